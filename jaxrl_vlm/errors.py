"""Errors that the user can correct. They are shown as one line, without a traceback."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
  """A mistake in flags, config, data or environment. The message is one line that says what to do.

  `config.run_cli` prints the message on stderr and exits with code 2.
  """


class WorkdirError(UserError):
  """The workdir contains a run with another config."""


def hint(name: str, valid: Iterable[str]) -> str:
  """Returns the end of a "no such ..." message: the valid names that are similar to `name`, or all.

  >>> hint("vpo", ["grpo", "vppo"])
  "did you mean 'vppo'?"
  """
  valid = sorted(valid)
  near = difflib.get_close_matches(name, valid, n=2, cutoff=0.6)
  if near:
    return f"did you mean {' or '.join(map(repr, near))}?"
  return f"valid: {', '.join(valid)}" if valid else "there are none"


@contextlib.contextmanager
def validation(prefix: str = "") -> Iterator[None]:
  """Converts a ValueError raised inside to a UserError whose message starts with `prefix`.

  Use it only for code that checks user input. A ValueError of other code is a bug and must keep its
  traceback.
  """
  try:
    yield
  except ValueError as error:
    raise UserError(prefix + one_line(str(error))) from error


def one_line(text: str) -> str:
  """Replaces each sequence of white space, including line breaks, by one space."""
  return " ".join(text.split())

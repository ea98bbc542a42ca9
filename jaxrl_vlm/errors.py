"""Errors that are the user's to fix: shown as one line, without a traceback."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
  """A mistake in flags, config, data or surroundings; the message is one line that says what to do.

  `config.run_cli` prints the message on stderr and exits with code 2.
  """


class WorkdirError(UserError):
  """The workdir holds the run of another config."""


def hint(name: str, valid: Iterable[str]) -> str:
  """The end of a "no such ..." message: the valid names nearest to `name`, else all of them.

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
  """Turns a ValueError raised inside into a UserError whose message starts with `prefix`.

  Only for code that checks the user's input: a ValueError from anywhere else is a bug and keeps
  its traceback.
  """
  try:
    yield
  except ValueError as error:
    raise UserError(prefix + one_line(str(error))) from error


def one_line(text: str) -> str:
  """`text` with every run of white space, line breaks included, as one space."""
  return " ".join(text.split())

"""Short patterns that name parts of a model: `decoder`, `!vision`, `layers/q`, `lora`."""

import fnmatch
from collections.abc import Sequence


def _holds(pattern: str, path: Sequence[str]) -> bool:
  parts = pattern.split("/")
  return any(
    all(fnmatch.fnmatchcase(name, part) for name, part in zip(path[i:], parts, strict=False))
    for i in range(len(path) - len(parts) + 1)
  )


def matches(patterns: Sequence[str], path: Sequence[str]) -> bool:
  """Whether the patterns choose a parameter or layer.

  A pattern is one or more names of consecutive levels of the path, with `*` as in file names:
  `decoder`, `layers/q`, `blocks*/qkv`. It is chosen if a pattern matches (or all patterns are
  negative) and no negative one (`!vision`) does.
  """
  positive = [p for p in patterns if not p.startswith("!")]
  negative = [p[1:] for p in patterns if p.startswith("!")]
  chosen = not positive or any(_holds(p, path) for p in positive)
  return chosen and not any(_holds(p, path) for p in negative)

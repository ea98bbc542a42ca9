"""Patterns that select parameters and layers by name: `decoder`, `!vision`, `layers/q`, `lora`."""

import fnmatch
from collections.abc import Sequence


def _matches_one(pattern: str, path: Sequence[str]) -> bool:
  parts = pattern.split("/")
  return any(
    all(fnmatch.fnmatchcase(name, part) for name, part in zip(path[i:], parts, strict=False))
    for i in range(len(path) - len(parts) + 1)
  )


def matches(patterns: Sequence[str], path: Sequence[str]) -> bool:
  """Returns whether the patterns select a parameter or layer.

  A pattern consists of the names of one or more consecutive levels of the path, separated by `/`.
  Names may contain wildcards as in file names: `decoder`, `layers/q`, `blocks*/qkv`. A pattern with
  `!`, such as `!vision`, excludes what it matches. A path is selected if at least one pattern
  without `!` matches it, or there is none, and no pattern with `!` matches it.

  Args:
    patterns: the patterns; () selects everything.
    path: names of the levels, as in `("decoder", "layers", "q", "kernel")`.
  """
  positive = [p for p in patterns if not p.startswith("!")]
  negative = [p[1:] for p in patterns if p.startswith("!")]
  chosen = not positive or any(_matches_one(p, path) for p in positive)
  return chosen and not any(_matches_one(p, path) for p in negative)

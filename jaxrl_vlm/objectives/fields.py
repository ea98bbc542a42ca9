"""Dataclass fields with a check of their values. A wrong value is an error of one line."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any


def _field(default: Any, valid: Callable[[Any], bool], expected: str) -> Any:
  return dataclasses.field(default=default, metadata={"valid": valid, "expected": expected})


def number(
  default: float | None,
  *,
  least: float = -math.inf,
  above: float = -math.inf,
  most: float = math.inf,
  optional: bool = False,
) -> Any:
  """A finite number x with least ≤ x ≤ most and x > above, or None if the field is optional."""

  def valid(x: Any) -> bool:
    if x is None:
      return optional
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
      return False
    return math.isfinite(x) and least <= float(x) <= most and float(x) > above

  bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", least), (">", above), ("<=", most))
            if math.isfinite(bound)]  # fmt: skip
  expected = " ".join(["a number", " and ".join(bounds)]).strip()
  return _field(default, valid, expected + (" or None" if optional else ""))


def count(default: int | None, *, least: int = 1, optional: bool = False) -> Any:
  """A whole number of at least `least`, or None if the field is optional."""

  def valid(x: Any) -> bool:
    if x is None:
      return optional
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and int(x) >= least

  return _field(default, valid, f"a whole number >= {least}" + (" or None" if optional else ""))


def flag(default: bool) -> Any:
  return _field(default, lambda x: isinstance(x, bool), "True or False")


def choice(default: str, names: Iterable[str]) -> Any:
  names = tuple(names)
  return _field(default, lambda x: x in names, f"one of {', '.join(map(repr, names))}")


def names(default: tuple[str, ...]) -> Any:
  """A tuple of at least one name. The names themselves are checked where they are known."""

  def valid(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) > 0 and all(isinstance(name, str) for name in x)

  return _field(default, valid, f"a tuple of names, e.g. {default!r}")


def check(instance: Any) -> None:
  """Raises ValueError for the first field of the dataclass with an invalid value."""
  for field in dataclasses.fields(instance):
    value = getattr(instance, field.name)
    if not field.metadata["valid"](value):
      raise ValueError(
        f"config.objective.{field.name}={value!r}: expected {field.metadata['expected']}"
      )


def did_you_mean(name: Any, known: Iterable[str]) -> str:
  """Returns "; did you mean 'x'?" for the known name that is closest, or an empty string."""
  close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]!r}?" if close else ""

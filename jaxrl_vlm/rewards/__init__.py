"""Rewards: weighted sums of verifiers, which are functions that grade a response.

A verifier is a function `(example: Example, text: str) -> float | dict[str, float]`. `text` is the
response. A config names verifiers and gives each one a weight.

This package does not import jax, because the worker processes of `rewards.pool` import it, and they
must not use an accelerator.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import cast

from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards import answers, maths

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127

Verifier = Callable[[Example, str], float | Mapping[str, float]]

_BUILTIN: dict[str, Verifier] = {
  "choice": answers.choice,
  "exact": answers.exact,
  "format": answers.response_format,
  "math": maths.math,
  "number": answers.number,
}

__all__ = ["Reward", "Verifier", "create", "metric_names", "resolve"]


class Reward:
  """A weighted sum of verifiers. Use `create` to make one."""

  def __init__(self, weights: Mapping[str, float]):
    _parts(weights)
    self.weights = dict(weights)

  def __call__(self, example: Example, text: str) -> dict[str, float]:
    """Grades one response.

    Args:
      example: the example that the response answers. If its `rewards` are not None, they replace
        the verifiers and weights of this reward.
      text: the response.

    Returns:
      The value of each verifier under its metric name, and their weighted sum under `total`. If a
      verifier returns a dict, the entry with the verifier's own name is its value. The other
      entries are reported as `name/entry` and do not count in the sum.

    Raises:
      ValueError: a verifier returned something other than finite numbers, or a value or the
        weighted sum is too large for float32.
      Exception: the exception that a verifier raised, with a note that names the verifier.
    """
    weights = self.weights if example.rewards is None else example.rewards
    result, total = {}, 0.0
    for name, weight, verifier in _parts(weights):
      try:
        value = verifier(example, text)
        values = dict(value) if isinstance(value, Mapping) else {name: value}
        if name not in values:
          raise ValueError(
            f"returned the entries {sorted(values)}, expected also the entry {name!r}"
          )
        for entry, number in values.items():
          result[name if entry == name else f"{name}/{entry}"] = _finite(entry, number)
      except BaseException as error:
        error.add_note(f"in verifier {name!r}")
        raise
      total += weight * result[name]
    if not fits_float32(total):
      raise ValueError(
        f"the weighted sum of the rewards is {total}, expected a number that float32 can hold"
      )
    return {**result, "total": total}


def create(weights: Mapping[str, float]) -> Reward:
  """Makes a reward from verifiers and their weights: `create({"math": 0.9, "format": 0.1})`.

  A key is the name of a built-in verifier (choice, exact, format, math, number) or the location of
  a function: "package.module:function" or "path/to/file.py:function". The metric of a function has
  the name of the function.

  Raises:
    ValueError: there are no weights, a weight is not a finite number in float32, a key does not
      name a verifier, or two keys have the same metric name.
  """
  return Reward(weights)


def metric_names(weights: Mapping[str, float]) -> tuple[str, ...]:
  """Returns the metric name of each verifier, in order. Raises the same errors as `create`."""
  return tuple(name for name, _, _ in _parts(weights))


@functools.cache
def resolve(key: str) -> Verifier:
  """Returns the verifier that a key names (see `create`). Raises ValueError if there is none."""
  if key in _BUILTIN:
    return _BUILTIN[key]
  where, colon, name = key.rpartition(":")
  if not colon:
    guess = difflib.get_close_matches(key, _BUILTIN, n=1)
    raise ValueError(
      f"rewards: {key!r}: no such verifier;"
      + (f" did you mean {guess[0]!r}?" if guess else "")
      + f" known: {', '.join(_BUILTIN)}, 'package.module:function' and 'path/to/file.py:function'"
    )
  try:
    module = _load_file(where) if where.endswith(".py") else importlib.import_module(where)
  except FileNotFoundError as error:
    raise ValueError(f"rewards: {key!r}: no such file: {error.filename}") from None
  except Exception as error:
    raise ValueError(f"rewards: {key!r}: cannot import: {type(error).__name__}: {error}") from error
  verifier = getattr(module, name, None)
  if not callable(verifier):
    known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
    problem = (
      "no such function"
      if verifier is None
      else f"expected a function, got {type(verifier).__name__}"
    )
    raise ValueError(f"rewards: {key!r}: {problem}; {where} has: {', '.join(known) or 'none'}")
  return cast(Verifier, verifier)


def _parts(weights: Mapping[str, float]) -> tuple[tuple[str, float, Verifier], ...]:
  """Returns (metric name, weight, verifier) for each key. Raises the same errors as `create`."""
  if not isinstance(weights, Mapping) or not weights:
    raise ValueError(f"rewards={weights!r}: expected a mapping such as {{'math': 0.9}}")
  for key, weight in weights.items():
    if not isinstance(key, str):
      raise ValueError(f"rewards: {key!r}: expected the name of a verifier")
    if not isinstance(weight, int | float) or not fits_float32(weight):
      shown = (
        f"an integer of {weight.bit_length()} bits" if isinstance(weight, int) else repr(weight)
      )
      raise ValueError(f"rewards[{key!r}]={shown}: expected a weight that is finite in float32")
  return _cached_parts(tuple(weights.items()))


@functools.lru_cache(maxsize=1024)
def _cached_parts(
  weights: tuple[tuple[str, float], ...],
) -> tuple[tuple[str, float, Verifier], ...]:
  keys = {"total": "the weighted sum"}
  parts = []
  for key, weight in weights:
    verifier = resolve(key)
    name = key.rpartition(":")[2]
    if name in keys:
      raise ValueError(
        f"rewards: {key!r}: its metric name {name!r} is already used by {keys[name]!r}"
      )
    keys[name] = key
    parts.append((name, float(weight), verifier))
  return tuple(parts)


def _finite(entry: str, value: object) -> float:
  """Returns the value as a float. Raises ValueError unless it is a finite number in float32."""
  if isinstance(value, str | bytes):
    raise ValueError(f"returned {entry}={value!r}, expected a number")
  try:
    number = float(value)  # type: ignore[arg-type]
  except OverflowError:  # an integer that even float64 cannot hold
    raise ValueError(
      f"returned {entry} of type {type(value).__name__} that is too large, expected a number that "
      "float32 can hold"
    ) from None
  except TypeError:
    raise ValueError(
      f"returned {entry} of type {type(value).__name__}, expected a number"
    ) from None
  if not math.isfinite(number):
    raise ValueError(f"returned {entry}={number}, expected a finite number")
  if not fits_float32(number):
    raise ValueError(f"returned {entry}={number}, expected a number that float32 can hold")
  return number


def fits_float32(number: float) -> bool:
  """Returns whether the number is finite in float32, the type of the arrays of rewards."""
  return abs(number) <= _FLOAT32_MAX  # also False for NaN


def _load_file(path: str):
  path = os.path.abspath(os.path.expanduser(path))
  if not os.path.isfile(path):
    raise FileNotFoundError(2, "no such file", path)
  name = "jaxrl_vlm_verifiers_" + hashlib.sha256(path.encode()).hexdigest()[:16]
  if name in sys.modules:
    return sys.modules[name]
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec is not None and spec.loader is not None
  module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module

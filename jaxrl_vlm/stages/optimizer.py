"""The optimizer: AdamW with gradient clipping, a schedule, and options for storing its state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_vlm.types import Array

MOMENTS = ("float32", "bfloat16", "host")


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
  """Creates AdamW with global-norm gradient clipping.

  Args:
    config: `optimizer` of a stage.
    steps: number of updates of the stage, after which a decaying learning rate is 0.

  Raises:
    ValueError: `moments` or `schedule` is unknown.
  """
  if config.moments not in MOMENTS:
    raise ValueError(
      f"config.optimizer.moments={config.moments!r}: expected one of {', '.join(MOMENTS)}"
    )
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(steps - warmup, 1)
  schedules = {
    "constant": lambda: optax.constant_schedule(peak),
    "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
  }
  if config.schedule not in schedules:
    raise ValueError(
      f"config.optimizer.schedule={config.schedule!r}: expected one of {', '.join(schedules)}"
    )
  schedule = schedules[config.schedule]()
  if warmup:
    ramp = optax.linear_schedule(peak / warmup, peak, warmup)
    schedule = optax.join_schedules([ramp, schedule], [warmup])
  adamw = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
  if config.moments == "bfloat16":
    adamw = in_bfloat16(adamw)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


class Rounded(NamedTuple):
  """State of `in_bfloat16`.

  Attributes:
    inner: state of the wrapped transformation.
    count: i32 scalar; number of updates, from which the random numbers for rounding are derived.
  """

  inner: Any
  count: Array


def in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Wraps a transformation so that its state is stored in bfloat16. It still computes in float32.

  With `b2` = 0.999, an update typically changes a second moment by less than half of the last digit
  of bfloat16, so rounding to the nearest value would discard the change. The state is therefore
  rounded stochastically, up or down, so that its expected value is exact.
  """

  def wide(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)

  def narrow(tree, count):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
    return jax.tree.unflatten(
      treedef,
      [
        _rounded(key, a) if a.dtype == jnp.float32 and a.ndim else a
        for key, a in zip(keys, leaves, strict=True)
      ],
    )

  def init(params):
    count = jnp.zeros((), jnp.int32)
    return Rounded(narrow(inner.init(params), count), count)

  def update(updates, state, params=None):
    updates, new = inner.update(updates, wide(state.inner), params)
    return updates, Rounded(narrow(new, state.count + 1), state.count + 1)

  return optax.GradientTransformation(init, update)


def _rounded(key: Array, a: Array) -> Array:
  """Rounds float32 stochastically to bfloat16.

  The result is one of the two neighbouring bfloat16 values, the closer one with higher probability.
  """
  bits = jax.lax.bitcast_convert_type(a, jnp.uint32)
  bits = (bits + jax.random.bits(key, a.shape, jnp.uint16)) & jnp.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)

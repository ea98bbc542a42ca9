"""How a token is drawn from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_vlm.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How responses are drawn.

  Attributes:
    num_samples: G, responses per prompt.
    max_tokens: T, the most tokens of a response, the end token included.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: keep the likeliest tokens whose probabilities sum to this.
    top_k: keep this many of the likeliest tokens; 0 keeps all.
  """

  num_samples: int = 1
  max_tokens: int = 256
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0

  def __post_init__(self):
    for name, ok, want in (
      ("num_samples", self.num_samples >= 1, "at least 1"),
      ("max_tokens", self.max_tokens >= 1, "at least 1"),
      ("temperature", self.temperature >= 0, "0 or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("top_k", self.top_k >= 0, "0 or more"),
    ):
      if not ok:
        raise ValueError(f"sampling.{name}={getattr(self, name)!r}: expected {want}")


def truncate(logits: Array, top_p: float, top_k: int) -> Array:
  """Sets to -inf what top-k and top-p leave out. logits: f32[..., V]."""
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # A token stays if what is likelier than it does not reach top_p: the first always stays.
    keep_sorted = jnp.cumsum(probs, axis=-1) - probs < top_p
    keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(keep, logits, -jnp.inf)
  return logits


def pick(keys: Array, logits: Array, sampling: Sampling) -> tuple[Array, Array]:
  """A token i32[...] and its log-probability before truncation, from logits f32[..., V].

  `keys` [...]: one for each row, so that a draw does not depend on what else is in the batch.
  """
  top = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  total = weights.sum(axis=-1)
  if sampling.temperature == 0:
    token = jnp.argmax(logits, axis=-1)
  else:
    if sampling.top_k or sampling.top_p < 1:
      weights = jnp.exp(truncate(logits, sampling.top_p, sampling.top_k) - top)
    token = draw(keys, weights)
  chosen = jnp.take_along_axis(logits - top, token[..., None], axis=-1)[..., 0]
  return token.astype(jnp.int32), chosen - jnp.log(total)


def draw(keys: Array, weights: Array, block: int = 256) -> Array:
  """An index i32[...] with a probability in proportion to its weight; weights: f32[..., V] >= 0.

  By one random number a row, first a block of indices and then one within it: Gumbel noise would
  take V random numbers, which cost as much as a small model.
  """
  uniform = jax.random.uniform
  for _ in keys.shape:
    uniform = jax.vmap(uniform)
  size = weights.shape[-1]
  room = [(0, 0)] * (weights.ndim - 1) + [(0, -size % block)]
  weights = jnp.pad(weights, room).reshape(*weights.shape[:-1], -1, block)
  sums = weights.sum(axis=-1)

  def first_above(sums, at):  # of running sums; and what is left of `at` there
    below = jnp.cumsum(sums, axis=-1)
    # Running sums are rounded, and not always in order: what has no weight is never chosen, and
    # where none is above it is the last that has some.
    above = (below > at[..., None]) & (sums > 0)
    last = jnp.where(sums > 0, jnp.arange(sums.shape[-1]), 0).max(axis=-1)
    index = jnp.where(above.any(axis=-1), jnp.argmax(above, axis=-1), last)
    before = jnp.take_along_axis(below - sums, index[..., None], axis=-1)[..., 0]
    return index, at - before

  of_block, rest = first_above(sums, uniform(keys) * sums.sum(axis=-1))
  within = jnp.take_along_axis(weights, of_block[..., None, None], axis=-2)[..., 0, :]
  index, _ = first_above(within, jnp.maximum(rest, 0.0))
  return (of_block * block + index).astype(jnp.int32)

"""Sampling of a token from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_vlm.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling parameters of responses.

  Attributes:
    num_samples: G, the number of responses per prompt.
    max_tokens: T, the maximum number of tokens of a response, including the end token.
    temperature: divides the logits. 0 selects the most likely token.
    top_p: keeps the smallest set of most likely tokens whose probabilities sum to at least this
      value. 1 keeps all tokens.
    top_k: keeps this many of the most likely tokens. 0 keeps all tokens.
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
  """Sets the logits that top-k and top-p exclude to -inf. logits: f32[..., V]."""
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # A token is kept if the sum over all more likely tokens is below top_p. The most likely token
    # is therefore always kept.
    keep_sorted = jnp.cumsum(probs, axis=-1) - probs < top_p
    keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(keep, logits, -jnp.inf)
  return logits


def pick(keys: Array, logits: Array, sampling: Sampling) -> tuple[Array, Array]:
  """Samples a token from each row of logits.

  Args:
    keys: [...]; one random key per row, so that a token does not depend on the rest of the batch.
    logits: f32[..., V]; already divided by the temperature.
    sampling: `top_p` and `top_k` apply here; at temperature 0 the most likely token is selected.

  Returns:
    The token i32[...] and its log-probability f32[...] before truncation by top-k and top-p.
  """
  top = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  total = weights.sum(axis=-1)
  if sampling.temperature == 0:
    token = jnp.argmax(logits, axis=-1)
  else:
    if sampling.top_k or sampling.top_p < 1:
      weights = jnp.exp(truncate(logits, sampling.top_p, sampling.top_k) - top)
    token = sample_index(keys, weights)
  chosen = jnp.take_along_axis(logits - top, token[..., None], axis=-1)[..., 0]
  return token.astype(jnp.int32), chosen - jnp.log(total)


def sample_index(keys: Array, weights: Array, block: int = 256) -> Array:
  """Samples an index from each row with probability proportional to its weight.

  The function inverts the cumulative distribution with one random number per row: first over blocks
  of `block` indices, then within the chosen block. The Gumbel trick needs V random numbers per row
  instead.

  Args:
    keys: [...]; one random key per row.
    weights: f32[..., V], at least 0.
    block: number of consecutive indices in a block.

  Returns:
    i32[...]; never an index of weight 0 if the row has a positive weight.
  """
  uniform = jax.random.uniform
  for _ in keys.shape:
    uniform = jax.vmap(uniform)
  size = weights.shape[-1]
  padding = [(0, 0)] * (weights.ndim - 1) + [(0, -size % block)]
  weights = jnp.pad(weights, padding).reshape(*weights.shape[:-1], -1, block)
  sums = weights.sum(axis=-1)

  def first_above(values, threshold):
    """The first index whose cumulative sum exceeds the threshold, and the remaining threshold."""
    cumulative = jnp.cumsum(values, axis=-1)
    # Cumulative sums are rounded and not always increasing. An index without weight is never
    # chosen, and if no sum exceeds the threshold, the last index with a weight is chosen.
    above = (cumulative > threshold[..., None]) & (values > 0)
    last = jnp.where(values > 0, jnp.arange(values.shape[-1]), 0).max(axis=-1)
    index = jnp.where(above.any(axis=-1), jnp.argmax(above, axis=-1), last)
    before = jnp.take_along_axis(cumulative - values, index[..., None], axis=-1)[..., 0]
    return index, threshold - before

  of_block, rest = first_above(sums, uniform(keys) * sums.sum(axis=-1))
  within = jnp.take_along_axis(weights, of_block[..., None, None], axis=-2)[..., 0, :]
  index, _ = first_above(within, jnp.maximum(rest, 0.0))
  return (of_block * block + index).astype(jnp.int32)

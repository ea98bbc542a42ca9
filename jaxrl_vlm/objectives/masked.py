"""Sums and means over the response tokens that count."""

import jax.numpy as jnp
import numpy as np

from jaxrl_vlm.types import Array

AGGREGATIONS = (
  "token-mean",
  "seq-mean-token-mean",
  "seq-mean-token-sum",
  "seq-mean-token-sum-norm",
)


def masked_fill(x: Array, mask: Array) -> Array:
  """x in float32, 0 where mask is false: whatever stands there (also inf and nan) has no effect."""
  return jnp.where(mask, jnp.asarray(x).astype(jnp.float32), 0.0)


def masked_sum(x: Array, mask: Array, axis: int | None = None) -> Array:
  """Σ x over the true positions of mask; the reduced axis stays, with length 1, if one is named."""
  return jnp.sum(masked_fill(x, mask), axis=axis, keepdims=axis is not None)


def masked_mean(x: Array, mask: Array, axis: int | None = None) -> Array:
  """Mean of x over the true positions of mask; 0 where there are none."""
  count = jnp.sum(mask, axis=axis, keepdims=axis is not None)
  return masked_sum(x, mask, axis) / jnp.maximum(count, 1)


def masked_whiten(x: Array, mask: Array) -> Array:
  """(x − mean) / √(var + 1e-8) over all true positions at once, unbiased variance; 0 elsewhere.

  x is shifted by its minimum first, so equal values give exactly 0.
  """
  x = masked_fill(x - jnp.min(jnp.where(mask, x, jnp.inf)), mask)
  centered = masked_fill(x - masked_mean(x, mask), mask)
  variance = jnp.sum(centered**2) / jnp.maximum(jnp.sum(mask) - 1, 1)
  return centered / jnp.sqrt(variance + 1e-8)


def aggregation_weights(mask: Array, aggregation: str, length: int | None = None) -> Array:
  """What each token weighs when a token loss [P, G, T] becomes one number: loss = Σ weight · x.

  n_i response tokens of response i, N responses with at least one token, all over the whole array:

      token-mean                 1 / Σ n_i          DAPO, verl and EasyR1's default
      seq-mean-token-mean        1 / (N n_i)        the GRPO paper
      seq-mean-token-sum         1 / N
      seq-mean-token-sum-norm    1 / (N length)     Dr.GRPO

  Returns f32[P, G, T], 0 where masked. Responses without tokens count nowhere.
  """
  tokens = jnp.sum(mask, axis=-1, keepdims=True)
  responses = jnp.maximum(jnp.sum(tokens > 0), 1)
  denominator = {
    "token-mean": jnp.sum(tokens),
    "seq-mean-token-mean": responses * tokens,
    "seq-mean-token-sum": responses,
    "seq-mean-token-sum-norm": responses * (length or 1),
  }[aggregation]
  return mask / jnp.maximum(denominator, 1).astype(jnp.float32)


def top_share(scores: Array, mask: Array, share: float) -> Array:
  """The ⌈share · n⌉ highest scores among the n true positions of each row's last axis, as bool.

  Of equal scores the earlier one ranks first.
  """
  # From the host in float64: ⌈0.4 · 5⌉ is 2 on every device.
  counts = np.ceil(np.round(share * np.arange(mask.shape[-1] + 1), 9)).astype(np.int32)
  count = jnp.asarray(counts)[jnp.sum(mask, axis=-1, keepdims=True)]
  order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return mask & (rank < count)


def above_quantile(scores: Array, mask: Array, quantile: float) -> Array:
  """Where scores are at least that quantile of the n true positions of the last axis, as bool.

  The quantile lies between two scores in general (torch's and numpy's linear interpolation); what
  is at least that is what is at least the upper one, number ⌈quantile (n − 1)⌉ from 0, and ties.
  """
  # From the host in float64, as in `top_share`.
  places = np.maximum(np.arange(mask.shape[-1] + 1) - 1, 0)
  index = np.ceil(np.round(quantile * places, 9)).astype(np.int32)
  index = jnp.asarray(index)[jnp.sum(mask, axis=-1, keepdims=True)]
  ascending = jnp.sort(jnp.where(mask, scores, jnp.inf), axis=-1)
  return mask & (scores >= jnp.take_along_axis(ascending, index, axis=-1))

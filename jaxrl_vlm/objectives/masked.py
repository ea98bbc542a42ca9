"""Sums, means and ranks over response tokens, without masked positions."""

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
  """Returns x in float32, with 0 where the mask is false. Values there may be inf or NaN."""
  return jnp.where(mask, jnp.asarray(x).astype(jnp.float32), 0.0)


def masked_sum(x: Array, mask: Array, axis: int | None = None) -> Array:
  """Returns the sum of x where the mask is true. A given axis is kept with length 1."""
  return jnp.sum(masked_fill(x, mask), axis=axis, keepdims=axis is not None)


def masked_mean(x: Array, mask: Array, axis: int | None = None) -> Array:
  """Returns the mean of x where the mask is true, or 0 if it is true nowhere."""
  count = jnp.sum(mask, axis=axis, keepdims=axis is not None)
  return masked_sum(x, mask, axis) / jnp.maximum(count, 1)


def masked_whiten(x: Array, mask: Array) -> Array:
  """Returns (x − mean) / √(var + 1e-8) where the mask is true, and 0 elsewhere.

  Mean and unbiased variance are over all positions where the mask is true. Equal values give
  exactly 0, because x is first shifted by its minimum.
  """
  x = masked_fill(x - jnp.min(jnp.where(mask, x, jnp.inf)), mask)
  centered = masked_fill(x - masked_mean(x, mask), mask)
  variance = jnp.sum(centered**2) / jnp.maximum(jnp.sum(mask) - 1, 1)
  return centered / jnp.sqrt(variance + 1e-8)


def aggregation_weights(mask: Array, aggregation: str, length: int | None = None) -> Array:
  """Returns the weights that combine a token loss [P, G, T] into one number: loss = Σ weight · x.

  With n_i tokens in response i, and N responses with at least one token in the whole array:

      token-mean                 1 / Σ n_i          DAPO, and the default of verl and EasyR1
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
  """Selects the ⌈share · n⌉ highest scores among the n unmasked positions along the last axis.

  Among equal scores, the earlier one ranks first.
  """
  # Computed on the host in float64, so that ⌈0.4 · 5⌉ is 2 on every device.
  counts = np.ceil(np.round(share * np.arange(mask.shape[-1] + 1), 9)).astype(np.int32)
  count = jnp.asarray(counts)[jnp.sum(mask, axis=-1, keepdims=True)]
  order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return mask & (rank < count)


def above_quantile(scores: Array, mask: Array, quantile: float) -> Array:
  """Selects scores of at least the quantile of the n unmasked positions along the last axis.

  In general, the quantile lies between two scores (linear interpolation, as in torch and numpy). A
  score reaches it if it reaches the upper one of these two, which has index ⌈quantile (n − 1)⌉ in
  ascending order.
  """
  # Computed on the host in float64, as in `top_share`.
  places = np.maximum(np.arange(mask.shape[-1] + 1) - 1, 0)
  index = np.ceil(np.round(quantile * places, 9)).astype(np.int32)
  index = jnp.asarray(index)[jnp.sum(mask, axis=-1, keepdims=True)]
  ascending = jnp.sort(jnp.where(mask, scores, jnp.inf), axis=-1)
  return mask & (scores >= jnp.take_along_axis(ascending, index, axis=-1))

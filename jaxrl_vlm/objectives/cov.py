"""Clip-Cov and KL-Cov: restraint only on the tokens that would collapse the entropy.

Both look at how far a token is to one side in advantage and in log-probability at once,

    cov_t = (A_t − mean A)(l_t − mean l),

with l of the current policy and means over the minibatch's tokens. Which tokens that chooses is
decided once for a whole minibatch (from `Experience.current`), where verl decides in every
microbatch: so the loss does not depend on how a minibatch is split.

Source: Cui et al. 2025, arXiv 2505.22617; verl's `clip_cov` and `kl_cov`.
"""

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import masked, ppo
from jaxrl_vlm.types import Array


def clip_cov(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  cov_tokens: Array,
  clip_low: float,
  clip_high: float,
) -> ppo.TokenLoss:
  """PPO's clipped surrogate without the chosen tokens, which get no gradient."""
  del mask
  log_ratio = ppo.log_ratio(logp, old_logp)
  loss, metrics = ppo.clipped_surrogate(log_ratio, advantages, clip_low, clip_high, None)
  return jnp.where(cov_tokens > 0, 0.0, loss), metrics | {"cov_tokens": cov_tokens}


def kl_cov(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  cov_tokens: Array,
  cov_coef: float,
) -> ppo.TokenLoss:
  """L = −A r, plus coef · |l − o| on the chosen tokens."""
  del mask
  loss = -advantages * jnp.exp(ppo.log_ratio(logp, old_logp))
  loss = loss + jnp.where(cov_tokens > 0, cov_coef * jnp.abs(logp - old_logp), 0.0)
  return loss, {"cov_tokens": cov_tokens}


def choose_for_kl(
  now: Array, old_logp: Array, advantages: Array, mask: Array, *, cov_share: float
) -> Array:
  """The max(1, ⌊share · tokens⌋) tokens of largest covariance, as bool[P, G, T]."""
  del old_logp
  covariance = _covariance(now, advantages, mask)
  return mask & _smallest(jnp.where(mask, -covariance, jnp.inf), _count(mask, cov_share))


def choose_for_clip(
  now: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  cov_share: float,
  cov_low: float,
  cov_high: float,
  clip_low: float,
  clip_high: float,
) -> Array:
  """max(1, ⌊share · tokens⌋) random tokens with cov_low < cov < cov_high that PPO does not clip.

  All of them where there are fewer. What is drawn depends on nothing but the bits of the tokens'
  log-probabilities under the sampling policy: as good as random, and the same whatever the order,
  padding or split of the minibatch. Of tokens with the same bits the earlier one ranks first.
  """
  covariance = _covariance(now, advantages, mask)
  _, clips = ppo.clipped_surrogate(
    ppo.log_ratio(now, old_logp), advantages, clip_low, clip_high, None
  )
  clipped = clips["clip_high"] | clips["clip_low"]
  eligible = mask & ~clipped & (covariance > cov_low) & (covariance < cov_high)
  draws = jnp.where(eligible, _hash(old_logp), 2.0)
  return eligible & _smallest(draws, _count(mask, cov_share))


def _covariance(now: Array, advantages: Array, mask: Array) -> Array:
  return (advantages - masked.masked_mean(advantages, mask)) * (now - masked.masked_mean(now, mask))


def _count(mask: Array, share: float) -> Array:
  return jnp.maximum(jnp.floor(share * jnp.sum(mask) + 1e-4).astype(jnp.int32), 1)


def _smallest(x: Array, count: Array) -> Array:
  """Where the `count` smallest values of the array stand."""
  order = jnp.argsort(x.ravel(), stable=True)
  return (jnp.argsort(order) < count).reshape(x.shape)


def _hash(x: Array) -> Array:
  """Numbers in [0, 1) from the bits of float32 (the finalizer of MurmurHash3)."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
  return (bits ^ (bits >> 16)).astype(jnp.float32) / 2.0**32


# Policy loss -> which tokens it chooses; the keyword-only arguments are fields of the objective.
CHOOSE = {"clip_cov": choose_for_clip, "kl_cov": choose_for_kl}

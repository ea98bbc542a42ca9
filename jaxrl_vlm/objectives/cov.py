"""Clip-Cov and KL-Cov: restrict only the tokens that reduce the entropy most.

Both methods select tokens by the covariance of advantage and log-probability,

    cov_t = (A_t − mean A)(l_t − mean l),

where l is the log-probability under the current policy and the means are over the tokens of the
minibatch. The selection uses the whole minibatch (`Experience.current`), so the loss does not
depend on how the minibatch is split. verl selects tokens in each microbatch.

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
  """The clipped loss of PPO without the selected tokens, which have no gradient."""
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
  """L = −A r, plus coef · |l − o| for the selected tokens."""
  del mask
  loss = -advantages * jnp.exp(ppo.log_ratio(logp, old_logp))
  loss = loss + jnp.where(cov_tokens > 0, cov_coef * jnp.abs(logp - old_logp), 0.0)
  return loss, {"cov_tokens": cov_tokens}


def choose_for_kl(
  now: Array, old_logp: Array, advantages: Array, mask: Array, *, cov_share: float
) -> Array:
  """Selects the max(1, ⌊share · tokens⌋) tokens with the largest covariance: bool[P, G, T]."""
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
  """Selects max(1, ⌊share · tokens⌋) random tokens with cov_low < cov < cov_high.

  Tokens that PPO clips are excluded. If fewer tokens are eligible, all of them are selected.
  Instead of a random key, the choice uses a hash of the bits of each token's log-probability under
  the sampling policy. So it does not depend on order, padding or split of the minibatch. Among
  tokens with equal bits, the earlier one ranks first.
  """
  covariance = _covariance(now, advantages, mask)
  _, clips = ppo.clipped_surrogate(
    ppo.log_ratio(now, old_logp), advantages, clip_low, clip_high, None
  )
  clipped = clips["clip_high"] | clips["clip_low"]
  eligible = mask & ~clipped & (covariance > cov_low) & (covariance < cov_high)
  hashes = jnp.where(eligible, _hash(old_logp), 2.0)
  return eligible & _smallest(hashes, _count(mask, cov_share))


def _covariance(now: Array, advantages: Array, mask: Array) -> Array:
  return (advantages - masked.masked_mean(advantages, mask)) * (now - masked.masked_mean(now, mask))


def _count(mask: Array, share: float) -> Array:
  return jnp.maximum(jnp.floor(share * jnp.sum(mask) + 1e-4).astype(jnp.int32), 1)


def _smallest(x: Array, count: Array) -> Array:
  """Selects the `count` smallest values of the array, as bool."""
  order = jnp.argsort(x.ravel(), stable=True)
  return (jnp.argsort(order) < count).reshape(x.shape)


def _hash(x: Array) -> Array:
  """Hashes the bits of float32 values to numbers in [0, 1) (the finalizer of MurmurHash3)."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
  return (bits ^ (bits >> 16)).astype(jnp.float32) / 2.0**32


# The function that selects the tokens of each policy loss. Its keyword-only arguments are fields.
CHOOSE = {"clip_cov": choose_for_clip, "kl_cov": choose_for_kl}

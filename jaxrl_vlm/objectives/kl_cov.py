"""KL-Cov: a KL penalty only on the tokens that would collapse the entropy."""

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import masked, ppo
from jaxrl_vlm.types import Array


def kl_cov(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  cov_share: float,
  cov_coef: float,
) -> ppo.TokenLoss:
  """L = −A r, plus coef · |l − o| on the share of tokens with the largest covariance.

      cov_t = (A_t − mean A)(l_t − mean l),  max(1, ⌊share · tokens⌋) tokens

  Means and ranks are over the array this function is given, as in verl: with gradient accumulation
  it is the one policy loss whose value depends on how a minibatch is split.

  Source: Cui et al. 2025, arXiv 2505.22617 (share 2e-4 to 2e-3, coef 1); verl's `kl_cov`.
  """
  now = jax.lax.stop_gradient(logp)
  covariance = (advantages - masked.masked_mean(advantages, mask)) * (
    now - masked.masked_mean(now, mask)
  )
  count = jnp.maximum(jnp.floor(cov_share * jnp.sum(mask) + 1e-4).astype(jnp.int32), 1)
  order = jnp.argsort(jnp.where(mask, -covariance, jnp.inf).ravel(), stable=True)
  chosen = mask & (jnp.argsort(order) < count).reshape(mask.shape)
  loss = -advantages * jnp.exp(ppo.log_ratio(logp, old_logp))
  loss = loss + jnp.where(chosen, cov_coef * jnp.abs(logp - old_logp), 0.0)
  return loss, {"cov_tokens": chosen}

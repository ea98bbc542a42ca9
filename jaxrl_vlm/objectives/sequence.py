"""Policy losses with one importance ratio per response (GSPO, GMPO).

All of them are token losses. Their mean over the tokens of a response (seq-mean-token-mean) equals
the sequence loss, with the same gradient.

They differ if a token filter, such as that of VPPO, drops tokens. In `gspo_token` and `gmpo`, the
loss of a token has a gradient only through the log-probability of this token, so dropped tokens
have no gradient. In `gspo`, the loss of each kept token has a gradient through all tokens of its
response.
"""

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import masked, ppo
from jaxrl_vlm.types import Array


def _per_token(sequence: Array, token: Array) -> Array:
  """sg[sequence] + token − sg[token]."""
  return jax.lax.stop_gradient(sequence) + token - jax.lax.stop_gradient(token)


def gspo(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  clip_low: float,
  clip_high: float,
  clip_dual: float | None,
) -> ppo.TokenLoss:
  """PPO's clipped surrogate with log r = mean_t (l − o) on every token of a response.

  Source: Zheng et al. 2025 (GSPO), arXiv 2507.18071; EasyR1's `gspo`. If the tokens of a response
  have different advantages, for example after whitening, each token uses its own.
  """
  sequence = masked.masked_mean(logp - old_logp, mask, axis=-1)
  ratio = jnp.broadcast_to(jnp.clip(sequence, -20.0, 20.0), mask.shape)
  return ppo.clipped_surrogate(ratio, advantages, clip_low, clip_high, clip_dual)


def gspo_token(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  clip_low: float,
  clip_high: float,
  clip_dual: float | None,
) -> ppo.TokenLoss:
  """PPO's clipped surrogate with log r_t = sg[mean_t (l − o)] + l_t − sg[l_t].

  Source: GSPO-token of the same paper. EasyR1's `gspo_token` has the dual clip. In verl it is
  called `gspo`, has no dual clip (`clip_dual=None`), and clamps the log-ratio at 10.
  """
  sequence = masked.masked_mean(logp - old_logp, mask, axis=-1)
  ratio = jnp.clip(_per_token(sequence, logp), -20.0, 20.0)
  return ppo.clipped_surrogate(ratio, advantages, clip_low, clip_high, clip_dual)


def gmpo(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  clip_low: float,
  clip_high: float,
) -> ppo.TokenLoss:
  """Geometric mean of token ratios. Each is clipped on the side to which its advantage pushes.

      L_i = −A_i · exp(mean_t d_t),  d = sign(A) · min(sign(A) Δ, sign(A) clamp(Δ, −ε_l, ε_h))

  The clip bounds apply to the logarithm of the ratio. With seq-mean-token-mean, this is the loss of
  the paper.
  Source: Zhao et al. 2025 (GMPO), arXiv 2507.20673; verl's `geo_mean`.
  """
  delta = ppo.log_ratio(logp, old_logp)
  sign = jnp.sign(advantages)
  bounded = jnp.clip(delta, -clip_low, clip_high)
  d = sign * jnp.minimum(sign * delta, sign * bounded)
  metrics = {
    "clip_high": (delta > clip_high) & (advantages > 0),
    "clip_low": (delta < -clip_low) & (advantages < 0),
  }
  ratio = jnp.exp(_per_token(masked.masked_mean(d, mask, axis=-1), d))
  return -masked.masked_mean(advantages, mask, axis=-1) * ratio, metrics

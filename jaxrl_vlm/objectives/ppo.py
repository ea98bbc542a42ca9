"""Token losses of the PPO family: functions of the log-ratio of current and sampling policy.

A policy loss is `f(logp, old_logp, advantages, mask, *, ...) -> (token loss, token metrics)`. All
arrays are f32[P, G, T] and 0 where the mask is false. The keyword arguments are fields of the
objective.

Notation: l and o are the log-probabilities of the token under the current and the sampling policy,
Δ = clamp(l − o, ±20), r = exp Δ, A is the advantage, and sg is stop-gradient.
"""

import jax
import jax.numpy as jnp

from jaxrl_vlm.types import Array

TokenLoss = tuple[Array, dict[str, Array]]


def log_ratio(logp: Array, old_logp: Array) -> Array:
  """Returns Δ = clamp(l − o, ±20). The clamp keeps exp(Δ) · A far below the float32 maximum."""
  return jnp.clip(logp - old_logp, -20.0, 20.0)


def clipped_surrogate(
  log_ratio: Array,
  advantages: Array,
  clip_low: float,
  clip_high: float,
  clip_dual: float | None,
) -> TokenLoss:
  """L = max(−A r, −A clip(r, 1−ε_l, 1+ε_h)); for A < 0 also L ≤ −A c. See `dual_clip`."""
  ratio = jnp.exp(log_ratio)
  plain = -advantages * ratio
  clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  loss = jnp.maximum(plain, clipped)
  metrics = {
    "clip_high": (clipped > plain) & (advantages > 0),
    "clip_low": (clipped > plain) & (advantages < 0),
  }
  if clip_dual is not None:
    bound = -advantages * clip_dual
    metrics["clip_dual"] = (loss > bound) & (advantages < 0)
    loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
  return loss, metrics


def dual_clip(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  clip_low: float,
  clip_high: float,
  clip_dual: float | None,
) -> TokenLoss:
  """PPO's clipped surrogate with the dual clip. The loss is min(L, −A c) if A < 0, otherwise L.

      L = max(−A r, −A clip(r, 1−ε_l, 1+ε_h))

  EasyR1 clips Δ to [log(1−ε_l), log(1+ε_h)] and verl clips r. Values and gradients are the same.

  c is `clip_dual`. If it is None, there is no dual clip.

  Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7. Dual clip: Ye et al. 2019, arXiv
  1912.09729. Separate ε_l and ε_h: DAPO, arXiv 2503.14476.
  """
  del mask
  return clipped_surrogate(log_ratio(logp, old_logp), advantages, clip_low, clip_high, clip_dual)


def cispo(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  clip_low: float,
  clip_high: float,
) -> TokenLoss:
  """L = −sg[clip(r, 1−ε_l, 1+ε_h)] · A · l. Unlike in PPO, a clipped token keeps its gradient.

  Source: MiniMax-M1, arXiv 2506.13585, which has no lower bound: ε_l = 1.
  """
  del mask
  ratio = jnp.exp(log_ratio(logp, old_logp))
  clipped = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
  metrics = {"clip_high": ratio > 1.0 + clip_high, "clip_low": ratio < 1.0 - clip_low}
  return -clipped * advantages * logp, metrics


def sapo(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  tau_positive: float,
  tau_negative: float,
) -> TokenLoss:
  """L = −A · (4/τ) σ(τ (r − 1)). The sigmoid is a smooth gate in place of the clip of PPO.

  τ is `tau_positive` if A > 0, otherwise `tau_negative`.

  Source: Gao et al. 2025 (SAPO), arXiv 2511.20347, as in verl and EasyR1.
  """
  del mask
  tau = jnp.where(advantages > 0, tau_positive, tau_negative)
  gate = jax.nn.sigmoid(tau * (jnp.exp(log_ratio(logp, old_logp)) - 1.0)) * 4.0 / tau
  return -advantages * gate, {}


def policy_gradient(logp: Array, old_logp: Array, advantages: Array, mask: Array) -> TokenLoss:
  """L = −A · l, without importance ratio. Chu et al. 2025 (GPG), arXiv 2504.02546."""
  del old_logp, mask
  return -advantages * logp, {}

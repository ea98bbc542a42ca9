"""Importance correction for a sampler that is not exactly the policy that is trained.

Decoding and scoring are different programs (other kernels, another precision, weights a step old),
so the tokens come from a policy μ that is not quite the π_old that the loss assumes. Correcting
multiplies each token's policy loss by

    ρ_t = π_old(o_t) / μ(o_t)                            level "token"
    ρ_i = Π_t π_old(o_t) / μ(o_t)                        level "sequence"
    ρ_i = (Π_t π_old(o_t) / μ(o_t))^(1 / n_i)            level "geometric"

"tis" truncates it, min(ρ, high); "mis" leaves out what lies outside [low, high]: those tokens count
nowhere, also not in the number that the loss is divided by (as in verl and slime).

Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"
(TIS); Liu et al. 2025, "When speed kills stability" (MIS); verl's `rollout_is` and `rollout_rs`.
"""

import jax.numpy as jnp

from jaxrl_vlm.objectives import masked
from jaxrl_vlm.types import Array

KINDS = ("none", "tis", "mis")
LEVELS = ("token", "sequence", "geometric")


def ratios(old_logp: Array, sampler_logp: Array, mask: Array, level: str) -> Array:
  """ρ, f32[P, G, T], the logarithm clamped to ±20; 1 where masked."""
  apart = masked.masked_fill(old_logp - sampler_logp, mask)
  if level == "sequence":
    apart = masked.masked_sum(apart, mask, axis=-1)
  elif level == "geometric":
    apart = masked.masked_mean(apart, mask, axis=-1)
  apart = jnp.broadcast_to(jnp.clip(apart, -20.0, 20.0), mask.shape)
  return jnp.where(mask, jnp.exp(apart), 1.0)


def accepted(ratio: Array, low: float, high: float) -> Array:
  """Where ρ lies in [low, high], as bool."""
  return (ratio >= low) & (ratio <= high)

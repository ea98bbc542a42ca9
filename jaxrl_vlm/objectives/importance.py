"""Importance correction for the difference between sampler and scorer.

Decoding and scoring are different programs, with different kernels, precision, or weights that are
one step older. So the tokens come from a policy μ that differs slightly from the π_old that the
loss assumes. The correction multiplies the policy loss of each token by

    ρ_t = π_old(o_t) / μ(o_t)                            level "token"
    ρ_i = Π_t π_old(o_t) / μ(o_t)                        level "sequence"
    ρ_i = (Π_t π_old(o_t) / μ(o_t))^(1 / n_i)            level "geometric"

"tis" truncates the factor: min(ρ, high). "mis" also masks tokens whose ρ is outside [low, high]:
the loss leaves them out, and the number of tokens that it is divided by does not include them (as
in verl and slime).

Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"
(TIS); Liu et al. 2025, "When speed kills stability" (MIS); verl's `rollout_is` and `rollout_rs`.
"""

import jax.numpy as jnp

from jaxrl_vlm.objectives import masked
from jaxrl_vlm.types import Array

KINDS = ("none", "tis", "mis")
LEVELS = ("token", "sequence", "geometric")


def ratios(old_logp: Array, sampler_logp: Array, mask: Array, level: str) -> Array:
  """Returns ρ, f32[P, G, T], with log ρ clamped to ±20. It is 1 where the mask is false."""
  apart = masked.masked_fill(old_logp - sampler_logp, mask)
  if level == "sequence":
    apart = masked.masked_sum(apart, mask, axis=-1)
  elif level == "geometric":
    apart = masked.masked_mean(apart, mask, axis=-1)
  apart = jnp.broadcast_to(jnp.clip(apart, -20.0, 20.0), mask.shape)
  return jnp.where(mask, jnp.exp(apart), 1.0)


def accepted(ratio: Array, low: float, high: float) -> Array:
  """Returns whether ρ is in [low, high]."""
  return (ratio >= low) & (ratio <= high)

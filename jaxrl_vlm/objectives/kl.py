"""Per-token estimators of KL(π ‖ π_ref) from tokens that π sampled.

Source: Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html; the
clamps are those of verl and EasyR1 (`core_algos.py`, there called kl, mse, low_var_kl, abs).
"""

import jax.numpy as jnp

from jaxrl_vlm.types import Array


def k1(logp: Array, ref_logp: Array) -> Array:
  """log π − log π_ref: unbiased, high variance, may be negative."""
  return logp - ref_logp


def k2(logp: Array, ref_logp: Array) -> Array:
  """½ (log π − log π_ref)²: biased, its gradient is an unbiased gradient of the KL."""
  return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Array, ref_logp: Array) -> Array:
  """exp(d) − d − 1, d = clamp(log π_ref − log π, ±20), clamped to ±10: unbiased, not negative."""
  d = jnp.clip(ref_logp - logp, -20.0, 20.0)
  # expm1, since exp(d) - 1 loses every digit for the small d that most tokens have.
  return jnp.clip(jnp.expm1(d) - d, -10.0, 10.0)


def absolute(logp: Array, ref_logp: Array) -> Array:
  """|log π − log π_ref|."""
  return jnp.abs(logp - ref_logp)


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}

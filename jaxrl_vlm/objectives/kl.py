"""Per-token estimators of KL(π ‖ π_ref) from tokens that π sampled.

Source: Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html. The
clamps are those of verl and EasyR1 (`core_algos.py`), where k1, k2, k3 and abs are called kl, mse,
low_var_kl and abs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_vlm.types import Array

Estimator = Callable[[Array, Array], Array]


def k1(logp: Array, ref_logp: Array) -> Array:
  """log π − log π_ref. It is unbiased, has a high variance, and may be negative."""
  return logp - ref_logp


def k2(logp: Array, ref_logp: Array) -> Array:
  """½ (log π − log π_ref)². It is biased, but its gradient is an unbiased gradient of the KL."""
  return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Array, ref_logp: Array) -> Array:
  """exp(d) − d − 1 with d = clamp(log π_ref − log π, ±20), clamped to ±10.

  Apart from the clamps, it is unbiased. It is never negative.
  """
  d = jnp.clip(ref_logp - logp, -20.0, 20.0)
  # For most tokens, d is small. Then exp(d) - 1 loses all digits in float32, and expm1 does not.
  return jnp.clip(jnp.expm1(d) - d, -10.0, 10.0)


def absolute(logp: Array, ref_logp: Array) -> Array:
  """|log π − log π_ref|."""
  return jnp.abs(logp - ref_logp)


def _with_gradient_of_k2(value: Estimator) -> Estimator:
  def estimator(logp: Array, ref_logp: Array) -> Array:
    """Has the value of `value` and the gradient of k2, an unbiased gradient of the KL."""
    slope = k2(logp, ref_logp)
    return jax.lax.stop_gradient(value(logp, ref_logp) - slope) + slope

  return estimator


# Names as in verl: k1+ and k3+ have the values of k1 and k3, and the gradient of k2.
ESTIMATORS: dict[str, Estimator] = {
  "k1": k1,
  "k2": k2,
  "k3": k3,
  "abs": absolute,
  "k1+": _with_gradient_of_k2(k1),
  "k3+": _with_gradient_of_k2(k3),
}
# Values of a field: an estimator, or "full", the divergence over the whole vocabulary
# (`scoring.full_kl`, stored in `TokenStats.kl`).
CHOICES = (*ESTIMATORS, "full")

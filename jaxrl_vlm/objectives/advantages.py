"""Advantage estimators: rewards [P, G] and mask [P, G, T] to advantages.

Estimators with one value per response return f32[P, G, 1], the others f32[P, G, T]. Both broadcast
against [P, G, T]. Group statistics are over axis 1. A group of one has mean 0 and standard
deviation 1, as in verl.

Groups of equal rewards have advantages of exactly 0. To achieve this, the rewards of a group are
first shifted by its first reward. Otherwise a rounding error of the mean, divided by a standard
deviation close to 0, could be large.

Some estimators need more arguments, which are keyword-only:

- `penalty`, f32[P, G, T]: subtracted from the reward of each token (KL in the reward). Estimators
  without this argument receive rewards from which the sum of the penalty has been subtracted.
- `baseline`, f32[P]: reward of the greedy response.
- `components` and `component_weights`, f32[P, G] for each verifier: NaN where the rewards of an
  example do not use the verifier.
"""

import inspect
from collections.abc import Mapping

import jax.numpy as jnp

from jaxrl_vlm.objectives import masked
from jaxrl_vlm.types import Array

EPSILON = 1e-6


def _centered(rewards: Array) -> Array:
  """Returns R − mean of the group, [P, G], or R itself for groups of one."""
  if rewards.shape[1] == 1:
    return rewards
  shifted = rewards - rewards[:, :1]
  return shifted - jnp.mean(shifted, axis=1, keepdims=True)


def _std(rewards: Array) -> Array:
  """Returns the unbiased standard deviation of each group, [P, 1], or 1 for groups of one."""
  if rewards.shape[1] == 1:
    return jnp.ones_like(rewards)
  return jnp.sqrt(jnp.sum(_centered(rewards) ** 2, axis=1, keepdims=True) / (rewards.shape[1] - 1))


def given(mask: Array | None, field: str, value: object) -> Array:
  """Returns the mask. Raises ValueError if it is None, naming the field that needs it."""
  if mask is None:
    raise ValueError(f"config.objective.{field}={value!r}: needs the response mask, got None")
  return mask


def grpo(rewards: Array, mask: Array | None = None) -> Array:
  """A_i = (R_i − mean R) / (std R + 1e-6), unbiased std. Shao et al. 2024, arXiv 2402.03300."""
  del mask
  return (_centered(rewards) / (_std(rewards) + EPSILON))[..., None]


def dr_grpo(rewards: Array, mask: Array | None = None) -> Array:
  """A_i = R_i − mean R. Liu et al. 2025 (Dr.GRPO), arXiv 2503.20783."""
  del mask
  return _centered(rewards)[..., None]


def rloo(rewards: Array, mask: Array | None = None) -> Array:
  """A_i = R_i − Σ_{j≠i} R_j / (G−1) = G/(G−1) · (R_i − mean R).

  Ahmadian et al. 2024, arXiv 2402.14740.
  """
  del mask
  size = rewards.shape[1]
  return (_centered(rewards) * (size / max(size - 1, 1)))[..., None]


def opo(rewards: Array, mask: Array | None = None) -> Array:
  """A_i = R_i − Σ n_j R_j / Σ n_j, n_j tokens of response j. Hao et al. 2025, arXiv 2505.23585."""
  tokens = jnp.sum(given(mask, "advantage", "opo"), axis=-1).astype(jnp.float32)
  shifted = rewards - rewards[:, :1]
  total = jnp.maximum(jnp.sum(tokens, axis=1, keepdims=True), 1)
  return (shifted - jnp.sum(tokens * shifted, axis=1, keepdims=True) / total)[..., None]


def grpo_passk(rewards: Array, mask: Array | None = None) -> Array:
  """(R₁ − R₂) / (std R + 1e-6) for the best response of the group, 0 for all others.

  R₁ and R₂ are the best and the second best reward. If several responses have the best reward, the
  first one counts as best. The copy of this estimator in the released VPPO code returns the raw
  reward for all other responses, which is a bug.

  Source: Tang et al. 2025, arXiv 2503.19595, as in verl.

  Raises:
    ValueError: the groups have one sample.
  """
  del mask
  if rewards.shape[1] == 1:
    raise ValueError("config.objective.advantage='grpo_passk': needs at least 2 samples per prompt")
  best = jnp.arange(rewards.shape[1])[None] == jnp.argmax(rewards, axis=1, keepdims=True)
  second = jnp.max(jnp.where(best, -jnp.inf, rewards), axis=1, keepdims=True)
  return jnp.where(best, (rewards - second) / (_std(rewards) + EPSILON), 0.0)[..., None]


def gpg(rewards: Array, mask: Array | None = None) -> Array:
  """A_i = α (R_i − mean R), α = responses / responses whose reward is not 0, over the array.

  Responses without tokens do not count. Chu et al. 2025, arXiv 2504.02546, as in verl (f_norm 1).
  """
  real = jnp.any(given(mask, "advantage", "gpg"), axis=-1)
  earned = jnp.maximum(jnp.sum(real & (rewards != 0)), 1)
  return (_centered(rewards) * (jnp.sum(real) / earned))[..., None]


def gdpo(
  rewards: Array,
  mask: Array | None = None,
  *,
  components: Mapping[str, Array],
  component_weights: Mapping[str, Array],
) -> Array:
  """Normalizes each reward on its own: Σ_k w_k (R_k − mean R_k) / (std R_k + 1e-6), whitened.

  w_k are the weights of the verifiers, and the sum of the rewards is not used. Responses with the
  same sum, but from different rewards, have the same advantage in GRPO and different ones in GDPO.
  Whitening is over all tokens of the array.

  Source: Liu et al. 2026 (GDPO), arXiv 2601.05242, as in verl.
  """
  tokens = given(mask, "advantage", "gdpo")
  total = jnp.zeros_like(rewards)
  for name, values in components.items():
    judged = jnp.isfinite(values)
    normal = grpo(jnp.where(judged, values, 0.0))[..., 0]
    total += jnp.where(judged, component_weights[name] * normal, 0.0)
  return masked.masked_whiten(jnp.broadcast_to(total[..., None], tokens.shape), tokens)


def remax(
  rewards: Array,
  mask: Array | None = None,
  *,
  baseline: Array,
  penalty: Array | None = None,
) -> Array:
  """A_i,t = R_i − Σ_{t'≥t} penalty_t' − b, b the reward of the prompt's greedy response.

  Li et al. 2023 (ReMax), arXiv 2310.10505, as in verl.
  """
  del mask
  return _returns(rewards, penalty) - baseline[:, None, None]


def reinforce_pp(
  rewards: Array, mask: Array | None = None, *, penalty: Array | None = None
) -> Array:
  """A_i,t = R_i − Σ_{t'≥t} penalty_t', whitened over all tokens. Hu 2025, arXiv 2501.03262.

  The reward belongs to the last token, and returns are not discounted.
  """
  tokens = given(mask, "advantage", "reinforce_pp")
  returns = _returns(rewards, penalty)
  return masked.masked_whiten(jnp.broadcast_to(returns, tokens.shape), tokens)


def reinforce_pp_baseline(rewards: Array, mask: Array | None = None) -> Array:
  """R_i − mean R for each token, whitened over all tokens of the array. arXiv 2501.03262."""
  tokens = given(mask, "advantage", "reinforce_pp_baseline")
  centered = _centered(rewards)[..., None]
  return masked.masked_whiten(jnp.broadcast_to(centered, tokens.shape), tokens)


def _returns(rewards: Array, penalty: Array | None) -> Array:
  """Returns the return of each token: [P, G, T], or [P, G, 1] without a penalty."""
  if penalty is None:
    return rewards[..., None]
  to_come = jnp.cumsum(jnp.flip(penalty, axis=-1), axis=-1)
  return rewards[..., None] - jnp.flip(to_come, axis=-1)


ESTIMATORS = {
  "grpo": grpo,
  "dr_grpo": dr_grpo,
  "rloo": rloo,
  "opo": opo,
  "grpo_passk": grpo_passk,
  "gpg": gpg,
  "gdpo": gdpo,
  "remax": remax,
  "reinforce_pp": reinforce_pp,
  "reinforce_pp_baseline": reinforce_pp_baseline,
}

# Estimators whose baseline does not use the group. They need only one sample of each prompt.
WITHOUT_GROUP = ("remax", "reinforce_pp")


def needs(estimator: str) -> tuple[str, ...]:
  """Returns the names of the estimator's keyword-only arguments (see the module docstring)."""
  parameters = inspect.signature(ESTIMATORS[estimator]).parameters.values()
  return tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY)

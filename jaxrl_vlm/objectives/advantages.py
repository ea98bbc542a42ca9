"""Advantage estimators: rewards [P, G] and mask [P, G, T] to advantages.

Those that give every token of a response one value return f32[P, G, 1], the others f32[P, G, T];
both broadcast against [P, G, T]. Group statistics are over axis 1. A group of one has mean 0 and
standard deviation 1, as in verl. Groups of equal rewards give exactly 0: rewards are shifted by the
group's first before anything is averaged, because rounding in the mean divided by a standard
deviation of almost 0 would not be small.

What an estimator wants besides, it names in keyword-only arguments: `penalty` f32[P, G, T], what
each token costs (KL in the reward); `baseline` f32[P]; `components` and `component_weights`, by
verifier f32[P, G], NaN where a sample's own rewards leave the verifier out. An estimator without
`penalty` is given rewards from which it has been subtracted.
"""

import inspect
from collections.abc import Mapping

import jax.numpy as jnp

from jaxrl_vlm.objectives import masked
from jaxrl_vlm.types import Array

EPSILON = 1e-6


def _centered(rewards: Array) -> Array:
  """R − mean over the group, [P, G]; R itself in a group of one."""
  if rewards.shape[1] == 1:
    return rewards
  shifted = rewards - rewards[:, :1]
  return shifted - jnp.mean(shifted, axis=1, keepdims=True)


def _std(rewards: Array) -> Array:
  """Unbiased standard deviation of each group, [P, 1]; 1 for a group of one."""
  if rewards.shape[1] == 1:
    return jnp.ones_like(rewards)
  return jnp.sqrt(jnp.sum(_centered(rewards) ** 2, axis=1, keepdims=True) / (rewards.shape[1] - 1))


def given(mask: Array | None, field: str, value: object) -> Array:
  """The mask; ValueError if there is none, for a field that needs one."""
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

  R₁, R₂: best and second best reward; of equal best the first is taken. Tang et al. 2025, arXiv
  2503.19595, as in verl. The copy of this estimator in the released VPPO code leaves the others at
  their raw reward, which is a fault.

  Raises ValueError for groups of one.
  """
  del mask
  if rewards.shape[1] == 1:
    raise ValueError("config.objective.advantage='grpo_passk': needs at least 2 samples a prompt")
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
  """Each reward normalised on its own: Σ_k w_k (R_k − mean R_k) / (std R_k + 1e-6), whitened.

  Whitening is over all tokens of the array. Weights are those of the verifiers in the reward; the
  total is not used. Where the sum of rewards is the same for different mixtures of them GRPO sees
  one group, this several. Liu et al. 2026 (GDPO), arXiv 2601.05242, as in verl.
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

  The reward stands on the last token and returns are not discounted.
  """
  tokens = given(mask, "advantage", "reinforce_pp")
  returns = _returns(rewards, penalty)
  return masked.masked_whiten(jnp.broadcast_to(returns, tokens.shape), tokens)


def reinforce_pp_baseline(rewards: Array, mask: Array | None = None) -> Array:
  """R_i − mean R on every token, whitened over all tokens of the array. arXiv 2501.03262."""
  tokens = given(mask, "advantage", "reinforce_pp_baseline")
  centered = _centered(rewards)[..., None]
  return masked.masked_whiten(jnp.broadcast_to(centered, tokens.shape), tokens)


def _returns(rewards: Array, penalty: Array | None) -> Array:
  """Reward to come at every token: [P, G, T], or [P, G, 1] without a penalty."""
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

# Those whose baseline is not the group's: one sample a prompt is enough.
WITHOUT_GROUP = ("remax", "reinforce_pp")


def needs(estimator: str) -> tuple[str, ...]:
  """What the estimator wants besides rewards and mask, see the module's docstring."""
  parameters = inspect.signature(ESTIMATORS[estimator]).parameters.values()
  return tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY)

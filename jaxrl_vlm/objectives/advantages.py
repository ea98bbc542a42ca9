"""Advantage estimators: rewards [P, G] and mask [P, G, T] to advantages.

Those that give every token of a response one value return f32[P, G, 1], the others f32[P, G, T];
both broadcast against [P, G, T]. Group statistics are over axis 1. A group of one has mean 0 and
standard deviation 1, as in verl. Groups of equal rewards give exactly 0: rewards are shifted by the
group's first before anything is averaged, because rounding in the mean divided by a standard
deviation of almost 0 would not be small.
"""

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


def _needs(mask: Array | None, name: str) -> Array:
  if mask is None:
    raise ValueError(f"config.objective.advantage={name!r}: needs the response mask, got None")
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
  tokens = jnp.sum(_needs(mask, "opo"), axis=-1).astype(jnp.float32)
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


def reinforce_pp(rewards: Array, mask: Array | None = None) -> Array:
  """Rewards on every token, whitened over all tokens of the array. Hu 2025, arXiv 2501.03262.

  The reward stands on the last token and returns are not discounted. REINFORCE++ as published also
  subtracts a KL penalty from the token rewards; here the penalty is a term of the loss (`kl_coef`).
  """
  tokens = _needs(mask, "reinforce_pp")
  return masked.masked_whiten(jnp.broadcast_to(rewards[..., None], tokens.shape), tokens)


def reinforce_pp_baseline(rewards: Array, mask: Array | None = None) -> Array:
  """R_i − mean R on every token, whitened over all tokens of the array. arXiv 2501.03262."""
  tokens = _needs(mask, "reinforce_pp_baseline")
  centered = _centered(rewards)[..., None]
  return masked.masked_whiten(jnp.broadcast_to(centered, tokens.shape), tokens)


ESTIMATORS = {
  "grpo": grpo,
  "dr_grpo": dr_grpo,
  "rloo": rloo,
  "opo": opo,
  "grpo_passk": grpo_passk,
  "reinforce_pp": reinforce_pp,
  "reinforce_pp_baseline": reinforce_pp_baseline,
}

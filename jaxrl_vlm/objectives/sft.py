"""Supervised fine-tuning: the negative log-likelihood of given responses."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import masked
from jaxrl_vlm.objectives.base import Metrics, Objective, minibatch_weights
from jaxrl_vlm.types import Array, Experience, TokenStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Objective):
  """L = −Σ w_t log π(o_t), by default the mean over the minibatch's response tokens.

  The loss uses only the mask of the experience; old, advantages and rewards may be None.

  Metrics: nll and entropy, means over tokens.
  """

  kind: ClassVar[str] = "sft"

  def loss(
    self, stats: TokenStats, experience: Experience, **grad_views: TokenStats
  ) -> tuple[Array, Metrics]:
    self._check_grad_views(grad_views)
    experience = self._prepared(experience)
    weights, means = minibatch_weights(experience)
    logp = masked.masked_fill(stats.logp, experience.mask)
    entropy = masked.masked_fill(stats.entropy, experience.mask)
    metrics = {
      "nll": -jnp.sum(means * logp),
      "entropy": jnp.sum(means * entropy),
    }
    return -jnp.sum(weights * logp), jax.lax.stop_gradient(metrics)

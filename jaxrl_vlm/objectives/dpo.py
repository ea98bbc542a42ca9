"""DPO and related losses for pairs of a chosen and a rejected response."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import fields, masked
from jaxrl_vlm.objectives.base import Metrics, Objective, minibatch_weights
from jaxrl_vlm.types import Array, Experience, TokenStats

LOSSES = ("sigmoid", "ipo", "hinge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(Objective):
  """Direct Preference Optimization. Sample 0 of each prompt is chosen, sample 1 is rejected.

      L = mean over pairs of f(h_chosen − h_rejected) + λ · NLL(chosen),  h = Σ_t (l_t − ref_t)

      sigmoid    f(z) = −(1 − ε) log σ(β z) − ε log σ(−β z)
      ipo        f(z) = (z − 1 / 2β)²,  h = mean_t (l_t − ref_t)
      hinge      f(z) = max(0, 1 − β z)

  l and ref are the log-probabilities of a response token under the current policy and under the
  reference. The loss uses the mask and the view `ref` of the experience; `old`, `advantages` and
  `rewards` may be None. Pairs with an empty response are left out.

  Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7.
    ε: Mitchell 2023, "A note on DPO with noisy preferences" (cDPO).
    ipo: Azar et al. 2023, arXiv 2310.12036, eq. 17, where β is called τ and h is a sum. TRL (since
      0.7.11) and this class use the mean over tokens, as the authors advise, so that β does not
      depend on the lengths.
    hinge: Liu et al. 2023, arXiv 2309.06657.
    λ: Pang et al. 2024, arXiv 2404.19733, where it is called α (`rpo_alpha` in TRL).

  Fields:
    beta: β.
    label_smoothing: ε, the probability that the labels of a pair are swapped. Only for sigmoid.
    loss_type: f.
    sft_coef: λ. 0 disables the NLL term.
    aggregation: aggregation of the NLL over the chosen responses. The paper has
      seq-mean-token-mean, TRL has token-mean. Losses of pairs are always averaged.

  Metrics (means over pairs): reward_chosen and reward_rejected: β h of each response.
  reward_margin: their difference. reward_accuracy: share of pairs with a positive margin.
  nll_chosen: the NLL, aggregated as in the loss, without λ.
  """

  kind: ClassVar[str] = "preference"

  beta: float = fields.number(0.1, above=0)
  label_smoothing: float = fields.number(0.0, least=0, most=0.5)
  loss_type: str = fields.choice("sigmoid", LOSSES)
  sft_coef: float = fields.number(0.0, least=0)
  aggregation: str = fields.choice("seq-mean-token-mean", masked.AGGREGATIONS)

  def __post_init__(self):
    super().__post_init__()
    if self.label_smoothing and self.loss_type != "sigmoid":
      raise ValueError(
        f"config.objective.label_smoothing={self.label_smoothing!r}: expected 0, because "
        f"loss_type={self.loss_type!r} has no labels to smooth"
      )

  @property
  def views(self) -> tuple[str, ...]:
    return ("ref",)

  @property
  def min_samples(self) -> int:
    return 2

  def prepare(self, experience: Experience) -> Experience:
    """Sets `weights` to the weights of the NLL, which are 0 on rejected responses.

    extras["pairs"] is 1 / number of pairs for all tokens of the pairs that count, and 0 elsewhere.

    Raises:
      ValueError: there are not two samples of each prompt.
    """
    shape = jnp.shape(experience.mask)
    if len(shape) != 3 or shape[1] != 2:
      raise ValueError(
        f"experience.mask: shape {shape}; expected [P, 2, T], the chosen and the rejected response "
        "of each prompt"
      )
    experience = super().prepare(experience)
    mask = experience.mask
    chosen = mask & (jnp.arange(2) == 0)[None, :, None]
    count = jnp.sum(jnp.any(mask, axis=(1, 2)))
    length = self.loss_length or self.max_length
    return dataclasses.replace(
      experience,
      weights=masked.aggregation_weights(chosen, self.aggregation, length),
      extras=dict(experience.extras, pairs=mask / jnp.maximum(count, 1).astype(jnp.float32)),
    )

  def _counts(self, experience: Experience, mask: Array) -> Array:
    mask = super()._counts(experience, mask)
    return mask & jnp.all(jnp.any(mask, axis=-1, keepdims=True), axis=1, keepdims=True)

  def loss(
    self, stats: TokenStats, experience: Experience, **grad_views: TokenStats
  ) -> tuple[Array, Metrics]:
    self._check_grad_views(grad_views)
    experience = self._prepared(experience)
    mask = experience.mask
    weights, _ = minibatch_weights(experience)
    pairs = jnp.max(experience.extras["pairs"], axis=(1, 2))
    logp = masked.masked_fill(stats.logp, mask)
    ratios = logp - masked.masked_fill(self._view(experience, "ref").logp, mask)
    if self.loss_type == "ipo":
      scores = masked.masked_mean(ratios, mask, axis=-1)[..., 0]
    else:
      scores = jnp.sum(ratios, axis=-1)
    margin = scores[:, 0] - scores[:, 1]

    if self.loss_type == "sigmoid":
      # −log σ(x) = softplus(−x), finite for every x.
      pair_loss = (1 - self.label_smoothing) * jax.nn.softplus(-self.beta * margin)
      pair_loss += self.label_smoothing * jax.nn.softplus(self.beta * margin)
    elif self.loss_type == "ipo":
      pair_loss = (margin - 1 / (2 * self.beta)) ** 2
    else:
      pair_loss = jax.nn.relu(1 - self.beta * margin)
    nll = -jnp.sum(weights * logp)
    loss = jnp.sum(pairs * pair_loss)
    if self.sft_coef:
      loss = loss + self.sft_coef * nll
    metrics = {
      "reward_chosen": self.beta * jnp.sum(pairs * scores[:, 0]),
      "reward_rejected": self.beta * jnp.sum(pairs * scores[:, 1]),
      "reward_margin": self.beta * jnp.sum(pairs * margin),
      "reward_accuracy": jnp.sum(pairs * (margin > 0)),
      "nll_chosen": nll,
    }
    return loss, jax.lax.stop_gradient(metrics)

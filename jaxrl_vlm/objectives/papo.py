"""PAPO: a policy gradient that also increases the KL between original and corrupted image."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import fields, kl, masked
from jaxrl_vlm.objectives.base import Metrics, minibatch_weights
from jaxrl_vlm.objectives.policy_gradient import PolicyGradient, penalty_weights
from jaxrl_vlm.types import Array, Experience, TokenStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class PAPO(PolicyGradient):
  """Perception-Aware Policy Optimization, with any policy loss and advantage estimator.

      L = L_pg + β KL_ref − γ Σ w_t K_t + η₁ (−mean l) + η₂ (−mean l′)
      K = exp(d) − d − 1,  d = clamp(l′ − l, ±20),  K clamped to ±10          (k3)

  l and l′ are the log-probabilities of the sampled token given the original and the corrupted
  image. K estimates KL(π(·|I) ‖ π(·|I′)). The paper writes the inverse ratio; the ratio above is
  the right one for tokens that are sampled from π(·|I).

  Paper and released code differ in l′. In the paper, l′ is the log-probability under the current
  policy. The code (fb63bf4) scores l′ once per rollout with the sampling policy and treats it as a
  constant, so the η₂ term is logged but has no gradient. The default follows the code.
  `masked_gradient=True` follows the paper.

  Source: arXiv 2507.06448. `create("papo")` is PAPO_G 7B, the run of the paper's first table (GRPO
  base: γ 0.02, η 0.05, β 0.01, clip 0.2/0.3). `create("papo_d")` is PAPO_D (DAPO base: γ 0.01,
  η 0.03, no reference, clip 0.2/0.28, dynamic sampling). PAPO_G 3B is PAPO_G with η₁ = η₂ = 0. The
  code also has a supervised loss on correct responses. All published runs disable it, and it is not
  implemented.

  Fields:
    perception_coef: γ.
    perception_kl: estimator of K. "full" computes it over the whole vocabulary, as in the paper. It
      requires `masked_gradient=True`, because the constant l′ is known for the sampled token only.
    anneal_updates: number of updates in which γ, η₁ and η₂ decrease linearly to 0. None keeps them
      constant. The code has this option, with γ = 0.01 and the first half of the training.
    perception_clip: K is clipped to [0, perception_clip], without gradient outside. None: no clip.
      The code has 0.2.
    perception_share: only the tokens of a response whose K is at least the (1 − share) quantile
      count in Σ w K, with unchanged w. These are 1 + ⌊share (n − 1)⌋ of n tokens, or more if there
      are ties. None: all tokens. The code has 0.2.
    entropy_penalty, masked_entropy_penalty: η₁, η₂.
    masked_gradient: l′ is scored with the current policy and has a gradient.

  Metrics: `perception_kl` (Σ w K, aggregated like the loss), `masked_nll` (mean of −l′) and, with
  annealing, `anneal` (the factor of γ and η).
  """

  perception_coef: float = fields.number(0.02, least=0)
  perception_kl: str = fields.choice("k3", kl.CHOICES)
  perception_clip: float | None = fields.number(None, above=0, optional=True)
  perception_share: float | None = fields.number(None, above=0, most=1, optional=True)
  masked_entropy_penalty: float = fields.number(0.0, least=0)
  masked_gradient: bool = fields.flag(False)
  anneal_updates: int | None = fields.count(None, optional=True)

  def __post_init__(self):
    super().__post_init__()
    self._refuse(
      self.perception_kl == "full" and not self.masked_gradient,
      "masked_gradient", "True, because perception_kl='full'",
    )  # fmt: skip

  @property
  def views(self) -> tuple[str, ...]:
    return super().views + (() if self.masked_gradient else ("masked",))

  @property
  def grad_views(self) -> tuple[str, ...]:
    return super().grad_views + (("masked",) if self.masked_gradient else ())

  @property
  def full_kl(self) -> tuple[str, ...]:
    return super().full_kl + (("masked",) if self.perception_kl == "full" else ())

  def initial_state(self) -> dict[str, Array]:
    anneals = self.anneal_updates is not None
    return super().initial_state() | ({"updates": jnp.float32(0)} if anneals else {})

  def next_state(self, experience: Experience, metrics: Metrics) -> dict[str, Array]:
    state = super().next_state(experience, metrics)
    return state | ({"updates": state["updates"] + 1} if "updates" in state else {})

  def prepare_metrics(self, experience: Experience) -> Metrics:
    metrics = super().prepare_metrics(experience)
    return metrics | ({} if self.anneal_updates is None else {"anneal": self._anneal(experience)})

  def _entropy_coefficient(self, experience: Experience) -> Array:
    return self._anneal(experience) * super()._entropy_coefficient(experience)

  def _anneal(self, experience: Experience) -> Array:
    """Returns the factor of γ, η₁ and η₂ in this update."""
    if self.anneal_updates is None:
      return jnp.float32(1)
    done = experience.state.get("updates", jnp.float32(0))
    return 1.0 - jnp.minimum(done / self.anneal_updates, 1.0)

  def loss(
    self, stats: TokenStats, experience: Experience, **grad_views: TokenStats
  ) -> tuple[Array, Metrics]:
    experience = self._prepared(experience)
    loss, metrics = super().loss(stats, experience, **grad_views)
    mask = experience.mask
    logp = masked.masked_fill(stats.logp, mask)
    if self.masked_gradient:
      view = grad_views["masked"]
    else:
      view = jax.lax.stop_gradient(self._view(experience, "masked"))
    masked_logp = masked.masked_fill(view.logp, mask)

    if self.perception_kl == "full":
      if view.kl is None:
        raise ValueError("stats of the view 'masked': kl=None: perception_kl='full' needs it")
      token_kl = masked.masked_fill(view.kl, mask)
    else:
      token_kl = kl.ESTIMATORS[self.perception_kl](logp, masked_logp)
    if self.perception_share is not None:
      top = masked.above_quantile(jax.lax.stop_gradient(token_kl), mask, 1 - self.perception_share)
      token_kl = jnp.where(top, token_kl, 0.0)
    if self.perception_clip is not None:
      token_kl = jnp.clip(token_kl, 0.0, self.perception_clip)
    perception_kl = jnp.sum(penalty_weights(experience) * token_kl)
    masked_nll = -jnp.sum(minibatch_weights(experience)[1] * masked_logp)
    perception = self.masked_entropy_penalty * masked_nll - self.perception_coef * perception_kl
    loss = loss + self._anneal(experience) * perception
    added = {"perception_kl": perception_kl, "masked_nll": masked_nll}
    return loss, metrics | jax.lax.stop_gradient(added)

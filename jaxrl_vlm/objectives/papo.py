"""PAPO: a policy gradient that also pushes clean-image and masked-image policies apart."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import fields, kl, masked
from jaxrl_vlm.objectives.base import Metrics, minibatch_weights
from jaxrl_vlm.objectives.policy_gradient import PolicyGradient, penalty_weights
from jaxrl_vlm.types import Array, Experience, TokenStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class PAPO(PolicyGradient):
  """Perception-Aware Policy Optimization, on top of any policy loss and advantage.

      L = L_pg + β KL_ref − γ Σ w_t K_t + η₁ (−mean l) + η₂ (−mean l′)
      K = exp(d) − d − 1,  d = clamp(l′ − l, ±20),  K clamped to ±10          (k3)

  l, l′: log-probability of the sampled token given the clean and the masked image. K estimates
  KL(π(·|I) ‖ π(·|I′)), with the inverse of the ratio that the paper writes: right for tokens
  sampled from π(·|I).

  Where paper and code differ: the paper's l′ is the current policy's. The released code (fb63bf4)
  scores l′ once per rollout with the sampling policy and holds it constant, so that the η₂ term is
  logged but has no gradient; that is the default here. `masked_gradient=True` is the paper.

  Source: arXiv 2507.06448. `create("papo")` is PAPO_G 7B (GRPO base: γ 0.02, η 0.05, β 0.01, clip
  0.2/0.3), the run of the paper's first table; `create("papo_d")` is PAPO_D (DAPO base: γ 0.01,
  η 0.03, no reference, clip 0.2/0.28, dynamic sampling). PAPO_G 3B is PAPO_G with both η at 0. The
  code's supervised loss on correct responses, off in every published run, is left out.

  Fields:
    perception_coef: γ.
    perception_kl: estimator of K; "full": over the whole vocabulary, as the paper writes it, which
      wants `masked_gradient=True`, because the constant l′ is of the sampled token alone.
    anneal_updates: γ and both η fall linearly to 0 over so many updates, as the code can (from its
      0.01 over the first half of training); None: they stay.
    perception_clip: K is cut to [0, this], without gradient outside; None: off. The code has 0.2.
    perception_share: only the tokens of a response whose K is at least the (1 − share) quantile of
      its tokens' count in Σ w K (w as before), so 1 + ⌊share (n − 1)⌋ and ties; None: all. The code
      has 0.2.
    entropy_penalty, masked_entropy_penalty: η₁, η₂.
    masked_gradient: l′ is the current policy's, with gradient.

  Metrics: `perception_kl` (Σ w K, aggregated like the loss), `masked_nll` (mean of −l′) and, with
  annealing, `anneal` (what γ and η are multiplied by).
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
    """What γ and η are multiplied by."""
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

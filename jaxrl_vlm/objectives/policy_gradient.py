"""Policy gradient objectives on group advantages: GRPO, DAPO and their relatives."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import advantages, fields, kl, kl_cov, masked, ppo, sequence
from jaxrl_vlm.objectives.base import Metrics, Objective, minibatch_weights
from jaxrl_vlm.types import Array, Experience, TokenStats

# The keyword-only arguments of each are fields of PolicyGradient.
POLICY_LOSSES = {
  "ppo": ppo.dual_clip,
  "cispo": ppo.cispo,
  "sapo": ppo.sapo,
  "gpg": ppo.policy_gradient,
  "gspo": sequence.gspo,
  "gmpo": sequence.gmpo,
  "kl_cov": kl_cov.kl_cov,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(Objective):
  """Policy loss + kl_coef · KL(π ‖ π_ref) + entropy_penalty · (−mean log π).

      L = Σ w_t [L_pg(l_t, o_t, A_t) + β KL_t] − η Σ u_t l_t

  with w the weights of the aggregation and u those of a mean over all response tokens.

  Fields (defaults: GRPO as EasyR1 runs it):
    advantage: estimator of the advantages, see `advantages.py`.
    policy_loss: see `ppo.py`, `sequence.py`, `kl_cov.py`.
    clip_low, clip_high, clip_dual: ε_l, ε_h and c; clip_dual None: no dual clip.
    kl, kl_coef: estimator and coefficient β of the KL to the reference policy; 0: no reference.
    entropy_penalty: η; raises the log-probabilities of the sampled tokens, so lowers entropy.
    tau_positive, tau_negative: sapo's temperatures for A > 0 and A ≤ 0.
    cov_share, cov_coef: kl_cov's share of tokens and the coefficient of their penalty.

  Metrics (means over the response tokens of the minibatch unless said otherwise):
    policy_loss, ref_kl: aggregated like the loss, without coefficient.
    nll: −log π of the sampled tokens, an estimate of the entropy without bias on policy.
    entropy: mean of stats.entropy.
    approx_kl_k1, approx_kl_k3: KL(π_old ‖ π) estimated on the tokens that π_old sampled.
    clip_high, clip_low, clip_dual ...: share of tokens where each clip cuts the gradient.
  """

  advantage: str = fields.choice("grpo", advantages.ESTIMATORS)
  policy_loss: str = fields.choice("ppo", POLICY_LOSSES)
  clip_low: float = fields.number(0.2, least=0, most=1)
  clip_high: float = fields.number(0.3, least=0)
  clip_dual: float | None = fields.number(3.0, above=1, optional=True)
  kl: str = fields.choice("k3", kl.ESTIMATORS)
  kl_coef: float = fields.number(0.01, least=0)
  entropy_penalty: float = fields.number(0.0, least=0)
  tau_positive: float = fields.number(1.0, above=0)
  tau_negative: float = fields.number(1.05, above=0)
  cov_share: float = fields.number(0.002, above=0, most=1)
  cov_coef: float = fields.number(1.0, least=0)

  @property
  def views(self) -> tuple[str, ...]:
    return ("ref",) if self.kl_coef else ()

  def advantages(self, rewards: Array, mask: Array | None = None) -> Array:
    """f32[P, G, 1] or, for estimators that whiten over tokens, f32[P, G, T]."""
    rewards = jnp.asarray(rewards).astype(jnp.float32)
    return advantages.ESTIMATORS[self.advantage](rewards, mask)

  def prepare(self, experience: Experience) -> Experience:
    experience = super().prepare(experience)
    full = jnp.broadcast_to(jnp.asarray(experience.advantages), experience.mask.shape)
    return dataclasses.replace(experience, advantages=masked.masked_fill(full, experience.mask))

  def loss(
    self, stats: TokenStats, experience: Experience, **grad_views: TokenStats
  ) -> tuple[Array, Metrics]:
    self._check_grad_views(grad_views)
    experience = self._prepared(experience)
    mask = experience.mask
    weights, means = minibatch_weights(experience)
    logp = masked.masked_fill(stats.logp, mask)
    old_logp = masked.masked_fill(experience.old.logp, mask)

    policy_loss = POLICY_LOSSES[self.policy_loss]
    parameters = inspect.signature(policy_loss).parameters.values()
    settings = {p.name: getattr(self, p.name) for p in parameters if p.kind == p.KEYWORD_ONLY}
    token_loss, token_metrics = policy_loss(logp, old_logp, experience.advantages, mask, **settings)
    loss = jnp.sum(weights * token_loss)
    log_ratio = ppo.log_ratio(logp, old_logp)
    token_metrics |= {
      "nll": -logp,
      "entropy": masked.masked_fill(stats.entropy, mask),
      "approx_kl_k1": -log_ratio,
      "approx_kl_k3": jnp.expm1(log_ratio) - log_ratio,
    }
    metrics = {name: jnp.sum(means * x) for name, x in token_metrics.items()}
    metrics["policy_loss"] = loss

    if self.kl_coef:
      ref_logp = masked.masked_fill(self._view(experience, "ref").logp, mask)
      ref_kl = jnp.sum(penalty_weights(experience) * kl.ESTIMATORS[self.kl](logp, ref_logp))
      loss = loss + self.kl_coef * ref_kl
      metrics["ref_kl"] = ref_kl
    if self.entropy_penalty:
      loss = loss + self.entropy_penalty * metrics["nll"]
    return loss, jax.lax.stop_gradient(metrics)


def penalty_weights(experience: Experience) -> Array:
  """The aggregation's weights of all response tokens, also where a filter cut the policy loss's."""
  return experience.extras.get("penalty_weights", minibatch_weights(experience)[0])

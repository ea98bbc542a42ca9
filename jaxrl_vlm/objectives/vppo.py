"""VPPO: a policy gradient on the tokens and responses that depend on the image."""

import dataclasses

import jax.numpy as jnp

from jaxrl_vlm.objectives import fields, kl, masked
from jaxrl_vlm.objectives.base import Metrics, minibatch_weights
from jaxrl_vlm.objectives.policy_gradient import PolicyGradient
from jaxrl_vlm.types import Array, Experience, TokenStats


def token_dependency(
  old_logp: Array, masked_view: TokenStats, mask: Array, estimator: str
) -> Array:
  """Returns s_t, the dependency of each sampled token on the image: f32[P, G, T], 0 where masked.

      d = clamp(log π_old(o | q, I′) − log π_old(o | q, I), ±20)
      s = clamp(exp(d) − d − 1, 0, 10)                                        (k3)

  I is the original image and I′ the corrupted one. The released code estimates the divergence from
  the sampled token. The paper defines it over the whole vocabulary, which is the estimator "full".
  """
  if estimator != "full":
    old_logp = masked.masked_fill(old_logp, mask)
    masked_logp = masked.masked_fill(masked_view.logp, mask)
    return jnp.maximum(kl.ESTIMATORS[estimator](old_logp, masked_logp), 0.0)
  if masked_view.kl is None:
    raise ValueError(
      "experience.views['masked'].kl=None: config.objective.dependency='full' needs it"
    )
  return jnp.maximum(masked.masked_fill(masked_view.kl, mask), 0.0)


def shaping_factors(dependency: Array, mask: Array, minimum: float) -> Array:
  """Returns α_i, the factor of the advantages of each response: f32[P, G, 1], with mean 1.

      s̄_i = mean_t s_t;  n_i = (s̄_i − min s̄) / (max s̄ − min s̄);  μ = mean n
      β_max = β_min + (1 − β_min) / (μ + 1e-8);  α_i = β_min + n_i (β_max − β_min)

  Minimum, maximum and mean are taken over all responses of the minibatch that have tokens. The
  released code takes minimum and maximum over the minibatch of a device, but μ over the microbatch,
  so its result depends on the microbatch size. If max − min ≤ 1e-6, or if there is only one
  response, α is 1.
  """
  score = masked.masked_mean(dependency, mask, axis=-1)
  valid = jnp.any(mask, axis=-1, keepdims=True)
  low = jnp.min(jnp.where(valid, score, jnp.inf))
  high = jnp.max(jnp.where(valid, score, -jnp.inf))
  shaped = (high - low > 1e-6) & (jnp.sum(valid) > 1)
  normalized = jnp.clip((score - low) / jnp.where(shaped, high - low, 1.0), 0.0, 1.0)
  mean = masked.masked_mean(normalized, valid)
  factor = minimum + normalized * (1.0 - minimum) / (mean + 1e-8)
  return jnp.where(shaped & valid, factor, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VPPO(PolicyGradient):
  """Visually-Perceptive Policy Optimization, with any policy loss and advantage estimator.

      L = Σ w_t m_t L_pg(l_t, o_t, α_i A_i) + η (−mean l),  m_t = [s_t among the ⌈k n_i⌉ largest]

  The token filter m_t is applied after clipping and does not change the weights w. With token-mean,
  the loss is therefore divided by the number of all response tokens. The penalties use all tokens.
  Among tokens with equal s_t, earlier tokens come first.

  Source: arXiv 2510.09285. The defaults of `create("vppo")` are those of the released code
  (VPPO-RL a23c54b) for the 7B model. They include token-mean, whereas the objective of the paper
  first averages over each response (seq-mean-token-mean).

  Fields:
    tokens: the tokens that have policy gradient. "dependency": the top `keep_share` by s_t.
      "entropy": the top `entropy_share` by the entropy of the sampling policy. "either": the union
      of both. "all": no filter.
    keep_share, entropy_share: shares of the tokens of each response, rounded up. k is `keep_share`.
    dependency: estimator of s_t from the sampled token, or "full".
    shaping: "minibatch" multiplies the advantages by α_i, "none" does not.
    shaping_min: β_min.
  """

  tokens: str = fields.choice("dependency", ("dependency", "entropy", "either", "all"))
  keep_share: float = fields.number(0.4, above=0, most=1)
  entropy_share: float = fields.number(0.2, above=0, most=1)
  dependency: str = fields.choice("k3", kl.CHOICES)
  shaping: str = fields.choice("minibatch", ("minibatch", "none"))
  shaping_min: float = fields.number(0.9, least=0, most=1)

  @property
  def views(self) -> tuple[str, ...]:
    return super().views + (("masked",) if self._uses_image else ())

  @property
  def needs_old(self) -> bool:
    return True

  @property
  def full_kl(self) -> tuple[str, ...]:
    full = self._uses_image and self.dependency == "full"
    return super().full_kl + (("masked",) if full else ())

  @property
  def _uses_image(self) -> bool:
    return self.tokens in ("dependency", "either") or self.shaping != "none"

  def _shaped(self, experience: Experience) -> Experience:
    experience = super()._shaped(experience)
    mask = experience.mask
    weights, _ = minibatch_weights(experience)
    extras = dict(experience.extras)
    advantages = experience.advantages
    keep = jnp.zeros_like(mask)
    if self._uses_image:
      masked_view = self._view(experience, "masked")
      dependency = token_dependency(experience.old.logp, masked_view, mask, self.dependency)
      extras["dependency"] = dependency
      if self.tokens in ("dependency", "either"):
        keep |= masked.top_share(dependency, mask, self.keep_share)
      if self.shaping != "none":
        factors = shaping_factors(dependency, mask, self.shaping_min)
        extras["shaping"] = jnp.broadcast_to(factors, mask.shape)
        advantages = advantages * factors
    if self.tokens in ("entropy", "either"):
      entropy = masked.masked_fill(experience.old.entropy, mask)
      keep |= masked.top_share(entropy, mask, self.entropy_share)
    if self.tokens == "all":
      keep = mask
    extras["keep"] = keep.astype(jnp.float32)
    weights = jnp.where(keep, weights, 0.0)
    return dataclasses.replace(experience, advantages=advantages, weights=weights, extras=extras)

  def prepare_metrics(self, experience: Experience) -> Metrics:
    """Returns the metrics of PolicyGradient and those of the token filter and the shaping.

    kept_share: share of tokens that have policy gradient.
    dependency, dependency_kept, dependency_rejected: mean dependency of all tokens, of the tokens
      that have policy gradient, and of the other tokens.
    shaping_mean, shaping_min, shaping_max: mean, minimum and maximum of α over responses.
    """
    mask, extras = experience.mask, experience.extras
    keep = extras["keep"] > 0
    metrics = dict(super().prepare_metrics(experience), kept_share=masked.masked_mean(keep, mask))
    if "dependency" in extras:
      metrics["dependency"] = masked.masked_mean(extras["dependency"], mask)
      metrics["dependency_kept"] = masked.masked_mean(extras["dependency"], keep)
      metrics["dependency_rejected"] = masked.masked_mean(extras["dependency"], mask & ~keep)
    if "shaping" in extras:
      valid = jnp.any(mask, axis=-1)
      factors = extras["shaping"][..., 0]
      metrics["shaping_mean"] = masked.masked_mean(factors, valid)
      # If the minibatch has no tokens, minimum and maximum would be infinite. Then they are 1.
      some = jnp.any(valid)
      lowest = jnp.min(jnp.where(valid, factors, jnp.inf))
      highest = jnp.max(jnp.where(valid, factors, -jnp.inf))
      metrics["shaping_min"] = jnp.where(some, lowest, 1.0)
      metrics["shaping_max"] = jnp.where(some, highest, 1.0)
    return metrics

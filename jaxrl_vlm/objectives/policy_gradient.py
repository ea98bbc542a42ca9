"""Policy gradient objectives on group advantages: GRPO, DAPO and their relatives."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_vlm.objectives import advantages, cov, fields, importance, kl, masked, ppo, sequence
from jaxrl_vlm.objectives.base import Metrics, Objective, minibatch_weights
from jaxrl_vlm.types import Array, Experience, TokenStats

# The keyword-only arguments of these functions are fields of PolicyGradient or arrays in `extras`.
POLICY_LOSSES = {
  "ppo": ppo.dual_clip,
  "cispo": ppo.cispo,
  "sapo": ppo.sapo,
  "gpg": ppo.policy_gradient,
  "gspo": sequence.gspo,
  "gspo_token": sequence.gspo_token,
  "gmpo": sequence.gmpo,
  "clip_cov": cov.clip_cov,
  "kl_cov": cov.kl_cov,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(Objective):
  """Policy gradient with a KL penalty to the reference and an entropy penalty.

      L = Σ w_t [L_pg(l_t, o_t, A_t) + β KL_t] − η Σ u_t l_t

  l_t and o_t are the log-probabilities of a token under the current policy and under the policy
  that sampled it, and A_t is its advantage. w_t are the weights of the aggregation, and u_t the
  weights of a mean over all response tokens.

  Fields (the defaults are those of GRPO in EasyR1):
    advantage: estimator of the advantages, see `advantages.py`.
    policy_loss: L_pg, see `ppo.py`, `sequence.py` and `cov.py`.
    clip_low, clip_high, clip_dual: ε_l, ε_h and c of the clipped loss. If clip_dual is None, there
      is no dual clip.
    kl, kl_coef: estimator and coefficient β of the KL divergence from the reference policy. With
      kl_coef 0, no reference is scored. "full" computes the divergence over the whole vocabulary,
      which adds a forward pass of the reference to each update.
    kl_in: "loss" adds the penalty to the loss. "reward" subtracts β KL_t of the sampling policy
      from the reward of each token before the advantages are computed. Estimators with one value
      per response subtract the sum over its tokens.
    kl_target, kl_horizon: adaptive β (Ziegler et al. 2019, arXiv 1909.08593; verl). After an update
      with n responses, β becomes β (1 + clip(KL / kl_target − 1, ±0.2) n / kl_horizon), but at
      least 0, where KL is the metric `ref_kl`. If kl_target is None, β is constant.
    entropy_penalty: η. It increases the log-probabilities of the sampled tokens, which lowers the
      entropy.
    tau_positive, tau_negative: temperatures of sapo for A > 0 and A ≤ 0.
    cov_share: share of tokens that clip_cov or kl_cov selects.
    cov_coef: coefficient of the penalty of kl_cov.
    cov_low, cov_high: bounds of the covariance in clip_cov.
    correction, correction_level, correction_low, correction_high: correction for the difference
      between sampler and scorer, see `importance.py`.
    overlong_buffer, overlong_factor: soft overlong punishment of DAPO (arXiv 2503.14476). It adds
      factor · min((L_max − buffer − n) / buffer, 0) to the reward of a response of n tokens, where
      L_max is `max_length`. If overlong_buffer is None, it is off.
    mask_overlong: truncated responses are left out of the loss. They still count in the mean and
      standard deviation of their group.
    mask_zero_advantages: groups in which all advantages are 0 are left out of the loss, including
      its penalties, so that the mean over tokens does not include them.

  Metrics (means over the response tokens of the minibatch, unless stated otherwise):
    policy_loss, ref_kl: aggregated like the loss, without coefficient.
    kl_coef: β, if it is adaptive.
    nll: −log π of the sampled tokens, an unbiased estimate of the entropy for on-policy samples.
    entropy: mean of `stats.entropy`.
    approx_kl_k1, approx_kl_k3: KL(π_old ‖ π), estimated from the tokens that π_old sampled.
    clip_high, clip_low, clip_dual: share of tokens at which each clip takes effect. Except with
      cispo, these tokens have no gradient of the policy loss.
    cov_tokens: share of tokens that clip_cov or kl_cov selects.
    correction_mean: mean of ρ.
    correction_cut: share of tokens whose ρ is truncated or masked.
    overlong_penalty: mean over responses of the value that is added to the reward.
    truncated_share: share of responses that `mask_overlong` leaves out.
    zero_advantage_share: share of groups in which all advantages are 0. Estimators that whiten over
      the batch give hardly any such groups.
  """

  advantage: str = fields.choice("grpo", advantages.ESTIMATORS)
  policy_loss: str = fields.choice("ppo", POLICY_LOSSES)
  clip_low: float = fields.number(0.2, least=0, most=1)
  clip_high: float = fields.number(0.3, least=0)
  clip_dual: float | None = fields.number(3.0, above=1, optional=True)
  kl: str = fields.choice("k3", kl.CHOICES)
  kl_coef: float = fields.number(0.01, least=0)
  kl_in: str = fields.choice("loss", ("loss", "reward"))
  kl_target: float | None = fields.number(None, above=0, optional=True)
  kl_horizon: int = fields.count(10_000)
  entropy_penalty: float = fields.number(0.0, least=0)
  tau_positive: float = fields.number(1.0, above=0)
  tau_negative: float = fields.number(1.05, above=0)
  cov_share: float = fields.number(0.002, above=0, most=1)
  cov_coef: float = fields.number(1.0, least=0)
  cov_low: float = fields.number(1.0)
  cov_high: float = fields.number(5.0)
  correction: str = fields.choice("none", importance.KINDS)
  correction_level: str = fields.choice("token", importance.LEVELS)
  correction_low: float = fields.number(0.5, least=0, most=1)
  correction_high: float = fields.number(2.0, least=1)
  overlong_buffer: int | None = fields.count(None, optional=True)
  overlong_factor: float = fields.number(1.0, least=0)
  mask_overlong: bool = fields.flag(False)
  mask_zero_advantages: bool = fields.flag(False)

  def __post_init__(self):
    super().__post_init__()
    self._refuse(
      self.overlong_buffer is not None and self.max_length is None,
      "max_length", "a whole number >= 1, because overlong_buffer counts back from it",
    )  # fmt: skip
    self._refuse(
      self.overlong_buffer is not None and self.overlong_buffer > (self.max_length or 0),
      "overlong_buffer", f"at most max_length={self.max_length}",
    )  # fmt: skip
    self._refuse(
      self.kl_target is not None and not self.kl_coef,
      "kl_coef", f"a number > 0 to start from, because kl_target={self.kl_target!r} adapts it",
    )  # fmt: skip
    self._refuse(self.cov_low >= self.cov_high, "cov_low", f"less than cov_high={self.cov_high!r}")
    if self.advantage == "gdpo":
      why = "because advantage='gdpo' normalizes each reward separately and does not use their sum"
      self._refuse(self._kl_in_reward, "kl_in", f"'loss', {why}")
      self._refuse(self.overlong_buffer is not None, "overlong_buffer", f"None, {why}")

  def _refuse(self, wrong: bool, field: str, expected: str) -> None:
    if wrong:
      raise ValueError(f"config.objective.{field}={getattr(self, field)!r}: expected {expected}")

  @property
  def _kl_in_reward(self) -> bool:
    return bool(self.kl_coef) and self.kl_in == "reward"

  @property
  def _kl_in_loss(self) -> bool:
    return bool(self.kl_coef) and self.kl_in == "loss"

  @property
  def views(self) -> tuple[str, ...]:
    return ("ref",) if self._kl_in_reward or (self._kl_in_loss and self.kl != "full") else ()

  @property
  def grad_views(self) -> tuple[str, ...]:
    return ("ref",) if self._kl_in_loss and self.kl == "full" else ()

  @property
  def full_kl(self) -> tuple[str, ...]:
    return ("ref",) if self.kl_coef and self.kl == "full" else ()

  @property
  def needs_old(self) -> bool:
    return self.correction != "none" or self._kl_in_reward or self.needs_current

  @property
  def needs_current(self) -> bool:
    return self.policy_loss in cov.CHOOSE

  @property
  def advantage_needs(self) -> tuple[str, ...]:
    needs = [name for name in advantages.needs(self.advantage) if name != "penalty"]
    return (*needs, "penalty") if self._kl_in_reward else tuple(needs)

  @property
  def min_samples(self) -> int:
    # filter_groups keeps groups with both right and wrong responses, which need two samples.
    alone = self.advantage in advantages.WITHOUT_GROUP and not self.filter_groups
    return 1 if alone else 2

  def initial_state(self) -> dict[str, Array]:
    adaptive = self.kl_target is not None
    return super().initial_state() | ({"kl_coef": jnp.float32(self.kl_coef)} if adaptive else {})

  def next_state(self, experience: Experience, metrics: Metrics) -> dict[str, Array]:
    state = super().next_state(experience, metrics)
    if self.kl_target is not None:
      responses = jnp.sum(jnp.any(experience.mask, axis=-1))
      error = jnp.clip(metrics["ref_kl"] / self.kl_target - 1.0, -0.2, 0.2)
      # A horizon shorter than 0.2 n could turn the penalty into a reward.
      factor = jnp.maximum(1.0 + error * responses / self.kl_horizon, 0.0)
      state["kl_coef"] = state["kl_coef"] * factor
    return state

  def penalty(
    self, old: TokenStats, ref: TokenStats, mask: Array, state: Mapping[str, Array]
  ) -> Array:
    """Returns β KL_t, the penalty on the reward of each token for kl_in="reward": f32[P, G, T]."""
    old_logp = masked.masked_fill(old.logp, mask)
    return self._coefficient("kl_coef", state) * self._ref_kl(old_logp, ref, mask)

  def advantages(self, rewards: Array, mask: Array | None = None, **more: Any) -> Array:
    """Returns f32[P, G, 1] or, for estimators with a value per token, f32[P, G, T]."""
    if set(more) != set(self.advantage_needs):
      raise ValueError(
        f"objective.advantages: config.objective.advantage={self.advantage!r} with "
        f"kl_in={self.kl_in!r} needs {list(self.advantage_needs)}, got {sorted(more)}"
      )
    rewards = jnp.asarray(rewards).astype(jnp.float32)
    if self.overlong_buffer is not None:
      mask = advantages.given(mask, "overlong_buffer", self.overlong_buffer)
      rewards = rewards + self._overlong(mask)
    penalty = more.pop("penalty", None)
    if penalty is not None:
      penalty = masked.masked_fill(penalty, advantages.given(mask, "kl_in", self.kl_in))
      if "penalty" in advantages.needs(self.advantage):
        more["penalty"] = penalty
      else:
        rewards = rewards - jnp.sum(penalty, axis=-1)
    return advantages.ESTIMATORS[self.advantage](rewards, mask, **more)

  def _overlong(self, mask: Array) -> Array:
    """Returns the soft overlong punishment of DAPO: f32[P, G], at most 0."""
    assert self.overlong_buffer is not None and self.max_length is not None
    over = self.max_length - self.overlong_buffer - jnp.sum(mask, axis=-1)
    return self.overlong_factor * jnp.minimum(over / self.overlong_buffer, 0.0)

  def _counts(self, experience: Experience, mask: Array) -> Array:
    if self.mask_overlong:
      if experience.truncated is None:
        raise ValueError("experience.truncated=None: config.objective.mask_overlong=True needs it")
      mask &= ~jnp.asarray(experience.truncated)[..., None]
    if self.mask_zero_advantages:
      mask &= self._some_advantage(experience)[:, None, None]
    if self.correction == "mis":
      ratio = self._sampler_ratio(experience, mask)
      mask &= importance.accepted(ratio, self.correction_low, self.correction_high)
    return mask

  def _some_advantage(self, experience: Experience) -> Array:
    """Returns bool[P]: groups in which the advantage of some token is not 0."""
    some = jnp.asarray(experience.mask).astype(bool) & (jnp.asarray(experience.advantages) != 0)
    return jnp.any(some, axis=(1, 2))

  def _sampler_ratio(self, experience: Experience, mask: Array) -> Array:
    if experience.sampler_logp is None:
      raise ValueError(
        f"experience.sampler_logp=None: config.objective.correction={self.correction!r} needs it"
      )
    sampler_logp = jnp.asarray(experience.sampler_logp)
    return importance.ratios(experience.old.logp, sampler_logp, mask, self.correction_level)

  def prepare(self, experience: Experience) -> Experience:
    before = jnp.asarray(experience.mask).astype(bool)
    some = jnp.broadcast_to(self._some_advantage(experience)[:, None, None], before.shape)
    experience = super().prepare(experience)
    mask = experience.mask
    weights, _ = minibatch_weights(experience)
    full = jnp.broadcast_to(jnp.asarray(experience.advantages), mask.shape)
    full = masked.masked_fill(full, mask)
    extras = dict(
      experience.extras, penalty_weights=weights, sampled=before.astype(jnp.float32),
      some_advantage=some.astype(jnp.float32),
    )  # fmt: skip
    if self.correction != "none":
      ratio = self._sampler_ratio(experience, before)
      extras["correction"] = ratio
      weights = weights * jnp.minimum(ratio, self.correction_high)
    experience = self._shaped(
      dataclasses.replace(experience, advantages=full, weights=weights, extras=extras)
    )
    if self.needs_current and experience.current is not None:
      chosen = self._cov_tokens(experience, experience.current.logp)
      extras = dict(experience.extras, cov_tokens=chosen)
      experience = dataclasses.replace(experience, extras=extras)
    return experience

  def _shaped(self, experience: Experience) -> Experience:
    """Subclasses change advantages or weights of the policy loss in this method."""
    return experience

  def _cov_tokens(self, experience: Experience, logp: Array) -> Array:
    """Returns 1 for the tokens that clip_cov or kl_cov selects, 0 for others: f32[P, G, T]."""
    choose = cov.CHOOSE[self.policy_loss]
    mask = experience.mask
    now, old = (masked.masked_fill(x, mask) for x in (logp, experience.old.logp))
    chosen = choose(now, old, experience.advantages, mask, **self._settings(choose, {}))
    return chosen.astype(jnp.float32)

  def _settings(self, function: Any, extras: Mapping[str, Array]) -> dict[str, Any]:
    """Returns the keyword-only arguments of the function, from `extras` or from the fields."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
    return {name: extras[name] if name in extras else getattr(self, name) for name in names}

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
    extras = dict(experience.extras)
    if self.needs_current and "cov_tokens" not in extras:
      extras["cov_tokens"] = self._cov_tokens(experience, jax.lax.stop_gradient(logp))
    settings = self._settings(policy_loss, extras)
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

    if self._kl_in_loss:
      full = self.kl == "full"
      ref = grad_views["ref"] if full else self._view(experience, "ref")
      ref_kl = jnp.sum(penalty_weights(experience) * self._ref_kl(logp, ref, mask))
      loss = loss + self._coefficient("kl_coef", experience.state) * ref_kl
      metrics["ref_kl"] = ref_kl
    if self.entropy_penalty:
      loss = loss + self._entropy_coefficient(experience) * metrics["nll"]
    return loss, jax.lax.stop_gradient(metrics)

  def prepare_metrics(self, experience: Experience) -> Metrics:
    metrics = super().prepare_metrics(experience)
    mask, extras = experience.mask, experience.extras
    sampled = extras["sampled"] > 0
    responses = jnp.any(sampled, axis=-1)
    groups = jnp.any(responses, axis=-1)
    some = extras["some_advantage"][:, 0, 0] > 0
    metrics["zero_advantage_share"] = masked.masked_mean(~some, groups)
    if self.mask_overlong and experience.truncated is not None:
      metrics["truncated_share"] = masked.masked_mean(experience.truncated, responses)
    if self.overlong_buffer is not None:
      metrics["overlong_penalty"] = masked.masked_mean(self._overlong(sampled), responses)
    if self.correction != "none":
      cut = ~importance.accepted(
        extras["correction"], self.correction_low if self.correction == "mis" else 0.0,
        self.correction_high,
      )  # fmt: skip
      metrics["correction_mean"] = masked.masked_mean(extras["correction"], sampled)
      metrics["correction_cut"] = masked.masked_mean(cut, sampled)
    if self._kl_in_reward:
      ref = self._view(experience, "ref")
      old_logp = masked.masked_fill(experience.old.logp, mask)
      metrics["ref_kl"] = jnp.sum(extras["penalty_weights"] * self._ref_kl(old_logp, ref, mask))
    if self.kl_target is not None:
      metrics["kl_coef"] = self._coefficient("kl_coef", experience.state)
    return metrics

  def _entropy_coefficient(self, experience: Experience) -> Array:
    del experience
    return jnp.float32(self.entropy_penalty)

  def _ref_kl(self, logp: Array, ref: TokenStats, mask: Array) -> Array:
    """Returns KL_t between the policy with log-probabilities `logp` and the reference."""
    if self.kl != "full":
      return kl.ESTIMATORS[self.kl](logp, masked.masked_fill(ref.logp, mask))
    if ref.kl is None:
      raise ValueError("experience.views['ref'].kl=None: config.objective.kl='full' needs it")
    return masked.masked_fill(ref.kl, mask)

  def _coefficient(self, name: str, state: Mapping[str, Array]) -> Array:
    """Returns the current value of a coefficient, which may have been adapted."""
    return state[name] if name in state else jnp.float32(getattr(self, name))


def penalty_weights(experience: Experience) -> Array:
  """Returns the weights of penalties, which token filters of the policy loss do not change."""
  return experience.extras.get("penalty_weights", minibatch_weights(experience)[0])

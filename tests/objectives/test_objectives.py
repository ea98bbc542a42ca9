"""Tests losses, weights and advantages against values by hand, and fields and error messages."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxrl_vlm import objectives
from jaxrl_vlm.objectives import kl, masked, ppo, sequence, vppo
from jaxrl_vlm.objectives.policy_gradient import POLICY_LOSSES
from jaxrl_vlm.types import Experience, TokenStats

PLAIN = {"kl_coef": 0.0, "entropy_penalty": 0.0}


def stats(logp) -> TokenStats:
  logp = jnp.asarray(logp, jnp.float32)
  return TokenStats(logp=logp, entropy=jnp.zeros_like(logp))


def experience(mask, advantages, old, **views) -> Experience:
  mask = jnp.asarray(mask, bool)
  return Experience(
    mask=mask,
    advantages=jnp.asarray(advantages, jnp.float32),
    old=stats(old),
    rewards=jnp.zeros(mask.shape[:2]),
    views={name: stats(logp) for name, logp in views.items()},
  )


@pytest.fixture(params=[False, True], ids=["eager", "jit"])
def variant(request):
  return jax.jit if request.param else lambda f: f


# Policy losses


def test_dual_clip(variant):
  ratio = np.array([[[1.0, 1.5, 0.5, 1.5, 0.5, 4.0]]])
  advantages = np.array([[[2.0, 2.0, 2.0, -2.0, -2.0, -2.0]]])
  loss, metrics = variant(
    lambda logp: ppo.dual_clip(
      logp,
      jnp.zeros_like(logp),
      jnp.asarray(advantages, jnp.float32),
      jnp.ones(logp.shape, bool),
      clip_low=0.2,
      clip_high=0.3,
      clip_dual=3.0,
    )
  )(jnp.log(jnp.asarray(ratio, jnp.float32)))
  # -A r; -A 1.3; -A r; -A r; -A 0.8; -A 3
  np.testing.assert_allclose(loss, [[[-2.0, -2.6, -1.0, 3.0, 1.6, 6.0]]], rtol=1e-6)
  np.testing.assert_array_equal(metrics["clip_high"], [[[0, 1, 0, 0, 0, 0]]])
  np.testing.assert_array_equal(metrics["clip_low"], [[[0, 0, 0, 0, 1, 0]]])
  np.testing.assert_array_equal(metrics["clip_dual"], [[[0, 0, 0, 0, 0, 1]]])


def test_clipped_tokens_get_no_gradient():
  old = jnp.zeros((1, 1, 4))
  logp = jnp.log(jnp.asarray([[[1.5, 0.5, 4.0, 1.1]]]))
  advantages = jnp.asarray([[[1.0, -1.0, -1.0, 1.0]]])
  clips = {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0}

  def loss(logp):
    return jnp.sum(ppo.dual_clip(logp, old, advantages, advantages != 0, **clips)[0])

  np.testing.assert_allclose(jax.grad(loss)(logp), [[[0, 0, 0, -1.1]]], rtol=1e-6)


def test_cispo_keeps_the_gradient_of_a_clipped_token():
  old, advantages = jnp.zeros((1, 1, 2)), jnp.asarray([[[1.0, -1.0]]])
  logp = jnp.log(jnp.asarray([[[8.0, 8.0]]]))

  def loss(logp):
    return jnp.sum(
      ppo.cispo(logp, old, advantages, advantages != 0, clip_low=0.0, clip_high=4.0)[0]
    )

  np.testing.assert_allclose(jax.grad(loss)(logp), [[[-5.0, 5.0]]], rtol=1e-6)


def test_sapo_at_ratio_one():
  old, advantages = jnp.zeros((1, 1, 2)), jnp.asarray([[[1.0, -1.0]]])

  def loss(logp):
    return jnp.sum(
      ppo.sapo(logp, old, advantages, advantages != 0, tau_positive=1.0, tau_negative=1.05)[0]
    )

  # σ(0) · 4/τ = 2/τ; its derivative with respect to log r at 1 is 1.
  value, gradient = jax.value_and_grad(loss)(old)
  np.testing.assert_allclose(value, -2.0 + 2.0 / 1.05, atol=1e-6)
  np.testing.assert_allclose(gradient, [[[-1.0, 1.0]]], rtol=1e-6)


def test_sequence_losses_equal_their_sequence_form(variant):
  """The mean token loss equals the loss of the response's ratio, in value and gradient."""
  old = jnp.zeros((1, 1, 3))
  mask = jnp.asarray([[[True, True, False]]])
  advantages = jnp.where(mask, -2.0, 0.0)
  logp = jnp.asarray([[[0.1, 0.3, 0.0]]])

  def token_forms(logp):
    clips = {"clip_low": 0.4, "clip_high": 0.4}
    gmpo, _ = sequence.gmpo(logp, old, advantages, mask, **clips)
    gspo, _ = sequence.gspo(logp, old, advantages, mask, **clips, clip_dual=None)
    token, _ = sequence.gspo_token(logp, old, advantages, mask, **clips, clip_dual=None)
    return tuple(jnp.sum(loss * mask) / 2 for loss in (gmpo, gspo, token))

  def sequence_form(logp):
    return 2.0 * jnp.exp((logp[0, 0, 0] + logp[0, 0, 1]) / 2)

  expected, slope = jax.value_and_grad(sequence_form)(logp)
  for i in range(3):
    value, gradient = variant(jax.value_and_grad(lambda x, i=i: token_forms(x)[i]))(logp)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6)


def test_keyword_arguments_of_policy_losses_are_fields():
  known = {field.name for field in dataclasses.fields(objectives.PolicyGradient)}
  for name, function in POLICY_LOSSES.items():
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
    assert names <= known | {"cov_tokens"}, (
      name
    )  # clip_cov and kl_cov get the tokens that `prepare` chose


@pytest.mark.parametrize(
  ("name", "expected"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5), ("abs", 0.5)]
)
def test_kl_estimators(name, expected):
  value = kl.ESTIMATORS[name](jnp.float32(-1.5), jnp.float32(-1.0))
  assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_straight_through_estimators(name):
  """k1+ and k3+ have the values of k1 and k3 and the gradient of k2, log π − log π_ref."""
  plus = jax.value_and_grad(kl.ESTIMATORS[f"{name}+"])(jnp.float32(-1.5), jnp.float32(-1.0))
  value = kl.ESTIMATORS[name](jnp.float32(-1.5), jnp.float32(-1.0))
  np.testing.assert_allclose(plus, (value, -0.5), rtol=1e-6)


# Weights


@pytest.mark.parametrize(
  ("aggregation", "expected"),
  [
    ("token-mean", [[1 / 4, 1 / 4, 1 / 4], [1 / 4, 0, 0], [0, 0, 0]]),
    ("seq-mean-token-mean", [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0], [0, 0, 0]]),
    ("seq-mean-token-sum", [[1 / 2, 1 / 2, 1 / 2], [1 / 2, 0, 0], [0, 0, 0]]),
    ("seq-mean-token-sum-norm", [[0.05, 0.05, 0.05], [0.05, 0, 0], [0, 0, 0]]),
  ],
)
def test_aggregation_weights(aggregation, expected, variant):
  mask = jnp.asarray([[[1, 1, 1], [1, 0, 0], [0, 0, 0]]], bool)
  weights = variant(lambda m: masked.aggregation_weights(m, aggregation, 10))(mask)
  np.testing.assert_allclose(weights, [expected], rtol=1e-6)


def test_masked_mean_of_no_values_is_zero():
  assert masked.masked_mean(jnp.asarray([jnp.nan, jnp.inf]), jnp.zeros(2, bool)) == 0


def test_top_share_takes_the_first_of_equal_scores(variant):
  scores = jnp.asarray([[[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 9.0, 9.0]]])
  mask = jnp.asarray([[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]], bool)
  # ⌈0.4 · 5⌉ = 2 and ⌈0.4 · 3⌉ = 2
  kept = variant(lambda s: masked.top_share(s, mask, 0.4))(scores)
  np.testing.assert_array_equal(kept, [[[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]])


@pytest.mark.parametrize("share", [0.07, 0.1, 0.2, 0.4, 0.6, 0.7, 1.0])
def test_top_share_rounds_up_exactly(share):
  mask = jnp.tril(jnp.ones((100, 100), bool))
  kept = masked.top_share(jnp.zeros((100, 100)), mask, share).sum(axis=-1)
  percent = round(share * 100)
  np.testing.assert_array_equal(kept, [-(-percent * n // 100) for n in range(1, 101)])


# Advantages


def advantages(name, rewards, mask=None):
  rewards = jnp.asarray(rewards, jnp.float32)
  return objectives.create("grpo", advantage=name).advantages(rewards, mask)


def test_advantages_by_hand(variant):
  rewards = np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])
  std = np.array([[0.5], [math.sqrt(20 / 3)]])
  centered = np.array([[0.75, -0.25, -0.25, -0.25], [-3, -1, 1, 3]])
  expected = {
    "grpo": centered / (std + 1e-6),
    "dr_grpo": centered,
    "rloo": [[1, -1 / 3, -1 / 3, -1 / 3], [-4, -4 / 3, 4 / 3, 4]],
    "grpo_passk": np.array([[1, 0, 0, 0], [0, 0, 0, 2]]) / (std + 1e-6),
  }
  for name, value in expected.items():
    got = variant(lambda r, name=name: advantages(name, r))(rewards)
    np.testing.assert_allclose(got[..., 0], value, rtol=1e-6, atol=1e-7, err_msg=name)
    assert got.shape == (2, 4, 1)


def test_opo_weights_rewards_by_length():
  mask = jnp.asarray([[[1, 1, 1], [1, 0, 0]]], bool)
  got = advantages("opo", [[1.0, 5.0]], mask)
  np.testing.assert_allclose(got[..., 0], [[-1.0, 3.0]], rtol=1e-6)  # baseline (3·1 + 1·5) / 4


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_the_advantage_in_a_group_of_one_is_its_reward(name):
  # As in verl, the mean is taken as 0 and the standard deviation as 1. 1e-6 is GRPO's epsilon.
  np.testing.assert_allclose(advantages(name, [[0.5]])[0, 0, 0], 0.5, rtol=2e-6)


@pytest.mark.parametrize("name", ["opo", "reinforce_pp", "reinforce_pp_baseline"])
def test_estimators_that_count_tokens_need_the_mask(name):
  with pytest.raises(ValueError, match=f"config.objective.advantage='{name}': needs the response"):
    advantages(name, [[1.0, 0.0]])


def test_passk_with_a_group_of_one_is_an_error():
  with pytest.raises(ValueError, match="at least 2 samples"):
    advantages("grpo_passk", [[1.0]])


# VPPO


def test_shaping_factors(variant):
  dependency = jnp.asarray([[[0.0, 0.0], [2.0, 0.0], [0.5, 7.0], [9.0, 9.0]]])
  mask = jnp.asarray([[[1, 1], [1, 1], [1, 0], [0, 0]]], bool)
  # Means 0, 1, 0.5; n = 0, 1, 0.5; μ = 0.5; β_max = 0.9 + 0.1/0.5 = 1.1. A response without tokens
  # has the factor 1.
  factors = variant(lambda s: vppo.shaping_factors(s, mask, 0.9))(dependency)
  np.testing.assert_allclose(factors[..., 0], [[0.9, 1.1, 1.0, 1.0]], rtol=1e-6)


def test_shaping_factors_are_one_if_all_responses_have_equal_dependency():
  mask = jnp.ones((1, 2, 2), bool)
  np.testing.assert_array_equal(vppo.shaping_factors(jnp.full((1, 2, 2), 0.3), mask, 0.9), 1.0)
  one = jnp.asarray([[[1, 1], [0, 0]]], bool)
  np.testing.assert_array_equal(
    vppo.shaping_factors(jnp.arange(4.0).reshape(1, 2, 2), one, 0.9), 1.0
  )


def test_vppo_by_hand(variant):
  """Of five tokens, the two most dependent ones get gradient. The denominator is still five."""
  old = jnp.zeros((1, 1, 5))
  masked_logp = jnp.asarray([[[0.0, -1.0, 0.1, -2.0, 0.2]]])
  batch = experience(np.ones((1, 1, 5)), np.full((1, 1, 1), 2.0), old, masked=masked_logp)
  objective = objectives.create("vppo", entropy_penalty=0.0)
  prepared = variant(objective.prepare)(batch)
  np.testing.assert_array_equal(prepared.extras["keep"], [[[0, 1, 0, 1, 0]]])
  gradient = variant(jax.grad(lambda l: objective.loss(stats(l), prepared)[0]))(old)
  np.testing.assert_allclose(gradient, [[[0, -2 / 5, 0, -2 / 5, 0]]], rtol=1e-6)
  metrics = objective.prepare_metrics(prepared)
  expected = {
    "kept_share": 0.4,
    "dependency_kept": (math.exp(-1) + math.exp(-2) + 1) / 2,
    "dependency_rejected": (math.exp(0.1) - 1.1 + math.exp(0.2) - 1.2) / 3,
    "shaping_mean": 1.0,
    "shaping_min": 1.0,
    "shaping_max": 1.0,
  }
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(value, rel=1e-5), name
  with_penalty = objectives.create("vppo")
  prepared = with_penalty.prepare(batch)
  gradient = jax.grad(lambda l: with_penalty.loss(stats(l), prepared)[0])(old)
  expected = np.array([0, -2 / 5, 0, -2 / 5, 0]) - 0.06 / 5
  np.testing.assert_allclose(gradient[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("loss", "expected"), [("gspo_token", [4, 0, 0, 0]), ("gspo", [1] * 4)])
def test_vppo_with_gspo(loss, expected):
  """Rejected tokens get no gradient if each token has its ratio (gspo_token), otherwise they do."""
  old = jnp.zeros((1, 1, 4))
  batch = experience(np.ones((1, 1, 4)), np.ones((1, 1, 1)), old, masked=[[[-3.0, 0.0, 0.0, 0.0]]])
  objective = objectives.create("vppo", policy_loss=loss, keep_share=0.25, clip_dual=None, **PLAIN)
  logp = jnp.asarray([[[0.0, 0.2, 0.0, 0.2]]])
  gradient = jax.grad(lambda l: objective.loss(stats(l), batch)[0])(logp)
  np.testing.assert_allclose(gradient[0, 0], -math.exp(0.1) / 16 * np.array(expected), rtol=1e-5)


# PAPO


def test_papo_by_hand(variant):
  l, l_masked = math.log(0.5), math.log(0.25)
  batch = experience([[[1]]], [[[0.0]]], [[[l]]], masked=[[[l_masked]]])
  objective = objectives.create("papo", perception_coef=0.02, **PLAIN)
  objective = dataclasses.replace(objective, masked_entropy_penalty=0.0)
  loss = variant(jax.value_and_grad(lambda l: objective.loss(stats(l), batch)[0]))
  value, gradient = loss(jnp.asarray([[[l]]]))
  # d = −log 2: K = 0.5 + log 2 − 1; ∂K/∂l = 1 − 0.5
  assert value == pytest.approx(-0.02 * (math.log(2) - 0.5), rel=1e-5)
  np.testing.assert_allclose(gradient, [[[-0.02 * 0.5]]], rtol=1e-6)


def test_papo_with_and_without_gradient_through_the_masked_view():
  l, l_masked = math.log(0.5), math.log(0.25)
  batch = experience([[[1]]], [[[0.0]]], [[[l]]], masked=[[[l_masked]]])
  released = objectives.create("papo", kl_coef=0.0)
  paper = objectives.create("papo", kl_coef=0.0, masked_gradient=True)
  assert (released.views, released.grad_views) == (("masked",), ())
  assert (paper.views, paper.grad_views) == ((), ("masked",))

  def loss(l, l_masked):
    return paper.loss(stats(l), batch, masked=stats(l_masked))[0]

  args = jnp.full((1, 1, 1), l), jnp.full((1, 1, 1), l_masked)
  value, (gradient, masked_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(*args)
  np.testing.assert_allclose(value, released.loss(stats(args[0]), batch)[0], rtol=1e-6)
  np.testing.assert_allclose(gradient, [[[-0.02 * 0.5 - 0.05]]], rtol=1e-6)
  # ∂K/∂l′ = exp(d) − 1 = −0.5
  np.testing.assert_allclose(masked_gradient, [[[0.02 * 0.5 - 0.05]]], rtol=1e-6)


# The interface


def test_sft_uses_only_the_mask_of_the_experience():
  batch = Experience(
    mask=jnp.asarray([[[1, 1, 0]]], bool),
    advantages=None,
    old=None,  # pyright: ignore[reportArgumentType]
    rewards=None,
  )
  objective = objectives.create("sft")
  loss, metrics = objective.loss(stats([[[-1.0, -2.0, -50.0]]]), objective.prepare(batch))
  assert loss == pytest.approx(1.5)
  assert metrics["nll"] == pytest.approx(1.5)


def test_views_of_each_objective():
  assert objectives.create("grpo").views == ("ref",)
  assert objectives.create("dapo").views == ()
  assert objectives.create("papo").views == ("ref", "masked")
  assert objectives.create("papo_d").views == ("masked",)
  assert objectives.create("vppo").views == ("masked",)
  assert objectives.create("vppo", kl_coef=0.01).views == ("ref", "masked")
  assert objectives.create("vppo", tokens="entropy", shaping="none").views == ()
  assert objectives.create("sft").views == ()


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("grpo", {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0, "kl": "k3", "kl_coef": 0.01}),
    ("dapo", {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 10.0, "kl_coef": 0.0}),
    ("dapo", {"aggregation": "token-mean", "filter_groups": True, "filter_low": 0.01}),
    ("vppo", {"keep_share": 0.4, "shaping_min": 0.9, "entropy_penalty": 0.06, "kl_coef": 0.0}),
    ("vppo", {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0, "filter_groups": True}),
    ("papo", {"perception_coef": 0.02, "entropy_penalty": 0.05, "kl_coef": 0.01}),
    ("papo", {"clip_low": 0.2, "clip_high": 0.3, "masked_entropy_penalty": 0.05}),
    ("papo_d", {"perception_coef": 0.01, "entropy_penalty": 0.03, "clip_high": 0.28}),
  ],
)
def test_defaults_equal_published_values(name, fields):
  objective = objectives.create(name)
  assert {field: getattr(objective, field) for field in fields} == fields


@pytest.mark.parametrize("name", objectives.names())
def test_equal_configs_are_equal_and_hashable(name):
  fields = {"loss_length": 8}
  first, second = objectives.create(name, **fields), objectives.create(name, **fields)
  assert first == second and hash(first) == hash(second)
  with pytest.raises(dataclasses.FrozenInstanceError):
    first.loss_length = 9  # pyright: ignore[reportAttributeAccessIssue]


def test_create_from_a_config_dict():
  config = ml_collections.ConfigDict({"name": "vppo", "keep_share": 0.3, "kl_coef": 0})
  objective = objectives.create(**config.to_dict())
  assert objective == objectives.create("vppo", keep_share=0.3)


def test_kept_groups_of_dynamic_sampling():
  accuracy = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]], np.float32)
  dapo = objectives.create("dapo")
  np.testing.assert_array_equal(dapo.kept(accuracy), [False, True, False, True])
  narrow = objectives.create("dapo", filter_low=0.25, filter_high=0.8)
  np.testing.assert_array_equal(narrow.kept(accuracy), [False, False, False, True])
  np.testing.assert_array_equal(objectives.create("grpo").kept(accuracy), [True] * 4)


def test_preparing_twice_is_an_error():
  objective = objectives.create("dapo")
  prepared = objective.prepare(experience([[[1]]], [[[1.0]]], [[[0.0]]]))
  with pytest.raises(ValueError, match="prepared already"):
    objective.prepare(prepared)


def test_errors_name_missing_views():
  batch = experience([[[1]]], [[[1.0]]], [[[0.0]]], blank=[[[0.0]]])
  with pytest.raises(ValueError, match=r"views=\['blank'\]: this objective needs .* 'masked'"):
    objectives.create("vppo").prepare(batch)
  with pytest.raises(ValueError, match="needs the view 'ref'"):
    objectives.create("grpo").loss(stats([[[0.0]]]), batch)
  with pytest.raises(ValueError, match=r"gradient of the views \['masked'\], got \[\]"):
    objectives.create("papo", kl_coef=0.0, masked_gradient=True).loss(stats([[[0.0]]]), batch)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      {"name": "vpo"},
      "config.objective.name='vpo': no such objective; did you mean 'vppo'? (known: grpo, ",
    ),
    ({"name": 7}, "config.objective.name=7: no such objective (known: grpo, "),
    (
      {"name": "grpo", "clip_hgih": 0.2},
      "config.objective.clip_hgih: no such field of 'grpo'; did you mean 'clip_high'? (fields: ",
    ),
    (
      {"name": "grpo", "keep_share": 0.2},
      "config.objective.keep_share: no such field of 'grpo'",
    ),
    (
      {"name": "grpo", "clip_low": -0.1},
      "config.objective.clip_low=-0.1: expected a number >= 0 and <= 1",
    ),
    (
      {"name": "grpo", "clip_low": "0.2"},
      "config.objective.clip_low='0.2': expected a number >= 0 and <= 1",
    ),
    (
      {"name": "grpo", "clip_high": float("nan")},
      "config.objective.clip_high=nan: expected a number >= 0",
    ),
    (
      {"name": "grpo", "clip_dual": 1.0},
      "config.objective.clip_dual=1.0: expected a number > 1 or None",
    ),
    (
      {"name": "vppo", "keep_share": 0.0},
      "config.objective.keep_share=0.0: expected a number > 0 and <= 1",
    ),
    (
      {"name": "vppo", "keep_share": 1.5},
      "config.objective.keep_share=1.5: expected a number > 0 and <= 1",
    ),
    (
      {"name": "grpo", "aggregation": "token-maen"},
      "config.objective.aggregation='token-maen': expected one of 'token-mean', ",
    ),
    (
      {"name": "grpo", "kl": ["k3"]},
      "config.objective.kl=['k3']: expected one of 'k1', 'k2', 'k3', 'abs'",
    ),
    (
      {"name": "dapo", "filter_groups": 1},
      "config.objective.filter_groups=1: expected True or False",
    ),
    (
      {"name": "dapo", "max_tries": 0},
      "config.objective.max_tries=0: expected a whole number >= 1",
    ),
    (
      {"name": "dapo", "filter_low": 0.995},
      "config.objective.filter_low=0.995: expected less than filter_high=0.99",
    ),
    (
      {"name": "dr_grpo"},
      "config.objective.loss_length=None: expected a whole number >= 1, because ",
    ),
  ],
)
def test_errors_name_the_field_its_value_and_what_was_expected(arguments, message):
  with pytest.raises(ValueError) as error:
    objectives.create(**arguments)
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)

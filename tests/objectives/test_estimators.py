"""Advantages that need more than rewards, and rewards with penalties, equal values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_vlm import objectives
from jaxrl_vlm.objectives import masked
from jaxrl_vlm.types import Experience, TokenStats

MASK = np.array([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]], bool)


def rows(advantages):
  return np.broadcast_to(advantages, MASK.shape)


def test_gpg_scales_with_the_share_of_rewarded_responses():
  # Three responses have tokens, and two of them have a reward, so α = 3/2.
  advantages = objectives.create("gpg").advantages(np.array([[1.0, 0.0], [2.0, 5.0]]), MASK)
  np.testing.assert_allclose(advantages[..., 0], 1.5 * np.array([[0.5, -0.5], [-1.5, 1.5]]))


def test_gdpo_normalizes_each_reward_separately():
  """Compares with a slow version in numpy and float64."""
  rng = np.random.default_rng(0)
  mask = np.arange(5) < rng.integers(1, 6, (4, 6, 1))
  components = {"right": rng.integers(0, 2, (4, 6)) * 1.0, "form": rng.random((4, 6))}
  components["form"][3] = np.nan  # the rewards of this prompt do not contain it
  weights = {"right": np.full((4, 6), 1.0), "form": np.full((4, 6), 0.25)}
  expected = np.zeros((4, 6))
  for p in range(4):
    for name, values in components.items():
      group = values[p]
      if not np.isnan(group).any():
        expected[p] += weights[name][p] * (group - group.mean()) / (group.std(ddof=1) + 1e-6)
  tokens = np.broadcast_to(expected[..., None], mask.shape)
  at = tokens[mask]
  expected = np.where(mask, (tokens - at.mean()) / np.sqrt(at.var(ddof=1) + 1e-8), 0)

  f32 = [{k: v.astype(np.float32) for k, v in d.items()} for d in (components, weights)]
  advantages = objectives.create("gdpo").advantages(
    np.zeros((4, 6)), mask, components=f32[0], component_weights=f32[1]
  )
  np.testing.assert_allclose(advantages, expected, atol=2e-5)


def test_gdpo_distinguishes_responses_with_equal_total_reward():
  """If two rewards always add up to 1, GRPO's advantages are zero and GDPO's are not."""
  right = np.array([[1.0, 1.0, 0.0, 1.0]], np.float32)
  components = {"right": right, "form": 1 - right}
  weights = {"right": np.full_like(right, 1.0), "form": np.full_like(right, 0.5)}
  mask = np.ones((1, 4, 2), bool)
  assert not np.any(objectives.create("grpo").advantages(right + components["form"], mask))
  advantages = objectives.create("gdpo").advantages(
    right + components["form"], mask, components=components, component_weights=weights
  )
  assert np.all(advantages[0, :, 0] * np.array([1, 1, -1, 1]) > 0.3)


def test_remax_subtracts_the_greedy_reward():
  advantages = objectives.create("remax", kl_coef=0.0).advantages(
    np.array([[1.0, 0.0], [2.0, 5.0]]), MASK, baseline=jnp.array([1.0, 2.5])
  )
  np.testing.assert_allclose(advantages[..., 0], [[0, -1], [-0.5, 2.5]])


# KL in the reward

OLD = np.full((2, 2, 3), -1.0, np.float32)
REF = OLD + np.array([[[0.1, 0.2, 0.4], [0.5, 9, 9]], [[0, -0.3, 9], [9, 9, 9]]], np.float32)
REWARDS = np.array([[1.0, 0.0], [2.0, 5.0]])


def penalised(name, **settings):
  objective = objectives.create(name, kl="k1", kl_coef=2.0, kl_in="reward", **settings)
  assert objective.views == ("ref",) and "penalty" in objective.advantage_needs
  penalty = objective.penalty(TokenStats(OLD, OLD), TokenStats(REF, REF), jnp.asarray(MASK), {})
  return objective, penalty


def test_penalty_is_the_weighted_kl_of_response_tokens():
  _, penalty = penalised("grpo")
  cost = -2 * np.array([[[0.1, 0.2, 0.4], [0.5, 0, 0]], [[0, -0.3, 0], [0, 0, 0]]])
  np.testing.assert_allclose(penalty, cost, atol=1e-6)


def test_outcome_estimators_subtract_the_sum_of_penalties_from_the_reward():
  objective, penalty = penalised("rloo")
  # R − Σ penalty: 1 + 1.4, 0 + 1; 2 − 0.6, 5
  advantages = objective.advantages(REWARDS, MASK, penalty=penalty)
  np.testing.assert_allclose(advantages[..., 0], [[1.4, -1.4], [-3.6, 3.6]], rtol=1e-5)


def test_token_returns_are_the_reward_minus_the_remaining_penalties():
  objective, penalty = penalised("remax")
  advantages = objective.advantages(REWARDS, MASK, penalty=penalty, baseline=jnp.zeros(2))
  expected = np.array([[[2.4, 2.2, 1.8], [1, 0, 0]], [[1.4, 1.4, 2], [5, 5, 5]]])
  np.testing.assert_allclose(np.where(MASK, advantages, 0), expected * MASK, rtol=1e-5)

  objective, penalty = penalised("reinforce_pp")
  advantages = objective.advantages(REWARDS, MASK, penalty=penalty)
  at = expected[MASK]
  whitened = (at - at.mean()) / np.sqrt(at.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(np.asarray(advantages)[MASK], whitened, rtol=1e-5)


def test_penalty_with_the_full_kl_uses_the_kl_of_the_view():
  objective = objectives.create("grpo", kl="full", kl_coef=0.5, kl_in="reward")
  assert objective.full_kl == ("ref",) and objective.grad_views == ()
  ref = TokenStats(REF, REF, kl=np.full(MASK.shape, 3.0, np.float32))
  penalty = objective.penalty(TokenStats(OLD, OLD), ref, jnp.asarray(MASK), {})
  np.testing.assert_allclose(penalty, 1.5 * MASK)
  with pytest.raises(ValueError, match=r"views\['ref'\].kl=None"):
    objective.penalty(TokenStats(OLD, OLD), TokenStats(REF, REF), jnp.asarray(MASK), {})


# Overlong responses


def test_overlong_punishment():
  """DAPO's reward is 0 up to L_max − buffer tokens, then decreases linearly to −factor at L_max."""
  objective = objectives.create("dr_grpo", max_length=8, overlong_buffer=4, overlong_factor=2.0)
  lengths = np.array([[0, 4, 5, 8]])
  mask = np.arange(8) < lengths[..., None]
  rewards = np.zeros((1, 4))
  expected = np.array([0, 0, -0.5, -2.0])
  np.testing.assert_allclose(
    objective.advantages(rewards, mask)[0, :, 0], expected - expected.mean(), rtol=1e-6
  )
  with pytest.raises(ValueError, match="overlong_buffer=4: needs the response mask"):
    objective.advantages(rewards)


# Errors


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("grpo", {"overlong_buffer": 4}, "max_length=None: .* overlong_buffer counts back"),
    ("grpo", {"overlong_buffer": 9, "max_length": 8}, "overlong_buffer=9: .* at most max_length=8"),
    ("dapo", {"kl_target": 0.1}, "kl_coef=0.0: .* > 0 to start from"),
    ("clip_cov", {"cov_low": 5.0}, "cov_low=5.0: expected less than cov_high=5.0"),
    ("gdpo", {"kl_in": "reward"}, "kl_in='reward': expected 'loss', because advantage='gdpo'"),
    ("gdpo", {"overlong_buffer": 1, "max_length": 2}, "overlong_buffer=1: expected None"),
    ("papo", {"perception_kl": "full"}, "masked_gradient=False: expected True"),
    ("papo", {"mask_kind": "semantic"}, "mask_on='original': expected 'processed'"),
    ("vppo", {"filter_keys": ()}, r"filter_keys=\(\): expected a tuple of names"),
    ("vppo", {"filter_keys": "accuracy"}, "filter_keys='accuracy': expected a tuple of names"),
    ("grpo", {"correction_high": 0.9}, "correction_high=0.9: expected a number >= 1"),
    ("grpo", {"kl": "k4"}, "kl='k4': expected one of 'k1', .*'k3\\+', 'full'"),
  ],
)
def test_contradictory_settings_are_errors(name, settings, message):
  with pytest.raises(ValueError, match=message):
    objectives.create(name, **settings)


def test_missing_or_unexpected_inputs_of_advantages_are_errors():
  with pytest.raises(ValueError, match=r"'remax' .* needs \['baseline'\], got \[\]"):
    objectives.create("remax", kl_coef=0.0).advantages(REWARDS, MASK)
  with pytest.raises(ValueError, match=r"'grpo' .* needs \[\], got \['baseline'\]"):
    objectives.create("grpo").advantages(REWARDS, MASK, baseline=jnp.zeros(2))


def test_smallest_number_of_samples_of_each_method():
  least = {name: objectives.create(name, max_length=8).min_samples for name in objectives.names()}
  assert {name for name, samples in least.items() if samples == 1} == {
    "remax", "reinforce_pp", "sft"}  # fmt: skip
  filtered = objectives.create(
    "dapo", advantage="remax"
  )  # one sample cannot be both right and wrong
  assert filtered.min_samples == 2


# PAPO's choice of tokens


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4, 0.5, 1.0])
def test_tokens_above_a_quantile_equal_numpy(share):
  """The quantile is over the tokens of each response. As in the released code, ties are kept."""
  rng = np.random.default_rng(0)
  mask = np.arange(9) < rng.permutation(np.arange(12) % 10).reshape(3, 4, 1)
  scores = rng.integers(0, 6, mask.shape).astype(np.float32)
  kept = np.asarray(masked.above_quantile(jnp.asarray(scores), jnp.asarray(mask), 1 - share))
  for p, g in np.ndindex(3, 4):
    row = scores[p, g][mask[p, g]]
    expected = row >= np.quantile(row, 1 - share) if len(row) else []
    np.testing.assert_array_equal(kept[p, g][mask[p, g]], expected)
  assert not np.any(kept & ~mask)


def test_the_perception_kl_is_clipped_on_both_sides():
  """k1 may be negative. It is clipped to [0, bound], without gradient where it is clipped."""
  objective = objectives.create(
    "papo_d", perception_kl="k1", perception_clip=0.2, perception_coef=1.0, entropy_penalty=0.0,
    masked_entropy_penalty=0.0)  # fmt: skip
  logp = np.array([[[-0.5, -0.5, -0.5]]], np.float32)
  view = TokenStats(logp - np.array([[[-1.0, 0.1, 1.0]]], np.float32), logp)
  batch = Experience(mask=np.ones((1, 1, 3), bool), advantages=np.zeros((1, 1, 1)),
                     old=TokenStats(logp, logp), rewards=np.zeros((1, 1)),
                     views={"masked": view})  # fmt: skip

  def loss(logp):
    return objective.loss(TokenStats(logp, logp), batch)[0]

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(logp))
  assert value == pytest.approx(-(0 + 0.1 + 0.2) / 3, rel=1e-5)
  np.testing.assert_allclose(gradient, [[[0, -1 / 3, 0]]], atol=1e-7)

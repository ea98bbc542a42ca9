"""Tests the choice of groups and responses, and coefficients that change with each update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_vlm import objectives
from jaxrl_vlm.types import Experience, TokenStats

P, G, T = 3, 2, 4
MASK = np.arange(T) < np.array([[[4], [2]], [[3], [4]], [[1], [0]]])
LOGP = np.full((P, G, T), -0.5, np.float32)
# The penalty gives every token that counts a gradient, also without an advantage.
PLAIN = {"kl_coef": 0.0, "entropy_penalty": 0.1}


def experience(advantages, **more):
  return Experience(mask=MASK, advantages=np.asarray(advantages, np.float32)[..., None],
                    old=TokenStats(LOGP, LOGP), rewards=np.zeros((P, G)), **more)  # fmt: skip


def gradient(objective, batch):
  prepared = objective.prepare(batch)
  grad = jax.grad(lambda logp: objective.loss(TokenStats(logp, LOGP), prepared)[0])
  return np.asarray(grad(jnp.asarray(LOGP))), objective.prepare_metrics(prepared)


def test_mask_overlong_leaves_out_truncated_responses():
  batch = experience([[1, -1], [1, -1], [1, 0]], truncated=np.array([[1, 0], [0, 1], [0, 0]], bool))
  masked, metrics = gradient(objectives.create("grpo", mask_overlong=True, **PLAIN), batch)
  counted = MASK & ~batch.truncated[..., None]
  by_hand, _ = gradient(
    objectives.create("grpo", **PLAIN), dataclasses.replace(batch, mask=counted)
  )
  np.testing.assert_array_equal(masked, by_hand)
  assert metrics["truncated_share"] == pytest.approx(2 / 5)  # one response has no tokens
  with pytest.raises(ValueError, match="truncated=None: config.objective.mask_overlong=True"):
    objectives.create("grpo", mask_overlong=True).prepare(experience([[1, -1]] * P))


def test_mask_zero_advantages_leaves_out_groups_without_advantages():
  batch = experience([[0, 0], [1, -1], [0, 0]])
  masked, metrics = gradient(objectives.create("grpo", mask_zero_advantages=True, **PLAIN), batch)
  plain, others = gradient(objectives.create("grpo", **PLAIN), batch)
  assert not np.any(masked[[0, 2]]) and np.any(plain[0])
  np.testing.assert_allclose(masked[1], plain[1] * MASK.sum() / MASK[1].sum(), rtol=1e-6)
  assert metrics["zero_advantage_share"] == others["zero_advantage_share"] == pytest.approx(2 / 3)


def test_filter_with_several_keys_keeps_groups_that_are_mixed_in_one_of_them():
  accuracy = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
  seen = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [np.nan, np.nan]])
  soft = objectives.create("dapo", filter_keys=("accuracy", "seen"))
  kept = soft.kept(accuracy, accuracy, {"seen": seen})
  np.testing.assert_array_equal(kept, [True, True, False, False])
  hard = objectives.create("dapo")
  np.testing.assert_array_equal(hard.kept(accuracy), [False, True, False, False])
  by_reward = objectives.create("dapo", filter_keys=("reward",))
  np.testing.assert_array_equal(by_reward.kept(accuracy, 1 - accuracy), [0, 1, 0, 0])
  with pytest.raises(ValueError, match="no such verifier 'seen' .known: accuracy, reward"):
    soft.kept(accuracy, accuracy, {})


def test_zero_advantage_share_does_not_count_truncated_groups():
  batch = experience([[1, -1], [1, -1], [0, 0]], truncated=np.array([[1, 1], [0, 0], [0, 0]], bool))
  _, metrics = gradient(objectives.create("grpo", mask_overlong=True, **PLAIN), batch)
  assert metrics["zero_advantage_share"] == pytest.approx(1 / 3)


# State


def test_the_kl_coefficient_equals_verls_controller():
  """Compares three updates with five responses each."""
  objective = objectives.create("grpo", kl_coef=0.02, kl_target=0.1, kl_horizon=50)
  batch = experience([[1, -1]] * P, views={"ref": TokenStats(LOGP, LOGP)})
  state, value = objective.initial_state(), 0.02
  for measured in (0.3, 0.105, 0.01):
    prepared = objective.prepare(dataclasses.replace(batch, state=state))
    assert objective.prepare_metrics(prepared)["kl_coef"] == pytest.approx(value, rel=1e-6)
    state = objective.next_state(prepared, {"ref_kl": jnp.float32(measured)})
    value *= 1 + np.clip(measured / 0.1 - 1, -0.2, 0.2) * 5 / 50
  assert state["kl_coef"] == pytest.approx(value, rel=1e-6)
  assert objectives.create("grpo").initial_state() == {}


def test_the_kl_coefficient_never_becomes_negative():
  objective = objectives.create("grpo", kl_coef=0.02, kl_target=0.1, kl_horizon=1)
  batch = experience([[1, -1]] * P, state=objective.initial_state())
  state = objective.next_state(objective.prepare(batch), {"ref_kl": jnp.float32(0)})
  assert state["kl_coef"] == 0


@pytest.mark.parametrize("where", ["loss", "reward"])
def test_loss_and_penalty_use_the_adapted_kl_coefficient(where):
  objective = objectives.create("grpo", kl="k2", kl_in=where, kl_coef=0.02, kl_target=0.1)
  ref = TokenStats(LOGP - 1, LOGP)
  state = {"kl_coef": jnp.float32(0.5)}
  if where == "loss":
    batch = experience(np.zeros((P, G)), views={"ref": ref}, state=state)
    loss, _ = objective.loss(TokenStats(LOGP, LOGP), objective.prepare(batch))
    assert loss == pytest.approx(0.5 * 0.5)
  else:
    penalty = objective.penalty(TokenStats(LOGP, LOGP), ref, jnp.asarray(MASK), state)
    np.testing.assert_allclose(penalty, 0.25 * MASK)
    batch = experience(np.zeros((P, G)), views={"ref": ref}, state=state)
    metrics = objective.prepare_metrics(objective.prepare(batch))
    assert metrics["ref_kl"] == pytest.approx(0.5)  # the input of the controller


def test_papo_anneals_perception_and_entropy():
  settings = {"perception_kl": "k1", "perception_coef": 1.0, "entropy_penalty": 0.5,
              "masked_entropy_penalty": 0.25}  # fmt: skip
  objective = objectives.create("papo_d", anneal_updates=4, **settings)
  view = {"masked": TokenStats(LOGP - 0.2, LOGP)}
  batch = experience(np.zeros((P, G)), views=view, state=objective.initial_state())
  full = -0.2 + 0.5 * 0.5 + 0.25 * 0.7
  for done in range(6):
    prepared = objective.prepare(batch)
    loss, metrics = objective.loss(TokenStats(LOGP, LOGP), prepared)
    left = 1 - min(done / 4, 1)
    assert loss == pytest.approx(full * left, abs=1e-6)
    assert objective.prepare_metrics(prepared)["anneal"] == pytest.approx(left)
    batch = dataclasses.replace(batch, state=objective.next_state(prepared, metrics))

"""Tests DPO, IPO and hinge losses against formulas in torch, and their invariances and errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxrl_vlm.objectives.dpo import DPO
from jaxrl_vlm.types import Experience, TokenStats

P, T = 5, 6
OBJECTIVES = {
  "sigmoid": DPO(),
  "smoothed": DPO(beta=0.3, label_smoothing=0.1),
  "ipo": DPO(beta=0.2, loss_type="ipo"),
  "hinge": DPO(beta=0.5, loss_type="hinge"),
  "sft": DPO(sft_coef=0.7),
  "sft_tokens": DPO(sft_coef=0.7, loss_type="ipo", aggregation="token-mean"),
}
every = pytest.mark.parametrize("name", OBJECTIVES)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def batch(seed: int = 0, dtype=np.float32, shift: float = 0.0, least: int = 1):
  """Generates log-probabilities [P, 2, T] of the policy, and an experience with the reference's.

  Args:
    seed: Seed of the random numbers.
    dtype: Type of the log-probabilities.
    shift: Difference from the reference that is added for chosen tokens and subtracted for rejected
      tokens.
    least: Smallest number of tokens of a response.
  """
  rng = np.random.default_rng(seed)
  mask = np.arange(T) < rng.integers(least, T + 1, (P, 2, 1))
  ref = -rng.exponential(1.0, (P, 2, T))
  logp = ref + rng.standard_normal((P, 2, T)) + shift * np.array([1, -1])[None, :, None]
  # Values at padded tokens must have no effect.
  logp, ref = (np.where(mask, x, np.nan).astype(dtype) for x in (logp, ref))
  return logp, experience(mask, ref)


def experience(mask, ref) -> Experience:
  return Experience(mask=mask, advantages=None, old=None, rewards=None, views={"ref": stats(ref)})


def stats(logp) -> TokenStats:
  return TokenStats(logp=logp, entropy=jnp.zeros_like(logp))


def run(objective: DPO, logp, experience: Experience, jit: bool = True):
  """Returns ((loss, metrics), gradient) of the minibatch as a single microbatch."""

  def loss(logp, experience):
    return objective.loss(stats(logp), objective.prepare(experience))

  grad = jax.value_and_grad(loss, has_aux=True)
  return (jax.jit(grad) if jit else grad)(jnp.asarray(logp), experience)


def by_hand(objective: DPO, logp, ref, mask):
  """Computes loss, metrics and gradient pair by pair with torch in float64."""
  policy = torch.tensor(np.nan_to_num(logp).astype(np.float64), requires_grad=True)
  losses, rewards, nll, tokens = [], [], [], 0
  for p in range(len(logp)):
    scores = []
    for g in (0, 1):
      keep = torch.tensor(mask[p, g])
      ratio = policy[p, g][keep] - torch.tensor(ref[p, g][mask[p, g]].astype(np.float64))
      scores.append(ratio.mean() if objective.loss_type == "ipo" else ratio.sum())
    z, b, e = scores[0] - scores[1], objective.beta, objective.label_smoothing
    log_sigmoid = torch.nn.functional.logsigmoid
    losses.append(
      {
        "sigmoid": -(1 - e) * log_sigmoid(b * z) - e * log_sigmoid(-b * z),
        "ipo": (z - 1 / (2 * b)) ** 2,
        "hinge": torch.relu(1 - b * z),
      }[objective.loss_type]
    )
    rewards.append([b * float(s.detach()) for s in scores])
    chosen = -policy[p, 0][torch.tensor(mask[p, 0])]
    nll.append(chosen.sum() if objective.aggregation == "token-mean" else chosen.mean())
    tokens += len(chosen)
  count = tokens if objective.aggregation == "token-mean" else len(nll)
  mean_nll = torch.stack(nll).sum() / count
  loss = torch.stack(losses).mean() + objective.sft_coef * mean_nll
  loss.backward()
  chosen, rejected = np.array(rewards).T
  metrics = {
    "reward_chosen": chosen.mean(),
    "reward_rejected": rejected.mean(),
    "reward_margin": (chosen - rejected).mean(),
    "reward_accuracy": (chosen > rejected).mean(),
    "nll_chosen": float(mean_nll.detach()),
  }
  assert policy.grad is not None
  return float(loss.detach()), metrics, policy.grad.numpy()


@every
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_loss_gradient_and_metrics_equal_the_formula(name, seed, jit):
  objective = OBJECTIVES[name]
  logp, e = batch(seed)
  (value, metrics), gradient = run(objective, logp, e, jit)
  loss, expected, slope = by_hand(objective, logp, e.views["ref"].logp, e.mask)
  close(value, loss)
  close(gradient, slope)
  assert np.abs(slope).max() > 1e-3 and not np.any(gradient[~e.mask])
  assert metrics.keys() == expected.keys()
  for key, number in expected.items():
    close(metrics[key], number, err_msg=key)
  assert 0 < expected["reward_accuracy"] < 1


def test_at_the_reference_the_loss_is_log_2_with_opposite_gradients():
  """If l = ref, every z is 0. The gradient is −β/2 for chosen and β/2 for rejected tokens."""
  _, e = batch()
  (value, metrics), gradient = run(DPO(beta=0.1), e.views["ref"].logp, e)
  close(value, np.log(2))
  close(gradient * P, 0.05 * np.where(e.mask, np.array([-1, 1])[None, :, None], 0))
  close(metrics["reward_margin"], 0)


@every
def test_padding_changes_nothing(name):
  logp, e = batch(2)
  room = [(0, 2), (0, 0), (0, 3)]
  padded = experience(
    np.pad(e.mask, room), np.pad(e.views["ref"].logp, room, constant_values=np.inf)
  )
  (value, metrics), gradient = run(OBJECTIVES[name], logp, e)
  (other, others), slope = run(OBJECTIVES[name], np.pad(logp, room, constant_values=np.nan), padded)
  close(other, value)
  jax.tree.map(close, others, metrics)
  close(slope[:P, :, :T], gradient)
  assert not np.any(slope[P:]) and not np.any(slope[:, :, T:])


@every
def test_the_order_of_prompts_does_not_matter(name):
  logp, e = batch(8, least=0)
  order = np.random.default_rng(8).permutation(P)
  (value, metrics), gradient = run(OBJECTIVES[name], logp, e)
  (other, others), slope = run(OBJECTIVES[name], *jax.tree.map(lambda x: x[order], (logp, e)))
  close(other, value)
  jax.tree.map(close, others, metrics)
  close(slope, np.asarray(gradient)[order])
  assert np.any(order != np.arange(P)) and np.any(gradient)


@every
@pytest.mark.parametrize("empty", [0, 1, 2], ids=["chosen", "rejected", "both"])
def test_a_pair_with_an_empty_response_is_left_out(name, empty):
  logp, e = batch(3)
  mask = e.mask.copy()
  mask[2, slice(None) if empty == 2 else empty] = False
  (value, metrics), gradient = run(OBJECTIVES[name], logp, dataclasses.replace(e, mask=mask))
  rest = np.array([0, 1, 3, 4])
  alone = experience(e.mask[rest], e.views["ref"].logp[rest])
  (expected, others), slope = run(OBJECTIVES[name], logp[rest], alone)
  close(value, expected)
  jax.tree.map(close, metrics, others)
  close(gradient[rest], slope)
  assert not np.any(gradient[2])


@every
def test_loss_and_gradient_are_zero_if_all_responses_are_empty(name):
  logp, e = batch(3)
  e = dataclasses.replace(e, mask=np.zeros_like(e.mask))
  (value, metrics), gradient = run(OBJECTIVES[name], logp, e)
  assert value == 0 and not np.any(gradient)
  assert all(x == 0 for x in metrics.values())


@every
@pytest.mark.parametrize("size", [1, 2])
def test_microbatches_add_up(name, size):
  """Tests splits along P, with pairs of all lengths and some pairs that are left out."""
  objective = OBJECTIVES[name]
  logp, e = batch(4, least=0)
  assert not e.mask.any(-1).all() and e.mask.any(-1).all(-1).sum() >= 2
  (value, metrics), gradient = run(objective, logp, e)
  prepared = objective.prepare(e)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def one(logp, experience):
    return objective.loss(stats(logp), experience)

  total, sums, slopes = 0.0, jax.tree.map(np.zeros_like, metrics), []
  for start in range(0, P, size):
    microbatch = jax.tree.map(lambda a, i=start: a[i : i + size], (logp, prepared))
    (loss, some), slope = one(*microbatch)
    total += loss
    sums = jax.tree.map(np.add, sums, some)
    slopes.append(slope)
  close(total, value)
  jax.tree.map(close, sums, metrics)
  close(np.concatenate(slopes), gradient)


@every
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shift", [-80.0, 80.0])
def test_results_are_finite_if_policies_are_far_apart(name, dtype, shift):
  objective = OBJECTIVES[name]
  logp, e = batch(5, dtype, shift)
  (value, metrics), gradient = run(objective, logp, e)
  assert np.isfinite(value) and all(np.isfinite(x) for x in metrics.values())
  assert metrics["reward_accuracy"] == (shift > 0)
  assert gradient.dtype == dtype
  gradient = np.asarray(gradient, np.float32)
  assert np.all(np.isfinite(gradient))
  if objective.loss_type == "sigmoid" and shift < 0 and not objective.sft_coef:
    # The sigmoid is saturated, and the gradient has its full size β.
    pull = objective.beta * (1 - objective.label_smoothing) / P
    close(gradient[e.mask[:, 0].nonzero()[0], 0, 0], -pull, rtol=1e-2)


def test_bfloat16_log_probabilities_are_added_in_float32():
  logp, e = batch(6, jnp.bfloat16)
  (value, _), _ = run(DPO(), logp, e)
  ref = e.views["ref"].logp
  exact, _, _ = by_hand(DPO(), logp.astype(np.float32), ref.astype(np.float32), e.mask)
  close(value, exact)


def test_loss_prepares_an_experience_that_is_not_prepared():
  logp, e = batch(7)
  direct, _ = DPO().loss(stats(logp), e)
  close(direct, run(DPO(), logp, e)[0][0])
  prepared = DPO().prepare(e)
  with pytest.raises(ValueError, match="has been prepared already"):
    DPO().prepare(prepared)
  assert prepared.weights is not None and prepared.token_weights is not None
  close(prepared.weights.sum(), 1)  # weights of the NLL of chosen responses
  assert not np.any(prepared.weights[:, 1])
  close(prepared.token_weights, e.mask / e.mask.sum())


@pytest.mark.parametrize("group", [1, 3])
def test_groups_of_other_than_two_samples_are_errors(group):
  e = experience(np.ones((P, group, T), bool), np.zeros((P, group, T), np.float32))
  message = rf"experience\.mask: shape \(5, {group}, 6\); expected \[P, 2, T\]"
  with pytest.raises(ValueError, match=message):
    DPO().prepare(e)


def test_a_missing_reference_is_an_error():
  logp, e = batch()
  assert DPO().views == ("ref",) and DPO().grad_views == ()
  with pytest.raises(ValueError, match="needs the view 'ref'"):
    DPO().loss(stats(logp), dataclasses.replace(e, views={}))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"beta": 0.0}, "config.objective.beta=0.0: expected a number > 0"),
    (
      {"label_smoothing": 0.6},
      "config.objective.label_smoothing=0.6: expected a number >= 0 and <= 0.5",
    ),
    (
      {"label_smoothing": 0.1, "loss_type": "ipo"},
      "config.objective.label_smoothing=0.1: expected 0, because loss_type='ipo' has no labels to "
      "smooth",
    ),
    (
      {"loss_type": "kto"},
      "config.objective.loss_type='kto': expected one of 'sigmoid', 'ipo', 'hinge'",
    ),
    ({"sft_coef": -1}, "config.objective.sft_coef=-1: expected a number >= 0"),
  ],
)
def test_bad_settings_are_errors(settings, message):
  with pytest.raises(ValueError) as error:
    DPO(**settings)
  assert str(error.value) == message

"""DPO, IPO and hinge: torch formulas, what must not matter, extremes and mistakes."""

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
  """Log-probabilities [P, 2, T] of the policy, and an experience with those of the reference.

  The policy's are `shift` or -`shift` away at every token, chosen and rejected apart.
  """
  rng = np.random.default_rng(seed)
  mask = np.arange(T) < rng.integers(least, T + 1, (P, 2, 1))
  ref = -rng.exponential(1.0, (P, 2, T))
  logp = ref + rng.standard_normal((P, 2, T)) + shift * np.array([1, -1])[None, :, None]
  # What stands on the padding is anything at all.
  logp, ref = (np.where(mask, x, np.nan).astype(dtype) for x in (logp, ref))
  return logp, experience(mask, ref)


def experience(mask, ref) -> Experience:
  return Experience(mask=mask, advantages=None, old=None, rewards=None, views={"ref": stats(ref)})


def stats(logp) -> TokenStats:
  return TokenStats(logp=logp, entropy=jnp.zeros_like(logp))


def run(objective: DPO, logp, experience: Experience, jit: bool = True):
  """((loss, metrics), gradient), of the whole as one microbatch."""

  def of(logp, experience):
    return objective.loss(stats(logp), objective.prepare(experience))

  grad = jax.value_and_grad(of, has_aux=True)
  return (jax.jit(grad) if jit else grad)(jnp.asarray(logp), experience)


def by_hand(objective: DPO, logp, ref, mask):
  """Loss, metrics and gradient in float64 from torch: one pair after another."""
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
def test_loss_gradient_and_metrics_are_the_formula(name, seed, jit):
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


def test_the_first_step_is_log_2_and_pushes_the_two_apart():
  """l = ref: every z is 0, and the slope is −β/2 on a chosen token, β/2 on a rejected one."""
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
def test_prompts_have_no_order(name):
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
def test_a_pair_without_one_of_its_responses_counts_nowhere(name, empty):
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
def test_nothing_but_masked_responses(name):
  logp, e = batch(3)
  e = dataclasses.replace(e, mask=np.zeros_like(e.mask))
  (value, metrics), gradient = run(OBJECTIVES[name], logp, e)
  assert value == 0 and not np.any(gradient)
  assert all(x == 0 for x in metrics.values())


@every
@pytest.mark.parametrize("size", [1, 2])
def test_microbatches_add_up(name, size):
  """Any split along P, with pairs of every length and some that do not count."""
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
    part = jax.tree.map(lambda a, i=start: a[i : i + size], (logp, prepared))
    (loss, some), slope = one(*part)
    total += loss
    sums = jax.tree.map(np.add, sums, some)
    slopes.append(slope)
  close(total, value)
  jax.tree.map(close, sums, metrics)
  close(np.concatenate(slopes), gradient)


@every
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shift", [-80.0, 80.0])
def test_finite_where_policies_are_far_apart(name, dtype, shift):
  objective = OBJECTIVES[name]
  logp, e = batch(5, dtype, shift)
  (value, metrics), gradient = run(objective, logp, e)
  assert np.isfinite(value) and all(np.isfinite(x) for x in metrics.values())
  assert metrics["reward_accuracy"] == (shift > 0)
  assert gradient.dtype == dtype
  gradient = np.asarray(gradient, np.float32)
  assert np.all(np.isfinite(gradient))
  if objective.loss_type == "sigmoid" and shift < 0 and not objective.sft_coef:
    # Saturated, but still pulled back with all of β.
    pull = objective.beta * (1 - objective.label_smoothing) / P
    close(gradient[e.mask[:, 0].nonzero()[0], 0, 0], -pull, rtol=1e-2)


def test_bfloat16_log_probabilities_are_added_in_float32():
  logp, e = batch(6, jnp.bfloat16)
  (value, _), _ = run(DPO(), logp, e)
  ref = e.views["ref"].logp
  exact, _, _ = by_hand(DPO(), logp.astype(np.float32), ref.astype(np.float32), e.mask)
  close(value, exact)


def test_an_experience_is_prepared_on_the_way_or_once():
  logp, e = batch(7)
  direct, _ = DPO().loss(stats(logp), e)
  close(direct, run(DPO(), logp, e)[0][0])
  prepared = DPO().prepare(e)
  with pytest.raises(ValueError, match="has been prepared already"):
    DPO().prepare(prepared)
  assert prepared.weights is not None and prepared.token_weights is not None
  close(prepared.weights.sum(), 1)  # of the NLL of chosen responses
  assert not np.any(prepared.weights[:, 1])
  close(prepared.token_weights, e.mask / e.mask.sum())


@pytest.mark.parametrize("group", [1, 3])
def test_other_than_two_samples_are_refused(group):
  e = experience(np.ones((P, group, T), bool), np.zeros((P, group, T), np.float32))
  message = rf"experience\.mask: shape \(5, {group}, 6\); expected \[P, 2, T\]"
  with pytest.raises(ValueError, match=message):
    DPO().prepare(e)


def test_the_reference_is_needed():
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
def test_mistakes(settings, message):
  with pytest.raises(ValueError) as error:
    DPO(**settings)
  assert str(error.value) == message

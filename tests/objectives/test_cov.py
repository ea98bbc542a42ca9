"""Tests Clip-Cov and KL-Cov against verl's formulas in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_vlm import objectives
from jaxrl_vlm.types import Experience, TokenStats

P, G, T = 4, 4, 8


def batch(seed=0):
  rng = np.random.default_rng(seed)
  mask = np.arange(T) < rng.integers(1, T + 1, (P, G, 1))
  old = -rng.exponential(2.0, (P, G, T)).astype(np.float32)
  now = (old + 0.3 * rng.standard_normal((P, G, T))).astype(np.float32)
  advantages = np.broadcast_to(2 * rng.standard_normal((P, G, 1)), mask.shape).astype(np.float32)
  experience = Experience(mask=mask, advantages=advantages, old=TokenStats(old, old),
                          rewards=advantages[..., 0])  # fmt: skip
  return TokenStats(now, now), experience


def eligible(stats, experience, low, high, clip):
  """Returns the tokens whose covariance is between `low` and `high` and that PPO does not clip."""
  mask, now, a = experience.mask, np.asarray(stats.logp), experience.advantages
  ratio = np.exp(now - experience.old.logp)
  clipped = np.where(a > 0, ratio > 1 + clip, ratio < 1 - clip)
  covariance = (a - a[mask].mean()) * (now - now[mask].mean())
  return mask & ~clipped & (covariance > low) & (covariance < high)


def test_clip_cov_drops_all_eligible_tokens_if_the_share_is_large_enough():
  stats, experience = batch()
  objective = objectives.create("clip_cov", cov_share=1.0, clip_low=0.2, clip_high=0.2)
  chosen = eligible(stats, experience, 1.0, 5.0, 0.2)
  assert 3 < chosen.sum() < experience.mask.sum() / 2
  a, mask = experience.advantages, experience.mask
  ratio = np.exp(np.asarray(stats.logp) - experience.old.logp)
  token = np.maximum(-a * ratio, -a * ratio.clip(0.8, 1.2))
  expected = (token * ~chosen)[mask].sum() / mask.sum()

  def loss(logp):
    return objective.loss(dataclasses.replace(stats, logp=logp), experience)

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(stats.logp))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert metrics["cov_tokens"] == pytest.approx(chosen.sum() / mask.sum())
  assert not np.any(gradient[chosen])
  clipped = np.where(a > 0, ratio > 1.2, ratio < 0.8)
  assert np.all(np.asarray(gradient != 0) == (mask & ~chosen & ~clipped))


def test_clip_cov_samples_its_share_of_the_eligible_tokens_uniformly():
  objective = objectives.create("clip_cov", cov_share=0.05)
  ranks = []  # of chosen tokens among the eligible ones, from 0 for the first to 1 for the last
  for seed in range(40):
    stats, experience = batch(seed)
    chosen = np.asarray(objective._cov_tokens(objective.prepare(experience), stats.logp)) > 0
    may = eligible(stats, experience, 1.0, 5.0, 1.0)
    assert not np.any(chosen & ~may)
    count = max(int(0.05 * experience.mask.sum() + 1e-4), 1)
    assert chosen.sum() == min(count, may.sum())
    ranks += [np.flatnonzero(may.ravel()).searchsorted(i) / max(may.sum() - 1, 1)
              for i in np.flatnonzero(chosen.ravel())]  # fmt: skip
  # The mean of n uniform ranks is 0.5 ± 0.29 / √n.
  assert len(ranks) > 60 and abs(np.mean(ranks) - 0.5) < 4 * 0.29 / len(ranks) ** 0.5


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_microbatches_equal_the_whole_minibatch_only_with_current(name):
  """With `current`, tokens are chosen once. Without, each microbatch chooses them, as in verl."""
  stats, experience = batch(3)
  objective = objectives.create(name, cov_share=0.1)
  whole = float(objective.loss(stats, objective.prepare(experience))[0])

  def split(experience):
    prepared = objective.prepare(experience)
    microbatches = (jax.tree.map(lambda x, i=i: x[i : i + 1], (stats, prepared)) for i in range(P))
    return sum(float(objective.loss(*microbatch)[0]) for microbatch in microbatches)

  assert split(dataclasses.replace(experience, current=stats)) == pytest.approx(whole, rel=1e-5)
  assert split(experience) != pytest.approx(whole, rel=1e-3)

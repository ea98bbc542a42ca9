"""Tests the correction for differences between sampler and scorer against values by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_vlm import objectives
from jaxrl_vlm.types import Experience, TokenStats

# π_old / μ of each token of two responses. The second token of the second response is padding.
RATIOS = np.array([[[1.5, 4.0], [0.25, 9.0]]], np.float32)
MASK = np.array([[[1, 1], [1, 0]]], bool)
OLD = np.full((1, 2, 2), -1.0, np.float32)


def run(**settings):
  """Returns the negative gradient of GPG's loss with advantage 1, and the metrics."""
  objective = objectives.create("gpg", clip_dual=None, **settings)
  experience = Experience(
    mask=MASK, advantages=np.ones((1, 2, 1), np.float32), old=TokenStats(OLD, OLD),
    rewards=np.ones((1, 2)), sampler_logp=OLD - np.log(RATIOS),
  )  # fmt: skip
  experience = objective.prepare(experience)
  gradient = jax.grad(lambda logp: objective.loss(TokenStats(logp, OLD), experience)[0])
  return -np.asarray(gradient(jnp.asarray(OLD))), objective.prepare_metrics(experience)


# Product and geometric mean of the ratios of the first response. For the second response, both are
# the ratio of its only token.
SEQUENCE, MEAN = 6.0, math.sqrt(6.0)


@pytest.mark.parametrize(
  ("kind", "level", "high", "expected"),
  [
    ("none", "token", 2.0, [[1, 1], [1, 0]]),
    ("tis", "token", 2.0, [[1.5, 2], [0.25, 0]]),
    ("tis", "sequence", 5.0, [[5, 5], [0.25, 0]]),
    ("tis", "geometric", 5.0, [[MEAN, MEAN], [0.25, 0]]),
  ],
)
def test_truncated_weights(kind, level, high, expected):
  gradient, metrics = run(correction=kind, correction_level=level, correction_high=high)
  np.testing.assert_allclose(gradient[0], np.array(expected) / 3, rtol=1e-5)
  assert ("correction_mean" in metrics) == (kind != "none")


@pytest.mark.parametrize(
  ("level", "low", "high", "expected", "tokens"),
  [
    ("token", 0.5, 2.0, [[1.5, 0], [0, 0]], 1),
    ("token", 0.1, 5.0, [[1.5, 4], [0.25, 0]], 3),
    ("sequence", 0.1, 5.0, [[0, 0], [0.25, 0]], 1),
    ("geometric", 0.5, 5.0, [[MEAN, MEAN], [0, 0]], 2),
  ],
)
def test_masked_tokens_are_left_out_of_the_mean_loss(level, low, high, expected, tokens):
  gradient, metrics = run(
    correction="mis", correction_level=level, correction_low=low, correction_high=high
  )
  np.testing.assert_allclose(gradient[0], np.array(expected) / tokens, rtol=1e-5)
  assert metrics["correction_cut"] == pytest.approx(1 - tokens / 3)


def test_correction_metrics():
  _, metrics = run(correction="tis")
  assert metrics["correction_mean"] == pytest.approx((1.5 + 4 + 0.25) / 3, rel=1e-5)
  assert metrics["correction_cut"] == pytest.approx(1 / 3)


def test_kl_and_entropy_terms_are_not_weighted():
  settings = {"correction": "tis", "kl_coef": 0.5, "kl": "k2", "entropy_penalty": 0.1}
  objective = objectives.create("grpo", **settings)
  experience = Experience(
    mask=MASK, advantages=np.zeros((1, 2, 1), np.float32), old=TokenStats(OLD, OLD),
    rewards=np.ones((1, 2)), views={"ref": TokenStats(OLD - 1, OLD)},
    sampler_logp=OLD - np.log(RATIOS),
  )  # fmt: skip
  loss, _ = objective.loss(TokenStats(OLD, OLD), experience)
  assert loss == pytest.approx(0.5 * 0.5 + 0.1 * 1.0)


def test_weights_of_extreme_differences_are_finite():
  objective = objectives.create("gpg", correction="tis", correction_level="sequence")
  experience = Experience(
    mask=MASK, advantages=np.ones((1, 2, 1), np.float32), old=TokenStats(OLD, OLD),
    rewards=np.ones((1, 2)), sampler_logp=OLD - np.array([[[300, 300], [-300, np.nan]]]),
  )  # fmt: skip
  prepared = objective.prepare(experience)
  assert np.all(np.isfinite(prepared.weights))
  assert all(np.isfinite(x) for x in objective.prepare_metrics(prepared).values())


def test_missing_log_probabilities_of_the_sampler_are_an_error():
  experience = Experience(
    mask=MASK, advantages=np.ones((1, 2, 1)), old=TokenStats(OLD, OLD), rewards=np.ones((1, 2))
  )
  with pytest.raises(ValueError, match="sampler_logp=None: config.objective.correction='mis'"):
    objectives.create("grpo", correction="mis").prepare(experience)

"""Tests held-out accuracy as the mean over several sampled answers to each question."""

import re
import shutil

import numpy as np
import pytest

from jaxrl_vlm import evaluate, metrics, train
from jaxrl_vlm.rollout import Sampling
from tests import tiny_run

pytestmark = pytest.mark.slow

QUESTIONS, SAMPLES = 6, 3


def get_config():
  """An RL stage that evaluates by sampling. The last batch of questions is not full."""
  config = tiny_run.get_config()
  _, rl = config.stages
  rl.steps = 2
  rl.eval.examples, rl.eval.batch, rl.eval.every = QUESTIONS, 4, 1
  rl.eval.samples, rl.eval.temperature = SAMPLES, 1.0
  config.stages = (rl,)
  config.checkpoint.every, config.checkpoint.keep = 1, 10
  return config


@pytest.fixture(scope="module")
def results():
  """The return values of `evaluate` during the run of `finished`, in order."""
  return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, results):
  """The workdir of a complete run."""
  from jaxrl_vlm.stages import run

  workdir = tmp_path_factory.mktemp("evaluation") / "run"
  with tiny_run.one_device(), pytest.MonkeyPatch.context() as patch:
    evaluate_ = run.evaluate

    def record(*args, **kwargs):
      results.append(evaluate_(*args, **kwargs))
      return results[-1]

    patch.setattr(run, "evaluate", record)
    train.train(get_config(), workdir)
  return workdir


def evaluations(workdir):
  return [
    {k: v for k, v in r.items() if k.startswith("eval/")}
    for r in metrics.read(workdir)
    if "eval/accuracy" in r
  ]


def test_accuracy_is_the_mean_over_questions_and_samples(finished, results):
  assert len(results) == len(evaluations(finished)) == 3
  for result, logged in zip(results, evaluations(finished), strict=True):
    assert result.correct.shape == (QUESTIONS, SAMPLES)
    texts = [[len(set(text)) / 32 for text in row] for row in result.texts]
    np.testing.assert_allclose(result.correct, texts, rtol=1e-6)  # the reward of the tiny run
    assert logged["eval/accuracy"] == pytest.approx(np.mean(texts))
    skills = np.array([e.meta["skill"] for e in result.examples])
    for skill in set(skills):
      assert logged[f"eval/accuracy/{skill}"] == pytest.approx(
        np.mean([t for t, s in zip(texts, skills, strict=True) if s == skill])
      )


def test_sampled_answers_differ_within_an_evaluation_and_between_evaluations(finished, results):
  for result in results:
    texts = [text for row in result.texts for text in row]
    assert len(set(texts)) > len(texts) / 2
  assert results[0].texts != results[1].texts != results[2].texts


def test_a_resumed_run_logs_the_same_evaluations(finished, tmp_path, one_device):
  shutil.copytree(finished, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "model")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
  train.train(get_config(), tmp_path / "run")
  assert evaluations(tmp_path / "run") == evaluations(finished)


def test_evaluation_is_greedy_by_default_with_one_sample_per_question():
  assert evaluate.sampling(tiny_run.get_config().stages[1]) == Sampling(1, 8, 0.0)


@pytest.mark.parametrize(
  ("samples", "temperature", "message"),
  [
    (
      4,
      0.0,
      "eval.samples=4: expected 1 with eval.temperature=0.0, which gives the same answer "
      "every time",
    ),
    (0, 1.0, "eval.samples=0: expected at least 1"),
    (1, -1.0, "eval.temperature=-1.0: expected 0 (greedy) or more"),
  ],
)
def test_invalid_evaluation_settings_are_refused(samples, temperature, message):
  stage = tiny_run.get_config().stages[1]
  stage.eval.samples, stage.eval.temperature = samples, temperature
  with pytest.raises(ValueError, match=re.escape(message)):
    evaluate.sampling(stage)

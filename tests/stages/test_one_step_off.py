"""Tests config.pipeline="one_step_off": each step samples the responses of the next step."""

import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_vlm import checkpoint, metrics, train
from jaxrl_vlm.report import read_rollouts
from tests import tiny_run

pytestmark = pytest.mark.slow

STEPS, SAVED = 7, 3  # a checkpoint is saved after every third step


def get_config(pipeline="one_step_off"):
  config = tiny_run.get_config()
  rl = config.stages[1]
  rl.steps = STEPS
  rl.eval.examples = 0
  rl.objective.name = "grpo"
  rl.optimizer.learning_rate = 1e-2
  config.stages = (rl,)
  config.pipeline = pipeline
  config.rollout.chunk = 2
  config.checkpoint.every, config.checkpoint.keep = SAVED, 10
  config.rollouts_every, config.rollouts_kept = 1, 4
  return config


def prompts_of(workdir: pathlib.Path) -> dict[int, list[str]]:
  """Returns the ids of the examples of every step."""
  return {
    step: [record["id"] for record in records] for step, records in read_rollouts(workdir).items()
  }


def records_of(workdir):
  return [r for r in metrics.read(workdir) if "train/loss" in r]


def weights_of(workdir):
  return load_file(workdir / "model" / "model.safetensors")


def run(workdir, **options):
  with tiny_run.one_device():
    train.train(get_config(**options), workdir)
  return workdir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The workdir of an uninterrupted run."""
  return run(tmp_path_factory.mktemp("finished") / "run")


def test_the_sampling_policy_is_one_update_older(finished):
  differences = [r["objective/sampler_logp_difference"] for r in records_of(finished)]
  # The first step and the steps after a checkpoint sample their responses themselves.
  on_policy = [True, False, False, True, False, False, True]
  for step, (value, same) in enumerate(zip(differences, on_policy, strict=True)):
    assert value < 1e-4 if same else value > 1e-3, (step + 1, differences)


def test_old_is_scored_with_the_policy_that_is_updated(finished):
  """A step has one update, so `old` equals the policy in the loss, whichever policy sampled.

  This includes the visual tokens, which are computed again after the vision tower has changed.
  """
  for record in records_of(finished):
    assert abs(record["objective/approx_kl_k1"]) < 1e-6, record


def test_importance_correction_is_on_by_default(finished):
  records = records_of(finished)
  assert all("objective/correction_mean" in r for r in records)
  assert abs(records[0]["objective/correction_mean"] - 1) < 1e-3
  assert abs(records[1]["objective/correction_mean"] - 1) > 1e-3


def test_nothing_is_compiled_after_the_first_steps(finished):
  """The metrics of a step are written during the next step, and count its compilations until then.

  So the second record includes all compilations of the first two steps.
  """
  counts = [r["time/compilations"] for r in records_of(finished)]
  seconds = [r["time/compile_seconds"] for r in records_of(finished)]
  assert counts[1] == counts[-1] > 0 and seconds[1] == seconds[-1] > 0


def test_the_prompts_are_those_of_a_synchronous_run(finished, tmp_path):
  synchronous = run(tmp_path / "run", pipeline="synchronous")
  assert prompts_of(finished) == prompts_of(synchronous)
  # The first step is on policy in both runs, so its responses are the same.
  assert records_of(synchronous)[0]["train/reward"] == records_of(finished)[0]["train/reward"]


def test_a_resumed_run_equals_an_uninterrupted_run(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  for step in (workdir / "checkpoints").iterdir():
    if step.name.isdigit() and int(step.name) > SAVED:
      shutil.rmtree(step)
  shutil.rmtree(workdir / "model")
  run(workdir)
  expected, found = weights_of(finished), weights_of(workdir)
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_stopped_run_resumes_with_the_first_unused_prompts(finished, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setenv("SIGNAL_AT_STEP", "SIGTERM:1")
    for owner, name in ((checkpoint.Checkpoints, "save"), (metrics.MetricsWriter, "write")):
      patch.setattr(owner, name, getattr(owner, name))  # registers the original for the undo
    tiny_run.signal_at_step()
    run(workdir)
  done = len(records_of(workdir))
  assert 0 < done < STEPS
  run(workdir)
  assert prompts_of(workdir) == prompts_of(finished)

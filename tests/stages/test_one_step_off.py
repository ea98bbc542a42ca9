"""Responses drawn one update ahead: what that changes and what it does not."""

import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_vlm import checkpoint, metrics, train
from jaxrl_vlm.report import read_rollouts
from tests import tiny_run

STEPS, SAVED = 7, 3  # a checkpoint follows every third step


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
  """Ids of the examples of every step."""
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
def ahead(tmp_path_factory):
  return run(tmp_path_factory.mktemp("ahead") / "run")


def test_the_policy_that_sampled_is_one_update_older(ahead):
  apart = [r["objective/sampler_logp_difference"] for r in records_of(ahead)]
  own = [True, False, False, True, False, False, True]  # the first, and those after a checkpoint
  for step, (value, same) in enumerate(zip(apart, own, strict=True)):
    assert value < 1e-4 if same else value > 1e-3, (step + 1, apart)


def test_what_is_updated_is_the_policy_that_is_scored(ahead):
  """Before its only update a policy is its own `old`, whoever sampled: features included."""
  for record in records_of(ahead):
    assert abs(record["objective/approx_kl_k1"]) < 1e-6, record


def test_importance_correction_is_on_unless_it_is_set(ahead):
  records = records_of(ahead)
  assert all("objective/correction_mean" in r for r in records)
  assert abs(records[0]["objective/correction_mean"] - 1) < 1e-3
  assert abs(records[1]["objective/correction_mean"] - 1) > 1e-3


def test_nothing_is_compiled_after_the_first_steps(ahead):
  """Compilations are counted as the next step begins, with what that has drawn ahead: the last
  program, the update, is compiled in the first step, and counted with the second."""
  counts = [r["time/compilations"] for r in records_of(ahead)]
  seconds = [r["time/compile_seconds"] for r in records_of(ahead)]
  assert counts[1] == counts[-1] > 0 and seconds[1] == seconds[-1] > 0


def test_the_prompts_are_those_of_a_synchronous_run(ahead, tmp_path):
  there = run(tmp_path / "run", pipeline="synchronous")
  assert prompts_of(ahead) == prompts_of(there)
  # Only what is drawn for them is other.
  assert records_of(there)[0]["train/reward"] == records_of(ahead)[0]["train/reward"]


def test_resumed_from_a_checkpoint_it_ends_the_same(ahead, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(ahead, workdir)
  for step in (workdir / "checkpoints").iterdir():
    if step.name.isdigit() and int(step.name) > SAVED:
      shutil.rmtree(step)
  shutil.rmtree(workdir / "model")
  run(workdir)
  expected, found = weights_of(ahead), weights_of(workdir)
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_stopped_it_goes_on_with_the_prompts_that_no_step_has_used(ahead, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setenv("SIGNAL_AT_STEP", "SIGTERM:1")
    for owner, name in ((checkpoint.Checkpoints, "save"), (metrics.MetricsWriter, "write")):
      patch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    tiny_run.signal_at_step()
    run(workdir)
  done = len(records_of(workdir))
  assert 0 < done < STEPS
  run(workdir)
  assert prompts_of(workdir) == prompts_of(ahead)

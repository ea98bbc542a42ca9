"""Tests `token_budget`: a stage ends with the step that spends the budget, also if resumed."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_vlm import metrics, stages, train
from jaxrl_vlm.errors import UserError
from tests import tiny_run

pytestmark = pytest.mark.slow

BUDGET = 100  # a step of 4 x 2 responses of at most 8 tokens generates at most 64


def get_config():
  """An RL stage that ends when its budget is spent, and then a supervised stage."""
  config = tiny_run.get_config()
  sft, rl = config.stages
  rl.token_budget = BUDGET
  rl.steps = 7
  sft.steps = 1
  config.stages = (rl, sft)
  config.checkpoint.every, config.checkpoint.keep = 1, 10
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("budget") / "run"
  with tiny_run.one_device():
    train.train(get_config(), workdir)
  return workdir


def records_of(workdir: pathlib.Path, stage: str) -> list[dict]:
  return [r for r in metrics.read(workdir) if r["stage"] == stage and "train/loss" in r]


def test_the_step_that_spends_the_budget_is_the_last_step(finished):
  steps = records_of(finished, "rl")
  spent = [r["train/generated_tokens"] for r in steps]
  # The tokens of a step: the mean length times 4 x 2 responses.
  np.testing.assert_allclose(
    np.diff([0, *spent]), [8 * r["train/response_length"] for r in steps], rtol=1e-6
  )
  assert spent[-2] < BUDGET <= spent[-1] and len(spent) < 7
  last = steps[-1]["step"]
  # Like the last step of any stage, it is evaluated and saved, and the next stage starts from it.
  evaluated = [r["step"] for r in metrics.read(finished) if "eval/accuracy" in r]
  assert evaluated == [0, last]
  meta = json.loads((finished / "checkpoints" / str(last) / "meta" / "metadata").read_text())
  assert meta["stage_step"] == last and meta["generated_tokens"] == spent[-1]
  assert [r["step"] for r in records_of(finished, "sft")] == [last + 1]
  assert "train/generated_tokens" not in records_of(finished, "sft")[0]


@pytest.mark.parametrize("before_end", [1, 0])
def test_a_resumed_stage_ends_at_the_same_step(before_end, finished, tmp_path, one_device):
  """This includes a run that was stopped between the last step of the stage and the next stage."""
  last = records_of(finished, "rl")[-1]["step"]
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / "model")
  for path in (workdir / "checkpoints").iterdir():
    if int(path.name) > last - before_end:
      shutil.rmtree(path)
  train.train(get_config(), workdir)
  for stage in ("rl", "sft"):
    for again, once in zip(records_of(workdir, stage), records_of(finished, stage), strict=True):
      same = {k: v for k, v in once.items() if not k.startswith("time/")}
      assert {k: v for k, v in again.items() if not k.startswith("time/")} == same
  ours, theirs = (load_file(w / "model" / "model.safetensors") for w in (workdir, finished))
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)


def get_filtering_config(steps: int):
  config = get_config()
  rl = config.stages[0]
  config.stages = (rl,)
  rl.steps, rl.token_budget, rl.eval.examples = steps, 0, 0
  # No group has an accuracy above 0.99, so both tries discard all groups.
  rl.objective.update(filter_groups=True, max_tries=2, filter_low=0.99, filter_high=1.0)
  return config


def test_tokens_of_discarded_groups_count(tmp_path, one_device):
  train.train(get_filtering_config(1), tmp_path / "run")
  (step,) = records_of(tmp_path / "run", "rl")
  assert step["train/tries"] == 2
  assert step["train/generated_tokens"] == pytest.approx(2 * 8 * step["train/response_length"])


def test_tokens_of_a_failed_step_do_not_count(tmp_path, one_device, monkeypatch):
  config = get_filtering_config(2)
  train.train(config, tmp_path / "once")
  with monkeypatch.context() as patch:
    calls, encode = [], stages.Run.encode

    def broken(self, examples):
      calls.append(examples)
      if len(calls) == 4:  # the second try of the second step
        raise UserError("a broken image")
      return encode(self, examples)

    patch.setattr(stages.Run, "encode", broken)
    with pytest.raises(UserError, match="a broken image"):
      train.train(config, tmp_path / "again")
  assert len(records_of(tmp_path / "again", "rl")) == 1
  train.train(config, tmp_path / "again")
  counts = [
    [r["train/generated_tokens"] for r in records_of(tmp_path / name, "rl")]
    for name in ("once", "again")
  ]
  assert counts[0] == counts[1] and len(counts[0]) == 2

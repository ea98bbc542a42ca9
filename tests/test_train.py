"""Tests short runs of the shipped base model with every method, and the files that a run writes."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import jaxrl_vlm as jv
from jaxrl_vlm import metrics, report
from jaxrl_vlm.config import load_config_file, override
from jaxrl_vlm.data import digit_boards
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.train import train

ROOT = pathlib.Path(__file__).parents[1]
BASE = ROOT / "checkpoints" / "digits_base"


def small(method: str, tmp_path: pathlib.Path, steps: int = 2):
  config = load_config_file(str(ROOT / "configs" / f"digits_{method}.py"))
  for field, value in {
    "model.path": BASE,
    "stages[0].steps": steps,
    "stages[0].prompts_per_step": 8,
    "stages[0].num_samples": 4,
    "stages[0].eval.examples": 16,
    "stages[0].eval.batch": 16,
    "stages[0].data.options": "{'live': True}",
    "stages[0].optimizer.warmup_steps": 1,
    "rollouts_every": 1,
  }.items():
    override(config, f"config.{field}", str(value))
  return config


# Metrics that the paper of each method plots.
OWN = {
  "grpo": ("objective/ref_kl", "objective/clip_high"),
  "dapo": ("train/tries", "train/kept_groups"),
  "papo": ("objective/perception_kl", "objective/masked_nll", "objective/ref_kl"),
  "vppo": (
    "objective/dependency_kept",
    "objective/dependency_rejected",
    "objective/shaping_max",
    "train/kept_groups",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", OWN)
def test_every_method_trains(method, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  train(small(method, tmp_path), tmp_path / "run")
  workdir = tmp_path / "run"
  records = [r for r in metrics.read(workdir) if "train/reward" in r]
  assert [r["step"] for r in records] == [1, 2]
  for record in records:
    for key in OWN[method] + (
      "train/accuracy",
      "train/response_length",
      "objective/entropy",
      "objective/sampler_logp_difference",
      "time/tokens_per_second",
      "time/compilations",
    ):
      assert record[key] is not None, key
    # Sampler and scorer are two programs with the same policy, so only rounding differs.
    assert record["objective/sampler_logp_difference_max"] < 1e-3
    assert record["train/bad_steps"] == 0 and record["train/grad_norm"] > 0
  assert records[1]["time/compilations"] <= records[0]["time/compilations"] + 1
  if method == "vppo":
    assert records[0]["objective/dependency_kept"] > records[0]["objective/dependency_rejected"]
    assert abs(records[0]["objective/shaping_mean"] - 1) < 1e-3

  assert "held-out accuracy" in capsys.readouterr().out
  for name in (
    "config.json",
    "metrics.jsonl",
    "report.html",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/preprocessor_config.json",
  ):
    assert (workdir / name).stat().st_size > 0, name
  assert list((workdir / "tensorboard").iterdir()) and list((workdir / "checkpoints").iterdir())
  sampled = report.read_rollouts(workdir)
  assert sorted(sampled) == [1, 2] and len(sampled[1][0]["samples"]) == 4
  # The parameters changed, by about the learning rate, and are finite.
  before, after = (
    jv.load_pretrained(p)[1]["decoder"]["norm"]["scale"] for p in (BASE, workdir / "model")
  )
  assert 0 < np.abs(np.asarray(after) - np.asarray(before)).max() < 0.01
  if method == "grpo":
    assert_transformers_decodes_the_same(workdir / "model")


def assert_transformers_decodes_the_same(path):
  theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(path).eval()
  model, params, processor = jv.load_pretrained(path, prompt_buckets=(40,), patch_buckets=(36,))
  examples = [digit_boards.make_example("test", 1, i) for i in range(6)]
  encoded = [processor.encode(e) for e in examples]
  prompt = processor.collate(encoded)
  rollout = jv.generate(
    model, params, prompt, jv.Sampling(max_tokens=64, temperature=0), processor=processor
  )
  for row, one in enumerate(encoded):
    ids = torch.tensor(one.tokens.astype(np.int64))[None]
    grid = one.patch_positions.max(0) + 1
    generated = theirs.generate(
      input_ids=ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=64,
      do_sample=False,
      mm_token_type_ids=(ids == processor.image_token_id).long(),
      pixel_values=torch.tensor(one.patches),
      image_grid_thw=torch.tensor([[1, int(grid[0]), int(grid[1])]]),
    )
    expected = generated[0, ids.shape[1] :].numpy()
    ours = np.asarray(rollout.tokens[row, 0])[np.asarray(rollout.mask[row, 0])]
    np.testing.assert_array_equal(ours, expected)
    assert rollout.text[row][0].endswith("}")


@pytest.mark.slow
def test_shipped_model_decodes_the_same_in_transformers():
  assert_transformers_decodes_the_same(BASE)


def test_shipped_model_is_small_and_complete():
  files = list(BASE.iterdir())
  assert sum(f.stat().st_size for f in files) <= 8 * 2**20
  config = json.loads((BASE / "config.json").read_text())
  assert config["model_type"] == "qwen2_5_vl"


@pytest.mark.slow
def test_a_wrong_flag_is_one_line_before_anything_is_written(tmp_path):
  def run(*flags):
    return subprocess.run(
      [
        sys.executable,
        "-m",
        "jaxrl_vlm.train",
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        *flags,
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )

  for flag, wanted in (
    ("--config.stages[0].objective.name=vpo", "did you mean 'vppo'?"),
    ("--config.stages[0].objective.clip_hihg=1", "did you mean 'clip_high'?"),
    ("--config.stages[0].learning_rate=1", "config.stages[0].learning_rate"),
    ("--config.sead=1", "did you mean 'seed'?"),
    ("--workdri=x", "did you mean 'workdir'?"),
    ("--config.stages[0].prompts_per_step=0", "config.stages[0].prompts_per_step=0"),
    ("--config.stages[0].accuracy=exat", "did you mean 'exact'?"),
    ("--config.stages[0].optimizer.schedule=cosin", "config.optimizer.schedule='cosin'"),
    ("--config.stages[0].top_p=0", "sampling.top_p=0"),
    ("--config.stages[0].num_samples=1", "num_samples=1: expected at least 2"),
    ("--config.stages[0].eval.samples=4", "eval.samples=4: expected 1 with"),
    ("--config.stages[0].token_budget=-1", "config.stages[0].token_budget=-1: expected at least"),
    ("--config.stages[0].data.options={'taks': 'read'}", "did you mean 'tasks'?"),
    ("--config.checkpoint.every=0", "config.checkpoint.every=0"),
    ("--config.stages[0].minibatches=0", "config.stages[0].minibatches=0"),
    ("--config.seed=-1", "config.seed=-1: expected at least 0"),
    ("--config.model.path=nowhere", "config.model.path='nowhere'"),
  ):
    result = run(flag)
    assert result.returncode == 2, flag
    assert wanted in result.stderr and result.stderr.count("\n") == 1, (flag, result.stderr)
    assert not (tmp_path / "run").exists()


def test_error_of_an_unreadable_model_is_one_line(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  config = small("grpo", tmp_path)
  config.model.path = str(tmp_path)
  with pytest.raises(UserError, match=f"config.model.path='{tmp_path}': .*config.json"):
    train(config, tmp_path / "run")

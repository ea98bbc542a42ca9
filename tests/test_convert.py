"""Tests python -m jaxrl_vlm.convert: in both directions and from checkpoints, without any loss."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import jaxrl_vlm as jv
from jaxrl_vlm import train
from jaxrl_vlm.convert import convert
from jaxrl_vlm.errors import UserError
from tests import tiny, tiny_run


def tensors(path):
  found = {}
  for file in path.glob("*.safetensors"):
    found |= load_file(file)
  return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl_moe", "gemma3"])
def test_round_trip_changes_no_parameter_and_no_file(family, tmp_path):
  start, orbax, back = (tmp_path / name for name in ("hf", "orbax", "back"))
  tiny.make_hf(start, family=family, dtype=torch.bfloat16, max_shard_size="200KB")
  lines = convert(start, orbax)
  assert not list(orbax.glob("*.safetensors*"))
  assert convert(orbax, back) == lines
  # The files have the published tensor names, so compare them after loading.
  _, before, processor = jv.load_pretrained(start, param_dtype="bfloat16")
  _, after, _ = jv.load_pretrained(back, param_dtype="bfloat16")
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert {t.dtype.name for t in tensors(back).values()} == {"bfloat16"}
  for file in start.iterdir():
    if "safetensors" not in file.name:
      if file.suffix == ".json":
        assert json.loads((back / file.name).read_text()) == json.loads(file.read_text())
      else:
        assert (back / file.name).read_bytes() == file.read_bytes()
  count = sum(x.size for x in jax.tree.leaves(before))
  assert f"{count:,} parameters" in lines[-1] and len(lines) > 30


def test_command_prints_the_mapping(tmp_path):
  tiny.make_hf(tmp_path / "hf", family="qwen3_vl_moe")
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "jaxrl_vlm.convert",
      f"--source={tmp_path / 'hf'}",
      f"--target={tmp_path / 'out'}",
      "--dtype=bfloat16",
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (
    "decoder/layers/mlp/up                    [3, 6, 64, 24] bfloat16  <->  "
    "model.language_model.layers.{0..2}.mlp.experts.gate_up_proj"
  ) in done.stdout
  assert done.stdout.endswith(f"written: {tmp_path / 'out'}\n")


@pytest.mark.parametrize("kind", ["everything", "adapters", "some of the adapters"])
def test_converted_checkpoint_equals_the_saved_model(kind, tmp_path, one_device):
  config = tiny_run.get_config() if kind == "everything" else tiny_run.get_lora_config()
  stage = config.stages[-1]
  stage.steps, stage.eval.examples, stage.objective.name = 2, 0, "grpo"
  config.stages = (stage,)
  workdir = tmp_path / "run"
  if kind == "some of the adapters":  # the other adapters come from an earlier run
    train.train(config, tmp_path / "earlier")
    config.model.lora.path = str(tmp_path / "earlier" / "adapter")
    config.model.trainable = ("decoder/layers/*/lora",)
  train.train(config, workdir)
  convert(workdir / "checkpoints" / "2", tmp_path / "out")
  got, expected = tensors(tmp_path / "out"), tensors(workdir / "model")
  assert set(got) == set(expected)
  start = tensors(workdir / "scratch")
  assert any((start[name] != value).any() for name, value in expected.items())
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
  ("source", "target", "dtype", "message"),
  [
    ("nothing", "out", "stored", "expected a Hugging Face directory"),
    ("hf", "hf", "stored", "hf: exists and is not an empty directory"),
    ("hf", "out", "int8", "--dtype=int8: expected 'stored', 'float32' or 'bfloat16'"),
    ("broken", "out", "stored", "model.safetensors: no such file"),
    ("llama", "out", "stored", "model_type='llama' is not supported"),
  ],
)
def test_mistakes_are_one_line_and_write_nothing(source, target, dtype, message, tmp_path):
  tiny.make_hf(tmp_path / "hf")
  for name, content in (("broken", None), ("llama", {"model_type": "llama"})):
    (tmp_path / name).mkdir()
    text = (tmp_path / "hf" / "config.json").read_text() if content is None else json.dumps(content)
    (tmp_path / name / "config.json").write_text(text)
  with pytest.raises(UserError, match=message) as error:
    convert(tmp_path / source, tmp_path / target, dtype)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()

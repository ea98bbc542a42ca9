"""Tests that hosts read only the shards of their devices, and that errors name invalid files."""

import json
import os
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxrl_vlm as jv
from jaxrl_vlm import models, parallel
from jaxrl_vlm.models import names, weights
from tests import tiny


class Spy:
  """A tensor that counts the elements that are read from it."""

  def __init__(self, array: np.ndarray):
    self.array, self.shape, self.read = array, array.shape, 0

  def __getitem__(self, index) -> np.ndarray:
    part = self.array[index]
    self.read += part.size
    return part


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_slices_of_every_parameter_are_read_without_the_rest(family, tmp_path):
  """The slices are those of a mesh that splits both axes of a matrix."""
  tiny.make_hf(tmp_path, family=family)
  config = models.from_directory(tmp_path)
  shapes = models.abstract_params(config)
  mesh = parallel.make_mesh({"fsdp": 2, "tensor": 4})
  places = weights.by_path(parallel.param_shardings(mesh, shapes))
  flat = weights.by_path(shapes)
  rng = np.random.default_rng(0)
  split = 0
  for entry in names.entries(config):
    shape, place = flat[entry.path].shape, places[entry.path]
    if entry.layers is not None:
      shape = shape[1:]
      place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*place.spec[1:]))
    for stored in {entry.file_shape(shape, config), entry.memory_shape(shape, config)}:
      theirs = rng.normal(size=stored)
      every = tuple(slice(None) for _ in shape)
      whole = entry.read(theirs, shape, every, config)
      whole = whole.T if entry.turned else whole
      assert whole.shape == shape
      if stored == entry.file_shape(shape, config) and entry.half is None:
        np.testing.assert_array_equal(entry.write(whole, config), theirs)
      for index in place.devices_indices_map(shape).values():
        spy = Spy(theirs)
        part = entry.read(spy, shape, index, config)
        np.testing.assert_array_equal(part.T if entry.turned else part, whole[index])
        if entry.kind != "patches":
          assert spy.read == part.size
          split += part.size < whole.size
  assert split > 50


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gemma3"])
def test_loading_onto_a_mesh_equals_loading_onto_one_device(family, tmp_path):
  tiny.make_hf(tmp_path, family=family)
  config = models.from_directory(tmp_path)
  shapes = models.abstract_params(config)
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
  places = parallel.param_shardings(mesh, shapes)
  plain = weights.load_params(tmp_path, config, shapes)
  split = weights.load_params(tmp_path, config, shapes, places)
  jax.tree.map(np.testing.assert_array_equal, plain, split)
  jax.tree.map(
    lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(), split, places
  )


PROCESS = """
import json, sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxrl_vlm import models, parallel
from jaxrl_vlm.models import weights

read = total = 0
class Counting:
  def __init__(self, tensor):
    self.tensor = tensor
    self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype
  def __getitem__(self, index):
    global read
    part = self.tensor[index]
    read += part.nbytes
    return part

import contextlib
plain = weights.Checkpoint.tensor
@contextlib.contextmanager
def tensor(self, name):
  with plain(self, name) as found:
    yield Counting(found)
weights.Checkpoint.tensor = tensor

path = sys.argv[3]
config = models.from_directory(path)
shapes = models.abstract_params(config)
mesh = parallel.make_mesh({"fsdp": 2})
params = weights.load_params(path, config, shapes, parallel.param_shardings(mesh, shapes))
held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
norm = jax.jit(lambda p: sum((x.astype(np.float32) ** 2).sum() for x in jax.tree.leaves(p)))
taken = read
weights.save_params(sys.argv[4], config, params, shard_bytes=100_000)
read = taken
print(json.dumps({"devices": jax.device_count(), "read": read, "held": held,
                  "total": sum(x.nbytes for x in jax.tree.leaves(params)),
                  "norm": float(norm(params))}))
"""


@pytest.mark.slow
def test_each_process_reads_the_shards_of_its_devices_and_process_0_writes(tmp_path):
  """Runs two processes with one device each on this host."""
  tiny.make_hf(tmp_path, family="qwen3_vl")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  running = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(i), str(tmp_path), str(tmp_path / "saved")],
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in range(2)
  ]
  done = [process.communicate(timeout=240) for process in running]
  for process, (_, err) in zip(running, done, strict=True):
    assert process.returncode == 0, err
  config = models.from_directory(tmp_path)
  params = weights.load_params(tmp_path, config, models.abstract_params(config))
  norm = sum(float((np.asarray(x) ** 2).sum()) for x in jax.tree.leaves(params))
  for out, _ in done:
    result = json.loads(out.splitlines()[-1])
    assert result["devices"] == 2
    # Norms and biases are replicated on both devices.
    assert result["held"] < 0.6 * result["total"]
    # The patch embedding is small, and every process reads it completely.
    patches = params["vision"]["patch_embed"]["kernel"].nbytes
    assert result["read"] == result["held"] + patches // 2
    np.testing.assert_allclose(result["norm"], norm, rtol=1e-5)
  # Saving requires both processes, but only process 0 writes.
  again = weights.load_params(tmp_path / "saved", config, models.abstract_params(config))
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_square_expert_tensors_are_read_as_in_transformers(tmp_path):
  """Experts are [E, D, 2·I] in files and [E, 2·I, D] in memory.

  If D = 2·I, the shape does not show which layout a tensor has.
  """
  config = models.from_hf(
    json.loads(
      json.dumps(
        {
          "model_type": "qwen3_vl_moe",
          "text_config": {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "rope_parameters": {"mrope_section": [2, 1, 1]},
          },
          "vision_config": {
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": 16,
            "patch_size": 4,
            "num_position_embeddings": 4,
            "deepstack_visual_indexes": [],
          },
        }
      )
    )
  )
  gate, up = (e for e in names.entries(config) if e.half is not None)
  ours = np.random.default_rng(0).normal(size=(2, 3, 16, 8))
  stored = np.concatenate(
    [gate.write(ours[0], config), up.write(ours[1], config)],
    axis=gate.half_axis(ours[0].shape, config),
  )
  memory = np.concatenate([ours[0], ours[1]], axis=-1).swapaxes(1, 2)
  np.testing.assert_array_equal(stored, memory)
  every = (slice(None),) * 3
  for entry, half in ((gate, ours[0]), (up, ours[1])):
    np.testing.assert_array_equal(entry.read(stored, half.shape, every, config), half)


def test_experts_are_saved_in_the_transposed_layout_of_published_files(tmp_path):
  """These are [E, D, 2·I] and [E, I, D], as in the published files that vLLM and SGLang read."""
  tiny.make_hf(tmp_path, family="qwen3_vl_moe")
  model, params, processor = jv.load_pretrained(tmp_path)
  jv.save_pretrained(tmp_path / "out", model, params, processor)
  name = "model.language_model.layers.0.mlp.experts.{}_proj"
  saved, original = (load_file(p / "model.safetensors") for p in (tmp_path / "out", tmp_path))
  for part in ("gate_up", "down"):
    np.testing.assert_array_equal(
      saved[name.format(part)], original[name.format(part)].swapaxes(1, 2)
    )
  assert saved[name.format("down")].shape == (6, 24, 64)


def test_errors_name_a_damaged_index_and_missing_files(tmp_path):
  tiny.make_hf(tmp_path, max_shard_size="100KB")
  index = tmp_path / "model.safetensors.index.json"
  content = json.loads(index.read_text())
  files = sorted(set(content["weight_map"].values()))
  missing = tmp_path / files[1]
  kept = missing.read_bytes()
  missing.unlink()
  with pytest.raises(FileNotFoundError, match=f"{files[1]}: no such file"):
    jv.load_pretrained(tmp_path)
  missing.write_bytes(kept[:100])
  with pytest.raises(ValueError, match=f"{files[1]}: not a complete safetensors file"):
    jv.load_pretrained(tmp_path)
  missing.write_bytes(kept)
  index.write_text("{")
  with pytest.raises(ValueError, match="index.json: expected a weight_map from tensors to files"):
    jv.load_pretrained(tmp_path)
  index.write_text(json.dumps({"weight_map": {"a": None}}))
  with pytest.raises(FileNotFoundError, match="None: no such file"):
    jv.load_pretrained(tmp_path)
  del content["weight_map"]["model.norm.weight"]
  index.write_text(json.dumps(content))
  for file in files:  # remove the tensor from the files too
    held = load_file(tmp_path / file)
    if held.pop("model.norm.weight", None) is not None:
      save_file(held, tmp_path / file)
  with pytest.raises(
    ValueError,
    match=r"index.json: tensor 'model.norm.weight' is missing, "
    r"expected with shape \(64,\)",
  ):
    jv.load_pretrained(tmp_path)
  outside = tmp_path.parent / "outside.safetensors"
  save_file({"x": np.zeros(1)}, outside)
  index.write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
  with pytest.raises(ValueError, match="names '../outside.safetensors', which is not a file of"):
    jv.load_pretrained(tmp_path)


def test_quantised_tensors_are_an_error(tmp_path):
  tiny.make_hf(tmp_path)
  file = tmp_path / "model.safetensors"
  tensors = load_file(file)
  for dtype, code in ((np.int32, "I32"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")):
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].astype(dtype)}, file)
    with pytest.raises(
      ValueError,
      match=f"model.safetensors: tensor 'lm_head.weight' has type "
      f"{code}, expected one of F64, F32, BF16, F16; quantised",
    ):
      jv.load_pretrained(tmp_path)


def test_a_saved_config_names_the_dtype_of_the_saved_tensors(tmp_path):
  tiny.make_hf(tmp_path / "hf", dtype=torch.bfloat16)
  for dtype in ("float32", "bfloat16"):
    model, params, processor = jv.load_pretrained(tmp_path / "hf", param_dtype=dtype)
    jv.save_pretrained(tmp_path / dtype, model, params, processor)
    said = json.loads((tmp_path / dtype / "config.json").read_text())
    assert {
      said["dtype"],
      *(said[part]["dtype"] for part in ("text_config", "vision_config") if "dtype" in said[part]),
    } == {dtype}
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / dtype)
    assert str(again.dtype) == f"torch.{dtype}"

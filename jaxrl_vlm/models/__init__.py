"""Flax models by family, and Hugging Face directories in and out."""

import json
import pathlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_vlm.models import weights
from jaxrl_vlm.models.config import ModelConfig, VisionConfig, from_hf
from jaxrl_vlm.models.vlm import VLM, empty_cache, logits
from jaxrl_vlm.types import Params, Prompt

if TYPE_CHECKING:
  from jaxrl_vlm.data.processor import Processor

__all__ = ["VLM", "ModelConfig", "VisionConfig", "abstract_params", "dummy_prompt", "empty_cache",
           "from_directory", "from_hf", "init_params", "load_pretrained", "logits",
           "save_pretrained"]


def dummy_prompt(config: ModelConfig, num_prompts: int = 1, length: int = 8,
                 num_patches: int | None = None) -> Prompt:
  """A Prompt of the right shapes, for initialisation and for compiling ahead of time."""
  n = config.vision.spatial_merge_size**2 if num_patches is None else num_patches
  ids = np.ones((num_prompts, n), np.int32)
  return Prompt(
      tokens=np.zeros((num_prompts, length), np.int32),
      length=np.full((num_prompts,), length, np.int32),
      positions=np.zeros((num_prompts, length, 3), np.int32),
      next_position=np.full((num_prompts,), length, np.int32),
      feature_index=np.full((num_prompts, length), -1, np.int32),
      patches=np.zeros((num_prompts, n, config.vision.patch_dim), np.float32),
      patch_positions=np.zeros((num_prompts, n, 2), np.int32),
      patch_segments=ids, patch_windows=ids)


def abstract_params(config: ModelConfig, dtype: str = "float32") -> Params:
  """Shapes and dtypes of the parameters; nothing is allocated."""
  shapes = jax.eval_shape(
      lambda: VLM(config).init(jax.random.key(0), dummy_prompt(config))["params"])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Random float32 parameters, Flax's initialisers."""
  return jax.jit(lambda k: VLM(config).init(k, dummy_prompt(config))["params"])(key)


def from_directory(path: str | pathlib.Path, dtype: str | None = None, remat: bool = False
                   ) -> ModelConfig:
  """The architecture of a Hugging Face directory. `dtype` None: as in `load_pretrained`."""
  path = pathlib.Path(path)
  if not (path / "config.json").is_file():
    raise FileNotFoundError(
        f"{path / 'config.json'}: no such file; expected a Hugging Face model directory")
  generation = path / "generation_config.json"
  stops = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
  if dtype is None:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return from_hf(json.loads((path / "config.json").read_text()), dtype=dtype, remat=remat,
                 stop_tokens=stops)


def load_pretrained(
    path: str | pathlib.Path, *, dtype: str | None = None, param_dtype: str = "float32",
    remat: bool = False, put=None, **processor_options) -> "tuple[VLM, Params, Processor]":
  """Loads a Hugging Face directory: config.json, *.safetensors, tokenizer, preprocessor.

  Args:
    path: the directory.
    dtype: of activations; None means bfloat16 on accelerators and float32 on CPU.
    param_dtype: of the parameters.
    remat: recompute layers in the backward pass.
    put: (path in the pytree, host array) -> device array; None puts all on the default device.
    **processor_options: of `Processor.from_pretrained`: buckets, pixel limits.

  Returns:
    model, params, processor.

  Raises:
    FileNotFoundError, ValueError: one line naming the file and what is wrong with it.
  """
  from jaxrl_vlm.data.processor import Processor

  config = from_directory(path, dtype=dtype, remat=remat)
  put = put or (lambda _, x: jax.device_put(x))
  params = weights.load_params(path, config, abstract_params(config, param_dtype), put)
  processor = Processor.from_pretrained(path, **processor_options)
  # config.json does not name every vision token; the tokenizer does.
  banned = {*config.suppressed_tokens, *processor.image_token_ids_never_sampled}
  return VLM(config.replace(suppressed_tokens=tuple(sorted(banned)))), params, processor


def save_pretrained(path: str | pathlib.Path, model: VLM, params: Params,
                    processor: "Processor") -> None:
  """Writes a Hugging Face directory that transformers loads to the same logits."""
  weights.save_params(path, model.config, params)
  processor.save_pretrained(path)

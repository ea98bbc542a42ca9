"""Flax models by family, and Hugging Face directories in and out."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_vlm import hf_config
from jaxrl_vlm.models import lora as lora_lib
from jaxrl_vlm.models import weights
from jaxrl_vlm.models.attention import choose as choose_attention
from jaxrl_vlm.models.config import LoRA, ModelConfig, VisionConfig
from jaxrl_vlm.models.families import from_hf
from jaxrl_vlm.models.patterns import matches
from jaxrl_vlm.models.vlm import VLM, logits
from jaxrl_vlm.types import Params, Prompt

if TYPE_CHECKING:
  from jaxrl_vlm.data.processor import Processor

__all__ = [
  "VLM",
  "LoRA",
  "ModelConfig",
  "VisionConfig",
  "abstract_params",
  "choose_attention",
  "dummy_prompt",
  "from_directory",
  "from_hf",
  "init_params",
  "load_pretrained",
  "logits",
  "save_pretrained",
]


def dummy_prompt(
  config: ModelConfig, num_prompts: int = 1, length: int = 8, num_patches: int | None = None
) -> Prompt:
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
    patch_grids=np.ones((num_prompts, n, 2), np.int32),
    patch_segments=ids,
    patch_windows=ids,
  )


# What is computed in float32 whatever the dtype of activations; all else is cast to that first.
_FLOAT32 = ("scale", "*norm*/bias", "positions")


def abstract_params(
  config: ModelConfig, dtype: str = "float32", trainable: Sequence[str] = ()
) -> Params:
  """Shapes and dtypes of the parameters; nothing is allocated.

  Those that `trainable` (patterns; () is all) leaves out have the dtype of activations in place
  of `dtype`, where that does not change the results.
  """
  alone = VLM(config.replace(mesh=None))
  shapes = jax.eval_shape(lambda: alone.init(jax.random.key(0), dummy_prompt(config))["params"])

  def one(keys, x):
    path = weights.path_of(keys)
    keep = matches(trainable, path) or matches(_FLOAT32, path)
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype if keep else config.dtype))

  return jax.tree.map_with_path(one, shapes)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Random float32 parameters, Flax's initialisers."""
  return jax.jit(lambda k: VLM(config).init(k, dummy_prompt(config))["params"])(key)


def from_directory(
  path: str | pathlib.Path, dtype: str | None = None, remat: str = "dots"
) -> ModelConfig:
  """The architecture of a Hugging Face directory. `dtype` None: as in `load_pretrained`."""
  config = hf_config.read(path)
  generation = pathlib.Path(path) / "generation_config.json"
  stops: tuple[int, ...] = ()
  if generation.exists():
    content = hf_config.parse_json(generation.name, generation.read_bytes())
    stops = hf_config.stop_tokens(content, generation.name)
  if dtype is None:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return from_hf(config, dtype=dtype, remat=remat, **({"stop_tokens": stops} if stops else {}))


def load_pretrained(
  path: str | pathlib.Path,
  *,
  dtype: str | None = None,
  param_dtype: str = "float32",
  remat: str = "dots",
  lora: LoRA | None = None,
  trainable: Sequence[str] = (),
  seed: int = 0,
  shardings: Params | None = None,
  **processor_options,
) -> "tuple[VLM, Params, Processor]":
  """Loads a Hugging Face directory: config.json, *.safetensors, tokenizer, preprocessor.

  Args:
    path: the directory.
    dtype: of activations; None means bfloat16 on accelerators and float32 on CPU.
    param_dtype: of the parameters.
    remat: what layers keep for the backward pass: "none" (computed again, everything is kept),
      "dots" or "full" (see `ModelConfig`).
    lora: adapters to add, which change nothing yet.
    trainable: patterns (`models/patterns.py`); parameters that they leave out lie in `dtype`.
      () is all.
    seed: of the adapters.
    shardings: a pytree like the parameters: where each goes; None is the default device.
    **processor_options: of `Processor.from_pretrained`: buckets, pixel limits.

  Returns:
    model, params, processor.

  Raises:
    FileNotFoundError, ValueError: one line naming the file and what is wrong with it.
  """
  from jaxrl_vlm.data.processor import Processor

  config = from_directory(path, dtype=dtype, remat=remat).replace(lora=lora)
  shapes = abstract_params(config, param_dtype, trainable)
  params = weights.load_params(
    path, config, lora_lib.strip(shapes), None if shardings is None else lora_lib.strip(shardings)
  )
  if lora is not None:
    adapters = lora_lib.init_adapters(shapes, jax.random.key(seed), shardings)
    params = lora_lib.merge(params, adapters)
  processor = Processor.from_pretrained(path, **processor_options)
  # The files of the model do not name every vision token, nor always the one that ends a turn, by
  # which a supervised target ends; the tokenizer does.
  banned = {*config.suppressed_tokens, *processor.image_token_ids_never_sampled}
  stops = dict.fromkeys((*config.stop_tokens, *processor.eos_token_ids))
  config = config.replace(
    suppressed_tokens=tuple(sorted(banned)),
    stop_tokens=tuple(stops),
    pad_token=processor.pad_token_id,
  )
  return VLM(config), params, processor


def save_pretrained(
  path: str | pathlib.Path, model: VLM, params: Params, processor: "Processor"
) -> None:
  """Writes a Hugging Face directory that transformers loads to the same logits.

  Adapters are folded into the weights. Parameters are written in the dtype they have, which
  config.json then says. In a run of many hosts all call this, and the first writes.
  """
  weights.save_params(path, model.config, lora_lib.merged(params, model.config))
  if jax.process_index() == 0:
    processor.save_pretrained(path)

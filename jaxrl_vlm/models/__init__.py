"""Flax models of all supported families; loading and saving Hugging Face directories."""

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
  """Returns placeholder prompts of the right shapes, to initialise a model or compile a program.

  Args:
    config: config of the model.
    num_prompts: P.
    length: Lp, which is also the length of each prompt.
    num_patches: N. None means the patches of one visual token.
  """
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


# Patterns of the parameters of computations that are in float32 whatever the dtype of activations:
# norms, and the table of positions of the vision tower. All other parameters are cast to the dtype
# of activations before they are used.
_FLOAT32 = ("scale", "*norm*/bias", "positions")


def abstract_params(
  config: ModelConfig, dtype: str = "float32", trainable: Sequence[str] = ()
) -> Params:
  """Returns the shapes and dtypes of the parameters, without allocating them.

  Args:
    config: config of the model.
    dtype: dtype of the trainable parameters.
    trainable: patterns of the trainable parameters (`models/patterns.py`); () means all. The other
      parameters have the dtype of activations, except where this would change the results.

  Returns:
    A pytree of ShapeDtypeStructs.
  """
  model = VLM(config.replace(mesh=None))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), dummy_prompt(config))["params"])

  def one(keys, x):
    path = weights.path_of(keys)
    keep = matches(trainable, path) or matches(_FLOAT32, path)
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype if keep else config.dtype))

  return jax.tree.map_with_path(one, shapes)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Returns random float32 parameters from Flax's initialisers."""
  return jax.jit(lambda k: VLM(config).init(k, dummy_prompt(config))["params"])(key)


def from_directory(
  path: str | pathlib.Path, dtype: str | None = None, remat: str = "dots"
) -> ModelConfig:
  """Reads the architecture of a Hugging Face directory.

  Args:
    path: the directory.
    dtype: dtype of activations. None means bfloat16 on accelerators and float32 on CPU.
    remat: what layers keep for the backward pass (see `ModelConfig`).
  """
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
    dtype: dtype of activations. None means bfloat16 on accelerators and float32 on CPU.
    param_dtype: dtype of the trainable parameters.
    remat: what layers keep for the backward pass: "none" keeps everything (nothing is recomputed),
      "dots" keeps the results of matrix products and attention, "full" keeps only the inputs of
      layers.
    lora: adapters to add. They are initialised so that they do not change the output of the model.
    trainable: patterns of the trainable parameters (`models/patterns.py`); () means all. The other
      parameters are stored in `dtype`, except those that are used in float32.
    seed: seed of the initial adapters.
    shardings: the sharding of each parameter, as a pytree like the parameters. None places all on
      the default device.
    **processor_options: options of `Processor.from_pretrained`, such as buckets and pixel limits.

  Returns:
    The model, its parameters and its processor.

  Raises:
    FileNotFoundError, ValueError: a file is missing or invalid. The message is one line that names
      the file and the problem.
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
  # The model files do not list all vision tokens. They do not always list the token that ends a
  # turn either, which is the last token of a supervised target. The tokenizer knows both.
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
  """Writes a Hugging Face directory with which transformers computes the same logits.

  Adapters are merged into the weights. Parameters are written in the dtype that they have, and
  config.json names it. In a run of several processes, all must call this function; process 0
  writes.
  """
  weights.save_params(path, model.config, lora_lib.merged(params, model.config))
  if jax.process_index() == 0:
    processor.save_pretrained(path)

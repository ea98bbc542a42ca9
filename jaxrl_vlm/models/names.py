"""Maps each parameter to its tensors in Hugging Face checkpoints: names, shapes and layouts.

"Parameter" means an array of the pytree of this project, "tensor" an array of transformers. A
parameter of stacked layers corresponds to one tensor per layer.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxrl_vlm.models.config import ModelConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter and the tensors that contain the same values.

  Methods that take a `shape` or an array of the parameter take that of one layer if layers are
  stacked.

  Attributes:
    path: path of the parameter in the pytree.
    name: name of the tensor in the model of transformers. `{}` stands for the layer number.
    layers: numbers of the layers that the parameter stacks. None if it is not stacked.
    kind: how the layouts of tensor and parameter differ:
      "same": they are the same;
      "linear": the tensor is [out, in], the parameter [in, out];
      "patches": the tensor is a convolution [out, C, (t,) p, p], the parameter [C·t·p·p, out];
      "experts": the tensor is [E, out, in] in memory and [E, in, out] in files, the parameter
        [E, in, out].
    half: 0 or 1 if the parameter is the first or the second half of the tensor along the axis of
      outputs. None if it is the whole tensor.
  """

  path: Path
  name: str
  layers: range | None = None
  kind: str = "same"
  half: int | None = None

  @property
  def turned(self) -> bool:
    """Whether the result of `read` must still be transposed, which is done on the device."""
    return self.kind == "linear"

  def names(self) -> list[str]:
    """Returns the names of all tensors of the parameter, in the order of its layers."""
    return [self.name] if self.layers is None else [self.name.format(i) for i in self.layers]

  def memory_shape(self, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of the tensor in the model of transformers."""
    vision = config.vision
    if self.kind == "linear":
      return shape[::-1]
    if self.kind == "patches":
      time = () if config.family == "gemma3" else (vision.temporal_patch_size,)
      return (shape[1], vision.in_channels, *time, vision.patch_size, vision.patch_size)
    if self.kind == "experts":
      return (shape[0], shape[2] * (1 if self.half is None else 2), shape[1])
    return shape

  def file_shape(self, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of the tensor in a published file."""
    memory = self.memory_shape(shape, config)
    return (memory[0], memory[2], memory[1]) if self.kind == "experts" else memory

  def read(
    self, tensor: Any, shape: tuple[int, ...], index: tuple[slice, ...], config: ModelConfig
  ) -> np.ndarray:
    """Reads a slice of the parameter from a tensor.

    Only this slice is read from the file, except for the patch embedding, which is small.

    Args:
      tensor: an array, or a slice object of a safetensors file, with the shape `file_shape`.
        Experts may also have `memory_shape`.
      shape: shape of the parameter.
      index: the slice of the parameter.
      config: config of the model.

    Returns:
      The slice, or its transpose if `turned`.
    """
    if self.kind == "same":
      return tensor[index]
    if self.kind == "linear":
      return tensor[index[::-1]]
    if self.kind == "patches":
      return np.ascontiguousarray(tensor[:].reshape(shape[1], -1).T[index])
    expert, into, out = index
    if self.half is not None:
      first, end, _ = out.indices(shape[2])
      out = slice(first + self.half * shape[2], end + self.half * shape[2])
    # As in transformers, a tensor that has the shape in memory is in that layout.
    if tensor_shape(tensor) == self.memory_shape(shape, config):
      return tensor[expert, out, into].swapaxes(1, 2)
    return tensor[expert, into, out]

  def write(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Converts the parameter to the tensor of a published file.

    If the parameter is a half of the tensor, the result is that half.
    """
    if self.kind in ("linear", "patches"):
      return np.ascontiguousarray(array.T.reshape(self.file_shape(array.shape, config)))
    square = self.file_shape(array.shape, config) == self.memory_shape(array.shape, config)
    # Transformers interprets a tensor of square matrices as in the layout in memory.
    if self.kind == "experts" and square:
      array = array.swapaxes(1, 2)
    return np.ascontiguousarray(array)

  def half_axis(self, shape: tuple[int, ...], config: ModelConfig) -> int:
    """Returns the axis along which the two halves that `write` returns are concatenated."""
    square = self.file_shape(shape, config) == self.memory_shape(shape, config)
    return 1 if square else 2


def entries(config: ModelConfig) -> Iterator[Entry]:
  """Yields the entry of every parameter of the model."""
  yield from _vision_entries(config)
  text = "model.language_model"
  yield Entry(("embed", "embedding"), f"{text}.embed_tokens.weight")
  path, name, layers = ("decoder", "layers"), f"{text}.layers.{{}}", range(config.num_layers)
  norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
  if config.post_norms:
    norms = {
      "norm1": "input_layernorm",
      "post_norm1": "post_attention_layernorm",
      "norm2": "pre_feedforward_layernorm",
      "post_norm2": "post_feedforward_layernorm",
    }
  if config.qk_norm:
    norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
  for part, norm in norms.items():
    yield Entry((*path, part, "scale"), f"{name}.{norm}.weight", layers)
  for part in ("q", "k", "v", "o"):
    yield from _linear(
      (*path, part), f"{name}.self_attn.{part}_proj", layers, bias=config.qkv_bias and part != "o"
    )
  if config.moe is None:
    for part in ("gate", "up", "down"):
      yield from _linear((*path, "mlp", part), f"{name}.mlp.{part}_proj", layers)
  else:
    yield from _linear((*path, "mlp", "router"), f"{name}.mlp.gate", layers)
    experts = f"{name}.mlp.experts"
    for half, part in enumerate(("gate", "up")):  # two halves of one tensor
      yield Entry((*path, "mlp", part), f"{experts}.gate_up_proj", layers, "experts", half)
    yield Entry((*path, "mlp", "down"), f"{experts}.down_proj", layers, "experts")
  yield Entry(("decoder", "norm", "scale"), f"{text}.norm.weight")
  if not config.tied:
    yield Entry(("head",), "lm_head.weight", kind="linear")


def _linear(
  path: Path, name: str, layers: range | None = None, bias: bool = False, kind: str = "linear"
) -> Iterator[Entry]:
  yield Entry((*path, "kernel"), f"{name}.weight", layers, kind)
  if bias:
    yield Entry((*path, "bias"), f"{name}.bias", layers)


# Names of the modules of a vision tower in transformers.
_QWEN2 = {
  "tower": "model.visual",
  "patch_embed": "patch_embed.proj",
  "block": "blocks.{}",
  "norm1": "norm1",
  "norm2": "norm2",
  "qkv": "attn.qkv",
  "proj": "attn.proj",
  "up": "mlp.fc1",
  "down": "mlp.fc2",
  "merger_norm": "merger.ln_q",
  "merger_up": "merger.mlp.0",
  "merger_down": "merger.mlp.2",
}
_QWEN3 = _QWEN2 | {
  "up": "mlp.linear_fc1",
  "down": "mlp.linear_fc2",
  "positions": "pos_embed.weight",
  "merger_norm": "merger.norm",
  "merger_up": "merger.linear_fc1",
  "merger_down": "merger.linear_fc2",
}
_VISION_NAMES = {
  "qwen2_vl": _QWEN2,
  "qwen2_5_vl": _QWEN2 | {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
  "qwen3_vl": _QWEN3,
  "qwen3_vl_moe": _QWEN3,
  "gemma3": {
    "tower": "model.vision_tower",
    "patch_embed": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding.weight",
    "block": "encoder.layers.{}",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "proj": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
  },
}


def _vision_entries(config: ModelConfig) -> Iterator[Entry]:
  vision, names = config.vision, _VISION_NAMES[config.family]
  tower = names["tower"]

  def norm(path, name, layers=None):
    yield Entry((*path, "scale"), f"{name}.weight", layers)
    if vision.norm == "layer":
      yield Entry((*path, "bias"), f"{name}.bias", layers)

  yield from _linear(
    ("vision", "patch_embed"),
    f"{tower}.{names['patch_embed']}",
    bias=vision.patch_bias,
    kind="patches",
  )
  if vision.position_grid:
    yield Entry(("vision", "positions"), f"{tower}.{names['positions']}")
  for i, ends in enumerate(vision.segments):
    path, layers = ("vision", f"blocks{i}" if i else "blocks"), range(*ends)
    block = f"{tower}.{names['block']}"
    for part in ("norm1", "norm2"):
      yield from norm((*path, part), f"{block}.{names[part]}", layers)
    for part in ("qkv", "q", "k", "v", "proj", "gate", "up", "down"):
      if part in names:
        suffix = ("mlp", part) if part in ("gate", "up", "down") else (part,)
        yield from _linear((*path, *suffix), f"{block}.{names[part]}", layers, bias=True)
  if vision.merger == "pool":
    projector = "model.multi_modal_projector"
    yield from norm(("vision", "merger", "post_norm"), f"{tower}.post_layernorm")
    yield Entry(("vision", "merger", "norm", "scale"), f"{projector}.mm_soft_emb_norm.weight")
    yield Entry(("vision", "merger", "proj", "kernel"), f"{projector}.mm_input_projection_weight")
    return
  mergers = [(("vision", "merger"), "")]
  mergers += [
    (("vision", f"deepstack{i}"), f"deepstack_merger_list.{i}")
    for i in range(len(vision.deepstack_layers))
  ]
  for path, other in mergers:
    for part in ("norm", "up", "down"):
      name = names[f"merger_{part}"]
      name = f"{tower}.{other}.{name.partition('.')[2]}" if other else f"{tower}.{name}"
      if part == "norm":
        yield from norm((*path, part), name)
      else:
        yield from _linear((*path, part), name, bias=True)


# Names in files -> names in the model of transformers, for the files of every version of
# transformers.
_CANONICAL = tuple(
  (re.compile(pattern), name)
  for pattern, name in (
    (r"^(model\.)?visual\.", "model.visual."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model.language_model."),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
  )
)
# Names in the model of transformers -> names in published files.
_GEMMA3 = (
  ("lm_head.", "language_model.lm_head."),
  ("model.language_model.", "language_model.model."),
  ("model.vision_tower.", "vision_tower.vision_model."),
  ("model.multi_modal_projector.", "multi_modal_projector."),
)
_OLD_QWEN = (("model.visual.", "visual."), ("model.language_model.", "model."))
_PUBLISHED = {"qwen2_vl": _OLD_QWEN, "qwen2_5_vl": _OLD_QWEN, "gemma3": _GEMMA3}


def canonical_name(name: str) -> str:
  """Converts the name of a tensor in a file to its name in the model of transformers."""
  for pattern, new in _CANONICAL:
    if pattern.match(name):
      return pattern.sub(new, name)
  return name


def published_name(name: str, family: str) -> str:
  """Converts the name of a tensor in the model of transformers to its name in published files."""
  for old, new in _PUBLISHED.get(family, ()):
    if name.startswith(old):
      return new + name.removeprefix(old)
  return name


def tensor_shape(tensor: Any) -> tuple[int, ...]:
  """Returns the shape of an array, or of a slice object of a safetensors file."""
  return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)

"""Hugging Face checkpoints in and out: names, shapes and layouts of every parameter."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.types import Params

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter of ours and the tensor(s) of theirs that it equals.

  Attributes:
    path: in our pytree.
    name: in transformers' model; `{}` stands for the layer number.
    layers: numbers of the layers that ours stacks; None for a parameter that is not stacked.
    kind: how the layouts differ:
      "same": not at all;
      "linear": theirs is [out, in], ours [in, out];
      "patches": theirs is a convolution [out, C, (t,) p, p], ours [C·t·p·p, out];
      "experts_in": theirs is [E, 2·I, D] in memory and [E, D, 2·I] in files, ours [E, D, 2, I];
      "experts_out": theirs is [E, D, I] in memory and [E, I, D] in files, as is ours.
  """

  path: Path
  name: str
  layers: range | None = None
  kind: str = "same"

  def names(self) -> list[str]:
    return [self.name] if self.layers is None else [self.name.format(i) for i in self.layers]

  def memory_shape(self, ours: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Shape of theirs in transformers' model, from that of (one layer of) ours."""
    vision = config.vision
    if self.kind == "linear":
      return ours[::-1]
    if self.kind == "patches":
      time = () if config.family == "gemma3" else (vision.temporal_patch_size,)
      return (ours[1], vision.in_channels, *time, vision.patch_size, vision.patch_size)
    if self.kind == "experts_in":
      return (ours[0], ours[2] * ours[3], ours[1])
    return (ours[0], ours[2], ours[1]) if self.kind == "experts_out" else ours

  def file_shape(self, ours: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Shape of theirs in a published file."""
    shape = self.memory_shape(ours, config)
    return (shape[0], shape[2], shape[1]) if self.kind.startswith("experts") else shape

  def read(self, tensor: Any, ours: tuple[int, ...], index: tuple[slice, ...],
           config: ModelConfig) -> np.ndarray:
    """Part `index` of (one layer of) ours, reading only that part of `tensor` where possible.

    `tensor` can be sliced and has the shape of a file or, for experts, that in memory.
    """
    if self.kind == "same":
      return tensor[index]
    if self.kind == "linear":
      return tensor[index[::-1]].T
    if self.kind == "patches":  # small
      return np.ascontiguousarray(tensor[:].reshape(ours[1], -1).T[index])
    # As in transformers, what already has the shape in memory is not transposed.
    swapped = _shape(tensor) == self.memory_shape(ours, config)
    if self.kind == "experts_out":
      return tensor[index[0], index[2], index[1]].swapaxes(1, 2) if swapped else tensor[index]
    part = (tensor[index[0], :, index[1]].swapaxes(1, 2) if swapped
            else tensor[index[0], index[1], :])
    return part.reshape(*part.shape[:2], 2, -1)[:, :, index[2], index[3]]

  def write(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Theirs, as in a published file, from (one layer of) ours."""
    shape = self.file_shape(array.shape, config)
    if self.kind in ("linear", "patches"):
      array = array.T
    elif self.kind.startswith("experts") and shape == self.memory_shape(array.shape, config):
      # A square tensor: transformers takes it for the layout in memory.
      return np.ascontiguousarray(array.reshape(shape).swapaxes(1, 2))
    return np.ascontiguousarray(array.reshape(shape))


def entries(config: ModelConfig) -> Iterator[Entry]:
  """Every parameter of the model beside its name in transformers' model."""
  yield from _vision_entries(config)
  text = "model.language_model"
  yield Entry(("embed", "embedding"), f"{text}.embed_tokens.weight")
  ours, theirs, layers = ("decoder", "layers"), f"{text}.layers.{{}}", range(config.num_layers)
  norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
  if config.post_norms:
    norms = {"norm1": "input_layernorm", "post_norm1": "post_attention_layernorm",
             "norm2": "pre_feedforward_layernorm", "post_norm2": "post_feedforward_layernorm"}
  if config.qk_norm:
    norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
  for part, name in norms.items():
    yield Entry((*ours, part, "scale"), f"{theirs}.{name}.weight", layers)
  for part in ("q", "k", "v", "o"):
    yield from _linear((*ours, part), f"{theirs}.self_attn.{part}_proj", layers,
                       bias=config.qkv_bias and part != "o")
  if config.moe is None:
    for part in ("gate", "up", "down"):
      yield from _linear((*ours, "mlp", part), f"{theirs}.mlp.{part}_proj", layers)
  else:
    yield from _linear((*ours, "mlp", "router"), f"{theirs}.mlp.gate", layers)
    for part, kind in (("gate_up", "experts_in"), ("down", "experts_out")):
      yield Entry((*ours, "mlp", part), f"{theirs}.mlp.experts.{part}_proj", layers, kind)
  yield Entry(("decoder", "norm", "scale"), f"{text}.norm.weight")
  if not config.tied:
    yield Entry(("head",), "lm_head.weight", kind="linear")


def _linear(path: Path, name: str, layers: range | None = None, bias: bool = False,
            kind: str = "linear") -> Iterator[Entry]:
  yield Entry((*path, "kernel"), f"{name}.weight", layers, kind)
  if bias:
    yield Entry((*path, "bias"), f"{name}.bias", layers)


# Names of the parts of a vision tower, by family.
_QWEN2 = {
    "tower": "model.visual", "patch_embed": "patch_embed.proj", "block": "blocks.{}",
    "norm1": "norm1", "norm2": "norm2", "qkv": "attn.qkv", "proj": "attn.proj",
    "up": "mlp.fc1", "down": "mlp.fc2",
    "merger_norm": "merger.ln_q", "merger_up": "merger.mlp.0", "merger_down": "merger.mlp.2"}
_QWEN3 = _QWEN2 | {
    "up": "mlp.linear_fc1", "down": "mlp.linear_fc2", "positions": "pos_embed.weight",
    "merger_norm": "merger.norm", "merger_up": "merger.linear_fc1",
    "merger_down": "merger.linear_fc2"}
_VISION_NAMES = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2 | {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "gemma3": {
        "tower": "model.vision_tower", "patch_embed": "embeddings.patch_embedding",
        "positions": "embeddings.position_embedding.weight", "block": "encoder.layers.{}",
        "norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "proj": "self_attn.out_proj",
        "up": "mlp.fc1", "down": "mlp.fc2"},
}


def _vision_entries(config: ModelConfig) -> Iterator[Entry]:
  vision, names = config.vision, _VISION_NAMES[config.family]
  tower = names["tower"]

  def norm(path, name, layers=None):
    yield Entry((*path, "scale"), f"{name}.weight", layers)
    if vision.norm == "layer":
      yield Entry((*path, "bias"), f"{name}.bias", layers)

  yield from _linear(("vision", "patch_embed"), f"{tower}.{names['patch_embed']}",
                     bias=vision.patch_bias, kind="patches")
  if vision.position_grid:
    yield Entry(("vision", "positions"), f"{tower}.{names['positions']}")
  for i, ends in enumerate(vision.segments):
    path, layers = ("vision", f"blocks{i}" if i else "blocks"), range(*ends)
    block = f"{tower}.{names['block']}"
    for part in ("norm1", "norm2"):
      yield from norm((*path, part), f"{block}.{names[part]}", layers)
    for part in ("qkv", "q", "k", "v", "proj", "gate", "up", "down"):
      if part in names:
        where = ("mlp", part) if part in ("gate", "up", "down") else (part,)
        yield from _linear((*path, *where), f"{block}.{names[part]}", layers, bias=True)
  if vision.merger == "pool":
    projector = "model.multi_modal_projector"
    yield from norm(("vision", "merger", "post_norm"), f"{tower}.post_layernorm")
    yield Entry(("vision", "merger", "norm", "scale"), f"{projector}.mm_soft_emb_norm.weight")
    yield Entry(("vision", "merger", "proj", "kernel"), f"{projector}.mm_input_projection_weight")
    return
  mergers = [(("vision", "merger"), "")]
  mergers += [(("vision", f"deepstack{i}"), f"deepstack_merger_list.{i}")
              for i in range(len(vision.deepstack_layers))]
  for path, other in mergers:
    for part in ("norm", "up", "down"):
      name = names[f"merger_{part}"]
      name = f"{tower}.{other}.{name.partition('.')[2]}" if other else f"{tower}.{name}"
      if part == "norm":
        yield from norm((*path, part), name)
      else:
        yield from _linear((*path, part), name, bias=True)


# Names in files -> names in transformers' model, for every generation of either.
_CANONICAL = tuple((re.compile(pattern), name) for pattern, name in (
    (r"^(model\.)?visual\.", "model.visual."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model.language_model."),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
))
# Names in transformers' model -> names in published files.
_GEMMA3 = (("lm_head.", "language_model.lm_head."),
           ("model.language_model.", "language_model.model."),
           ("model.vision_tower.", "vision_tower.vision_model."),
           ("model.multi_modal_projector.", "multi_modal_projector."))
_OLD_QWEN = (("model.visual.", "visual."), ("model.language_model.", "model."))
_PUBLISHED = {"qwen2_vl": _OLD_QWEN, "qwen2_5_vl": _OLD_QWEN, "gemma3": _GEMMA3}


def canonical_name(name: str) -> str:
  """The name in transformers' model of a tensor in a file."""
  for pattern, new in _CANONICAL:
    if pattern.match(name):
      return pattern.sub(new, name)
  return name


def published_name(name: str, family: str) -> str:
  """The name in published files of a tensor of transformers' model."""
  for old, new in _PUBLISHED.get(family, ()):
    if name.startswith(old):
      return new + name.removeprefix(old)
  return name


_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def _shape(tensor: Any) -> tuple[int, ...]:
  return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)


class Checkpoint:
  """Tensors of a directory by their names in transformers' model; read when they are asked for."""

  def __init__(self, path: pathlib.Path):
    index = path / "model.safetensors.index.json"
    if index.exists():
      try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
      except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index}: not a valid index of safetensors files ({e})") from None
    else:
      files = ["model.safetensors"]
    self.path, self._where = path, {}
    for file in files:
      with self._open(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - not a mapping
          self._where[canonical_name(name)] = (file, name)

  @contextlib.contextmanager
  def _open(self, file: str) -> Iterator[Any]:
    where = self.path / file
    if where.parent.resolve() != self.path.resolve():
      raise ValueError(f"{self.path / 'model.safetensors.index.json'}: names {file!r}, which is "
                       "not a file of this directory")
    try:
      handle = safe_open(where, framework="numpy")
    except FileNotFoundError:
      raise FileNotFoundError(f"{where}: no such file; expected model weights here") from None
    except SafetensorError as e:
      raise ValueError(f"{where}: not a complete safetensors file ({e})") from None
    with handle as opened:
      yield opened

  def names(self) -> set[str]:
    return set(self._where)

  def file(self, name: str) -> str:
    return self._where[name][0]

  @contextlib.contextmanager
  def tensor(self, name: str) -> Iterator[Any]:
    """The tensor, to be sliced inside the `with`: its file is mapped into memory only there."""
    if name not in self._where:
      raise ValueError(f"{self.path}: tensor {name!r} is missing")
    file, stored = self._where[name]
    with self._open(file) as handle:
      yield handle.get_slice(stored)


def load_params(
    path: str | pathlib.Path,
    config: ModelConfig,
    shapes: Params,
    shardings: Params | None = None,
) -> Params:
  """Reads a checkpoint directory into our pytree, one tensor at a time.

  Stacked parameters are filled on the device layer by layer, so that the host never holds more
  than one tensor besides what its devices hold; each host reads only what its devices hold.

  Args:
    path: a directory with `model.safetensors` or an index of shards.
    config: the architecture.
    shapes: pytree of ShapeDtypeStructs that the result must have.
    shardings: where each parameter goes, a pytree like `shapes`; None is the default device.

  Raises:
    FileNotFoundError, ValueError: file missing or cut, tensor missing, left over or of another
      shape; one line naming file, tensor and expectation.
  """
  source = Checkpoint(pathlib.Path(path))
  flat, places = by_path(shapes), by_path(shardings) if shardings is not None else {}
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  every = list(entries(config))
  _check(source, every, flat, config)
  loaded = {}
  for entry in every:
    want, place = flat[entry.path], places.get(entry.path, here)
    loaded[entry.path] = _load(source, entry, want, place, config)
  return jax.tree.map_with_path(lambda keys, x: loaded.get(_keys(keys), x), shapes)


def stored_shapes(path: str | pathlib.Path, config: ModelConfig, shapes: Params) -> Params:
  """`shapes` with the dtypes that a checkpoint directory stores."""
  source, stored = Checkpoint(pathlib.Path(path)), {}
  for entry in entries(config):
    with source.tensor(entry.names()[0]) as tensor:
      stored[entry.path] = jnp.dtype(_DTYPES[tensor.get_dtype()])
  return jax.tree.map_with_path(
      lambda keys, x: jax.ShapeDtypeStruct(x.shape, stored[_keys(keys)]), shapes)


def _check(source: Checkpoint, every: list[Entry], flat: Mapping[Path, Any], config: ModelConfig):
  """All tensors are there with the right shapes, and no other; before anything is read."""
  used: set[str] = set()
  for entry in every:
    want = flat[entry.path].shape
    one = want if entry.layers is None else want[1:]
    expected = entry.file_shape(one, config)
    for name in entry.names():
      with source.tensor(name) as tensor:
        shape = _shape(tensor)
      if shape not in (expected, entry.memory_shape(one, config)):
        raise ValueError(f"{source.path / source.file(name)}: tensor {name!r} has shape {shape}, "
                         f"expected {expected}")
      used.add(name)
  # A tied head may be stored a second time.
  extra = source.names() - used - ({"lm_head.weight"} if config.tied else set())
  if extra:
    name = min(extra)
    raise ValueError(f"{source.path / source.file(name)}: tensor {name!r} has no place in this "
                     f"model ({len(extra)} such; does config.json belong to these weights?)")


def _load(source: Checkpoint, entry: Entry, want: Any, place: Any, config: ModelConfig
          ) -> jax.Array:
  shape, dtype = tuple(want.shape), np.dtype(want.dtype)
  # Devices transpose and cast several times faster than numpy does.
  turned = entry.kind == "linear"

  def put(name: str, shape: tuple[int, ...], place: Any) -> jax.Array:
    with source.tensor(name) as tensor:
      def part(index: Any) -> np.ndarray:
        return tensor[index] if turned else np.ascontiguousarray(
            entry.read(tensor, shape, index, config))

      return jax.make_array_from_callback(
          shape[::-1] if turned else shape, _turned(place) if turned else place, part)

  if entry.layers is None:
    one = put(entry.name, shape, place)
    return one if one.dtype == dtype and not turned else _finish(turned, dtype, place)(one)
  layer = place
  if isinstance(place, NamedSharding):
    assert not place.spec or place.spec[0] is None, "the axis of layers is never split"
    layer = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
  out = jnp.zeros(shape, dtype, device=place)
  for i, name in enumerate(entry.names()):
    out = _fill(turned, place)(out, put(name, shape[1:], layer), np.int32(i))
    out.block_until_ready()  # or the host would run ahead and hold many layers
  return out


def _turned(place: Any) -> Any:
  """Where the transpose of a matrix lies so that each device has the transpose of its part."""
  if not isinstance(place, NamedSharding):
    return place
  axes = (*place.spec, None, None)[:2]
  return NamedSharding(place.mesh, PartitionSpec(*axes[::-1]))


@functools.lru_cache(maxsize=64)
def _finish(turned: bool, dtype: np.dtype, place: Any):
  return jax.jit(lambda one: (one.T if turned else one).astype(dtype), out_shardings=place)


@functools.lru_cache(maxsize=64)
def _fill(turned: bool, place: Any):
  """Writes one layer into a stacked parameter, in place."""
  return jax.jit(
      lambda whole, one, i: jax.lax.dynamic_update_index_in_dim(
          whole, (one.T if turned else one).astype(whole.dtype), i, 0),
      donate_argnums=0, out_shardings=place)


def by_path(tree: Any) -> dict[Path, Any]:
  """Leaves of nested dictionaries by their path."""
  return {_keys(keys): leaf for keys, leaf in jax.tree.leaves_with_path(
      tree, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))}


def _keys(keys: Any) -> Path:
  return tuple(k.key for k in keys)


def tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
  """Names in published files and, when called, the tensors themselves, fetched one at a time."""
  flat = by_path(params)
  for entry in entries(config):
    array = flat[entry.path]
    for i, name in enumerate(entry.names()):
      def fetch(entry=entry, array=array, i=i):
        one = array if entry.layers is None else array[i]
        return entry.write(np.asarray(jax.device_get(one)), config)

      yield published_name(name, config.family), fetch


def save_params(path: str | pathlib.Path, config: ModelConfig, params: Params,
                shard_bytes: int = 5 * 2**30) -> None:
  """Writes `config.json` and safetensors under published names; shards above `shard_bytes`.

  The files appear under their names only when complete; no more than one shard is held at a time.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  flat = by_path(params)
  shards: list[list[str]] = [[]]
  size = total = 0
  for entry in entries(config):
    nbytes = flat[entry.path].nbytes // len(entry.layers or [0])
    for name in entry.names():
      if size and size + nbytes > shard_bytes:
        shards.append([])
        size = 0
      shards[-1].append(published_name(name, config.family))
      size, total = size + nbytes, total + nbytes

  count = len(shards)
  files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  files = ["model.safetensors"] if count == 1 else files
  source = tensors(config, params)
  for file, names in zip(files, shards, strict=True):
    held = {}
    for _ in names:
      name, fetch = next(source)
      held[name] = fetch()
    write_file(path / file, lambda f, held=held: save_file(held, f, metadata={"format": "pt"}))
  index = path / "model.safetensors.index.json"
  if count > 1:
    content = {"metadata": {"total_size": total},
               "weight_map": {k: f for f, names in zip(files, shards, strict=True) for k in names}}
    write_file(index, lambda f: f.write_text(json.dumps(content, indent=1)))
  else:  # an index that an earlier model left would name other files
    index.unlink(missing_ok=True)
  write_file(path / "config.json",
             lambda f: f.write_text(json.dumps(json.loads(config.hf), indent=2)))


def write_file(path: pathlib.Path, save: Callable[[pathlib.Path], object]) -> None:
  """Writes a file that appears under its name only when it is complete."""
  temporary = path.with_name(f".{path.name}.tmp")
  save(temporary)
  temporary.chmod(0o644)  # safetensors leaves it to its owner alone
  temporary.replace(path)

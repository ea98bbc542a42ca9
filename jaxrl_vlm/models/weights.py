"""Hugging Face checkpoints in and out: names, shapes and layouts of every parameter."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.types import Params


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One parameter of ours and the tensor(s) of theirs that it equals.

  Attributes:
    path: in our pytree.
    name: in theirs; `{}` stands for the layer number, and ours then stacks `layers` of them.
    layers: how many, 0 for a parameter that is not stacked.
    linear: theirs is [out, in], ours [in, out].
    flatten: theirs has trailing axes that ours flattens (the 3-D convolution of the patches).
  """

  path: tuple[str, ...]
  name: str
  layers: int = 0
  linear: bool = False
  flatten: bool = False

  def names(self) -> list[str]:
    return [self.name.format(i) for i in range(self.layers)] if self.layers else [self.name]

  def ours(self, tensor: np.ndarray) -> np.ndarray:
    if self.flatten:
      tensor = tensor.reshape(tensor.shape[0], -1)
    return tensor.T if self.linear else tensor

  def theirs(self, array: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = array.T if self.linear else array
    return np.ascontiguousarray(array.reshape(shape) if self.flatten and shape else array)


def entries(config: ModelConfig) -> Iterator[_Entry]:
  """Every parameter of the model beside its name in a published checkpoint."""

  def linear(path, name, layers=0, bias=False, **kw):
    yield _Entry((*path, "kernel"), f"{name}.weight", layers, linear=True, **kw)
    if bias:
      yield _Entry((*path, "bias"), f"{name}.bias", layers)

  blocks, depth = ("vision", "blocks"), config.vision.depth
  yield from linear(("vision", "patch_embed"), "visual.patch_embed.proj", flatten=True)
  for norm in ("norm1", "norm2"):
    yield _Entry((*blocks, norm, "scale"), f"visual.blocks.{{}}.{norm}.weight", depth)
  for ours, theirs in (("qkv", "attn.qkv"), ("proj", "attn.proj")):
    yield from linear((*blocks, ours), f"visual.blocks.{{}}.{theirs}", depth, bias=True)
  for part in ("gate", "up", "down"):
    yield from linear((*blocks, "mlp", part), f"visual.blocks.{{}}.mlp.{part}_proj", depth, True)
  yield _Entry(("vision", "merger_norm", "scale"), "visual.merger.ln_q.weight")
  yield from linear(("vision", "merger_in"), "visual.merger.mlp.0", bias=True)
  yield from linear(("vision", "merger_out"), "visual.merger.mlp.2", bias=True)

  yield _Entry(("embed", "embedding"), "model.embed_tokens.weight")
  layers, count = ("decoder", "layers"), config.num_layers
  for ours, theirs in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
    yield _Entry((*layers, ours, "scale"), f"model.layers.{{}}.{theirs}.weight", count)
  for part in ("q", "k", "v", "o"):
    yield from linear(
        (*layers, part), f"model.layers.{{}}.self_attn.{part}_proj", count, bias=part != "o")
  for part in ("gate", "up", "down"):
    yield from linear((*layers, "mlp", part), f"model.layers.{{}}.mlp.{part}_proj", count)
  yield _Entry(("decoder", "norm", "scale"), "model.norm.weight")
  if not config.tied:
    yield _Entry(("head",), "lm_head.weight", linear=True)


def _published_name(name: str) -> str:
  """The name that hub checkpoints use, from either generation of transformers' names."""
  for new, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
    if name.startswith(new):
      return old + name.removeprefix(new)
  return name


class _Checkpoint:
  """Tensors of a directory by published name; each is read from disk when it is asked for."""

  def __init__(self, path: pathlib.Path):
    index = path / "model.safetensors.index.json"
    if index.exists():
      files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
      files = ["model.safetensors"]
    self.path, self._where = path, {}
    for file in files:
      try:
        handle = safe_open(path / file, framework="numpy")
      except FileNotFoundError:
        raise FileNotFoundError(
            f"{path / file}: no such file; expected model weights here") from None
      except SafetensorError as e:
        raise ValueError(f"{path / file}: not a complete safetensors file ({e})") from None
      for name in handle.keys():  # noqa: SIM118 - not a mapping
        self._where[_published_name(name)] = (handle, name, file)

  def names(self) -> set[str]:
    return set(self._where)

  def read(self, name: str) -> np.ndarray:
    if name not in self._where:
      raise ValueError(f"{self.path}: tensor {name!r} is missing")
    handle, stored, _ = self._where[name]
    return handle.get_tensor(stored)


def load_params(
    path: str | pathlib.Path,
    config: ModelConfig,
    shapes: Params,
    put: Callable[[tuple[str, ...], np.ndarray], jax.Array],
) -> Params:
  """Reads a checkpoint directory into our pytree, one parameter at a time.

  Args:
    path: a directory with `model.safetensors` or an index of shards.
    config: the architecture.
    shapes: pytree of ShapeDtypeStructs that the result must have.
    put: moves one host array to its devices, given its path in the pytree.

  Raises:
    FileNotFoundError, ValueError: file missing or cut, tensor missing, left over or of another
      shape; one line naming file, tensor and expectation.
  """
  source = _Checkpoint(pathlib.Path(path))
  flat = {tuple(k.key for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(shapes)}
  used: set[str] = set()
  loaded = {}
  for entry in entries(config):
    want = flat[entry.path]
    one = want.shape[1:] if entry.layers else want.shape
    out = np.empty(want.shape, want.dtype)
    for i, name in enumerate(entry.names()):
      tensor = entry.ours(source.read(name))
      if tensor.shape != one:
        raise ValueError(
            f"{path}: tensor {name!r} has shape {entry.theirs(tensor).shape}, expected "
            f"{tuple(reversed(one)) if entry.linear else one}")
      out[i if entry.layers else ...] = tensor
      used.add(name)
    loaded[entry.path] = put(entry.path, out)
  # A tied head may be stored a second time.
  extra = source.names() - used - ({"lm_head.weight"} if config.tied else set())
  if extra:
    raise ValueError(f"{path}: tensor {min(extra)!r} has no place in this model "
                     f"({len(extra)} such; does config.json belong to these weights?)")
  return jax.tree.map_with_path(lambda keys, _: loaded[tuple(k.key for k in keys)], shapes)


def save_params(path: str | pathlib.Path, config: ModelConfig, params: Params,
                shard_bytes: int = 5 * 2**30) -> None:
  """Writes `config.json` and safetensors under published names; shards above `shard_bytes`.

  The files appear under their names only when complete.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  vision = config.vision
  conv = (vision.hidden_size, vision.in_channels, vision.temporal_patch_size,
          vision.patch_size, vision.patch_size)
  flat = {tuple(k.key for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}
  shards: list[dict[str, np.ndarray]] = [{}]
  size = total = 0
  for entry in entries(config):
    array = np.asarray(jax.device_get(flat[entry.path]))
    for i, name in enumerate(entry.names()):
      tensor = entry.theirs(array[i] if entry.layers else array, conv)
      if size and size + tensor.nbytes > shard_bytes:
        shards.append({})
        size = 0
      shards[-1][name] = tensor
      size, total = size + tensor.nbytes, total + tensor.nbytes

  def write(name: str, save: Callable[[pathlib.Path], object]) -> None:
    temporary = path / f".{name}.tmp"
    save(temporary)
    temporary.chmod(0o644)  # safetensors leaves it to its owner alone
    temporary.replace(path / name)

  count = len(shards)
  names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  names = ["model.safetensors"] if count == 1 else names
  for name, tensors in zip(names, shards, strict=True):
    write(name, lambda f, t=tensors: save_file(t, f, metadata={"format": "pt"}))
  if count > 1:
    index = {"metadata": {"total_size": total},
             "weight_map": {k: n for n, t in zip(names, shards, strict=True) for k in t}}
    write("model.safetensors.index.json", lambda f: f.write_text(json.dumps(index, indent=1)))
  else:  # an index that an earlier model left would name other files
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
  write("config.json", lambda f: f.write_text(json.dumps(json.loads(config.hf), indent=2)))

"""Reads and writes Hugging Face checkpoints, one tensor at a time."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.models.names import (
  Entry,
  Path,
  canonical_name,
  entries,
  published_name,
  tensor_shape,
)
from jaxrl_vlm.types import Params

# Supported dtypes of safetensors, and the dtypes they are read as. Other dtypes (8-bit floats,
# integers) are those of quantised weights. JAX has no 64-bit floats by default.
_DTYPES = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_INDEX = "model.safetensors.index.json"


class Checkpoint:
  """The tensors of a directory, by their names in the model of transformers.

  The constructor reads only the names. `tensor` reads the values.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    # Name in the model of transformers -> (file, name in this file).
    self.where: dict[str, tuple[str, str]] = {}
    # Name in the model of transformers -> file, as in the index. The file may lack the tensor.
    self._listed: dict[str, str] = {}
    for file in self._files():
      with self._open(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - not a mapping
          self.where[canonical_name(name)] = (file, name)

  def _files(self) -> list[str]:
    index = self.path / _INDEX
    if not index.exists():
      return ["model.safetensors"]
    try:
      listed = json.loads(index.read_text())["weight_map"]
      self._listed = {canonical_name(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"{index}: expected a weight_map from tensors to files ({error})") from None
    files = sorted(set(self._listed.values()))
    for file in files:
      if pathlib.PurePath(file).name != file:
        raise ValueError(f"{index}: names {file!r}, which is not a file of this directory")
    return files

  @contextlib.contextmanager
  def _open(self, file: str) -> Iterator[Any]:
    full_path = self.path / file
    try:
      handle = safe_open(full_path, framework="numpy")
    except FileNotFoundError:
      raise FileNotFoundError(f"{full_path}: no such file; expected model weights") from None
    except (SafetensorError, OSError) as e:
      raise ValueError(f"{full_path}: not a complete safetensors file ({e})") from None
    with handle as opened:
      yield opened

  @contextlib.contextmanager
  def tensor(self, name: str) -> Iterator[Any]:
    """Opens a tensor as an object that can be sliced.

    The file is mapped into memory only inside the `with` statement.
    """
    file, stored = self.where[name]
    with self._open(file) as handle:
      yield handle.get_slice(stored)

  def check(self, name: str, shapes: tuple[tuple[int, ...], ...], family: str) -> str:
    """Checks a tensor and returns its dtype.

    Args:
      name: name of the tensor in the model of transformers.
      shapes: the shapes that the tensor may have.
      family: family of the model, for the name in error messages.

    Raises:
      ValueError: the tensor is missing, has none of `shapes`, or is quantised.
    """
    if name not in self.where:
      file = self._listed.get(name, _INDEX if self._listed else "model.safetensors")
      raise ValueError(
        f"{self.path / file}: tensor {published_name(name, family)!r} is missing, "
        f"expected with shape {shapes[0]}"
      )
    file, stored = self.where[name]
    with self.tensor(name) as tensor:
      shape, dtype = tensor_shape(tensor), tensor.get_dtype()
    if shape not in shapes:
      raise ValueError(
        f"{self.path / file}: tensor {stored!r} has shape {shape}, expected {shapes[0]}"
      )
    if dtype not in _DTYPES:
      raise ValueError(
        f"{self.path / file}: tensor {stored!r} has type {dtype}, expected one of "
        f"{', '.join(_DTYPES)}; quantised checkpoints are not supported"
      )
    return _DTYPES[dtype]


def load_params(
  path: str | pathlib.Path,
  config: ModelConfig,
  shapes: Params,
  shardings: Params | None = None,
) -> Params:
  """Reads the parameters of a checkpoint directory, one tensor at a time.

  Stacked parameters are filled on the device layer by layer. The memory of a host therefore never
  holds more than one tensor in addition to the shards of its devices. Each host reads only the
  shards of its devices.

  Args:
    path: a directory with `model.safetensors`, or with an index of several such files.
    config: config of the model.
    shapes: pytree of ShapeDtypeStructs with the shapes and dtypes of the result.
    shardings: the sharding of each parameter, as a pytree like `shapes`. None means the default
      device.

  Returns:
    The parameters, as a pytree like `shapes`.

  Raises:
    FileNotFoundError, ValueError: a file is missing or incomplete, or a tensor is missing, unknown
      or of another shape. The message is one line that names the file, the tensor and what was
      expected.
  """
  source = Checkpoint(pathlib.Path(path))
  flat, places = by_path(shapes), by_path(shardings) if shardings is not None else {}
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _check(source, flat, config)
  loaded = {}
  for entry in entries(config):
    want, place = flat[entry.path], places.get(entry.path, default)
    loaded[entry.path] = _load(source, entry, want, place, config)
  return jax.tree.map_with_path(lambda keys, x: loaded.get(path_of(keys), x), shapes)


def stored_shapes(path: str | pathlib.Path, config: ModelConfig, shapes: Params) -> Params:
  """Returns `shapes` with the dtypes that a checkpoint directory stores.

  Raises:
    FileNotFoundError, ValueError: as `load_params`.
  """
  dtypes = _check(Checkpoint(pathlib.Path(path)), by_path(shapes), config)
  return jax.tree.map_with_path(
    lambda keys, x: jax.ShapeDtypeStruct(x.shape, dtypes[path_of(keys)]), shapes
  )


def _check(
  source: Checkpoint, flat: Mapping[Path, Any], config: ModelConfig
) -> dict[Path, jnp.dtype]:
  """Checks that the checkpoint has exactly the tensors of the model, with the right shapes.

  Returns:
    For each parameter, a dtype that can represent the values of all its tensors.
  """
  used: set[str] = set()
  dtypes = {}
  for entry in entries(config):
    want = flat[entry.path].shape
    one = want if entry.layers is None else want[1:]
    shapes = entry.file_shape(one, config), entry.memory_shape(one, config)
    found = {source.check(name, shapes, config.family) for name in entry.names()}
    dtypes[entry.path] = functools.reduce(jnp.promote_types, found)
    used |= set(entry.names())
  # If the weights are tied, the file may contain the head in addition to the embedding.
  extra = set(source.where) - used - ({"lm_head.weight"} if config.tied else set())
  if extra:
    file, stored = source.where[min(extra)]
    raise ValueError(
      f"{source.path / file}: tensor {stored!r} belongs to no parameter of this model "
      f"({len(extra)} such tensors; does config.json belong to these weights?)"
    )
  return dtypes


def _load(
  source: Checkpoint, entry: Entry, want: Any, place: Any, config: ModelConfig
) -> jax.Array:
  shape, dtype = tuple(want.shape), np.dtype(want.dtype)
  turned = entry.turned

  def put(name: str, shape: tuple[int, ...], place: Any) -> jax.Array:
    with source.tensor(name) as tensor:

      def part(index: Any) -> np.ndarray:
        index = index[::-1] if turned else index
        return np.ascontiguousarray(entry.read(tensor, shape, index, config))

      return jax.make_array_from_callback(
        shape[::-1] if turned else shape, _turned(place) if turned else place, part
      )

  if entry.layers is None:
    one = put(entry.name, shape, place)
    return one if one.dtype == dtype and not turned else _finish(turned, dtype, place)(one)
  layer = place
  if isinstance(place, NamedSharding):
    assert not place.spec or place.spec[0] is None, "the axis of layers must not be sharded"
    layer = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
  out = jnp.zeros(shape, dtype, device=place)
  for i, name in enumerate(entry.names()):
    out = _fill(turned, place)(out, put(name, shape[1:], layer), np.int32(i))
    # Without waiting, the host would read more layers before this one is copied, and hold them all.
    out.block_until_ready()
  return out


def _turned(place: Any) -> Any:
  """Returns the sharding of a transposed matrix: each device has the transpose of its shard."""
  if not isinstance(place, NamedSharding):
    return place
  axes = (*place.spec, None, None)[:2]
  return NamedSharding(place.mesh, PartitionSpec(*axes[::-1]))


@functools.lru_cache(maxsize=64)
def _finish(turned: bool, dtype: np.dtype, place: Any):
  return jax.jit(lambda one: (one.T if turned else one).astype(dtype), out_shardings=place)


@functools.lru_cache(maxsize=64)
def _fill(turned: bool, place: Any):
  """Returns a function that writes one layer into a stacked parameter, in place."""
  return jax.jit(
    lambda whole, one, i: jax.lax.dynamic_update_index_in_dim(
      whole, (one.T if turned else one).astype(whole.dtype), i, 0
    ),
    donate_argnums=0,
    out_shardings=place,
  )


def by_path(tree: Any) -> dict[Path, Any]:
  """Returns the leaves of nested dictionaries by path. Shardings are leaves."""
  return {
    path_of(keys): leaf
    for keys, leaf in jax.tree.leaves_with_path(
      tree, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding)
    )
  }


def path_of(keys: Any) -> Path:
  """Converts the keys of `jax.tree.map_with_path` to a path."""
  return tuple(k.key for k in keys)


def fetch(array: Any) -> np.ndarray:
  """Returns the whole array on the host.

  In a run of several processes, all must call this function at the same point.
  """
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(jax.device_get(array))


def _tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, int, Callable]]:
  """Yields for each tensor: its name in published files, its bytes, and a function to fetch it."""
  flat = by_path(params)
  groups: list[list[Entry]] = []
  for entry in entries(config):
    if entry.half == 1:
      groups[-1].append(entry)
    else:
      groups.append([entry])
  for group in groups:
    arrays = [flat[entry.path] for entry in group]
    layers = len(group[0].layers or [0])
    for i, name in enumerate(group[0].names()):

      def get(group=group, arrays=arrays, i=i) -> np.ndarray:
        ones = [fetch(a if e.layers is None else a[i]) for e, a in zip(group, arrays, strict=True)]
        parts = [e.write(one, config) for e, one in zip(group, ones, strict=True)]
        if len(parts) == 1:
          return parts[0]
        return np.concatenate(parts, axis=group[0].half_axis(ones[0].shape, config))

      yield (
        published_name(name, config.family),
        sum(array.nbytes for array in arrays) // layers,
        get,
      )


def save_params(
  path: str | pathlib.Path, config: ModelConfig, params: Params, shard_bytes: int = 5 * 2**30
) -> None:
  """Writes `config.json` and safetensors files with the names of published tensors.

  Parameters are written in their own dtype. `dtype` in config.json is that of most of their bytes.
  A file appears under its final name only when it is complete. In a run of several processes, all
  must call this function; process 0 writes.

  Args:
    path: the directory, which is created if it does not exist.
    config: config of the model.
    params: the parameters, without adapters.
    shard_bytes: maximum size of a safetensors file, in bytes. A file with a single larger tensor
      may exceed it. The host holds no more than one file at a time.
  """
  path = pathlib.Path(path)
  first = jax.process_index() == 0
  shards: list[list[tuple[str, Callable]]] = [[]]
  size = total = 0
  for name, nbytes, get in _tensors(config, params):
    if size and size + nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append((name, get))
    size, total = size + nbytes, total + nbytes

  count = len(shards)
  files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  files = ["model.safetensors"] if count == 1 else files
  if first:
    path.mkdir(parents=True, exist_ok=True)
  for file, shard in zip(files, shards, strict=True):
    held = {}
    for name, get in shard:
      tensor = get()  # in every process: fetching may require all of them
      if first:
        held[name] = tensor
    if first:
      write_file(path / file, lambda f, held=held: save_file(held, f, metadata={"format": "pt"}))
  if first:
    index = path / _INDEX
    if count > 1:
      content = {
        "metadata": {"total_size": total},
        "weight_map": {
          name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard
        },
      }
      write_file(index, lambda f: f.write_text(json.dumps(content, indent=1)))
    else:  # an index of an earlier model in this directory would name other files
      index.unlink(missing_ok=True)
    hf = _with_dtype(json.loads(config.hf), params)
    write_file(path / "config.json", lambda f: f.write_text(json.dumps(hf, indent=2)))
  if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
    multihost_utils.sync_global_devices(f"saved {path}")


def _with_dtype(hf: dict[str, Any], params: Params) -> dict[str, Any]:
  """Returns config.json with each dtype in it replaced by that of most bytes of `params`."""
  sizes: dict[str, int] = {}
  for leaf in jax.tree.leaves(params):
    sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.nbytes
  dtype = max(sizes, key=lambda name: sizes[name])
  for part in (hf, hf.get("text_config"), hf.get("vision_config")):
    if isinstance(part, dict):
      part |= {key: dtype for key in ("dtype", "torch_dtype") if part.get(key)}
  return hf


def write_file(path: pathlib.Path, save: Callable[[pathlib.Path], object]) -> None:
  """Writes a file under a temporary name, and renames it when it is complete."""
  temporary = path.with_name(f".{path.name}.tmp")
  save(temporary)
  temporary.chmod(0o644)  # safetensors creates files that only the owner can read
  temporary.replace(path)

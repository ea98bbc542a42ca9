"""Selecting the trainable parameters, and low-rank adapters (LoRA, arXiv 2106.09685).

Parameters are nested dicts. An adapter is the entry `lora` next to the `kernel` of a linear layer.
It contains `a` [in, rank] and `b` [rank, out], with a leading axis if layers are stacked.
"""

import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxrl_vlm.errors import hint
from jaxrl_vlm.models import names, weights
from jaxrl_vlm.models.config import LoRA, ModelConfig
from jaxrl_vlm.models.patterns import matches
from jaxrl_vlm.types import Params

_ADAPTERS = ("lora",)
_PREFIX = "base_model.model."  # prefix of every tensor name in a PEFT file
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


# -- Splitting and joining pytrees of parameters, without copying leaves ---------------------------


def split(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
  """Returns (trainable, frozen): the parameters that the patterns select, and the others.

  An empty list of patterns selects all parameters. See `models/patterns.py`.
  """

  def select(tree: Params, parent: tuple[str, ...], chosen: bool) -> Params:
    out = {}
    for key, value in tree.items():
      path = (*parent, key)
      if isinstance(value, Mapping):
        if inner := select(value, path, chosen):
          out[key] = inner
      elif matches(patterns, path) is chosen:
        out[key] = value
    return out

  return select(params, (), True), select(params, (), False)


def merge(one: Params, other: Params) -> Params:
  """Returns the parameters of both pytrees, which must have none in common. Inverse of `split`."""
  out = dict(one)
  for key, value in other.items():
    if key in out:
      assert isinstance(value, Mapping), f"both pytrees contain {key!r}"
      value = merge(out[key], value)
    out[key] = value
  return out


def strip(params: Params) -> Params:
  """Returns the parameters without the adapters."""
  return split(params, _ADAPTERS)[1]


def adapters(params: Params) -> Params:
  """Returns only the adapters."""
  return split(params, _ADAPTERS)[0]


# -- Validating a config ---------------------------------------------------------------------------


def check(shapes: Params, lora: LoRA | None, trainable: Sequence[str]) -> None:
  """Checks `config.model.lora.targets` and `config.model.trainable` against a model.

  Args:
    shapes: the parameters of the model with adapters in all layers that can have one.
    lora: the configured adapters; None means no adapters.
    trainable: the configured patterns of trainable parameters.

  Raises:
    ValueError: a pattern matches nothing, or the patterns together select nothing. The message is
      one line that names the field, its value and what was expected.
  """
  layers = [path[:-2] for path in weights.by_path(adapters(shapes)) if path[-1] == "a"]
  if lora is not None:
    field = f"config.model.lora.targets={lora.targets!r}"
    names = {layer[0] for layer in layers} | {layer[-1] for layer in layers}
    _check_each(field, lora.targets, layers, "linear layer", names)
    layers = [layer for layer in layers if matches(lora.targets, layer)]
    if not layers:
      raise ValueError(f"{field}: expected patterns that select at least one linear layer")
  field = f"config.model.trainable={tuple(trainable)!r}"
  adapted = set(layers) if lora is not None else set()
  every = list(weights.by_path(shapes))
  paths = [p for p in every if "lora" not in p or p[:-2] in adapted]
  if lora is None:
    for pattern in trainable:
      bare = pattern.removeprefix("!")
      if _holds_any(bare, every) and not _holds_any(bare, paths):
        raise ValueError(
          f"{field}: {bare!r} matches only adapters; expected config.model.lora.rank above 0, got 0"
        )
  names = {path[0] for path in paths} | ({"lora"} if lora is not None else set())
  _check_each(field, trainable, paths, "parameter", names)
  if not any(matches(trainable, path) for path in paths):
    raise ValueError(f"{field}: expected patterns that select at least one parameter")


def _holds_any(pattern: str, paths: Sequence[Sequence[str]]) -> bool:
  return any(matches((pattern,), path) for path in paths)


def _check_each(
  field: str, patterns: Sequence[str], paths: Sequence[Sequence[str]], what: str, names: set[str]
) -> None:
  for pattern in patterns:
    bare = pattern.removeprefix("!")
    if not _holds_any(bare, paths):
      # PEFT's names of these layers end in `_proj`.
      raise ValueError(
        f"{field}: {bare!r} matches no {what}; {hint(bare.removesuffix('_proj'), names)}"
      )


# -- Initialising and merging adapters -------------------------------------------------------------


def init_adapters(shapes: Params, key: jax.Array, shardings: Params | None = None) -> Params:
  """Returns new adapters, which do not change the output of the model.

  As in PEFT, `a` is uniform in ±1/√in and `b` is zero.

  Args:
    shapes: ShapeDtypeStructs of the parameters with adapters. Only the adapters are initialised.
    key: a JAX random key.
    shardings: the sharding of each parameter, as a pytree like `shapes`. None means the default
      device.
  """
  wanted = adapters(shapes)

  def make(key):
    leaves = []
    for i, (path, x) in enumerate(sorted(weights.by_path(wanted).items())):
      if path[-1] == "b":
        leaves.append((path, jnp.zeros(x.shape, x.dtype)))
      else:
        bound = 1.0 / math.sqrt(x.shape[-2])
        leaves.append(
          (
            path,
            jax.random.uniform(
              jax.random.fold_in(key, i), x.shape, minval=-bound, maxval=bound
            ).astype(x.dtype),
          )
        )
    flat = dict(leaves)
    return jax.tree.map_with_path(lambda keys, _: flat[weights.path_of(keys)], wanted)

  return jax.jit(make, out_shardings=None if shardings is None else adapters(shardings))(key)


def merged(params: Params, config: ModelConfig, donate: bool = False) -> Params:
  """Returns the parameters with every adapter merged into its kernel: kernel + alpha / rank · a·b.

  The sum is computed in float32, one layer at a time, and rounded to the dtype of the kernel.
  Leaves without an adapter are those of `params`, not copies.

  Args:
    params: parameters with adapters.
    config: config of the model.
    donate: whether the sums overwrite the kernels, so that there is no second copy of them.
      `params` must then not be used again.
  """
  if not isinstance(params, Mapping):
    return params
  out = {k: merged(v, config, donate) for k, v in params.items() if k != "lora"}
  if "lora" in params:
    assert config.lora is not None, "config.lora=None, but the parameters contain adapters"
    kernel = jnp.asarray(params["kernel"])
    merge_into = _merger(kernel.sharding, config.lora.alpha / config.lora.rank, donate)
    out["kernel"] = merge_into(kernel, params["lora"]["a"], params["lora"]["b"])
  return out


@functools.lru_cache(maxsize=64)
def _merger(sharding: Any, scale: float, donate: bool):
  def merge_layer(kernel, a, b):
    change = jnp.matmul(
      a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)

  def merge_kernel(kernel, a, b):
    if kernel.ndim == 2:
      return merge_layer(kernel, a, b)

    def layer(i, kernel):
      merged_layer = merge_layer(kernel[i], a[i], b[i])
      return jax.lax.dynamic_update_index_in_dim(kernel, merged_layer, i, 0)

    return jax.lax.fori_loop(0, kernel.shape[0], layer, kernel)

  return jax.jit(merge_kernel, out_shardings=sharding, donate_argnums=0 if donate else ())


# -- PEFT directories ------------------------------------------------------------------------------


def _adapted(config: ModelConfig, params: Params) -> Iterator[names.Entry]:
  """Yields the entries of the kernels that have an adapter in `params`."""
  layers = {path[:-2] for path in weights.by_path(adapters(params))}
  return (
    entry
    for entry in names.entries(config)
    if entry.path[-1] == "kernel" and entry.path[:-1] in layers
  )


def _is_module(entry: names.Entry) -> bool:
  """Returns whether the tensor is the weight of a PyTorch module, not a bare parameter."""
  return entry.name.endswith(".weight")


def _stems(entry: names.Entry) -> list[str]:
  """Returns the names of the adapters in a PEFT file, without `.lora_A.weight`."""
  return [_PREFIX + name.rpartition(".")[0] for name in entry.names()]


def _to_peft(
  entry: names.Entry, a: np.ndarray, b: np.ndarray, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Converts one layer of `a` and `b` to PEFT's lora_A and lora_B."""
  if not _is_module(entry):  # the parameter is [in, out], but PEFT interprets it as [out, in]
    return b, a
  if entry.kind == "patches":  # lora_A is a convolution over patches, lora_B has kernel size 1
    first = entry.write(a, config)
    return first, b.T.reshape(*b.T.shape, *(1,) * (first.ndim - 2))
  return a.T, b.T


def _from_peft(
  entry: names.Entry, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Converts PEFT's lora_A and lora_B to `a` and `b`. Inverse of `_to_peft`."""
  if not _is_module(entry):
    return second, first
  return first.reshape(first.shape[0], -1).T, second.reshape(*second.shape[:2]).T


def save_adapter(
  path: str | pathlib.Path, config: ModelConfig, params: Params, base: str | pathlib.Path = ""
) -> None:
  """Writes the adapters of `params` as a directory that `peft.PeftModel.from_pretrained` loads.

  Args:
    path: the directory, which is created if it does not exist.
    config: config of the model, with `lora`.
    params: parameters with adapters.
    base: directory or name of the base model.
  """
  assert config.lora is not None, "config.lora=None: this model has no adapters"
  path = pathlib.Path(path)
  flat = weights.by_path(params)
  tensors: dict[str, np.ndarray] = {}
  modules, parameters = [], []
  for entry in _adapted(config, params):
    adapter_path = (*entry.path[:-1], "lora")
    a, b = (weights.fetch(flat[*adapter_path, part]) for part in ("a", "b"))
    for i, stem in enumerate(_stems(entry)):
      one = (a, b) if entry.layers is None else (a[i], b[i])
      first, second = _to_peft(entry, *one, config)
      tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(first)
      tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(second)
    if _is_module(entry):
      modules += [name.removesuffix(".weight") for name in entry.names()]
    else:
      parameters += entry.names()
  alpha = config.lora.alpha
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": str(base),
    "r": config.lora.rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "target_modules": modules,
    "target_parameters": parameters or None,
    "bias": "none",
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "modules_to_save": None,
  }
  if jax.process_index():
    return  # fetching requires all processes; only process 0 writes
  path.mkdir(parents=True, exist_ok=True)
  weights.write_file(
    path / WEIGHTS_FILE, lambda f: save_file(tensors, f, metadata={"format": "pt"})
  )
  weights.write_file(path / CONFIG_FILE, lambda f: f.write_text(json.dumps(settings, indent=2)))


def check_adapter(path: str | pathlib.Path, adapter: LoRA) -> None:
  """Checks that a PEFT directory exists, and that its rank and alpha are those of `adapter`.

  Raises:
    FileNotFoundError, ValueError: a file is missing or invalid, a value differs, or a setting is
      not supported. The message is one line.
  """
  settings_file, file = (pathlib.Path(path) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
  for needed in (settings_file, file):
    if not needed.is_file():
      raise FileNotFoundError(f"{needed}: no such file; expected a PEFT adapter directory")
  try:
    settings = json.loads(settings_file.read_text())
    settings = dict(settings.items())
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{settings_file}: not a JSON object ({error})") from None
  for field, key in (("rank", "r"), ("alpha", "lora_alpha")):
    value = getattr(adapter, field)
    if settings.get(key) != value:
      raise ValueError(
        f"config.model.lora.{field}={value!r}: expected {settings.get(key)!r}, "
        f"the value of {key} in {settings_file}"
      )
  for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
    if settings.get(key):
      raise ValueError(f"{settings_file}: {key}={settings[key]!r} is not supported")


def load_adapter(
  path: str | pathlib.Path, config: ModelConfig, shapes: Params, shardings: Params | None = None
) -> Params:
  """Reads the adapters of a directory that `save_adapter` or PEFT has written.

  Args:
    path: the directory.
    config: config of the model. `lora` must agree with the directory.
    shapes: ShapeDtypeStructs of the parameters with adapters. Only the adapters are read.
    shardings: the sharding of each parameter, as a pytree like `shapes`. None means the default
      device.

  Returns:
    The adapters of `shapes`, without the other parameters.

  Raises:
    FileNotFoundError, ValueError: a file is missing or incomplete, or rank, alpha, layers or shapes
      differ from those of the model. The message is one line.
  """
  adapter = config.lora
  assert adapter is not None, "config.lora=None: this model has no adapters"
  check_adapter(path, adapter)
  file = pathlib.Path(path) / WEIGHTS_FILE
  try:
    stored = load_file(file)
  except SafetensorError as error:
    raise ValueError(f"{file}: not a complete safetensors file ({error})") from None
  # Files of earlier versions of transformers contain other names of the same layers.
  found = {_PREFIX + names.canonical_name(name.removeprefix(_PREFIX)): name for name in stored}
  flat, places = weights.by_path(shapes), {}
  if shardings is not None:
    places = weights.by_path(shardings)

  def take(name: str) -> np.ndarray:
    if name not in found:
      raise ValueError(
        f"{file}: tensor {name!r} is missing; config.model.lora.targets="
        f"{adapter.targets!r} requires it"
      )
    return stored[found.pop(name)]

  loaded: dict[names.Path, jax.Array] = {}
  for entry in _adapted(config, shapes):
    pairs = [
      _from_peft(entry, take(f"{stem}.lora_A.weight"), take(f"{stem}.lora_B.weight"))
      for stem in _stems(entry)
    ]
    for part, layers in zip(("a", "b"), zip(*pairs, strict=True), strict=True):
      adapter_path = (*entry.path[:-1], "lora", part)
      array = layers[0] if entry.layers is None else np.stack(layers)
      if array.shape != flat[adapter_path].shape:
        raise ValueError(
          f"{file}: the adapter of {'/'.join(entry.path[:-1])} has shape "
          f"{array.shape}, expected {flat[adapter_path].shape}"
        )
      loaded[adapter_path] = jax.device_put(
        array.astype(flat[adapter_path].dtype), places.get(adapter_path)
      )
  if found:
    raise ValueError(
      f"{file}: tensor {min(found.values())!r} belongs to no adapter of this model "
      f"({len(found)} such tensors; config.model.lora.targets={adapter.targets!r})"
    )
  return jax.tree.map_with_path(lambda keys, _: loaded[weights.path_of(keys)], adapters(shapes))

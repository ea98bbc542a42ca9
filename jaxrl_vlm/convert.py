"""Converts models between Hugging Face and Orbax directories: python -m jaxrl_vlm.convert."""

import pathlib
import shutil
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import jax

from jaxrl_vlm import config as config_lib
from jaxrl_vlm.config import Flag
from jaxrl_vlm.errors import UserError, validation

ABOUT = """Converts a model. The type of the source determines the result:
  Hugging Face directory (config.json, *.safetensors) -> Orbax directory (config.json, params/)
  Orbax directory -> Hugging Face directory
  checkpoint of a run -> Hugging Face directory
Prints which parameter was mapped to which tensors."""

SOURCE = Flag(
  "source",
  "Hugging Face directory, Orbax directory that this command wrote, or "
  "checkpoint of a run (runs/mine/checkpoints/100)",
  "checkpoints/digits_base",
)
TARGET = Flag("target", "directory to write; it must be empty or not exist", "converted")
DTYPE = Flag(
  "dtype",
  "dtype of the written parameters: float32, bfloat16, or stored (as in the source)",
  "bfloat16",
  "stored",
)

PARAMS = "params"  # subdirectory of an Orbax directory


def convert(
  source: str | pathlib.Path, target: str | pathlib.Path, dtype: str = "stored"
) -> list[str]:
  """Converts a model, as ABOUT describes.

  Args:
    source: Hugging Face directory, Orbax directory, or checkpoint of a run.
    target: directory to write. It must be empty or not exist.
    dtype: dtype of the written parameters: "float32", "bfloat16" or "stored" (as in the source).

  Returns:
    One line for each parameter with its path, shape, dtype, and the names of its tensors in the
    Hugging Face checkpoint; then a line with the totals.

  Raises:
    UserError: the source is of no known type or is damaged, the target is not empty, or the dtype
      is invalid.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  if dtype not in ("stored", "float32", "bfloat16"):
    raise UserError(f"--dtype={dtype}: expected 'stored', 'float32' or 'bfloat16'")
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"--target={target}: exists and is not an empty directory")
  target.parent.mkdir(parents=True, exist_ok=True)
  # Write under a temporary name first, so that a failed conversion leaves no incomplete target.
  unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
  try:
    with validation(f"--source={source}: "):
      lines = _convert(source, unfinished, dtype)
    unfinished.chmod(0o755)  # mkdtemp creates directories that only the owner can read
    if target.exists():
      target.rmdir()
    unfinished.rename(target)
  except FileNotFoundError as error:
    raise UserError(f"--source={source}: {error}") from error
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return lines


def _convert(source: pathlib.Path, target: pathlib.Path, dtype: str) -> list[str]:
  import orbax.checkpoint as ocp

  from jaxrl_vlm import models
  from jaxrl_vlm.models import weights

  if (source / PARAMS).is_dir():
    config = models.from_directory(source)
    params = _restore(source, config, dtype)
    _copy_files(source, target)
    weights.save_params(target, config, params)
  elif (source / "config.json").is_file():
    config = models.from_directory(source)
    shapes = weights.stored_shapes(source, config, models.abstract_params(config))
    params = weights.load_params(source, config, _typed(shapes, dtype))
    _copy_files(source, target)
    with ocp.StandardCheckpointer() as saver:
      saver.save((target / PARAMS).absolute(), params)
  elif (source / "state").is_dir() and (source.parents[1] / config_lib.CONFIG_FILE).is_file():
    model, params, processor = _of_run(source)
    config = model.config
    if dtype != "stored":
      params = jax.tree.map(lambda x: x.astype(dtype), params)
    models.save_pretrained(target, model, params, processor)
  else:
    raise UserError(
      f"--source={source}: expected a Hugging Face directory (config.json and *.safetensors), an "
      f"Orbax directory (config.json and {PARAMS}/), or a checkpoint of a run (state/)"
    )
  return list(_mapped(config, params))


def _of_run(checkpoint: pathlib.Path) -> tuple[Any, Any, Any]:
  """Returns model, parameters with merged adapters, and processor of a checkpoint of a run."""
  import orbax.checkpoint as ocp

  from jaxrl_vlm import models, parallel
  from jaxrl_vlm.models import lora
  from jaxrl_vlm.stages.loading import load_model, model_path, trainable_of

  workdir = checkpoint.resolve().parents[1]
  config = config_lib.from_json((workdir / config_lib.CONFIG_FILE).read_text(encoding="utf-8"))
  # No attention is computed, and this machine may not support the kernel of the run.
  config.model.attention = "xla"
  model, params, processor = load_model(
    config, model_path(config, workdir), parallel.make_mesh({"fsdp": -1})
  )
  start, frozen = lora.split(params, trainable_of(config))
  wanted = {
    "train": {
      "params": jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), start
      )
    }
  }
  with ocp.PyTreeCheckpointer() as reader:
    trained = reader.restore(
      (checkpoint / "state").absolute(),
      args=ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
      ),
    )["train"]["params"]
  params = lora.merged(lora.merge(frozen, trained), model.config, donate=True)
  return models.VLM(model.config.replace(lora=None)), params, processor


def _typed(shapes: Any, dtype: str) -> Any:
  if dtype == "stored":
    return shapes
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jax.numpy.dtype(dtype)), shapes)


def _restore(source: pathlib.Path, config: Any, dtype: str) -> Any:
  import orbax.checkpoint as ocp

  from jaxrl_vlm import models

  path = (source / PARAMS).absolute()
  with ocp.StandardCheckpointer() as saver:
    stored = saver.metadata(path).item_metadata
    types_ = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored.tree)
    wanted = models.abstract_params(config)
    if jax.tree.map(lambda x: x.shape, types_) != jax.tree.map(lambda x: x.shape, wanted):
      raise ValueError(
        f"{path}: expected the parameter shapes of the model in {source / 'config.json'}"
      )
    return saver.restore(path, _typed(types_, dtype))


# Endings of files with parameters, in all common formats, and of their index files.
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json")


def _copy_files(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies all files except parameters: config, tokenizer, chat template, preprocessors."""
  for file in sorted(source.iterdir()):
    if file.is_file() and not file.name.endswith(_WEIGHTS):
      shutil.copyfile(file, target / file.name)


def _mapped(config: Any, params: Any) -> Iterator[str]:
  """Yields a line for each parameter and one with the totals, see `convert`."""
  from jaxrl_vlm.models import names, weights

  flat = weights.by_path(params)
  for entry in names.entries(config):
    array, layers = flat[entry.path], entry.layers
    name = names.published_name(entry.name, config.family)
    if layers is not None:
      name = name.format(f"{{{layers[0]}..{layers[-1]}}}")
    shape = ", ".join(map(str, array.shape))
    yield f"{'/'.join(entry.path):40} [{shape}] {array.dtype}  <->  {name}"
  count, size = (sum(getattr(x, k) for x in flat.values()) for k in ("size", "nbytes"))
  yield (
    f"{sum(len(e.names()) for e in names.entries(config))} tensors, {count:,} parameters, "
    f"{size / 2**30:.2f} GiB"
  )


def main(args: types.SimpleNamespace) -> None:
  from jaxrl_vlm import parallel

  parallel.choose_platform()
  for line in convert(args.source, args.target, args.dtype):
    print(line)
  print(f"written: {args.target}")


if __name__ == "__main__":
  config_lib.run_cli(main, "jaxrl_vlm.convert", ABOUT, (SOURCE, TARGET, DTYPE))

"""Shared code of the speed benchmarks: stored results, timing, and synthetic prompts."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runs
from jaxrl_vlm import config as config_lib
from jaxrl_vlm import parallel
from jaxrl_vlm.data.layout import Visual, expand_visuals, lay_out_patches
from jaxrl_vlm.models import ModelConfig
from jaxrl_vlm.types import Params, Prompt

FOLDER = pathlib.Path(__file__).parent
THREADS = 2
# Seconds of pause before each measurement. During the pause, the threads that the previous
# measurement used stop waiting for more work.
_PAUSE = 0.5


def parser(doc: str | None) -> argparse.ArgumentParser:
  """Returns an argument parser with the flags --again and --out."""
  result = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  result.add_argument(
    "--again", action="store_true", help="discard stored results and measure again"
  )
  result.add_argument("--out", type=pathlib.Path, help="file of results (default: in benchmarks/)")
  return result


def use_threads(count: int = THREADS) -> None:
  """Limits this process to `count` processors.

  It must be called before the first use of jax, because jax then starts one thread for each
  processor that the process may use.
  """
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


class Results:
  """Results by name, stored in a JSON file. A result that is in the file is not measured again.

  Each result is written as soon as it is measured. The entry `about` of the file contains the date,
  the machine and the package versions of the last measurement.

  Args:
    path: The JSON file.
    again: Whether to discard the stored results.
  """

  def __init__(self, path: pathlib.Path, again: bool = False):
    self.path = path
    self.values: dict[str, Any] = {}
    if path.exists() and not again:
      self.values = json.loads(path.read_text())

  def get(
    self, name: str, measure: Callable[[], Mapping[str, Any]], *packages: str, **about: Any
  ) -> dict[str, Any]:
    """Returns the stored result. If there is none, measures and stores it.

    Args:
      name: Name of the result.
      measure: Function that measures the result.
      *packages: Packages whose versions are stored in `about`, in addition to jax and numpy.
      **about: Further entries of `about`.
    """
    if name not in self.values:
      result = {**measure(), "date": datetime.date.today().isoformat()}
      versions = {p: importlib.metadata.version(p) for p in ("jax", "numpy", *packages)}
      values = {k: v for k, v in self.values.items() if k != "about"}
      about = {**runs.surroundings(), "versions": versions, **about}
      self.values = values | {name: result, "about": about}
      config_lib.write_atomically(self.path, json.dumps(self.values, indent=1) + "\n")
    return self.values[name]

  def picture(self, path: pathlib.Path) -> pathlib.Path:
    """Returns the path of a plot. With --out, it is next to the results instead of `path`."""
    return path if self.path.parent == FOLDER else self.path.with_suffix(".png")


def take_turns(
  sides: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
  """Measures the seconds of several functions, which run alternately under the same conditions.

  In each turn, every function runs once.

  Args:
    sides: Functions by name. The time of a function includes waiting for its jax results.
    repeats: Number of measured turns.
    warm_up: Number of turns before the measured ones.

  Returns:
    The seconds of each measured turn, by name of the function.
  """
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for i in range(repeats + warm_up):
    for name, run in sides.items():
      time.sleep(_PAUSE)
      start = time.perf_counter()
      jax.block_until_ready(run())
      if i >= warm_up:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def median(seconds: Mapping[str, list[float]]) -> dict[str, float]:
  return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
  """Returns the speedup of `fast` over `slow`: the median ratio of their times in a turn."""
  return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def matrix_product(size: int, dtype: str = "float32") -> tuple[Callable[[], jax.Array], float]:
  """Returns a function that multiplies two `size` x `size` matrices, and its number of FLOPs."""
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
  product = jax.jit(jnp.matmul)
  return lambda: product(a, b), 2.0 * size**3


def one_device() -> Any:
  return parallel.make_mesh({"fsdp": 1, "tensor": 1}, jax.devices()[:1])


def random_params(shapes: Params) -> Params:
  """Returns small random parameters of the given shapes and dtypes. The scales of norms are 1."""

  def one(path, key, shape):
    if "scale" in str(path[-1]):
      return jnp.ones(shape.shape, shape.dtype)
    return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)

  leaves, treedef = jax.tree.flatten(shapes)
  keys = jax.tree.unflatten(treedef, list(jax.random.split(jax.random.key(0), len(leaves))))
  return jax.jit(lambda keys: jax.tree.map_with_path(one, keys, shapes))(keys)


def words(config: ModelConfig) -> np.ndarray:
  """Returns the ids i32[n] of ordinary tokens, which are neither special nor suppressed."""
  special = [
    v for k, v in json.loads(config.hf).items() if k.endswith("_token_id") and isinstance(v, int)
  ]
  all_tokens = np.arange(config.vocab_size, dtype=np.int32)
  return np.setdiff1d(all_tokens, [*special, *config.suppressed_tokens])


def make_prompt(config: ModelConfig, prompts: int, text: int, side: int = 0) -> Prompt:
  """Returns a batch of random prompts of equal length, without padding, as numpy arrays.

  Args:
    config: Config of the model.
    prompts: Number of prompts (P).
    text: Number of text tokens of each prompt.
    side: Side in patches of a square image in the middle of the text, or 0 for no image.
  """
  rng, vision = np.random.default_rng(0), config.vision
  grids = [(1, side, side)] if side else []
  image = [Visual(grid, json.loads(config.hf)["image_token_id"]) for grid in grids]
  rows = []
  for line in rng.choice(words(config), (prompts, text)):
    ids = np.insert(line, text // 2, [v.token_id for v in image])
    rows.append(expand_visuals(ids, image, vision.spatial_merge_size))
  tokens, positions, features = (np.stack(arrays) for arrays in zip(*rows, strict=True))
  window = None if vision.full_attention_layers is None else vision.window_size
  where = lay_out_patches(grids, vision.spatial_merge_size, vision.patch_size, window)
  # Without an image, a prompt still has padding for the patches of one visual token.
  room = 0 if side else vision.spatial_merge_size**2
  where = [np.pad(a, [(0, room)] + [(0, 0)] * (a.ndim - 1)) for a in where]
  where[1][side**2 :] = 1
  places = [np.broadcast_to(a, (prompts, *a.shape)) for a in where]
  patches = rng.standard_normal((prompts, side**2 + room, vision.patch_dim), np.float32)
  return Prompt(
    tokens=tokens,
    length=np.full(prompts, tokens.shape[1], np.int32),
    positions=positions,
    next_position=positions.max(axis=(1, 2)) + 1,
    feature_index=features,
    patches=patches,
    patch_positions=places[0],
    patch_grids=places[1],
    patch_segments=places[2],
    patch_windows=places[3],
  )


def torch_inputs(
  prompt: Prompt, row: int, copies: int, image_token: int, more: Any = None
) -> dict[str, Any]:
  """Returns inputs for Qwen2.5-VL in transformers: copies of a prompt with one image.

  Args:
    prompt: A batch of prompts.
    row: Index of the prompt.
    copies: Number of copies.
    image_token: Token id of visual tokens.
    more: Tokens i[copies, n] to append to the copies, or None.
  """
  import torch

  tokens = np.repeat(np.asarray(prompt.tokens)[row : row + 1, : prompt.length[row]], copies, axis=0)
  image = tokens == image_token
  if more is not None:
    tokens = np.concatenate([tokens, more], axis=1)
    image = np.concatenate([image, np.zeros(more.shape, bool)], axis=1)
  inputs = {
    "input_ids": torch.tensor(tokens).long(),
    "attention_mask": torch.ones(tokens.shape, dtype=torch.long),
    "mm_token_type_ids": torch.tensor(image).long(),
  }
  grid = [1, *np.asarray(prompt.patch_grids)[row, 0].tolist()]
  return inputs | {
    "pixel_values": torch.tensor(np.asarray(prompt.patches)[row]).repeat(copies, 1),
    "image_grid_thw": torch.tensor([grid] * copies),
  }

"""Estimates the memory that programs need on one device, without compiling them.

The formulas count the large arrays: weights and optimizer state, keys and values, activations kept
for the backward pass, logits, and the activations of the largest layer. All results are in bytes on
one device. `tests/parallel/test_tpu.py` checks that they agree within a factor with the memory that
XLA plans for a TPU. A run plans to fill `SHARE` of a device's memory.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_vlm.models import attention
from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.models.decoder import NEAR
from jaxrl_vlm.models.layers import SCORES
from jaxrl_vlm.packing import block_shape

GIB = 2**30
SHARE = 0.9
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def capacity(device: Any) -> int:
  """Returns the memory of a device in bytes, or 0 if unknown.

  A CPU device has an equal share of the machine's (or the container's) memory.
  """
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return int(stats["bytes_limit"])
  if device.platform != "cpu":
    return 0
  machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  for path in _LIMITS:  # of a container
    with contextlib.suppress(OSError, ValueError):  # no such file; the text "max"
      machine = min(machine, int(pathlib.Path(path).read_text()))
  return machine // len(jax.local_devices(backend="cpu"))


def held(tree: Any, shardings: Any) -> int:
  """Returns the bytes that a pytree occupies on each device.

  Args:
    tree: arrays or shapes.
    shardings: their shardings. Leaves in host memory (`pinned_host`) are not counted.
  """
  return sum(
    math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    if sharding.memory_kind != "pinned_host"
  )


@dataclasses.dataclass(frozen=True)
class Model:
  """Sizes in bytes of a model's arrays on one device.

  Attributes:
    config: config of the model.
    tensor: number of devices that heads, hidden units and vocabulary are sharded over.
  """

  config: ModelConfig
  tensor: int = 1

  def _split(self, count: int) -> float:
    return count / self.tensor if count % self.tensor == 0 else count

  @property
  def item(self) -> int:
    """Bytes per element of activations."""
    return jnp.dtype(self.config.dtype).itemsize

  def keys_and_values(self, positions: float, int8: bool = False) -> float:
    """Returns the bytes of the keys and values of this many positions in all layers."""
    config = self.config
    per_head = config.head_dim + 4 if int8 else config.head_dim * self.item
    return 2 * config.num_layers * self._split(config.num_kv_heads) * positions * per_head

  def logits(self, tokens: float) -> float:
    """Returns the bytes of the float32 logits of this many tokens and their log-probabilities."""
    return 2 * 4 * tokens * self._split(self.config.vocab_size)

  def _wide(self) -> tuple[float, float, float]:
    """Elements per token of query heads, key (or value) heads and hidden units of the MLP."""
    config = self.config
    hidden = config.intermediate_size
    if config.moe is not None:  # for each expert also its input and output rows, `hidden_size` wide
      hidden = config.moe.experts_per_token * (config.moe.intermediate_size + config.hidden_size)
    return (
      self._split(config.num_heads) * config.head_dim,
      self._split(config.num_kv_heads) * config.head_dim,
      self._split(hidden),
    )

  def layer(self, tokens: float) -> float:
    """Returns the peak of activations in one layer's forward pass over this many tokens."""
    heads, kv, hidden = self._wide()
    return tokens * self.item * (4 * self.config.hidden_size + max(2 * heads + 2 * kv, 3 * hidden))

  def scores(self, queries: float, keys: float, heads: int = 0) -> float:
    """Returns the bytes of two arrays of one layer's attention scores.

    Only attention by XLA stores scores. Kernels store none, but the cuDNN kernel takes a mask.

    Args:
      queries, keys: number of queries, and of keys that each attends to.
      heads: number of heads; 0 for those of the decoder.
    """
    if self.config.attention != "xla":
      return self._mask(queries, keys)
    return self._scores(queries, keys, heads)

  def _mask(self, queries: float, keys: float) -> float:
    return 2 * queries * keys if self.config.attention == "cudnn" else 0.0

  def _scores(self, queries: float, keys: float, heads: int = 0) -> float:
    stored = min(queries * keys, max(SCORES, keys))
    return 2 * 4 * self._split(heads or self.config.num_heads) * stored

  def scores_of_blocks(self, tokens: float, length: int, max_tokens: int, rows: int) -> float:
    """Returns `scores` of packed responses.

    A block is a fixed number of consecutive response tokens, the unit of packing. Without a kernel,
    attention processes tiles of several blocks.

    Args:
      tokens: response tokens that pass through the model together.
      length: Lp.
      max_tokens: T.
      rows: number of prompts whose keys and values are stored.
    """
    if attention.answers(self.config, int(tokens)):
      return self._mask(tokens, rows * length + tokens)  # over the keys of all prompts
    tile = math.prod(block_shape(max_tokens, kernel=False))  # tokens of a tile of blocks
    return -(-tokens // tile) * self._scores(tile, length + max(tile, NEAR))

  def kept(self, tokens: float) -> float:
    """Returns the bytes of activations that all layers keep for the backward pass.

    The number depends on `ModelConfig.remat`.
    """
    heads, kv, hidden = self._wide()
    config = self.config
    per_token = {
      "full": config.hidden_size,
      "dots": 3 * config.hidden_size + 2 * heads + 2 * kv + 2 * hidden,
      "none": 7 * config.hidden_size + 4 * heads + 4 * kv + 5 * hidden,
    }[config.remat]
    return config.num_layers * tokens * per_token * self.item

  def tower_forward(self, patches: int) -> float:
    """Returns the peak of activations of the vision tower for one prompt, without gradient."""
    vision = self.config.vision
    hidden = (3 if vision.gated_mlp else 2) * vision.intermediate_size
    return patches * self.item * (
      2 * vision.hidden_size + max(4 * vision.hidden_size, hidden)
    ) + self.scores(patches, patches, vision.num_heads)

  def tower(self, patches: int) -> float:
    """Returns the bytes that the vision tower keeps of one prompt for the backward pass."""
    vision = self.config.vision
    hidden = (2 if vision.gated_mlp else 1) * vision.intermediate_size
    per_patch = {
      "full": vision.hidden_size,
      "dots": 6 * vision.hidden_size + hidden,
      "none": 14 * vision.hidden_size + 2 * hidden,
    }[self.config.remat]
    return vision.depth * patches * per_patch * self.item


def rollout(
  model: Model,
  length: int,
  group: int,
  groups: int,
  prefixes: int,
  prefill_size: int,
  tokens: int,
  chunk: int,
  int8: bool = False,
) -> float:
  """Returns the bytes that a rollout needs besides weights and prompts.

  Args:
    model: the model on a device.
    length: Lp.
    group: G, the samples of a prompt.
    groups: number of groups that are decoded at once on this device.
    prefixes: number of prompts whose keys and values are stored.
    prefill_size: number of prompts that are prefilled at once.
    tokens: T.
    chunk: number of tokens between two checks by the host.
    int8: whether the keys and values of prompts are stored in 8 bits.
  """
  # The state stores all chunks but the last. The current chunk is separate and is then appended.
  positions = -(-tokens // chunk) * chunk
  sequences = groups * group
  decoding = sequences * model.keys_and_values(2 * chunk) + model.logits(sequences)
  prefill = prefill_size * (
    model.keys_and_values(length) + model.layer(length)
  ) + prefill_size * model.scores(length, length)
  state = prefixes * model.keys_and_values(length, int8) + sequences * model.keys_and_values(
    positions - chunk
  )
  # Compaction needs the old state, the new smaller one, and temporary copies.
  return max(state + decoding, state + prefill, 2 * state)


def update(
  model: Model,
  length: int,
  patches: int,
  prompts: int,
  group: int,
  tokens: int,
  part_tokens: int,
  gradient: float,
  trains_vision: bool = True,
  views: Sequence[int] = (1,),
) -> float:
  """Returns the bytes that an update needs besides the training state and the prompts.

  A view of a prompt is the same tokens scored under another image or another set of parameters.

  Args:
    model: the model on a device.
    length: Lp.
    patches: number of patches of a prompt.
    prompts: prompts of a microbatch on this device.
    group: G.
    tokens: T.
    part_tokens: response tokens that pass through the model together.
    gradient: bytes of one gradient.
    trains_vision: whether the vision tower has a backward pass.
    views: for each view that has a gradient, the number of its rows per prompt: G for a masked view
      with an image for each sample, else 1.
  """
  pass_tokens = min(max(part_tokens, tokens), prompts * group * tokens)
  rows = prompts * sum(views)
  tower = rows * (model.tower(patches) if trains_vision else 0.0)
  # Keys and values, and their float32 gradient.
  prefixes = rows * model.keys_and_values(length) * (1 + 4 / model.item)
  scores = max(
    rows * model.scores(length, length),
    model.scores_of_blocks(pass_tokens, length, tokens, prompts * max(views)),
  )
  # Two gradients: the accumulated one, and that of the current pass.
  return (
    2 * gradient
    + prefixes
    + tower
    + model.kept(rows * length + len(views) * pass_tokens)
    + model.layer(pass_tokens)
    + model.logits(512)
    + scores
  )


def score(
  model: Model, length: int, prompts: int, rows: int, tokens: int, part_tokens: int
) -> float:
  """Returns the bytes that scoring responses needs besides weights and prompts.

  Args:
    model: the model on a device.
    length: Lp.
    prompts: prompts of a microbatch on this device.
    rows: number of rows per prompt, which are prefilled one after another.
    tokens: T.
    part_tokens: response tokens that pass through the model together.
  """
  prefill = prompts * (model.layer(length) + model.scores(length, length))
  rows *= prompts
  responding = (
    model.layer(part_tokens)
    + model.logits(512)
    + model.scores_of_blocks(part_tokens, length, tokens, rows)
  )
  return rows * model.keys_and_values(length) + max(prefill, responding)


def prompts(model: Model, patches: int, count: int) -> float:
  """Returns the bytes of the patches and visual tokens of `count` prompts.

  The other arrays of a prompt are small and not counted.
  """
  return count * model.item * patches * model.config.vision.patch_dim + features(
    model, patches, count
  )


def features(model: Model, patches: int, count: int) -> float:
  """Returns the bytes of the visual tokens of `count` prompts."""
  vision = model.config.vision
  tokens = patches // vision.spatial_merge_size**2
  return count * tokens * model.config.hidden_size * model.item * (1 + len(vision.deepstack_layers))


def see(model: Model, patches: int, prompts: int) -> float:
  """Returns the bytes that the vision tower needs for the prompts of a microbatch on a device."""
  return prompts * model.tower_forward(patches)

"""Memory of one device by formula, before anything is compiled.

Counted is what grows: weights and optimizer state, keys and values, what the backward pass keeps,
logits, the widest layer. It is held to what XLA plans for a TPU within a factor (see
`tests/parallel/test_tpu.py`); `SHARE` of a device's memory is meant to be filled.
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
  """Bytes of a device; of one of several on the same CPU its share of the machine's."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return int(stats["bytes_limit"])
  if device.platform != "cpu":
    return 0
  most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  for path in _LIMITS:  # of a container
    with contextlib.suppress(OSError, ValueError):  # not there; "max"
      most = min(most, int(pathlib.Path(path).read_text()))
  return most // len(jax.local_devices(backend="cpu"))


def held(tree: Any, shardings: Any) -> int:
  """Bytes of a pytree of arrays or shapes on each device, from where its leaves lie."""
  return sum(
    math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    if place.memory_kind != "pinned_host"
  )


@dataclasses.dataclass(frozen=True)
class Model:
  """Bytes of one model's arrays on a device.

  Attributes:
    config: of the model.
    tensor: devices that heads, hidden units and vocabulary are split over.
  """

  config: ModelConfig
  tensor: int = 1

  def _split(self, count: int) -> float:
    return count / self.tensor if count % self.tensor == 0 else count

  @property
  def item(self) -> int:
    """Bytes of a number in activations."""
    return jnp.dtype(self.config.dtype).itemsize

  def keys_and_values(self, positions: float, int8: bool = False) -> float:
    """Of so many positions in all layers."""
    config = self.config
    each = config.head_dim + 4 if int8 else config.head_dim * self.item
    return 2 * config.num_layers * self._split(config.num_kv_heads) * positions * each

  def logits(self, tokens: float) -> float:
    """float32, and what becomes of them: logarithms of probabilities."""
    return 2 * 4 * tokens * self._split(self.config.vocab_size)

  def _wide(self) -> tuple[float, float, float]:
    """Numbers of a token: attention's heads, key/value heads, hidden units of the MLP."""
    config = self.config
    hidden = config.intermediate_size
    if config.moe is not None:  # and a row of the hidden size for each expert, before and after
      hidden = config.moe.experts_per_token * (config.moe.intermediate_size + config.hidden_size)
    return (
      self._split(config.num_heads) * config.head_dim,
      self._split(config.num_kv_heads) * config.head_dim,
      self._split(hidden),
    )

  def layer(self, tokens: float) -> float:
    """The widest moment of a forward pass over so many tokens."""
    heads, kv, hidden = self._wide()
    return tokens * self.item * (4 * self.config.hidden_size + max(2 * heads + 2 * kv, 3 * hidden))

  def scores(self, queries: float, keys: float, heads: int = 0) -> float:
    """Of one layer's attention by XLA, twice; kernels hold none, but cuDNN's has a mask."""
    if self.config.attention != "xla":
      return self._mask(queries, keys)
    return self._scores(queries, keys, heads)

  def _mask(self, queries: float, keys: float) -> float:
    return 2 * queries * keys if self.config.attention == "cudnn" else 0.0

  def _scores(self, queries: float, keys: float, heads: int = 0) -> float:
    most = min(queries * keys, max(SCORES, keys))
    return 2 * 4 * self._split(heads or self.config.num_heads) * most

  def scores_of_blocks(self, tokens: float, length: int, max_tokens: int, rows: int) -> float:
    """`scores` of so many tokens of packed responses; `rows`: of prompts that are there."""
    if attention.answers(self.config, int(tokens)):
      return self._mask(tokens, rows * length + tokens)  # of all prompts
    wide = math.prod(block_shape(max_tokens, kernel=False))
    return -(-tokens // wide) * self._scores(wide, length + max(wide, NEAR))

  def kept(self, tokens: float) -> float:
    """What all layers keep of so many tokens for the backward pass (`ModelConfig.remat`)."""
    heads, kv, hidden = self._wide()
    config = self.config
    each = {
      "full": config.hidden_size,
      "dots": 3 * config.hidden_size + 2 * heads + 2 * kv + 2 * hidden,
      "none": 7 * config.hidden_size + 4 * heads + 4 * kv + 5 * hidden,
    }[config.remat]
    return config.num_layers * tokens * each * self.item

  def tower_forward(self, patches: int) -> float:
    """The widest moment of a prompt's pass through the vision tower, without gradient."""
    vision = self.config.vision
    hidden = (3 if vision.gated_mlp else 2) * vision.intermediate_size
    return patches * self.item * (
      2 * vision.hidden_size + max(4 * vision.hidden_size, hidden)
    ) + self.scores(patches, patches, vision.num_heads)

  def tower(self, patches: int) -> float:
    """What the vision tower keeps of a prompt for the backward pass."""
    vision = self.config.vision
    hidden = (2 if vision.gated_mlp else 1) * vision.intermediate_size
    each = {
      "full": vision.hidden_size,
      "dots": 6 * vision.hidden_size + hidden,
      "none": 14 * vision.hidden_size + 2 * hidden,
    }[self.config.remat]
    return vision.depth * patches * each * self.item


def rollout(
  model: Model,
  length: int,
  group: int,
  groups: int,
  slots: int,
  admitted: int,
  tokens: int,
  chunk: int,
  int8: bool = False,
) -> float:
  """Bytes that decoding needs besides weights and prompts.

  Args:
    model: on a device.
    length: Lp of the prompts.
    group: G.
    groups: that are decoded at once on this device.
    slots: prompts whose keys and values are held.
    admitted: prompts that are read at once.
    tokens: T.
    chunk: tokens between two looks of the host.
    int8: the prompts' keys and values are.
  """
  # The last chunk is not kept; this one is, and copied behind what was there.
  positions = -(-tokens // chunk) * chunk
  cells = groups * group
  decoding = cells * model.keys_and_values(2 * chunk) + model.logits(cells)
  reading = admitted * (
    model.keys_and_values(length) + model.layer(length)
  ) + admitted * model.scores(length, length)
  flight = slots * model.keys_and_values(length, int8) + cells * model.keys_and_values(
    positions - chunk
  )
  # To move the survivors together takes the flight before, a smaller one after, and copies.
  return max(flight + decoding, flight + reading, 2 * flight)


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
  """Bytes that an update needs besides the state and the prompts.

  Args:
    model: on a device.
    length: Lp of the prompts.
    patches: of a prompt.
    prompts: of a microbatch on this device.
    group: G.
    tokens: T.
    part_tokens: of responses that pass through the model together.
    gradient: bytes of one gradient.
    trains_vision: whether the tower keeps something for a backward pass.
    views: that have a gradient, how many rows of each stand for a prompt: 1, and for a masked view
      of each sample G.
  """
  part = min(max(part_tokens, tokens), prompts * group * tokens)
  rows = prompts * sum(views)
  tower = rows * (model.tower(patches) if trains_vision else 0.0)
  # Keys and values, and their gradient in float32.
  prefixes = rows * model.keys_and_values(length) * (1 + 4 / model.item)
  scores = max(
    rows * model.scores(length, length),
    model.scores_of_blocks(part, length, tokens, prompts * max(views)),
  )
  # The gradient so far, and that of this part.
  return (
    2 * gradient
    + prefixes
    + tower
    + model.kept(rows * length + len(views) * part)
    + model.layer(part)
    + model.logits(512)
    + scores
  )


def score(
  model: Model, length: int, prompts: int, rows: int, tokens: int, part_tokens: int
) -> float:
  """Bytes that scores need besides weights and prompts.

  Args:
    model: on a device.
    length: Lp of the prompts.
    prompts: of a microbatch on this device.
    rows: of each prompt, that are read one after another.
    tokens: T.
    part_tokens: of responses that pass through the model together.
  """
  reading = prompts * (model.layer(length) + model.scores(length, length))
  rows *= prompts
  responding = (
    model.layer(part_tokens)
    + model.logits(512)
    + model.scores_of_blocks(part_tokens, length, tokens, rows)
  )
  return rows * model.keys_and_values(length) + max(reading, responding)


def prompts(model: Model, patches: int, count: int) -> float:
  """Bytes of so many prompts with visual tokens; all else of them is little."""
  return count * model.item * patches * model.config.vision.patch_dim + features(
    model, patches, count
  )


def features(model: Model, patches: int, count: int) -> float:
  """Bytes of the visual tokens of so many prompts."""
  vision = model.config.vision
  tokens = patches // vision.spatial_merge_size**2
  return count * tokens * model.config.hidden_size * model.item * (1 + len(vision.deepstack_layers))


def see(model: Model, patches: int, prompts: int) -> float:
  """Bytes that the vision tower needs for the prompts of a microbatch on this device."""
  return prompts * model.tower_forward(patches)

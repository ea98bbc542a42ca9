"""The text decoder, over one stream of tokens that may stand on a prefix.

A prompt is a stream of one sample without a prefix; G responses are a stream of G samples on
the prompt's keys and values. One module serves prefill, scoring, training and decoding.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from jaxrl_vlm import parallel
from jaxrl_vlm.models import attention, layers
from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.types import Array

NEAR = 256  # keys of responses that a packed query sees at a time, at least


@struct.dataclass
class Prefix:
  """Keys and values of P prompts, shared by all samples of each.

  Attributes:
    k, v: [L, P, K, Lp, D]; for decoding also `Int8`.
    length: i32[P]; how many of the Lp positions responses see.
  """

  k: Any
  v: Any
  length: Array


@struct.dataclass
class Int8:
  """Keys or values in 8 bits, for half the memory and half the bandwidth of bfloat16.

  Attributes:
    values: i8[..., D].
    scale: f32[..., 1]; of one position and head: its largest magnitude is 127 scales.
  """

  values: Array
  scale: Array

  @classmethod
  def of(cls, a: Array) -> "Int8":
    a = a.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(a).max(axis=-1, keepdims=True), 1e-30) / 127
    return cls(jnp.round(a / scale).astype(jnp.int8), scale)

  def to(self, dtype: Any) -> Array:
    return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@struct.dataclass
class Cells:
  """Keys and values of responses while they are decoded, one response in a cell.

  The batch is in R parts, one for each device that holds prompts of its own; a part has C cells
  and S slots, which hold the prefixes (`Prefix` with P = R·S) of prompts that are being answered.
  Nothing crosses from one part to another.

  What a cell has decoded lies in two places: all chunks before this one, and this chunk, where
  every cell writes at the same position, whatever the length of what it has.

  Attributes:
    k, v: [L, R, C, K, T, D]; the chunks before. T may be 0.
    chunk_k, chunk_v: [L, R, C, K, n, D]; this chunk.
    used: i32[R, C]; positions of k and v that are filled.
    longest: i32; the largest of `used`.
    step: i32; positions of this chunk that are filled, the same for all.
    place: i32[R, C]; where the cell's query stands among the S·W of its part. Those of one prompt
      stand together, W to a slot, so that a prefix is read once for all of them.
    cell: i32[R, S·W]; the cell whose query stands here, any where none does.
  """

  k: Array
  v: Array
  chunk_k: Array
  chunk_v: Array
  used: Array
  longest: Array
  step: Array
  place: Array
  cell: Array


@struct.dataclass
class Blocks:
  """Where the tokens of responses are computed: in blocks of B, of which each is of one response.

  The batch is in R parts, one for each device that holds prompts of its own; a part has N blocks,
  those of a response one after another. Padding of short responses costs less than a block each.

  Attributes:
    index: i32[R, N]; which of the part's P/R · G · T/B blocks this is; as many where none is.
    size: B.
    tile: W; blocks i·W ... i·W + W - 1 are of one prompt, or some of the last of them none.
  """

  index: Array
  size: int = struct.field(pytree_node=False)
  tile: int = struct.field(pytree_node=False, default=1)

  def _flat(self, a: Array) -> Array:
    """[P, G, T, ...] -> [R, P/R · G · T/B, B, ...]."""
    room = [(0, 0)] * a.ndim
    room[2] = (0, -a.shape[2] % self.size)
    return jnp.pad(a, room).reshape(self.index.shape[0], -1, self.size, *a.shape[3:])

  def take(self, a: Array) -> Array:
    """[P, G, T, ...] -> [R, N, B, ...]."""
    return jax.vmap(lambda a, i: jnp.take(a, i, axis=0, mode="clip"))(self._flat(a), self.index)

  def put(self, a: Array, into: Array) -> Array:
    """[R, N, B] -> `into` [P, G, T] with these blocks in their places."""
    p, g, t = into.shape
    flat = jax.vmap(lambda a, i, b: a.at[i].set(b, mode="drop"))(self._flat(into), self.index, a)
    return flat.reshape(p, g, -1)[..., :t]

  def holds(self, shape: tuple[int, ...]) -> Array:
    """bool[P, G, T]; the positions in these blocks."""
    some = jnp.ones((*self.index.shape, self.size), bool)
    return self.put(some, jnp.zeros(shape, bool))

  def place(self, shape: tuple[int, ...], rows: int) -> "BlockPlaces":
    """`shape` of the responses [P, G, T]; `rows` of prompts that they stand on, P or P·G."""
    p, g, t = shape
    each = -(-t // self.size)
    response = self.index // each
    return BlockPlaces(
      number=self.index % each,
      row=jnp.minimum(response // (p * g // rows), rows - 1),
      reach=each - 1,
      tile=self.tile if rows == p else 1,
    )  # samples with prompts of their own share no keys


@struct.dataclass
class BlockPlaces:
  """What attention must know of `Blocks`.

  Attributes:
    number: i32[R, N]; of the block in its response.
    row: i32[R, N]; of the prefix in its part.
    reach: the largest number.
    tile: of `Blocks`.
  """

  number: Array
  row: Array
  reach: int = struct.field(pytree_node=False)
  tile: int = struct.field(pytree_node=False)


def _over_blocks(config, q, k, v, sliding, prefix_kv, prefix_length, places):
  """Attention of q [R, N, B, H, D] over its own response and its prefix. [R, N, B, H, D]."""
  r, n, size = q.shape[:3]
  if attention.answers(config, n * size):
    return attention.over_responses(
      config, q, k, v, places.number, places.row, prefix_kv, prefix_length
    )
  scale, tile = config.attention_scale, places.tile
  wide, tiles = tile * size, n // tile  # tokens of a tile, tiles of a part
  far = -(-places.reach // tile)  # tiles before its own in which a block may see its response
  near = min(far + 1, max(1, NEAR // wide))  # tiles that are seen at a time

  def in_window(distance):
    return ~sliding | (distance < config.sliding_window)

  def fold(a):  # [R, N, ...] or [R, M, ...] -> [R·M, ...]
    return a.reshape(r * tiles, *a.shape[2:])

  def by_tile(a):  # [R, N, B, ...] -> [R, M, W·B, ...]
    return a.reshape(r, tiles, wide, *a.shape[3:])

  queries = fold(by_tile(q))
  k, v = (by_tile(a).swapaxes(2, 3) for a in (k, v))
  numbers = places.number.reshape(r * tiles, tile)

  def own(first):
    """Keys and values of `near` tiles from `first` tiles back on, and where they are seen."""
    keys, values = (
      fold(jnp.concatenate([jnp.roll(a, first + i, axis=1) for i in range(near)], axis=3))
      for a in (k, v)
    )
    back, key = first + jnp.arange(near * wide) // wide, jnp.arange(near * wide) % wide

    def sees(at):
      distance = back * wide + at[:, None] - key
      # The response begins as many blocks before the query's as that block's number.
      blocks = back * tile + at[:, None] // size - key // size
      mask = (distance >= 0) & (blocks <= jnp.take(numbers, at // size, axis=1)[..., None])
      return mask & in_window(distance) if config.sliding_window else mask

    return keys, values, sees

  take = jax.vmap(lambda a, index: jnp.take(a, index, axis=0, mode="clip"))

  def of_prefix(a):  # [R·S, ...] -> [R·M, ...]
    return fold(take(a.reshape(r, -1, *a.shape[1:]), places.row[:, ::tile]))

  length, place = of_prefix(prefix_length)[:, None, None], jnp.arange(prefix_kv[0].shape[2])

  def sees_prefix(at):
    mask = jnp.broadcast_to(place < length, (r * tiles, len(at), len(place)))
    if config.sliding_window:
      age = jnp.take(numbers, at // size, axis=1) * size + at % size
      mask = mask & in_window(length + age[..., None] - place)
    return mask

  keys, values, sees = own(0)
  keys, values = (
    jnp.concatenate([of_prefix(a), b], axis=2)
    for a, b in zip(prefix_kv, (keys, values), strict=True)
  )
  out = layers.attend(
    queries, keys, values, lambda at: jnp.concatenate([sees_prefix(at), sees(at)], axis=-1), scale
  )

  def further(so_far, first):
    return layers.merge(so_far, layers.attend(queries, *own(first), scale)), None

  if near <= far:
    out, _ = jax.lax.scan(jax.checkpoint(further), out, jnp.arange(near, far + 1, near))
  return out[0].reshape(q.shape)


def _over_stream(config, q, k, v, sliding, prefix_kv, prefix_length, images):
  """Attention of q [P, G, T, H, D] over its own stream and the prefix. [P, G, T, H, D]."""
  p, g, t = q.shape[:3]
  if prefix_kv is None and attention.reads(config, t):
    return attention.over_prompts(config, q, k, v, sliding, images)
  if prefix_kv is not None and attention.answers(config, g * t):
    zero = jnp.zeros((p, g), jnp.int32)  # a part for each prompt, a block for each response
    return attention.over_responses(config, q, k, v, zero, zero, prefix_kv, prefix_length)

  def in_window(distance):  # of a key, tokens back
    return ~sliding | (distance < config.sliding_window)

  def sees_own(at):
    back = at[:, None] - jnp.arange(t)
    mask = (back >= 0)[None]
    if images is not None:
      here = jnp.take(images, at, axis=1)[..., None]
      mask = mask | ((here == images[:, None, :]) & (here > 0))
    return mask & in_window(back) if config.sliding_window else mask

  def fold(a):  # [P, G, T, ...] -> [P·G, T, ...]: each sample sees only itself
    return a.reshape(p * g, *a.shape[2:])

  own = layers.attend(
    fold(q), fold(k).swapaxes(1, 2), fold(v).swapaxes(1, 2), sees_own, config.attention_scale
  )
  if prefix_kv is None:
    return own[0].reshape(q.shape)
  # The prefix is read once for all samples: their queries become one row of G·T queries.
  keys, values = prefix_kv
  length, place = prefix_length[:, None, None], jnp.arange(keys.shape[2])

  def sees_prefix(at):
    mask = place < length
    return mask & in_window(length + (at % t)[:, None] - place) if config.sliding_window else mask

  shared = layers.attend(
    q.reshape(p, g * t, *q.shape[3:]), keys, values, sees_prefix, config.attention_scale
  )
  mean, lse = (a.reshape(p * g, t, *a.shape[2:]) for a in shared)
  return layers.merge((mean, lse), own)[0].reshape(q.shape)


def _over_cells(config, q, k, v, sliding, prefix_kv, prefix_length, own_kv, chunk_kv, cells):
  """Attention of one query for each cell [R, C, H, D] over its prompt, the chunks before, what this
  chunk has, and its own key and value [R, C, K, D]. [R, C, H, D]."""
  r, c, h = q.shape[:3]
  scale = config.attention_scale
  age = cells.used + cells.step  # of the query, in tokens of the response

  def in_window(distance):
    return ~sliding | (distance < config.sliding_window)

  def fold(a):  # [R, C, ...] -> [R·C, ...]
    return a.reshape(r * c, *a.shape[2:])

  def over_own(kv, first, end):
    """Over keys of the cell itself, of which `first` [R, C] is the position of the first."""
    k, v = kv
    at = jnp.arange(k.shape[3])
    seen = at < end[..., None]
    if config.sliding_window:
      seen = seen & in_window((age - first)[..., None] - at)
    out = layers.attend(fold(q)[:, None], fold(k), fold(v), lambda _: fold(seen)[:, None], scale)
    mean, lse = (a[:, 0].reshape(r, c, *a.shape[2:]) for a in out)
    return mean, lse

  def of_heads(a):  # [R, C, K, D] -> [R, C, H, D]
    return jnp.repeat(a, h // a.shape[2], axis=2)

  itself: Any = jnp.einsum("rchd,rchd->rch", q, of_heads(k), preferred_element_type=jnp.float32)
  zero = jnp.zeros_like(cells.used)
  parts = [(of_heads(v), itself * scale), over_own(chunk_kv, cells.used, zero + cells.step)]

  size = own_kv[0].shape[3]
  if size:
    # Only as far as the longest response reaches.
    ends = sorted({-(-size * i // 4) for i in range(5)})

    def before(end):
      if not end:
        return jnp.zeros_like(q), jnp.full(q.shape[:3], layers.MASKED)
      return over_own([a[..., :end, :] for a in own_kv], zero, cells.used)

    parts.append(
      jax.lax.switch(
        jnp.searchsorted(jnp.array(ends), cells.longest), [lambda e=e: before(e) for e in ends]
      )
    )

  take = jax.vmap(lambda a, index: jnp.take(a, index, axis=0, mode="clip"))
  keys, values = (a.to(q.dtype) if isinstance(a, Int8) else a for a in prefix_kv)
  slots = keys.shape[0]

  def in_places(a):  # [R, C, ...] -> [R·S, W, ...]
    return take(a, cells.cell).reshape(slots, -1, *a.shape[2:])

  length, at = prefix_length[:, None, None], jnp.arange(keys.shape[2])
  ages = in_places(age)

  def sees_prefix(queries):
    mask = at < length
    return mask & in_window(length + ages[:, queries, None] - at) if config.sliding_window else mask

  shared = layers.attend(in_places(q), keys, values, sees_prefix, scale)
  mean, lse = (take(a.reshape(r, -1, *a.shape[2:]), cells.place) for a in shared)
  parts.append((mean, lse))
  return layers.merge(*parts)[0]


class DecoderLayer(nn.Module):
  """Pre-norm attention (the stream's own keys, the prefix's, merged) and MLP."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    carry,
    layer,
    sliding,
    prefix_kv,
    own_kv,
    angles,
    prefix_length,
    images,
    deepstack,
    places,
    cells,
  ):
    """One layer.

    Args:
      carry: x [P, G, T, D], and keys and values of the chunk of all cells, or None.
      layer: i32 scalar.
      sliding: bool scalar; this layer sees `sliding_window` tokens back.
      prefix_kv: of this layer, or None.
      own_kv: of the cells, of this layer, or None.
      angles: f32[P, G, T, head_dim / 2] of the layers that see everything, and of those that slide
        (None where there are none); while decoding their `layers.turns`.
      prefix_length: i32[P] or None.
      images: i32[P, T]; number of the image that a prompt's token belongs to, 0 for text; None
        where images are seen like text.
      deepstack: [n, P, T, D] to add after the first n layers, or None.
      places: BlockPlaces, if x [R, N, B, D] is responses in blocks; or None.
      cells: Cells without keys and values, of which x [R, C, 1, D] is the next token of each; or
        None.

    Returns:
      The carry and this stream's (k, v) [P, G, K, T, D] (None with places or cells).
    """
    config = self.config
    x, chunk = carry
    x = parallel.constrained(config.mesh, x, parallel.ROWS)
    p, g, t, _ = x.shape

    def norm(name):
      return layers.RMSNorm(config.rms_norm_eps, config.norm_offset, name=name)

    y = norm("norm1")(x)

    def heads(count, name):
      dense = layers.Dense(
        count * config.head_dim, config.qkv_bias, config.dtype, config.lora, name=name
      )
      return dense(y).reshape(p, g, t, count, config.head_dim)

    q, k = heads(config.num_heads, "q"), heads(config.num_kv_heads, "k")
    v = heads(config.num_kv_heads, "v")
    if config.qk_norm:
      q, k = norm("q_norm")(q), norm("k_norm")(k)
    here = angles[0] if angles[1] is None else jnp.where(sliding, angles[1], angles[0])
    turns = layers.turns(here) if cells is None else here
    q, k = layers.rotate(q, turns), layers.rotate(k, turns)

    out = None
    if places is not None:
      y = _over_blocks(config, q, k, v, sliding, prefix_kv, prefix_length, places)
    elif cells is None:
      y = _over_stream(config, q, k, v, sliding, prefix_kv, prefix_length, images)
      out = k.swapaxes(2, 3), v.swapaxes(2, 3)
    else:
      # Read before it is written: XLA for CPU copies the chunk half as often.
      chunk_kv = [jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in chunk]
      y = _over_cells(
        config,
        q[:, :, 0],
        k[:, :, 0],
        v[:, :, 0],
        sliding,
        prefix_kv,
        prefix_length,
        own_kv,
        chunk_kv,
        cells,
      )
      at = (layer, 0, 0, 0, cells.step, 0)
      chunk = tuple(
        jax.lax.dynamic_update_slice(into, new.swapaxes(2, 3)[None].astype(into.dtype), at)
        for into, new in zip(chunk, (k, v), strict=True)
      )

    y = layers.Dense(config.hidden_size, False, config.dtype, config.lora, name="o")(
      y.reshape(p, g, t, -1)
    )
    x = x + (norm("post_norm1")(y) if config.post_norms else y)
    y = layers.mlp(config, "mlp")(norm("norm2")(x))
    x = x + (norm("post_norm2")(y) if config.post_norms else y)
    if deepstack is not None:
      n = deepstack.shape[0]
      more = jax.lax.dynamic_index_in_dim(deepstack, jnp.minimum(layer, n - 1), keepdims=False)[
        :, None
      ]
      x = x + jnp.where(layer < n, more, 0).astype(x.dtype)
    return (x, chunk), out


def _rotary_axes(config: ModelConfig) -> np.ndarray:
  """Which position (0 time, 1 height, 2 width) each rotary frequency follows. i64[head_dim / 2]."""
  if not config.mrope_section:
    return np.zeros(config.head_dim // 2, int)
  if not config.mrope_interleaved:
    return np.repeat(np.arange(3), config.mrope_section)
  axes = np.zeros(config.head_dim // 2, int)
  for axis in (1, 2):
    axes[axis : 3 * config.mrope_section[axis] : 3] = axis
  return axes


class Decoder(nn.Module):
  """All layers and the final norm."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Array,
    positions: Array,
    prefix: Prefix | None = None,
    cells: Cells | None = None,
    images: Array | None = None,
    deepstack: Array | None = None,
    places: BlockPlaces | None = None,
    finish: bool = True,
  ) -> tuple[Array, Any, Any]:
    """Runs a stream.

    Args:
      x: [P, G, T, D] embedded tokens.
      positions: i32[P, G, T, 3] M-RoPE ids (time, height, width).
      prefix: what all samples of a prompt see before themselves.
      cells: what each response has decoded so far; then x [R, C, 1, D] is the next token of each.
      images: i32[P, T]; of prompts: tokens with the same number above 0 see each other.
      deepstack: [n, P, T, D]; of prompts: added after the first n layers.
      places: of responses in blocks, x [R, N, B, D].
      finish: whether the final norm follows.

    Returns:
      hidden [P, G, T, D]; the streams' keys and values
      ([L, P, G, K, T, D] each; None with places or cells); the cells, one token further.
    """
    config = self.config

    def angles(theta, factor, axes):
      freq = layers.frequencies(config.head_dim, theta) / factor
      return jnp.take(positions, axes, axis=-1).astype(jnp.float32) * freq

    axes = _rotary_axes(config)
    every = angles(config.rope_theta, config.rope_factor, axes)
    near = angles(config.sliding_rope_theta, 1.0, axes) if config.sliding_window else None
    # Else XLA for CPU computes them again for each layer and head, and here for every token.
    if cells is not None:
      every, near = jax.lax.optimization_barrier(jax.tree.map(layers.turns, (every, near)))
    sliding = jnp.array(config.sliding_layers or (False,) * config.num_layers)

    layer = layers.rematted(DecoderLayer, config.remat)
    stack = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, 0, 0, 0, *(nn.broadcast,) * 6),  # type: ignore[arg-type]  # flax says int
      length=config.num_layers,
    )
    prefix_kv = None if prefix is None else (prefix.k, prefix.v)
    length = None if prefix is None else prefix.length
    chunk = own_kv = where = None
    if cells is not None:
      chunk, own_kv = (cells.chunk_k, cells.chunk_v), (cells.k, cells.v)
      where = dataclasses.replace(cells, k=None, v=None, chunk_k=None, chunk_v=None)
    (x, chunk), kv = stack(config, name="layers")(
      (x, chunk),
      jnp.arange(config.num_layers),
      sliding,
      prefix_kv,
      own_kv,
      (every, near),
      length,
      images,
      deepstack,
      places,
      where,
    )
    if cells is not None and chunk is not None:
      cells = dataclasses.replace(cells, chunk_k=chunk[0], chunk_v=chunk[1], step=cells.step + 1)
    norm = layers.RMSNorm(config.rms_norm_eps, config.norm_offset, name="norm")
    return norm(x) if finish else x, kv, cells

"""The text decoder.

The decoder runs on a stream: token sequences [P, G, T] that can attend to a prefix, the cached keys
and values of their prompts. Prompts are a stream with G = 1 and no prefix. The G responses of each
prompt are a stream whose prefix is that prompt. One module therefore serves prefill, scoring,
training and decoding.

Scoring and training can pack responses into blocks (`Blocks`). A block is a fixed number of
consecutive response tokens, the unit of packing. Decoding advances one response per sequence (row)
of the decoding batch (`DecodeCache`). Both split the batch into R shards, one for each index along
the mesh axes that split prompts (`parallel.ROWS`).
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

# Response keys that packed attention without a kernel processes at a time. If one tile of blocks
# has more keys, it processes one tile at a time.
NEAR = 256


@struct.dataclass
class Prefix:
  """Keys and values of P prompts, shared by all samples of each prompt.

  Attributes:
    k, v: [L, P, K, Lp, D], or `Int8` for decoding.
    length: i32[P]; number of the Lp positions that responses attend to.
  """

  k: Any
  v: Any
  length: Array


@struct.dataclass
class Int8:
  """Keys or values quantized to 8 bits: D + 4 bytes per position and head, 2·D in bfloat16.

  Attributes:
    values: i8[..., D].
    scale: f32[..., 1]; one scale per position and head, its largest magnitude divided by 127.
  """

  values: Array
  scale: Array

  @classmethod
  def of(cls, a: Array) -> "Int8":
    """Quantizes an array [..., D]."""
    a = a.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(a).max(axis=-1, keepdims=True), 1e-30) / 127
    return cls(jnp.round(a / scale).astype(jnp.int8), scale)

  def to(self, dtype: Any) -> Array:
    """Returns the dequantized array [..., D]."""
    return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@struct.dataclass
class DecodeCache:
  """Keys and values of the responses that are being decoded.

  A shard has C sequences, which decode one response each, and S prefix slots, which hold the
  prefixes of the prompts that are being answered (`Prefix` with P = R·S). No data passes between
  shards.

  Responses are decoded in chunks of n tokens. The keys and values of earlier chunks are in `k` and
  `v`, where each sequence has its own length. Those of the current chunk are in `chunk_k` and
  `chunk_v`, where all sequences write at the same position `step`.

  Attributes:
    k, v: [L, R, C, K, T, D]; the earlier chunks. T may be 0.
    chunk_k, chunk_v: [L, R, C, K, n, D]; the current chunk.
    used: i32[R, C]; number of filled positions of k and v.
    longest: i32; the maximum of `used`.
    step: i32; number of filled positions of the current chunk, the same for all sequences.
    query_of_sequence: i32[R, C]; index of the query of each sequence among the S·W queries of its
      shard. These are ordered by prefix slot, W queries per slot, so that a prefix is read once for
      all sequences of its prompt.
    sequence_of_query: i32[R, S·W]; the inverse: the sequence that each of these queries belongs to.
      Unused queries have any valid index.
  """

  k: Array
  v: Array
  chunk_k: Array
  chunk_v: Array
  used: Array
  longest: Array
  step: Array
  query_of_sequence: Array
  sequence_of_query: Array


@struct.dataclass
class Blocks:
  """The blocks of response tokens that one forward pass computes.

  A block is B consecutive tokens of one response. A shard has N blocks, and the blocks of a
  response are consecutive in it. The padding of a response is less than one block.

  Attributes:
    index: i32[R, N]; index of each block among the P/R · G · ceil(T/B) blocks of its shard. Unused
      entries hold that count.
    size: B.
    tile: W; blocks i·W to i·W + W - 1 belong to the same prompt. The last of them may be unused.
  """

  index: Array
  size: int = struct.field(pytree_node=False)
  tile: int = struct.field(pytree_node=False, default=1)

  def _flat(self, a: Array) -> Array:
    """[P, G, T, ...] -> [R, P/R · G · T/B, B, ...]."""
    padding = [(0, 0)] * a.ndim
    padding[2] = (0, -a.shape[2] % self.size)
    return jnp.pad(a, padding).reshape(self.index.shape[0], -1, self.size, *a.shape[3:])

  def take(self, a: Array) -> Array:
    """Gathers the blocks: [P, G, T, ...] -> [R, N, B, ...]."""
    return jax.vmap(lambda a, i: jnp.take(a, i, axis=0, mode="clip"))(self._flat(a), self.index)

  def put(self, a: Array, into: Array) -> Array:
    """Returns `into` [P, G, T] with these blocks replaced by `a` [R, N, B]."""
    p, g, t = into.shape
    flat = jax.vmap(lambda a, i, b: a.at[i].set(b, mode="drop"))(self._flat(into), self.index, a)
    return flat.reshape(p, g, -1)[..., :t]

  def holds(self, shape: tuple[int, ...]) -> Array:
    """Returns the mask bool[P, G, T] of the tokens in these blocks. `shape`: (P, G, T)."""
    ones = jnp.ones((*self.index.shape, self.size), bool)
    return self.put(ones, jnp.zeros(shape, bool))

  def info(self, shape: tuple[int, ...], rows: int) -> "BlockInfo":
    """Returns what attention needs to know about the blocks.

    Args:
      shape: (P, G, T) of the responses.
      rows: number of prompts: P, or P·G if every sample has a prompt of its own.
    """
    p, g, t = shape
    per_response = -(-t // self.size)
    response = self.index // per_response
    return BlockInfo(
      number=self.index % per_response,
      row=jnp.minimum(response // (p * g // rows), rows - 1),
      reach=per_response - 1,
      tile=self.tile if rows == p else 1,  # samples with prompts of their own share no prefix
    )


@struct.dataclass
class BlockInfo:
  """What attention needs to know about `Blocks`.

  Attributes:
    number: i32[R, N]; index of the block in its response.
    row: i32[R, N]; index of the prefix of the block in its shard.
    reach: the largest possible `number`.
    tile: as in `Blocks`.
  """

  number: Array
  row: Array
  reach: int = struct.field(pytree_node=False)
  tile: int = struct.field(pytree_node=False)


def _packed_attention(config, q, k, v, sliding, prefix_kv, prefix_length, info):
  """Attention of blocks q [R, N, B, H, D] to their own responses and prefixes. [R, N, B, H, D]."""
  r, n, size = q.shape[:3]
  if attention.answers(config, n * size):
    return attention.over_responses(
      config, q, k, v, info.number, info.row, prefix_kv, prefix_length
    )
  scale, tile = config.attention_scale, info.tile
  tile_tokens, tiles = tile * size, n // tile  # M tiles per shard
  # Earlier tiles that can hold keys of the same response, and tiles that are processed at a time.
  earlier = -(-info.reach // tile)
  at_once = min(earlier + 1, max(1, NEAR // tile_tokens))

  def in_window(distance):
    return ~sliding | (distance < config.sliding_window)

  def fold(a):  # [R, N, ...] or [R, M, ...] -> [R·M, ...]
    return a.reshape(r * tiles, *a.shape[2:])

  def by_tile(a):  # [R, N, B, ...] -> [R, M, W·B, ...]
    return a.reshape(r, tiles, tile_tokens, *a.shape[3:])

  queries = fold(by_tile(q))
  k, v = (by_tile(a).swapaxes(2, 3) for a in (k, v))
  numbers = info.number.reshape(r * tiles, tile)

  def own(first):
    """Keys and values of tiles `first` to `first + at_once - 1` before the query's, and a mask."""
    keys, values = (
      fold(jnp.concatenate([jnp.roll(a, first + i, axis=1) for i in range(at_once)], axis=3))
      for a in (k, v)
    )
    back = first + jnp.arange(at_once * tile_tokens) // tile_tokens
    key = jnp.arange(at_once * tile_tokens) % tile_tokens

    def mask_of(query):
      distance = back * tile_tokens + query[:, None] - key
      # The response starts `number` blocks before the block of the query.
      blocks_back = back * tile + query[:, None] // size - key // size
      mask = (distance >= 0) & (blocks_back <= jnp.take(numbers, query // size, axis=1)[..., None])
      return mask & in_window(distance) if config.sliding_window else mask

    return keys, values, mask_of

  take = jax.vmap(lambda a, index: jnp.take(a, index, axis=0, mode="clip"))

  def of_prefix(a):  # [R·S, ...] -> [R·M, ...]
    return fold(take(a.reshape(r, -1, *a.shape[1:]), info.row[:, ::tile]))

  length, key_position = of_prefix(prefix_length)[:, None, None], jnp.arange(prefix_kv[0].shape[2])

  def prefix_mask_of(query):
    mask = jnp.broadcast_to(key_position < length, (r * tiles, len(query), len(key_position)))
    if config.sliding_window:
      age = jnp.take(numbers, query // size, axis=1) * size + query % size
      mask = mask & in_window(length + age[..., None] - key_position)
    return mask

  keys, values, mask_of = own(0)
  keys, values = (
    jnp.concatenate([of_prefix(a), b], axis=2)
    for a, b in zip(prefix_kv, (keys, values), strict=True)
  )
  out = layers.attend(
    queries,
    keys,
    values,
    lambda query: jnp.concatenate([prefix_mask_of(query), mask_of(query)], axis=-1),
    scale,
  )

  def add_earlier_tiles(out, first):
    return layers.merge(out, layers.attend(queries, *own(first), scale)), None

  if at_once <= earlier:
    out, _ = jax.lax.scan(
      jax.checkpoint(add_earlier_tiles), out, jnp.arange(at_once, earlier + 1, at_once)
    )
  return out[0].reshape(q.shape)


def _stream_attention(config, q, k, v, sliding, prefix_kv, prefix_length, images):
  """Attention of q [P, G, T, H, D] to its own stream and the prefix. [P, G, T, H, D]."""
  p, g, t = q.shape[:3]
  if prefix_kv is None and attention.reads(config, t):
    return attention.over_prompts(config, q, k, v, sliding, images)
  if prefix_kv is not None and attention.answers(config, g * t):
    zero = jnp.zeros((p, g), jnp.int32)  # one shard per prompt, one block per response
    return attention.over_responses(config, q, k, v, zero, zero, prefix_kv, prefix_length)

  def in_window(distance):  # from the query back to the key, in tokens
    return ~sliding | (distance < config.sliding_window)

  def own_mask_of(query):
    distance = query[:, None] - jnp.arange(t)
    mask = (distance >= 0)[None]
    if images is not None:
      image = jnp.take(images, query, axis=1)[..., None]
      mask = mask | ((image == images[:, None, :]) & (image > 0))
    return mask & in_window(distance) if config.sliding_window else mask

  def fold(a):  # [P, G, T, ...] -> [P·G, T, ...]: a sample attends only to itself
    return a.reshape(p * g, *a.shape[2:])

  own = layers.attend(
    fold(q), fold(k).swapaxes(1, 2), fold(v).swapaxes(1, 2), own_mask_of, config.attention_scale
  )
  if prefix_kv is None:
    return own[0].reshape(q.shape)
  # The queries of all samples form one row of G·T queries, so that the prefix is read once.
  keys, values = prefix_kv
  length, key = prefix_length[:, None, None], jnp.arange(keys.shape[2])

  def prefix_mask_of(query):
    mask = key < length
    return mask & in_window(length + (query % t)[:, None] - key) if config.sliding_window else mask

  shared = layers.attend(
    q.reshape(p, g * t, *q.shape[3:]), keys, values, prefix_mask_of, config.attention_scale
  )
  mean, lse = (a.reshape(p * g, t, *a.shape[2:]) for a in shared)
  return layers.merge((mean, lse), own)[0].reshape(q.shape)


def _decode_attention(config, q, k, v, sliding, prefix_kv, prefix_length, own_kv, chunk_kv, cache):
  """Attention of one query per sequence, q [R, C, H, D]. [R, C, H, D].

  A query attends to its prompt, to the earlier chunks, to the current chunk so far, and to its own
  key and value, k and v [R, C, K, D].
  """
  r, c, h = q.shape[:3]
  scale = config.attention_scale
  age = cache.used + cache.step  # index of the query in its response

  def in_window(distance):
    return ~sliding | (distance < config.sliding_window)

  def fold(a):  # [R, C, ...] -> [R·C, ...]
    return a.reshape(r * c, *a.shape[2:])

  def over_own(kv, first, end):
    """Attention to the first `end` [R, C] keys of kv, which start at token `first` [R, C]."""
    k, v = kv
    key_position = jnp.arange(k.shape[3])
    mask = key_position < end[..., None]
    if config.sliding_window:
      mask = mask & in_window((age - first)[..., None] - key_position)
    out = layers.attend(fold(q)[:, None], fold(k), fold(v), lambda _: fold(mask)[:, None], scale)
    mean, lse = (a[:, 0].reshape(r, c, *a.shape[2:]) for a in out)
    return mean, lse

  def of_heads(a):  # [R, C, K, D] -> [R, C, H, D]
    return jnp.repeat(a, h // a.shape[2], axis=2)

  itself: Any = jnp.einsum("rchd,rchd->rch", q, of_heads(k), preferred_element_type=jnp.float32)
  zero = jnp.zeros_like(cache.used)
  outputs = [(of_heads(v), itself * scale), over_own(chunk_kv, cache.used, zero + cache.step)]

  size = own_kv[0].shape[3]
  if size:
    # Each branch reads a quarter more of the earlier chunks. The branch taken is the first that
    # covers the longest response.
    ends = sorted({-(-size * i // 4) for i in range(5)})

    def before(end):
      if not end:
        return jnp.zeros_like(q), jnp.full(q.shape[:3], layers.MASKED)
      return over_own([a[..., :end, :] for a in own_kv], zero, cache.used)

    outputs.append(
      jax.lax.switch(
        jnp.searchsorted(jnp.array(ends), cache.longest), [lambda e=e: before(e) for e in ends]
      )
    )

  take = jax.vmap(lambda a, index: jnp.take(a, index, axis=0, mode="clip"))
  keys, values = (a.to(q.dtype) if isinstance(a, Int8) else a for a in prefix_kv)
  prefix_slots = keys.shape[0]  # of all shards, R·S

  def by_prefix(a):  # [R, C, ...] -> [R·S, W, ...]
    return take(a, cache.sequence_of_query).reshape(prefix_slots, -1, *a.shape[2:])

  length, key = prefix_length[:, None, None], jnp.arange(keys.shape[2])
  ages = by_prefix(age)

  def prefix_mask_of(query):
    mask = key < length
    return mask & in_window(length + ages[:, query, None] - key) if config.sliding_window else mask

  shared = layers.attend(by_prefix(q), keys, values, prefix_mask_of, scale)
  mean, lse = (take(a.reshape(r, -1, *a.shape[2:]), cache.query_of_sequence) for a in shared)
  outputs.append((mean, lse))
  return layers.merge(*outputs)[0]


class DecoderLayer(nn.Module):
  """A transformer layer: pre-norm attention to the stream and its prefix, then a pre-norm MLP."""

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
    block_info,
    cache,
  ):
    """Applies the layer.

    Args:
      carry: x [P, G, T, D], and the keys and values of the current chunk, all layers, or None.
      layer: i32 scalar; index of the layer.
      sliding: bool scalar; whether this layer attends only `sliding_window` tokens back.
      prefix_kv: keys and values of the prefix in this layer, or None.
      own_kv: keys and values of the earlier chunks in this layer, or None.
      angles: rotary angles f32[P, G, T, head_dim / 2] of the layers with full attention, and those
        of the sliding layers (None if there are none). While decoding, their `layers.turns`.
      prefix_length: i32[P] or None.
      images: i32[P, T]; for each token of a prompt, the number of its image, or 0 for text. None if
        image tokens are causal like text.
      deepstack: [n, P, T, D] to add after the first n layers, or None.
      block_info: BlockInfo if x [R, N, B, D] holds blocks of responses, else None.
      cache: DecodeCache without keys and values if x [R, C, 1, D] holds the next token of each
        sequence, else None.

    Returns:
      The carry, and the (k, v) [P, G, K, T, D] of this stream (None with block_info or cache).
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
    rotary = angles[0] if angles[1] is None else jnp.where(sliding, angles[1], angles[0])
    turns = layers.turns(rotary) if cache is None else rotary
    q, k = layers.rotate(q, turns), layers.rotate(k, turns)

    out = None
    if block_info is not None:
      y = _packed_attention(config, q, k, v, sliding, prefix_kv, prefix_length, block_info)
    elif cache is None:
      y = _stream_attention(config, q, k, v, sliding, prefix_kv, prefix_length, images)
      out = k.swapaxes(2, 3), v.swapaxes(2, 3)
    else:
      # The chunk is read before it is written, else XLA for CPU copies it twice as often.
      chunk_kv = [jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in chunk]
      y = _decode_attention(
        config,
        q[:, :, 0],
        k[:, :, 0],
        v[:, :, 0],
        sliding,
        prefix_kv,
        prefix_length,
        own_kv,
        chunk_kv,
        cache,
      )
      at = (layer, 0, 0, 0, cache.step, 0)
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
  """The position axis (0 time, 1 height, 2 width) of each rotary frequency. i64[head_dim / 2]."""
  if not config.mrope_section:
    return np.zeros(config.head_dim // 2, int)
  if not config.mrope_interleaved:
    return np.repeat(np.arange(3), config.mrope_section)
  axes = np.zeros(config.head_dim // 2, int)
  for axis in (1, 2):
    axes[axis : 3 * config.mrope_section[axis] : 3] = axis
  return axes


class Decoder(nn.Module):
  """All transformer layers and the final norm."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Array,
    positions: Array,
    prefix: Prefix | None = None,
    cache: DecodeCache | None = None,
    images: Array | None = None,
    deepstack: Array | None = None,
    block_info: BlockInfo | None = None,
    finish: bool = True,
  ) -> tuple[Array, Any, Any]:
    """Runs the decoder on a stream.

    Args:
      x: [P, G, T, D]; embedded tokens.
      positions: i32[P, G, T, 3]; M-RoPE ids (time, height, width).
      prefix: keys and values of the prompts, which all samples of a prompt attend to.
      cache: keys and values of the responses decoded so far. x [R, C, 1, D] is then the next token
        of each sequence.
      images: i32[P, T]; for prompts: tokens with the same number above 0 attend to each other in
        both directions.
      deepstack: [n, P, T, D]; for prompts: added after the first n layers.
      block_info: for responses in blocks, x [R, N, B, D].
      finish: whether to apply the final norm.

    Returns:
      hidden: [P, G, T, D], or as x.
      kv: keys and values of the stream, [L, P, G, K, T, D] each. None with block_info or cache.
      cache: the cache with one more token per sequence, or None.
    """
    config = self.config

    def angles(theta, factor, axes):
      freq = layers.frequencies(config.head_dim, theta) / factor
      return jnp.take(positions, axes, axis=-1).astype(jnp.float32) * freq

    axes = _rotary_axes(config)
    full = angles(config.rope_theta, config.rope_factor, axes)
    window = angles(config.sliding_rope_theta, 1.0, axes) if config.sliding_window else None
    # Without the barrier, XLA for CPU recomputes cosines and sines for each layer and head, for
    # every decoded token.
    if cache is not None:
      full, window = jax.lax.optimization_barrier(jax.tree.map(layers.turns, (full, window)))
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
    chunk = own_kv = cache_indices = None
    if cache is not None:
      chunk, own_kv = (cache.chunk_k, cache.chunk_v), (cache.k, cache.v)
      cache_indices = dataclasses.replace(cache, k=None, v=None, chunk_k=None, chunk_v=None)
    (x, chunk), kv = stack(config, name="layers")(
      (x, chunk),
      jnp.arange(config.num_layers),
      sliding,
      prefix_kv,
      own_kv,
      (full, window),
      length,
      images,
      deepstack,
      block_info,
      cache_indices,
    )
    if cache is not None and chunk is not None:
      cache = dataclasses.replace(cache, chunk_k=chunk[0], chunk_v=chunk[1], step=cache.step + 1)
    norm = layers.RMSNorm(config.rms_norm_eps, config.norm_offset, name="norm")
    return norm(x) if finish else x, kv, cache

"""The text decoder, over one stream of tokens that may stand on a prefix.

A prompt is a stream of one sample without a prefix; G responses are a stream of G samples on
the prompt's keys and values. One module serves prefill, scoring, training and decoding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from jaxrl_vlm.models import layers
from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.types import Array


@struct.dataclass
class Prefix:
  """Keys and values of P prompts, shared by all samples of each.

  Attributes:
    k, v: [L, P, Lp, K, D].
    length: i32[P]; how many of the Lp positions responses see.
  """

  k: Array
  v: Array
  length: Array


@struct.dataclass
class Cache:
  """Keys and values of responses while they are decoded.

  Attributes:
    k, v: [L, P, G, T, K, D].
    used: i32 scalar; positions filled so far, the same for all samples.
  """

  k: Array
  v: Array
  used: Array


class DecoderLayer(nn.Module):
  """Pre-norm attention (the stream's own keys, the prefix's, merged) and MLP."""

  config: ModelConfig

  @nn.compact
  def __call__(self, carry, layer, sliding, prefix_kv, angles, prefix_length, blocks, deepstack):
    """One layer.

    Args:
      carry: x [P, G, T, D] and the Cache or None.
      layer: i32 scalar.
      sliding: bool scalar; this layer sees `sliding_window` tokens back.
      prefix_kv: of this layer, or None.
      angles: f32[P, G, T, head_dim / 2] of the layers that see everything, and of those that slide
        (None where there are none).
      prefix_length: i32[P] or None.
      blocks: i32[P, T]; number of the image that a prompt's token belongs to, 0 for text; None
        where images are seen like text.
      deepstack: [n, P, T, D] to add after the first n layers, or None.

    Returns:
      The carry and this stream's (k, v) [P, G, T, K, D] (None when there is a cache).
    """
    config = self.config
    x, cache = carry
    p, g, t, _ = x.shape

    def norm(name):
      return layers.RMSNorm(config.rms_norm_eps, config.norm_offset, name=name)

    y = norm("norm1")(x)

    def heads(count, name):
      dense = layers.Dense(count * config.head_dim, config.qkv_bias, config.dtype, config.lora,
                           name=name)
      return dense(y).reshape(p, g, t, count, config.head_dim)

    q, k = heads(config.num_heads, "q"), heads(config.num_kv_heads, "k")
    v = heads(config.num_kv_heads, "v")
    if config.qk_norm:
      q, k = norm("q_norm")(q), norm("k_norm")(k)
    here = angles[0] if angles[1] is None else jnp.where(sliding, angles[1], angles[0])
    q, k = layers.rotate(q, here), layers.rotate(k, here)

    if cache is None:
      own_k, own_v, seen, out = k, v, jnp.arange(t), (k, v)
    else:
      at = (layer, 0, 0, cache.used, 0, 0)
      cache = cache.replace(
          k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), at),
          v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), at))
      own_k, own_v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)
                      for a in (cache.k, cache.v))
      seen, out = cache.used + jnp.arange(t), None

    def in_window(distance):  # of a key, tokens back
      return ~sliding | (distance < config.sliding_window)

    back = seen[:, None] - jnp.arange(own_k.shape[2])[None, :]
    mask = (back >= 0)[None]
    if blocks is not None:
      mask = mask | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] > 0))
    if config.sliding_window:
      mask = mask & in_window(back)

    def fold(a):  # [P, G, S, ...] -> [P·G, S, ...]: each sample sees only itself
      return a.reshape(p * g, *a.shape[2:])

    attention = layers.attend(fold(q), fold(own_k), fold(own_v), mask, config.attention_scale)
    if prefix_kv is None:
      y = attention[0]
    else:
      # The prefix is read once for all samples: their queries become one row of G·T queries.
      keys, values = prefix_kv
      place = jnp.arange(keys.shape[1])
      on_prefix = (place < prefix_length[:, None])[:, None, :]
      if config.sliding_window:
        back = (prefix_length[:, None] + seen)[:, :, None] - place  # [P, T, Lp]
        on_prefix = jnp.tile(on_prefix & in_window(back), (1, g, 1))
      shared = layers.attend(q.reshape(p, g * t, *q.shape[3:]), keys, values, on_prefix,
                             config.attention_scale)
      mean, lse = (a.reshape(p * g, t, *a.shape[2:]) for a in shared)
      y = layers.merge((mean, lse), attention)

    y = layers.Dense(config.hidden_size, False, config.dtype, config.lora, name="o")(
        y.reshape(p, g, t, -1))
    x = x + (norm("post_norm1")(y) if config.post_norms else y)
    y = layers.mlp(config, "mlp")(norm("norm2")(x))
    x = x + (norm("post_norm2")(y) if config.post_norms else y)
    if deepstack is not None:
      n = deepstack.shape[0]
      more = jax.lax.dynamic_index_in_dim(
          deepstack, jnp.minimum(layer, n - 1), keepdims=False)[:, None]
      x = x + jnp.where(layer < n, more, 0).astype(x.dtype)
    return (x, cache), out


def _rotary_axes(config: ModelConfig) -> np.ndarray:
  """Which position (0 time, 1 height, 2 width) each rotary frequency follows. i64[head_dim / 2]."""
  if not config.mrope_section:
    return np.zeros(config.head_dim // 2, int)
  if not config.mrope_interleaved:
    return np.repeat(np.arange(3), config.mrope_section)
  axes = np.zeros(config.head_dim // 2, int)
  for axis in (1, 2):
    axes[axis:3 * config.mrope_section[axis]:3] = axis
  return axes


class Decoder(nn.Module):
  """All layers and the final norm."""

  config: ModelConfig

  @nn.compact
  def __call__(
      self, x: Array, positions: Array, prefix: Prefix | None = None, cache: Cache | None = None,
      blocks: Array | None = None, deepstack: Array | None = None
  ) -> tuple[Array, Any, Any]:
    """Runs a stream.

    Args:
      x: [P, G, T, D] embedded tokens.
      positions: i32[P, G, T, 3] M-RoPE ids (time, height, width).
      prefix: what all samples of a prompt see before themselves.
      cache: what each sample has decoded so far; then x is what follows.
      blocks: i32[P, T]; of prompts: tokens with the same number above 0 see each other.
      deepstack: [n, P, T, D]; of prompts: added after the first n layers.

    Returns:
      hidden [P, G, T, D] after the final norm; the streams' keys and values
      ([L, P, G, T, K, D] each; None with a cache); the cache, filled further.
    """
    config = self.config

    def angles(theta, factor, axes):
      freq = layers.frequencies(config.head_dim, theta) / factor
      return jnp.take(positions, axes, axis=-1).astype(jnp.float32) * freq

    axes = _rotary_axes(config)
    every = angles(config.rope_theta, config.rope_factor, axes)
    near = angles(config.sliding_rope_theta, 1.0, axes) if config.sliding_window else None
    sliding = jnp.array(config.sliding_layers or (False,) * config.num_layers)

    layer = nn.remat(DecoderLayer, prevent_cse=False) if config.remat else DecoderLayer
    stack = nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=(0, 0, 0, *(nn.broadcast,) * 4),  # type: ignore[arg-type]  # flax says int
        length=config.num_layers,
    )
    prefix_kv = None if prefix is None else (prefix.k, prefix.v)
    length = None if prefix is None else prefix.length
    (x, cache), kv = stack(config, name="layers")(
        (x, cache), jnp.arange(config.num_layers), sliding, prefix_kv, (every, near), length,
        blocks, deepstack)
    if cache is not None:
      cache = cache.replace(used=cache.used + x.shape[2])
    norm = layers.RMSNorm(config.rms_norm_eps, config.norm_offset, name="norm")
    return norm(x), kv, cache

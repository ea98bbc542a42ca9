"""The text decoder, over one stream of tokens that may stand on a prefix.

A prompt is a stream of one sample without a prefix; G responses are a stream of G samples on
the prompt's keys and values. One module serves prefill, scoring, training and decoding.
"""

from typing import Any

import jax
import jax.numpy as jnp
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
  """Pre-norm attention (the stream's own keys, the prefix's, merged) and gated MLP."""

  config: ModelConfig

  @nn.compact
  def __call__(self, carry, layer, prefix_kv, angles, prefix_length):
    """carry: x [P, G, T, D] and the Cache or None; layer: i32 scalar; prefix_kv: of this layer.

    Returns the carry and this stream's (k, v) [P, G, T, K, D] (None when there is a cache).
    """
    config = self.config
    x, cache = carry
    p, g, t, _ = x.shape
    y = layers.RMSNorm(config.rms_norm_eps, name="norm1")(x)

    def heads(count, name):
      dense = nn.Dense(count * config.head_dim, dtype=config.dtype, name=name)
      return dense(y).reshape(p, g, t, count, config.head_dim)

    q = layers.rotate(heads(config.num_heads, "q"), angles)
    k = layers.rotate(heads(config.num_kv_heads, "k"), angles)
    v = heads(config.num_kv_heads, "v")

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
    causal = jnp.arange(own_k.shape[2])[None, :] <= seen[:, None]

    def fold(a):  # [P, G, S, ...] -> [P·G, S, ...]: each sample sees only itself
      return a.reshape(p * g, *a.shape[2:])

    attention = layers.attend(fold(q), fold(own_k), fold(own_v), causal[None])
    if prefix_kv is None:
      y = attention[0]
    else:
      # The prefix is read once for all samples: their queries become one row of G·T queries.
      on_prefix = jnp.arange(prefix_kv[0].shape[1]) < prefix_length[:, None]
      keys, values = prefix_kv
      shared = layers.attend(
          q.reshape(p, g * t, *q.shape[3:]), keys, values, on_prefix[:, None, :])
      mean, lse = (a.reshape(p * g, t, *a.shape[2:]) for a in shared)
      y = layers.merge((mean, lse), attention)

    width = config.hidden_size
    y = y.reshape(p, g, t, -1)
    x = x + nn.Dense(width, use_bias=False, dtype=config.dtype, name="o")(y)
    y = layers.RMSNorm(config.rms_norm_eps, name="norm2")(x)
    x = x + layers.GatedMLP(config.intermediate_size, False, config.dtype, name="mlp")(y)
    return (x, cache), out


class Decoder(nn.Module):
  """All layers and the final norm."""

  config: ModelConfig

  @nn.compact
  def __call__(
      self, x: Array, positions: Array, prefix: Prefix | None = None, cache: Cache | None = None
  ) -> tuple[Array, Any, Any]:
    """Runs a stream.

    Args:
      x: [P, G, T, D] embedded tokens.
      positions: i32[P, G, T, 3] M-RoPE ids (time, height, width).
      prefix: what all samples of a prompt see before themselves.
      cache: what each sample has decoded so far; then x is what follows.

    Returns:
      hidden [P, G, T, D] after the final norm; the streams' keys and values
      ([L, P, G, T, K, D] each; None with a cache); the cache, filled further.
    """
    config = self.config
    freq = layers.frequencies(config.head_dim, config.rope_theta)
    axis = jnp.repeat(jnp.arange(3), jnp.array(config.mrope_section),
                      total_repeat_length=config.head_dim // 2)
    angles = jnp.take(positions, axis, axis=-1).astype(jnp.float32) * freq

    layer = nn.remat(DecoderLayer, prevent_cse=False) if config.remat else DecoderLayer
    stack = nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast, nn.broadcast),  # type: ignore[arg-type]  # flax says int
        length=config.num_layers,
    )
    prefix_kv = None if prefix is None else (prefix.k, prefix.v)
    length = None if prefix is None else prefix.length
    (x, cache), kv = stack(config, name="layers")(
        (x, cache), jnp.arange(config.num_layers), prefix_kv, angles, length)
    if cache is not None:
      cache = cache.replace(used=cache.used + x.shape[2])
    return layers.RMSNorm(config.rms_norm_eps, name="norm")(x), kv, cache

"""The vision tower of Qwen2.5-VL: patches in, visual tokens in the decoder's width out."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrl_vlm.models import layers
from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.types import Array


class VisionBlock(nn.Module):
  """Pre-norm attention and gated MLP. Window attention unless this layer attends fully."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array, full: Array, angles: Array, segments: Array, windows: Array):
    vision, dtype = self.config.vision, self.config.dtype
    b, n, d = x.shape
    y = layers.RMSNorm(name="norm1")(x)
    qkv = nn.Dense(3 * d, dtype=dtype, name="qkv")(y).reshape(b, n, 3, vision.num_heads, -1)
    q, k = layers.rotate(qkv[:, :, 0], angles), layers.rotate(qkv[:, :, 1], angles)
    # Attention does not depend on the order of patches, so a window is a mask, not a permutation.
    ids = jnp.where(full, segments, windows)
    mask = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] > 0)
    y, _ = layers.attend(q, k, qkv[:, :, 2], mask)
    x = x + nn.Dense(d, dtype=dtype, name="proj")(y.reshape(b, n, d))
    y = layers.RMSNorm(name="norm2")(x)
    return x + layers.GatedMLP(vision.intermediate_size, True, dtype, name="mlp")(y), None


class VisionTower(nn.Module):
  """Patch embedding, blocks with 2-D rotary positions, and the merger.

  Source: Qwen2.5-VL technical report (arXiv 2502.13923) and its implementation in transformers.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, patches: Array, positions: Array, segments: Array, windows: Array) -> Array:
    """patches f32[P, N, patch_dim], positions i32[P, N, 2], ids i32[P, N] -> [P, N / merge², D]."""
    config, vision = self.config, self.config.vision
    dtype, width = config.dtype, vision.hidden_size
    x = nn.Dense(width, use_bias=False, dtype=dtype, name="patch_embed")(patches.astype(dtype))
    freq = layers.frequencies(width // vision.num_heads // 2, vision.rope_theta)
    angles = positions[..., None].astype(jnp.float32) * freq  # [P, N, 2, head_dim / 4]
    angles = angles.reshape(*angles.shape[:2], -1)

    full = jnp.isin(jnp.arange(vision.depth), jnp.array(vision.full_attention_layers, jnp.int32))
    block = nn.remat(VisionBlock, prevent_cse=False) if config.remat else VisionBlock
    blocks = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # type: ignore[arg-type]
        length=vision.depth,
    )
    x, _ = blocks(config, name="blocks")(x, full, angles, segments, windows)

    x = layers.RMSNorm(name="merger_norm")(x)
    x = x.reshape(x.shape[0], -1, width * vision.spatial_merge_size**2)
    x = nn.Dense(x.shape[-1], dtype=dtype, name="merger_in")(x)
    x = jax.nn.gelu(x, approximate=False)
    return nn.Dense(vision.out_hidden_size, dtype=dtype, name="merger_out")(x)

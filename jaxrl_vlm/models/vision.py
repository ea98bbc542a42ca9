"""The vision tower, which turns image patches into visual tokens of the decoder's hidden size.

One module implements the towers of all families, each as in transformers:

- Qwen2-VL (arXiv 2409.12191);
- Qwen2.5-VL (2502.13923): window attention, RMS norm, gated MLP;
- Qwen3-VL: learned positions, DeepStack (2406.04334);
- Gemma 3: SigLIP (2303.15343), pooled as in 2503.19786.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrl_vlm import parallel
from jaxrl_vlm.models import attention, layers
from jaxrl_vlm.models.config import ModelConfig, VisionConfig
from jaxrl_vlm.types import Array, Prompt


def _norm(vision: VisionConfig, name: str) -> nn.Module:
  kind = {"rms": layers.RMSNorm, "layer": layers.LayerNorm}[vision.norm]
  return kind(vision.norm_eps, name=name)


class VisionBlock(nn.Module):
  """A layer of the vision tower: pre-norm attention and a pre-norm MLP.

  Attention is over the whole frame if `full` is true, else within windows.

  Returns x, and the saliency f32[P, N] of the patches in this layer (`received`). The saliency is
  zero if `watched` is false, and None if `watched` is None.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Array,
    full: Array,
    watched: Array | None,
    angles: Array | None,
    segments: Array,
    windows: Array,
    share: Array | None,
  ) -> tuple[Array, Array | None]:
    vision, dtype, lora = self.config.vision, self.config.dtype, self.config.lora
    x = parallel.constrained(self.config.mesh, x, parallel.ROWS)
    b, n, d = x.shape
    heads = (b, n, vision.num_heads, d // vision.num_heads)
    y = _norm(vision, "norm1")(x)
    if vision.fused_qkv:
      qkv = layers.Dense(3 * d, True, dtype, lora, name="qkv")(y).reshape(b, n, 3, *heads[2:])
      q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    else:
      q, k, v = (layers.Dense(d, True, dtype, lora, name=part)(y).reshape(heads) for part in "qkv")
    if angles is not None:
      turns = layers.turns(angles)
      q, k = layers.rotate(q, turns), layers.rotate(k, turns)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scale = heads[-1] ** -0.5

    def frame_mask_of(query):
      segment = jnp.take(segments, query, axis=1)[..., None]
      return (segment == segments[:, None]) & (segment > 0)

    def over_frame():
      if self.config.attention == "xla":
        return layers.attend(q, k, v, frame_mask_of, scale)[0]
      return attention.over_frames(self.config, q, k, v, segments, scale)

    if vision.full_attention_layers is None:
      y = over_frame()
    else:
      y = jax.lax.cond(
        full, over_frame, lambda: _over_windows(q, k, v, windows, vision.window_patches, scale)
      )
    saliency = None
    if watched is not None:
      saliency = jax.lax.cond(
        watched, lambda: received(q, k, frame_mask_of, scale, share), lambda: jnp.zeros((b, n))
      )
    x = x + layers.Dense(d, True, dtype, lora, name="proj")(y.reshape(b, n, d))
    y = _norm(vision, "norm2")(x)
    mlp = layers.MLP(
      vision.intermediate_size, vision.activation, vision.gated_mlp, True, dtype, lora, name="mlp"
    )
    return x + mlp(y), saliency


def _over_windows(q: Array, k: Array, v: Array, windows: Array, size: int, scale: float) -> Array:
  """Computes attention within windows of at most `size` patches.

  The patches of a window must be consecutive. A block of `size` queries is multiplied with the keys
  of its own block and of the two adjacent blocks, because no window extends further. A kernel is
  not used for so few keys, because its blocks are larger.

  Args:
    q: [B, N, H, D].
    k, v: [B, H, N, D].
    windows: i32[B, N]; number of the window of each patch, 0 at padding.
    size: maximum number of patches in a window.
    scale: factor on the products of queries and keys.

  Returns:
    [B, N, H, D].
  """
  b, n = windows.shape
  count = -(-n // size)

  def blocks(a, axis):  # [..., N, ...] -> [..., count, size, ...]
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, count * size - n)
    a = jnp.pad(a, pad)
    return a.reshape(*a.shape[:axis], count, size, *a.shape[axis + 1 :])

  def around(a, axis):  # -> [..., count, 3 · size, ...]
    a = blocks(a, axis)
    first, last = (jnp.zeros_like(jax.lax.slice_in_dim(a, 0, 1, axis=axis)),) * 2
    before = jnp.concatenate([first, jax.lax.slice_in_dim(a, 0, count - 1, axis=axis)], axis)
    after = jnp.concatenate([jax.lax.slice_in_dim(a, 1, count, axis=axis), last], axis)
    return jnp.concatenate([before, a, after], axis + 1)

  def fold(a):  # [B, count, ...] -> [B·count, ...]
    return a.reshape(b * count, *a.shape[2:])

  of_query, of_key = fold(blocks(windows, 1))[:, :, None], fold(around(windows, 1))[:, None]
  mask = (of_query == of_key) & (of_query > 0)
  keys, values = (fold(jnp.moveaxis(around(a, 2), 2, 1)) for a in (k, v))
  out, _ = layers.attend(fold(blocks(q, 1)), keys, values, lambda query: mask[:, query], scale)
  return out.reshape(b, count * size, *q.shape[2:])[:, :n]


def received(
  q: Array, k: Array, mask_of: Callable[[Array], Array], scale: float, share: Array
) -> Array:
  """Returns the attention that each key receives, f32[B, N].

      s_k = mean over heads of Σ_q share_q · p_qk

  Attention is linear in the values. Its backward pass with respect to the values therefore computes
  this sum if the gradient of its output is `share`. Heads are processed one at a time, which needs
  less memory than the attention itself. The result has no gradient.

  Args:
    q: [B, N, H, D].
    k: [B, H, N, D].
    mask_of, scale: as in `layers.attend`.
    share: f32[B, N]; weight of each query.
  """
  q, k = jax.lax.stop_gradient((q, k))
  share = share.astype(jnp.float32)

  def add(total, head):
    q, k = head[0][:, :, None], head[1][:, None]

    def attend(values):  # [B, S]
      return layers.attend(q, k, values[:, None, :, None], mask_of, scale)[0][..., 0, 0]

    return total + jax.vjp(attend, share)[1](share)[0], None

  total, _ = jax.lax.scan(
    add, jnp.zeros_like(share), (jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 1, 0))
  )
  return total / q.shape[2]


class Merger(nn.Module):
  """Turns each merge² adjacent patches into one visual token. x: [P, N, d] -> [P, N / merge², D].

  merge is `spatial_merge_size`. The patches are concatenated and pass through an MLP. The norm is
  applied to each patch, or to the concatenated patches with `norm_after`.
  """

  config: ModelConfig
  norm_after: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    config, vision = self.config, self.config.vision
    merged = (x.shape[0], -1, vision.spatial_merge_size**2 * x.shape[-1])
    norm = _norm(vision, "norm")
    x = norm(x.reshape(merged)) if self.norm_after else norm(x).reshape(merged)
    x = layers.Dense(x.shape[-1], True, config.dtype, config.lora, name="up")(x)
    x = layers.ACTIVATIONS["gelu"](x)
    return layers.Dense(vision.out_hidden_size, True, config.dtype, config.lora, name="down")(x)


class PoolingMerger(nn.Module):
  """Turns each merge² adjacent patches into one visual token. x: [P, N, d] -> [P, N / merge², D].

  merge is `spatial_merge_size`. The mean of the patches is normalised and projected.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    config, vision = self.config, self.config.vision
    x = _norm(vision, "post_norm")(x)
    x = x.reshape(x.shape[0], -1, vision.spatial_merge_size**2, x.shape[-1]).mean(axis=2)
    x = layers.RMSNorm(vision.norm_eps, config.norm_offset, name="norm")(x)
    return layers.Dense(vision.out_hidden_size, False, config.dtype, config.lora, name="proj")(x)


class VisionTower(nn.Module):
  """Patch embedding, positions, layers (called blocks) and merger."""

  config: ModelConfig

  def __call__(self, prompt: Prompt) -> tuple[Array, tuple[Array, ...]]:
    """Returns the visual tokens [P, F, D], and those of each DeepStack layer in order."""
    features, taken, _ = self._run(prompt)
    return features, taken

  def saliency(self, prompt: Prompt) -> Array:
    """Returns the attention that each patch receives, f32[P, N], 0 at padding.

        s_k = mean over heads, and over the queries q of k's own frame, of p_qk

    p_qk are the probabilities of the last layer with full attention. The sum of s_k over a frame
    is 1.

    PAPO (arXiv 2507.06448) blackens the patches that are most salient in the self-attention of
    DINOv2. This method uses the vision tower of the policy instead.

    Raises:
      ValueError: no layer has full attention.
    """
    full = self.config.vision.full_attention_layers
    if full is not None and not full:
      raise ValueError(
        "config.vision.full_attention_layers=(): expected at least one layer, because "
        "saliency is computed from its attention"
      )
    last = self.config.vision.depth - 1 if full is None else max(full)
    return self._run(prompt, last)[2]

  @nn.compact
  def _run(
    self, prompt: Prompt, watched: int | None = None
  ) -> tuple[Array, tuple[Array, ...], Array | None]:
    """Runs the tower.

    Returns:
      The visual tokens, those of the DeepStack layers, and the saliency of the patches in the layer
      `watched` (None if `watched` is None).
    """
    config, vision = self.config, self.config.vision
    dtype, width = config.dtype, vision.hidden_size
    x = layers.Dense(width, vision.patch_bias, dtype, config.lora, name="patch_embed")(
      prompt.patches
    )
    if vision.position_grid:
      table = self.param(
        "positions", nn.initializers.normal(0.02), (vision.position_grid**2, width)
      )
      x = x + _interpolate(table, vision.position_grid, prompt).astype(x.dtype)
    angles = None
    if vision.rope_theta:
      freq = layers.frequencies(width // vision.num_heads // 2, vision.rope_theta)
      angles = prompt.patch_positions[..., None].astype(jnp.float32) * freq  # [P, N, 2, head / 4]
      angles = angles.reshape(*angles.shape[:2], -1)

    all_layers = range(vision.depth)
    full = [
      i in (all_layers if vision.full_attention_layers is None else vision.full_attention_layers)
      for i in all_layers
    ]
    share = saliency = None
    if watched is not None:  # weight of each query: 1 / number of patches of its frame
      share = (prompt.patch_segments > 0) / prompt.patch_grids.prod(axis=-1)
    segments, windows = prompt.patch_segments, prompt.patch_windows
    order = None
    if vision.full_attention_layers is not None:
      # Attention does not depend on the order of the patches. They are sorted so that those of a
      # window are consecutive, and padding is last.
      order = jnp.argsort(jnp.where(windows > 0, windows, windows.shape[1] + 1), axis=1)

      x, angles, segments, windows, share = (
        None if a is None else _sorted(a, order) for a in (x, angles, segments, windows, share)
      )

    def unsorted(a):  # back to the order of the prompt
      return a if order is None else _sorted(a, jnp.argsort(order, axis=1))

    block = layers.rematted(VisionBlock, config.remat)
    taken = []
    for i, (first, end) in enumerate(vision.segments):
      blocks = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, *[nn.broadcast] * 4),  # type: ignore[arg-type]
        length=end - first,
      )
      has_watched = watched is not None and first <= watched < end
      x, by_layer = blocks(config, name=f"blocks{i}" if i else "blocks")(
        x,
        jnp.array(full[first:end]),
        jnp.arange(first, end) == watched if has_watched else None,
        angles,
        segments,
        windows,
        share,
      )
      if watched is not None and by_layer is not None:
        saliency = unsorted(by_layer[watched - first])
      if i < len(vision.deepstack_layers):
        taken.append(Merger(config, norm_after=True, name=f"deepstack{i}")(unsorted(x)))
    merger = {"mlp": Merger, "pool": PoolingMerger}[vision.merger]
    return merger(config, name="merger")(unsorted(x)), tuple(taken), saliency


def _sorted(a: Array, order: Array) -> Array:
  """Permutes each row of a [P, N, ...] by order i32[P, N]."""
  return jax.vmap(lambda row, at: row[at])(a, order)


def _interpolate(table: Array, side: int, prompt: Prompt) -> Array:
  """Interpolates a learned table of positions [side², D] at each patch. f32[P, N, D].

  The interpolation is bilinear. The corners of the table are aligned with the corner patches of the
  image.
  """
  rows_and_cols = jnp.maximum(prompt.patch_grids - 1, 1).astype(jnp.float32)
  at = prompt.patch_positions.astype(jnp.float32) * (side - 1) / rows_and_cols  # [P, N, 2]
  low = jnp.floor(at)
  share = at - low
  taps = jnp.clip(jnp.stack([low, low + 1], axis=-1).astype(jnp.int32), 0, side - 1)
  weights = jnp.stack([1 - share, share], axis=-1)
  total = 0.0
  for down in range(2):
    for across in range(2):
      index = taps[..., 0, down] * side + taps[..., 1, across]
      weight = weights[..., 0, down] * weights[..., 1, across]
      total = total + table[index].astype(jnp.float32) * weight[..., None]
  return total

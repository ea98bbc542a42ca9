"""What the vision tower and the decoder share: norm, gated MLP, rotary positions, attention."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrl_vlm.types import Array

_MASKED = -1e30  # finite, so that a fully masked row gives numbers, not NaN


class RMSNorm(nn.Module):
  """x / rms(x) · scale, computed in float32. x: [..., D]."""

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return scale.astype(x.dtype) * y.astype(x.dtype)


class GatedMLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) · up(x)). x: [..., D]."""

  hidden: int
  use_bias: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def dense(size, name):
      return nn.Dense(size, use_bias=self.use_bias, dtype=self.dtype, name=name)

    gated = nn.silu(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
    return dense(x.shape[-1], "down")(gated)


def frequencies(dim: int, theta: float) -> Array:
  """Rotary frequencies θ^(-2i/dim), f32[dim/2]."""
  return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotate(x: Array, angles: Array) -> Array:
  """Rotary embedding, halves convention. x: [..., H, D]; angles: f32[..., D/2]; in float32."""
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def attend(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
  """Softmax attention with grouped key/value heads, and its log-sum-exp.

  Args:
    q: [B, Q, H, D].
    k: [B, S, K, D]; H is a multiple of K.
    v: [B, S, K, D].
    mask: bool, broadcastable to [B, Q, S]; true where a query sees a key.

  Returns:
    out [B, Q, H, D] and lse f32[B, Q, H]: the log of the softmax's denominator, by which two
    attentions of the same queries over different keys merge exactly (`merge`).
  """
  b, n, h, d = q.shape
  kv = k.shape[2]
  grouped = q.reshape(b, n, kv, h // kv, d)
  scores = jnp.einsum("bqkrd,bskd->bkrqs", grouped, k, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, None], scores * d**-0.5, _MASKED)
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  out = jnp.einsum("bkrqs,bskd->bqkrd", (weights / total).astype(v.dtype), v)
  lse = (jnp.log(total) + top)[..., 0]  # [B, K, R, Q]
  return out.reshape(b, n, h, d), lse.transpose(0, 3, 1, 2).reshape(b, n, h)


def merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
  """Attention over the union of two sets of keys from the (out, lse) over each of them."""
  (out_a, lse_a), (out_b, lse_b) = a, b
  share = nn.sigmoid(lse_a - lse_b)[..., None]
  merged = out_a.astype(jnp.float32) * share + out_b.astype(jnp.float32) * (1.0 - share)
  return merged.astype(out_a.dtype)

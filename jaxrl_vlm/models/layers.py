"""Layers that the vision tower and the decoder share.

Linear layers with adapters, norms, MLPs, mixtures of experts, rotary embedding, and attention
without a kernel.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxrl_vlm import parallel
from jaxrl_vlm.models.config import LoRA, ModelConfig, MoE
from jaxrl_vlm.models.patterns import matches
from jaxrl_vlm.types import Array

MASKED = -1e30  # finite, so that the softmax of a fully masked row is not NaN
KEPT = "kept"  # `checkpoint_name` of the values that remat "dots" keeps
SCORES = 2**19  # maximum number of scores per head (queries · keys) that `attend` holds at a time

# By name in `config.json`.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": nn.silu,
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


class Adapter(nn.Module):
  """A low-rank adapter: alpha / rank · B·A·x. x: [..., in] -> [..., features].

  B is initialised to 0, so the adapter initially returns 0.
  """

  features: int
  lora: LoRA

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # A is uniform in ±1/√in, as in PEFT.
    start = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    a = self.param("a", start, (x.shape[-1], self.lora.rank))
    b = self.param("b", nn.initializers.zeros, (self.lora.rank, self.features))
    down = jnp.matmul(x, a.astype(x.dtype))
    return jnp.matmul(down, b.astype(x.dtype)) * (self.lora.alpha / self.lora.rank)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, dtype: Any = None) -> Array:
  """Returns x·kernel. x: [..., in]; kernel: [in, out].

  `dtype` is that of the result; None means the dtype of x.

  The backward pass flattens the leading axes of x, and computes the gradient of the kernel with x
  as the left operand. With other contractions, XLA for CPU makes a transposed copy of the gradient
  of the output.
  """
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _product_forward(x, kernel, dtype):
  return product(x, kernel, dtype), (x, kernel)


def _product_backward(dtype, saved, g):
  del dtype
  x, kernel = saved
  # The gradient of float32 logits is cast too. Otherwise the operands below would have two dtypes,
  # and the kernel would be copied to convert it.
  g = g.astype(x.dtype)
  kernel_gradient = jax.lax.dot_general(
    x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), (((0,), (0,)), ((), ()))
  )
  return jnp.matmul(g, kernel.T), kernel_gradient


product.defvjp(_product_forward, _product_backward)


def _kept(x: Array) -> Array:
  """Marks x as a value that remat "dots" keeps. Returns x."""
  named: Any = checkpoint_name(x, KEPT)
  return named


def rematted(layer: type[nn.Module], remat: str) -> type[nn.Module]:
  """Returns the layer with the rematerialisation `ModelConfig.remat`, to be used in `nn.scan`."""
  if remat == "none":
    return layer
  kept = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == "dots" else None
  return nn.remat(layer, prevent_cse=False, policy=kept)


class Dense(nn.Module):
  """A linear layer, x·kernel + bias, with an optional adapter. x: [..., in].

  The adapter is applied only if the parameters contain one. Applied to the same parameters without
  adapters, a model with `lora` computes the base model.
  """

  features: int
  use_bias: bool
  dtype: str
  lora: LoRA | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = x.astype(self.dtype)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
    y = _kept(product(x, kernel.astype(x.dtype)))
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
    if (
      self.lora is not None
      and matches(self.lora.targets, self.path)
      and (self.is_initializing() or "lora" in self.variables["params"])
    ):
      y = y + Adapter(self.features, self.lora, name="lora")(x)
    return y


def vocabulary(
  config: ModelConfig, mesh: Mesh, size: int
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
  """Returns which mesh axes split a vocabulary of `size` tokens.

  Returns:
    All these axes; those of them that split prompts too; and the others.
  """
  vocab = parallel.split_over(mesh, config.rules, "vocab", size)
  shared = tuple(axis for axis in vocab if axis in parallel.ROWS)
  return vocab, shared, tuple(axis for axis in vocab if axis not in shared)


def lookup(config: ModelConfig, table: Array, tokens: Array) -> Array:
  """Looks up tokens in the embedding table [V, D]: i32[P, ...] -> [P, ..., D] in `config.dtype`.

  If the vocabulary is sharded, each device looks up its rows of the table for the tokens of all
  devices that share the vocabulary, and the results are added. No device ever holds the whole table
  or its gradient. If these devices have more tokens than the table has rows, they gather the table
  instead, along the mesh axes that also split prompts.
  """
  table = table.astype(config.dtype)
  mesh = config.mesh
  if mesh is None or mesh.size == 1:
    return jnp.take(table, tokens, axis=0)
  vocab, shared, others = vocabulary(config, mesh, len(table))
  count, parts = (math.prod(mesh.shape[axis] for axis in axes) for axes in (shared, others))
  gather_tokens = tokens.size // parallel.rows(mesh) * count <= len(table)

  def local(table, tokens):
    # Shard i · parts + j of the table is on the device with index i along `shared` and j along
    # `others`.
    shard, row = jnp.divmod(tokens, len(table))
    if gather_tokens:
      shard, row = jax.lax.all_gather((shard, row), shared, tiled=True)
      is_local = shard == jax.lax.axis_index(vocab)
    else:
      is_local = shard % parts == jax.lax.axis_index(others)
      row += shard // parts * len(table)
      table = jax.lax.all_gather(table, shared, tiled=True)
    found = jnp.where(is_local[..., None], jnp.take(table, row, axis=0), 0)
    if gather_tokens:
      found = jax.lax.psum_scatter(found, shared, tiled=True)
    return jax.lax.psum(found, others)

  rows = Spec(parallel.ROWS)
  return jax.shard_map(
    local, mesh=mesh, in_specs=(Spec(vocab), rows), out_specs=rows, check_vma=False
  )(table, tokens)


class RMSNorm(nn.Module):
  """x / rms(x) · scale, or x / rms(x) · (1 + scale) with `offset`. x: [..., D].

  x / rms(x) is computed in float32.
  """

  eps: float = 1e-6
  offset: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    start = nn.initializers.zeros if self.offset else nn.initializers.ones
    scale = self.param("scale", start, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    if self.offset:  # the product is in float32 too, and only its result is rounded
      return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
    return scale.astype(x.dtype) * y.astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std · scale + bias, in float32. x: [..., D]."""

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale + bias).astype(x.dtype)


class MLP(nn.Module):
  """down(act(up(x))), or down(act(gate(x)) · up(x)) if gated. x: [..., D]."""

  hidden: int
  activation: str
  gated: bool
  use_bias: bool
  dtype: str
  lora: LoRA | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def dense(size, name):
      return Dense(size, self.use_bias, self.dtype, self.lora, name=name)

    act = ACTIVATIONS[self.activation]
    if self.gated:
      hidden = act(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
    else:
      hidden = act(dense(self.hidden, "up")(x))
    return dense(x.shape[-1], "down")(hidden)


class Experts(nn.Module):
  """A mixture of experts. x: [..., D].

  The output for a token is the sum over its k most probable experts, weighted by their renormalised
  probabilities. Tokens are sorted by expert, so that each expert processes only its own tokens
  (ragged matrix products). No token is dropped. Source: Qwen3-VL-MoE in transformers.
  """

  moe: MoE
  activation: str
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    e, k, hidden = self.moe.num_experts, self.moe.experts_per_token, self.moe.intermediate_size
    width = x.shape[-1]
    init = nn.initializers.lecun_normal(batch_axis=0)
    gate, up, down = (
      self.param(name, init, (e, *sizes)).astype(x.dtype)
      for name, sizes in (
        ("gate", (width, hidden)),
        ("up", (width, hidden)),
        ("down", (hidden, width)),
      )
    )
    tokens = x.reshape(-1, width)
    scores = Dense(e, False, self.dtype, name="router")(tokens)
    share, chosen = jax.lax.top_k(nn.softmax(scores.astype(jnp.float32)), k)  # [N, k]
    share = (share / share.sum(axis=-1, keepdims=True)).astype(x.dtype)

    order = jnp.argsort(chosen.reshape(-1))  # sorts the N·k (token, expert) pairs by expert
    counts = jnp.bincount(chosen.reshape(-1), length=e).astype(jnp.int32)
    rows = tokens[order // k]
    product = functools.partial(jax.lax.ragged_dot, group_sizes=counts)
    act = ACTIVATIONS[self.activation]
    y = act(product(rows, gate)) * product(rows, up)
    y = product(y, down)[jnp.argsort(order)].reshape(-1, k, width)
    return jnp.einsum("nkd,nk->nd", y, share).reshape(x.shape)


def mlp(config: ModelConfig, name: str) -> nn.Module:
  """Returns the MLP of a decoder layer, or the experts that replace it."""
  if config.moe is not None:
    return Experts(config.moe, config.activation, config.dtype, name=name)
  return MLP(
    config.intermediate_size, config.activation, True, False, config.dtype, config.lora, name=name
  )


def frequencies(dim: int, theta: float) -> Array:
  """Returns the rotary frequencies θ^(-2i/dim), f32[dim/2]."""
  return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def turns(angles: Array) -> Array:
  """Returns the cosines and sines f32[..., 2, D/2] of angles f32[..., D/2]."""
  return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-2)


def rotate(x: Array, turns: Array) -> Array:
  """Applies rotary embedding in float32. x: [..., H, D]; turns: f32[..., 2, D/2].

  Element i of the first half of D is rotated together with element i of the second half.
  """
  cos, sin = turns[..., None, 0, :], turns[..., None, 1, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def attend(
  q: Array, k: Array, v: Array, mask_of: Callable[[Array], Array], scale: float
) -> tuple[Array, Array]:
  """Computes softmax attention with grouped key/value heads, and its log-sum-exp.

  With many queries and keys, the queries are processed in blocks, and the scores of only one block
  exist at a time.

  Args:
    q: [B, Q, H, D].
    k: [B, K, S, D]; H is a multiple of K. Heads come before positions, which is the layout of the
      matrix products. Keys that are read repeatedly, as in decoding, are therefore never
      transposed.
    v: [B, K, S, D].
    mask_of: function of query indices i32[n] that returns their mask, bool, broadcastable to
      [B, n, S]: True where a query attends to a key.
    scale: factor on the products of queries and keys.

  Returns:
    out [B, Q, H, D], and lse f32[B, Q, H], the logarithm of the denominator of the softmax. With
    lse, `merge` combines the attention of the same queries to different keys exactly.
  """
  n, s = q.shape[1], k.shape[2]
  size = max(1, SCORES // s)
  if n <= size:
    return _attend(q, k, v, mask_of(jnp.arange(n)), scale)
  count = -(-n // size)
  size = -(-n // count)

  def of_block(inputs):
    q, indices = inputs
    return _attend(q, k, v, mask_of(indices), scale)

  # The queries are padded with zeros, which have the mask of the last query.
  indices = jnp.minimum(jnp.arange(count * size), n - 1).reshape(count, size)
  blocks = jnp.moveaxis(
    jnp.pad(q, ((0, 0), (0, count * size - n), (0, 0), (0, 0))).reshape(
      q.shape[0], count, size, *q.shape[2:]
    ),
    1,
    0,
  )
  # The backward pass recomputes the masks, but not the outputs.
  rematted_block = jax.checkpoint(
    of_block, policy=jax.checkpoint_policies.save_only_these_names(KEPT)
  )
  out = jax.lax.map(rematted_block, (blocks, indices))
  return tuple(jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])[:, :n] for a in out)  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, Array]:
  """Computes `attend` for all queries at once. mask: bool, broadcastable to [B, Q, S].

  The backward pass recomputes the probabilities from lse. No array of the size of the scores is
  kept for it.
  """
  scores = _scores(_by_head(q, k.shape[1]), k, mask, scale)
  top = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  # Dividing the output takes fewer divisions than dividing the weights.
  out = jnp.einsum(
    "bkns,bksd->bknd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  out = (out / total).astype(v.dtype)
  lse = _by_query(jnp.log(total) + top, q.shape[2])
  return _by_query(out, q.shape[2]), lse[..., 0]


def _attend_forward(q, k, v, mask, scale):
  both: Any = _attend(q, k, v, mask, scale)
  out, lse = map(_kept, both)
  return (out, lse), (q, k, v, mask, out, lse)


def _attend_backward(scale, saved, gradients):
  q, k, v, mask, out, lse = saved
  grad_out, grad_lse = gradients
  heads = k.shape[1]
  q, g = _by_head(q, heads), _by_head(grad_out, heads)
  # With g = grad_out, the gradient of a score is p · (g·v - g·out + grad_lse).
  shift = grad_lse - jnp.sum(grad_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  lse, shift = (_by_head(a[..., None], heads) for a in (lse, shift))
  p = jnp.exp(_scores(q, k, mask, scale) - lse)
  grad_p: Any = jnp.einsum("bknd,bksd->bkns", g, v, preferred_element_type=jnp.float32)
  grad_scores = (p * (grad_p + shift) * scale).astype(q.dtype)
  grad_q = jnp.einsum("bkns,bksd->bknd", grad_scores, k)
  grad_k = jnp.einsum("bkns,bknd->bksd", grad_scores, q)
  grad_v = jnp.einsum("bkns,bknd->bksd", p.astype(v.dtype), g)
  return _by_query(grad_q, out.shape[2]), grad_k, grad_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q: Array, k: Array, mask: Array, scale: float) -> Array:
  """Returns the masked scores f32[B, K, H/K · Q, S] of q, which `_by_head` has rearranged."""
  scores: Any = jnp.einsum("bknd,bksd->bkns", q, k, preferred_element_type=jnp.float32)
  b, heads, rows, s = scores.shape
  n = mask.shape[1]
  # A mask with only one query applies to all queries.
  scores = scores.reshape(b, heads, -1, n if n > 1 else rows, s) * scale
  return jnp.where(mask[:, None, None], scores, MASKED).reshape(b, heads, rows, s)


def _by_head(a: Array, heads: int) -> Array:
  """[B, Q, H, D] -> [B, K, H/K · Q, D]: one matrix of queries for each key/value head."""
  b, n, h, d = a.shape
  return jnp.moveaxis(a.reshape(b, n, heads, h // heads, d), 1, 3).reshape(b, heads, -1, d)


def _by_query(a: Array, h: int) -> Array:
  """Inverse of `_by_head`; h is H."""
  b, heads, rows, d = a.shape
  n = rows * heads // h
  return jnp.moveaxis(a.reshape(b, heads, h // heads, n, d), 3, 1).reshape(b, n, h, d)


def merge(*parts: tuple[Array, Array]) -> tuple[Array, Array]:
  """Returns (out, lse) of attention to several sets of keys together, from those of each set."""
  top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [lse for _, lse in parts]))
  shares = [jnp.exp(lse - top)[..., None] for _, lse in parts]
  total: Any = sum(shares)
  merged: Any = sum(
    out.astype(jnp.float32) * (share / total) for (out, _), share in zip(parts, shares, strict=True)
  )
  return merged.astype(parts[0][0].dtype), jnp.log(total[..., 0]) + top

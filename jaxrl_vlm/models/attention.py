"""Attention kernels that do not store the attention scores: Pallas splash on TPU, cuDNN on GPU.

`layers.attend` is the implementation without a kernel. It is used for small inputs, for attention
that the kernels do not support, and on other devices.

If queries attend to several sets of keys (their own response and a prefix), these are concatenated
and passed to one kernel call. There are then no partial results to merge, and the gradient is that
of the kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as Spec

from jaxrl_vlm import parallel
from jaxrl_vlm.models import layers
from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.types import Array

CHOICES = ("auto", "xla", "splash", "cudnn")
MOST_SPANNED = 2**16  # `_splash` packs both ends of a span, two key indices, into one int32
_BLOCK = 512  # maximum number of queries, and of keys, in a block of the splash kernel
_LANES = 128  # lanes of a TPU; block sizes are multiples of it


@struct.dataclass
class Sight:
  """The attention mask: which keys each query attends to.

  A query attends to the keys that have the same segment. The first `spanned` keys must also be in
  the span of the query. Every query must attend to at least one key.

  Attributes:
    segment: i32[B, Q]; segment of each query, at least 0.
    key_segment: i32[B, S]; segment of each key, or -1 if no query attends to it.
    first, last: i32[B, Q]; first and last key of the span of each query, both included. None if
      `spanned` is 0.
    spanned: number of keys that the spans apply to, at most `MOST_SPANNED`.
    causal: whether the mask is the causal one: each query attends to itself and to all keys before
      it.
  """

  segment: Array
  key_segment: Array
  first: Array | None = None
  last: Array | None = None
  spanned: int = struct.field(pytree_node=False, default=0)
  causal: bool = struct.field(pytree_node=False, default=False)

  def mask(self) -> Array:
    """Returns the mask as an array, bool[B, Q, S]."""
    mask = self.segment[..., None] == self.key_segment[:, None]
    if self.first is None or self.last is None:
      return mask
    at = jnp.arange(self.key_segment.shape[1])
    within = (at >= self.first[..., None]) & (at <= self.last[..., None])
    return mask & (within | (at >= self.spanned))

  def padded(self, queries: int, keys: int) -> "Sight":
    """Pads to `queries` queries and `keys` keys.

    The added queries are copies of the last one, because every query must attend to a key. No query
    attends to the added keys.
    """

    def repeat(a):
      return None if a is None else jnp.pad(a, ((0, 0), (0, queries - a.shape[1])), mode="edge")

    more = ((0, 0), (0, keys - self.key_segment.shape[1]))
    return dataclasses.replace(
      self,
      segment=repeat(self.segment),
      first=repeat(self.first),
      last=repeat(self.last),
      key_segment=jnp.pad(self.key_segment, more, constant_values=-1),
    )


def choose(name: str, devices: Iterable[Any], config: ModelConfig) -> str:
  """Returns the attention implementation for the devices of a mesh.

  Args:
    name: value of `config.model.attention`. "auto" chooses a kernel that supports the devices and
      the model, or "xla" if there is none.
    devices: the devices of the mesh.
    config: config of the model.

  Returns:
    "xla", "splash" or "cudnn".

  Raises:
    ValueError: the name is unknown, or the devices or the model do not support it.
  """
  if name not in CHOICES:
    raise ValueError(f"config.model.attention={name!r}: expected one of {', '.join(CHOICES)}")
  devices = list(devices)
  platforms = {device.platform for device in devices}
  # Only NVIDIA GPUs have a number as compute capability.
  capabilities = [str(getattr(device, "compute_capability", "")) for device in devices]
  ampere = all(c.replace(".", "").isdigit() and float(c) >= 8 for c in capabilities)
  hopper = ampere and all(float(c) >= 9 for c in capabilities)
  missing: dict[str, str] = {}
  if platforms != {"tpu"}:
    missing["splash"] = f"a mesh of TPUs, got one of {', '.join(sorted(platforms))}"
  if platforms != {"gpu"} or not ampere:
    missing["cudnn"] = (
      f"a mesh of NVIDIA GPUs of compute capability 8.0 or more, got one of "
      f"{', '.join(sorted({device.device_kind for device in devices}))}"
    )
  elif config.dtype != "bfloat16":
    missing["cudnn"] = f"config.model.dtype='bfloat16', got {config.dtype!r}"
  elif config.head_dim > (limit := 256 if hopper else 128):
    missing["cudnn"] = f"a model with head_dim of at most {limit}, got {config.head_dim}"
  if name in missing:
    raise ValueError(
      f"config.model.attention={name!r}: expected {missing[name]}; other choices: "
      f"{', '.join(choice for choice in CHOICES if choice != name)}"
    )
  if name != "auto":
    return name
  return next(kind for kind in ("splash", "cudnn", "xla") if kind not in missing)


def attend(config: ModelConfig, q: Array, k: Array, v: Array, sight: Sight, scale: float) -> Array:
  """Computes softmax attention with grouped key/value heads by the kernel `config.attention`.

  With a mesh, each device computes its rows of the batch (mesh axes `parallel.ROWS`) and its heads
  (mesh axis `tensor`). An axis is not split if its size is not divisible.

  Args:
    config: config of the model; `attention` and `mesh` are used.
    q: [B, Q, H, D].
    k, v: [B, K, S, D]; H is a multiple of K.
    sight: the attention mask.
    scale: factor on the products of queries and keys.

  Returns:
    [B, Q, H, D].
  """
  kernel = functools.partial(_KERNELS[config.attention], scale=scale)
  mesh = config.mesh
  if mesh is None:
    return kernel(q, k, v, sight)
  split = mesh.shape["tensor"]
  # If the number of key/value heads is not divisible by the size of `tensor`, they are repeated, so
  # that each device has the heads of its queries.
  copies = split // math.gcd(split, k.shape[1])
  if q.shape[2] % (copies * k.shape[1]) == 0:
    k, v = (jnp.repeat(a, copies, axis=1) for a in (k, v))
  rows = parallel.ROWS if q.shape[0] % parallel.rows(mesh) == 0 else None
  heads = "tensor" if k.shape[1] % split == 0 else None
  return jax.shard_map(
    kernel,
    mesh=mesh,
    out_specs=Spec(rows, None, heads),
    check_vma=False,
    in_specs=(Spec(rows, None, heads), Spec(rows, heads), Spec(rows, heads), Spec(rows)),
  )(q, k, v, sight)


def reads(config: ModelConfig, tokens: int) -> bool:
  """Returns whether `over_prompts` supports prompts of `tokens` tokens."""
  return config.attention != "xla" and tokens <= MOST_SPANNED


def answers(config: ModelConfig, tokens: int) -> bool:
  """Returns whether `over_responses` supports this model, and `tokens` response tokens per shard.

  Models with sliding layers are not supported. A query has only one span, and the window of a
  sliding layer would need a second one for the prefix.
  """
  return config.attention != "xla" and tokens <= MOST_SPANNED and not config.sliding_window


def over_prompts(
  config: ModelConfig, q: Array, k: Array, v: Array, sliding: Array, images: Array | None
) -> Array:
  """Computes the attention of prompts to themselves.

  Supports sliding windows, and images whose tokens attend to each other in both directions.

  Args:
    config: config of the model.
    q, k, v: [P, 1, T, H or K, D].
    sliding: bool scalar; whether queries attend only `config.sliding_window` tokens back.
    images: i32[P, T]; tokens with the same number above 0 attend to each other. None if all tokens
      are causal.

  Returns:
    [P, 1, T, H, D].
  """
  p, _, t = q.shape[:3]
  at = jnp.arange(t)
  first, last = jnp.zeros((p, t), jnp.int32), jnp.broadcast_to(at, (p, t))
  if config.sliding_window:
    first = jnp.where(sliding, jnp.maximum(at - config.sliding_window + 1, 0), first)
  if images is not None:
    ends = images != jnp.pad(images, ((0, 0), (0, 1)))[:, 1:]
    end = jax.lax.cummin(jnp.where(ends, at, t), axis=1, reverse=True)
    last = jnp.where(images > 0, end, last)
  zero = jnp.zeros((p, t), jnp.int32)
  causal = not config.sliding_window and images is None
  sight = Sight(zero, zero, first, last, spanned=t, causal=causal)
  out = attend(
    config, q[:, 0], k[:, 0].swapaxes(1, 2), v[:, 0].swapaxes(1, 2), sight, config.attention_scale
  )
  return out[:, None]


def over_responses(
  config: ModelConfig,
  q: Array,
  k: Array,
  v: Array,
  number: Array,
  row: Array,
  prefix_kv: Sequence[Array],
  prefix_length: Array,
) -> Array:
  """Computes the attention of blocks of responses to their own responses and their prefixes.

  The keys of a shard are those of its blocks, followed by those of all its prefixes. The segment of
  a query is its prompt. Its span is its response up to the query itself.

  Args:
    config: config of the model.
    q, k, v: [R, N, B, H or K, D].
    number: i32[R, N]; index of the block in its response. The blocks of a response are consecutive.
    row: i32[R, N]; index of the prefix of the block in its shard.
    prefix_kv: keys and values [R·S, K, Lp, D].
    prefix_length: i32[R·S]; number of the Lp positions that responses attend to.

  Returns:
    [R, N, B, H, D].
  """
  r, n, size, h, d = q.shape

  def of_tokens(a):  # [R, N] -> [R, N·B]
    return jnp.repeat(a, size, axis=1)

  def joined(own, prefix):  # -> [R, K, N·B + S·Lp, D]
    own = own.reshape(r, n * size, -1, d).swapaxes(1, 2)
    prefix = prefix.reshape(r, -1, *prefix.shape[1:]).swapaxes(1, 2)
    return jnp.concatenate([own, prefix.reshape(*own.shape[:2], -1, d)], axis=2)

  k, v = (joined(*pair) for pair in zip((k, v), prefix_kv, strict=True))
  length = prefix_length.reshape(r, -1, 1)
  prefixes = jnp.where(
    jnp.arange(prefix_kv[0].shape[2]) < length, jnp.arange(length.shape[1])[:, None], -1
  )
  rows = of_tokens(row)
  sight = Sight(
    rows,
    jnp.concatenate([rows, prefixes.reshape(r, -1)], axis=1),
    first=of_tokens((jnp.arange(n) - number) * size),
    last=jnp.broadcast_to(jnp.arange(n * size), rows.shape),
    spanned=n * size,
  )
  out = attend(config, q.reshape(r, n * size, h, d), k, v, sight, config.attention_scale)
  return out.reshape(q.shape)


def over_frames(
  config: ModelConfig, q: Array, k: Array, v: Array, segments: Array, scale: float
) -> Array:
  """Computes the attention of patches to the patches of the same frame.

  Args:
    config, q, k, v, scale: as in `attend`.
    segments: i32[B, N]; frame of each patch, 0 at padding.

  Returns:
    [B, N, H, D].
  """
  # Padding is divided into segments of up to `_LANES` patches. One large segment would be more to
  # compute.
  n = segments.shape[1]
  segments = jnp.where(segments > 0, segments, n + 1 + jnp.arange(n) // _LANES)
  return attend(config, q, k, v, Sight(segments, segments), scale)


@dataclasses.dataclass(frozen=True)
class _WithinSpan:
  """The mask function of the splash kernel, of a packed span (first · 2^16 + last) and a key index.

  Returns whether the key is in the span, or is none of the `spanned` keys that spans apply to.
  """

  spanned: int

  def __call__(self, span: Array, key: Array) -> Array:
    first, last = jax.lax.shift_right_logical(span, 16), span & (MOST_SPANNED - 1)
    return ((key >= first) & (key <= last)) | (key >= self.spanned)


def _blocks(n: int) -> tuple[int, int]:
  """Returns a block size for n queries or keys, and n padded to a multiple of it."""
  count = -(-n // _BLOCK)
  size = -(-n // (count * _LANES)) * _LANES
  return size, count * size


def _upcoming(active: Array) -> Array:
  """Returns the block that the kernel fetches in advance at each step (i, j), i32[I, J].

  This is the j of the first active pair of blocks from (i, j) on, in row-major order. If there is
  none, it is the last j.
  """
  i, j = active.shape
  at = jnp.where(active.reshape(-1), jnp.arange(i * j, dtype=jnp.int32), i * j - 1)
  return jax.lax.cummin(at, reverse=True).reshape(i, j) % j


def _splash(
  q: Array, k: Array, v: Array, sight: Sight, scale: float, interpret: bool = False
) -> Array:
  """Computes `attend` on one TPU.

  A pair of a query block and a key block is skipped if no query of the one attends to a key of the
  other, in any row of the batch. Which pairs these are is known only at run time. The kernel
  accepts such masks, but its constructor `make_splash_mha` requires masks that are known at trace
  time. This function therefore constructs `SplashAttentionKernel` itself.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

  n, s = q.shape[1], k.shape[2]
  (of_q, queries), (of_k, keys) = _blocks(n), _blocks(s)
  q = jnp.pad(q * scale, ((0, 0), (0, queries - n), (0, 0), (0, 0))).swapaxes(1, 2)
  k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, keys - s), (0, 0))) for a in (k, v))
  sight = sight.padded(queries, keys)
  active = sight.mask().reshape(-1, queries // of_q, of_q, keys // of_k, of_k).any((0, 2, 4))
  by_query, by_key = _upcoming(active), _upcoming(active.T).T
  span = None
  if sight.first is not None and sight.last is not None:
    span = sight.first << 16 | sight.last
  sizes = splash.BlockSizes(
    block_q=of_q,
    block_kv=of_k,
    block_q_dkv=of_q,
    block_kv_dkv=of_k,
    block_q_dq=of_q,
    block_kv_dq=of_k,
  )

  def row(q, k, v, span, *segments):
    def info(upcoming):
      return MaskInfo(upcoming[None], None, active[None].astype(jnp.int32), None, span)

    kernel = splash.SplashAttentionKernel(
      info(by_query),
      info(by_query),
      info(by_key),
      is_mqa=False,
      block_sizes=sizes,
      save_residuals=False,
      mask_value=splash.DEFAULT_MASK_VALUE,
      attn_logits_soft_cap=None,
      residual_checkpoint_name=layers.KEPT,
      interpret=interpret,
      mask_function=None if span is None else _WithinSpan(sight.spanned),
    )
    return kernel(q, k, v, splash.SegmentIds(*segments))

  out: Any = jax.vmap(row)(q, k, v, span, sight.segment, sight.key_segment)
  return out.swapaxes(1, 2)[:, :n]


def _cudnn(
  q: Array, k: Array, v: Array, sight: Sight, scale: float, implementation: Any = "cudnn"
) -> Array:
  """Computes `attend` on one GPU.

  The kernel requires even numbers of queries and keys. It receives every mask except the causal one
  as an array, of two bytes for each pair of a query and a key, whatever the number of heads.
  """
  n, s = q.shape[1], k.shape[2]
  k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, s % 2), (0, 0))).swapaxes(1, 2) for a in (k, v))
  q = jnp.pad(q, ((0, 0), (0, n % 2), (0, 0), (0, 0)))
  mask = None if sight.causal else sight.padded(n + n % 2, s + s % 2).mask()[:, None]
  out = jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=sight.causal, scale=scale, implementation=implementation
  )
  return out[:, :n]


# Kernels by the value of `ModelConfig.attention`. The last two compute the same on machines without
# a TPU or GPU.
_KERNELS = {
  "splash": _splash,
  "cudnn": _cudnn,
  "splash_interpreted": functools.partial(_splash, interpret=True),
  "cudnn_by_xla": functools.partial(_cudnn, implementation="xla"),
}

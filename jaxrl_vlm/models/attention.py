"""Attention by kernels that hold no scores: Pallas' splash on TPU, cuDNN's on GPU.

`layers.attend` is the plain one, for what is small, for what these cannot say, and for other
devices. Every set of keys that a query sees is given to one kernel, one behind another: nothing is
left to merge, and the gradient is the kernel's own.
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
MOST_SPANNED = 2**16  # numbers of keys that fit into half of an int32
_BLOCK = 512  # the most queries, and the most keys, that splash computes at a time
_LANES = 128  # of a TPU; blocks are multiples


@struct.dataclass
class Sight:
  """Which keys queries see: those of their segment, of the first `spanned` those in their span.

  Every query must see at least one.

  Attributes:
    segment: i32[B, Q]; of each query, at least 0.
    key_segment: i32[B, S]; of each key, -1 where none sees it.
    first, last: i32[B, Q]; the span, both ends included. None where `spanned` is 0.
    spanned: how many keys the spans are about, at most `MOST_SPANNED`.
    causal: all this comes to nothing but what is before the query and the query itself.
  """

  segment: Array
  key_segment: Array
  first: Array | None = None
  last: Array | None = None
  spanned: int = struct.field(pytree_node=False, default=0)
  causal: bool = struct.field(pytree_node=False, default=False)

  def mask(self) -> Array:
    """bool[B, Q, S]."""
    mask = self.segment[..., None] == self.key_segment[:, None]
    if self.first is None or self.last is None:
      return mask
    at = jnp.arange(self.key_segment.shape[1])
    within = (at >= self.first[..., None]) & (at <= self.last[..., None])
    return mask & (within | (at >= self.spanned))

  def padded(self, queries: int, keys: int) -> "Sight":
    """With copies of the last query, which sees something, and keys that none sees."""

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
  """The attention that `config.model.attention` asks for on the devices of a mesh.

  Raises:
    ValueError: there is no such attention, or these devices or this model cannot have it.
  """
  if name not in CHOICES:
    raise ValueError(f"config.model.attention={name!r}: expected one of {', '.join(CHOICES)}")
  devices = list(devices)
  platforms = {device.platform for device in devices}
  # Others than NVIDIA's have no number here.
  capabilities = [str(getattr(device, "compute_capability", "")) for device in devices]
  ampere = all(c.replace(".", "").isdigit() and float(c) >= 8 for c in capabilities)
  hopper = ampere and all(float(c) >= 9 for c in capabilities)
  missing: dict[str, str] = {}
  if platforms != {"tpu"}:
    missing["splash"] = f"a mesh of TPUs, this one is of {', '.join(sorted(platforms))}"
  if platforms != {"gpu"} or not ampere:
    missing["cudnn"] = (
      f"a mesh of NVIDIA GPUs of compute capability 8.0 or more, this one is of "
      f"{', '.join(sorted({device.device_kind for device in devices}))}"
    )
  elif config.dtype != "bfloat16":
    missing["cudnn"] = f"config.model.dtype='bfloat16', this model computes in {config.dtype!r}"
  elif config.head_dim > (256 if hopper else 128):
    missing["cudnn"] = f"smaller heads than this model's, of head_dim={config.head_dim}"
  if name in missing:
    raise ValueError(
      f"config.model.attention={name!r}: expected {missing[name]}; the others are "
      f"{', '.join(choice for choice in CHOICES if choice != name)}"
    )
  if name != "auto":
    return name
  return next(kind for kind in ("splash", "cudnn", "xla") if kind not in missing)


def attend(config: ModelConfig, q: Array, k: Array, v: Array, sight: Sight, scale: float) -> Array:
  """Softmax attention with grouped key/value heads by the kernel of `config.attention`.

  With a mesh every device computes its rows (`parallel.ROWS`) and its heads (`tensor`).

  Args:
    config: `attention` and `mesh`.
    q: [B, Q, H, D].
    k, v: [B, K, S, D]; H is a multiple of K.
    sight: which keys each query sees.
    scale: of the products of queries and keys.

  Returns:
    [B, Q, H, D].
  """
  kernel = functools.partial(_KERNELS[config.attention], scale=scale)
  mesh = config.mesh
  if mesh is None:
    return kernel(q, k, v, sight)
  split = mesh.shape["tensor"]
  # Fewer key/value heads than devices: each has a copy of the one that its queries want.
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
  """Whether a kernel computes prompts of so many tokens."""
  return config.attention != "xla" and tokens <= MOST_SPANNED


def answers(config: ModelConfig, tokens: int) -> bool:
  """Whether a kernel computes responses, so many tokens together.

  Not where layers slide: a query has one span, and its window would be a second one, of the prefix.
  """
  return config.attention != "xla" and tokens <= MOST_SPANNED and not config.sliding_window


def over_prompts(
  config: ModelConfig, q: Array, k: Array, v: Array, sliding: Array, images: Array | None
) -> Array:
  """Attention of prompts over themselves, with windows and images that see all of themselves.

  Args:
    config: of the model.
    q, k, v: [P, 1, T, H or K, D].
    sliding: bool; whether queries see `config.sliding_window` back.
    images: i32[P, T]; tokens with the same number above 0 see each other; or None.

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
  """Attention of blocks of responses over their own responses and the prefixes of their prompts.

  The keys of a part are those of its blocks and, behind them, of all its prefixes; the prompt is
  the segment, and the response up to the query is the span.

  Args:
    config: of the model.
    q, k, v: [R, N, B, H or K, D].
    number: i32[R, N]; of the block in its response, whose blocks stand one after another.
    row: i32[R, N]; of the prefix in its part.
    prefix_kv: keys and values [R·S, K, Lp, D].
    prefix_length: i32[R·S]; how many of the Lp positions are seen.

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
  """Attention of patches over their frames; `segments`: i32[B, N], 0 is padding. As `attend`."""
  # Padding sees a little padding: less to compute than if all of it were one frame.
  n = segments.shape[1]
  segments = jnp.where(segments > 0, segments, n + 1 + jnp.arange(n) // _LANES)
  return attend(config, q, k, v, Sight(segments, segments), scale)


@dataclasses.dataclass(frozen=True)
class _WithinSpan:
  """bool; whether the key of a number is in a span (first · 2^16 + last) or behind all spans."""

  spanned: int

  def __call__(self, span: Array, key: Array) -> Array:
    first, last = jax.lax.shift_right_logical(span, 16), span & (MOST_SPANNED - 1)
    return ((key >= first) & (key <= last)) | (key >= self.spanned)


def _blocks(n: int) -> tuple[int, int]:
  """Size of a block and of all blocks together that hold n."""
  count = -(-n // _BLOCK)
  size = -(-n // (count * _LANES)) * _LANES
  return size, count * size


def _upcoming(active: Array) -> Array:
  """i32[I, J]; the j of this block or else of the next active one, which is fetched meanwhile."""
  i, j = active.shape
  at = jnp.where(active.reshape(-1), jnp.arange(i * j, dtype=jnp.int32), i * j - 1)
  return jax.lax.cummin(at, reverse=True).reshape(i, j) % j


def _splash(
  q: Array, k: Array, v: Array, sight: Sight, scale: float, interpret: bool = False
) -> Array:
  """`attend` on one TPU. Pairs of blocks in which no row has a query that sees a key are skipped.

  Which ones these are is known only when it runs. The kernel can take that, but what makes it
  (`make_splash_mha`) takes only masks that are known before: so it is made here.
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
  """`attend` on one GPU.

  The kernel wants even numbers of queries and keys. Any other mask than the causal one it takes as
  an array: two bytes for each pair of a query and a key, whatever the number of heads.
  """
  n, s = q.shape[1], k.shape[2]
  k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, s % 2), (0, 0))).swapaxes(1, 2) for a in (k, v))
  q = jnp.pad(q, ((0, 0), (0, n % 2), (0, 0), (0, 0)))
  mask = None if sight.causal else sight.padded(n + n % 2, s + s % 2).mask()[:, None]
  out = jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=sight.causal, scale=scale, implementation=implementation
  )
  return out[:, :n]


# By `ModelConfig.attention`; those behind the first two are for machines without such devices.
_KERNELS = {
  "splash": _splash,
  "cudnn": _cudnn,
  "splash_interpreted": functools.partial(_splash, interpret=True),
  "cudnn_by_xla": functools.partial(_cudnn, implementation="xla"),
}

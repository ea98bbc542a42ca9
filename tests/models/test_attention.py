"""Attention kernels give the values and gradients of attention without a kernel.

The tests run on CPU devices. Splash runs in interpret mode, and XLA replaces cuDNN.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrl_vlm as jv
from jaxrl_vlm import models, objectives, parallel, scratch
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.models import attention, layers
from jaxrl_vlm.models.decoder import Blocks
from jaxrl_vlm.packing import Packer
from jaxrl_vlm.stages.loading import load_model
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience, TokenStats
from tests import tiny, tiny_run

KERNELS = ("splash_interpreted", "cudnn_by_xla")
QUICK = {"xla_backend_optimization_level": 0}  # for a shorter compilation


def mesh_of(fsdp: int, tensor: int):
  return parallel.make_mesh({"fsdp": fsdp, "tensor": tensor}, jax.devices()[: fsdp * tensor])


def assert_near(actual, expected, share=1e-5):
  """Asserts that two pytrees are equal up to the order of sums in float32.

  The tolerance of an array is `share` of its largest value, or of a thousandth of the largest value
  of all arrays if that is larger. The second case is for the gradient of the bias of keys, which is
  0 except for rounding.
  """
  actual, expected = jax.device_get((actual, expected))
  smallest_scale = 1e-3 * max(float(np.abs(b).max()) for b in jax.tree.leaves(expected))

  def near(path, a, b):
    np.testing.assert_allclose(
      a,
      b,
      rtol=0,
      atol=share * max(float(np.abs(b).max()), smallest_scale),
      err_msg=jax.tree_util.keystr(path),
    )

  jax.tree.map_with_path(near, actual, expected)


# -- The kernels -----------------------------------------------------------------------------------


def _prompts(rng, rows):
  """The causal mask of a prompt."""
  n = 151
  zero = np.zeros((rows, n), np.int32)
  at = np.broadcast_to(np.arange(n), (rows, n))
  return attention.Sight(zero, zero, zero, at, spanned=n, causal=True)


def _windows(rng, rows):
  """A window of 40 tokens, and an image. Some pairs of blocks have no attention at all."""
  n = 401
  zero = np.zeros((rows, n), np.int32)
  at = np.broadcast_to(np.arange(n), (rows, n))
  last = np.where((at >= 30) & (at < 90), 89, at)
  return attention.Sight(zero, zero, np.maximum(at - 39, 0), last, spanned=n)


def _responses(rng, rows):
  """Seven responses of 11 to 68 tokens to five prompts in random order. One prefix is empty."""
  n, prefixes, length = 300, 5, 70
  starts = np.sort(rng.choice(np.arange(1, n), 6, replace=False))
  first = np.zeros(n, np.int32)
  first[starts] = starts
  first = np.maximum.accumulate(first)
  own = np.stack([rng.permutation(7) % prefixes for _ in range(rows)])[
    :, np.searchsorted(starts, np.arange(n), side="right")
  ]
  lengths = rng.integers(1, length + 1, (rows, prefixes, 1))
  lengths[:, 2] = 0
  real = np.arange(length) < lengths
  of_prefixes = np.where(real, np.arange(prefixes)[:, None], -1).reshape(rows, -1)
  return attention.Sight(
    own,
    np.concatenate([own, of_prefixes], axis=1),
    np.broadcast_to(first, own.shape),
    np.broadcast_to(np.arange(n), own.shape),
    spanned=n,
  )


def _frames(rng, rows):
  """Four images of one frame each, then padding. The last row is only padding."""
  sizes = np.array([130, 7, 90, 40])
  frames = np.concatenate([np.repeat(np.arange(1, 5), sizes), np.zeros(30, int)])
  frames = np.stack([frames] * (rows - 1) + [np.zeros_like(frames)])
  return attention.Sight(frames, frames)


@pytest.mark.parametrize(
  ("sights", "head_dim", "axes", "rows"),
  [
    (_windows, 128, None, 2),
    (_responses, 64, (2, 2), 4),
    (_responses, 128, (1, 4), 2),  # more devices than key/value heads
    (_prompts, 16, (2, 3), 3),  # neither rows nor heads are divisible by the mesh
    (_frames, 80, (2, 1), 2),
  ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_equal_attention_without_a_kernel(
  kernel, sights, head_dim, axes, rows, monkeypatch
):
  monkeypatch.setattr(attention, "_BLOCK", 128)
  rng = np.random.default_rng(0)
  sight = jax.tree.map(lambda a: jnp.asarray(a, jnp.int32), sights(rng, rows))
  n, s = sight.segment.shape[1], sight.key_segment.shape[1]
  q, k, v, w = (
    jnp.asarray(rng.normal(size=(rows, *shape)), jnp.float32)
    for shape in ((n, 4, head_dim), (2, s, head_dim), (2, s, head_dim), (n, 4, head_dim))
  )
  scale = head_dim**-0.5
  config = types.SimpleNamespace(attention=kernel, mesh=axes and mesh_of(*axes))

  def by_kernel(q, k, v):
    return attention.attend(config, q, k, v, sight, scale)

  def plain(q, k, v):
    return layers.attend(q, k, v, lambda at: sight.mask()[:, at], scale)[0]

  def both(attend):
    def weighted(*args):
      out = attend(*args)
      return (out * w).sum(), out

    return jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True), compiler_options=QUICK)(
      q, k, v
    )

  (_, out), grads = both(by_kernel)
  (_, expected), expected_grads = both(plain)
  assert_near((out, grads), (expected, expected_grads))


def test_blocks_without_attention_are_neither_computed_nor_fetched(monkeypatch):
  """The keys of these blocks are NaN, which would make the output NaN even with probability 0."""
  monkeypatch.setattr(attention, "_BLOCK", 128)
  segment = jnp.repeat(jnp.array([[-1, 0, -1]]), 128, axis=1)
  sight = attention.Sight(jnp.zeros((1, 100), jnp.int32), segment)
  k = jnp.where(segment == 0, 1.0, jnp.nan)[:, None, :, None] * jnp.ones(128)
  config = types.SimpleNamespace(attention="splash_interpreted", mesh=None)
  out = attention.attend(config, jnp.ones((1, 100, 1, 128)), k, k, sight, 1.0)
  np.testing.assert_allclose(out, 1.0, rtol=1e-6)
  np.testing.assert_array_equal(
    attention._upcoming(jnp.array([[False, True, False], [False, False, True]])),
    [[1, 1, 2], [2, 2, 2]],
  )


@pytest.mark.parametrize(
  ("n", "expected"), [(1, (128, 128)), (512, (512, 512)), (640, (384, 768)), (4096, (512, 4096))]
)
def test_block_sizes_cover_all_elements_with_little_padding(n, expected):
  assert attention._blocks(n) == expected


# -- Models ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  ("family", "kernel"), [("qwen2_5_vl", "splash_interpreted"), ("gemma3", "cudnn_by_xla")]
)
def test_a_model_with_kernels_equals_one_without(family, kernel, tmp_path):
  """The batch has images, videos, windows and padding.

  The test compares prompts, responses with padding, and responses in blocks.
  """
  tiny.make_hf(tmp_path, family=family)
  model, params, processor = jv.load_pretrained(tmp_path)
  prompt = jax.tree.map(lambda a: a[:6], tiny.mixed_batch(processor, family))
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 50, (6, 2, 21)).astype(np.int32)
  lengths = np.array([[21, 3], [1, 0], [17, 16], [9, 21], [8, 5], [21, 2]])
  index, used = Packer(1, 1, 8, 16)(lengths, 21)
  assert used[0] > 1 and index[0, used[0] - 1].max() == 6 * 2 * 3  # some blocks are unused
  blocks = Blocks(jnp.asarray(index[0, used[0] - 1]), 8)
  weights = [
    rng.normal(size=(*shape, model.config.hidden_size)).astype(np.float32)
    for shape in (prompt.tokens.shape, tokens.shape, (1, 16, 8))
  ]

  def run(params, attention):
    apply = functools.partial(
      models.VLM(model.config.replace(attention=attention)).apply, {"params": params}, prompt
    )
    hidden, prefix = apply(method="prefill")
    real = np.arange(hidden.shape[1]) < prompt.length[:, None]
    out = (
      jnp.where(real[..., None], hidden, 0),
      apply(prefix, tokens, method="respond"),
      apply(prefix, tokens, blocks, method="respond"),
    )
    return sum((a * w).mean() for a, w in zip(out, weights, strict=True)), out

  values = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=1, compiler_options=QUICK)
  ((_, out), grads), ((_, expected), expected_grads) = (
    values(params, attention) for attention in (kernel, "xla")
  )
  assert_near(out, expected, 2e-5)
  # Gradients pass through several layers, each of which adds rounding errors.
  assert_near(grads, expected_grads, 5e-5)


P, G, T = 4, 2, 24


@pytest.fixture(scope="module")
def scratch_path(tmp_path_factory):
  path = tmp_path_factory.mktemp("scratch")
  scratch.create(path, tiny_run.ARCHITECTURE, ["what is three plus four"] * 20)
  return path


@pytest.mark.slow
def test_a_step_with_a_kernel_on_four_devices_equals_one_without_on_one_device(scratch_path):
  """The responses are packed."""
  messages = [tiny.turn(None, text) for text in ("three", "plus four", "what is", "is")]
  pictures = [tiny.images((24, 40 - 8 * i), seed=i) for i in range(P)]

  def step(kind, mesh):
    config = models.from_directory(scratch_path)
    model, params, processor = models.load_pretrained(
      scratch_path,
      prompt_buckets=(64,),
      patch_buckets=(36,),
      shardings=parallel.param_shardings(mesh, models.abstract_params(config)),
    )
    model = models.VLM(model.config.replace(attention=kind, stop_tokens=()))
    gradient = optax.GradientTransformation(
      lambda params: jax.tree.map(jnp.zeros_like, params),
      lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
    )
    programs = Programs(model, mesh, objectives.create("grpo"), gradient, params, part_tokens=32)
    prompt = parallel.put_batch(mesh, processor(messages, pictures))
    zeros = np.zeros((P, G, T), "f4")
    advantages = np.where(np.arange(G)[:, None] > 0, 1.0, -0.5) * mask
    experience = Experience(
      mask=mask,
      advantages=advantages.astype("f4"),
      old=None,
      rewards=zeros[..., 0],
      views={"ref": TokenStats(zeros, zeros)},
    )
    state, _ = programs.update(
      programs.init_state(params),
      {},
      prompt,
      tokens,
      experience,
      jax.random.key(1),
      None,
      programs.pack(mask),
    )
    return state.opt_state

  mask = np.arange(T) < np.array([[T, 3], [1, 0], [17, 16], [9, T]])[..., None]
  tokens = np.random.default_rng(3).integers(0, 200, mask.shape).astype(np.int32)
  assert_near(step("splash_interpreted", mesh_of(2, 2)), step("xla", mesh_of(1, 1)), 5e-5)


# -- Choosing the attention ------------------------------------------------------------------------

TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5e")
CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
HOPPER, VOLTA, AMD = (
  types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=number)
  for kind, number in (("NVIDIA H100", "9.0"), ("Tesla V100", "7.0"), ("AMD MI300", "gfx942"))
)


@dataclasses.dataclass
class Sizes:
  dtype: str = "bfloat16"
  head_dim: int = 128


@pytest.mark.parametrize(
  ("name", "device", "sizes", "expected"),
  [
    ("auto", TPU, Sizes("float32", 80), "splash"),
    ("auto", HOPPER, Sizes(), "cudnn"),
    ("auto", HOPPER, Sizes("float32"), "xla"),
    ("auto", HOPPER, Sizes(head_dim=512), "xla"),
    ("auto", VOLTA, Sizes(), "xla"),
    ("auto", AMD, Sizes(), "xla"),
    ("auto", CPU, Sizes(), "xla"),
    ("xla", TPU, Sizes(), "xla"),
    ("splash", TPU, Sizes(), "splash"),
    ("cudnn", HOPPER, Sizes(), "cudnn"),
  ],
)
def test_auto_depends_on_the_devices_and_the_model(name, device, sizes, expected):
  assert attention.choose(name, [device] * 2, sizes) == expected


@pytest.mark.parametrize(
  ("name", "device", "sizes", "complaint"),
  [
    ("flash", CPU, Sizes(), "expected one of auto, xla, splash, cudnn"),
    ("splash_interpreted", CPU, Sizes(), "expected one of auto, xla, splash, cudnn"),
    ("splash", HOPPER, Sizes(), "expected a mesh of TPUs, got one of gpu; other choices: auto"),
    ("cudnn", VOLTA, Sizes(), "compute capability 8.0 or more, got one of Tesla V100"),
    ("cudnn", HOPPER, Sizes("float32"), "expected config.model.dtype='bfloat16'"),
    (
      "cudnn",
      HOPPER,
      Sizes(head_dim=512),
      "expected a model with head_dim of at most 256, got 512",
    ),
  ],
)
def test_an_unsupported_choice_is_an_error_with_the_reason(name, device, sizes, complaint):
  with pytest.raises(ValueError, match=f"^config.model.attention='{name}': .*{complaint}"):
    attention.choose(name, [device], sizes)


def test_a_run_chooses_attention_for_its_mesh_before_it_reads_parameters(scratch_path):
  config = tiny_run.get_config()
  assert config.model.attention == "auto"
  assert load_model(config, scratch_path, mesh_of(2, 1))[0].config.attention == "xla"
  config.model.attention = "splash"
  with pytest.raises(
    UserError,
    match="^config.model.attention='splash': expected a mesh of TPUs, "
    "got one of cpu; other choices: auto, xla, cudnn$",
  ):
    load_model(config, scratch_path, mesh_of(2, 1))

"""Compares the FLOPs and bytes that `planning.hlo` counts in programs with counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxrl_vlm.planning import hlo


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def cost(function, *args, steps=1.0, shares=None, **options) -> hlo.Cost:
  text = jax.jit(function, **options).lower(*args).compile().as_text()
  return hlo.analyse(text, steps, shares)


def matmul_flops(m, k, n):
  return 2 * m * k * n


@functools.cache
def mesh():
  return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


# -- FLOPs ----------------------------------------------------------------------------------------


def test_flops_of_a_matrix_product():
  found = cost(lambda a, b: a @ b, shape(64, 32), shape(32, 128))
  assert found.flops == matmul_flops(64, 32, 128)
  assert not found.collectives and not found.unknown


def test_flops_with_batch_axes_and_several_contracted_axes():
  found = cost(
    lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), shape(3, 8, 5, 16), shape(3, 7, 5, 16)
  )
  assert found.flops == 2 * 3 * 5 * 8 * 7 * 16
  assert cost(lambda a, b: jnp.tensordot(a, b, 2), shape(6, 4, 5), shape(4, 5, 9)).flops == (
    matmul_flops(6, 20, 9)
  )


def test_the_body_of_a_loop_counts_once_per_iteration():
  def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  found = cost(layers, shape(16, 32), shape(5, 32, 32))
  assert found.flops == 5 * matmul_flops(16, 32, 32) and not found.unknown
  # The gradient of a layer needs two more products. The first layer needs only one of them, because
  # the gradient of its input is not used.
  gradient = cost(jax.grad(lambda w, x: layers(x, w).sum()), shape(5, 32, 32), shape(16, 32))
  assert gradient.flops in (3 * found.flops, 3 * found.flops - matmul_flops(16, 32, 32))


def test_nested_loops_and_loops_that_do_not_start_at_zero():
  def f(x, w):
    return jax.lax.fori_loop(
      3, 10, lambda i, x: jax.lax.fori_loop(0, 4, lambda j, x: jnp.sin(x @ w), x), x
    )

  found = cost(f, shape(16, 16), shape(16, 16))
  assert found.flops == 7 * 4 * matmul_flops(16, 16, 16) and not found.unknown


def test_a_loop_with_an_early_exit_counts_its_largest_number_of_iterations():
  def f(x, w):
    return jax.lax.while_loop(
      lambda s: (s[1] < 6) & (s[0].sum() < 100), lambda s: (s[0] @ w, s[1] + 1), (x, 0)
    )[0]

  assert cost(f, shape(8, 8), shape(8, 8)).flops == 6 * matmul_flops(8, 8, 8)


def test_a_loop_with_an_unknown_trip_count_counts_as_many_steps_as_the_caller_passes():
  def f(x, w, n):
    return jax.lax.fori_loop(0, n, lambda i, x: x @ w, x)

  args = shape(8, 8), shape(8, 8), shape(dtype=jnp.int32)
  one_step, steps = cost(f, *args), cost(f, *args, steps=2.5)
  assert one_step.flops == matmul_flops(8, 8, 8) and steps.flops == 2.5 * one_step.flops
  assert one_step.unknown == steps.unknown == 1


# Every iteration adds 2 to the counter %i. The limit 7 is an element of the loop's state, not a
# constant of the condition.
LOOP = """HloModule m

%body (state: (s32[], f32[4,4], s32[])) -> (s32[], f32[4,4], s32[]) {
  %state = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%state), index=1
  %n = s32[] get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %first = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %copied = s32[] copy(%i)
  %next = s32[] add(%copied, %one)
  %after = s32[] add(%one, %next)
  ROOT %new = (s32[], f32[4,4]{1,0}, s32[]) tuple(%after, %first, %n)
}

%condition (state.1: (s32[], f32[4,4], s32[])) -> pred[] {
  %state.1 = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %n.1 = s32[] get-tuple-element(%state.1), index=2
  ROOT %less = pred[] compare(%i.1, %n.1), direction=LT
}

ENTRY %main (x.1: f32[4,4]) -> f32[4,4] {
  %x.1 = f32[4,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %limit = s32[] constant(7)
  %begin = (s32[], f32[4,4]{1,0}, s32[]) tuple(%zero, %x.1, %limit)
  %loop = (s32[], f32[4,4]{1,0}, s32[]) while(%begin), condition=%condition, body=%body
  ROOT %out = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_an_unrolled_loop_whose_limit_is_in_its_state():
  assert hlo.analyse(LOOP).flops == 4 * matmul_flops(4, 4, 4)


def branches(n, x, w):
  return jax.lax.switch(n, [lambda x: x, lambda x: x @ w, lambda x: jnp.sin(x @ w) @ w], x)


def test_a_conditional_counts_its_most_expensive_branch_or_the_given_shares():
  args = shape(dtype=jnp.int32), shape(8, 8), shape(8, 8)
  assert cost(branches, *args).flops == 2 * matmul_flops(8, 8, 8)
  shares = {"cond": (0.5, 0.25, 0.25)}
  assert cost(branches, *args, shares=shares).flops == 0.75 * matmul_flops(8, 8, 8)
  # Shares for another name, or for another number of branches, are not used.
  assert cost(branches, *args, shares={"cond": (1, 0), "x": (1, 0, 0)}).flops == (
    2 * matmul_flops(8, 8, 8)
  )


@pytest.mark.parametrize(
  "window",
  [
    dict(window_strides=(1,), padding=[(0, 0)]),
    dict(window_strides=(2,), padding=[(1, 2)]),
    dict(window_strides=(1,), padding=[(3, 3)], lhs_dilation=(2,)),
    dict(window_strides=(7,), padding=[(0, 0)], lhs_dilation=(8,)),
    dict(window_strides=(1,), padding=[(2, 1)], rhs_dilation=(3,)),
  ],
)
def test_a_convolution_counts_only_products_of_input_and_window_elements(window):
  """Window elements over padding, or between the elements of a dilated input, do not count."""
  b, size, width, out, kernel = 2, 9, 3, 5, 3
  text = (
    jax.jit(
      functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=("NHC", "HIO", "NHC"), **window
      )
    )
    .lower(shape(b, size, width), shape(kernel, width, out))
    .compiler_ir("hlo")
    .as_hlo_text()
  )
  # If all elements are 1, every output is its number of products.
  ones = jax.lax.conv_general_dilated(
    np.ones((1, size, 1), np.float32),
    np.ones((kernel, 1, 1), np.float32),
    dimension_numbers=("NHC", "HIO", "NHC"),
    **window,
  )
  assert hlo.analyse(text).flops == 2 * b * width * out * int(ones.sum())


# -- Collectives ----------------------------------------------------------------------------------


def cost_of_sharded(function, inputs, output, *args):
  shardings = [NamedSharding(mesh(), spec) for spec in inputs]
  return cost(
    function, *args, in_shardings=tuple(shardings), out_shardings=NamedSharding(mesh(), output)
  )


def cost_of_shard_map(function, spec, out, *args):
  return cost(
    jax.shard_map(function, mesh=mesh(), in_specs=spec, out_specs=out, check_vma=False), *args
  )


def test_bytes_that_a_device_sends_in_each_kind_of_collective():
  size = 64 * 32 * 4 / 4  # bytes of one shard
  x = shape(64, 32)
  gather = cost_of_shard_map(lambda x: jax.lax.all_gather(x, "a"), Spec("a"), Spec(), x)
  assert gather.collectives == {"all-gather": 3 * size}
  total = cost_of_shard_map(lambda x: jax.lax.psum(x, "a"), Spec("a"), Spec(), x)
  assert total.collectives == {"all-reduce": 2 * 3 / 4 * size}
  both = cost_of_shard_map(lambda x: jax.lax.psum(x, ("a", "b")), Spec("a"), Spec(), x)
  assert both.collectives == {"all-reduce": 2 * 7 / 8 * size}
  scatter = cost_of_shard_map(
    lambda x: jax.lax.psum_scatter(x, "a", tiled=True), Spec("a"), Spec("a"), x
  )
  assert scatter.collectives == {"reduce-scatter": 3 / 4 * size}
  swap = cost_of_shard_map(
    lambda x: jax.lax.all_to_all(x, "a", 0, 1, tiled=True), Spec("a"), Spec("a"), x
  )
  assert swap.collectives == {"all-to-all": 3 / 4 * size}
  ring = [(i, (i + 1) % 4) for i in range(4)]
  passed = cost_of_shard_map(lambda x: jax.lax.ppermute(x, "a", ring), Spec("a"), Spec("a"), x)
  assert passed.collectives == {"collective-permute": size}
  assert passed.sent == size


def test_a_collective_in_a_loop_counts_once_per_iteration():
  def f(x):
    ring = [(0, 1), (1, 0)]
    return jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(jax.lax.ppermute(x, "b", ring)), x)

  found = cost_of_shard_map(f, Spec("b"), Spec("b"), shape(8, 16))
  assert found.collectives == {"collective-permute": 5 * 8 * 16 * 4 / 2}


def test_a_sharded_product_counts_the_work_of_one_device():
  """Rows are sharded over `a` and the contracted axis over `b`.

  Each device computes an eighth of the product, and an all-reduce over `b` adds the partial sums.
  """
  found = cost_of_sharded(
    lambda x, w: x @ w, (Spec("a", "b"), Spec("b")), Spec("a"), shape(32, 64), shape(64, 128)
  )
  assert found.flops == matmul_flops(32, 64, 128) / 8
  assert found.collectives == {"all-reduce": 2 * 1 / 2 * 8 * 128 * 4}


# -- Programs for TPUs ----------------------------------------------------------------------------

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=4, entry_computation_layout={()->f32[]}

%all-reduce-scatter.1 (input: bf16[8,128]) -> bf16[2,128] {
  %input = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups=mesh['x'=2,'y'=2] {'x','y'}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = bf16[2,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,128}
}

%fused (p0: f32[6,8,128], p1: s32[], p2: f32[6,8,128], p3: f32[8,128]) -> f32[6,8,128] {
  %p0 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[6,8,128]{2,1,0:T(8,128)} parameter(2)
  %p3 = f32[8,128]{1,0:T(8,128)S(1)} parameter(3)
  %zero.1 = s32[] constant(0)
  %part = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero.1, %zero.1), dynamic_slice_sizes={1,8,128}
  ROOT %new = f32[6,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p2, %part, %p1, %zero.1, %zero.1)
}

ENTRY %main (a: bf16[8,128], b: f32[6,8,128], i: s32[], c: f32[6,8,128]) -> f32[] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[6,8,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %c = f32[6,8,128]{2,1,0:T(8,128)} parameter(3)
  %on-chip = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%a), custom_call_target="AllocateBuffer"
  %scattered = bf16[2,128]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel.2 = (bf16[8,128]{1,0:T(8,128)(2,1)}, f32[8]{0}) custom-call(%a, /*index=1*/%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
}}, metadata={op_name="x" stack_frame_id=253}
  %updated = f32[6,8,128]{2,1,0:T(8,128)} fusion(%b, %i, %c, %on-chip), kind=kLoop, calls=%fused
  %permute = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %after = bf16[8,128]{1,0} collective-permute-done(%permute)
  %lhs = bf16[8,64,128]{2,1,0} custom-call(%a), custom_call_target="AllocateBuffer"
  %rhs = bf16[8,32,128]{2,1,0} custom-call(%a), custom_call_target="AllocateBuffer"
  ROOT %scores = f32[8,64,32]{2,1,0:S(1)} convolution(%lhs, %rhs), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf
}
"""  # noqa: E501


def test_instructions_of_tpu_programs():
  found = hlo.analyse(TEXT)
  assert found.collectives == {
    "reduce-scatter": 3 / 4 * 8 * 128 * 2,
    "collective-permute": 8 * 128 * 2,
  }
  assert found.kernels == {"kernel": 1}
  # The TPU compiler writes a batch of products as a convolution. Along the batch axis, each output
  # has one product.
  assert found.flops == 8 * matmul_flops(64, 128, 32)
  a, kernel = 8 * 128 * 2, 3 * 8 * 128 * 2 + 8 * 4
  # %updated reads and writes only slices, and %permute reads and writes its operand. %scores reads
  # its operands from HBM and writes to on-chip memory.
  slices = 2 * 8 * 128 * 4 + 4
  scores = 8 * 64 * 128 * 2 + 8 * 32 * 128 * 2
  assert found.bytes == (a + 2 * 128 * 2) + kernel + slices + 2 * a + scores


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("{{0,1},{2,3}}", 2),
    ("[2,4]<=[8]", 4),
    ("[1,8]<=[2,4]T(1,0)", 8),
    ("{}", 4),
    ("mesh['x'=2,'y'=4] {'y'}", 4),
    ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y'}", 8),
  ],
)
def test_the_group_size_is_read_from_every_notation_of_replica_groups(groups, size):
  text = f"""HloModule m, num_partitions=4

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
  assert hlo.analyse(text).collectives == {"all-reduce": 2 * 32 * (size - 1) / size}

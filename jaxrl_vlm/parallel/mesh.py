"""The mesh of a run and where every array lives on it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

# `slice` splits the prompts of a batch alone: between slices, which only a slow network connects,
# nothing passes but the sum of gradients. `fsdp` splits prompts and parameters; `tensor` splits
# heads, hidden units and vocabulary.
AXES = ("slice", "fsdp", "tensor")
ROWS = ("slice", "fsdp")  # what prompts are split over

# What matches first holds; a spec counts from the last axis, so that the leading axis
# of stacked layers needs no rule.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"head", ("fsdp", "tensor")),
    (r"(q|k|v|qkv|gate|up|patch_embed)/kernel", ("fsdp", "tensor")),
    (r"(o|proj|down)/kernel", ("tensor", "fsdp")),
    (r"(q|k|v|qkv|gate|up)/bias", ("tensor",)),
    (r"mlp/(gate|up)", ("fsdp", "tensor")),  # of experts
    (r"mlp/down", ("tensor", "fsdp")),
    (r"lora/a", ("fsdp", None)),
    (r"lora/b", (None, "tensor")),
)


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices, of which neighbours are neighbours in the machine.

  Args:
    axes: sizes of `slice`, `fsdp` and `tensor` (default 1, -1, 1); one of them may be -1: whatever
      is left.
    devices: default all of this run.

  Raises:
    ValueError: a size is not a number of devices, or they do not multiply to that of all, or
      `slice` is not the number of TPU slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {name: axes.get(name, default) for name, default in zip(AXES, (1, -1, 1), strict=True)}
  if any(s < 1 and s != -1 for s in sizes.values()):
    raise ValueError(f"config.mesh={dict(axes)}: expected positive sizes, or -1 for one of them")
  known = math.prod(s for s in sizes.values() if s != -1)
  sizes = {k: len(devices) // known if s == -1 else s for k, s in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
        f"config.mesh={dict(axes)}: the axes must multiply to {len(devices)} devices, "
        f"got {math.prod(sizes.values())}")
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1 and sizes["slice"] != slices:
    raise ValueError(f"config.mesh.slice={sizes['slice']}: expected {slices}, the number of TPU "
                     "slices of this run")
  shape = tuple(sizes.values())
  if slices > 1:
    placed = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (slices, 1, 1), devices)
  elif devices[0].platform == "tpu":
    placed = mesh_utils.create_device_mesh(shape, devices)
  else:  # in their own order, which is that of their processes
    placed = np.asarray(devices).reshape(shape)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rows(mesh: Mesh) -> int:
  """Into how many parts the prompts of a batch are split."""
  return math.prod(mesh.shape[name] for name in ROWS)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> Spec:
  for pattern, axes in RULES:
    if re.search(rf"(^|/){pattern}$", path):
      padded = (None,) * (len(shape) - len(axes)) + axes
      # An axis that does not divide evenly is kept whole.
      return Spec(*(a if a and n % mesh.shape[a] == 0 else None
                    for a, n in zip(padded, shape, strict=True)))
  return Spec()


def param_shardings(mesh: Mesh, tree: Any) -> Any:
  """Shardings for a pytree of parameters, or of anything that mirrors one (optimizer state)."""

  def one(keys, leaf):
    path = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)
    return NamedSharding(mesh, _spec(path, leaf.shape, mesh))

  return jax.tree.map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Arrays whose leading axis is P prompts."""
  return NamedSharding(mesh, Spec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, Spec())


def put_batch(mesh: Mesh, tree: Any) -> Any:
  """Moves a pytree of host arrays with leading axis P onto the mesh."""
  return jax.device_put(tree, batch_sharding(mesh))


def reordered(mesh: Mesh, tree: Any, order: jax.Array) -> Any:
  """Rows [P, ...] of arrays that are split as `batch_sharding` says, in another order i32[P].

  Shards go round in a ring: no device ever holds all of them.
  """
  size = rows(mesh)
  if size == 1:
    return jax.tree.map(lambda a: jnp.take(a, order, axis=0), tree)

  def local(order, tree):
    here = len(order) // size
    me = jax.lax.axis_index(ROWS)
    mine = jax.lax.dynamic_slice_in_dim(order, me * here, here)

    def take(into, shards, i):  # `shards` of the device i places further
      at = mine - (me + i) % size * here
      found = (at >= 0) & (at < here)

      def one(into, shard):
        taken = jnp.take(shard, jnp.clip(at, 0, here - 1), axis=0)
        return jnp.where(found.reshape(-1, *[1] * (taken.ndim - 1)), taken, into)

      return jax.tree.map(one, into, shards)

    def step(i, state):
      taken, passing = state
      passing = jax.lax.ppermute(
          passing, ROWS, [(source, (source - 1) % size) for source in range(size)])
      return take(taken, passing, i), passing

    return jax.lax.fori_loop(1, size, step, (take(tree, tree, 0), tree))[0]

  split = Spec(ROWS)
  return jax.shard_map(local, mesh=mesh, in_specs=(Spec(), split), out_specs=split,
                       check_vma=False)(order, tree)

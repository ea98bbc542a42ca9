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

Rules = tuple[tuple[str, tuple[str, ...]], ...]

# Axes of the mesh that split each logical axis of parameters; `config.sharding` overrides them.
RULES: Rules = (("hidden", ("tensor",)), ("vocab", ("fsdp", "tensor")), ("width", ("fsdp",)))

# While responses are drawn in a layout of their own: nothing is gathered for a token.
ROLLOUT_RULES: Rules = (("hidden", ("tensor",)), ("vocab", ("tensor",)), ("width", ()))

# Logical axes of parameters: `width` is that of the residual stream, `hidden` is heads and hidden
# units. What matches first holds; it counts from the last axis, so that the leading axis of stacked
# layers needs no name. All others lie whole on every device.
_LOGICAL: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embed/embedding", ("vocab", "width")),
  (r"head", ("width", "vocab")),
  (r"(q|k|v|qkv|gate|up|patch_embed)/kernel", ("width", "hidden")),
  (r"(o|proj|down)/kernel", ("hidden", "width")),
  (r"(q|k|v|qkv|gate|up)/bias", ("hidden",)),
  (r"mlp/(gate|up)", ("width", "hidden")),  # of experts
  (r"mlp/down", ("hidden", "width")),
  (r"lora/a", ("width", None)),
  (r"lora/b", (None, "hidden")),
)


def rules_of(sharding: Mapping[str, Sequence[str]]) -> Rules:
  """`config.sharding` as rules; what it leaves out is as in `RULES`.

  Raises:
    ValueError: no such logical axis, or none of the mesh; names both and what there is.
  """
  rules = dict(RULES)
  for name, axes in sharding.items():
    if name not in rules:
      raise ValueError(
        f"config.sharding.{name}: no such axis of parameters; they are {', '.join(rules)}"
      )
    if isinstance(axes, str) or not set(axes) <= set(AXES) or len(set(axes)) < len(axes):
      raise ValueError(
        f"config.sharding.{name}={axes!r}: expected a tuple of some of {', '.join(AXES)}"
      )
    rules[name] = tuple(axis for axis in AXES if axis in axes)
  return tuple(sorted(rules.items()))


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
      f"got {math.prod(sizes.values())}"
    )
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1 and sizes["slice"] != slices:
    raise ValueError(
      f"config.mesh.slice={sizes['slice']}: expected {slices}, the number of TPU slices of this run"
    )
  shape = tuple(sizes.values())
  if slices > 1:
    placed = mesh_utils.create_hybrid_device_mesh(
      (1, *shape[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  elif devices[0].platform == "tpu":
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:  # in their own order, which is that of their processes
    placed = np.asarray(devices).reshape(shape)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_tensor(mesh: Mesh, tensor: int) -> Mesh:
  """The same devices in the same order with another size of `tensor`, at the cost of `fsdp`.

  Raises:
    ValueError: it is no multiple of what it was, or does not divide the devices of a slice.
  """
  slices, was = mesh.shape["slice"], mesh.shape["tensor"]
  if tensor < 1 or tensor % was or (mesh.size // slices) % tensor:
    raise ValueError(
      f"config.rollout.tensor={tensor}: expected a multiple of config.mesh.tensor={was} that "
      f"divides the {mesh.size // slices} devices of a slice, or 0 for the layout of training"
    )
  return Mesh(
    mesh.devices.reshape(slices, -1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def rows(mesh: Mesh) -> int:
  """Into how many parts the prompts of a batch are split."""
  return math.prod(mesh.shape[name] for name in ROWS)


def split_over(
  mesh: Mesh, rules: Rules, name: str, size: int, taken: Sequence[str] = ()
) -> tuple[str, ...]:
  """The axes of the mesh that split a logical axis of this size.

  Not those `taken` by another axis of the same array; then as many, from the last on, as divide the
  size evenly.
  """
  axes = tuple(axis for axis in dict(rules)[name] if axis not in taken)
  while size % math.prod(mesh.shape[axis] for axis in axes):
    axes = axes[1:]
  return axes


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> Spec:
  for pattern, names in _LOGICAL:
    if re.search(rf"(^|/){pattern}$", path):
      taken: list[str] = []
      spec: list[Any] = [None] * len(shape)
      first = len(shape) - len(names)
      for i in sorted(range(len(names)), key=lambda i: names[i] != "vocab"):  # it chooses first
        name, size = names[i], shape[first + i]
        axes = split_over(mesh, rules, name, size, taken) if name else ()
        taken += axes
        spec[first + i] = axes if len(axes) > 1 else axes[0] if axes else None
      return Spec(*spec)
  return Spec()


def param_shardings(mesh: Mesh, tree: Any, rules: Rules = RULES) -> Any:
  """Shardings for a pytree of parameters, or of anything that mirrors one (optimizer state)."""

  def one(keys, leaf):
    path = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)
    return NamedSharding(mesh, _spec(path, leaf.shape, mesh, rules))

  return jax.tree.map_with_path(one, tree)


def constrained(mesh: Mesh | None, a: jax.Array, *axes: Any) -> jax.Array:
  """An array within a program, split over the mesh as `PartitionSpec(*axes)`.

  As it is where there is nothing to split it over.
  """
  if mesh is None or mesh.size == 1:
    return a
  return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, Spec(*axes)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Arrays whose leading axis is P prompts."""
  return NamedSharding(mesh, Spec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, Spec())


def reordered(mesh: Mesh, tree: Any, order: jax.Array) -> Any:
  """Rows [P, ...] of arrays that are split as `batch_sharding` says, in another order i32[P].

  None goes from one slice to another. Within a slice shards go round in a ring: no device ever
  holds all of them.
  """
  size = mesh.shape["fsdp"]
  if rows(mesh) == 1:
    return jax.tree.map(lambda a: jnp.take(a, order, axis=0), tree)

  def local(order, tree):
    here = len(order) // rows(mesh)
    me, first = jax.lax.axis_index("fsdp"), jax.lax.axis_index("slice") * size * here
    mine = jax.lax.dynamic_slice_in_dim(order, first + me * here, here) - first

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
        passing, "fsdp", [(source, (source - 1) % size) for source in range(size)]
      )
      return take(taken, passing, i), passing

    return jax.lax.fori_loop(1, size, step, (take(tree, tree, 0), tree))[0]

  split = Spec(ROWS)
  return jax.shard_map(
    local, mesh=mesh, in_specs=(Spec(), split), out_specs=split, check_vma=False
  )(order, tree)

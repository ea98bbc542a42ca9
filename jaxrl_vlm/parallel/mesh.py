"""The mesh of a run, and the shardings of arrays on it."""

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

# Axes of the mesh. `slice` shards only the prompts of a batch, so that the slow network between TPU
# slices transfers nothing but the sum of gradients. `fsdp` shards prompts and parameters, and
# `tensor` shards heads, hidden units and vocabulary.
AXES = ("slice", "fsdp", "tensor")
ROWS = ("slice", "fsdp")  # the axes that shard prompts

Rules = tuple[tuple[str, tuple[str, ...]], ...]

# The mesh axes that shard each logical axis of parameters. `config.sharding` overrides them.
RULES: Rules = (("hidden", ("tensor",)), ("vocab", ("fsdp", "tensor")), ("width", ("fsdp",)))

# For rollouts with their own sharding (`config.rollout.tensor`). No parameters are sharded over
# `fsdp`, so that decoding does not gather weights for every token.
ROLLOUT_RULES: Rules = (("hidden", ("tensor",)), ("vocab", ("tensor",)), ("width", ()))

# Logical axes of parameters: `width` is the residual stream, `hidden` is heads and hidden units.
# The first pattern that matches the path of a parameter applies. Its names refer to the last axes
# of the array, so the leading axis of stacked layers needs no name. All other parameters are
# replicated.
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
  """Returns the rules of `config.sharding`. Logical axes that are not in it are as in `RULES`.

  Args:
    sharding: mesh axes for each logical axis.

  Raises:
    ValueError: a logical axis or a mesh axis does not exist. The message lists the valid ones.
  """
  rules = dict(RULES)
  for name, axes in sharding.items():
    if name not in rules:
      raise ValueError(f"config.sharding.{name}: no such axis; expected one of {', '.join(rules)}")
    if isinstance(axes, str) or not set(axes) <= set(AXES) or len(set(axes)) < len(axes):
      raise ValueError(
        f"config.sharding.{name}={axes!r}: expected a tuple of some of {', '.join(AXES)}"
      )
    rules[name] = tuple(axis for axis in AXES if axis in axes)
  return tuple(sorted(rules.items()))


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh of all devices. Devices that are adjacent in the mesh are adjacent in the
  hardware.

  Args:
    axes: sizes of `slice`, `fsdp` and `tensor` (default 1, -1, 1). One of them may be -1, which
      stands for all remaining devices.
    devices: the devices; by default all devices of this run.

  Raises:
    ValueError: a size is invalid, the product of the sizes is not the number of devices, or `slice`
      is not the number of TPU slices.
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
  else:  # in the order of JAX, in which the devices of a process are adjacent
    placed = np.asarray(devices).reshape(shape)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_tensor(mesh: Mesh, tensor: int) -> Mesh:
  """Returns a mesh of the same devices in the same order with another size of `tensor`.

  The size of `slice` stays the same, and `fsdp` becomes smaller as `tensor` becomes larger.

  Raises:
    ValueError: `tensor` is not a multiple of its size in `mesh`, or does not divide the number of
      devices of a slice.
  """
  slices, was = mesh.shape["slice"], mesh.shape["tensor"]
  if tensor < 1 or tensor % was or (mesh.size // slices) % tensor:
    raise ValueError(
      f"config.rollout.tensor={tensor}: expected a multiple of config.mesh.tensor={was} that "
      f"divides the {mesh.size // slices} devices of a slice, or 0 for the sharding of training"
    )
  return Mesh(
    mesh.devices.reshape(slices, -1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def rows(mesh: Mesh) -> int:
  """Returns R, the number of shards of a batch of prompts."""
  return math.prod(mesh.shape[name] for name in ROWS)


def split_over(
  mesh: Mesh, rules: Rules, name: str, size: int, taken: Sequence[str] = ()
) -> tuple[str, ...]:
  """Returns the mesh axes that shard a logical axis of parameters.

  Starting from the axes in `rules` that are not `taken`, the first axes are dropped until the
  product of the remaining ones divides `size`.

  Args:
    mesh: the mesh.
    rules: mesh axes for each logical axis.
    name: name of the logical axis.
    size: size of the logical axis.
    taken: mesh axes that already shard another axis of the same array.
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
      for i in sorted(range(len(names)), key=lambda i: names[i] != "vocab"):  # vocab first
        name, size = names[i], shape[first + i]
        axes = split_over(mesh, rules, name, size, taken) if name else ()
        taken += axes
        spec[first + i] = axes if len(axes) > 1 else axes[0] if axes else None
      return Spec(*spec)
  return Spec()


def param_shardings(mesh: Mesh, tree: Any, rules: Rules = RULES) -> Any:
  """Returns the shardings of parameters, or of a pytree that mirrors them (optimizer state)."""

  def one(keys, leaf):
    path = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)
    return NamedSharding(mesh, _spec(path, leaf.shape, mesh, rules))

  return jax.tree.map_with_path(one, tree)


def constrained(mesh: Mesh | None, a: jax.Array, *axes: Any) -> jax.Array:
  """Constrains the sharding of an array in a jitted function to `PartitionSpec(*axes)`.

  Without a mesh, or with a mesh of one device, the array is returned unchanged.
  """
  if mesh is None or mesh.size == 1:
    return a
  return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, Spec(*axes)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose leading axis is P prompts."""
  return NamedSharding(mesh, Spec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device stores completely."""
  return NamedSharding(mesh, Spec())


def reordered(mesh: Mesh, tree: Any, order: jax.Array) -> Any:
  """Permutes the rows of arrays [P, ...] with `batch_sharding`: row i of the result is order[i].

  `order` must not move rows between slices. Within a slice, the shards are passed around in a ring
  of devices, so that a device never holds the whole batch.

  Args:
    mesh: the mesh.
    tree: pytree of arrays [P, ...].
    order: i32[P], a permutation.
  """
  size = mesh.shape["fsdp"]
  if rows(mesh) == 1:
    return jax.tree.map(lambda a: jnp.take(a, order, axis=0), tree)

  def local(order, tree):
    count = len(order) // rows(mesh)  # rows of a shard
    device, first = jax.lax.axis_index("fsdp"), jax.lax.axis_index("slice") * size * count
    # The rows that this device needs, as indices in the slice.
    wanted = jax.lax.dynamic_slice_in_dim(order, first + device * count, count) - first

    def take(result, shards, i):
      """Copies the wanted rows from `shards`, which are those of the device `device` + i."""
      index = wanted - (device + i) % size * count
      found = (index >= 0) & (index < count)

      def from_shard(result, shard):
        taken = jnp.take(shard, jnp.clip(index, 0, count - 1), axis=0)
        return jnp.where(found.reshape(-1, *[1] * (taken.ndim - 1)), taken, result)

      return jax.tree.map(from_shard, result, shards)

    def step(i, state):
      result, shards = state
      shards = jax.lax.ppermute(
        shards, "fsdp", [(source, (source - 1) % size) for source in range(size)]
      )
      return take(result, shards, i), shards

    return jax.lax.fori_loop(1, size, step, (take(tree, tree, 0), tree))[0]

  split = Spec(ROWS)
  return jax.shard_map(
    local, mesh=mesh, in_specs=(Spec(), split), out_specs=split, check_vma=False
  )(order, tree)

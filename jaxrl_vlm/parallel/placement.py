"""The rows of a batch that this process holds, and copying arrays from the host to a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrl_vlm.parallel.mesh import batch_sharding


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows (prompts) of a batch that this process holds.

  Attributes:
    count: P, the rows of all processes together.
    here: indices of the rows that are on devices of this process, ascending.
    owned: the rows of `here` that this process is responsible for. Several processes can hold the
      same row; the first of them owns it.
  """

  count: int
  here: tuple[int, ...]
  owned: tuple[int, ...]

  def spread(self, values: list[Any]) -> list[Any]:
    """Returns a list of P entries with the values of the rows `here`, and None for other rows."""
    spread: list[Any] = [None] * self.count
    for row, value in zip(self.here, values, strict=True):
      spread[row] = value
    return spread


@functools.lru_cache(maxsize=64)
def own_rows(mesh: Mesh, count: int) -> Rows:
  """Returns the rows of a batch of `count` prompts that this process holds."""
  holders: list[set[int]] = [set() for _ in range(count)]
  for device, index in batch_sharding(mesh).devices_indices_map((count,)).items():
    for row in range(*index[0].indices(count)):
      holders[row].add(device.process_index)
  me = jax.process_index()
  return Rows(
    count,
    tuple(row for row, who in enumerate(holders) if me in who),
    tuple(row for row, who in enumerate(holders) if me == min(who)),
  )


def put(tree: Any, shardings: Any) -> Any:
  """Copies host arrays to devices. Every process must have the same, complete arrays.

  Args:
    tree: pytree of host arrays.
    shardings: a sharding, or a pytree of shardings that is a prefix of `tree`.
  """

  def one(sharding, subtree):
    if sharding.is_fully_addressable:
      return jax.device_put(subtree, sharding)
    # device_put would compare the arrays of all processes.
    return jax.tree.map(
      lambda a: _placed(np.shape(a), sharding, np.asarray(a).__getitem__), subtree
    )

  return jax.tree.map(one, shardings, tree, is_leaf=lambda s: isinstance(s, jax.sharding.Sharding))


def put_batch(mesh: Mesh, tree: Any) -> Any:
  """Copies a pytree of host arrays [P, ...] to the mesh. Every process has the complete arrays."""
  return put(tree, batch_sharding(mesh))


def put_rows(mesh: Mesh, tree: Any, rows: Rows) -> Any:
  """Copies host arrays of the rows `here` to the mesh: [len(rows.here), ...] -> [P, ...]."""
  sharding = batch_sharding(mesh)
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  position = {row: i for i, row in enumerate(rows.here)}

  def one(a):
    def shard(index):
      return a[[position[row] for row in range(*index[0].indices(rows.count))]]

    return _placed((rows.count, *a.shape[1:]), sharding, shard)

  return jax.tree.map(one, tree)


def _placed(shape: tuple[int, ...], sharding: Any, shard: Callable) -> jax.Array:
  return jax.make_array_from_callback(shape, sharding, shard)


def everywhere(mesh: Mesh, key: jax.Array) -> jax.Array:
  """Replicates a random key, which is the same in all processes, on the mesh."""
  if mesh.is_multi_process:
    data = put(
      np.asarray(jax.random.key_data(key)),
      jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
  return key


def taken(array: jax.Array) -> dict[int, np.ndarray]:
  """Returns the rows of a batch that this process holds, on the host, by index in the batch."""
  if array.is_fully_addressable:
    return dict(enumerate(np.asarray(array)))
  values = {}
  for shard in array.addressable_shards:
    rows = range(*shard.index[0].indices(array.shape[0]))
    values |= dict(zip(rows, np.asarray(shard.data), strict=True))
  return values

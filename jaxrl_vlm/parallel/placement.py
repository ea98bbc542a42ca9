"""Which rows of a batch are this process's, and how arrays of the host come onto a mesh."""

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
  """Which prompts of a batch are this process's.

  Attributes:
    count: P, of all processes together.
    here: those that its devices hold, ascending.
    owned: those of them that it answers for: several processes may hold the same.
  """

  count: int
  here: tuple[int, ...]
  owned: tuple[int, ...]

  def spread(self, values: list[Any]) -> list[Any]:
    """Values of the rows `here` at their places among P; the others are None."""
    found: list[Any] = [None] * self.count
    for row, value in zip(self.here, values, strict=True):
      found[row] = value
    return found


@functools.lru_cache(maxsize=64)
def own_rows(mesh: Mesh, count: int) -> Rows:
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
  """`jax.device_put` of host arrays that every process has whole."""

  def one(sharding, part):
    if sharding.is_fully_addressable:
      return jax.device_put(part, sharding)
    # device_put would compare the arrays of all processes.
    return jax.tree.map(lambda a: _placed(np.shape(a), sharding, np.asarray(a).__getitem__), part)

  return jax.tree.map(one, shardings, tree, is_leaf=lambda s: isinstance(s, jax.sharding.Sharding))


def put_batch(mesh: Mesh, tree: Any) -> Any:
  """Moves a pytree of host arrays with leading axis P, which every process has whole."""
  return put(tree, batch_sharding(mesh))


def put_rows(mesh: Mesh, tree: Any, rows: Rows) -> Any:
  """Moves host arrays of the rows `here` onto the mesh: [len(rows.here), ...] -> [P, ...]."""
  sharding = batch_sharding(mesh)
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  place = {row: i for i, row in enumerate(rows.here)}

  def one(a):
    def part(index):
      return a[[place[row] for row in range(*index[0].indices(rows.count))]]

    return _placed((rows.count, *a.shape[1:]), sharding, part)

  return jax.tree.map(one, tree)


def _placed(shape: tuple[int, ...], sharding: Any, part: Callable) -> jax.Array:
  return jax.make_array_from_callback(shape, sharding, part)


def everywhere(mesh: Mesh, key: jax.Array) -> jax.Array:
  """A random key, the same in all processes, for programs on the mesh."""
  if mesh.is_multi_process:
    data = put(
      np.asarray(jax.random.key_data(key)),
      jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
  return key


def taken(array: jax.Array) -> dict[int, np.ndarray]:
  """The rows of a batch that this process holds, by number."""
  if array.is_fully_addressable:
    return dict(enumerate(np.asarray(array)))
  found = {}
  for shard in array.addressable_shards:
    rows = range(*shard.index[0].indices(array.shape[0]))
    found |= dict(zip(rows, np.asarray(shard.data), strict=True))
  return found

"""Iterates over a source in batches of examples. The iterator can be saved and resumed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_vlm.data.sources import Source
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.example import Example


class BatchIterator:
  """Iterates over batches, which are lists of examples. Use `make_iterator` to create one.

  The state of the iterator is the number of batches that it has returned. The next batch depends
  only on this number and on the arguments of `make_iterator`. It does not depend on the number of
  workers, or on which rows of a batch a process reads.

  Attributes:
    given: Number of batches that the iterator has returned. It is also the index of the next batch.
  """

  def __init__(
    self,
    source: Source,
    batches: Any,
    rows: Sequence[int] | None,
    identity: dict[str, Any],
    workers: int,
  ):
    self._source, self._batches, self._rows = source, batches, rows
    self._identity, self._workers = identity, workers
    self.given = 0
    self._iterator: Any = None

  def __iter__(self) -> "BatchIterator":
    return self

  def __next__(self) -> list[Example]:
    if self._iterator is None:
      self._iterator = self._start()
    batch = next(self._iterator)
    self.given += 1
    return batch

  def _start(self) -> Any:
    import grain

    # The buffer is small, because its elements are batches of encoded images. The threads are few,
    # because a model that runs on the CPU uses the same cores.
    read_options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = self._batches[self.given :].map(_Read(self._source, self._rows))
    stream = batches.to_iter_dataset(read_options)
    if self._workers:
      stream = stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
      )
    return iter(stream)

  def get_state(self) -> dict[str, Any]:
    """Returns the state of the iterator as a dict of JSON values."""
    return {"batches": self.given, **self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves the iterator to the position at which `get_state` returned `state`.

    Raises:
      UserError: The state belongs to another dataset or other settings, so that the iterator would
        skip or repeat examples.
    """
    for field, value in self._identity.items():
      if state.get(field) != value:
        raise UserError(f"cannot resume the data: {field} was {state.get(field)!r}, now {value!r}")
    self.close()
    self.given = int(state["batches"])

  def example(self, batch: int, row: int) -> Example:
    """Returns one example of a batch, which may be in a row that another process reads.

    Args:
      batch: Index of the batch.
      row: Index of the example in the batch.
    """
    return self._source[int(self._batches[batch][row])]

  def close(self) -> None:
    """Stops the worker processes."""
    if self._iterator is not None and hasattr(self._iterator, "close"):
      self._iterator.close()
    self._iterator = None


def make_iterator(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  shuffle: bool = True,
  repeat: bool = True,
  workers: int = 0,
  rows: Sequence[int] | None = None,
  drop_remainder: bool = True,
) -> BatchIterator:
  """Creates an iterator over batches of a source. The arguments determine the order of examples.

  Args:
    source: A random-access sequence of examples.
    batch_size: Number of examples in a batch, over all hosts.
    seed: Seed of the shuffles.
    shuffle: Whether to shuffle every epoch, each in another order. Otherwise examples come in the
      order of the source.
    repeat: Whether to repeat the source without end. A batch may span two epochs, so no example is
      dropped.
    workers: Number of processes that read. 0 reads in threads of the current process.
    rows: Indices in a batch, 0 .. batch_size - 1, of the examples that this host reads. None reads
      all of them.
    drop_remainder: Whether to drop a last batch that is not full. It has no effect with `repeat`.

  Raises:
    UserError: The source has too few examples for a single batch.
  """
  import grain  # imports parts of jax

  size = len(source)
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected at least 1")
  if not size or (drop_remainder and not repeat and size < batch_size):
    raise UserError(f"the dataset has {size} examples: too few for a batch of {batch_size}")
  indices: Any = range(size)
  dataset: Any = grain.MapDataset.source(indices)
  if shuffle:
    # grain shuffles epoch e with seed + e. The seed is hashed because otherwise epoch 1 of a run
    # would have the order of epoch 0 of the run with the next seed.
    dataset = dataset.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
  if repeat:
    dataset = dataset.repeat()
  batches = dataset.batch(batch_size, drop_remainder=drop_remainder, batch_fn=_as_list)
  identity = {
    "examples": size,
    "batch_size": batch_size,
    "seed": seed,
    "shuffle": shuffle,
    "repeat": repeat,
  }
  return BatchIterator(source, batches, rows, identity, workers)


def _as_list(indices: Sequence[int]) -> list[int]:
  return list(indices)


class _Read:
  """Reads the examples of a batch from their indices. Sent to worker processes."""

  def __init__(self, source: Source, rows: Sequence[int] | None):
    self._source, self._rows = source, rows

  def __call__(self, indices: list[int]) -> list[Example]:
    rows = range(len(indices)) if self._rows is None else self._rows
    return [self._source[int(indices[row])] for row in rows if row < len(indices)]

"""From a source to an endless, resumable stream of batches of examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_vlm.data.sources import Source
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.example import Example


class BatchIterator:
  """Iterates over lists of examples; made by `make_iterator`.

  The state is the number of batches given so far: what comes next depends on it and on the
  arguments of `make_iterator` alone, not on the number of workers, nor on who reads which rows.

  Attributes:
    given: that number, which is also that of the next batch.
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

    # A little ahead of the consumer: elements are whole batches of encoded images, and
    # preparation shares the cores with a model that may run on them too.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = self._batches[self.given :].map(_Read(self._source, self._rows))
    stream = batches.to_iter_dataset(ahead)
    if self._workers:
      stream = stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
      )
    return iter(stream)

  def get_state(self) -> dict[str, Any]:
    """Where the iterator stands, JSON-like."""
    return {"batches": self.given, **self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `state` was taken.

    Raises:
      UserError: the state is of another dataset or of other settings: it would skip or repeat
        examples.
    """
    for field, value in self._identity.items():
      if state.get(field) != value:
        raise UserError(f"cannot resume the data: {field} was {state.get(field)!r}, now {value!r}")
    self.close()
    self.given = int(state["batches"])

  def example(self, batch: int, row: int) -> Example:
    """One of those that a batch has, whoever reads it."""
    return self._source[int(self._batches[batch][row])]

  def close(self) -> None:
    """Ends the worker processes."""
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
  """Batches of a source's examples in an order that is a function of the arguments.

  Args:
    source: random access to examples.
    batch_size: examples in a batch, of all hosts together.
    seed: of the shuffles.
    shuffle: each epoch in an order of its own; otherwise as in the source.
    repeat: epoch after epoch, without end; a batch may span two epochs, so nothing is dropped.
    workers: processes that read; 0 reads in threads of this one.
    rows: those of a batch that this host reads, 0 .. batch_size - 1; None is all.
    drop_remainder: without repeat, leaves out a last batch that is not full.

  Raises:
    UserError: there are too few examples for a single batch.
  """
  import grain  # it imports parts of jax

  size = len(source)
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected at least 1")
  if not size or (drop_remainder and not repeat and size < batch_size):
    raise UserError(f"the dataset has {size} examples: too few for a batch of {batch_size}")
  numbers: Any = range(size)
  dataset: Any = grain.MapDataset.source(numbers)
  if shuffle:
    # Epoch e is shuffled with seed + e: neighbouring seeds must not be each other's epochs.
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


def _as_list(numbers: Sequence[int]) -> list[int]:
  return list(numbers)


class _Read:
  """The examples of a batch, from their numbers. Goes to worker processes."""

  def __init__(self, source: Source, rows: Sequence[int] | None):
    self._source, self._rows = source, rows

  def __call__(self, numbers: list[int]) -> list[Example]:
    rows = range(len(numbers)) if self._rows is None else self._rows
    return [self._source[int(numbers[row])] for row in rows if row < len(numbers)]

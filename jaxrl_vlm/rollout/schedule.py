"""Host-side bookkeeping of a rollout: which sample is decoded in which row of the decoding batch.

The sampler decodes responses of different lengths together, a chunk of tokens at a time. After each
chunk, the responses that have ended leave the batch and waiting prompts take the free rows. When no
prompt waits, the remaining sequences are compacted into a smaller layout, so that a few long
responses do not keep the whole batch busy.

The decoding batch has R shards, one for each index along the mesh axes that split prompts
(`parallel.ROWS`). Each shard has C sequences (rows that decode one sample each) and S prefix slots
(each caches the keys and values of one prompt). A group is the G samples of one prompt.

This module uses numpy only and keeps no arrays on the device.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """Size of one shard of the decoding batch. Each layout is compiled to a program of its own.

  Attributes:
    sequences: C, the number of responses that are decoded at once.
    prefixes: S, the number of prefix slots.
  """

  sequences: int
  prefixes: int


def ladder(layout: Layout, fewest: int = 8) -> list[Layout]:
  """Returns the layouts of a rollout, from `layout` down to at most `fewest` sequences.

  Each layout has half as many sequences as the one before it. The list does not depend on the
  lengths of the responses, so the programs are compiled once for all rollouts, and a response is
  computed in the same way whatever was decoded before it.
  """
  rungs = [layout]
  while rungs[-1].sequences > fewest:
    sequences = -(-rungs[-1].sequences // 2)
    rungs.append(Layout(sequences, min(layout.prefixes, sequences)))
  return rungs


@dataclasses.dataclass(frozen=True)
class Prefill:
  """The prompts that one call of the prefill program starts: up to A in each of R shards.

  Attributes:
    prompts: i32[R, A]; index of the prompt in its shard. Unused entries have any valid index.
    prefix_slots: i32[R, A]; the prefix slot that receives the keys and values of the prompt. S in
      unused entries.
    sequences: i32[R, A, G]; the sequences that decode the samples of the prompt. C in unused
      entries.
  """

  prompts: np.ndarray
  prefix_slots: np.ndarray
  sequences: np.ndarray


class Schedule:
  """Assigns the G samples of each prompt to sequences, and prompts to prefix slots.

  Attributes:
    layout: the current layout.
    sample: i32[R, C]; index of the sample in its shard (prompt · G + sample), or -1 if the sequence
      is free.
    prompt: i32[R, S]; index of the prompt in its shard, or -1 if the prefix slot is free.
  """

  def __init__(self, prompts: int, group: int, shards: int, layouts: Sequence[Layout]):
    """Creates a schedule in which no prompt has started.

    Args:
      prompts: number of prompts in each shard.
      group: G, the number of samples of each prompt.
      shards: R.
      layouts: the layouts to use one after another, the first one from the start (see `ladder`).
    """
    self.group, self._prompts = group, prompts
    layout, *self._smaller = layouts
    self.layout = layout
    self.sample = np.full((shards, layout.sequences), -1, np.int32)
    self.prompt = np.full((shards, layout.prefixes), -1, np.int32)
    self._next = [0] * shards  # the first prompt of each shard that has not started

  @property
  def waiting(self) -> bool:
    """Whether some prompt has not started."""
    return any(first < self._prompts for first in self._next)

  @property
  def alive(self) -> np.ndarray:
    """bool[R, C]; the sequences that decode a sample."""
    return self.sample >= 0

  def prefill(self, most: int) -> Prefill | None:
    """Starts up to `most` (A) waiting prompts in each shard.

    Returns:
      The assignment of the prompts. None if no shard has room for all of its next `most` prompts
      (fewer if fewer are waiting), or if no prompt is waiting.
    """
    shards, group = len(self.prompt), self.group
    rooms = [
      min(int((self.prompt[r] < 0).sum()), int((~self.alive[r]).sum()) // group)
      for r in range(shards)
    ]
    left = [self._prompts - first for first in self._next]
    counts = [min(most, room, wait) for room, wait in zip(rooms, left, strict=True)]
    if not any(
      count and count == min(most, wait) for count, wait in zip(counts, left, strict=True)
    ):
      return None
    prompts = np.zeros((shards, most), np.int32)
    slots = np.full((shards, most), self.layout.prefixes, np.int32)
    sequences = np.full((shards, most, group), self.layout.sequences, np.int32)
    for r, count in enumerate(counts):
      new = self._next[r] + np.arange(count, dtype=np.int32)
      prompts[r, :count] = new
      slots[r, :count] = np.flatnonzero(self.prompt[r] < 0)[:count]
      sequences[r, :count] = np.flatnonzero(~self.alive[r])[: count * group].reshape(count, group)
      self.prompt[r, slots[r, :count]] = new
      self.sample[r, sequences[r, :count]] = new[:, None] * group + np.arange(group)
      self._next[r] += count
    return Prefill(prompts, slots, sequences)

  def retire(self, done: np.ndarray) -> None:
    """Frees the sequences in `done` bool[R, C], and the prefix slots that no sequence needs."""
    self.sample[done] = -1
    for r in range(len(self.prompt)):
      live = np.unique(self.sample[r][self.alive[r]] // self.group)
      self.prompt[r][~np.isin(self.prompt[r], live)] = -1

  def group_by_prompt(self) -> tuple[np.ndarray, np.ndarray]:
    """Orders the sequences by prefix slot.

    Returns:
      `query_of_sequence` i32[R, C] and `sequence_of_query` i32[R, S·G], as
      `models.decoder.DecodeCache` defines them.
    """
    width = self.group
    query = np.zeros(self.sample.shape, np.int32)
    sequence = np.zeros((len(self.prompt), self.layout.prefixes * width), np.int32)
    for r, prompts in enumerate(self.prompt):
      for slot in np.flatnonzero(prompts >= 0):
        members = np.flatnonzero(self.alive[r] & (self.sample[r] // self.group == prompts[slot]))
        queries = slot * width + np.arange(len(members))
        query[r, members], sequence[r, queries] = queries, members
    return query, sequence

  def smaller(self) -> Layout | None:
    """Returns the next layout if no prompt waits and the remaining sequences fit, else None."""
    if self.waiting or not self._smaller:
      return None
    return self._smaller[0] if self.alive.sum(axis=1).max() <= self._smaller[0].sequences else None

  def compact(self) -> tuple[np.ndarray, np.ndarray]:
    """Switches to the next layout.

    Returns:
      For each sequence of the new layout, its index in the old layout, i32[R, C'], and the same for
      prefix slots, i32[R, S']. A free entry has the old C or S, one more than the last old index.
    """
    layout = self._smaller.pop(0)

    def order(values, size):
      old = np.full((len(values), size), values.shape[1], np.int32)
      for r, row in enumerate(values):
        taken = np.flatnonzero(row >= 0)
        old[r, : len(taken)] = taken
      padded = np.pad(values, ((0, 0), (0, 1)), constant_values=-1)
      return old, np.take_along_axis(padded, old, axis=1)

    sequences, self.sample = order(self.sample, layout.sequences)
    prefix_slots, self.prompt = order(self.prompt, layout.prefixes)
    self.layout = layout
    return sequences, prefix_slots

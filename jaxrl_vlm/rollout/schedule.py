"""Which response is decoded where: host-side bookkeeping, no arrays on the device.

Responses of very different length are decoded together, a chunk of tokens at a time. Between two
chunks those that have ended leave, waiting prompts take the free places, and when none wait the
survivors move together into a smaller layout, so that the longest response does not set the price
of all.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sizes of a part of the batch while it is decoded; each layout is a compiled program.

  Attributes:
    cells: C, responses that are decoded at once.
    slots: S, prompts whose keys and values are held.
  """

  cells: int
  slots: int


def ladder(layout: Layout, fewest: int = 8) -> list[Layout]:
  """The layouts that survivors move through, each of half the cells, down to `fewest` or less.

  It is the same for every rollout: its programs are compiled once, and no response is computed
  otherwise because of what was decoded before it.
  """
  rungs = [layout]
  while rungs[-1].cells > fewest:
    cells = -(-rungs[-1].cells // 2)
    rungs.append(Layout(cells, min(layout.slots, cells)))
  return rungs


@dataclasses.dataclass(frozen=True)
class Admission:
  """Prompts that begin, up to A in each of R parts.

  Attributes:
    rows: i32[R, A]; number of the prompt in its part; any where none begins.
    slots: i32[R, A]; where its keys and values go; S where none begins.
    cells: i32[R, A, G]; where its samples go; C where none begins.
  """

  rows: np.ndarray
  slots: np.ndarray
  cells: np.ndarray


class Schedule:
  """Where the G samples of each prompt are while they are decoded.

  Attributes:
    layout: of now.
    sample: i32[R, C]; number of the sample in its part (prompt · G + sample), -1 in a free cell.
    prompt: i32[R, S]; number of the prompt in its part, -1 in a free slot.
  """

  def __init__(self, prompts: int, group: int, parts: int, layouts: Sequence[Layout]):
    """`prompts`: of each part; `layouts`: what it may move through, the first to begin with."""
    self.group, self._prompts = group, prompts
    layout, *self._smaller = layouts
    self.layout = layout
    self.sample = np.full((parts, layout.cells), -1, np.int32)
    self.prompt = np.full((parts, layout.slots), -1, np.int32)
    self._next = [0] * parts  # the first prompt of each part that has not begun

  @property
  def waiting(self) -> bool:
    """Whether some prompt has not begun."""
    return any(first < self._prompts for first in self._next)

  @property
  def alive(self) -> np.ndarray:
    """bool[R, C]; cells that hold a sample."""
    return self.sample >= 0

  def admit(self, most: int) -> Admission | None:
    """Lets up to `most` prompts begin in each part, if there is room for as many in one of them.

    None if not, or if no prompt waits.
    """
    parts, group = len(self.prompt), self.group
    rooms = [
      min(int((self.prompt[r] < 0).sum()), int((~self.alive[r]).sum()) // group)
      for r in range(parts)
    ]
    left = [self._prompts - first for first in self._next]
    counts = [min(most, room, wait) for room, wait in zip(rooms, left, strict=True)]
    if not any(
      count and count == min(most, wait) for count, wait in zip(counts, left, strict=True)
    ):
      return None
    rows = np.zeros((parts, most), np.int32)
    slots = np.full((parts, most), self.layout.slots, np.int32)
    cells = np.full((parts, most, group), self.layout.cells, np.int32)
    for r, count in enumerate(counts):
      new = self._next[r] + np.arange(count, dtype=np.int32)
      rows[r, :count] = new
      slots[r, :count] = np.flatnonzero(self.prompt[r] < 0)[:count]
      cells[r, :count] = np.flatnonzero(~self.alive[r])[: count * group].reshape(count, group)
      self.prompt[r, slots[r, :count]] = new
      self.sample[r, cells[r, :count]] = new[:, None] * group + np.arange(group)
      self._next[r] += count
    return Admission(rows, slots, cells)

  def retire(self, done: np.ndarray) -> None:
    """Frees the cells whose sample has ended, bool[R, C], and the slots that nobody stands on."""
    self.sample[done] = -1
    for r in range(len(self.prompt)):
      live = np.unique(self.sample[r][self.alive[r]] // self.group)
      self.prompt[r][~np.isin(self.prompt[r], live)] = -1

  def places(self) -> tuple[np.ndarray, np.ndarray]:
    """`place` i32[R, C] and `cell` i32[R, S·G] of `models.decoder.Cells`."""
    width = self.group
    place = np.zeros(self.sample.shape, np.int32)
    cell = np.zeros((len(self.prompt), self.layout.slots * width), np.int32)
    for r, prompts in enumerate(self.prompt):
      for slot in np.flatnonzero(prompts >= 0):
        mine = np.flatnonzero(self.alive[r] & (self.sample[r] // self.group == prompts[slot]))
        at = slot * width + np.arange(len(mine))
        place[r, mine], cell[r, at] = at, mine
    return place, cell

  def smaller(self) -> Layout | None:
    """The next layout, once nobody waits and the survivors fit into it."""
    if self.waiting or not self._smaller:
      return None
    return self._smaller[0] if self.alive.sum(axis=1).max() <= self._smaller[0].cells else None

  def move(self) -> tuple[np.ndarray, np.ndarray]:
    """Moves to the next layout. Returns the old cells [R, C'] and slots [R, S'] in new order.

    A free place has the number after the last old one.
    """
    layout = self._smaller.pop(0)

    def order(values, size):
      old = np.full((len(values), size), values.shape[1], np.int32)
      for r, row in enumerate(values):
        taken = np.flatnonzero(row >= 0)
        old[r, : len(taken)] = taken
      padded = np.pad(values, ((0, 0), (0, 1)), constant_values=-1)
      return old, np.take_along_axis(padded, old, axis=1)

    cells, self.sample = order(self.sample, layout.cells)
    slots, self.prompt = order(self.prompt, layout.slots)
    self.layout = layout
    return cells, slots

"""Which response is decoded where: host-side bookkeeping, no arrays on the device.

Responses of very different length are decoded together, a chunk of tokens at a time. Between two
chunks those that have ended leave, waiting prompts take the free places, and when none wait the
survivors move together into a smaller layout, so that the longest response does not set the price
of all.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sizes of a part of the batch while it is decoded; each layout is a compiled program.

  Attributes:
    cells: C, responses that are decoded at once.
    slots: S, prompts whose keys and values are held.
    width: W, the most responses of one prompt.
  """

  cells: int
  slots: int
  width: int


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

  def __init__(self, prompts: int, group: int, parts: int, layout: Layout):
    """`prompts`: of each part."""
    self.group, self.layout, self._prompts = group, layout, prompts
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
    rooms = [min(int((self.prompt[r] < 0).sum()), int((~self.alive[r]).sum()) // group)
             for r in range(parts)]
    left = [self._prompts - first for first in self._next]
    counts = [min(most, room, wait) for room, wait in zip(rooms, left, strict=True)]
    if not any(count and count == min(most, wait)
               for count, wait in zip(counts, left, strict=True)):
      return None
    rows = np.zeros((parts, most), np.int32)
    slots = np.full((parts, most), self.layout.slots, np.int32)
    cells = np.full((parts, most, group), self.layout.cells, np.int32)
    for r, count in enumerate(counts):
      new = self._next[r] + np.arange(count, dtype=np.int32)
      rows[r, :count] = new
      slots[r, :count] = np.flatnonzero(self.prompt[r] < 0)[:count]
      cells[r, :count] = np.flatnonzero(~self.alive[r])[:count * group].reshape(count, group)
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
    """`place` i32[R, C] and `cell` i32[R, S·W] of `models.decoder.Cells`."""
    width = self.layout.width
    place = np.zeros(self.sample.shape, np.int32)
    cell = np.zeros((len(self.prompt), self.layout.slots * width), np.int32)
    for r, prompts in enumerate(self.prompt):
      for slot in np.flatnonzero(prompts >= 0):
        mine = np.flatnonzero(self.alive[r] & (self.sample[r] // self.group == prompts[slot]))
        at = slot * width + np.arange(len(mine))
        place[r, mine], cell[r, at] = at, mine
    return place, cell

  def smaller(self, cost: Callable[[Layout], float], known: Collection[Layout], new: bool
              ) -> Layout | None:
    """The cheapest layout into which the survivors fit, if it is worth moving.

    Args:
      cost: of a step in a layout.
      known: layouts that are compiled already.
      new: whether another one may be compiled.
    """
    if self.waiting or not self.alive.any():
      return None
    counts = [np.unique(self.sample[r][self.alive[r]] // self.group, return_counts=True)[1]
              for r in range(len(self.sample))]
    need = Layout(int(self.alive.sum(axis=1).max()), max(len(c) for c in counts),
                  max(int(c.max()) for c in counts if len(c)))
    now = dataclasses.astuple(self.layout)
    best = Layout(*itertools.starmap(_halved, zip(now, dataclasses.astuple(need), strict=True)))
    fitting = [layout for layout in known if _fits(need, layout)]
    at_hand = min((cost(layout) for layout in fitting), default=cost(self.layout))
    if new and cost(best) < 0.7 * min(at_hand, cost(self.layout)):
      return best
    cheapest = min(fitting, key=cost, default=None)
    return cheapest if cheapest and cost(cheapest) < 0.9 * cost(self.layout) else None

  def move(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Moves the survivors together. Returns the old cells [R, C'] and slots [R, S'] in new order.

    A free place has the number after the last old one.
    """
    def order(values, size):
      old = np.full((len(values), size), values.shape[1], np.int32)
      for r, row in enumerate(values):
        taken = np.flatnonzero(row >= 0)
        old[r, :len(taken)] = taken
      padded = np.pad(values, ((0, 0), (0, 1)), constant_values=-1)
      return old, np.take_along_axis(padded, old, axis=1)

    cells, self.sample = order(self.sample, layout.cells)
    slots, self.prompt = order(self.prompt, layout.slots)
    self.layout = layout
    return cells, slots


def _halved(size: int, need: int) -> int:
  """`size`, halved as often as it stays at least `need`."""
  while size > 1 and -(-size // 2) >= need:
    size = -(-size // 2)
  return size


def _fits(need: Layout, layout: Layout) -> bool:
  return all(a <= b for a, b in zip(
      dataclasses.astuple(need), dataclasses.astuple(layout), strict=True))

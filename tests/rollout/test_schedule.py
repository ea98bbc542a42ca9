"""Where each response is decoded: nobody is lost, nobody meets a stranger, a tail costs little."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_vlm.rollout.schedule import Layout, Schedule, ladder


def run(lengths, groups, most, log=None):
  """Decodes lengths [R, P, G] (in chunks) on paper. Returns the cells that were paid for."""
  parts, prompts, group = lengths.shape
  slots = min(prompts, 2 * groups)
  schedule = Schedule(prompts, group, parts, ladder(Layout(groups * group, slots), fewest=1))
  # What each cell and slot really holds, moved as the device moves it.
  held = np.full(schedule.sample.shape, -1)
  prefix = np.full(schedule.prompt.shape, -1)
  age = np.zeros((parts, prompts * group), int)
  paid = 0

  def moved(a, index):
    return np.take_along_axis(np.pad(a, ((0, 0), (0, 1)), constant_values=-1), index, axis=1)

  while schedule.waiting or schedule.alive.any():
    while (admitted := schedule.admit(most)) is not None:
      for r, i in np.ndindex(admitted.rows.shape):
        if admitted.slots[r, i] < schedule.layout.slots:
          row = prefix[r, admitted.slots[r, i]] = admitted.rows[r, i]
          held[r, admitted.cells[r, i]] = row * group + np.arange(group)
    while schedule.smaller():
      cells, slots = schedule.move()
      held, prefix = moved(held, cells), moved(prefix, slots)
    alive = schedule.alive
    np.testing.assert_array_equal(held[alive], schedule.sample[alive])
    place, cell = schedule.places()
    for r in range(parts):
      mine = np.flatnonzero(alive[r])
      assert len(set(place[r, mine])) == len(mine)
      np.testing.assert_array_equal(cell[r, place[r, mine]], mine)
      # Each stands on its own prompt.
      np.testing.assert_array_equal(prefix[r, place[r, mine] // group], held[r, mine] // group)
    paid += parts * schedule.layout.cells
    if log is not None:
      log.append(schedule.layout)
    done = np.zeros(alive.shape, bool)
    for r, c in zip(*np.nonzero(alive), strict=True):
      age[r, held[r, c]] += 1
      done[r, c] = age[r, held[r, c]] == lengths.reshape(parts, -1)[r, held[r, c]]
    schedule.retire(done)
  np.testing.assert_array_equal(age, lengths.reshape(parts, -1))
  return paid


@settings(max_examples=60, deadline=None)
@given(
  st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31)
)
def test_every_sample_is_decoded_once_beside_its_own_prompt(parts, prompts, group, groups, seed):
  lengths = np.random.default_rng(seed).integers(1, 7, (parts, prompts, group))
  groups = min(groups, prompts)
  run(lengths, groups, most=max(1, groups // 2))


def test_a_ladder_halves_the_cells():
  assert ladder(Layout(40, 5)) == [Layout(40, 5), Layout(20, 5), Layout(10, 5), Layout(5, 5)]
  assert ladder(Layout(12, 12), fewest=3) == [Layout(12, 12), Layout(6, 6), Layout(3, 3)]
  assert ladder(Layout(8, 4)) == [Layout(8, 4)]


def test_the_longest_does_not_set_the_price():
  lengths = np.ones((1, 16, 8), int)
  lengths[0, 3, 5] = 40
  log = []
  assert run(lengths, 16, 16, log=log) == 128 + 39
  assert log == [Layout(128, 16)] + [Layout(1, 1)] * 39


def test_waiting_prompts_take_free_places():
  """A long tail: sum of lengths, not waves of the longest."""
  lengths = np.ceil(np.random.default_rng(0).lognormal(1.0, 0.8, (1, 64, 8))).astype(int)
  waves = lengths.reshape(8, -1).max(axis=1).sum() * 64
  paid = run(lengths, 8, 2)
  assert paid < 1.35 * lengths.sum() < 0.45 * waves


@pytest.mark.parametrize("most", [1, 4])
def test_prompts_begin_in_order(most):
  schedule = Schedule(4, 2, 1, [Layout(8, 4)])
  rows = []
  while (new := schedule.admit(most)) is not None:
    rows += new.rows[0].tolist()
  assert rows == [0, 1, 2, 3] and not schedule.waiting

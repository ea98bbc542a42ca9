"""The schedule decodes every sample exactly once, next to its own prompt, in few sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_vlm.rollout.schedule import Layout, Schedule, ladder


def run(lengths, groups, most, log=None):
  """Simulates a rollout of responses of the given lengths [R, P, G], in chunks.

  Returns the number of sequences computed, summed over all chunks.
  """
  shards, prompts, group = lengths.shape
  prefixes = min(prompts, 2 * groups)
  schedule = Schedule(prompts, group, shards, ladder(Layout(groups * group, prefixes), fewest=1))
  # The content of each sequence and prefix slot, updated as the device updates it.
  held = np.full(schedule.sample.shape, -1)
  prefix = np.full(schedule.prompt.shape, -1)
  age = np.zeros((shards, prompts * group), int)
  computed = 0

  def compacted(a, index):
    return np.take_along_axis(np.pad(a, ((0, 0), (0, 1)), constant_values=-1), index, axis=1)

  while schedule.waiting or schedule.alive.any():
    while (started := schedule.prefill(most)) is not None:
      for r, i in np.ndindex(started.prompts.shape):
        if started.prefix_slots[r, i] < schedule.layout.prefixes:
          row = prefix[r, started.prefix_slots[r, i]] = started.prompts[r, i]
          held[r, started.sequences[r, i]] = row * group + np.arange(group)
    while schedule.smaller():
      sequences, prefix_slots = schedule.compact()
      held, prefix = compacted(held, sequences), compacted(prefix, prefix_slots)
    alive = schedule.alive
    np.testing.assert_array_equal(held[alive], schedule.sample[alive])
    query, sequence = schedule.group_by_prompt()
    for r in range(shards):
      live = np.flatnonzero(alive[r])
      assert len(set(query[r, live])) == len(live)
      np.testing.assert_array_equal(sequence[r, query[r, live]], live)
      # Each sequence attends to the prefix of its own prompt.
      np.testing.assert_array_equal(prefix[r, query[r, live] // group], held[r, live] // group)
    computed += shards * schedule.layout.sequences
    if log is not None:
      log.append(schedule.layout)
    done = np.zeros(alive.shape, bool)
    for r, c in zip(*np.nonzero(alive), strict=True):
      age[r, held[r, c]] += 1
      done[r, c] = age[r, held[r, c]] == lengths.reshape(shards, -1)[r, held[r, c]]
    schedule.retire(done)
  np.testing.assert_array_equal(age, lengths.reshape(shards, -1))
  return computed


@settings(max_examples=60, deadline=None)
@given(
  st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31)
)
def test_every_sample_is_decoded_once_with_its_own_prompt(shards, prompts, group, groups, seed):
  lengths = np.random.default_rng(seed).integers(1, 7, (shards, prompts, group))
  groups = min(groups, prompts)
  run(lengths, groups, most=max(1, groups // 2))


def test_each_layout_of_the_ladder_has_half_the_sequences():
  assert ladder(Layout(40, 5)) == [Layout(40, 5), Layout(20, 5), Layout(10, 5), Layout(5, 5)]
  assert ladder(Layout(12, 12), fewest=3) == [Layout(12, 12), Layout(6, 6), Layout(3, 3)]
  assert ladder(Layout(8, 4)) == [Layout(8, 4)]


def test_a_single_long_response_is_decoded_in_the_smallest_layout():
  lengths = np.ones((1, 16, 8), int)
  lengths[0, 3, 5] = 40
  log = []
  assert run(lengths, 16, 16, log=log) == 128 + 39
  assert log == [Layout(128, 16)] + [Layout(1, 1)] * 39


def test_waiting_prompts_take_free_sequences():
  """With long-tailed lengths, the cost is close to the sum of lengths.

  Without reuse of free sequences, each batch of 8 groups would run until its longest response ends.
  """
  lengths = np.ceil(np.random.default_rng(0).lognormal(1.0, 0.8, (1, 64, 8))).astype(int)
  without_reuse = lengths.reshape(8, -1).max(axis=1).sum() * 64
  computed = run(lengths, 8, 2)
  assert computed < 1.35 * lengths.sum() < 0.45 * without_reuse


@pytest.mark.parametrize("most", [1, 4])
def test_prompts_start_in_order(most):
  schedule = Schedule(4, 2, 1, [Layout(8, 4)])
  prompts = []
  while (new := schedule.prefill(most)) is not None:
    prompts += new.prompts[0].tolist()
  assert prompts == [0, 1, 2, 3] and not schedule.waiting

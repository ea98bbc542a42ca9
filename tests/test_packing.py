"""Every token of every response stands in exactly one block, and few blocks hold nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_vlm.packing import Packer, balanced


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
       st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_every_token_once(splits, devices, here, group, size, tile, seed):
  rng = np.random.default_rng(seed)
  longest = 13
  each = -(-longest // size)
  lengths = rng.integers(0, longest + 1, (splits * devices * here, group))
  room = -(-(each + int(rng.integers(0, 5))) // tile) * tile
  packer = Packer(splits, devices, size, room, tile)
  index, used = packer(lengths, longest)
  # By hand: prompt i·splits + piece; a device has neighbouring i.
  for piece in range(splits):
    prompts = np.arange(piece, len(lengths), splits).reshape(devices, here)
    for device in range(devices):
      mine = index[piece, :, device]
      assert (mine[used[piece]:] == here * group * each).all()
      for part in mine:
        held = part[part < here * group * each]
        # Those of a response are all there, one after another, from its first.
        for response in np.unique(held // each):
          i, g = divmod(int(response), group)
          numbers = held[held // each == response] % each
          wanted = -(-lengths[prompts[device, i], g] // size)
          np.testing.assert_array_equal(numbers, np.arange(wanted))
          assert (np.diff(np.flatnonzero(held // each == response)) == 1).all()
        # No tile holds two prompts, and what holds nothing stands behind the rest of it.
        for blocks in part.reshape(-1, tile):
          real = blocks < here * group * each
          assert len(set((blocks[real] // each // group).tolist())) <= 1
          assert (np.diff(real.astype(int)) <= 0).all()
      held = mine[mine < here * group * each]
      assert len(set(held.tolist())) == len(held)
      assert len(held) == (-(-lengths[prompts[device]] // size)).sum()


def test_little_is_padding():
  """Log-normal lengths, 64 prompts of 8 responses: computed tokens against real ones."""
  lengths = np.ceil(np.random.default_rng(0).lognormal(6.0, 0.8, (64, 8))).clip(1, 2048).astype(int)
  for tile, most in ((1, 0.1), (4, 0.13)):
    _, used = Packer(4, 1, 64, 64, tile)(lengths, 2048)
    computed = used.sum() * 64 * 64
    assert 1 - lengths.sum() / computed < most
  assert lengths.sum() / (lengths.size * 2048) < 0.3  # what padding to the longest would keep


def test_room_for_the_longest():
  with pytest.raises(ValueError, match="room=3: expected a multiple of tile=1, at least the 4 blo"):
    Packer(1, 1, 16, 3)(np.ones((2, 2), int), 64)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4),
       st.integers(0, 2**31))
def test_balanced_moves_nobody_to_another_minibatch(devices, microbatches, minibatches, here, seed):
  loads = np.random.default_rng(seed).integers(0, 1000, devices * microbatches * minibatches * here)
  order = balanced(loads, devices, microbatches, minibatches)
  np.testing.assert_array_equal(np.sort(order), np.arange(len(loads)))
  np.testing.assert_array_equal(order % minibatches, np.arange(len(loads)) % minibatches)


def test_balanced_by_hand():
  """Two devices, two microbatches: the long ones first, 9 and 6 beside 8 and 7."""
  loads = np.array([1, 9, 2, 8, 3, 7, 4, 6])
  # Of a device: prompt i of its share, microbatch by microbatch.
  by_device = loads[balanced(loads, 2, 2)].reshape(2, 2, 2)
  assert by_device[:, :, 0].tolist() == [[9, 6], [8, 7]]
  assert by_device[:, :, 1].tolist() == [[4, 1], [3, 2]]


@pytest.mark.parametrize(("devices", "microbatches"), [(8, 1), (1, 4), (8, 4)])
def test_less_is_padding_in_balance(devices, microbatches):
  """128 prompts of 8 responses: computed tokens against real ones, as they come and in balance."""
  def padding(lengths):
    _, used = Packer(microbatches, devices, 64, 32, 4)(lengths, 1024)
    return 1 - lengths.sum() / (used.sum() * devices * 32 * 64)

  found = []
  for seed in range(3):
    lengths = np.random.default_rng(seed).lognormal(5.3, 0.8, (128, 8))
    lengths = np.ceil(lengths).clip(1, 1024).astype(int)
    order = balanced(lengths.sum(axis=1), devices, microbatches)
    found.append((padding(lengths), padding(lengths[order])))
  before, after = np.mean(found, axis=0)
  assert after <= before if devices * microbatches < 8 else after < before - 0.03

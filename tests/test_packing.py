"""Every token of every response stands in exactly one block, and few blocks hold nothing."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_vlm import models, objectives, parallel, scratch
from jaxrl_vlm.packing import Packer, balanced
from jaxrl_vlm.stages import programs
from tests import tiny_run


@settings(max_examples=60, deadline=None)
@given(
  st.integers(1, 3),
  st.integers(1, 3),
  st.integers(1, 4),
  st.integers(1, 4),
  st.integers(1, 5),
  st.integers(1, 3),
  st.integers(0, 2**31),
)
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
      assert (mine[used[piece] :] == here * group * each).all()
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


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("most", [1024, 2048, 4096])
@pytest.mark.parametrize(
  ("devices", "microbatches", "prompts"), [(1, 1, 64), (1, 4, 64), (8, 1, 128), (8, 4, 512)]
)
def test_little_is_padding(devices, microbatches, prompts, most, kernel, monkeypatch):
  """Of what a stage computes with its defaults; log-normal lengths, a quarter of the limit."""
  config = dataclasses.replace(
    scratch.model_config(tiny_run.ARCHITECTURE), attention="splash" if kernel else "xla"
  )
  program = programs.Programs(
    models.VLM(config),
    parallel.make_mesh({"fsdp": devices}, jax.devices()[:devices]),
    objectives.create("sft"),
    optax.sgd(0.0),
    models.abstract_params(config),
    microbatches=microbatches,
  )

  def padding(mask):
    packing = program.packed(mask)
    return 1 - mask.sum() / (packing.used.sum() * devices * packing.index.shape[-1] * packing.size)

  masks = []
  for seed in range(3):
    lengths = np.random.default_rng(seed).lognormal(np.log(most) - 1.62, 0.8, (prompts, 8, 1))
    masks.append(np.arange(most) < lengths)
  dealt = np.mean([padding(mask) for mask in masks])
  assert dealt < 0.15
  if devices > 1:
    monkeypatch.setattr(programs, "balanced", lambda loads, *_: np.arange(len(loads)))
    assert np.mean([padding(mask) for mask in masks]) > dealt + 0.02


def test_room_for_the_longest():
  with pytest.raises(ValueError, match="room=3: expected a multiple of tile=1, at least the 4 blo"):
    Packer(1, 1, 16, 3)(np.ones((2, 2), int), 64)


@settings(max_examples=60, deadline=None)
@given(
  st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31)
)
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

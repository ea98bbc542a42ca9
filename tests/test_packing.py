"""Tests packing: every token of the responses is in exactly one block, and padding is rare."""

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
def test_every_token_is_in_exactly_one_block(splits, devices, share, group, size, tile, seed):
  """Each device has `share` prompts of each piece of the batch."""
  rng = np.random.default_rng(seed)
  longest = 13
  each = -(-longest // size)  # blocks of the longest response
  lengths = rng.integers(0, longest + 1, (splits * devices * share, group))
  room = -(-(each + int(rng.integers(0, 5))) // tile) * tile
  packer = Packer(splits, devices, size, room, tile)
  index, used = packer(lengths, longest)
  # A piece has the prompts i·splits + piece. A device has consecutive i.
  for piece in range(splits):
    prompts = np.arange(piece, len(lengths), splits).reshape(devices, share)
    for device in range(devices):
      passes = index[piece, :, device]
      empty = share * group * each  # the number that stands for an empty block
      assert (passes[used[piece] :] == empty).all()
      for one_pass in passes:
        filled = one_pass[one_pass < empty]
        # All blocks of a response are in the same pass, consecutive and in order.
        for response in np.unique(filled // each):
          i, g = divmod(int(response), group)
          numbers = filled[filled // each == response] % each
          expected = -(-lengths[prompts[device, i], g] // size)
          np.testing.assert_array_equal(numbers, np.arange(expected))
          assert (np.diff(np.flatnonzero(filled // each == response)) == 1).all()
        # A tile has blocks of one prompt. Its empty blocks come last.
        for blocks in one_pass.reshape(-1, tile):
          real = blocks < empty
          assert len(set((blocks[real] // each // group).tolist())) <= 1
          assert (np.diff(real.astype(int)) <= 0).all()
      filled = passes[passes < empty]
      assert len(set(filled.tolist())) == len(filled)
      assert len(filled) == (-(-lengths[prompts[device]] // size)).sum()


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("most", [1024, 2048, 4096])
@pytest.mark.parametrize(
  ("devices", "microbatches", "prompts"), [(1, 1, 64), (1, 4, 64), (8, 1, 128), (8, 4, 512)]
)
def test_less_than_15_percent_of_the_computed_tokens_is_padding(
  devices, microbatches, prompts, most, kernel, monkeypatch
):
  """Uses the defaults of a stage, and log-normal lengths with a mean of about `most` / 4."""
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
  balanced_padding = np.mean([padding(mask) for mask in masks])
  assert balanced_padding < 0.15
  if devices > 1:  # without balancing over devices, there is more padding
    monkeypatch.setattr(programs, "balanced", lambda loads, *_: np.arange(len(loads)))
    assert np.mean([padding(mask) for mask in masks]) > balanced_padding + 0.02


def test_a_pass_must_have_room_for_the_longest_response():
  with pytest.raises(ValueError, match="room=3: expected a multiple of tile=1, at least the 4 blo"):
    Packer(1, 1, 16, 3)(np.ones((2, 2), int), 64)


@settings(max_examples=60, deadline=None)
@given(
  st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31)
)
def test_balancing_keeps_every_prompt_in_its_minibatch(
  devices, microbatches, minibatches, share, seed
):
  count = devices * microbatches * minibatches * share
  loads = np.random.default_rng(seed).integers(0, 1000, count)
  order = balanced(loads, devices, microbatches, minibatches)
  np.testing.assert_array_equal(np.sort(order), np.arange(len(loads)))
  np.testing.assert_array_equal(order % minibatches, np.arange(len(loads)) % minibatches)


def test_balancing_deals_prompts_in_order_of_decreasing_load():
  """Two devices and two microbatches: the first microbatch has 9 and 6 beside 8 and 7."""
  loads = np.array([1, 9, 2, 8, 3, 7, 4, 6])
  # Axes: device, prompt of the device in a microbatch, microbatch.
  by_device = loads[balanced(loads, 2, 2)].reshape(2, 2, 2)
  assert by_device[:, :, 0].tolist() == [[9, 6], [8, 7]]
  assert by_device[:, :, 1].tolist() == [[4, 1], [3, 2]]

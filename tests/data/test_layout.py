"""Positions and windows of patches and position ids of tokens equal those of transformers."""

import numpy as np
import pytest
import torch
from transformers import vision_utils

from jaxrl_vlm.data import layout
from tests.data.reference import QWEN, hf_windows, partition, rope_index

IMAGE, VIDEO, TEXT = 300, 301, 7


def check_patches(grids, positions, sizes, segments):
  thw = torch.tensor(grids)
  np.testing.assert_array_equal(positions, vision_utils.get_vision_position_ids(thw, 2).numpy())
  lengths = vision_utils.get_vision_cu_seqlens(thw).diff()
  np.testing.assert_array_equal(segments, np.repeat(np.arange(len(lengths)) + 1, lengths))
  counts = [t * rows * cols for t, rows, cols in grids]
  np.testing.assert_array_equal(sizes, np.repeat(np.array(grids)[:, 1:], counts, axis=0))


@pytest.mark.parametrize("window_size", [28, 56, 100, 112])
def test_patches_equal_transformers_for_random_grids(window_size):
  rng = np.random.default_rng(0)
  for _ in range(20):
    grids = [
      (int(rng.integers(1, 4)), *(2 * rng.integers(1, 14, 2)).tolist())
      for _ in range(rng.integers(1, 4))
    ]
    positions, sizes, segments, windows = layout.lay_out_patches(grids, 2, 14, window_size)
    check_patches(grids, positions, sizes, segments)
    assert partition(windows) == hf_windows(torch.tensor(grids), window_size)
    assert set(windows) == set(range(1, windows.max() + 1))


def test_without_window_size_a_frame_is_one_window():
  grids = [(1, 4, 30), (2, 8, 2)]
  *patches, windows = layout.lay_out_patches(grids, 2, 14, None)
  check_patches(grids, *patches)
  np.testing.assert_array_equal(windows, patches[-1])


def test_without_images_there_are_no_patches():
  for array, shape in zip(
    layout.lay_out_patches([], 2, 14, 112), [(0, 2), (0, 2), (0,), (0,)], strict=True
  ):
    assert array.shape == shape and array.dtype == np.int32


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_patches_of_one_token_are_a_square(merge):
  positions, *_ = layout.lay_out_patches([(1, 8, 4)], merge, 14, None)
  tokens = positions.reshape(-1, merge**2, 2) // merge
  assert (tokens == tokens[:, :1]).all()
  np.testing.assert_array_equal(tokens[:, 0], np.argwhere(np.ones((8 // merge, 4 // merge))))


def random_prompt(rng, with_videos):
  """Generates a random prompt.

  Returns:
    The ids with one token for each image or video, the grids of images and of videos, the seconds
    per temporal patch of each video, and the (id, grid) of all images and videos in order.
  """
  ids, visuals, grids, seconds = [TEXT] * int(rng.integers(1, 9)), [], {IMAGE: [], VIDEO: []}, []
  for _ in range(rng.integers(0, 5)):
    kind = VIDEO if with_videos and rng.random() < 0.6 else IMAGE
    frames = int(rng.integers(1, 9)) if kind == VIDEO else 1
    grid = (frames, *(2 * rng.integers(1, 9, 2)).tolist())
    grids[kind].append(grid)
    if kind == VIDEO:
      seconds.append(float(rng.choice([1.0, 0.5, 2 / 3, 0.083, 1.7])))
    visuals.append((kind, grid))
    ids += [kind] + [TEXT] * int(rng.integers(1, 9))
  return ids, grids, seconds, visuals


@pytest.mark.parametrize("with_videos", [False, True])
@pytest.mark.parametrize("family", QWEN)
def test_positions_equal_transformers_for_random_layouts(family, with_videos):
  rng = np.random.default_rng(0)
  for _ in range(30):
    ids, grids, seconds, parts = random_prompt(rng, with_videos)
    times, visuals, marks = iter(seconds), [], []
    for token in ids:
      if token == TEXT:
        marks.append(token)
        continue
      _, (frames, rows, cols) = parts.pop(0)
      step = 1.0
      if token == VIDEO and family == "qwen2_5_vl":
        step = 4 * np.float32(next(times))
      if token == VIDEO and family.startswith("qwen3"):
        # Each temporal patch is separate, with text in between.
        visuals += [layout.Visual((1, rows, cols), token)] * frames
        marks += [token, TEXT] * frames
      else:
        visuals.append(layout.Visual((frames, rows, cols), token, float(step)))
        marks.append(token)
    tokens, positions, features = layout.expand_visuals(np.array(marks), visuals, 2)
    expected, _ = rope_index(family, tokens, IMAGE, VIDEO, grids[IMAGE], grids[VIDEO], seconds)
    np.testing.assert_array_equal(positions, expected)
    is_text = tokens == TEXT
    assert (features[is_text] == -1).all()
    np.testing.assert_array_equal(features[~is_text], np.arange((~is_text).sum()))
    patches = sum(t * rows * cols for kind in grids.values() for t, rows, cols in kind)
    assert (~is_text).sum() * 4 == patches


def test_text_after_a_video_continues_from_its_rows_and_columns_not_its_time():
  visual = layout.Visual((5, 2, 4), VIDEO, 2.5)
  _, positions, _ = layout.expand_visuals(np.array([TEXT, VIDEO, TEXT]), [visual], 2)
  # Five frames of 1 by 2 tokens. Their time ids are 2.5 apart and truncated to integers.
  np.testing.assert_array_equal(positions[1:-1:2, 0], [1, 3, 6, 8, 11])
  np.testing.assert_array_equal(positions[1:-1, 2], [1, 2] * 5)
  np.testing.assert_array_equal(positions[-1], [3, 3, 3])


def test_the_numbers_of_visuals_and_their_tokens_must_agree():
  with pytest.raises(ValueError):
    layout.expand_visuals(np.array([TEXT, IMAGE]), [layout.Visual((1, 2, 2), IMAGE)] * 2, 2)

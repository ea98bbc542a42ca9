"""Where the patches and visual tokens of a prompt are: everything about them but their pixels.

numpy only. What the device would otherwise have to compute from values (rotary ids, attention
windows, which visual token goes where) is computed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl_vlm.data.images import Grid


@dataclasses.dataclass(frozen=True)
class Visual:
  """An image, a video, or the part of one that stands in the text without interruption.

  Attributes:
    grid: (frames, rows, columns) of patches; a frame is one temporal patch.
    token_id: stands in the text once for every visual token.
    time_step: distance of its frames in M-RoPE ids; need not be whole.
  """

  grid: Grid
  token_id: int
  time_step: float = 1.0


def lay_out_patches(
  grids: Sequence[Grid], merge_size: int, patch_size: int, window_size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Where each patch is, what image it is of, and with which patches it attends.

  Windows are squares of window_size pixels, rounded down to whole visual tokens, cut at the right
  and lower border. Equals `get_vision_position_ids` and, as a partition, `get_vision_window_index`
  of transformers; without window_size a frame is one window.

  Returns:
    patch_positions i32[N, 2] (row, column), patch_grids i32[N, 2] (rows, columns of the image),
    patch_segments i32[N] (frames, from 1), patch_windows i32[N] (from 1, all images together).
  """
  positions = [np.zeros((0, 2), np.int32)]
  sizes = [np.zeros((0, 2), np.int32)]
  segments = [np.zeros(0, np.int32)]
  windows = [np.zeros(0, np.int32)]
  num_segments = num_windows = 0
  for frames, rows, cols in grids:
    side = max(rows, cols)
    if window_size is not None:
      side = window_size // merge_size // patch_size * merge_size
    down, across = -(-rows // side), -(-cols // side)
    grid = np.indices((rows, cols), dtype=np.int32)
    grid = grid.reshape(2, rows // merge_size, merge_size, cols // merge_size, merge_size)
    grid = grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)  # the patches of one token adjacent
    window = grid[:, 0] // side * across + grid[:, 1] // side
    for _ in range(frames):
      positions.append(grid)
      sizes.append(np.full_like(grid, (rows, cols)))
      num_segments += 1
      segments.append(np.full(len(grid), num_segments, np.int32))
      windows.append(window + num_windows + 1)
      num_windows += down * across
  return (
    np.concatenate(positions),
    np.concatenate(sizes),
    np.concatenate(segments),
    np.concatenate(windows),
  )


def expand_visuals(
  ids: np.ndarray, visuals: Sequence[Visual], merge_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Each image or video token becomes as many as it stands for, and all tokens get M-RoPE ids.

  A text token has one id on all three axes; visual tokens have (time, row, column) ids from where
  the text stopped, and the text goes on after the larger of rows and columns, even if the time went
  further. Equals `get_rope_index` of the Qwen models in transformers.

  Args:
    ids: i32[l], with the `token_id` of each of the `visuals` once, in their order.
    visuals: what the tokens stand for.
    merge_size: merge_size² patches are one visual token.

  Returns:
    tokens i32[L], positions i32[L, 3], feature_index i32[L] (-1 for text).
  """
  tokens, positions, features = [], [], []
  start = position = feature = 0

  def add_text(end: int):
    tokens.append(ids[start:end])
    line = np.arange(position, position + end - start)
    positions.append(np.repeat(line[:, None], 3, axis=1))
    features.append(np.full(end - start, -1))

  marks = np.flatnonzero(np.isin(ids, [visual.token_id for visual in visuals])).tolist()
  for mark, visual in zip(marks, visuals, strict=True):
    add_text(mark)
    position += mark - start
    frames, rows, cols = visual.grid
    rows, cols = rows // merge_size, cols // merge_size
    grid = np.indices((frames, rows, cols)).reshape(3, -1).T
    # In float32, as transformers computes it, because the product is cut to a whole number.
    grid[:, 0] = grid[:, 0].astype(np.float32) * np.float32(visual.time_step)
    tokens.append(np.full(len(grid), visual.token_id))
    positions.append(grid + position)
    features.append(np.arange(feature, feature + len(grid)))
    position += max(rows, cols)
    feature += len(grid)
    start = mark + 1
  add_text(len(ids))
  return (
    np.concatenate(tokens).astype(np.int32),
    np.concatenate(positions).astype(np.int32),
    np.concatenate(features).astype(np.int32),
  )

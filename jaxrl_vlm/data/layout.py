"""Computes everything about the patches and visual tokens of a prompt that needs no pixels.

This is position ids, attention windows, and the order of visual tokens. They depend on the values
of image sizes and tokens, so the host computes them, and the device never has to. This module needs
only numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl_vlm.data.images import Grid


@dataclasses.dataclass(frozen=True)
class Visual:
  """A contiguous run of visual tokens: an image, a video, or a section of a video.

  Attributes:
    grid: (frames, rows, columns) of patches. A frame is one temporal patch.
    token_id: Id of the visual tokens.
    time_step: Difference between the M-RoPE time ids of consecutive frames. It may be fractional.
  """

  grid: Grid
  token_id: int
  time_step: float = 1.0


def lay_out_patches(
  grids: Sequence[Grid], merge_size: int, patch_size: int, window_size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Computes the position, image size, frame and attention window of each patch.

  A window is a square with sides of `window_size` pixels, rounded down to whole visual tokens.
  Windows are cut off at the right and lower border. If `window_size` is None, each frame is one
  window. Positions equal `get_vision_position_ids` of transformers. Windows contain the same
  patches as the windows of `get_vision_window_index`.

  Args:
    grids: (frames, rows, columns) of patches of each image or video.
    merge_size: Square root of the number of patches in one visual token.
    patch_size: Side of a patch in pixels.
    window_size: Side of an attention window in pixels, or None.

  Returns:
    A tuple of
      patch_positions: i32[N, 2]; row and column of the patch in its image.
      patch_grids: i32[N, 2]; rows and columns of patches of its image.
      patch_segments: i32[N]; number of its frame, counted from 1 through all images.
      patch_windows: i32[N]; number of its attention window, counted from 1 through all images.
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
    grid = grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)  # the patches of one token are adjacent
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
  """Repeats each image or video token once per visual token, and computes M-RoPE position ids.

  A text token has the same id on all three axes. The visual tokens of an image or video have (time,
  row, column) ids that begin after the last text id. The next text token continues after the larger
  of rows and columns, even if the time ids reached further. The result equals `get_rope_index` of
  the Qwen models in transformers.

  Args:
    ids: i32[l]; contains the `token_id` of each element of `visuals` once, in their order.
    visuals: The runs of visual tokens.
    merge_size: Square root of the number of patches in one visual token.

  Returns:
    A tuple of
      tokens: i32[L].
      positions: i32[L, 3].
      feature_index: i32[L]; index of the visual token among all visual tokens, -1 for text.
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
    # Multiply in float32 as transformers does, because the product is truncated to an integer.
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

"""Turns videos into the patches that a Qwen vision tower takes as input.

A video is a sequence of frames; this module does not decode video files. It needs only numpy and
Pillow. The sampled frames and their new size equal those of `Qwen2VLVideoProcessor` and
`Qwen3VLVideoProcessor` in transformers. These classes resize with torchvision, so pixels may differ
by one grey level, rarely by two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from jaxrl_vlm.data.images import (
  MAX_ASPECT_RATIO,
  Grid,
  ImageError,
  ImageLike,
  ImageSettings,
  decode_image,
  patchify,
  smart_resize,
)


@dataclasses.dataclass(frozen=True)
class Video:
  """Frames of the same size, in order and equally spaced in time.

  Attributes:
    frames: u8[T, H, W, 3], or a sequence of bytes, Pillow images or u8[H, W, 3] arrays.
    fps: Frames per second of `frames`. The processor may sample only some of them.
  """

  frames: np.ndarray | Sequence[ImageLike]
  fps: float


@dataclasses.dataclass(frozen=True)
class VideoSettings:
  """Settings of a `video_preprocessor_config.json`. Subclasses add the rules of each family.

  Attributes:
    images: Sizes, pixel bounds and normalisation of frames.
    do_sample_frames: Whether to sample frames by the fields below. Otherwise all frames are used.
    fps: Number of frames to sample per second.
    num_frames: Number of frames to sample, independent of the length of the video. Only one of
      `fps` and `num_frames` may be set.
    min_frames, max_frames: Bounds of the number of frames that follows from `fps`.
    cap_pixels_per_frame: Whether `max_video_tokens` bounds the size of frames.
    max_video_tokens: Largest number of visual tokens. Qwen2-VL and Qwen2.5-VL count the whole
      video, and use 90 % of this number. Qwen3-VL counts one frame.
  """

  images: ImageSettings
  do_sample_frames: bool = False
  fps: float | None = None
  num_frames: int | None = None
  min_frames: int = 4
  max_frames: int = 768
  cap_pixels_per_frame: bool = False
  max_video_tokens: int = 128_000

  def updated(self, config: Mapping[str, Any], file: str) -> Self:
    """Returns a copy with the values that `config` gives to the fields of this class.

    Args:
      config: Contents of `file`. Fields that are absent or null keep their current value.
      file: Name of the file, used in error messages.

    Raises:
      ValueError: Both `fps` and `num_frames` are set, or a setting of images is not supported.
    """
    names = {f.name for f in dataclasses.fields(self)} - {"images"}
    values = {k: v for k, v in config.items() if k in names and v is not None}
    out = dataclasses.replace(self, images=self.images.updated(config, file), **values)
    if out.do_sample_frames and out.fps is not None and out.num_frames is not None:
      raise ValueError(f"{file}: fps={out.fps} and num_frames={out.num_frames}: expected only one")
    return out

  def frame_indices(self, total: int, fps: float) -> np.ndarray:
    """Returns the indices i[t] of the frames to sample.

    Args:
      total: Number of frames of the video.
      fps: Frames per second of the video.

    Raises:
      ValueError: The video has too few frames, or the settings are incomplete.
    """
    raise NotImplementedError

  def frame_size(self, count: int, height: int, width: int) -> tuple[int, int]:
    """Returns the (height, width) in pixels that the sampled frames are resized to.

    Args:
      count: Number of sampled frames.
      height: Height of a frame in pixels.
      width: Width of a frame in pixels.

    Raises:
      ValueError: The frames are too narrow or too few.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Qwen2VideoSettings(VideoSettings):
  """Settings of Qwen2-VL and Qwen2.5-VL. The pixel bounds apply to each frame."""

  images: ImageSettings = ImageSettings(min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)

  def frame_indices(self, total: int, fps: float) -> np.ndarray:
    if not self.do_sample_frames:
      return np.arange(total)
    t = self.images.temporal_patch_size
    if self.num_frames is not None:
      count = round(self.num_frames / t) * t
    elif self.fps is not None:
      largest = min(self.max_frames, total) // t * t
      count = math.floor(min(max(total / fps * self.fps, self.min_frames), largest) / t) * t
    else:
      raise ValueError("do_sample_frames=True: expected fps or num_frames, but both are null")
    if not 0 < count <= total:
      raise ValueError(f"{total} frames at {fps:g} per second: cannot sample {count} of them")
    # As in transformers, in float32 and not limited to `count`: rounding sometimes adds one index.
    return np.arange(0, total, total / count).astype(np.float32).astype(np.int64)

  def frame_size(self, count: int, height: int, width: int) -> tuple[int, int]:
    side, largest = self.images.token_side, self.images.max_pixels
    if self.cap_pixels_per_frame:
      budget = int(self.max_video_tokens * side * side * 0.9)
      share = budget * self.images.temporal_patch_size // count
      largest = max(min(largest, share), int(self.images.min_pixels * 1.05))
    return smart_resize(height, width, side, self.images.min_pixels, largest)


@dataclasses.dataclass(frozen=True)
class Qwen3VideoSettings(VideoSettings):
  """Settings of Qwen3-VL. The pixel bounds apply to all frames of a video together."""

  images: ImageSettings = ImageSettings(
    patch_size=16,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    min_pixels=128 * 32 * 32,
    max_pixels=768 * 32 * 32,
  )
  do_sample_frames: bool = True
  fps: float | None = 2
  max_video_tokens: int = 768

  def updated(self, config: Mapping[str, Any], file: str) -> Self:
    # As in transformers, these two fields apply only to images. The bounds of videos are in `size`.
    config = {k: v for k, v in config.items() if k not in ("min_pixels", "max_pixels")}
    return super().updated(config, file)

  def frame_indices(self, total: int, fps: float) -> np.ndarray:
    if not self.do_sample_frames:
      return np.arange(total)
    if self.num_frames is not None:
      count = self.num_frames
    elif self.fps is not None:
      wanted = int(total / fps * self.fps)
      count = min(max(wanted, self.min_frames), self.max_frames, total)
    else:
      count = min(max(total, self.min_frames), self.max_frames)
    return np.linspace(0, total - 1, count).round().astype(np.int64)

  def frame_size(self, count: int, height: int, width: int) -> tuple[int, int]:
    side, t = self.images.token_side, self.images.temporal_patch_size
    smallest, largest = self.images.min_pixels, self.images.max_pixels
    if self.cap_pixels_per_frame:
      frame = min(self.max_video_tokens * side * side, largest // count)
      largest = max(frame, int(smallest * 1.05)) * count
    return fit_volume(count, height, width, t, side, smallest, largest)


def fit_volume(
  count: int,
  height: int,
  width: int,
  temporal_factor: int,
  factor: int,
  min_pixels: int,
  max_pixels: int,
) -> tuple[int, int]:
  """Returns the (height, width) at which the pixels of all frames together lie within bounds.

  Equals `smart_resize` of transformers (models/qwen3_vl/video_processing_qwen3_vl.py).

  Args:
    count: Number of frames.
    height: Height of a frame in pixels.
    width: Width of a frame in pixels.
    temporal_factor: Number of frames in a temporal patch. `count` is rounded to a multiple of it.
    factor: Number of pixels that both sides become a multiple of.
    min_pixels: Smallest number of pixels of all frames.
    max_pixels: Largest number of pixels of all frames.

  Raises:
    ValueError: There are fewer frames than `temporal_factor`, or one side is more than 200 times as
      long as the other.
  """
  if count < temporal_factor:
    raise ValueError(f"{count} frames: expected at least {temporal_factor}")
  if min(height, width) < factor:
    scale = max(factor / height, factor / width)
    height, width = int(height * scale), int(width * scale)
  ratio = max(height, width) / min(height, width)
  if ratio > MAX_ASPECT_RATIO:
    raise ValueError(f"size {width}x{height}: aspect ratio {ratio:.4g} > {MAX_ASPECT_RATIO}")
  new_height = round(height / factor) * factor
  new_width = round(width / factor) * factor
  volume = round(count / temporal_factor) * temporal_factor * new_height * new_width
  if volume > max_pixels:
    scale = math.sqrt(count * height * width / max_pixels)
    new_height = max(factor, math.floor(height / scale / factor) * factor)
    new_width = max(factor, math.floor(width / scale / factor) * factor)
  elif volume < min_pixels:
    scale = math.sqrt(min_pixels / (count * height * width))
    new_height = math.ceil(height * scale / factor) * factor
    new_width = math.ceil(width * scale / factor) * factor
  return new_height, new_width


def preprocess_video(
  video: Video, settings: VideoSettings, name: str = "video"
) -> tuple[np.ndarray, Grid, np.ndarray]:
  """Samples frames of a video and cuts them into patches.

  The last frame is repeated to fill the last temporal patch.

  Args:
    video: The video.
    settings: Settings of the checkpoint.
    name: What error messages call the video.

  Returns:
    The patches f32[N, C·t·p·p], their grid (frames, rows, columns), and the indices i[t] of the
    sampled frames.

  Raises:
    ImageError: A frame does not decode or differs in size from the first one, there are too few
      frames, or the aspect ratio exceeds 200. The message starts with `name`.
  """
  if not isinstance(video, Video):
    raise ImageError(f"{name}: expected a Video, got {type(video).__name__}")
  total = len(video.frames)
  if not total or not 0 < video.fps < math.inf:
    raise ImageError(
      f"{name}: {total} frames at fps={video.fps}: expected at least one and fps > 0"
    )
  try:
    indices = settings.frame_indices(total, video.fps)
  except ValueError as error:
    raise ImageError(f"{name}: {error}") from error
  # A frame may be sampled several times.
  decoded = {i: decode_image(video.frames[i], f"{name}, frame {i}") for i in set(indices.tolist())}
  frames = [decoded[i] for i in indices.tolist()]
  for index, frame in zip(indices, frames, strict=True):
    if frame.size != frames[0].size:
      raise ImageError(
        f"{name}, frame {index}: size {frame.width}x{frame.height}: expected "
        f"{frames[0].width}x{frames[0].height}, the size of the first frame"
      )
  try:
    height, width = settings.frame_size(len(frames), frames[0].height, frames[0].width)
  except ValueError as error:
    raise ImageError(f"{name}: {error}") from error
  images = settings.images
  frames += frames[-1:] * (-len(frames) % images.temporal_patch_size)
  # As in torchvision, resize horizontally and then vertically, and round to grey levels after each.
  # A single call of Pillow would use the cheaper order, whose result differs visibly for noise.
  across = [frame.resize((width, frame.height), images.RESAMPLE) for frame in frames]
  pixels = np.stack([np.asarray(f.resize((width, height), images.RESAMPLE)) for f in across])
  grid = (
    len(frames) // images.temporal_patch_size,
    height // images.patch_size,
    width // images.patch_size,
  )
  return patchify(pixels, images), grid, indices

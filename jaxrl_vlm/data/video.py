"""Videos, as frames that are already decoded, to the patches that a Qwen vision tower reads.

numpy and Pillow only. Which frames are taken and to what size they are resized equals
`Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor` of transformers; those resize with torchvision,
so a pixel may differ from theirs by a grey level, rarely two.
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
  """Frames of one size, in order, at equal distances in time.

  Attributes:
    frames: u8[T, H, W, 3], or a sequence of bytes, Pillow images or u8[H, W, 3] arrays.
    fps: frames per second of `frames`; which of them the model sees is decided later.
  """

  frames: np.ndarray | Sequence[ImageLike]
  fps: float


@dataclasses.dataclass(frozen=True)
class VideoSettings:
  """How videos become patches; the fields of a `video_preprocessor_config.json`.

  Attributes:
    images: sizes, pixel bounds and normalisation of frames.
    do_sample_frames: take some of the frames, by the fields below; otherwise all.
    fps: frames to take of each second.
    num_frames: frames to take of a video, whatever its length; excludes `fps`.
    min_frames, max_frames: limits of what `fps` asks for.
    cap_pixels_per_frame: bound the pixels of long videos by `max_video_tokens`.
    max_video_tokens: see `frame_size`.
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
    """With what `config`, the contents of `file`, says about the fields; null says nothing."""
    names = {f.name for f in dataclasses.fields(self)} - {"images"}
    values = {k: v for k, v in config.items() if k in names and v is not None}
    out = dataclasses.replace(self, images=self.images.updated(config, file), **values)
    if out.do_sample_frames and out.fps is not None and out.num_frames is not None:
      raise ValueError(f"{file}: fps={out.fps} and num_frames={out.num_frames}: expected only one")
    return out

  def frame_indices(self, total: int, fps: float) -> np.ndarray:
    """i[t]; which of `total` frames at `fps` frames per second are taken. May raise ValueError."""
    raise NotImplementedError

  def frame_size(self, count: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) that `count` frames are resized to. May raise ValueError."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Qwen2VideoSettings(VideoSettings):
  """Pixel bounds are of one frame."""

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
      raise ValueError(f"{total} frames at {fps:g} per second: cannot take {count} of them")
    # In float32 and without regard to `count`, as transformers does it: rounding sometimes makes
    # one index more.
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
  """Pixel bounds are of all frames together."""

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
    # As in transformers: those are of images and say nothing about videos.
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
  """The frame size, multiples of `factor`, that brings the pixels of `count` frames within bounds.

  Equals `smart_resize` of transformers (models/qwen3_vl/video_processing_qwen3_vl.py).

  Raises:
    ValueError: fewer frames than `temporal_factor`; one side is more than 200 times the other.
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
  """The taken frames of a video as patches; the last frame is repeated to fill a temporal patch.

  Returns:
    patches f32[N, C·t·p·p], their grid (frames, rows, cols), indices i[t] of the taken frames.

  Raises:
    ImageError: a frame does not decode or has another size than the first, there are too few
      frames, or an aspect ratio above 200. The message starts with `name`.
  """
  if not isinstance(video, Video):
    raise ImageError(f"{name}: expected a Video, got {type(video).__name__}")
  total = len(video.frames)
  if not total or not 0 < video.fps < math.inf:
    raise ImageError(f"{name}: {total} frames at fps={video.fps}: expected at least one, fps > 0")
  try:
    indices = settings.frame_indices(total, video.fps)
  except ValueError as error:
    raise ImageError(f"{name}: {error}") from error
  # A frame may be taken several times.
  decoded = {i: decode_image(video.frames[i], f"{name}, frame {i}") for i in set(indices.tolist())}
  frames = [decoded[i] for i in indices.tolist()]
  for index, frame in zip(indices, frames, strict=True):
    if frame.size != frames[0].size:
      raise ImageError(
        f"{name}, frame {index}: size {frame.width}x{frame.height}: expected "
        f"{frames[0].width}x{frames[0].height}, that of the first frame"
      )
  try:
    height, width = settings.frame_size(len(frames), frames[0].height, frames[0].width)
  except ValueError as error:
    raise ImageError(f"{name}: {error}") from error
  images = settings.images
  frames += frames[-1:] * (-len(frames) % images.temporal_patch_size)
  # First across, then down, each rounded to grey levels, as torchvision does it. In one call Pillow
  # takes the cheaper order, which differs visibly where the picture is noisy.
  across = [frame.resize((width, frame.height), images.RESAMPLE) for frame in frames]
  pixels = np.stack([np.asarray(f.resize((width, height), images.RESAMPLE)) for f in across])
  grid = (
    len(frames) // images.temporal_patch_size,
    height // images.patch_size,
    width // images.patch_size,
  )
  return patchify(pixels, images), grid, indices

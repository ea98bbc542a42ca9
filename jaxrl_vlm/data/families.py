"""What differs between the supported architectures before the model: text, sizes, ids.

A family is `model_type` of `config.json`. Each is a class with what it does otherwise than the one
it derives from; `Processor` does the rest, which is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxrl_vlm import hf_config
from jaxrl_vlm.data.images import FixedImageSettings, Grid, ImageSettings, PatchSettings
from jaxrl_vlm.data.video import Qwen2VideoSettings, Qwen3VideoSettings, Video, VideoSettings

# Grid and time step of each stretch of visual tokens of one image or video.
Stretches = list[tuple[Grid, float]]


class Family:
  """The base, with nothing of its own.

  Class attributes:
    IMAGE_MARK, VIDEO_MARK: what the chat template writes for an image and a video, special tokens;
      VIDEO_MARK is empty where the model takes no videos.
    IMAGE_TOKEN, VIDEO_TOKEN: stand in the text once for every visual token.
    START_TOKEN, END_TOKEN: stand around them.
    ID_FIELDS: fields of config.json with the ids of the four tokens above.
    END_OF_TURN: special token that ends a response.
    MROPE: whether visual tokens have ids of time, row and column; else they count on as text does.

  Attributes:
    config: the contents of `config.json`, completed by `hf_config`.
    vision: its `vision_config`.
    processor_config: the contents of `processor_config.json`.
  """

  IMAGE_MARK: ClassVar[str]
  VIDEO_MARK: ClassVar[str] = ""
  IMAGE_TOKEN: ClassVar[str]
  VIDEO_TOKEN: ClassVar[str] = ""
  START_TOKEN: ClassVar[str]
  END_TOKEN: ClassVar[str]
  ID_FIELDS: ClassVar[Mapping[str, str]]  # from the names of the attributes above
  END_OF_TURN: ClassVar[str]
  MROPE: ClassVar[bool] = False

  def __init__(self, config: Mapping[str, Any], processor_config: Mapping[str, Any]):
    self.config = config
    self.processor_config = processor_config
    self.vision: Mapping[str, Any] = config["vision_config"]

  def image_settings(self, preprocessor: Mapping[str, Any], file: str) -> PatchSettings:
    """From `preprocessor`, the contents of `file`; ValueError where the model does not fit it."""
    raise NotImplementedError

  def video_settings(
    self, video: Mapping[str, Any], file: str, images: PatchSettings
  ) -> VideoSettings | None:
    """From `video`, the contents of `file`, with the patches of `images`."""
    raise NotImplementedError

  def image_text(self, views: int) -> str:
    """What takes the place of IMAGE_MARK; IMAGE_TOKEN once for each of the image's views."""
    raise NotImplementedError

  def video_text(self, times: np.ndarray) -> str:
    """What takes the place of VIDEO_MARK; VIDEO_TOKEN once for each of `video_stretches`.

    Args:
      times: f[frames]; seconds from the start, the middle of each temporal patch.
    """
    raise NotImplementedError

  def video_stretches(self, grid: Grid, video: Video, count: int) -> Stretches:
    """The uninterrupted stretches of visual tokens of a video, of which `count` frames are seen."""
    raise NotImplementedError

  def window_size(self, images: PatchSettings) -> int | None:
    """Side of a vision attention window in pixels; None where there are no windows."""
    return None

  def vision_ids(self, special_ids: Mapping[str, int]) -> dict[str, int]:
    """From the keys of ID_FIELDS to ids, which must be the same in tokenizer and config.json."""
    ids = {}
    for name, field in self.ID_FIELDS.items():
      text = getattr(self, name)
      if text not in special_ids:
        raise ValueError(
          f"tokenizer.json: no special token {text!r}: expected one, for config.json has "
          f"model_type={self.config['model_type']!r}"
        )
      ids[name] = special_ids[text]
      if self.config[field] != ids[name]:
        raise ValueError(
          f"config.json: {field}={self.config[field]}: expected {ids[name]}, which is {text!r} in "
          "tokenizer.json"
        )
    return ids

  def expect(self, file: str, field: str, value: Any, expected: Any) -> None:
    """Raises ValueError unless a field of vision_config is `expected`."""
    found = self.vision[field]
    if found != expected:
      raise ValueError(
        f"config.json: vision_config.{field}={found}: expected {expected}, for {file} has {value}"
      )


class Qwen2VL(Family):
  """Marks are the tokens themselves; every temporal patch of a video is one time step."""

  IMAGE_MARK = IMAGE_TOKEN = "<|image_pad|>"
  VIDEO_MARK = VIDEO_TOKEN = "<|video_pad|>"
  START_TOKEN = "<|vision_start|>"
  END_TOKEN = "<|vision_end|>"
  ID_FIELDS = {
    "IMAGE_TOKEN": "image_token_id",
    "VIDEO_TOKEN": "video_token_id",
    "START_TOKEN": "vision_start_token_id",
    "END_TOKEN": "vision_end_token_id",
  }
  END_OF_TURN = "<|im_end|>"
  MROPE = True
  VIDEO_DEFAULTS: ClassVar[VideoSettings] = Qwen2VideoSettings()

  def image_settings(self, preprocessor: Mapping[str, Any], file: str) -> ImageSettings:
    settings = ImageSettings.from_config(preprocessor, file)
    for field, ours in (
      ("patch_size", "patch_size"),
      ("temporal_patch_size", "temporal_patch_size"),
      ("spatial_merge_size", "merge_size"),
    ):
      value = getattr(settings, ours)
      self.expect(file, field, f"{ours}={value}", value)
    return settings

  def video_settings(
    self, video: Mapping[str, Any], file: str, images: PatchSettings
  ) -> VideoSettings:
    settings = self.VIDEO_DEFAULTS.updated(video, file)
    for field in ("patch_size", "temporal_patch_size", "merge_size"):
      value, expected = getattr(settings.images, field), getattr(images, field)
      if value != expected:
        raise ValueError(f"{file}: {field}={value}: expected {expected}, as for images")
    return settings

  def image_text(self, views: int) -> str:
    return self.IMAGE_TOKEN * views

  def video_text(self, times: np.ndarray) -> str:
    return self.VIDEO_TOKEN

  def video_stretches(self, grid: Grid, video: Video, count: int) -> Stretches:
    return [(grid, 1.0)]


class Qwen25VL(Qwen2VL):
  """Window attention; the time steps of a video follow the clock."""

  def window_size(self, images: PatchSettings) -> int | None:
    size = self.vision["window_size"]
    if size < images.token_side:
      raise ValueError(
        f"config.json: vision_config.window_size={size}: expected at least {images.token_side}, "
        "the side of one visual token"
      )
    return size

  def video_stretches(self, grid: Grid, video: Video, count: int) -> Stretches:
    sampled_fps = count / len(video.frames) * video.fps
    temporal = self.vision["temporal_patch_size"]
    # The product of float32, as transformers hands the seconds on.
    step = self.vision["tokens_per_second"] * np.float32(temporal / sampled_fps)
    return [(grid, float(step))]


class Qwen3VL(Qwen2VL):
  """Every temporal patch of a video is preceded by its time in words, and is like an image.

  As in transformers 5.23, the START_TOKEN and END_TOKEN that the chat template writes around
  VIDEO_MARK stay around all of them; transformers 4.57 left that outer pair out.
  """

  VIDEO_DEFAULTS = Qwen3VideoSettings()

  def video_text(self, times: np.ndarray) -> str:
    group = self.START_TOKEN + self.VIDEO_TOKEN + self.END_TOKEN
    return "".join(f"<{time:.1f} seconds>{group}" for time in times)

  def video_stretches(self, grid: Grid, video: Video, count: int) -> Stretches:
    frames, rows, cols = grid
    return [((1, rows, cols), 1.0)] * frames


class Gemma3(Family):
  """Images of one size, a fixed number of tokens each, in the text between empty lines."""

  IMAGE_MARK = START_TOKEN = "<start_of_image>"
  IMAGE_TOKEN = "<image_soft_token>"
  END_TOKEN = "<end_of_image>"
  ID_FIELDS = {
    "IMAGE_TOKEN": "image_token_index",
    "START_TOKEN": "boi_token_index",
    "END_TOKEN": "eoi_token_index",
  }
  END_OF_TURN = "<end_of_turn>"

  def image_settings(self, preprocessor: Mapping[str, Any], file: str) -> FixedImageSettings:
    tokens = self.config["mm_tokens_per_image"]
    patch, side = self.vision["patch_size"], self.vision["image_size"]
    rows = side // patch
    across = round(tokens**0.5)
    if across**2 != tokens or side % patch or rows % across:
      raise ValueError(
        f"config.json: mm_tokens_per_image={tokens}: expected a square number whose root divides "
        f"the {side}/{patch} patches of a side"
      )
    length = self.processor_config.get("image_seq_length", tokens)
    if length != tokens:
      raise ValueError(
        f"processor_config.json: image_seq_length={length}: expected {tokens}, for config.json has "
        f"mm_tokens_per_image={tokens}"
      )
    settings = FixedImageSettings(patch_size=patch, merge_size=rows // across)
    settings = settings.updated(preprocessor, file)
    size = f"size={settings.height}x{settings.width}"
    for value in (settings.height, settings.width):
      self.expect(file, "image_size", size, value)
    for field in ("patch_size", "merge_size", "temporal_patch_size"):
      if preprocessor.get(field) is not None:
        raise ValueError(f"{file}: {field}={preprocessor[field]}: not a field of Gemma 3")
    return settings

  def video_settings(self, video: Mapping[str, Any], file: str, images: PatchSettings) -> None:
    return None

  def image_text(self, views: int) -> str:
    picture = f"\n\n{self.START_TOKEN}{self.IMAGE_TOKEN}{self.END_TOKEN}\n\n"
    if views == 1:
      return picture
    # The words of the released model's processor.
    crops = " ".join([picture] * (views - 1))
    return (
      f"Here is the original image {picture} and here are some crops to help you see better {crops}"
    )


FAMILIES: Mapping[str, type[Family]] = {
  "qwen2_vl": Qwen2VL,
  "qwen2_5_vl": Qwen25VL,
  "qwen3_vl": Qwen3VL,
  "qwen3_vl_moe": Qwen3VL,
  "gemma3": Gemma3,
}


def create(config: Mapping[str, Any], processor_config: Mapping[str, Any]) -> Family:
  """The family of a `config.json`; raises as `hf_config.complete`."""
  config = hf_config.complete(config)
  return FAMILIES[config["model_type"]](config, processor_config)


def group_times(indices: Sequence[int] | np.ndarray, fps: float, size: int) -> np.ndarray:
  """f[ceil(t / size)]; seconds from the start of frames i[t], the middle of every `size` of them.

  The last frame is repeated to fill the last group.
  """
  seconds = np.asarray(indices) / fps
  seconds = np.append(seconds, np.repeat(seconds[-1:], -len(seconds) % size)).reshape(-1, size)
  return (seconds[:, 0] + seconds[:, -1]) / 2

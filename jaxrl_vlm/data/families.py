"""The differences between supported architectures in preparing prompts: text, sizes and token ids.

There is one class per family. A family is the set of checkpoints with the same `model_type` in
`config.json`. Each class overrides what it does differently from its base class. `Processor` does
everything that is the same for all families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxrl_vlm import hf_config
from jaxrl_vlm.data.images import FixedImageSettings, Grid, ImageSettings, PatchSettings
from jaxrl_vlm.data.video import Qwen2VideoSettings, Qwen3VideoSettings, Video, VideoSettings

# Grid and time step of each contiguous run of visual tokens of one video.
Stretches = list[tuple[Grid, float]]


class Family:
  """Base class of all families.

  Class attributes:
    IMAGE_MARK, VIDEO_MARK: Special tokens that the chat template writes for an image and a video.
      VIDEO_MARK is empty if the model accepts no videos.
    IMAGE_TOKEN, VIDEO_TOKEN: Special tokens that occur in the text once for every visual token.
    START_TOKEN, END_TOKEN: Special tokens before and after the visual tokens.
    ID_FIELDS: Maps the names of the four token attributes above to the fields of config.json that
      contain their ids.
    END_OF_TURN: Special token that ends a response.
    MROPE: Whether visual tokens have position ids for time, row and column. Otherwise their
      positions are consecutive, as in text.

  Attributes:
    config: Contents of `config.json`, completed by `hf_config`.
    vision: Its `vision_config`.
    processor_config: Contents of `processor_config.json`.
  """

  IMAGE_MARK: ClassVar[str]
  VIDEO_MARK: ClassVar[str] = ""
  IMAGE_TOKEN: ClassVar[str]
  VIDEO_TOKEN: ClassVar[str] = ""
  START_TOKEN: ClassVar[str]
  END_TOKEN: ClassVar[str]
  ID_FIELDS: ClassVar[Mapping[str, str]]
  END_OF_TURN: ClassVar[str]
  MROPE: ClassVar[bool] = False

  def __init__(self, config: Mapping[str, Any], processor_config: Mapping[str, Any]):
    self.config = config
    self.processor_config = processor_config
    self.vision: Mapping[str, Any] = config["vision_config"]

  def image_settings(self, preprocessor: Mapping[str, Any], file: str) -> PatchSettings:
    """Creates the image settings.

    Args:
      preprocessor: Contents of `file`.
      file: Name of the file, used in error messages.

    Raises:
      ValueError: The file does not fit the model that `config` describes.
    """
    raise NotImplementedError

  def video_settings(
    self, video: Mapping[str, Any], file: str, images: PatchSettings
  ) -> VideoSettings | None:
    """Creates the video settings, or returns None if the model accepts no videos.

    Args:
      video: Contents of `file`.
      file: Name of the file, used in error messages.
      images: The image settings. The patches of a video must have the same sizes.

    Raises:
      ValueError: The file contradicts `images` or itself.
    """
    raise NotImplementedError

  def image_text(self, views: int) -> str:
    """Returns the text that replaces IMAGE_MARK, with IMAGE_TOKEN once for each view.

    Args:
      views: Number of pictures that the model receives for the image: the image and its crops.
    """
    raise NotImplementedError

  def video_text(self, times: np.ndarray) -> str:
    """Returns the text that replaces VIDEO_MARK, with VIDEO_TOKEN once for each stretch.

    Args:
      times: f[frames]. The middle of each temporal patch, in seconds from the start of the video.
    """
    raise NotImplementedError

  def video_stretches(self, grid: Grid, video: Video, count: int) -> Stretches:
    """Returns the grid and the time step of each contiguous run of visual tokens of a video.

    Args:
      grid: (frames, rows, columns) of patches of the video.
      video: The video before frames are sampled.
      count: Number of frames that were sampled from it.
    """
    raise NotImplementedError

  def window_size(self, images: PatchSettings) -> int | None:
    """Returns the side of a vision attention window in pixels, or None without windows."""
    return None

  def vision_ids(self, special_ids: Mapping[str, int]) -> dict[str, int]:
    """Maps the keys of ID_FIELDS to token ids.

    Args:
      special_ids: Maps the special tokens of the tokenizer to their ids.

    Raises:
      ValueError: The tokenizer lacks one of the tokens, or config.json has another id for it.
    """
    ids = {}
    for name, field in self.ID_FIELDS.items():
      text = getattr(self, name)
      if text not in special_ids:
        raise ValueError(
          f"tokenizer.json: no special token {text!r}: expected one, because config.json "
          f"has model_type={self.config['model_type']!r}"
        )
      ids[name] = special_ids[text]
      if self.config[field] != ids[name]:
        raise ValueError(
          f"config.json: {field}={self.config[field]}: expected {ids[name]}, which is {text!r} in "
          "tokenizer.json"
        )
    return ids

  def expect(self, file: str, field: str, value: Any, expected: Any) -> None:
    """Raises ValueError unless a field of vision_config equals `expected`.

    Args:
      file: Name of the file that requires `expected`.
      field: Name of the field of vision_config.
      value: What `file` contains, as text for the error message.
      expected: The value that the field must have.
    """
    found = self.vision[field]
    if found != expected:
      raise ValueError(
        f"config.json: vision_config.{field}={found}: expected {expected}, because {file} has "
        f"{value}"
      )


class Qwen2VL(Family):
  """Family of Qwen2-VL.

  The chat template writes the visual token itself as the mark. Each temporal patch of a video is
  one time step.
  """

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
        raise ValueError(f"{file}: {field}={value}: expected {expected}, the value for images")
    return settings

  def image_text(self, views: int) -> str:
    return self.IMAGE_TOKEN * views

  def video_text(self, times: np.ndarray) -> str:
    return self.VIDEO_TOKEN

  def video_stretches(self, grid: Grid, video: Video, count: int) -> Stretches:
    return [(grid, 1.0)]


class Qwen25VL(Qwen2VL):
  """Family of Qwen2.5-VL: window attention, and time steps proportional to seconds of video."""

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
    # Multiply in float32, because transformers passes on the seconds of a grid step in float32.
    step = self.vision["tokens_per_second"] * np.float32(temporal / sampled_fps)
    return [(grid, float(step))]


class Qwen3VL(Qwen2VL):
  """Family of Qwen3-VL, dense and mixture-of-experts.

  Each temporal patch of a video is treated like an image, and its time precedes it as text. As in
  transformers 5.23, the START_TOKEN and END_TOKEN that the chat template writes around VIDEO_MARK
  stay around the whole video. Transformers 4.57 removed this outer pair.
  """

  VIDEO_DEFAULTS = Qwen3VideoSettings()

  def video_text(self, times: np.ndarray) -> str:
    group = self.START_TOKEN + self.VIDEO_TOKEN + self.END_TOKEN
    return "".join(f"<{time:.1f} seconds>{group}" for time in times)

  def video_stretches(self, grid: Grid, video: Video, count: int) -> Stretches:
    frames, rows, cols = grid
    return [((1, rows, cols), 1.0)] * frames


class Gemma3(Family):
  """Family of Gemma 3.

  All images have the same size and the same number of visual tokens. An empty line precedes and
  follows each image in the text. Videos are not supported.
  """

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
        f"processor_config.json: image_seq_length={length}: expected {tokens}, because "
        f"config.json has mm_tokens_per_image={tokens}"
      )
    settings = FixedImageSettings(patch_size=patch, merge_size=rows // across)
    settings = settings.updated(preprocessor, file)
    size = f"size={settings.height}x{settings.width}"
    for value in (settings.height, settings.width):
      self.expect(file, "image_size", size, value)
    for field in ("patch_size", "merge_size", "temporal_patch_size"):
      if preprocessor.get(field) is not None:
        raise ValueError(f"{file}: {field}={preprocessor[field]}: Gemma 3 has no such field")
    return settings

  def video_settings(self, video: Mapping[str, Any], file: str, images: PatchSettings) -> None:
    return None

  def image_text(self, views: int) -> str:
    picture = f"\n\n{self.START_TOKEN}{self.IMAGE_TOKEN}{self.END_TOKEN}\n\n"
    if views == 1:
      return picture
    # The wording of the released model's processor.
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
  """Creates the family of a `config.json`. Raises what `hf_config.complete` raises.

  Args:
    config: Contents of `config.json`.
    processor_config: Contents of `processor_config.json`.
  """
  config = hf_config.complete(config)
  return FAMILIES[config["model_type"]](config, processor_config)


def group_times(indices: Sequence[int] | np.ndarray, fps: float, size: int) -> np.ndarray:
  """Returns the time of each temporal patch: the middle between its first and last frame.

  The last frame is repeated to fill the last temporal patch.

  Args:
    indices: i[t]. Indices of the sampled frames in the video.
    fps: Frames per second of the video.
    size: Number of frames in a temporal patch.

  Returns:
    f[ceil(t / size)]. Seconds from the start of the video.
  """
  seconds = np.asarray(indices) / fps
  seconds = np.append(seconds, np.repeat(seconds[-1:], -len(seconds) % size)).reshape(-1, size)
  return (seconds[:, 0] + seconds[:, -1]) / 2

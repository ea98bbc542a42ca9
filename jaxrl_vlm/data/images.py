"""Encoded images to the patches that a vision tower reads.

numpy and Pillow only. Equal, value for value, to `Qwen2VLImageProcessorPil` and
`Gemma3ImageProcessorPil` of transformers, but for the order of Gemma's patches: always those of one
visual token are adjacent.
"""

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageOps

Grid = tuple[int, int, int]  # frames (after temporal merging), rows of patches, columns of patches
ImageLike = bytes | Image.Image | np.ndarray

MAX_ASPECT_RATIO = 200
# Pillow only warns above this many pixels; a training job should not spend gigabytes on one file.
MAX_DECODED_PIXELS = 89_478_485


class ImageError(ValueError):
  """An image that cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True)
class PatchSettings:
  """How pixels become patches, whatever their size is.

  Attributes:
    patch_size: side of a patch in pixels (p).
    temporal_patch_size: frames in one patch (t); a still image is repeated that often.
    merge_size: merge_size² neighbouring patches become one visual token.
    image_mean: of each channel, after rescaling.
    image_std: of each channel, after rescaling.
    rescale_factor: multiplies the 0..255 values before normalisation.
  """

  RESAMPLE: ClassVar[Image.Resampling]

  patch_size: int = 14
  temporal_patch_size: int = 2
  merge_size: int = 2
  image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
  rescale_factor: float = 1 / 255

  def updated(self, config: Mapping[str, Any], file: str) -> Self:
    """With what `config`, the contents of `file`, says about the fields; null says nothing.

    Raises:
      ValueError: `config` asks for a step that is always or never taken here.
    """
    for field in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
      if config.get(field) is False:
        raise ValueError(f"{file}: {field}=False is not supported")
    resample = config.get("resample")
    if resample not in (None, self.RESAMPLE):
      raise ValueError(
        f"{file}: resample={resample} is not supported, only {self.RESAMPLE:d} "
        f"({self.RESAMPLE.name.lower()}) is"
      )
    names = {f.name for f in dataclasses.fields(self)}
    values = {k: v for k, v in config.items() if k in names and v is not None}
    for field in ("image_mean", "image_std"):
      if field in values:
        values[field] = tuple(values[field])
    return dataclasses.replace(self, **values)

  @property
  def patch_dim(self) -> int:
    """C·t·p·p, the length of one flattened patch."""
    return 3 * self.temporal_patch_size * self.patch_size**2

  @property
  def token_side(self) -> int:
    """Side in pixels of the square behind one visual token."""
    return self.patch_size * self.merge_size

  @property
  def max_patches(self) -> int:
    """Patches of the largest image. (Extremely narrow ones may have more, see `smart_resize`.)"""
    raise NotImplementedError

  def bound(self, patches: int) -> tuple[str, str]:
    """For an error: the setting that allows too large images, and how to get it to `patches`."""
    raise NotImplementedError

  def size(self, height: int, width: int) -> tuple[int, int]:
    """The (height, width) to resize an image to; ValueError if it is too narrow."""
    raise NotImplementedError

  def views(self, image: Image.Image) -> list[Image.Image]:
    """The pictures that stand for one image, itself first."""
    return [image]


@dataclasses.dataclass(frozen=True)
class ImageSettings(PatchSettings):
  """Images keep their aspect ratio, within bounds of their area: Qwen.

  Attributes:
    min_pixels: images are enlarged to at least this area.
    max_pixels: images are shrunk to at most this area.
  """

  RESAMPLE = Image.Resampling.BICUBIC

  min_pixels: int = 56 * 56
  max_pixels: int = 28 * 28 * 1280

  @classmethod
  def from_config(cls, config: Mapping[str, Any], file: str = "preprocessor_config.json") -> Self:
    """From the contents of a `preprocessor_config.json`, with `size` or `min/max_pixels`."""
    return cls().updated(config, file)

  def updated(self, config: Mapping[str, Any], file: str) -> Self:
    size = config.get("size") or {}
    # As in transformers, min_pixels and max_pixels win over `size`.
    edges = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    return super().updated(edges | {k: v for k, v in config.items() if v is not None}, file)

  def __post_init__(self):
    if not 0 < self.min_pixels <= self.max_pixels:
      raise ValueError(
        f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}: expected 0 < min <= max"
      )

  @property
  def max_patches(self) -> int:
    return max(1, self.max_pixels // self.token_side**2) * self.merge_size**2

  def bound(self, patches: int) -> tuple[str, str]:
    most = patches // self.merge_size**2 * self.token_side**2
    remedy = f"set config.model.max_pixels to at most {most}, or add a bucket"
    return f"max_pixels={self.max_pixels}", remedy

  def size(self, height: int, width: int) -> tuple[int, int]:
    return smart_resize(height, width, self.token_side, self.min_pixels, self.max_pixels)


@dataclasses.dataclass(frozen=True)
class FixedImageSettings(PatchSettings):
  """Every image is squeezed to one size; long ones may come with crops of themselves: Gemma 3.

  Attributes:
    height, width: of every image.
    do_pan_and_scan: add crops of images far from square. In transformers the file cannot ask for
      them, only the caller of Gemma3Processor; here the file does.
    pan_and_scan_min_ratio_to_activate: longer over shorter side, from which on crops are made.
    pan_and_scan_min_crop_size: no crops are made when one would have a shorter side, in pixels.
    pan_and_scan_max_num_crops: of one image.
  """

  RESAMPLE = Image.Resampling.BILINEAR

  temporal_patch_size: int = 1
  merge_size: int = 4
  image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  height: int = 224
  width: int = 224
  do_pan_and_scan: bool = False
  pan_and_scan_min_ratio_to_activate: float = 1.2
  pan_and_scan_min_crop_size: int = 256
  pan_and_scan_max_num_crops: int = 4

  def updated(self, config: Mapping[str, Any], file: str) -> Self:
    for field in ("min_pixels", "max_pixels"):
      if config.get(field) is not None:
        raise ValueError(
          f"{file}: {field}={config[field]}: expected none, every image becomes "
          f"{self.width}x{self.height}"
        )
    size = {k: v for k, v in (config.get("size") or {}).items() if k in ("height", "width")}
    return super().updated({**config, **size}, file)

  @property
  def max_patches(self) -> int:
    views = 1 + self.pan_and_scan_max_num_crops if self.do_pan_and_scan else 1
    return views * self.height * self.width // self.patch_size**2

  def bound(self, patches: int) -> tuple[str, str]:
    if self.do_pan_and_scan:
      crops = self.pan_and_scan_max_num_crops
      return f"do_pan_and_scan=True with pan_and_scan_max_num_crops={crops}", "add a bucket"
    return f"size={self.height}x{self.width}", "add a bucket"

  def size(self, height: int, width: int) -> tuple[int, int]:
    return self.height, self.width

  def views(self, image: Image.Image) -> list[Image.Image]:
    return [image, *self.crops(image)] if self.do_pan_and_scan else [image]

  def crops(self, image: Image.Image) -> list[Image.Image]:
    """Equal crops along the longer side; none of an image that is nearly square or small.

    Equals `pan_and_scan` of Gemma3ImageProcessorPil in transformers.
    """
    longer, shorter = max(image.size), min(image.size)
    ratio = longer / shorter
    if ratio < self.pan_and_scan_min_ratio_to_activate:
      return []
    count = min(math.floor(ratio + 0.5), longer // self.pan_and_scan_min_crop_size)
    count = min(max(2, count), self.pan_and_scan_max_num_crops)
    length = math.ceil(longer / count)
    if min(length, shorter) < self.pan_and_scan_min_crop_size:
      return []
    starts = range(0, length * count, length)
    width, height = image.size
    if width >= height:
      return [image.crop((x, 0, min(x + length, width), height)) for x in starts]
    return [image.crop((0, y, width, min(y + length, height))) for y in starts]


def decode_image(image: ImageLike, name: str = "image") -> Image.Image:
  """An encoded file, Pillow image or u8[H, W(, 1|3|4)] array -> RGB Pillow image.

  Transparency is composited onto white. The EXIF orientation of an encoded file is applied, as
  transformers' `load_image` does; an image that is already decoded stays as it is.

  Raises:
    ImageError: it does not decode, is truncated, empty or larger than MAX_DECODED_PIXELS.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
      raise ImageError(f"{name}: expected u8[H, W, 3], got {image.dtype}{list(image.shape)}")
    if image.ndim == 3 and image.shape[2] == 1:
      image = image[..., 0]
  # Pillow's decoders raise almost anything on broken files: OSError, SyntaxError, struct.error ...
  try:
    if isinstance(image, Image.Image):
      decoded = image
    elif isinstance(image, np.ndarray):
      decoded = Image.fromarray(image)
    elif isinstance(image, bytes):
      decoded = Image.open(io.BytesIO(image))
    else:
      raise TypeError(f"expected bytes, a Pillow image or an array, got {type(image).__name__}")
    width, height = decoded.size
    if not width or not height:
      raise ValueError(f"size {width}x{height}")
    if width * height > MAX_DECODED_PIXELS:
      raise ValueError(f"size {width}x{height} is more than {MAX_DECODED_PIXELS} pixels")
    if not isinstance(image, (Image.Image, np.ndarray)):
      ImageOps.exif_transpose(decoded, in_place=True)
    if "A" in decoded.getbands() or decoded.info.get("transparency") is not None:
      decoded = decoded.convert("RGBA")
      white = Image.new("RGBA", decoded.size, (255, 255, 255, 255))
      decoded = Image.alpha_composite(white, decoded)
    return decoded.convert("RGB")
  except Exception as error:
    raise ImageError(f"{name}: {error or type(error).__name__}") from error


def smart_resize(
  height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
  """The (height, width) to resize to: multiples of `factor`, area within bounds, aspect kept.

  Equals `smart_resize` of transformers (models/qwen2_vl). As there, an image narrower than
  `factor` at its new area may exceed `max_pixels`, because no side becomes shorter than `factor`.

  Raises:
    ValueError: one side is more than 200 times the other.
  """
  ratio = max(height, width) / min(height, width)
  if ratio > MAX_ASPECT_RATIO:
    raise ValueError(f"size {width}x{height}: aspect ratio {ratio:.4g} > {MAX_ASPECT_RATIO}")
  new_height = round(height / factor) * factor
  new_width = round(width / factor) * factor
  if new_height * new_width > max_pixels:
    scale = math.sqrt((height * width) / max_pixels)
    new_height = max(factor, math.floor(height / scale / factor) * factor)
    new_width = max(factor, math.floor(width / scale / factor) * factor)
  elif new_height * new_width < min_pixels:
    scale = math.sqrt(min_pixels / (height * width))
    new_height = math.ceil(height * scale / factor) * factor
    new_width = math.ceil(width * scale / factor) * factor
  return new_height, new_width


def patchify(pixels: np.ndarray, settings: PatchSettings) -> np.ndarray:
  """pixels: u8[t·T, H, W, 3] -> f32[T·rows·cols, 3·t·p·p], normalised.

  The merge_size² patches of one visual token are adjacent; tokens follow in reading order.
  """
  p, t, m = settings.patch_size, settings.temporal_patch_size, settings.merge_size
  frames, height, width, channels = pixels.shape
  pixels = pixels.reshape(
    frames // t, t, height // p // m, m, p, width // p // m, m, p, channels
  ).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [T, rows/m, cols/m, m, m, C, t, p, p]
  pixels = pixels.reshape(-1, channels, t * p * p)
  # Only 256 values exist, so the arithmetic of transformers (rescaling in float64, normalising in
  # float32) is done once on a table.
  values = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
  patches = np.empty(pixels.shape, np.float32)
  for c in range(channels):
    table = (values - np.float32(settings.image_mean[c])) / np.float32(settings.image_std[c])
    patches[:, c] = table[pixels[:, c]]
  return patches.reshape(len(patches), -1)


def preprocess_image(
  image: ImageLike, settings: PatchSettings, name: str = "image"
) -> tuple[np.ndarray, Grid]:
  """One still image -> patches f32[N, C·t·p·p] and its grid (1, rows, cols), N = rows·cols.

  Raises:
    ImageError: see `decode_image`; or an aspect ratio above 200. The message starts with `name`.
  """
  rgb = decode_image(image, name)
  try:
    height, width = settings.size(rgb.height, rgb.width)
  except ValueError as error:
    raise ImageError(f"{name}: {error}") from error
  pixels = np.asarray(rgb.resize((width, height), settings.RESAMPLE))
  pixels = np.broadcast_to(pixels, (settings.temporal_patch_size, *pixels.shape))
  grid = (1, height // settings.patch_size, width // settings.patch_size)
  return patchify(pixels, settings), grid

"""Turns encoded images into the patches that a vision tower takes as input.

This module needs only numpy and Pillow. Its results equal those of `Qwen2VLImageProcessorPil` and
`Gemma3ImageProcessorPil` in transformers value for value, with two exceptions. The patches of one
visual token are always adjacent, so Gemma's patches come in another order. Grey images of 16 or 32
bits per pixel are scaled to 8 bits, while transformers clips them (see `decode_image`).
"""

import codecs
import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageOps

from jaxrl_vlm.errors import one_line

# Frames (after temporal merging), rows of patches, columns of patches.
Grid = tuple[int, int, int]
ImageLike = bytes | Image.Image | np.ndarray

MAX_ASPECT_RATIO = 200
# Pillow only warns above this many pixels. Here larger images are an error, so that one file cannot
# take gigabytes of a training job's memory.
MAX_DECODED_PIXELS = 89_478_485

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0

# How files begin, to describe in an error message what a file that does not decode looks like.
_IMAGE_FORMATS: dict[str, Callable[[bytes], bool]] = {
  "PNG": lambda data: data.startswith(b"\x89PNG"),
  "JPEG": lambda data: data.startswith(b"\xff\xd8\xff"),
  "GIF": lambda data: data.startswith((b"GIF87a", b"GIF89a")),
  "WebP": lambda data: data.startswith(b"RIFF") and data[8:12] in (b"WEBP", b""),
  "BMP": lambda data: data.startswith(b"BM") and data[6:10] == b"\0\0\0\0",
  "TIFF": lambda data: data.startswith((b"II*\0", b"MM\0*")),
  "AVIF": lambda data: data[4:12] in (b"ftypavif", b"ftypavis"),
  "JPEG 2000": lambda data: data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")),
}
_OTHER_FORMATS: dict[str, Callable[[bytes], bool]] = {
  "a HEIC image": lambda data: data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"),
  "an MP4 or QuickTime video": lambda data: data[4:8] in (b"ftyp", b"moov", b"mdat"),
  "a Matroska or WebM video": lambda data: data.startswith(b"\x1a\x45\xdf\xa3"),
  "an AVI video": lambda data: data.startswith(b"RIFF") and data[8:12] == b"AVI ",
  "an MPEG video": lambda data: data.startswith((b"\0\0\1\xba", b"\0\0\1\xb3")),
  "a Flash video": lambda data: data.startswith(b"FLV"),
  "an Ogg file": lambda data: data.startswith(b"OggS"),
  "a PDF document": lambda data: data.startswith(b"%PDF-"),
  "a ZIP archive": lambda data: data.startswith(b"PK\3\4"),
  "a gzip archive": lambda data: data.startswith(b"\x1f\x8b"),
  "a NumPy array": lambda data: data.startswith(b"\x93NUMPY"),
}


class ImageError(ValueError):
  """Raised for an image that cannot be used. The message names the image."""


@dataclasses.dataclass(frozen=True)
class PatchSettings:
  """Settings for cutting pixels into patches. Subclasses add how images are resized.

  Attributes:
    patch_size: Side of a patch in pixels (p).
    temporal_patch_size: Number of frames in one patch (t). A still image is repeated t times.
    merge_size: Square root of the number of patches in one visual token. A square of
      merge_size x merge_size patches becomes one token.
    image_mean: Mean of each channel, subtracted after rescaling.
    image_std: Standard deviation of each channel, by which pixels are divided after rescaling.
    rescale_factor: Factor that multiplies the values 0..255 before normalisation.
  """

  RESAMPLE: ClassVar[Image.Resampling]

  patch_size: int = 14
  temporal_patch_size: int = 2
  merge_size: int = 2
  image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
  rescale_factor: float = 1 / 255

  def updated(self, config: Mapping[str, Any], file: str) -> Self:
    """Returns a copy with the values that `config` gives to the fields of this class.

    Args:
      config: Contents of `file`. Fields that are absent or null keep their current value.
      file: Name of the file, used in error messages.

    Raises:
      ValueError: `config` turns off a step that is always taken, or asks for another resampling
        filter.
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
    """Length of one flattened patch, C·t·p·p."""
    return 3 * self.temporal_patch_size * self.patch_size**2

  @property
  def token_side(self) -> int:
    """Side in pixels of the square that one visual token stands for."""
    return self.patch_size * self.merge_size

  @property
  def max_patches(self) -> int:
    """Number of patches of the largest image. Extremely narrow images may exceed it.

    `smart_resize` describes this exception.
    """
    raise NotImplementedError

  def bound(self, patches: int) -> tuple[str, str]:
    """Returns text for the error that images may have more than `patches` patches.

    Args:
      patches: Largest number of patches that an image should have.

    Returns:
      The setting that allows larger images, with its value, and what the user can do about it.
    """
    raise NotImplementedError

  def size(self, height: int, width: int) -> tuple[int, int]:
    """Returns the (height, width) in pixels that an image of the given size is resized to.

    Raises:
      ValueError: The image is too narrow.
    """
    raise NotImplementedError

  def views(self, image: Image.Image) -> list[Image.Image]:
    """Returns the pictures that the model receives for one image: the image, then its crops."""
    return [image]


@dataclasses.dataclass(frozen=True)
class ImageSettings(PatchSettings):
  """Settings of Qwen models, which keep the aspect ratio of an image and bound its area.

  Attributes:
    min_pixels: Smallest area in pixels. Smaller images are enlarged.
    max_pixels: Largest area in pixels. Larger images are shrunk.
  """

  RESAMPLE = Image.Resampling.BICUBIC

  min_pixels: int = 56 * 56
  max_pixels: int = 28 * 28 * 1280

  @classmethod
  def from_config(cls, config: Mapping[str, Any], file: str = "preprocessor_config.json") -> Self:
    """Creates settings from the contents of a `preprocessor_config.json`.

    Args:
      config: Contents of the file. The bounds may be given as `size` (`shortest_edge` and
        `longest_edge`) or as `min_pixels` and `max_pixels`.
      file: Name of the file, used in error messages.
    """
    return cls().updated(config, file)

  def updated(self, config: Mapping[str, Any], file: str) -> Self:
    size = config.get("size") or {}
    # As in transformers, min_pixels and max_pixels take precedence over `size`.
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
    largest_area = patches // self.merge_size**2 * self.token_side**2
    remedy = f"set config.model.max_pixels to at most {largest_area}, or add a bucket"
    return f"max_pixels={self.max_pixels}", remedy

  def size(self, height: int, width: int) -> tuple[int, int]:
    return smart_resize(height, width, self.token_side, self.min_pixels, self.max_pixels)


@dataclasses.dataclass(frozen=True)
class FixedImageSettings(PatchSettings):
  """Settings of Gemma 3, which resizes every image to one size without keeping its aspect ratio.

  Attributes:
    height: Height in pixels that every image is resized to.
    width: Width in pixels that every image is resized to.
    do_pan_and_scan: Whether elongated images are accompanied by crops of themselves. In
      transformers only the caller of Gemma3Processor can enable this; here the file can.
    pan_and_scan_min_ratio_to_activate: Smallest ratio of the longer to the shorter side at which
      crops are made.
    pan_and_scan_min_crop_size: Smallest side of a crop in pixels. If the crops of an image would
      have a shorter side, the image gets no crops.
    pan_and_scan_max_num_crops: Largest number of crops of one image.
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
          f"{file}: {field}={config[field]}: expected no such field, because every image is "
          f"resized to {self.width}x{self.height}"
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
    """Returns crops of equal length along the longer side of an image.

    An image that is nearly square or small has no crops. The result equals `pan_and_scan` of
    Gemma3ImageProcessorPil in transformers.
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
  """Decodes an image to an 8-bit RGB Pillow image.

  Transparent pixels are composited onto white. The EXIF orientation of an encoded file is applied,
  as transformers' `load_image` does. The orientation of a Pillow image or an array is not changed.

  Grey images of 16 or 32 bits per pixel (Pillow's modes I;16, I and F) are scaled to 8 bits by
  these rules:

  - Integers with a maximum of at most 255 are 8-bit levels and stay as they are.
  - Larger integers are 16-bit levels and are multiplied by 255 / 65535. A TIFF file that declares
    n bits per pixel, 8 < n < 16, is scaled by 255 / (2ⁿ - 1) instead.
  - Floats with a maximum of at most 1 are multiplied by 255. Larger floats are 8-bit levels.
  - Results are rounded to the nearest level. Values below 0, integers above the range, floats
    above 255, NaN and infinity are errors.

  Args:
    image: Bytes of an encoded file, a Pillow image, or a u8[H, W], u8[H, W, 1], u8[H, W, 3] or
      u8[H, W, 4] array.
    name: What error messages call the image.

  Raises:
    ImageError: The image does not decode, is truncated, is empty, has more than MAX_DECODED_PIXELS
      pixels, or has grey values outside the ranges above. If bytes are not an image, the message
      says what they look like instead.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
      raise ImageError(f"{name}: expected u8[H, W, 3], got {image.dtype}{list(image.shape)}")
    if image.ndim == 3 and image.shape[2] == 1:
      image = image[..., 0]
  # On damaged files, Pillow's decoders raise many types: OSError, SyntaxError, struct.error ...
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
      raise ImageError(f"size {width}x{height}: expected at least one pixel")
    if width * height > MAX_DECODED_PIXELS:
      raise ImageError(f"size {width}x{height} is more than {MAX_DECODED_PIXELS} pixels")
    if not isinstance(image, (Image.Image, np.ndarray)):
      ImageOps.exif_transpose(decoded, in_place=True)
    if decoded.mode in ("I", "F") or decoded.mode.startswith("I;16"):
      return _to_8_bits(decoded).convert("RGB")
    if "A" in decoded.getbands() or decoded.info.get("transparency") is not None:
      decoded = decoded.convert("RGBA")
      white = Image.new("RGBA", decoded.size, (255, 255, 255, 255))
      decoded = Image.alpha_composite(white, decoded)
    return decoded.convert("RGB")
  except (ImageError, Image.DecompressionBombError) as error:
    raise ImageError(f"{name}: {error}") from error
  except Exception as error:
    problem = one_line(str(error)) or type(error).__name__
    if isinstance(image, bytes):
      problem = _describe_undecodable(image, problem)
    raise ImageError(f"{name}: {problem}") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
  """Scales a grey image of 16 or 32 bits per pixel as `decode_image` documents."""
  values = np.asarray(image)
  tiff_tags = getattr(image, "tag_v2", {})
  is_float = values.dtype.kind == "f"
  if is_float and not np.isfinite(values).all():
    raise ImageError("a grey image of floats: expected finite values, got NaN or infinity")
  low, high = values.min().item(), values.max().item()
  if is_float:
    scale, largest, expected = 255.0 if high <= 1 else 1.0, 255, "0 to 1, or from 0 to 255"
  else:
    bits = tiff_tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    largest = 2**bits - 1 if 8 < bits < 16 else 65535
    scale, expected = 1.0 if high <= 255 else 255 / largest, f"0 to {largest}"
  if low < 0 or high > largest:
    raise ImageError(
      f"grey values from {low:g} to {high:g}: expected "
      f"{'floats' if is_float else 'integers'} from {expected}"
    )
  levels = np.rint(values.astype(np.float32) * np.float32(scale)).astype(np.uint8)
  if tiff_tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
    levels = 255 - levels
  transparent = image.info.get("transparency")
  if transparent is not None:
    levels[values == transparent] = 255
  return Image.fromarray(levels)


def _describe_undecodable(data: bytes, problem: str) -> str:
  """Returns text that says what bytes that Pillow cannot decode look like.

  Args:
    data: The bytes.
    problem: Message of Pillow's exception.
  """
  if not data:
    return "not an image: the file is empty (0 bytes)"
  for kind, is_kind in _IMAGE_FORMATS.items():
    if is_kind(data):
      # Pillow's message would print the address of a buffer.
      detail = "" if "cannot identify image file" in problem else f": {problem}"
      return f"a truncated or damaged {kind} file of {len(data)} bytes{detail}"
  for description, is_kind in _OTHER_FORMATS.items():
    if is_kind(data):
      readable = " that Pillow can read" if description.endswith("image") else ""
      return f"not an image{readable}: {description}"
  text = data[:1000].decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
  shown = repr(text[:40])
  if text.startswith("version https://git-lfs"):
    return "not an image: a Git LFS pointer; run 'git lfs pull' to fetch the file it stands for"
  if text.startswith("<"):
    kind = re.search(r"<(svg|!doctype html|html|head|body)\b", text, re.IGNORECASE)
    if kind is None or kind[1].lower() == "svg":
      kind = "XML" if kind is None else "an SVG image"
      return f"not an image that Pillow can read: {kind} that begins with {shown}"
    return f"not an image: an HTML page that begins with {shown}"
  if text.startswith(("{", "[")):
    return f"not an image: JSON that begins with {shown}"
  if text.startswith(("data:image/", "iVBORw0KGgo", "/9j/")):
    return f"not an image: base64 text that begins with {shown}; decode it first"
  if _is_text(data):
    return f"not an image: text that begins with {shown}"
  return f"not an image that Pillow can read: {len(data)} bytes that begin with {data[:8].hex(' ')}"


def _is_text(data: bytes) -> bool:
  try:
    # The last character of the excerpt may be cut off.
    text = codecs.getincrementaldecoder("utf-8")().decode(data[:1000])
  except UnicodeDecodeError:
    return False
  return all(c.isprintable() or c.isspace() for c in text)


def smart_resize(
  height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
  """Returns the (height, width) in pixels that an image is resized to.

  Both sides are multiples of `factor`, the area lies within the bounds, and the aspect ratio is
  kept as far as that allows. The result equals `smart_resize` of transformers (models/qwen2_vl).
  As in transformers, an image that would be narrower than `factor` at its new area may exceed
  `max_pixels`, because no side becomes shorter than `factor`.

  Args:
    height: Height of the image in pixels.
    width: Width of the image in pixels.
    factor: Number of pixels that both sides become a multiple of.
    min_pixels: Smallest area in pixels.
    max_pixels: Largest area in pixels.

  Raises:
    ValueError: One side is more than 200 times as long as the other.
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
  """Cuts frames into normalised patches.

  The merge_size² patches of one visual token are adjacent. The tokens follow in reading order.

  Args:
    pixels: u8[t·T, H, W, 3]. H and W are multiples of `settings.token_side`.
    settings: Settings with the patch size p and t frames per patch.

  Returns:
    f32[T·rows·cols, 3·t·p·p].
  """
  p, t, m = settings.patch_size, settings.temporal_patch_size, settings.merge_size
  frames, height, width, channels = pixels.shape
  pixels = pixels.reshape(
    frames // t, t, height // p // m, m, p, width // p // m, m, p, channels
  ).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [T, rows/m, cols/m, m, m, C, t, p, p]
  pixels = pixels.reshape(-1, channels, t * p * p)
  # A pixel has only 256 possible values, so the arithmetic of transformers (rescaling in float64,
  # normalisation in float32) runs once on a table.
  values = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
  patches = np.empty(pixels.shape, np.float32)
  for c in range(channels):
    table = (values - np.float32(settings.image_mean[c])) / np.float32(settings.image_std[c])
    patches[:, c] = table[pixels[:, c]]
  return patches.reshape(len(patches), -1)


def preprocess_image(
  image: ImageLike, settings: PatchSettings, name: str = "image"
) -> tuple[np.ndarray, Grid]:
  """Decodes, resizes and cuts one still image into patches.

  Args:
    image: As in `decode_image`.
    settings: How the image is resized and cut.
    name: What error messages call the image. Messages start with it.

  Returns:
    The patches f32[N, C·t·p·p] and their grid (1, rows, cols), N = rows·cols.

  Raises:
    ImageError: The image does not decode (see `decode_image`), or its aspect ratio is above 200.
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

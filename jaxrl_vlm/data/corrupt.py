"""An example with corrupted images: before the processor decodes and resizes them.

numpy and Pillow only. `jaxrl_vlm.views` has the same corruptions of processed images, on the
device; PAPO's released code (`random_patch_blackening` of its trainer) makes them here. Pixels are
grey levels 0..255 of the image as `decode_image` shows it: turned as its EXIF data says, on white
where it is transparent, RGB.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from jaxrl_vlm.data.images import decode_image
from jaxrl_vlm.errors import hint
from jaxrl_vlm.example import Example

KINDS = ("patches", "blank", "solid", "noise", "blur")


def black_squares(
  image: Image.Image, rng: np.random.Generator, rate: float, side: int
) -> Image.Image:
  """Blackens squares of `side` x `side` pixels, each with probability `rate`, independently.

  Squares from the upper left corner on, cut at the right and lower border; one draw each, in
  reading order.
  """
  if side < 1:
    raise ValueError(f"side={side!r}: expected a whole number >= 1")
  pixels = np.array(image)
  height, width = pixels.shape[:2]
  drawn = rng.random((-(-height // side), -(-width // side))) < rate
  hit = drawn.repeat(side, axis=0)[:height].repeat(side, axis=1)[:, :width]
  pixels[hit] = 0
  return Image.fromarray(pixels)


def grey(image: Image.Image, level: float) -> Image.Image:
  """Every pixel the same grey; nothing but the size is left."""
  return Image.new("RGB", image.size, (round(level),) * 3)


def noisy(image: Image.Image, rng: np.random.Generator, std: float) -> Image.Image:
  """clip(round(x + std · ε), 0, 255), ε ~ N(0, 1) for every pixel and channel."""
  pixels = np.asarray(image)
  drawn = rng.standard_normal(pixels.shape, dtype=np.float32)
  return Image.fromarray(np.rint(pixels + std * drawn).clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image, radius: float) -> Image.Image:
  """Pillow's Gaussian blur: three box filters of together the variance radius²."""
  return image.filter(ImageFilter.GaussianBlur(radius))


def corrupt_images(
  example: Example,
  *,
  kind: str,
  seed: Sequence[int],
  rate: float = 0.6,
  patch: int = 14,
  level: float = 128.0,
  noise: float = 189.0,
  blur: float = 6.0,
) -> Example:
  """The example with every image corrupted: the same number of them, sizes, tokens and grids.

  The images become PNG files, RGB, without loss. Each has draws of its own, which depend on `seed`
  and its place among the images alone.

  Args:
    example: its images are encoded files (Pillow images and u8 arrays do too).
    kind: "patches", "blank", "solid", "noise" or "blur", as `objective.mask_kind`.
    seed: whole numbers >= 0, such as (seed of the run, step, prompt, sample).
    rate: of patches: the probability of each square; PAPO's is 0.6.
    patch: of patches: side of a square in pixels; PAPO's is 14.
    level: of solid: the grey level, 0 to 255.
    noise: of noise: standard deviation in grey levels.
    blur: of blur: standard deviation in pixels.

  Raises:
    ValueError: no such kind.
    ImageError: an image does not decode; names the example and the image.
  """
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r}: no such corruption of images; {hint(kind, KINDS)}")
  images = []
  for i, encoded in enumerate(example.images):
    image = decode_image(encoded, f"{example.name}, image {i}")
    # With its length, because (1, 2) and (1, 2, 0) would be the same numbers.
    rng = np.random.default_rng(np.random.SeedSequence([len(seed), *seed], spawn_key=(i,)))
    if kind == "patches":
      image = black_squares(image, rng, rate, patch)
    elif kind == "noise":
      image = noisy(image, rng, noise)
    elif kind == "blur":
      image = blurred(image, blur)
    else:
      image = grey(image, level if kind == "solid" else 0)
    images.append(_png(image))
  return example.replace(images=tuple(images))


def _png(image: Image.Image) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, "PNG", compress_level=1)  # it is read once, and soon
  return buffer.getvalue()

"""Corrupts the images of an example before the processor resizes them.

PAPO's released code also corrupts images at this point (`random_patch_blackening` of its trainer).
`jaxrl_vlm.views` applies the same corruptions to processed images on the device.

This module needs only numpy and Pillow. It corrupts the 8-bit RGB image that `decode_image`
returns, with the EXIF orientation applied and transparent pixels composited onto white.
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
  """Blackens squares of `side` x `side` pixels, each independently with probability `rate`.

  The grid of squares begins at the upper left corner and is cut off at the right and lower border.
  One random number is drawn for each square, row by row.

  Raises:
    ValueError: `side` is below 1.
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
  """Returns an image of the same size whose pixels all have the grey level `level`."""
  return Image.new("RGB", image.size, (round(level),) * 3)


def noisy(image: Image.Image, rng: np.random.Generator, std: float) -> Image.Image:
  """Adds Gaussian noise: clip(round(x + std · ε), 0, 255), ε ~ N(0, 1) per pixel and channel."""
  pixels = np.asarray(image)
  drawn = rng.standard_normal(pixels.shape, dtype=np.float32)
  return Image.fromarray(np.rint(pixels + std * drawn).clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image, radius: float) -> Image.Image:
  """Applies Pillow's Gaussian blur: three box filters whose variances add up to radius²."""
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
  """Returns the example with every image corrupted.

  The number and the sizes of the images stay the same, and therefore the prompt's tokens and grids
  too. The corrupted images are RGB PNG files, which are lossless. The random numbers of an image
  depend only on `seed` and on its index among the images.

  Args:
    example: The example. Its images are encoded files. Pillow images and u8 arrays also work.
    kind: "patches", "blank", "solid", "noise" or "blur", as in `objective.mask_kind`.
    seed: Integers >= 0, such as (seed of the run, step, prompt, sample).
    rate: For "patches": the probability of each square. PAPO uses 0.6.
    patch: For "patches": side of a square in pixels. PAPO uses 14.
    level: For "solid": the grey level, 0 to 255.
    noise: For "noise": standard deviation in grey levels.
    blur: For "blur": standard deviation in pixels.

  Raises:
    ValueError: `kind` is unknown.
    ImageError: An image does not decode. The message names the example and the image.
  """
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r}: no such corruption of images; {hint(kind, KINDS)}")
  images = []
  for i, encoded in enumerate(example.images):
    image = decode_image(encoded, f"{example.name}, image {i}")
    # Include the length, because SeedSequence treats (1, 2) and (1, 2, 0) as the same seed.
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
  # A low compression level, because the file is soon read, and only once.
  image.save(buffer, "PNG", compress_level=1)
  return buffer.getvalue()

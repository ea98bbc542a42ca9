"""Tests the corruptions of an example's images against slow implementations.

Everything else about the example and its prompt must stay unchanged.
"""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from jaxrl_vlm.data import corrupt
from jaxrl_vlm.data.images import ImageError, decode_image
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.example import Example
from tests.tiny_processor import make_processor_dir


def picture(mode: str, width: int = 45, height: int = 31) -> Image.Image:
  rng = np.random.default_rng(0)
  if mode == "I;16":
    return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
  channels = {"L": (), "LA": (2,), "RGBA": (4,), "CMYK": (4,)}.get(mode, (3,))
  values = rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)
  base = Image.fromarray(values, mode if mode in ("LA", "CMYK") else None)
  return base if base.mode == mode else base.convert(mode)


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def turned() -> bytes:
  """A JPEG with the EXIF orientation of a quarter turn."""
  exif = Image.Exif()
  exif[0x0112] = 6
  return encoded(picture("RGB"), "JPEG", exif=exif)


def transparent_colour() -> bytes:
  """A palette file in which one colour is transparent."""
  return encoded(picture("P"), transparency=3)


FILES = {
  **{mode: encoded(picture(mode)) for mode in ("RGB", "L", "LA", "P", "RGBA", "1", "I;16")},
  "CMYK": encoded(picture("CMYK"), "JPEG"),
  "transparent colour": transparent_colour(),
  "EXIF": turned(),
  "narrow": encoded(picture("RGB", 150, 2)),
  "one pixel": encoded(picture("RGB", 1, 1)),
}


def example(*images: bytes) -> Example:
  return Example("q7", "which is larger", "3", images=images, meta={"skill": "count"})


def shown(image: bytes) -> np.ndarray:
  """The decoded image u8[H, W, 3], as the processor receives it."""
  return np.asarray(decode_image(image))


def draws(seed: tuple[int, ...], image: int) -> np.random.Generator:
  return np.random.default_rng(np.random.SeedSequence([len(seed), *seed], spawn_key=(image,)))


def slow(pixels: np.ndarray, kind: str, rng: np.random.Generator, **settings) -> np.ndarray:
  """Computes a corruption pixel by pixel from its definition."""
  out = pixels.copy()
  height, width, _ = pixels.shape
  if kind == "patches":
    side = settings["patch"]
    for y in range(0, height, side):
      for x in range(0, width, side):
        if rng.random() < settings["rate"]:
          for i in range(y, min(y + side, height)):
            for j in range(x, min(x + side, width)):
              out[i, j] = 0
  elif kind == "noise":
    drawn = rng.standard_normal(pixels.shape, dtype=np.float32)
    for at in np.ndindex(pixels.shape):
      out[at] = min(max(round(float(pixels[at]) + settings["noise"] * float(drawn[at])), 0), 255)
  elif kind == "blur":
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(settings["blur"]))
    out = np.asarray(blurred)
  else:
    out[:] = {"blank": 0, "solid": settings.get("level")}[kind]
  return out


CASES = [
  ("patches", {"rate": 0.6, "patch": 14}), ("patches", {"rate": 0.3, "patch": 1}),
  ("patches", {"rate": 0.5, "patch": 7}), ("patches", {"rate": 1.0, "patch": 200}),
  ("blank", {}), ("solid", {"level": 128.0}), ("solid", {"level": 255}),
  ("noise", {"noise": 189.0}), ("noise", {"noise": 5.0}),
  ("blur", {"blur": 6.0}), ("blur", {"blur": 0.7}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_corruption_of_the_decoded_image_equals_the_slow_one(kind, settings):
  files = list(FILES.values())
  seed = (5, 0, 2**40)
  new = corrupt.corrupt_images(example(*files), kind=kind, seed=seed, **settings)
  assert new.replace(images=()) == example()
  assert len(new.images) == len(files)
  for i, (before, after) in enumerate(zip(files, new.images, strict=True)):
    pixels = shown(before)
    np.testing.assert_array_equal(
      shown(after), slow(pixels, kind, draws(seed, i), **settings), err_msg=list(FILES)[i]
    )
    with Image.open(io.BytesIO(after)) as file:  # neither EXIF orientation nor transparency
      assert (file.format, file.mode) == ("PNG", "RGB") and not file.getexif()


def test_defaults_equal_the_values_of_released_code():
  given = example(FILES["RGB"])
  for kind, settings in (
    ("patches", {"rate": 0.6, "patch": 14}),
    ("solid", {"level": 128}),
    ("noise", {"noise": 189}),
    ("blur", {"blur": 6}),
  ):
    plain = corrupt.corrupt_images(given, kind=kind, seed=(1,))
    assert plain == corrupt.corrupt_images(given, kind=kind, seed=(1,), **settings)


def test_exif_orientation_is_applied_before_the_corruption():
  after = corrupt.corrupt_images(example(FILES["EXIF"]), kind="patches", seed=(1,), patch=14)
  assert shown(after.images[0]).shape == (45, 31, 3)  # the stored image is 45 wide and 31 high


@pytest.mark.parametrize("kind", ["patches", "noise"])
def test_random_numbers_depend_only_on_the_seed_and_the_index_of_the_image(kind):
  image = encoded(picture("RGB", 200, 180))

  def made(*seed, images=(image, image)):
    return corrupt.corrupt_images(example(*images), kind=kind, seed=seed).images

  assert made(1, 2) == made(1, 2)
  seeds = [(1, 2), (2, 1), (1,), (1, 0), (1, 2, 0), (0, 1, 2), ()]
  results = [image for seed in seeds for image in made(*seed)]
  assert len(set(results)) == 2 * len(seeds)  # the two images of an example differ too
  assert made(1, 2, images=(image,)) == made(1, 2)[:1]


def test_the_share_of_black_squares_equals_the_rate():
  white = encoded(Image.new("RGB", (1400, 1400), "white"))
  for rate in (0.0, 0.25, 0.6, 1.0):
    after = corrupt.corrupt_images(example(white), kind="patches", seed=(0,), rate=rate)
    share = (shown(after.images[0]) == 0).mean()
    assert abs(share - rate) <= 5 * np.sqrt(rate * (1 - rate) / 100**2)


def test_noise_is_gaussian():
  grey = encoded(Image.new("RGB", (300, 300), (128, 128, 128)))
  after = corrupt.corrupt_images(example(grey), kind="noise", seed=(0,), noise=20.0)
  drawn = shown(after.images[0]) - 128.0
  # The tolerance is five standard errors. Rounding adds 1/12 to the variance, and no value comes
  # near 0 or 255, so clipping has no effect.
  assert abs(drawn.mean()) < 5 * 20 / np.sqrt(drawn.size)
  assert abs(drawn.std() / 20 - 1) < 5 / np.sqrt(2 * drawn.size) + 1e-3
  assert abs(np.corrcoef(drawn[..., 0].ravel(), drawn[..., 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("kind", corrupt.KINDS)
def test_a_corruption_changes_only_the_pixels_of_the_prompt(family, kind, tmp_path):
  processor = Processor.from_pretrained(make_processor_dir(tmp_path, family=family))
  clean = example(*FILES.values()).replace(question="which is larger" + "<image>" * len(FILES))
  clean = processor.encode(clean)
  new = processor.encode(
    corrupt.corrupt_images(
      example(*FILES.values()).replace(question="which is larger" + "<image>" * len(FILES)),
      kind=kind,
      seed=(3,),
    )
  )
  for field in (
    "tokens",
    "positions",
    "feature_index",
    "patch_positions",
    "patch_grids",
    "patch_segments",
    "patch_windows",
  ):
    np.testing.assert_array_equal(getattr(new, field), getattr(clean, field))
  assert new.next_position == clean.next_position
  assert new.patches.shape == clean.patches.shape
  assert (new.patches != clean.patches).any()


def test_an_example_without_images_is_unchanged():
  assert corrupt.corrupt_images(example(), kind="noise", seed=(1,)) == example()


def test_bad_arguments_and_images_are_errors():
  with pytest.raises(ValueError, match="kind='blurr': no such corruption.*did you mean 'blur'"):
    corrupt.corrupt_images(example(), kind="blurr", seed=(1,))
  with pytest.raises(ImageError, match="example 'q7', image 1: "):
    corrupt.corrupt_images(example(FILES["L"], b"broken"), kind="blank", seed=(1,))
  with pytest.raises(ImageError, match="example 'q7', image 0: "):
    corrupt.corrupt_images(example(FILES["RGB"][:200]), kind="blur", seed=(1,))
  with pytest.raises(ValueError, match="side=0: expected a whole number >= 1"):
    corrupt.corrupt_images(example(FILES["L"]), kind="patches", seed=(1,), patch=0)

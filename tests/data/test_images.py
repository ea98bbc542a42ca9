"""Tests that images become the same patches as in transformers, and that bad images are named."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

from jaxrl_vlm.data import images

SIZES = [(1, 1), (28, 28), (29, 13), (14, 42), (99, 99), (5, 900), (640, 480), (33, 517)]
EXTREMES = [(200, 1), (1, 200), (3, 600), (2000, 10)]  # the largest allowed ratio is 200


def random_image(height, width, channels=3, seed=0):
  shape = (height, width, channels) if channels > 1 else (height, width)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, file_format="PNG", **options):
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
    buffer, file_format, **options
  )
  return buffer.getvalue()


def hf_patches(image, settings):
  processor = hf.Qwen2VLImageProcessorPil(
    patch_size=settings.patch_size,
    temporal_patch_size=settings.temporal_patch_size,
    merge_size=settings.merge_size,
    min_pixels=settings.min_pixels,
    max_pixels=settings.max_pixels,
    image_mean=list(settings.image_mean),
    image_std=list(settings.image_std),
  )
  out = processor([image], return_tensors="np")
  return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("size", SIZES + EXTREMES)
def test_patches_equal_transformers(size):
  settings = images.ImageSettings(max_pixels=300 * 28 * 28)
  image = random_image(*size)
  patches, grid = images.preprocess_image(image, settings)
  expected, expected_grid = hf_patches(Image.fromarray(image), settings)
  assert grid == expected_grid
  assert patches.dtype == np.float32
  assert patches.shape == (np.prod(grid), settings.patch_dim)
  np.testing.assert_array_equal(patches, expected)


@pytest.mark.parametrize("seed", range(25))
def test_patches_equal_transformers_for_random_sizes_and_settings(seed):
  rng = np.random.default_rng(seed)
  settings = images.ImageSettings(
    patch_size=int(rng.choice([4, 8, 14, 16])),
    temporal_patch_size=int(rng.choice([1, 2, 3])),
    merge_size=int(rng.choice([1, 2, 3])),
    min_pixels=int(rng.integers(16, 4000)),
    max_pixels=int(rng.integers(4000, 100_000)),
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.5, 0.25, 0.2),
  )
  image = random_image(*rng.integers(8, 400, 2), seed=seed)
  patches, grid = images.preprocess_image(image, settings)
  expected, expected_grid = hf_patches(Image.fromarray(image), settings)
  assert grid == expected_grid
  np.testing.assert_array_equal(patches, expected)


@pytest.mark.parametrize("size", [(56, 56), (3584, 3584), (3600, 3570), (280, 28000)])
def test_resized_size_stays_within_published_bounds(size):
  settings = images.ImageSettings(min_pixels=56 * 56, max_pixels=12_845_056)
  height, width = settings.size(*size)
  assert (height, width) == hf.smart_resize(*size, 28, 56 * 56, 12_845_056)
  assert height * width // 14**2 <= settings.max_patches == 65_536
  if size == (56, 56):
    patches, grid = images.preprocess_image(random_image(*size), settings)
    assert grid == (1, 4, 4) and len(patches) == 16
  if size == (3584, 3584):
    assert height * width // 14**2 == 65_536


def test_no_image_has_more_than_max_patches():
  """Very narrow images are left out: they may exceed the bound if it is below 200 visual tokens."""
  rng = np.random.default_rng(0)
  for _ in range(3000):
    size = [int(2 ** rng.uniform(0, 13)) for _ in range(2)]
    bound = int(rng.integers(100 * 784, 4000 * 784))
    settings = images.ImageSettings(min_pixels=784, max_pixels=bound)
    ratio = max(size) / min(size)
    if ratio > 200 or ratio > bound / 784:
      continue
    height, width = settings.size(*size)
    assert height * width // 14**2 <= settings.max_patches


def gemma_views(image, settings):
  """Returns the pixels that transformers makes of an image and its crops, f32[views, C, H, W]."""
  processor = Gemma3ImageProcessorPil(
    size={"height": settings.height, "width": settings.width},
    do_pan_and_scan=settings.do_pan_and_scan,
    pan_and_scan_min_crop_size=settings.pan_and_scan_min_crop_size,
    pan_and_scan_max_num_crops=settings.pan_and_scan_max_num_crops,
    pan_and_scan_min_ratio_to_activate=settings.pan_and_scan_min_ratio_to_activate,
  )
  return processor([image], return_tensors="np")["pixel_values"]


def check_gemma(image, settings):
  expected = gemma_views(image, settings)
  views = settings.views(images.decode_image(image))
  assert len(views) == len(expected)
  m, p = settings.merge_size, settings.patch_size
  for view, pixels in zip(views, expected, strict=True):
    patches, grid = images.preprocess_image(view, settings)
    rows, cols = settings.height // p, settings.width // p
    assert grid == (1, rows, cols)
    # [rows of tokens, columns of tokens, m, m, C, p, p] back to a picture.
    picture = patches.reshape(rows // m, cols // m, m, m, 3, p, p).transpose(4, 0, 2, 5, 1, 3, 6)
    np.testing.assert_array_equal(picture.reshape(pixels.shape), pixels)
  return len(views)


@pytest.mark.parametrize("size", [(1, 1), (56, 56), (224, 224), (300, 7), (7, 300), (1, 900)])
def test_gemma_patches_equal_transformers(size):
  settings = images.FixedImageSettings(height=56, width=56, merge_size=2)
  assert check_gemma(Image.fromarray(random_image(*size)), settings) == 1


def test_gemma_patches_with_published_settings_equal_transformers():
  settings = images.FixedImageSettings(height=896, width=896)
  assert settings.max_patches == 4096 and settings.patch_dim == 588
  assert check_gemma(Image.fromarray(random_image(480, 640)), settings) == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_gemma_patches_of_other_modes_equal_transformers(mode):
  settings = images.FixedImageSettings(height=56, width=56, merge_size=2)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers warns about deprecated arguments
    check_gemma(Image.fromarray(random_image(60, 80, 4), "RGBA").convert(mode), settings)


def test_pan_and_scan_equals_transformers():
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(60):
    settings = images.FixedImageSettings(
      height=28,
      width=28,
      merge_size=2,
      do_pan_and_scan=True,
      pan_and_scan_min_crop_size=int(rng.integers(5, 50)),
      pan_and_scan_max_num_crops=int(rng.integers(2, 6)),
      pan_and_scan_min_ratio_to_activate=float(rng.choice([1.0, 1.2, 2.0])),
    )
    size = [int(2 ** rng.uniform(3, 9)) for _ in range(2)]
    views = check_gemma(Image.fromarray(random_image(*size)), settings)
    assert views * 4 <= settings.max_patches
    seen.add(views)
  assert seen == {1, 3, 4, 5, 6}


def test_smart_resize_equals_transformers():
  rng = np.random.default_rng(0)
  for _ in range(3000):
    height, width = (int(2 ** rng.uniform(0, 12)) for _ in range(2))
    if max(height, width) > 200 * min(height, width):
      continue
    bounds = {"factor": 28, "min_pixels": 3136, "max_pixels": int(rng.integers(3136, 10**6))}
    assert images.smart_resize(height, width, **bounds) == hf.smart_resize(height, width, **bounds)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_patches_of_other_modes_equal_transformers(mode):
  """The I;16 image has values up to 255, which are 8-bit levels."""
  image = Image.fromarray(random_image(60, 80, 4), "RGBA")
  image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
  settings = images.ImageSettings()
  patches, _ = images.preprocess_image(image, settings)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers warns about deprecated arguments
    expected, _ = hf_patches(image, settings)
  np.testing.assert_array_equal(patches, expected)


def test_transparent_palette_is_composited_onto_white():
  image = Image.new("P", (56, 56), 3)
  image.putpalette([10, 20, 30] * 8)
  np.testing.assert_array_equal(images.decode_image(encoded(image)).getpixel((0, 0)), [10, 20, 30])
  decoded = images.decode_image(encoded(image, transparency=3))
  np.testing.assert_array_equal(np.asarray(decoded), 255)


def test_png_bytes_arrays_and_pillow_images_agree():
  array = random_image(50, 70)
  settings = images.ImageSettings()
  expected, _ = images.preprocess_image(array, settings)
  for image in (encoded(array), Image.fromarray(array)):
    np.testing.assert_array_equal(images.preprocess_image(image, settings)[0], expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba_arrays_are_decoded(channels):
  array = random_image(40, 30, channels)
  assert images.decode_image(array).mode == "RGB"
  assert images.decode_image(array[..., None] if channels == 1 else array).size == (30, 40)


def test_exif_orientation_of_a_file_is_applied():
  exif = Image.Exif()
  exif[0x0112] = 6  # viewers rotate the image clockwise by 90 degrees
  data = encoded(random_image(40, 60), "JPEG", exif=exif)
  assert images.decode_image(data).size == (40, 60)
  assert images.decode_image(Image.open(io.BytesIO(data))).size == (60, 40)


def test_patches_of_one_visual_token_are_adjacent():
  settings = images.ImageSettings(
    patch_size=2, merge_size=2, min_pixels=1, image_mean=(0, 0, 0), image_std=(1, 1, 1)
  )
  array = np.zeros((8, 8, 3), np.uint8)
  array[:4, 4:] = 255  # the second visual token
  patches, grid = images.preprocess_image(array, settings)
  assert grid == (1, 4, 4)
  np.testing.assert_array_equal(patches.mean(axis=1), [0] * 4 + [1] * 4 + [0] * 8)


PNG = encoded(random_image(200, 200))
JPEG = encoded(random_image(200, 200), "JPEG")


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"not an image",
    PNG[:30],
    PNG[: len(PNG) // 2],
    JPEG[: len(JPEG) // 2],
    PNG[:8] + b"\0" * 99,
  ],
)
def test_error_for_damaged_file_names_the_image(data):
  with pytest.raises(images.ImageError, match="example 'a', image 1: ."):
    images.preprocess_image(data, images.ImageSettings(), "example 'a', image 1")


RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))  # dark left, bright right
UNIT_RAMP = (RAMP / 65535).astype(np.float32)


def make_tiff(values, *, bits=16, white_is_zero=False):
  """Returns an uncompressed grey TIFF file, with fields that Pillow does not write."""
  height, width = values.shape
  if bits == 12:  # two values in three bytes
    pairs = values.reshape(height, -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1)
    pixels = packed.astype(np.uint8).tobytes()
  else:
    pixels = values.astype("<u2").tobytes()
  tags = {
    256: width,
    257: height,
    258: bits,
    259: 1,  # no compression
    262: 0 if white_is_zero else 1,
    273: 8,  # offset of the pixels
    277: 1,
    278: height,
    279: len(pixels),
  }
  directory = struct.pack("<H", len(tags))
  for tag, value in tags.items():
    directory += struct.pack("<HHII", tag, 4, 1, value)
  header = b"II*\0" + struct.pack("<I", 8 + len(pixels))
  return header + pixels + directory + struct.pack("<I", 0)


def make_png_with_transparency(values, transparent):
  """Returns a 16-bit grey PNG file in which pixels of value `transparent` are transparent."""
  data = encoded(Image.fromarray(values))
  chunk = b"tRNS" + struct.pack(">H", transparent)
  chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
  at = data.index(b"IDAT") - 4
  return data[:at] + chunk + data[at:]


@pytest.mark.parametrize(
  "image",
  [
    pytest.param(encoded(Image.fromarray(RAMP)), id="16-bit PNG"),
    pytest.param(encoded(Image.fromarray(RAMP), "TIFF"), id="16-bit TIFF"),
    pytest.param(encoded(Image.fromarray(RAMP), "PPM"), id="16-bit PGM"),
    pytest.param(make_tiff(RAMP >> 4, bits=12), id="12-bit TIFF"),
    pytest.param(make_tiff(65535 - RAMP, white_is_zero=True), id="TIFF in which 0 is white"),
    pytest.param(encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), id="32-bit TIFF"),
    pytest.param(encoded(Image.fromarray(UNIT_RAMP), "TIFF"), id="floats up to 1"),
    pytest.param(encoded(Image.fromarray(UNIT_RAMP * 255), "TIFF"), id="floats up to 255"),
    pytest.param(Image.frombytes("I;16", (64, 64), RAMP.tobytes()), id="I;16"),
    pytest.param(Image.frombytes("I;16L", (64, 64), RAMP.astype("<u2").tobytes()), id="I;16L"),
    pytest.param(Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()), id="I;16B"),
    pytest.param(Image.fromarray(RAMP.astype(np.int32)), id="I"),
    pytest.param(Image.fromarray(UNIT_RAMP), id="F"),
  ],
)
def test_grey_images_of_more_than_8_bits_are_scaled(image):
  levels = np.asarray(images.decode_image(image))
  assert levels.shape == (64, 64, 3)
  np.testing.assert_allclose(levels[..., 0], RAMP / 257, atol=1)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_grey_values_up_to_255_are_8_bit_levels(dtype):
  values = random_image(20, 30, 1)
  decoded = images.decode_image(encoded(values.astype(dtype), "TIFF"))
  np.testing.assert_array_equal(np.asarray(decoded), np.repeat(values[..., None], 3, -1))


def test_16_bit_image_is_rotated_and_composited_onto_white():
  exif = Image.Exif()
  exif[0x0112] = 6
  rotated = np.asarray(images.decode_image(encoded(Image.fromarray(RAMP[:32]), exif=exif)))
  np.testing.assert_allclose(rotated[..., 0], np.rot90(RAMP[:32], -1) / 257, atol=1)
  decoded = np.asarray(images.decode_image(make_png_with_transparency(RAMP, transparent=0)))
  assert (decoded[:, 0] == 255).all()
  np.testing.assert_allclose(decoded[:, 1:, 0], RAMP[:, 1:] / 257, atol=1)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (RAMP.astype(np.int32) * 2, "from 0 to 131070: expected integers from 0 to 65535"),
    (RAMP.astype(np.int32) - 7, "from -7 to 65528: expected integers from 0 to 65535"),
    (UNIT_RAMP * 65535, "from 0 to 65535: expected floats from 0 to 1, or from 0 to 255"),
    (UNIT_RAMP - 0.5, "from -0.5 to 0.5: expected floats from 0 to 1, or from 0 to 255"),
    (np.full_like(UNIT_RAMP, np.nan), "expected finite values, got NaN or infinity"),
    (np.full_like(UNIT_RAMP, np.inf), "expected finite values, got NaN or infinity"),
  ],
)
def test_grey_values_outside_the_range_are_refused(values, message):
  with pytest.raises(images.ImageError, match=f"^example 'a', image 0: .*{message}"):
    images.decode_image(encoded(values, "TIFF"), "example 'a', image 0")


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "not an image: the file is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    (b"<!DOCTYPE html>\n<title>404</title>", "not an image: an HTML page that begins with '<!DOC"),
    (b'\n<html lang="en">', "not an image: an HTML page"),
    (b'<?xml version="1.0"?>\n<svg width="1">', "an SVG image"),
    (b'{"error": "not found"}', 'not an image: JSON that begins with \'{"error"'),
    ("Größe unbekannt\n".encode(), "not an image: text that begins with 'Größe"),
    (b"iVBORw0KGgoAAAANSUhEUg", "base64 text .* decode it first"),
    (b"\0\0\0\x18ftypisom" + bytes(20), "not an image: an MP4 or QuickTime video"),
    (b"\x1a\x45\xdf\xa3" + bytes(20), "not an image: a Matroska or WebM video"),
    (b"RIFF\0\1\0\0AVI LIST", "not an image: an AVI video"),
    (b"%PDF-1.7", "not an image: a PDF document"),
    (b"\1\2\3\xff", "4 bytes that begin with 01 02 03 ff"),
    (PNG[:30], "a truncated or damaged PNG file of 30 bytes"),
    (PNG[: len(PNG) // 2], "a truncated or damaged PNG file of .* bytes: image file is truncated"),
    (JPEG[:4], "a truncated or damaged JPEG file of 4 bytes"),
    (JPEG[: len(JPEG) // 2], "a truncated or damaged JPEG file of .* bytes: image file is trunca"),
  ],
)
def test_error_says_what_undecodable_bytes_look_like(data, message):
  with pytest.raises(images.ImageError, match=f"^data.jsonl:3, image 0: .*{message}") as error:
    images.decode_image(data, "data.jsonl:3, image 0")
  assert "BytesIO" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((0, 5, 3), np.uint8),
    np.zeros((5, 5, 3), np.float32),
    np.zeros((5, 5, 2, 3), np.uint8),
    np.zeros((5, 5, 5), np.uint8),
    Image.new("RGB", (0, 4)),
    np.zeros((1, 201, 3), np.uint8),
    "image.png",
    None,
  ],
)
def test_error_for_unusable_image_names_it(image):
  with pytest.raises(images.ImageError, match="image 7: ."):
    images.preprocess_image(image, images.ImageSettings(), "image 7")


def test_images_with_too_many_pixels_are_refused_before_decoding():
  image = Image.new("1", (10_000, 9_000))
  with pytest.raises(images.ImageError, match="bomb: .*10000x9000"):
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    images.decode_image(encoded(image), "bomb")


def test_settings_accept_both_forms_of_the_pixel_bounds():
  size = {"shortest_edge": 100, "longest_edge": 200}
  assert images.ImageSettings.from_config({"size": size}) == images.ImageSettings(
    min_pixels=100, max_pixels=200
  )
  # As in transformers, min_pixels and max_pixels take precedence.
  both = images.ImageSettings.from_config({"size": size, "max_pixels": 300, "min_pixels": None})
  assert (both.min_pixels, both.max_pixels) == (100, 300)


@pytest.mark.parametrize(
  "config", [{"do_resize": False}, {"resample": 2}, {"min_pixels": 9, "max_pixels": 8}]
)
def test_unsupported_settings_are_refused(config):
  with pytest.raises(ValueError, match="|".join(config)):
    images.ImageSettings.from_config(config)

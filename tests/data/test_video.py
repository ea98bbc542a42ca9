"""Patches of videos equal those of transformers, which make_video_reference.py has stored."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from jaxrl_vlm.data import video
from jaxrl_vlm.data.images import ImageError
from tests.data import make_video_reference as cases
from tests.data.reference import VIDEOS

SETTINGS = {"qwen2": video.Qwen2VideoSettings(), "qwen3": video.Qwen3VideoSettings()}


@pytest.fixture(scope="module")
def reference():
  return json.loads(VIDEOS.read_text())


@pytest.fixture(scope="module")
def pixels():
  return np.load(VIDEOS.with_suffix(".npz"))


def attempt(function, *args):
  """Returns the result of the function as a list, or None if it raises ValueError."""
  try:
    return np.asarray(function(*args)).tolist()
  except ValueError:
    return None


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_frames_equal_transformers(reference, kind):
  grid = list(itertools.product(cases.TOTALS, cases.RATES))
  compared = 0
  for options, expected in zip(cases.SAMPLING[kind], reference["frames"][kind], strict=True):
    settings = SETTINGS[kind].updated(options | {"do_sample_frames": True}, "file")
    for (total, fps), indices in zip(grid, expected, strict=True):
      found = attempt(settings.frame_indices, total, fps)
      assert cases.shortened(found) == indices, (options, total, fps)
      compared += indices is not None
  assert compared > 400


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_sizes_equal_transformers(reference, kind):
  grid = list(itertools.product(cases.COUNTS, cases.SIZES))
  compared = 0
  for options, expected in zip(cases.SIZING[kind], reference["sizes"][kind], strict=True):
    settings = SETTINGS[kind].updated(options, "file")
    for (count, size), resized in zip(grid, expected, strict=True):
      found = attempt(settings.frame_size, count, *size)
      assert found == resized, (options, count, size)
      compared += resized is not None
  assert compared > 120


@pytest.mark.parametrize(
  "family, index",
  [(family, index) for family, clips in cases.CLIPS.items() for index in range(len(clips))],
)
def test_pixels_equal_transformers(pixels, family, index):
  options = cases.directory_options(family)
  size = {"shortest_edge": options["min_pixels"], "longest_edge": options["max_pixels"]}
  settings = SETTINGS[family[:5]].updated(
    {"patch_size": options["patch_size"], "size": size}, "file"
  )
  frames, fps = cases.make_clip(family, index)
  patches, grid, indices = video.preprocess_video(video.Video(frames, fps), settings)
  assert grid == tuple(pixels[f"{family}_{index}_grid"].tolist())
  expected = pixels[f"{family}_{index}"].astype(np.float32)
  assert patches.shape == expected.shape
  assert len(indices) <= 2 * grid[0]
  images = settings.images
  channels = patches.reshape(len(patches), 3, -1)
  mean, std = (np.array(v)[:, None] for v in (images.image_mean, images.image_std))
  levels = (channels * std + mean).reshape(expected.shape) * 255
  # The reference was resized by torchvision, which rounds differently from Pillow. The additional
  # 1e-3 allows for float32.
  assert np.abs(levels - expected).max() <= 1 + 1e-3


def test_the_last_frame_is_repeated_to_fill_the_last_patch():
  frames, fps = cases.make_clip("qwen2_5_vl", 2)
  settings = video.Qwen2VideoSettings()
  short, grid, _ = video.preprocess_video(video.Video(frames, fps), settings)
  longer = video.Video(np.concatenate([frames, frames[-1:]]), fps)
  patches, longer_grid, _ = video.preprocess_video(longer, settings)
  assert grid == longer_grid
  np.testing.assert_array_equal(short, patches)


def test_arrays_and_sequences_of_images_agree():
  frames, fps = cases.make_clip("qwen2_vl", 0)
  settings = video.Qwen2VideoSettings()
  expected, *_ = video.preprocess_video(video.Video(frames, fps), settings)
  for images in (list(frames), tuple(Image.fromarray(frame) for frame in frames)):
    patches, *_ = video.preprocess_video(video.Video(images, fps), settings)
    np.testing.assert_array_equal(patches, expected)


def black(frames, height=28, width=28):
  return np.zeros((frames, height, width, 3), np.uint8)


@pytest.mark.parametrize(
  "clip, kind, message",
  [
    (black(4), "qwen2", "expected a Video, got ndarray"),
    (video.Video(black(0), 2), "qwen2", "0 frames at fps=2: expected at least one and fps > 0"),
    (video.Video(black(4), 0), "qwen2", "4 frames at fps=0: expected at least one and fps > 0"),
    (video.Video([*black(2), *black(1, 20)], 2), "qwen2", "frame 2: size 28x20: expected 28x28"),
    (video.Video([*black(2), b"broken"], 2), "qwen2", "frame 2: "),
    (video.Video(black(4, 2, 402), 2), "qwen2", "aspect ratio 201"),
    (video.Video(black(4, 2, 402), 2), "qwen3", "aspect ratio"),
    (video.Video(black(1), 2), "qwen3", "1 frames: expected at least 2"),
  ],
)
def test_unusable_videos_name_the_video(clip, kind, message):
  with pytest.raises(ImageError, match=f"example 'a', video 1.*{message}"):
    video.preprocess_video(clip, SETTINGS[kind], "example 'a', video 1")


def test_sampling_more_frames_than_the_video_has_is_an_error():
  settings = SETTINGS["qwen2"].updated({"do_sample_frames": True, "num_frames": 8}, "file")
  with pytest.raises(ImageError, match="v: 5 frames at 2 per second: cannot sample 8 of them"):
    video.preprocess_video(video.Video(black(5), 2), settings, "v")


def test_setting_both_fps_and_num_frames_is_an_error():
  with pytest.raises(ValueError, match="file.json: fps=2 and num_frames=4: expected only one"):
    SETTINGS["qwen3"].updated({"num_frames": 4}, "file.json")

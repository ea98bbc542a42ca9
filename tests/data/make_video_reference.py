"""Writes video_reference.json and video_reference.npz, results of transformers' video processors.

The video processors need torchvision, which the project does not install. Therefore this script
runs in an environment of its own, once per version of transformers, and the tests compare with the
files that it wrote:

    python3 -m venv /tmp/video && /tmp/video/bin/pip install torch==2.13.0 transformers==5.23 pillow
    /tmp/video/bin/pip install --no-deps torchvision==0.28.0
    PYTHONPATH=. /tmp/video/bin/python tests/data/make_video_reference.py

The tests import the cases from this module.
"""

import itertools
import json
import pathlib
import tempfile

import numpy as np

FOLDER = pathlib.Path(__file__).parent

# Settings for the choice of frames.
SAMPLING = {
  "qwen2": [
    {"fps": 1},
    {"fps": 2},
    {"fps": 2.5, "min_frames": 8},
    {"fps": 24, "max_frames": 9},
    {"fps": 0.3, "temporal_patch_size": 3},
    {"num_frames": 4},
    {"num_frames": 7},
    {"num_frames": 13, "temporal_patch_size": 4},
    {"num_frames": 14},
    {"num_frames": 28},
    {"fps": 2, "min_frames": 5, "max_frames": 31},
  ],
  "qwen3": [
    {},
    {"fps": 1},
    {"fps": 4, "min_frames": 2},
    {"fps": 0.1, "min_frames": 1},
    {"fps": 30, "max_frames": 10},
    {"fps": 3.7, "min_frames": 6, "max_frames": 50},
    {"min_frames": 7, "temporal_patch_size": 3},
  ],
}
TOTALS = (1, 2, 3, 4, 5, 7, 8, 15, 17, 30, 34, 100, 301, 777, 5000)
RATES = (1, 6.25, 23.976, 30, 60)

SIZING = {
  "qwen2": [
    {},
    {"min_pixels": 3136, "max_pixels": 12845056},
    {"cap_pixels_per_frame": True},
    {"cap_pixels_per_frame": True, "max_video_tokens": 4000, "patch_size": 16},
    {"patch_size": 8, "min_pixels": 256, "max_pixels": 4096},
  ],
  "qwen3": [
    {},
    {"size": {"shortest_edge": 4096, "longest_edge": 25165824}},
    {"cap_pixels_per_frame": True},
    {
      "cap_pixels_per_frame": True,
      "max_video_tokens": 64,
      "size": {"shortest_edge": 4096, "longest_edge": 25165824},
    },
    {"patch_size": 8, "size": {"shortest_edge": 1024, "longest_edge": 65536}},
  ],
}
COUNTS = (1, 2, 3, 8, 61, 768)
SIZES = ((1, 1), (20, 300), (9, 2000), (28, 28), (100, 37), (240, 426), (1080, 1920), (2160, 3840))

# Frames, height, width and frames per second. The settings below keep the number of pixels small.
CLIPS = {
  "qwen2_vl": [(4, 20, 30, 2), (5, 48, 17, 3), (1, 16, 16, 1), (6, 9, 70, 7.5)],
  "qwen2_5_vl": [(4, 20, 30, 2), (5, 48, 17, 3), (3, 33, 32, 0.7), (9, 16, 40, 24)],
  "qwen3_vl": [(4, 20, 30, 2), (7, 48, 17, 3), (30, 33, 32, 10), (61, 16, 40, 24), (3, 90, 120, 1)],
}
SMALL = {"patch_size": 4, "min_pixels": 8 * 8, "max_pixels": 24 * 8 * 8}
SMALL_TOTAL = SMALL | {"min_pixels": 4 * 8 * 8, "max_pixels": 60 * 8 * 8}
# One letter per part of a message: I is an image, V a video, t a text.
CHATS = ["V", "tV", "VtV", "IV", "VItV", "tIVtIt"]
IMAGE_SIZES = ((30, 21), (16, 64), (9, 9))


def directory_options(family):
  return SMALL_TOTAL if family == "qwen3_vl" else SMALL


def make_clip(family, index):
  """Returns a clip u8[T, H, W, 3] and its frames per second.

  The upper half is a moving gradient and the lower half is noise, which resizing changes most.
  """
  frames, height, width, fps = CLIPS[family][index]
  rng = np.random.default_rng(index)
  t, y, x = np.indices((frames, height, width))
  gradient = np.stack([x * 255 // width, y * 255 // height, (5 * t + 2 * x) % 256], axis=-1)
  noise = rng.integers(0, 256, gradient.shape)
  return np.where(y[..., None] < height // 2, gradient, noise).astype(np.uint8), fps


def make_chat(family, letters):
  """Returns the messages, images u8[H, W, 3] and videos (as from make_clip) of one chat."""
  rng = np.random.default_rng(7)
  content, images, videos = [], [], []
  for letter in letters:
    if letter == "I":
      content.append({"type": "image"})
      images.append(rng.integers(0, 256, (*IMAGE_SIZES[len(images)], 3), dtype=np.uint8))
    elif letter == "V":
      content.append({"type": "video"})
      videos.append(make_clip(family, (len(letters) + len(videos)) % len(CLIPS[family])))
    else:
      content.append({"type": "text", "text": f" How many red circles, {len(content)}?\n"})
  content.append({"type": "text", "text": "Think step by step."})
  return [{"role": "user", "content": content}], images, videos


def tolerate_missing_operators():
  """Allows importing a torchvision whose compiled operators do not fit the installed torch.

  This script uses none of these operators.
  """
  import torch

  register = torch.library.register_fake

  def patched(name, *args, **kwargs):
    if isinstance(name, str) and name.startswith("torchvision::"):
      return lambda function: function
    return register(name, *args, **kwargs)

  torch.library.register_fake = patched


def attempt(function, *args, **options):
  """Returns the result of the function, or None if it raises an expected error."""
  try:
    return function(*args, **options)
  except (ValueError, ZeroDivisionError, RuntimeError, TypeError):
    return None


def main():
  tolerate_missing_operators()
  import torch
  import transformers
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
  from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
  from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
  from transformers.video_utils import VideoMetadata

  from tests.tiny_processor import make_processor_dir

  classes = {"qwen2": Qwen2VLVideoProcessor, "qwen3": Qwen3VLVideoProcessor}

  def sampled(kind, settings, total, fps):
    processor = classes[kind](**settings)
    names = processor.valid_kwargs.__annotations__
    options = {name: getattr(processor, name, None) for name in names}
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    return np.asarray(processor.sample_frames(metadata=metadata, **options)).tolist()

  class OfShape:
    def __init__(self, *shape):
      self.shape = shape

  def sized(kind, settings, count, height, width):
    processor = classes[kind](**settings)
    base = classes[kind].__mro__[1]
    resize, base.resize = base.resize, lambda self, image, size, resample: size
    try:
      size = processor.resize(
        videos=OfShape(1, count, 3, height, width),
        size=processor.size,
        resample=processor.resample,
        factor=processor.patch_size * processor.merge_size,
        temporal_factor=processor.temporal_patch_size,
        cap_pixels_per_frame=processor.cap_pixels_per_frame,
      )
    finally:
      base.resize = resize
    return [size.height, size.width]

  out = {"transformers": transformers.__version__}
  out["frames"] = {
    kind: [
      [
        attempt(sampled, kind, settings, total, fps)
        for total, fps in itertools.product(TOTALS, RATES)
      ]
      for settings in cases
    ]
    for kind, cases in SAMPLING.items()
  }
  out["sizes"] = {
    kind: [
      [
        attempt(sized, kind, settings, count, *size)
        for count, size in itertools.product(COUNTS, SIZES)
      ]
      for settings in cases
    ]
    for kind, cases in SIZING.items()
  }
  # Long lists of frame indices are shortened.
  for cases in out["frames"].values():
    for case in cases:
      case[:] = [shortened(indices) for indices in case]

  pixels = {}
  out["chats"] = {}
  for family, name in (
    ("qwen2_vl", "Qwen2VL"),
    ("qwen2_5_vl", "Qwen2_5_VL"),
    ("qwen3_vl", "Qwen3VL"),
  ):
    path = make_processor_dir(tempfile.mkdtemp(), family=family, **directory_options(family))
    video = classes[family[:5]].from_pretrained(path)
    processor = getattr(transformers, f"{name}Processor")(
      Qwen2VLImageProcessorPil.from_pretrained(path),
      transformers.AutoTokenizer.from_pretrained(path),
      video,
    )
    mean, std = (np.array(v)[None, :, None] for v in (video.image_mean, video.image_std))
    for index in range(len(CLIPS[family])):
      frames, fps = make_clip(family, index)
      metadata = {"total_num_frames": len(frames), "fps": fps}
      outputs = attempt(
        video, [torch.from_numpy(frames)], video_metadata=[metadata], return_tensors="np"
      )
      if outputs is None:
        continue
      values = outputs["pixel_values_videos"].reshape(-1, 3, 2 * SMALL["patch_size"] ** 2)
      levels = (values * std + mean) * 255
      assert np.abs(levels - levels.round()).max() < 1e-2
      pixels[f"{family}_{index}"] = levels.round().astype(np.uint8).reshape(len(values), -1)
      pixels[f"{family}_{index}_grid"] = outputs["video_grid_thw"][0]
    out["chats"][family] = []
    for letters in CHATS:
      messages, images, videos = make_chat(family, letters)
      text = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
      )
      outputs = processor(
        text=[text],
        images=images or None,
        videos=[torch.from_numpy(frames) for frames, _ in videos] or None,
        video_metadata=[{"total_num_frames": len(frames), "fps": fps} for frames, fps in videos]
        or None,
        return_tensors="pt",
      )
      names = ("input_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
      out["chats"][family].append(
        {name: torch.as_tensor(outputs[name]).tolist() for name in names if name in outputs}
      )
  (FOLDER / "video_reference.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
  np.savez_compressed(FOLDER / "video_reference.npz", **pixels)


def shortened(indices):
  """Returns frame indices, or their count, first and last values and weighted sum if many."""
  if indices is None or len(indices) <= 16:
    return indices
  weighted = sum(i * index for i, index in enumerate(indices, 1))
  return {"count": len(indices), "ends": indices[:4] + indices[-4:], "sum": weighted}


if __name__ == "__main__":
  main()

"""Makes tiny models of every family with random weights, saved by transformers."""

import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.data.video import Video
from jaxrl_vlm.models import ModelConfig
from tests import tiny_processor

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3")

# With several threads, models of this size run slower, above all if another process uses the cores.
torch.set_num_threads(1)


def hf_config(family: str, processor_config: dict[str, Any], tied: bool) -> Any:
  """Returns a small config with the token ids and vision sizes of a processor's config.json."""
  given = processor_config
  vision = dict(given["vision_config"])
  text: dict[str, Any] = dict(
    vocab_size=given["vocab_size"],
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    bos_token_id=given["bos_token_id"],
    eos_token_id=given["eos_token_id"],
  )
  rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
  if family == "qwen2_vl":
    vision |= dict(depth=3, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=2)
    text |= dict(rope_parameters=rope)
  elif family == "qwen2_5_vl":
    vision |= dict(
      depth=3,
      hidden_size=32,
      intermediate_size=48,
      num_heads=2,
      out_hidden_size=64,
      fullatt_block_indexes=[1],
    )
    text |= dict(rope_parameters=rope)
  elif family == "gemma3":
    vision |= dict(
      model_type="siglip_vision_model",
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=2,
      vision_use_head=False,
    )
    text |= dict(
      num_hidden_layers=5,
      head_dim=16,
      query_pre_attn_scalar=24,
      sliding_window=9,
      sliding_window_pattern=3,
      rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    )
  else:
    vision |= dict(
      depth=3,
      hidden_size=32,
      intermediate_size=48,
      num_heads=2,
      out_hidden_size=64,
      num_position_embeddings=25,
      deepstack_visual_indexes=[0, 1],
    )
    text |= dict(head_dim=16, rope_parameters=rope | {"mrope_interleaved": True})
    if family == "qwen3_vl_moe":
      text |= dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
  ids = {
    k: v
    for k, v in given.items()
    if k.endswith(("_token_id", "_token_index")) and k[:3] not in ("bos", "eos")
  }
  ids |= {k: given[k] for k in ("mm_tokens_per_image",) if k in given}
  return transformers.AutoConfig.for_model(
    family, text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids
  )


def make_hf(
  path: pathlib.Path,
  *,
  family: str = "qwen2_5_vl",
  tied: bool = False,
  seed: int = 0,
  dtype: torch.dtype = torch.float32,
  **saving,
):
  """Writes a checkpoint directory with processor and model. Returns the torch model."""
  tiny_processor.make_processor_dir(path, family=family)
  generation = (path / "generation_config.json").read_text()
  config = hf_config(family, json.loads((path / "config.json").read_text()), tied)
  torch.manual_seed(seed)
  model = transformers.AutoModelForImageTextToText.from_config(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      # transformers initializes biases to 0 and scales to 1. A test would not notice if such a
      # parameter were loaded under a wrong name. And with its small initial weights, outputs would
      # hardly depend on the image.
      if parameter.ndim == 1 or not parameter.any():
        parameter.add_(0.1 * torch.randn_like(parameter))
      elif "embed_tokens" not in name or not tied:
        parameter.mul_(4.0)
  model.to(dtype).save_pretrained(path, **saving)
  (path / "generation_config.json").write_text(generation)
  return model


def images(*sizes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
  """Returns random images uint8[height, width, 3] of the given (height, width)."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def turn(*content: str | None):
  """Returns a user message. None stands for an image, and "<video>" for a video."""
  parts = [
    {"type": "image"}
    if c is None
    else {"type": "video"}
    if c == "<video>"
    else {"type": "text", "text": c}
    for c in content
  ]
  return [{"role": "user", "content": parts}]


def conversations(seed: int = 0):
  """Returns messages and images: text only, one image, several images of different sizes."""
  messages = [
    turn("what is three plus four"),
    turn(None, "what digit is this"),
    turn("first", None, "then", None, "which is larger"),
  ]
  return messages, [[], images((40, 56), seed=seed), images((64, 32), (28, 84), seed=seed + 1)]


def mixed_batch(processor: Processor, family: str):
  """Returns a Prompt whose rows differ in their images and videos.

  The rows have only text, one image, several images of different shapes, the smallest image and the
  largest image that are allowed. If the family supports videos, one more row has a video, and
  another one a video and an image.
  """
  messages, pictures = conversations()
  side = int(getattr(processor.image_settings, "max_pixels", 0) ** 0.5)
  messages += [turn(None, "small"), turn(None, "large"), turn("wide", None, "and tall", None)]
  pictures += [images((1, 1)), images((side or 90, side or 90)), images((20, 160), (170, 15))]
  videos: list[list[Video]] = [[] for _ in messages]
  if family != "gemma3":
    frames = np.stack(images(*[(40, 60)] * 7, seed=3))
    messages += [turn("<video>", "what moves"), turn(None, "see", "<video>", "and compare")]
    pictures += [[], images((30, 70), seed=5)]
    videos += [[Video(frames, fps=2.0)], [Video(frames[:4], fps=1.0)]]
  return processor(messages, pictures, videos)


def torch_inputs(model, prompt, row: int) -> dict[str, torch.Tensor]:
  """Converts the patches and token ids of one row of a Prompt to inputs of transformers."""
  config = model.config
  length = int(prompt.length[row])
  ids = np.asarray(prompt.tokens[row, :length]).astype(np.int64)
  inputs = {"input_ids": torch.tensor(ids)[None]}
  image = ids == config.image_token_id
  video = ids == getattr(config, "video_token_id", -1)
  real = np.asarray(prompt.patch_segments[row]) > 0
  patches, grids = np.asarray(prompt.patches[row])[real], np.asarray(prompt.patch_grids[row])[real]
  segments = np.asarray(prompt.patch_segments[row])[real]
  positions = np.asarray(prompt.patch_positions[row])[real]
  if config.model_type == "gemma3":
    size, p = config.vision_config.image_size, config.vision_config.patch_size
    pixels = np.zeros((segments.max(initial=0), 3, size, size), np.float32)
    for patch, segment, (r, c) in zip(patches, segments, positions, strict=True):
      pixels[segment - 1, :, r * p : (r + 1) * p, c * p : (c + 1) * p] = patch.reshape(3, p, p)
    inputs["token_type_ids"] = torch.tensor(image.astype(np.int64))[None]
    return inputs | ({"pixel_values": torch.tensor(pixels)} if len(pixels) else {})
  inputs["mm_token_type_ids"] = torch.tensor(image + 2 * video.astype(np.int64))[None]
  merge = config.vision_config.spatial_merge_size**2
  start = 0  # index of the first patch of the current image or video
  found: dict[bool, list] = {False: [], True: []}
  kinds = np.where(image, 1, np.where(video, 2, 0))
  edges = np.flatnonzero(np.diff(kinds, prepend=0, append=0))
  for begin, end in zip(edges[::1], edges[1:], strict=False):
    if kinds[begin]:
      span = slice(start, start + (end - begin) * merge)
      frames = len(np.unique(segments[span]))
      found[bool(kinds[begin] == 2)].append((patches[span], (frames, *grids[start])))
      start = span.stop
  for is_video, pixels, grid in (
    (False, "pixel_values", "image_grid_thw"),
    (True, "pixel_values_videos", "video_grid_thw"),
  ):
    if found[is_video]:
      inputs[pixels] = torch.tensor(np.concatenate([a for a, _ in found[is_video]]))
      inputs[grid] = torch.tensor([[int(n) for n in g] for _, g in found[is_video]])
  if video.any() and config.model_type == "qwen2_5_vl":
    # The seconds between temporal patches, from the positions of the first two of each video.
    times = np.asarray(prompt.positions[row, :length, 0])
    per_second = config.vision_config.tokens_per_second
    starts = [b for b in edges[:-1] if kinds[b] == 2]
    inputs["second_per_grid_ts"] = torch.tensor(
      [
        (times[b + int(t[1:].prod()) // merge] - times[b]) / per_second
        for b, t in zip(starts, inputs["video_grid_thw"], strict=True)
      ]
    )
  return inputs


def torch_logits(model, prompt, row: int):
  """Computes the logits [length, V] of one row of a Prompt with transformers.

  It uses only the patches and token ids of the row. transformers computes the positions itself.
  """
  with torch.no_grad():
    return model(**torch_inputs(model, prompt, row)).logits[0].float().numpy()


def torch_greedy(model, prompt, row: int, config: ModelConfig, max_tokens: int):
  """Decodes greedily with transformers. Returns at most max_tokens tokens after a row of a Prompt.

  `config` is the config of our model. It has the pad token, the suppressed tokens and the stop
  tokens, of which there may be none.
  """
  inputs = torch_inputs(model, prompt, row)
  # The settings are stored in the model. Given as an argument of `generate`, settings that are None
  # would be filled in from those of the model.
  model.generation_config = transformers.GenerationConfig(
    max_new_tokens=max_tokens,
    do_sample=False,
    pad_token_id=config.pad_token,
    eos_token_id=list(config.stop_tokens) or None,
    suppress_tokens=list(config.suppressed_tokens),
  )
  # Without a mask, `generate` would treat pad tokens within the prompt as padding.
  mask = torch.ones_like(inputs["input_ids"])
  with torch.no_grad():
    tokens = model.generate(**inputs, attention_mask=mask)[0]
  return tokens[len(mask[0]) :].numpy()

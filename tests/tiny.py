"""A tiny Qwen2.5-VL with random weights, as a directory that transformers saved."""

import pathlib

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from jaxrl_vlm import models
from jaxrl_vlm.data.processor import Processor
from tests import tiny_processor


def make_hf(path: pathlib.Path, *, tied: bool = False, seed: int = 0):
  """Writes the directory; returns the torch model."""
  processor = tiny_processor.make_processor_dir(path)
  del processor
  ours = Processor.from_pretrained(path)
  vocab = len(ours.tokenizer)
  settings = ours.image_settings
  config = Qwen2_5_VLConfig(
      text_config=dict(
          vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
          num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
          bos_token_id=ours.pad_token_id, eos_token_id=ours.end_token_id,
          pad_token_id=ours.pad_token_id,
          rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}),
      vision_config=dict(
          depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
          patch_size=settings.patch_size, spatial_merge_size=settings.merge_size,
          temporal_patch_size=settings.temporal_patch_size, window_size=ours.window_size,
          fullatt_block_indexes=[1]),
      image_token_id=ours.image_token_id, video_token_id=ours.video_token_id,
      vision_start_token_id=ours.vision_start_token_id,
      vision_end_token_id=ours.vision_end_token_id, tie_word_embeddings=tied)
  torch.manual_seed(seed)
  model = Qwen2_5_VLForConditionalGeneration(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      # transformers starts biases at 0 and scales at 1, behind which a wrong name would hide;
      # and its small weights would give answers that hardly depend on the image.
      if parameter.ndim == 1:
        parameter.add_(0.1 * torch.randn_like(parameter))
      elif "embed_tokens" not in name or not tied:
        parameter.mul_(4.0)
  model.save_pretrained(path)
  return model


def images(*sizes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
  """Random pictures of (height, width)."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def conversations(seed: int = 0):
  """A mixed batch: text only, one image, several images of different sizes."""
  def turn(*content):
    parts = [{"type": "image"} if c is None else {"type": "text", "text": c} for c in content]
    return [{"role": "user", "content": parts}]

  messages = [turn("what is three plus four"), turn(None, "what digit is this"),
              turn("first", None, "then", None, "which is larger")]
  return messages, [[], images((40, 56), seed=seed), images((64, 32), (28, 84), seed=seed + 1)]


def torch_logits(model, prompt, row: int):
  """Logits [L, V] of one row of a Prompt by transformers, from its patches and token ids alone."""
  length = int(prompt.length[row])
  ids = torch.tensor(np.asarray(prompt.tokens[row, :length]).astype(np.int64))[None]
  segments = np.asarray(prompt.patch_segments[row])
  grids = []
  for segment in range(1, int(segments.max(initial=0)) + 1):
    rows, cols = np.asarray(prompt.patch_positions[row])[segments == segment].max(0) + 1
    grids.append((1, int(rows), int(cols)))
  inputs = {}
  if grids:
    inputs = dict(pixel_values=torch.tensor(np.asarray(prompt.patches[row])[segments > 0]),
                  image_grid_thw=torch.tensor(grids))
  types = (ids == model.config.image_token_id).long()
  with torch.no_grad():
    return model(input_ids=ids, mm_token_type_ids=types, **inputs).logits[0].numpy()


def load(path: pathlib.Path, **kwargs):
  return models.load_pretrained(path, **kwargs)

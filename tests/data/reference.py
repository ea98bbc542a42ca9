"""Functions of transformers that the tests of the data modules compare with."""

import functools
import itertools
import pathlib

import torch
import transformers
from transformers import vision_utils
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

NAMES = {
  "qwen2_vl": "Qwen2VL",
  "qwen2_5_vl": "Qwen2_5_VL",
  "qwen3_vl": "Qwen3VL",
  "qwen3_vl_moe": "Qwen3VLMoe",
}
QWEN = tuple(NAMES)
VIDEOS = pathlib.Path(__file__).with_name("video_reference.json")


def hf_processor(family, path, **image_options):
  """Returns the processor class of a family in transformers, loaded from a directory.

  Qwen's processors are made without a video processor, which needs torchvision.
  """
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  if family == "gemma3":
    images = Gemma3ImageProcessorPil.from_pretrained(path, **image_options)
    processor = transformers.AutoProcessor.from_pretrained(path)
    assert isinstance(processor, transformers.Gemma3Processor)
    processor.image_processor = images
    return processor
  base = getattr(transformers, f"{NAMES[family].removesuffix('Moe')}Processor")

  class WithoutVideos(base):
    def check_argument_for_proper_class(self, argument_name, argument):
      if argument is not None:
        return super().check_argument_for_proper_class(argument_name, argument)

  images = Qwen2VLImageProcessorPil.from_pretrained(path, **image_options)
  return WithoutVideos(images, tokenizer, None)


@functools.cache
def rope_model(family, image_token_id, video_token_id, tokens_per_second=4):
  """Returns a Qwen model without weights. Its index functions use only the config."""
  text = {
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
  }
  vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16}
  if family == "qwen2_5_vl":
    vision["tokens_per_second"] = tokens_per_second
  config = getattr(transformers, f"{NAMES[family]}Config")(
    image_token_id=image_token_id,
    video_token_id=video_token_id,
    text_config=text,
    vision_config=vision,
  )
  with torch.device("meta"):
    return getattr(transformers, f"{NAMES[family]}Model")(config)


def rope_index(
  family,
  tokens,
  image_token_id,
  video_token_id,
  image_grids=(),
  video_grids=(),
  seconds=(),
  tokens_per_second=4,
):
  """Computes position ids with the family's model.

  Args:
    family: A key of NAMES.
    tokens: i[L]; token ids, with one id per visual token.
    image_token_id: Id of an image token.
    video_token_id: Id of a video token.
    image_grids: (frames, rows, columns) of each image, in order.
    video_grids: (frames, rows, columns) of each video, in order.
    seconds: Duration of one temporal patch of each video in seconds. Only qwen2_5_vl uses it.
    tokens_per_second: Setting of the vision config. Only qwen2_5_vl uses it.

  Returns:
    The positions i64[L, 3], and the position id after the last one.
  """
  model = rope_model(family, image_token_id, video_token_id, tokens_per_second)
  types = (tokens == image_token_id).astype("int32") + 2 * (tokens == video_token_id)
  options = {}
  if family == "qwen2_5_vl" and len(seconds):
    options["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32)
  positions, delta = model.get_rope_index(
    torch.tensor(tokens)[None].long(),
    torch.tensor(types)[None],
    image_grid_thw=torch.tensor(image_grids) if len(image_grids) else None,
    video_grid_thw=torch.tensor(video_grids) if len(video_grids) else None,
    **options,
  )
  return positions[:, 0].T.numpy(), len(tokens) + delta.item()


def partition(labels):
  """Returns the sets of indices that have equal labels, independent of the labels' values."""
  groups = {}
  for index, label in enumerate(labels.tolist()):
    groups.setdefault(label, set()).add(index)
  return {frozenset(group) for group in groups.values()}


def hf_windows(thw, window_size):
  """Returns the attention windows of transformers as sets of patch indices.

  Patches have 14 pixels per side, and a visual token has 2 x 2 patches.
  """
  index, cumulative = vision_utils.get_vision_window_index(thw, 2, window_size, 14)
  order = (index[:, None] * 4 + torch.arange(4)).flatten().tolist()
  return {frozenset(order[a:b]) for a, b in itertools.pairwise(cumulative.tolist())}

"""Creates a Hugging Face directory of a new model: random weights and a newly trained tokenizer.

This is meant for models that are small enough to be trained from random weights, such as
`configs/digits_base.py`. A run then loads the directory like that of any other model.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrl_vlm import models
from jaxrl_vlm.models import weights

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS)

# Splits text before BPE: each digit is a separate piece, words keep their leading space, and
# "\boxed{" is one piece because every answer contains it.
_SPLIT = r" ?[a-zA-Z]+| ?[0-9]|\\boxed\{|[^\sa-zA-Z0-9\\]+ ?|\\|\s+"

CHAT_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
  "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
  "{% for part in message['content'] %}"
  "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
  "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
  "{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
  """Trains a byte-level BPE tokenizer with the special tokens and the chat format of Qwen.

  Byte-level means that encoding and decoding any text returns the same text.

  Args:
    texts: texts to train on.
    vocab_size: maximum size of the vocabulary, including special tokens.
  """
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  marks = ["<think>", "</think>"]
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(marks),
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.add_tokens(marks)
  fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    extra_special_tokens=list(SPECIAL_TOKENS),
    clean_up_tokenization_spaces=False,
  )
  fast.chat_template = CHAT_TEMPLATE
  return fast


def _config_json(architecture: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
  """Returns the `config.json` of a Qwen2.5-VL model.

  Args:
    architecture: as in `create`.
    ids: token ids of <|image_pad|>, <|video_pad|>, <|vision_start|>, <|vision_end|>, of the end of
      a turn (<|im_end|>), and of padding (<|endoftext|>).
  """
  text, vision = dict(architecture["text"]), dict(architecture["vision"])
  image, video, start, end, eos, pad = ids
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "dtype": "float32",
    "tie_word_embeddings": bool(architecture["tie_word_embeddings"]),
    "image_token_id": image,
    "video_token_id": video,
    "vision_start_token_id": start,
    "vision_end_token_id": end,
    "text_config": {
      "model_type": "qwen2_5_vl_text",
      "rms_norm_eps": 1e-6,
      "bos_token_id": pad,
      "eos_token_id": eos,
      "pad_token_id": pad,
      **text,
    },
    "vision_config": {
      "model_type": "qwen2_5_vl_vision",
      "out_hidden_size": text["hidden_size"],
      **vision,
    },
  }


def model_config(architecture: Mapping[str, Any]) -> models.ModelConfig:
  """Returns the config of the model that `create` writes, with arbitrary ids of special tokens."""
  return models.from_hf(_config_json(architecture, range(6)))


def create(
  path: str | pathlib.Path, architecture: Mapping[str, Any], texts: Iterable[str], seed: int = 0
) -> None:
  """Writes the Hugging Face directory of a new Qwen2.5-VL model with random weights.

  Args:
    path: directory to write. It is created if it does not exist.
    architecture: `text` and `vision`, the `text_config` and `vision_config` of a `config.json` of
      Qwen2.5-VL; `tie_word_embeddings`; and `min_pixels` and `max_pixels`, the minimum and maximum
      area of images. `text["vocab_size"]` is the size of the embeddings and the maximum size of the
      tokenizer's vocabulary.
    texts: texts on which the tokenizer is trained.
    seed: seed of the weights.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  vision = architecture["vision"]
  tokenizer = train_tokenizer(texts, architecture["text"]["vocab_size"])
  tokenizer.save_pretrained(path)
  ids: Any = tokenizer.convert_tokens_to_ids(
    [
      "<|image_pad|>",
      "<|video_pad|>",
      "<|vision_start|>",
      "<|vision_end|>",
      "<|im_end|>",
      "<|endoftext|>",
    ]
  )
  hf = _config_json(architecture, ids)
  eos, pad = ids[-2:]
  generation = {"eos_token_id": [eos], "pad_token_id": pad, "bos_token_id": pad}
  preprocessor = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": vision["patch_size"],
    "merge_size": vision["spatial_merge_size"],
    "temporal_patch_size": vision["temporal_patch_size"],
    "min_pixels": architecture["min_pixels"],
    "max_pixels": architecture["max_pixels"],
  }
  for name, content in (
    ("generation_config.json", generation),
    ("preprocessor_config.json", preprocessor),
  ):
    (path / name).write_text(json.dumps(content, indent=2))
  config = models.from_hf(hf)
  weights.save_params(path, config, models.init_params(config, jax.random.key(seed)))

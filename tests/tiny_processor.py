"""A Qwen-like tokenizer, chat template and processor configs, small enough to make in a test."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# In the order of the Qwen2.5-VL vocabulary.
SPECIAL_TOKENS = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|object_ref_start|>",
  "<|object_ref_end|>",
  "<|box_start|>",
  "<|box_end|>",
  "<|quad_start|>",
  "<|quad_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
TOOL_TOKENS = ("<tool_call>", "</tool_call>")  # added to the vocabulary, but not special

# The layout that Qwen2.5-VL was trained on.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""

_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
  "You are a helpful assistant. system user assistant",
  "How many red circles are in the image? What is the sum of the numbers in the top row?",
  "Think step by step and put the final answer in \\boxed{}. <think> </think> <answer> </answer>",
  "The answer is 42. There are three squares, two triangles and no circle in the image.",
)


def make_tokenizer() -> tokenizers.Tokenizer:
  """Byte-level BPE with Qwen's splitting rule, special tokens last; about 400 ids."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated", invert=False),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=432, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(_CORPUS * 2, trainer)
  tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  tokenizer.add_tokens(list(TOOL_TOKENS))
  return tokenizer


def make_processor_dir(
  path: str | pathlib.Path,
  *,
  patch_size: int = 14,
  temporal_patch_size: int = 2,
  merge_size: int = 2,
  window_size: int | None = 112,
  min_pixels: int | None = None,
  max_pixels: int = 64 * 28 * 28,
) -> pathlib.Path:
  """Writes everything `Processor.from_pretrained` reads; returns the directory.

  A `config.json` that is already there (a model's) keeps its fields; the token ids and the vision
  fields given here are put into it. `min_pixels=None` is one visual token.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  tokenizer = make_tokenizer()
  tokenizer.save(str(path / "tokenizer.json"))
  ids = {text: tokenizer.token_to_id(text) for text in SPECIAL_TOKENS}

  def write(name: str, value: dict):
    (path / name).write_text(json.dumps(value, indent=2))

  write(
    "tokenizer_config.json",
    {
      "tokenizer_class": "Qwen2Tokenizer",
      "eos_token": "<|im_end|>",
      "pad_token": "<|endoftext|>",
      "bos_token": None,
      "chat_template": CHAT_TEMPLATE,
      "model_max_length": 131072,
    },
  )
  write(
    "preprocessor_config.json",
    {
      "image_processor_type": "Qwen2VLImageProcessor",
      "processor_class": "Qwen2_5_VLProcessor",
      "patch_size": patch_size,
      "temporal_patch_size": temporal_patch_size,
      "merge_size": merge_size,
      "min_pixels": (patch_size * merge_size) ** 2 if min_pixels is None else min_pixels,
      "max_pixels": max_pixels,
      "image_mean": [0.48145466, 0.4578275, 0.40821073],
      "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
  )
  write(
    "generation_config.json",
    {
      "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
      "pad_token_id": ids["<|endoftext|>"],
    },
  )
  config_path = path / "config.json"
  config = json.loads(config_path.read_text()) if config_path.exists() else {}
  config.setdefault("model_type", "qwen2_5_vl")
  config.setdefault("vocab_size", tokenizer.get_vocab_size())
  config.setdefault("bos_token_id", ids["<|endoftext|>"])
  config.setdefault("eos_token_id", ids["<|im_end|>"])
  config |= {
    "vision_start_token_id": ids["<|vision_start|>"],
    "vision_end_token_id": ids["<|vision_end|>"],
    "vision_token_id": ids["<|vision_pad|>"],
    "image_token_id": ids["<|image_pad|>"],
    "video_token_id": ids["<|video_pad|>"],
  }
  vision = config.setdefault("vision_config", {})
  vision |= {
    "patch_size": patch_size,
    "temporal_patch_size": temporal_patch_size,
    "spatial_merge_size": merge_size,
  }
  if window_size is not None:
    vision["window_size"] = window_size
  write("config.json", config)
  return path

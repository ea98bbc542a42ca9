"""Makes small tokenizers, chat templates and processor configs of every family for tests."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

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

# In the order of the Gemma 3 vocabulary, where the first tokens come before the words.
GEMMA_FIRST_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
GEMMA_LAST_TOKENS = (
  "<start_of_turn>",
  "<end_of_turn>",
  "<start_of_image>",
  "<end_of_image>",
  "<image_soft_token>",
)
GEMMA_SPECIAL_TOKENS = GEMMA_FIRST_TOKENS + GEMMA_LAST_TOKENS

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3")

# Gives the prompt format that Qwen2.5-VL was trained on.
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

# Gives the prompt format that Gemma 3 was trained on. The text of the system message is placed at
# the beginning of the first user message.
GEMMA_CHAT_TEMPLATE = """\
{{ bos_token }}
{%- set ns = namespace(first='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- if message['content'] is string -%}
{%- set ns.first = message['content'] + '\n\n' -%}
{%- else -%}
{%- set ns.first = message['content'][0]['text'] + '\n\n' -%}
{%- endif -%}
{%- else -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
{{- ns.first }}
{%- set ns.first = '' -%}
{%- if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<start_of_image>' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\n' }}
{%- endif -%}"""

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
  """A byte-level BPE tokenizer of about 400 ids. It splits text as Qwen does.

  The special tokens come last.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated", invert=False),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=432, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(_CORPUS * 2, trainer)
  tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  tokenizer.add_tokens(list(TOOL_TOKENS))
  return tokenizer


def make_gemma_tokenizer() -> tokenizers.Tokenizer:
  """A BPE tokenizer like that of Gemma, with spaces as "▁" and with byte fallback.

  Sequences of newlines are added tokens.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  tokenizer.normalizer = normalizers.Replace(" ", "▁")
  tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  letters = sorted(set("".join(_CORPUS)) - {" "}) + ["▁"]
  lines = ["\n" * count for count in range(1, 5)]
  some_bytes = [f"<0x{value:02X}>" for value in range(256)]
  trainer = trainers.BpeTrainer(
    vocab_size=500,
    initial_alphabet=letters,
    # Not all of these are special tokens. But the trainer places all of them before the words.
    special_tokens=[*GEMMA_FIRST_TOKENS, *some_bytes, *lines],
    show_progress=False,
  )
  # The trainer is given single words, so that no trained token contains a space within it. The
  # splitting rule cannot prevent such tokens, because the normalizer has replaced the spaces.
  words = [" " * (i > 0) + word for text in _CORPUS for i, word in enumerate(text.split(" "))]
  tokenizer.train_from_iterator(words * 2, trainer)
  tokenizer = _without_added_tokens(tokenizer)
  tokenizer.add_tokens(lines)
  tokenizer.add_special_tokens([*GEMMA_FIRST_TOKENS, *GEMMA_LAST_TOKENS])
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<bos> $A",
    pair="<bos> $A <bos> $B",
    special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))],
  )
  return tokenizer


def _without_added_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """Returns the same vocabulary, in which the special tokens of the trainer are ordinary tokens."""
  state = json.loads(tokenizer.to_str())
  state["added_tokens"] = []
  return tokenizers.Tokenizer.from_str(json.dumps(state))


def make_processor_dir(
  path: str | pathlib.Path,
  *,
  family: str = "qwen2_5_vl",
  patch_size: int = 14,
  temporal_patch_size: int = 2,
  merge_size: int = 2,
  window_size: int | None = 112,
  min_pixels: int | None = None,
  max_pixels: int | None = None,
  image_size: int = 56,
) -> pathlib.Path:
  """Writes all files that `Processor.from_pretrained` reads. Returns the directory.

  If the directory already has a `config.json`, for example of a model, its fields are kept. The
  token ids and the given fields of the vision config are added to it.

  Args:
    path: the directory.
    family: one of FAMILIES. It becomes the `model_type` if there is no config.json yet.
    patch_size: side of a patch in pixels.
    temporal_patch_size: frames in a patch. Gemma does not use it.
    merge_size: side of a visual token in patches.
    window_size: side of an attention window in pixels. Only qwen2_5_vl uses it.
    min_pixels, max_pixels: bounds for the pixels of an image and of a frame of a video. For qwen3,
      the bounds of a video are for all its frames together. By default, they are the pixels of 1
      and 64 visual tokens. Gemma does not use them.
    image_size: side of every image in pixels. Only Gemma uses it.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  if family == "gemma3":
    _write_gemma(path, patch_size, merge_size, image_size)
    return path
  tokenizer = make_tokenizer()
  tokenizer.save(str(path / "tokenizer.json"))
  ids = {text: tokenizer.token_to_id(text) for text in SPECIAL_TOKENS}
  token_area = (patch_size * merge_size) ** 2
  min_pixels = token_area if min_pixels is None else min_pixels
  max_pixels = 64 * token_area if max_pixels is None else max_pixels
  names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
  _write(
    path,
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
  half = [0.5, 0.5, 0.5]
  is_qwen3 = family.startswith("qwen3")
  preprocessor = {
    "processor_class": f"{names.get(family, 'Qwen3VL')}Processor",
    "patch_size": patch_size,
    "temporal_patch_size": temporal_patch_size,
    "merge_size": merge_size,
    "image_mean": half if is_qwen3 else [0.48145466, 0.4578275, 0.40821073],
    "image_std": half if is_qwen3 else [0.26862954, 0.26130258, 0.27577711],
  }
  bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
  size = {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}
  image = {"image_processor_type": "Qwen2VLImageProcessor"}
  _write(path, "preprocessor_config.json", preprocessor | image | (size if is_qwen3 else bounds))
  if is_qwen3:  # only Qwen3-VL has a separate file for videos
    video = {"video_processor_type": "Qwen3VLVideoProcessor"}
    _write(path, "video_preprocessor_config.json", preprocessor | video | size)
  _write(
    path,
    "generation_config.json",
    {
      "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
      "pad_token_id": ids["<|endoftext|>"],
    },
  )
  vision: dict[str, Any] = {
    "patch_size": patch_size,
    "temporal_patch_size": temporal_patch_size,
    "spatial_merge_size": merge_size,
  }
  if window_size is not None and family == "qwen2_5_vl":
    vision["window_size"] = window_size
  _merge_config(
    path,
    {
      "model_type": family,
      "vocab_size": tokenizer.get_vocab_size(),
      "bos_token_id": ids["<|endoftext|>"],
      "eos_token_id": ids["<|im_end|>"],
    },
    {
      "vision_start_token_id": ids["<|vision_start|>"],
      "vision_end_token_id": ids["<|vision_end|>"],
      "vision_token_id": ids["<|vision_pad|>"],
      "image_token_id": ids["<|image_pad|>"],
      "video_token_id": ids["<|video_pad|>"],
    },
    vision,
  )
  return path


def _write_gemma(path: pathlib.Path, patch_size: int, merge_size: int, image_size: int) -> None:
  tokenizer = make_gemma_tokenizer()
  tokenizer.save(str(path / "tokenizer.json"))
  ids = {text: tokenizer.token_to_id(text) for text in GEMMA_SPECIAL_TOKENS}
  tokens = (image_size // patch_size // merge_size) ** 2
  _write(
    path,
    "tokenizer_config.json",
    {
      "tokenizer_class": "GemmaTokenizer",
      "bos_token": "<bos>",
      "eos_token": "<eos>",
      "pad_token": "<pad>",
      "unk_token": "<unk>",
      "boi_token": "<start_of_image>",
      "eoi_token": "<end_of_image>",
      "image_token": "<image_soft_token>",
      "chat_template": GEMMA_CHAT_TEMPLATE,
      "model_max_length": 131072,
    },
  )
  # The published file has null in fields whose value the processor class decides.
  preprocessor = {
    "processor_class": "Gemma3Processor",
    "image_processor_type": "Gemma3ImageProcessor",
    "size": {"height": image_size, "width": image_size},
    "resample": 2,
    "do_convert_rgb": None,
    "do_pan_and_scan": None,
    "pan_and_scan_max_num_crops": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
  }
  _write(path, "preprocessor_config.json", preprocessor)
  processor = {"processor_class": "Gemma3Processor", "image_seq_length": tokens}
  _write(path, "processor_config.json", processor)
  eos = [ids["<eos>"], ids["<end_of_turn>"]]
  _write(path, "generation_config.json", {"eos_token_id": eos, "pad_token_id": ids["<pad>"]})
  _merge_config(
    path,
    {
      "model_type": "gemma3",
      "vocab_size": tokenizer.get_vocab_size(),
      "bos_token_id": ids["<bos>"],
      "eos_token_id": eos,
    },
    {
      "image_token_index": ids["<image_soft_token>"],
      "boi_token_index": ids["<start_of_image>"],
      "eoi_token_index": ids["<end_of_image>"],
      "mm_tokens_per_image": tokens,
    },
    {"patch_size": patch_size, "image_size": image_size},
  )


def _write(path: pathlib.Path, name: str, value: Mapping[str, Any]) -> None:
  (path / name).write_text(json.dumps(value, indent=2))


def _merge_config(
  path: pathlib.Path,
  defaults: Mapping[str, Any],
  fields: Mapping[str, Any],
  vision: Mapping[str, Any],
) -> None:
  """Updates config.json: `fields` and `vision` (in vision_config) replace values.

  `defaults` only add missing fields.
  """
  file = path / "config.json"
  config = json.loads(file.read_text()) if file.exists() else {}
  vision = {**config.get("vision_config", {}), **vision}
  _write(path, "config.json", {**defaults, **config, **fields, "vision_config": vision})

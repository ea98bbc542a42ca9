"""Reads and checks the `config.json` of a model, and adds the default values of transformers.

Files written by transformers 4 contain only the fields that differ from the defaults of its config
classes. A field that is absent therefore has the default value. The tables below contain the
defaults of transformers 5.23, for the fields that are read here, in `models/families.py` and in
`data/families.py`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]

_QWEN: Json = {
  "pad_token_id": None,
  "image_token_id": 151655,
  "video_token_id": 151656,
  "vision_start_token_id": 151652,
  "vision_end_token_id": 151653,
  "vision_token_id": None,
  "tie_word_embeddings": False,
}
_GEMMA3: Json = {
  "pad_token_id": None,
  "image_token_index": 262144,
  "boi_token_index": 255999,
  "eoi_token_index": 256000,
  "mm_tokens_per_image": 256,
  "tie_word_embeddings": True,
}

_TEXT: Json = {
  "num_key_value_heads": None,
  "head_dim": None,
  "eos_token_id": None,
  "pad_token_id": None,
  "rope_parameters": None,
  "rope_scaling": None,
}
_QWEN2_TEXT: Json = _TEXT | {
  "vocab_size": 152064,
  "hidden_size": 8192,
  "intermediate_size": 29568,
  "num_hidden_layers": 80,
  "num_attention_heads": 64,
  "num_key_value_heads": 8,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
  "use_sliding_window": False,
  "eos_token_id": 151645,
  "tie_word_embeddings": False,
}
_QWEN3_TEXT: Json = _TEXT | {
  "vocab_size": 151936,
  "hidden_size": 4096,
  "intermediate_size": 22016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "head_dim": 128,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "rope_theta": 5e5,
  "attention_bias": False,
  "use_sliding_window": False,
}
_QWEN3_MOE_TEXT: Json = _QWEN3_TEXT | {
  "hidden_size": 2048,
  "intermediate_size": 5632,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "num_key_value_heads": 16,
  "head_dim": None,
  "decoder_sparse_step": 1,
  "mlp_only_layers": None,
  "moe_intermediate_size": 1408,
  "num_experts": 60,
  "num_experts_per_tok": 4,
}
_GEMMA3_TEXT: Json = _TEXT | {
  "vocab_size": 262208,
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e6,
  "rope_local_base_freq": 1e4,
  "eos_token_id": 1,
  "pad_token_id": 0,
  "attention_bias": False,
  "query_pre_attn_scalar": 256.0,
  "sliding_window": 4096,
  "sliding_window_pattern": 6,
  "layer_types": None,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "use_bidirectional_attention": False,
}

_QWEN_VISION: Json = {
  "num_heads": 16,
  "in_channels": 3,
  "spatial_merge_size": 2,
  "temporal_patch_size": 2,
  "rope_parameters": None,
  "rope_theta": 1e4,
}
_QWEN2_VISION: Json = _QWEN_VISION | {
  "depth": 32,
  "embed_dim": 1280,
  "hidden_size": 3584,
  "hidden_act": "quick_gelu",
  "mlp_ratio": 4.0,
  "patch_size": 14,
}
_QWEN2_5_VISION: Json = _QWEN_VISION | {
  "depth": 32,
  "hidden_size": 3584,
  "intermediate_size": 3420,
  "hidden_act": "silu",
  "patch_size": 14,
  "tokens_per_second": 4.0,
  "window_size": 112,
  "out_hidden_size": 3584,
  "fullatt_block_indexes": (7, 15, 23, 31),
}
_QWEN3_VISION: Json = _QWEN_VISION | {
  "depth": 27,
  "hidden_size": 1152,
  "intermediate_size": 4304,
  "hidden_act": "gelu_pytorch_tanh",
  "patch_size": 16,
  "out_hidden_size": 3584,
  "num_position_embeddings": 2304,
  "deepstack_visual_indexes": (8, 16, 24),
}
_SIGLIP: Json = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "num_channels": 3,
  "image_size": 224,
  "patch_size": 16,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}

# Defaults by `model_type`: of the top level, of text_config, and of vision_config.
DEFAULTS: Mapping[str, tuple[Json, Json, Json]] = {
  "qwen2_vl": (_QWEN, _QWEN2_TEXT, _QWEN2_VISION),
  "qwen2_5_vl": (_QWEN, _QWEN2_TEXT, _QWEN2_5_VISION),
  "qwen3_vl": (_QWEN, _QWEN3_TEXT, _QWEN3_VISION),
  "qwen3_vl_moe": (_QWEN, _QWEN3_MOE_TEXT, _QWEN3_VISION),
  "gemma3": (_GEMMA3, _GEMMA3_TEXT, _SIGLIP),
}
# In older files of these families, the fields of the decoder are at the top level.
_FLAT = ("qwen2_vl", "qwen2_5_vl")
# Other names that transformers writes or reads for fields of the tables. If a file contains both
# names, transformers uses the value of the other name.
_ALIASES = {
  "num_local_experts": "num_experts",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "image_token_id": "image_token_index",
  "boi_token_id": "boi_token_index",
  "eoi_token_id": "eoi_token_index",
}
# Fields that may be null, each with an example value of its type. `stop_tokens` checks
# eos_token_id.
_NULLABLE: Json = {
  "num_key_value_heads": 1,
  "head_dim": 1,
  "pad_token_id": 1,
  "vision_token_id": 1,
  "rope_parameters": {},
  "rope_scaling": {},
  "layer_types": ("full_attention",),
  "mlp_only_layers": (0,),
  "attn_logit_softcapping": 1.0,
  "final_logit_softcapping": 1.0,
}
_ROPE: Json = {"rope_theta": 1.0, "factor": 1.0, "mrope_section": (0,)}


def parse_json(name: str, content: bytes) -> dict[str, Any]:
  """Parses a JSON object.

  Args:
    name: name of the file, for error messages.
    content: content of the file.

  Raises:
    ValueError: the content is not a JSON object; the message names the file.
  """
  try:
    value = json.loads(content)
  except ValueError as error:
    raise ValueError(f"{name}: not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{name}: expected a JSON object, got {type(value).__name__}")
  return value


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """Returns the contents of the `config.json` of a directory.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the file is not a JSON object. Both messages are one line that names the file.
  """
  file = pathlib.Path(path) / "config.json"
  if not file.is_file():
    raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face model directory")
  return parse_json(file.name, file.read_bytes())


def complete(config: Json) -> dict[str, Any]:
  """Adds the defaults of all missing fields to the contents of a `config.json`.

  As in transformers, older files of Qwen2-VL and Qwen2.5-VL without `text_config` have the fields
  of the decoder at the top level.

  Args:
    config: the parsed file. It is not modified.

  Returns:
    A copy with every field of `DEFAULTS`, in which the fields of decoder and vision tower are in
    `text_config` and `vision_config`.

  Raises:
    ValueError: the family is not supported, the weights are quantized, or a field has a wrong type.
      The message is one line with the field, its value and what was expected.
  """
  family = config.get("model_type")
  if family not in tuple(DEFAULTS):
    raise ValueError(
      f"config.json: model_type={family!r} is not supported; supported: "
      + ", ".join(map(repr, DEFAULTS))
    )
  quantization = config.get("quantization_config")
  if quantization is not None:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise ValueError(
      f"config.json: quantization_config.quant_method={method!r}: quantized checkpoints are not "
      "supported; expected weights in bfloat16, float16 or float32"
    )
  top, text, vision = DEFAULTS[family]
  given = config.get("text_config")
  flat = given is None and family in _FLAT
  return _filled(top, config, "") | {
    "text_config": _filled(text, {k: v for k, v in config.items() if k in text}, "")
    if flat
    else _filled(text, given, "text_config"),
    "vision_config": _filled(vision, config.get("vision_config"), "vision_config"),
  }


def stop_tokens(config: Json, file: str = "config.json") -> tuple[int, ...]:
  """Returns the ids of `eos_token_id`, which may be one id, a list of ids, or absent.

  Args:
    config: contents of the file.
    file: name of the file, for error messages.

  Raises:
    ValueError: the value is neither a token id nor a list of token ids.
  """
  value = config.get("eos_token_id")
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if any(type(i) is not int or i < 0 for i in ids):
    raise ValueError(f"{file}: eos_token_id={value!r}: expected a token id or a list of them")
  return tuple(ids)


def _filled(defaults: Json, given: Any, section: str) -> dict[str, Any]:
  """Returns the fields of `given`, and `defaults` for fields that are missing; checks all types.

  Args:
    defaults: default values of a section.
    given: the section in the file, or None if it is absent.
    section: name of the section; "" for the top level.
  """
  given = {} if given is None else given
  if not isinstance(given, Mapping):
    raise ValueError(f"config.json: {section}={given!r}: expected an object")
  filled = {**defaults, **given}
  names = {name: name for name in defaults}  # the name of each field in the file
  for alias, name in _ALIASES.items():
    if alias in given and name in defaults and alias not in defaults:
      filled[name], names[name] = given[alias], alias
  prefix = f"{section}." if section else ""
  for name, default in defaults.items():
    if name == "eos_token_id" or (name in _NULLABLE and filled[name] is None):
      continue
    _check(prefix + names[name], filled[name], _NULLABLE.get(name, default))
  for name in ("rope_parameters", "rope_scaling"):
    _check_rope(prefix + name, filled.get(name) or {} if name in defaults else {})
  return filled


def _check_rope(name: str, rope: Json) -> None:
  for field, example in _ROPE.items():
    if rope.get(field) is not None:
      _check(f"{name}.{field}", rope[field], example)
  for kind in ("full_attention", "sliding_attention"):
    if rope.get(kind) is not None:
      _check(f"{name}.{kind}", rope[kind], {})
      _check_rope(f"{name}.{kind}", rope[kind])


def _check(name: str, value: Any, example: Any) -> None:
  """Raises ValueError unless `value` has the type of `example` and is in the valid range."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  match example:
    case bool():
      right, expected = value is None or isinstance(value, bool), "true or false"
    case int() if name.endswith(("_token_id", "_token_index")):
      right, expected = number and isinstance(value, int) and value >= 0, "a token id"
    case int():
      right, expected = number and isinstance(value, int) and value > 0, "a positive integer"
    case float():
      right, expected = number and value > 0, "a positive number"
    case str():
      right, expected = isinstance(value, str), "a string"
    case tuple():
      kind = type(example[0])
      right = isinstance(value, list | tuple) and all(type(item) is kind for item in value)
      expected = "a list of " + ("integers" if kind is int else "strings")
    case dict():
      right, expected = isinstance(value, dict), "an object"
    case _:
      return
  if not right:
    raise ValueError(f"config.json: {name}={value!r}: expected {expected}")

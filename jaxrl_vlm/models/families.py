"""Makes a `ModelConfig` from the `config.json` of each model family."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_vlm import hf_config
from jaxrl_vlm.models.config import ModelConfig, MoE, VisionConfig
from jaxrl_vlm.models.layers import ACTIVATIONS

Json = Mapping[str, Any]


def from_hf(config: Json, **overrides) -> ModelConfig:
  """Returns the architecture that a `config.json` describes.

  Args:
    config: the parsed file. The fields of the decoder may be at the top level (older files) or in
      `text_config`. Fields with default values may be absent.
    **overrides: fields of `ModelConfig` that replace those of the file or are not in it, such as
      dtype and remat.

  Raises:
    ValueError: a family or a setting is not supported. The message is one line that names the
      field, its value, and what is supported.
  """
  whole = hf_config.complete(config)
  text = whole["text_config"]
  fields = _common(whole, text) | FAMILIES[whole["model_type"]](whole, text)
  fields["hf"] = json.dumps(config, sort_keys=True)
  return ModelConfig(**fields | overrides)


def _common(config: Json, text: Json) -> dict[str, Any]:
  stops = hf_config.stop_tokens(config) or hf_config.stop_tokens(text)
  pads = (config["pad_token_id"], text["pad_token_id"], *stops, 0)
  heads, vocab = text["num_attention_heads"], text["vocab_size"]
  special = [
    config[key]
    for key in hf_config.DEFAULTS[config["model_type"]][0]
    if key.startswith(("image", "video", "vision", "boi", "eoi"))
  ]
  return {
    "family": config["model_type"],
    "vocab_size": vocab,
    "hidden_size": text["hidden_size"],
    "intermediate_size": text["intermediate_size"],
    "num_layers": text["num_hidden_layers"],
    "num_heads": heads,
    "num_kv_heads": text["num_key_value_heads"] or heads,
    "head_dim": _head_dim(text),
    "rms_norm_eps": text["rms_norm_eps"],
    "suppressed_tokens": tuple(
      sorted({token for token in special if token is not None and token < vocab})
    ),
    "stop_tokens": stops,
    "pad_token": next(token for token in pads if token is not None and token < vocab),
  }


def _qwen2_vl(config: Json, text: Json) -> dict[str, Any]:
  vision = config["vision_config"]
  widths = {
    "hidden_size": vision["embed_dim"],
    "intermediate_size": int(vision["embed_dim"] * vision["mlp_ratio"]),
    "out_hidden_size": vision["hidden_size"],
  }
  return _qwen_decoder(config, text) | {
    "qkv_bias": True,
    "vision": VisionConfig(**_qwen_vision({**vision, **widths}), norm="layer", gated_mlp=False),
  }


def _qwen2_5_vl(config: Json, text: Json) -> dict[str, Any]:
  vision = config["vision_config"]
  return _qwen_decoder(config, text) | {
    "qkv_bias": True,
    "vision": VisionConfig(
      **_qwen_vision(vision),
      window_size=vision["window_size"],
      full_attention_layers=tuple(vision["fullatt_block_indexes"]),
    ),
  }


def _qwen3_vl(config: Json, text: Json) -> dict[str, Any]:
  vision = config["vision_config"]
  if text["attention_bias"]:
    raise ValueError("config.json: attention_bias=true is not supported; expected false")
  return _qwen_decoder(config, text) | {
    "qk_norm": True,
    "vision": VisionConfig(
      **_qwen_vision(vision),
      norm="layer",
      gated_mlp=False,
      patch_bias=True,
      position_grid=int(vision["num_position_embeddings"] ** 0.5),
      deepstack_layers=tuple(vision["deepstack_visual_indexes"]),
    ),
  }


def _qwen3_vl_moe(config: Json, text: Json) -> dict[str, Any]:
  if text["decoder_sparse_step"] != 1 or text["mlp_only_layers"]:
    raise ValueError(
      f"config.json: decoder_sparse_step={text['decoder_sparse_step']}, mlp_only_layers="
      f"{text['mlp_only_layers']} are not supported; expected 1 and [], which "
      "means experts in every layer"
    )
  return _qwen3_vl(config, text) | {
    "moe": MoE(text["num_experts"], text["num_experts_per_tok"], text["moe_intermediate_size"])
  }


def _gemma3(config: Json, text: Json) -> dict[str, Any]:
  vision = config["vision_config"]
  for name in (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "attention_bias",
  ):
    if text[name]:
      raise ValueError(f"config.json: {name}={text[name]!r} is not supported; expected none")
  layers, pattern = text["num_hidden_layers"], text["sliding_window_pattern"]
  kinds = text["layer_types"] or [
    "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
  ]
  rope = text["rope_parameters"] or {}
  everywhere = rope.get("full_attention") or text["rope_scaling"] or {}
  near = rope.get("sliding_attention") or {}
  rope_type(near, ("default",))
  linear = rope_type(everywhere, ("default", "linear")) == "linear"
  if linear and not everywhere.get("factor"):
    raise ValueError("config.json: rope_type='linear' without factor: expected a positive factor")
  side = vision["image_size"] // vision["patch_size"]
  tokens = int(config["mm_tokens_per_image"] ** 0.5)
  return {
    "activation": _activation(text, "hidden_activation"),
    "attention_scale": text["query_pre_attn_scalar"] ** -0.5,
    "qk_norm": True,
    "norm_offset": True,
    "post_norms": True,
    "embed_scale": text["hidden_size"] ** 0.5,
    "rope_theta": float(everywhere.get("rope_theta") or text["rope_theta"]),
    "rope_factor": float(everywhere["factor"]) if linear else 1.0,
    "sliding_window": text["sliding_window"],
    "sliding_layers": tuple(kind == "sliding_attention" for kind in kinds),
    "sliding_rope_theta": float(near.get("rope_theta") or text["rope_local_base_freq"]),
    "bidirectional_images": True,
    "tied": bool(config["tie_word_embeddings"]),
    "vision": VisionConfig(
      depth=vision["num_hidden_layers"],
      hidden_size=vision["hidden_size"],
      intermediate_size=vision["intermediate_size"],
      num_heads=vision["num_attention_heads"],
      out_hidden_size=text["hidden_size"],
      patch_size=vision["patch_size"],
      temporal_patch_size=1,
      spatial_merge_size=side // tokens,
      in_channels=vision["num_channels"],
      norm="layer",
      norm_eps=vision["layer_norm_eps"],
      gated_mlp=False,
      fused_qkv=False,
      patch_bias=True,
      activation=_activation(vision, "vision_config.hidden_act"),
      rope_theta=0.0,
      position_grid=side,
      merger="pool",
    ),
  }


# By `model_type`: functions of the file as completed by `hf_config.complete`, and of its
# text_config. Each returns fields of `ModelConfig`.
FAMILIES: dict[str, Callable[[Json, Json], dict[str, Any]]] = {
  "qwen2_vl": _qwen2_vl,
  "qwen2_5_vl": _qwen2_5_vl,
  "qwen3_vl": _qwen3_vl,
  "qwen3_vl_moe": _qwen3_vl_moe,
  "gemma3": _gemma3,
}


def _qwen_decoder(config: Json, text: Json) -> dict[str, Any]:
  """Returns the fields that all Qwen families read in the same way, such as M-RoPE."""
  rope = text["rope_parameters"] or text["rope_scaling"] or {}
  rope_type(rope, ("default", "mrope"))
  if text["use_sliding_window"]:
    raise ValueError("config.json: use_sliding_window=true is not supported; expected false")
  head_dim = _head_dim(text)
  interleaved = config["model_type"].startswith("qwen3")
  section = tuple(rope.get("mrope_section") or ((24, 20, 20) if interleaved else (16, 24, 24)))
  if len(section) != 3 or sum(section) * 2 != head_dim:
    raise ValueError(
      f"config.json: mrope_section={list(section)} must be three numbers that sum to half the "
      f"head dimension, {head_dim // 2}"
    )
  return {
    "activation": _activation(text, "hidden_act"),
    "attention_scale": head_dim**-0.5,
    "rope_theta": rope.get("rope_theta") or text["rope_theta"],
    "mrope_section": section,
    "mrope_interleaved": interleaved,
    # As in transformers: older files of Qwen2-VL and Qwen2.5-VL have the field among those of the
    # decoder.
    "tied": bool(
      config["tie_word_embeddings"] or (not interleaved and text["tie_word_embeddings"])
    ),
  }


def _qwen_vision(vision: Json) -> dict[str, Any]:
  return {
    "hidden_size": vision["hidden_size"],
    "intermediate_size": vision["intermediate_size"],
    "out_hidden_size": vision["out_hidden_size"],
    "activation": _activation(vision, "vision_config.hidden_act"),
    "depth": vision["depth"],
    "num_heads": vision["num_heads"],
    "patch_size": vision["patch_size"],
    "temporal_patch_size": vision["temporal_patch_size"],
    "spatial_merge_size": vision["spatial_merge_size"],
    "in_channels": vision["in_channels"],
    "rope_theta": (vision["rope_parameters"] or {}).get("rope_theta") or vision["rope_theta"],
  }


def rope_type(rope: Json, supported: tuple[str, ...]) -> str:
  """Returns the kind of rotary scaling. Raises ValueError if it is not in `supported`."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in supported:
    raise ValueError(
      f"config.json: rope_type={kind!r} is not supported; supported: "
      + ", ".join(map(repr, supported))
    )
  return kind


def _head_dim(text: Json) -> int:
  return text["head_dim"] or text["hidden_size"] // text["num_attention_heads"]


def _activation(section: Json, field: str) -> str:
  value = section[field.rpartition(".")[2]]
  if value not in ACTIVATIONS:
    raise ValueError(
      f"config.json: {field}={value!r} is not supported; supported: "
      + ", ".join(map(repr, ACTIVATIONS))
    )
  return value

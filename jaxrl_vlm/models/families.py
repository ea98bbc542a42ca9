"""What each family's `config.json` says: the switches of `ModelConfig`."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_vlm.models.config import ModelConfig, MoE, VisionConfig
from jaxrl_vlm.models.layers import ACTIVATIONS

Json = Mapping[str, Any]


def from_hf(config: Json, **overrides) -> ModelConfig:
  """Reads a `config.json`, in the old flat or the new nested form.

  Args:
    config: the parsed file.
    **overrides: fields of `ModelConfig` that are not in the file (dtype, remat ...).

  Raises:
    ValueError: a family or a setting that is not supported; one line with field, value and what
      is supported.
  """
  family = config.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"config.json: model_type={family!r} is not supported; supported: "
                     + ", ".join(map(repr, FAMILIES)))
  try:
    text = {**_DEFAULTS.get(family, {}), **config, **(config.get("text_config") or {})}
    fields = _common(config, text) | FAMILIES[family](config, text) | overrides
    return ModelConfig(**fields)
  except KeyError as error:
    raise ValueError(f"config.json: {error.args[0]} is missing") from None


def _common(config: Json, text: Json) -> dict[str, Any]:
  stops = text.get("eos_token_id") or ()
  stops = tuple(stops) if isinstance(stops, list | tuple) else (stops,)
  pad, heads = text.get("pad_token_id"), text["num_attention_heads"]
  special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
             "vision_token_id", "image_token_index", "boi_token_index", "eoi_token_index")
  return {
      "family": config["model_type"],
      "vocab_size": text["vocab_size"],
      "hidden_size": text["hidden_size"],
      "intermediate_size": text["intermediate_size"],
      "num_layers": text["num_hidden_layers"],
      "num_heads": heads,
      "num_kv_heads": text.get("num_key_value_heads") or heads,
      "head_dim": _head_dim(text),
      "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
      "suppressed_tokens": tuple(sorted({
          config[key] for key in special if config.get(key) is not None})),
      "stop_tokens": stops,
      "pad_token": pad if pad is not None else (stops[0] if stops else 0),
      "hf": json.dumps(config, sort_keys=True),
  }


def _qwen2_vl(config: Json, text: Json) -> dict[str, Any]:
  vision = config["vision_config"]
  return _qwen_decoder(config, text) | {
      "qkv_bias": True,
      "vision": VisionConfig(
          **_qwen_vision(vision),
          hidden_size=vision["embed_dim"],
          intermediate_size=int(vision["embed_dim"] * vision.get("mlp_ratio", 4)),
          out_hidden_size=vision["hidden_size"],
          activation=_activation(vision, "vision_config.hidden_act", "quick_gelu"),
          norm="layer", gated_mlp=False)}


def _qwen2_5_vl(config: Json, text: Json) -> dict[str, Any]:
  vision = config["vision_config"]
  return _qwen_decoder(config, text) | {
      "qkv_bias": True,
      "vision": VisionConfig(
          **_qwen_vision(vision),
          hidden_size=vision["hidden_size"],
          intermediate_size=vision["intermediate_size"],
          out_hidden_size=vision["out_hidden_size"],
          activation=_activation(vision, "vision_config.hidden_act", "silu"),
          window_size=vision["window_size"],
          full_attention_layers=tuple(vision["fullatt_block_indexes"]))}


def _qwen3_vl(config: Json, text: Json) -> dict[str, Any]:
  vision = config["vision_config"]
  if text.get("attention_bias"):
    raise ValueError("config.json: attention_bias=true is not supported; expected false")
  return _qwen_decoder(config, text) | {
      "qk_norm": True,
      "vision": VisionConfig(
          **_qwen_vision(vision),
          hidden_size=vision["hidden_size"],
          intermediate_size=vision["intermediate_size"],
          out_hidden_size=vision["out_hidden_size"],
          activation=_activation(vision, "vision_config.hidden_act", "gelu_pytorch_tanh"),
          norm="layer", gated_mlp=False, patch_bias=True,
          position_grid=int(vision["num_position_embeddings"]**0.5),
          deepstack_layers=tuple(vision["deepstack_visual_indexes"]))}


def _qwen3_vl_moe(config: Json, text: Json) -> dict[str, Any]:
  if text.get("decoder_sparse_step", 1) != 1 or text.get("mlp_only_layers"):
    raise ValueError(
        f"config.json: decoder_sparse_step={text.get('decoder_sparse_step')}, mlp_only_layers="
        f"{text.get('mlp_only_layers')} are not supported; expected 1 and []: experts in every "
        "layer")
  experts = text.get("num_experts") or text["num_local_experts"]
  return _qwen3_vl(config, text) | {
      "moe": MoE(experts, text["num_experts_per_tok"], text["moe_intermediate_size"])}


def _gemma3(config: Json, text: Json) -> dict[str, Any]:
  vision = config["vision_config"]
  for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention",
               "attention_bias"):
    if text.get(name):
      raise ValueError(f"config.json: {name}={text[name]!r} is not supported; expected none")
  layers, pattern = text["num_hidden_layers"], text.get(
      "sliding_window_pattern", text.get("_sliding_window_pattern", 6))
  kinds = text.get("layer_types") or [
      "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
  rope = text.get("rope_parameters") or {}
  everywhere = rope.get("full_attention") or text.get("rope_scaling") or {}
  near = rope.get("sliding_attention") or {}
  rope_type(near, ("default",))
  linear = rope_type(everywhere, ("default", "linear")) == "linear"
  side = vision["image_size"] // vision["patch_size"]
  tokens = int(config.get("mm_tokens_per_image", 256)**0.5)
  eps = vision.get("layer_norm_eps", 1e-6)
  return {
      "activation": _activation(text, "hidden_activation", "gelu_pytorch_tanh"),
      "attention_scale": text.get("query_pre_attn_scalar", 256)**-0.5,
      "qk_norm": True, "norm_offset": True, "post_norms": True,
      "embed_scale": text["hidden_size"]**0.5,
      "rope_theta": float(everywhere.get("rope_theta") or text.get("rope_theta") or 1e6),
      "rope_factor": float(everywhere["factor"]) if linear else 1.0,
      "sliding_window": text.get("sliding_window") or 4096,
      "sliding_layers": tuple(kind == "sliding_attention" for kind in kinds),
      "sliding_rope_theta": float(
          near.get("rope_theta") or text.get("rope_local_base_freq") or 1e4),
      "bidirectional_images": True,
      "tied": bool(config.get("tie_word_embeddings", True)),
      "vision": VisionConfig(
          depth=vision["num_hidden_layers"],
          hidden_size=vision["hidden_size"],
          intermediate_size=vision["intermediate_size"],
          num_heads=vision["num_attention_heads"],
          out_hidden_size=text["hidden_size"],
          patch_size=vision["patch_size"],
          temporal_patch_size=1,
          spatial_merge_size=side // tokens,
          in_channels=vision.get("num_channels", 3),
          norm="layer", norm_eps=eps, gated_mlp=False, fused_qkv=False, patch_bias=True,
          activation=_activation(vision, "vision_config.hidden_act", "gelu_pytorch_tanh"),
          rope_theta=0.0, position_grid=side, merger="pool")}


# Published files may leave out what equals the defaults of transformers.
_DEFAULTS: dict[str, Json] = {
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
               "vocab_size": 262208},
}
# Under their `model_type`.
FAMILIES: dict[str, Callable[[Json, Json], dict[str, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "gemma3": _gemma3,
}


def _qwen_decoder(config: Json, text: Json) -> dict[str, Any]:
  """What the Qwen families share: multimodal rotary positions, scale, no sliding window."""
  rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
  rope_type(rope, ("default", "mrope"))
  if text.get("use_sliding_window"):
    raise ValueError("config.json: use_sliding_window=true is not supported; expected false")
  head_dim = _head_dim(text)
  interleaved = config["model_type"].startswith("qwen3")
  section = tuple(rope.get("mrope_section", (24, 20, 20) if interleaved else (16, 24, 24)))
  if len(section) != 3 or sum(section) * 2 != head_dim:
    raise ValueError(
        f"config.json: mrope_section={list(section)} must be three numbers that sum to half the "
        f"head dimension, {head_dim // 2}")
  return {
      "activation": _activation(text, "hidden_act", "silu"),
      "attention_scale": head_dim**-0.5,
      "rope_theta": rope.get("rope_theta") or text.get(
          "rope_theta", 5e5 if interleaved else 1e6),
      "mrope_section": section,
      "mrope_interleaved": interleaved,
      # As in transformers: older files of the first two families have it among the decoder's sizes.
      "tied": bool(config.get("tie_word_embeddings")
                   or (not interleaved and text.get("tie_word_embeddings")))}


def _qwen_vision(vision: Json) -> dict[str, Any]:
  return {
      "depth": vision["depth"],
      "num_heads": vision["num_heads"],
      "patch_size": vision["patch_size"],
      "temporal_patch_size": vision.get("temporal_patch_size", 2),
      "spatial_merge_size": vision.get("spatial_merge_size", 2),
      "in_channels": vision.get("in_channels", vision.get("in_chans", 3)),
      "rope_theta": (vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)}


def rope_type(rope: Json, supported: tuple[str, ...]) -> str:
  """The kind of rotary scaling; ValueError if it is none of `supported`."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in supported:
    raise ValueError(f"config.json: rope_type={kind!r} is not supported; supported: "
                     + ", ".join(map(repr, supported)))
  return kind


def _head_dim(text: Json) -> int:
  return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def _activation(part: Json, field: str, default: str) -> str:
  value = part.get(field.rpartition(".")[2], default)
  if value not in ACTIVATIONS:
    raise ValueError(f"config.json: {field}={value!r} is not supported; supported: "
                     + ", ".join(map(repr, ACTIVATIONS)))
  return value

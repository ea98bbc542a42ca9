"""The architecture, read from a Hugging Face `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower. Sizes are those of `vision_config` in `config.json`."""

  depth: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  out_hidden_size: int
  patch_size: int
  temporal_patch_size: int
  spatial_merge_size: int
  window_size: int
  full_attention_layers: tuple[int, ...]
  in_channels: int = 3
  rope_theta: float = 10000.0

  @property
  def patch_dim(self) -> int:
    return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Qwen2.5-VL model: decoder sizes, its vision tower, and how to compute.

  Attributes:
    mrope_section: how many rotary frequencies follow time, height and width.
    suppressed_tokens: ids that the policy never produces (image and vision special tokens); its
      distribution over responses is renormalised without them.
    stop_tokens: ids that end a response.
    pad_token: id after the end.
    dtype: of activations; "float32" or "bfloat16".
    remat: recompute each layer in the backward pass instead of keeping its activations.
    hf: the `config.json` this came from, as text; `save_pretrained` writes it back.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_theta: float
  mrope_section: tuple[int, int, int]
  tied: bool
  vision: VisionConfig
  suppressed_tokens: tuple[int, ...] = ()
  stop_tokens: tuple[int, ...] = ()
  pad_token: int = 0
  dtype: str = "float32"
  remat: bool = False
  hf: str = dataclasses.field(default="{}", repr=False)

  def replace(self, **changes) -> "ModelConfig":
    return dataclasses.replace(self, **changes)


def from_hf(config: Mapping[str, Any], **overrides) -> ModelConfig:
  """Reads a `config.json` of the Qwen2.5-VL family, in the old flat or the new nested form.

  Args:
    config: the parsed file.
    **overrides: fields of `ModelConfig` that are not in the file (dtype, remat ...).

  Raises:
    ValueError: another family, or a rotary scaling that is not supported; names field and value.
  """
  family = config.get("model_type")
  if family != "qwen2_5_vl":
    raise ValueError(
        f"config.json: model_type={family!r} is not supported; supported: 'qwen2_5_vl'"
    )
  text = {**config, **(config.get("text_config") or {})}
  vision = config["vision_config"]
  rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  if rope_type not in ("default", "mrope"):
    raise ValueError(
        f"config.json: rope_type={rope_type!r} is not supported; supported: 'default', 'mrope'"
    )
  if text.get("use_sliding_window"):
    raise ValueError("config.json: use_sliding_window=true is not supported; expected false")
  for name, act in (("hidden_act", text), ("vision_config.hidden_act", vision)):
    if act.get("hidden_act", "silu") != "silu":
      raise ValueError(
          f"config.json: {name}={act['hidden_act']!r} is not supported; expected 'silu'")
  heads = text["num_attention_heads"]
  special = [config.get(k) for k in (
      "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
      "vision_token_id")]
  overrides.setdefault("suppressed_tokens", tuple(sorted({i for i in special if i is not None})))
  stops = overrides.pop("stop_tokens", None) or text.get("eos_token_id") or ()
  stops = tuple(stops) if isinstance(stops, list | tuple) else (stops,)
  pad = text.get("pad_token_id")
  head_dim = text.get("head_dim") or text["hidden_size"] // heads
  section = tuple(rope.get("mrope_section", (16, 24, 24)))
  if len(section) != 3 or sum(section) * 2 != head_dim:
    raise ValueError(
        f"config.json: mrope_section={list(section)} must be three numbers that sum to half the "
        f"head dimension, {head_dim // 2}"
    )
  return ModelConfig(
      vocab_size=text["vocab_size"],
      hidden_size=text["hidden_size"],
      intermediate_size=text["intermediate_size"],
      num_layers=text["num_hidden_layers"],
      num_heads=heads,
      num_kv_heads=text.get("num_key_value_heads") or heads,
      head_dim=head_dim,
      rms_norm_eps=text.get("rms_norm_eps", 1e-6),
      rope_theta=rope.get("rope_theta") or text.get("rope_theta", 1e6),
      mrope_section=section,
      tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)),
      vision=VisionConfig(
          depth=vision["depth"],
          hidden_size=vision["hidden_size"],
          intermediate_size=vision["intermediate_size"],
          num_heads=vision["num_heads"],
          out_hidden_size=vision["out_hidden_size"],
          patch_size=vision["patch_size"],
          temporal_patch_size=vision.get("temporal_patch_size", 2),
          spatial_merge_size=vision.get("spatial_merge_size", 2),
          window_size=vision["window_size"],
          full_attention_layers=tuple(vision["fullatt_block_indexes"]),
          in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
          rope_theta=(vision.get("rope_parameters") or {}).get("rope_theta", 10000.0),
      ),
      stop_tokens=stops,
      pad_token=pad if pad is not None else (stops[0] if stops else 0),
      hf=json.dumps(config, sort_keys=True),
      **overrides,
  )

"""Architectures of published checkpoints, for plans and tests without their weights."""

from typing import Any

_QWEN_IDS = {
  "vision_start_token_id": 151652,
  "vision_end_token_id": 151653,
  "image_token_id": 151655,
  "video_token_id": 151656,
}


def _sizes(hidden, intermediate, layers, heads, kv, **more) -> dict[str, Any]:
  return {
    "hidden_size": hidden,
    "intermediate_size": intermediate,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv,
    **more,
  }


def _qwen2(family: str, vision: dict[str, Any], vocab: int, tied: bool, *sizes: int):
  return {
    "model_type": family,
    **_QWEN_IDS,
    "vocab_size": vocab,
    "tie_word_embeddings": tied,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": vision,
    **_sizes(*sizes),
  }


def _qwen2_vl(vocab: int, tied: bool, *sizes: int):
  vision = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_chans": 3,
    "hidden_size": sizes[0],
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_act": "quick_gelu",
  }
  return _qwen2("qwen2_vl", vision, vocab, tied, *sizes)


def _qwen2_5_vl(intermediate: int, vocab: int, tied: bool, *sizes: int):
  vision = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": intermediate,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": sizes[0],
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "tokens_per_second": 2,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
  }
  return _qwen2("qwen2_5_vl", vision, vocab, tied, *sizes)


_SMALL_TOWER = {
  "depth": 24,
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "deepstack_visual_indexes": [5, 11, 17],
}
_LARGE_TOWER = {
  "depth": 27,
  "hidden_size": 1152,
  "intermediate_size": 4304,
  "deepstack_visual_indexes": [8, 16, 24],
}


def _qwen3_vl(tower: dict[str, Any], tied: bool, *sizes: int, **moe: int):
  family = "qwen3_vl_moe" if moe else "qwen3_vl"
  return {
    "model_type": family,
    **_QWEN_IDS,
    "tie_word_embeddings": tied,
    "text_config": {
      "model_type": f"{family}_text",
      "vocab_size": 151936,
      "head_dim": 128,
      "rms_norm_eps": 1e-6,
      "rope_theta": 5e6,
      "hidden_act": "silu",
      "attention_bias": False,
      "bos_token_id": 151643,
      "eos_token_id": 151645,
      "max_position_embeddings": 262144,
      "rope_scaling": {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
      },
      **_sizes(*sizes),
      **moe,
    },
    "vision_config": {
      "model_type": family,
      "num_heads": 16,
      "in_channels": 3,
      "patch_size": 16,
      "spatial_merge_size": 2,
      "temporal_patch_size": 2,
      "num_position_embeddings": 2304,
      "hidden_act": "gelu_pytorch_tanh",
      "out_hidden_size": sizes[0],
      **tower,
    },
  }


def _gemma3(*sizes: int, **more: int):
  return {
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "eos_token_id": [1, 106],
    "text_config": {
      "model_type": "gemma3_text",
      "sliding_window": 1024,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      **_sizes(*sizes, **more),
    },
    "vision_config": {
      "model_type": "siglip_vision_model",
      "hidden_size": 1152,
      "intermediate_size": 4304,
      "num_hidden_layers": 27,
      "num_attention_heads": 16,
      "image_size": 896,
      "patch_size": 14,
      "vision_use_head": False,
    },
  }


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1}

# Contents of `config.json` by name of the checkpoint. The sizes are: hidden size, intermediate size
# of the MLP, layers, heads, key/value heads.
CONFIGS: dict[str, dict[str, Any]] = {
  "Qwen2-VL-2B": _qwen2_vl(151936, True, 1536, 8960, 28, 12, 2),
  "Qwen2-VL-7B": _qwen2_vl(152064, False, 3584, 18944, 28, 28, 4),
  "Qwen2-VL-72B": _qwen2_vl(152064, False, 8192, 29568, 80, 64, 8),
  "Qwen2.5-VL-3B": _qwen2_5_vl(3420, 151936, True, 2048, 11008, 36, 16, 2),
  "Qwen2.5-VL-7B": _qwen2_5_vl(3420, 152064, False, 3584, 18944, 28, 28, 4),
  "Qwen2.5-VL-32B": _qwen2_5_vl(3456, 152064, False, 5120, 27648, 64, 40, 8),
  "Qwen2.5-VL-72B": _qwen2_5_vl(3456, 152064, False, 8192, 29568, 80, 64, 8),
  "Qwen3-VL-2B": _qwen3_vl(_SMALL_TOWER, True, 2048, 6144, 28, 16, 8),
  "Qwen3-VL-4B": _qwen3_vl(_SMALL_TOWER, True, 2560, 9728, 36, 32, 8),
  "Qwen3-VL-8B": _qwen3_vl(_LARGE_TOWER, False, 4096, 12288, 36, 32, 8),
  "Qwen3-VL-32B": _qwen3_vl(_LARGE_TOWER, False, 5120, 25600, 64, 64, 8),
  "Qwen3-VL-30B-A3B": _qwen3_vl(
    _LARGE_TOWER, False, 2048, 6144, 48, 32, 4, moe_intermediate_size=768, **_EXPERTS
  ),
  "Qwen3-VL-235B-A22B": _qwen3_vl(
    _LARGE_TOWER, False, 4096, 12288, 94, 64, 4, moe_intermediate_size=1536, **_EXPERTS
  ),
  "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, head_dim=256, query_pre_attn_scalar=256),
  "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, head_dim=256, query_pre_attn_scalar=256),
  "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
}

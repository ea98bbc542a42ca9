"""Tests that `config.json` is read as in transformers, and that unsupported settings are errors."""

import copy
import json

import pytest
import transformers

from jaxrl_vlm import models
from jaxrl_vlm.models.config import MoE
from jaxrl_vlm.models.published import CONFIGS
from tests.sparse import sparse

ONE_OF_EACH = {
  "qwen2_vl": "Qwen2-VL-2B",
  "qwen2_5_vl": "Qwen2.5-VL-3B",
  "qwen3_vl": "Qwen3-VL-2B",
  "qwen3_vl_moe": "Qwen3-VL-30B-A3B",
  "gemma3": "gemma-3-4b",
}


def changed(family: str, part: str, **fields):
  config = copy.deepcopy(CONFIGS[ONE_OF_EACH[family]])
  (config.get(part, config) if part else config).update(fields)
  return config


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_published_config_and_one_of_transformers_5_are_read_the_same(family):
  published = CONFIGS[ONE_OF_EACH[family]]
  theirs = dict(copy.deepcopy(published))
  theirs = transformers.AutoConfig.for_model(theirs.pop("model_type"), **theirs).to_dict()
  one, other = models.from_hf(published), models.from_hf(theirs)
  same = {"hf": "", "suppressed_tokens": (), "stop_tokens": (), "pad_token": 0}
  assert one.replace(**same) == other.replace(**same)


def test_an_unknown_family_is_an_error_with_the_supported_families():
  with pytest.raises(
    ValueError,
    match="model_type='llama' is not supported; supported: "
    "'qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'qwen3_vl_moe', 'gemma3'",
  ):
    models.from_hf({"model_type": "llama"})


YARN = {"rope_type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}


@pytest.mark.parametrize(
  ("family", "part", "fields", "message"),
  [
    (
      "qwen2_vl",
      "",
      {"rope_scaling": YARN},
      "rope_type='yarn' is not supported; supported: 'default', 'mrope'",
    ),
    ("qwen2_5_vl", "", {"rope_scaling": YARN}, "rope_type='yarn' is not supported"),
    ("qwen3_vl", "text_config", {"rope_scaling": YARN}, "rope_type='yarn' is not supported"),
    (
      "gemma3",
      "text_config",
      {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
      "rope_type='llama3' is not supported; supported: 'default', 'linear'",
    ),
    (
      "qwen2_5_vl",
      "",
      {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}},
      r"mrope_section=\[1, 2, 3\] must be three numbers that sum to half the head dimension, 64",
    ),
    ("qwen2_5_vl", "", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
    ("qwen2_5_vl", "", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    ("qwen2_vl", "vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act='relu'"),
    ("qwen3_vl", "text_config", {"attention_bias": True}, "attention_bias=true is not supported"),
    ("qwen3_vl_moe", "text_config", {"mlp_only_layers": [3]}, r"mlp_only_layers=\[3\] are not"),
    ("gemma3", "text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is"),
  ],
)
def test_an_unsupported_setting_is_an_error_with_its_name(family, part, fields, message):
  with pytest.raises(ValueError, match=message):
    models.from_hf(changed(family, part, **fields))


def test_linear_rotary_scaling_without_a_factor_is_an_error():
  config = changed("gemma3", "text_config", rope_scaling={"rope_type": "linear"})
  with pytest.raises(ValueError, match="config.json: rope_type='linear' without factor"):
    models.from_hf(config)


def hf_parsed(config):
  config = copy.deepcopy(config)
  return transformers.AutoConfig.for_model(config.pop("model_type"), **config)


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_with_default_values_may_be_absent(name):
  """Files of transformers 4 omit these fields. Both libraries read the same values from them."""
  full, less = CONFIGS[name], sparse(CONFIGS[name])
  assert len(str(less)) < len(str(full))
  config = models.from_hf(less)
  assert json.loads(config.hf) == less
  assert config.replace(hf="") == models.from_hf(full).replace(hf="")
  check_sizes(config, hf_parsed(less))


# The vision_config of published checkpoints as transformers 4.49 writes it.
TOWERS = {
  "Qwen2.5-VL-7B": {
    "hidden_size": 1280,
    "in_chans": 3,
    "model_type": "qwen2_5_vl",
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
  },
  "Qwen2-VL-7B": {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
}


@pytest.mark.parametrize("name", TOWERS)
def test_the_vision_config_of_a_fine_tuned_checkpoint_is_read(name):
  config = CONFIGS[name] | {"vision_config": TOWERS[name]}
  ours = models.from_hf(config)
  assert ours.replace(hf="") == models.from_hf(CONFIGS[name]).replace(hf="")
  check_sizes(ours, hf_parsed(config))


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_config_without_fields_has_the_defaults_of_transformers(family):
  config = {"model_type": family}
  if family.startswith("qwen3"):  # the default in transformers has no mrope_section
    config["text_config"] = {"rope_scaling": {"mrope_section": [24, 20, 20]}}
  check_sizes(models.from_hf(config), hf_parsed(config))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_in_chans_is_ignored_as_in_transformers(family):
  config = changed(family, "vision_config", in_chans=1)
  assert models.from_hf(config).vision.in_channels == 3
  assert hf_parsed(config).vision_config.in_channels == 3
  config["vision_config"]["in_channels"] = 1
  assert models.from_hf(config).vision.in_channels == 1


@pytest.mark.parametrize("family", ONE_OF_EACH)
@pytest.mark.parametrize("part", ["", "text_config"])
@pytest.mark.parametrize("tied", [False, True])
def test_tie_word_embeddings_is_read_where_transformers_reads_it(family, part, tied):
  config = copy.deepcopy(CONFIGS[ONE_OF_EACH[family]])
  config.pop("tie_word_embeddings", None)
  if part and part not in config:  # an added text_config replaces the fields at the top level
    config[part] = {}
  (config[part] if part else config)["tie_word_embeddings"] = tied
  assert models.from_hf(config).tied == hf_parsed(config).tie_word_embeddings


def test_tokens_outside_the_vocabulary_are_not_suppressed():
  config = changed("qwen2_vl", "", vocab_size=151654)
  assert models.from_hf(config).suppressed_tokens == (151652, 151653)


@pytest.mark.parametrize(
  ("fields", "stops", "pad"),
  [
    ({"eos_token_id": 0}, (0,), 0),
    ({"eos_token_id": [0, 3]}, (0, 3), 0),
    ({"eos_token_id": 5}, (5,), 5),
    ({"eos_token_id": 5, "pad_token_id": 0}, (5,), 0),
    ({"eos_token_id": 5, "text_config": {"eos_token_id": 6, "pad_token_id": 7}}, (5,), 7),
    ({"text_config": {"eos_token_id": 0}}, (0,), 0),
    ({}, (151645,), 151645),
    ({"vocab_size": 100}, (151645,), 0),  # a token outside the vocabulary cannot be the pad token
  ],
)
def test_stop_and_pad_tokens(fields, stops, pad):
  config = models.from_hf({"model_type": "qwen2_vl", **fields})
  assert (config.stop_tokens, config.pad_token) == (stops, pad)


@pytest.mark.parametrize(
  ("eos", "stops"),
  [("0", (0,)), ("[0, 7]", (0, 7)), ("7", (7,)), ("null", (151645,)), ("[]", (151645,))],
)
def test_stop_tokens_of_generation_config_have_precedence(eos, stops, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen2-VL-2B"]))
  assert models.from_directory(tmp_path).stop_tokens == (151645,)
  (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
  assert models.from_directory(tmp_path).stop_tokens == stops


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "^generation_config.json: not JSON: "),
    ("[]", "^generation_config.json: expected a JSON object, got list"),
    ('{"eos_token_id": "a"}', "generation_config.json: eos_token_id='a': expected a token id or"),
    ('{"eos_token_id": [true]}', r"generation_config.json: eos_token_id=\[True\]: expected a tok"),
  ],
)
def test_an_invalid_generation_config_is_an_error_in_one_line(content, message, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen2-VL-2B"]))
  (tmp_path / "generation_config.json").write_text(content)
  with pytest.raises(ValueError, match=message) as error:
    models.from_directory(tmp_path)
  assert "\n" not in str(error.value)


def check_sizes(ours, theirs):
  """Asserts that a ModelConfig has the values of a configuration of transformers."""
  text, vision, tower = theirs.text_config, theirs.vision_config, ours.vision
  gemma = ours.family == "gemma3"
  head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
  rope = text.rope_parameters["full_attention"] if gemma else text.rope_parameters
  expected = dict(
    vocab_size=text.vocab_size,
    hidden_size=text.hidden_size,
    num_layers=text.num_hidden_layers,
    intermediate_size=text.intermediate_size,
    num_heads=text.num_attention_heads,
    num_kv_heads=text.num_key_value_heads,
    head_dim=head_dim,
    rms_norm_eps=text.rms_norm_eps,
    activation=text.hidden_activation if gemma else text.hidden_act,
    rope_theta=rope["rope_theta"],
    rope_factor=rope.get("factor", 1.0),
    mrope_section=tuple(rope.get("mrope_section", ours.mrope_section)),
    attention_scale=(text.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
    tied=theirs.tie_word_embeddings,
  )
  if gemma:
    expected |= dict(
      sliding_window=text.sliding_window,
      sliding_layers=tuple(kind == "sliding_attention" for kind in text.layer_types),
      sliding_rope_theta=text.rope_parameters["sliding_attention"]["rope_theta"],
    )
  if ours.moe is not None:
    expected |= dict(
      moe=MoE(text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size)
    )
  assert {field: getattr(ours, field) for field in expected} == expected

  qwen2, embed = ours.family == "qwen2_vl", getattr(vision, "embed_dim", vision.hidden_size)
  expected = dict(
    depth=vision.num_hidden_layers,
    num_heads=vision.num_attention_heads,
    hidden_size=embed,
    intermediate_size=embed * vision.mlp_ratio if qwen2 else vision.intermediate_size,
    out_hidden_size=(
      text.hidden_size if gemma else vision.hidden_size if qwen2 else vision.out_hidden_size
    ),
    patch_size=vision.patch_size,
    activation=vision.hidden_act,
    in_channels=vision.num_channels if gemma else vision.in_channels,
  )
  if gemma:
    side = vision.image_size // vision.patch_size
    expected |= dict(
      position_grid=side,
      norm_eps=vision.layer_norm_eps,
      spatial_merge_size=side // int(theirs.mm_tokens_per_image**0.5),
    )
  else:
    expected |= dict(
      temporal_patch_size=vision.temporal_patch_size,
      spatial_merge_size=vision.spatial_merge_size,
      rope_theta=vision.rope_parameters["rope_theta"],
    )
  if ours.family == "qwen2_5_vl":
    expected |= dict(
      window_size=vision.window_size, full_attention_layers=tuple(vision.fullatt_block_indexes)
    )
  if ours.family.startswith("qwen3"):
    expected |= dict(
      position_grid=int(vision.num_position_embeddings**0.5),
      deepstack_layers=tuple(vision.deepstack_visual_indexes),
    )
  assert {field: getattr(tower, field) for field in expected} == expected

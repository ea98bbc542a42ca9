"""Tests reading `config.json`: defaults equal those of transformers, and errors name the field."""

import copy
import json
import re

import pytest
import transformers

from jaxrl_vlm import hf_config
from jaxrl_vlm.data import families as data_families
from jaxrl_vlm.models import families as model_families
from jaxrl_vlm.models.published import CONFIGS

# Fields that not every config class of transformers has. They are null or depend on other fields.
ROPE = {"rope_theta", "rope_local_base_freq", "rope_parameters", "rope_scaling"}
DERIVED = {"head_dim", "layer_types", "mlp_only_layers", "sliding_window_pattern"}


def test_all_modules_support_the_same_families():
  assert set(hf_config.DEFAULTS) == set(data_families.FAMILIES) == set(model_families.FAMILIES)
  assert set(hf_config.DEFAULTS) == {config["model_type"] for config in CONFIGS.values()}


@pytest.mark.parametrize("family", hf_config.DEFAULTS)
def test_defaults_equal_those_of_transformers(family):
  theirs = transformers.AutoConfig.for_model(family)
  parts = (theirs, theirs.text_config, theirs.vision_config)
  for ours, part in zip(hf_config.DEFAULTS[family], parts, strict=True):
    for field, value in ours.items():
      if field in ROPE or (field in DERIVED and value is None):
        continue
      default = getattr(part, field, None)
      default = tuple(default) if isinstance(default, list) else default
      # If transformers has no such field, our default must be off.
      assert (
        value == default or (not value and not default) or (field == "sliding_window_pattern")
      ), field
  _, text, vision = hf_config.DEFAULTS[family]
  rope = theirs.text_config.rope_parameters
  if family == "gemma3":
    assert text["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert text["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    kinds = theirs.text_config.layer_types
    assert kinds.index("full_attention") + 1 == text["sliding_window_pattern"]
  else:
    assert text["rope_theta"] == rope["rope_theta"]
    assert vision["rope_theta"] == theirs.vision_config.rope_parameters["rope_theta"]


def test_complete_does_not_modify_its_argument_and_keeps_other_fields():
  config = CONFIGS["Qwen2.5-VL-7B"] | {"architectures": ["A"]}
  before = copy.deepcopy(config)
  whole = hf_config.complete(config)
  assert config == before
  assert whole["architectures"] == ["A"]
  assert whole["text_config"]["hidden_size"] == 3584
  assert whole["vision_config"]["in_chans"] == 3
  assert hf_config.complete(whole) == whole


@pytest.mark.parametrize("family", hf_config.DEFAULTS)
@pytest.mark.parametrize(
  "section",
  [{}, {"text_config": None}, {"text_config": {}}, {"text_config": {"num_hidden_layers": 6}}],
)
def test_fields_of_the_decoder_are_found_as_in_transformers(family, section):
  """Only in older files of the older families are they at the top level."""
  config = {"model_type": family, "hidden_size": 2048, "num_hidden_layers": 12, **section}
  whole = hf_config.complete(config)
  config = copy.deepcopy(config)
  theirs = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
  for field in ("hidden_size", "num_hidden_layers", "intermediate_size"):
    assert whole["text_config"][field] == getattr(theirs.text_config, field)


@pytest.mark.parametrize(
  ("family", "section", "alias", "field"),
  [
    ("qwen3_vl_moe", "text_config", "num_local_experts", "num_experts"),
    ("qwen2_5_vl", "vision_config", "num_hidden_layers", "depth"),
    ("qwen3_vl", "vision_config", "num_attention_heads", "num_heads"),
    ("gemma3", "", "image_token_id", "image_token_index"),
  ],
)
@pytest.mark.parametrize("both", [False, True])
def test_other_names_of_a_field_have_precedence_as_in_transformers(
  family, section, alias, field, both
):
  fields = {alias: 8} | ({field: 4} if both else {})
  config = {section: fields} if section else fields
  theirs = transformers.AutoConfig.for_model(family, **copy.deepcopy(config))
  theirs = getattr(theirs, section) if section else theirs
  whole = hf_config.complete({"model_type": family, **config})
  assert (whole[section] if section else whole)[field] == getattr(theirs, field) == 8


@pytest.mark.parametrize(
  ("family", "fields", "message"),
  [
    (
      "llama",
      {},
      "model_type='llama' is not supported; supported: 'qwen2_vl', 'qwen2_5_vl', "
      "'qwen3_vl', 'qwen3_vl_moe', 'gemma3'",
    ),
    (None, {}, "model_type=None is not supported; supported: 'qwen2_vl'"),
    (["gemma3"], {}, "model_type=['gemma3'] is not supported"),
    (
      "qwen2_vl",
      {"quantization_config": {"quant_method": "awq", "bits": 4}},
      "quantization_config.quant_method='awq': quantized checkpoints are not supported; expected "
      "weights in bfloat16, float16 or float32",
    ),
    ("qwen2_vl", {"quantization_config": "fp8"}, "quantization_config.quant_method='fp8': quan"),
    ("qwen2_vl", {"num_hidden_layers": "a"}, "num_hidden_layers='a': expected a positive integer"),
    ("qwen2_vl", {"num_hidden_layers": None}, "num_hidden_layers=None: expected a positive int"),
    ("qwen2_vl", {"num_hidden_layers": True}, "num_hidden_layers=True: expected a positive int"),
    ("qwen2_vl", {"num_attention_heads": 0}, "num_attention_heads=0: expected a positive integer"),
    ("qwen2_vl", {"image_token_id": -1}, "image_token_id=-1: expected a token id"),
    ("qwen2_vl", {"pad_token_id": "a"}, "pad_token_id='a': expected a token id"),
    ("qwen2_vl", {"rms_norm_eps": "a"}, "rms_norm_eps='a': expected a positive number"),
    ("qwen2_vl", {"hidden_act": ["silu"]}, "hidden_act=['silu']: expected a string"),
    ("qwen2_vl", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no': expected true or false"),
    ("qwen2_vl", {"text_config": []}, "text_config=[]: expected an object"),
    ("qwen2_vl", {"vision_config": []}, "vision_config=[]: expected an object"),
    ("qwen2_vl", {"rope_scaling": "mrope"}, "rope_scaling='mrope': expected an object"),
    (
      "qwen2_vl",
      {"rope_scaling": {"mrope_section": [1, "a"]}},
      "rope_scaling.mrope_section=[1, 'a']: expected a list of integers",
    ),
    (
      "qwen2_vl",
      {"vision_config": {"patch_size": [14, 14]}},
      "vision_config.patch_size=[14, 14]: expected a positive integer",
    ),
    (
      "qwen2_5_vl",
      {"vision_config": {"fullatt_block_indexes": 7}},
      "vision_config.fullatt_block_indexes=7: expected a list of integers",
    ),
    (
      "qwen2_5_vl",
      {"vision_config": {"num_hidden_layers": "a"}},
      "vision_config.num_hidden_layers='a': expected a positive integer",
    ),
    (
      "qwen3_vl",
      {"text_config": {"num_hidden_layers": "a"}},
      "text_config.num_hidden_layers='a': expected a positive integer",
    ),
    (
      "gemma3",
      {"text_config": {"layer_types": [1]}},
      "text_config.layer_types=[1]: expected a list of strings",
    ),
    (
      "gemma3",
      {"text_config": {"rope_parameters": {"full_attention": {"factor": "a"}}}},
      "text_config.rope_parameters.full_attention.factor='a': expected a positive number",
    ),
    ("gemma3", {"mm_tokens_per_image": None}, "mm_tokens_per_image=None: expected a positive int"),
  ],
)
def test_errors_name_the_field_and_its_value(family, fields, message):
  for read in (hf_config.complete, model_families.from_hf, lambda c: data_families.create(c, {})):
    with pytest.raises(ValueError, match=f"^config.json: {re.escape(message)}") as error:
      read({"model_type": family, **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "config.json: not JSON: Expecting value"),
    (b"\xff\xff\xff", "config.json: not JSON: "),
    (b'{"model_type": ', "config.json: not JSON: Expecting value: line 1 column 16"),
    (b"[]", "config.json: expected a JSON object, got list"),
  ],
)
def test_error_of_a_file_that_is_no_json_object(content, message, tmp_path):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
    hf_config.read(tmp_path)
  assert "\n" not in str(error.value)


def test_error_of_a_missing_file(tmp_path):
  message = f"{tmp_path}/config.json: no such file; expected a Hugging Face model directory"
  with pytest.raises(FileNotFoundError, match=re.escape(message)):
    hf_config.read(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
  assert hf_config.read(str(tmp_path)) == {"a": 1}

"""What `config.json` says, of every family, and what is refused."""

import copy

import pytest
import transformers

from jaxrl_vlm import models
from jaxrl_vlm.models.published import CONFIGS

ONE_OF_EACH = {"qwen2_vl": "Qwen2-VL-2B", "qwen2_5_vl": "Qwen2.5-VL-3B", "qwen3_vl": "Qwen3-VL-2B",
               "qwen3_vl_moe": "Qwen3-VL-30B-A3B", "gemma3": "gemma-3-4b"}


def changed(family: str, part: str, **fields):
  config = copy.deepcopy(CONFIGS[ONE_OF_EACH[family]])
  (config.get(part, config) if part else config).update(fields)
  return config


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_published_and_saved_configs_say_the_same(family):
  """The hub's form of the file, and the one that transformers 5 writes."""
  published = CONFIGS[ONE_OF_EACH[family]]
  theirs = dict(copy.deepcopy(published))
  theirs = transformers.AutoConfig.for_model(theirs.pop("model_type"), **theirs).to_dict()
  one, other = models.from_hf(published), models.from_hf(theirs)
  same = {"hf": "", "suppressed_tokens": (), "stop_tokens": (), "pad_token": 0}
  assert one.replace(**same) == other.replace(**same)


def test_unknown_family_lists_what_is_supported():
  with pytest.raises(ValueError, match="model_type='llama' is not supported; supported: "
                     "'qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'qwen3_vl_moe', 'gemma3'"):
    models.from_hf({"model_type": "llama"})


YARN = {"rope_type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}


@pytest.mark.parametrize(("family", "part", "fields", "message"), [
    ("qwen2_vl", "", {"rope_scaling": YARN}, "rope_type='yarn' is not supported; supported: "
     "'default', 'mrope'"),
    ("qwen2_5_vl", "", {"rope_scaling": YARN}, "rope_type='yarn' is not supported"),
    ("qwen3_vl", "text_config", {"rope_scaling": YARN}, "rope_type='yarn' is not supported"),
    ("gemma3", "text_config", {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
     "rope_type='llama3' is not supported; supported: 'default', 'linear'"),
    ("qwen2_5_vl", "", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}},
     r"mrope_section=\[1, 2, 3\] must be three numbers that sum to half the head dimension, 64"),
    ("qwen2_5_vl", "", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
    ("qwen2_5_vl", "", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    ("qwen2_vl", "vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act='relu'"),
    ("qwen3_vl", "text_config", {"attention_bias": True}, "attention_bias=true is not supported"),
    ("qwen3_vl_moe", "text_config", {"mlp_only_layers": [3]}, r"mlp_only_layers=\[3\] are not"),
    ("gemma3", "text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is"),
])
def test_what_is_not_supported_is_named(family, part, fields, message):
  with pytest.raises(ValueError, match=message):
    models.from_hf(changed(family, part, **fields))


def test_missing_field_is_named():
  config = changed("qwen3_vl", "")
  del config["text_config"]["num_hidden_layers"]
  with pytest.raises(ValueError, match="config.json: num_hidden_layers is missing"):
    models.from_hf(config)

"""Tests that the models of all published sizes have the tensor names and shapes of transformers."""

import copy

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxrl_vlm import models
from jaxrl_vlm.models import names, weights
from jaxrl_vlm.models.published import CONFIGS

# Billions of parameters, according to the model cards on the Hugging Face hub.
SIZES = {
  "Qwen2-VL-2B": 2.21,
  "Qwen2-VL-7B": 8.29,
  "Qwen2-VL-72B": 73.4,
  "Qwen2.5-VL-3B": 3.75,
  "Qwen2.5-VL-7B": 8.29,
  "Qwen2.5-VL-32B": 33.5,
  "Qwen2.5-VL-72B": 73.4,
  "Qwen3-VL-2B": 2.13,
  "Qwen3-VL-4B": 4.44,
  "Qwen3-VL-8B": 8.77,
  "Qwen3-VL-32B": 33.4,
  "Qwen3-VL-30B-A3B": 31.1,
  "Qwen3-VL-235B-A22B": 236.0,
  "gemma-3-4b": 4.30,
  "gemma-3-12b": 12.2,
  "gemma-3-27b": 27.4,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_equal_transformers(name):
  config = models.from_hf(CONFIGS[name])
  shapes = models.abstract_params(config)
  flat = weights.by_path(shapes)
  ours = {}
  for entry in names.entries(config):
    shape = flat.pop(entry.path).shape
    if entry.layers is not None:
      assert shape[0] == len(entry.layers)
      shape = shape[1:]
    for tensor in entry.names():
      assert (tensor in ours) == (entry.half == 1)
      ours[tensor] = entry.memory_shape(shape, config)
  assert not flat  # every parameter has a tensor

  parsed = dict(copy.deepcopy(CONFIGS[name]))
  parsed = transformers.AutoConfig.for_model(parsed.pop("model_type"), **parsed)
  with torch.device("meta"):
    theirs = transformers.AutoModelForImageTextToText.from_config(parsed)
  expected = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
  if config.tied:
    assert expected.pop("lm_head.weight") == expected["model.language_model.embed_tokens.weight"]
  assert ours == expected
  assert config.tied == parsed.tie_word_embeddings

  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
  assert count == pytest.approx(SIZES[name] * 1e9, rel=0.005)

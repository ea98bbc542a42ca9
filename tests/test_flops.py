"""Compares model FLOPs with counts by hand, with parameter shapes, and with the counts of XLA."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrl_vlm import flops, models
from jaxrl_vlm.data.layout import lay_out_patches
from jaxrl_vlm.models.config import MoE
from jaxrl_vlm.models.decoder import Prefix
from jaxrl_vlm.models.published import CONFIGS
from tests import tiny, tiny_processor

# XLA also counts norms, rotary embeddings, softmax and activation functions: 4 to 7% in models this
# narrow.
LEAST = 0.92


def one_layer(tmp_path, family):
  """A tiny model with one layer of each kind, because XLA counts the body of a loop once."""
  tiny_processor.make_processor_dir(tmp_path, family=family)
  hf = json.loads((tmp_path / "config.json").read_text())
  config = models.from_hf(tiny.hf_config(family, hf, True).to_dict())
  vision = dataclasses.replace(
    config.vision,
    depth=1,
    deepstack_layers=config.vision.deepstack_layers[:1],
    full_attention_layers=None if config.vision.full_attention_layers is None else (0,),
  )
  # XLA for CPU computes every expert for every token.
  moe = config.moe and MoE(1, 1, 2 * config.moe.intermediate_size)
  return config.replace(num_layers=1, vision=vision, moe=moe, sliding_window=0, sliding_layers=())


def counted(function, *args) -> float:
  cost = jax.jit(function).lower(*args).compile().cost_analysis()
  return cost["flops"]


def hidden(config, prompt, tokens=None):
  """A function of params that computes hidden states of the prompt, or of responses [P, G, T]."""

  def run(params, prompt, tokens):
    variables, model = {"params": params}, models.VLM(config)
    if tokens is None:
      return model.apply(variables, prompt, method="prefill")[0]
    shape = (
      1,
      prompt.tokens.shape[0],
      config.num_kv_heads,
      prompt.tokens.shape[1],
      config.head_dim,
    )
    prefix = Prefix(*(jax.numpy.ones(shape),) * 2, prompt.length - 1)
    return model.apply(variables, prompt, prefix, tokens, method="respond")

  return lambda params: run(params, prompt, tokens)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_decoder_and_vision_flops_match_xla(tmp_path, family):
  config = one_layer(tmp_path, family)
  params = models.abstract_params(config)
  prompt = models.dummy_prompt(config, 1, 48, num_patches=0)
  # XLA also computes the masked scores, so that every query attends to all keys.
  expected = flops.decoder(config, 48, 48 * 48)
  assert LEAST < expected / counted(hidden(config, prompt), params) < 1
  if family == "qwen3_vl_moe":
    return  # same vision tower as qwen3_vl
  side = 12
  image = models.dummy_prompt(config, 1, 8, num_patches=side * side)
  tower = counted(lambda p: models.VLM(config).apply({"params": p}, image, method="see"), params)
  assert LEAST < flops.vision(config, (side, side)) / tower < 1


def test_flops_of_responses_logits_and_gradients_match_xla(tmp_path):
  config = one_layer(tmp_path, "qwen2_5_vl")
  params = models.abstract_params(config)
  prompt = models.dummy_prompt(config, 2, 40, num_patches=0)
  run = hidden(config, prompt, np.zeros((2, 3, 16), np.int32))
  once = counted(run, params)
  expected = flops.decoder(config, 2 * 3 * 16, 2 * 3 * 16 * (40 + 16))
  assert LEAST < expected / once < 1
  logits = counted(
    lambda p, x: models.VLM(config).apply({"params": p}, x, method="unembed"),
    params,
    jax.ShapeDtypeStruct((5, config.hidden_size), np.float32),
  )
  assert flops.unembedding(config, 5) == pytest.approx(logits, rel=1e-6)

  # The backward pass is twice the forward pass. XLA counts a little less, because the input of the
  # embedding has no gradient.
  both = counted(jax.value_and_grad(lambda p: run(p).sum()), params)
  assert both / once == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("name", ["Qwen2-VL-2B", "Qwen2.5-VL-3B", "Qwen3-VL-8B", "gemma-3-4b"])
def test_a_token_costs_two_flops_per_matrix_element(name):
  config = models.from_hf(CONFIGS[name])
  shapes = models.abstract_params(config)

  def matrices(tree):
    return sum(x.size for path, x in jax.tree.leaves_with_path(tree) if "kernel" in str(path[-1]))

  assert flops.decoder(config, 1, 0) == 2 * matrices(shapes["decoder"])
  vocabulary = shapes["embed"]["embedding"].shape[0]
  assert flops.unembedding(config, 1) == 2 * vocabulary * config.hidden_size


def test_only_the_experts_of_a_token_are_counted():
  config = models.from_hf(CONFIGS["Qwen3-VL-30B-A3B"])
  layer = 2 * 2048 * 128 * (32 + 4) + 2048 * 128 + 8 * 3 * 2048 * 768
  assert flops.decoder(config, 1, 0) == 2 * 48 * layer


def test_window_attention_matches_the_windows_of_the_processor():
  config = models.from_hf(CONFIGS["Qwen2.5-VL-3B"])
  v = config.vision
  for rows, columns in ((8, 8), (4, 6), (26, 38), (74, 18)):
    windows = lay_out_patches([(1, rows, columns)], 2, v.patch_size, v.window_size)[3]
    n, layers = rows * columns, 28 * (np.bincount(windows) ** 2).sum() + 4 * (rows * columns) ** 2
    dense = n * (1176 * 1280 + 32 * (4 * 1280**2 + 3 * 1280 * 3420))
    merger = n // 4 * (5120**2 + 5120 * 2048)
    assert flops.vision(config, (rows, columns)) == 2 * (dense + 2 * 1280 * layers + merger)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (7, 0), (7, 3), (7, 20), (0, 4)])
def test_number_of_keys_in_a_causal_stream(tokens, before, window):
  expected = sum(min(before + i + 1, window or 10**9) for i in range(tokens))
  assert flops.seen(tokens, before, window) == expected


def test_shared_and_separate_prompts_match_a_count_by_hand(tmp_path):
  """The model has two layers of width 4, two heads and one key/value head of size 2.

  The MLP has 3 hidden units, and the vocabulary 10 tokens.
  """
  config = one_layer(tmp_path, "qwen2_5_vl").replace(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=3,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
  )
  token = 2 * (4 * 4 * 2 + 4 * 2 * 2 + 3 * 4 * 3)  # one layer: q and o, k and v, MLP
  key = 2 * 2 * 4  # one query and one key: score and weighted value
  assert flops.prefill(config, 5) == 2 * (5 * token + 15 * key)
  # The last of the 5 prompt tokens is in the stream of each response.
  answers = 2 * (4 * token + (5 + 6 + 7 + 5) * key) + 4 * 2 * 4 * 10
  assert flops.responses(config, [3, 1], 5) == answers
  assert flops.forward(config, 5, [3, 1]) == flops.prefill(config, 4) + answers
  assert flops.forward(config, 5, [3, 1], shared=False) == 2 * flops.prefill(config, 4) + answers
  # Separate sequences of 7 and 5 tokens, 4 of which have logits.
  assert flops.forward(config, 5, [3, 1], shared=False) == pytest.approx(
    flops.prefill(config, 7) + flops.prefill(config, 5) + 4 * 2 * 4 * 10
  )
  tower = flops.vision(config, (4, 4))
  both = flops.forward_backward(config, 5, [3, 1], [(4, 4)])
  assert both == 3 * (flops.forward(config, 5, [3, 1]) + tower)
  frozen = flops.forward_backward(config, 5, [3, 1], [(4, 4)], trains_vision=False)
  assert frozen == both - 2 * tower

"""Compares the Flax models with the PyTorch models of transformers with the same random weights."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxrl_vlm as jv
from jaxrl_vlm import models, scoring
from jaxrl_vlm.models import layers, names, weights
from tests import tiny

# (family, whether the embedding is also the output head). `ONCE` has each family once, `CASES` has
# all combinations.
ONCE = [
  ("qwen2_vl", True),
  ("qwen2_5_vl", False),
  ("qwen3_vl", True),
  ("qwen3_vl_moe", False),
  ("gemma3", True),
]
CASES = ONCE + [(family, not tied) for family, tied in ONCE]


def _id(case) -> str:
  return f"{case[0]}-{'tied' if case[1] else 'head'}"


@pytest.fixture(scope="module", params=CASES, ids=_id)
def pair(request, tmp_path_factory):
  """Returns the directory, the model of transformers, and (model, params, processor)."""
  family, tied = request.param
  path = tmp_path_factory.mktemp("hf")
  theirs = tiny.make_hf(path, family=family, tied=tied)
  return path, theirs, jv.load_pretrained(path)


every_family_once = pytest.mark.parametrize("pair", ONCE, indirect=True, ids=_id)


@pytest.fixture(scope="module")
def mixed(pair):
  """Returns a batch of all kinds of input of a family, and the logits of transformers by row."""
  _, theirs, (_, _, processor) = pair
  prompt = tiny.mixed_batch(processor, theirs.config.model_type)
  return prompt, [tiny.torch_logits(theirs, prompt, row) for row in range(len(prompt.length))]


def test_logits_equal_transformers(pair, mixed):
  _, _, (model, params, _) = pair
  prompt, expected = mixed
  logits = np.asarray(jv.logits(model, params, prompt))
  for row, want in enumerate(expected):
    assert np.ptp(want) > 1  # the logits depend on the token
    np.testing.assert_allclose(logits[row, : len(want)], want, atol=1e-4, err_msg=f"row {row}")


def test_greedy_generation_equals_transformers(pair, mixed):
  """Generates 32 tokens, without stop tokens in both libraries."""
  _, theirs, (model, params, processor) = pair
  prompt, _ = mixed
  endless = models.VLM(model.config.replace(stop_tokens=()))
  rollout = jv.generate(
    endless, params, prompt, jv.Sampling(max_tokens=32, temperature=0), processor=processor
  )
  assert rollout.mask.all()
  for row in range(len(prompt.length)):
    expected = tiny.torch_greedy(theirs, prompt, row, endless.config, 32)
    assert expected.shape == (32,)
    np.testing.assert_array_equal(rollout.tokens[row, 0], expected, err_msg=f"row {row}")
    assert rollout.text[row][0] == processor.decode(expected)


@pytest.mark.parametrize("pair", [("gemma3", True)], indirect=True, ids=_id)
def test_stop_tokens_end_responses_as_in_transformers(pair):
  """There are two stop tokens, which end different rows first."""
  _, theirs, (model, params, processor) = pair
  prompt = processor(*tiny.conversations())
  endless = model.config.replace(stop_tokens=())
  free = [tiny.torch_greedy(theirs, prompt, row, endless, 16) for row in range(3)]
  config = model.config.replace(stop_tokens=(int(free[0][3]), int(free[1][9])))
  rollout = jv.generate(
    models.VLM(config), params, prompt, jv.Sampling(max_tokens=16, temperature=0)
  )
  lengths = set()
  for row in range(3):
    expected = tiny.torch_greedy(theirs, prompt, row, config, 16)
    n = len(expected)
    lengths.add(n)
    np.testing.assert_array_equal(expected, free[row][:n])
    np.testing.assert_array_equal(rollout.mask[row, 0], np.arange(16) < n)
    np.testing.assert_array_equal(rollout.tokens[row, 0, :n], expected)
    np.testing.assert_array_equal(rollout.tokens[row, 0, n:], config.pad_token)
    assert n == 16 or expected[-1] in config.stop_tokens
  assert len(lengths) > 1 and min(lengths) < 16


@every_family_once
def test_logits_depend_on_the_image(pair):
  _, _, (model, params, processor) = pair
  messages, pictures = tiny.conversations()
  one = jv.logits(model, params, processor(messages[1], pictures[1]))
  other = jv.logits(model, params, processor(messages[1], tiny.images((40, 56), seed=9)))
  assert np.abs(one - other).max() > 0.1


@every_family_once
def test_logits_of_a_prompt_do_not_depend_on_other_prompts_or_padding(pair):
  _, _, (model, params, processor) = pair
  messages, pictures = tiny.conversations()
  batch = jv.logits(model, params, processor(messages, pictures))
  for row in range(3):
    alone = jv.logits(model, params, processor(messages[row], pictures[row]))
    n = int(processor(messages[row], pictures[row]).length[0])
    np.testing.assert_allclose(batch[row, :n], alone[0, :n], atol=2e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
@every_family_once
def test_remat_does_not_change_gradients(pair, remat):
  _, _, (model, params, processor) = pair
  prompt = processor(*tiny.conversations())

  def loss(model, params, prompt):
    real = np.arange(prompt.tokens.shape[1]) < prompt.length[:, None]
    return (
      (jv.logits(model, params, prompt) ** 2).mean(axis=-1, where=real[..., None]).mean(where=real)
    )

  again = models.VLM(model.config.replace(remat=remat))
  grad = jax.jit(jax.grad(loss, 1), static_argnums=0)
  plain, other = grad(model, params, prompt), grad(again, params, prompt)

  def assert_same(a, b):  # up to the order of sums in float32
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-7)

  jax.tree.map(assert_same, plain, other)


@every_family_once
def test_the_bfloat16_error_is_similar_to_that_of_transformers(pair, mixed):
  """The mean error of the logits is at most twice the error of transformers in bfloat16.

  The error is over real tokens, not padding.
  """
  path, _, _ = pair
  prompt, rows = mixed
  model, params, _ = jv.load_pretrained(path, dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  ours = np.asarray(jv.logits(model, params, prompt), np.float32)
  ours = [logits[: len(row)] for logits, row in zip(ours, rows, strict=True)]
  theirs = transformers.AutoModelForImageTextToText.from_pretrained(
    path, dtype=torch.bfloat16
  ).eval()
  theirs = [tiny.torch_logits(theirs, prompt, row) for row in range(len(rows))]
  exact = np.concatenate(rows)

  def error(rows):
    return np.abs(np.concatenate(rows) - exact).mean()

  assert error(ours) <= 2 * error(theirs)
  # One rounding is 0.2%, and there are dozens. The lower bound shows that bfloat16 was really used.
  assert 0.002 * exact.std() < error(ours) < 0.05 * exact.std()


def test_a_saved_model_loads_in_transformers(pair, mixed, tmp_path):
  path, theirs, (model, params, processor) = pair
  jv.save_pretrained(tmp_path, model, params, processor)
  again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
  assert type(again) is type(theirs)
  expected, saved = theirs.state_dict(), again.state_dict()
  assert set(expected) == set(saved)
  for name, value in expected.items():
    assert torch.equal(value, saved[name]), name
  prompt, logits = mixed
  np.testing.assert_array_equal(tiny.torch_logits(again, prompt, 2), logits[2])
  config = json.loads((tmp_path / "config.json").read_text())
  assert config == json.loads((path / "config.json").read_text())
  kept = {f.name for f in path.iterdir()}
  assert kept <= {f.name for f in tmp_path.iterdir()}
  _, params_again, _ = jv.load_pretrained(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_checkpoints_in_several_files_and_in_bfloat16(pair, mixed, tmp_path):
  path, theirs, (model, _, _) = pair
  family, tied = theirs.config.model_type, model.config.tied
  low = tiny.make_hf(
    tmp_path, family=family, tied=tied, dtype=torch.bfloat16, max_shard_size="100KB"
  )
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  loaded, params, _ = jv.load_pretrained(tmp_path)
  # The configs are equal, so that the compiled program of `model` can be used.
  assert loaded.config.replace(hf="") == model.config.replace(hf="")
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  prompt, _ = mixed
  load = transformers.AutoModelForImageTextToText.from_pretrained
  expected = tiny.torch_logits(load(tmp_path, dtype=torch.float32).eval(), prompt, 2)
  logits = np.asarray(jv.logits(model, params, prompt))[2, : len(expected)]
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  # Loading and saving in bfloat16 keeps all bits.
  _, params, _ = jv.load_pretrained(tmp_path, param_dtype="bfloat16")
  weights.save_params(tmp_path / "again", model.config, params, shard_bytes=100_000)
  assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
  again = load(tmp_path / "again", dtype=torch.bfloat16)
  for name, value in low.state_dict().items():
    assert torch.equal(value, again.state_dict()[name]), name


# Prefix of the decoder's tensors in the files on the Hugging Face hub, by family.
TEXT = {
  "qwen2_vl": "model",
  "qwen2_5_vl": "model",
  "qwen3_vl": "model.language_model",
  "qwen3_vl_moe": "model.language_model",
  "gemma3": "language_model.model",
}
_QWEN2 = {
  "visual.patch_embed.proj.weight": (32, 3, 2, 14, 14),
  "visual.blocks.0.attn.qkv.weight": (96, 32),
  "visual.merger.mlp.2.weight": (64, 128),
  "model.layers.0.self_attn.q_proj.weight": (64, 64),
  "model.layers.0.self_attn.k_proj.weight": (32, 64),
  "model.layers.0.self_attn.k_proj.bias": (32,),
  "model.layers.2.mlp.down_proj.weight": (64, 96),
  "model.norm.weight": (64,),
}
_QWEN3 = {
  "model.visual.patch_embed.proj.weight": (32, 3, 2, 14, 14),
  "model.visual.pos_embed.weight": (25, 32),
  "model.visual.merger.norm.weight": (32,),
  "model.visual.deepstack_merger_list.0.norm.weight": (128,),
  "model.visual.deepstack_merger_list.1.linear_fc2.weight": (64, 128),
  "model.language_model.layers.0.self_attn.q_norm.weight": (16,),
}
# Names of some tensors on the hub, and their shapes in the tiny models.
ON_THE_HUB = {
  "qwen2_vl": _QWEN2 | {"visual.blocks.2.mlp.fc1.weight": (64, 32)},
  "qwen2_5_vl": _QWEN2 | {"visual.blocks.2.mlp.gate_proj.weight": (48, 32)},
  "qwen3_vl": _QWEN3 | {"model.language_model.layers.2.mlp.gate_proj.weight": (96, 64)},
  "qwen3_vl_moe": _QWEN3
  | {
    "model.language_model.layers.0.mlp.experts.gate_up_proj": (6, 64, 48),
    "model.language_model.layers.0.mlp.experts.down_proj": (6, 24, 64),
    "model.language_model.layers.0.mlp.gate.weight": (6, 64),
  },
  "gemma3": {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (32, 3, 14, 14),
    "vision_tower.vision_model.encoder.layers.1.self_attn.out_proj.weight": (32, 32),
    "vision_tower.vision_model.post_layernorm.bias": (32,),
    "multi_modal_projector.mm_input_projection_weight": (32, 64),
    "multi_modal_projector.mm_soft_emb_norm.weight": (32,),
    "language_model.model.layers.0.post_feedforward_layernorm.weight": (64,),
    "language_model.model.layers.4.self_attn.k_norm.weight": (16,),
  },
}


def test_saved_tensors_have_the_names_and_shapes_of_the_hub(pair, tmp_path):
  path, _, (model, params, _) = pair
  family, table = model.config.family, (model.config.vocab_size, 64)
  weights.save_params(tmp_path, model.config, params)
  saved = {k: v.shape for k, v in load_file(tmp_path / "model.safetensors").items()}
  expected = ON_THE_HUB[family] | {f"{TEXT[family]}.embed_tokens.weight": table}
  if not model.config.tied:
    expected[("language_model." if family == "gemma3" else "") + "lm_head.weight"] = table
  assert {name: saved.get(name) for name in expected} == expected
  assert model.config.tied != any(name.endswith("lm_head.weight") for name in saved)
  # transformers writes the same tensors. For the vision tower of Gemma, it omits one level of the
  # names on the hub.
  theirs = set(load_file(path / "model.safetensors"))
  if family == "gemma3":
    saved = {k.replace("vision_tower.vision_model.", "vision_tower.") for k in saved}
  assert set(saved) == theirs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_small_changes_to_a_bfloat16_model_are_saved_in_float32(family, tmp_path):
  """One weight changes by the smallest step of a float32.

  transformers loads the changed weight, and all others unchanged.
  """
  start = tiny.make_hf(tmp_path / "start", family=family, dtype=torch.bfloat16)
  model, params, processor = jv.load_pretrained(tmp_path / "start")
  kernel = np.array(params["decoder"]["layers"]["q"]["kernel"])
  before = kernel[1, 2, 3]
  kernel[1, 2, 3] = after = np.nextafter(before, np.float32(np.inf))
  assert before != after and jnp.bfloat16(before) == jnp.bfloat16(after)
  params = {
    **params,
    "decoder": {
      **params["decoder"],
      "layers": {
        **params["decoder"]["layers"],
        "q": params["decoder"]["layers"]["q"] | {"kernel": jnp.asarray(kernel)},
      },
    },
  }
  jv.save_pretrained(tmp_path / "out", model, params, processor)
  again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
  expected = {name: value.float() for name, value in start.state_dict().items()}
  expected["model.language_model.layers.1.self_attn.q_proj.weight"][3, 2] = float(after)
  assert set(again) == set(expected)
  for name, value in expected.items():
    assert again[name].dtype == torch.float32, name
    assert torch.equal(again[name], value), name


@every_family_once
def test_tensor_names_of_all_versions_of_transformers_are_read(pair, tmp_path):
  """Names of the model of transformers and of older versions are read like published names."""
  path, theirs, (model, params, _) = pair
  family = model.config.family
  shutil.copytree(path, tmp_path, dirs_exist_ok=True)
  memory = {
    k: v.numpy().copy()
    for k, v in theirs.state_dict().items()
    if not (model.config.tied and k == "lm_head.weight")
  }
  older = (
    {
      "model.language_model.": "language_model.model.",
      "model.vision_tower.": "vision_tower.vision_model.",
    }
    if family == "gemma3"
    else {"model.visual.": "visual."}
  )

  def rename(name, table):
    for old, new in table.items():
      if name.startswith(old):
        return new + name.removeprefix(old)
    return name

  for tensors in (memory, {rename(k, older): v for k, v in memory.items()}):
    save_file(tensors, tmp_path / "model.safetensors")
    _, again, _ = jv.load_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, again)


@every_family_once
def test_errors_name_invalid_files_and_tensors(pair, tmp_path):
  _, _, (model, params, processor) = pair
  jv.save_pretrained(tmp_path, model, params, processor)
  last = f"{TEXT[model.config.family]}.norm.weight"
  weights_file = tmp_path / "model.safetensors"
  whole = weights_file.read_bytes()
  tensors = load_file(weights_file)

  weights_file.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
    jv.load_pretrained(tmp_path)
  save_file({k: v for k, v in tensors.items() if k != last}, weights_file)
  with pytest.raises(
    ValueError,
    match=rf"model.safetensors: tensor '{re.escape(last)}' is missing",
  ):
    jv.load_pretrained(tmp_path)
  save_file(tensors | {last: np.ones(3, np.float32)}, weights_file)
  with pytest.raises(
    ValueError,
    match=rf"model.safetensors: tensor '{re.escape(last)}' has "
    r"shape \(3,\), expected \(64,\)",
  ):
    jv.load_pretrained(tmp_path)
  save_file(tensors | {"model.extra.weight": np.ones(3, np.float32)}, weights_file)
  with pytest.raises(ValueError, match="'model.extra.weight' belongs to no parameter"):
    jv.load_pretrained(tmp_path)
  weights_file.unlink()
  with pytest.raises(FileNotFoundError, match="model.safetensors: no such file"):
    jv.load_pretrained(tmp_path)
  with pytest.raises(FileNotFoundError, match="config.json: no such file"):
    jv.load_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("scores", [40, 9, 1])
def test_attention_in_blocks_of_queries_equals_attention_at_once(scores, monkeypatch):
  """Compares values, log-sum-exps and gradients."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, a, b, 8)).astype(np.float32) for a, b in ((7, 4), (2, 9), (2, 9)))
  mask = rng.random((2, 7, 9)) < 0.7
  mask[..., 0] = True
  mask = jnp.asarray(mask)
  cotangent = rng.normal(size=q.shape).astype(np.float32), rng.normal(size=(2, 7, 4)).astype("f4")

  def run():
    out, back = jax.vjp(lambda *a: layers.attend(*a, lambda at: mask[:, at], 0.3), q, k, v)
    return out, back(cotangent)

  whole = run()
  monkeypatch.setattr(layers, "SCORES", scores)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), run(), whole)


def test_merge_is_exact():
  """Attention to two sets of keys, merged by log-sum-exp, equals attention to all keys."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, a, b, 8)).astype(np.float32) for a, b in ((5, 4), (2, 9), (2, 9)))
  mask = rng.random((2, 5, 9)) < 0.7
  mask[0, 0, :4] = False  # the first query attends to no key of the first set
  mask[0, 0, 4] = True
  whole, _ = layers.attend(q, k, v, lambda at: mask[:, at], 8**-0.5)
  halves = [
    layers.attend(q, k[:, :, s], v[:, :, s], lambda at, s=s: mask[:, at, s], 8**-0.5)
    for s in (slice(0, 4), slice(4, 9))
  ]
  np.testing.assert_allclose(layers.merge(*halves)[0], whole, atol=1e-6)
  # The formula of attention, for one query.
  keys = k[1, 1][mask[1, 2]]
  weights = np.exp(keys @ q[1, 2, 3] / np.sqrt(8))
  expected = (weights / weights.sum()) @ v[1, 1][mask[1, 2]]
  np.testing.assert_allclose(whole[1, 2, 3], expected, atol=1e-6)


def _responses(model, shape, seed=0):
  """Returns random tokens [P, G, T] and their mask, with responses of different lengths.

  Suppressed tokens are excluded. So is the pad token, because torch keeps the gradient of its
  embedding at zero even where it is not padding.
  """
  rng = np.random.default_rng(seed)
  allowed = np.setdiff1d(
    np.arange(model.config.vocab_size), [*model.config.suppressed_tokens, model.config.pad_token]
  )
  tokens = rng.choice(allowed, shape).astype(np.int32)
  mask = np.arange(shape[-1]) < rng.integers(2, shape[-1] + 1, shape[:2])[..., None]
  return tokens, mask


@every_family_once
def test_shared_prefix_equals_separate_sequences(pair):
  """Compares P · G responses with shared prefixes with P · G separate sequences in torch.

  The log-probabilities, entropies and gradients must be equal.
  """
  _, theirs, (model, params, processor) = pair
  prompt = processor(*tiny.conversations())
  tokens, mask = _responses(model, (3, 2, 7))
  share = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32) * mask

  @jax.jit
  def loss(params, prompt):
    stats = scoring.score_tokens(model, params, prompt, tokens, mask, temperature=0.7)
    return (stats.logp * share).sum(), stats

  (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, prompt)

  theirs.zero_grad()
  total = 0
  banned = list(model.config.suppressed_tokens)
  with torch.enable_grad():
    for p in range(3):
      n = int(prompt.length[p])
      inputs = tiny.torch_inputs(theirs, prompt, p)
      types = "token_type_ids" if "token_type_ids" in inputs else "mm_token_type_ids"
      kinds = np.pad(inputs.pop(types)[0].numpy(), (0, 7))
      del inputs["input_ids"]
      for g in range(2):
        ids = torch.tensor(np.concatenate([prompt.tokens[p, :n], tokens[p, g]]).astype(np.int64))
        logits = theirs(input_ids=ids[None], **{types: torch.tensor(kinds)[None]}, **inputs).logits[
          0
        ]
        logits = logits[n - 1 : -1] / 0.7
        logits[:, banned] = -1e30
        logp = torch.log_softmax(logits, -1)
        picked = logp[torch.arange(7), torch.tensor(tokens[p, g]).long()]
        entropy = -(logp.exp() * logp).sum(-1)
        keep = mask[p, g]
        np.testing.assert_allclose(
          np.asarray(stats.logp[p, g])[keep], picked.detach().numpy()[keep], atol=1e-4
        )
        np.testing.assert_allclose(
          np.asarray(stats.entropy[p, g])[keep], entropy.detach().numpy()[keep], atol=1e-4
        )
        total = total + (picked * torch.tensor(share[p, g])).sum()
    total.backward()
  expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
  flat = {tuple(k.key for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(grads)}
  compared = set()
  for entry in names.entries(model.config):
    for i, name in enumerate(entry.names()):
      ours = np.asarray(flat[entry.path])
      ours = ours if entry.layers is None else ours[i]
      if name not in expected:  # the last DeepStack layers are unused in torch
        np.testing.assert_array_equal(ours, 0, err_msg=name)
        continue
      every = (slice(None),) * ours.ndim
      want = entry.read(expected[name], ours.shape, every, model.config)
      want = want.T if entry.turned else want
      # Both round in float32. The difference is 3e-6 of the largest value, and 2e-4 in Gemma,
      # which has more norms. The absolute term is for gradients that are 0 except
      # for rounding, such as that of the bias of keys, which does not change a softmax.
      atol = (5e-4 if model.config.family == "gemma3" else 2e-5) * np.abs(want).max() + 1e-6
      np.testing.assert_allclose(ours, want, rtol=0, atol=atol, err_msg=name)
      compared.add(name)
  assert compared == set(expected)


def test_scoring_in_chunks_equals_scoring_at_once(tmp_path):
  tiny.make_hf(tmp_path)
  model, params, processor = jv.load_pretrained(tmp_path)
  prompt = processor(*tiny.conversations())
  tokens, mask = _responses(model, (3, 2, 7))

  @functools.partial(jax.jit, static_argnums=2)
  def logp(params, prompt, chunk):
    return scoring.score_tokens(model, params, prompt, tokens, mask, chunk=chunk)

  @functools.partial(jax.jit, static_argnums=2)
  @jax.grad
  def grad(params, prompt, chunk):
    stats = logp(params, prompt, chunk)
    return stats.logp.sum() + stats.entropy.sum()

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    logp(params, prompt, 3),
    logp(params, prompt, 128),
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4),
    grad(params, prompt, 3),
    grad(params, prompt, 128),
  )

"""Our Flax model against transformers' torch implementation, with the same random weights."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

import jaxrl_vlm as jv
from jaxrl_vlm import models, scoring
from jaxrl_vlm.models import layers
from tests import tiny


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
  path = tmp_path_factory.mktemp("hf")
  theirs = tiny.make_hf(path, tied=request.param)
  return path, theirs, jv.load_pretrained(path)


def test_logits_equal_transformers(pair):
  _, theirs, (model, params, processor) = pair
  prompt = processor(*tiny.conversations())
  logits = np.asarray(jv.logits(model, params, prompt))
  for row in range(3):
    expected = tiny.torch_logits(theirs, prompt, row)
    assert np.ptp(expected) > 1  # the weights say something
    np.testing.assert_allclose(logits[row, :len(expected)], expected, atol=1e-4)


def test_images_matter(pair):
  _, _, (model, params, processor) = pair
  messages, pictures = tiny.conversations()
  one = jv.logits(model, params, processor(messages[1], pictures[1]))
  other = jv.logits(model, params, processor(messages[1], tiny.images((40, 56), seed=9)))
  assert np.abs(one - other).max() > 0.1


def test_rows_do_not_see_each_other_or_padding(pair):
  _, _, (model, params, processor) = pair
  messages, pictures = tiny.conversations()
  batch = jv.logits(model, params, processor(messages, pictures))
  for row in range(3):
    alone = jv.logits(model, params, processor(messages[row], pictures[row]))
    n = int(processor(messages[row], pictures[row]).length[0])
    np.testing.assert_allclose(batch[row, :n], alone[0, :n], atol=2e-5)


def test_remat_and_bfloat16(pair):
  path, _, (model, params, processor) = pair
  prompt = processor(*tiny.conversations())
  expected = np.asarray(jv.logits(model, params, prompt))

  def loss(model, params, prompt):
    return (jv.logits(model, params, prompt) ** 2).mean()

  again = models.VLM(model.config.replace(remat=True))
  grad = jax.jit(jax.grad(loss, 1), static_argnums=0)
  plain, remat = grad(model, params, prompt), grad(again, params, prompt)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, remat)
  low, low_params, _ = jv.load_pretrained(path, dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(low_params)} == {np.dtype("float32")}
  # 8 bits of mantissa through 6 layers.
  assert np.abs(np.asarray(jv.logits(low, low_params, prompt)) - expected).mean() < 0.1


def test_greedy_generation_equals_transformers(pair):
  _, theirs, (model, params, processor) = pair
  messages, pictures = tiny.conversations()
  prompt = processor(messages, pictures)
  rollout = jv.generate(
      model, params, prompt, jv.Sampling(max_tokens=8, temperature=0), processor=processor)
  banned = list(model.config.suppressed_tokens)
  for row in range(3):
    grown = prompt
    for t in range(int(rollout.mask[row, 0].sum())):
      expected = tiny.torch_logits(theirs, grown, row)[-1]
      expected[banned] = -np.inf
      assert expected.argmax() == rollout.tokens[row, 0, t]
      # One more token of the prompt, for transformers to continue from.
      n = int(grown.length[row])
      tokens = np.concatenate([grown.tokens, np.zeros((3, 1), np.int32)], 1)
      tokens[row, n] = expected.argmax()
      length = np.array(grown.length)
      length[row] += 1
      grown = grown.replace(tokens=tokens, length=length)
    assert rollout.text[row][0] == processor.decode(
        np.asarray(rollout.tokens[row, 0])[np.asarray(rollout.mask[row, 0])])


def test_saved_model_loads_in_transformers(pair, tmp_path):
  path, theirs, (model, params, processor) = pair
  jv.save_pretrained(tmp_path, model, params, processor)
  again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
  expected, saved = theirs.state_dict(), again.state_dict()
  assert set(expected) == set(saved)
  for name, value in expected.items():
    assert torch.equal(value, saved[name]), name
  config = json.loads((tmp_path / "config.json").read_text())
  assert config == json.loads((path / "config.json").read_text())
  _, params_again, _ = jv.load_pretrained(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_sharded_files_and_both_generations_of_names(pair, tmp_path):
  path, _, (model, params, processor) = pair
  models.weights.save_params(tmp_path, model.config, params, shard_bytes=100_000)
  processor.save_pretrained(tmp_path)
  files = sorted(tmp_path.glob("*.safetensors"))
  assert len(files) > 2
  for file in files:  # the names that transformers 5 has in memory
    renamed = {name.replace("visual.", "model.visual.", 1) if name.startswith("visual.")
               else name.replace("model.", "model.language_model.", 1): value
               for name, value in load_file(file).items()}
    save_file(renamed, file)
  _, again, _ = jv.load_pretrained(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_bad_files_are_named(pair, tmp_path):
  path, _, (model, params, processor) = pair
  jv.save_pretrained(tmp_path, model, params, processor)
  weights_file = tmp_path / "model.safetensors"
  whole = weights_file.read_bytes()
  tensors = load_file(weights_file)

  weights_file.write_bytes(whole[:len(whole) // 2])
  with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
    jv.load_pretrained(tmp_path)
  save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, weights_file)
  with pytest.raises(ValueError, match="tensor 'model.norm.weight' is missing"):
    jv.load_pretrained(tmp_path)
  save_file(tensors | {"model.norm.weight": np.ones(3, np.float32)}, weights_file)
  with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(3,\), expected \(64,\)"):
    jv.load_pretrained(tmp_path)
  save_file(tensors | {"model.extra.weight": np.ones(3, np.float32)}, weights_file)
  with pytest.raises(ValueError, match="'model.extra.weight' has no place"):
    jv.load_pretrained(tmp_path)
  weights_file.unlink()
  with pytest.raises(FileNotFoundError, match="model.safetensors: no such file"):
    jv.load_pretrained(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  with pytest.raises(ValueError, match="model_type='llama' is not supported"):
    models.from_hf(config | {"model_type": "llama"})
  with pytest.raises(FileNotFoundError, match="config.json: no such file"):
    jv.load_pretrained(tmp_path / "nothing")


def test_attention_merges_exactly():
  """Two attentions merged by their log-sum-exp are the attention over all keys."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, n, h, 8)).astype(np.float32)
             for n, h in ((5, 4), (9, 2), (9, 2)))
  mask = rng.random((2, 5, 9)) < 0.7
  mask[0, 0, :4] = False  # one side empty
  mask[0, 0, 4] = True
  whole, _ = layers.attend(q, k, v, mask)
  halves = [layers.attend(q, k[:, s], v[:, s], mask[:, :, s])
            for s in (slice(0, 4), slice(4, 9))]
  np.testing.assert_allclose(layers.merge(*halves), whole, atol=1e-6)
  # And the plain formula, for one query.
  keys = k[1, :, 1][mask[1, 2]]
  weights = np.exp(keys @ q[1, 2, 3] / np.sqrt(8))
  expected = (weights / weights.sum()) @ v[1, :, 1][mask[1, 2]]
  np.testing.assert_allclose(whole[1, 2, 3], expected, atol=1e-6)


def _responses(model, shape, seed=0):
  """Random tokens [P, G, T] of unequal length, none of them forbidden.

  Nor the pad token: torch keeps the gradient of its embedding at zero, wherever it stands.
  """
  rng = np.random.default_rng(seed)
  allowed = np.setdiff1d(np.arange(model.config.vocab_size),
                         [*model.config.suppressed_tokens, model.config.pad_token])
  tokens = rng.choice(allowed, shape).astype(np.int32)
  mask = np.arange(shape[-1]) < rng.integers(2, shape[-1] + 1, shape[:2])[..., None]
  return tokens, mask


def test_shared_prefix_equals_separate_sequences(pair):
  """Logits and gradients of P x G responses on shared prompts, and of P·G sequences by torch."""
  _, theirs, (model, params, processor) = pair
  prompt = processor(*tiny.conversations())
  tokens, mask = _responses(model, (3, 2, 7))
  weights = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32) * mask

  @jax.jit
  def loss(params, prompt):
    stats = scoring.score_tokens(model, params, prompt, tokens, mask, temperature=0.7)
    return (stats.logp * weights).sum(), stats

  (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, prompt)

  theirs.zero_grad()
  total = 0
  banned = list(model.config.suppressed_tokens)
  with torch.enable_grad():
    for p in range(3):
      n = int(prompt.length[p])
      segments = np.asarray(prompt.patch_segments[p])
      grids = [(1, *(np.asarray(prompt.patch_positions[p])[segments == s].max(0) + 1).tolist())
               for s in range(1, segments.max() + 1)]
      inputs = dict(pixel_values=torch.tensor(prompt.patches[p][segments > 0]),
                    image_grid_thw=torch.tensor(grids)) if grids else {}
      for g in range(2):
        ids = torch.tensor(np.concatenate([prompt.tokens[p, :n], tokens[p, g]]).astype(np.int64))
        types = (ids == model.config.vocab_size).long()[None]
        types[0, :n] = ids[:n] == theirs.config.image_token_id
        logits = theirs(input_ids=ids[None], mm_token_type_ids=types, **inputs).logits[0]
        logits = logits[n - 1:-1] / 0.7
        logits[:, banned] = -1e30
        logp = torch.log_softmax(logits, -1)
        picked = logp[torch.arange(7), torch.tensor(tokens[p, g]).long()]
        entropy = -(logp.exp() * logp).sum(-1)
        keep = mask[p, g]
        np.testing.assert_allclose(
            np.asarray(stats.logp[p, g])[keep], picked.detach().numpy()[keep], atol=1e-4)
        np.testing.assert_allclose(
            np.asarray(stats.entropy[p, g])[keep], entropy.detach().numpy()[keep], atol=1e-4)
        total = total + (picked * torch.tensor(weights[p, g])).sum()
    total.backward()
  expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
  expected = {models.weights._published_name(name): g for name, g in expected.items()}
  flat = {tuple(k.key for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(grads)}
  compared = set()
  for entry in models.weights.entries(model.config):
    for i, name in enumerate(entry.names()):
      ours = np.asarray(flat[entry.path])[i if entry.layers else ...]
      want = entry.ours(expected[name])
      np.testing.assert_allclose(ours, want, atol=1e-4 * max(1, np.abs(want).max()), err_msg=name)
      compared.add(name)
  assert compared == set(expected)


def test_chunked_scoring_equals_whole(pair):
  _, _, (model, params, processor) = pair
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

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               logp(params, prompt, 3), logp(params, prompt, 128))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4),
               grad(params, prompt, 3), grad(params, prompt, 128))

"""Our Flax models against transformers' torch implementations, with the same random weights."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxrl_vlm as jv
from jaxrl_vlm import models, scoring
from jaxrl_vlm.models import layers, weights
from tests import tiny

CASES = [("qwen2_vl", False), ("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", True),
         ("qwen3_vl_moe", False), ("gemma3", False), ("gemma3", True)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{'tied' if c[1] else 'head'}")
def pair(request, tmp_path_factory):
  family, tied = request.param
  path = tmp_path_factory.mktemp("hf")
  theirs = tiny.make_hf(path, family=family, tied=tied)
  return path, theirs, jv.load_pretrained(path)


@pytest.fixture(scope="module")
def mixed(pair):
  """A batch of everything a family takes, and transformers' logits of each row."""
  _, theirs, (_, _, processor) = pair
  prompt = tiny.mixed_batch(processor, theirs.config.model_type)
  return prompt, [tiny.torch_logits(theirs, prompt, row) for row in range(len(prompt.length))]


def test_logits_equal_transformers(pair, mixed):
  _, _, (model, params, _) = pair
  prompt, expected = mixed
  logits = np.asarray(jv.logits(model, params, prompt))
  for row, want in enumerate(expected):
    assert np.ptp(want) > 1  # the weights say something
    np.testing.assert_allclose(logits[row, :len(want)], want, atol=1e-4, err_msg=f"row {row}")


def test_greedy_generation_equals_transformers(pair, mixed):
  _, theirs, (model, params, processor) = pair
  prompt, _ = mixed
  rollout = jv.generate(
      model, params, prompt, jv.Sampling(max_tokens=32, temperature=0), processor=processor)
  settings = transformers.GenerationConfig(
      max_new_tokens=32, do_sample=False, eos_token_id=list(model.config.stop_tokens),
      pad_token_id=model.config.pad_token, suppress_tokens=list(model.config.suppressed_tokens))
  longest = 0
  for row in range(len(prompt.length)):
    inputs = tiny.torch_inputs(theirs, prompt, row)
    with torch.no_grad():
      expected = theirs.generate(**inputs, generation_config=settings)[0]
    expected = expected[inputs["input_ids"].shape[1]:].numpy()
    ours = np.asarray(rollout.tokens[row, 0])[np.asarray(rollout.mask[row, 0])]
    np.testing.assert_array_equal(ours, expected, err_msg=f"row {row}")
    assert rollout.text[row][0] == processor.decode(ours)
    longest = max(longest, len(ours))
  assert longest > 8


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
    real = np.arange(prompt.tokens.shape[1]) < prompt.length[:, None]
    return (jv.logits(model, params, prompt) ** 2).mean(axis=-1, where=real[..., None]).mean(
        where=real)

  again = models.VLM(model.config.replace(remat=True))
  grad = jax.jit(jax.grad(loss, 1), static_argnums=0)
  plain, remat = grad(model, params, prompt), grad(again, params, prompt)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, remat)
  low, low_params, _ = jv.load_pretrained(path, dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(low_params)} == {np.dtype("float32")}
  # 8 bits of mantissa through 6 layers.
  assert np.abs(np.asarray(jv.logits(low, low_params, prompt)) - expected).mean() < 0.1


def test_saved_model_loads_in_transformers(pair, mixed, tmp_path):
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


def test_sharded_and_bfloat16_files(pair, mixed, tmp_path):
  path, theirs, (model, _, _) = pair
  family, tied = theirs.config.model_type, model.config.tied
  low = tiny.make_hf(tmp_path, family=family, tied=tied, dtype=torch.bfloat16,
                     max_shard_size="100KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  model, params, _ = jv.load_pretrained(tmp_path)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  prompt, _ = mixed
  load = transformers.AutoModelForImageTextToText.from_pretrained
  expected = tiny.torch_logits(load(tmp_path, dtype=torch.float32).eval(), prompt, 2)
  logits = np.asarray(jv.logits(model, params, prompt))[2, :len(expected)]
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  # In bfloat16 the bits are those of the files, and come back so.
  _, params, processor = jv.load_pretrained(tmp_path, param_dtype="bfloat16")
  weights.save_params(tmp_path / "again", model.config, params, shard_bytes=100_000)
  assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
  again = load(tmp_path / "again", dtype=torch.bfloat16)
  for name, value in low.state_dict().items():
    assert torch.equal(value, again.state_dict()[name]), name


def test_names_of_all_generations(pair, tmp_path):
  """Names as published, as in transformers' model, and as older releases of it wrote them."""
  path, theirs, (model, params, _) = pair
  family = model.config.family
  shutil.copytree(path, tmp_path, dirs_exist_ok=True)
  memory = {k: v.numpy().copy() for k, v in theirs.state_dict().items()
            if not (model.config.tied and k == "lm_head.weight")}
  older = {"model.language_model.": "language_model.model.", "model.vision_tower.":
           "vision_tower.vision_model."} if family == "gemma3" else {"model.visual.": "visual."}
  def rename(name, table):
    for old, new in table.items():
      if name.startswith(old):
        return new + name.removeprefix(old)
    return name

  for tensors in (memory, {rename(k, older): v for k, v in memory.items()}):
    save_file(tensors, tmp_path / "model.safetensors")
    _, again, _ = jv.load_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_bad_files_are_named(pair, tmp_path):
  _, _, (model, params, processor) = pair
  jv.save_pretrained(tmp_path, model, params, processor)
  last = next(name for name in load_file(tmp_path / "model.safetensors")
              if weights.canonical_name(name) == "model.language_model.norm.weight")
  weights_file = tmp_path / "model.safetensors"
  whole = weights_file.read_bytes()
  tensors = load_file(weights_file)

  weights_file.write_bytes(whole[:len(whole) // 2])
  with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
    jv.load_pretrained(tmp_path)
  save_file({k: v for k, v in tensors.items() if k != last}, weights_file)
  with pytest.raises(ValueError, match="tensor 'model.language_model.norm.weight' is missing"):
    jv.load_pretrained(tmp_path)
  save_file(tensors | {last: np.ones(3, np.float32)}, weights_file)
  with pytest.raises(ValueError, match=r"model.safetensors: tensor 'model.language_model.norm."
                                       r"weight' has shape \(3,\), expected \(64,\)"):
    jv.load_pretrained(tmp_path)
  save_file(tensors | {"model.extra.weight": np.ones(3, np.float32)}, weights_file)
  with pytest.raises(ValueError, match="'model.extra.weight' has no place"):
    jv.load_pretrained(tmp_path)
  weights_file.unlink()
  with pytest.raises(FileNotFoundError, match="model.safetensors: no such file"):
    jv.load_pretrained(tmp_path)
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
  whole, _ = layers.attend(q, k, v, mask, 8**-0.5)
  halves = [layers.attend(q, k[:, s], v[:, s], mask[:, :, s], 8**-0.5)
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
        logits = theirs(
            input_ids=ids[None], **{types: torch.tensor(kinds)[None]}, **inputs).logits[0]
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
        total = total + (picked * torch.tensor(share[p, g])).sum()
    total.backward()
  expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
  flat = {tuple(k.key for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(grads)}
  compared = set()
  for entry in weights.entries(model.config):
    for i, name in enumerate(entry.names()):
      ours = np.asarray(flat[entry.path])
      ours = ours if entry.layers is None else ours[i]
      if name not in expected:  # the unused last DeepStack layers of torch have none
        np.testing.assert_array_equal(ours, 0, err_msg=name)
        continue
      every = (slice(None),) * ours.ndim
      want = entry.read(expected[name], ours.shape, every, model.config)
      # Both round in float32; Gemma's ten norms a pass are the most.
      np.testing.assert_allclose(ours, want, atol=3e-4 * max(1, np.abs(want).max()), err_msg=name)
      compared.add(name)
  assert compared == set(expected)


def test_chunked_scoring_equals_whole(tmp_path):
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

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               logp(params, prompt, 3), logp(params, prompt, 128))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4),
               grad(params, prompt, 3), grad(params, prompt, 128))

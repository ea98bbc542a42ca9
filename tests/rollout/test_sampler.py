"""Compares sampled responses with the scorer, and token sampling with its definition."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxrl_vlm as jv
from jaxrl_vlm import parallel
from jaxrl_vlm.rollout import Sampler, sampler
from jaxrl_vlm.rollout.sampling import pick, sample_index, truncate
from jaxrl_vlm.rollout.schedule import Layout
from jaxrl_vlm.stages import run
from tests import tiny


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  path = tmp_path_factory.mktemp("hf")
  tiny.make_hf(path)
  model, params, processor = jv.load_pretrained(path)
  return model, params, processor, processor(*tiny.conversations())


def test_greedy_sampling_matches_the_teacher_forced_argmax(setup):
  model, params, processor, prompt = setup
  rollout = jv.generate(model, params, prompt, jv.Sampling(2, 10, temperature=0))
  variables = {"params": params}
  _, prefix = model.apply(variables, prompt, method="prefill")
  hidden = model.apply(variables, prompt, prefix, rollout.tokens, method="respond")
  logits = model.apply(variables, hidden, method="response_logits")
  mask = np.asarray(rollout.mask)
  np.testing.assert_array_equal(
    np.asarray(rollout.tokens)[mask], np.asarray(logits.argmax(-1))[mask]
  )
  np.testing.assert_array_equal(rollout.tokens[:, 0], rollout.tokens[:, 1])


def test_sampled_logp_matches_the_scorer(setup):
  model, params, processor, prompt = setup
  sampling = jv.Sampling(4, 12, temperature=0.8, top_p=0.9)
  rollout = jv.generate(model, params, prompt, sampling, jax.random.key(1), processor)
  stats = jv.score(model, params, prompt, rollout, temperature=0.8)
  np.testing.assert_allclose(rollout.logp, stats.logp, atol=1e-4)
  # Samples of one prompt differ, and the same key reproduces them.
  assert len({row.tobytes() for row in np.asarray(rollout.tokens[0])}) > 1
  again = jv.generate(model, params, prompt, sampling, jax.random.key(1), processor)
  np.testing.assert_array_equal(rollout.tokens, again.tokens)
  assert rollout.text == again.text and len(rollout.text) == 3 and len(rollout.text[0]) == 4


@pytest.mark.slow
def test_responses_end_at_the_end_token_and_contain_no_vision_tokens(setup):
  model, params, processor, prompt = setup
  # The head of this model favours vision tokens.
  head = np.array(params["head"])
  head[:, list(model.config.suppressed_tokens)] += 10 * head.mean(axis=1, keepdims=True)
  rollout = jv.generate(
    model, {**params, "head": head}, prompt, jv.Sampling(16, 40, temperature=3.0), jax.random.key(0)
  )
  tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
  assert not np.isin(tokens, model.config.suppressed_tokens).any()
  assert set(model.config.suppressed_tokens) == set(processor.image_token_ids_never_sampled)
  stops = np.isin(tokens, model.config.stop_tokens) & mask
  assert stops.any()
  for row, keep, stop in zip(
    tokens.reshape(-1, 40), mask.reshape(-1, 40), stops.reshape(-1, 40), strict=True
  ):
    end = int(stop.argmax()) + 1 if stop.any() else 40
    assert keep[:end].all() and not keep[end:].any()
    assert (row[end:] == model.config.pad_token).all()
  assert (np.asarray(rollout.logp)[~mask] == 0).all()


def one_device_sampler(model, params, sampling, **options):
  mesh = parallel.make_mesh({"fsdp": 1}, jax.devices()[:1])
  return Sampler(model, mesh, sampling, parallel.param_shardings(mesh, params), **options)


def test_a_smaller_layout_is_filled_with_sequences_that_are_done(setup):
  """Compacting 4 sequences of which one is left: the second place of the new layout is empty."""
  model, params, *_ = setup
  generate = one_device_sampler(model, params, jv.Sampling(2, 4), chunk=2)
  state = generate._start(Layout(4, 2), 8)
  state = dataclasses.replace(state, done=jax.numpy.zeros_like(state.done))
  compacted = generate._compact(state, np.array([[2, 4]]), np.array([[1]]))
  assert compacted.done.tolist() == [[False, True]]


@pytest.mark.slow
def test_decoding_takes_as_many_steps_as_the_longest_response(setup, monkeypatch):
  model, params, _, prompt = setup
  steps = []

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return pick(*args)

  monkeypatch.setattr(sampler, "pick", counted)
  for stops, expected in (((0,), 1), ((), 12)):
    steps.clear()
    # All logits are equal, so the greedy choice is token 0, which may be an end token.
    equal = {**params, "head": np.zeros_like(params["head"])}
    short = model.clone(config=dataclasses.replace(model.config, stop_tokens=stops))
    generate = one_device_sampler(short, equal, jv.Sampling(1, 12, temperature=0), chunk=5)
    rollout = generate(equal, prompt, jax.random.key(0))
    jax.effects_barrier()
    assert len(steps) == expected
    assert (rollout.mask.sum(-1) == expected).all()


def test_top_k_and_top_p_keep_the_defined_tokens():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 3, 11)).astype(np.float32) * 2
  for top_p, top_k in ((0.5, 0), (1.0, 4), (0.8, 6), (1e-6, 0), (1.0, 99)):
    kept = np.isfinite(np.asarray(truncate(logits, top_p, top_k)))
    for row, keep in zip(logits.reshape(-1, 11), kept.reshape(-1, 11), strict=True):
      order = np.argsort(-row)
      if top_k:
        order = order[:top_k]
      probs = np.exp(row[order]) / np.exp(row[order]).sum()
      count = 1
      while top_p < 1 and probs[:count].sum() < top_p:
        count += 1
      expected = np.zeros(11, bool)
      expected[order[:count] if top_p < 1 else order] = True
      np.testing.assert_array_equal(keep, expected)


def test_tokens_follow_their_probabilities():
  probs = np.array([0.5, 0.3, 0.15, 0.05])
  logits = np.broadcast_to(np.log(probs), (40, 500, 4)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), logits.shape[:-1])
  token, logp = pick(keys, logits, jv.Sampling(temperature=1.0))
  share = np.bincount(np.asarray(token).ravel(), minlength=4) / token.size
  np.testing.assert_allclose(share, probs, atol=0.015)  # 4 standard errors of 20,000 samples
  np.testing.assert_allclose(logp, np.log(probs)[np.asarray(token)], atol=1e-6)


@pytest.mark.slow
def test_sampled_indices_follow_weights_across_blocks():
  rng = np.random.default_rng(0)
  weights = rng.exponential(size=1000).astype(np.float32) ** 2
  weights[::3] = 0  # including the first and the last
  weights[256:512] = 0  # a whole block
  keys = jax.random.split(jax.random.key(0), 100_000)
  rows = np.broadcast_to(weights, (len(keys), 1000))
  counts = np.bincount(np.asarray(jax.jit(sample_index)(keys, rows)), minlength=1000)
  assert not counts[weights == 0].any()
  expected = len(keys) * weights / weights.sum()
  frequent = expected > 5
  chi2 = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[frequent].sum()
  assert abs(chi2 - frequent.sum()) < 4 * np.sqrt(2 * frequent.sum())


@pytest.mark.parametrize("index", [0, 255, 256, 700, 999])
def test_the_only_index_with_weight_is_sampled(index):
  weights = np.zeros((500, 1000), np.float32)
  weights[:, index] = 1e-20
  keys = jax.random.split(jax.random.key(1), 500)
  assert (np.asarray(sample_index(keys, weights)) == index).all()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("num_samples", 0),
    ("max_tokens", 0),
    ("temperature", -1.0),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_k", -1),
  ],
)
def test_invalid_sampling_fields_are_named_in_the_error(field, value):
  with pytest.raises(ValueError, match=f"sampling.{field}={value}"):
    jv.Sampling(**{field: value})


def test_sampling_without_a_key_is_an_error(setup):
  model, params, _, prompt = setup
  with pytest.raises(ValueError, match="a key is needed"):
    jv.generate(model, params, prompt, jv.Sampling(max_tokens=2))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_responses_do_not_depend_on_the_schedule(family, tmp_path):
  """Greedy and sampled responses are the same for several chunk sizes, groups and layers.

  gemma3 has sliding-window layers.
  """
  tiny.make_hf(tmp_path, family=family)
  model, params, processor = jv.load_pretrained(tmp_path)
  messages, images = tiny.conversations()
  prompt = processor(messages * 2, images * 2)
  for temperature in (0.0, 2.0):
    sampling = jv.Sampling(3, 20, temperature=temperature)
    plain = one_device_sampler(model, params, sampling, chunk=20)(params, prompt, jax.random.key(3))
    lengths = plain.mask.sum(-1)
    assert len(np.unique(lengths)) > 1 or temperature == 0
    # Stacks of one layer, of three layers and the rest, and of all layers.
    for options in (
      dict(chunk=3),
      dict(chunk=7, groups=2, layers=3),
      dict(chunk=4, groups=3, layers=model.config.num_layers),
    ):
      ended = {}
      generate = one_device_sampler(model, params, sampling, **options)

      def finished(rows, *arrays, ended=ended):
        ended.update({p: [a[i] for a in arrays] for i, p in enumerate(rows)})

      other = generate(params, prompt, jax.random.key(3), finished=finished)
      np.testing.assert_array_equal(other.tokens, plain.tokens, err_msg=f"{options}")
      np.testing.assert_array_equal(other.mask, plain.mask)
      np.testing.assert_allclose(other.logp, plain.logp, atol=1e-5)
      assert sorted(ended) == list(range(len(lengths)))
      for p, (tokens, mask) in ended.items():
        np.testing.assert_array_equal(tokens, plain.tokens[p])
        np.testing.assert_array_equal(mask, plain.mask[p])


@pytest.mark.slow
def test_two_devices_give_the_same_tokens_and_compile_only_once(setup):
  """The first rollout compiles all layouts, so later response lengths need no compilation."""
  model, params, processor, _ = setup
  messages, images = tiny.conversations()
  prompt = processor((messages * 2)[:4], (images * 2)[:4])
  greedy = jv.Sampling(2, 20, temperature=0)
  plain = one_device_sampler(model, params, greedy)(params, prompt, jax.random.key(0))
  mesh = parallel.make_mesh({"fsdp": 2}, jax.devices()[:2])
  shardings = parallel.param_shardings(mesh, params)
  params, prompt = jax.device_put(params, shardings), parallel.put_batch(mesh, prompt)
  rollout = Sampler(model, mesh, greedy, shardings, chunk=3, groups=2)(
    params, prompt, jax.random.key(0)
  )
  np.testing.assert_array_equal(rollout.tokens, plain.tokens)

  generate = Sampler(model, mesh, jv.Sampling(2, 20, temperature=3.0), shardings, chunk=3, groups=2)
  compilations, lengths = run._count_compilations(), set()
  generate(params, prompt, jax.random.key(0))
  first, _ = compilations()
  for seed in range(1, 5):
    limits = np.random.default_rng(seed).integers(1, 20, (4, 2))
    lengths.add(tuple(generate(params, prompt, jax.random.key(seed), limits).mask.sum(-1).flat))
  assert compilations()[0] == first > 0 and len(lengths) > 1


@pytest.mark.slow
def test_resharding_for_the_rollout_does_not_change_responses(setup):
  """`tensor` devices share the weights during the rollout; with `tensor=1` they are replicated."""
  model, params, processor, _ = setup
  messages, images = tiny.conversations()
  prompt = processor((messages * 2)[:4], (images * 2)[:4])
  greedy = jv.Sampling(2, 12, temperature=0)
  plain = one_device_sampler(model, params, greedy)(params, prompt, jax.random.key(0))
  mesh = parallel.make_mesh({"fsdp": 4}, jax.devices()[:4])
  shardings = parallel.param_shardings(mesh, params)
  params = jax.device_put(params, shardings)
  with_features = jax.jit(lambda p, x: model.apply({"params": p}, x, method="see"))(params, prompt)
  for inputs, tensor in ((prompt, 2), (with_features, 4), (with_features, 1)):
    generate = Sampler(model, mesh, greedy, shardings, chunk=5, tensor=tensor)
    rollout = generate(params, parallel.put_batch(mesh, inputs), jax.random.key(0))
    np.testing.assert_array_equal(rollout.tokens, plain.tokens)
    np.testing.assert_allclose(rollout.logp, plain.logp, atol=1e-4)
    resharded, copied_prompt = generate.reshard(params, parallel.put_batch(mesh, inputs))
    shard_counts = {
      x.size // x.addressable_shards[0].data.size
      for x in (resharded["decoder"]["layers"]["mlp"]["up"]["kernel"], resharded["head"])
    }
    assert shard_counts == {tensor}
    assert copied_prompt.patches.shape[1] == (inputs.patches.shape[1] if inputs is prompt else 0)


@pytest.mark.slow
def test_a_response_ends_at_its_own_limit(setup):
  """Up to the limit, the tokens are the same as without it."""
  model, params, _, prompt = setup
  generate = one_device_sampler(model, params, jv.Sampling(2, 9, temperature=1.5), chunk=4)
  plain = generate(params, prompt, jax.random.key(0))
  limits = np.array([[1, 9], [4, 5], [20, 8]])
  limited = generate(params, prompt, jax.random.key(0), limits)
  np.testing.assert_array_equal(limited.mask.sum(-1), np.minimum(plain.mask.sum(-1), limits))
  np.testing.assert_array_equal(limited.tokens[limited.mask], plain.tokens[limited.mask])


@pytest.mark.slow
def test_int8_prefixes_use_less_memory_and_give_nearly_the_same_distribution(setup):
  model, params, _, prompt = setup
  sampling = jv.Sampling(2, 12)
  plain = one_device_sampler(model, params, sampling)
  small = one_device_sampler(model, params, sampling, prefix_dtype="int8")
  a, b = (generate(params, prompt, jax.random.key(0)) for generate in (plain, small))
  # Both use the same random numbers. Probabilities are comparable while the tokens are the same.
  same = np.cumprod(a.tokens == b.tokens, axis=-1).astype(bool) & a.mask
  assert same[..., 0].mean() > 0.9
  apart = np.abs(a.logp - b.logp)[same]
  assert 0 < apart.max() < 0.05

  def held(generate):
    state = jax.eval_shape(lambda: generate._empty(generate._plan(prompt)[0], 64))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.prefix_k))

  head = model.config.head_dim
  assert (
    held(small) == held(plain) * (1 + 4 / head) / 4
  )  # 1 byte for each float32, and a float32 scale for each position and head


def test_an_unknown_prefix_dtype_is_an_error(setup):
  model, params, _, _ = setup
  with pytest.raises(ValueError, match="rollout.prefix_dtype='int4': expected one of auto, int8"):
    one_device_sampler(model, params, jv.Sampling(), prefix_dtype="int4")

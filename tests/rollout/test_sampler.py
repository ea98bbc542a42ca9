"""Sampling against the scorer, and each way of cutting the distribution against its definition."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxrl_vlm as jv
from jaxrl_vlm import parallel
from jaxrl_vlm.rollout import Sampler, sampler
from jaxrl_vlm.rollout.sampling import draw, pick, truncate
from jaxrl_vlm.stages import run
from tests import tiny


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  path = tmp_path_factory.mktemp("hf")
  tiny.make_hf(path)
  model, params, processor = jv.load_pretrained(path)
  return model, params, processor, processor(*tiny.conversations())


def test_greedy_is_the_teacher_forced_argmax(setup):
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


def test_logp_is_the_scorers(setup):
  model, params, processor, prompt = setup
  sampling = jv.Sampling(4, 12, temperature=0.8, top_p=0.9)
  rollout = jv.generate(model, params, prompt, sampling, jax.random.key(1), processor)
  stats = jv.score(model, params, prompt, rollout, temperature=0.8)
  np.testing.assert_allclose(rollout.logp, stats.logp, atol=1e-4)
  # Samples of one prompt differ, and the same key gives the same samples.
  assert len({row.tobytes() for row in np.asarray(rollout.tokens[0])}) > 1
  again = jv.generate(model, params, prompt, sampling, jax.random.key(1), processor)
  np.testing.assert_array_equal(rollout.tokens, again.tokens)
  assert rollout.text == again.text and len(rollout.text) == 3 and len(rollout.text[0]) == 4


def test_nothing_after_the_end_and_no_vision_tokens(setup):
  model, params, processor, prompt = setup
  # A model that wants vision tokens above all: its head favours them.
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


def test_stops_early(setup, monkeypatch):
  """The loop takes as many steps as the longest response has tokens."""
  model, params, _, prompt = setup
  steps = []

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return pick(*args)

  monkeypatch.setattr(sampler, "pick", counted)
  for stops, expected in (((0,), 1), ((), 12)):
    steps.clear()
    # Equal logits: the greedy choice is token 0, an end token or not.
    equal = {**params, "head": np.zeros_like(params["head"])}
    short = model.clone(config=dataclasses.replace(model.config, stop_tokens=stops))
    draw = one_device_sampler(short, equal, jv.Sampling(1, 12, temperature=0), chunk=5)
    rollout = draw(equal, prompt, jax.random.key(0))
    jax.effects_barrier()
    assert len(steps) == expected
    assert (rollout.mask.sum(-1) == expected).all()


def test_truncation_by_definition():
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


def test_sampling_follows_the_distribution():
  probs = np.array([0.5, 0.3, 0.15, 0.05])
  logits = np.broadcast_to(np.log(probs), (40, 500, 4)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), logits.shape[:-1])
  token, logp = pick(keys, logits, jv.Sampling(temperature=1.0))
  share = np.bincount(np.asarray(token).ravel(), minlength=4) / token.size
  np.testing.assert_allclose(share, probs, atol=0.015)  # 4 standard errors of 20,000 draws
  np.testing.assert_allclose(logp, np.log(probs)[np.asarray(token)], atol=1e-6)


def test_drawing_over_several_blocks_follows_the_weights():
  rng = np.random.default_rng(0)
  weights = rng.exponential(size=1000).astype(np.float32) ** 2
  weights[::3] = 0  # also the first and the last
  weights[256:512] = 0  # a whole block
  keys = jax.random.split(jax.random.key(0), 100_000)
  rows = np.broadcast_to(weights, (len(keys), 1000))
  found = np.bincount(np.asarray(jax.jit(draw)(keys, rows)), minlength=1000)
  assert not found[weights == 0].any()
  expected = len(keys) * weights / weights.sum()
  real = expected > 5
  chi2 = ((found - expected) ** 2 / np.maximum(expected, 1e-9))[real].sum()
  assert abs(chi2 - real.sum()) < 4 * np.sqrt(2 * real.sum())


@pytest.mark.parametrize("where", [0, 255, 256, 700, 999])
def test_drawing_what_alone_has_weight(where):
  weights = np.zeros((500, 1000), np.float32)
  weights[:, where] = 1e-20
  keys = jax.random.split(jax.random.key(1), 500)
  assert (np.asarray(draw(keys, weights)) == where).all()


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
def test_bad_settings_are_named(field, value):
  with pytest.raises(ValueError, match=f"sampling.{field}={value}"):
    jv.Sampling(**{field: value})


def test_a_key_is_needed(setup):
  model, params, _, prompt = setup
  with pytest.raises(ValueError, match="a key is needed"):
    jv.generate(model, params, prompt, jv.Sampling(max_tokens=2))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_scheduling_changes_nothing(family, tmp_path):
  """Responses are the same however they are decoded, greedy or drawn, with sliding layers too."""
  tiny.make_hf(tmp_path, family=family)
  model, params, processor = jv.load_pretrained(tmp_path)
  messages, images = tiny.conversations()
  prompt = processor(messages * 2, images * 2)
  for temperature in (0.0, 2.0):
    sampling = jv.Sampling(3, 20, temperature=temperature)
    plain = one_device_sampler(model, params, sampling, chunk=20)(params, prompt, jax.random.key(3))
    lengths = plain.mask.sum(-1)
    assert len(np.unique(lengths)) > 1 or temperature == 0
    # One layer is taken at a time, or three and what is left, or all.
    for options in (
      dict(chunk=3),
      dict(chunk=7, groups=2, layers=3),
      dict(chunk=4, groups=3, layers=model.config.num_layers),
    ):
      ended = {}
      draw = one_device_sampler(model, params, sampling, **options)

      def finished(rows, *arrays, ended=ended):
        ended.update({p: [a[i] for a in arrays] for i, p in enumerate(rows)})

      other = draw(params, prompt, jax.random.key(3), finished=finished)
      np.testing.assert_array_equal(other.tokens, plain.tokens, err_msg=f"{options}")
      np.testing.assert_array_equal(other.mask, plain.mask)
      np.testing.assert_allclose(other.logp, plain.logp, atol=1e-5)
      assert sorted(ended) == list(range(len(lengths)))
      for p, (tokens, mask) in ended.items():
        np.testing.assert_array_equal(tokens, plain.tokens[p])
        np.testing.assert_array_equal(mask, plain.mask[p])


def test_two_devices_decode_as_one_and_compile_once(setup):
  """Whatever the lengths: all layouts that can come up are compiled with the first prompts."""
  model, params, processor, _ = setup
  messages, images = tiny.conversations()
  prompt = processor((messages * 2)[:4], (images * 2)[:4])
  greedy = jv.Sampling(2, 20, temperature=0)
  plain = one_device_sampler(model, params, greedy)(params, prompt, jax.random.key(0))
  mesh = parallel.make_mesh({"fsdp": 2}, jax.devices()[:2])
  shardings = parallel.param_shardings(mesh, params)
  params, prompt = jax.device_put(params, shardings), parallel.put_batch(mesh, prompt)
  drawn = Sampler(model, mesh, greedy, shardings, chunk=3, groups=2)(
    params, prompt, jax.random.key(0)
  )
  np.testing.assert_array_equal(drawn.tokens, plain.tokens)

  draw = Sampler(model, mesh, jv.Sampling(2, 20, temperature=3.0), shardings, chunk=3, groups=2)
  compilations, lengths = run._count_compilations(), set()
  draw(params, prompt, jax.random.key(0))
  first, _ = compilations()
  for seed in range(1, 5):
    limits = np.random.default_rng(seed).integers(1, 20, (4, 2))
    lengths.add(tuple(draw(params, prompt, jax.random.key(seed), limits).mask.sum(-1).flat))
  assert compilations()[0] == first > 0 and len(lengths) > 1


def test_a_layout_of_its_own_draws_the_same(setup):
  """Weights in parts on pairs of devices, prompts over the pairs; `tensor=1`: whole everywhere."""
  model, params, processor, _ = setup
  messages, images = tiny.conversations()
  prompt = processor((messages * 2)[:4], (images * 2)[:4])
  greedy = jv.Sampling(2, 12, temperature=0)
  plain = one_device_sampler(model, params, greedy)(params, prompt, jax.random.key(0))
  mesh = parallel.make_mesh({"fsdp": 4}, jax.devices()[:4])
  shardings = parallel.param_shardings(mesh, params)
  params = jax.device_put(params, shardings)
  seen = jax.jit(lambda p, x: model.apply({"params": p}, x, method="see"))(params, prompt)
  for given, tensor in ((prompt, 2), (seen, 4), (seen, 1)):
    draw = Sampler(model, mesh, greedy, shardings, chunk=5, tensor=tensor)
    drawn = draw(params, parallel.put_batch(mesh, given), jax.random.key(0))
    np.testing.assert_array_equal(drawn.tokens, plain.tokens)
    np.testing.assert_allclose(drawn.logp, plain.logp, atol=1e-4)
    placed, light = draw.reshard(params, parallel.put_batch(mesh, given))
    parts = {
      x.size // x.addressable_shards[0].data.size
      for x in (placed["decoder"]["layers"]["mlp"]["up"]["kernel"], placed["head"])
    }
    assert parts == {tensor}
    assert light.patches.shape[1] == (given.patches.shape[1] if given is prompt else 0)


def test_limits(setup):
  """A response ends at its own limit; what it has until then is what it has without."""
  model, params, _, prompt = setup
  draw = one_device_sampler(model, params, jv.Sampling(2, 9, temperature=1.5), chunk=4)
  plain = draw(params, prompt, jax.random.key(0))
  limits = np.array([[1, 9], [4, 5], [20, 8]])
  limited = draw(params, prompt, jax.random.key(0), limits)
  np.testing.assert_array_equal(limited.mask.sum(-1), np.minimum(plain.mask.sum(-1), limits))
  np.testing.assert_array_equal(limited.tokens[limited.mask], plain.tokens[limited.mask])


def test_prefixes_in_8_bits(setup):
  """Half the memory of bfloat16 or less, and nearly the same distribution."""
  model, params, _, prompt = setup
  sampling = jv.Sampling(2, 12)
  plain = one_device_sampler(model, params, sampling)
  small = one_device_sampler(model, params, sampling, prefix_dtype="int8")
  a, b = (draw(params, prompt, jax.random.key(0)) for draw in (plain, small))
  # The same random numbers: as long as the same tokens were drawn the probabilities compare.
  same = np.cumprod(a.tokens == b.tokens, axis=-1).astype(bool) & a.mask
  assert same[..., 0].mean() > 0.9
  apart = np.abs(a.logp - b.logp)[same]
  assert 0 < apart.max() < 0.05

  def held(draw):
    flight = jax.eval_shape(lambda: draw._empty(draw._plan(prompt)[0], 64))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(flight.prefix_k))

  head = model.config.head_dim
  assert held(small) == held(plain) * (1 + 4 / head) / 4  # from float32; a scale for each head


def test_an_unknown_prefix_dtype_is_named(setup):
  model, params, _, _ = setup
  with pytest.raises(ValueError, match="rollout.prefix_dtype='int4': expected one of auto, int8"):
    one_device_sampler(model, params, jv.Sampling(), prefix_dtype="int4")

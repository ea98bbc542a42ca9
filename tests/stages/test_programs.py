"""Compares the compiled programs of a stage with slow and obvious computations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_vlm import models, objectives, parallel, scoring, scratch, views
from jaxrl_vlm.data import digit_boards
from jaxrl_vlm.models import lora
from jaxrl_vlm.rollout import Sampling
from jaxrl_vlm.stages.programs import Programs, TrainState
from jaxrl_vlm.types import Experience, TokenStats
from tests import tiny_run

P, G, T = 4, 2, 6
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  """Model, params, prompts of different lengths and images, random responses and their mask,
  black patch."""
  path = tmp_path_factory.mktemp("scratch")
  boards = digit_boards.LiveBoards("train", P, tasks=("read", "count"), style="direct")
  examples = [boards[i] for i in range(P)]
  scratch.create(path, tiny_run.ARCHITECTURE, [e.question for e in examples])
  model, params, processor = models.load_pretrained(path, prompt_buckets=(64,), patch_buckets=(36,))
  # With the initial parameters, biases are 0 and responses hardly depend on the image.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(1.5 * np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.dtype), params
  )
  prompt = processor.collate([processor.encode(e) for e in examples])
  allowed = np.setdiff1d(np.arange(model.config.vocab_size), model.config.suppressed_tokens)
  tokens = rng.choice(allowed, (P, G, T)).astype(np.int32)
  mask = np.arange(T) < rng.integers(1, T + 1, (P, G, 1))
  return model, params, prompt, tokens, mask, processor.black_patch


def keep_gradient() -> optax.GradientTransformation:
  """An optimizer that does not change the parameters. Its state is the last gradient."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
  )


@pytest.fixture(scope="module")
def make(setup):
  """Function (objective, learning_rate=None, **kwargs) -> Programs, with a cache."""
  model, params, *_, black = setup
  mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])

  @functools.cache
  def make(objective, learning_rate: float | None = None, **kwargs) -> Programs:
    optimizer = optax.sgd(learning_rate, momentum=0.9) if learning_rate else keep_gradient()
    return Programs(
      model, mesh, objective, optimizer, params, temperature=TEMPERATURE, black=black, **kwargs
    )

  return make


@pytest.fixture(scope="module")
def experience(setup, make) -> Experience:
  """Experience whose `old` and views differ from the scores of the policy by random noise."""
  _, params, prompt, tokens, mask, _ = setup
  rng = np.random.default_rng(1)
  stats = make(objectives.create("grpo")).score(params, prompt, tokens, mask)
  clean = np.asarray(stats.logp)

  def near(spread):
    return TokenStats(
      np.where(mask, clean + spread * rng.normal(size=mask.shape), 0).astype("f4"),
      np.asarray(stats.entropy),
    )

  return Experience(
    mask=mask,
    advantages=rng.normal(size=mask.shape).astype("f4"),
    old=near(0.4),
    rewards=np.zeros((P, G), "f4"),
    views={"ref": near(0.5), "masked": near(0.8)},
  )


def fresh(programs: Programs, params) -> TrainState:
  return programs.init_state(jax.tree.map(jnp.copy, params))


def assert_close_trees(a, b, *, share: float) -> None:
  """Checks each leaf with an absolute tolerance.

  The tolerance is `share` of the largest value of the leaf, or of a thousandth of the largest value
  of all leaves if that is larger.
  """
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(b))

  def close(path, x, y):
    scale = max(float(np.abs(y).max()), 1e-3 * largest)
    np.testing.assert_allclose(x, y, rtol=0, atol=share * scale, err_msg=jax.tree_util.keystr(path))

  jax.tree.map_with_path(close, a, b)


# -- Comparison with separate sequences, all logits, and the formulas ------------------------------


def slow_logp(model, params, prompt, tokens):
  """Computes log π [P, G, T] from P·G sequences of prompt and response, with all their logits.

  `prompt` has a row for every sample.
  """
  lengths = np.asarray(prompt.length)
  rows = np.arange(P * G)[:, None]
  index = lengths[:, None] + np.arange(T)  # of the response tokens in the sequence
  padding = [(0, 0), (0, T)]
  positions = np.asarray(prompt.next_position)[:, None] + np.arange(T)
  whole = prompt.replace(
    tokens=jnp.pad(prompt.tokens, padding).at[rows, index].set(tokens.reshape(-1, T)),
    length=lengths + T,
    positions=jnp.pad(prompt.positions, [*padding, (0, 0)])
    .at[rows, index]
    .set(positions[..., None]),
    feature_index=jnp.pad(prompt.feature_index, padding, constant_values=-1),
  )
  logits = model.apply({"params": params}, whole)[rows, index - 1] / TEMPERATURE
  logits = logits.at[..., list(model.config.suppressed_tokens)].set(-jnp.inf)
  logp = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logp, tokens.reshape(-1, T, 1), axis=-1).reshape(P, G, T)


def k3(logp, other):
  return jnp.minimum(jnp.exp(other - logp) - (other - logp) - 1, 10)


def ppo(logp, old, advantages, low, high, dual):
  ratio = jnp.exp(logp - old)
  loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - low, 1 + high))
  return jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual), loss)


def grpo(logp, e, _):
  token = ppo(logp, e.old.logp, e.advantages, 0.2, 0.3, 3.0) + 0.01 * k3(logp, e.views["ref"].logp)
  return jnp.where(e.mask, token, 0).sum() / e.mask.sum()


def papo(logp, e, masked_logp):
  """The masked view has a gradient too, in the KL between the views and in its entropy penalty."""
  token = ppo(logp, e.old.logp, e.advantages, 0.2, 0.3, 3.0) + 0.01 * k3(logp, e.views["ref"].logp)
  token += -0.02 * k3(logp, masked_logp) - 0.05 * logp - 0.05 * masked_logp
  return jnp.where(e.mask, token, 0).sum() / e.mask.sum()


def vppo(logp, e, _):
  """Keeps the 40% of tokens with the largest dependency, and shapes advantages from 0.9 upwards.

  The range of the shaping factors is that of the minibatch.
  """
  d = e.views["masked"].logp - e.old.logp
  dependency = np.minimum(np.exp(d) - d - 1, 10)
  keep, mean = np.zeros(e.mask.shape), np.zeros((P, G))
  for p, g in np.ndindex(P, G):
    row = dependency[p, g][e.mask[p, g]]
    mean[p, g] = row.mean()
    keep[p, g, np.argsort(-row)[: int(np.ceil(0.4 * len(row)))]] = 1
  share = (mean - mean.min()) / (mean.max() - mean.min())
  factor = 0.9 + share * 0.1 / share.mean()
  advantages = e.advantages * factor[..., None]
  token = keep * ppo(logp, e.old.logp, advantages, 0.2, 0.28, 3.0) - 0.06 * logp
  return jnp.where(e.mask, token, 0).sum() / e.mask.sum()


@pytest.mark.parametrize(
  ("formula", "settings"),
  [(grpo, {}), (papo, {"masked_gradient": True, "mask_per": "sample"}), (vppo, {})],
  ids=["grpo", "papo_masked_gradient", "vppo"],
)
def test_the_gradient_equals_that_of_the_formula_on_separate_sequences(
  setup, make, experience, formula, settings
):
  model, params, prompt, tokens, mask, black = setup
  objective = objectives.create(formula.__name__, **settings)
  program = make(objective)
  key = jax.random.key(5)
  state, metrics = program.update(fresh(program, params), {}, prompt, tokens, experience, key, None)

  repeated = views.repeat_prompts(prompt, G)
  darkened = views.black_patches(key, repeated, objective.mask_rate, black)

  @jax.jit
  @jax.value_and_grad
  def slow(params):
    masked = slow_logp(model, params, darkened, tokens) if settings else None
    return formula(slow_logp(model, params, repeated, tokens), experience, masked)

  loss, grads = slow(params)
  # The computation is in float32 with four layers. Sums over keys and over the batch are in another
  # order.
  np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
  assert_close_trees(state.opt_state, grads, share=1e-3)
  assert float(optax.global_norm(grads)) > 0.01
  np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-4)


# -- Views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "per", "settings"),
  [
    ("patches", "sample", {"mask_patch": 3, "mask_rate": 0.6}),
    ("patches", "prompt", {"mask_patch": 3, "mask_rate": 0.6}),
    ("noise", "sample", {"mask_noise": 90.0}),
    ("noise", "prompt", {"mask_noise": 90.0}),
    ("blank", "sample", {}),
    ("solid", "sample", {"mask_level": 70}),
    ("blur", "sample", {"mask_blur": 4.0}),
  ],
)
def test_the_masked_view_scores_the_corrupted_image_of_the_objective(setup, kind, per, settings):
  model, params, prompt, tokens, mask, black = setup
  white = black + 3.0  # any patch that is brighter than black
  objective = objectives.create("papo", mask_kind=kind, mask_per=per, **settings)
  mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
  program = Programs(
    model,
    mesh,
    objective,
    keep_gradient(),
    params,
    temperature=TEMPERATURE,
    black=black,
    white=white,
  )
  key, shape = jax.random.key(9), (3, 2, 8, 8)
  stats = program.score_masked(params, prompt, tokens, mask, key)

  repeated = views.repeat_prompts(prompt, G)
  images = repeated if per == "sample" else prompt
  corrupted = {
    "patches": lambda: views.black_patches(key, images, 0.6, black, block=3, merge_size=2),
    "blank": lambda: views.solid(images, 0, black, white),
    "solid": lambda: views.solid(images, 70, black, white),
    "noise": lambda: views.noise(key, images, 90.0, black, white, shape),
    "blur": lambda: views.blur(images, 4.0, shape, 2),
  }[kind]()
  corrupted = corrupted if per == "sample" else views.repeat_prompts(corrupted, G)
  slow = jax.jit(
    lambda patches: slow_logp(model, params, repeated.replace(patches=patches), tokens)
  )
  masked = np.asarray(slow(corrupted.patches))
  # The computation is in float32 with four layers. Sums are in another order.
  np.testing.assert_allclose(stats.logp, np.where(mask, masked, 0), atol=2e-4)
  assert np.abs(masked - slow(repeated.patches))[mask].max() > 0.01


def test_full_kl_of_the_masked_view_equals_its_definition(setup, make):
  model, params, prompt, tokens, mask, black = setup
  program = make(objectives.create("vppo", dependency="full"))
  key = jax.random.key(2)
  kl = program.score_masked(params, prompt, tokens, mask, key).kl

  repeated = views.repeat_prompts(prompt, G)
  darkened = views.black_patches(key, repeated, 0.5, black)

  @jax.jit
  def slow(prompt):
    """log π f32[P, G, T, V] of every token."""
    vocabulary = jnp.arange(model.config.vocab_size)
    hidden = scoring.hidden_states(model, params, prompt, jnp.asarray(tokens))
    logits = model.apply({"params": params}, hidden, method="unembed") / TEMPERATURE
    suppressed = jnp.isin(vocabulary, jnp.array(model.config.suppressed_tokens))
    return jax.nn.log_softmax(jnp.where(suppressed, -jnp.inf, logits))

  clean, masked = (np.asarray(slow(view), np.float64) for view in (repeated, darkened))
  with np.errstate(invalid="ignore"):
    terms = np.where(np.isinf(clean), 0, np.exp(clean) * (clean - masked))
  np.testing.assert_allclose(kl, np.where(mask, terms.sum(-1), 0), rtol=1e-3, atol=1e-5)
  assert np.asarray(kl)[mask].mean() > 1e-3
  # The same key gives the same masked image, so logp and kl are of the same view.
  picked = np.take_along_axis(masked, tokens[..., None], axis=-1)[..., 0]
  stats = program.score_masked(params, prompt, tokens, mask, key)
  np.testing.assert_allclose(stats.logp, np.where(mask, picked, 0), atol=2e-4)


@pytest.mark.parametrize(
  "settings",
  [{"mask_kind": "patches", "mask_patch": 3}, {"mask_kind": "noise"}, {"mask_kind": "blur"}],
  ids=["patches", "noise", "blur"],
)
def test_masked_views_are_equal_on_one_and_four_devices(setup, settings):
  model, params, prompt, tokens, mask, black = setup
  objective = objectives.create("vppo", dependency="full", **settings)

  def score(devices):
    mesh = parallel.make_mesh({"fsdp": devices, "tensor": 1}, devices=jax.devices()[:devices])
    program = Programs(
      model,
      mesh,
      objective,
      keep_gradient(),
      params,
      temperature=TEMPERATURE,
      black=black,
      white=black + 3.0,
    )
    args = params, prompt, tokens, mask, jax.random.key(4)
    stats = program.score_masked(*args)
    return stats.logp, stats.kl

  # The random masks are the same. Sums over sharded matrices are in another order in float32.
  for one, four in zip(score(1), score(4), strict=True):
    np.testing.assert_allclose(four, one, atol=2e-4)


def test_noise_requires_a_white_patch(setup):
  model, params, *_, black = setup
  mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
  with pytest.raises(ValueError, match="white=None: expected a patch .*mask_kind='noise'"):
    Programs(
      model,
      mesh,
      objectives.create("papo", mask_kind="noise"),
      keep_gradient(),
      params,
      black=black,
    )


# -- Microbatches and minibatches -----------------------------------------------------------------


def assert_equal_updates(split, whole) -> None:
  """Compares two results (state, metrics) of updates whose optimizer state is the gradient."""
  state, others = split
  expected, metrics = whole
  # The same float32 terms are added in another order. A microbatch that is missing, or weighted by
  # its own number of tokens, would change the result by a quarter. Another mask would change it by
  # more.
  assert_close_trees(state.opt_state, expected.opt_state, share=2e-4)
  assert others.keys() == metrics.keys()
  for key, value in metrics.items():
    np.testing.assert_allclose(others[key], value, rtol=2e-5, atol=1e-6, err_msg=key)


MASKED = {"masked_gradient": True, "mask_rate": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "settings", "splits"),
  [
    ("grpo", {}, (2, 4)),
    ("papo", MASKED, (4,)),
    ("papo", {**MASKED, "mask_per": "sample"}, (2,)),
    ("vppo", {}, (4,)),
  ],
  ids=["grpo", "papo", "papo_per_sample", "vppo"],
)
def test_microbatches_do_not_change_the_gradient(setup, make, experience, name, settings, splits):
  objective = objectives.create(name, **settings)
  _, params, prompt, tokens, *_ = setup

  def update(**kwargs):
    program = make(objective, **kwargs)
    return program.update(
      fresh(program, params), {}, prompt, tokens, experience, jax.random.key(0), None
    )

  whole = update()
  for microbatches in splits:
    assert_equal_updates(update(microbatches=microbatches), whole)


@pytest.mark.parametrize("per", ["prompt", "sample"])
def test_images_masked_on_the_host_equal_images_masked_on_the_device(setup, make, experience, per):
  """The host gives masked images for each prompt or each sample. The update has two microbatches.

  The images of other prompts would change the metrics.
  """
  objective = objectives.create("papo", mask_per=per, **MASKED)
  _, params, prompt, tokens, _, black = setup
  key = jax.random.key(3)
  rows = views.repeat_prompts(prompt, G) if per == "sample" else prompt
  host = jax.device_get(
    views.black_patches(
      jax.random.split(key, (P, G) if per == "sample" else P).reshape(-1), rows, 0.5, black
    )
  )

  def update(source, **kwargs):
    program = make(objective, **kwargs)
    return program.update(fresh(program, params), {}, prompt, tokens, experience, source, None)

  whole = update(key)
  assert_equal_updates(update(host, microbatches=2), whole)
  other = host.replace(patches=np.roll(host.patches, 1, axis=0))
  _, metrics = update(other, microbatches=2)
  assert abs(metrics["masked_nll"] - whole[1]["masked_nll"]) > 1e-3


def test_an_update_with_moments_on_the_host_equals_one_on_the_device(setup, experience):
  model, params, prompt, tokens, *_ = setup
  mesh = parallel.make_mesh({"fsdp": 2}, devices=jax.devices()[:2])

  def update(on_host):
    program = Programs(
      model,
      mesh,
      objectives.create("grpo"),
      optax.adam(1e-2),
      params,
      minibatches=2,
      state_on_host=on_host,
    )
    state, _ = program.update(
      program.init_state(jax.tree.map(jnp.copy, params)),
      {},
      prompt,
      tokens,
      experience,
      jax.random.key(0),
      None,
    )
    return state

  plain, on_host = update(False), update(True)
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(on_host.opt_state) if x.ndim}
  assert kinds == {"pinned_host"}
  # XLA compiles the same float32 computation in another way.
  assert_close_trees(jax.device_get(on_host), jax.device_get(plain), share=1e-5)


@pytest.mark.parametrize(
  ("name", "settings", "host"),
  [
    ("vppo", {}, False),  # the shaping depends on the minibatch
    ("papo", {**MASKED, "anneal_updates": 3}, True),
    ("grpo", {"kl_target": 0.01, "kl_horizon": 10}, False),
  ],
  ids=["vppo", "papo", "grpo"],
)
def test_minibatches_equal_consecutive_updates(setup, make, experience, name, settings, host):
  """The program loops over minibatches with a scan, which also carries the objective's state."""
  _, params, prompt, tokens, _, black = setup
  objective = objectives.create(name, **settings)
  source = (
    jax.device_get(views.black_patches(jax.random.key(4), prompt, 0.5, black))
    if host
    else jax.random.key(0)
  )
  both = make(objective, 0.05, minibatches=2)
  state, metrics = both.update(fresh(both, params), {}, prompt, tokens, experience, source, None)

  single = make(objective, 0.05)
  by_hand, history, states = fresh(single, params), [], []
  for part in (0, 1):
    *batch, images = jax.tree.map(
      lambda a, part=part: np.asarray(a)[part::2],
      (prompt, tokens, experience, source if host else ()),
    )
    by_hand, one_metrics = single.update(by_hand, {}, *batch, images if host else source, None)
    history.append(jax.device_get(one_metrics))
    states.append(jax.device_get(by_hand.objective))
  # XLA compiles the same computation once inside a loop and once outside of it.
  assert_close_trees(state.params, by_hand.params, share=1e-5)
  assert_close_trees(state.opt_state, by_hand.opt_state, share=1e-4)
  losses = [one["loss"] for one in history]
  assert metrics.keys() == history[0].keys()
  for key, value in metrics.items():
    mean = np.mean([one[key] for one in history])
    np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6, err_msg=key)
  assert abs(losses[0] - losses[1]) > 1e-3  # swapped or repeated minibatches would show

  assert state.objective.keys() == states[-1].keys()
  for key, value in states[-1].items():
    np.testing.assert_allclose(state.objective[key], value, rtol=1e-5, err_msg=key)
  if name == "papo":
    assert [one["anneal"] for one in history] == pytest.approx([1, 2 / 3])
    assert state.objective["updates"] == 2
  if name == "grpo":  # each update has two prompts of two samples, and a KL far above the target
    assert [one["kl_coef"] for one in history] == pytest.approx([0.01, 0.0108])
    assert state.objective["kl_coef"] == pytest.approx(0.01 * 1.08**2)


# -- Losses and gradients that are not finite ------------------------------------------------------


def test_an_update_with_a_nonfinite_loss_or_gradient_only_counts_bad_steps(setup, make, experience):
  _, params, prompt, tokens, mask, _ = setup
  program = make(objectives.create("vppo"), 0.05)
  halves = jax.tree.map(lambda a: np.asarray(a)[::2], (prompt, tokens, experience))

  def step(state, change=lambda advantages: advantages):
    state = jax.tree.map(jnp.copy, state)
    prompt, tokens, e = halves
    e = e.replace(advantages=change(e.advantages).astype("f4"))
    state, metrics = program.update(state, {}, prompt, tokens, e, jax.random.key(0), None)
    return jax.device_get(state), metrics

  start, _ = step(fresh(program, params))  # the momentum is no longer 0
  first, metrics = step(start, lambda a: np.where(np.arange(a.size).reshape(a.shape), a, np.nan))
  assert not np.isfinite(metrics["loss"])
  # The loss is finite, but the squares of the gradient exceed the range of float32.
  second, metrics = step(first, lambda a: np.full_like(a, 1e25))
  assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
  for bad, count in ((first, 1), (second, 2)):
    assert bad.bad_steps == count
    jax.tree.map(
      np.testing.assert_array_equal, (bad.params, bad.opt_state), (start.params, start.opt_state)
    )
  after, metrics = step(second)
  assert after.bad_steps == 0 and np.isfinite(metrics["loss"])
  assert not np.array_equal(after.params["head"], start.params["head"])


def test_programs_with_a_frozen_vision_tower_use_the_visual_tokens(setup, make, experience):
  """If a prompt has its visual tokens, no program reads its patches, which are NaN here."""
  _, params, prompt, tokens, mask, _ = setup
  programs = make(objectives.create("grpo"), trainable=("!vision",), sampling=Sampling(G, T))
  trained, frozen = lora.split(params, ("!vision",))
  with_features = programs.see(params, prompt)
  without_patches = with_features.replace(patches=jnp.full_like(with_features.patches, jnp.nan))
  plain = programs.score(params, prompt, tokens, mask)
  np.testing.assert_allclose(
    programs.score(params, without_patches, tokens, mask).logp, plain.logp, atol=1e-5
  )
  rollout = programs.rollout(params, without_patches, jax.random.key(0))
  np.testing.assert_array_equal(
    rollout.tokens, programs.rollout(params, prompt, jax.random.key(0)).tokens
  )
  (_, wanted), (_, found) = (
    programs.update(
      fresh(programs, trained), frozen, given, tokens, experience, jax.random.key(0), None
    )
    for given in (prompt, without_patches)
  )
  np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=1e-5)


# -- Packing ---------------------------------------------------------------------------------------

PACKED = (
  ("grpo", {}, {}),
  ("gspo", {}, dict(microbatches=2)),
  ("vppo", {}, dict(minibatches=2)),
  ("vppo", {}, dict(microbatches=2, minibatches=2)),
  ("papo", dict(masked_gradient=True, mask_rate=0.8), dict(microbatches=2)),
  ("kl_cov", dict(cov_share=0.3), {}),
  ("papo", dict(masked_gradient=True, perception_kl="full", kl="full"), {}),
)


def longer_responses(setup, experience):
  """Tokens, mask and experience of responses of 0 to 4 T tokens, some of which are masked."""
  _, _, _, tokens, mask, _ = setup
  tokens, mask = (np.concatenate([a] * 4, axis=-1) for a in (tokens, mask))
  lengths = np.random.default_rng(5).integers(0, mask.shape[-1] + 1, (P, G, 1))
  mask = mask & (np.arange(mask.shape[-1]) < lengths)
  longer = jax.tree.map(
    lambda a: np.concatenate([np.asarray(a)] * 4, axis=-1) if np.ndim(a) == 3 else a, experience
  )
  return tokens, mask, longer.replace(mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "split"), PACKED)
def test_packing_does_not_change_scores_gradients_or_metrics(
  name, fields, split, setup, make, experience
):
  """The packed responses go through the model in several passes."""
  _, params, prompt, *_ = setup
  tokens, mask, longer = longer_responses(setup, experience)
  objective = objectives.create(name, **fields)
  program = make(objective, part_tokens=32, **split)
  packing = program.pack(mask)
  assert packing.size == 16
  # There are several passes. But if each piece of the batch is one prompt, one pass is enough.
  assert max(packing.used) > 1 or len(packing.used) == P
  key = jax.random.key(4)
  for score, more in ((program.score, ()), (program.score_masked, (key,))):
    padded, packed = (score(params, prompt, tokens, mask, *more, p) for p in (None, packing))
    np.testing.assert_allclose(packed.logp, padded.logp, rtol=1e-5, atol=5e-5)
    np.testing.assert_allclose(packed.entropy, padded.entropy, rtol=1e-5, atol=5e-5)
  reference = params if "ref" in objective.grad_views else None
  outs = [
    program.update(fresh(program, params), {}, prompt, tokens, longer, key, reference, p)
    for p in (None, packing)
  ]
  (padded, metrics), (packed, others) = outs
  assert_close_trees(packed.opt_state, padded.opt_state, share=2e-4)
  for metric, value in metrics.items():
    np.testing.assert_allclose(others[metric], value, rtol=2e-4, atol=1e-6, err_msg=metric)


def assert_same_steps(both, single, params, batch, source, packing, share) -> None:
  """Packed scores and updates on two devices equal padded ones on one device."""
  prompt, tokens, experience = batch
  plain = single.score_masked(params, prompt, tokens, experience.mask, source)
  packed = both.score_masked(params, prompt, tokens, experience.mask, source, packing)
  np.testing.assert_allclose(packed.logp, plain.logp, rtol=1e-5, atol=5e-5)
  state, metrics = single.update(fresh(single, params), {}, *batch, source, None)
  found, others = both.update(fresh(both, params), {}, *batch, source, None, packing)
  assert_close_trees(jax.device_get(found.opt_state), jax.device_get(state.opt_state), share=share)
  for metric, value in metrics.items():
    np.testing.assert_allclose(others[metric], value, rtol=share, atol=1e-6, err_msg=metric)


@pytest.mark.slow
def test_packing_on_two_devices_equals_padding_on_one(setup, make, experience):
  """Each device processes blocks of its own prompts, and may fill fewer passes than the other."""
  model, params, prompt, *_, black = setup
  tokens, mask, longer = longer_responses(setup, experience)
  objective, key = objectives.create("vppo"), jax.random.key(4)
  mesh = parallel.make_mesh({"fsdp": 2, "tensor": 1}, devices=jax.devices()[:2])
  both = Programs(
    model,
    mesh,
    objective,
    keep_gradient(),
    params,
    temperature=TEMPERATURE,
    black=black,
    part_tokens=32,
  )
  packing = both.pack(mask)
  assert packing.index.shape[2] == 2 and max(packing.used) > 1
  assert not np.array_equal(packing.order, np.arange(P))
  assert_same_steps(both, make(objective), params, (prompt, tokens, longer), key, packing, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["prompt", "sample"])
def test_balancing_prompts_over_devices_does_not_change_an_update(setup, make, experience, per):
  """Two devices, two minibatches of two microbatches, and images masked on the host."""
  model, params, prompt, *_, black = setup
  tokens, mask, longer = longer_responses(setup, experience)
  rng = np.random.default_rng(6)
  order = np.arange(2 * P) % P  # every prompt twice, with different responses

  def twice(tree):
    return jax.tree.map(lambda a: np.asarray(a)[order], tree)

  prompt, tokens, longer = twice((prompt, tokens, longer))
  mask = np.arange(tokens.shape[-1]) < rng.integers(1, tokens.shape[-1] + 1, (2 * P, G, 1))
  longer = longer.replace(mask=mask)
  rows = jax.device_get(views.repeat_prompts(prompt, G) if per == "sample" else prompt)
  source = rows.replace(patches=rows.patches + rng.normal(size=rows.patches.shape).astype("f4"))
  objective = objectives.create("papo", mask_per=per, mask_on="original", **MASKED)
  mesh = parallel.make_mesh({"fsdp": 2, "tensor": 1}, devices=jax.devices()[:2])
  both = Programs(
    model,
    mesh,
    objective,
    optax.sgd(0.01, momentum=0.9),
    params,
    temperature=TEMPERATURE,
    black=black,
    part_tokens=32,
    microbatches=2,
    minibatches=2,
  )
  packing = both.pack(mask)
  assert not np.array_equal(packing.order, np.arange(2 * P))
  assert_same_steps(
    both,
    make(objective, 0.01, minibatches=2),
    params,
    (prompt, tokens, longer),
    source,
    packing,
    5e-4,
  )

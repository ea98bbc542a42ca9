"""The compiled programs against slow references written out plainly."""

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
  """Model, params, prompts of different lengths and images, random responses, a black patch."""
  path = tmp_path_factory.mktemp("scratch")
  boards = digit_boards.LiveBoards("train", P, tasks=("read", "count"), style="direct")
  examples = [boards[i] for i in range(P)]
  scratch.create(path, tiny_run.ARCHITECTURE, [e.question for e in examples])
  model, params, processor = models.load_pretrained(path, prompt_buckets=(64,), patch_buckets=(36,))
  # Away from the initialisation, where biases are 0 and answers hardly depend on the image.
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
  """Changes nothing; its state is the last gradient."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
  )


@pytest.fixture(scope="module")
def make(setup):
  """(objective, learning_rate=None, **kwargs) -> Programs, the same ones for equal arguments."""
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
  """As if the rollout's policy and the views were other models, some way off."""
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
  """Every leaf within `share` of its largest value, or of a thousandth of the largest of all."""
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(b))

  def close(path, x, y):
    scale = max(float(np.abs(y).max()), 1e-3 * largest)
    np.testing.assert_allclose(x, y, rtol=0, atol=share * scale, err_msg=jax.tree_util.keystr(path))

  jax.tree.map_with_path(close, a, b)


# -- Against G separate sequences, full logits, and the formula ------------------------------------


def slow_logp(model, params, prompt, tokens):
  """log π [P, G, T] from P·G whole sequences, prompt and response together, and all their logits.

  `prompt` has a row for every sample.
  """
  lengths = np.asarray(prompt.length)
  rows = np.arange(P * G)[:, None]
  at = lengths[:, None] + np.arange(T)  # where response tokens stand
  room = [(0, 0), (0, T)]
  line = np.asarray(prompt.next_position)[:, None] + np.arange(T)
  whole = prompt.replace(
    tokens=jnp.pad(prompt.tokens, room).at[rows, at].set(tokens.reshape(-1, T)),
    length=lengths + T,
    positions=jnp.pad(prompt.positions, [*room, (0, 0)]).at[rows, at].set(line[..., None]),
    feature_index=jnp.pad(prompt.feature_index, room, constant_values=-1),
  )
  logits = model.apply({"params": params}, whole)[rows, at - 1] / TEMPERATURE
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
  """The masked view has a gradient too: pushed away from the clean one, and both sharpened."""
  token = ppo(logp, e.old.logp, e.advantages, 0.2, 0.3, 3.0) + 0.01 * k3(logp, e.views["ref"].logp)
  token += -0.02 * k3(logp, masked_logp) - 0.05 * logp - 0.05 * masked_logp
  return jnp.where(e.mask, token, 0).sum() / e.mask.sum()


def vppo(logp, e, _):
  """Top 40% of each response by dependency; advantages shaped to [0.9, ...] over the minibatch."""
  d = e.views["masked"].logp - e.old.logp
  depends = np.minimum(np.exp(d) - d - 1, 10)
  keep, mean = np.zeros(e.mask.shape), np.zeros((P, G))
  for p, g in np.ndindex(P, G):
    row = depends[p, g][e.mask[p, g]]
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
def test_gradient_is_that_of_separate_sequences_and_the_formula(
  setup, make, experience, formula, settings
):
  model, params, prompt, tokens, mask, black = setup
  objective = objectives.create(formula.__name__, **settings)
  program = make(objective)
  key = jax.random.key(5)
  state, metrics = program.update(fresh(program, params), {}, prompt, tokens, experience, key, None)

  alone = views.repeat_prompts(prompt, G)
  darkened = views.black_patches(key, alone, objective.mask_rate, black)

  @jax.jit
  @jax.value_and_grad
  def slow(params):
    masked = slow_logp(model, params, darkened, tokens) if settings else None
    return formula(slow_logp(model, params, alone, tokens), experience, masked)

  loss, grads = slow(params)
  # float32 through four layers; the sums of attention and of the batch are taken in another order.
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
def test_masked_view_scores_the_image_that_the_objective_asks_for(setup, kind, per, settings):
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

  alone = views.repeat_prompts(prompt, G)
  drawn_on = alone if per == "sample" else prompt
  other = {
    "patches": lambda: views.black_patches(key, drawn_on, 0.6, black, block=3, merge_size=2),
    "blank": lambda: views.solid(drawn_on, 0, black, white),
    "solid": lambda: views.solid(drawn_on, 70, black, white),
    "noise": lambda: views.noise(key, drawn_on, 90.0, black, white, shape),
    "blur": lambda: views.blur(drawn_on, 4.0, shape, 2),
  }[kind]()
  other = other if per == "sample" else views.repeat_prompts(other, G)
  slow = jax.jit(lambda patches: slow_logp(model, params, alone.replace(patches=patches), tokens))
  masked = np.asarray(slow(other.patches))
  # float32 through four layers, sums in another order.
  np.testing.assert_allclose(stats.logp, np.where(mask, masked, 0), atol=2e-4)
  assert np.abs(masked - slow(alone.patches))[mask].max() > 0.01


def test_kl_of_the_masked_view_is_that_of_full_distributions(setup, make):
  model, params, prompt, tokens, mask, black = setup
  program = make(objectives.create("vppo", dependency="full"))
  key = jax.random.key(2)
  kl = program.score_masked(params, prompt, tokens, mask, key).kl

  alone = views.repeat_prompts(prompt, G)
  darkened = views.black_patches(key, alone, 0.5, black)

  @jax.jit
  def slow(prompt):
    """log π f32[P, G, T, V] of every token."""
    every = jnp.arange(model.config.vocab_size)
    hidden = scoring.hidden_states(model, params, prompt, jnp.asarray(tokens))
    logits = model.apply({"params": params}, hidden, method="unembed") / TEMPERATURE
    banned = jnp.isin(every, jnp.array(model.config.suppressed_tokens))
    return jax.nn.log_softmax(jnp.where(banned, -jnp.inf, logits))

  clean, masked = (np.asarray(slow(view), np.float64) for view in (alone, darkened))
  with np.errstate(invalid="ignore"):
    terms = np.where(np.isinf(clean), 0, np.exp(clean) * (clean - masked))
  np.testing.assert_allclose(kl, np.where(mask, terms.sum(-1), 0), rtol=1e-3, atol=1e-5)
  assert np.asarray(kl)[mask].mean() > 1e-3
  # One key, one image: the masked view that the objective's loss sees.
  picked = np.take_along_axis(masked, tokens[..., None], axis=-1)[..., 0]
  stats = program.score_masked(params, prompt, tokens, mask, key)
  np.testing.assert_allclose(stats.logp, np.where(mask, picked, 0), atol=2e-4)


@pytest.mark.parametrize(
  "settings",
  [{"mask_kind": "patches", "mask_patch": 3}, {"mask_kind": "noise"}, {"mask_kind": "blur"}],
  ids=["patches", "noise", "blur"],
)
def test_masked_views_are_the_same_on_four_devices(setup, settings):
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

  # float32; the same draws, the sums of sharded matrices in another order.
  for one, four in zip(score(1), score(4), strict=True):
    np.testing.assert_allclose(four, one, atol=2e-4)


def test_noise_without_a_white_patch_is_refused(setup):
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


# -- Splits ---------------------------------------------------------------------------------------


def assert_equal_updates(part, whole) -> None:
  """Of (state, metrics), where the state keeps the gradient."""
  state, others = part
  expected, metrics = whole
  # The same float32 terms, added in another order; a part that is left out or weighted by its
  # own number of tokens would be off by a quarter, one under another mask by more.
  assert_close_trees(state.opt_state, expected.opt_state, share=2e-4)
  assert others.keys() == metrics.keys()
  for key, value in metrics.items():
    np.testing.assert_allclose(others[key], value, rtol=2e-5, atol=1e-6, err_msg=key)


MASKED = {"masked_gradient": True, "mask_rate": 0.5}


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
def test_images_of_the_host_go_with_their_prompts(setup, make, experience, per):
  """A row for each prompt or for each sample; in parts what the device draws in one."""
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


def test_moments_on_the_host_change_nothing(setup, experience):
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

  plain, away = update(False), update(True)
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(away.opt_state) if x.ndim}
  assert kinds == {"pinned_host"}
  # The same float32 computation, in other loops of the compiler.
  assert_close_trees(jax.device_get(away), jax.device_get(plain), share=1e-5)


@pytest.mark.parametrize(
  ("name", "settings", "host"),
  [
    ("vppo", {}, False),  # its shaping depends on the minibatch
    ("papo", {**MASKED, "anneal_updates": 3}, True),
    ("grpo", {"kl_target": 0.01, "kl_horizon": 10}, False),
  ],
  ids=["vppo", "papo", "grpo"],
)
def test_minibatches_are_updates_one_after_another(setup, make, experience, name, settings, host):
  """What changes from update to update, the objective's scalars too, goes through the scan."""
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
    by_hand, one = single.update(by_hand, {}, *batch, images if host else source, None)
    history.append(jax.device_get(one))
    states.append(jax.device_get(by_hand.objective))
  # The same computation, compiled once inside a loop and once alone.
  assert_close_trees(state.params, by_hand.params, share=1e-5)
  assert_close_trees(state.opt_state, by_hand.opt_state, share=1e-4)
  losses = [one["loss"] for one in history]
  assert metrics.keys() == history[0].keys()
  for key, value in metrics.items():
    mean = np.mean([one[key] for one in history])
    np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6, err_msg=key)
  assert abs(losses[0] - losses[1]) > 1e-3  # so halves that were swapped or repeated would show

  assert state.objective.keys() == states[-1].keys()
  for key, value in states[-1].items():
    np.testing.assert_allclose(state.objective[key], value, rtol=1e-5, err_msg=key)
  if name == "papo":
    assert [one["anneal"] for one in history] == pytest.approx([1, 2 / 3])
    assert state.objective["updates"] == 2
  if name == "grpo":  # two prompts of two samples each time, far above the target
    assert [one["kl_coef"] for one in history] == pytest.approx([0.01, 0.0108])
    assert state.objective["kl_coef"] == pytest.approx(0.01 * 1.08**2)


# -- Bad steps ------------------------------------------------------------------------------------


def test_a_step_with_a_bad_loss_or_gradient_changes_only_the_count(setup, make, experience):
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
  # The gradient alone: its squares leave float32's range, the loss does not.
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


def test_a_frozen_tower_sees_each_prompt_once(setup, make, experience):
  """What is seen needs no pictures any more, in no program."""
  _, params, prompt, tokens, mask, _ = setup
  programs = make(objectives.create("grpo"), trainable=("!vision",), sampling=Sampling(G, T))
  trained, frozen = lora.split(params, ("!vision",))
  seen = programs.see(params, prompt)
  blind = seen.replace(patches=jnp.full_like(seen.patches, jnp.nan))
  plain = programs.score(params, prompt, tokens, mask)
  np.testing.assert_allclose(
    programs.score(params, blind, tokens, mask).logp, plain.logp, atol=1e-5
  )
  drawn = programs.rollout(params, blind, jax.random.key(0))
  np.testing.assert_array_equal(
    drawn.tokens, programs.rollout(params, prompt, jax.random.key(0)).tokens
  )
  (_, wanted), (_, found) = (
    programs.update(
      fresh(programs, trained), frozen, given, tokens, experience, jax.random.key(0), None
    )
    for given in (prompt, blind)
  )
  np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=1e-5)


# -- Packed ----------------------------------------------------------------------------------------

PACKED = (
  ("grpo", {}, {}),
  ("gspo", {}, dict(microbatches=2)),
  ("vppo", {}, dict(minibatches=2)),
  ("vppo", {}, dict(microbatches=2, minibatches=2)),
  ("papo", dict(masked_gradient=True, mask_rate=0.8), dict(microbatches=2)),
  ("kl_cov", dict(cov_share=0.3), {}),
  ("papo", dict(masked_gradient=True, perception_kl="full", kl="full"), {}),
)


def four_times(setup, experience):
  """Longer responses of all lengths: tokens, mask, experience."""
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
def test_packing_changes_nothing(name, fields, split, setup, make, experience):
  """Blocks of responses, several parts: the same scores, gradients and metrics as with padding."""
  _, params, prompt, *_ = setup
  tokens, mask, longer = four_times(setup, experience)
  objective = objectives.create(name, **fields)
  program = make(objective, part_tokens=32, **split)
  packing = program.pack(mask)
  assert packing.size == 16
  # Several parts; but the responses of one prompt fill no more than one.
  assert max(packing.used) > 1 or len(packing.used) == P
  key = jax.random.key(4)
  for score, more in ((program.score, ()), (program.score_masked, (key,))):
    plain, packed = (score(params, prompt, tokens, mask, *more, p) for p in (None, packing))
    np.testing.assert_allclose(packed.logp, plain.logp, rtol=1e-5, atol=5e-5)
    np.testing.assert_allclose(packed.entropy, plain.entropy, rtol=1e-5, atol=5e-5)
  reference = params if "ref" in objective.grad_views else None
  outs = [
    program.update(fresh(program, params), {}, prompt, tokens, longer, key, reference, p)
    for p in (None, packing)
  ]
  (plain, metrics), (packed, others) = outs
  assert_close_trees(packed.opt_state, plain.opt_state, share=2e-4)
  for metric, value in metrics.items():
    np.testing.assert_allclose(others[metric], value, rtol=2e-4, atol=1e-6, err_msg=metric)


def assert_same_steps(both, single, params, batch, source, packing, share) -> None:
  """Scores and an update of two devices, packed, are those of one, padded."""
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
def test_packed_on_two_devices_as_padded_on_one(setup, make, experience):
  """Each device has blocks of its own prompts, and not all have equally many parts of them."""
  model, params, prompt, *_, black = setup
  tokens, mask, longer = four_times(setup, experience)
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
def test_dealt_to_devices_and_microbatches_prompts_stay_themselves(setup, make, experience, per):
  """With images of the host, two minibatches of two microbatches each, on two devices."""
  model, params, prompt, *_, black = setup
  tokens, mask, longer = four_times(setup, experience)
  rng = np.random.default_rng(6)
  order = np.arange(2 * P) % P  # every prompt twice, with other responses

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

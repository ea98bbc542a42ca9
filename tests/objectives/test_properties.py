"""What must hold for every objective and every input: padding, order, splits, ties, extremes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl_vlm import objectives, parallel
from jaxrl_vlm.objectives import advantages
from jaxrl_vlm.types import Experience, TokenStats

P, G, T = 4, 3, 6
# Every method by name, and what else a field can make of the loss.
OBJECTIVES = {
  name: objectives.create(name, max_length=16)
  for name in objectives.names() if name != "dpo"  # see test_dpo.py
} | {
  "clip_cov": objectives.create("clip_cov", cov_share=0.1, cov_low=0.1),
  "kl_cov": objectives.create("kl_cov", cov_share=0.1),
  "papo_share": objectives.create("papo_d", perception_share=0.3, perception_clip=0.2),
  "papo_paper": objectives.create(
    "papo", masked_gradient=True, perception_kl="full", kl="k2", anneal_updates=8),
  "vppo_seq": objectives.create(
    "vppo", aggregation="seq-mean-token-mean", dependency="full", kl="k1+", kl_coef=0.01),
  "vppo_gspo": objectives.create(
    "vppo", aggregation="seq-mean-token-sum", tokens="either", policy_loss="gspo_token",
    kl="abs", kl_coef=0.01),
  "vppo_clip_cov": objectives.create(
    "vppo", policy_loss="clip_cov", cov_share=0.1, cov_low=0.1, correction="tis",
    correction_level="sequence"),
  "vppo_kl_cov": objectives.create("vppo", policy_loss="kl_cov", cov_share=0.3),
  "grpo_full": objectives.create("grpo", kl="full", kl_target=0.1),
  "grpo_mis": objectives.create(
    "grpo", correction="mis", mask_overlong=True, mask_zero_advantages=True),
}  # fmt: skip
every = pytest.mark.parametrize("name", OBJECTIVES)
every_rl = pytest.mark.parametrize(
  "name", [k for k, v in OBJECTIVES.items() if isinstance(v, objectives.PolicyGradient)]
)
few = settings(
  max_examples=6,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.differing_executors],
)
seeds = st.integers(0, 2**31 - 1)
# Sums of some tens of float32 terms in another order.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def batch(seed: int, scale: float = 0.5, dtype=np.float32, prompts: int = P):
  """Random current stats, masked stats and experience; some responses empty, some short."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, T + 1, (prompts, G))
  mask = np.arange(T) < lengths[..., None]
  logps = {}
  base = -rng.exponential(1.0, (prompts, G, T))
  for name in ("new", "old", "ref", "masked", "new_masked", "sampler"):
    logp = base + scale * rng.standard_normal((prompts, G, T))
    logps[name] = TokenStats(
      logp=logp.astype(dtype),
      entropy=rng.exponential(1.0, (prompts, G, T)).astype(dtype),
      kl=rng.exponential(0.1, (prompts, G, T)).astype(dtype),
    )
  experience = Experience(
    mask=mask,
    advantages=rng.standard_normal((prompts, G, 1)).astype(np.float32),
    old=logps["old"],
    rewards=rng.standard_normal((prompts, G)).astype(np.float32),
    views={name: logps[name] for name in ("ref", "masked")},
    sampler_logp=logps["sampler"].logp,
    truncated=rng.random((prompts, G)) < 0.2,
  )
  return logps["new"], logps["new_masked"], experience


def batch_of(name: str, *args, **kwargs):
  """`batch` with nothing in it that the objective's stage does not have."""
  stats, masked_stats, experience = batch(*args, **kwargs)
  if isinstance(OBJECTIVES[name], objectives.SFT):
    experience = Experience(mask=experience.mask, advantages=None, old=None, rewards=None)
  return stats, masked_stats, experience


prepare = jax.jit(lambda objective, experience: objective.prepare(experience), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def loss(objective, stats, masked_stats, experience):
  """(loss, metrics), gradients with respect to the log-probabilities of both passes."""

  def of(logps):
    view = dataclasses.replace(masked_stats, logp=logps[1])
    views = dict.fromkeys(objective.grad_views, view)
    return objective.loss(dataclasses.replace(stats, logp=logps[0]), experience, **views)

  return jax.value_and_grad(of, has_aux=True)((stats.logp, masked_stats.logp))


def run(objective, stats, masked_stats, experience):
  return loss(objective, stats, masked_stats, prepare(objective, experience))


@every
@given(seed=seeds)
@few
def test_padding_changes_nothing(name, seed):
  """More padded tokens, samples and prompts, anything at all in them."""
  inputs = batch_of(name, seed)

  def pad(x):
    axes = [(0, 2), (0, 1), (0, 3)][: x.ndim]
    if x.ndim == 3 and x.shape[-1] == 1:
      axes[2] = (0, 0)
    fill = False if x.dtype == bool else np.nan
    return np.pad(x, axes, constant_values=fill)

  (value, metrics), gradients = run(OBJECTIVES[name], *inputs)
  (padded, padded_metrics), padded_gradients = run(OBJECTIVES[name], *jax.tree.map(pad, inputs))
  close(padded, value)
  jax.tree.map(close, padded_metrics, metrics)
  for ours, theirs in zip(padded_gradients, gradients, strict=True):
    close(ours[:P, :G, :T], theirs)
    assert not np.any(ours[P:]) and not np.any(ours[:, G:]) and not np.any(ours[:, :, T:])


@every
@pytest.mark.parametrize("axis", [0, 1], ids=["prompts", "samples"])
@given(seed=seeds)
@few
def test_neither_prompts_nor_samples_have_an_order(name, axis, seed):
  inputs = batch_of(name, seed)
  order = np.random.default_rng(seed).permutation((P, G)[axis])
  permute = functools.partial(jax.tree.map, lambda x: np.take(x, order, axis))
  (value, metrics), gradients = run(OBJECTIVES[name], *inputs)
  (permuted_value, permuted_metrics), permuted_gradients = run(OBJECTIVES[name], *permute(inputs))
  close(permuted_value, value)
  jax.tree.map(close, permuted_metrics, metrics)
  jax.tree.map(close, permuted_gradients, permute(jax.device_get(gradients)))


@every
def test_compiled_is_not_compiled(name):
  inputs = batch_of(name, 5)
  with jax.disable_jit():
    plain = run(OBJECTIVES[name], *inputs)
  jax.tree.map(close, run(OBJECTIVES[name], *inputs), plain)


@every
@given(seed=seeds)
@few
def test_microbatches_add_up(name, seed):
  """The whole minibatch at once = one prompt at a time, in loss, metrics and gradients."""
  stats, masked_stats, experience = batch_of(name, seed)
  # The whole, which chooses tokens in its own pass where it chooses any.
  (value, metrics), gradients = run(OBJECTIVES[name], stats, masked_stats, experience)
  experience = dataclasses.replace(experience, current=stats)
  prepared = jax.device_get(prepare(OBJECTIVES[name], experience))
  results = [
    loss(
      OBJECTIVES[name], *jax.tree.map(lambda x, i=i: x[i : i + 1], (stats, masked_stats, prepared))
    )
    for i in range(P)
  ]
  close(sum(part[0][0] for part in results), value)
  jax.tree.map(lambda x, *xs: close(sum(xs), x), metrics, *(part[0][1] for part in results))
  jax.tree.map(
    lambda x, *xs: close(np.concatenate(xs), x), gradients, *(part[1] for part in results)
  )


whole = jax.jit(
  lambda objective, stats, masked_stats, experience: (
    loss(objective, stats, masked_stats, prepared := objective.prepare(experience)),
    objective.prepare_metrics(prepared),
  ),
  static_argnums=0,
)


@every
def test_eight_devices_are_one(name):
  """Prompts over devices: sums, sorts and choices over the minibatch cross them."""
  inputs = batch_of(name, 11, prompts=8)
  mesh = parallel.make_mesh({"fsdp": 8, "tensor": 1}, devices=jax.devices())
  sharded = parallel.put_batch(mesh, inputs)
  assert len(sharded[0].logp.sharding.device_set) == 8
  plain = whole(OBJECTIVES[name], *inputs)
  jax.tree.map(close, whole(OBJECTIVES[name], *sharded), plain)


@pytest.mark.parametrize("name", ["grpo", "papo", "vppo"])
def test_an_unprepared_experience_is_a_whole_minibatch(name):
  inputs = batch(0)
  (value, _), gradients = loss(OBJECTIVES[name], *inputs)
  (prepared_value, _), prepared_gradients = run(OBJECTIVES[name], *inputs)
  close(value, prepared_value)
  jax.tree.map(close, gradients, prepared_gradients)


@every
def test_nothing_but_masked_responses(name):
  stats, masked_stats, experience = batch_of(name, 0)
  experience = dataclasses.replace(experience, mask=np.zeros((P, G, T), bool))
  prepared = prepare(OBJECTIVES[name], experience)
  (value, metrics), gradients = loss(OBJECTIVES[name], stats, masked_stats, prepared)
  assert value == 0 and not any(np.any(x) for x in gradients)
  assert all(np.isfinite(x) for x in metrics.values())
  assert all(np.isfinite(x) for x in OBJECTIVES[name].prepare_metrics(prepared).values())


@every
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_finite_up_to_differences_of_80(name, dtype, sign):
  stats, masked_stats, experience = batch_of(name, 1, dtype=dtype)
  shift = sign * 80 * np.random.default_rng(0).choice([-1, 0, 1], (P, G, T))
  stats = dataclasses.replace(stats, logp=stats.logp + shift.astype(dtype))
  (value, metrics), gradients = run(OBJECTIVES[name], stats, masked_stats, experience)
  assert np.isfinite(value) and all(np.isfinite(x) for x in metrics.values())
  for gradient in gradients:
    assert gradient.dtype == dtype
    assert np.all(np.isfinite(gradient.astype(np.float32)))


def given_to(objective, rewards):
  """What the objective's advantages want besides rewards and mask, all of it equal as they are."""
  known = {
    "baseline": rewards[:, 0],
    "components": {"a": rewards, "b": 2 * rewards},
    "component_weights": {"a": jnp.ones_like(rewards), "b": jnp.ones_like(rewards)},
    "penalty": jnp.zeros((P, G, T)),
  }
  return {name: known[name] for name in objective.advantage_needs}


@every_rl
@given(reward=st.floats(-10, 10, width=32))
@few
def test_equal_rewards_give_no_policy_gradient(name, reward):
  """Exactly zero: no rounding of the mean that a tiny standard deviation could blow up."""
  settings = {"kl_coef": 0.0, "kl_target": None, "entropy_penalty": 0.0}
  objective = dataclasses.replace(OBJECTIVES[name], **settings)
  if isinstance(objective, objectives.PAPO):
    objective = dataclasses.replace(objective, perception_coef=0.0, masked_entropy_penalty=0.0)
  stats, masked_stats, experience = batch(2)
  rewards = jnp.full((P, G), reward, jnp.float32)
  more = given_to(objective, rewards)
  computed = objective.advantages(rewards, experience.mask, **more)
  assert not np.any(computed)
  # kl_cov's penalty is there whatever the advantages: on policy it has no slope to speak of.
  if objective.policy_loss != "kl_cov":
    experience = dataclasses.replace(experience, advantages=np.asarray(computed))
    _, gradients = run(objective, stats, masked_stats, experience)
    assert not np.any(gradients[0])


@pytest.mark.parametrize("advantage", advantages.ESTIMATORS)
@given(seed=seeds)
@few
def test_a_group_of_equal_rewards_has_no_advantages(advantage, seed):
  """Whatever the reward, which is another in each group, and whatever the other groups earn.

  Exactly 0, but for these, as published: reinforce_pp has no groups, so a group that earns more
  than others is pushed up as a whole; gdpo and reinforce_pp_baseline whiten over the batch, and
  the mean over its tokens, which is not 0 where longer responses earn more, is taken off every
  group; where all groups are of equal rewards they give 0 too. remax gives 0 where the greedy
  response earns the same.
  """
  rng = np.random.default_rng(seed)
  objective = objectives.create("dapo", advantage=advantage)
  lengths = rng.integers(1, T + 1, (P, G))
  rewards = np.repeat(10 * rng.standard_normal((P, 1)), G, axis=1).astype(np.float32)

  def of(prompts):
    """Of all tokens of the first prompts."""
    mask = np.arange(T) < lengths[..., None]
    computed = objective.advantages(rewards, mask, **given_to(objective, rewards))
    return np.broadcast_to(computed, mask.shape)[:prompts][mask[:prompts]]

  assert np.any(of(P)) == (advantage == "reinforce_pp")
  # One group in which the longest response earns most.
  rewards[-1] = rng.permutation([0, 0, 1])
  lengths[-1] = np.where(rewards[-1], T, 1)
  exception = advantage in ("gdpo", "reinforce_pp", "reinforce_pp_baseline")
  assert np.any(of(P - 1)) == exception


@pytest.mark.parametrize("advantage", advantages.ESTIMATORS)
@given(seed=seeds)
@few
def test_advantages_follow_their_samples(advantage, seed):
  """Permuted prompts and samples have permuted advantages; padded tokens change none."""
  rng = np.random.default_rng(seed)
  objective = objectives.create("dapo", advantage=advantage)
  mask = batch(seed)[2].mask
  # Of equal best rewards grpo_passk takes the first; these have none.
  rewards = rng.standard_normal((P, G)).astype(np.float32)
  plain = np.asarray(jnp.broadcast_to(
    objective.advantages(rewards, mask, **given_to(objective, rewards)), mask.shape))  # fmt: skip
  order = np.ix_(rng.permutation(P), np.arange(G) if "baseline" in objective.advantage_needs
                 else rng.permutation(G))  # fmt: skip
  moved = objective.advantages(
    rewards[order], mask[order], **given_to(objective, rewards[order]))  # fmt: skip
  padded = np.pad(mask, ((0, 0), (0, 0), (0, 3)))
  longer = jnp.broadcast_to(
    objective.advantages(rewards, padded, **given_to(objective, rewards)), padded.shape
  )
  close(np.where(mask[order], moved, 0), np.where(mask, plain, 0)[order])
  close(np.where(mask, longer[..., :T], 0), np.where(mask, plain, 0))


@given(seed=seeds)
@few
def test_group_advantages_ignore_shift(seed):
  rewards = np.random.default_rng(seed).standard_normal((P, G)).astype(np.float32)
  for advantage in ("grpo", "dr_grpo", "rloo", "grpo_passk"):
    objective = objectives.create("grpo", advantage=advantage)
    plain, shifted = objective.advantages(rewards), objective.advantages(rewards + 2)
    np.testing.assert_allclose(shifted, plain, rtol=1e-4, atol=1e-4)

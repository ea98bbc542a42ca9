"""Tests properties of all objectives: padding, order, microbatches, devices and extreme values."""

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
# All objectives with their defaults, and further settings that change the loss.
OBJECTIVES = {
  name: objectives.create(name, max_length=16)
  for name in objectives.names() if name != "dpo"  # test_dpo.py tests it
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
# The tolerance allows for sums of some tens of float32 terms in another order.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def batch(seed: int, scale: float = 0.5, dtype=np.float32, prompts: int = P):
  """Generates random stats of the policy and the masked view, and an experience.

  Some responses are empty, and some are short.
  """
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
  """Like `batch`, but leaves out of the experience what the objective's kind of stage lacks."""
  stats, masked_stats, experience = batch(*args, **kwargs)
  if isinstance(OBJECTIVES[name], objectives.SFT):
    experience = Experience(mask=experience.mask, advantages=None, old=None, rewards=None)
  return stats, masked_stats, experience


prepare = jax.jit(lambda objective, experience: objective.prepare(experience), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def loss(objective, stats, masked_stats, experience):
  """Returns ((loss, metrics), gradients with respect to the logps of the policy and the view)."""

  def loss_of(logps):
    view = dataclasses.replace(masked_stats, logp=logps[1])
    views = dict.fromkeys(objective.grad_views, view)
    return objective.loss(dataclasses.replace(stats, logp=logps[0]), experience, **views)

  return jax.value_and_grad(loss_of, has_aux=True)((stats.logp, masked_stats.logp))


def run(objective, stats, masked_stats, experience):
  return loss(objective, stats, masked_stats, prepare(objective, experience))


@every
@given(seed=seeds)
@few
def test_padding_changes_nothing(name, seed):
  """Adds padded tokens, samples and prompts, whose values are NaN."""
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
def test_the_order_of_prompts_and_of_samples_does_not_matter(name, axis, seed):
  inputs = batch_of(name, seed)
  order = np.random.default_rng(seed).permutation((P, G)[axis])
  permute = functools.partial(jax.tree.map, lambda x: np.take(x, order, axis))
  (value, metrics), gradients = run(OBJECTIVES[name], *inputs)
  (permuted_value, permuted_metrics), permuted_gradients = run(OBJECTIVES[name], *permute(inputs))
  close(permuted_value, value)
  jax.tree.map(close, permuted_metrics, metrics)
  jax.tree.map(close, permuted_gradients, permute(jax.device_get(gradients)))


@every
def test_jit_equals_no_jit(name):
  inputs = batch_of(name, 5)
  with jax.disable_jit():
    plain = run(OBJECTIVES[name], *inputs)
  jax.tree.map(close, run(OBJECTIVES[name], *inputs), plain)


@every
@given(seed=seeds)
@few
def test_microbatches_add_up(name, seed):
  """The sums over microbatches of one prompt equal loss, metrics and gradients of the minibatch."""
  stats, masked_stats, experience = batch_of(name, seed)
  # In the whole minibatch, objectives that choose tokens do so in `loss`.
  (value, metrics), gradients = run(OBJECTIVES[name], stats, masked_stats, experience)
  experience = dataclasses.replace(experience, current=stats)
  prepared = jax.device_get(prepare(OBJECTIVES[name], experience))
  results = [
    loss(
      OBJECTIVES[name], *jax.tree.map(lambda x, i=i: x[i : i + 1], (stats, masked_stats, prepared))
    )
    for i in range(P)
  ]
  close(sum(result[0][0] for result in results), value)
  jax.tree.map(lambda x, *xs: close(sum(xs), x), metrics, *(result[0][1] for result in results))
  jax.tree.map(
    lambda x, *xs: close(np.concatenate(xs), x), gradients, *(result[1] for result in results)
  )


whole = jax.jit(
  lambda objective, stats, masked_stats, experience: (
    loss(objective, stats, masked_stats, prepared := objective.prepare(experience)),
    objective.prepare_metrics(prepared),
  ),
  static_argnums=0,
)


@every
def test_eight_devices_equal_one(name):
  """Shards prompts over devices. Sums, sorts and choices over the minibatch then cross devices."""
  inputs = batch_of(name, 11, prompts=8)
  mesh = parallel.make_mesh({"fsdp": 8, "tensor": 1}, devices=jax.devices())
  sharded = parallel.put_batch(mesh, inputs)
  assert len(sharded[0].logp.sharding.device_set) == 8
  plain = whole(OBJECTIVES[name], *inputs)
  jax.tree.map(close, whole(OBJECTIVES[name], *sharded), plain)


@pytest.mark.parametrize("name", ["grpo", "papo", "vppo"])
def test_loss_treats_an_unprepared_experience_as_a_whole_minibatch(name):
  inputs = batch(0)
  (value, _), gradients = loss(OBJECTIVES[name], *inputs)
  (prepared_value, _), prepared_gradients = run(OBJECTIVES[name], *inputs)
  close(value, prepared_value)
  jax.tree.map(close, gradients, prepared_gradients)


@every
def test_loss_and_gradient_are_zero_if_all_responses_are_empty(name):
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
def test_results_are_finite_for_logp_differences_up_to_80(name, dtype, sign):
  stats, masked_stats, experience = batch_of(name, 1, dtype=dtype)
  shift = sign * 80 * np.random.default_rng(0).choice([-1, 0, 1], (P, G, T))
  stats = dataclasses.replace(stats, logp=stats.logp + shift.astype(dtype))
  (value, metrics), gradients = run(OBJECTIVES[name], stats, masked_stats, experience)
  assert np.isfinite(value) and all(np.isfinite(x) for x in metrics.values())
  for gradient in gradients:
    assert gradient.dtype == dtype
    assert np.all(np.isfinite(gradient.astype(np.float32)))


def given_to(objective, rewards):
  """Returns the other inputs of the objective's advantages. Equal rewards give equal inputs."""
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
  """It is exactly zero. A rounding error of the mean, divided by a tiny std, would be large."""
  settings = {"kl_coef": 0.0, "kl_target": None, "entropy_penalty": 0.0}
  objective = dataclasses.replace(OBJECTIVES[name], **settings)
  if isinstance(objective, objectives.PAPO):
    objective = dataclasses.replace(objective, perception_coef=0.0, masked_entropy_penalty=0.0)
  stats, masked_stats, experience = batch(2)
  rewards = jnp.full((P, G), reward, jnp.float32)
  more = given_to(objective, rewards)
  computed = objective.advantages(rewards, experience.mask, **more)
  assert not np.any(computed)
  # The penalty of kl_cov does not depend on the advantages. On policy its gradient is negligible.
  if objective.policy_loss != "kl_cov":
    experience = dataclasses.replace(experience, advantages=np.asarray(computed))
    _, gradients = run(objective, stats, masked_stats, experience)
    assert not np.any(gradients[0])


@pytest.mark.parametrize("advantage", advantages.ESTIMATORS)
@given(seed=seeds)
@few
def test_a_group_of_equal_rewards_has_no_advantages(advantage, seed):
  """The advantages are exactly 0, whatever the rewards of this group and of others are.

  The exceptions follow the publications. reinforce_pp uses no groups, so a group with higher
  rewards than others has positive advantages. gdpo and reinforce_pp_baseline whiten over the batch:
  they subtract the mean over all tokens, which is not 0 if longer responses have higher rewards. If
  the rewards are equal within each of the groups, they also give 0. remax gives 0 if the greedy
  response has the same reward.
  """
  rng = np.random.default_rng(seed)
  objective = objectives.create("dapo", advantage=advantage)
  lengths = rng.integers(1, T + 1, (P, G))
  rewards = np.repeat(10 * rng.standard_normal((P, 1)), G, axis=1).astype(np.float32)

  def advantages_of(prompts):
    """Returns the advantages of all tokens of the first prompts."""
    mask = np.arange(T) < lengths[..., None]
    computed = objective.advantages(rewards, mask, **given_to(objective, rewards))
    return np.broadcast_to(computed, mask.shape)[:prompts][mask[:prompts]]

  assert np.any(advantages_of(P)) == (advantage == "reinforce_pp")
  # In the last group, the longest response now has the highest reward.
  rewards[-1] = rng.permutation([0, 0, 1])
  lengths[-1] = np.where(rewards[-1], T, 1)
  exception = advantage in ("gdpo", "reinforce_pp", "reinforce_pp_baseline")
  assert np.any(advantages_of(P - 1)) == exception


@pytest.mark.parametrize("advantage", advantages.ESTIMATORS)
@given(seed=seeds)
@few
def test_advantages_move_with_their_samples(advantage, seed):
  """Permuted prompts and samples have permuted advantages. Padded tokens change no advantage."""
  rng = np.random.default_rng(seed)
  objective = objectives.create("dapo", advantage=advantage)
  mask = batch(seed)[2].mask
  # These rewards have no ties. Among equal best rewards, grpo_passk takes the first.
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
def test_group_advantages_ignore_a_shift_of_rewards(seed):
  rewards = np.random.default_rng(seed).standard_normal((P, G)).astype(np.float32)
  for advantage in ("grpo", "dr_grpo", "rloo", "grpo_passk"):
    objective = objectives.create("grpo", advantage=advantage)
    plain, shifted = objective.advantages(rewards), objective.advantages(rewards + 2)
    np.testing.assert_allclose(shifted, plain, rtol=1e-4, atol=1e-4)

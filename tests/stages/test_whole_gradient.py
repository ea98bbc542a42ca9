"""Compares the gradient of an update with a slow computation from the formulas of the papers.

The programs share each prompt among its samples, compute the logits in chunks and call the
objective. The slow computation does none of this: each sample is a sequence of its own, with prompt
and response, all logits are computed at once, and this file contains the formulas of the losses.
Both start from the patches of the images and differentiate with respect to all parameters.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_vlm import models, objectives, parallel, views
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience, Params, Prompt
from tests import tiny

G, T = 3, 5
TEMPERATURE = 0.8
KEY = jax.random.key(7)
# The learning rate. The gradient is computed from the change of the parameters. With a small rate,
# this difference would lose digits to rounding. Multiplying by a power of 2 is exact.
RATE = 1024.0
TEXT = 0  # row of the batch: a prompt without an image
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0, "aggregation": "token-mean"}


class Setup:
  """A model, parameters of the policy, `old` and `ref`, prompts, responses and their rewards."""

  def __init__(self, path, family: str):
    tiny.make_hf(path, family=family)
    self.model, self.params, processor = models.load_pretrained(path)
    self.old, self.ref = self._near(1, 0.1), self._near(2, 0.15)
    messages, pictures = tiny.conversations()
    messages.append(tiny.turn(None, "is it large"))
    pictures.append(tiny.images((90, 60), seed=9))
    self.prompt: Prompt = processor(messages, pictures)
    self.black = processor.black_patch
    rng = np.random.default_rng(3)
    count = len(messages)
    suppressed = self.model.config.suppressed_tokens
    assert suppressed
    self.allowed = np.setdiff1d(np.arange(self.model.config.vocab_size), suppressed)
    self.tokens = rng.choice(self.allowed, (count, G, T)).astype(np.int32)
    self.mask = np.arange(T) < rng.integers(2, T + 1, (count, G, 1))
    self.mask[1, 1] = True
    self.rewards = rng.normal(size=(count, G)).astype(np.float32)
    self.mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])

  def _near(self, seed: int, share: float) -> Params:
    """Returns the parameters plus noise of `share` times the standard deviation of each tensor."""
    rng = np.random.default_rng(seed)

    def perturbed(x):
      x = np.asarray(x)
      return jnp.asarray(x + share * x.std() * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(perturbed, self.params)

  def programs(self, objective: objectives.Objective) -> Programs:
    return Programs(
      self.model,
      self.mesh,
      objective,
      optax.sgd(RATE),
      self.params,
      temperature=TEMPERATURE,
      black=self.black,
    )

  def update(self, objective: objectives.Objective, mask) -> tuple[Params, dict[str, Any]]:
    """Runs one update with SGD. Returns the gradient, and the metrics."""
    programs, batch = self.programs(objective), (self.prompt, self.tokens, mask)
    scored = {}
    if "ref" in objective.views:
      scored["ref"] = programs.score(self.ref, *batch)
    if "masked" in objective.views:
      scored["masked"] = programs.score_masked(self.old, *batch, KEY)
    advantages = objective.advantages(self.rewards, mask)
    experience = Experience(
      mask=mask,
      advantages=jnp.broadcast_to(advantages, mask.shape),
      rewards=self.rewards,
      old=programs.score(self.old, *batch),
      views=scored,
    )
    state = programs.init_state(jax.tree.map(jnp.copy, self.params))
    reference = self.ref if "ref" in objective.grad_views else None
    state, metrics = programs.update(
      state, {}, self.prompt, self.tokens, experience, KEY, reference
    )
    assert metrics["bad_steps"] == 0
    return jax.tree.map(lambda old, new: (old - new) / RATE, self.params, state.params), metrics

  def darkened(self, per: str, rate: float, block: int) -> Prompt:
    """Returns a row for every sample, with the black squares that KEY selects."""
    prompt = views.repeat_prompts(self.prompt, G) if per == "sample" else self.prompt
    dark = views.black_patches(
      KEY,
      prompt,
      rate,
      self.black,
      block=block,
      merge_size=self.model.config.vision.spatial_merge_size,
    )
    return dark if per == "sample" else views.repeat_prompts(dark, G)

  def log_probs(self, params: Params, prompt: Prompt) -> jax.Array:
    """log π [P, G, T, V'] at each response position, over the V' tokens that can be sampled.

    Processes one sequence after another. `prompt` has a row for every sample.
    """
    responses = self.tokens.reshape(-1, T)
    rows = np.arange(len(responses))[:, None]
    index = prompt.length[:, None] + np.arange(T)  # of the response tokens in the sequence
    positions = prompt.next_position[:, None] + np.arange(T)
    padding = [(0, 0), (0, T)]
    whole = dataclasses.replace(
      prompt,
      tokens=jnp.pad(prompt.tokens, padding).at[rows, index].set(responses),
      length=prompt.length + T,
      positions=jnp.pad(prompt.positions, [*padding, (0, 0)])
      .at[rows, index]
      .set(positions[..., None]),
      feature_index=jnp.pad(prompt.feature_index, padding, constant_values=-1),
    )

    def one(sequence_and_index):
      sequence, index = sequence_and_index
      logits: Any = self.model.apply({"params": params}, jax.tree.map(lambda a: a[None], sequence))
      return jax.nn.log_softmax(logits[0, index - 1][:, self.allowed] / TEMPERATURE, axis=-1)

    log_probs = jax.lax.map(one, (whole, index))
    return log_probs.reshape(*self.tokens.shape, -1)

  def picked(self, log_probs: jax.Array) -> jax.Array:
    """Returns log π(o_t) [P, G, T] of the tokens of the responses."""
    index = np.searchsorted(self.allowed, self.tokens)
    return jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]


@pytest.fixture(scope="module")
def setup(request, tmp_path_factory) -> Setup:
  return Setup(tmp_path_factory.mktemp("hf"), request.param)


# -- The formulas ----------------------------------------------------------------------------------


def group_advantages(rewards):
  """(R − mean) / std over the samples of each prompt, for every token. arXiv 2402.03300, 4.1.2."""
  centered = rewards - rewards.mean(axis=1, keepdims=True)
  return (centered / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6))[..., None]


def surrogate(logp, old, advantages):
  """−min(r A, clip(r) A). If A < 0, the loss is at most 3 |A| (arXiv 1912.09729)."""
  ratio = jnp.exp(logp - old)
  value = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.28) * advantages)
  return -jnp.where(advantages < 0, jnp.maximum(value, 3.0 * advantages), value)


def k3(logp, other):
  """π_other / π − log(π_other / π) − 1 (arXiv 2402.03300, eq. 4)."""
  return jnp.exp(other - logp) - (other - logp) - 1


def token_mean(values, mask):
  return jnp.where(mask, values, 0).sum() / mask.sum()


def grpo(s: Setup, mask, clean):
  ref, old = (s.picked(jax.jit(s.log_probs)(policy, clean)) for policy in (s.ref, s.old))
  advantages = group_advantages(s.rewards)

  def loss(params):
    logp = s.picked(s.log_probs(params, clean))
    return token_mean(surrogate(logp, old, advantages) + 0.05 * k3(logp, ref), mask)

  return loss


def papo(s: Setup, mask, clean, full=False):
  """arXiv 2507.06448, eq. 5 and 6, with a KL to the reference.

  The scores with the original and with the masked image both have a gradient. If `full` is True,
  both KLs are sums over the whole vocabulary, else estimates from the sampled token.
  """
  ref, old = (jax.jit(s.log_probs)(policy, clean) for policy in (s.ref, s.old))
  old = s.picked(old)
  dark = s.darkened("prompt", 0.6, 2)
  advantages = group_advantages(s.rewards)

  def loss(params):
    log_probs, masked_log_probs = (s.log_probs(params, view) for view in (clean, dark))
    logp, masked_logp = s.picked(log_probs), s.picked(masked_log_probs)
    if full:
      perception_kl, ref_kl = (
        (jnp.exp(log_probs) * (log_probs - other)).sum(axis=-1) for other in (masked_log_probs, ref)
      )
    else:
      perception_kl, ref_kl = k3(logp, masked_logp), k3(logp, s.picked(ref))
    token = surrogate(logp, old, advantages) + 0.05 * ref_kl
    return token_mean(token - 0.2 * perception_kl - 0.05 * logp - 0.03 * masked_logp, mask)

  return loss


def vppo(s: Setup, mask, clean):
  """arXiv 2510.09285, eq. 4 to 8. The sampling policy gives dependency, filter and shaping."""
  log_probs, masked_log_probs = (
    np.asarray(jax.jit(s.log_probs)(s.old, view), np.float64)
    for view in (clean, s.darkened("sample", 0.5, 1))
  )
  dependency = (np.exp(log_probs) * (log_probs - masked_log_probs)).sum(axis=-1)
  keep, means = np.zeros(mask.shape, bool), np.full(mask.shape[:2], np.nan)
  for p, g in np.ndindex(*mask.shape[:2]):
    if mask[p, g].any():
      row = np.where(mask[p, g], dependency[p, g], -np.inf)
      order, count = np.argsort(-row), int(np.ceil(0.4 * mask[p, g].sum()))
      keep[p, g, order[:count]] = True
      means[p, g] = dependency[p, g][mask[p, g]].mean()
      # The choice of tokens does not depend on rounding.
      assert row[order[count - 1]] - row[order[count]] > 1e-4 * row[order[0]]
  share = (means - np.nanmin(means)) / (np.nanmax(means) - np.nanmin(means))
  most = 0.9 + (1 - 0.9) / np.nanmean(share)
  factors = np.nan_to_num(0.9 + share * (most - 0.9))
  assert np.ptp(factors[mask.any(-1)]) > 0.1
  old = s.picked(jax.jit(s.log_probs)(s.old, clean))
  advantages = (group_advantages(s.rewards) * factors[..., None]).astype(np.float32)

  def loss(params):
    logp = s.picked(s.log_probs(params, clean))
    return token_mean(keep * surrogate(logp, old, advantages) - 0.06 * logp, mask)

  return loss


PAPO = {
  "masked_gradient": True,
  "kl": "k3",
  "kl_coef": 0.05,
  "perception_kl": "k3",
  "perception_coef": 0.2,
  "entropy_penalty": 0.05,
  "masked_entropy_penalty": 0.03,
  "mask_kind": "patches",
  "mask_on": "processed",
  "mask_per": "prompt",
  "mask_rate": 0.6,
  "mask_patch": 2,
}
FORMULAS: dict[str, tuple[Callable, dict[str, Any]]] = {
  "grpo": (grpo, {"kl": "k3", "kl_coef": 0.05}),
  "papo": (papo, PAPO),
  "papo_full": (functools.partial(papo, full=True), PAPO | {"perception_kl": "full", "kl": "full"}),
  "vppo": (
    vppo,
    {
      "dependency": "full",
      "tokens": "dependency",
      "keep_share": 0.4,
      "shaping": "minibatch",
      "shaping_min": 0.9,
      "entropy_penalty": 0.06,
      "kl_coef": 0.0,
      "filter_groups": False,
      "mask_kind": "patches",
      "mask_on": "processed",
      "mask_per": "sample",
      "mask_rate": 0.5,
      "mask_patch": 1,
    },
  ),
}
CASES = [
  ("grpo", "qwen2_5_vl"),
  ("papo", "qwen2_5_vl"),
  ("papo_full", "qwen2_5_vl"),
  ("vppo", "qwen2_5_vl"),
  ("grpo", "qwen3_vl"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "setup"), CASES, indirect=["setup"], ids=[f"{a}-{b}" for a, b in CASES]
)
def test_every_parameter_has_the_gradient_of_the_formula(name, setup):
  formula, settings = FORMULAS[name]
  mask = setup.mask.copy()
  if name == "vppo":
    # Without an image, all dependencies are 0 up to rounding, so the ranking would be arbitrary.
    mask[TEXT] = False
  ours, metrics = setup.update(objectives.create(name.partition("_")[0], **CLIPS, **settings), mask)
  loss = formula(setup, mask, views.repeat_prompts(setup.prompt, G))
  value, expected = jax.jit(jax.value_and_grad(loss))(setup.params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5, atol=1e-6)
  # Some ratios are clipped, and most are not.
  assert 0 < metrics["clip_high"] + metrics["clip_low"] < 0.8

  def compare(path, ours, expected):
    largest = float(jnp.abs(expected).max())
    assert largest > 1e-6, path
    # The computation is in float32. Its sums are in another order, which gives differences of about
    # 3e-6.
    np.testing.assert_allclose(
      ours, expected, rtol=0, atol=1e-4 * largest, err_msg=jax.tree_util.keystr(path)
    )

  jax.tree.map_with_path(compare, ours, expected)

"""The gradient of a whole update, from pixels to parameters, against a slow one from the papers.

The programs score every policy and view, share each prompt among its samples, take the vocabulary
in chunks and apply the objective. The reference knows nothing of that: each sample is a sequence of
its own, prompt and response, with all its logits, and the loss is written out here.
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
RATE = 1024.0  # a power of 2, so that it costs no digit; with 1 the parameters' own digits would
TEXT = 0  # the row of the prompt that has no image
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0, "aggregation": "token-mean"}


class Setup:
  """A model, three sets of parameters, prompts, responses and their rewards."""

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
    banned = self.model.config.suppressed_tokens
    assert banned
    self.allowed = np.setdiff1d(np.arange(self.model.config.vocab_size), banned)
    self.tokens = rng.choice(self.allowed, (count, G, T)).astype(np.int32)
    self.mask = np.arange(T) < rng.integers(2, T + 1, (count, G, 1))
    self.mask[1, 1] = True
    self.rewards = rng.normal(size=(count, G)).astype(np.float32)
    self.mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])

  def _near(self, seed: int, share: float) -> Params:
    """Other parameters: each tensor some share of its own size away."""
    rng = np.random.default_rng(seed)

    def move(x):
      x = np.asarray(x)
      return jnp.asarray(x + share * x.std() * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(move, self.params)

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
    """What one real update changes, divided by its step size; and its metrics."""
    programs, batch = self.programs(objective), (self.prompt, self.tokens, mask)
    seen = {}
    if "ref" in objective.views:
      seen["ref"] = programs.score(self.ref, *batch)
    if "masked" in objective.views:
      seen["masked"] = programs.score_masked(self.old, *batch, KEY)
    advantages = objective.advantages(self.rewards, mask)
    experience = Experience(
      mask=mask,
      advantages=jnp.broadcast_to(advantages, mask.shape),
      rewards=self.rewards,
      old=programs.score(self.old, *batch),
      views=seen,
    )
    state = programs.init_state(jax.tree.map(jnp.copy, self.params))
    reference = self.ref if "ref" in objective.grad_views else None
    state, metrics = programs.update(
      state, {}, self.prompt, self.tokens, experience, KEY, reference
    )
    assert metrics["bad_steps"] == 0
    return jax.tree.map(lambda old, new: (old - new) / RATE, self.params, state.params), metrics

  def darkened(self, per: str, rate: float, block: int) -> Prompt:
    """A row for every sample, its image with the squares black that the key draws."""
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
    """log π [P, G, T, V'] at each response position, of the tokens that may be sampled.

    One sequence after another; `prompt` has a row for every sample.
    """
    responses = self.tokens.reshape(-1, T)
    rows = np.arange(len(responses))[:, None]
    at = prompt.length[:, None] + np.arange(T)  # where response tokens stand
    line = prompt.next_position[:, None] + np.arange(T)
    room = [(0, 0), (0, T)]
    whole = dataclasses.replace(
      prompt,
      tokens=jnp.pad(prompt.tokens, room).at[rows, at].set(responses),
      length=prompt.length + T,
      positions=jnp.pad(prompt.positions, [*room, (0, 0)]).at[rows, at].set(line[..., None]),
      feature_index=jnp.pad(prompt.feature_index, room, constant_values=-1),
    )

    def one(sequence_and_place):
      sequence, place = sequence_and_place
      logits: Any = self.model.apply({"params": params}, jax.tree.map(lambda a: a[None], sequence))
      return jax.nn.log_softmax(logits[0, place - 1][:, self.allowed] / TEMPERATURE, axis=-1)

    everything = jax.lax.map(one, (whole, at))
    return everything.reshape(*self.tokens.shape, -1)

  def picked(self, log_probs: jax.Array) -> jax.Array:
    """log π(o_t) [P, G, T] of the responses' tokens."""
    index = np.searchsorted(self.allowed, self.tokens)
    return jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]


@pytest.fixture(scope="module")
def setup(request, tmp_path_factory) -> Setup:
  return Setup(tmp_path_factory.mktemp("hf"), request.param)


# -- The formulas ----------------------------------------------------------------------------------


def group_advantages(rewards):
  """(R − mean) / std of the samples of each prompt, for every token. arXiv 2402.03300, 4.1.2."""
  centered = rewards - rewards.mean(axis=1, keepdims=True)
  return (centered / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6))[..., None]


def surrogate(logp, old, advantages):
  """−min(r A, clip(r) A), where A < 0 not more than 3 |A| (arXiv 1912.09729)."""
  ratio = jnp.exp(logp - old)
  value = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.28) * advantages)
  return -jnp.where(advantages < 0, jnp.maximum(value, 3.0 * advantages), value)


def k3(logp, other):
  """π_other / π − log(π_other / π) − 1, as arXiv 2402.03300, eq. 4."""
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
  """arXiv 2507.06448, eq. 5 and 6, with the reference's KL; both branches have a gradient.

  `full`: both KLs over the whole vocabulary, not estimates from the sampled token.
  """
  ref, old = (jax.jit(s.log_probs)(policy, clean) for policy in (s.ref, s.old))
  old = s.picked(old)
  dark = s.darkened("prompt", 0.6, 2)
  advantages = group_advantages(s.rewards)

  def loss(params):
    seen, unseen = (s.log_probs(params, view) for view in (clean, dark))
    logp, blind = s.picked(seen), s.picked(unseen)
    if full:
      apart, moved = ((jnp.exp(seen) * (seen - other)).sum(axis=-1) for other in (unseen, ref))
    else:
      apart, moved = k3(logp, blind), k3(logp, s.picked(ref))
    token = surrogate(logp, old, advantages) + 0.05 * moved
    return token_mean(token - 0.2 * apart - 0.05 * logp - 0.03 * blind, mask)

  return loss


def vppo(s: Setup, mask, clean):
  """arXiv 2510.09285, eq. 4 to 8: dependency, filter and shaping from the sampling policy."""
  seen, unseen = (
    np.asarray(jax.jit(s.log_probs)(s.old, view), np.float64)
    for view in (clean, s.darkened("sample", 0.5, 1))
  )
  depends = (np.exp(seen) * (seen - unseen)).sum(axis=-1)
  keep, means = np.zeros(mask.shape, bool), np.full(mask.shape[:2], np.nan)
  for p, g in np.ndindex(*mask.shape[:2]):
    if mask[p, g].any():
      row = np.where(mask[p, g], depends[p, g], -np.inf)
      order, count = np.argsort(-row), int(np.ceil(0.4 * mask[p, g].sum()))
      keep[p, g, order[:count]] = True
      means[p, g] = depends[p, g][mask[p, g]].mean()
      # Not a matter of rounding.
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
    mask[TEXT] = False  # without an image nothing depends on it, and which token is first is chance
  ours, metrics = setup.update(objectives.create(name.partition("_")[0], **CLIPS, **settings), mask)
  loss = formula(setup, mask, views.repeat_prompts(setup.prompt, G))
  value, expected = jax.jit(jax.value_and_grad(loss))(setup.params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5, atol=1e-6)
  # The setting is a real one: some ratios are cut, most are not.
  assert 0 < metrics["clip_high"] + metrics["clip_low"] < 0.8

  def compare(path, ours, expected):
    largest = float(jnp.abs(expected).max())
    assert largest > 1e-6, path
    # float32 through all layers; sums are taken in another order, which costs some 3e-6.
    np.testing.assert_allclose(
      ours, expected, rtol=0, atol=1e-4 * largest, err_msg=jax.tree_util.keystr(path)
    )

  jax.tree.map_with_path(compare, ours, expected)

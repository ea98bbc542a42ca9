"""The compiled programs of a stage. Each states where its inputs and outputs live on the mesh."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from jaxrl_vlm import parallel, scoring, views
from jaxrl_vlm.models import lora
from jaxrl_vlm.models.vlm import VLM
from jaxrl_vlm.objectives import Objective
from jaxrl_vlm.rollout import Sampling, sample_responses
from jaxrl_vlm.types import Array, Experience, Params, Prompt, TokenStats


@struct.dataclass
class TrainState:
  """What an update changes.

  Attributes:
    params, opt_state: pytrees; of the parameters that train, no others.
    bad_steps: i32 scalar; updates in a row that were skipped, for a loss or gradient that was NaN
      or infinite.
  """

  params: Params
  opt_state: Any
  bad_steps: Array


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
  """AdamW with clipping from `config.optimizer`; `steps` is the length of a decaying schedule."""
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(steps - warmup, 1)
  schedules = {
      "constant": lambda: optax.constant_schedule(peak),
      "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
      "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
  }
  if config.schedule not in schedules:
    raise ValueError(f"config.optimizer.schedule={config.schedule!r}: expected one of "
                     f"{', '.join(schedules)}")
  schedule = schedules[config.schedule]()
  if warmup:
    ramp = optax.linear_schedule(peak / warmup, peak, warmup)
    schedule = optax.join_schedules([ramp, schedule], [warmup])
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay))


class Programs:
  """rollout, score, score_masked, score_masked_kl, advantages and update of one stage on one mesh.

  Each is a `jax.jit` of a pure function. `params` and the optimizer's state lie as
  `parallel.param_shardings` says, everything with a leading axis P is split over `fsdp`.

  `update(state, frozen, ...)` takes the parameters in the two parts of `lora.split(params,
  trainable)` and gives only the first away; all others take them whole: `lora.merge` of both.
  `score_base` takes them without adapters.

  `black` and `white` are patches as the processor normalises them (`views.level_patch`): what the
  masked view is made of.
  """

  def __init__(
      self, model: VLM, mesh: Mesh, objective: Objective, optimizer: optax.GradientTransformation,
      abstract_params: Params, *, trainable: Sequence[str] = (), temperature: float = 1.0,
      microbatches: int = 1, minibatches: int = 1, sampling: Sampling | None = None,
      black: Array | None = None, white: Array | None = None):
    self.model, self.mesh, self.objective, self.optimizer = model, mesh, objective, optimizer
    self.temperature, self.microbatches, self.minibatches = temperature, microbatches, minibatches
    self.black, self.white = black, white
    kind = objective.mask_kind
    if kind in ("solid", "noise") and white is None:
      raise ValueError(f"white=None: expected a patch (views.level_patch), because "
                       f"objective.mask_kind={kind!r} needs one")

    trained, frozen = lora.split(abstract_params, trainable)
    self.abstract_state = jax.eval_shape(self._init_state, trained)
    self.state_shardings = parallel.param_shardings(mesh, self.abstract_state)
    whole, batch = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    params, frozen = (parallel.param_shardings(mesh, tree) for tree in (abstract_params, frozen))

    self.init_state = jax.jit(self._init_state, out_shardings=self.state_shardings)
    self.score = jax.jit(
        self._score, in_shardings=(params, batch, batch, batch), out_shardings=batch)
    self.score_base = jax.jit(
        self._score, in_shardings=(lora.strip(params), batch, batch, batch), out_shardings=batch)
    self.score_masked = jax.jit(
        self._score_masked, in_shardings=(params, batch, batch, batch, whole),
        out_shardings=batch)
    self.score_masked_kl = jax.jit(
        self._score_masked_kl, in_shardings=(params, batch, batch, batch, whole),
        out_shardings=batch)
    self.advantages = jax.jit(
        self._advantages, in_shardings=(batch, batch), out_shardings=batch)
    self.compare = jax.jit(
        self._compare, in_shardings=(batch, batch, batch), out_shardings=whole)
    self.update = jax.jit(
        self._update, in_shardings=(self.state_shardings, frozen, batch, batch, batch, whole),
        out_shardings=(self.state_shardings, whole), donate_argnums=0)
    if sampling is not None:
      self.rollout = make_rollout(model, mesh, sampling, params)

  def _init_state(self, params: Params) -> TrainState:
    return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

  def _score(self, params, prompt: Prompt, tokens: Array, mask: Array) -> TokenStats:
    return scoring.score_tokens(
        self.model, params, prompt, tokens, mask, temperature=self.temperature)

  def _corrupted(self, key: Array, prompt: Prompt, group: int) -> Prompt:
    """The prompts under another image, as the objective's mask_* fields say.

    A row for each prompt, or for each of the `group` samples of each prompt.
    """
    objective, vision = self.objective, self.model.config.vision
    black, white = self.black, self.white
    shape = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    kind = objective.mask_kind
    # What is not random is the same for all samples of a prompt.
    if kind in ("patches", "noise") and objective.mask_per == "sample":
      prompt = views.repeat_prompts(prompt, group)
    if kind == "patches":
      return views.black_patches(
          key, prompt, objective.mask_rate, black, block=objective.mask_patch,
          merge_size=vision.spatial_merge_size)
    if kind == "blank":
      return views.solid(prompt, 0, black, white)
    if kind == "solid":
      return views.solid(prompt, objective.mask_level, black, white)
    if kind == "noise":
      return views.noise(
          key, prompt, objective.mask_noise, black, white, shape)
    if kind == "blur":
      return views.blur(
          prompt, objective.mask_blur, shape, vision.spatial_merge_size)
    raise ValueError(f"objective.mask_kind={kind!r}: expected one of 'patches', 'blank', 'solid', "
                     "'noise', 'blur'")

  def _score_masked(self, params, prompt, tokens, mask, key) -> TokenStats:
    prompt = self._corrupted(key, prompt, tokens.shape[1])
    return self._score(params, prompt, tokens, mask)

  def _score_masked_kl(self, params, prompt, tokens, mask, key) -> Array:
    """f32[P, G, T]; `scoring.full_kl` of the clean and the masked view, 0 where masked."""
    others = self._corrupted(key, prompt, tokens.shape[1])
    clean, masked = (scoring.hidden_states(self.model, params, view, tokens)
                     for view in (prompt, others))
    kl = scoring.full_kl(self.model, params, clean, masked, self.temperature)
    return jnp.where(mask, kl, 0.0)

  def _compare(self, logp: Array, sampler_logp: Array, mask: Array) -> dict[str, Array]:
    """Mean and largest |difference| between the scorer's log-probabilities and the sampler's."""
    apart = jnp.where(mask, jnp.abs(logp - sampler_logp), 0.0)
    return {"sampler_logp_difference": apart.sum() / jnp.maximum(mask.sum(), 1),
            "sampler_logp_difference_max": apart.max()}

  def _advantages(self, rewards: Array, mask: Array) -> Array:
    return jnp.broadcast_to(self.objective.advantages(rewards, mask), mask.shape)

  def _loss(self, trained, frozen, prompt, tokens, experience: Experience, key):
    params = lora.merge(frozen, trained)
    stats = self._score(params, prompt, tokens, experience.mask)
    extra = {}
    if "masked" in self.objective.grad_views:
      extra["masked"] = self._score_masked(params, prompt, tokens, experience.mask, key)
    return self.objective.loss(stats, experience, **extra)

  def _minibatch(self, state: TrainState, frozen, batch, key
                 ) -> tuple[TrainState, dict[str, Array]]:
    prompt, tokens, experience = batch
    experience = self.objective.prepare(experience)
    metrics = self.objective.prepare_metrics(experience)
    grad = jax.value_and_grad(self._loss, has_aux=True)

    if self.microbatches == 1:
      (loss, sums), grads = grad(state.params, frozen, prompt, tokens, experience, key)
    else:
      # Strided, so that every microbatch is spread over all devices as the minibatch is.
      parts = jax.tree.map(
          lambda a: jnp.moveaxis(a.reshape(-1, self.microbatches, *a.shape[1:]), 1, 0),
          (prompt, tokens, experience))

      def one(total, part_and_key):
        part, key = part_and_key
        out = grad(state.params, frozen, *part, key)
        return jax.tree.map(jnp.add, total, out), None

      keys = jax.random.split(key, self.microbatches)
      first = jax.tree.map(lambda a: a[0], parts)
      shapes = jax.eval_shape(grad, state.params, frozen, *first, key)
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      ((loss, sums), grads), _ = jax.lax.scan(one, zeros, (parts, keys))

    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # A bad step changes nothing but the count.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, opt_state), (state.params, state.opt_state))
    state = TrainState(params, opt_state, jnp.where(good, 0, state.bad_steps + 1))
    metrics |= sums | {"loss": loss, "grad_norm": norm, "bad_steps": state.bad_steps}
    return state, metrics

  def _update(self, state: TrainState, frozen: Params, prompt: Prompt, tokens: Array,
              experience: Experience, key: Array):
    """One optimizer step for each minibatch of P / minibatches prompts."""
    batch = (prompt, tokens, experience)
    if self.minibatches == 1:
      return self._minibatch(state, frozen, batch, key)
    parts = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(-1, self.minibatches, *a.shape[1:]), 1, 0), batch)
    keys = jax.random.split(key, self.minibatches)
    state, metrics = jax.lax.scan(
        lambda s, x: self._minibatch(s, frozen, x[0], x[1]), state, (parts, keys))
    last = metrics.pop("bad_steps")[-1]
    return state, jax.tree.map(lambda a: a.mean(axis=0), metrics) | {"bad_steps": last}


@functools.lru_cache(maxsize=8)
def _rollout_cache(model, mesh, sampling, treedef, leaves):
  params = jax.tree.unflatten(treedef, leaves)
  whole, batch = parallel.replicated(mesh), parallel.batch_sharding(mesh)
  return jax.jit(
      lambda params, prompt, key: sample_responses(model, params, prompt, key, sampling),
      in_shardings=(params, batch, whole), out_shardings=batch)


def make_rollout(model: VLM, mesh: Mesh, sampling: Sampling, param_shardings: Any):
  """The compiled (params, prompt, key) -> Rollout; one program for equal arguments."""
  leaves, treedef = jax.tree.flatten(param_shardings)
  return _rollout_cache(model, mesh, sampling, treedef, tuple(leaves))  # pyright: ignore[reportArgumentType]

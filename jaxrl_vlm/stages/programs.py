"""The compiled programs of a stage. Each states where its inputs and outputs live on the mesh."""

import dataclasses
from collections.abc import Mapping, Sequence
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
from jaxrl_vlm.rollout import Sampling, make_sampler
from jaxrl_vlm.types import Array, Experience, Params, Prompt, TokenStats


@struct.dataclass
class TrainState:
  """What an update changes.

  Attributes:
    params, opt_state: pytrees; of the parameters that train, no others.
    bad_steps: i32 scalar; updates in a row that were skipped, for a loss or gradient that was NaN
      or infinite.
    objective: scalars, `objective.initial_state()` and what has become of them.
  """

  params: Params
  opt_state: Any
  bad_steps: Array
  objective: Mapping[str, Array] = struct.field(default_factory=dict)


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
  """rollout, score and its variants, advantages and update of one stage on one mesh.

  Each is a `jax.jit` of a pure function. `params` and the optimizer's state lie as
  `parallel.param_shardings` says, everything with a leading axis P is split over `fsdp`.

  `see` gives prompts their visual tokens, so that no other needs the vision tower: all may have
  such prompts but an update that trains it (`trains_vision`).

  `update(state, frozen, ...)` takes the parameters in the two parts of `lora.split(params,
  trainable)` and gives only the first away; all others take them whole: `lora.merge` of both.
  `score_base` takes them without adapters, `score_reference` takes the policy and the reference.
  The `source` of a masked view is the random key with which to draw it, or the prompts under
  images that the host has corrupted, a row for each prompt or for each sample. Every row is drawn
  with a key of its own, so that no split of the batch changes it.

  `black` and `white` are patches as the processor normalises them (`views.level_patch`): what the
  masked view is made of.
  """

  def __init__(
      self, model: VLM, mesh: Mesh, objective: Objective, optimizer: optax.GradientTransformation,
      abstract_params: Params, *, trainable: Sequence[str] = (), temperature: float = 1.0,
      microbatches: int = 1, minibatches: int = 1, sampling: Sampling | None = None,
      chunk: int = 32, groups: int = 0, black: Array | None = None, white: Array | None = None):
    self.model, self.mesh, self.objective, self.optimizer = model, mesh, objective, optimizer
    self.temperature, self.microbatches, self.minibatches = temperature, microbatches, minibatches
    self.black, self.white = black, white
    kind = objective.mask_kind
    if kind in ("solid", "noise") and white is None:
      raise ValueError(f"white=None: expected a patch (views.level_patch), because "
                       f"objective.mask_kind={kind!r} needs one")

    # Of one update the policy that sampled is the policy that is updated.
    self.scores_old = minibatches > 1 or objective.needs_old

    trained, frozen = lora.split(abstract_params, trainable)
    self.trains_vision = bool(jax.tree.leaves(trained.get("vision", {})))
    self.abstract_state = jax.eval_shape(self._init_state, trained)
    self.state_shardings = parallel.param_shardings(mesh, self.abstract_state)
    whole, batch = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    params, frozen = (parallel.param_shardings(mesh, tree) for tree in (abstract_params, frozen))

    self.init_state = jax.jit(self._init_state, out_shardings=self.state_shardings)
    self.see = jax.jit(self._see, in_shardings=(params, batch), out_shardings=batch)
    self.score = jax.jit(
        self._score, in_shardings=(params, batch, batch, batch), out_shardings=batch)
    self.score_base = jax.jit(
        self._score, in_shardings=(lora.strip(params), batch, batch, batch), out_shardings=batch)
    # None: as the argument comes, a key or prompts; a reference with or without adapters.
    self.score_masked = jax.jit(
        self._score_masked, in_shardings=(params, batch, batch, batch, None),
        out_shardings=batch)
    self.score_reference = jax.jit(
        self._score_reference, in_shardings=(params, None, batch, batch, batch),
        out_shardings=batch)
    self.advantages = jax.jit(
        self._advantages, in_shardings=(batch, batch, batch, whole), out_shardings=batch)
    self.compare = jax.jit(
        self._compare, in_shardings=(batch, batch, batch), out_shardings=whole)
    self.update = jax.jit(
        self._update,
        in_shardings=(self.state_shardings, frozen, batch, batch, batch, None, None),
        out_shardings=(self.state_shardings, whole), donate_argnums=0)
    if sampling is not None:
      self.rollout = make_sampler(
          model, mesh, sampling, params, chunk=chunk, groups=groups)
      if "baseline" in objective.advantage_needs:
        greedy = dataclasses.replace(sampling, num_samples=1, temperature=0.0)
        self.rollout_greedy = make_sampler(
            model, mesh, greedy, params, chunk=chunk, groups=groups)

  def _init_state(self, params: Params) -> TrainState:
    return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32),
                      self.objective.initial_state())

  def _see(self, params, prompt: Prompt) -> Prompt:
    return self.model.apply({"params": params}, prompt, method="see")

  def _score(self, params, prompt: Prompt, tokens: Array, mask: Array) -> TokenStats:
    return scoring.score_tokens(
        self.model, params, prompt, tokens, mask, temperature=self.temperature)

  def _corrupted(self, source: Array | Prompt, params, prompt: Prompt, group: int) -> Prompt:
    """The prompts under another image, as the objective's mask_* fields say.

    A row for each prompt, or for each of the `group` samples of each prompt.
    """
    if isinstance(source, Prompt):
      return source
    key = source.reshape(-1)
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
    if kind == "semantic":
      saliency: Any = self.model.apply(
          {"params": jax.lax.stop_gradient(params)}, prompt, method="saliency")
      return views.salient_patches(
          prompt, saliency, objective.mask_rate, black, block=objective.mask_patch,
          merge_size=vision.spatial_merge_size)
    if kind == "blank":
      return views.solid(prompt, 0, black, white)
    if kind == "solid":
      return views.solid(prompt, objective.mask_level, black, white)
    if kind == "noise":
      return views.noise(key, prompt, objective.mask_noise, black, white, shape)
    assert kind == "blur", kind
    return views.blur(prompt, objective.mask_blur, shape, vision.spatial_merge_size)

  def _view(self, name: str, params: Params, hidden: Array | None, prompt: Prompt,
            other_params: Params, other_prompt: Prompt, tokens: Array, mask: Array) -> TokenStats:
    """Stats of `other_params` on `other_prompt`, 0 where masked.

    With the divergence of `params` on `prompt` from them, if the objective wants it of this view;
    `hidden` are those hidden states, if they are there already.
    """
    other = scoring.hidden_states(self.model, other_params, other_prompt, tokens)
    stats = scoring.token_stats(
        self.model, other_params, other, tokens, temperature=self.temperature)
    if name in self.objective.full_kl:
      if hidden is None:
        hidden = scoring.hidden_states(self.model, params, prompt, tokens)
      kl = scoring.full_kl(
          self.model, params, hidden, other_params, other, self.temperature)
      stats = dataclasses.replace(stats, kl=kl)
    return jax.tree.map(lambda x: jnp.where(mask, x, 0.0), stats)

  def _row_sources(self, source: Array | Prompt, prompts: int, group: int) -> Array | Prompt:
    """Of a key: keys [P] or [P, G], for every row of the masked view."""
    if isinstance(source, Prompt):
      return source
    each = self.objective.mask_per == "sample"
    return jax.random.split(source, (prompts, group) if each else prompts)

  def _score_masked(self, params, prompt, tokens, mask, source) -> TokenStats:
    source = self._row_sources(source, *tokens.shape[:2])
    other = self._corrupted(source, params, prompt, tokens.shape[1])
    return self._view("masked", params, None, prompt, params, other, tokens, mask)

  def _score_reference(self, params, reference, prompt, tokens, mask) -> TokenStats:
    return self._view("ref", params, None, prompt, reference, prompt, tokens, mask)

  def _compare(self, logp: Array, sampler_logp: Array, mask: Array) -> dict[str, Array]:
    """Mean and largest |difference| between the scorer's log-probabilities and the sampler's."""
    apart = jnp.where(mask, jnp.abs(logp - sampler_logp), 0.0)
    return {"sampler_logp_difference": apart.sum() / jnp.maximum(mask.sum(), 1),
            "sampler_logp_difference_max": apart.max()}

  def _advantages(self, rewards: Array, mask: Array, more: Mapping[str, Any],
                  state: Mapping[str, Array]) -> Array:
    """f32[P, G, T]; `more`: what `objective.advantage_needs` names.

    Instead of `penalty` it holds the TokenStats it is made of, `old` and `ref`; `state` is the
    objective's.
    """
    more = dict(more)
    if "penalty" in self.objective.advantage_needs:
      more["penalty"] = self.objective.penalty(more.pop("old"), more.pop("ref"), mask, state)
    return jnp.broadcast_to(self.objective.advantages(rewards, mask, **more), mask.shape)

  def _loss(self, trained, frozen, prompt, tokens, experience: Experience, source, reference):
    params, mask = lora.merge(frozen, trained), experience.mask
    hidden = scoring.hidden_states(self.model, params, prompt, tokens)
    stats = scoring.token_stats(self.model, params, hidden, tokens, temperature=self.temperature)
    stats = jax.tree.map(lambda x: jnp.where(mask, x, 0.0), stats)
    sums, peaks = {}, {}
    if experience.old is None:
      experience = dataclasses.replace(experience, old=jax.lax.stop_gradient(stats))
      if experience.sampler_logp is not None:
        apart = self._compare(experience.old.logp, experience.sampler_logp, mask)
        mean, peaks = apart.pop("sampler_logp_difference"), apart
        share = jnp.where(mask, experience.token_weights, 0.0).sum()
        sums = {"sampler_logp_difference": mean * share}
    views = {}
    for name in self.objective.grad_views:
      if name == "masked":
        other_params = params
        other_prompt = self._corrupted(source, params, prompt, tokens.shape[1])
      else:
        other_params, other_prompt = reference, prompt
      views[name] = self._view(
          name, params, hidden, prompt, other_params, other_prompt, tokens, mask)
    value, more = self.objective.loss(stats, experience, **views)
    return value, jax.lax.stop_gradient((sums | more, peaks))

  def _minibatch(self, state: TrainState, frozen, batch, reference
                 ) -> tuple[TrainState, dict[str, Array]]:
    prompt, tokens, experience, source = batch
    count = self.microbatches
    if count > 1 and self.objective.needs_current:
      experience = dataclasses.replace(
          experience, current=self._current(state, frozen, prompt, tokens, experience.mask))
    experience = self.objective.prepare(dataclasses.replace(experience, state=state.objective))
    metrics = self.objective.prepare_metrics(experience)

    def loss(trained, prompt, tokens, experience, source):
      experience = dataclasses.replace(experience, state=state.objective)
      return self._loss(trained, frozen, prompt, tokens, experience, source, reference)

    grad = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
      (value, (sums, peaks)), grads = grad(state.params, prompt, tokens, experience, source)
    else:
      parts = _split((prompt, tokens, dataclasses.replace(experience, state={}), source), count,
                     tokens.shape[0])

      def one(total, part):
        (value, (sums, peaks)), grads = grad(state.params, *part)
        (total_value, (total_sums, total_peaks)), total_grads = total
        added = jax.tree.map(
            jnp.add, (total_value, total_sums, total_grads), (value, sums, grads))
        peaks = jax.tree.map(jnp.maximum, total_peaks, peaks)
        return ((added[0], (added[1], peaks)), added[2]), None

      first = jax.tree.map(lambda a: a[0], parts)
      shapes = jax.eval_shape(grad, state.params, *first)
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      ((value, (sums, peaks)), grads), _ = jax.lax.scan(one, zeros, parts)

    norm = optax.tree.norm(grads)
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    numbers = self.objective.next_state(experience, metrics | sums)
    # A bad step changes nothing but the count.
    params, opt_state, numbers = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, opt_state, numbers), (state.params, state.opt_state, dict(state.objective)))
    state = TrainState(params, opt_state, jnp.where(good, 0, state.bad_steps + 1), numbers)
    metrics |= sums | peaks | {"loss": value, "grad_norm": norm, "bad_steps": state.bad_steps}
    return state, metrics

  def _current(self, state: TrainState, frozen, prompt, tokens, mask) -> TokenStats:
    """Stats of the policy that is being updated, [P, G, T], a microbatch at a time."""
    params = lora.merge(frozen, state.params)
    parts = _split((prompt, tokens, mask), self.microbatches, tokens.shape[0])
    stats = jax.lax.map(lambda part: self._score(params, *part), parts)
    return jax.tree.map(
        lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:]), stats)

  def _update(self, state: TrainState, frozen: Params, prompt: Prompt, tokens: Array,
              experience: Experience, source: Array | Prompt, reference: Params = None):
    """One optimizer step for each minibatch of P / minibatches prompts.

    `reference`: all its parameters, if the objective wants its gradient view, else None.
    """
    batch = (prompt, tokens, experience, self._row_sources(source, *tokens.shape[:2]))
    if self.minibatches == 1:
      return self._minibatch(state, frozen, batch, reference)
    state, metrics = jax.lax.scan(
        lambda state, part: self._minibatch(state, frozen, part, reference), state,
        _split(batch, self.minibatches, tokens.shape[0]))
    last = metrics.pop("bad_steps")[-1]
    return state, jax.tree.map(lambda a: a.mean(axis=0), metrics) | {"bad_steps": last}


def _split(tree: Any, count: int, prompts: int) -> Any:
  """[P·r, ...] -> [count, P·r / count, ...] of every leaf, r rows of a prompt staying together.

  Strided over prompts, so that every part is spread over all devices as the whole is.
  """
  def one(a):
    rows = a.shape[0] // prompts
    a = jnp.moveaxis(a.reshape(prompts // count, count, rows, *a.shape[1:]), 1, 0)
    return a.reshape(count, -1, *a.shape[3:])

  return jax.tree.map(one, tree)

"""The compiled programs of a stage. Each states where its inputs and outputs live on the mesh."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxrl_vlm import memory, parallel, scoring, views
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.models import attention, lora
from jaxrl_vlm.models.decoder import Blocks, Prefix
from jaxrl_vlm.models.vlm import VLM
from jaxrl_vlm.objectives import Objective
from jaxrl_vlm.objectives.base import minibatch_weights
from jaxrl_vlm.packing import Packer, balanced, block_shape
from jaxrl_vlm.rollout import Sampling, make_sampler
from jaxrl_vlm.types import Array, Experience, Params, Prompt, TokenStats

_PARTS, _LEAST_PART = 16, 512  # of a full batch; tokens


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


@struct.dataclass
class Packing:
  """Which tokens of the responses pass through the model together, see `packing.Packer`.

  Attributes:
    index: i32[pieces, parts, R, N].
    used: i32[pieces].
    size: tokens of a block.
    tile: blocks of one prompt that stand together.
    order: i32[P]; how prompts are dealt to devices and pieces (`packing.balanced`); None: they are
      not.
  """

  index: Array
  used: Array
  size: int = struct.field(pytree_node=False)
  tile: int = struct.field(pytree_node=False, default=1)
  order: Array | None = None

  def blocks(self, index: Array) -> Blocks:
    return Blocks(index, self.size, self.tile)


class Program:
  """A jitted function of which the last argument may be left out: None."""

  def __init__(self, function: Callable, in_shardings: tuple, out_shardings: Any, **options):
    self._count = len(in_shardings)
    self._jitted = jax.jit(
      function, in_shardings=in_shardings, out_shardings=out_shardings, **options
    )

  def __call__(self, *args):
    return self._jitted(*self._all(args))

  def lower(self, *args):
    return self._jitted.lower(*self._all(args))

  def _all(self, args):
    return (*args, None) if len(args) == self._count - 1 else args


class Programs:
  """rollout, score and its variants, advantages and update of one stage on one mesh.

  Each is a `jax.jit` of a pure function. `params` and the optimizer's state lie as
  `parallel.param_shardings` says, everything with a leading axis P as
  `parallel.batch_sharding` says.

  `see` gives prompts their visual tokens, so that no other needs the vision tower: all may have
  such prompts but an update that trains it (`trains_vision`).

  `update(state, frozen, ...)` takes the parameters in the two parts of `lora.split(params,
  trainable)` and gives only the first away; all others take them whole: `lora.merge` of both.
  `score_base` takes them without adapters, `score_reference` takes the policy and the reference.
  The `source` of a masked view is the random key with which to draw it, or the prompts under
  images that the host has corrupted, a row for each prompt or for each sample. Every row is drawn
  with a key of its own, so that no split of the batch changes it.

  The last argument of all scores and of update is a `Packing` (`pack`): padding is left out, and
  `part_tokens` of the responses pass through the model at a time. None: all of them, padding too.

  `rollout`: further arguments of the `Sampler`. `capacity`: bytes of a device that may be used, 0
  if that is not known; `room` is what weights and optimizer leave of it. With `state_on_host` the
  optimizer's state lies in the hosts' memory.

  `fields` is what stands before the names of the stage's fields in errors.

  `black` and `white` are patches as the processor normalises them (`views.level_patch`): what the
  masked view is made of.
  """

  def __init__(
    self,
    model: VLM,
    mesh: Mesh,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    abstract_params: Params,
    *,
    trainable: Sequence[str] = (),
    temperature: float = 1.0,
    microbatches: int = 1,
    minibatches: int = 1,
    sampling: Sampling | None = None,
    rollout: Mapping[str, Any] | None = None,
    part_tokens: int = 4096,
    capacity: float = 0,
    state_on_host: bool = False,
    fields: str = "",
    black: Array | None = None,
    white: Array | None = None,
  ):
    self.model, self.mesh = model.on(mesh), mesh
    rules = model.config.rules
    self.objective, self.optimizer = objective, optimizer
    self.temperature, self.microbatches, self.minibatches = temperature, microbatches, minibatches
    self.part_tokens, self.fields = part_tokens, fields
    self.black, self.white = black, white
    kind = objective.mask_kind
    if kind in ("solid", "noise") and white is None:
      raise ValueError(
        f"white=None: expected a patch (views.level_patch), because "
        f"objective.mask_kind={kind!r} needs one"
      )

    # Of one update the policy that sampled is the policy that is updated.
    self.scores_old = minibatches > 1 or objective.needs_old

    trained, frozen = lora.split(abstract_params, trainable)
    self.trains_vision = bool(jax.tree.leaves(trained.get("vision", {})))
    state = jax.eval_shape(self._init_state, trained)
    homes: Any = parallel.param_shardings(mesh, state, rules)
    self._on_host, self._on_device = state_on_host, homes.opt_state
    if state_on_host:
      homes = dataclasses.replace(
        homes,
        opt_state=jax.tree.map(
          lambda x, place: place.with_memory_kind("pinned_host") if x.ndim else place,
          state.opt_state,
          homes.opt_state,
        ),
      )
    self.state_shardings = homes
    self.abstract_state = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, homes
    )
    whole, batch = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    params, frozen, places = (
      parallel.param_shardings(mesh, tree, rules) for tree in (abstract_params, frozen, trained)
    )

    self.held = memory.held(self.abstract_state, self.state_shardings) + memory.held(
      lora.split(abstract_params, trainable)[1], frozen
    )
    if "ref" in (*objective.views, *objective.grad_views):
      self.held += memory.held(trained, places)
    self.gradient = memory.held(trained, places)
    # Something to divide, even where the weights alone are too much.
    self.room = max(capacity - self.held, 1.0) if capacity else 0
    self._checked: set[tuple[int, ...]] = set()

    self.init_state = jax.jit(self._init_state, out_shardings=self.state_shardings)
    self.see = jax.jit(self._see, in_shardings=(params, batch), out_shardings=batch)
    # None: as it comes; a key or prompts, a reference with or without adapters, a packing.
    self.score = Program(self._score, (params, batch, batch, batch, None), batch)
    self.score_base = Program(self._score, (lora.strip(params), batch, batch, batch, None), batch)
    self.score_masked = Program(
      self._score_masked, (params, batch, batch, batch, None, None), batch
    )
    self.score_reference = Program(
      self._score_reference, (params, None, batch, batch, batch, None), batch
    )
    self.advantages = jax.jit(
      self._advantages, in_shardings=(batch, batch, batch, whole), out_shardings=batch
    )
    self.compare = jax.jit(self._compare, in_shardings=(batch, batch, batch), out_shardings=whole)
    self.update = Program(
      self._update,
      (self.state_shardings, frozen, batch, batch, batch, None, None, None),
      (self.state_shardings, whole),
      donate_argnums=0,
    )
    if sampling is not None:
      rollout = {**(rollout or {}), "room": self.room, "samples_field": f"{fields}num_samples"}
      self.rollout = make_sampler(model, mesh, sampling, params, **rollout)
      if "baseline" in objective.advantage_needs:
        greedy = dataclasses.replace(sampling, num_samples=1, temperature=0.0)
        self.rollout_greedy = make_sampler(model, mesh, greedy, params, **rollout)

  def update_bytes(
    self, prompts: int, length: int, patches: int, group: int, tokens: int, microbatches: int = 0
  ) -> float:
    """What scores and update of P prompts need on each device beside weights and optimizer."""
    count, objective = microbatches or self.microbatches, self.objective
    devices = parallel.rows(self.mesh)
    here = prompts // (self.minibatches * count * devices)
    model = memory.Model(self.model.config, self.mesh.shape["tensor"])
    part = self.part_of(tokens, here * group)

    def rows(view):
      return group if view == "masked" and objective.mask_per == "sample" else 1

    need = memory.update(
      model,
      length,
      patches,
      here,
      group,
      tokens,
      part,
      self.gradient,
      self.trains_vision,
      (1, *map(rows, objective.grad_views)),
    )
    if self._on_host:  # the optimizer's state comes and goes when there is nothing else
      moments = memory.held(self.abstract_state.opt_state, self._on_device)
      need = max(need, self.gradient + moments)  # XLA takes a parameter after the other
    scores = [
      memory.score(model, length, here, rows(view), tokens, part) for view in objective.views
    ]
    given = memory.prompts(model, patches, prompts // devices)
    if objective.mask_on == "original":  # the host's
      given *= 1 + sum(map(rows, {"masked"} & {*objective.views, *objective.grad_views}))
    working = max(need, memory.see(model, patches, here), *scores)
    if devices == 1:
      return given + working
    # What is dealt is there, is taken and passes in two buffers (`parallel.reordered`); then it is
    # there twice.
    return max(4 * given, 2 * given + working)

  def part_of(self, tokens: int, responses: int) -> int:
    """Response tokens that pass through the model together on each device.

    Where a batch is small, so are its parts: the last one is half empty on average.
    """
    return max(tokens, min(self.part_tokens, max(_LEAST_PART, responses * tokens // _PARTS)))

  def check_update(self, prompts: int, length: int, patches: int, group: int, tokens: int) -> None:
    """Before an update of these sizes is compiled.

    Raises:
      UserError: it cannot fit into the memory of a device; names what would.
    """
    sizes = prompts, length, patches, group, tokens
    if not self.room or sizes in self._checked:
      return
    need = self.update_bytes(*sizes)
    if need > self.room:
      most = prompts // self.minibatches // parallel.rows(self.mesh)
      fits = [
        n for n in range(1, most + 1) if most % n == 0 and self.update_bytes(*sizes, n) <= self.room
      ]
      remat = self.model.config.remat
      advice = (
        f"microbatches={fits[0]} fits"
        if fits
        else "no number of microbatches fits: use more devices, "
        + ("" if remat == "full" else "config.model.remat='full', ")
        + f"{self.fields}optimizer.moments='host', smaller config.prompt_buckets or "
        f"{self.fields}part_tokens, or train adapters (config.model.lora)"
      )
      raise UserError(
        f"{self.fields}microbatches={self.microbatches}: an update with prompts of "
        f"{length} tokens and {patches} patches needs {need / memory.GIB:.1f} GiB on a device "
        f"beside weights and optimizer ({self.held / memory.GIB:.1f}), "
        f"{self.room / memory.GIB:.1f} are free; {advice}"
      )
    self._checked.add(sizes)

  def pack(self, mask: np.ndarray) -> Packing:
    """Which tokens of a batch pass through the model together; mask: bool[P, G, T] on the host."""
    packing, whole = self.packed(mask), parallel.replicated(self.mesh)
    by_device = NamedSharding(self.mesh, Spec(None, None, parallel.ROWS))
    return parallel.put(
      packing,
      dataclasses.replace(
        packing, index=by_device, used=whole, order=None if packing.order is None else whole
      ),
    )

  def packed(self, mask: np.ndarray) -> Packing:
    """`pack` as arrays on the host."""
    p, g, t = mask.shape
    splits, devices = self.minibatches * self.microbatches, parallel.rows(self.mesh)
    here = p // splits // devices * g
    room = self.part_of(t, here)
    size, tile = block_shape(t, attention.answers(self.model.config, room))
    each = -(-t // size)
    room = -(-max(room // size, each) // tile) * tile
    packer = Packer(splits, devices, size, min(room, here * -(-each // tile) * tile), tile)
    # Behind the last token that counts nothing does.
    lengths = np.where(mask, np.arange(1, t + 1), 0).max(axis=-1)
    order = None
    if devices > 1:
      # Within each slice: between them there is only a slow network.
      slices = self.mesh.shape["slice"]
      loads = lengths.sum(axis=1).reshape(slices, -1)
      order = np.concatenate(
        [
          i * p // slices + balanced(load, devices // slices, self.microbatches, self.minibatches)
          for i, load in enumerate(loads)
        ]
      ).astype(np.int32)
      lengths = lengths[order]
    return Packing(*packer(lengths, t), size, tile, order)

  def _ordered(self, packing: Packing | None, tree: Any, back: bool = False) -> Any:
    """Rows of P prompts in the packing's order, or back in that of the batch."""
    if packing is None or packing.order is None:
      return tree
    return parallel.reordered(
      self.mesh, tree, jnp.argsort(packing.order) if back else packing.order
    )

  def _init_state(self, params: Params) -> TrainState:
    return TrainState(
      params, self.optimizer.init(params), jnp.zeros((), jnp.int32), self.objective.initial_state()
    )

  def _see(self, params, prompt: Prompt) -> Prompt:
    def piece(prompt):
      seen: Any = self.model.apply({"params": params}, prompt, method="see")
      return seen.features

    count = self.minibatches * self.microbatches
    if count == 1 or prompt.features is not None or not prompt.patches.shape[1]:
      return dataclasses.replace(prompt, features=piece(prompt))
    pieces = jax.lax.map(piece, _split(prompt, count, prompt.tokens.shape[0]))
    return dataclasses.replace(prompt, features=_joined(pieces))

  def _score(
    self, params, prompt: Prompt, tokens: Array, mask: Array, packing: Packing | None = None
  ) -> TokenStats:
    prompt, tokens, mask = self._ordered(packing, (prompt, tokens, mask))
    stats = self._scored("", {"": (params, prompt)}, tokens, mask, packing)
    return self._ordered(packing, stats, back=True)

  def _scored(
    self,
    name: str,
    sides: Mapping[str, tuple[Params, Prompt]],
    tokens: Array,
    mask: Array,
    packing: Packing | None,
    pieces: int = 1,
    source: Array | Prompt | None = None,
  ) -> TokenStats:
    """Stats of one of the sides, one piece of the batch after another.

    With a `source` the side "masked" is that of the corrupted prompts.
    """
    params = {key: side[0] for key, side in sides.items()}

    def piece(prompts, source, tokens, mask, *packed):
      given = {key: (params[key], prompt) for key, prompt in prompts.items()}
      if source is not None:
        clean = given["masked"]
        given["masked"] = clean[0], self._corrupted(source, *clean, tokens.shape[1])
      prefixes = {
        key: self._read(*side, side[1].tokens.shape[0] // tokens.shape[0])
        for key, side in given.items()
      }
      if packing is None:
        return self._stats(given, prefixes, tokens, mask, None)[name]
      (index, used), blocks = packed, packing.blocks

      def part(i, so_far):
        stats = self._stats(given, prefixes, tokens, mask, blocks(index[i]))[name]
        return jax.tree.map(jnp.add, so_far, stats)  # 0 outside of its blocks

      zeros = jnp.zeros(tokens.shape, jnp.float32)
      kl = zeros if name in self.objective.full_kl else None
      return jax.lax.fori_loop(0, used, part, TokenStats(zeros, zeros, kl))

    batch = {key: side[1] for key, side in sides.items()}, source, tokens, mask
    if packing is None and pieces == 1:
      return piece(*batch)
    count = pieces if packing is None else len(packing.used)
    parts = _split(batch, count, tokens.shape[0])
    if packing is not None:
      parts = (*parts, packing.index, packing.used)
    stats = jax.lax.map(lambda part: piece(*part), parts)
    return _joined(stats)

  def _read(self, params: Params, prompt: Prompt, rows: int = 1) -> Prefix:
    """The prefixes of prompts; where each has several `rows`, one of each at a time."""

    def read(prompt):
      prefix: Any = self.model.apply({"params": params}, prompt, method="prefill")
      return prefix[1]

    if rows == 1:
      return read(prompt)
    each = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, rows, *a.shape[1:]), 1, 0), prompt)
    prefixes = jax.lax.map(read, each)  # k, v: [rows, L, P, ...]
    k, v = (
      jnp.moveaxis(a, 0, 2).reshape(a.shape[1], -1, *a.shape[3:]) for a in (prefixes.k, prefixes.v)
    )
    return Prefix(k, v, prefixes.length.T.reshape(-1))

  def _stats(
    self,
    sides: Mapping[str, tuple[Params, Prompt]],
    prefixes: Mapping[str, Prefix],
    tokens: Array,
    mask: Array,
    blocks: Blocks | None,
  ) -> dict[str, TokenStats]:
    """Stats of responses tokens [P, G, T] by name, 0 where masked or not in `blocks`.

    `sides`: parameters and prompts, "" the policy. Those that the objective's `full_kl` names come
    with the divergence of the policy from them.
    """
    given, chunks = tokens, {}
    if blocks is not None:
      given, chunks = blocks.take(tokens), {"chunk": max(1, 512 // blocks.size), "axis": 1}
    hidden: dict[str, Any] = {
      name: self.model.apply(
        {"params": params}, prompt, prefixes[name], tokens, blocks, method="respond"
      )
      for name, (params, prompt) in sides.items()
    }
    stats = {}
    for name, (params, _) in sides.items():
      values = scoring.token_stats(
        self.model, params, hidden[name], given, temperature=self.temperature, **chunks
      )
      if name in self.objective.full_kl:
        values = dataclasses.replace(
          values,
          kl=scoring.full_kl(
            self.model, sides[""][0], hidden[""], params, hidden[name], self.temperature, **chunks
          ),
        )
      if blocks is not None:
        values = jax.tree.map(lambda a: blocks.put(a, jnp.zeros(tokens.shape, a.dtype)), values)
      stats[name] = jax.tree.map(lambda x: jnp.where(mask, x, 0.0), values)
    return stats

  def _corrupted(self, source: Array | Prompt, params, prompt: Prompt, group: int) -> Prompt:
    """The prompts under another image, as the objective's mask_* fields say.

    A row for each prompt, or for each of the `group` samples of each prompt.
    """
    if isinstance(source, Prompt):
      return source
    masked = self._masked(
      source.reshape(-1),
      params,
      dataclasses.replace(prompt, patches=prompt.patches.astype(jnp.float32)),
      group,
    )
    return dataclasses.replace(masked, patches=masked.patches.astype(prompt.patches.dtype))

  def _masked(self, key: Array, params, prompt: Prompt, group: int) -> Prompt:
    objective, vision = self.objective, self.model.config.vision
    black, white = self.black, self.white
    shape = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    kind = objective.mask_kind
    # What is not random is the same for all samples of a prompt.
    if kind in ("patches", "noise") and objective.mask_per == "sample":
      prompt = views.repeat_prompts(prompt, group)
    if kind == "patches":
      return views.black_patches(
        key,
        prompt,
        objective.mask_rate,
        black,
        block=objective.mask_patch,
        merge_size=vision.spatial_merge_size,
      )
    if kind == "semantic":
      saliency: Any = self.model.apply(
        {"params": jax.lax.stop_gradient(params)}, prompt, method="saliency"
      )
      return views.salient_patches(
        prompt,
        saliency,
        objective.mask_rate,
        black,
        block=objective.mask_patch,
        merge_size=vision.spatial_merge_size,
      )
    if kind == "blank":
      return views.solid(prompt, 0, black, white)
    if kind == "solid":
      return views.solid(prompt, objective.mask_level, black, white)
    if kind == "noise":
      return views.noise(key, prompt, objective.mask_noise, black, white, shape)
    assert kind == "blur", kind
    return views.blur(prompt, objective.mask_blur, shape, vision.spatial_merge_size)

  def _with_source(self, packing: Packing | None, batch: tuple, source: Array | Prompt) -> tuple:
    """A batch (prompt, tokens, ...) in the packing's order, and what masks each of its rows.

    Of a key that is keys [P] or [P, G].
    """
    prompts, group = batch[1].shape[:2]
    if isinstance(source, Prompt):
      rows = jax.tree.map(lambda a: a.reshape(prompts, -1, *a.shape[1:]), source)
      *ordered, rows = self._ordered(packing, (*batch, rows))
      return *ordered, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), rows)
    each = self.objective.mask_per == "sample"
    keys = jax.random.split(source, (prompts, group) if each else (prompts,))
    if packing is not None and packing.order is not None:
      keys = keys[packing.order]
    return *self._ordered(packing, batch), keys

  def _score_masked(self, params, prompt, tokens, mask, source, packing=None) -> TokenStats:
    prompt, tokens, mask, source = self._with_source(packing, (prompt, tokens, mask), source)
    sides = {"masked": (params, prompt)}
    if "masked" in self.objective.full_kl:
      sides[""] = params, prompt
    stats = self._scored("masked", sides, tokens, mask, packing, source=source)
    return self._ordered(packing, stats, back=True)

  def _score_reference(self, params, reference, prompt, tokens, mask, packing=None) -> TokenStats:
    prompt, tokens, mask = self._ordered(packing, (prompt, tokens, mask))
    sides = {"": (params, prompt), "ref": (reference, prompt)}
    stats = self._scored("ref", sides, tokens, mask, packing)
    return self._ordered(packing, stats, back=True)

  def _compare(self, logp: Array, sampler_logp: Array, mask: Array) -> dict[str, Array]:
    """Mean and largest |difference| between the scorer's log-probabilities and the sampler's."""
    apart = jnp.where(mask, jnp.abs(logp - sampler_logp), 0.0)
    return {
      "sampler_logp_difference": apart.sum() / jnp.maximum(mask.sum(), 1),
      "sampler_logp_difference_max": apart.max(),
    }

  def _advantages(
    self, rewards: Array, mask: Array, more: Mapping[str, Any], state: Mapping[str, Array]
  ) -> Array:
    """f32[P, G, T]; `more`: what `objective.advantage_needs` names.

    Instead of `penalty` it holds the TokenStats it is made of, `old` and `ref`; `state` is the
    objective's.
    """
    more = dict(more)
    if "penalty" in self.objective.advantage_needs:
      more["penalty"] = self.objective.penalty(more.pop("old"), more.pop("ref"), mask, state)
    return jnp.broadcast_to(self.objective.advantages(rewards, mask, **more), mask.shape)

  def _grad(
    self,
    trained,
    frozen,
    prompt,
    tokens,
    experience: Experience,
    source,
    reference,
    packed: tuple[Array, Array] | None,
    packing: Packing | None,
    total: Any = None,
  ):
    """((loss, (sums, peaks)), gradient) of a microbatch: prompts once, responses part by part.

    All is added to `total` as it comes: there are never more than two gradients. None: nothing.
    """
    params = lora.merge(frozen, trained)
    prompts = {"": prompt}
    for name in self.objective.grad_views:
      prompts[name] = prompt
      if name == "masked":
        prompts[name] = self._corrupted(source, params, prompt, tokens.shape[1])

    def sides(trained):
      params = lora.merge(frozen, trained)
      return {
        name: (reference if name == "ref" else params, given) for name, given in prompts.items()
      }

    def read(trained):  # keys and values: what has a gradient
      prefixes = {name: self._read(*side) for name, side in sides(trained).items()}
      return {name: (prefix.k, prefix.v) for name, prefix in prefixes.items()}

    def loss(trained, kv, blocks):
      prefixes = {
        name: Prefix(*kv[name], length=given.length - 1) for name, given in prompts.items()
      }
      here = experience
      if blocks is not None:
        here = _within(experience, blocks.holds(experience.mask.shape))
      stats = self._stats(sides(trained), prefixes, tokens, here.mask, blocks)
      return self._loss(stats.pop(""), here, stats)

    if packed is None or packing is None:
      return _added(
        total,
        jax.value_and_grad(lambda trained: loss(trained, read(trained), None), has_aux=True)(
          trained
        ),
      )
    index, used = packed
    kv, pull = jax.vjp(read, trained)
    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def part(i, so_far):
      total, total_kv = so_far
      value, (grads, of_kv) = grad(trained, kv, packing.blocks(index[i]))
      return _added(total, (value, grads)), jax.tree.map(jnp.add, total_kv, of_kv)

    if total is None:
      value, (grads, _) = jax.eval_shape(grad, trained, kv, packing.blocks(index[0]))
      total = _zeros((value, grads))
    # Many parts add up: not in bfloat16.
    zeros = _zeros(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), kv))
    total, of_kv = jax.lax.fori_loop(0, used, part, (total, zeros))
    of_kv = jax.tree.map(lambda a, like: a.astype(like.dtype), of_kv, kv)
    value, grads = total
    return value, jax.tree.map(jnp.add, grads, pull(of_kv)[0])

  def _loss(self, stats: TokenStats, experience: Experience, views: Mapping[str, TokenStats]):
    """The objective's loss, and its metrics: those that add up, and those that are maxima."""
    sums, peaks = {}, {}
    if experience.old is None:
      experience = dataclasses.replace(experience, old=jax.lax.stop_gradient(stats))
      if experience.sampler_logp is not None:
        apart = self._compare(experience.old.logp, experience.sampler_logp, experience.mask)
        mean, peaks = apart.pop("sampler_logp_difference"), apart
        _, means = minibatch_weights(experience)
        share = jnp.where(experience.mask, means, 0.0).sum()
        sums = {"sampler_logp_difference": mean * share}
    value, more = self.objective.loss(stats, experience, **views)
    return value, jax.lax.stop_gradient((sums | more, peaks))

  def _minibatch(
    self, state: TrainState, frozen, batch, reference
  ) -> tuple[TrainState, dict[str, Array]]:
    prompt, tokens, experience, source, packing = batch
    count = self.microbatches
    if (count > 1 or packing is not None) and self.objective.needs_current:
      sides = {"": (lora.merge(frozen, state.params), prompt)}
      experience = dataclasses.replace(
        experience, current=self._scored("", sides, tokens, experience.mask, packing, count)
      )
    experience = self.objective.prepare(dataclasses.replace(experience, state=state.objective))
    metrics = self.objective.prepare_metrics(experience)

    def grad(total, prompt, tokens, experience, source, *packed):
      experience = dataclasses.replace(experience, state=state.objective)
      return self._grad(
        state.params,
        frozen,
        prompt,
        tokens,
        experience,
        source,
        reference,
        packed or None,
        packing,
        total,
      )

    parts = _split(
      (prompt, tokens, dataclasses.replace(experience, state={}), source), count, tokens.shape[0]
    )
    if packing is not None:
      parts = (*parts, packing.index, packing.used)
    first = jax.tree.map(lambda a: a[0], parts)
    if count == 1:
      total = grad(None, *first)
    else:
      zeros = _zeros(jax.eval_shape(grad, None, *first))
      total, _ = jax.lax.scan(lambda total, part: (grad(total, *part), None), zeros, parts)
    (value, (sums, peaks)), grads = total

    norm = optax.tree.norm(grads)
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    old_state = state.opt_state
    if self._on_host:  # once there is nothing on the device but the gradient
      grads, old_state = jax.lax.optimization_barrier((grads, old_state))
      old_state = jax.device_put(old_state, self._on_device)
    updates, opt_state = self.optimizer.update(grads, old_state, state.params)
    params = optax.apply_updates(state.params, updates)
    numbers = self.objective.next_state(experience, metrics | sums)
    # A bad step changes nothing but the count.
    params, opt_state, numbers = jax.tree.map(
      lambda new, old: jnp.where(good, new, old),
      (params, opt_state, numbers),
      (state.params, old_state, dict(state.objective)),
    )
    if self._on_host:
      opt_state = jax.device_put(opt_state, self.state_shardings.opt_state)
    state = TrainState(params, opt_state, jnp.where(good, 0, state.bad_steps + 1), numbers)
    metrics |= sums | peaks | {"loss": value, "grad_norm": norm, "bad_steps": state.bad_steps}
    return state, metrics

  def _update(
    self,
    state: TrainState,
    frozen: Params,
    prompt: Prompt,
    tokens: Array,
    experience: Experience,
    source: Array | Prompt,
    reference: Params = None,
    packing: Packing | None = None,
  ):
    """One optimizer step for each minibatch of P / minibatches prompts.

    `reference`: all its parameters, if the objective wants its gradient view, else None.
    """
    batch = self._with_source(packing, (prompt, tokens, experience), source)
    if packing is not None:
      packing = dataclasses.replace(packing, order=None)
    if self.minibatches == 1:
      return self._minibatch(state, frozen, (*batch, packing), reference)
    # Piece k · minibatches + j is microbatch k of minibatch j.
    by_minibatch = jax.tree.map(
      lambda a: a.reshape(-1, self.minibatches, *a.shape[1:]).swapaxes(0, 1), packing
    )
    state, metrics = jax.lax.scan(
      lambda state, part: self._minibatch(state, frozen, part, reference),
      state,
      (*_split(batch, self.minibatches, tokens.shape[0]), by_minibatch),
    )
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


def _joined(tree: Any) -> Any:
  """`_split` undone, where a prompt has one row."""
  return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:]), tree)


def _within(experience: Experience, where: Array) -> Experience:
  """A prepared experience in which nothing but `where` [P, G, T] counts."""

  def cut(a):
    return jnp.where(where, a, 0)

  return dataclasses.replace(
    experience,
    mask=experience.mask & where,
    advantages=cut(experience.advantages),
    weights=cut(experience.weights),
    token_weights=cut(experience.token_weights),
    extras={name: cut(a) for name, a in experience.extras.items()},
  )


def _zeros(shapes: Any) -> Any:
  """To add to in a loop. Known to be zeros, XLA would have the loop begin with a copy."""
  return jax.lax.optimization_barrier(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def _added(total: Any, more: Any) -> Any:
  """The sum of two ((loss, (sums, peaks)), gradient), of peaks the larger; None is nothing."""
  if total is None:
    return more
  ((value, (sums, peaks)), grads), ((value2, (sums2, peaks2)), grads2) = total, more
  value, sums, grads = jax.tree.map(jnp.add, (value, sums, grads), (value2, sums2, grads2))
  return (value, (sums, jax.tree.map(jnp.maximum, peaks, peaks2))), grads

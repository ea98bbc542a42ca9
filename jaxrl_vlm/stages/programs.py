"""The compiled programs of a stage, with the shardings of their inputs and outputs."""

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

# A pass is the response tokens that go through the model together. `part_of` limits it to
# 1 / `_PASSES` of the tokens of a microbatch of full-length responses, or to `_LEAST_TOKENS` tokens
# if this is more.
_PASSES, _LEAST_TOKENS = 16, 512


@struct.dataclass
class TrainState:
  """The state of training, which an update changes.

  Attributes:
    params: pytree of the trained parameters. Frozen parameters are not included.
    opt_state: pytree of the optimizer state of these parameters.
    bad_steps: i32 scalar; number of consecutive updates that were skipped because the loss or the
      gradient was NaN or infinite.
    objective: scalars of the objective. They start as `objective.initial_state()`, and
      `objective.next_state` changes them.
  """

  params: Params
  opt_state: Any
  bad_steps: Array
  objective: Mapping[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Packing:
  """The assignment of response tokens to passes.

  A pass is the response tokens that go through the model together. It consists of blocks, each a
  fixed number of consecutive tokens of one response. `packing.Packer` computes the assignment for
  each microbatch of the batch.

  Attributes:
    index: i32[microbatches, passes, R, N]; the blocks of each pass, see `models.decoder.Blocks`.
    used: i32[microbatches]; number of passes that contain any blocks.
    size: B, tokens per block.
    tile: W, blocks per tile. The blocks of a tile belong to the same prompt.
    order: i32[P]; the order of the prompts in which the devices have similar loads in each
      microbatch (`packing.balanced`). None keeps the order of the batch.
  """

  index: Array
  used: Array
  size: int = struct.field(pytree_node=False)
  tile: int = struct.field(pytree_node=False, default=1)
  order: Array | None = None

  def blocks(self, index: Array) -> Blocks:
    return Blocks(index, self.size, self.tile)


class Program:
  """A jitted function whose last argument may be omitted. It is then None."""

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
  """The programs of one stage on one mesh: rollout, scores, advantages and update.

  Each program is a `jax.jit` of a pure function. Parameters and optimizer state have the shardings
  `parallel.param_shardings`, and arrays with a leading axis P have `parallel.batch_sharding`.

  - `see` adds the visual tokens to prompts, so that the other programs need not run the vision
    tower again. All of them accept such prompts, except an update that trains the vision tower
    (`trains_vision`).
  - `rollout` samples responses, and `rollout_greedy` one greedy response per prompt if the
    objective uses it as baseline.
  - `score` computes the log-probabilities and entropies of given responses. `score_base` takes
    parameters without adapters. `score_masked` scores the view `masked`, and `score_reference` the
    view `ref`; the latter takes the parameters of both the policy and the reference.
  - `advantages` computes advantages, and `compare` the difference between scorer and sampler.
  - `update(state, frozen, ...)` takes the two pytrees of `lora.split(params, trainable)`, the first
    of them in `state`. It donates the buffers of `state` only. The other programs take all
    parameters together, `lora.merge` of both.

  The `source` of the view `masked` is either a random key, or prompts with images that the host has
  corrupted, one row for each prompt or for each sample. Each row gets a random key of its own, so
  that the result does not depend on how the batch is divided.

  The last argument of the scores and of `update` is a `Packing` (`pack`). With it, padding is left
  out, and `part_tokens` response tokens go through the model at a time (one pass). If it is None,
  all response tokens and their padding go through the model at once.

  Attributes:
    scores_old: whether the scores `old` must be computed before the update.
    trains_vision: whether the vision tower has trained parameters.
    held: bytes on each device of weights, reference and optimizer state.
    gradient: bytes on each device of one gradient.
    room: bytes on each device that `held` leaves free, or 0 if unknown.

  Args:
    model: the model.
    mesh: the mesh.
    objective: the objective.
    optimizer: the optimizer.
    abstract_params: shapes of all parameters.
    trainable: patterns of the trained parameters. () trains all.
    temperature: sampling temperature, at which responses are scored.
    microbatches: number of pieces of a minibatch whose gradients are accumulated.
    minibatches: number of updates per batch.
    sampling: sampling parameters. None makes no rollout program.
    rollout: further arguments of `Sampler`.
    part_tokens: response tokens of a pass on each device.
    capacity: bytes on each device that may be used, or 0 if unknown.
    state_on_host: whether the optimizer state is in host memory between updates.
    fields: prefix of the names of the stage's fields in error messages.
    black, white: normalized patches of these colors (`views.level_patch`), for the view `masked`.

  Raises:
    ValueError: the objective needs `white`, and it is None.
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

    # With one update per rollout, the update itself scores the policy before it changes, so `old`
    # need not be scored separately.
    self.scores_old = minibatches > 1 or objective.needs_old

    trained, frozen = lora.split(abstract_params, trainable)
    self.trains_vision = bool(jax.tree.leaves(trained.get("vision", {})))
    state = jax.eval_shape(self._init_state, trained)
    shardings: Any = parallel.param_shardings(mesh, state, rules)
    self._on_host, self._on_device = state_on_host, shardings.opt_state
    if state_on_host:
      shardings = dataclasses.replace(
        shardings,
        opt_state=jax.tree.map(
          lambda x, sharding: sharding.with_memory_kind("pinned_host") if x.ndim else sharding,
          state.opt_state,
          shardings.opt_state,
        ),
      )
    self.state_shardings = shardings
    self.abstract_state = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      state,
      shardings,
    )
    replicated, batch = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    params, frozen, trained_shardings = (
      parallel.param_shardings(mesh, tree, rules) for tree in (abstract_params, frozen, trained)
    )

    self.held = memory.held(self.abstract_state, self.state_shardings) + memory.held(
      lora.split(abstract_params, trainable)[1], frozen
    )
    if "ref" in (*objective.views, *objective.grad_views):
      self.held += memory.held(trained, trained_shardings)
    self.gradient = memory.held(trained, trained_shardings)
    # At least 1, even if the weights alone do not fit, because 0 means unknown.
    self.room = max(capacity - self.held, 1.0) if capacity else 0
    self._checked: set[tuple[int, ...]] = set()

    self.init_state = jax.jit(self._init_state, out_shardings=self.state_shardings)
    self.see = jax.jit(self._see, in_shardings=(params, batch), out_shardings=batch)
    # A sharding of None keeps that of the argument: a random key or prompts, a reference with or
    # without adapters, or a packing.
    self.score = Program(self._score, (params, batch, batch, batch, None), batch)
    self.score_base = Program(self._score, (lora.strip(params), batch, batch, batch, None), batch)
    self.score_masked = Program(
      self._score_masked, (params, batch, batch, batch, None, None), batch
    )
    self.score_reference = Program(
      self._score_reference, (params, None, batch, batch, batch, None), batch
    )
    self.advantages = jax.jit(
      self._advantages, in_shardings=(batch, batch, batch, replicated), out_shardings=batch
    )
    self.compare = jax.jit(
      self._compare, in_shardings=(batch, batch, batch), out_shardings=replicated
    )
    self.update = Program(
      self._update,
      (self.state_shardings, frozen, batch, batch, batch, None, None, None),
      (self.state_shardings, replicated),
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
    """Returns the bytes on each device that scores and update need besides weights and optimizer.

    Args:
      prompts: P, the prompts of the batch.
      length: Lp.
      patches: number of patches of a prompt.
      group: G.
      tokens: T.
      microbatches: number of microbatches, or 0 for the number of this stage.
    """
    count, objective = microbatches or self.microbatches, self.objective
    devices = parallel.rows(self.mesh)
    prompts_per_device = prompts // (self.minibatches * count * devices)
    model = memory.Model(self.model.config, self.mesh.shape["tensor"])
    pass_tokens = self.part_of(tokens, prompts_per_device * group)

    def rows(view):
      return group if view == "masked" and objective.mask_per == "sample" else 1

    need = memory.update(
      model,
      length,
      patches,
      prompts_per_device,
      group,
      tokens,
      pass_tokens,
      self.gradient,
      self.trains_vision,
      (1, *map(rows, objective.grad_views)),
    )
    if self._on_host:
      # The optimizer state is on the device only when the gradient is complete. XLA then updates
      # one parameter after another.
      moments = memory.held(self.abstract_state.opt_state, self._on_device)
      need = max(need, self.gradient + moments)
    scores = [
      memory.score(model, length, prompts_per_device, rows(view), tokens, pass_tokens)
      for view in objective.views
    ]
    inputs = memory.prompts(model, patches, prompts // devices)
    if objective.mask_on == "original":  # the prompts that the host has corrupted are inputs too
      inputs *= 1 + sum(map(rows, {"masked"} & {*objective.views, *objective.grad_views}))
    working = max(need, memory.see(model, patches, prompts_per_device), *scores)
    if devices == 1:
      return inputs + working
    # `parallel.reordered` needs four times the inputs: the inputs, the result, and two buffers of
    # shards that are passed on. Afterwards the inputs exist twice, in both orders.
    return max(4 * inputs, 2 * inputs + working)

  def part_of(self, tokens: int, responses: int) -> int:
    """Returns the number of response tokens of a pass on each device.

    It is `part_tokens`, or less for a small batch, because the last pass of a batch is half empty
    on average.

    Args:
      tokens: T; a pass has at least this many tokens.
      responses: number of responses of a microbatch on each device.
    """
    return max(tokens, min(self.part_tokens, max(_LEAST_TOKENS, responses * tokens // _PASSES)))

  def check_update(self, prompts: int, length: int, patches: int, group: int, tokens: int) -> None:
    """Checks that an update of these sizes fits in the memory of a device, before it is compiled.

    Args:
      prompts: P, the prompts of the batch.
      length: Lp.
      patches: number of patches of a prompt.
      group: G.
      tokens: T.

    Raises:
      UserError: it does not fit. The message names the smallest number of microbatches that fits,
        or else what to change.
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
        f"besides the {self.held / memory.GIB:.1f} GiB of weights and optimizer, but only "
        f"{self.room / memory.GIB:.1f} GiB are free; {advice}"
      )
    self._checked.add(sizes)

  def pack(self, mask: np.ndarray) -> Packing:
    """Returns the packing of a batch of responses on the devices.

    Args:
      mask: bool[P, G, T] on the host; response tokens that count.
    """
    packing, replicated = self.packed(mask), parallel.replicated(self.mesh)
    by_device = NamedSharding(self.mesh, Spec(None, None, parallel.ROWS))
    return parallel.put(
      packing,
      dataclasses.replace(
        packing,
        index=by_device,
        used=replicated,
        order=None if packing.order is None else replicated,
      ),
    )

  def packed(self, mask: np.ndarray) -> Packing:
    """Returns the result of `pack` as arrays on the host."""
    p, g, t = mask.shape
    splits, devices = self.minibatches * self.microbatches, parallel.rows(self.mesh)
    responses = p // splits // devices * g  # of a microbatch on each device
    room = self.part_of(t, responses)
    size, tile = block_shape(t, attention.answers(self.model.config, room))
    each = -(-t // size)
    room = -(-max(room // size, each) // tile) * tile
    packer = Packer(splits, devices, size, min(room, responses * -(-each // tile) * tile), tile)
    # Tokens after the last one in the mask are padding.
    lengths = np.where(mask, np.arange(1, t + 1), 0).max(axis=-1)
    order = None
    if devices > 1:
      # Prompts stay in their slice, because the network between slices is slow.
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
    """Reorders arrays [P, ...] from the order of the batch to that of the packing, or `back`."""
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
    def features_of(prompt):
      with_features: Any = self.model.apply({"params": params}, prompt, method="see")
      return with_features.features

    count = self.minibatches * self.microbatches
    if count == 1 or prompt.features is not None or not prompt.patches.shape[1]:
      return dataclasses.replace(prompt, features=features_of(prompt))
    features = jax.lax.map(features_of, _split(prompt, count, prompt.tokens.shape[0]))
    return dataclasses.replace(prompt, features=_joined(features))

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
    """Scores responses tokens [P, G, T] under one view, one microbatch after another.

    Args:
      name: the view.
      sides: parameters and prompts by view. "" is the policy with the original image, which a view
        in the objective's `full_kl` needs in addition.
      tokens, mask: [P, G, T].
      packing: the packing, or None to compute all tokens at once.
      pieces: number of microbatches, if there is no packing.
      source: if given, the prompts of the view "masked" are corrupted as it says (`_corrupted`).
    """
    params = {key: side[0] for key, side in sides.items()}

    def microbatch(prompts, source, tokens, mask, *packed):
      given = {key: (params[key], prompt) for key, prompt in prompts.items()}
      if source is not None:
        clean = given["masked"]
        given["masked"] = clean[0], self._corrupted(source, *clean, tokens.shape[1])
      prefixes = {
        key: self._prefixes(*side, side[1].tokens.shape[0] // tokens.shape[0])
        for key, side in given.items()
      }
      if packing is None:
        return self._stats(given, prefixes, tokens, mask, None)[name]
      (index, used), blocks = packed, packing.blocks

      def add_pass(i, total):
        stats = self._stats(given, prefixes, tokens, mask, blocks(index[i]))[name]
        return jax.tree.map(jnp.add, total, stats)  # the stats are 0 outside the blocks of the pass

      zeros = jnp.zeros(tokens.shape, jnp.float32)
      kl = zeros if name in self.objective.full_kl else None
      return jax.lax.fori_loop(0, used, add_pass, TokenStats(zeros, zeros, kl))

    batch = {key: side[1] for key, side in sides.items()}, source, tokens, mask
    if packing is None and pieces == 1:
      return microbatch(*batch)
    count = pieces if packing is None else len(packing.used)
    inputs = _split(batch, count, tokens.shape[0])
    if packing is not None:
      inputs = (*inputs, packing.index, packing.used)
    stats = jax.lax.map(lambda arrays: microbatch(*arrays), inputs)
    return _joined(stats)

  def _prefixes(self, params: Params, prompt: Prompt, rows: int = 1) -> Prefix:
    """Returns the prefixes of P·rows prompts.

    If each prompt has several rows, one row of every prompt is prefilled at a time.
    """

    def prefill(prompt):
      prefix: Any = self.model.apply({"params": params}, prompt, method="prefill")
      return prefix[1]

    if rows == 1:
      return prefill(prompt)
    by_row = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, rows, *a.shape[1:]), 1, 0), prompt)
    prefixes = jax.lax.map(prefill, by_row)  # k, v: [rows, L, P, ...]
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
    """Scores responses tokens [P, G, T] under each view.

    Args:
      sides: parameters and prompts by view. "" is the policy with the original image.
      prefixes: prefixes of these prompts by view.
      tokens, mask: [P, G, T].
      blocks: the blocks to compute, or None for all tokens.

    Returns:
      TokenStats [P, G, T] by view, 0 where the mask is false or the token is not in `blocks`. Those
      of views in the objective's `full_kl` contain `kl`.
    """
    targets, chunks = tokens, {}
    if blocks is not None:
      targets, chunks = blocks.take(tokens), {"chunk": max(1, 512 // blocks.size), "axis": 1}
    hidden: dict[str, Any] = {
      name: self.model.apply(
        {"params": params}, prompt, prefixes[name], tokens, blocks, method="respond"
      )
      for name, (params, prompt) in sides.items()
    }
    stats = {}
    for name, (params, _) in sides.items():
      values = scoring.token_stats(
        self.model, params, hidden[name], targets, temperature=self.temperature, **chunks
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
    """Returns the prompts with corrupted images, as the mask_* fields of the objective define them.

    There is one row for each prompt, or one for each of the `group` samples of each prompt.

    Args:
      source: random keys of the rows (`_with_source`), or prompts that the host has corrupted.
      params: parameters, for the saliency of `mask_kind="semantic"`.
      prompt: the prompts with the original images.
      group: G.
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
    # Corruptions that are not random are the same for all samples of a prompt.
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
    """Returns a batch (prompt, tokens, ...) in the order of the packing, followed by its source.

    If the source is prompts, they are reordered too. If it is a random key, it is replaced by one
    key for each row, [P], or [P, G] with `mask_per="sample"`. The key of a row does not depend on
    the packing.
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
    """Returns mean and maximum of |scorer's log-probability − sampler's log-probability|."""
    difference = jnp.where(mask, jnp.abs(logp - sampler_logp), 0.0)
    return {
      "sampler_logp_difference": difference.sum() / jnp.maximum(mask.sum(), 1),
      "sampler_logp_difference_max": difference.max(),
    }

  def _advantages(
    self, rewards: Array, mask: Array, more: Mapping[str, Any], state: Mapping[str, Array]
  ) -> Array:
    """Returns the advantages, f32[P, G, T].

    Args:
      rewards: [P, G].
      mask: [P, G, T].
      more: the arguments that `objective.advantage_needs` names. In place of `penalty`, it contains
        the TokenStats `old` and `ref` from which the penalty is computed.
      state: scalars of the objective (`TrainState.objective`).
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
    """Computes the loss, metrics and gradient of a microbatch and adds them to `total`.

    The prompts are prefilled once. Then the responses are processed one pass after another. Each
    pass adds to the gradient of the parameters, and to the gradient of the prompts' keys and
    values. At the end, the latter is backpropagated through the prefill. Because results are added
    immediately, at most two gradients exist at a time.

    Args:
      trained, frozen: the parameters.
      prompt, tokens, experience, source: the microbatch. `source` is as in `_corrupted`.
      reference: parameters of the reference, or None.
      packed: (index, used) of the packing of this microbatch, or None without packing.
      packing: the packing, or None.
      total: result of the previous microbatches, or None.

    Returns:
      ((loss, (sums, peaks)), gradient); `_loss` explains sums and peaks.
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

    def keys_and_values(trained):  # the arrays of the prefixes that have a gradient
      prefixes = {name: self._prefixes(*side) for name, side in sides(trained).items()}
      return {name: (prefix.k, prefix.v) for name, prefix in prefixes.items()}

    def loss(trained, kv, blocks):
      prefixes = {
        name: Prefix(*kv[name], length=given.length - 1) for name, given in prompts.items()
      }
      selected = experience
      if blocks is not None:
        selected = _within(experience, blocks.holds(experience.mask.shape))
      stats = self._stats(sides(trained), prefixes, tokens, selected.mask, blocks)
      return self._loss(stats.pop(""), selected, stats)

    if packed is None or packing is None:
      return _added(
        total,
        jax.value_and_grad(
          lambda trained: loss(trained, keys_and_values(trained), None), has_aux=True
        )(trained),
      )
    index, used = packed
    kv, backward = jax.vjp(keys_and_values, trained)
    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def add_pass(i, totals):
      total, total_kv_grads = totals
      value, (grads, kv_grads) = grad(trained, kv, packing.blocks(index[i]))
      return _added(total, (value, grads)), jax.tree.map(jnp.add, total_kv_grads, kv_grads)

    if total is None:
      value, (grads, _) = jax.eval_shape(grad, trained, kv, packing.blocks(index[0]))
      total = _zeros((value, grads))
    # In float32, because bfloat16 is too coarse for a sum over many passes.
    zeros = _zeros(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), kv))
    total, kv_grads = jax.lax.fori_loop(0, used, add_pass, (total, zeros))
    kv_grads = jax.tree.map(lambda a, like: a.astype(like.dtype), kv_grads, kv)
    value, grads = total
    return value, jax.tree.map(jnp.add, grads, backward(kv_grads)[0])

  def _loss(self, stats: TokenStats, experience: Experience, views: Mapping[str, TokenStats]):
    """Returns the objective's loss and its metrics: (loss, (sums, peaks)).

    The metrics in `sums` add up over passes and microbatches. Of those in `peaks`, the maximum is
    taken. If `experience.old` is None, the scores of the current policy take its place.
    """
    sums, peaks = {}, {}
    if experience.old is None:
      experience = dataclasses.replace(experience, old=jax.lax.stop_gradient(stats))
      if experience.sampler_logp is not None:
        peaks = self._compare(experience.old.logp, experience.sampler_logp, experience.mask)
        mean = peaks.pop("sampler_logp_difference")
        _, token_weights = minibatch_weights(experience)
        # The share of these tokens in the minibatch, so that the products add up to its mean.
        share = jnp.where(experience.mask, token_weights, 0.0).sum()
        sums = {"sampler_logp_difference": mean * share}
    value, more = self.objective.loss(stats, experience, **views)
    return value, jax.lax.stop_gradient((sums | more, peaks))

  def _minibatch(
    self, state: TrainState, frozen, batch, reference
  ) -> tuple[TrainState, dict[str, Array]]:
    """Updates the parameters with one minibatch: (prompt, tokens, experience, source, packing).

    Returns:
      The new state and the metrics.
    """
    prompt, tokens, experience, source, packing = batch
    count = self.microbatches
    if (count > 1 or packing is not None) and self.objective.needs_current:
      sides = {"": (lora.merge(frozen, state.params), prompt)}
      experience = dataclasses.replace(
        experience, current=self._scored("", sides, tokens, experience.mask, packing, count)
      )
    experience = self.objective.prepare(dataclasses.replace(experience, state=state.objective))
    metrics = self.objective.prepare_metrics(experience)

    def add_microbatch(total, prompt, tokens, experience, source, *packed):
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

    microbatches = _split(
      (prompt, tokens, dataclasses.replace(experience, state={}), source), count, tokens.shape[0]
    )
    if packing is not None:
      microbatches = (*microbatches, packing.index, packing.used)
    first = jax.tree.map(lambda a: a[0], microbatches)
    if count == 1:
      total = add_microbatch(None, *first)
    else:
      zeros = _zeros(jax.eval_shape(add_microbatch, None, *first))
      total, _ = jax.lax.scan(
        lambda total, arrays: (add_microbatch(total, *arrays), None), zeros, microbatches
      )
    (value, (sums, peaks)), grads = total

    norm = optax.tree.norm(grads)
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    old_state = state.opt_state
    if self._on_host:  # copy it to the device only after the gradient is complete
      grads, old_state = jax.lax.optimization_barrier((grads, old_state))
      old_state = jax.device_put(old_state, self._on_device)
    updates, opt_state = self.optimizer.update(grads, old_state, state.params)
    params = optax.apply_updates(state.params, updates)
    numbers = self.objective.next_state(experience, metrics | sums)
    # If the loss or the gradient is not finite, the update changes only `bad_steps`.
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
    """Updates the parameters once for each minibatch of P / minibatches prompts.

    Args:
      state, frozen: the trained and the frozen parameters.
      prompt, tokens, experience: the batch.
      source: what corrupts the images of the view `masked`, see `Programs`.
      reference: all parameters of the reference if "ref" is in `objective.grad_views`, else None.
      packing: the packing, or None.

    Returns:
      The new state, and the metrics: means over the minibatches, and the last `bad_steps`.
    """
    batch = self._with_source(packing, (prompt, tokens, experience), source)
    if packing is not None:
      packing = dataclasses.replace(packing, order=None)
    if self.minibatches == 1:
      return self._minibatch(state, frozen, (*batch, packing), reference)
    # Entry k · minibatches + j of the packing is microbatch k of minibatch j.
    by_minibatch = jax.tree.map(
      lambda a: a.reshape(-1, self.minibatches, *a.shape[1:]).swapaxes(0, 1), packing
    )
    state, metrics = jax.lax.scan(
      lambda state, minibatch: self._minibatch(state, frozen, minibatch, reference),
      state,
      (*_split(batch, self.minibatches, tokens.shape[0]), by_minibatch),
    )
    last = metrics.pop("bad_steps")[-1]
    return state, jax.tree.map(lambda a: a.mean(axis=0), metrics) | {"bad_steps": last}


def _split(tree: Any, count: int, prompts: int) -> Any:
  """Splits every leaf into `count` pieces: [P·r, ...] -> [count, P·r / count, ...].

  Piece i has the prompts i, i + count, ..., so that each piece is sharded over all devices like the
  whole batch. The r rows of a prompt stay together.
  """

  def one(a):
    rows = a.shape[0] // prompts
    a = jnp.moveaxis(a.reshape(prompts // count, count, rows, *a.shape[1:]), 1, 0)
    return a.reshape(count, -1, *a.shape[3:])

  return jax.tree.map(one, tree)


def _joined(tree: Any) -> Any:
  """Reverts `_split` of arrays with one row per prompt: [count, P / count, ...] -> [P, ...]."""
  return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:]), tree)


def _within(experience: Experience, where: Array) -> Experience:
  """Restricts a prepared experience to the tokens in `where`, bool[P, G, T]."""

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
  """Returns zeros as the start of a sum in a loop.

  The barrier hides from XLA that they are zeros. Otherwise, XLA would begin the loop with a copy.
  """
  return jax.lax.optimization_barrier(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def _added(total: Any, more: Any) -> Any:
  """Adds two results of `Programs._grad`, taking the maximum of the peaks. `total` may be None."""
  if total is None:
    return more
  ((value, (sums, peaks)), grads), ((value2, (sums2, peaks2)), grads2) = total, more
  value, sums, grads = jax.tree.map(jnp.add, (value, sums, grads), (value2, sums2, grads2))
  return (value, (sums, jax.tree.map(jnp.maximum, peaks, peaks2))), grads

"""Lists the programs of a stage for a plan. Only shapes are used: nothing is allocated or run.

Each program comes with the number of times that a step runs it, its model FLOPs, and the bytes that
are in use on each device besides its arguments while it runs.
"""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from ml_collections import ConfigDict

from jaxrl_vlm import evaluate, flops, memory, models, parallel, rewards
from jaxrl_vlm.errors import UserError, hint, validation
from jaxrl_vlm.models import attention, lora
from jaxrl_vlm.models.published import CONFIGS
from jaxrl_vlm.rollout import make_sampler
from jaxrl_vlm.rollout.schedule import Layout, Schedule, ladder
from jaxrl_vlm.stages import rl
from jaxrl_vlm.stages.loading import lora_of, objective_of, trainable_of
from jaxrl_vlm.stages.optimizer import make_optimizer
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience, Prompt, TokenStats


@dataclasses.dataclass
class StageProgram:
  """One program of a stage.

  Attributes:
    name: name of the program, e.g. "update".
    phase: phase of a step: "see" (the vision tower), "rollout", "scores" or "update". "" if the
      program is not part of every step.
    lower: returns the lowered program, ready to be compiled.
    runs: number of times that a step runs it.
    flops: model FLOPs of one run, summed over all devices.
    kernels: FLOPs of attention that kernels compute in one run, summed over all devices.
    beside: bytes in use on each device while it runs that are not its arguments.
    shardings: shardings of the arguments that outlive the program, by position of the argument.
      These arguments occupy memory even if the program does not use all of them.
    steps: trip count of the loops whose trip count depends on the data.
    shares: how often each branch of its conditionals is taken (see `hlo.analyse`).
  """

  name: str
  phase: str
  lower: Callable[[], Any]
  runs: float = 0.0
  flops: float = 0.0
  kernels: float = 0.0
  beside: float = 0.0
  shardings: Mapping[int, Any] = dataclasses.field(default_factory=dict)
  steps: float = 1.0
  shares: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Stage:
  """The programs of a stage and what they have in common.

  Attributes:
    programs: all programs of the stage.
    tokens: response tokens of a step.
    holds: bytes in use on each device during the whole stage, by kind, e.g. "optimizer".
    facts: sizes of the plan to print, e.g. the mesh and the number of prompts.
    refusal: the error with which a run would refuse these prompts; "" if it would accept them.
    needs: bytes that update and scores need on each device in addition to `holds`, by the formulas
      of `memory.py`.
  """

  programs: list[StageProgram]
  tokens: float
  holds: dict[str, float]
  facts: dict[str, Any]
  refusal: str
  needs: float


def architecture(config: ConfigDict) -> models.ModelConfig:
  """Returns the model of a config as a TPU computes it.

  It needs no weights. It is read from the `config.json` of `config.model.path`, or is that of the
  published model with this name if there is no such directory.

  Raises:
    UserError: there is no such directory, and the name is not that of a published model.
  """
  settings = config.model
  dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
  with validation(f"config.model.path={settings.path!r}: "):
    if settings.scratch:
      from jaxrl_vlm import scratch

      model = scratch.model_config(settings.scratch.to_dict()).replace(
        dtype=dtype, remat=settings.remat
      )
    elif pathlib.Path(settings.path).is_dir():
      try:
        model = models.from_directory(settings.path, dtype, settings.remat)
      except OSError as error:
        raise ValueError(str(error)) from error
    else:
      last = pathlib.Path(settings.path).name
      names = [name for name in CONFIGS if last == name or last.startswith(f"{name}-")]
      if not names:
        raise UserError(
          f"config.model.path={settings.path!r}: expected a directory with config.json, or the "
          f"name of a published model; {hint(last, CONFIGS)}"
        )
      model = models.from_hf(CONFIGS[max(names, key=len)], dtype=dtype, remat=settings.remat)
  with validation():
    return model.replace(lora=lora_of(config), rules=parallel.rules_of(config.sharding.to_dict()))


def weights(model: models.ModelConfig) -> float:
  """Returns the bytes of all parameters in the dtype of activations."""
  return sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(models.abstract_params(model, model.dtype))
  )


def frame(model: models.ModelConfig, patches: int) -> flops.Frame:
  """Returns the rows and columns of the image with this many patches that is closest to square."""
  merge = model.vision.spatial_merge_size
  tokens = patches // merge**2
  rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
  return rows * merge, tokens // rows * merge


def buckets(
  config: ConfigDict, model: models.ModelConfig, length: int = 0, patches: int = 0
) -> tuple[int, int]:
  """Returns the number of tokens and of patches of each prompt.

  Args:
    config: config of the run.
    model: `architecture(config)`.
    length: number of tokens; 0 for the largest prompt bucket.
    patches: number of patches; 0 for the largest patch bucket whose visual tokens fit in `length`,
      or the smallest patch bucket if none fits.
  """
  length = length or max(config.prompt_buckets)
  most = length * model.vision.spatial_merge_size**2
  fits = [n for n in config.patch_buckets if n <= most]
  return length, patches or max(fits, default=min(config.patch_buckets))


class _Shapes:
  """Sizes of a stage, and the shapes of the arguments of its programs.

  Attributes:
    prompts, group, tokens: P, G, T.
    length, patches: Lp and N.
    number, ids, mask: shapes [P, G, T] of float32, int32 and bool arrays.
    rewards: shape f32[P, G].
    sizes: the five sizes in the order of the arguments of `Programs.update_bytes`.
    key: shape of a random key.
  """

  def __init__(
    self,
    model: models.ModelConfig,
    prompts: int,
    group: int,
    tokens: int,
    length: int,
    patches: int,
  ):
    self.model, self.prompts, self.group, self.tokens = model, prompts, group, tokens
    self.length, self.patches = length, patches
    self.number = self.shape("float32", prompts, group, tokens)
    self.ids, self.mask = (self.shape(d, prompts, group, tokens) for d in ("int32", "bool"))
    self.rewards = self.shape("float32", prompts, group)
    self.sizes = prompts, length, patches, group, tokens
    self.key = jax.eval_shape(lambda: jax.random.key(0))

  @staticmethod
  def shape(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))

  def prompt(self, rows: int = 1) -> Prompt:
    """Returns the shapes of a batch with `rows` rows for each prompt, without visual tokens."""
    count = self.prompts * rows
    one = models.dummy_prompt(self.model, 1, self.length, self.patches)
    one = dataclasses.replace(one, patches=one.patches.astype(jnp.dtype(self.model.dtype)))
    return jax.tree.map(lambda a: self.shape(a.dtype, count, *a.shape[1:]), one)

  def stats(self, full: bool = False) -> TokenStats:
    return TokenStats(self.number, self.number, self.number if full else None)


def _placed(tree: Any, sharding: Any) -> Any:
  """Adds shardings to a pytree of shapes: one for all, or a pytree of the same structure."""
  if isinstance(sharding, NamedSharding):
    sharding = jax.tree.map(lambda _: sharding, tree)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
  )


def size(tree: Any, sharding: Any) -> float:
  """Returns the bytes of a pytree of shapes on each device.

  Args:
    tree: arrays or shapes.
    sharding: one sharding for all of them, or a pytree of the same structure.
  """
  if isinstance(sharding, NamedSharding):
    sharding = jax.tree.map(lambda _: sharding, tree)
  return memory.held(tree, sharding)


class Plan:
  """The programs of one stage of a config on a mesh of TPUs, which need not exist.

  Args:
    config: config of the run.
    index: index of the stage in `config.stages`.
    model: `architecture(config)`.
    devices: devices of a topology (`compiled.topology`).
    usable: bytes of memory of a device.
    length, patches: number of tokens and of patches of each prompt.
    response_tokens: number of tokens of each response; 0 for max_tokens.

  Raises:
    UserError: the config is invalid for this mesh, or `response_tokens` is out of range.
  """

  def __init__(
    self,
    config: ConfigDict,
    index: int,
    model: models.ModelConfig,
    devices: Sequence[Any],
    usable: float,
    length: int,
    patches: int,
    response_tokens: int = 0,
  ):
    self.config, self.index, self.stage = config, index, config.stages[index]
    stage, field = self.stage, f"config.stages[{index}]"
    with validation():
      self.mesh: Mesh = parallel.make_mesh(config.mesh, devices)
      model = model.replace(
        attention=models.choose_attention(config.model.attention, self.mesh.devices.flat, model)
      )
    self.model = model
    if stage.kind not in ("rl", "sft"):
      raise UserError(
        f"{field}.kind={stage.kind!r}: no such stage; {hint(stage.kind, ('rl', 'sft'))}"
      )
    rows = parallel.rows(self.mesh)
    splits = stage.microbatches * stage.get("minibatches", 1) * rows
    if stage.prompts_per_step < 1 or stage.prompts_per_step % splits:
      raise UserError(
        f"{field}.prompts_per_step={stage.prompts_per_step}: expected a multiple of minibatches "
        f"x microbatches x mesh.slice x mesh.fsdp = {stage.get('minibatches', 1)} x "
        f"{stage.microbatches} x {rows} = {splits}; use fewer microbatches, or a larger "
        "config.mesh.tensor"
      )
    self.rows, self.groups_at_once = rows, 0
    self.mean = response_tokens or stage.max_tokens
    if not 1 <= self.mean <= stage.max_tokens:
      raise UserError(
        f"--response_tokens={self.mean}: expected 1 to {field}.max_tokens={stage.max_tokens}"
      )
    group = stage.num_samples if stage.kind == "rl" else 1
    self.shapes = _Shapes(model, stage.prompts_per_step, group, stage.max_tokens, length, patches)
    self.frames = (frame(model, patches),) if patches else ()
    self.abstract = models.abstract_params(model, config.model.param_dtype, trainable_of(config))
    self.capacity = memory.SHARE * (config.device_memory * memory.GIB or usable)
    self.programs = self._programs()
    self.params_at = parallel.param_shardings(self.mesh, self.abstract, model.rules)
    self.batch_at = parallel.batch_sharding(self.mesh)
    self.replicated = parallel.replicated(self.mesh)
    self.frozen = lora.split(self.abstract, trainable_of(config))[1]
    self.frozen_at = parallel.param_shardings(self.mesh, self.frozen, model.rules)
    self._measure()

  def _programs(self) -> Programs:
    config, stage, patch = self.config, self.stage, np.zeros(self.model.vision.patch_dim)
    model, fields = models.VLM(self.model), f"config.stages[{self.index}]."
    if stage.kind == "rl":
      return rl.make_programs(
        config,
        self.index,
        model,
        self.mesh,
        self.abstract,
        capacity=self.capacity,
        black=patch,
        white=patch,
      )
    with validation(fields[:-1] + ": "):
      objective, optimizer = objective_of(stage), make_optimizer(stage.optimizer, stage.steps)
    return Programs(
      model,
      self.mesh,
      objective,
      optimizer,
      self.abstract,
      trainable=trainable_of(config),
      microbatches=stage.microbatches,
      capacity=self.capacity,
      fields=fields,
      state_on_host=stage.optimizer.moments == "host",
    )

  def _measure(self) -> None:
    """Computes the bytes on each device of the arrays that outlive programs, `holds`."""
    programs, objective = self.programs, self.programs.objective
    state, shardings = programs.abstract_state, programs.state_shardings
    views = (*objective.views, *objective.grad_views)
    trained = size(state.params, shardings.params)
    self.holds = {
      "parameters": trained + size(self.frozen, self.frozen_at),
      "optimizer": size(state, shardings) - trained,
      "reference": trained if "ref" in views else 0.0,
    }
    self.prompt = self.shapes.prompt()
    self.seen: Prompt = self.prompt  # in an RL stage, with visual tokens
    if self.stage.kind == "rl":
      self.seen = jax.eval_shape(programs.see, self.abstract, self.prompt)
    self.batch_bytes = size(self.seen, self.batch_at)
    # With one_step_off, the prompts of the next step are in memory too.
    one_step_off = self.config.pipeline == "one_step_off"
    self.batches_held = 1 + one_step_off
    # Rows per prompt that the host has corrupted; 0 if programs on the device make the masked view.
    self.masked_rows = 0
    if "masked" in views and objective.mask_on == "original":
      random = objective.mask_kind in ("patches", "noise") and objective.mask_per == "sample"
      self.masked_rows = self.shapes.group if random else 1
    self.holds["prompts"] = (
      self.batches_held * self.batch_bytes
      + size(self.shapes.prompt(self.masked_rows), self.batch_at)
      if self.stage.kind == "rl"
      else 0.0
    )

  def plan(self) -> Stage:
    """Returns all programs of the stage.

    If a run would refuse the prompts, because they do not fit by the formulas of `memory.py`, the
    reason is in `Stage.refusal`. Programs whose sizes cannot be determined then are left out.
    """
    listed, refusals = [], []
    make = self._rl if self.stage.kind == "rl" else self._sft
    for group in make():
      try:
        listed += list(group())
      except UserError as error:
        refusals.append(str(error))
    shapes, stage = self.shapes, self.stage
    try:
      self.programs.check_update(*shapes.sizes)
    except UserError as error:
      refusals.append(str(error))
    packing = self.packing
    facts = {
      "mesh": dict(self.mesh.shape),
      "prompts": shapes.prompts,
      "prompt_tokens": shapes.length,
      "patches": shapes.patches,
      "samples": shapes.group,
      "max_tokens": shapes.tokens,
      "response_tokens": self.mean,
      "minibatches": stage.get("minibatches", 1),
      "microbatches": stage.microbatches,
      "attention": self.model.attention,
      "remat": self.model.remat,
      "rollout_tensor": self.config.rollout.tensor,
      "parts": float(np.mean(packing.used)),
    }
    return Stage(
      listed,
      float(shapes.prompts * shapes.group * self.mean),
      self.holds,
      facts,
      "; ".join(refusals),
      self.programs.update_bytes(*shapes.sizes),
    )

  # -- Stages -------------------------------------------------------------------------------------

  def _sft(self) -> list[Callable[[], Iterator[StageProgram]]]:
    return [self._init, self._update, self._evaluation]

  def _rl(self) -> list[Callable[[], Iterator[StageProgram]]]:
    return [
      self._init,
      self._see,
      self._rollouts,
      self._scores,
      self._advantages,
      self._update,
      self._evaluation,
    ]

  @functools.cached_property
  def packing(self) -> Any:
    """The packing of responses that all have the same length (`mean`), as arrays on the host."""
    shapes = self.shapes
    mask = np.zeros((shapes.prompts, shapes.group, shapes.tokens), bool)
    mask[..., : self.mean] = True
    return self.programs.packed(mask)

  def _packing(self) -> Any:
    """Returns the shapes of the packing with the shardings that `Programs.pack` gives it."""
    packing = self.packing
    index = NamedSharding(self.mesh, Spec(None, None, parallel.ROWS))
    return jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(np.shape(a), jnp.asarray(a).dtype, sharding=s),
      packing,
      dataclasses.replace(
        packing,
        index=index,
        used=self.replicated,
        order=None if packing.order is None else self.replicated,
      ),
    )

  def _others(self, *arguments: str, prompts: float = 0.0) -> float:
    """Returns the bytes of `holds` that are not arguments of a program.

    Args:
      *arguments: names of the entries of `holds` that are arguments.
      prompts: number of batches of prompts that are arguments.
    """
    rest = sum(count for name, count in self.holds.items() if name not in arguments)
    return rest - prompts * self.batch_bytes

  def _init(self) -> Iterator[StageProgram]:
    state, shardings = self.programs.abstract_state, self.programs.state_shardings
    params = _placed(state.params, shardings.params)
    yield StageProgram(
      "init_state",
      "",
      lambda: self.programs.init_state.lower(params),
      beside=size(self.frozen, self.frozen_at) + self.holds["reference"],
      shardings={0: shardings.params},
    )

  def _see(self) -> Iterator[StageProgram]:
    shapes, programs = self.shapes, self.programs
    count = shapes.prompts * sum(flops.vision(self.model, f) for f in self.frames)
    # With dynamic sampling, the program runs again for the prompts of the accepted groups.
    yield StageProgram(
      "see",
      "see",
      lambda: programs.see.lower(self.abstract, self.prompt),
      runs=1 + programs.objective.filter_groups,
      flops=count,
      kernels=self._frame_attention(),
      beside=self._others("parameters", prompts=1),
      shardings={0: self.params_at, 1: self.batch_at},
      shares=self._tower_shares(),
    )

  def _rollouts(self) -> Iterator[StageProgram]:
    """Yields the programs of the rollout of a step, and of the rollout of its greedy baselines."""
    for name in ("rollout", "rollout_greedy"):
      sampler = getattr(self.programs, name, None)
      if sampler is not None:
        yield from self._rollout(
          name.removeprefix("rollout").strip("_"),
          "rollout",
          sampler,
          self.seen,
          self.shapes.prompts,
        )

  def evaluation_sampler(self) -> Any:
    """Returns the sampler that generates the responses of the stage's evaluations."""
    field = f"config.stages[{self.index}]"
    with validation(f"{field}: "):
      sampling = evaluate.sampling(self.stage)
    return make_sampler(
      models.VLM(self.model),
      self.mesh,
      sampling,
      self.params_at,
      **self.config.rollout.to_dict(),
      room=self.programs.room,
      samples_field=f"{field}.eval.samples",
    )

  def _evaluation(self) -> Iterator[StageProgram]:
    settings = self.stage.eval
    if not settings.examples:
      return
    sampler = self.evaluation_sampler()
    shapes = _Shapes(self.model, settings.batch, 1, 1, self.shapes.length, self.shapes.patches)
    yield from self._rollout("eval", "", sampler, shapes.prompt(), settings.batch)

  def _rollout(
    self, prefix: str, phase: str, sampler: Any, prompt: Prompt, prompts: int
  ) -> Iterator[StageProgram]:
    """Yields the programs of a sampler.

    Args:
      prefix: prefix of the names of the programs.
      phase: "rollout", or "" if the sampler is not part of every step.
      sampler: the sampler.
      prompt: shapes of the prompts.
      prompts: number of prompts.
    """
    lowered = sampler.lower(self.abstract, prompt)
    group, length, in_step = sampler.sampling.num_samples, self.shapes.length, phase != ""
    rows = parallel.rows(sampler.mesh)
    args = lowered["prefill"].args_info[0]
    prefill_size, state = args[3].shape[1], args[2]
    layout = Layout(state.used.shape[1], state.length.shape[1])
    runs, branch_shares = _rollout_runs(
      prompts // rows, group, layout, prefill_size, self.mean, sampler.chunk, state.k.shape[-2]
    )
    frames = () if prompt.features is not None else self.frames
    model_flops = {
      "prefill": rows * prefill_size * flops.prefill(self.model, length, frames),
      "decode": prompts
      * flops.responses(self.model, [self.mean] * group, length)
      / max(runs["decode"], 1),
    }
    kernels = rows * prefill_size * self._prompt_attention()
    others = self._others("parameters")
    # The prompts of a step are in `holds`, those of an evaluation are not.
    prompt_bytes = self.batch_bytes if in_step else 0
    shardings: dict[str, dict[int, Any]] = {
      "reshard": {0: self.params_at, 1: self.batch_at},
      "prefill": {0: sampler.params_at, 1: sampler.batch_at},
      "decode": {0: sampler.params_at},
    }
    if sampler.reshard is None:
      beside = {
        "prefill": others - prompt_bytes,
        "decode": others,
        "compact": others + self.holds["parameters"],
      }
    else:  # the resharded copies, in addition to the parameters and prompts
      weights, prompt_copy = lowered["reshard"].out_info
      weights = size(weights, sampler.params_at)
      prompt_copy = size(prompt_copy, sampler.batch_at)
      others += self.holds["parameters"]
      beside = {
        "reshard": others - prompt_bytes - self.holds["parameters"],
        "prefill": others,
        "decode": others + prompt_copy,
        "compact": others + prompt_copy + weights,
      }
      runs["reshard"] = 1
    for name, program in lowered.items():
      shares = {
        **self._tower_shares(),
        **({"layers/cond": branch_shares} if name == "decode" else {}),
      }
      yield StageProgram(
        "_".join(filter(None, (prefix, name))),
        phase,
        lambda program=program: program,
        runs=runs.get(name, 0) if in_step else 0,
        flops=model_flops.get(name, 0.0),
        kernels=kernels if name == "prefill" else 0.0,
        beside=beside.get(name, others),
        shardings=shardings.get(name, {}),
        shares=shares,
        steps=sampler.chunk,
      )
    if in_step:
      self.groups_at_once = layout.sequences // group * rows

  def _unseen(self, prompt: Prompt) -> Prompt:
    """Removes the visual tokens if the update trains the vision tower and so recomputes them."""
    return dataclasses.replace(prompt, features=None) if self.programs.trains_vision else prompt

  def _forward(self, rows: int = 1, vision: bool = False) -> tuple[float, float]:
    """Returns the FLOPs of scoring the responses to all prompts.

    Args:
      rows: number of rows for each prompt, which differ in their image.
      vision: whether the vision tower runs too.

    Returns:
      Model FLOPs, and the FLOPs of attention that kernels compute.
    """
    shapes, model = self.shapes, self.model
    frames = self.frames if vision else ()
    prefill = rows * flops.prefill(model, shapes.length - 1, frames)
    responses = flops.responses(model, [self.mean] * shapes.group, shapes.length)
    kernels = rows * self._prompt_attention() + self._response_attention()
    return (
      shapes.prompts * (prefill + responses),
      shapes.prompts * kernels + (rows * self._frame_attention() if vision else 0.0),
    )

  def _scores(self) -> Iterator[StageProgram]:
    programs, shapes, objective = self.programs, self.shapes, self.programs.objective
    packing, steps = self._packing(), float(np.mean(self.packing.used))
    usual = {0: self.params_at, 1: self.batch_at}

    def scoring(name, program, *args, cost, shardings=usual, arguments=("parameters",)):
      counted, kernels = cost
      return StageProgram(
        name,
        "scores",
        lambda: program.lower(*args),
        runs=1,
        flops=counted,
        kernels=kernels,
        beside=self._others(*arguments, prompts=1),
        shardings=shardings,
        steps=steps,
        shares=self._tower_shares(),
      )

    batch = shapes.ids, shapes.mask
    if programs.scores_old:
      yield scoring(
        "score", programs.score, self.abstract, self.seen, *batch, packing, cost=self._forward()
      )
    unseen, vision = self._unseen(self.seen), programs.trains_vision
    settings = self.config.model.lora
    base = bool(settings.rank and not settings.path and self.index == 0)
    reference = lora.strip(self.abstract) if base else self.abstract
    reference_at = lora.strip(self.params_at) if base else self.params_at
    for name in objective.views:
      if name == "ref" and name in objective.full_kl:
        once, kernels = self._forward(vision=vision)
        yield scoring(
          "score_reference",
          programs.score_reference,
          self.abstract,
          _placed(reference, reference_at),
          unseen,
          *batch,
          packing,
          cost=(2 * once, 2 * kernels),
          arguments=("parameters", "reference"),
          shardings={0: self.params_at, 1: reference_at, 2: self.batch_at},
        )
      elif name == "ref":
        program = programs.score_base if base else programs.score
        yield scoring(
          "score_base" if base else "score_ref",
          program,
          reference,
          unseen,
          *batch,
          packing,
          cost=self._forward(vision=vision),
          arguments=("reference",),
          shardings={0: reference_at, 1: self.batch_at},
        )
      elif name == "masked":
        counted, kernels = self._forward(self.rows_of("masked"), True)
        if name in objective.full_kl:
          clean = self._forward()
          counted, kernels = counted + clean[0], kernels + clean[1]
        yield scoring(
          "score_masked",
          programs.score_masked,
          self.abstract,
          self.seen,
          *batch,
          self._source(),
          packing,
          cost=(counted, kernels),
        )

  def rows_of(self, view: str) -> int:
    """Returns the number of rows that a view has for each prompt: G with a mask per sample."""
    objective = self.programs.objective
    return self.shapes.group if view == "masked" and objective.mask_per == "sample" else 1

  def _source(self) -> Any:
    """Returns the shape of the source of the masked view.

    It is a random key, or the prompts with images that the host has corrupted.
    """
    if not self.masked_rows:
      return self.shapes.key
    return _placed(self.shapes.prompt(self.masked_rows), self.batch_at)

  def _stats(self) -> dict[str, TokenStats]:
    objective = self.programs.objective
    return {name: self.shapes.stats(name in objective.full_kl) for name in objective.views}

  def _advantages(self) -> Iterator[StageProgram]:
    programs, shapes = self.programs, self.shapes
    needs, views, more = programs.objective.advantage_needs, self._stats(), {}
    if "components" in needs:
      names = sorted(rewards.metric_names(self.stage.rewards.to_dict()))
      more["components"] = more["component_weights"] = dict.fromkeys(names, shapes.rewards)
    if "baseline" in needs:
      more["baseline"] = shapes.shape("float32", shapes.prompts)
    if "penalty" in needs:
      more |= {"old": shapes.stats(), "ref": views["ref"]}
    state = programs.abstract_state.objective
    yield StageProgram(
      "advantages",
      "update",
      lambda: programs.advantages.lower(shapes.rewards, shapes.mask, more, state),
      runs=1,
      beside=self._others(),
    )
    if programs.scores_old:
      yield StageProgram(
        "compare",
        "update",
        lambda: programs.compare.lower(shapes.number, shapes.number, shapes.mask),
        runs=1,
        beside=self._others(),
      )

  def _update(self) -> Iterator[StageProgram]:
    programs, shapes, objective = self.programs, self.shapes, self.programs.objective
    trains = programs.trains_vision
    prompt, source = self._unseen(self.seen), shapes.key
    vision = prompt.features is None
    arguments = ["parameters", "optimizer"]
    if self.stage.kind == "rl":
      source = self._source()
      experience = Experience(
        mask=shapes.mask,
        advantages=shapes.number,
        old=shapes.stats() if programs.scores_old else None,
        rewards=shapes.rewards,
        views=self._stats(),
        sampler_logp=shapes.number,
        truncated=shapes.shape("bool", shapes.prompts, shapes.group),
      )
    else:
      experience = Experience(mask=shapes.mask, advantages=shapes.number, old=None, rewards=None)
    reference = None
    if "ref" in objective.grad_views:
      reference = _placed(self.abstract, self.params_at)
      arguments.append("reference")
    forward, kernels = self._forward(vision=vision)
    tower = (
      shapes.prompts * sum(flops.vision(self.model, f) for f in self.frames) if vision else 0.0
    )
    count = 3 * forward - (0 if trains else 2 * tower)
    # Forward pass, again if it is recomputed, and a backward pass with twice its FLOPs.
    passes = 3 + (self.model.remat == "full")
    attention_flops = passes * kernels
    for view in objective.grad_views:
      view_flops, view_kernels = self._forward(self.rows_of(view), True)
      times = 1 if view == "ref" else 3
      count += times * view_flops
      attention_flops += min(times, 3) * view_kernels
    if objective.needs_current:
      current_flops, current_kernels = self._forward(vision=vision)
      count += current_flops
      attention_flops += current_kernels
    features = size(self.seen.features, self.batch_at) if self.seen.features is not None else 0.0
    others = self._others(*arguments, prompts=1) if self.stage.kind == "rl" else 0.0
    yield StageProgram(
      "update",
      "update",
      lambda: programs.update.lower(
        programs.abstract_state,
        self.frozen,
        prompt,
        shapes.ids,
        experience,
        source,
        reference,
        self._packing(),
      ),
      runs=1,
      flops=count,
      kernels=attention_flops,
      beside=others + (features if prompt.features is None else 0.0),
      shardings={0: programs.state_shardings, 1: self.frozen_at, 2: self.batch_at},
      steps=float(np.mean(self.packing.used)),
      shares=self._tower_shares(),
    )

  # -- Attention ----------------------------------------------------------------------------------

  def _tower_shares(self) -> dict[str, Sequence[float]]:
    """Returns the shares of the vision tower's layers with windowed and with full attention."""
    vision = self.model.vision
    if vision.full_attention_layers is None:
      return {}
    full = len(vision.full_attention_layers) / vision.depth
    return {"blocks/cond": (1 - full, full)}

  def _frame_attention(self) -> float:
    """Returns the FLOPs of full attention in the vision tower for all prompts.

    0 if no kernel computes it.
    """
    vision = self.model.vision
    if self.model.attention == "xla":
      return 0.0
    layers = vision.full_attention_layers
    full = vision.depth if layers is None else len(layers)
    pairs = sum((rows * columns) ** 2 for rows, columns in self.frames)
    return self.shapes.prompts * 4.0 * vision.hidden_size * full * pairs

  def _prompt_attention(self) -> float:
    """Returns the FLOPs of attention in the prefill of one prompt; 0 if no kernel computes it."""
    model, length = self.model, self.shapes.length
    if not attention.reads(model, length):
      return 0.0
    return flops.decoder(model, 0, flops.seen(length), flops.seen(length, 0, model.sliding_window))

  def _response_attention(self) -> float:
    """Returns the FLOPs of attention of the responses to one prompt; 0 if no kernel computes it."""
    model = self.model
    if not attention.answers(model, self.programs.part_tokens):
      return 0.0
    keys = flops.seen(self.mean, self.shapes.length - 1)
    return self.shapes.group * flops.decoder(model, 0, keys)


def _rollout_runs(
  prompts: int,
  group: int,
  layout: Layout,
  prefill_size: int,
  tokens: int,
  chunk: int,
  positions: int,
) -> tuple[dict[str, int], list[float]]:
  """Simulates the schedule of a rollout in one shard, for responses of equal length.

  Args:
    prompts: number of prompts of the shard.
    group: G.
    layout: the first layout.
    prefill_size: A, the number of prompts that the shard prefills at once.
    tokens: number of tokens of each response.
    chunk: number of tokens that each sequence is decoded between two checks by the host.
    positions: number of earlier response tokens whose keys and values the decode state stores.

  Returns:
    The number of runs of each program, and the shares of the runs of `decode` that take each branch
    of its attention to earlier chunks. The first branch reads none of the `positions`, and each
    following branch a quarter more of them.
  """
  schedule, chunks = Schedule(prompts, group, 1, ladder(layout)), -(-tokens // chunk)
  runs: dict[str, int] = collections.Counter(prefill=0, decode=0, compact=0)
  ends = sorted({-(-positions * i // 4) for i in range(5)})
  taken: dict[int, int] = collections.Counter()
  age = np.zeros(prompts * group, int)  # chunks of each sample so far
  while schedule.waiting or schedule.alive.any():
    while schedule.prefill(prefill_size) is not None:
      runs["prefill"] += 1
    while schedule.smaller():
      schedule.compact()
      runs["compact"] += 1
    runs["decode"] += 1
    alive = schedule.sample[schedule.alive]
    taken[int(np.searchsorted(ends, age[alive].max() * chunk))] += 1
    age[alive] += 1
    done = schedule.alive.copy()
    done[done] = age[schedule.sample[done]] >= chunks
    schedule.retire(done)
  return runs, [taken[i] / runs["decode"] for i in range(len(ends))]

"""The programs of a stage as shapes: nothing is allocated, nothing runs.

Each comes with how often a step runs it, the FLOPs that the mathematics asks for, and what the
devices hold besides its arguments while it runs.
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
class Piece:
  """One program of a stage.

  Attributes:
    name: of the program, e.g. "update".
    part: of the step that it belongs to: "see", "rollout", "scores", "update", or "" if it is not
      part of every step.
    lower: the program before it is compiled.
    times: how often a step runs it.
    flops: model FLOPs of one run, on all devices together.
    kernels: FLOPs of attention in one run, on all devices, if kernels compute it.
    alive: bytes on each device that are there while it runs but are not its arguments.
    places: by number of the argument, where what outlives the program lies: it counts also where
      the program has no use for all of it.
    steps: how often its loops run whose length the data decide.
    shares: how often the branches of its conditions are taken (`planning.hlo`).
  """

  name: str
  part: str
  lower: Callable[[], Any]
  times: float = 0.0
  flops: float = 0.0
  kernels: float = 0.0
  alive: float = 0.0
  places: Mapping[int, Any] = dataclasses.field(default_factory=dict)
  steps: float = 1.0
  shares: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Stage:
  """The programs of a stage.

  Attributes:
    pieces: all of them.
    tokens: response tokens of a step.
    holds: bytes on each device by what it holds during the whole stage.
    facts: numbers that the programs follow from, for people.
    refusal: why the run itself would refuse such prompts, "" if it would not.
    needs: bytes beside what the stage holds, by formula (`memory.py`), of the update and scores.
  """

  pieces: list[Piece]
  tokens: float
  holds: dict[str, float]
  facts: dict[str, Any]
  refusal: str
  needs: float


def architecture(config: ConfigDict) -> models.ModelConfig:
  """The model of a config as a TPU computes it, from `config.json` alone, or from a published name.

  Raises:
    UserError: there is no such directory, and it is not named like a published model.
  """
  settings = config.model
  dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
  with validation(f"config.model.path={settings.path!r}: "):
    if settings.scratch:
      from jaxrl_vlm import scratch

      found = scratch.model_config(settings.scratch.to_dict()).replace(
        dtype=dtype, remat=settings.remat
      )
    elif pathlib.Path(settings.path).is_dir():
      try:
        found = models.from_directory(settings.path, dtype, settings.remat)
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
      found = models.from_hf(CONFIGS[max(names, key=len)], dtype=dtype, remat=settings.remat)
  with validation():
    return found.replace(lora=lora_of(config), rules=parallel.rules_of(config.sharding.to_dict()))


def weights(model: models.ModelConfig) -> float:
  """Bytes of all parameters in the dtype of activations."""
  return sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(models.abstract_params(model, model.dtype))
  )


def frame(model: models.ModelConfig, patches: int) -> flops.Frame:
  """Rows and columns of the squarest image of so many patches."""
  merge = model.vision.spatial_merge_size
  tokens = patches // merge**2
  rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
  return rows * merge, tokens // rows * merge


def buckets(
  config: ConfigDict, model: models.ModelConfig, length: int = 0, patches: int = 0
) -> tuple[int, int]:
  """Length and patches of prompts: as given, or the largest of the config that go together."""
  length = length or max(config.prompt_buckets)
  most = length * model.vision.spatial_merge_size**2
  fits = [n for n in config.patch_buckets if n <= most]
  return length, patches or max(fits, default=min(config.patch_buckets))


class _Shapes:
  """Sizes of a stage and the shapes of what its programs take."""

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
    """Without visual tokens; so many rows for each prompt."""
    count = self.prompts * rows
    one = models.dummy_prompt(self.model, 1, self.length, self.patches)
    one = dataclasses.replace(one, patches=one.patches.astype(jnp.dtype(self.model.dtype)))
    return jax.tree.map(lambda a: self.shape(a.dtype, count, *a.shape[1:]), one)

  def stats(self, full: bool = False) -> TokenStats:
    return TokenStats(self.number, self.number, self.number if full else None)


def _placed(tree: Any, place: Any) -> Any:
  """Shapes with where they lie; `place`: of all of them, or a pytree like them."""
  if isinstance(place, NamedSharding):
    place = jax.tree.map(lambda _: place, tree)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, place)


def size(tree: Any, place: Any) -> float:
  """Bytes of a pytree of shapes on each device."""
  if isinstance(place, NamedSharding):
    place = jax.tree.map(lambda _: place, tree)
  return memory.held(tree, place)


class Plan:
  """The programs of stage `index` of a config on a mesh of TPUs that need not be there.

  Args:
    config: of the run.
    index: of the stage.
    model: `architecture(config)`.
    devices: of a topology.
    usable: bytes of a device.
    length, patches: of every prompt.
    response_tokens: of every response; 0 is max_tokens.
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
        f"{stage.microbatches} x {rows} = {splits}; fewer microbatches, or mesh.tensor, will do"
      )
    self.rows, self.at_once = rows, 0
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
    self.whole = parallel.replicated(self.mesh)
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
    """Bytes of what outlives programs."""
    programs, objective = self.programs, self.programs.objective
    state, places = programs.abstract_state, programs.state_shardings
    views = (*objective.views, *objective.grad_views)
    trained = size(state.params, places.params)
    self.holds = {
      "parameters": trained + size(self.frozen, self.frozen_at),
      "optimizer": size(state, places) - trained,
      "reference": trained if "ref" in views else 0.0,
    }
    self.prompt = self.shapes.prompt()
    self.seen: Prompt = self.prompt
    if self.stage.kind == "rl":
      self.seen = jax.eval_shape(programs.see, self.abstract, self.prompt)
    self.one_prompt = size(self.seen, self.batch_at)
    ahead = self.config.pipeline == "one_step_off"
    self.prompts_held = 1 + ahead
    self.masked_rows = 0
    if "masked" in views and objective.mask_on == "original":
      random = objective.mask_kind in ("patches", "noise") and objective.mask_per == "sample"
      self.masked_rows = self.shapes.group if random else 1
    self.holds["prompts"] = (
      self.prompts_held * self.one_prompt
      + size(self.shapes.prompt(self.masked_rows), self.batch_at)
      if self.stage.kind == "rl"
      else 0.0
    )

  def plan(self) -> Stage:
    """All programs of the stage."""
    pieces, refusals = [], []
    make = self._rl if self.stage.kind == "rl" else self._sft
    for group in make():
      try:
        pieces += list(group())
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
      pieces,
      float(shapes.prompts * shapes.group * self.mean),
      self.holds,
      facts,
      "; ".join(refusals),
      self.programs.update_bytes(*shapes.sizes),
    )

  # -- Stages -------------------------------------------------------------------------------------

  def _sft(self) -> list[Callable[[], Iterator[Piece]]]:
    return [self._init, self._update, self._evaluation]

  def _rl(self) -> list[Callable[[], Iterator[Piece]]]:
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
    """Of responses that are all as long as the mean; arrays on the host."""
    shapes = self.shapes
    mask = np.zeros((shapes.prompts, shapes.group, shapes.tokens), bool)
    mask[..., : self.mean] = True
    return self.programs.packed(mask)

  def _packing(self) -> Any:
    """Shapes of the packing, where `Programs.pack` puts it."""
    packing = self.packing
    index = NamedSharding(self.mesh, Spec(None, None, parallel.ROWS))
    return jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(np.shape(a), jnp.asarray(a).dtype, sharding=s),
      packing,
      dataclasses.replace(
        packing, index=index, used=self.whole, order=None if packing.order is None else self.whole
      ),
    )

  def _others(self, *held: str, prompts: float = 0.0) -> float:
    """Bytes of all that is held but `held`; `prompts`: how many of those are among them."""
    rest = sum(count for name, count in self.holds.items() if name not in held)
    return rest - prompts * self.one_prompt

  def _init(self) -> Iterator[Piece]:
    state, places = self.programs.abstract_state, self.programs.state_shardings
    params = _placed(state.params, places.params)
    yield Piece(
      "init_state",
      "",
      lambda: self.programs.init_state.lower(params),
      alive=size(self.frozen, self.frozen_at) + self.holds["reference"],
      places={0: places.params},
    )

  def _see(self) -> Iterator[Piece]:
    shapes, programs = self.shapes, self.programs
    count = shapes.prompts * sum(flops.vision(self.model, f) for f in self.frames)
    # What dynamic sampling has kept is seen once more.
    yield Piece(
      "see",
      "see",
      lambda: programs.see.lower(self.abstract, self.prompt),
      times=1 + programs.objective.filter_groups,
      flops=count,
      kernels=self._of_frames(),
      alive=self._others("parameters", prompts=1),
      places={0: self.params_at, 1: self.batch_at},
      shares=self._tower(),
    )

  def _rollouts(self) -> Iterator[Piece]:
    """Of the step, and of its greedy baselines."""
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
    """What draws the answers of the stage's evaluations."""
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

  def _evaluation(self) -> Iterator[Piece]:
    settings = self.stage.eval
    if not settings.examples:
      return
    sampler = self.evaluation_sampler()
    shapes = _Shapes(self.model, settings.batch, 1, 1, self.shapes.length, self.shapes.patches)
    yield from self._rollout("eval", "", sampler, shapes.prompt(), settings.batch)

  def _rollout(
    self, prefix: str, part: str, sampler: Any, prompt: Prompt, prompts: int
  ) -> Iterator[Piece]:
    lowered = sampler.lower(self.abstract, prompt)
    group, length, own = sampler.sampling.num_samples, self.shapes.length, part != ""
    rows = parallel.rows(sampler.mesh)
    args = lowered["prefill"].args_info[0]
    prefilled, state = args[3].shape[1], args[2]
    layout = Layout(state.used.shape[1], state.length.shape[1])
    runs, reached = _draw(
      prompts // rows, group, layout, prefilled, self.mean, sampler.chunk, state.k.shape[-2]
    )
    unseen = () if prompt.features is not None else self.frames
    models_flops = {
      "prefill": rows * prefilled * flops.prefill(self.model, length, unseen),
      "decode": prompts
      * flops.responses(self.model, [self.mean] * group, length)
      / max(runs["decode"], 1),
    }
    kernels = rows * prefilled * self._of_prompt()
    here = self._others("parameters")
    given = self.one_prompt if own else 0
    places: dict[str, dict[int, Any]] = {
      "reshard": {0: self.params_at, 1: self.batch_at},
      "prefill": {0: sampler.params_at, 1: sampler.batch_at},
      "decode": {0: sampler.params_at},
    }
    if sampler.reshard is None:
      alive = {"prefill": here - given, "decode": here, "compact": here + self.holds["parameters"]}
    else:  # the copies, besides what they are of
      weights, light = lowered["reshard"].out_info
      weights, light = size(weights, sampler.params_at), size(light, sampler.batch_at)
      here += self.holds["parameters"]
      alive = {
        "reshard": here - given - self.holds["parameters"],
        "prefill": here,
        "decode": here + light,
        "compact": here + light + weights,
      }
      runs["reshard"] = 1
    for name, program in lowered.items():
      shares = {**self._tower(), **({"layers/cond": reached} if name == "decode" else {})}
      yield Piece(
        "_".join(filter(None, (prefix, name))),
        part,
        lambda program=program: program,
        times=runs.get(name, 0) if own else 0,
        flops=models_flops.get(name, 0.0),
        kernels=kernels if name == "prefill" else 0.0,
        alive=alive.get(name, here),
        places=places.get(name, {}),
        shares=shares,
        steps=sampler.chunk,
      )
    if own:
      self.at_once = layout.sequences // group * rows

  def _unseen(self, prompt: Prompt) -> Prompt:
    return dataclasses.replace(prompt, features=None) if self.programs.trains_vision else prompt

  def _forward(self, rows: int = 1, sees: bool = False) -> tuple[float, float]:
    """Model FLOPs, and those of attention, of all prompts with `rows` rows and their responses."""
    shapes, model = self.shapes, self.model
    frames = self.frames if sees else ()
    reading = rows * flops.prefill(model, shapes.length - 1, frames)
    answering = flops.responses(model, [self.mean] * shapes.group, shapes.length)
    kernels = rows * self._of_prompt() + self._of_responses()
    return (
      shapes.prompts * (reading + answering),
      shapes.prompts * kernels + (rows * self._of_frames() if sees else 0.0),
    )

  def _scores(self) -> Iterator[Piece]:
    programs, shapes, objective = self.programs, self.shapes, self.programs.objective
    packing, steps = self._packing(), float(np.mean(self.packing.used))
    where = {0: self.params_at, 1: self.batch_at}

    def piece(name, program, *args, cost, places=where, given=("parameters",)):
      counted, kernels = cost
      return Piece(
        name,
        "scores",
        lambda: program.lower(*args),
        times=1,
        flops=counted,
        kernels=kernels,
        alive=self._others(*given, prompts=1),
        places=places,
        steps=steps,
        shares=self._tower(),
      )

    batch = shapes.ids, shapes.mask
    if programs.scores_old:
      yield piece(
        "score", programs.score, self.abstract, self.seen, *batch, packing, cost=self._forward()
      )
    unseen, sees = self._unseen(self.seen), programs.trains_vision
    settings = self.config.model.lora
    base = bool(settings.rank and not settings.path and self.index == 0)
    reference = lora.strip(self.abstract) if base else self.abstract
    reference_at = lora.strip(self.params_at) if base else self.params_at
    for name in objective.views:
      if name == "ref" and name in objective.full_kl:
        once, kernels = self._forward(sees=sees)
        yield piece(
          "score_reference",
          programs.score_reference,
          self.abstract,
          _placed(reference, reference_at),
          unseen,
          *batch,
          packing,
          cost=(2 * once, 2 * kernels),
          given=("parameters", "reference"),
          places={0: self.params_at, 1: reference_at, 2: self.batch_at},
        )
      elif name == "ref":
        program = programs.score_base if base else programs.score
        yield piece(
          "score_base" if base else "score_ref",
          program,
          reference,
          unseen,
          *batch,
          packing,
          cost=self._forward(sees=sees),
          given=("reference",),
          places={0: reference_at, 1: self.batch_at},
        )
      elif name == "masked":
        counted, kernels = self._forward(self.rows_of("masked"), True)
        if name in objective.full_kl:
          clean = self._forward()
          counted, kernels = counted + clean[0], kernels + clean[1]
        yield piece(
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
    """Prompts under which a view scores the responses of one prompt."""
    objective = self.programs.objective
    return self.shapes.group if view == "masked" and objective.mask_per == "sample" else 1

  def _source(self) -> Any:
    """What masks: a key, or prompts that the host has corrupted."""
    if not self.masked_rows:
      return self.shapes.key
    return _placed(self.shapes.prompt(self.masked_rows), self.batch_at)

  def _stats(self) -> dict[str, TokenStats]:
    objective = self.programs.objective
    return {name: self.shapes.stats(name in objective.full_kl) for name in objective.views}

  def _advantages(self) -> Iterator[Piece]:
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
    yield Piece(
      "advantages",
      "update",
      lambda: programs.advantages.lower(shapes.rewards, shapes.mask, more, state),
      times=1,
      alive=self._others(),
    )
    if programs.scores_old:
      yield Piece(
        "compare",
        "update",
        lambda: programs.compare.lower(shapes.number, shapes.number, shapes.mask),
        times=1,
        alive=self._others(),
      )

  def _update(self) -> Iterator[Piece]:
    programs, shapes, objective = self.programs, self.shapes, self.programs.objective
    trains = programs.trains_vision
    prompt, source = self._unseen(self.seen), shapes.key
    sees = prompt.features is None
    given = ["parameters", "optimizer"]
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
      given.append("reference")
    forward, kernels = self._forward(sees=sees)
    tower = shapes.prompts * sum(flops.vision(self.model, f) for f in self.frames) if sees else 0.0
    count = 3 * forward - (0 if trains else 2 * tower)
    passes = 3 + (self.model.remat == "full")  # forward, again for the gradient, two of that
    attended = passes * kernels
    for view in objective.grad_views:
      more, of_kernels = self._forward(self.rows_of(view), True)
      times = 1 if view == "ref" else 3
      count, attended = count + times * more, attended + min(times, 3) * of_kernels
    if objective.needs_current:
      more, of_kernels = self._forward(sees=sees)
      count, attended = count + more, attended + of_kernels
    features = size(self.seen.features, self.batch_at) if self.seen.features is not None else 0.0
    here = self._others(*given, prompts=1) if self.stage.kind == "rl" else 0.0
    yield Piece(
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
      times=1,
      flops=count,
      kernels=attended,
      alive=here + (features if prompt.features is None else 0.0),
      places={0: programs.state_shardings, 1: self.frozen_at, 2: self.batch_at},
      steps=float(np.mean(self.packing.used)),
      shares=self._tower(),
    )

  # -- Attention of kernels -----------------------------------------------------------------------

  def _tower(self) -> dict[str, Sequence[float]]:
    """Of the tower's layers the share within windows, and over whole frames."""
    vision = self.model.vision
    if vision.full_attention_layers is None:
      return {}
    full = len(vision.full_attention_layers) / vision.depth
    return {"blocks/cond": (1 - full, full)}

  def _of_frames(self) -> float:
    """FLOPs of attention over whole frames, of all prompts."""
    vision = self.model.vision
    if self.model.attention == "xla":
      return 0.0
    layers = vision.full_attention_layers
    full = vision.depth if layers is None else len(layers)
    seen = sum((rows * columns) ** 2 for rows, columns in self.frames)
    return self.shapes.prompts * 4.0 * vision.hidden_size * full * seen

  def _of_prompt(self) -> float:
    """FLOPs of a prompt's attention, if a kernel computes it."""
    model, length = self.model, self.shapes.length
    if not attention.reads(model, length):
      return 0.0
    return flops.decoder(model, 0, flops.seen(length), flops.seen(length, 0, model.sliding_window))

  def _of_responses(self) -> float:
    """FLOPs of the attention of a prompt's responses, if a kernel computes it."""
    model = self.model
    if not attention.answers(model, self.programs.part_tokens):
      return 0.0
    keys = flops.seen(self.mean, self.shapes.length - 1)
    return self.shapes.group * flops.decoder(model, 0, keys)


def _draw(
  prompts: int, group: int, layout: Layout, prefilled: int, tokens: int, chunk: int, positions: int
) -> tuple[dict[str, int], list[float]]:
  """How a device's share of a rollout goes if all responses have as many tokens.

  Returns:
    how often each program runs; the share of decode's runs in each branch of its attention, which
    sees a quarter more of what has been decoded before than the branch ahead of it.
  """
  schedule, chunks = Schedule(prompts, group, 1, ladder(layout)), -(-tokens // chunk)
  runs: dict[str, int] = collections.Counter(prefill=0, decode=0, compact=0)
  ends = sorted({-(-positions * i // 4) for i in range(5)})
  reached: dict[int, int] = collections.Counter()
  age = np.zeros(prompts * group, int)
  while schedule.waiting or schedule.alive.any():
    while schedule.prefill(prefilled) is not None:
      runs["prefill"] += 1
    while schedule.smaller():
      schedule.compact()
      runs["compact"] += 1
    runs["decode"] += 1
    alive = schedule.sample[schedule.alive]
    reached[int(np.searchsorted(ends, age[alive].max() * chunk))] += 1
    age[alive] += 1
    done = schedule.alive.copy()
    done[done] = age[schedule.sample[done]] >= chunks
    schedule.retire(done)
  return runs, [reached[i] / runs["decode"] for i in range(len(ends))]

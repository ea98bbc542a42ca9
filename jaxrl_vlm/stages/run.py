"""What the stages of a run share: the model on its mesh, files in the workdir, and the bookkeeping
around a training step (metrics, checkpoints, evaluation, stopping)."""

import contextlib
import dataclasses
import functools
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxrl_vlm import memory, models, parallel, report, rewards
from jaxrl_vlm import metrics as metrics_lib
from jaxrl_vlm.checkpoint import Checkpoints
from jaxrl_vlm.data import pipeline, sources
from jaxrl_vlm.data.processor import EncodedPrompt
from jaxrl_vlm.errors import UserError, validation
from jaxrl_vlm.evaluate import Evaluation, evaluate
from jaxrl_vlm.evaluate import sampling as evaluation_sampling
from jaxrl_vlm.example import Example
from jaxrl_vlm.models import lora
from jaxrl_vlm.rewards.pool import RewardPool
from jaxrl_vlm.rollout import make_sampler
from jaxrl_vlm.stages.loading import load_model, model_path, trainable_of
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Params, Prompt

# What the random key of an evaluation is for; far from the numbers of the stages' own purposes.
_EVALUATION = 1000


class Stopped(Exception):
  """The run was asked to stop; whoever calls `run_all` sees it after all is saved. No error."""

  agreed = True  # all processes of the run stop at once


class _Silent:
  """Files and display of all processes but the first: whatever is called does nothing."""

  def __getattr__(self, name: str) -> Callable:
    return lambda *args, **kwargs: None

  def __enter__(self) -> "_Silent":
    return self

  def __exit__(self, *exception) -> None:
    pass


def source_spec(stage: ConfigDict, split: str) -> dict[str, Any]:
  """What `sources.open_source` opens for this split of a stage."""
  spec = stage.data.to_dict()
  if split == "test":
    spec["options"] |= stage.eval.options.to_dict()
  return spec


class Run:
  """One run: everything that outlives a stage.

  Attributes:
    config: resolved.
    workdir: where it writes.
    mesh, model, processor: as loaded.
    model_path: directory that the model was loaded from.
    trainable: patterns of the parameters that train; () is all.
    trained: those parameters at the end of the last finished stage; None while a stage has them.
    frozen: the other parameters.
    step: global step, over all stages.
    capacity: bytes of a device that are meant to be filled; 0 if that is not known.
  """

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, unreadable: Iterable[int] = ()):
    """`unreadable`: checkpoints to pass over, see `checkpoint.Unreadable`."""
    self.config, self.workdir = config, workdir
    self.mesh = parallel.make_mesh(config.mesh)
    # What is planned with it must be the same in all processes.
    self.capacity = memory.SHARE * (
      config.device_memory * memory.GIB
      or min(parallel.gather(memory.capacity(self.mesh.local_devices[0])))
    )
    self.checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep, unreadable)
    self.position = self.checkpoints.latest_meta() or {"stage": 0, "stage_step": 0, "step": 0}
    self.step: int = self.position["step"]
    self.trainable = trainable_of(config)
    self.model_path = self._find_model()
    self.model, params, self.processor = load_model(config, self.model_path, self.mesh)
    self.trained: Params | None
    self.trained, self.frozen = lora.split(params, self.trainable)
    del params
    self.abstract_params = models.abstract_params(
      self.model.config, config.model.param_dtype, self.trainable
    )
    self.param_shardings = parallel.param_shardings(
      self.mesh, self.abstract_params, self.model.config.rules
    )
    self.metrics: Any = _Silent()
    self.rollouts: Any = _Silent()
    self.progress: Any = _Silent()
    if parallel.is_first():
      self.metrics = metrics_lib.MetricsWriter(
        workdir, start=self.step + 1 if self.step else 0, keep=self.position.get("records")
      )
      self.rollouts = report.RolloutLog(workdir)
      self.progress = metrics_lib.Progress(sum(s.steps for s in config.stages), config.log_every)
    self.stop_signal = ""
    self.compilations = _count_compilations()

  @property
  def params(self) -> Params:
    """All parameters at the end of the last finished stage."""
    assert self.trained is not None, "a stage is changing them"
    return lora.merge(self.frozen, self.trained)

  def _find_model(self) -> pathlib.Path:
    path, architecture = model_path(self.config, self.workdir), self.config.model.scratch

    def create():
      if architecture and not (path / "config.json").exists():  # written last
        from jaxrl_vlm import scratch

        scratch.create(path, architecture.to_dict(), self._some_texts(), self.config.seed)

    parallel.in_turn(create)
    return path

  def _some_texts(self, count: int = 4000) -> Iterator[str]:
    for stage in self.config.stages:
      source = self._open(stage, "train")
      for i in range(min(count, len(source))):
        example = source[i]
        yield from (example.question, example.target or example.answer)

  def open_source(self, stage: ConfigDict, split: str) -> sources.Source:
    """The stage's training examples, or its held-out questions with `eval.options` of their own."""
    return parallel.in_turn(lambda: self._open(stage, split))  # one writes what is to be written

  def _open(self, stage: ConfigDict, split: str) -> sources.Source:
    need = "target" if stage.kind == "sft" and split == "train" else "answer"
    verifiers = tuple(stage.rewards.to_dict())
    return sources.open_source(source_spec(stage, split), split, need=need, verifiers=verifiers)

  @property
  def system(self) -> str | None:
    return self.config.system_prompt or None

  def encode(self, examples: Sequence[Example]) -> list[EncodedPrompt]:
    """The prompts of examples.

    Raises:
      UserError: an image that does not decode, a prompt longer than the buckets; names the example.
    """
    with validation():
      return [self.processor.encode(example, self.system) for example in examples]

  def read(
    self, make: Callable[[], list[Example]], count: int
  ) -> tuple[list[Any], list[Any], Prompt]:
    """P prompts, each process reading those of its own rows.

    Args:
      make: examples of the rows `parallel.own_rows(mesh, P).here`.
      count: P.

    Returns:
      examples and encoded, [P] with None for the rows of others, and the prompts on the mesh.

    Raises:
      UserError: in all processes, if one of them cannot read or encode an example.
    """

    def read():
      examples = make()
      return examples, self.encode(examples)

    (examples, encoded), sizes = parallel.exchange(read, lambda mine: self.processor.sizes(mine[1]))
    rows = parallel.own_rows(self.mesh, count)
    return rows.spread(examples), rows.spread(encoded), self.place(encoded, sizes, rows)

  def place(
    self, encoded: Sequence[EncodedPrompt], sizes: Sequence[Sequence[int]], rows: parallel.Rows
  ) -> Prompt:
    """Encoded prompts of the rows `here` on the mesh; `sizes`: `processor.sizes` of each process.

    Patches go as the tower takes them, in the dtype of activations.
    """
    prompt = self.processor.collate(encoded, *map(max, zip(*sizes, strict=True)))
    patches = prompt.patches.astype(jnp.dtype(self.model.config.dtype))
    return parallel.put_rows(self.mesh, dataclasses.replace(prompt, patches=patches), rows)

  def random_key(self, purpose: int, *more: int) -> jax.Array:
    """A key that depends on the seed, the global step and the purpose, and on nothing else."""
    key = jax.random.key(self.config.seed)
    for number in (purpose, self.step, *more):
      key = jax.random.fold_in(key, number)
    return parallel.everywhere(self.mesh, key)

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Handles SIGTERM and SIGINT (save, then stop) and closes files, whatever happens inside."""

    def ask_to_stop(number, _):
      if self.stop_signal:  # asked twice: at once
        raise KeyboardInterrupt
      self.stop_signal = signal.Signals(number).name
      print(
        f"{self.stop_signal}: saving and stopping (once more stops at once)",
        file=sys.stderr,
        flush=True,
      )

    old = {}
    with contextlib.suppress(ValueError):  # not the main thread: a notebook's own affair
      for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, ask_to_stop)
    try:
      with self.progress, parallel.stopping_all():
        yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)
      self.checkpoints.close()
      self.metrics.close()


class StageRun:
  """The bookkeeping of one stage: where it resumes, and what happens around every step.

  Attributes:
    state: TrainState; the stage's loop replaces it.
    reference: the parameters that train as they were at the start of the stage, if the objective
      compares with them, else None.
    reference_is_base: adapters added nothing at the start: the reference has none.
    start: the step of this stage to begin with.
    rows: of the P prompts of a step, this process's.
    data: iterator of lists of Examples, those of `rows`.
    pool: grades answers; None in a supervised stage that evaluates nothing.
    accuracy: the verifier that is called accuracy.
    generated_tokens: response tokens that the stage has generated so far; None if it never counted.
    ahead: state of `data` before the batch that is drawn ahead of its step, None if none is.
    verifiers: metric names of all that have had a weight in a reward of this stage.
    stop: the signal that asked a process of the run to stop, as all of them know it.
  """

  def __init__(
    self, run: Run, index: int, programs: Programs, pool: RewardPool | None, data: Any = None
  ):
    self.run, self.index, self.programs, self.pool = run, index, programs, pool
    self.stage = run.config.stages[index]
    # The metric of a verifier that is a function has another name than its key in the config.
    self.accuracy = self.stage.accuracy
    if self.stage.rewards and not self.accuracy:
      self.accuracy = rewards.metric_names(self.stage.rewards.to_dict())[0]
    self.rows = parallel.own_rows(run.mesh, self.stage.prompts_per_step)
    self.data = data if data is not None else self._make_data()
    objective = programs.objective
    self.keep_reference = "ref" in (*objective.views, *objective.grad_views)
    self.reference: Params | None = None
    settings = run.config.model.lora
    self.reference_is_base = bool(settings.rank and not settings.path and index == 0)
    self._pending: tuple[int, Any, dict[str, float]] | None = None
    self._clock = time.monotonic()
    self._eval_rollout: Callable | None = None
    self._eval_examples: Sequence[Example] = ()
    with validation(f"config.stages[{index}]: "):
      self._eval_sampling = evaluation_sampling(self.stage)
    self.generated_tokens: int | None = None
    self.ahead: Any = None
    self.verifiers: set[str] = set()
    self.stop = ""

    position = run.position
    # From here on the stage has them: nothing else keeps a second copy alive.
    start, run.trained = run.trained, None
    if position["step"] and position["stage"] == index:
      self.start = position["stage_step"]
      self.generated_tokens = position.get("generated_tokens")
      del start
      self._restore()
      if position.get("data") is not None:
        self.data.set_state(position["data"])
    else:
      self.start = 0
      if self.keep_reference:
        self.reference = self._part_of_reference(start)
        start = _copy(start)
      self.state = programs.init_state(start)
      del start
    if not self.start or position.get("evaluate"):
      try:
        self._evaluate_and_log()
      except Stopped:
        raise self._stopped() from None

  @property
  def params(self) -> Params:
    """All parameters as they are now."""
    return lora.merge(self.run.frozen, self.state.params)

  @property
  def reference_params(self) -> Params:
    """All parameters of the reference; those that are frozen are the policy's own."""
    assert self.reference is not None, "the objective compares with none"
    return lora.merge(self._part_of_reference(self.run.frozen), self.reference)

  def _part_of_reference(self, params: Any) -> Any:
    return lora.strip(params) if self.reference_is_base else params

  def _make_data(self):
    stage = self.stage
    source = self.run.open_source(stage, "train")
    return pipeline.make_iterator(
      source,
      batch_size=stage.prompts_per_step,
      seed=self.run.config.seed + self.index,
      rows=self.rows.here,
    )

  def _restore(self) -> None:
    """The state, and the reference if there is one, from the newest checkpoint."""
    programs = self.programs

    def abstract(tree, shardings):
      return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
      )

    target: dict[str, Any] = {"train": abstract(programs.abstract_state, programs.state_shardings)}
    reference = self._part_of_reference(target["train"].params)
    if self.keep_reference and reference:
      target["reference"] = reference
    state = self.run.checkpoints.restore(target)
    self.state = state["train"]
    if self.keep_reference:
      self.reference = state.get("reference", {})

  def steps(self) -> Iterator[int]:
    """The steps of this stage that are still to do; sets run.step to the step being done."""
    step = self.start
    while not self.ends(step):
      self._begun = step, self._data_state(), self.generated_tokens
      self.run.step += 1
      yield step
      self._after_step(step)
      step += 1
    self._flush()
    self.run.trained = self.state.params

  def _data_state(self) -> Any:
    """Of the data that no step has used."""
    return self.data.get_state() if self.ahead is None else self.ahead

  def _agree_to_stop(self) -> None:
    self.stop = next(filter(None, parallel.gather(self.run.stop_signal)), "")

  def stop_if_asked(self) -> None:
    """Raises Stopped, in all processes, if one of them was asked to stop."""
    self._agree_to_stop()
    if self.stop:
      raise Stopped

  def _stopped(self) -> Stopped:
    self.run.checkpoints.wait()
    return Stopped(f"{self.stop}: stopped after step {self.run.step}")

  def saves(self, step: int) -> bool:
    """Whether a checkpoint follows the step that is being done, as far as is known."""
    return bool(
      self.stop
      or step + 1 >= self.stage.steps
      or self.run.step % self.run.config.checkpoint.every == 0
    )

  def ends(self, done: int) -> bool:
    """Whether the stage ends after `done` steps: it has done them all or spent its tokens."""
    budget = self.stage.get("token_budget", 0)
    return done >= self.stage.steps or 0 < budget <= (self.generated_tokens or 0)

  def generated(self, tokens: int) -> None:
    """Counts response tokens of the step that is being done, as they are sampled.

    All count, also those that dynamic sampling then throws away.
    """
    self.generated_tokens = (self.generated_tokens or 0) + tokens

  @contextlib.contextmanager
  def before_update(self) -> Iterator[None]:
    """Around what a step does before it changes anything.

    Where that is ended, by an error in the user's data or as the run is to stop, the steps that are
    done are saved: who continues begins with this one.
    """
    try:
      self.stop_if_asked()
      yield
    except (UserError, Stopped) as ended:
      done, data, self.generated_tokens = self._begun  # without what this step has sampled already
      self.run.step -= 1
      if done > self.start:
        self._flush()
        self._save(done, None, data)
      if isinstance(ended, Stopped):
        raise self._stopped() from None
      self.run.checkpoints.wait()
      raise

  def log(self, device_metrics: Any, host_metrics: dict[str, float], tokens: int) -> None:
    """Takes the metrics of a step; they are fetched and written while the next step runs."""
    self._flush()
    values: dict[str, float] = {**host_metrics, "_tokens": float(tokens)}
    if self.generated_tokens is not None:
      values["train/generated_tokens"] = self.generated_tokens
    self._pending = (self.run.step, device_metrics, values)

  def _flush(self) -> None:
    if self._pending is None:
      return
    step, device, values = self._pending
    self._pending = None
    values = dict(values)
    tokens = values.pop("_tokens")
    for key, value in jax.device_get(device).items():
      name = f"train/{key}" if key in ("loss", "grad_norm", "bad_steps") else f"objective/{key}"
      values[name] = float(value)
    now = time.monotonic()
    values["time/step_seconds"] = now - self._clock
    values["time/tokens_per_second"] = tokens / (now - self._clock)
    count, seconds = self.run.compilations()
    values["time/compilations"], values["time/compile_seconds"] = float(count), seconds
    self._clock = now
    self.run.metrics.write(step, self.stage.kind, values)
    self.run.progress.update(step, self.stage.kind, values)
    limit = self.run.config.max_bad_steps
    if values["train/bad_steps"] >= limit:
      self.run.checkpoints.wait()
      raise UserError(
        f"step {step}: the loss or gradient was NaN or infinite {limit} times in a row "
        f"(config.max_bad_steps={limit}); the last good checkpoint is kept in "
        f"{self.run.checkpoints.path}; try a lower "
        f"config.stages[{self.index}].optimizer.learning_rate in another --workdir"
      )

  def _after_step(self, step: int) -> None:
    done = step + 1
    last = self.ends(done)
    every = self.stage.eval.every
    due = bool(self.stage.eval.examples and (last or (every and done % every == 0)))
    self._agree_to_stop()  # one that comes from here on is for the evaluation or the next step
    if due or last or self.saves(step):
      # A run resumed from this checkpoint never comes back to this step's metrics.
      self._flush()
    accuracy = None
    if due and not self.stop:
      with contextlib.suppress(Stopped):
        accuracy, due = self._evaluate_and_log(), False
    if last or self.saves(step):
      self._save(done, accuracy, self._data_state(), due)
    if self.stop and (due or not last or self.index < len(self.run.config.stages) - 1):
      raise self._stopped()

  def _save(self, done: int, accuracy: float | None, data: Any, due: bool = False) -> None:
    """`due`: an evaluation, with which whoever continues from here begins."""
    state: dict[str, Any] = {"train": self.state}
    if self.reference:
      state["reference"] = self.reference
    # Parameters that a bad step left alone are good parameters: there is nothing else to check.
    self.run.checkpoints.save(
      self.run.step,
      state,
      {
        "stage": self.index,
        "stage_step": done,
        "step": self.run.step,
        "generated_tokens": self.generated_tokens,
        "data": data,
        "evaluate": due,
        "records": self.run.metrics.records if parallel.is_first() else None,
      },
      accuracy,
    )

  def correct(self, components: Mapping[str, np.ndarray], total: np.ndarray) -> np.ndarray:
    """The verifier called accuracy, [P, G]; the total for samples that it does not judge."""
    value = components.get(self.accuracy)
    return total if value is None else np.where(np.isnan(value), total, value)

  # -- Evaluation ---------------------------------------------------------------------------------

  def evaluate(self) -> Evaluation | None:
    """Held-out accuracy of the current parameters; None if the stage asks for no evaluation."""
    settings = self.stage.eval
    if not settings.examples:
      return None
    assert self.pool is not None
    run = self.run
    if self._eval_rollout is None:
      source = run.open_source(self.stage, "test")
      self._eval_examples = _Some(source, min(settings.examples, len(source)))
      self._eval_rollout = make_sampler(
        run.model,
        run.mesh,
        self._eval_sampling,
        run.param_shardings,
        **run.config.rollout.to_dict(),
        room=self.programs.room,
        samples_field=f"config.stages[{self.index}].eval.samples",
      )
    rollout = functools.partial(self._eval_rollout, each_chunk=self.stop_if_asked)
    return evaluate(
      rollout,
      self.params,
      run.processor,
      self._eval_examples,
      self.pool,
      correct=self.correct,
      batch=settings.batch,
      mesh=run.mesh,
      place=run.place,
      key=run.random_key(_EVALUATION),
      system=run.system,
    )

  def _evaluate_and_log(self) -> float | None:
    result = self.evaluate()
    if result is None:
      return None
    run = self.run
    run.metrics.write(
      run.step, self.stage.kind, {f"eval/{k}": v for k, v in result.metrics.items()}
    )
    shown = "  ".join(f"{k} {v:.3f}" for k, v in sorted(result.metrics.items()))
    run.progress.log(f"{self.stage.kind}  held-out after step {run.step}: {shown}")
    self._clock = time.monotonic()
    return result.metrics["accuracy"]


class _Some(Sequence[Example]):
  """The first examples of a source, each read when it is first asked for."""

  def __init__(self, source: sources.Source, count: int):
    self._read, self._count = functools.cache(source.__getitem__), count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: Any) -> Any:
    if index not in range(self._count):
      raise IndexError(index)
    return self._read(index)


def _copy(tree: Params) -> Params:
  """A copy on the device, because an update gives its inputs away."""
  return jax.tree.map(jnp.copy, tree)


def _count_compilations() -> Callable[[], tuple[int, float]]:
  """The result tells how often XLA has compiled in this process since now, and seconds.

  A program that comes from the cache on disk counts too, with the time it takes to read it.
  """
  taken = _compile_seconds()
  before = len(taken)
  return lambda: (len(taken) - before, sum(taken[before:]))


@functools.cache  # jax listens for as long as the process lives
def _compile_seconds() -> list[float]:
  """Of everything that is compiled from now on."""
  taken: list[float] = []

  def listen(event: str, duration_secs: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      taken.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return taken

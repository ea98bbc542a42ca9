"""The code that all stages of a run share.

`Run` has the model on its mesh and the files in the workdir. `StageRun` does what surrounds each
training step: metrics, checkpoints, evaluation, and stopping on a signal.
"""

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

# The purpose of evaluations in `Run.random_key`. It differs from the purposes in rl.py.
_EVALUATION = 1000


class Stopped(Exception):
  """The run was asked to stop. This is not an error.

  `run_all` raises it after a checkpoint has been saved.
  """

  agreed = True  # all processes of the run raise it


class _Silent:
  """Takes the place of output files and progress display in all processes except process 0.

  All of its methods do nothing.
  """

  def __getattr__(self, name: str) -> Callable:
    return lambda *args, **kwargs: None

  def __enter__(self) -> "_Silent":
    return self

  def __exit__(self, *exception) -> None:
    pass


def source_spec(stage: ConfigDict, split: str) -> dict[str, Any]:
  """Returns the first argument of `sources.open_source` for a split of the stage's dataset."""
  spec = stage.data.to_dict()
  if split == "test":
    spec["options"] |= stage.eval.options.to_dict()
  return spec


class Run:
  """A run, with everything that all of its stages use.

  Attributes:
    config: the config with all overrides applied.
    workdir: directory of the run.
    mesh, model, processor: as loaded.
    model_path: directory that the model was loaded from.
    trainable: patterns of the trained parameters. () trains all.
    trained: the trained parameters at the end of the last finished stage. None during a stage.
    frozen: the other parameters.
    position: what `StageRun` saved with the newest readable checkpoint (stage, step, data position
      ...). The start of the first stage if there is no checkpoint.
    step: global step, counted over all stages.
    capacity: bytes on each device that the run plans to fill, or 0 if unknown.
  """

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, unreadable: Iterable[int] = ()):
    """Loads the model, and finds the position of the newest readable checkpoint.

    Args:
      config: the config.
      workdir: directory of the run.
      unreadable: steps of checkpoints to skip, see `checkpoint.Unreadable`.
    """
    self.config, self.workdir = config, workdir
    self.mesh = parallel.make_mesh(config.mesh)
    # The minimum over all processes, because all must plan the same batches.
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
    assert self.trained is not None, "during a stage, StageRun has the parameters"
    return lora.merge(self.frozen, self.trained)

  def _find_model(self) -> pathlib.Path:
    path, architecture = model_path(self.config, self.workdir), self.config.model.scratch

    def create():
      if architecture and not (path / "config.json").exists():  # `scratch.create` writes it last
        from jaxrl_vlm import scratch

        scratch.create(path, architecture.to_dict(), self._training_texts(), self.config.seed)

    parallel.in_turn(create)
    return path

  def _training_texts(self, count: int = 4000) -> Iterator[str]:
    """Yields the texts of up to `count` training examples of each stage."""
    for stage in self.config.stages:
      source = self._open(stage, "train")
      for i in range(min(count, len(source))):
        example = source[i]
        yield from (example.question, example.target or example.answer)

  def open_source(self, stage: ConfigDict, split: str) -> sources.Source:
    """Opens the training examples of a stage, or its held-out questions with `eval.options`."""
    # Process 0 goes first, because opening a dataset may prepare it on disk.
    return parallel.in_turn(lambda: self._open(stage, split))

  def _open(self, stage: ConfigDict, split: str) -> sources.Source:
    need = "target" if stage.kind == "sft" and split == "train" else "answer"
    verifiers = tuple(stage.rewards.to_dict())
    return sources.open_source(source_spec(stage, split), split, need=need, verifiers=verifiers)

  @property
  def system(self) -> str | None:
    return self.config.system_prompt or None

  def encode(self, examples: Sequence[Example]) -> list[EncodedPrompt]:
    """Converts examples to prompts.

    Raises:
      UserError: an image cannot be decoded, or a prompt or its images exceed the largest bucket.
        The message names the example.
    """
    with validation():
      return [self.processor.encode(example, self.system) for example in examples]

  def read(
    self, make: Callable[[], list[Example]], count: int
  ) -> tuple[list[Any], list[Any], Prompt]:
    """Reads P prompts and puts them on the mesh. Each process reads its own rows.

    Args:
      make: returns the examples of the rows `parallel.own_rows(mesh, P).here`.
      count: P.

    Returns:
      The examples and the encoded prompts, lists [P] with None for rows that this process does not
      hold, and the prompts on the mesh.

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
    """Puts prompts on the mesh. The patches are converted to the dtype of activations.

    Args:
      encoded: the prompts of `rows.here`.
      sizes: `processor.sizes` of all processes.
      rows: the rows of the batch.
    """
    prompt = self.processor.collate(encoded, *map(max, zip(*sizes, strict=True)))
    patches = prompt.patches.astype(jnp.dtype(self.model.config.dtype))
    return parallel.put_rows(self.mesh, dataclasses.replace(prompt, patches=patches), rows)

  def random_key(self, purpose: int, *more: int) -> jax.Array:
    """Returns a random key that depends only on the seed, the global step and the arguments."""
    key = jax.random.key(self.config.seed)
    for number in (purpose, self.step, *more):
      key = jax.random.fold_in(key, number)
    return parallel.everywhere(self.mesh, key)

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Context in which the stages run.

    On SIGTERM or SIGINT, the run saves a checkpoint and stops. On exit, files are closed.
    """

    def ask_to_stop(number, _):
      if self.stop_signal:  # a second signal stops the run immediately
        raise KeyboardInterrupt
      self.stop_signal = signal.Signals(number).name
      print(
        f"{self.stop_signal}: saving a checkpoint and stopping (a second signal stops immediately)",
        file=sys.stderr,
        flush=True,
      )

    old = {}
    with contextlib.suppress(ValueError):  # only the main thread can install signal handlers
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
  """One stage of a run: where it starts or resumes, and what surrounds each step.

  Attributes:
    run, index, programs: the run, the index of the stage, and its programs.
    stage: the config of the stage.
    state: the current TrainState. The training loop of the stage replaces it.
    reference: the trained parameters as they were at the start of the stage, if the objective uses
      the reference, else None.
    reference_is_base: whether the reference is the model without adapters. This is so in the first
      stage if the adapters are new, because new adapters do not change the outputs of the model.
    start: the first step that is still to do, counted from the start of the stage.
    rows: the rows of the P prompts of a step that this process holds.
    data: iterator over batches, each a list of the examples of `rows`.
    pool: grades responses. None in a supervised stage without evaluation.
    accuracy: name of the verifier whose value is the accuracy.
    generated_tokens: number of response tokens that the stage has generated so far. None if it has
      not counted any, as in supervised stages.
    ahead: state of `data` before the batch whose responses are generated one step early
      (`config.pipeline="one_step_off"`), or None.
    verifiers: metric names of all verifiers that have had a weight in a reward of this stage.
    stop: name of the signal that asked a process of the run to stop, the same in all processes. ""
      if there was none.
  """

  def __init__(
    self, run: Run, index: int, programs: Programs, pool: RewardPool | None, data: Any = None
  ):
    self.run, self.index, self.programs, self.pool = run, index, programs, pool
    self.stage = run.config.stages[index]
    # If a verifier is a function, its metric name differs from its key in the config.
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
    # From here on, only the stage refers to these parameters, so that no second copy is kept.
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
        self.reference = self._as_reference(start)
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
    """All current parameters."""
    return lora.merge(self.run.frozen, self.state.params)

  @property
  def reference_params(self) -> Params:
    """All parameters of the reference. It shares the frozen parameters with the policy."""
    assert self.reference is not None, "the objective does not use a reference"
    return lora.merge(self._as_reference(self.run.frozen), self.reference)

  def _as_reference(self, params: Any) -> Any:
    """Removes the adapters from parameters if the reference has none."""
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
    """Restores the state, and the reference if there is one, from the newest checkpoint."""
    programs = self.programs

    def abstract(tree, shardings):
      return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
      )

    target: dict[str, Any] = {"train": abstract(programs.abstract_state, programs.state_shardings)}
    reference = self._as_reference(target["train"].params)
    if self.keep_reference and reference:
      target["reference"] = reference
    state = self.run.checkpoints.restore(target)
    self.state = state["train"]
    if self.keep_reference:
      self.reference = state.get("reference", {})

  def steps(self) -> Iterator[int]:
    """Iterates over the steps that are still to do. `run.step` is the global step of each."""
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
    """Returns the position in the data after the batches that steps have used."""
    return self.data.get_state() if self.ahead is None else self.ahead

  def _agree_to_stop(self) -> None:
    """Sets `stop` in all processes if one of them has received a signal."""
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
    """Whether a checkpoint is saved after the current step, as far as is known during the step."""
    return bool(
      self.stop
      or step + 1 >= self.stage.steps
      or self.run.step % self.run.config.checkpoint.every == 0
    )

  def ends(self, done: int) -> bool:
    """Whether the stage ends after `done` steps.

    This is so if these are all of its steps, or if it has generated `token_budget` tokens.
    """
    budget = self.stage.get("token_budget", 0)
    return done >= self.stage.steps or 0 < budget <= (self.generated_tokens or 0)

  def generated(self, tokens: int) -> None:
    """Adds to the number of response tokens that the stage has generated.

    Responses that dynamic sampling discards later count too.
    """
    self.generated_tokens = (self.generated_tokens or 0) + tokens

  @contextlib.contextmanager
  def before_update(self) -> Iterator[None]:
    """Context of the part of a step before the update.

    If this part ends with an error in the user's data or because the run is asked to stop, a
    checkpoint of the steps before this one is saved. A resumed run begins with this step.
    """
    try:
      self.stop_if_asked()
      yield
    except (UserError, Stopped) as ended:
      done, data, self.generated_tokens = self._begun  # as they were before this step
      self.run.step -= 1
      if done > self.start:
        self._flush()
        self._save(done, None, data)
      if isinstance(ended, Stopped):
        raise self._stopped() from None
      self.run.checkpoints.wait()
      raise

  def log(self, device_metrics: Any, host_metrics: dict[str, float], tokens: int) -> None:
    """Logs the metrics of a step.

    The metrics are copied to the host and written during the next step, so that the host does not
    wait for the update.

    Args:
      device_metrics: metrics on the devices.
      host_metrics: metrics on the host.
      tokens: number of response tokens of the step, for the metric `time/tokens_per_second`.
    """
    self._flush()
    values: dict[str, float] = {**host_metrics, "_tokens": float(tokens)}
    if self.generated_tokens is not None:
      values["train/generated_tokens"] = self.generated_tokens
    self._pending = (self.run.step, device_metrics, values)

  def _flush(self) -> None:
    """Writes the metrics of the last `log`.

    Raises:
      UserError: `config.max_bad_steps` updates in a row were skipped.
    """
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
    self._agree_to_stop()  # the evaluation or the next step handles later signals
    if due or last or self.saves(step):
      # Write the metrics of this step now, because a run that resumes from the checkpoint does not
      # repeat the step.
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
    """Saves a checkpoint.

    Args:
      done: number of steps of this stage that are done.
      accuracy: held-out accuracy of the current parameters, or None.
      data: position in the data.
      due: whether an evaluation is due. A run that resumes from this checkpoint begins with it.
    """
    state: dict[str, Any] = {"train": self.state}
    if self.reference:
      state["reference"] = self.reference
    # The parameters need not be checked for NaN, because a bad step does not change them.
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
    """Returns the accuracy of graded responses, [P, G].

    It is the value of the verifier `accuracy`, or `total` for responses that this verifier does not
    grade.

    Args:
      components: [P, G] for each verifier, by metric name. NaN where a verifier does not grade.
      total: [P, G]; weighted sum of the verifiers.
    """
    value = components.get(self.accuracy)
    return total if value is None else np.where(np.isnan(value), total, value)

  # -- Evaluation ---------------------------------------------------------------------------------

  def evaluate(self) -> Evaluation | None:
    """Evaluates the current parameters on the held-out questions.

    Returns None if `stage.eval.examples` is 0.
    """
    settings = self.stage.eval
    if not settings.examples:
      return None
    assert self.pool is not None
    run = self.run
    if self._eval_rollout is None:
      source = run.open_source(self.stage, "test")
      self._eval_examples = _FirstExamples(source, min(settings.examples, len(source)))
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


class _FirstExamples(Sequence[Example]):
  """The first `count` examples of a source. Each is read on first access and then kept."""

  def __init__(self, source: sources.Source, count: int):
    self._read, self._count = functools.cache(source.__getitem__), count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: Any) -> Any:
    if index not in range(self._count):
      raise IndexError(index)
    return self._read(index)


def _copy(tree: Params) -> Params:
  """Copies parameters on the device, because an update donates its input buffers."""
  return jax.tree.map(jnp.copy, tree)


def _count_compilations() -> Callable[[], tuple[int, float]]:
  """Starts to count the compilations of XLA in this process.

  Returns:
    A function that returns the number of compilations since the start, and their seconds. Reading a
    program from the cache on disk counts as a compilation.
  """
  taken = _compile_seconds()
  before = len(taken)
  return lambda: (len(taken) - before, sum(taken[before:]))


@functools.cache  # registered once, because JAX keeps listeners until the process ends
def _compile_seconds() -> list[float]:
  """Returns a list to which the seconds of each compilation from now on are appended."""
  taken: list[float] = []

  def listen(event: str, duration_secs: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      taken.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return taken

"""Grades responses in worker processes, where a response can cost no more than its own reward.

Model text makes graders hang inside one C call (9^{9^{9^{9}}}), exhaust memory and crash. Signals
and threads do not stop that, so workers are separate processes with a memory limit, killed from
outside when an answer takes too long, and started anew.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any

import pebble

from jaxrl_vlm import rewards
from jaxrl_vlm.example import Example

if TYPE_CHECKING:
  import numpy as np  # Not in the workers: its BLAS starts a thread per core.

_CHUNK = 16  # answers per task: enough to hide the cost of a task, few enough to balance
_MAX_TASKS = 1000  # per worker, so that what verifiers leak never adds up to the memory limit
_MAX_LOST = 3  # times that a task may be lost with a whole pool before it counts as the reason


@dataclasses.dataclass(frozen=True, eq=False)
class RewardBatch:
  """The rewards of G responses to each of P examples.

  Attributes:
    total: float32 [P, G], the weighted sums; 0 where grading failed.
    components: metric name -> float32 [P, G]; 0 where grading failed, NaN where the example's own
      `rewards` do not name this verifier.
    failures: how many responses failed by "timeout" (time limit), "crash" (their worker died) and
      "error" (a verifier raised, ran out of memory, or returned something not finite).
    messages: kind of failure -> what the first failure of this kind was, for the log.
  """

  total: "np.ndarray"
  components: dict[str, "np.ndarray"]
  failures: dict[str, int]
  messages: dict[str, str]


class RewardPool:
  """Worker processes that grade. Use as a context manager, or `close` it.

  Args:
    weights: verifiers and weights, as for `rewards.create`; an example's own `rewards` go first.
    workers: number of processes; None means half of the cores, at most 16.
    timeout_s: seconds that one response may take, all its verifiers together.
    memory_gb: GiB that a worker may allocate beyond what it has at its start.
    max_chars: longer responses lose their beginning, and with it their `format` reward.

  Raises:
    ValueError: as `rewards.create` does, or a limit is not positive.
  """

  def __init__(
    self,
    weights: Mapping[str, float],
    workers: int | None = None,
    timeout_s: float = 2.0,
    memory_gb: float = 2.0,
    max_chars: int = 65_536,
  ):
    workers = max(1, min(16, (os.cpu_count() or 1) // 2)) if workers is None else workers
    limits = {"workers": workers, "timeout_s": timeout_s, "memory_gb": memory_gb}
    for name, value in {**limits, "max_chars": max_chars}.items():
      if not value > 0:
        raise ValueError(f"RewardPool: {name}={value!r}: expected a positive number")
    self._workers, self._timeout_s, self._max_chars = workers, timeout_s, max_chars
    self._memory = int(memory_gb * 2**30)
    self._weights = _portable(rewards.create(weights).weights)
    self._named = {*weights, *self._weights}
    self._preload = list(self._weights)  # verifiers that a worker imports before its first task
    self._lock = threading.Lock()
    self._executor: pebble.ProcessPool | None = None
    self._closed = False
    self._schedule([])  # Starts the workers, which takes them about a second, in the background.

  def submit(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> "Grading":
    """Starts grading and returns at once.

    Args:
      examples: [P] tasks. Workers get them without images; `meta` must be picklable.
      texts: [P][G] responses.

    Raises:
      ValueError: shapes that do not fit, or an example's `rewards` name no verifier, or a function
        that this pool's own weights do not name.
      TypeError: a response is not a string.
    """
    group = len(texts[0]) if len(texts) else 0
    grading = self.begin(len(examples), group)
    grading.add(range(len(examples)), examples, texts)
    return grading

  def begin(self, prompts: int, group: int) -> "Grading":
    """A grading of P prompts with G responses each, to which they are added as they come."""
    return Grading(self, (prompts, group), list(rewards.metric_names(self._weights)))

  def grade(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> RewardBatch:
    """`submit(examples, texts).result()`."""
    return self.submit(examples, texts).result()

  def close(self) -> None:
    """Stops the workers. Responses not graded yet never will be."""
    with self._lock:
      self._closed = True
      self._stop()

  def __enter__(self) -> "RewardPool":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _chunk(self, responses: int) -> int:
    """How many responses a task holds."""
    return max(1, min(_CHUNK, -(-responses // (4 * self._workers))))

  def _schedule(self, jobs: list[tuple[Example, str]]) -> tuple[futures.Future, pebble.ProcessPool]:
    """Hands one task to the workers; all of it may take as long as one response."""
    with self._lock:
      if self._closed:
        raise RuntimeError("RewardPool: closed")
      # A worker that dies idle (the system's out-of-memory killer) breaks a whole pebble pool.
      if self._executor is None or not self._executor.active:
        self._stop()
        self._executor = pebble.ProcessPool(
          max_workers=self._workers,
          max_tasks=_MAX_TASKS,
          initializer=_start_worker,
          initargs=(self._preload, self._memory),
          context=_Context(),
        )
      executor = self._executor
      args = (jobs, self._timeout_s / 4)
      return executor.schedule(_grade, args=args, timeout=self._timeout_s), executor

  def _prepared(self, example: Example) -> Example:
    """Without images, and with the weights that judge it."""
    own = example.rewards
    if own is not None:
      # Data is not code: what a sample may run is built in or named by whoever made this pool.
      foreign = [key for key in own if ":" in str(key) and key not in self._named]
      if foreign:
        raise ValueError(
          f"example.rewards of id={example.id!r}: {foreign[0]!r} is neither built in nor among the"
          " stage's own rewards; name it there (with weight 0.0 if other samples need none of it)"
        )
      try:
        own = _portable(rewards.create(own).weights)
      except ValueError as error:
        raise ValueError(f"example.rewards of id={example.id!r}: {error}") from error
      # Only new workers know it: a slow import may cost the old ones their life, once.
      self._preload += [key for key in own if key not in self._preload]
    return example.replace(images=(), rewards=self._weights if own is None else own)

  def _stop(self) -> None:
    if self._executor is not None:
      self._executor.stop()
      self._executor.join()
      self._executor = None


class Grading:
  """Responses that are being graded. Made by `RewardPool.submit` or `RewardPool.begin`."""

  def __init__(self, pool: RewardPool, shape: tuple[int, int], columns: list[str]):
    self._pool, self._shape, self._columns = pool, shape, columns
    self._jobs: dict[int, tuple[Example, str]] = {}
    self._values: list[dict[str, float]] = [{} for _ in range(shape[0] * shape[1])]
    self._failures = {"timeout": 0, "crash": 0, "error": 0}
    self._messages: dict[str, str] = {}
    self._pending: dict[futures.Future, _Task] = {}
    self._batch: RewardBatch | None = None

  def add(
    self, rows: Sequence[int], examples: Sequence[Example], texts: Sequence[Sequence[str]]
  ) -> None:
    """Starts grading some of the prompts and returns at once; errors as of `RewardPool.submit`.

    Args:
      rows: [n] numbers of the prompts, from 0; each once.
      examples: [n] their tasks.
      texts: [n][G] responses.
    """
    group, sizes = self._shape[1], [len(row) for row in texts]
    if len(texts) != len(examples) or any(size != group for size in sizes):
      raise ValueError(
        f"RewardPool: texts has rows of {sizes} responses, expected {len(examples)} rows (one per"
        f" example) of one length{f', {group}' if group else ''}"
      )
    new = {}
    for row, example, responses in zip(rows, examples, texts, strict=True):
      example = self._pool._prepared(example)
      names = rewards.metric_names(example.rewards or {})
      self._columns += [name for name in names if name not in self._columns]
      for i, text in enumerate(responses):
        if not isinstance(text, str):
          raise TypeError(f"RewardPool: a response to id={example.id!r} is {type(text).__name__}")
        new[row * group + i] = example, text[-self._pool._max_chars :]
    self._jobs |= new
    indices, size = list(new), self._pool._chunk(len(self._values))
    for start in range(0, len(indices), size):
      self._schedule(indices[start : start + size])

  def result(self) -> RewardBatch:
    """Waits for the rewards.

    Raises:
      RuntimeError: the pool was closed, or its workers do not stay alive.
      ValueError: some prompts have not been added.
    """
    if len(self._jobs) < len(self._values):
      raise ValueError(
        f"RewardPool: {len(self._jobs)} of {len(self._values)} responses have been added"
      )
    while self._pending:
      done, _ = futures.wait(self._pending, timeout=1.0, return_when=futures.FIRST_COMPLETED)
      # A pool that broke or was closed leaves futures that nobody will ever complete.
      dead = [f for f, task in self._pending.items() if not task.executor.active]
      for future in done or dead:
        self._collect(future, self._pending.pop(future))
    if self._batch is None:
      self._batch = self._as_batch()
    return self._batch

  def _schedule(self, indices: list[int], lost: int = 0) -> None:
    future, executor = self._pool._schedule([self._jobs[i] for i in indices])
    self._pending[future] = _Task(indices, executor, lost)

  def _collect(self, future: futures.Future, task: "_Task") -> None:
    """Takes the outcome of one task; whatever of it has none yet goes to the workers again."""
    indices = task.indices
    try:
      if not future.done():
        raise BrokenProcessPool
      outcomes = future.result()
    except Exception as error:
      lost = isinstance(error, BrokenProcessPool | futures.CancelledError)
      if lost and task.lost < _MAX_LOST:
        self._schedule(indices, task.lost + 1)
      elif lost and not self._workers_start():
        raise RuntimeError("RewardPool: the workers die before they grade anything") from error
      elif len(indices) > 1:  # One of these is guilty: only alone it shows which.
        for i in indices:
          self._schedule([i])
      elif lost:
        self._fail(indices[0], "crash", "it took all workers with it")
      elif isinstance(error, TimeoutError):
        self._fail(indices[0], "timeout", "its time is over")
      elif isinstance(error, pebble.ProcessExpired):
        self._fail(indices[0], "crash", f"its worker died with exit code {error.exitcode}")
      else:
        self._fail(indices[0], "error", f"{type(error).__name__}: {error}")
    else:
      for i, outcome in zip(indices, outcomes, strict=False):
        if isinstance(outcome, str):
          self._fail(i, "error", outcome)
        else:
          self._values[i] = outcome
      if indices[len(outcomes) :]:
        self._schedule(indices[len(outcomes) :])

  def _workers_start(self) -> bool:
    try:
      return self._pool._schedule([])[0].result(timeout=60) == []
    except Exception:
      return False

  def _fail(self, index: int, kind: str, message: str) -> None:
    example, text = self._jobs[index]
    self._failures[kind] += 1
    self._messages.setdefault(
      kind, f"id={example.id!r}: {message}; the response ends with {text[-80:]!r}"
    )
    self._values[index] = dict.fromkeys(
      (*rewards.metric_names(example.rewards or {}), "total"), 0.0
    )

  def _as_batch(self) -> RewardBatch:
    import numpy as np

    columns = dict.fromkeys([*self._columns, *(name for v in self._values for name in v)])
    table = {
      name: np.array([v.get(name, np.nan) for v in self._values], np.float32).reshape(self._shape)
      for name in columns
    }
    total = table.pop("total", np.zeros(self._shape, np.float32))
    return RewardBatch(total, table, dict(self._failures), dict(self._messages))


@dataclasses.dataclass(frozen=True)
class _Task:
  """Responses that a worker grades one after the other; `lost` tasks like it came to nothing."""

  indices: list[int]
  executor: pebble.ProcessPool
  lost: int


def _portable(weights: Mapping[str, float]) -> dict[str, float]:
  """Weights with absolute file names: workers may start in another directory."""

  def key(name: str) -> str:
    where, _, function = name.rpartition(":")
    if not where.endswith(".py"):
      return name
    return f"{os.path.abspath(os.path.expanduser(where))}:{function}"

  return {key(name): weight for name, weight in weights.items()}


# ------------------------------------------------------------------ in the workers


def _start_worker(preload: list[str], memory: int) -> None:
  """Imports the verifiers, so that this takes nobody's time, and then limits the memory."""
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Pebble's handler cannot run inside a C call.
  os.environ["JAX_PLATFORMS"] = "cpu"  # A verifier that uses jax must not take the accelerator.
  for key in preload:
    with contextlib.suppress(Exception):  # Who needs this verifier gets the error.
      verifier = rewards.resolve(key)
      if key == "math":
        verifier(Example("", "", "1"), r"\boxed{\frac{2}{3}}")
  with contextlib.suppress(ImportError, OSError, ValueError):  # Not every system has these limits.
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
      memory += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _grade(jobs: list[tuple[Example, str]], budget_s: float) -> list[dict[str, float] | str]:
  """The values or the error message of each response, in order.

  Gives the rest back when `budget_s` is over: slow graders are not yet hanging ones.
  """
  start, outcomes = time.monotonic(), []
  for example, text in jobs:
    if outcomes and time.monotonic() - start > budget_s:
      break
    try:
      outcomes.append(rewards.create(example.rewards or {})(example, text))
    except BaseException as error:  # A verifier's sys.exit() is an error as well.
      message = f"{type(error).__name__}: {error}"
      outcomes.append(" ".join([message, *getattr(error, "__notes__", ())])[:2000])
  return outcomes


# ------------------------------------------------------------------ how workers start


class _Process(SpawnProcess):
  """A spawned process that does not import the parent's `__main__`.

  Spawn runs the parent's script again in each child (under the name `__mp_main__`): with
  `python -m jaxrl_vlm.train` or an unguarded script that would import jax, or start a second
  training. A fork of a process with jax threads deadlocks, and a fork server belongs to whoever
  in the process started it first.
  """

  def start(self) -> None:
    with _starting:
      original, thread = spawn.get_preparation_data, threading.get_ident()

      def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if threading.get_ident() == thread:  # Other threads may be starting other processes.
          data.pop("init_main_from_name", None)
          data.pop("init_main_from_path", None)
        return data

      spawn.get_preparation_data = without_main
      try:
        super().start()
      finally:
        spawn.get_preparation_data = original


class _Context(SpawnContext):
  Process = _Process


_starting = threading.Lock()

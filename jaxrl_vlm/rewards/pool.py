"""Grades responses in worker processes, so that a bad response loses only its own reward.

Model output can make a verifier hang inside a single C call (9^{9^{9^{9}}}), exhaust the memory or
crash. Signals and threads cannot stop such a call. Therefore workers are separate processes with a
memory limit. If a response takes too long, its worker is killed from outside and replaced.
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
  import numpy as np  # not imported in the workers, where its BLAS would start a thread per core

# Maximum number of responses per task. More would balance the workers worse, and fewer would make
# the overhead of tasks noticeable.
_CHUNK = 16
# Number of tasks after which a worker is replaced, so that memory leaks of verifiers do not add up
# to the memory limit.
_MAX_TASKS = 1000
# Number of times that a task is scheduled again after the whole pool died while it ran. If the pool
# dies once more, the task counts as the cause.
_MAX_LOST = 3


@dataclasses.dataclass(frozen=True, eq=False)
class RewardBatch:
  """The rewards of G responses to each of P examples.

  Attributes:
    total: float32 [P, G], the weighted sums; 0 where grading failed.
    components: metric name -> float32 [P, G]; 0 where grading failed, NaN where the rewards of the
      example do not use this verifier.
    failures: number of responses by kind of failure. "timeout": the time limit was exceeded.
      "crash": the worker died. "error": a verifier raised an exception, ran out of memory, or
      returned something other than finite float32 numbers.
    messages: kind of failure -> description of its first failure, for the log.
  """

  total: "np.ndarray"
  components: dict[str, "np.ndarray"]
  failures: dict[str, int]
  messages: dict[str, str]


class RewardPool:
  """A pool of worker processes that grade responses. Use it as a context manager or call `close`.

  Args:
    weights: verifiers and weights, as for `rewards.create`. If an example has its own `rewards`,
      they are used instead.
    workers: number of processes. None means half of the cores, at most 16.
    timeout_s: time limit in seconds for grading one response with all its verifiers.
    memory_gb: memory limit in GiB that a worker may allocate in addition to what it has at its
      start.
    max_chars: maximum length of a response. Only the end of longer responses is graded, so they
      get no `format` reward.

  Raises:
    ValueError: as in `rewards.create`, or a limit is not positive.
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
    self._preload = list(self._weights)  # verifiers that workers import before their first task
    self._lock = threading.Lock()
    self._executor: pebble.ProcessPool | None = None
    self._closed = False
    self._schedule([])  # starts the workers in the background, which takes about a second

  def submit(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> "Grading":
    """Starts grading and returns without waiting for the results.

    Args:
      examples: [P] examples. Workers receive them without images. `meta` must be picklable.
      texts: [P][G] responses.

    Raises:
      ValueError: the shapes do not match, the `rewards` of an example name an unknown verifier, or
        they name a function that is not among the weights of the pool.
      TypeError: a response is not a string.
    """
    group = len(texts[0]) if len(texts) else 0
    grading = self.begin(len(examples), group)
    grading.add(range(len(examples)), examples, texts)
    return grading

  def begin(self, prompts: int, group: int) -> "Grading":
    """Makes an empty `Grading` for P prompts with G responses each. Use `add` to add responses."""
    return Grading(self, (prompts, group), list(rewards.metric_names(self._weights)))

  def grade(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> RewardBatch:
    """Grades responses and waits for the result. See `submit` for the arguments."""
    return self.submit(examples, texts).result()

  def close(self) -> None:
    """Stops the workers. Responses that have not been graded yet will not be graded."""
    with self._lock:
      self._closed = True
      self._stop()

  def __enter__(self) -> "RewardPool":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _chunk(self, responses: int) -> int:
    """Returns the number of responses per task."""
    return max(1, min(_CHUNK, -(-responses // (4 * self._workers))))

  def _schedule(self, jobs: list[tuple[Example, str]]) -> tuple[futures.Future, pebble.ProcessPool]:
    """Schedules one task, with the time limit of a single response for all its responses."""
    with self._lock:
      if self._closed:
        raise RuntimeError("RewardPool: the pool is closed")
      # If an idle worker dies, for example by the out-of-memory killer, the whole pebble pool stops
      # working and is replaced.
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
    """Returns the example without images and with the verifiers and weights to use for it."""
    own = example.rewards
    if own is not None:
      # A dataset must not be able to run arbitrary code. So its examples may use only built-in
      # verifiers and functions that the weights of the pool name.
      foreign = [key for key in own if ":" in str(key) and key not in self._named]
      if foreign:
        raise ValueError(
          f"example.rewards of id={example.id!r}: {foreign[0]!r} is neither built in nor among the"
          " stage's own rewards; name it there (with weight 0.0 if other examples do not need it)"
        )
      try:
        own = _portable(rewards.create(own).weights)
      except ValueError as error:
        raise ValueError(f"example.rewards of id={example.id!r}: {error}") from error
      # Only workers that start later import it in advance. In the others, a slow import can exceed
      # the time limit once.
      self._preload += [key for key in own if key not in self._preload]
    return example.replace(images=(), rewards=self._weights if own is None else own)

  def _stop(self) -> None:
    if self._executor is not None:
      self._executor.stop()
      self._executor.join()
      self._executor = None


class Grading:
  """Responses that are being graded. `RewardPool.submit` and `RewardPool.begin` return it."""

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
    """Starts grading the responses to n of the prompts. Raises the errors of `RewardPool.submit`.

    Args:
      rows: [n] indices of the prompts in the result. Each prompt is added once.
      examples: [n] examples of these prompts.
      texts: [n][G] responses.
    """
    group, sizes = self._shape[1], [len(row) for row in texts]
    if len(texts) != len(examples) or any(size != group for size in sizes):
      raise ValueError(
        f"RewardPool: texts has rows of {sizes} responses, expected {len(examples)} rows (one per"
        f" example) of the same length{f', {group}' if group else ''}"
      )
    new = {}
    for row, example, responses in zip(rows, examples, texts, strict=True):
      example = self._pool._prepared(example)
      names = rewards.metric_names(example.rewards or {})
      self._columns += [name for name in names if name not in self._columns]
      for i, text in enumerate(responses):
        if not isinstance(text, str):
          raise TypeError(
            f"RewardPool: a response to id={example.id!r} is {type(text).__name__}, expected str"
          )
        new[row * group + i] = example, text[-self._pool._max_chars :]
    self._jobs |= new
    indices, size = list(new), self._pool._chunk(len(self._values))
    for start in range(0, len(indices), size):
      self._schedule(indices[start : start + size])

  def result(self) -> RewardBatch:
    """Waits for the rewards and returns them.

    Raises:
      RuntimeError: the pool was closed, or its workers die at start.
      ValueError: some prompts have not been added.
    """
    if len(self._jobs) < len(self._values):
      raise ValueError(
        f"RewardPool: {len(self._jobs)} of {len(self._values)} responses have been added"
      )
    while self._pending:
      done, _ = futures.wait(self._pending, timeout=1.0, return_when=futures.FIRST_COMPLETED)
      # The futures of a pool that is broken or closed are never completed.
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
    """Stores the results of a task, and schedules its responses without result again."""
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
        raise RuntimeError("RewardPool: the workers die before they grade a response") from error
      elif len(indices) > 1:  # Any of these responses can be the cause. Grade each one alone.
        for i in indices:
          self._schedule([i])
      elif lost:
        self._fail(indices[0], "crash", "all workers died while it was graded")
      elif isinstance(error, TimeoutError):
        self._fail(indices[0], "timeout", "grading it exceeded the time limit")
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
  """A task: responses that a worker grades one after another.

  Attributes:
    indices: positions of the responses in the flattened [P, G] result.
    executor: the pool of processes that the task was given to.
    lost: number of times that the task was scheduled before and its pool died.
  """

  indices: list[int]
  executor: pebble.ProcessPool
  lost: int


def _portable(weights: Mapping[str, float]) -> dict[str, float]:
  """Makes the paths of files absolute, because workers may start in another directory."""

  def key(name: str) -> str:
    where, _, function = name.rpartition(":")
    if not where.endswith(".py"):
      return name
    return f"{os.path.abspath(os.path.expanduser(where))}:{function}"

  return {key(name): weight for name, weight in weights.items()}


# ------------------------------------------------------------------ code that runs in the workers


def _start_worker(preload: list[str], memory: int) -> None:
  """Imports the verifiers and then limits the memory.

  Importing them before the first task keeps the import time out of the time limit of a response.
  """
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Pebble's handler cannot run inside a C call.
  os.environ["JAX_PLATFORMS"] = "cpu"  # A verifier that uses jax must not take the accelerator.
  for key in preload:
    with contextlib.suppress(Exception):  # Responses that use this verifier raise it again.
      verifier = rewards.resolve(key)
      if key == "math":
        verifier(Example("", "", "1"), r"\boxed{\frac{2}{3}}")
  with contextlib.suppress(ImportError, OSError, ValueError):  # Some systems lack these limits.
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
      memory += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _grade(jobs: list[tuple[Example, str]], budget_s: float) -> list[dict[str, float] | str]:
  """Returns the values or the error message of each response, in order.

  After `budget_s` seconds, it returns the results so far, and the caller schedules the other
  responses again. So responses that are slow, but within the time limit, do not time out together.
  """
  start, outcomes = time.monotonic(), []
  for example, text in jobs:
    if outcomes and time.monotonic() - start > budget_s:
      break
    try:
      outcomes.append(rewards.create(example.rewards or {})(example, text))
    except BaseException as error:  # includes sys.exit() in a verifier
      message = f"{type(error).__name__}: {error}"
      outcomes.append(" ".join([message, *getattr(error, "__notes__", ())])[:2000])
  return outcomes


# ------------------------------------------------------------------ how workers start


class _Process(SpawnProcess):
  """A spawned process that does not import the parent's `__main__`.

  The start method "spawn" runs the parent's script again in each child, under the name
  `__mp_main__`. With `python -m jaxrl_vlm.train` or a script without the `__main__` guard, this
  would import jax or start a second training. The other start methods are no alternative: a fork
  of a process with jax threads can deadlock, and a process has only one fork server, which other
  code may have started before.
  """

  def start(self) -> None:
    with _starting:
      original, thread = spawn.get_preparation_data, threading.get_ident()

      def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if threading.get_ident() == thread:  # Other threads may start other processes.
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

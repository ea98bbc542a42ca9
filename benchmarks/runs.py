"""Executes the training runs of a benchmark, several at a time.

A finished run is not repeated. A run that was stopped is resumed.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import platform
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from jaxrl_vlm import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
_SECONDS, _SETTINGS = "seconds.json", "settings.json"


@dataclasses.dataclass(frozen=True)
class Job:
  """A run: `python -m jaxrl_vlm.train --config=<config> --workdir=<folder>/<name> <flags>`.

  Attributes:
    name: Name of the directory of the run, different for each run. It is an error if the directory
      contains a run with another config or other flags (`Runner.check`).
    config: Path of the config relative to the repository.
    flags: Further command-line flags.
  """

  name: str
  config: str
  flags: tuple[str, ...] = ()


class Failed(Exception):
  """The error of a run that failed. The message is the last line of its log."""


class Stopped(Exception):
  """Raised when the benchmark receives SIGINT or SIGTERM. Its runs save their progress."""


class Runner:
  """Executes jobs in `folder`, up to `at_once` at a time, each on separate processors.

      with Runner(folder, at_once=2) as runner:
        for job, seconds in runner.run(jobs):  # in the order in which they end
          ...  # if a job failed, `seconds` is an exception

  Raises:
    SystemExit: Another process executes jobs in this folder.
  """

  def __init__(self, folder: pathlib.Path, at_once: int):
    self.folder, self.at_once = folder.absolute(), at_once  # the runs' working directory is ROOT
    self._children: set[subprocess.Popen] = set()
    self._stopping = False
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = max(1, len(every) // at_once)
    self._places: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for i in range(at_once):
      # A run starts as many threads as there are processors that it may use.
      self._places.put(every[i * share : (i + 1) * share])

  def __enter__(self) -> "Runner":
    self.folder.mkdir(parents=True, exist_ok=True)
    self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115  # open until __exit__
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise SystemExit(
        f"{self.folder}: another benchmark, or a run that it started, is using this folder; wait "
        "for it to end, or choose another --folder"
      ) from None

    def stop(number, _):
      self._stop()
      raise Stopped(signal.Signals(number).name)

    self._handlers = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    self._lock.close()

  def _stop(self) -> None:
    """Sends SIGTERM to all runs, so that they save and stop. Further calls have no effect."""
    if not self._stopping:
      self._stopping = True
      print("stopping: each run finishes its current step and saves", file=sys.stderr, flush=True)
      for child in tuple(self._children):
        child.terminate()

  def path(self, job: Job) -> pathlib.Path:
    return self.folder / job.name

  def seconds(self, job: Job) -> float | None:
    """Returns the total seconds of all starts of a run, or None if the run is not finished."""
    path = self.path(job)
    if not (path / "model" / "config.json").exists():  # written last
      return None
    return sum(_lives(path))

  def settings(self, job: Job) -> dict[str, str]:
    """Returns the config and the flags of a job by name.

    If a flag occurs several times, the last value counts. Paths inside the folder become relative
    to it, so that the folder can be moved.
    """
    found, name = {"--config": job.config}, ""
    for word in job.flags:
      if word.startswith("--"):
        name, equals, value = word.partition("=")
        found[name] = value if equals else "True"
      else:
        found[name] = word
    return {name: value.removeprefix(f"{self.folder}/") for name, value in found.items()}

  def check(self, jobs: Sequence[Job]) -> None:
    """Checks that existing runs have the settings of their jobs. Runs nothing and writes nothing.

    A run without a settings file is accepted.

    Raises:
      SystemExit: The settings of a run that has begun or is finished differ from those of its job.
    """
    for job in jobs:
      path = self.path(job)
      # Training writes config.json once it has accepted the config, before it does any other work.
      begun = (path / "config.json").exists() or self.seconds(job) is not None
      if not begun or not (path / _SETTINGS).exists():
        continue
      stored, current = json.loads((path / _SETTINGS).read_text()), self.settings(job)
      for field in (*current, *stored):
        if stored.get(field) != current.get(field):
          raise SystemExit(
            f"{path}: {field} is {stored.get(field, 'not given')} in this run, "
            f"{current.get(field, 'not given')} now; delete the run, or choose another --folder"
          )

  def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, float | Failed]]:
    """Executes the jobs that are not finished, in order.

    Yields:
      Every job, with its seconds or the error with which it failed. Jobs that were already finished
      come first. The others follow in the order in which they end.

    Raises:
      SystemExit: As in `check`, before any job is executed.
    """
    self.check(jobs)
    todo = []
    for job in jobs:
      seconds = self.seconds(job)
      if seconds is None:
        todo.append(job)
      else:
        if not (self.path(job) / _SETTINGS).exists():
          self._keep_settings(job)
        yield job, seconds
    pool = concurrent.futures.ThreadPoolExecutor(self.at_once)
    futures = {pool.submit(self._run, job): job for job in todo}
    try:
      for future in concurrent.futures.as_completed(futures):
        try:
          yield futures[future], future.result()
        except Failed as error:
          yield futures[future], error
    except BaseException:  # includes errors of the code that iterates over the results
      self._stop()
      raise
    finally:
      pool.shutdown(cancel_futures=True)

  def _keep_settings(self, job: Job) -> None:
    text = json.dumps(self.settings(job), indent=1) + "\n"
    config_lib.write_atomically(self.path(job) / _SETTINGS, text)

  def _run(self, job: Job) -> float:
    path = self.path(job)
    path.mkdir(parents=True, exist_ok=True)
    self._keep_settings(job)
    place = self._places.get()
    try:
      return self._train(job, path, place)
    finally:
      self._places.put(place)

  def _train(self, job: Job, path: pathlib.Path, place: list[int]) -> float:
    began = time.monotonic()
    command = [
      sys.executable,
      "-m",
      "jaxrl_vlm.train",
      f"--config={job.config}",
      f"--workdir={path}",
      *job.flags,
    ]
    if place and shutil.which("taskset"):
      command = ["taskset", "-c", ",".join(map(str, place)), *command]
    with open(path / "log.txt", "a") as log:
      if self._stopping:
        raise Failed("not started")
      # In a new session, the run does not receive Ctrl-C. Only this process does, and it stops the
      # run. The run inherits the lock. If it outlives this process, the folder stays locked.
      child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(self._lock.fileno(),),
      )
      self._children.add(child)
      if self._stopping:
        child.terminate()
      code = child.wait()
      self._children.discard(child)
    (path / _SECONDS).write_text(json.dumps([*_lives(path), time.monotonic() - began]))
    seconds = self.seconds(job)
    if seconds is None:  # also if the run was asked to stop
      lines = (path / "log.txt").read_text(errors="replace").split("\n")
      last = next((line for line in reversed(lines) if line.strip()), "")
      raise Failed(f"exit code {code}: {last[:200]}")
    return seconds


def _lives(path: pathlib.Path) -> list[float]:
  """Returns the seconds of each start of a run. A resumed run has several."""
  if not (path / _SECONDS).exists():
    return []
  seconds = json.loads((path / _SECONDS).read_text())
  return seconds if isinstance(seconds, list) else [seconds]


def surroundings(at_once: int | None = None) -> dict:
  """Returns the date, the machine and the commit of a measurement, for the file of results."""
  result: dict = {
    "date": datetime.date.today().isoformat(),
    "python": platform.python_version(),
    "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
  }
  if at_once is not None:
    result["at_once"] = at_once
  with contextlib.suppress(OSError, subprocess.CalledProcessError):
    result["commit"] = subprocess.run(
      ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
  return result


def main_of(work: Callable[[], None]) -> None:
  """Calls `work`. After SIGINT or SIGTERM, prints how to continue and exits with code 130."""
  try:
    work()
  except (Stopped, KeyboardInterrupt):
    print("stopped; the same command continues the benchmark", file=sys.stderr)
    raise SystemExit(130) from None

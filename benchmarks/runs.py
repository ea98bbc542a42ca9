"""Training runs of a benchmark: each is done once, a stopped one continues, several at a time."""

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
  """`python -m jaxrl_vlm.train --config=<config> --workdir=<folder>/<name> <flags>`.

  Attributes:
    name: of its directory; another run has another name. A name that is there with another config
      or other flags is refused (`Runner.check`).
    config: relative to the repository.
    flags: as on the command line.
  """

  name: str
  config: str
  flags: tuple[str, ...] = ()


class Failed(Exception):
  """A run that ended with an error; the message is the last line of its log."""


class Stopped(Exception):
  """The benchmark was asked to stop; what runs had done is saved."""


class Runner:
  """Runs jobs in `folder`, at most `at_once` side by side, each on processors of its own.

  with Runner(folder, at_once=2) as runner:
    for job, seconds in runner.run(jobs):  # as they end; seconds is an exception if one failed
      ...

  Raises:
    SystemExit: another process runs jobs in this folder.
  """

  def __init__(self, folder: pathlib.Path, at_once: int):
    self.folder, self.at_once = folder.absolute(), at_once  # runs have another directory
    self._children: set[subprocess.Popen] = set()
    self._stopping = False
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = max(1, len(every) // at_once)
    self._places: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for i in range(at_once):
      # A run that computes on one processor alone starts as many threads as that can use.
      self._places.put(every[i * share : (i + 1) * share])

  def __enter__(self) -> "Runner":
    self.folder.mkdir(parents=True, exist_ok=True)
    self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115  # held until the end
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise SystemExit(
        f"{self.folder}: another benchmark, or a run that it left behind, is working here"
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
    """Asks the runs to save and stop, once."""
    if not self._stopping:
      self._stopping = True
      print("stopping: runs save after the step that they are in", file=sys.stderr, flush=True)
      for child in tuple(self._children):
        child.terminate()

  def path(self, job: Job) -> pathlib.Path:
    return self.folder / job.name

  def seconds(self, job: Job) -> float | None:
    """Seconds that a finished run took, over all its lives; None if it is not finished."""
    path = self.path(job)
    if not (path / "model" / "config.json").exists():  # written last
      return None
    return sum(_lives(path))

  def settings(self, job: Job) -> dict[str, str]:
    """Config and flags by name, the last of a name; paths in the folder are relative to it, so that
    it may be moved."""
    found, name = {"--config": job.config}, ""
    for word in job.flags:
      if word.startswith("--"):
        name, equals, value = word.partition("=")
        found[name] = value if equals else "True"
      else:
        found[name] = word
    return {name: value.removeprefix(f"{self.folder}/") for name, value in found.items()}

  def check(self, jobs: Sequence[Job]) -> None:
    """Nothing is run or written. A run without a file of settings is taken for what it is.

    Raises:
      SystemExit: a run that has begun, or is finished, has other settings than its job.
    """
    for job in jobs:
      path = self.path(job)
      # Training writes the first file once it has accepted the config: before, nothing is done yet.
      begun = (path / "config.json").exists() or self.seconds(job) is not None
      if not begun or not (path / _SETTINGS).exists():
        continue
      there, here = json.loads((path / _SETTINGS).read_text()), self.settings(job)
      for field in (*here, *there):
        if there.get(field) != here.get(field):
          raise SystemExit(
            f"{path}: {field} is {there.get(field, 'not given')} in this run, "
            f"{here.get(field, 'not given')} now; delete the run, or choose another --folder"
          )

  def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, float | Failed]]:
    """Runs what is not finished, in order; yields all jobs as they end, finished ones first.

    Raises:
      SystemExit: as `check`, before anything runs.
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
    except BaseException:  # also if whoever asked for the results fails
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
      # In a session of its own: Ctrl-C comes here alone, and is passed on. It inherits the lock, so
      # that a run which outlives this process keeps others away.
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
    if seconds is None:  # also one that was asked to stop and has saved
      lines = (path / "log.txt").read_text(errors="replace").split("\n")
      last = next((line for line in reversed(lines) if line.strip()), "")
      raise Failed(f"exit code {code}: {last[:200]}")
    return seconds


def _lives(path: pathlib.Path) -> list[float]:
  """Seconds of each life of a run so far."""
  if not (path / _SECONDS).exists():
    return []
  seconds = json.loads((path / _SECONDS).read_text())
  return seconds if isinstance(seconds, list) else [seconds]


def surroundings(at_once: int | None = None) -> dict:
  """When and on what it was measured, for the file of results."""
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
  """Runs `work`; asked to stop, it says how to go on."""
  try:
    work()
  except (Stopped, KeyboardInterrupt):
    print("stopped; the same command continues", file=sys.stderr)
    raise SystemExit(130) from None

"""Groups of processes that train one config after another.

Starting processes and compiling their programs takes much longer than a run of the tiny model. A
`Group` starts its processes once. Every process joins the others, compiles each program once, and
trains the config of each job with `train.train`.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
TIME_LIMIT = 400  # seconds of a run
_ENDED = "ended with "  # what a process prints after each run, followed by the exit status


class Ended(NamedTuple):
  """How the run of one process ended."""

  code: int  # exit status of the command
  out: str
  err: str
  at: float  # time.time() when the end was noticed


class Group:
  """Processes that stay up between runs.

  Args:
    environments: the environment variables of each process.
  """

  def __init__(self, environments: list[dict[str, str]]):
    self.processes = [
      subprocess.Popen(
        [sys.executable, "-m", "tests.parallel.group"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
      )
      for environment in environments
    ]

  def train(self, workdir: pathlib.Path, test: dict[str, Any]) -> list[Ended]:
    """Trains `processes_config` in every process; returns how each run ended.

    Args:
      workdir: the workdir of the run.
      test: value of TEST, see `processes_config`.
    """
    workdir.parent.mkdir(exist_ok=True)
    logs = [f"{workdir}.{i}" for i in range(len(self.processes))]
    for process, log in zip(self.processes, logs, strict=True):
      assert process.stdin
      job = {"workdir": str(workdir), "log": log, "test": test, "read": f"{workdir}.read"}
      process.stdin.write(json.dumps(job) + "\n")
      process.stdin.flush()
    # Processes that wait for each other forever are killed, which closes their output.
    limit = threading.Timer(TIME_LIMIT, self.kill)
    limit.start()
    ends = []
    try:
      for process, log in zip(self.processes, logs, strict=True):
        assert process.stdout
        line = next((line for line in process.stdout if line.startswith(_ENDED)), "")
        out, err = (pathlib.Path(f"{log}.{name}").read_text() for name in ("out", "err"))
        assert line, (process.wait(), out, err)
        ends.append(Ended(int(line.removeprefix(_ENDED)), out, err, time.time()))
    except BaseException:
      self.kill()
      raise
    finally:
      limit.cancel()
    return ends

  def kill(self) -> None:
    for process in self.processes:
      process.kill()

  @property
  def alive(self) -> bool:
    return all(process.poll() is None for process in self.processes)

  def close(self) -> None:
    """Ends all processes together, as at the end of a command; all must end with status 0."""
    if not self.alive:  # a test has failed and killed them
      return self.kill()
    for process in self.processes:
      assert process.stdin
      process.stdin.close()
    try:
      codes = [process.wait(60) for process in self.processes]
    finally:
      self.kill()
    assert codes == [0] * len(codes), codes


def run(job: dict[str, Any]) -> int:
  """Trains as `job` says; returns the exit status that the command would have.

  Args:
    job: `workdir`; `log`, the path of the log files without suffix; `test` and `read`, the values
      of TEST and READ (see `processes_config`).
  """
  from jaxrl_vlm import train
  from jaxrl_vlm.errors import UserError, one_line
  from tests.parallel import processes_config

  os.environ |= {"TEST": json.dumps(job["test"]), "READ": job["read"]}
  with (
    open(f"{job['log']}.out", "w") as out,
    open(f"{job['log']}.err", "w") as err,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    try:
      with processes_config.patched():
        train.train(processes_config.get_config(), job["workdir"])
    except UserError as error:
      print(one_line(str(error)), file=err)
      return 2
    except Exception:
      traceback.print_exc()
      return 1
  return 0


def main() -> None:
  from absl import flags

  from jaxrl_vlm import parallel
  from tests import compile_once

  compile_once.install()
  flags.FLAGS(sys.argv[:1])  # libraries read absl flags, which must count as parsed
  parallel.choose_platform()
  parallel.join_processes()
  for line in sys.stdin:
    print(f"{_ENDED}{run(json.loads(line))}", flush=True)
  parallel.leave_processes()


if __name__ == "__main__":
  main()

"""Config of runs of several processes: the RL stage of the tiny run, with faults that tests inject.

The environment variable TEST is a JSON object. All its keys are optional:

- `sft`: true adds one supervised step before the RL stage.
- `config`: fields of the config to set.
- `kill`: [process, seconds]. The process is killed this many seconds after its second step began.
  If seconds is null, it is killed while its second checkpoint is written.
- `term`: [process, step, calls]. The process receives SIGTERM in this step (counted from 1), after
  it has called `stop_if_asked` this many times in the step.
- `crash`: [process, step]. The process raises an exception in this step (counted from 0).
- `bad`: [process, batch]. The process cannot read this batch (counted from 0).

Every process appends the examples that it reads to the file READ, another environment variable.
"""

import contextlib
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

from jaxrl_vlm.config import override
from tests import tiny_run


def get_config():
  asked = json.loads(os.environ.get("TEST", "{}"))
  config = tiny_run.get_config()
  sft, rl = config.stages
  rl.steps, rl.num_samples, rl.eval.examples, rl.objective.name = 4, 4, 6, "grpo"
  rl.optimizer.learning_rate = 1e-4
  sft.steps = 1
  config.stages = (sft, rl) if asked.get("sft") else (rl,)
  config.checkpoint.every, config.checkpoint.keep = 1, 10
  config.log_every, config.seed = 1, 3
  for field, value in asked.get("config", {}).items():
    override(config, f"config.{field}", str(value))
  _log_examples(asked.get("bad"))
  _inject_faults(asked)
  return config


@contextlib.contextmanager
def patched() -> Iterator[None]:
  """Restores at the end the methods that `get_config` patches.

  Processes that train several configs need this.
  """
  from jaxrl_vlm import checkpoint
  from jaxrl_vlm.data import pipeline
  from jaxrl_vlm.stages.run import StageRun

  methods = [
    (pipeline.BatchIterator, "__next__"),
    (checkpoint.Checkpoints, "save"),
    (StageRun, "steps"),
    (StageRun, "stop_if_asked"),
  ]
  before = [getattr(owner, name) for owner, name in methods]
  try:
    yield
  finally:
    for (owner, name), method in zip(methods, before, strict=True):
      setattr(owner, name, method)


def _process_id() -> str:
  return os.environ.get("JAX_PROCESS_ID", "0")


def _log_examples(bad: list[int] | None) -> None:
  """Logs every example that is read: seed of the stage's data, batch, row and id of the example.

  Args:
    bad: process and batch that raise an error instead; None for no error.
  """
  from jaxrl_vlm.data import pipeline
  from jaxrl_vlm.errors import UserError

  read_next = pipeline.BatchIterator.__next__

  def read_and_log(self):
    if bad and [_process_id(), self.given] == [str(bad[0]), bad[1]]:
      raise UserError("example 'broken': its image does not decode")
    batch, examples = self.given, read_next(self)
    rows = range(len(examples)) if self._rows is None else self._rows
    with open(pathlib.Path(os.environ["READ"]), "a") as file:
      seed = self.get_state()["seed"]
      file.writelines(
        f"{seed} {batch} {row} {example.id}\n" for row, example in zip(rows, examples, strict=True)
      )
    return examples

  pipeline.BatchIterator.__next__ = read_and_log


def _inject_faults(asked) -> None:
  """Patches methods so that the faults `kill`, `term` and `crash` happen."""
  from jaxrl_vlm import checkpoint
  from jaxrl_vlm.stages.run import StageRun

  save = checkpoint.Checkpoints.save

  def save_and_kill(self, step, *given):
    save(self, step, *given)
    if kill and kill[1] is None and [_process_id(), step] == [str(kill[0]), 2]:
      die(0)  # at this time, the checkpoint is being written in the background

  checkpoint.Checkpoints.save = save_and_kill
  steps = StageRun.steps
  kill, term, crash = (asked.get(name) for name in ("kill", "term", "crash"))

  def die(seconds):
    time.sleep(seconds)
    print(f"killed at {time.time()}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

  def steps_with_faults(self):
    for step in steps(self):
      if kill and kill[1] is not None and _process_id() == str(kill[0]) and step == 1:
        threading.Thread(target=die, args=(kill[1],), daemon=True).start()
      self.stop_calls = 0
      if crash and [_process_id(), step] == [str(crash[0]), crash[1]]:
        raise RuntimeError("a bug")
      yield step

  stop_if_asked = StageRun.stop_if_asked

  def term_and_stop_if_asked(self):
    if term and [_process_id(), self.run.step, self.stop_calls] == [str(term[0]), *term[1:]]:
      os.kill(os.getpid(), signal.SIGTERM)
    self.stop_calls += 1
    stop_if_asked(self)

  StageRun.steps, StageRun.stop_if_asked = steps_with_faults, term_and_stop_if_asked
  StageRun.stop_calls = 0

"""The config of runs of many processes: the RL stage of the tiny run, and what a test does to it.

TEST is JSON: `sft` (a step of it comes first), `config` (fields to set), `kill` ([process, seconds
after its second step began, or null: while its second checkpoint is written]),
`term` ([process, number of the step, how often it has looked in this step whether it is asked to
stop]), `crash` ([process, number of the step]), `bad` ([process, number of the batch]).
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
  _note_examples(asked.get("bad"))
  _disturb(asked)
  return config


@contextlib.contextmanager
def patched() -> Iterator[None]:
  """Undoes at the end what `get_config` patches, for processes that train several configs."""
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


def _me() -> str:
  return os.environ.get("JAX_PROCESS_ID", "0")


def _note_examples(bad: list[int] | None) -> None:
  """Writes one line for each example read: the seed of the stage's data, batch, row and example."""
  from jaxrl_vlm.data import pipeline
  from jaxrl_vlm.errors import UserError

  following = pipeline.BatchIterator.__next__

  def noted(self):
    if bad and [_me(), self.given] == [str(bad[0]), bad[1]]:
      raise UserError("example 'broken': its image does not decode")
    batch, examples = self.given, following(self)
    rows = range(len(examples)) if self._rows is None else self._rows
    with open(pathlib.Path(os.environ["READ"]), "a") as file:
      seed = self.get_state()["seed"]
      file.writelines(
        f"{seed} {batch} {row} {example.id}\n" for row, example in zip(rows, examples, strict=True)
      )
    return examples

  pipeline.BatchIterator.__next__ = noted


def _disturb(asked) -> None:
  from jaxrl_vlm import checkpoint
  from jaxrl_vlm.stages.run import StageRun

  save = checkpoint.Checkpoints.save

  def saved(self, step, *given):
    save(self, step, *given)
    if kill and kill[1] is None and [_me(), step] == [str(kill[0]), 2]:
      die(0)  # it is written in the background

  checkpoint.Checkpoints.save = saved
  steps = StageRun.steps
  kill, term, crash = (asked.get(name) for name in ("kill", "term", "crash"))

  def die(seconds):
    time.sleep(seconds)
    print(f"killed at {time.time()}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

  def disturbed(self):
    for step in steps(self):
      if kill and kill[1] is not None and _me() == str(kill[0]) and step == 1:
        threading.Thread(target=die, args=(kill[1],), daemon=True).start()
      self.looks = 0
      if crash and [_me(), step] == [str(crash[0]), crash[1]]:
        raise RuntimeError("a bug")
      yield step

  look = StageRun.stop_if_asked

  def looked(self):
    if term and [_me(), self.run.step, self.looks] == [str(term[0]), *term[1:]]:
      os.kill(os.getpid(), signal.SIGTERM)
    self.looks += 1
    look(self)

  StageRun.steps, StageRun.stop_if_asked, StageRun.looks = disturbed, looked, 0

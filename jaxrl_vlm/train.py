"""Trains a model: runs all stages of a config in a workdir.

    python -m jaxrl_vlm.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command resumes a stopped run from its last checkpoint. For a finished run, it prints the
result again.
"""

# Do not import jax at module level: the reward workers import this module first.
import contextlib
import pathlib
import time
import types
import uuid

from jaxrl_vlm import config as config_lib
from jaxrl_vlm import metrics
from jaxrl_vlm.errors import UserError

ABOUT = "Trains a vision-language model: runs all stages of a config."


def train(config, workdir: str | pathlib.Path) -> None:
  """Runs the stages of a config, from the start or from the last checkpoint.

  In a run of several processes, every process calls this function with the same config and with a
  workdir that all of them can read and write. Process 0 prints, and writes the files that exist
  once. Before a process exits, it must call `parallel.leave_processes`, as the command does.
  Otherwise the other processes take it for lost.

  Args:
    config: config of the run, as `get_config()` of a config file returns it.
    workdir: directory for all files of the run. It is created if it does not exist.

  Raises:
    UserError: a mistake that the user can correct; the message names it. Files that were saved
      before are kept.
  """
  from jaxrl_vlm import parallel

  parallel.choose_platform()
  parallel.join_processes()
  parallel.cache_compilations()
  from jaxrl_vlm import report, stages

  workdir = pathlib.Path(workdir)
  _check_the_same(config)
  parallel.in_turn(lambda: stages.check(config))
  parallel.in_turn(lambda: config_lib.check_workdir(workdir, config, may_change=stages.MAY_CHANGE))
  _check_shared(workdir)
  if not parallel.is_first():
    with contextlib.suppress(stages.Stopped):
      _save(stages.run_all(config, workdir), workdir)
    return
  began = time.monotonic()
  try:
    run = stages.run_all(config, workdir)
    final = workdir / "model"
    adapter = _save(run, workdir)
  except stages.Stopped as stopped:
    report.write_report(workdir)
    print(f"{stopped}; the same command continues.")
    return
  except BaseException:
    with contextlib.suppress(UserError, OSError):  # the original error is raised below
      report.write_report(workdir)
    raise
  page = report.write_report(workdir)
  changes = metrics.before_and_after(metrics.read(workdir))
  if changes:
    metrics.results_table(changes)
  print(f"""
finished in {metrics.duration(time.monotonic() - began)}
  model        {final}{adapter}
  report       {page}
  metrics      {workdir / "metrics.jsonl"} (TensorBoard: --logdir {workdir})
  rollouts     {workdir / "rollouts"}
  checkpoints  {workdir / "checkpoints"}""")


def _check_the_same(config) -> None:
  """Raises UserError if a process of the run has another config than process 0."""
  from jaxrl_vlm import parallel

  first, *others = map(config_lib.from_json, parallel.gather(config_lib.to_json(config)))
  for index, other in enumerate(others, 1):
    if lines := config_lib.diff(first, other):
      raise UserError(
        f"--config: process {index} of this run has another config than process 0 ({lines[0]})"
      )


def _check_shared(workdir: pathlib.Path) -> None:
  """Raises UserError if a process of the run does not see the files of process 0."""
  from jaxrl_vlm import parallel

  token = f".shared-{uuid.uuid4().hex}"
  mark = workdir / parallel.gather(token)[0]
  parallel.in_turn(lambda: mark.touch() if parallel.is_first() else None)
  end = time.monotonic() + 10  # network file systems may need a moment
  while not (seen := mark.exists()) and time.monotonic() < end:
    time.sleep(0.2)
  blind = [str(i) for i, sees in enumerate(parallel.gather(seen)) if not sees]
  if parallel.is_first():
    mark.unlink(missing_ok=True)
  if blind:
    raise UserError(
      f"--workdir={workdir}: process {', '.join(blind)} of this run does not see what process 0 "
      "writes there; expected a directory that all hosts share"
    )


def _save(run, workdir: pathlib.Path) -> str:
  """Writes the final model. If only adapters were trained, also writes them as a PEFT directory.

  Returns:
    A line of the summary that names the directory of the adapters, or "".
  """
  from jaxrl_vlm import models
  from jaxrl_vlm.models import lora

  params, config, line = run.params, run.model.config, ""
  if config.lora is not None:
    # If other parameters were trained too, the adapters do not fit the start model.
    if not lora.strip(run.trained):
      lora.save_adapter(workdir / "adapter", config, params, run.model_path)
      line = f"\n  adapter      {workdir / 'adapter'} (of {run.model_path})"
    params = lora.merged(params, config, donate=True)
  models.save_pretrained(workdir / "model", run.model, params, run.processor)
  return line


def main(args: types.SimpleNamespace) -> None:
  from jaxrl_vlm import parallel

  try:
    train(args.config, args.workdir)
  except BaseException as error:
    parallel.leave_processes(error)
    raise
  parallel.leave_processes()


__all__ = ["UserError", "main", "train"]

if __name__ == "__main__":
  config_lib.run_cli(main, "jaxrl_vlm.train", ABOUT)

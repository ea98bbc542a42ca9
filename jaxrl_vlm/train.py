"""python -m jaxrl_vlm.train --config=configs/quickstart.py --workdir=runs/quickstart

Runs the stages of a config. Started again with the same command, a run continues where its last
checkpoint left it; a finished run shows its result again.
"""

# Nothing here may import jax at module level: processes that grade import this module first.
import contextlib
import pathlib
import time
import types

from jaxrl_vlm import config as config_lib
from jaxrl_vlm import metrics
from jaxrl_vlm.errors import UserError

ABOUT = "Trains a vision-language model through the stages of a config."


def train(config, workdir: str | pathlib.Path) -> None:
  """Runs `config` (as from a config file) in `workdir`, from its beginning or where it stopped.

  Raises:
    UserError: something that the user can mend; the message names it. What was saved stays.
  """
  from jaxrl_vlm import parallel

  parallel.choose_platform()
  parallel.cache_compilations()
  from jaxrl_vlm import report, stages

  workdir = pathlib.Path(workdir)
  stages.check(config)
  config_lib.check_workdir(workdir, config, may_change=stages.MAY_CHANGE)
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
    with contextlib.suppress(UserError, OSError):  # the first error is the one to tell
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
  metrics      {workdir / 'metrics.jsonl'} (TensorBoard: --logdir {workdir})
  rollouts     {workdir / 'rollouts'}
  checkpoints  {workdir / 'checkpoints'}""")


def _save(run, workdir: pathlib.Path) -> str:
  """Writes the model and, where nothing but adapters trained, these; a line that says so."""
  from jaxrl_vlm import models
  from jaxrl_vlm.models import lora

  params, config, line = run.params, run.model.config, ""
  if config.lora is not None:
    # Otherwise the adapters do not belong to the model that the run began with.
    if not lora.strip(run.trained):
      lora.save_adapter(workdir / "adapter", config, params, run.model_path)
      line = f"\n  adapter      {workdir / 'adapter'} (of {run.model_path})"
    params = lora.merged(params, config, donate=True)
  models.save_pretrained(workdir / "model", run.model, params, run.processor)
  return line


def main(args: types.SimpleNamespace) -> None:
  train(args.config, args.workdir)


__all__ = ["UserError", "main", "train"]

if __name__ == "__main__":
  config_lib.run_cli(main, "jaxrl_vlm.train", ABOUT)

"""Tests that runs resume after signals, kills, damaged checkpoints, a full disk and bad input.

A resumed run must lose nothing, and end with the same model as an uninterrupted run. One test
starts processes, which it stops and kills. The other tests run in this process, on one device.
"""

import collections
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from jaxrl_vlm import checkpoint, metrics, objectives, train
from jaxrl_vlm import config as config_lib
from jaxrl_vlm.data import digit_boards, pipeline, sources
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.stages.run import StageRun
from tests import tiny_run

CONFIG = """\
from tests import tiny_run

def get_config():
  tiny_run.use_one_device()
  tiny_run.signal_at_step()
  return tiny_run.get_config()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The workdir of an uninterrupted run. Tests copy it."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  with tiny_run.one_device():
    train.train(tiny_run.get_config(), workdir)
  return workdir


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of `finished` without its model, like a run that was stopped just before its end."""
  shutil.copytree(finished, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "model")
  return tmp_path / "run"


def command(config, workdir, monkeypatch, capsys, *flags: str) -> tuple[int, str]:
  """Runs `python -m jaxrl_vlm.train` in this process. Returns its exit code and stderr."""
  path = workdir.parent / "config.py"
  path.write_text(
    "from jaxrl_vlm import config\n\ndef get_config():\n"
    f"  return config.from_json({config_lib.to_json(config)!r})\n"
  )
  monkeypatch.setattr(sys, "argv", ["train", f"--config={path}", f"--workdir={workdir}", *flags])
  capsys.readouterr()
  code = 0
  try:
    config_lib.run_cli(train.main, "jaxrl_vlm.train", train.ABOUT)
  except SystemExit as e:
    code = int(e.code or 0)
  return code, capsys.readouterr().err


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  return load_file(workdir / "model" / "model.safetensors")


def assert_same_model(a: pathlib.Path, b: pathlib.Path) -> None:
  ours, theirs = weights(a), weights(b)
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def trained_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps in metrics.jsonl that have a training loss."""
  records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [record["step"] for record in records if "train/loss" in record]


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- Stopped and killed ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_resumed_after_sigterm_and_sigkill_equals_an_uninterrupted_run(finished, tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  workdir = tmp_path / "run"

  def run(signal_at: str = "") -> subprocess.CompletedProcess:
    """Runs the command of the run. SIGNAL_AT_STEP makes the process send itself a signal."""
    return subprocess.run(
      [
        sys.executable,
        "-m",
        "jaxrl_vlm.train",
        f"--config={tmp_path / 'config.py'}",
        f"--workdir={workdir}",
      ],
      env={**os.environ, "SIGNAL_AT_STEP": signal_at},
      cwd=tiny_run.ROOT,
      text=True,
      capture_output=True,
      timeout=500,
    )

  # SIGTERM in the supervised stage. The metrics of step 1 are written while step 2 runs.
  stopped = run("SIGTERM:1")
  assert stopped.returncode == 0, stopped.stderr
  assert "SIGTERM: stopped after step 2; the same command continues." in stopped.stdout
  assert trained_steps(workdir) == [1, 2]
  assert not (workdir / "model").exists()

  # SIGKILL in the RL stage, as soon as a new checkpoint is complete.
  killed = run("SIGKILL:6")
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert trained_steps(workdir) == [1, 2, 3, 4, 5, 6]
  assert not (workdir / "model").exists()

  ended = run()
  assert ended.returncode == 0, ended.stderr
  assert trained_steps(workdir) == trained_steps(finished) == list(range(1, 9))
  assert_same_model(workdir, finished)
  # Training has changed every parameter. If not, the models could be equal without training.
  scratch = load_file(workdir / "scratch" / "model.safetensors")
  trained = weights(workdir)
  assert not [name for name in scratch if np.array_equal(trained[name], scratch[name])]


def records(workdir: pathlib.Path) -> list[dict]:
  return [
    {key: value for key, value in record.items() if not key.startswith("time/")}
    for record in metrics.read(workdir)
  ]


def resume_and_stop(step: int, check: int, workdir, monkeypatch) -> None:
  """Resumes a run and stops it with SIGTERM at the `check`-th stop check within step `step`.

  A stop check is a call of `StageRun.stop_if_asked`.
  """
  checks, stop_if_asked = collections.Counter(), StageRun.stop_if_asked

  def counted(self):
    checks[self.run.step] += 1
    if (self.run.step, checks[self.run.step]) == (step, check):
      os.kill(os.getpid(), signal.SIGTERM)
    stop_if_asked(self)

  with monkeypatch.context() as patch:
    patch.setattr(StageRun, "stop_if_asked", counted)
    train.train(tiny_run.get_config(), workdir)
  assert checks[step] == check and not (workdir / "model").exists()


@pytest.mark.parametrize(
  ("step", "check", "done"),
  [
    pytest.param(7, 2, 6, id="in the first rollout"),
    pytest.param(8, 2, 7, id="in a rollout"),
    pytest.param(8, 3, 7, id="before the update"),
  ],
)
def test_a_signal_within_a_step_stops_the_run_before_its_update(
  step, check, done, workdir, finished, one_device, monkeypatch, capsys
):
  shutil.rmtree(workdir / "checkpoints" / "8")  # resumes from step 6
  resume_and_stop(step, check, workdir, monkeypatch)
  out = capsys.readouterr().out
  assert f"SIGTERM: stopped after step {done}; the same command continues." in out
  assert max(int(p.name) for p in (workdir / "checkpoints").iterdir()) == done
  train.train(tiny_run.get_config(), workdir)
  assert_same_model(workdir, finished)
  assert records(workdir) == records(finished)


def test_a_stopped_evaluation_is_repeated_and_logged_once(
  tmp_path, finished, one_device, monkeypatch, capsys
):
  workdir = tmp_path / "run"
  for step, check, done in (
    (3, 2, 3),  # in the evaluation at the start of the second stage
    (4, 2, 3),  # in the first rollout after that evaluation
    (8, 4, 8),  # in the last evaluation
    (8, 1, 8),  # in the last evaluation again
  ):
    resume_and_stop(step, check, workdir, monkeypatch)
    assert f"stopped after step {done}; " in capsys.readouterr().out
  train.train(tiny_run.get_config(), workdir)
  assert_same_model(workdir, finished)
  assert records(workdir) == records(finished)


@pytest.mark.parametrize("moments", ["host", "bfloat16"])
def test_a_run_with_moments_on_the_host_or_in_bfloat16_resumes(moments, tmp_path, one_device):
  config = supervised(4)
  config.stages[0].optimizer.moments = moments
  whole, workdir = tmp_path / "whole", tmp_path / "run"
  train.train(config, whole)
  shutil.copytree(whole, workdir)
  shutil.rmtree(workdir / "model")
  for step in (3, 4):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  train.train(config, workdir)
  assert_same_model(workdir, whole)
  assert_equal_trees(saved_state(workdir, 4)["opt_state"], saved_state(whole, 4)["opt_state"])


def test_a_run_without_remaining_steps_only_saves_the_model_and_prints_the_result(
  workdir, finished, one_device, capsys
):
  before = (workdir / "metrics.jsonl").read_text()
  train.train(tiny_run.get_config(), workdir)
  assert (workdir / "metrics.jsonl").read_text() == before
  assert_same_model(workdir, finished)
  assert "held-out accuracy" in capsys.readouterr().out


# -- Damaged checkpoints --------------------------------------------------------------------------


def truncate_largest_file(step: pathlib.Path) -> None:
  largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.parametrize(
  "damage",
  [
    pytest.param(truncate_largest_file, id="data cut short"),
    pytest.param(lambda step: shutil.rmtree(step / "meta"), id="meta missing"),
    pytest.param(lambda step: (shutil.rmtree(step), step.mkdir()), id="empty"),
  ],
)
def test_a_damaged_checkpoint_is_skipped(damage, workdir, finished, one_device, capsys):
  checkpoints = workdir / "checkpoints"
  assert sorted(p.name for p in checkpoints.iterdir()) == ["4", "6", "8"]
  damage(checkpoints / "8")
  # A checkpoint that was being written when the run was interrupted is skipped too.
  shutil.copytree(checkpoints / "6", checkpoints / "9.orbax-checkpoint-tmp")
  train.train(tiny_run.get_config(), workdir)
  assert_same_model(workdir, finished)
  assert trained_steps(workdir) == list(range(1, 9))
  warnings = [w for w in capsys.readouterr().err.splitlines() if w.startswith("warning: ")]
  assert warnings == [
    "warning: the checkpoint of step 8 cannot be read and is now "
    f"{checkpoints / 'unreadable-8'}; continuing from step 6"
  ]
  assert (checkpoints / "8").is_dir() and (checkpoints / "unreadable-8").is_dir()


def test_a_run_without_a_readable_checkpoint_overwrites_nothing(workdir, one_device):
  checkpoints = workdir / "checkpoints"
  for step in ("4", "6", "8"):
    shutil.rmtree(checkpoints / step / "meta")
  before = files(workdir)
  with pytest.raises(UserError, match=r"checkpoints: no checkpoint can be read \(step 4: "):
    train.train(tiny_run.get_config(), workdir)
  after = files(workdir)
  after.pop("report.html")  # written again at the end of every run
  before.pop("report.html")
  assert after == before


# -- Full disk ------------------------------------------------------------------------------------

STATE = {"w": np.arange(300_000, dtype=np.float32), "count": np.int32(3)}


@pytest.fixture
def checkpoints(tmp_path):
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["test"])
  saved = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
  saved.save(1, jax.tree.map(jnp.asarray, STATE), {"step": 1})
  saved.wait()
  return saved


def restored(path: pathlib.Path):
  again = checkpoint.Checkpoints(path, keep=2)
  meta = again.latest_meta()
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jnp.zeros(()).sharding), STATE
  )
  state = again.restore(target)
  again.close()
  return meta, state


def test_a_full_disk_is_an_error_and_keeps_the_older_checkpoints(checkpoints, monkeypatch):
  usage = collections.namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * 2**20, 9 * 2**20, 2**20))
  with pytest.raises(UserError) as error:
    checkpoints.save(2, STATE, {"step": 2})
  assert str(error.value) == (
    f"{checkpoints.path}: disk full: a checkpoint needs 1 MiB, 1 MiB are free; make room and "
    "start the same command again (last complete checkpoint: step 1)"
  )
  checkpoints.close()
  meta, state = restored(checkpoints.path)
  assert meta == {"step": 1}
  np.testing.assert_array_equal(state["w"], STATE["w"])


def test_a_failed_background_write_of_a_checkpoint_is_an_error(checkpoints):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  noise = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=300_000), jnp.float32),
    "count": jnp.int32(4),
  }  # random numbers, which cannot be compressed below the limit
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # maximum size of a file in bytes
  try:
    with pytest.raises(UserError, match=r"saving a checkpoint failed: .*; earlier checkpoints"):
      checkpoints.save(2, noise, {"step": 2})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  checkpoints.close()
  meta, state = restored(checkpoints.path)
  assert meta == {"step": 1}
  np.testing.assert_array_equal(state["w"], STATE["w"])


# -- NaN losses -----------------------------------------------------------------------------------


def supervised(steps: int):
  """Only the supervised stage of the tiny run, with a checkpoint after every step."""
  config = tiny_run.get_config()
  config.stages = config.stages[:1]
  config.stages[0].steps = steps
  config.checkpoint.every, config.checkpoint.keep = 1, 10
  return config


def poison(monkeypatch, bad_steps: set[int]) -> None:
  """Makes the loss of the given supervised steps NaN.

  The experience of these steps has negative advantages. They tell the loss to return NaN.
  """
  from jaxrl_vlm.stages import sft

  count = itertools.count(1)
  experience, loss = sft.Experience, objectives.SFT.loss

  def marked(advantages, **fields):
    return experience(advantages=advantages * (-1 if next(count) in bad_steps else 1), **fields)

  def poisoned(self, stats, experience, **grad_views):
    value, metrics = loss(self, stats, experience, **grad_views)
    return value * jnp.where(experience.advantages.min() < 0, jnp.nan, 1.0), metrics

  monkeypatch.setattr(sft, "Experience", marked)
  monkeypatch.setattr(objectives.SFT, "loss", poisoned)


def saved_state(workdir: pathlib.Path, step: int):
  return ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")["train"]


def assert_equal_trees(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_step_with_a_nan_loss_changes_nothing_and_the_run_continues(
  tmp_path, one_device, monkeypatch
):
  poison(monkeypatch, {2})
  train.train(supervised(3), tmp_path / "run")
  first, second, third = (saved_state(tmp_path / "run", step) for step in (1, 2, 3))
  assert_equal_trees(first["params"], second["params"])
  assert_equal_trees(first["opt_state"], second["opt_state"])
  assert [s["bad_steps"] for s in (first, second, third)] == [0, 1, 0]
  assert not np.array_equal(second["params"]["head"], third["params"]["head"])
  records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  records = list(records)
  assert [r["train/bad_steps"] for r in records] == [0, 1, 0]
  assert [r["train/loss"] is None for r in records] == [False, True, False]


def test_too_many_consecutive_nan_losses_stop_the_run_and_keep_the_last_checkpoint(
  tmp_path, one_device, monkeypatch, capsys
):
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    poison(patch, {3, 4, 5})
    code, err = command(supervised(5), workdir, patch, capsys)
  assert code == 2
  assert err == (
    "step 4: the loss or gradient was NaN or infinite 2 times in a row (config.max_bad_steps=2); "
    f"the last good checkpoint is kept in {workdir / 'checkpoints'}; try a lower "
    "config.stages[0].optimizer.learning_rate in another --workdir\n"
  )
  good, kept = saved_state(workdir, 2), saved_state(workdir, 3)
  assert_equal_trees(good["params"], kept["params"])
  assert not (workdir / "checkpoints" / "4").exists() and not (workdir / "model").exists()
  # Without the NaN losses, the same command resumes from that checkpoint.
  train.train(supervised(5), workdir)
  assert trained_steps(workdir) == [1, 2, 3, 4, 5]
  assert (workdir / "model").exists()


# -- Bad input ------------------------------------------------------------------------------------


def write_jsonl(folder: pathlib.Path, count: int = 16) -> pathlib.Path:
  """Writes digit boards as a JSON lines file, with an image file for each."""
  boards = digit_boards.LiveBoards("train", count, tasks=("read",), style="direct")
  folder.mkdir()
  lines = []
  for i in range(count):
    example = boards[i]
    (folder / f"{i}.png").write_bytes(example.images[0])
    lines.append(
      json.dumps(
        {
          "id": f"board-{i}",
          "question": example.question,
          "image": f"{i}.png",
          "answer": example.answer,
          "target": example.target,
        }
      )
    )
  (folder / "train.jsonl").write_text("\n".join(lines))
  return folder / "train.jsonl"


def third_batch(path: pathlib.Path, config) -> int:
  """Returns the number of an example that the first stage uses in its third step, not before."""
  source = sources.open_source({"name": str(path)}, "train")
  stream = pipeline.make_iterator(source, batch_size=4, seed=config.seed)
  return int([next(stream) for _ in range(3)][-1][0].id.removeprefix("board-"))


def on_jsonl(kind: int, path: pathlib.Path, finished: pathlib.Path):
  """Only stage `kind` of the tiny run, with data from a file and a checkpoint after every step."""
  config = supervised(4)
  config.model.path, config.model.scratch = str(finished / "model"), {}
  config.stages = (tiny_run.get_config().stages[kind],)
  stage = config.stages[0]
  stage.steps = 4
  stage.data.name, stage.data.options = str(path), {}
  stage.eval.examples = 0
  return config


def test_a_broken_image_is_named_and_the_run_resumes_after_its_repair(
  finished, tmp_path, one_device, monkeypatch, capsys
):
  path = write_jsonl(tmp_path / "data")
  config = on_jsonl(0, path, finished)
  config.checkpoint.every = 50  # the error saves a checkpoint of the completed steps nevertheless
  number = third_batch(path, config)
  image = path.parent / f"{number}.png"
  whole = image.read_bytes()
  image.write_bytes(whole[: len(whole) // 2])
  workdir = tmp_path / "run"
  code, err = command(config, workdir, monkeypatch, capsys)
  assert code == 2 and len(err.splitlines()) == 1, err
  assert f"example 'board-{number}', image 0" in err
  assert trained_steps(workdir) == [1, 2]
  before = saved_state(workdir, 2)

  image.write_bytes(whole)
  code, err = command(config, workdir, monkeypatch, capsys)
  assert code == 0, err
  assert trained_steps(workdir) == [1, 2, 3, 4]
  assert_equal_trees(saved_state(workdir, 2)["params"], before["params"])


def test_an_example_longer_than_the_largest_bucket_is_named(
  finished, tmp_path, one_device, monkeypatch, capsys
):
  path = write_jsonl(tmp_path / "data")
  config = on_jsonl(1, path, finished)
  number = third_batch(path, config)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  lines[number]["question"] += " again" * 60
  path.write_text("\n".join(map(json.dumps, lines)))
  workdir = tmp_path / "run"
  code, err = command(config, workdir, monkeypatch, capsys)
  assert code == 2 and len(err.splitlines()) == 1, err
  assert f"example 'board-{number}': " in err
  assert "tokens, but the largest bucket is 64 (config.prompt_buckets)" in err
  assert trained_steps(workdir) == [1, 2]
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def test_an_example_without_an_answer_is_named_before_training(
  finished, tmp_path, one_device, monkeypatch, capsys
):
  path = write_jsonl(tmp_path / "data")
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  lines[6]["answer"] = " "
  path.write_text("\n".join(map(json.dumps, lines)))
  code, err = command(on_jsonl(1, path, finished), tmp_path / "run", monkeypatch, capsys)
  assert code == 2
  assert err == f"{path}:7: field 'answer' is empty\n"
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_workdir_of_another_config_is_refused_and_not_changed(
  workdir, one_device, monkeypatch, capsys
):
  before = files(workdir)
  config = tiny_run.get_config()
  config.stages[1].objective.name = "grpo"
  code, err = command(config, workdir, monkeypatch, capsys)
  assert code == 2
  assert err == (
    f"--workdir={workdir}: holds a run with another config "
    "(config.stages[1].objective.name: 'papo' -> 'grpo'); choose another --workdir for a new "
    "run, or set these fields back to resume that one\n"
  )
  assert files(workdir) == before


def test_a_run_resumes_with_another_checkpoint_interval(
  workdir, finished, one_device, monkeypatch, capsys
):
  config = tiny_run.get_config()
  config.checkpoint.every = 100
  code, err = command(config, workdir, monkeypatch, capsys)
  assert (code, err) == (0, "")
  assert_same_model(workdir, finished)


@pytest.mark.parametrize(
  ("flag", "line"),
  [
    (
      "--config.stages[0].prompts_per_step=6",
      "config.stages[0].prompts_per_step=6: expected a multiple of minibatches x microbatches x "
      "mesh.slice x mesh.fsdp = 4",
    ),
    (
      "--config.stages[1].eval.batch=6",
      "config.stages[1].eval.batch=6: expected a multiple of mesh.slice x mesh.fsdp = 4",
    ),
    (
      "--config.mesh.tensor=3",
      "config.mesh={'fsdp': 4, 'slice': 1, 'tensor': 3}: the axes must multiply to 8 devices, "
      "got 12",
    ),
  ],
)
def test_sizes_that_do_not_fit_the_mesh_are_refused(flag, line, tmp_path, monkeypatch, capsys):
  config = tiny_run.get_config()
  config.mesh.fsdp, config.mesh.tensor = 4, 2
  code, err = command(config, tmp_path / "run", monkeypatch, capsys, flag)
  assert (code, err) == (2, line + "\n")
  assert not (tmp_path / "run").exists()

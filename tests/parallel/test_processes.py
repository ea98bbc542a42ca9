"""Compares runs of several processes with runs of one, and tests that processes end together."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_vlm import metrics
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.parallel import processes
from tests import tiny_run
from tests.parallel.group import Ended, Group

STEPS = 4


def environment(
  index: int, count: int, devices: int, port: int, test: dict[str, Any], read: Any
) -> dict[str, str]:
  """Returns the environment variables of one process.

  Args:
    index: index of the process.
    count: number of processes of the run.
    devices: number of devices of the process.
    port: port of the coordinator.
    test, read: values of TEST and READ, see `processes_config`.
  """
  env = {name: value for name, value in os.environ.items() if name not in processes._ENVIRONMENT}
  env |= {"XLA_FLAGS": tiny_run.xla_flags(devices), "TEST": json.dumps(test), "READ": str(read)}
  if count > 1:
    address = f"127.0.0.1:{port}"
    env |= dict(zip(processes._ENVIRONMENT, (address, str(count), str(index)), strict=True))
  return env


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def run(
  workdir: pathlib.Path, count: int, devices: int, each: dict[int, Any] | None = None, **test: Any
) -> list[Ended]:
  """Runs the same command in several processes; returns how each of them ended.

  Args:
    workdir: the workdir of the run.
    count: number of processes.
    devices: number of devices of each process.
    each: keys of TEST, or `workdir`, for single processes by index.
    **test: keys of TEST for all processes, see `processes_config`.
  """
  port = free_port()
  workdir.parent.mkdir(exist_ok=True)
  logs = [workdir.parent / f"{workdir.name}.{i}" for i in range(count)]
  started = []
  for i, log in enumerate(logs):
    own = test | (each or {}).get(i, {})
    with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
      started.append(
        subprocess.Popen(
          [
            sys.executable,
            "-m",
            "jaxrl_vlm.train",
            f"--config={pathlib.Path(__file__).with_name('processes_config.py')}",
            f"--workdir={own.pop('workdir', workdir)}",
          ],
          env=environment(i, count, devices, port, own, f"{workdir}.read"),
          cwd=tiny_run.ROOT,
          stdout=out,
          stderr=err,
        )
      )
  ended: dict[int, float] = {}
  try:
    end = time.monotonic() + 400
    while len(ended) < count and time.monotonic() < end:
      time.sleep(0.1)
      ended |= {
        i: time.time()
        for i, process in enumerate(started)
        if i not in ended and process.poll() is not None
      }
  finally:
    for process in started:
      process.kill()
  return [
    Ended(
      process.wait(),
      pathlib.Path(f"{log}.out").read_text(),
      pathlib.Path(f"{log}.err").read_text(),
      ended.get(i, float("inf")),
    )
    for i, (process, log) in enumerate(zip(started, logs, strict=True))
  ]


_groups: dict[tuple[int, int], Group] = {}


@pytest.fixture(scope="module", autouse=True)
def close_groups():
  yield
  with contextlib.ExitStack() as stack:  # closes all groups, even if one of them fails
    while _groups:
      stack.callback(_groups.popitem()[1].close)


def run_in_group(workdir: pathlib.Path, count: int, devices: int, **test: Any) -> list[Ended]:
  """Like `run`, but in processes that stay up and are shared by all runs of this file.

  The processes must survive the run: it may be stopped, or fail with an error that all processes
  raise.
  """
  if (count, devices) not in _groups or not _groups[count, devices].alive:
    port = free_port()
    _groups[count, devices] = Group(
      [environment(i, count, devices, port, {}, "") for i in range(count)]
    )
  return _groups[count, devices].train(workdir, test)


def finish(workdir: pathlib.Path, count: int, devices: int, **test: Any) -> list[Ended]:
  """Trains to the end with `run_in_group`; all processes must succeed."""
  ends = run_in_group(workdir, count, devices, **test)
  assert [end.code for end in ends] == [0] * count, ends
  return ends


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the metrics of a run without times."""
  return [
    {key: value for key, value in record.items() if not key.startswith("time/")}
    for record in metrics.read(workdir)
  ]


def examples_read(workdir: pathlib.Path) -> dict[tuple[str, ...], str]:
  """Returns the example that was read for each seed, batch and row, by any process.

  A row that was read several times must have been the same example every time.
  """
  found: dict[tuple[str, ...], str] = {}
  for line in pathlib.Path(f"{workdir}.read").read_text().splitlines():
    *key, example = line.split()
    assert found.setdefault(tuple(key), example) == example
  return found


def texts(workdir: pathlib.Path) -> dict[tuple[int, str], Any]:
  """Returns texts and rewards of the samples in the rollout files, by step and prompt."""
  return {
    (step, group["id"]): [(s["text"], s["reward"]) for s in group["samples"]]
    for path in (workdir / "rollouts").glob("step_*.jsonl")
    for group in map(json.loads, path.read_text().splitlines())
    for step in [group["step"]]
  }


# With several processes, sums over devices are computed in another order, so results are rounded
# differently. These metrics consist of rounding errors only: they are differences of nearly equal
# numbers, or compare a policy with itself.
NOISE = ("objective/ref_kl", "objective/approx_kl_k1", "objective/sampler_logp", "train/loss")


def assert_same_run(workdir: pathlib.Path, one_process: pathlib.Path) -> None:
  ours, theirs = records(workdir), records(one_process)
  assert [r.keys() for r in ours] == [r.keys() for r in theirs]
  for a, b in zip(ours, theirs, strict=True):
    for key, value in a.items():
      if key.startswith("train/re") or key.startswith("eval/") or key.startswith("train/acc"):
        assert value == b[key], (a["step"], key)  # tokens and rewards are the same
      elif isinstance(value, float):
        np.testing.assert_allclose(
          value, b[key], rtol=1e-2, atol=1e-5 if key.startswith(NOISE) else 1e-7, err_msg=key
        )
      else:
        assert value == b[key], (a["step"], key)
  samples = texts(workdir)
  assert samples and samples.items() <= texts(one_process).items()
  assert examples_read(workdir) == examples_read(one_process)
  assert_same_model(workdir, one_process)


def assert_same_model(workdir: pathlib.Path, reference: pathlib.Path) -> None:
  ours, theirs, start = (
    load_file(path / "model.safetensors")
    for path in (workdir / "model", reference / "model", reference / "scratch")
  )
  assert ours.keys() == theirs.keys()
  # Adam divides by the magnitude of the gradient. Where the gradient is only rounding error, the
  # update is arbitrary, up to the learning rate in each of the STEPS steps.
  change = max(np.abs(theirs[name] - start[name]).max() for name in theirs)
  differences = [np.abs(ours[name] - theirs[name]) for name in theirs]
  assert max(d.max() for d in differences) < 0.2 * change
  assert max(d.mean() for d in differences) < 1e-3 * change


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """The uninterrupted run of one process with four devices."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  finish(workdir, 1, 4)
  return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """The uninterrupted run of two processes with two devices each."""
  workdir = tmp_path_factory.mktemp("two") / "run"
  ends = finish(workdir, 2, 2)
  # Only process 0 prints.
  assert "finished in" in ends[0].out and "finished" not in ends[1].out
  return workdir


@pytest.mark.slow
def test_a_run_of_two_processes_equals_a_run_of_one(two, one):
  assert_same_run(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_with_dynamic_sampling_equal_one(count, tmp_path):
  # In about half of the groups, both samples have the same reward, so the group is discarded.
  (tmp_path / "odd.py").write_text("def odd(example, text):\n  return len(text) % 2\n")
  dapo = {
    "stages[0].objective.name": "dapo",
    "stages[0].objective.max_tries": 3,
    "stages[0].num_samples": 2,
    "stages[0].rewards": {f"{tmp_path / 'odd.py'}:odd": 1.0},
  }
  one, several = tmp_path / "one", tmp_path / "several"
  finish(one, 1, 4, config=dapo)
  finish(several, count, 4 // count, config=dapo)
  # Some steps need several tries, so accepted groups move to other rows.
  assert max(r.get("train/tries", 0) for r in records(one)) > 1
  assert_same_run(several, one)


@pytest.mark.slow
@pytest.mark.parametrize(
  "test",
  [
    pytest.param(
      {
        "sft": True,
        "config": {
          "pipeline": "one_step_off",
          "rollout.tensor": 2,
          "checkpoint.every": 3,
          "stages[1].objective.name": "papo",
          "stages[1].objective.mask_on": "original",
          "stages[1].objective.mask_per": "sample",
          "stages[1].optimizer.moments": "bfloat16",
        },
      },
      id="sft, one step off, other sharding in rollouts, masks from the host",
    ),
    pytest.param(
      {"config": {"model.lora.rank": 4, "stages[0].objective.name": "remax"}},
      id="adapters, greedy baseline",
    ),
  ],
)
def test_two_processes_equal_one_in_other_configs(test, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  finish(one, 1, 4, **test)
  finish(two, 2, 2, **test)
  assert_same_run(two, one)


# -- Ending together ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  ("victim", "after"),
  # `after`: seconds after the second step began. None: while the second checkpoint is written.
  # Process 0 is the coordinator.
  [
    pytest.param(0, random.Random(0).uniform(0, 3), id="0-in a step"),
    pytest.param(1, random.Random(1).uniform(0, 3), id="1-in a step"),
    pytest.param(0, None, id="0-in a save"),
    pytest.param(1, None, id="1-in a save"),
  ],
)
def test_the_other_process_names_a_killed_process_and_the_run_resumes(victim, after, two, tmp_path):
  workdir = tmp_path / "run"
  ends = run(workdir, 2, 2, kill=[victim, after])
  killed = re.search(r"killed at ([0-9.]+)", ends[victim].out)
  assert killed and ends[victim].code == -signal.SIGKILL, ends
  other = ends[1 - victim]
  assert other.code == os.EX_TEMPFAIL, other
  assert other.at - float(killed[1]) < 60
  host = re.escape(socket.gethostname())
  assert re.search(
    rf"^process {victim} of 2 \(host {host}\)(, the coordinator,)? is gone; ",
    other.err,
    re.MULTILINE,
  ), other.err
  assert not (workdir / "model").exists()
  if after is None:
    assert not (workdir / "checkpoints" / "2").exists()

  finish(workdir, 2, 2)
  assert records(workdir) == records(two)
  assert examples_read(workdir) == examples_read(two)
  for name, value in load_file(workdir / "model" / "model.safetensors").items():
    np.testing.assert_array_equal(
      value, load_file(two / "model" / "model.safetensors")[name], err_msg=name
    )


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_and_the_run_resumes_with_another_mesh(one, tmp_path):
  workdir = tmp_path / "run"
  rarely = {"checkpoint.every": 50}
  for count, devices, mesh, step, calls in (  # before a step, and in a rollout
    (1, 4, {"mesh.fsdp": 2, "mesh.tensor": 2}, 2, 0),
    (2, 2, {}, 4, 1),
  ):
    ends = run_in_group(
      workdir, count, devices, term=[count - 1, step, calls], config=mesh | rarely
    )
    assert [end.code for end in ends] == [0] * count, ends
    assert f"SIGTERM: stopped after step {step - 1}; the same command continues." in ends[0].out
    assert [int(p.name) for p in (workdir / "checkpoints").iterdir()] and not (
      workdir / "model"
    ).exists()
  # Now the axis `tensor` spans both processes, so they hold the same rows. Microbatches, passes and
  # remat are different too.
  finish(
    workdir,
    2,
    2,
    config={
      "mesh.fsdp": 1,
      "mesh.tensor": 4,
      "rollout.tensor": 4,
      "stages[0].microbatches": 2,
      "stages[0].part_tokens": 512,
      "stages[0].eval.batch": 2,
      "model.remat": "full",
    }
    | rarely,
  )
  assert [r["step"] for r in records(workdir) if "train/loss" in r] == [1, 2, 3, 4]
  assert examples_read(workdir) == examples_read(one)
  assert_same_model(workdir, one)


@pytest.mark.slow
def test_an_unreadable_example_in_one_process_stops_all_with_a_checkpoint(two, tmp_path):
  workdir = tmp_path / "run"
  rarely = {"checkpoint.every": 50}
  ends = run_in_group(workdir, 2, 2, bad=[1, 2], config=rarely)
  assert [end.code for end in ends] == [2, 2], ends
  message = "example 'broken': its image does not decode"
  assert ends[0].err.splitlines()[-1] == f"process 1: {message}"
  assert ends[1].err.splitlines()[-1] == message
  assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
  finish(workdir, 2, 2, config=rarely)
  assert records(workdir) == records(two)
  assert examples_read(workdir) == examples_read(two)


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all(tmp_path):
  began = time.monotonic()
  ends = run(tmp_path / "run", 2, 2, crash=[1, 0])
  assert [end.code for end in ends] == [1, 1], ends
  assert "RuntimeError: a bug" in ends[1].err
  assert re.search(
    r"^process 1 of 2 \(host .*\) stopped: RuntimeError: a bug; ", ends[0].err, re.MULTILINE
  ), ends[0].err
  assert abs(ends[0].at - ends[1].at) < 60 and time.monotonic() - began < 300


@pytest.mark.slow
def test_no_process_resumes_from_a_damaged_or_incomplete_checkpoint(two, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(two, workdir)
  shutil.copy(f"{two}.read", f"{workdir}.read")
  shutil.rmtree(workdir / "model")
  checkpoints = workdir / "checkpoints"
  shutil.copytree(checkpoints / "4", checkpoints / "5.orbax-checkpoint-tmp")
  largest = max(
    (p for p in (checkpoints / "4").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  ends = finish(workdir, 2, 2)
  assert "the checkpoint of step 4 cannot be read" in ends[0].err
  assert "cannot be read" not in ends[1].err
  assert records(workdir) == records(two)
  assert_same_model(workdir, two)


# Joins the other processes and exchanges values until it is killed or raises an exception.
SMALL = """
import os, sys, time
from jaxrl_vlm import parallel

parallel.join_processes()
print("joined", flush=True)
try:
  with parallel.stopping_all():
    assert parallel.gather(int(os.environ["JAX_PROCESS_ID"])) == [0, 1, 2, 3]
    for turn in range(10000):
      parallel.gather(turn)
      time.sleep(0.1)
      if turn == 20 and sys.argv[1] == "bug":
        raise RuntimeError("a bug")
except BaseException as error:
  parallel.leave_processes(error)
  raise
"""


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "what"), [(0, "killed"), (2, "bug"), (2, "killed"), (0, "bug")])
def test_all_other_processes_name_the_process_that_ended(victim, what):
  port, started = free_port(), []
  for i in range(4):
    started.append(
      subprocess.Popen(
        [sys.executable, "-c", SMALL, what if i == victim else ""],
        cwd=tiny_run.ROOT,
        text=True,
        env=environment(i, 4, 1, port, {}, ""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
    )
  for process in started:
    assert process.stdout and process.stdout.readline() == "joined\n"
  if what == "killed":
    time.sleep(3)
    started[victim].kill()
  ends = [process.communicate(timeout=120)[1] for process in started]
  codes = [process.returncode for process in started]
  host = re.escape(socket.gethostname())
  for i, (code, err) in enumerate(zip(codes, ends, strict=True)):
    told = re.findall(
      r"^(process \d) of 4 \(host .*?\)(.*); process \d of 4 \(host .*?\) stops too",
      err,
      re.MULTILINE,
    )
    if i == victim:
      assert not told and code == (-signal.SIGKILL if what == "killed" else 1), (codes, ends)
      assert what == "killed" or "RuntimeError: a bug" in err
      continue
    assert [name for name, _ in told] == [f"process {victim}"], (codes, ends)
    assert code == (os.EX_TEMPFAIL if what == "killed" else 1), (codes, ends)
    assert re.search(rf"process {victim} of 4 \(host {host}\)", err)
    assert told[0][1].endswith("is gone" if what == "killed" else "stopped: RuntimeError: a bug")


@pytest.mark.slow
def test_the_error_names_a_workdir_that_is_not_shared(tmp_path):
  ends = run(tmp_path / "run", 2, 1, each={1: {"workdir": str(tmp_path / "other")}})
  assert [end.code for end in ends] == [2, 2], ends
  line = (
    f"--workdir={tmp_path / 'run'}: process 1 of this run does not see what process 0 writes "
    "there; expected a directory that all hosts share"
  )
  assert ends[0].err.splitlines()[-1] == line


# -- Joining --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("a:1", "2", ""), "JAX_PROCESS_ID: not set, but JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
    (("a", "2", "1"), "JAX_COORDINATOR_ADDRESS='a': expected host:port of process 0"),
    (
      ("a:1", "2", "2"),
      "JAX_PROCESS_ID='2' and JAX_NUM_PROCESSES='2': expected integers with 0 <= ",
    ),
    (("a:1", "two", "1"), "JAX_NUM_PROCESSES='two': expected integers with 0 <= JAX_PROCESS_ID < "),
  ],
)
def test_errors_of_an_invalid_environment_name_the_variables(given, message, monkeypatch):
  for name, value in zip(processes._ENVIRONMENT, given, strict=True):
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=re.escape(message)):
    processes.join_processes()


@pytest.mark.slow
def test_a_single_process_joins_nothing_and_exchanges_values_with_itself(monkeypatch):
  for name in processes._ENVIRONMENT:
    monkeypatch.delenv(name, raising=False)
  processes.join_processes()
  assert processes.gather({"a": 1.5}) == [{"a": 1.5}]
  assert processes.exchange(lambda: 3, str) == (3, ["3"])
  error = UserError("no")

  def fail():
    raise error

  with pytest.raises(UserError) as raised:
    processes.exchange(fail)
  assert raised.value is error

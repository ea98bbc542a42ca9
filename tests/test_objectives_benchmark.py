"""The comparison of objectives: its numbers, its page, and runs that fail or are stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import objectives as bench
from benchmarks import runs
from jaxrl_vlm import config as config_lib
from jaxrl_vlm import stages

ROOT = pathlib.Path(__file__).parents[1]


# -- Numbers --------------------------------------------------------------------------------------


def test_a_curve_counts_tokens_and_the_seconds_of_steps_alone():
  def step(number, tokens, seconds, compilations):
    return {"step": number, "stage": "rl", "train/generated_tokens": tokens,
            "time/step_seconds": seconds, "time/compilations": compilations}

  def evaluation(number, accuracy):
    return {"step": number, "stage": "rl", "eval/accuracy": accuracy,
            "eval/accuracy/perception": accuracy + 0.1, "eval/accuracy/reasoning": accuracy - 0.1}

  found = bench.curve([
      evaluation(0, 0.2), step(1, 100, 50.0, 7), step(2, 250, 2.0, 7), evaluation(2, 0.3),
      step(3, 400, 4.0, 7), evaluation(3, 0.5)])
  assert found["step"] == [0, 2, 3] and found["tokens"] == [0, 250, 400]
  # The first step compiled: it counts as one of 3 seconds.
  assert found["seconds"] == [0, 5, 9]
  assert found["overall"] == [0.2, 0.3, 0.5] and found["reasoning"] == [0.1, 0.2, 0.4]
  run = {"curve": found}
  assert bench.reached(run, 0.4, "tokens") == pytest.approx(325)
  assert bench.reached(run, 0.25, "seconds") == pytest.approx(2.5)
  assert bench.reached(run, 0.1, "tokens") == 0
  assert bench.reached(run, 0.6, "tokens") is None


def test_intervals_and_tests_are_the_textbooks():
  mean, half = bench.interval([1.0, 2.0, 3.0, 4.0, 5.0])
  assert mean == 3 and half == pytest.approx(2.776 * np.sqrt(2.5 / 5), rel=1e-3)
  assert np.isnan(bench.interval([1.0])[1])
  # Student's sleep data, R's t.test(paired=TRUE): t = -4.0621, p = 0.002833.
  first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
  second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
  mean, half, p = bench.paired(dict(enumerate(first)), dict(enumerate(second)) | {10: 9.0})
  assert mean == pytest.approx(-1.58) and p == pytest.approx(0.002833, rel=1e-3)
  assert mean - half == pytest.approx(-2.4598858) and mean + half == pytest.approx(-0.7001142)
  assert bench.paired({0: 1.0}, {1: 1.0})[0] is not None and np.isnan(bench.paired({}, {})[2])
  # R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm").
  got = bench.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "none": float("nan")})
  assert np.isnan(got.pop("none"))
  assert got == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def result(method, rate, seed, purpose, final):
  curve = {"step": [0, 10, 20], "tokens": [0, 100_000, 310_000], "seconds": [0.0, 10.0, 20.0]}
  for i, skill in enumerate(bench.SKILLS):
    curve[skill] = [0.3, 0.4 + 0.01 * i, final + 0.01 * i]
  return {"method": method, "learning_rate": rate, "seed": seed, "purpose": purpose,
          "seconds": 99.0, "curve": curve}


@pytest.fixture
def data():
  rates = bench.LEARNING_RATES
  results = [result(m, rate, seed, "tune", 0.5 + 0.01 * (i == 1) + 0.002 * (seed - 100))
             for m in ("grpo", "vppo") for i, rate in enumerate(rates) for seed in (100, 101)]
  for seed in (0, 1, 2):
    results += [result("grpo", rates[1], seed, "compare", 0.6 + 0.01 * seed),
                result("vppo", rates[1], seed, "compare", 0.65 + 0.012 * seed),
                result("vppo", rates[0], seed, "compare", 0.1),  # of a rate that was tuned away
                result("vppo_full_kl", rates[1], seed, "compare", 0.64)]
  return {
      "date": "2026-01-01", "machine": "2 CPU cores", "at_once": 2, "commit": "abc",
      "settings": {"token_budget": 310_000, "eval_every": 10}, "done": 18, "planned": 157,
      "failed": {"compare_rloo_0.0001_0": "exit code 2: no such objective"},
      "learning_rates": bench.tuned(results), "results": results}


def test_the_best_mean_over_tuning_seeds_is_the_learning_rate(data):
  assert data["learning_rates"] == dict.fromkeys(("grpo", "vppo"), bench.LEARNING_RATES[1])
  trials = bench.comparison_trials(data["learning_rates"])
  assert {t.method for t in trials} == {"grpo", "vppo", *bench.VARIANTS}
  assert [t.seed for t in trials] == sorted(t.seed for t in trials)


def test_the_page_has_the_numbers_between_its_markers(data, tmp_path):
  (tmp_path / "docs").mkdir()
  file = tmp_path / bench.PAGE
  file.write_text(f"# Title\n\nBefore.\n{bench.BEGIN}\nold\n{bench.END}\nAfter.\n")
  bench.write(tmp_path, data)
  bench.write(tmp_path, data)  # again: the same
  text = file.read_text()
  assert text.startswith(f"# Title\n\nBefore.\n{bench.BEGIN}\n") and "old" not in text
  assert text.endswith(f"{bench.END}\nAfter.\n")
  assert "18 of 157 runs, 2026-01-01, 2 CPU cores" in text
  assert "compare_rloo_0.0001_0: exit code 2: no such objective" in text
  rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
  cells = [cell.strip() for cell in rows["VPPO"].strip("|").split("|")]
  assert cells == ["VPPO", "50.1", "**51.1**", "50.1"]  # the last table: learning rates
  main = bench.table(bench._compared(data["results"], data), list(bench.METHODS), "grpo")
  grpo, vppo = ([cell.strip() for cell in line.strip("|").split("|")]
                for line in main.splitlines()[2:])
  assert grpo[:4] == ["GRPO", "0.0001", "3", "61.0 ± 2.5"] and grpo[6] == ""
  assert vppo[3] == "66.2 ± 3.0" and vppo[6] == "+5.2 ± 0.5"
  assert float(vppo[7]) < 0.001 and vppo[7] == vppo[8]
  # GRPO's level is 61%, between 40% at 100k and 65, 66.2 and 67.4% at 310k.
  assert vppo[9] == f"{np.mean([100 + 210 * 0.21 / (d - 0.4) for d in (0.65, 0.662, 0.674)]):.0f}k"
  assert grpo[9].endswith("(2 of 3)")
  assert main in text and json.loads((tmp_path / bench.RESULT).read_text()) == data
  assert (tmp_path / bench.PICTURE).stat().st_size > 10_000


def test_nothing_measured_yet_is_a_page_too(data, tmp_path):
  bench.write(tmp_path, data | {"results": [], "learning_rates": {}, "done": 0})
  assert "0 of 157 runs" in (tmp_path / bench.PAGE).read_text()


# -- Runs -----------------------------------------------------------------------------------------


def test_every_run_of_the_benchmark_has_a_valid_config(tmp_path, one_device):
  """What is on its command lines fits the config and the objective of that name."""
  rates = dict.fromkeys(bench.TUNED, 1e-4)
  trials = [t for t in bench.comparison_trials(rates) if t.seed == 0]
  trials += [t for t in bench.tuning_trials() if t.seed == bench.TUNING_SEEDS[0]]
  assert len({t.method for t in trials}) == len(bench.EVERYTHING)
  for trial in trials:
    job = trial.job(ROOT / "checkpoints" / "digits_base",
                    {"token_budget": 1000, "eval_every": 10}, ())
    flags = [f"--config={ROOT / job.config}", f"--workdir={tmp_path}", *job.flags]
    config = config_lib.load(flags).config
    stages.check(config)
    (stage,) = config.stages
    assert stage.token_budget == 1000 and stage.eval.every == (
        5 if bench.EVERYTHING[trial.method].filters else 10)


TRAIN = '''
import json, os, pathlib, signal, sys, time

flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
signal.signal(signal.SIGTERM, lambda *_: (print("stopped"), sys.exit(0)))
print("pid", os.getpid(), flush=True)
if "bad" in workdir.name and not pathlib.Path("mended").exists():
  sys.exit("config.sed: no such field")
if "slow" in workdir.name and not (workdir / "begun").exists():
  (workdir / "begun").touch()
  time.sleep(60)
(workdir / "model").mkdir()
(workdir / "model" / "config.json").write_text("{}")
'''


@pytest.fixture
def root(tmp_path, monkeypatch):
  """A repository whose training command does nothing, but leaves files like the real one."""
  (tmp_path / "jaxrl_vlm").mkdir()
  (tmp_path / "jaxrl_vlm" / "__init__.py").touch()
  (tmp_path / "jaxrl_vlm" / "train.py").write_text(TRAIN)
  monkeypatch.setattr(runs, "ROOT", tmp_path)
  return tmp_path


def test_a_failed_run_is_reported_and_tried_again_a_finished_one_is_not(root):
  jobs = [runs.Job(name, "configs/x.py") for name in ("a", "bad", "c")]
  with runs.Runner(root / "runs", 2) as runner:
    first = dict(runner.run(jobs))
  assert isinstance(first[jobs[0]], float) and isinstance(first[jobs[2]], float)
  assert str(first[jobs[1]]) == "exit code 1: config.sed: no such field"
  log = (root / "runs" / "a" / "log.txt").read_text()
  (root / "mended").touch()
  with runs.Runner(root / "runs", 1) as runner:
    second = dict(runner.run(jobs))
  assert (root / "runs" / "a" / "log.txt").read_text() == log
  assert second[jobs[0]] == first[jobs[0]]
  # Both of its lives count.
  assert second[jobs[1]] == sum(json.loads((root / "runs" / "bad" / "seconds.json").read_text()))


def test_two_benchmarks_do_not_share_a_folder(root):
  with runs.Runner(root / "runs", 1), pytest.raises(SystemExit, match="another benchmark"):
    runs.Runner(root / "runs", 1).__enter__()


SCRIPT = '''
import pathlib, sys
sys.path.insert(0, {repository!r})
from benchmarks import runs
runs.ROOT = pathlib.Path({root!r})

def work():
  with runs.Runner(runs.ROOT / "runs", 2) as runner:
    jobs = [runs.Job(name, "configs/x.py") for name in ("slow_1", "slow_2", "later")]
    print(len([s for _, s in runner.run(jobs) if isinstance(s, float)]), "done")

runs.main_of(work)
'''


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_passes_that_on_and_the_same_command_continues(number, root):
  script = [sys.executable, "-c", SCRIPT.format(repository=str(ROOT), root=str(root))]
  process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  begun = [root / "runs" / name / "begun" for name in ("slow_1", "slow_2")]
  while not all(path.exists() for path in begun):
    assert process.poll() is None
    time.sleep(0.05)
  began = time.monotonic()
  process.send_signal(number)
  out, err = process.communicate(timeout=50)
  assert time.monotonic() - began < 30 and process.returncode == 130
  assert "the same command continues" in err and "done" not in out
  for path in begun:  # nothing of it is left
    pid = int((path.parent / "log.txt").read_text().split()[1])
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)
  assert not (root / "runs" / "later" / "model").exists()
  again = subprocess.run(script, capture_output=True, text=True, timeout=50, check=True)
  assert again.stdout == "3 done\n"

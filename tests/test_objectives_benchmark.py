"""Tests the benchmark of objectives: its statistics, its page, and failed and stopped runs."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import digits, runs
from benchmarks import objectives as bench
from jaxrl_vlm import config as config_lib
from jaxrl_vlm import stages

ROOT = pathlib.Path(__file__).parents[1]


# -- Numbers --------------------------------------------------------------------------------------


def test_a_curve_counts_tokens_and_seconds_without_compilation():
  def step(number, tokens, seconds, compilations):
    return {
      "step": number,
      "stage": "rl",
      "train/generated_tokens": tokens,
      "time/step_seconds": seconds,
      "time/compilations": compilations,
    }

  def evaluation(number, accuracy):
    return {
      "step": number,
      "stage": "rl",
      "eval/accuracy": accuracy,
      "eval/accuracy/perception": accuracy + 0.1,
      "eval/accuracy/reasoning": accuracy - 0.1,
    }

  found = bench.curve(
    [
      evaluation(0, 0.2),
      step(1, 100, 50.0, 7),
      step(2, 250, 2.0, 7),
      evaluation(2, 0.3),
      step(3, 400, 4.0, 7),
      evaluation(3, 0.5),
    ]
  )
  assert found["step"] == [0, 2, 3] and found["tokens"] == [0, 250, 400]
  # The first step compiles programs, so it counts as 3 seconds, the median of the other steps.
  assert found["seconds"] == [0, 5, 9]
  assert found["overall"] == [0.2, 0.3, 0.5] and found["reasoning"] == [0.1, 0.2, 0.4]
  run = {"curve": found}
  assert bench.reached(run, 0.4, "tokens") == pytest.approx(325)
  assert bench.reached(run, 0.25, "seconds") == pytest.approx(2.5)
  assert bench.reached(run, 0.1, "tokens") == 0
  assert bench.reached(run, 0.6, "tokens") is None


def test_confidence_intervals_and_p_values_equal_those_of_textbooks_and_r():
  mean, half = bench.interval([1.0, 2.0, 3.0, 4.0, 5.0])
  assert mean == 3 and half == pytest.approx(2.776 * np.sqrt(2.5 / 5), rel=1e-3)
  assert np.isnan(bench.interval([1.0])[1])
  # Student's sleep data. R's t.test(paired=TRUE) gives t = -4.0621, p = 0.002833.
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
  return {
    "method": method,
    "learning_rate": rate,
    "seed": seed,
    "purpose": purpose,
    "seconds": 99.0,
    "curve": curve,
  }


@pytest.fixture
def data():
  rates = bench.LEARNING_RATES
  results = [
    result(m, rate, seed, "tune", 0.5 + 0.01 * (i == 1) + 0.002 * (seed - 100))
    for m in ("grpo", "vppo")
    for i, rate in enumerate(rates)
    for seed in (100, 101)
  ]
  for seed in (0, 1, 2):
    results += [
      result("grpo", rates[1], seed, "compare", 0.6 + 0.01 * seed),
      result("vppo", rates[1], seed, "compare", 0.65 + 0.012 * seed),
      result("vppo", rates[0], seed, "compare", 0.1),  # not the rate that tuning chose
      result("vppo_full_kl", rates[1], seed, "compare", 0.64),
    ]
  return {
    "date": "2026-01-01",
    "machine": "2 CPU cores",
    "at_once": 2,
    "commit": "abc",
    "settings": {"token_budget": 310_000, "eval_every": 10},
    "done": 18,
    "planned": 157,
    "failed": {"compare_rloo_0.0001_0": "exit code 2: no such objective"},
    "learning_rates": bench.tuned(results),
    "results": results,
  }


def test_tuning_chooses_the_learning_rate_with_the_best_mean_over_seeds(data):
  assert data["learning_rates"] == dict.fromkeys(("grpo", "vppo"), bench.LEARNING_RATES[1])
  trials = bench.comparison_trials(data["learning_rates"])
  assert {t.method for t in trials} == {"grpo", "vppo", *bench.VARIANTS}
  assert [t.seed for t in trials] == sorted(t.seed for t in trials)


def test_the_numbers_are_written_between_the_markers_of_the_page(data, tmp_path):
  (tmp_path / "docs").mkdir()
  file = tmp_path / bench.PAGE
  file.write_text(f"# Title\n\nBefore.\n{bench.BEGIN}\nold\n{bench.END}\nAfter.\n")
  bench.write(tmp_path, data)
  bench.write(tmp_path, data)  # writing a second time must change nothing
  text = file.read_text()
  assert text.startswith(f"# Title\n\nBefore.\n{bench.BEGIN}\n") and "old" not in text
  assert text.endswith(f"{bench.END}\nAfter.\n")
  assert "18 of 157 runs, 2026-01-01, 2 CPU cores" in text
  assert f"{len(data['results']) * 99 / 2 / 3600:.1f} hours in total" in text
  assert "compare_rloo_0.0001_0: exit code 2: no such objective" in text
  rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
  assert 'the objective of "VPPO, shaping only" above' in text
  cells = [cell.strip() for cell in rows["VPPO"].strip("|").split("|")]
  assert cells == ["VPPO", "50.1", "**51.1**", "50.1"]  # the last table: learning rates
  main = bench.table(bench._compared(data["results"], data), list(bench.METHODS), "grpo")
  grpo, vppo = (
    [cell.strip() for cell in line.strip("|").split("|")] for line in main.splitlines()[2:]
  )
  assert grpo[:4] == ["GRPO", "0.0001", "3", "61.0 ± 2.5"] and grpo[6] == ""
  assert vppo[3] == "66.2 ± 3.0" and vppo[6] == "+5.2 ± 0.5"
  assert float(vppo[7]) < 0.001 and vppo[7] == vppo[8]
  # The accuracy of GRPO is 61%. VPPO reaches it between 100k tokens, where its accuracy is 40%, and
  # 310k tokens, where it is 65%, 66.2% or 67.4%.
  assert vppo[9] == f"{np.mean([100 + 210 * 0.21 / (d - 0.4) for d in (0.65, 0.662, 0.674)]):.0f}k"
  assert grpo[9].endswith("(2 of 3)")
  assert grpo[11:] == vppo[11:] == ["310k", "20"] and "tokens per run | seconds per run" in main
  assert main in text and json.loads((tmp_path / bench.RESULT).read_text()) == data
  assert (tmp_path / bench.PICTURE).stat().st_size > 10_000


def test_metrics_are_averaged_over_steps_for_a_table():
  records = [
    {"step": 1, "train/tries": 1.0, "objective/clip_low": 0.1, "objective/clip_high": 0.0},
    {"step": 2, "train/tries": 2.0, "objective/clip_low": 0.2, "objective/clip_high": 0.3},
    {"step": 2, "eval/accuracy": 0.5},
  ]
  found = bench.step_means(records)
  assert found == {
    "train/tries": 1.5,
    "objective/clip_low": pytest.approx(0.15),
    "objective/clip_high": pytest.approx(0.15),
  }
  # Results of older versions of the benchmark have no `means`.
  old = result("grpo", 1e-4, 0, "compare", 0.6)
  new = [result("vppo", 1e-4, seed, "compare", 0.6) | {"means": found} for seed in (0, 1)]
  rows = bench.steps_table({"grpo": [old], "vppo": new}).splitlines()[2:]
  assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
    ["GRPO", "20", "–", "–", "–", "–"],
    ["VPPO", "20", "–", "–", "1.5", "30.0"],
  ]


def test_the_page_can_be_written_without_results(data, tmp_path):
  bench.write(tmp_path, data | {"results": [], "learning_rates": {}, "done": 0})
  assert "0 of 157 runs" in (tmp_path / bench.PAGE).read_text()


def test_the_page_can_be_written_from_stored_results(data, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["objectives.py", "--page", f"--out={tmp_path}"])
  with pytest.raises(SystemExit, match=r"objectives.json: no such file; expected results"):
    bench.main()
  text = json.dumps(data)
  (tmp_path / bench.RESULT).parent.mkdir()
  (tmp_path / bench.RESULT).write_text(text)
  bench.main()
  assert "18 of 157 runs" in (tmp_path / bench.PAGE).read_text()
  assert (tmp_path / bench.PICTURE).exists()
  assert (tmp_path / bench.RESULT).read_text() == text


# -- Learning rates -------------------------------------------------------------------------------


def tunings(method, finals):
  return [result(method, rate, 100, "tune", final) for rate, final in finals.items()]


@pytest.mark.parametrize(
  ("finals", "rates", "best"),
  [
    ({}, (5e-5, 1e-4, 2e-4), None),
    ({5e-5: 0.3, 1e-4: 0.9}, (5e-5, 1e-4, 2e-4), None),  # one rate is not measured yet
    ({5e-5: 0.3, 1e-4: 0.5, 2e-4: 0.4}, (5e-5, 1e-4, 2e-4), 1e-4),
    ({5e-5: 0.3, 1e-4: 0.4, 2e-4: 0.5}, (5e-5, 1e-4, 2e-4, 4e-4), None),
    ({5e-5: 0.3, 1e-4: 0.4, 2e-4: 0.5, 4e-4: 0.4}, (5e-5, 1e-4, 2e-4, 4e-4), 2e-4),
    ({5e-5: 0.3, 1e-4: 0.4, 2e-4: 0.5, 4e-4: 0.6}, (5e-5, 1e-4, 2e-4, 4e-4, 8e-4), None),
    ({5e-5: 0.3, 1e-4: 0.4, 2e-4: 0.5, 4e-4: 0.6, 8e-4: 0.7}, (5e-5, 1e-4, 2e-4, 4e-4, 8e-4), 8e-4),
    ({5e-5: 0.5, 1e-4: 0.4, 2e-4: 0.3, 2.5e-5: 0.6}, (5e-5, 1e-4, 2e-4, 2.5e-5, 1.25e-5), None),
  ],
)
def test_tuning_adds_rates_while_the_best_rate_is_the_lowest_or_the_highest(finals, rates, best):
  results = tunings("grpo", finals)
  assert bench.grid(bench.tuning(results, "grpo")) == rates
  assert bench.tuned(results) == ({} if best is None else {"grpo": best})
  mine = [t for t in bench.tuning_trials(results) if t.method == "grpo"]
  assert [t.learning_rate for t in mine] == list(rates)
  assert set(bench.tuning_trials(results)) <= set(bench.possible_trials())
  assert set(bench.comparison_trials(bench.tuned(results))) <= set(bench.possible_trials())


def test_the_tuning_table_marks_a_best_rate_that_is_the_lowest_or_the_highest(data):
  results = tunings("grpo", {5e-5: 0.3, 1e-4: 0.4, 2e-4: 0.5, 4e-4: 0.6, 8e-4: 0.7})
  results += tunings("vppo", {5e-5: 0.3, 1e-4: 0.5, 2e-4: 0.4})
  text = bench.tuning_table(data | {"results": results, "learning_rates": bench.tuned(results)})
  head, _, *lines = text.splitlines()
  assert head == "| method | 5e-05 | 0.0001 | 0.0002 | 0.0004 | 0.0008 |"
  assert lines[0] == "| GRPO | 30.0 | 40.0 | 50.0 | 60.0 | **70.0** † |"
  assert "| VPPO | 30.0 | **50.0** | 40.0 | – | – |" in lines
  assert lines[-1].startswith("† The best rate is the lowest or the highest")
  assert "†" not in bench.tuning_table(data)


class FakeRunner(runs.Runner):
  """A runner that writes the files of a finished run without training. Jobs in `fail` fail."""

  weights = b"weights"

  def __init__(self, folder, accuracy, fail=()):
    super().__init__(folder, 2)
    self.accuracy, self.fail, self.ran = accuracy, fail, []

  def run(self, jobs):
    self.check(jobs)
    for job in jobs:
      if job.name not in self.fail and self.seconds(job) is None:
        flags = self.settings(job)
        rate = float(flags.get("--config.stages[0].optimizer.learning_rate", 0))
        final = self.accuracy(flags.get("--config.stages[0].objective.name"), rate)
        path = self.path(job)
        (path / "model").mkdir(parents=True)
        (path / "model" / "config.json").write_text("{}")
        (path / "model" / "model.safetensors").write_bytes(self.weights)
        (path / "seconds.json").write_text("[360.0]")
        evaluations = [
          {
            "step": step,
            "eval/accuracy": a,
            "eval/accuracy/perception": a,
            "eval/accuracy/reasoning": a,
          }
          for step, a in ((0, 0.3), (1, final))
        ]
        step = {
          "step": 1,
          "train/generated_tokens": 100_000,
          "time/step_seconds": 1.0,
          "time/compilations": 0,
        }
        (path / "metrics.jsonl").write_text(
          "".join(
            json.dumps({"stage": "rl", **r}) + "\n"
            for r in (*evaluations[:1], step, *evaluations[1:])
          )
        )
        self._keep_settings(job)
      self.ran.append(job.name)
      yield job, runs.Failed("no memory") if job.name in self.fail else 360.0


SETTINGS = {"token_budget": 1000, "eval_every": 10}


def accuracy(method, rate):
  """Returns the final accuracy of a method at a learning rate.

  The best rate is above all tried rates for GRPO, and below the common rates for RLOO. For other
  methods, it is one of the common rates.
  """
  best = {"grpo": 1.0, "rloo": 2.5e-5}.get(method, 1e-4)
  return 0.6 - 0.01 * abs(np.log2((rate or 1.0) / best))


def test_runs_at_common_rates_precede_further_rates_and_the_comparison(tmp_path, monkeypatch):
  monkeypatch.setattr(bench, "write", lambda *_: None)
  runner = FakeRunner(tmp_path / "runs", accuracy)
  more = ("--config.log_every=5",)

  def plan():
    return bench.plan(runner, SETTINGS, more, seconds=3600.0, base_seconds=7200.0)

  assert plan().startswith("129 runs") and "; 0 finished." in plan()
  # 128 runs of one hour, two at a time, and the cold start of two hours.
  assert plan().endswith(" 66.0 hours left.")
  benchmark = bench.Benchmark(runner, tmp_path, SETTINGS, more)
  benchmark.run_all()
  tuning = [name for name in runner.ran if name.startswith("tune")]
  assert runner.ran[: 1 + len(tuning)] == ["base", *tuning] and len(tuning) == 33 + 4
  assert tuning[33:] == [
    f"tune_{name}_100" for name in ("grpo_0.0004", "rloo_2.5e-05", "grpo_0.0008", "rloo_1.25e-05")
  ]
  rates = benchmark.data["learning_rates"]
  assert rates == dict.fromkeys(bench.TUNED, 1e-4) | {"grpo": 8e-4, "rloo": 2.5e-5}
  assert benchmark.data["done"] == benchmark.data["planned"] == 133 == len(runner.ran)
  # A comparison run at a rate that tuning did not choose is not counted.
  other = bench.Trial("grpo", 1e-4, 0, "compare")
  list(runner.run([benchmark.job(other)]))
  assert plan().startswith("133 runs") and "x 1 seeds, and 4 at further rates)" in plan()
  assert plan().endswith(" 133 finished.\nAt 360 seconds per run, 2 side by side: 0.0 hours left.")


def test_a_method_is_compared_only_if_its_tuning_is_complete(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(bench, "write", lambda *_: None)
  fail = ["tune_cispo_0.0002_100", "tune_vppo_5e-05_100", "tune_rloo_2.5e-05_100"]
  runner = FakeRunner(tmp_path / "runs", accuracy, fail)
  with pytest.raises(SystemExit, match="3 runs failed; the same command"):
    bench.Benchmark(runner, tmp_path, SETTINGS, ()).run_all()
  left_out = {"cispo", "vppo", "rloo", *bench.VARIANTS}
  expected = {
    bench.Trial(name, 8e-4 if name == "grpo" else 1e-4, seed, "compare")
    .job(tmp_path, SETTINGS, ())
    .name
    for name in bench.EVERYTHING.keys() - left_out
    for seed in bench.SEEDS
  }
  assert {name for name in runner.ran if name.startswith("compare")} == expected
  err = capsys.readouterr().err
  for name in ("cispo", "vppo", "rloo"):
    assert f"{name}: not compared, because a run of its tuning failed" in err
  again = FakeRunner(tmp_path / "runs", accuracy)
  benchmark = bench.Benchmark(again, tmp_path, SETTINGS, ())
  benchmark.run_all()
  assert not benchmark.data["failed"] and benchmark.data["done"] == 133


def test_a_benchmark_continues_from_the_results_file_of_another_checkout(tmp_path, monkeypatch):
  """Only the results file is needed. Its runs are not repeated, except for the cold start."""
  write = bench.write
  monkeypatch.setattr(bench, "write", lambda *_: None)
  first = bench.Benchmark(FakeRunner(tmp_path / "runs", accuracy), tmp_path, SETTINGS, ())
  first.run_all()
  results = first.data["results"]
  write(tmp_path, first.data | {"results": results[:-3]})

  runner = FakeRunner(tmp_path / "elsewhere", accuracy)
  second = bench.Benchmark(runner, tmp_path, SETTINGS, ())
  second.run_all()
  last = [
    bench.Trial(**{k: r[k] for k in ("method", "learning_rate", "seed", "purpose")})
    for r in results[-3:]
  ]
  assert sorted(runner.ran) == sorted(["base", *(second.job(t).name for t in last)])
  assert second.data["done"] == first.data["done"] and len(second.data["results"]) == len(results)
  assert second.data["learning_rates"] == first.data["learning_rates"]

  with pytest.raises(SystemExit, match="settings is .* move it away to start over"):
    bench.Benchmark(
      FakeRunner(tmp_path / "other", accuracy), tmp_path, SETTINGS | {"token_budget": 7}, ()
    ).run_all()
  monkeypatch.setattr(FakeRunner, "weights", b"others")
  with pytest.raises(SystemExit, match="cold_start is .* move it away to start over"):
    bench.Benchmark(FakeRunner(tmp_path / "third", accuracy), tmp_path, SETTINGS, ()).run_all()


def test_changed_settings_are_an_error_before_any_run_starts(tmp_path):
  runner = FakeRunner(tmp_path / "runs", accuracy)
  benchmark = bench.Benchmark(runner, tmp_path, SETTINGS, ())
  # The benchmark would execute this run last. Its rate is not one of the common rates.
  list(runner.run([benchmark.job(bench.Trial("vppo_full_kl", 8e-4, 4, "compare"))]))
  runner.ran.clear()
  settings = {**SETTINGS, "token_budget": 2000}
  expected = (
    r"compare_vppo_full_kl_0.0008_4: --config.stages\[0\].token_budget is 1000 in this "
    "run, 2000 now; delete the run, or choose another --folder$"
  )
  with pytest.raises(SystemExit, match=expected):
    bench.Benchmark(runner, tmp_path, settings, ()).run_all()
  with pytest.raises(SystemExit, match=expected):
    bench.plan(runner, settings, (), seconds=1.0, base_seconds=1.0)
  assert not runner.ran


# -- Runs -----------------------------------------------------------------------------------------


def test_every_run_of_the_benchmark_has_a_valid_config(tmp_path, one_device):
  """The flags of each run must be valid for the config and its objective."""
  rates = dict.fromkeys(bench.TUNED, 1e-4)
  trials = [t for t in bench.comparison_trials(rates) if t.seed == 0]
  trials += [t for t in bench.tuning_trials() if t.seed == bench.TUNING_SEEDS[0]]
  assert len({t.method for t in trials}) == len(bench.EVERYTHING)
  for trial in trials:
    job = trial.job(
      ROOT / "checkpoints" / "digits_base", {"token_budget": 1000, "eval_every": 10}, ()
    )
    flags = [f"--config={ROOT / job.config}", f"--workdir={tmp_path}", *job.flags]
    config = config_lib.load(flags).config
    stages.check(config)
    (stage,) = config.stages
    assert stage.token_budget == 1000 and stage.eval.every == (
      5 if bench.EVERYTHING[trial.method].filters else 10
    )


TRAIN = """
import json, os, pathlib, signal, sys, time

flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
workdir = pathlib.Path(flags["workdir"])
assert workdir.is_absolute()
signal.signal(signal.SIGTERM, lambda *_: (print("stopped"), sys.exit(0)))
print("pid", os.getpid(), flush=True)
if "bad" in workdir.name and not pathlib.Path("mended").exists():
  sys.exit("config.sed: no such field")
(workdir / "config.json").write_text("{}")
if "slow" in workdir.name and not (workdir / "begun").exists():
  (workdir / "begun").touch()
  time.sleep(60)
(workdir / "model").mkdir()
(workdir / "model" / "config.json").write_text("{}")
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
  """A repository whose training command only writes the files of a run, without training."""
  (tmp_path / "jaxrl_vlm").mkdir()
  (tmp_path / "jaxrl_vlm" / "__init__.py").touch()
  (tmp_path / "jaxrl_vlm" / "train.py").write_text(TRAIN)
  monkeypatch.setattr(runs, "ROOT", tmp_path)
  return tmp_path


def test_failed_runs_are_reported_and_repeated_but_finished_runs_are_not(root):
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
  # The seconds of the failed start are included.
  assert second[jobs[1]] == sum(json.loads((root / "runs" / "bad" / "seconds.json").read_text()))


def run_alone(folder, *jobs):
  with runs.Runner(folder, 1) as runner:
    return list(runner.run(jobs))


def test_a_run_with_other_settings_is_an_error_before_any_run_starts(root):
  folder = root / "runs"
  model = f"--config.model.path={folder}/base/model"
  done = runs.Job("done", "configs/x.py", ("--config.seed=1", model, "--config.seed", "2"))
  run_alone(folder, done)
  kept = json.loads((folder / "done" / "settings.json").read_text())
  assert kept == {
    "--config": "configs/x.py",
    "--config.seed": "2",
    "--config.model.path": "base/model",
  }
  for job, text in (
    (
      runs.Job("done", "configs/y.py", done.flags),
      "--config is configs/x.py in this run, configs/y.py now",
    ),
    (
      runs.Job("done", "configs/x.py", (*done.flags, "--config.seed=3")),
      "--config.seed is 2 in this run, 3 now",
    ),
    (
      runs.Job("done", "configs/x.py", (*done.flags, "--config.log")),
      "--config.log is not given in this run, True now",
    ),
    (runs.Job("done", "configs/x.py", done.flags[:2]), "--config.seed is 2 in this run, 1 now"),
    (runs.Job("done", "configs/x.py", (model,)), "in this run, not given now"),
  ):
    with pytest.raises(SystemExit) as error:
      run_alone(folder, runs.Job("new", "configs/x.py"), job)
    line = str(error.value)
    assert line.startswith(f"{folder}/done: ") and text in line and "\n" not in line
    assert "delete the run, or choose another --folder" in line
  assert not (folder / "new").exists()
  # If the folder is moved, the settings of its runs stay the same.
  folder.rename(root / "moved")
  flags = (f"--config.model.path={root}/moved/base/model", "--config.seed=2")
  ((_, seconds),) = run_alone(root / "moved", runs.Job("done", "configs/x.py", flags))
  assert isinstance(seconds, float)


def test_only_runs_that_have_not_begun_may_have_new_settings(root):
  bad = runs.Job("bad", "configs/x.py", ("--config.sed=1",))
  # The config has an error, so the run does not begin.
  ((_, failed),) = run_alone(root / "runs", bad)
  assert isinstance(failed, runs.Failed)
  better = runs.Job("bad", "configs/x.py", ("--config.seed=1",))
  run_alone(root / "runs", better)
  (root / "runs" / "bad" / "config.json").write_text("{}")  # the first file of a run that has begun
  with pytest.raises(SystemExit, match="--config.seed is 1 in this run, 2 now"):
    run_alone(root / "runs", runs.Job("bad", "configs/x.py", ("--config.seed=2",)))


def test_a_finished_run_without_a_settings_file_is_accepted_and_gets_one(root):
  job = runs.Job("old", "configs/x.py", ("--config.seed=1",))
  run_alone(root / "runs", job)
  file, log = (root / "runs" / "old" / name for name in ("settings.json", "log.txt"))
  text = log.read_text()
  file.unlink()
  with runs.Runner(root / "runs", 1) as runner:
    runner.check([job])
    assert not file.exists()
  ((_, seconds),) = run_alone(root / "runs", job)
  assert isinstance(seconds, float) and log.read_text() == text and file.exists()
  with pytest.raises(SystemExit, match="--config.seed is 1"):
    run_alone(root / "runs", runs.Job("old", "configs/x.py"))


def test_failed_digit_runs_in_a_relative_folder_give_an_exit_code(root, monkeypatch, capsys):
  monkeypatch.setattr(digits, "RESULT", root / "digits.json")
  monkeypatch.setattr(
    digits,
    "result",
    lambda method, seed, workdir, seconds: {
      "method": method,
      "seed": seed,
      "seconds": seconds,
      "accuracy": {"overall": [0.1, 0.2]},
    },
  )
  (root / "elsewhere").mkdir()
  monkeypatch.chdir(root / "elsewhere")
  argv = ["digits.py", "--seeds", "0", "--folder", "my_runs", "--at-once", "1", "--methods"]
  monkeypatch.setattr(sys, "argv", [*argv, "good", "bad"])
  with pytest.raises(SystemExit, match="1 of 2 runs failed; the same command tries them again"):
    digits.main()
  assert "bad_0: exit code 1: config.sed: no such field" in capsys.readouterr().err
  assert (root / "elsewhere" / "my_runs" / "good_0" / "model" / "config.json").exists()
  (root / "mended").touch()
  digits.main()
  assert len(json.loads((root / "digits.json").read_text())["results"]) == 2
  monkeypatch.setattr(sys, "argv", [*argv, "good", "new", "--config.log_every=3"])
  with pytest.raises(SystemExit, match="good_0: --config.log_every is not given in this run"):
    digits.main()
  assert not (root / "elsewhere" / "my_runs" / "new_0").exists()


def test_two_benchmarks_cannot_use_the_same_folder(root):
  with runs.Runner(root / "runs", 1), pytest.raises(SystemExit, match="another benchmark"):
    runs.Runner(root / "runs", 1).__enter__()


SCRIPT = """
import pathlib, sys
sys.path.insert(0, {repository!r})
from benchmarks import runs
runs.ROOT = pathlib.Path({root!r})

def work():
  with runs.Runner(runs.ROOT / "runs", 2) as runner:
    jobs = [runs.Job(name, "configs/x.py") for name in ("slow_1", "slow_2", "later")]
    print(len([s for _, s in runner.run(jobs) if isinstance(s, float)]), "done")

runs.main_of(work)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_benchmark_stops_its_runs_and_the_same_command_continues(number, root):
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
  for path in begun:  # the processes of both runs have ended
    pid = int((path.parent / "log.txt").read_text().split()[1])
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)
  assert not (root / "runs" / "later" / "model").exists()
  again = subprocess.run(script, capture_output=True, text=True, timeout=50, check=True)
  assert again.stdout == "3 done\n"

"""Measures the seconds of each test file: with a cold cache, a warm cache, and exhaustively.

    python benchmarks/suite.py            # measure, then write the tables
    python benchmarks/suite.py --write    # write the tables again from benchmarks/suite.json

The benchmark runs these tests:

- `cold`: the tests that run by default, with an empty compilation cache.
- `warm`: the same tests, with the cache that the cold run has filled.
- `exhaustive`: the exhaustive tests, with the same cache. CI also runs them after the other tests.
- `objectives`, `rewards`, `not slow`: `pytest tests/objectives`, `pytest tests/rewards` and
  `pytest tests -m "not slow"` in one process, each with an empty cache.

For each test file, it records the number of tests, their seconds, and how many of these seconds the
test process spends compiling in XLA. If a test starts other processes, its seconds include the time
of these processes, but its compile seconds do not.

The results of each run are stored in `benchmarks/suite.json` when the run ends. If the command is
interrupted, run it again with `--only` and the names of the missing runs. The table of folders is
written to CONTRIBUTING.md and the table of files to docs/testing.md, between the markers there.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "suite.json"
_TWO_PROCESSES = ("-n", "2", "--dist", "loadfile")
# Arguments of pytest for each run.
RUNS = {
  "cold": _TWO_PROCESSES,
  "warm": _TWO_PROCESSES,
  "exhaustive": (*_TWO_PROCESSES, "-m", "exhaustive"),
  "objectives": ("tests/objectives",),
  "rewards": ("tests/rewards",),
  "not slow": ("tests", "-m", "not slow"),
}
BEGIN, END = "<!-- suite: benchmarks/suite.py -->", "<!-- end of suite -->"
OUT = "JAXRL_VLM_SUITE_TIMES"  # environment variable with the path of the file of the plugin

# -- The pytest plugin (`-p benchmarks.suite`) -----------------------------------------------------

_compiled = {"seconds": 0.0, "listening": 0.0}
_files: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])


def _listen() -> None:
  """Starts counting the seconds that this process spends compiling."""
  import jax.monitoring

  def add(event: str, seconds: float, **_) -> None:
    if event.endswith("backend_compile_duration"):
      _compiled["seconds"] += seconds

  jax.monitoring.register_event_duration_secs_listener(add)
  _compiled["listening"] = 1.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  if not _compiled["listening"]:
    _listen()
  item.compiled_before = _compiled["seconds"]
  return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call) -> None:
  """Adds the compile seconds of the test to the report of its last phase, `teardown`."""
  if call.when == "teardown":
    item.user_properties.append(("compiled", _compiled["seconds"] - item.compiled_before))


def pytest_runtest_logreport(report) -> None:
  file = _files[report.nodeid.partition("::")[0]]
  file[1] += report.duration
  if report.when == "teardown":
    file[0] += 1
    file[2] += dict(report.user_properties).get("compiled", 0.0)


def pytest_sessionfinish(session) -> None:
  if OUT in os.environ and not hasattr(session.config, "workerinput"):  # not a worker of xdist
    pathlib.Path(os.environ[OUT]).write_text(json.dumps(_files))


# -- The benchmark ---------------------------------------------------------------------------------


def measure(cache: str, *arguments: str) -> dict:
  """Runs the tests and returns the total seconds and the results of each file.

  Args:
    cache: Directory of the compilation cache.
    *arguments: Arguments of pytest.
  """
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "times.json"
    environment = os.environ | {OUT: str(out), "JAX_COMPILATION_CACHE_DIR": cache}
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", *arguments, "-p", "benchmarks.suite"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    seconds = time.monotonic() - start
    files = json.loads(out.read_text())
  return {
    "date": datetime.date.today().isoformat(),
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "seconds": round(seconds),
    "files": {name: [tests, round(a, 1), round(b, 1)] for name, (tests, a, b) in files.items()},
  }


def markdown(head: list[str], rows: list[list[str]]) -> str:
  lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_folder(files: dict[str, list[float]]) -> dict[str, list[float]]:
  """Returns the sums over the files of each folder. Files directly in `tests/` are one folder."""
  folders: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
  for name, row in files.items():
    folder = str(pathlib.PurePath(name).parent)
    folders[folder] = [a + b for a, b in zip(folders[folder], row, strict=True)]
  return folders


def table_rows(
  runs: list[dict[str, list[float]]], columns: tuple[tuple[int, ...], ...]
) -> list[list[str]]:
  """Returns a row for each file or folder. Cells of runs without results are empty.

  Args:
    runs: the results of each run, by file or folder.
    columns: the indices of the values of each run to show.
  """
  rows = []
  for name in sorted(set().union(*runs)):
    row = [f"`{name}`"]
    for run, shown in zip(runs, columns, strict=True):
      row += [f"{run[name][i]:.0f}" if name in run else "" for i in shown]
    rows.append(row)
  return rows


def tables(results: dict) -> tuple[str, str]:
  """Returns the table of folders and the table of files, in Markdown."""
  runs = [results.get(name, {"files": {}}) for name in ("cold", "warm", "exhaustive")]
  commands = {
    "cold": "the ordinary tests, in two processes with an empty cache",
    "warm": "the ordinary tests again, with the cache of the first run",
    "exhaustive": "the exhaustive tests, in two processes",
    "objectives": "`pytest tests/objectives` with an empty cache",
    "rewards": "`pytest tests/rewards` with an empty cache",
    "not slow": '`pytest tests -m "not slow"` with an empty cache',
  }
  rows = [
    [text, f"{results[name]['seconds'] / 60:.1f}", results[name]["date"]]
    for name, text in commands.items()
    if name in results
  ]
  machine = next(iter(results.values()))["machine"]
  about = (
    f"{markdown(['run', 'minutes', 'measured on'], rows)}\n\n"
    f"`python benchmarks/suite.py` measured these values ({machine}). The seconds below are sums "
    "over tests; where two processes share the work, the run takes about half of them."
  )
  short = table_rows([by_folder(run["files"]) for run in runs], ((0, 1), (1,), (0, 1)))
  long = table_rows([run["files"] for run in runs], ((0, 1, 2), (1, 2), (0, 1, 2)))
  head = ["folder", "tests", "seconds, cold", "seconds, warm", "exhaustive tests", "seconds"]
  files = ["file", "tests", "seconds, cold", "compiling", "seconds, warm"]
  files += ["compiling", "exhaustive tests", "seconds", "compiling"]
  return f"{about}\n\n{markdown(head, short)}", f"{about}\n\n{markdown(files, long)}"


def replace(path: pathlib.Path, text: str) -> None:
  """Replaces the text between the markers of a page."""
  head, found, rest = path.read_text(encoding="utf-8").partition(BEGIN)
  _, end, tail = rest.partition(END)
  if not found or not end:
    raise SystemExit(f"{path}: expected the lines {BEGIN!r} and {END!r}")
  path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", action="store_true", help="write the tables without running tests")
  parser.add_argument(
    "--only", nargs="+", choices=RUNS, default=list(RUNS), help="names of the runs to measure"
  )
  parser.add_argument(
    "--cache",
    default="",
    help="directory of the compilation cache; the cold run needs an empty one",
  )
  options = parser.parse_args()
  results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
  if not options.write:
    with tempfile.TemporaryDirectory() as shared:
      for name in options.only:
        with tempfile.TemporaryDirectory() as own:
          empty = own if name in ("objectives", "rewards", "not slow") else shared
          results[name] = measure(options.cache or empty, *RUNS[name])
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
  short, long = tables(results)
  replace(ROOT / "CONTRIBUTING.md", short)
  replace(ROOT / "docs" / "testing.md", long)
  print(short)


if __name__ == "__main__":
  main()

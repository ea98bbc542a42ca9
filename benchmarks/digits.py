"""Measures the gain of reinforcement learning on digit boards, for several methods and seeds.

    python benchmarks/digits.py                 # 4 methods x 3 seeds, two runs at a time
    python benchmarks/digits.py --methods grpo  # only the gain of the quickstart

Each run is `python -m jaxrl_vlm.train --config=configs/digits_<method>.py --config.seed=<seed>`.
Finished runs are not repeated, and stopped runs resume. After every run, the benchmark prints the
table of README.md and rewrites benchmarks/digits.json. It exits with status 1 if a run failed.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import runs  # noqa: E402
from jaxrl_vlm import metrics  # noqa: E402

RESULT = ROOT / "benchmarks" / "digits.json"


def result(method: str, seed: int, workdir: pathlib.Path, seconds: float) -> dict:
  """Returns the accuracy by skill before and after a finished run, its tokens and its seconds."""
  records = metrics.read(workdir)
  tokens = sum(
    r["time/tokens_per_second"] * r["time/step_seconds"]
    for r in records
    if "time/step_seconds" in r
  )
  return {
    "method": method,
    "seed": seed,
    "seconds": seconds,
    "response_tokens": round(tokens),
    "accuracy": {c.name: [c.before, c.after] for c in metrics.before_and_after(records)},
  }


def table(results: list[dict]) -> str:
  """Returns a Markdown table of the held-out accuracy in percent, before → after.

  Values are means over seeds. ± is the standard error of the gain.
  """
  skills = list(results[0]["accuracy"])
  lines = [
    "| method | seeds | " + " | ".join(skills) + " | gain (points) | minutes per run |",
    "|---|---|" + "---|" * (len(skills) + 2),
  ]
  for method in dict.fromkeys(r["method"] for r in results):
    method_results = [r for r in results if r["method"] == method]
    cells = []
    for skill in skills:
      before, after = 100 * np.array([r["accuracy"][skill] for r in method_results]).T
      cells.append(f"{before.mean():.1f} → {after.mean():.1f}")
    before, after = 100 * np.array([r["accuracy"]["overall"] for r in method_results]).T
    gain = after - before
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
    minutes = np.mean([r["seconds"] for r in method_results]) / 60
    lines.append(
      f"| {method} | {len(method_results)} | "
      + " | ".join(cells)
      + f" | {gain.mean():+.1f} ± {error:.1f} | {minutes:.1f} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument(
    "--methods", nargs="+", default=["grpo", "dapo", "papo", "vppo"], help="methods to run"
  )
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds to run")
  parser.add_argument(
    "--folder", type=pathlib.Path, default=ROOT / "runs" / "digits", help="directory of the runs"
  )
  parser.add_argument("--at-once", type=int, default=2, help="number of runs side by side")
  args, more = parser.parse_known_args()
  jobs = {
    runs.Job(f"{m}_{s}", f"configs/digits_{m}.py", (f"--config.seed={s}", *more)): (m, s)
    for s in args.seeds
    for m in args.methods
  }
  results, failed = [], 0
  with runs.Runner(args.folder, args.at_once) as runner:
    for job, seconds in runner.run(list(jobs)):
      if isinstance(seconds, runs.Failed):
        print(f"{job.name}: {seconds} ({runner.path(job) / 'log.txt'})", file=sys.stderr)
        failed += 1
        continue
      results.append(result(*jobs[job], runner.path(job), seconds))
      results.sort(key=lambda r: (args.methods.index(r["method"]), r["seed"]))
      RESULT.write_text(
        json.dumps(
          {**runs.surroundings(args.at_once), "arguments": more, "results": results}, indent=1
        )
        + "\n"
      )
      print(f"{len(results)}/{len(jobs)} runs\n{table(results)}\n", flush=True)
  if failed:
    raise SystemExit(f"{failed} of {len(jobs)} runs failed; the same command tries them again")


if __name__ == "__main__":
  runs.main_of(main)

"""Compares objectives from one start model, at one token budget, tuned alike, with paired seeds.

    python benchmarks/objectives.py         # takes hours; if stopped, the same command resumes
    python benchmarks/objectives.py --plan  # print how many runs and hours are left
    python benchmarks/objectives.py --page  # write page and picture from the existing results

The benchmark has three parts:

1. Cold start: it trains the start model (configs/objectives_base.py).
2. Tuning: it trains every method at three learning rates, with a tuning seed and its own evaluation
   questions. If the best rate of a method is the lowest or the highest, it also tries half or twice
   that rate.
3. Comparison: it trains every method at its best rate with the comparison seeds. All methods of a
   seed run before the next seed.

After each run it rewrites benchmarks/objectives.json, the part of docs/objectives.md between the
markers, and docs/images/objectives.png. A failed run is reported, and the next start tries it
again. A method is compared once its tuning is complete. If existing runs have other settings, the
benchmark refuses to start.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import runs  # noqa: E402
from jaxrl_vlm import config as config_lib  # noqa: E402
from jaxrl_vlm import metrics  # noqa: E402

RESULT = "benchmarks/objectives.json"
PAGE = "docs/objectives.md"
PICTURE = "docs/images/objectives.png"
BEGIN, END = "<!-- benchmarks/objectives.py: begin -->", "<!-- benchmarks/objectives.py: end -->"

LEARNING_RATES = (5e-5, 1e-4, 2e-4)
EXTENSIONS = 2  # how often a best rate at the edge is doubled or halved
TUNING_SEEDS = (100,)
SEEDS = (0, 1, 2, 3, 4)
TOKEN_BUDGET = 100_000
STEPS = 200  # more than any method needs to spend the token budget
TUNING_QUESTIONS = 1  # seed of the evaluation boards of tuning; the comparison uses 0
SKILLS = ("overall", "perception", "reasoning")
# Seconds of a run and of the cold start, for --plan before anything has run.
SECONDS, BASE_SECONDS = 130.0, 330.0
# Metrics whose mean over the steps of a run is kept.
MEANS = (
  "train/response_length",
  "train/kept_groups",
  "train/tries",
  "objective/clip_low",
  "objective/clip_high",
)


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the comparison.

  Attributes:
    label: name in tables.
    objective: fields of config.stages[0].objective.
    like: the method whose tuned learning rate it uses; "" if it is tuned itself.
    filters: whether it uses dynamic sampling. Its steps then generate more tokens, so it is
      evaluated after half as many steps.
  """

  label: str
  objective: Mapping[str, Any]
  like: str = ""
  filters: bool = False


def _vppo(label: str, **fields: Any) -> Method:
  return Method(
    label, {"name": "vppo", **fields}, like="vppo", filters=fields.get("filter_groups", True)
  )


# Compared with GRPO.
METHODS = {
  "grpo": Method("GRPO", {"name": "grpo"}),
  "dr_grpo": Method("Dr.GRPO", {"name": "dr_grpo"}),
  "dapo": Method("DAPO", {"name": "dapo"}, filters=True),
  "gspo": Method("GSPO", {"name": "gspo"}),
  "cispo": Method("CISPO", {"name": "cispo"}),
  "rloo": Method("RLOO", {"name": "rloo"}),
  "papo": Method("PAPO_G", {"name": "papo"}),
  "papo_d": Method("PAPO_D", {"name": "papo_d"}, filters=True),
  "vppo": Method("VPPO", {"name": "vppo"}, filters=True),
  "vppo_shaping": Method("VPPO, shaping only", {"name": "vppo", "tokens": "all"}, filters=True),
  "vppo_filter": Method(
    "VPPO, token filter only", {"name": "vppo", "shaping": "none"}, filters=True
  ),
}
# Compared with VPPO.
VARIANTS = {
  "vppo_all_groups": _vppo("without dynamic sampling", filter_groups=False),
  "vppo_mask_prompt": _vppo("one mask per prompt", mask_per="prompt"),
  "vppo_full_kl": _vppo("dependency: KL over the vocabulary", dependency="full"),
  **{
    f"vppo_keep_{share}": _vppo(f"keep_share {share}", keep_share=share)
    for share in (0.1, 0.2, 0.6, 0.8, 1.0)
  },
}
EVERYTHING = METHODS | VARIANTS
TUNED = tuple(name for name, method in METHODS.items() if not method.like)

BASE = runs.Job("base", "configs/objectives_base.py")


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of the benchmark. `purpose` is "tune" or "compare"."""

  method: str
  learning_rate: float
  seed: int
  purpose: str

  def job(self, base: pathlib.Path, settings: Mapping[str, Any], more: Sequence[str]) -> runs.Job:
    method = EVERYTHING[self.method]
    stage = "--config.stages[0]"
    every = settings["eval_every"]
    flags = {
      "--config.model.path": base,
      "--config.seed": self.seed,
      f"{stage}.steps": STEPS,
      f"{stage}.token_budget": settings["token_budget"],
      f"{stage}.optimizer.learning_rate": self.learning_rate,
      f"{stage}.eval.every": (every + 1) // 2 if method.filters else every,
      **{f"{stage}.objective.{k}": v for k, v in method.objective.items()},
    }
    if self.purpose == "tune":
      flags[f"{stage}.eval.options"] = {"seed": TUNING_QUESTIONS}
    name = f"{self.purpose}_{self.method}_{self.learning_rate:g}_{self.seed}"
    return runs.Job(
      name, "configs/objectives.py", (*(f"{flag}={value}" for flag, value in flags.items()), *more)
    )


# ------------------------------------------------------------------------------------------------
# Results of a run
# ------------------------------------------------------------------------------------------------


def curve(records: Sequence[metrics.Record]) -> dict[str, list[float]]:
  """Returns the evaluations of a run: step, tokens and seconds so far, accuracy by skill.

  Seconds are those of training steps, without evaluations. A step that compiled a program counts
  with the median seconds of a step.
  """
  steps = [r for r in records if "train/generated_tokens" in r]
  times = np.array([r["time/step_seconds"] for r in steps])
  compiled = np.diff([0, *(r["time/compilations"] for r in steps)]) != 0
  if len(times):
    times[compiled] = np.median(times if compiled.all() else times[~compiled])
  seconds = dict(zip((r["step"] for r in steps), np.cumsum(times), strict=True))
  tokens = {r["step"]: r["train/generated_tokens"] for r in steps}
  result: dict[str, list[float]] = {name: [] for name in ("step", "tokens", "seconds", *SKILLS)}
  for record in records:
    if record.get("eval/accuracy") is None:
      continue
    step = record["step"]
    result["step"].append(step)
    result["tokens"].append(tokens.get(step, 0))
    result["seconds"].append(round(float(seconds.get(step, 0.0)), 2))
    for skill in SKILLS:
      key = "eval/accuracy" if skill == "overall" else f"eval/accuracy/{skill}"
      result[skill].append(round(record[key], 5))
  return result


def step_means(records: Sequence[metrics.Record]) -> dict[str, float]:
  """Returns the means of the metrics in `MEANS` over the steps that have them."""
  by_key = {key: [r[key] for r in records if r.get(key) is not None] for key in MEANS}
  return {key: round(float(np.mean(values)), 5) for key, values in by_key.items() if values}


def reached(run: Mapping[str, Any], accuracy: float, unit: str) -> float | None:
  """Returns the tokens, seconds or steps after which a run first reaches `accuracy`.

  The value is interpolated linearly between two evaluations.

  Args:
    run: a result of the benchmark.
    accuracy: overall accuracy, 0 to 1.
    unit: "tokens", "seconds" or "step".

  Returns:
    The value, or None if no evaluation reaches `accuracy`.
  """
  values, costs = run["curve"]["overall"], run["curve"][unit]
  for i, value in enumerate(values):
    if value >= accuracy:
      if i == 0:
        return float(costs[0])
      share = (accuracy - values[i - 1]) / (value - values[i - 1])
      return float(costs[i - 1] + share * (costs[i] - costs[i - 1]))
  return None


def tuning(results: Sequence[Mapping[str, Any]], method: str) -> dict[float, float]:
  """Returns the mean final accuracy at each learning rate that has results of all tuning seeds."""
  finals: dict[float, dict[int, float]] = {}
  for r in results:
    if r["purpose"] == "tune" and r["method"] == method:
      finals.setdefault(r["learning_rate"], {})[r["seed"]] = r["curve"]["overall"][-1]
  return {
    rate: float(np.mean(list(finals[rate].values())))
    for rate in sorted(finals)
    if finals[rate].keys() >= set(TUNING_SEEDS)
  }


def grid(means: Mapping[float, float]) -> tuple[float, ...]:
  """Returns the learning rates that the tuning of a method needs.

  These are `LEARNING_RATES`. If the best of them is the lowest or the highest, half or twice that
  rate follows, at most `EXTENSIONS` times.

  Args:
    means: the result of `tuning` for the method so far.
  """
  rates = LEARNING_RATES
  for _ in range(EXTENSIONS):
    if not means.keys() >= set(rates):
      break
    best = _best({rate: means[rate] for rate in rates})
    if best == max(rates):
      rates += (2 * best,)
    elif best == min(rates):
      rates += (best / 2,)
    else:
      break
  return rates


def _best(means: Mapping[float, float]) -> float:
  return max(sorted(means), key=lambda rate: means[rate])


def tuned(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the best learning rate of each method that has results for its whole `grid`."""
  best = {}
  for method in TUNED:
    means = tuning(results, method)
    rates = grid(means)
    if means.keys() >= set(rates):
      best[method] = _best({rate: means[rate] for rate in rates})
  return best


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
  """Returns the mean and half the width of its 95% confidence interval (Student's t).

  Half the width is nan if there is only one value.
  """
  from scipy import stats

  x = np.asarray(values, float)
  if len(x) < 2:
    return float(x.mean()), float("nan")
  return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, float]:
  """Compares two methods on the seeds that both have.

  Returns:
    The mean difference, half the width of its 95% confidence interval, and the p-value of the
    paired t-test. The last two are nan with fewer than two seeds.
  """
  from scipy import stats

  seeds = sorted(ours.keys() & theirs.keys())
  if not seeds:
    return float("nan"), float("nan"), float("nan")
  differences = np.array([ours[s] - theirs[s] for s in seeds])
  mean, half = interval(differences)
  if len(seeds) < 2:
    return mean, half, float("nan")
  if not differences.std():  # the test would divide by 0
    return mean, 0.0, 1.0 if not mean else 0.0
  test: Any = stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds])
  return mean, half, float(test.pvalue)


def holm(p: Mapping[str, float]) -> dict[str, float]:
  """Returns p-values with Holm's correction for several tests. nan means that there is no test."""
  tests = sorted((value, name) for name, value in p.items() if np.isfinite(value))
  corrected, highest = dict.fromkeys(p, float("nan")), 0.0
  for i, (value, name) in enumerate(tests):
    highest = max(highest, min(1.0, value * (len(tests) - i)))
    corrected[name] = highest
  return corrected


# ------------------------------------------------------------------------------------------------
# Page and picture
# ------------------------------------------------------------------------------------------------


def _number(value: float, text: str) -> str:
  return text.format(value) if np.isfinite(value) else "–"


def _plus_minus(mean: float, half: float, sign: str = "") -> str:
  return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if np.isfinite(half) else "")


def _finals(results: Sequence[Mapping[str, Any]], skill: str) -> dict[int, float]:
  """Final accuracy in percent by seed."""
  return {r["seed"]: 100 * r["curve"][skill][-1] for r in results}


def _compared(
  results: Sequence[Mapping[str, Any]], data: Mapping[str, Any]
) -> dict[str, list[Mapping[str, Any]]]:
  """Comparison runs by method, at its tuned learning rate."""
  rates = data["learning_rates"]
  by_method = {}
  for name, method in EVERYTHING.items():
    chosen = [
      r
      for r in results
      if r["purpose"] == "compare"
      and r["method"] == name
      and r["learning_rate"] == rates.get(method.like or name)
    ]
    if chosen:
      by_method[name] = sorted(chosen, key=lambda r: r["seed"])
  return by_method


def table(
  by_method: Mapping[str, list[Mapping[str, Any]]], names: Sequence[str], against: str
) -> str:
  """Returns a Markdown table: final accuracy, difference from a method, cost to reach its accuracy.

  Args:
    by_method: comparison runs by method.
    names: the methods to show.
    against: the method that the others are compared with.
  """
  label = EVERYTHING[against].label
  head = [
    "method",
    "learning rate",
    "seeds",
    *SKILLS,
    f"difference from {label}",
    "p",
    "p (Holm)",
    f"tokens to reach {label}",
    f"seconds to reach {label}",
    "tokens per run",
    "seconds per run",
  ]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  if against not in by_method:
    return "\n".join(lines)
  base = _finals(by_method[against], "overall")
  level = float(np.mean(list(base.values()))) / 100
  # Other processes slow some runs down, so the fastest run gives the seconds of a step.
  pace = {
    name: min(r["curve"]["seconds"][-1] / r["curve"]["step"][-1] for r in method_runs)
    for name, method_runs in by_method.items()
  }
  names = [name for name in names if name in by_method]
  tests = {
    name: paired(_finals(by_method[name], "overall"), base) for name in names if name != against
  }
  corrected = holm({name: test[2] for name, test in tests.items()})
  for name in names:
    method_runs = by_method[name]
    cells = [EVERYTHING[name].label, f"{method_runs[0]['learning_rate']:g}", str(len(method_runs))]
    cells += [
      _plus_minus(*interval(list(_finals(method_runs, skill).values()))) for skill in SKILLS
    ]
    if name == against:
      cells += ["", "", ""]
    else:
      mean, half, p = tests[name]
      cells += [
        _plus_minus(mean, half, "+"),
        _number(p, "{:.3f}"),
        _number(corrected[name], "{:.3f}"),
      ]
    for unit in ("tokens", "step"):
      costs = [c for c in (reached(r, level, unit) for r in method_runs) if c is not None]
      few = f" ({len(costs)} of {len(method_runs)})" if len(costs) < len(method_runs) else ""
      mean = float(np.mean(costs)) if costs else 0.0
      shown = f"{mean / 1000:.0f}k" if unit == "tokens" else f"{mean * pace[name]:.0f}"
      cells.append(shown + few if costs else "not reached")
    tokens, steps = (
      np.mean([r["curve"][unit][-1] for r in method_runs]) for unit in ("tokens", "step")
    )
    cells += [f"{tokens / 1000:.0f}k", f"{steps * pace[name]:.0f}"]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def tuning_table(data: Mapping[str, Any]) -> str:
  """Returns a Markdown table: final accuracy of each method at each learning rate.

  The best rate is bold. It has a mark if it is the lowest or the highest that was tried.
  """
  means = {name: tuning(data["results"], name) for name in TUNED}
  rates = sorted(
    {*LEARNING_RATES, *(rate for method_means in means.values() for rate in method_means)}
  )
  head = ["method", *(f"{rate:g}" for rate in rates)]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  marked = False
  for name, method_means in means.items():
    cells = [METHODS[name].label]
    for rate in rates:
      text = f"{100 * method_means[rate]:.1f}" if rate in method_means else "–"
      if rate in method_means and rate == data["learning_rates"].get(name):
        edge = rate in (min(method_means), max(method_means))
        marked |= edge
        text = f"**{text}**{' †' if edge else ''}"
      cells.append(text)
    lines.append(f"| {' | '.join(cells)} |")
  if marked:
    lines += [
      "",
      "† The best rate is the lowest or the highest that was tried, so a rate beyond it may be "
      "better.",
    ]
  return "\n".join(lines)


def steps_table(by_method: Mapping[str, list[Mapping[str, Any]]]) -> str:
  """Returns a Markdown table: steps of each method, kept groups and clipped tokens."""
  head = [
    "method",
    "steps",
    "tokens per response",
    "groups that pass the filter (%)",
    "batches sampled per step",
    "clipped tokens (%)",
  ]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for name, method_runs in by_method.items():

    def mean(
      *keys, method_runs=method_runs
    ):  # mean of the sum of some metrics; nan if no run has them
      values = [
        sum(r["means"][k] for k in keys)
        for r in method_runs
        if set(keys) <= r.get("means", {}).keys()
      ]
      return float(np.mean(values)) if values else float("nan")

    lines.append(
      "| "
      + " | ".join(
        [
          EVERYTHING[name].label,
          f"{np.mean([r['curve']['step'][-1] for r in method_runs]):.0f}",
          _number(mean("train/response_length"), "{:.0f}"),
          _number(100 * mean("train/kept_groups"), "{:.0f}"),
          _number(mean("train/tries"), "{:.1f}"),
          _number(100 * mean("objective/clip_low", "objective/clip_high"), "{:.1f}"),
        ]
      )
      + " |"
    )
  return "\n".join(lines)


def page(data: Mapping[str, Any]) -> str:
  """Returns the text between the markers of docs/objectives.md."""
  by_method = _compared(data["results"], data)
  settings = data["settings"]
  starts = [100 * r["curve"]["overall"][0] for results in by_method.values() for r in results]
  start = f" All runs start at {np.mean(starts):.1f}%." if starts else ""
  failed = "".join(f"\n- {name}: {text}" for name, text in data["failed"].items())
  failed = f" These runs failed and will be tried again:{failed}" if failed else ""
  commit = f", commit {data['commit']}" if data.get("commit") else ""
  hours = sum(r["seconds"] for r in data["results"]) / data["at_once"] / 3600
  return f"""
Measured: {data["done"]} of {data["planned"]} runs, {data["date"]}, {data["machine"]},
{data["at_once"]} runs at the same time, {hours:.1f} hours in total{commit}.{failed}

![Accuracy over generated tokens](images/{pathlib.Path(PICTURE).name})

**Methods.** The table shows the accuracy in percent on held-out questions after
{settings["token_budget"]:,} generated tokens. ± is half of the 95% confidence interval of the mean
over seeds (Student's t).{start} The difference
from GRPO is computed between runs with the same seed. *p* is the p-value of a paired t-test, and
*p (Holm)* is this value with Holm's correction for the number of rows.

A run ends after the step in which it reaches the token budget. It therefore generates more tokens
than the budget (*tokens per run*). The excess is largest with dynamic sampling, because a step then
generates more tokens. The seconds are the number of steps, multiplied by the seconds per step of
the fastest run of the method. Evaluations and compilation are not included.

*tokens to reach GRPO* is the number of tokens after which a run first reaches the mean final
accuracy of GRPO. The table shows the mean over the runs that reach it. If some runs do not reach
it, the number of runs that do is in parentheses.

{table(by_method, list(METHODS), "grpo")}

**Variants of VPPO.** They use the learning rate of VPPO. VPPO itself has keep_share 0.4, one mask
per sample, and the estimator k3 of the dependency. With keep_share 1.0, the token filter keeps
every token. This row has the objective of "{METHODS["vppo_shaping"].label}" above, at the learning
rate of VPPO.

{table(by_method, ["vppo", *VARIANTS], "vppo")}

**Tokens and groups.** The values are means over the steps of all seeds. A clipped token has no
gradient, except with CISPO, which keeps the gradient of clipped tokens. The lower clip bound of
CISPO is a ratio of 1.

{steps_table(by_method)}

**Tuning.** The table shows the final accuracy at each learning rate that was tried. Tuning uses
another seed and other questions than the comparison.

{tuning_table(data)}
"""


def picture(path: pathlib.Path, data: Mapping[str, Any]) -> None:
  """Draws the mean accuracy over generated tokens (left) and the final accuracies (right)."""
  from matplotlib import colormaps
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  by_method = _compared(data["results"], data)
  names = [name for name in METHODS if name in by_method]
  if not names:
    return
  figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  tokens = np.linspace(0, data["settings"]["token_budget"], 60)
  for i, name in enumerate(names):
    color = colormaps["tab20"](2 * i % 20 + (i >= 10))
    curves = [
      np.interp(tokens, r["curve"]["tokens"], r["curve"]["overall"]) for r in by_method[name]
    ]
    left.plot(
      tokens / 1000,
      100 * np.mean(curves, axis=0),
      color=color,
      linewidth=1.8,
      label=METHODS[name].label,
    )
    mean, half = interval(list(_finals(by_method[name], "overall").values()))
    right.errorbar(
      mean, -i, xerr=half if np.isfinite(half) else 0.0, fmt="o", color=color, capsize=3
    )
  left.set_xlabel("generated tokens (thousands)")
  left.set_ylabel("held-out accuracy (%)")
  left.legend(frameon=False, fontsize=8)
  right.set_yticks([-i for i in range(len(names))], [METHODS[name].label for name in names])
  right.set_xlabel("final accuracy (%), 95% interval")
  for axes in (left, right):
    axes.grid(axis="both", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def write(out: pathlib.Path, data: Mapping[str, Any]) -> None:
  """Writes the results, the page and the picture to the directory `out`."""
  (out / RESULT).parent.mkdir(parents=True, exist_ok=True)
  config_lib.write_atomically(out / RESULT, json.dumps(data, indent=1) + "\n")
  show(out, data)


def show(out: pathlib.Path, data: Mapping[str, Any]) -> None:
  """Writes the page and the picture to the directory `out`."""
  file = out / PAGE
  file.parent.mkdir(parents=True, exist_ok=True)
  text = file.read_text() if file.exists() else f"# Objectives compared\n\n{BEGIN}\n{END}\n"
  head, begin, rest = text.partition(BEGIN)
  _, end, tail = rest.partition(END)
  if not begin or not end:
    raise SystemExit(f"{file}: expected the lines {BEGIN} and {END}")
  config_lib.write_atomically(file, head + BEGIN + "\n" + page(data) + "\n" + END + tail)
  picture(out / PICTURE, data)


# ------------------------------------------------------------------------------------------------
# All runs
# ------------------------------------------------------------------------------------------------


def tuning_trials(results: Sequence[Mapping[str, Any]] = ()) -> list[Trial]:
  """Returns the trials that tuning needs, given the results so far: common rates come first."""
  rates = {name: grid(tuning(results, name)) for name in TUNED}
  common = len(LEARNING_RATES)
  return [
    Trial(name, rates[name][i], seed, "tune")
    for indices in (range(common), range(common, common + EXTENSIONS))
    for seed in TUNING_SEEDS
    for i in indices
    for name in TUNED
    if i < len(rates[name])
  ]


def comparison_trials(rates: Mapping[str, float]) -> list[Trial]:
  """Returns the trials of the comparison. Methods without a tuned learning rate are left out."""
  trials = []
  for seed in SEEDS:
    for name, method in EVERYTHING.items():
      rate = rates.get(method.like or name)
      if rate is not None:
        trials.append(Trial(name, rate, seed, "compare"))
  return trials


def possible_trials() -> list[Trial]:
  """Returns every trial that can become necessary, whatever the results of tuning are."""
  factors = [2.0**i for i in range(1, EXTENSIONS + 1)]
  rates = (
    *LEARNING_RATES,
    *(max(LEARNING_RATES) * f for f in factors),
    *(min(LEARNING_RATES) / f for f in factors),
  )
  return [
    Trial(name, rate, seed, purpose)
    for purpose, names, seeds in (("tune", TUNED, TUNING_SEEDS), ("compare", EVERYTHING, SEEDS))
    for name in names
    for rate in rates
    for seed in seeds
  ]


def planned(results: Sequence[Mapping[str, Any]]) -> int:
  """Returns the total number of runs, with the cold start, given the results so far."""
  return 1 + len(tuning_trials(results)) + len(SEEDS) * len(EVERYTHING)


def outcome(trial: Trial, path: pathlib.Path, seconds: float) -> dict[str, Any]:
  """Returns the entry of a finished run in benchmarks/objectives.json."""
  records = metrics.read(path)
  return {
    **dataclasses.asdict(trial),
    "seconds": round(seconds, 1),
    "curve": curve(records),
    "means": step_means(records),
  }


class Benchmark:
  """Runs trials and keeps the results.

  Attributes:
    data: the content of benchmarks/objectives.json.
  """

  def __init__(
    self, runner: runs.Runner, out: pathlib.Path, settings: Mapping[str, Any], more: Sequence[str]
  ):
    self.runner, self.out, self.settings, self.more = runner, out, settings, tuple(more)
    self.begun: set[Trial] = set()
    self.known: dict[Trial, dict[str, Any]] = {}  # results of runs in another folder
    self.data: dict[str, Any] = {
      **runs.surroundings(runner.at_once),
      "settings": dict(settings),
      "arguments": list(more),
      "cold_start": "",
      "done": 0,
      "planned": planned([]),
      "failed": {},
      "learning_rates": {},
      "results": [],
    }

  def job(self, trial: Trial) -> runs.Job:
    return trial.job(self.runner.path(BASE) / "model", self.settings, self.more)

  def take_known(self) -> None:
    """Loads the results of runs that are in the results file but not in this folder.

    Raises:
      SystemExit: these runs have other settings, or started from another cold start.
    """
    model = self.runner.path(BASE) / "model" / "model.safetensors"
    self.data["cold_start"] = hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    file = self.out / RESULT
    if not file.exists():
      return
    before = json.loads(file.read_text())
    for field in ("settings", "arguments", "cold_start"):
      if before["results"] and before.get(field) not in (None, self.data[field]):
        raise SystemExit(
          f"{file}: {field} is {before[field]} in this file, {self.data[field]} now; move it away "
          "to start over, or choose another --out"
        )
    for result in before["results"]:
      fields = {f.name: result[f.name] for f in dataclasses.fields(Trial)}
      self.known[Trial(**fields)] = result

  def run(self, trials: Sequence[Trial]) -> None:
    self.begun.update(trials)
    for trial in trials:
      if trial in self.known and self.runner.seconds(self.job(trial)) is None:
        self.data["results"].append(self.known[trial])
        self.data["done"] += 1
        trials = [t for t in trials if t != trial]
    self.data["learning_rates"] = tuned(self.data["results"])
    jobs = {self.job(trial): trial for trial in trials}
    old = sum(self.runner.seconds(job) is not None for job in jobs)
    for number, (job, seconds) in enumerate(self.runner.run(list(jobs)), 1):
      trial = jobs[job]
      if isinstance(seconds, runs.Failed):
        self.data["failed"][job.name] = str(seconds)
        print(
          f"{job.name} failed: {seconds} ({self.runner.path(job) / 'log.txt'})",
          file=sys.stderr,
          flush=True,
        )
      else:
        # The checkpoints of 150 runs would fill 5 GB, and a finished run needs none.
        shutil.rmtree(self.runner.path(job) / "checkpoints", ignore_errors=True)
        self.data["results"].append(outcome(trial, self.runner.path(job), seconds))
        result = self.data["results"][-1]["curve"]
        self.data["done"] += 1
        self.data["planned"] = planned(self.data["results"])
        print(
          f"{self.data['done']}/{self.data['planned']} {job.name}: "
          f"{result['overall'][0]:.3f} -> {result['overall'][-1]:.3f}, {seconds:.0f} s",
          flush=True,
        )
      if trial.purpose == "tune":
        self.data["learning_rates"] = tuned(self.data["results"])
      if number >= old:  # runs of an earlier start come first and share one rewrite of the page
        write(self.out, self.data)

  def run_all(self) -> None:
    self.runner.check([BASE, *map(self.job, possible_trials())])
    for _, seconds in self.runner.run([BASE]):
      if isinstance(seconds, runs.Failed):
        raise SystemExit(f"the cold start: {seconds} ({self.runner.path(BASE) / 'log.txt'})")
      self.data["done"] += 1
    self.take_known()
    # The common rates come first, then the further rates of methods whose best rate is at the edge.
    while todo := [t for t in tuning_trials(self.data["results"]) if t not in self.begun]:
      self.run(todo)
    for name in TUNED:
      if name not in self.data["learning_rates"]:
        print(
          f"{name}: not compared, because a run of its tuning failed", file=sys.stderr, flush=True
        )
    self.run(comparison_trials(self.data["learning_rates"]))
    if self.data["failed"]:
      raise SystemExit(f"{len(self.data['failed'])} runs failed; the same command tries them again")


def plan(
  runner: runs.Runner,
  settings: Mapping[str, Any],
  more: Sequence[str],
  seconds: float,
  base_seconds: float,
) -> str:
  """Returns a text with the number of runs, and the hours left at the mean pace so far."""

  def job(trial: Trial) -> runs.Job:
    return trial.job(runner.path(BASE) / "model", settings, more)

  runner.check([BASE, *map(job, possible_trials())])
  results: list[dict[str, Any]] = []
  seen: set[Trial] = set()
  while todo := [t for t in tuning_trials(results) if t not in seen]:
    seen.update(todo)
    results += [
      outcome(t, runner.path(job(t)), s) for t in todo if (s := runner.seconds(job(t))) is not None
    ]
  # Comparison runs at a rate that is not the tuned one do not count.
  compared = [runner.seconds(job(t)) for t in comparison_trials(tuned(results))]
  known = [r["seconds"] for r in results] + [s for s in compared if s is not None]
  tunings = len(tuning_trials(results))
  common = len(tuning_trials())
  beyond = f", and {tunings - common} at further rates" if tunings > common else ""
  total = planned(results)
  each = float(np.mean(known)) if known else seconds
  base = runner.seconds(BASE)
  hours = (
    (total - 1 - len(known)) * each / runner.at_once + (base_seconds if base is None else 0.0)
  ) / 3600
  return (
    f"{total} runs: the cold start, {tunings} to tune ({len(TUNED)} methods x "
    f"{len(LEARNING_RATES)} learning rates x {len(TUNING_SEEDS)} seeds{beyond}), "
    f"{len(SEEDS) * len(METHODS)} to compare methods and {len(SEEDS) * len(VARIANTS)} to "
    f"compare variants; {len(known) + (base is not None)} finished.\nAt {each:.0f} seconds "
    f"per run, {runner.at_once} side by side: {hours:.1f} hours left."
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument(
    "--folder",
    type=pathlib.Path,
    default=ROOT / "runs" / "objectives",
    help="directory of the runs",
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=ROOT,
    help="directory to which results, page and picture are written",
  )
  parser.add_argument("--at-once", type=int, default=2, help="number of runs side by side")
  parser.add_argument(
    "--token-budget", type=int, default=TOKEN_BUDGET, help="response tokens that a run generates"
  )
  # GRPO spends the budget in 33 steps: the third evaluation is also the last.
  parser.add_argument(
    "--eval-every",
    type=int,
    default=11,
    help="steps between evaluations; half with dynamic sampling",
  )
  parser.add_argument(
    "--plan", action="store_true", help="only print how many runs and hours are left"
  )
  parser.add_argument("--page", action="store_true", help=f"only rewrite {PAGE} and {PICTURE}")
  args, more = parser.parse_known_args()
  settings = {"token_budget": args.token_budget, "eval_every": args.eval_every}
  if args.page:
    file = args.out / RESULT
    if not file.exists():
      raise SystemExit(f"{file}: no such file; expected results, from a run without --page")
    show(args.out, json.loads(file.read_text()))
    return
  runner = runs.Runner(args.folder, args.at_once)
  if args.plan:
    print(plan(runner, settings, more, seconds=SECONDS, base_seconds=BASE_SECONDS))
    return
  with runner:
    Benchmark(runner, args.out, settings, more).run_all()


if __name__ == "__main__":
  runs.main_of(main)

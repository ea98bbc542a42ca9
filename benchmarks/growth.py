"""Measures how cost grows with the group, the prompt, the response and the vocabulary.

    JAX_PLATFORMS=cpu python benchmarks/growth.py         # measure what is not measured yet
    JAX_PLATFORMS=cpu python benchmarks/growth.py --page  # print the table for docs/performance.md

The benchmark measures the seconds and the peak memory of a rollout and of an update, each in a
separate process. It starts from a common point (4 prompts of 256 tokens, 8 responses of 64 tokens,
a vocabulary of 2,048) and varies one axis at a time. The model has 4.6 million parameters and
computes in float32 with 2 threads. Prompts contain only text, because the decoder computes the same
for visual tokens and text tokens.

The memory of a measurement is the peak of the resident memory during the work, minus the resident
memory before it. It excludes parameters and compiled programs. Slopes are the slopes of straight
lines fitted to the logarithms: of seconds, of memory and, as a prediction, of model FLOPs
(`jaxrl_vlm/flops.py`) at the same points.

Results are stored in `growth.json` as soon as they are measured, and docs/images/growth.png is
drawn at the end. A stored result is not measured again unless --again is given.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import load, speed  # noqa: E402
from benchmarks.rl_step import ARCHITECTURE  # noqa: E402

RESULTS = ROOT / "benchmarks" / "growth.json"
PICTURE = ROOT / "docs" / "images" / "growth.png"
WORK, REPEATS = ("rollout", "update"), 3
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Point:
  """The sizes of one measurement.

  Attributes:
    prompts: Number of prompts, P.
    group: Number of responses per prompt, G.
    prompt: Number of tokens of each prompt, Lp.
    response: Number of tokens of each response, T.
    vocabulary: Size of the vocabulary, V.
  """

  prompts: int = 4
  group: int = 8
  prompt: int = 256
  response: int = 64
  vocabulary: int = 2048

  def name(self, work: str) -> str:
    numbers = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(self).items())
    return f"{work}: {numbers}"


AXES = {
  "group": (1, 2, 4, 8, 16, 32),
  "prompt": (64, 128, 256, 512, 1024, 2048),
  "response": (16, 32, 64, 128, 256, 512),
  "vocabulary": (2048, 4096, 8192, 16384, 32768),
}
LABELS = {
  "group": "responses of a prompt (G)",
  "prompt": "tokens of a prompt",
  "response": "tokens of a response",
  "vocabulary": "vocabulary",
}


def config_of(point: Point):
  from jaxrl_vlm import scratch

  text = ARCHITECTURE["text"] | {"vocab_size": point.vocabulary}
  return scratch.model_config(ARCHITECTURE | {"text": text}).replace(stop_tokens=())


def model_flops(work: str, point: Point) -> float:
  from jaxrl_vlm import flops

  count = flops.forward if work == "rollout" else flops.forward_backward
  lengths = [point.response] * point.group
  return point.prompts * count(config_of(point), point.prompt, lengths)


def measure(work: str, point: Point, repeats: int = REPEATS) -> dict[str, float]:
  """Measures seconds and memory in this process, which must not have done other work before.

  Args:
    work: "rollout" or "update".
    point: Sizes of the measurement.
    repeats: Number of repetitions. The seconds are their median, and the memory is their peak.
  """
  import jax
  import jax.numpy as jnp
  import optax

  from jaxrl_vlm import models, objectives, parallel
  from jaxrl_vlm.rollout import Sampling
  from jaxrl_vlm.stages.programs import Programs
  from jaxrl_vlm.types import Experience

  config, mesh = config_of(point), speed.one_device()
  params = speed.random_params(models.abstract_params(config))
  programs = Programs(
    models.VLM(config),
    mesh,
    objectives.create("grpo", kl_coef=0.0),
    optax.adamw(1e-6),
    params,
    sampling=Sampling(point.group, point.response),
  )
  prompt = parallel.put_batch(mesh, speed.make_prompt(config, point.prompts, point.prompt))
  shape = point.prompts, point.group, point.response
  mask = np.ones(shape, bool)

  if work == "rollout":

    def run():
      rollout = programs.rollout(params, prompt, jax.random.key(0))
      assert rollout.mask.all()
  else:
    rng = np.random.default_rng(0)
    tokens, on_device, advantages = parallel.put_batch(
      mesh,
      (
        rng.choice(speed.words(config), shape),
        mask,
        np.broadcast_to(rng.standard_normal((*shape[:2], 1), np.float32), shape),
      ),
    )
    experience = Experience(
      on_device, advantages, None, jnp.zeros(shape[:2]), truncated=jnp.zeros(shape[:2], bool)
    )
    packing, state = programs.pack(mask), programs.init_state(params)

    def run():
      nonlocal state
      state, _ = programs.update(
        state, {}, prompt, tokens, experience, jax.random.key(0), None, packing
      )
      return state

  jax.block_until_ready(run())  # compiles before the measurement, because compiling takes memory
  with contextlib.suppress(AttributeError):  # C libraries other than glibc have no malloc_trim
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system
  _, compiling = load.resident()
  load.forget_peak()
  before, _ = load.resident()
  seconds = speed.take_turns({work: run}, repeats, warm_up=0)[work]
  _, peak = load.resident()
  return {
    "seconds": statistics.median(seconds),
    "all_seconds": seconds,
    "memory": (peak - before) / MIB,
    "before": before / MIB,
    "process": max(compiling, peak) / MIB,
  }


def apart(work: str, point: Point) -> dict[str, float]:
  """Runs `measure` in a separate process."""
  spec = json.dumps({"work": work, **dataclasses.asdict(point)})
  done = subprocess.run(
    [sys.executable, __file__, f"--measure={spec}"],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ,
  )
  return json.loads(done.stdout.splitlines()[-1])


def line(values: dict, work: str, axis: str) -> list[tuple[Point, dict]]:
  """Returns the measured points of an axis with their results, in order."""
  points = [dataclasses.replace(Point(), **{axis: value}) for value in AXES[axis]]
  return [(p, values[p.name(work)]) for p in points if p.name(work) in values]


def slope(x, y) -> float:
  """Returns the slope of the straight line fitted to the logarithms."""
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes(points: list[tuple[Point, dict]], work: str, axis: str) -> dict[str, float]:
  """Returns measured and predicted slopes.

  Each slope is fitted to all points and, with the prefix `last_`, to the three largest points, for
  which constant costs matter least.
  """
  x = [getattr(p, axis) for p, _ in points]
  kinds = {
    "seconds": [r["seconds"] for _, r in points],
    "memory": [max(r["memory"], 1e-3) for _, r in points],
    "flops": [model_flops(work, p) for p, _ in points],
  }
  found = {kind: slope(x, y) for kind, y in kinds.items()}
  return found | {f"last_{kind}": slope(x[-3:], y[-3:]) for kind, y in kinds.items()}


def table(values: dict) -> str:
  """Returns a Markdown table. Slopes over the three largest values are in parentheses."""
  head = [
    "grows",
    "from",
    "to",
    "work",
    "seconds",
    "memory, MiB",
    "slope of seconds",
    "of model FLOPs",
    "of memory",
  ]
  rows = [head, ["---"] + ["--:"] * 2 + ["---"] + ["--:"] * 5]
  for axis in AXES:
    for work in WORK:
      points = line(values, work, axis)
      if len(points) < 3:
        continue
      (low, first), (high, last) = points[0], points[-1]
      s = slopes(points, work, axis)
      rows.append(
        [
          LABELS[axis],
          str(getattr(low, axis)),
          str(getattr(high, axis)),
          work,
          f"{first['seconds']:.2f} → {last['seconds']:.2f}",
          f"{first['memory']:.0f} → {last['memory']:.0f}",
          *(f"{s[k]:.2f} ({s['last_' + k]:.2f})" for k in ("seconds", "flops", "memory")),
        ]
      )
  return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def draw(values: dict, path: pathlib.Path) -> None:
  """Plots the measured points, and dashed lines that are proportional to model FLOPs.

  Each dashed line is scaled to the geometric mean of the measured seconds.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 5.6), layout="constrained")
  grid = figure.subplots(2, len(AXES), sharex="col", sharey="row")
  for column, axis in enumerate(AXES):
    for work, colour in zip(WORK, ("#2563eb", "#d97706"), strict=True):
      points = line(values, work, axis)
      if not points:
        continue
      x = [getattr(p, axis) for p, _ in points]
      seconds = np.array([r["seconds"] for _, r in points])
      work_done = np.array([model_flops(work, p) for p, _ in points])
      height = np.exp(np.mean(np.log(seconds / work_done)))
      grid[0, column].loglog(x, seconds, "o", color=colour, label=work)
      grid[0, column].loglog(x, height * work_done, "--", color=colour, label="as model FLOPs")
      grid[1, column].loglog(x, [max(r["memory"], 1) for _, r in points], "o-", color=colour)
    grid[1, column].set_xlabel(LABELS[axis])
    grid[1, column].set_xticks(AXES[axis], [str(v) for v in AXES[axis]], rotation=45)
    grid[1, column].minorticks_off()
  grid[0, 0].set_ylabel("seconds")
  grid[1, 0].set_ylabel("memory, MiB")
  grid[0, 0].legend(fontsize=8)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)


def main() -> None:
  parser = speed.parser(__doc__)
  parser.add_argument(
    "--page", action="store_true", help="print the table of stored results without measuring"
  )
  parser.add_argument("--measure", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    speed.use_threads()
    spec = json.loads(args.measure)
    work = spec.pop("work")
    print(json.dumps(measure(work, Point(**spec))))
    return
  results = speed.Results(args.out or RESULTS, args.again)
  if not args.page:
    for axis, sizes in AXES.items():
      for size in sizes:
        for work in WORK:
          point = dataclasses.replace(Point(), **{axis: size})
          r = results.get(
            point.name(work), lambda w=work, p=point: apart(w, p), threads=speed.THREADS
          )
          print(f"{point.name(work)}: {r['seconds']:.2f} s, {r['memory']:.0f} MiB", flush=True)
    draw(results.values, results.picture(PICTURE))
  print(table(results.values))


if __name__ == "__main__":
  main()

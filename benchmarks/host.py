"""Measures the work of the host during training: preprocessing images, grading, and waiting.

    JAX_PLATFORMS=cpu python benchmarks/host.py

The benchmark measures:

- The number of images of 1024 x 768 pixels that are preprocessed per second on one core, from JPEG
  files and from decoded images, compared with the Pillow-based processor of transformers. Both
  compute equal patches.
- The number of responses that worker processes grade per second.
- In a small RL run, the share of each step in which the main thread reads, preprocesses and
  collates images, decodes tokens to text, submits responses for grading, or waits for rewards. It
  also measures how much of this time the device is idle. If the device finishes before a call ends,
  the whole call counts as idle time. On a CPU, the work of the host takes processors away from the
  device, even if the device does not wait for the host.
- The time of each phase of a step, in a second run that waits for every program to finish. The
  result is drawn in docs/images/step.png.

Results are stored in `host.json`. A stored result is not measured again unless --again is given.
"""

import collections
import contextlib
import functools
import io
import os
import pathlib
import statistics
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import rl_step, speed  # noqa: E402
from jaxrl_vlm import scratch  # noqa: E402
from jaxrl_vlm.data.images import ImageSettings, preprocess_image  # noqa: E402
from jaxrl_vlm.example import Example  # noqa: E402
from jaxrl_vlm.rewards.pool import Grading, RewardPool  # noqa: E402
from jaxrl_vlm.stages import rl  # noqa: E402
from jaxrl_vlm.stages.run import StageRun  # noqa: E402

RESULTS = ROOT / "benchmarks" / "host.json"
ASKED = 1.0  # target for the images per second, relative to transformers
# For each run: width and height of the images in pixels, and prompts per step.
RUNS = {"64 visual tokens": (224, 16), "1024 visual tokens": (896, 4)}
PICTURE = ROOT / "docs" / "images" / "step.png"
# The phases of a step, and the calls that belong to each phase.
PARTS = {
  "images on the host": ("read", "preprocess", "collate"),
  "vision tower": ("see",),
  "rollout": ("rollout",),
  "rewards": ("rewards",),
  "update": ("pack", "update"),
}


def picture(seed: int, size: tuple[int, int] = (1024, 768)) -> Image.Image:
  """Returns an image with large shapes and a little noise.

  Compressed as JPEG, it has about the size of a photo.
  """
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
  large = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
  return Image.fromarray((large + rng.integers(-8, 9, large.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, "JPEG", quality=90)
  return file.getvalue()


@contextlib.contextmanager
def one_core():
  cores = os.sched_getaffinity(0)
  os.sched_setaffinity(0, sorted(cores)[:1])
  try:
    yield
  finally:
    os.sched_setaffinity(0, cores)


def preprocessing(count: int = 16, repeats: int = 7) -> dict:
  """Measures how many images per second both processors preprocess on one core."""
  import transformers

  theirs, settings = transformers.Qwen2VLImageProcessorPil(), ImageSettings()
  # By default, the processor has no minimum and maximum size. It gets the sizes of the published
  # checkpoints.
  bounds = {"size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}}
  decoded = [picture(i) for i in range(count)]
  results = {}
  with one_core():
    for kind, images in (("decoded", decoded), ("JPEG", [jpeg(image) for image in decoded])):

      def opened(image, kind=kind):
        return Image.open(io.BytesIO(image)) if kind == "JPEG" else image

      def run_theirs(images=images, opened=opened):
        for image in images:
          out = theirs(images=[opened(image)], return_tensors="np", **bounds)
        return out["pixel_values"]

      def run_ours(images=images):
        for image in images:
          out = preprocess_image(image, settings)[0]
        return out

      np.testing.assert_array_equal(run_ours(), run_theirs())
      seconds = speed.take_turns({"ours": run_ours, "theirs": run_theirs}, repeats)
      results[kind] = {
        **{name: count / value for name, value in speed.median(seconds).items()},
        "ratio": speed.ratio(seconds, "theirs", "ours"),
        "asked": ASKED,
        "seconds": seconds,
      }
  return results


def responses(prompts: int, group: int) -> tuple[list[Example], list[list[str]]]:
  """Returns examples, and for each of them responses with reasoning. Half of them are right.

  If the answer of an example is a fraction, the right responses write it in another notation.
  """
  examples, texts = [], []
  for i in range(prompts):
    a, b = i + 2, 2 * i + 7
    fraction = i % 2
    examples.append(Example(str(i), "?", rf"\frac{{{a}}}{{{b}}}" if fraction else str(a * b)))
    right = f"{2 * a}/{2 * b}" if fraction else str(a * b)
    reasons = "We look at the picture and compute step by step. " * 12
    texts.append(
      [
        f"<think>{reasons}</think> The answer is "
        rf"\boxed{{{right if g % 2 else a + b + g}}}."
        for g in range(group)
      ]
    )
  return examples, texts


def grading(
  verifier: str, workers: int, prompts: int = 64, group: int = 8, repeats: int = 7
) -> dict:
  """Measures how many responses per second `workers` processes grade with a verifier."""
  examples, texts = responses(prompts, group)
  with RewardPool({verifier: 1.0}, workers, timeout_s=60.0) as pool:
    rewards = pool.grade(examples, texts)  # starts the workers before the measurement
    seconds = speed.take_turns({"pool": lambda: pool.grade(examples, texts).total}, repeats)
  assert not sum(rewards.failures.values()), rewards.messages
  return {
    "samples_per_second": prompts * group / statistics.median(seconds["pool"]),
    "mean_reward": float(rewards.total.mean()),
    "seconds": seconds["pool"],
  }


class Trace:
  """Records for each step how long the main thread is in the watched calls.

  Attributes:
    steps: Seconds of each finished step, from its beginning to the beginning of the next one.
    inside: For each step, the seconds in watched calls, by name.
    idle: Like `inside`, but only the calls at whose end the device had no work.
    in_flight: Function that returns whether the device has work.
  """

  def __init__(self):
    self.steps, self.inside, self.idle = [], [], []
    self.in_flight = lambda: False
    self._begun, self._current = None, (collections.Counter(), collections.Counter())

  def next_step(self) -> None:
    now = time.perf_counter()
    if self._begun is not None:
      self.steps.append(now - self._begun)
      self.inside.append(dict(self._current[0]))
      self.idle.append(dict(self._current[1]))
    self._begun, self._current = now, (collections.Counter(), collections.Counter())

  def watch(self, name: str, function, wait: bool = False):
    """Returns `function` with timing added, under the given name.

    If `wait` is true, the returned function also waits until its result is computed.
    """

    def watched(*args, **kwargs):
      start = time.perf_counter()
      try:
        result = function(*args, **kwargs)
        return jax.block_until_ready(result) if wait else result
      finally:
        seconds = time.perf_counter() - start
        self._current[0][name] += seconds
        self._current[1][name] += 0.0 if self.in_flight() else seconds

    return watched

  def shares(self, warm_up: int) -> dict:
    """Returns for each name the median share of the time of a step.

    The first `warm_up` steps do not count.
    """

    def share(name, of):
      return statistics.median(
        row.get(name, 0.0) / seconds
        for row, seconds in zip(of[warm_up:], self.steps[warm_up:], strict=True)
      )

    names = sorted({name for row in self.inside for name in row})
    return {
      name: {"main_thread": share(name, self.inside), "device_idle": share(name, self.idle)}
      for name in names
    }


class Watched:
  """Wraps an iterator or a callable. `watched` replaces its `__next__` or `__call__`."""

  def __init__(self, inner, watched):
    self._inner, self._watched = inner, watched

  def __next__(self):
    return self._watched()

  def __call__(self, *args, **kwargs):
    return self._watched(*args, **kwargs)

  def __getattr__(self, name):
    return getattr(self._inner, name)


def traced_run(config, folder: pathlib.Path, watch, steps: int, warm_up: int) -> Trace:
  """Executes an RL run in `folder` and times its calls.

  Args:
    config: Config of the run.
    folder: Workdir of the run.
    watch: Function that receives the trace and the StageRun, and adds timing to further calls.
    steps: Number of steps to measure.
    warm_up: Number of steps before the measured ones.
  """
  trace = Trace()

  class Traced(StageRun):
    def steps(self):
      run = self.run
      self.data = Watched(self.data, trace.watch("read", self.data.__next__))
      run.encode = trace.watch("preprocess", run.encode)
      run.processor.collate = trace.watch("collate", run.processor.collate)
      watch(trace, self)
      for step in super().steps():
        trace.next_step()
        if len(trace.steps) == steps + warm_up:
          raise rl_step.Enough
        yield step

  with contextlib.ExitStack() as patches:
    for name, owner, attribute in (
      ("text", rl, "texts_of"),
      ("hand over", Grading, "add"),
      ("rewards", Grading, "result"),
    ):
      watched = trace.watch(name, getattr(owner, attribute))
      patches.enter_context(mock.patch.object(owner, attribute, watched))
    rl_step.train(config, folder, Traced)
  return trace


def critical_path(config, folder: pathlib.Path, steps: int = 7, warm_up: int = 2) -> dict:
  """Measures how much of a step the host takes, in an RL run in `folder`."""

  def watch(trace, loop):
    decode, decoding = loop.programs.rollout._decode, []

    def decoded(*args):
      state, out = decode(*args)
      decoding[:] = out
      return state, out

    loop.programs.rollout._decode = decoded
    loop.programs.pack = trace.watch("pack", loop.programs.pack)
    # Only updates and the decoding of chunks run while the host does other work. The host waits
    # for all other programs immediately.
    trace.in_flight = lambda: (
      not all(leaf.is_ready() for leaf in [*jax.tree.leaves(loop.state.params), *decoding])
    )

  trace = traced_run(config, folder, watch, steps, warm_up)
  return {
    "shares": trace.shares(warm_up),
    "step_seconds": statistics.median(trace.steps[warm_up:]),
    "steps": trace.steps,
    "inside": trace.inside,
    "idle": trace.idle,
  }


def parts_of_step(config, folder: pathlib.Path, steps: int = 5, warm_up: int = 2) -> dict:
  """Measures the seconds of each phase of a step, in an RL run that waits for every program."""

  def watch(trace, loop):
    for name in ("see", "rollout", "pack", "update"):
      program = getattr(loop.programs, name)
      setattr(loop.programs, name, Watched(program, trace.watch(name, program, wait=True)))

  trace = traced_run(config, folder, watch, steps, warm_up)
  parts = {
    part: statistics.median(
      sum(row.get(name, 0.0) for name in names) for row in trace.inside[warm_up:]
    )
    for part, names in PARTS.items()
  }
  whole = statistics.median(trace.steps[warm_up:])
  return {
    "parts": parts | {"everything else": max(0.0, whole - sum(parts.values()))},
    "step_seconds": whole,
  }


def draw(values: dict, path: pathlib.Path) -> None:
  """Draws one bar per run, which is divided into the phases of a step."""
  from matplotlib.figure import Figure

  runs = {name: values[f"parts, {name}"] for name in RUNS if f"parts, {name}" in values}
  figure = Figure(figsize=(9, 0.9 + 0.7 * len(runs)), layout="constrained")
  axes = figure.subplots()
  colours = ("#94a3b8", "#16a34a", "#2563eb", "#dc2626", "#d97706", "#e2e8f0")
  for row, r in enumerate(runs.values()):
    left = 0.0
    for (part, seconds), colour in zip(r["parts"].items(), colours, strict=True):
      share = seconds / r["step_seconds"]
      axes.barh(row, share, left=left, color=colour, label=part if not row else None)
      if share > 0.04:
        axes.text(left + share / 2, row, f"{seconds:.2f} s", ha="center", va="center", fontsize=9)
      left += share
  axes.set_yticks(range(len(runs)), [f"{RUNS[name][1]} prompts of\n{name}" for name in runs])
  axes.invert_yaxis()
  axes.set_xlim(0, 1)
  axes.xaxis.set_major_formatter("{x:.0%}")
  axes.set_xlabel("share of the time of a step")
  figure.legend(loc="outside upper center", ncols=len(colours), fontsize=8, frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)


def run_config(folder: pathlib.Path, model: pathlib.Path, side: int, prompts: int):
  config = rl_step.our_config(folder, model, side, prompts)
  config.stages[0].rewards = ConfigDict({"math": 1.0, "exact": 0.0})
  return config


def describe(name: str, r: dict) -> str:
  shares = ", ".join(
    f"{key} {share['main_thread']:.1%} (device idle: {share['device_idle']:.1%})"
    for key, share in r["shares"].items()
  )
  return f"RL step, {name}, {r['step_seconds']:.2f} s: {shares}"


def main() -> None:
  args = speed.parser(__doc__).parse_args()
  speed.use_threads()
  results = speed.Results(args.out or RESULTS, args.again)
  get = functools.partial(results.get, threads=speed.THREADS)

  for kind, r in get("preprocessing", preprocessing, "pillow", "transformers").items():
    if kind != "date":
      print(
        f"{kind} images: {r['ours']:.1f} images/s per core, transformers {r['theirs']:.1f}, "
        f"speedup {r['ratio']:.2f} (target: {r['asked']:.0f})",
        flush=True,
      )
  for verifier in ("math", "exact"):
    for workers in (1, 2):
      r = get(f"{verifier}, {workers} workers", lambda v=verifier, w=workers: grading(v, w))
      print(
        f"{verifier}: {r['samples_per_second']:.0f} responses/s with {workers} workers",
        flush=True,
      )
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    scratch.create(
      folder / "model",
      rl_step.ARCHITECTURE,
      [rl_step.QUESTION, *(f"the word {i}" for i in range(4000))],
    )
    for name, (side, prompts) in RUNS.items():

      def measure(find, side=side, prompts=prompts):
        subfolder = folder / f"{find.__name__}{side}"
        subfolder.mkdir()
        return find(run_config(subfolder, folder / "model", side, prompts), subfolder / "run")

      print(describe(name, get(name, lambda m=measure: m(critical_path))), flush=True)
      r = get(f"parts, {name}", lambda m=measure: m(parts_of_step))
      print(
        f"RL step, {name}, waiting for every program: "
        + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in r["parts"].items()),
        flush=True,
      )
  draw(results.values, results.picture(PICTURE))


if __name__ == "__main__":
  main()

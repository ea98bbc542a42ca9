"""What the host does beside the device: reading images and grading, and who waits for it.

    JAX_PLATFORMS=cpu python benchmarks/host.py

Images of 1024 x 768 a second on one core, JPEG files and decoded ones, beside the processor of
transformers that uses Pillow, to equal patches; responses graded a second in worker processes; and
a small RL run: the seconds of each step in which its main thread reads, preprocesses and collates
images, turns tokens into text, hands them to the graders or waits for rewards, and in how many of
them the device had nothing to do. The last count a call whole as soon as the device is done before
the call is. On a CPU the host's work takes processors away from the "device" even where nobody
waits for it.

What is measured so far stands in `host.json` and is not measured again; --again throws it away.
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
ASKED = 1.0  # images a second, over those of transformers
# Name: side of the images in pixels, prompts of a step.
RUNS = {"64 visual tokens": (224, 16), "1024 visual tokens": (896, 4)}


def picture(seed: int, size: tuple[int, int] = (1024, 768)) -> Image.Image:
  """Large shapes and a little noise, so that a JPEG has the size of a photograph's."""
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
  """Images a second of both processors on one core."""
  import transformers

  theirs, settings = transformers.Qwen2VLImageProcessorPil(), ImageSettings()
  # It names no bounds of its own: those of the published checkpoints.
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
          "ratio": speed.ratio(seconds, "theirs", "ours"), "asked": ASKED, "seconds": seconds}
  return results


def responses(prompts: int, group: int) -> tuple[list[Example], list[list[str]]]:
  """Tasks and reasoned answers, of which half are right; fractions in another notation."""
  examples, texts = [], []
  for i in range(prompts):
    a, b = i + 2, 2 * i + 7
    fraction = i % 2
    examples.append(Example(str(i), "?", rf"\frac{{{a}}}{{{b}}}" if fraction else str(a * b)))
    right = f"{2 * a}/{2 * b}" if fraction else str(a * b)
    reasons = "We look at the picture and compute step by step. " * 12
    texts.append([f"<think>{reasons}</think> The answer is "
                  rf"\boxed{{{right if g % 2 else a + b + g}}}." for g in range(group)])
  return examples, texts


def grading(verifier: str, workers: int, prompts: int = 64, group: int = 8, repeats: int = 7
            ) -> dict:
  """Responses graded a second."""
  examples, texts = responses(prompts, group)
  with RewardPool({verifier: 1.0}, workers, timeout_s=60.0) as pool:
    rewards = pool.grade(examples, texts)  # the workers have started
    seconds = speed.take_turns({"pool": lambda: pool.grade(examples, texts).total}, repeats)
  assert not sum(rewards.failures.values()), rewards.messages
  return {"samples_per_second": prompts * group / statistics.median(seconds["pool"]),
          "mean_reward": float(rewards.total.mean()), "seconds": seconds["pool"]}


class Trace:
  """Seconds of calls of the main thread, for each step.

  Attributes:
    steps: seconds of the finished steps, from the begin of one to that of the next.
    inside: for each of them, seconds in the calls of a name.
    idle: of these, those of calls at whose end the device had nothing to do.
  """

  def __init__(self):
    self.steps, self.inside, self.idle = [], [], []
    self.in_flight = lambda: False
    self._begun, self._here = None, (collections.Counter(), collections.Counter())

  def next_step(self) -> None:
    now = time.perf_counter()
    if self._begun is not None:
      self.steps.append(now - self._begun)
      self.inside.append(dict(self._here[0]))
      self.idle.append(dict(self._here[1]))
    self._begun, self._here = now, (collections.Counter(), collections.Counter())

  def watch(self, name: str, function):
    @functools.wraps(function)
    def watched(*args, **kwargs):
      start = time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        seconds = time.perf_counter() - start
        self._here[0][name] += seconds
        self._here[1][name] += 0.0 if self.in_flight() else seconds

    return watched

  def shares(self, warm_up: int) -> dict:
    """Of the time of the steps, by name."""
    def share(name, of):
      return statistics.median(row.get(name, 0.0) / seconds for row, seconds in zip(
          of[warm_up:], self.steps[warm_up:], strict=True))

    names = sorted({name for row in self.inside for name in row})
    return {name: {"main_thread": share(name, self.inside), "device_idle": share(name, self.idle)}
            for name in names}


class Watched:
  """An iterator whose `next` is watched."""

  def __init__(self, inner, trace: Trace):
    self._inner, self._next = inner, trace.watch("read", inner.__next__)

  def __next__(self):
    return self._next()

  def __getattr__(self, name):
    return getattr(self._inner, name)


def critical_path(config, folder: pathlib.Path, steps: int = 7, warm_up: int = 2) -> dict:
  """Of an RL run in `folder`: who waits for the host."""
  trace = Trace()

  class Traced(StageRun):

    def steps(self):
      run = self.run
      self.data = Watched(self.data, trace)
      run.encode = trace.watch("preprocess", run.encode)
      run.processor.collate = trace.watch("collate", run.processor.collate)
      decode, decoding = self.programs.rollout._decode, []

      def decoded(*args):
        flight, out = decode(*args)
        decoding[:] = out
        return flight, out

      self.programs.rollout._decode = decoded
      # The last update or the last chunk; what else there is somebody waits for at once.
      trace.in_flight = lambda: not all(
          leaf.is_ready() for leaf in [*jax.tree.leaves(self.state.params), *decoding])
      for step in super().steps():
        trace.next_step()
        if len(trace.steps) == steps + warm_up:
          raise rl_step.Enough
        yield step

  with contextlib.ExitStack() as patches:
    for name, owner, attribute in (("text", rl, "texts_of"), ("hand over", Grading, "add"),
                                   ("rewards", Grading, "result")):
      watched = trace.watch(name, getattr(owner, attribute))
      patches.enter_context(mock.patch.object(owner, attribute, watched))
    rl_step.train(config, folder, Traced)
  return {"shares": trace.shares(warm_up), "step_seconds": statistics.median(trace.steps[warm_up:]),
          "steps": trace.steps, "inside": trace.inside, "idle": trace.idle}


def run_config(folder: pathlib.Path, model: pathlib.Path, side: int, prompts: int):
  config = rl_step.our_config(folder, model, side, prompts)
  config.stages[0].rewards = ConfigDict({"math": 1.0, "exact": 0.0})
  return config


def describe(name: str, r: dict) -> str:
  shares = ", ".join(
      f"{key} {share['main_thread']:.1%} (nothing in flight: {share['device_idle']:.1%})"
      for key, share in r["shares"].items())
  return f"RL step, {name}, {r['step_seconds']:.2f} s: {shares}"


def main() -> None:
  args = speed.parser(__doc__).parse_args()
  speed.use_threads()
  results = speed.Results(args.out or RESULTS, args.again)
  get = functools.partial(results.get, threads=speed.THREADS)

  for kind, r in get("preprocessing", preprocessing, "pillow", "transformers").items():
    if kind != "date":
      print(f"{kind} images: {r['ours']:.1f} a second and core, transformers {r['theirs']:.1f}, "
            f"{r['ratio']:.2f} times as many (asked: {r['asked']:.0f})", flush=True)
  for verifier in ("math", "exact"):
    for workers in (1, 2):
      r = get(f"{verifier}, {workers} workers", lambda v=verifier, w=workers: grading(v, w))
      print(f"{verifier}: {r['samples_per_second']:.0f} responses a second, {workers} workers",
            flush=True)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    scratch.create(folder / "model", rl_step.ARCHITECTURE,
                   [rl_step.QUESTION, *(f"the word {i}" for i in range(4000))])
    for name, (side, prompts) in RUNS.items():
      def measure(side=side, prompts=prompts):
        config = run_config(folder, folder / "model", side, prompts)
        return critical_path(config, folder / f"run{side}")

      print(describe(name, get(name, measure)), flush=True)


if __name__ == "__main__":
  main()

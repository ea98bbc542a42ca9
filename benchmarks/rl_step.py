"""Measures the samples per second of a whole RL step, compared with TRL's GRPOTrainer on a CPU.

    pip install -e '.[test]' trl && pip install --no-deps torchvision==0.28.0
    JAX_PLATFORMS=cpu python benchmarks/rl_step.py

Both libraries train the same checkpoint on the same prompts and rewards. They run alternately, one
step each. A step preprocesses images, generates and grades responses, and updates the parameters.
The method is GRPO without a reference model, with G = 8, 64 tokens in every response, AdamW on all
parameters, float32 and 2 threads.

Results are stored in `rl_step.json`. A stored result is not measured again unless --again is given.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "configs")]
import base  # noqa: E402

from benchmarks import speed  # noqa: E402
from jaxrl_vlm import scratch  # noqa: E402
from jaxrl_vlm.stages import rl  # noqa: E402
from jaxrl_vlm.stages.run import Run, StageRun  # noqa: E402

RESULTS = ROOT / "benchmarks" / "rl_step.json"
GROUP, TOKENS, THREADS, WARM_UP = 8, 64, 2, 2
QUESTION = "what is in the picture number 7"
# For each case: width and height of the images in pixels, prompts per step, number of measured
# steps, and target speedup.
CASES = {"64 visual tokens": (224, 16, 7, 3.0), "1024 visual tokens": (896, 4, 5, 10.0)}
ARCHITECTURE = {  # 4.6 million parameters
  "tie_word_embeddings": True,
  "min_pixels": 28 * 28,
  "max_pixels": 896 * 896,
  "text": {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "mrope_section": (4, 6, 6), "rope_theta": 10000.0},
  },
  "vision": {
    "depth": 3,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (2,),
  },
}


def reward(example, response):
  """Returns the length of the text modulo 7, as the reward of `trl_side.py` does."""
  del example
  return float(len(response) % 7)


def main():
  parser = speed.parser(__doc__)
  parser.add_argument("--python", default=sys.executable, help="Python interpreter that has TRL")
  args = parser.parse_args()
  speed.use_threads()
  results = speed.Results(args.out or RESULTS, args.again)
  with tempfile.TemporaryDirectory() as folder:
    model = pathlib.Path(folder) / "model"
    scratch.create(model, ARCHITECTURE, [QUESTION, *(f"the word {i}" for i in range(4000))])
    for name, (side, prompts, repeats, want) in CASES.items():

      def measure(side=side, prompts=prompts, repeats=repeats, want=want):
        found = compare(pathlib.Path(folder), model, side, prompts, repeats, args.python)
        return found | {"asked": want}

      print(describe(name, results.get(name, measure, threads=THREADS)), flush=True)


def describe(name, result):
  return (
    f"{name}: jaxrl_vlm {result['ours']:.2f} samples/s, TRL {result['trl']:.2f} samples/s, "
    f"speedup {result['ratio']:.1f} (target: {result['asked']:.0f})"
  )


def compare(folder, model, side, prompts, repeats, python):
  """Measures the samples per second of both libraries. Each of them waits while the other runs."""
  spec = dict(
    threads=THREADS,
    model=str(model),
    side=side,
    prompts=prompts,
    group=GROUP,
    tokens=TOKENS,
    question=QUESTION,
    output=str(folder / "trl"),
  )
  env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
  log = open(folder / "trl.log", "w+")  # noqa: SIM115  # closed after the process ends
  other = subprocess.Popen(
    [python, str(ROOT / "benchmarks" / "trl_side.py"), json.dumps(spec)],
    env=env,
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=log,
  )
  assert other.stdin is not None and other.stdout is not None
  versions = json.loads(other.stdout.readline() or "{}")

  def trl_step():
    other.stdin.write("go\n")
    other.stdin.flush()
    line = other.stdout.readline()
    if not line.startswith("seconds "):
      log.seek(0)
      raise SystemExit(f"the process of TRL ended:\n{log.read()[-2000:]}")
    return float(line.split()[1])

  pairs = []

  def after_ours(seconds):
    pairs.append((seconds, trl_step()))
    print(
      f"  step {len(pairs)}: {pairs[-1][0]:.2f} s, TRL {pairs[-1][1]:.2f} s"
      + ("  (warm-up)" if len(pairs) <= WARM_UP else ""),
      flush=True,
    )
    return len(pairs) == repeats + WARM_UP

  try:
    train(our_config(folder, model, side, prompts), folder / f"run{side}", timed(after_ours))
  finally:
    other.kill()
    other.wait()
    log.close()
  pairs = pairs[WARM_UP:]
  ours, trl = (statistics.median(p[i] for p in pairs) for i in range(2))
  samples = prompts * GROUP
  return {
    "ours": samples / ours,
    "trl": samples / trl,
    "ratio": statistics.median(p[1] / p[0] for p in pairs),
    "seconds": pairs,
    "prompts": prompts,
    "samples": samples,
    "trl_versions": versions,
  }


class Enough(Exception):
  """Raised when all steps are measured, to end the run."""


def timed(after):
  """Returns a subclass of StageRun that measures steps.

  It calls `after` with the seconds of each step. When `after` returns true, it raises Enough.
  """

  class Timed(StageRun):
    def steps(self):
      for step in super().steps():
        start = time.perf_counter()
        yield step
        jax.block_until_ready(self.state)
        if after(time.perf_counter() - start):
          raise Enough

  return Timed


def train(config, workdir, stage_run):
  """Runs an RL stage with `stage_run` in place of StageRun, until it raises Enough."""
  workdir.mkdir()
  run = Run(config, workdir)
  # Without stop tokens, every response has the full length, as in `trl_side.py`.
  run.model = run.model.clone(config=run.model.config.replace(stop_tokens=()))
  with mock.patch.object(rl, "StageRun", stage_run), contextlib.suppress(Enough), run.running():
    rl.train(run, 0)


def our_config(folder, model, side, prompts):
  """Writes a dataset with square images of `side` pixels, and returns a GRPO config for it."""
  images = folder / f"images{side}"
  images.mkdir()
  rng = np.random.default_rng(0)
  lines = []
  for i in range(prompts * 4):
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(images / f"{i}.png")
    lines.append(
      json.dumps(
        {"id": str(i), "question": QUESTION, "answer": "7", "images": [str(images / f"{i}.png")]}
      )
    )
  data = folder / f"train{side}.jsonl"
  data.write_text("\n".join(lines))
  config = base.get_config()
  config.model.path = str(model)
  config.model.min_pixels = config.model.max_pixels = side * side
  tokens = (side // 28) ** 2
  config.prompt_buckets, config.patch_buckets = (tokens + 32,), (tokens * 4,)
  stage = base.rl()
  stage.steps, stage.prompts_per_step, stage.num_samples = 1000, prompts, GROUP
  stage.max_tokens = TOKENS
  stage.part_tokens = 2048  # small enough for the caches of two CPU cores
  stage.data.name = str(data)
  stage.rewards[f"{__file__}:reward"] = 1.0
  stage.objective.kl_coef = 0.0
  config.stages = (stage,)
  config.checkpoint.every = 100_000
  config.log_every = config.rollouts_every = 100_000
  return config


if __name__ == "__main__":
  main()

"""Measures the GPU utilization of updates and decoding, and the time of each phase of an RL step.

    python benchmarks/gpu.py                           # needs a GPU
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --tiny  # the same code on a very small model

The model has the architecture of Qwen2.5-VL-3B with random weights in bfloat16. AdamW trains all
parameters. A step has 32 prompts of 1,024 visual tokens with 8 responses of 256 tokens each. It
decodes no image files and grades no responses.

All measurements run alternately on one GPU, and the results are medians:

- The rate of a large bfloat16 matrix product, and the memory bandwidth when reading and writing a
  large array.
- The MFU of an update, relative to the rate of the matrix product. It counts model FLOPs
  (`jaxrl_vlm/flops.py`), without the recomputation in the backward pass.
- The time to decode one token of all sequences, from the difference between rollouts of 256 and of
  32 tokens. It is compared with the time of reading the necessary bytes at the measured bandwidth:
  the weights, the keys and values of the prompts (once per group), and the keys and values of each
  response.
- The time of each phase of a step.

The result is stored in `gpu.json` under the name of the GPU. It is not measured again unless
--again is given.
"""

import dataclasses
import math
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import speed  # noqa: E402
from benchmarks.rl_step import ARCHITECTURE  # noqa: E402
from jaxrl_vlm import flops, models, objectives, parallel, scratch  # noqa: E402
from jaxrl_vlm.models.published import CONFIGS  # noqa: E402
from jaxrl_vlm.rollout import Sampling  # noqa: E402
from jaxrl_vlm.stages.programs import Programs  # noqa: E402
from jaxrl_vlm.types import Experience  # noqa: E402

RESULTS = ROOT / "benchmarks" / "gpu.json"
ASKED = {"update_mfu": 0.45, "decode_bandwidth": 0.60}
MODEL = "Qwen2.5-VL-3B"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Size:
  """The sizes of the measurement.

  Attributes:
    prompts: Number of prompts, P.
    group: Number of responses per prompt, G.
    side: Side of the image of a prompt in patches.
    text: Number of text tokens of a prompt.
    response: Number of tokens of each response.
    short: Number of tokens of each response in the second, shorter rollout.
    microbatches: Number of microbatches of an update.
    product: Side of the matrices whose product is timed.
    copied: Number of elements of the array that is read and written.
    repeats: Number of times that each measurement is repeated.
  """

  prompts: int = 32
  group: int = 8
  side: int = 64
  text: int = 64
  response: int = 256
  short: int = 32
  microbatches: int = 8
  product: int = 8192
  copied: int = 2**30
  repeats: int = 5


TINY = Size(
  prompts=2,
  group=2,
  side=4,
  text=8,
  response=8,
  short=4,
  microbatches=1,
  product=64,
  copied=2**12,
  repeats=1,
)


def decode_bytes(config: models.ModelConfig, params, prompt: int, size: Size) -> float:
  """Returns the bytes that must be read to decode one token of all sequences.

  The number is the mean over the tokens of a response after the first `size.short`.

  Args:
    config: Config of the model.
    params: Parameters of the model.
    prompt: Number of tokens of each prompt.
    size: Sizes of the measurement.
  """
  head = params["embed" if config.tied else "head"]
  weights = sum(x.nbytes for x in jax.tree.leaves((params["decoder"], head)))
  number = jnp.dtype(config.dtype).itemsize
  position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * number
  own = size.group * (size.short + size.response) / 2
  return weights + size.prompts * position * (prompt - 1 + own)


class Step:
  """An RL step without image preprocessing and rewards.

  Attributes:
    parts: The seconds of each phase, one value per step.
  """

  def __init__(self, config: models.ModelConfig, size: Size):
    self.config, self.size, self.mesh = config, size, speed.one_device()
    shapes = models.abstract_params(config, config.dtype)
    self.programs = Programs(
      models.VLM(config),
      self.mesh,
      objectives.create("grpo", kl_coef=0.0),
      optax.adamw(1e-6),
      shapes,
      microbatches=size.microbatches,
      sampling=Sampling(size.group, size.response),
    )
    self.state = self.programs.init_state(speed.random_params(shapes))
    self.prompt = speed.make_prompt(config, size.prompts, size.text, size.side)
    self.rewards = np.random.default_rng(0).standard_normal((size.prompts, size.group), np.float32)
    self.parts: dict[str, list[float]] = {}
    self._clock = 0.0

  def _part(self, name: str, done) -> None:
    jax.block_until_ready(done)
    now = time.perf_counter()
    self.parts.setdefault(name, []).append(now - self._clock)
    self._clock = now

  def rollout(self, tokens: int):
    """Returns a rollout with the given number of tokens in each response.

    It uses the prompts of the last step, with the features of their images.
    """
    limits = np.full(self.rewards.shape, tokens, np.int32)
    rollout = self.programs.rollout(
      self.state.params, self.with_features, jax.random.key(0), limits
    )
    assert rollout.mask.sum() == tokens * limits.size
    return rollout

  def __call__(self) -> None:
    programs, mesh = self.programs, self.mesh
    self._clock = time.perf_counter()
    prompt = parallel.put_batch(mesh, self.prompt)
    self._part("copy of the prompts", prompt)
    self.with_features = programs.see(self.state.params, prompt)
    self._part("vision tower", self.with_features.features)
    rollout = self.rollout(self.size.response)
    self._part("rollout", ())
    packing = programs.pack(rollout.mask)
    tokens, mask, logp, rewards = parallel.put_batch(
      mesh, (rollout.tokens, rollout.mask, rollout.logp, self.rewards)
    )
    advantages = programs.advantages(rewards, mask, {}, self.state.objective)
    self._part("packing and advantages", (packing, advantages))
    experience = Experience(
      mask, advantages, None, rewards, sampler_logp=logp, truncated=jnp.ones(rewards.shape, bool)
    )
    self.state, metrics = programs.update(
      self.state, {}, prompt, tokens, experience, jax.random.key(0), None, packing
    )
    self._part("update", self.state.params)
    assert not int(metrics["bad_steps"]), "the gradient is not finite"


def measure(config: models.ModelConfig, size: Size) -> dict:
  """Returns all measurements, which run alternately."""
  config = config.replace(stop_tokens=())
  step = Step(config, size)
  product, in_product = speed.matrix_product(size.product, config.dtype)
  copied, copy = jnp.zeros(size.copied, jnp.float32), jax.jit(lambda a: a + 1)
  seconds = speed.take_turns(
    {
      "product": product,
      "copy": lambda: copy(copied),
      "step": step,
      "short rollout": lambda: step.rollout(size.short),
    },
    size.repeats,
  )
  middle = speed.median(seconds)
  # The first turn is a warm-up.
  parts = {name: statistics.median(values[1:]) for name, values in step.parts.items()}
  rate, bandwidth = in_product / middle["product"], 2 * copied.nbytes / middle["copy"]

  length = int(step.prompt.length[0])
  work = size.prompts * flops.forward_backward(
    config, length, [size.response] * size.group, [(size.side, size.side)]
  )
  a_token = (parts["rollout"] - middle["short rollout"]) / (size.response - size.short)
  bound = decode_bytes(config, step.state.params, length, size) / bandwidth
  memory = jax.devices()[0].memory_stats() or {}
  tokens = math.prod((size.prompts, size.group, size.response))
  return {
    "update_mfu": work / parts["update"] / rate,
    "decode_bandwidth": bound / a_token,
    "asked": ASKED,
    "product_flops": rate,
    "bandwidth": bandwidth,
    "model_flops": work,
    "decode_seconds_a_token": a_token,
    "decode_bound": bound,
    "step_seconds": middle["step"],
    "parts": parts,
    "samples_per_second": size.prompts * size.group / middle["step"],
    "rollout_tokens_per_second": tokens / parts["rollout"],
    "peak_memory_gib": memory.get("peak_bytes_in_use", 0) / GIB,
    "seconds": seconds,
    "size": dataclasses.asdict(size),
  }


def describe(card: str, r: dict) -> str:
  lines = [
    f"{card}: {r['product_flops'] / 1e12:.4g} TFLOP/s, {r['bandwidth'] / 1e9:.4g} GB/s",
    f"update: MFU {r['update_mfu']:.1%} (target: {r['asked']['update_mfu']:.0%})",
    f"decoding: {r['decode_bandwidth']:.1%} of the bandwidth bound (target: "
    f"{r['asked']['decode_bandwidth']:.0%}), {1e3 * r['decode_seconds_a_token']:.2f} ms per token",
    f"step: {r['step_seconds']:.2f} s, {r['samples_per_second']:.1f} samples/s, peak "
    f"{r['peak_memory_gib']:.1f} GiB",
  ]
  return "\n".join(lines + [f"  {name}: {seconds:.3f} s" for name, seconds in r["parts"].items()])


def large(devices) -> models.ModelConfig:
  """Returns the config of the measured model, with attention kernels for the given devices."""
  config = models.from_hf(CONFIGS[MODEL], dtype="bfloat16")
  return config.replace(attention=models.choose_attention("auto", devices, config))


def main() -> None:
  parser = speed.parser(__doc__)
  parser.add_argument(
    "--tiny", action="store_true", help="measure a very small model, on any device"
  )
  args = parser.parse_args()
  card = jax.devices()[0].device_kind
  if args.tiny:
    if args.out is None:
      parser.error("--tiny: expected --out, because the numbers of a tiny model are not results")
    config, size, card = scratch.model_config(ARCHITECTURE), TINY, f"tiny model, {card}"
  elif jax.default_backend() != "gpu":
    raise SystemExit(
      f"benchmarks/gpu.py: no GPU: jax finds {card!r} ({jax.default_backend()}); "
      "on a machine with a GPU, install the extra `gpu`; --tiny runs on any machine"
    )
  else:
    config, size = large(jax.devices()), Size()
  results = speed.Results(args.out or RESULTS, args.again)
  print(describe(card, results.get(card, lambda: measure(config, size), model=MODEL, card=card)))


if __name__ == "__main__":
  main()

"""Measures the gradient of groups that share their prompt, compared with separate sequences.

    JAX_PLATFORMS=cpu python benchmarks/update.py

The benchmark computes the gradient of GRPO in three ways:

- `shared`: the 8 responses of a prompt share the prompt.
- `separate`: the same code, but each prompt is repeated for each of its responses.
- `torch`: transformers and torch, on the same separate sequences. As in the trainers that use
  transformers, images are repeated for each response. Logits are computed only for responses.

The norms of the three gradients must be equal. Prompts have 64 or 1,024 visual tokens. Responses
have 64 tokens each, or lengths with a long tail. The computation is in float32 with 2 threads. The
three ways run alternately in one process, and the results are medians.

The benchmark records:

- `seconds`: the seconds of each turn.
- `faster`: the speedup of shared over separate prompts.
- `fewer_flops`: the model FLOPs (`jaxrl_vlm/flops.py`) of separate prompts, divided by those of
  shared prompts.
- `share`: the realized saving, (faster - 1) / (fewer_flops - 1).
- `padding`: the share of padding in the response tokens that go through the model.
- `mfu`: model FLOPs per second, relative to a large float32 matrix product in the same process.

A pass has 512 response tokens, because the batches are small. Runs use 4,096 by default. For this
size, the benchmark computes the padding in batches of 64 prompts, without running the model.

Results are stored in `update.json`. A stored result is not measured again unless --again is given.
The benchmark needs the extra `test` (torch).
"""

import dataclasses
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import jaxrl_vlm as jv  # noqa: E402
from benchmarks import speed  # noqa: E402
from benchmarks.rl_step import ARCHITECTURE  # noqa: E402
from jaxrl_vlm import flops, models, objectives, parallel, scratch, views  # noqa: E402
from jaxrl_vlm.models import lora  # noqa: E402
from jaxrl_vlm.stages.programs import Programs  # noqa: E402
from jaxrl_vlm.types import Experience  # noqa: E402

RESULTS = ROOT / "benchmarks" / "update.json"
GROUP, REPEATS, TEXT, PRODUCT, ROOM = 8, 5, 24, 2048, 512
ASKED = {"share": 0.7, "mfu": 0.5}
LARGE = ARCHITECTURE | {
  "text": {  # 17 million parameters, so that matrix products take nearly all of the time
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rope_parameters": {
      "rope_type": "default",
      "mrope_section": (8, 12, 12),
      "rope_theta": 10000.0,
    },
  }
}
ARCHITECTURES = {"small": ARCHITECTURE, "large": LARGE}


def tail(shape: tuple[int, ...], most: int) -> np.ndarray:
  """Returns log-normal lengths of up to `most` tokens. A few are ten times as long as most."""
  lengths = np.random.default_rng(0).lognormal(np.log(most) - 2.5, 0.9, shape)
  return np.ceil(lengths).clip(1, most).astype(int)


@dataclasses.dataclass(frozen=True)
class Case:
  """The model and the batch of one measurement.

  Attributes:
    model: A key of ARCHITECTURES.
    side: Width and height of the image of each prompt, in patches.
    prompts: Number of prompts, P.
    tail: Whether the lengths of responses have a long tail. Otherwise, each has 64 tokens.
    trains_vision: Whether the vision tower is trained. Otherwise it is frozen and runs once for
      each prompt.
  """

  model: str
  side: int
  prompts: int
  tail: bool = False
  trains_vision: bool = True

  @property
  def name(self) -> str:
    return (
      f"{self.model} model, {self.side**2 // 4} visual tokens, "
      f"{'long tail' if self.tail else '64 tokens each'}"
      f"{'' if self.trains_vision else ', frozen tower'}"
    )

  def lengths(self) -> np.ndarray:
    """Returns the number of tokens of each response, i[P, G]."""
    shape = (self.prompts, GROUP)
    return tail(shape, 256) if self.tail else np.full(shape, 64)


CASES = [
  Case(model, side, prompts, tail)
  for model, side, prompts in (
    ("small", 16, 8),
    ("small", 64, 1),
    ("large", 16, 4),
    ("large", 64, 1),
  )
  for tail in (False, True)
]
CASES += [Case("large", 64, 1, tail, trains_vision=False) for tail in (False, True)]


class Ours:
  """The update of an RL stage with learning rate 0, on P prompts and responses [P, G, T]."""

  def __init__(self, model, params, prompt, tokens, mask, advantages, trains_vision):
    trainable = () if trains_vision else ("!vision",)
    mesh = speed.one_device()
    self.programs = Programs(
      model,
      mesh,
      objectives.create("grpo", kl_coef=0.0),
      optax.sgd(0.0),
      params,
      trainable=trainable,
      part_tokens=max(ROOM, mask.shape[2]),
    )
    # The update donates its state, so it gets a copy of the parameters.
    trained, self.frozen = lora.split(jax.tree.map(jnp.copy, params), trainable)
    self.state = self.programs.init_state(trained)
    self.packing = self.programs.pack(mask)
    self.prompt, self.tokens, mask, advantages = parallel.put_batch(
      mesh, (prompt, tokens, mask, advantages)
    )
    self.experience = Experience(
      mask, advantages, None, jnp.zeros(mask.shape[:2]), truncated=jnp.zeros(mask.shape[:2], bool)
    )

  def __call__(self):
    prompt = self.prompt
    if not self.programs.trains_vision:
      prompt = self.programs.see(lora.merge(self.frozen, self.state.params), prompt)
    self.state, metrics = self.programs.update(
      self.state,
      self.frozen,
      prompt,
      self.tokens,
      self.experience,
      jax.random.key(0),
      None,
      self.packing,
    )
    return metrics["grad_norm"]


class Torch:
  """The gradient by transformers. It processes one group at a time, padded to its longest response.

  The gradients of the groups are accumulated.
  """

  def __init__(self, folder, prompt, tokens, lengths, scale, trains_vision):
    import torch
    import transformers

    torch.set_num_threads(speed.THREADS)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    self.model = model
    if not trains_vision:
      model.model.visual.requires_grad_(False)
    self.groups = []
    for row, most in enumerate(lengths.max(axis=1)):
      inputs = speed.torch_inputs(
        prompt, row, tokens.shape[1], model.config.image_token_id, tokens[row, :, : most - 1]
      )
      self.groups.append(
        (inputs, torch.tensor(tokens[row, :, :most]).long(), torch.tensor(scale[row, :, :most]))
      )

  def __call__(self):
    self.model.zero_grad(set_to_none=True)
    for inputs, tokens, scale in self.groups:
      logits = self.model(**inputs, logits_to_keep=tokens.shape[1], use_cache=False).logits
      logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
      (-(scale * logp).sum()).backward()

  def norm(self) -> float:
    return float(
      sum((p.grad**2).sum() for p in self.model.parameters() if p.grad is not None) ** 0.5
    )


def padding(packing, mask: np.ndarray) -> float:
  """Returns the share of padding in the response tokens that go through the model."""
  _, _, devices, room = packing.index.shape
  computed = int(np.asarray(packing.used).sum()) * devices * room * packing.size
  return 1 - int(mask.sum()) / computed


def padding_of_runs() -> dict[str, float]:
  """Computes the padding of batches of 64 prompts x 8 responses with the default `part_tokens`."""
  config = scratch.model_config(ARCHITECTURE)
  programs = Programs(
    models.VLM(config),
    speed.one_device(),
    objectives.create("sft"),
    optax.sgd(0.0),
    models.abstract_params(config),
  )
  found = {}
  for most in (256, 1024, 4096):
    mask = np.arange(most) < tail((64, GROUP), most)[..., None]
    found[f"at most {most} tokens, {mask.sum(-1).mean():.0f} on average"] = padding(
      programs.packed(mask), mask
    )
  return found


def measure(
  folder: pathlib.Path, case: Case, repeats: int = REPEATS, product: int = PRODUCT
) -> dict:
  """Measures one case.

  Args:
    folder: Directory of the model of the case.
    case: The case.
    repeats: Number of turns.
    product: Number of rows and columns of the matrices whose product is timed.
  """
  model, params, _ = jv.load_pretrained(folder)
  # The model of transformers does not suppress any tokens, so this one must not either.
  model = model.clone(config=model.config.replace(suppressed_tokens=()))
  config = model.config
  prompt = speed.make_prompt(config, case.prompts, TEXT, case.side)
  lengths = case.lengths()
  rng = np.random.default_rng(0)
  shape = (*lengths.shape, int(lengths.max()))
  tokens = rng.choice(speed.words(config), shape)
  mask = np.arange(shape[2]) < lengths[..., None]
  advantages = np.broadcast_to(rng.standard_normal((*shape[:2], 1), np.float32), shape).copy()

  def split_groups(a):
    return a.reshape(-1, 1, *a.shape[2:])

  shared = Ours(model, params, prompt, tokens, mask, advantages, case.trains_vision)
  separate = Ours(
    model,
    params,
    jax.tree.map(np.asarray, views.repeat_prompts(prompt, GROUP)),
    *map(split_groups, (tokens, mask, advantages)),
    case.trains_vision,
  )
  weights = shared.programs.objective.prepare(shared.experience).weights
  scale = np.where(mask, np.asarray(weights) * advantages, 0).astype(np.float32)
  torch = Torch(folder, prompt, tokens, lengths, scale, case.trains_vision)

  matmul, in_product = speed.matrix_product(product)
  seconds = speed.take_turns(
    {"shared": shared, "separate": separate, "torch": torch, "product": matmul}, repeats
  )
  norms = [float(shared()), float(separate()), torch.norm()]
  if not np.allclose(norms, norms[0], rtol=1e-3):
    raise SystemExit(f"{case.name}: expected gradients of equal norm, got the norms {norms}")

  middle = speed.median(seconds)
  frames = [(case.side, case.side)]

  def work(sharing):
    return sum(
      flops.forward_backward(
        config, prompt.tokens.shape[1], row, frames, sharing, case.trains_vision
      )
      for row in lengths.tolist()
    )

  allowed, gain = work(False) / work(True), speed.ratio(seconds, "separate", "shared")
  rate = in_product / middle["product"]
  return {
    "seconds": seconds,
    "medians": middle,
    "faster": gain,
    "fewer_flops": allowed,
    "share": (gain - 1) / (allowed - 1),
    "faster_than_torch": speed.ratio(seconds, "torch", "shared"),
    "padding": padding(shared.packing, mask),
    "model_flops": {"shared": work(True), "separate": work(False)},
    "product_flops": rate,
    "mfu": {
      name: work(name == "shared") / middle[name] / rate for name in ("shared", "separate", "torch")
    },
    "asked": ASKED,
    **dataclasses.asdict(case),
  }


def describe(name: str, r: dict) -> str:
  return (
    f"{name}: shared {r['medians']['shared']:.2f} s, separate {r['medians']['separate']:.2f} s, "
    f"torch {r['medians']['torch']:.2f} s; speedup {r['faster']:.2f}, FLOP ratio "
    f"{r['fewer_flops']:.2f}, realized saving {r['share']:.0%} (target: "
    f"{r['asked']['share']:.0%}); padding {r['padding']:.0%}; MFU: shared {r['mfu']['shared']:.0%} "
    f"(target: {r['asked']['mfu']:.0%}), separate {r['mfu']['separate']:.0%}, torch "
    f"{r['mfu']['torch']:.0%}"
  )


def main() -> None:
  args = speed.parser(__doc__).parse_args()
  speed.use_threads()
  results = speed.Results(args.out or RESULTS, args.again)
  for name, share in results.get("padding of runs", padding_of_runs).items():
    if name != "date":
      print(f"64 prompts x {GROUP} responses of {name}: {share:.0%} padding", flush=True)
  with tempfile.TemporaryDirectory() as folder:
    for case in CASES:
      path = pathlib.Path(folder) / case.model
      if not path.exists():
        scratch.create(path, ARCHITECTURES[case.model], [f"the word {i}" for i in range(4000)])
      result = results.get(
        case.name,
        lambda path=path, case=case: measure(path, case),
        "torch",
        "transformers",
        threads=speed.THREADS,
      )
      print(describe(case.name, result), flush=True)


if __name__ == "__main__":
  main()

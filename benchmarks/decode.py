"""Measures generated tokens per second, compared with `generate` of transformers.

    JAX_PLATFORMS=cpu python benchmarks/decode.py

Both libraries use the same weights. The batch has 16 prompts of 64 visual tokens with 8 responses
each. In the first case, all responses have 128 tokens. In the second case, their lengths have a
long tail as in training: they are log-normal, and a few are ten times as long as most. `generate`
continues until the longest response has ended. The computation is in float32 with 2 threads. The
two libraries run alternately in one process.

Results are stored in `decode.json`. A stored result is not measured again unless --again is given.
The benchmark needs the extra `test` (torch).
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np
import torch
import transformers
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import jaxrl_vlm as jv  # noqa: E402
from benchmarks import speed  # noqa: E402
from benchmarks.rl_step import ARCHITECTURE, GROUP, QUESTION  # noqa: E402
from jaxrl_vlm import parallel, scratch  # noqa: E402
from jaxrl_vlm.rollout import make_sampler  # noqa: E402

RESULTS = ROOT / "benchmarks" / "decode.json"
PROMPTS, SIDE, REPEATS = 16, 224, 5
ROWS = PROMPTS * GROUP
TAIL = np.ceil(np.random.default_rng(0).lognormal(3.0, 0.9, (PROMPTS, GROUP))).clip(1, 256)
# For each case: the number of tokens of each response [P, G], and the target speedup.
CASES = {
  "128 tokens each": (np.full((PROMPTS, GROUP), 128), 3.0),
  "long tail": (TAIL.astype(int), 5.0),
}


def main():
  args = speed.parser(__doc__).parse_args()
  speed.use_threads()
  torch.set_num_threads(speed.THREADS)
  results = speed.Results(args.out or RESULTS, args.again)
  with tempfile.TemporaryDirectory() as folder:
    scratch.create(folder, ARCHITECTURE, [QUESTION, *(f"the word {i}" for i in range(4000))])
    model, params, processor = jv.load_pretrained(
      folder, prompt_buckets=(96,), patch_buckets=(256,), min_pixels=SIDE**2, max_pixels=SIDE**2
    )
    model = model.clone(config=model.config.replace(stop_tokens=()))
    rng = np.random.default_rng(0)
    messages = [
      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    ] * PROMPTS
    prompt = processor(
      messages,
      [[Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))] for _ in messages],
    )
    theirs = Transformers(folder, prompt)
    for name, (lengths, want) in CASES.items():

      def measure(lengths=lengths, want=want):
        return compare(model, params, prompt, theirs, lengths) | {"asked": want}

      result = results.get(name, measure, "torch", "transformers", threads=speed.THREADS)
      print(
        f"{name}: {result['ours']:.0f} tokens/s; generate with a dynamic cache "
        f"{result['dynamic']:.0f}, static {result['static']:.0f}; "
        f"speedup over the faster of the two {result['ratio']:.1f} (target: {want:.0f})",
        flush=True,
      )


def compare(model, params, prompt, theirs, lengths):
  mesh = speed.one_device()
  sampler = make_sampler(
    model, mesh, jv.Sampling(GROUP, int(lengths.max())), parallel.param_shardings(mesh, params)
  )
  on_device = parallel.put_batch(mesh, prompt)

  def ours():
    rollout = sampler(params, on_device, jax.random.key(0), lengths)
    assert rollout.mask.sum() == lengths.sum()

  sides = {
    "ours": ours,
    "dynamic": lambda: theirs(lengths, None),
    "static": lambda: theirs(lengths, "static"),
  }
  seconds = speed.take_turns(sides, REPEATS)
  tokens, medians = int(lengths.sum()), speed.median(seconds)
  better = min(("dynamic", "static"), key=lambda name: medians[name])
  return {name: tokens / value for name, value in medians.items()} | {
    "ratio": speed.ratio(seconds, better, "ours"),
    "better": better,
    "tokens": tokens,
    "seconds": seconds,
  }


class Transformers:
  """`generate` of transformers. It receives each prompt of a batch G times, once per response."""

  def __init__(self, folder, prompt):
    self.model = transformers.AutoModelForImageTextToText.from_pretrained(
      folder, dtype=torch.float32
    ).eval()
    self.model.generation_config.eos_token_id = None
    length = int(prompt.length[0])
    tokens = torch.from_numpy(np.asarray(prompt.tokens[:, :length])).long()
    side = SIDE // 14
    self.inputs = {
      "input_ids": tokens.repeat_interleave(GROUP, 0),
      "attention_mask": torch.ones(ROWS, length, dtype=torch.long),
      "pixel_values": torch.from_numpy(np.asarray(prompt.patches))
      .repeat_interleave(GROUP, 0)
      .flatten(0, 1),
      "image_grid_thw": torch.tensor([[1, side, side]] * ROWS),
      "mm_token_type_ids": (tokens == self.model.config.image_token_id)
      .long()
      .repeat_interleave(GROUP, 0),
    }
    self.prompt = length

  def __call__(self, lengths, cache):
    ends = torch.from_numpy(lengths.reshape(-1)) + self.prompt

    class Ends(transformers.StoppingCriteria):
      def __call__(self, ids, scores, **kwargs):
        return ids.shape[1] >= ends

    with torch.no_grad():
      self.model.generate(
        **self.inputs,
        do_sample=True,
        top_k=0,
        max_new_tokens=int(lengths.max()),
        cache_implementation=cache,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([Ends()]),
      )


if __name__ == "__main__":
  main()

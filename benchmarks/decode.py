"""Drawing responses, beside transformers' generate with the same weights: tokens a second.

    JAX_PLATFORMS=cpu python benchmarks/decode.py

16 prompts of 64 visual tokens, 8 responses of each: a batch of 128. Once all responses have 128
tokens; once their lengths have a long tail (log-normal, most short, a few ten times as long), as
they have in training. generate works on until the longest has ended. float32, 2 threads, both in
turn in one run. Needs the extra `test` (torch).
"""

import datetime
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
import transformers
from PIL import Image
from rl_step import ARCHITECTURE, GROUP, QUESTION, THREADS

import jaxrl_vlm as jv
from jaxrl_vlm import parallel, scratch
from jaxrl_vlm.rollout import make_sampler

RESULTS = pathlib.Path(__file__).with_suffix(".json")
PROMPTS, SIDE, REPEATS = 16, 224, 5
ROWS = PROMPTS * GROUP
# Name: tokens of each response [P, G], at least this ratio.
TAIL = np.ceil(np.random.default_rng(0).lognormal(3.0, 0.9, (PROMPTS, GROUP))).clip(1, 256)
CASES = {"128 tokens each": (np.full((PROMPTS, GROUP), 128), 3.0),
         "long tail": (TAIL.astype(int), 5.0)}


def main():
  torch.set_num_threads(THREADS)
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    scratch.create(folder, ARCHITECTURE, [QUESTION, *(f"the word {i}" for i in range(4000))])
    model, params, processor = jv.load_pretrained(
        folder, prompt_buckets=(96,), patch_buckets=(256,), min_pixels=SIDE**2, max_pixels=SIDE**2)
    model = model.clone(config=model.config.replace(stop_tokens=()))
    rng = np.random.default_rng(0)
    messages = [[{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": QUESTION}]}]] * PROMPTS
    prompt = processor(messages, [
        [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))] for _ in messages])
    theirs = Transformers(folder, prompt)
    for name, (lengths, want) in CASES.items():
      results[name] = compare(model, params, prompt, theirs, lengths) | {"asked": want}
      result = results[name]
      print(f"{name}: {result['ours']:.0f} tokens/s; generate with a dynamic cache "
            f"{result['dynamic']:.0f}, static {result['static']:.0f}: "
            f"{result['ratio']:.1f} times the better one (asked: {want:.0f})", flush=True)
  results["about"] = {"date": str(datetime.date.today()), "threads": THREADS,
                      "jax": jax.__version__, "torch": torch.__version__,
                      "transformers": transformers.__version__}
  RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def compare(model, params, prompt, theirs, lengths):
  mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, jax.devices()[:1])
  sampler = make_sampler(model, mesh, jv.Sampling(GROUP, int(lengths.max())),
                         parallel.param_shardings(mesh, params))
  on_device = parallel.put_batch(mesh, prompt)

  def ours():
    rollout = sampler(params, on_device, jax.random.key(0), lengths)
    assert rollout.mask.sum() == lengths.sum()

  sides = {"ours": ours, "dynamic": lambda: theirs(lengths, None),
           "static": lambda: theirs(lengths, "static")}
  seconds = {name: [] for name in sides}
  for i in range(REPEATS + 1):
    for name, run in sides.items():
      start = time.perf_counter()
      run()
      if i:  # the first warms up
        seconds[name].append(time.perf_counter() - start)
  tokens = int(lengths.sum())
  result = {name: tokens / statistics.median(values) for name, values in seconds.items()}
  ratios = [min(a, b) / c for a, b, c in zip(
      seconds["dynamic"], seconds["static"], seconds["ours"], strict=True)]
  return result | {"ratio": statistics.median(ratios), "tokens": tokens, "seconds": seconds}


class Transformers:
  """generate on the patches and tokens of a Prompt, each prompt once for every response."""

  def __init__(self, folder, prompt):
    self.model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32).eval()
    self.model.generation_config.eos_token_id = None
    length = int(prompt.length[0])
    tokens = torch.from_numpy(np.asarray(prompt.tokens[:, :length])).long()
    side = SIDE // 14
    self.inputs = {
        "input_ids": tokens.repeat_interleave(GROUP, 0),
        "attention_mask": torch.ones(ROWS, length, dtype=torch.long),
        "pixel_values": torch.from_numpy(np.asarray(prompt.patches)).repeat_interleave(
            GROUP, 0).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, side, side]] * ROWS),
        "mm_token_type_ids": (tokens == self.model.config.image_token_id).long().repeat_interleave(
            GROUP, 0)}
    self.prompt = length

  def __call__(self, lengths, cache):
    ends = torch.from_numpy(lengths.reshape(-1)) + self.prompt

    class Ends(transformers.StoppingCriteria):

      def __call__(self, ids, scores, **kwargs):
        return ids.shape[1] >= ends

    with torch.no_grad():
      self.model.generate(
          **self.inputs, do_sample=True, top_k=0, max_new_tokens=int(lengths.max()),
          cache_implementation=cache, pad_token_id=0,
          stopping_criteria=transformers.StoppingCriteriaList([Ends()]))


if __name__ == "__main__":
  main()

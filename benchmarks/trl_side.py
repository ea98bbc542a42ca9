"""Runs TRL's GRPOTrainer step by step for `rl_step.py`.

The script waits for the line `go` on its standard input, does one step, and writes its seconds to
its standard output. It runs in a separate process and does not import jaxrl_vlm.
"""

import importlib.metadata
import json
import sys
import time

import numpy as np
import torch

# torchvision registers operators that the CPU build of torch does not have. This script does not
# use these operators, so it skips their registration.
_register = torch.library.register_fake


def _register_fake(name, *args, **kwargs):
  if isinstance(name, str) and name.startswith("torchvision::"):
    return lambda function: function
  return _register(name, *args, **kwargs)


torch.library.register_fake = _register_fake

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from PIL import Image  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class Stepwise(transformers.TrainerCallback):
  """Waits for `go` before each step, and writes the seconds of the step after it."""

  def on_step_begin(self, *args, **kwargs):
    if sys.stdin.readline().strip() != "go":
      sys.exit(0)

  def on_step_end(self, *args, **kwargs):
    print(f"seconds {time.perf_counter() - self.start:.6f}", file=OUT, flush=True)


OUT = sys.stdout
sys.stdout = sys.stderr  # keeps the output of the trainer out of the protocol with rl_step.py


def main(spec):
  print(
    json.dumps({p: importlib.metadata.version(p) for p in ("trl", "torch", "transformers")}),
    file=OUT,
    flush=True,
  )
  torch.set_num_threads(spec["threads"])
  folder = spec["model"]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  pixels = {"min_pixels": spec["side"] ** 2, "max_pixels": spec["side"] ** 2}
  processor = transformers.Qwen2_5_VLProcessor(
    transformers.AutoImageProcessor.from_pretrained(folder, **pixels),
    tokenizer,
    transformers.Qwen2VLVideoProcessor(),
    chat_template=tokenizer.chat_template,
  )
  model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
  # Without stop tokens, every response has the full length, as in `rl_step.py`.
  model.generation_config.eos_token_id = None

  rng = np.random.default_rng(0)
  count = spec["prompts"] * 4
  rows = [
    {
      "prompt": [{"role": "user", "content": spec["question"]}],
      "image": Image.fromarray(rng.integers(0, 256, (spec["side"],) * 2 + (3,), np.uint8)),
    }
    for _ in range(count)
  ]

  def reward(completions, **kwargs):
    return [float(len(c[0]["content"]) % 7) for c in completions]

  steps = Stepwise()
  config = GRPOConfig(
    output_dir=spec["output"],
    max_steps=100_000,
    per_device_train_batch_size=spec["prompts"] * spec["group"],
    gradient_accumulation_steps=1,
    num_generations=spec["group"],
    max_completion_length=spec["tokens"],
    beta=0.0,
    temperature=1.0,
    learning_rate=1e-6,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to=[],
    save_strategy="no",
    logging_steps=10_000,
    disable_tqdm=True,
    shuffle_dataset=False,
    dataloader_num_workers=0,
    generation_kwargs={"min_new_tokens": spec["tokens"]},
  )
  trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=processor,
    callbacks=[steps],
  )

  # The trainer loads a batch before it calls `on_step_begin`. The measurement of a step starts in
  # `training_step`, where the work of the step begins.
  inner = trainer.training_step

  def timed(*args, **kwargs):
    steps.start = time.perf_counter()
    return inner(*args, **kwargs)

  trainer.training_step = timed
  trainer.train()


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))

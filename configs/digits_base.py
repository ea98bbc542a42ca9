"""Trains the small base model checkpoints/digits_base from random weights, on two CPU cores.

    python -m jaxrl_vlm.train --config=configs/digits_base.py --workdir=runs/digits_base
    cp runs/digits_base/model/* checkpoints/digits_base/

The supervised stages build on each other:

1. `cells`: read boards of a single cell. A model that starts with whole boards learns the colours
   but never the digits.
2. `boards`: read whole boards.
3. `questions`: answer every question in two ways, directly or by reading the necessary cells
   first, and compute additions without a board. Reading first is more accurate.
4. `again`: the same questions, with larger weights for those that are learned last.
5. `even`: answer in both ways equally often. The final model therefore uses both ways, and the RL
   of the quickstart has to discover the better one.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import base  # noqa: E402

QUESTIONS = (
  "read",
  "colour",
  "where",
  "sum_row",
  "sum_column",
  "count",
  "largest_colour",
  "compare",
)


def get_config():
  c = base.get_config()
  c.model.scratch = {
    "tie_word_embeddings": True,
    "min_pixels": 16 * 16,
    "max_pixels": 48 * 48,
    "text": {
      "vocab_size": 448,
      "hidden_size": 128,
      "intermediate_size": 256,
      "num_hidden_layers": 4,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "max_position_embeddings": 1024,
      "rope_parameters": {
        "rope_type": "default",
        "mrope_section": (4, 6, 6),
        "rope_theta": 10000.0,
      },
    },
    "vision": {
      "depth": 2,
      "hidden_size": 128,
      "intermediate_size": 256,
      "num_heads": 4,
      "patch_size": 8,
      "spatial_merge_size": 2,
      "temporal_patch_size": 2,
      "window_size": 32,
      "fullatt_block_indexes": (1,),
    },
  }
  c.prompt_buckets = (24, 40)
  c.patch_buckets = (4, 36)

  cells = _stage(
    steps=600, max_tokens=8, learning_rate=5e-4, tasks="transcribe", rows=(1, 1), columns=(1, 1)
  )
  boards = _stage(
    steps=1000, max_tokens=32, learning_rate=5e-4, tasks="transcribe", rows=(1, 3), columns=(1, 3)
  )
  questions = _stage(
    steps=2400,
    max_tokens=64,
    learning_rate=5e-4,
    tasks={"transcribe": 0.2, "arithmetic": 0.1, **dict.fromkeys(QUESTIONS, 0.7 / 8)},
    style={"direct": 0.5, "local": 0.5},
  )
  # Larger weights for the questions that are learned last.
  again = _stage(
    steps=1200,
    max_tokens=64,
    learning_rate=5e-4,
    tasks={
      "transcribe": 0.12,
      **dict.fromkeys(("colour", "where", "count", "largest_colour"), 0.13),
      **dict.fromkeys(("read", "sum_row", "sum_column", "compare"), 0.09),
    },
    style={"direct": 0.52, "local": 0.48},
  )
  # A lower learning rate, so that the model settles between the two ways.
  even = _stage(
    steps=200,
    max_tokens=64,
    learning_rate=2e-4,
    tasks=QUESTIONS,
    style={"direct": 0.5, "local": 0.5},
  )
  for stage in (questions, again, even):
    stage.optimizer.schedule = "cosine"
    stage.rewards = {"exact": 1.0}
    stage.eval.examples = 500
    stage.eval.every = 400
    stage.eval.options = {"tasks": QUESTIONS}
  c.stages = (cells, boards, questions, again, even)
  c.checkpoint.every = 300
  c.log_every = 50
  return c


def _stage(steps, max_tokens, learning_rate, **options):
  stage = base.sft()
  stage.steps = steps
  stage.prompts_per_step = 64
  stage.max_tokens = max_tokens
  stage.data.name = "digit_boards"
  stage.data.options = {"live": True, **options}
  stage.optimizer.learning_rate = learning_rate
  stage.optimizer.warmup_steps = 50
  stage.optimizer.b2 = 0.98
  return stage

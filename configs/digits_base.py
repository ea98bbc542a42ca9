"""The small base model that ships as checkpoints/digits_base, taught from nothing on two cores.

    python -m jaxrl_vlm.train --config=configs/digits_base.py --workdir=runs/digits_base
    cp -r runs/digits_base/model checkpoints/digits_base

It learns to read whole boards (two fifths of the samples), additions in samples of their own, and
every question in two ways of answering: straight away, and reading what is needed first. It is
stopped while it still errs, so reinforcement learning has something to do: get better at both,
and find out which way is worth it.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import base  # noqa: E402

QUESTIONS = ("read", "colour", "where", "sum_row", "sum_column", "count", "largest_colour",
             "compare")


def get_config():
  c = base.get_config()
  c.model.scratch = {
      "tie_word_embeddings": True,
      "min_pixels": 16 * 16,
      "max_pixels": 64 * 64,
      "text": {
          "vocab_size": 448, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
          "rope_parameters": {
              "rope_type": "default", "mrope_section": (4, 6, 6), "rope_theta": 10000.0},
      },
      "vision": {
          "depth": 4, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "patch_size": 8,
          "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32,
          "fullatt_block_indexes": (1, 3),
      },
  }
  c.prompt_buckets = (40,)
  c.patch_buckets = (36,)

  stage = base.sft()
  stage.steps = 3000
  stage.prompts_per_step = 64
  stage.max_tokens = 64
  stage.data.name = "digit_boards"
  stage.data.options = {
      "live": True,
      "tasks": {"transcribe": 0.4, "arithmetic": 0.1, **{task: 0.0625 for task in QUESTIONS}},
      "style": {"direct": 0.5, "local": 0.5},
      # The evaluation asks questions only.
      "test": 500,
  }
  stage.optimizer.learning_rate = 2e-3
  stage.optimizer.schedule = "cosine"
  stage.optimizer.warmup_steps = 100
  stage.optimizer.b2 = 0.98
  stage.rewards = {"exact": 1.0}
  stage.eval.examples = 500
  stage.eval.every = 500
  c.stages = (stage,)
  c.checkpoint.every = 500
  c.log_every = 50
  return c

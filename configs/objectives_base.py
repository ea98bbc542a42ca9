"""The cold start of the comparison of objectives: the base model, taught by a teacher that slips.

    python -m jaxrl_vlm.train --config=configs/objectives_base.py --workdir=runs/objectives/base

Its steps are in order but it misreads digits and colours and miscalculates sums, as often as its
teacher: there is much for RL to put right, in seeing as well as in reasoning, and no other way of
answering that would do so at once.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import base  # noqa: E402


def get_config():
  c = base.get_config()
  c.model.path = "checkpoints/digits_base"
  c.prompt_buckets = (40,)
  c.patch_buckets = (36,)

  stage = base.sft()
  stage.steps = 300
  stage.prompts_per_step = 64
  stage.max_tokens = 64
  stage.data.name = "digit_boards"
  stage.data.options = {
    "live": True,
    "style": "local",
    "slips": {"digit": 0.5, "colour": 0.5, "sum": 0.4},
  }
  stage.optimizer.learning_rate = 3e-4
  stage.optimizer.schedule = "cosine"
  stage.optimizer.warmup_steps = 20
  stage.optimizer.b2 = 0.98
  stage.rewards = {"exact": 1.0}
  stage.eval.examples = 500
  c.stages = (stage,)
  c.checkpoint.every = 100
  c.log_every = 50
  return c

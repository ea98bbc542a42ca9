"""Trains the start model of the comparison of objectives with a teacher that makes mistakes.

    python -m jaxrl_vlm.train --config=configs/objectives_base.py --workdir=runs/objectives/base

The resulting model writes its steps in order. Like its teacher, it misreads digits and colours and
makes errors in sums. RL can therefore improve both perception and reasoning. Unlike in the
quickstart, choosing another way of answering cannot remove these errors at once.
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

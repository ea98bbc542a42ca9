"""RL of a small model on questions about boards of handwritten digits.

This takes a few minutes on two CPU cores.

    python -m jaxrl_vlm.train --config=configs/quickstart.py --workdir=runs/quickstart

To use another objective, add a flag: '--config.stages[0].objective.name=vppo'
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

  stage = base.rl()
  stage.steps = 40
  stage.prompts_per_step = 16
  stage.num_samples = 8
  stage.max_tokens = 64
  stage.data.name = "digit_boards"
  stage.optimizer.learning_rate = 1e-4
  stage.optimizer.warmup_steps = 5
  stage.optimizer.b2 = 0.98
  stage.optimizer.weight_decay = 0.0
  stage.rewards = {"exact": 0.9, "format": 0.1}
  stage.eval.examples = 500
  stage.eval.every = 10
  c.stages = (stage,)
  c.checkpoint.every = 20
  return c

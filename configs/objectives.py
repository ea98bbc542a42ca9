"""One RL run of the comparison of objectives (benchmarks/objectives.py).

The run starts from the model that configs/objectives_base.py trains:

    python -m jaxrl_vlm.train --config=configs/objectives_base.py --workdir=runs/objectives/base
    python -m jaxrl_vlm.train --config=configs/objectives.py --workdir=runs/objectives/grpo \\
      --config.model.path=runs/objectives/base/model
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import quickstart  # noqa: E402


def get_config():
  c = quickstart.get_config()
  c.model.path = "runs/objectives/base/model"
  (stage,) = c.stages
  stage.steps = 100
  # Several updates per rollout. With one update, all ratios are 1 and clipping has no effect.
  stage.minibatches = 4
  stage.optimizer.warmup_steps = 20
  stage.data.options = {"live": True}
  stage.rewards = {"exact": 1.0}
  # Evaluate at the temperature of training, as the mean over samples. The held-out boards have
  # digits that training never uses.
  stage.eval.examples = 500
  stage.eval.every = 10
  stage.eval.samples = 4
  stage.eval.temperature = 1.0
  c.checkpoint.every = 1000
  c.rollouts_every = 1000
  c.log_every = 10
  return c

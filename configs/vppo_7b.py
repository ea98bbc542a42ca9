"""VPPO on Qwen2.5-VL-7B-Instruct with the settings of its authors.

Source: arXiv 2510.09285, code VPPO-RL a23c54b.

    python -m jaxrl_vlm.plan --config=configs/vppo_7b.py --topology=v5p:2x2x4
    python -m jaxrl_vlm.train --config=configs/vppo_7b.py --workdir=runs/vppo_7b \
      --config.model.path=DIRECTORY '--config.stages[0].data.name=DIRECTORY/{split}.jsonl'

The authors train on the 39,000 questions of ViRL39K. Each `question` ends with the instruction to
think inside <think></think> and to give the answer in \\boxed{}. The verifier compares the response
with `answer`. Weights and optimizer state are float32 in this config and bfloat16 in theirs.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import base  # noqa: E402


def get_config():
  c = base.get_config()
  c.model.path = "Qwen2.5-VL-7B-Instruct"  # downloaded directory; a plan needs only the name
  c.model.min_pixels = 256 * 28 * 28
  c.model.max_pixels = 1280 * 28 * 28
  c.model.remat = "full"
  c.rollout.tensor = 4
  c.prompt_buckets = (1024, 2048, 4096)
  c.patch_buckets = (1024, 2560, 5120)

  stage = base.rl()
  stage.steps = 202  # two epochs
  stage.prompts_per_step = 384
  stage.minibatches = 3
  stage.microbatches = 8
  stage.num_samples = 8
  stage.max_tokens = 2048
  stage.temperature = 1.0
  stage.top_p = 0.99
  stage.objective.name = "vppo"
  stage.data.name = "data/{split}.jsonl"
  stage.rewards = {"math": 1.0}
  stage.optimizer.learning_rate = 1e-6
  stage.optimizer.weight_decay = 0.01
  c.stages = (stage,)
  return c

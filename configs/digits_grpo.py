"""The quickstart with the objective GRPO.

python -m jaxrl_vlm.train --config=configs/digits_grpo.py --workdir=runs/digits_grpo
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import quickstart  # noqa: E402


def get_config():
  c = quickstart.get_config()
  c.stages[0].objective.name = "grpo"
  return c

"""The quickstart with the objective VPPO.

python -m jaxrl_vlm.train --config=configs/digits_vppo.py --workdir=runs/digits_vppo
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import quickstart  # noqa: E402


def get_config():
  c = quickstart.get_config()
  c.stages[0].objective.name = "vppo"
  return c

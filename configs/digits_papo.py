"""The quickstart with the objective PAPO.

python -m jaxrl_vlm.train --config=configs/digits_papo.py --workdir=runs/digits_papo
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import quickstart  # noqa: E402


def get_config():
  c = quickstart.get_config()
  c.stages[0].objective.name = "papo"
  return c

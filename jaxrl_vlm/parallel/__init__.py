"""Meshes, shardings, and runs of several processes.

JAX distributes the programs over the devices of a named mesh (GSPMD).
"""

from jaxrl_vlm.parallel.mesh import (
  AXES,
  ROLLOUT_RULES,
  ROWS,
  RULES,
  Rules,
  batch_sharding,
  constrained,
  make_mesh,
  param_shardings,
  reordered,
  replicated,
  rows,
  rules_of,
  split_over,
  with_tensor,
)
from jaxrl_vlm.parallel.placement import (
  Rows,
  everywhere,
  own_rows,
  put,
  put_batch,
  put_rows,
  taken,
)
from jaxrl_vlm.parallel.platform import cache_compilations, choose_platform
from jaxrl_vlm.parallel.processes import (
  exchange,
  gather,
  in_turn,
  is_first,
  join_processes,
  leave_processes,
  stopping_all,
)

__all__ = [
  "AXES",
  "ROLLOUT_RULES",
  "ROWS",
  "RULES",
  "Rows",
  "Rules",
  "batch_sharding",
  "cache_compilations",
  "choose_platform",
  "constrained",
  "everywhere",
  "exchange",
  "gather",
  "in_turn",
  "is_first",
  "join_processes",
  "leave_processes",
  "make_mesh",
  "own_rows",
  "param_shardings",
  "put",
  "put_batch",
  "put_rows",
  "reordered",
  "replicated",
  "rows",
  "rules_of",
  "split_over",
  "stopping_all",
  "taken",
  "with_tensor",
]

"""Meshes and shardings. The distributed engine is JAX's own: GSPMD over a named mesh."""

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
    put_batch,
    reordered,
    replicated,
    rows,
    rules_of,
    split_over,
    with_tensor,
)
from jaxrl_vlm.parallel.platform import cache_compilations, choose_platform

__all__ = ["AXES", "ROLLOUT_RULES", "ROWS", "RULES", "Rules", "batch_sharding",
           "cache_compilations", "choose_platform", "constrained", "make_mesh", "param_shardings",
           "put_batch", "reordered", "replicated", "rows", "rules_of", "split_over", "with_tensor"]

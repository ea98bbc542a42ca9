"""Meshes and shardings. The distributed engine is JAX's own: GSPMD over a named mesh."""

from jaxrl_vlm.parallel.mesh import (
    AXES,
    ROWS,
    batch_sharding,
    make_mesh,
    param_shardings,
    put_batch,
    reordered,
    replicated,
    rows,
)
from jaxrl_vlm.parallel.platform import cache_compilations, choose_platform

__all__ = ["AXES", "ROWS", "batch_sharding", "cache_compilations", "choose_platform", "make_mesh",
           "param_shardings", "put_batch", "reordered", "replicated", "rows"]

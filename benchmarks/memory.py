"""Computes the memory of published models per chip, from parameter shapes and sharding rules.

    python benchmarks/memory.py           # print the table
    python benchmarks/memory.py --write   # write it to docs/models.md

The numbers include weights, gradients, AdamW's two moments, and the KV cache. They do not include
what a program needs temporarily (activations, buffers of collectives), which depends on sequence
lengths and batch size.
"""

import argparse
import math
import pathlib
import sys

import jax
from jax.sharding import AbstractMesh

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from jaxrl_vlm import models, parallel  # noqa: E402
from jaxrl_vlm.models import lora  # noqa: E402
from jaxrl_vlm.models.published import CONFIGS  # noqa: E402
from jaxrl_vlm.types import Params  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- memory: benchmarks/memory.py -->", "<!-- end of memory -->"
GIB = 2**30
RANK = 16


def per_chip(shapes: Params, chips: int) -> int:
  """Returns the number of parameters on one chip if they are sharded over `chips` chips."""
  mesh = AbstractMesh((1, chips, 1), parallel.AXES)
  shardings = parallel.param_shardings(mesh, shapes)
  return sum(
    math.prod(sharding.shard_shape(leaf.shape))
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
  )


def row(name: str) -> list[str]:
  """Returns the table row of a published model."""
  config = models.from_hf(CONFIGS[name])
  shapes = models.abstract_params(config)
  adapters = lora.adapters(
    models.abstract_params(config.replace(lora=models.LoRA(RANK, 32.0, ("decoder", "vision"))))
  )
  count = per_chip(shapes, 1)
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2

  def inference(chips):  # weights in bfloat16
    return 2 * per_chip(shapes, chips)

  def training(chips):  # weights, gradients and two moments in float32
    return 16 * per_chip(shapes, chips)

  def adapting(chips):  # frozen weights in bfloat16, adapters as in training
    return inference(chips) + 16 * per_chip(adapters, chips)

  sizes = [inference(1), inference(8), training(16), training(64), adapting(8), adapting(32)]
  return [
    name,
    f"{count / 1e9:.2f}",
    *(f"{size / GIB:.1f}" for size in sizes),
    f"{cache / 1024:.0f}",
  ]


def table() -> str:
  """Returns the Markdown table of all published models."""
  head = [
    "model",
    "parameters (10⁹)",
    "inference, 1 chip",
    "inference, 8 chips",
    "training, 16 chips",
    "training, 64 chips",
    f"LoRA rank {RANK}, 8 chips",
    f"LoRA rank {RANK}, 32 chips",
    "KV cache, KiB per token",
  ]
  rows = [head, ["---"] + ["--:"] * (len(head) - 1), *(row(name) for name in CONFIGS)]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", action="store_true", help="write the table to docs/models.md")
  args = parser.parse_args()
  print(table())
  if args.write:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
  main()

"""Memory of the published models per chip, from their shapes and the sharding rules.

    python benchmarks/memory.py           # prints the table
    python benchmarks/memory.py --write   # puts it into docs/models.md

Counts what a program holds for certain: weights, gradients, AdamW's two moments, keys and values.
What it needs besides while it runs (activations, buffers of collectives) depends on lengths and
batch and comes on top.
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
  """Parameters on one chip when `chips` of them split what the rules split."""
  mesh = AbstractMesh((1, chips, 1), parallel.AXES)
  places = parallel.param_shardings(mesh, shapes)
  return sum(
    math.prod(place.shard_shape(leaf.shape))
    for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
  )


def row(name: str) -> list[str]:
  config = models.from_hf(CONFIGS[name])
  shapes = models.abstract_params(config)
  adapters = lora.adapters(
    models.abstract_params(config.replace(lora=models.LoRA(RANK, 32.0, ("decoder", "vision"))))
  )
  count = per_chip(shapes, 1)
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2

  def inference(chips):  # bfloat16
    return 2 * per_chip(shapes, chips)

  def training(chips):  # float32: weights, gradients, two moments
    return 16 * per_chip(shapes, chips)

  def adapting(chips):  # bfloat16 weights, adapters as in training
    return inference(chips) + 16 * per_chip(adapters, chips)

  sizes = [inference(1), inference(8), training(16), training(64), adapting(8), adapting(32)]
  return [
    name,
    f"{count / 1e9:.2f}",
    *(f"{size / GIB:.1f}" for size in sizes),
    f"{cache / 1024:.0f}",
  ]


def table() -> str:
  head = [
    "model",
    "parameters (10⁹)",
    "inference, 1 chip",
    "8 chips",
    "training, 16 chips",
    "64 chips",
    f"LoRA rank {RANK}, 8 chips",
    "32 chips",
    "keys and values, KiB a token",
  ]
  rows = [head, ["---"] + ["--:"] * (len(head) - 1), *(row(name) for name in CONFIGS)]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
  args = parser.parse_args()
  print(table())
  if args.write:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
  main()

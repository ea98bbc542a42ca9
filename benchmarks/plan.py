"""Plans VPPO at real lengths on TPU slices of 4 to 256 chips: which model fits where.

    python benchmarks/plan.py                        # all cases: takes hours, resumes if stopped
    python benchmarks/plan.py Qwen2.5-VL-7B v5e:4x4  # one case, or all cases of a model or a slice
    python benchmarks/plan.py --as_run               # recompile narrow cases as a run compiles
    python benchmarks/plan.py --write                # write the tables to docs/plan.md

A case is `configs/vppo_7b.py` with one of the models on one of the slices: prompts of 4,096 tokens,
8 responses of 2,048 tokens each. For each slice, the formulas of `jaxrl_vlm/memory.py` order the
mesh shapes by free memory. The benchmark compiles them in this order until one fits. The results
are stored in `plan.json`. A case that is not in this file has not been compiled.

Plans ask the compiler for less optimization than runs do. `--as_run` asks for full optimization,
which takes several times as long. It recompiles the cases of `FIRST`, and those that fit by less
than `NARROW` bytes.
"""

import argparse
import copy
import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from jaxrl_vlm import config as config_lib  # noqa: E402
from jaxrl_vlm import plan  # noqa: E402
from jaxrl_vlm.errors import UserError  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "plan.json", ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- plan: benchmarks/plan.py -->", "<!-- end of plan -->"
CONFIG = ROOT / "configs" / "vppo_7b.py"
# Names of the model directories, without "-Instruct".
MODELS = ("Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Qwen2.5-VL-72B", "Qwen2.5-VL-3B", "Qwen3-VL-8B")
GENERATIONS = ("v5e", "v5p", "v6e")
FIRST = (
  ("Qwen2.5-VL-7B", "v5e:4x4"),
  ("Qwen2.5-VL-32B", "v5p:2x2x4"),
  ("Qwen2.5-VL-72B", "v5p:2x4x4"),
)
SIZES = (16, 64, 256, 4, 32, 128, 8)
_GIB = 2**30
NARROW = 2 * _GIB


def cases() -> list[tuple[str, str]]:
  """Returns all cases (model, slice) in the order in which they are compiled.

  `FIRST` comes first. The others are ordered by number of chips as in `SIZES`.
  """
  from jaxrl_vlm.planning import roofline

  every = [
    (where.chips, model, where.name)
    for model in MODELS
    for generation in GENERATIONS
    for where in roofline.slices(roofline.CHIPS[generation])
  ]
  rest = [(model, name) for _, model, name in sorted(every, key=lambda case: SIZES.index(case[0]))]
  return list(dict.fromkeys((*FIRST, *rest)))


def config_of(model: str):
  """Returns the VPPO config for a model."""
  from jaxrl_vlm.planning import step

  config = config_lib.load_config_file(str(CONFIG))
  config.model.path = f"{model}-Instruct"
  if model.startswith("Qwen3"):  # its patches have 16 pixels instead of 14
    config.model.min_pixels, config.model.max_pixels = 256 * 32 * 32, 1280 * 32 * 32
  # With more chips than key/value heads, every chip would store all of these heads.
  config.rollout.tensor = min(config.rollout.tensor, step.architecture(config).num_kv_heads)
  return config


def compiled(model: str, name: str, cache: pathlib.Path) -> dict:
  """Compiles a case. Call it inside `plan.compiler()`.

  Args:
    model: one of `MODELS`.
    name: name of the slice, e.g. "v5e:4x4".
    cache: directory of compiled results.

  Returns:
    The result of the first mesh that fits, or of the mesh that needs the least memory. If nothing
    could be compiled, the bytes per chip of parameters, gradients and AdamW moments (`state`).
  """
  from jaxrl_vlm.planning import roofline

  where, request = roofline.find_slice(name), plan.Request(config_of(model), cache=cache)
  too_large: list[dict] = []
  for tensor, asked in plan.meshes(request, where):
    plan.say(f"{model} on {name}, mesh.tensor={tensor}")
    result = plan.plan_stage(asked, 0, where, all_of_it=False)
    if result["fits"]:
      return _row(result)
    too_large.append(result)
  if too_large:
    return _row(min(too_large, key=lambda result: result["peak"]))
  return {
    "fits": False,
    "state": _state(request, where),
    "capacity": where.chip.memory,
    "chips": where.chips,
  }


def as_run(model: str, name: str, row: dict, cache: pathlib.Path) -> dict:
  """Compiles a case with full optimization, on the mesh of its row.

  Returns:
    `fits`, `peak`, `peak_of` and `date`, as in the rows of `plan.json`.
  """
  from jaxrl_vlm.planning import roofline

  where, request = roofline.find_slice(name), plan.Request(config_of(model), cache=cache)
  plan.say(f"{model} on {name}, as run")
  asked = dict(plan.meshes(request, where))[row["mesh"]["tensor"]]
  result = plan.plan_stage(asked, 0, where, all_of_it=False)
  return {key: _row(result)[key] for key in ("fits", "peak", "peak_of", "date")}


def _state(request: plan.Request, where) -> float:
  """Bytes per chip of parameters, AdamW moments and gradients, sharded evenly over all chips."""
  import jax

  from jaxrl_vlm import models
  from jaxrl_vlm.planning import step

  shapes = models.abstract_params(step.architecture(copy.deepcopy(request.config)))
  return 16 * sum(x.size for x in jax.tree.leaves(shapes)) / where.chips


def _row(result: dict) -> dict:
  worst = max(result["programs"], key=lambda row: row["peak"])
  keep = (
    "fits",
    "chips",
    "mesh",
    "microbatches",
    "groups_at_once",
    "peak",
    "step_seconds",
    "tokens_per_second_per_chip",
    "split",
    "refusal",
  )
  return {
    **{key: result[key] for key in keep},
    "capacity": result["chip_memory"],
    "peak_of": worst["program"],
    "date": time.strftime("%Y-%m-%d"),
    "programs": {
      row["program"]: {
        "peak": row["peak"],
        "bound": row["bound"],
        "step_seconds": row["step_seconds"],
      }
      for row in result["programs"]
    },
  }


def tables(results: dict) -> str:
  """Returns one Markdown table for each model."""
  shown = []
  for model in MODELS:
    rows = dict(results.get(model, {}))
    if not rows:
      continue
    head = [
      "slice",
      "chips",
      "mesh",
      "fits",
      "peak, GiB per chip",
      "peak as run",
      "available",
      "program at peak",
      "step, s",
      "tokens/s per chip",
      "rollout",
      "scores",
      "update",
    ]
    lines = [head, ["---", "--:", "---", "---", "--:", "--:", "--:", "---"] + ["--:"] * 5]
    generations = list(dict.fromkeys(name.partition(":")[0] for name in rows))
    for generation in sorted(generations):
      slices = {n: r for n, r in rows.items() if n.startswith(f"{generation}:")}
      lines += [
        _cells(name, row) for name, row in sorted(slices.items(), key=lambda item: item[1]["chips"])
      ]
    shown.append(f"### {model}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines))
  return "\n\n".join(shown)


def _cells(name: str, row: dict) -> list[str]:
  begin, available = [name, str(row["chips"])], f"{row['capacity'] / _GIB:.2f}"
  if "mesh" not in row:
    state = f"{row['state'] / _GIB:.1f}"
    return [*begin, "", "no", state, "", available, "not compiled", *[""] * 5]
  mesh = " x ".join(f"{axis} {count}" for axis, count in row["mesh"].items() if count > 1)
  run = row.get("as_run", row)
  fits = row["fits"] and run["fits"]
  cells = [
    *begin,
    mesh,
    "yes" if fits else "no",
    f"{row['peak'] / _GIB:.1f}",
    f"{run['peak'] / _GIB:.1f}" if run is not row else "",
    available,
    run["peak_of"],
  ]
  total = row["step_seconds"]
  if not fits or not total:
    return [*cells, *[""] * 5]
  return [
    *cells,
    f"{total:.0f}",
    f"{row['tokens_per_second_per_chip']:.0f}",
    *(f"{row['split'].get(part, 0.0) / total:.0%}" for part in ("rollout", "scores", "update")),
  ]


def write(results: dict) -> None:
  before, _, rest = PAGE.read_text().partition(BEGIN)
  PAGE.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{rest.partition(END)[2]}")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("only", nargs="*", help="only the cases of this model, this slice, or both")
  parser.add_argument(
    "--write", action="store_true", help="write the tables to docs/plan.md; compile nothing"
  )
  parser.add_argument("--again", action="store_true", help="compile cases again that have a result")
  parser.add_argument(
    "--as_run", action="store_true", help="recompile narrow cases with full optimization"
  )
  parser.add_argument(
    "--cache", default="~/.cache/jaxrl_vlm/plan", help="directory of compiled results"
  )
  args = parser.parse_args()
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  if args.write:
    write(results)
    return
  cache = pathlib.Path(args.cache).expanduser()
  if args.as_run:
    os.environ["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = "0"
  with plan.compiler():
    for model, name in cases():
      if not set(args.only) <= {model, name}:
        continue
      row = results.get(model, {}).get(name)
      if args.as_run:
        if row is None or not row["fits"] or ("as_run" in row and not args.again):
          continue
        if row["capacity"] - row["peak"] >= NARROW and (model, name) not in FIRST:
          continue
        row["as_run"] = as_run(model, name, row, cache)
      elif row is not None and not args.again:
        continue
      else:
        try:
          row = compiled(model, name, cache)
        except UserError as error:
          plan.say(f"{model} on {name}: {error}")
          continue
        results.setdefault(model, {})[name] = row
      RESULTS.write_text(json.dumps(results, indent=1) + "\n")
  print(tables(results))


if __name__ == "__main__":
  main()

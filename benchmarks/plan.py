"""What fits where: VPPO at real lengths, compiled for TPU slices from 4 to 256 chips.

    python benchmarks/plan.py                             # all of it: hours; continues where it was
    python benchmarks/plan.py Qwen2.5-VL-7B v5e:4x4       # one row, also a model or a slice alone
    python benchmarks/plan.py --as_run                    # again what just fits, as a run compiles
    python benchmarks/plan.py --write                     # puts the tables into docs/plan.md

`configs/vppo_7b.py` with each model: prompts of 4,096 tokens, 8 responses of 2,048. Of each slice
the mesh that has most room, by formula, is compiled, and those behind it until one fits. What has
been compiled stands in `plan.json`; a slice that is not there has not been compiled. Plans ask the
compiler for less optimisation than runs do; `--as_run` asks for all of it, which takes several
times as long, for the rows of `FIRST` and those that fit by less than `NARROW` bytes.
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
# As their directories are called, less "-Instruct".
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
  """(model, slice) by importance: some, then 16, 64, 256 and 4 chips of all, then the others."""
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
  """The config of VPPO for a model."""
  from jaxrl_vlm.planning import step

  config = config_lib.load_config_file(str(CONFIG))
  config.model.path = f"{model}-Instruct"
  if model.startswith("Qwen3"):  # patches of 16 pixels, not of 14
    config.model.min_pixels, config.model.max_pixels = 256 * 32 * 32, 1280 * 32 * 32
  # Of more chips than heads of keys and values each would hold all of these.
  config.rollout.tensor = min(config.rollout.tensor, step.architecture(config).num_kv_heads)
  return config


def compiled(model: str, name: str, cache: pathlib.Path) -> dict:
  """The row of a model on a slice: the first of its meshes that fits, or the one that needs least.

  Called within `plan.compiler()`.
  """
  from jaxrl_vlm.planning import roofline

  where, request = roofline.find_slice(name), plan.Request(config_of(model), cache=cache)
  found: list[dict] = []
  for tensor, asked in plan.meshes(request, where):
    plan.say(f"{model} on {name}, mesh.tensor={tensor}")
    result = plan.plan_stage(asked, 0, where, all_of_it=False)
    if result["fits"]:
      return _row(result)
    found.append(result)
  if found:
    return _row(min(found, key=lambda result: result["peak"]))
  return {
    "fits": False,
    "state": _state(request, where),
    "capacity": where.chip.memory,
    "chips": where.chips,
  }


def as_run(model: str, name: str, row: dict, cache: pathlib.Path) -> dict:
  """The most that a chip of the row needs where nothing is left out of optimising."""
  from jaxrl_vlm.planning import roofline

  where, request = roofline.find_slice(name), plan.Request(config_of(model), cache=cache)
  plan.say(f"{model} on {name}, as run")
  asked = dict(plan.meshes(request, where))[row["mesh"]["tensor"]]
  result = plan.plan_stage(asked, 0, where, all_of_it=False)
  return {key: _row(result)[key] for key in ("fits", "peak", "peak_of", "date")}


def _state(request: plan.Request, where) -> float:
  """Bytes of parameters, moments and gradients on a chip, if all chips share them evenly."""
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
  """One for each model."""
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
      "GiB on a chip",
      "as run",
      "of",
      "most in",
      "step, s",
      "tokens/s a chip",
      "rollout",
      "scores",
      "update",
    ]
    lines = [head, ["---", "--:", "---", "---", "--:", "--:", "--:", "---"] + ["--:"] * 5]
    generations = list(dict.fromkeys(name.partition(":")[0] for name in rows))
    for generation in sorted(generations):
      here = {n: r for n, r in rows.items() if n.startswith(f"{generation}:")}
      lines += [
        _cells(name, row) for name, row in sorted(here.items(), key=lambda item: item[1]["chips"])
      ]
    shown.append(f"### {model}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines))
  return "\n\n".join(shown)


def _cells(name: str, row: dict) -> list[str]:
  begin, of = [name, str(row["chips"])], f"{row['capacity'] / _GIB:.2f}"
  if "mesh" not in row:
    state = f"{row['state'] / _GIB:.1f}"
    return [*begin, "", "no", state, "", of, "not compiled", *[""] * 5]
  mesh = " x ".join(f"{axis} {count}" for axis, count in row["mesh"].items() if count > 1)
  run = row.get("as_run", row)
  fits = row["fits"] and run["fits"]
  cells = [
    *begin,
    mesh,
    "yes" if fits else "no",
    f"{row['peak'] / _GIB:.1f}",
    f"{run['peak'] / _GIB:.1f}" if run is not row else "",
    of,
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
  parser.add_argument("only", nargs="*", help="a model, a slice, or both")
  parser.add_argument("--write", action="store_true", help="put the tables into docs/plan.md")
  parser.add_argument("--again", action="store_true", help="also what has been compiled before")
  parser.add_argument(
    "--as_run", action="store_true", help="what just fits: its memory with all optimisation"
  )
  parser.add_argument("--cache", default="~/.cache/jaxrl_vlm/plan")
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

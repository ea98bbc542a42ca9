"""python -m jaxrl_vlm.plan --config=configs/vppo_7b.py --topology=v5e:4x4

Compiles every program of a run for TPUs, on a machine without one: does it fit, and how fast could
it be? Nothing is loaded or allocated; the times are bounds from the chip's own numbers, nothing is
measured.
"""

# jax is imported only behind `prepare()`, which sets the environment that libtpu wants.
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxrl_vlm import config as config_lib
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.planning.compiled import Request, compiler, plan_stage, prepare, say, stage_on

ABOUT = (
  "Compiles every program of a config for a TPU topology, on a machine without a TPU: "
  "memory on each chip, and the least time of a step."
)
FLAGS = (
  config_lib.CONFIG,
  config_lib.Flag("topology", "TPU slice, or with --search a generation such as v5p", "v5e:4x4"),
  config_lib.Flag("length", "prompt tokens; 0: the largest bucket", "4096", "0"),
  config_lib.Flag(
    "patches",
    "image patches of a prompt; 0: the largest bucket that such a prompt can hold",
    "5120",
    "0",
  ),
  config_lib.Flag("response_tokens", "tokens of every response; 0: max_tokens", "1024", "0"),
  config_lib.Flag(
    "search",
    "of a generation the smallest slice that fits, of a slice the fastest mesh",
    "true",
    "false",
  ),
  config_lib.Flag("json", "prints JSON in place of tables", "true", "false"),
  config_lib.Flag("out", "file for the JSON", "plan.json", ""),
  config_lib.Flag(
    "cache",
    "directory where compiled results are kept",
    "plans",
    os.path.join(os.environ.get("JAXRL_VLM_CACHE") or "~/.cache/jaxrl_vlm", "plan"),
  ),
)
_GIB = 2**30


# -- What to do where it does not fit -------------------------------------------------------------


def complaint(request: Request, result: dict[str, Any], where: Any) -> str:
  """One line: what does not fit, by how much, what holds the memory, what would help most."""
  worst = max(
    (row for row in result["programs"] if not row["fits"]),
    key=lambda row: row["peak"],
    default=None,
  )
  if worst is None:
    return (
      f"{where.name}: with prompts of {result['prompt_tokens']} tokens the run would stop: "
      f"{result['refusal']}"
    )
  capacity = result["chip_memory"]
  holds = {name: count for name, count in result["holds"].items() if count > 0.005 * capacity}
  rest = worst["peak"] - sum(holds.values())
  shown = ", ".join(f"{name} {count / _GIB:.1f}" for name, count in holds.items())
  need, more = worst["peak"] / _GIB, (worst["peak"] - capacity) / _GIB
  others = ", ".join(
    f"{row['program']} {row['peak'] / _GIB:.2f}"
    for row in result["programs"]
    if not row["fits"] and row is not worst
  )
  others = f" (nor {others})" if others else ""
  return (
    f"{where.name}: {worst['program']} does not fit{others}: it needs {need:.2f} GiB on a "
    f"chip, {more:.2f} more than the {capacity / _GIB:.2f} there are: {shown}, its own "
    f"{rest / _GIB:.1f}; {advice(request, result, worst, where)}"
  )


def advice(request: Request, result: dict[str, Any], worst: dict[str, Any], where: Any) -> str:
  """Which one field saves most, by the formulas of memory.py."""
  from jaxrl_vlm.planning import roofline

  index, name = result["stage"], worst["program"]
  name = "rollout" if worst["part"] == "rollout" else name
  name = "eval" if name.startswith("eval_") else name
  before = _formula(request.config, request, index, where, name)
  saved: dict[str, float] = {}
  for label, changed in _knobs(request.config, result, where, name):
    with contextlib.suppress(UserError):
      saved[label] = before - _formula(changed, request, index, where, name)
  best = max(saved, key=lambda label: saved[label], default="")
  text = "no single field helps"
  if best and saved[best] > 0:
    text = f"by formula {best} helps most, {saved[best] / _GIB:.1f} GiB"
  larger = [s for s in roofline.slices(where.chip) if s.chips > where.chips]
  for bigger in larger[:1]:
    with contextlib.suppress(UserError):
      fitted = _fitted(request.config, index, bigger)
      more = before - _formula(fitted, request, index, bigger, name)
      text += f"; {bigger.name} {more / _GIB:.1f} GiB"
  return text


def _formula(config: Any, request: Request, index: int, where: Any, name: str) -> float:
  """Bytes on a chip while the program of this name runs; for "rollout" and "eval" any of theirs.

  Of one that has no formula only what lies beside it.
  """
  from jaxrl_vlm import memory

  plan = stage_on(dataclasses.replace(request, config=config), index, where)
  holds, programs, shapes = sum(plan.holds.values()), plan.programs, plan.shapes
  length = shapes.length
  if name in ("rollout", "eval"):
    sampler, prompts = programs.rollout, shapes.prompts
    if name == "eval":
      sampler, prompts = plan.evaluation_sampler(), config.stages[index].eval.batch
    groups = sampler.groups_at_once(prompts, length, shapes.patches, name == "rollout")
    return holds + sampler.copied + sampler.need(groups, prompts, length)
  if name.startswith("score"):
    rows = plan.rows_of("masked" if name == "score_masked" else "")
    here = shapes.prompts // (programs.minibatches * programs.microbatches * plan.rows)
    return holds + memory.score(
      memory.Model(plan.model, plan.mesh.shape["tensor"]),
      length,
      here,
      rows,
      shapes.tokens,
      programs.part_of(shapes.tokens, here * shapes.group),
    )
  return holds + (programs.update_bytes(*shapes.sizes) if name == "update" else 0.0)


def _knobs(config: Any, result: dict[str, Any], where: Any, name: str) -> Iterator[tuple[str, Any]]:
  """Configs that differ in one field each, with that field as a flag shows it."""
  index = result["stage"]
  stage = config.stages[index]

  def changed(change: Callable[[Any], None]) -> Any:
    other = copy.deepcopy(config)
    change(other)
    return other

  def set_mesh(c, tensor):
    c.mesh.fsdp, c.mesh.tensor = -1, tensor

  tensor = 2 * result["mesh"]["tensor"]
  if name in ("rollout", "eval"):
    shared = max(2 * config.rollout.tensor, 2 * tensor)
    if config.rollout.tensor and where.chips % shared == 0:
      yield (
        f"config.rollout.tensor={shared}",
        changed(lambda c: setattr(c.rollout, "tensor", shared)),
      )
    groups = (result["groups_at_once"] or 0) // 2 if name == "rollout" else 0
    if groups:
      yield (
        f"config.rollout.groups={groups}",
        changed(lambda c: setattr(c.rollout, "groups", groups)),
      )
    if config.rollout.prefix_dtype != "int8":
      yield (
        "config.rollout.prefix_dtype=int8",
        changed(lambda c: setattr(c.rollout, "prefix_dtype", "int8")),
      )
  else:
    each = (
      stage.prompts_per_step
      // stage.get("minibatches", 1)
      // (where.chips // result["mesh"]["tensor"])
    )
    count = next((n for n in range(stage.microbatches + 1, each + 1) if each % n == 0), 0)
    if count:
      yield (
        f"config.stages[{index}].microbatches={count}",
        changed(lambda c: setattr(c.stages[index], "microbatches", count)),
      )
    half = stage.get("part_tokens", 0) // 2
    if half >= 512:
      yield (
        f"config.stages[{index}].part_tokens={half}",
        changed(lambda c: setattr(c.stages[index], "part_tokens", half)),
      )
    if name == "update" and config.model.remat != "full":
      yield "config.model.remat=full", changed(lambda c: setattr(c.model, "remat", "full"))
    if stage.optimizer.moments == "float32":
      yield (
        f"config.stages[{index}].optimizer.moments=host",
        changed(lambda c: setattr(c.stages[index].optimizer, "moments", "host")),
      )
  if where.chips % tensor == 0:
    yield f"config.mesh.tensor={tensor}", changed(lambda c: set_mesh(c, tensor))


# -- Search ---------------------------------------------------------------------------------------


def _fitted(config: Any, index: int, where: Any, tensor: int = 0) -> Any:
  """The config for a slice: as many microbatches as set, or else as its prompts allow.

  Where rollouts have a layout of their own, as many chips as set share the weights, or more, so
  that these leave two thirds of a chip to other things; or half of it, where more chips than heads
  of keys and values would each hold all of these.

  Raises:
    UserError: its prompts cannot be split over so many.
  """
  from jaxrl_vlm.planning import step

  chips, tensor = where.chips, tensor or max(config.mesh.tensor, 1)
  rows, stage = chips // tensor, config.stages[index]
  each, rest = divmod(stage.prompts_per_step // stage.get("minibatches", 1), rows)
  if rest or not each:
    raise UserError(
      f"config.stages[{index}].prompts_per_step={stage.prompts_per_step}: cannot be split over "
      f"{rows} rows of chips in {stage.get('minibatches', 1)} minibatches"
    )
  other = copy.deepcopy(config)
  other.mesh.slice, other.mesh.fsdp, other.mesh.tensor = 1, rows, tensor
  if config.rollout.tensor:
    model = step.architecture(config)
    weights, room = step.weights(model), where.chip.memory
    least = min(max(tensor, config.rollout.tensor), chips)
    shares = [n for n in range(tensor, chips + 1, tensor) if chips % n == 0 and n >= least]
    heads = [n for n in shares if model.num_kv_heads % n == 0]
    other.rollout.tensor = next(
      (
        n
        for ns, part in ((heads, 3), (heads, 2), (shares, 3))
        for n in ns
        if weights / n <= room / part
      ),
      shares[-1],
    )
  other.stages[index].microbatches = max(
    n for n in range(1, each + 1) if each % n == 0 and n <= max(stage.microbatches, 1)
  )
  return other


def meshes(request: Request, where: Any) -> Iterator[tuple[int, Request]]:
  """Mesh shapes of a slice that could fit, by formula, each with its `tensor`; roomiest first.

  One that could fit holds all stages of the config. The formulas are within a factor of two of the
  compiler: what would not fit at half of what they say is left out, and what a run would refuse.
  """
  from jaxrl_vlm.planning import step

  model, found = step.architecture(request.config), []
  for tensor in (1, 2, 4, 8, 16):
    if where.chips % tensor or model.num_heads % tensor:
      continue
    config, indices = request.config, range(len(request.config.stages))
    try:
      for index in indices:
        config = _fitted(config, index, where, tensor)
    except UserError:  # another mesh may split them
      continue
    asked, most, least = dataclasses.replace(request, config=config), 0.0, 0.0
    plans = [stage_on(asked, index, where) for index in indices]
    for plan in plans:
      holds, needs = sum(plan.holds.values()), plan.programs.update_bytes(*plan.shapes.sizes)
      most, least = max(most, holds + needs), max(least, holds + needs / 2)
    if least <= where.chip.memory:
      found.append((most, tensor, asked, plans))
  for _, tensor, asked, plans in sorted(found, key=lambda f: f[0]):
    if not any(plan.plan().refusal for plan in plans):
      yield tensor, asked


def _plans(request: Request, where: Any, all_of_it: bool) -> list[dict[str, Any]]:
  """Plans of all stages; unless `all_of_it`, up to the first that does not fit."""
  results: list[dict[str, Any]] = []
  for index in range(len(request.config.stages)):
    if all_of_it or all(result["fits"] for result in results):
      results.append(plan_stage(request, index, where, all_of_it))
  return results


def smallest(request: Request, chip: Any) -> list[dict[str, Any]]:
  """The plans of all stages on the smallest slice of a generation on which some mesh fits them.

  Raises:
    UserError: there is none.
  """
  from jaxrl_vlm.planning import roofline

  for where in roofline.slices(chip):
    for tensor, asked in meshes(request, where):
      asked.say(f"{where.name}, config.mesh.tensor={tensor}")
      if all(result["fits"] for result in _plans(asked, where, all_of_it=False)):
        return _plans(asked, where, all_of_it=True)
    request.say(f"{where.name}: does not fit")
  raise UserError(
    f"--topology={chip.name}: no slice of up to {chip.slices[-1]} fits with any mesh; smaller "
    "config.prompt_buckets, or adapters (config.model.lora), need less"
  )


def fastest(request: Request, where: Any) -> list[list[dict[str, Any]]]:
  """Plans of all stages with each mesh of a slice that fits, the fastest first.

  Raises:
    UserError: none fits.
  """
  found = []
  for tensor, asked in meshes(request, where):
    asked.say(f"{where.name}, config.mesh.tensor={tensor}")
    results = _plans(asked, where, all_of_it=False)
    if all(result["fits"] for result in results):
      found.append(results)
  if not found:
    raise UserError(
      f"--topology={where.name}: no mesh fits; --search with "
      f"--topology={where.chip.name} finds the smallest slice that does"
    )
  return sorted(found, key=lambda results: _seconds(request, results))


def _seconds(request: Request, results: Sequence[dict[str, Any]]) -> float:
  """Of all steps of all stages; of a stage that ends by something else one step."""
  return sum(
    max(stage.steps, 1) * result["step_seconds"]
    for stage, result in zip(request.config.stages, results, strict=True)
  )


def flags(results: Sequence[dict[str, Any]]) -> str:
  """What asks for the mesh of plans of all stages."""
  first = results[0]
  fields = {f"config.mesh.{axis}": count for axis, count in first["mesh"].items()}
  if first["rollout_tensor"]:
    fields["config.rollout.tensor"] = first["rollout_tensor"]
  fields |= {
    f"config.stages[{result['stage']}].microbatches": result["microbatches"] for result in results
  }
  return " ".join(shlex.quote(f"--{name}={value}") for name, value in fields.items())


# -- What is shown --------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns, the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  lines = [
    [
      cell.ljust(w) if not i else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ]
    for row in (head, *rows)
  ]
  return "\n".join("  ".join(line).rstrip() for line in lines)


def _number(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
  return "-" if value is None else f"{value / scale:.{digits}f}"


def memory_table(result: dict[str, Any]) -> str:
  rows = [
    [
      row["program"],
      *(_number(row[key], _GIB) for key in ("arguments", "temporaries", "needs", "beside", "peak")),
      "yes" if row["fits"] else "NO",
    ]
    for row in result["programs"]
  ]
  return table(
    ["GiB on a chip", "arguments", "temporaries", "program", "beside", "peak", "fits"], rows
  )


def time_table(result: dict[str, Any]) -> str:
  kinds = list(
    dict.fromkeys(kind for row in result["programs"] for kind in row["collectives"] or ())
  )
  rows = []
  for row in result["programs"]:
    seconds, sent = row["seconds"] or {}, row["collectives"]
    rows.append(
      [
        row["program"],
        f"{row['runs']:g}",
        _number(row["model_flops"], 1e12),
        _number(row["compiled_flops"], 1e12),
        _number(row["bytes"], 1e9, 1),
        *(_number(None if sent is None else sent.get(kind, 0.0), 1e9) for kind in kinds),
        *(_number(seconds.get(key), 1, 3) for key in ("compute", "HBM", "ICI")),
        row["bound"] or "-",
        _number(row["step_seconds"]),
      ]
    )
  return table(
    [
      "one run, one chip",
      "runs",
      "model TFLOP",
      "compiled",
      "HBM GB",
      *(f"{kind} GB" for kind in kinds),
      "compute s",
      "HBM s",
      "ICI s",
      "bound",
      "step s",
    ],
    rows,
  )


def report(result: dict[str, Any]) -> str:
  """A plan for people."""
  mesh = " ".join(f"{axis}={count}" for axis, count in result["mesh"].items() if count > 1)
  splash = sorted(
    {
      name
      for row in result["programs"]
      for name in row["kernels"] or ()
      if "splash" in name and row["program"] == "update"
    }
  )
  lines = [
    f"{result['model']}, {result['objective']} on {result['topology']} ({result['chips']} chips, "
    f"{result['chip_memory'] / _GIB:.2f} GiB each), mesh {mesh or 'of one'}",
    f"{result['prompts']} prompts of {result['prompt_tokens']} tokens and {result['patches']} "
    f"patches, {result['samples']} samples of {result['response_tokens']:g} tokens (most "
    f"{result['max_tokens']}), {result['minibatches']} minibatches of {result['microbatches']} "
    f"microbatches, remat {result['remat']}, {result['groups_at_once']} groups decoded at once"
    + (f" with tensor={result['rollout_tensor']}" if result["rollout_tensor"] else ""),
    "",
    memory_table(result),
    "",
    time_table(result),
    "",
    f"kernels of the update: {', '.join(splash) or 'none'}",
  ]
  if result["step_seconds"] is None:
    lines.append("a step: not estimated, because not all of it compiles")
  else:
    total = result["step_seconds"]
    split = ", ".join(
      f"{part} {seconds:.1f} s ({seconds / total:.0%})" for part, seconds in result["split"].items()
    )
    lines.append(f"a step, by the roofline: {total:.1f} s: {split}")
    lines.append(f"response tokens a second and chip: {result['tokens_per_second_per_chip']:.0f}")
    lines.append(
      "(not measured: every program as fast as the busiest of matrix units, memory and "
      "links allows, and nothing waits for the host)"
    )
  if result["refusal"]:
    lines.append(f"the run itself would say: {result['refusal']}")
  return "\n".join(lines)


# -- Command line ---------------------------------------------------------------------------------


def _whole(args: Any, name: str) -> int:
  text = getattr(args, name)
  if not text.isdigit():
    raise UserError(f"--{name}={text}: expected a whole number")
  return int(text)


def _switch(args: Any, name: str) -> bool:
  text = str(getattr(args, name)).lower()
  if text not in ("true", "false", "1", "0"):
    raise UserError(f"--{name}={text}: expected true or false")
  return text in ("true", "1")


def main(args: Any) -> None:
  """Plans all stages of a config."""
  search, as_json = _switch(args, "search"), _switch(args, "json")
  request = Request(
    args.config,
    *(_whole(args, name) for name in ("length", "patches", "response_tokens")),
    cache=pathlib.Path(args.cache).expanduser(),
  )
  if not args.config.stages:
    raise UserError("config.stages=(): expected at least one stage")
  prepare()
  from jaxrl_vlm.planning import roofline

  chip = roofline.find_chip(args.topology) if search and ":" not in args.topology else None
  where = None if chip is not None else roofline.find_slice(args.topology)
  complaints: list[str] = []
  with compiler():
    if chip is not None:
      results = smallest(request, chip)
    elif search:
      for other in (found := fastest(request, where)):
        steps = ", ".join(f"{result['step_seconds']:.1f} s" for result in other)
        say(f"{steps} a step: {flags(other)}")
      results = found[0]
    else:
      results = _plans(request, where, all_of_it=True)
      complaints = [complaint(request, result, where) for result in results if not result["fits"]]
  text = json.dumps({"stages": results}, indent=2)
  if args.out:
    pathlib.Path(args.out).write_text(text + "\n")
  print(text if as_json else "\n\n".join(map(report, results)))
  if search and not as_json:
    print(f"\nas flags: {flags(results)}")
  if complaints:
    raise UserError("; ".join(complaints))


def run(argv: Sequence[str] | None = None) -> None:
  """The command; --search and --json need no value."""
  words = list(sys.argv[1:] if argv is None else argv)
  sys.argv[1:] = [f"{word}=true" if word in ("--search", "--json") else word for word in words]
  config_lib.run_cli(main, "jaxrl_vlm.plan", ABOUT, FLAGS)


if __name__ == "__main__":
  run()

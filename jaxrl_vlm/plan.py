"""python -m jaxrl_vlm.plan --config=configs/vppo_7b.py --topology=v5e:4x4

Compiles every program of a run for a TPU slice, on a machine without a TPU, to find out whether the
run fits and how long a step takes. No weights are loaded or allocated. The times are estimates by a
roofline model (`planning/roofline.py`), not measurements.
"""

# jax is imported only after `prepare()`, which sets environment variables for libtpu.
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
  "Compiles every program of a config for a TPU slice, on a machine without a TPU. "
  "Prints the memory on each chip and the estimated time of a step."
)
FLAGS = (
  config_lib.CONFIG,
  config_lib.Flag("topology", "TPU slice; with --search also a generation, such as v5p", "v5e:4x4"),
  config_lib.Flag("length", "tokens of each prompt; 0: the largest prompt bucket", "4096", "0"),
  config_lib.Flag(
    "patches",
    "image patches of each prompt; 0: the largest patch bucket that such a prompt can hold",
    "5120",
    "0",
  ),
  config_lib.Flag("response_tokens", "tokens of each response; 0: max_tokens", "1024", "0"),
  config_lib.Flag(
    "search",
    "with a generation, find the smallest slice that fits; with a slice, find its fastest mesh",
    "true",
    "false",
  ),
  config_lib.Flag("json", "print JSON instead of tables", "true", "false"),
  config_lib.Flag("out", "file to which the JSON is written too", "plan.json", ""),
  config_lib.Flag(
    "cache",
    "directory where the results of compiled programs are stored",
    "plans",
    os.path.join(os.environ.get("JAXRL_VLM_CACHE") or "~/.cache/jaxrl_vlm", "plan"),
  ),
)
_GIB = 2**30


# -- Advice for plans that do not fit -------------------------------------------------------------


def complaint(request: Request, result: dict[str, Any], tpu_slice: Any) -> str:
  """Returns one line about a plan that does not fit.

  It says which program does not fit and by how much, what occupies the memory, and what saves most.

  Args:
    request: options of the command.
    result: the plan, as `plan_stage` returns it.
    tpu_slice: `roofline.Slice`.
  """
  worst = max(
    (row for row in result["programs"] if not row["fits"]),
    key=lambda row: row["peak"],
    default=None,
  )
  if worst is None:
    return (
      f"{tpu_slice.name}: with prompts of {result['prompt_tokens']} tokens, a run would stop: "
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
  others = f" (also too large, in GiB: {others})" if others else ""
  return (
    f"{tpu_slice.name}: {worst['program']} does not fit{others}: it needs {need:.2f} GiB on each "
    f"chip, {more:.2f} GiB more than the {capacity / _GIB:.2f} GiB available ({shown}, the program "
    f"itself {rest / _GIB:.1f}); {advice(request, result, worst, tpu_slice)}"
  )


def advice(request: Request, result: dict[str, Any], worst: dict[str, Any], tpu_slice: Any) -> str:
  """Returns which change of a single field saves most memory, by the formulas of `memory.py`.

  It also returns what the next larger slice saves.

  Args:
    request: options of the command.
    result: the plan, as `plan_stage` returns it.
    worst: the row of the program with the largest peak.
    tpu_slice: `roofline.Slice`.
  """
  from jaxrl_vlm.planning import roofline

  index, name = result["stage"], worst["program"]
  name = "rollout" if worst["part"] == "rollout" else name
  name = "eval" if name.startswith("eval_") else name
  before = _formula(request.config, request, index, tpu_slice, name)
  saved: dict[str, float] = {}
  for label, changed in _alternatives(request.config, result, tpu_slice, name):
    with contextlib.suppress(UserError):
      saved[label] = before - _formula(changed, request, index, tpu_slice, name)
  best = max(saved, key=lambda label: saved[label], default="")
  text = "by the formulas, no change of a single field saves memory"
  if best and saved[best] > 0:
    text = f"by the formulas, {best} saves most, {saved[best] / _GIB:.1f} GiB"
  larger = [s for s in roofline.slices(tpu_slice.chip) if s.chips > tpu_slice.chips]
  for bigger in larger[:1]:
    with contextlib.suppress(UserError):
      fitted = _fitted(request.config, index, bigger)
      more = before - _formula(fitted, request, index, bigger, name)
      text += f"; the slice {bigger.name} saves {more / _GIB:.1f} GiB"
  return text


def _formula(config: Any, request: Request, index: int, tpu_slice: Any, name: str) -> float:
  """Returns the bytes in use on a chip while a program runs, by the formulas of `memory.py`.

  Args:
    config: config of the run.
    request: options of the command.
    index: index of the stage.
    tpu_slice: `roofline.Slice`.
    name: name of the program, or "rollout" or "eval" for the largest of their programs. For a
      program without a formula, only the memory in use during the whole stage is returned.
  """
  from jaxrl_vlm import memory

  plan = stage_on(dataclasses.replace(request, config=config), index, tpu_slice)
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
    prompts = shapes.prompts // (programs.minibatches * programs.microbatches * plan.rows)
    return holds + memory.score(
      memory.Model(plan.model, plan.mesh.shape["tensor"]),
      length,
      prompts,
      rows,
      shapes.tokens,
      programs.part_of(shapes.tokens, prompts * shapes.group),
    )
  return holds + (programs.update_bytes(*shapes.sizes) if name == "update" else 0.0)


def _alternatives(
  config: Any, result: dict[str, Any], tpu_slice: Any, name: str
) -> Iterator[tuple[str, Any]]:
  """Yields configs that differ in one field each from `config`, with a label "field=value"."""
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
    if config.rollout.tensor and tpu_slice.chips % shared == 0:
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
      // (tpu_slice.chips // result["mesh"]["tensor"])
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
  if tpu_slice.chips % tensor == 0:
    yield f"config.mesh.tensor={tensor}", changed(lambda c: set_mesh(c, tensor))


# -- Search ---------------------------------------------------------------------------------------


def _fitted(config: Any, index: int, tpu_slice: Any, tensor: int = 0) -> Any:
  """Returns the config with the mesh of a slice, and with fields that fit this mesh.

  The number of microbatches stays, or becomes the next smaller one that divides the prompts of a
  minibatch on each shard.

  If rollouts have their own sharding (`config.rollout.tensor`), the weights are shared by the
  smallest number of chips, at least `config.rollout.tensor`, with which they fill at most a third
  of a chip. Numbers that divide the key/value heads are preferred, because with other numbers every
  chip stores all of these heads: of them, one with which the weights fill up to half of a chip is
  chosen before any other number.

  Args:
    config: config of the run.
    index: index of the stage.
    tpu_slice: `roofline.Slice`.
    tensor: size of the mesh axis `tensor`; 0 for that of the config.

  Raises:
    UserError: the prompts of a step cannot be divided among the shards of this mesh.
  """
  from jaxrl_vlm.planning import step

  chips, tensor = tpu_slice.chips, tensor or max(config.mesh.tensor, 1)
  rows, stage = chips // tensor, config.stages[index]
  each, rest = divmod(stage.prompts_per_step // stage.get("minibatches", 1), rows)
  if rest or not each:
    raise UserError(
      f"config.stages[{index}].prompts_per_step={stage.prompts_per_step}: expected a multiple of "
      f"mesh.fsdp x minibatches = {rows} x {stage.get('minibatches', 1)}"
    )
  other = copy.deepcopy(config)
  other.mesh.slice, other.mesh.fsdp, other.mesh.tensor = 1, rows, tensor
  if config.rollout.tensor:
    model = step.architecture(config)
    weights, room = step.weights(model), tpu_slice.chip.memory
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


def meshes(request: Request, tpu_slice: Any) -> Iterator[tuple[int, Request]]:
  """Yields the meshes of a slice on which all stages of the config could fit.

  The formulas of `memory.py` select the meshes. They agree with the compiler within a factor of
  two, so a mesh is left out if it would not fit even if update and scores needed half of what the
  formulas say. Meshes that a run would refuse are left out too.

  Args:
    request: options of the command.
    tpu_slice: `roofline.Slice`.

  Yields:
    The size of the mesh axis `tensor`, and the request with this mesh in its config. The mesh with
    the most free memory comes first.
  """
  from jaxrl_vlm.planning import step

  model, candidates = step.architecture(request.config), []
  for tensor in (1, 2, 4, 8, 16):
    if tpu_slice.chips % tensor or model.num_heads % tensor:
      continue
    config, indices = request.config, range(len(request.config.stages))
    try:
      for index in indices:
        config = _fitted(config, index, tpu_slice, tensor)
    except UserError:  # the prompts cannot be divided on this mesh
      continue
    candidate, most, least = dataclasses.replace(request, config=config), 0.0, 0.0
    plans = [stage_on(candidate, index, tpu_slice) for index in indices]
    for plan in plans:
      holds, needs = sum(plan.holds.values()), plan.programs.update_bytes(*plan.shapes.sizes)
      most, least = max(most, holds + needs), max(least, holds + needs / 2)
    if least <= tpu_slice.chip.memory:
      candidates.append((most, tensor, candidate, plans))
  for _, tensor, candidate, plans in sorted(candidates, key=lambda candidate: candidate[0]):
    if not any(plan.plan().refusal for plan in plans):
      yield tensor, candidate


def _plans(request: Request, tpu_slice: Any, all_of_it: bool) -> list[dict[str, Any]]:
  """Returns the plans of all stages; without `all_of_it`, up to the first that does not fit."""
  results: list[dict[str, Any]] = []
  for index in range(len(request.config.stages)):
    if all_of_it or all(result["fits"] for result in results):
      results.append(plan_stage(request, index, tpu_slice, all_of_it))
  return results


def smallest(request: Request, chip: Any) -> list[dict[str, Any]]:
  """Returns the plans of all stages on the smallest slice of a generation that fits them.

  Args:
    request: options of the command.
    chip: `roofline.Chip`.

  Raises:
    UserError: no slice of this generation fits them with any mesh.
  """
  from jaxrl_vlm.planning import roofline

  for tpu_slice in roofline.slices(chip):
    for tensor, candidate in meshes(request, tpu_slice):
      candidate.say(f"{tpu_slice.name}, config.mesh.tensor={tensor}")
      if all(result["fits"] for result in _plans(candidate, tpu_slice, all_of_it=False)):
        return _plans(candidate, tpu_slice, all_of_it=True)
    request.say(f"{tpu_slice.name}: does not fit")
  raise UserError(
    f"--topology={chip.name}: the config does not fit on any slice up to {chip.slices[-1]}; use "
    "smaller config.prompt_buckets, or train adapters (config.model.lora)"
  )


def fastest(request: Request, tpu_slice: Any) -> list[list[dict[str, Any]]]:
  """Returns the plans of all stages for each mesh of a slice that fits, the fastest first.

  Args:
    request: options of the command.
    tpu_slice: `roofline.Slice`.

  Raises:
    UserError: no mesh fits.
  """
  fitting = []
  for tensor, candidate in meshes(request, tpu_slice):
    candidate.say(f"{tpu_slice.name}, config.mesh.tensor={tensor}")
    results = _plans(candidate, tpu_slice, all_of_it=False)
    if all(result["fits"] for result in results):
      fitting.append(results)
  if not fitting:
    raise UserError(
      f"--topology={tpu_slice.name}: no mesh fits; to find the smallest slice that fits, use "
      f"--search --topology={tpu_slice.chip.name}"
    )
  return sorted(fitting, key=lambda results: _seconds(request, results))


def _seconds(request: Request, results: Sequence[dict[str, Any]]) -> float:
  """Returns the seconds of all steps of all stages. A stage with `steps=0` counts one step."""
  return sum(
    max(stage.steps, 1) * result["step_seconds"]
    for stage, result in zip(request.config.stages, results, strict=True)
  )


def flags(results: Sequence[dict[str, Any]]) -> str:
  """Returns the flags that select the mesh of these plans, one plan for each stage."""
  first = results[0]
  fields = {f"config.mesh.{axis}": count for axis, count in first["mesh"].items()}
  if first["rollout_tensor"]:
    fields["config.rollout.tensor"] = first["rollout_tensor"]
  fields |= {
    f"config.stages[{result['stage']}].microbatches": result["microbatches"] for result in results
  }
  return " ".join(shlex.quote(f"--{name}={value}") for name, value in fields.items())


# -- Output ---------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Formats a table. The first column is aligned to the left, the others to the right."""
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
  """Returns the table of memory of a plan, in GiB per chip (see docs/plan.md)."""
  rows = [
    [
      row["program"],
      *(_number(row[key], _GIB) for key in ("arguments", "temporaries", "needs", "beside", "peak")),
      "yes" if row["fits"] else "NO",
    ]
    for row in result["programs"]
  ]
  return table(
    ["GiB per chip", "arguments", "temporaries", "program", "beside", "peak", "fits"], rows
  )


def time_table(result: dict[str, Any]) -> str:
  """Returns the table of FLOPs, traffic and estimated times of a plan (see docs/plan.md)."""
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
      "per run and chip",
      "runs",
      "model TFLOP",
      "compiled TFLOP",
      "HBM GB",
      *(f"{kind} GB" for kind in kinds),
      "compute s",
      "HBM s",
      "ICI s",
      "bound",
      "s per step",
    ],
    rows,
  )


def report(result: dict[str, Any]) -> str:
  """Returns the text that shows a plan: its sizes, both tables, and the time of a step."""
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
    f"{result['chip_memory'] / _GIB:.2f} GiB each), mesh {mesh or 'of one chip'}",
    f"{result['prompts']} prompts of {result['prompt_tokens']} tokens and {result['patches']} "
    f"patches, {result['samples']} samples of {result['response_tokens']:g} tokens (at most "
    f"{result['max_tokens']}), {result['minibatches']} minibatches of {result['microbatches']} "
    f"microbatches, remat {result['remat']}, {result['groups_at_once']} groups decoded at once"
    + (f" with rollout.tensor={result['rollout_tensor']}" if result["rollout_tensor"] else ""),
    "",
    memory_table(result),
    "",
    time_table(result),
    "",
    f"splash attention kernels of the update: {', '.join(splash) or 'none'}",
  ]
  if result["step_seconds"] is None:
    lines.append("time of a step: not estimated, because not all of its programs fit")
  else:
    total = result["step_seconds"]
    split = ", ".join(
      f"{part} {seconds:.1f} s ({seconds / total:.0%})" for part, seconds in result["split"].items()
    )
    lines.append(f"estimated time of a step: {total:.1f} s: {split}")
    lines.append(f"response tokens per second and chip: {result['tokens_per_second_per_chip']:.0f}")
    lines.append(
      "(estimated by a roofline model, not measured: a program takes as long as the slowest of "
      "compute, HBM and ICI, and nothing waits for the host)"
    )
  if result["refusal"]:
    lines.append(f"a run would refuse these prompts: {result['refusal']}")
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
  """Plans all stages of a config and prints the plans.

  Raises:
    UserError: a flag is invalid, or a plan does not fit.
  """
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
  tpu_slice = None if chip is not None else roofline.find_slice(args.topology)
  complaints: list[str] = []
  with compiler():
    if chip is not None:
      results = smallest(request, chip)
    elif search:
      for other in (found := fastest(request, tpu_slice)):
        steps = ", ".join(f"{result['step_seconds']:.1f} s" for result in other)
        say(f"{steps} per step: {flags(other)}")
      results = found[0]
    else:
      results = _plans(request, tpu_slice, all_of_it=True)
      complaints = [
        complaint(request, result, tpu_slice) for result in results if not result["fits"]
      ]
  text = json.dumps({"stages": results}, indent=2)
  if args.out:
    pathlib.Path(args.out).write_text(text + "\n")
  print(text if as_json else "\n\n".join(map(report, results)))
  if search and not as_json:
    print(f"\nflags: {flags(results)}")
  if complaints:
    raise UserError("; ".join(complaints))


def run(argv: Sequence[str] | None = None) -> None:
  """Runs the command. The flags --search and --json need no value."""
  words = list(sys.argv[1:] if argv is None else argv)
  sys.argv[1:] = [f"{word}=true" if word in ("--search", "--json") else word for word in words]
  config_lib.run_cli(main, "jaxrl_vlm.plan", ABOUT, FLAGS)


if __name__ == "__main__":
  run()

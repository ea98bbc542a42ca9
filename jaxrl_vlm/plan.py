"""python -m jaxrl_vlm.plan --config=configs/vppo_7b.py --topology=v5e:4x4

Compiles every program of a run for TPUs, on a machine without one: does it fit, and how fast could
it be? Nothing is loaded or allocated; the times are bounds from the chip's own numbers, nothing is
measured.
"""

# jax is imported only once the environment is set by which libtpu compiles and does nothing else.
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxrl_vlm import config as config_lib
from jaxrl_vlm.errors import UserError

ABOUT = ("Compiles every program of a config for a TPU topology, on a machine without a TPU: "
         "memory on each chip, and the least time of a step.")
FLAGS = (
    config_lib.CONFIG,
    config_lib.Flag("topology", "TPU slice, or with --search a generation such as v5p", "v5e:4x4"),
    config_lib.Flag("length", "prompt tokens; 0: the largest bucket", "4096", "0"),
    config_lib.Flag("patches", "image patches of a prompt; 0: the largest bucket that such a "
                    "prompt can hold", "5120", "0"),
    config_lib.Flag("response_tokens", "tokens of every response; 0: max_tokens", "1024", "0"),
    config_lib.Flag("search", "of a generation the smallest slice that fits, of a slice the "
                    "fastest mesh", "true", "false"),
    config_lib.Flag("json", "prints JSON in place of tables", "true", "false"),
    config_lib.Flag("out", "file for the JSON", "plan.json", ""),
    config_lib.Flag("cache", "directory where compiled results are kept", "plans", os.path.join(
        os.environ.get("JAXRL_VLM_CACHE") or "~/.cache/jaxrl_vlm", "plan")),
)
LOCK = "jaxrl_vlm_libtpu.lock"  # in the directory for temporary files
# The last: less optimisation, more than twice as fast to compile.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_MIN_LOG_LEVEL": "3",
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"}
# The first to be compiled where one that does not fit is enough to know.
_LARGEST_FIRST = ("update", "score_masked", "score_reference", "score_ref", "score_base", "score")
_GIB = 2**30


@contextlib.contextmanager
def compiler() -> Iterator[None]:
  """libtpu as a compiler, for this process alone: another that asks for it waits.

  Raises:
    UserError: libtpu is not installed.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("libtpu, the TPU compiler, is not installed: pip install -e '.[plan]'")
  os.environ.update(_ENVIRONMENT)
  with open(pathlib.Path(tempfile.gettempdir()) / LOCK, "a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      say("waiting for another process that compiles for TPUs")
      fcntl.flock(lock, fcntl.LOCK_EX)
    import jax

    for name in ("JAX_PLATFORMS", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT"):
      # Also where jax has been imported before.
      value = _ENVIRONMENT[name]
      jax.config.update(name.lower(), float(value) if value[-1].isdigit() else value)
    yield


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Request:
  """What is asked of every plan of a command.

  Attributes:
    config: of the run.
    length, patches, response_tokens: 0 for what the config says.
    cache: directory of results.
    say: shows progress.
  """

  config: Any
  length: int = 0
  patches: int = 0
  response_tokens: int = 0
  cache: pathlib.Path = pathlib.Path("plan")
  say: Callable[[str], None] = say


# -- One program ----------------------------------------------------------------------------------


def needed(message: str) -> float:
  """Bytes that a program needs, from what the compiler says where that is too much."""
  for pattern in (r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)",
                  r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
                  r"Attempting to reserve ([\d.]+)([KMGT]?)"):
    if found := re.search(pattern, message):
      return float(found[1]) * 1024**" KMGT".index(found[2] or " ")
  raise ValueError(f"no size in {message[:200]!r}")


def compile_piece(piece: Any, where: Any, request: Request) -> dict[str, Any]:
  """Memory and cost of one program: compiled, or from the cache."""
  import jax

  from jaxrl_vlm.parallel import hlo

  began = time.monotonic()
  lowered = piece.lower()
  versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
  sizes = {number: sizes_of(place) for number, place in piece.places.items()}
  key = hashlib.sha256("\n".join(map(str, (
      lowered.as_text(), where.name, versions, piece.steps, sorted(piece.shares.items()),
      pathlib.Path(hlo.__file__).read_text(), sorted(sizes)))).encode()).hexdigest()[:32]
  path = request.cache / f"{key}.json"
  if path.exists():
    request.say(f"{piece.name}: compiled before")
    return json.loads(path.read_text())
  result: dict[str, Any] = {"program": piece.name, "topology": where.name, "compiled": True}
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    result |= {"compiled": False, "needs": needed(str(error)), "unused": 0.0}
  else:
    memory = compiled.memory_analysis()
    result |= {
        "arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "unused": unused(compiled, lowered, piece.places)}
    result["needs"] = (result["arguments"] + result["outputs"] - result["aliased"]
                       + result["temporaries"])
    result["cost"] = dataclasses.asdict(hlo.analyse(
        compiled.as_text(), piece.steps, piece.shares))
  result["compile_seconds"] = round(time.monotonic() - began, 1)
  size = result["needs"] / _GIB
  request.say(f"{piece.name}: {result['compile_seconds']:.0f} s, {size:.1f} GiB"
              + ("" if result["compiled"] else ", too much"))
  request.cache.mkdir(parents=True, exist_ok=True)
  half = path.with_suffix(f".{os.getpid()}")
  half.write_text(json.dumps(result))
  half.replace(path)
  return result


def sizes_of(place: Any) -> str:
  """A name for where an argument lies, in keys of the cache."""
  return type(place).__name__


def unused(compiled: Any, lowered: Any, places: Any) -> float:
  """Bytes of arguments that the program has no use for, but that are there while it runs."""
  import jax
  from jax.sharding import NamedSharding

  from jaxrl_vlm import memory

  def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)

  total = 0.0
  formats, shapes = compiled.input_formats[0], lowered.args_info[0]
  for number, place in places.items():
    given = leaves(shapes[number])
    placed = [place] * len(given) if isinstance(place, NamedSharding) else leaves(place)
    for form, shape, at in zip(leaves(formats[number]), given, placed, strict=True):
      if shape is not None and (form is None or form.sharding is None):
        total += memory.held(jax.ShapeDtypeStruct(shape.shape, shape.dtype), at)
  return total


# -- One stage ------------------------------------------------------------------------------------


def plan_stage(request: Request, index: int, where: Any, all_of_it: bool = True) -> dict[str, Any]:
  """The plan of a stage on a slice, as JSON has it.

  Args:
    request: what is asked.
    index: of the stage.
    where: `roofline.Slice`.
    all_of_it: otherwise the first program that does not fit ends it.
  """
  from jaxrl_vlm import step

  model = step.architecture(request.config)
  devices = topology(where)
  length, patches = step.buckets(request.config, model, request.length, request.patches)
  plan = step.Plan(request.config, index, model, devices, where.chip.memory, length, patches,
                   request.response_tokens)
  stage = plan.plan()
  pieces = stage.pieces
  if not all_of_it:
    pieces = sorted(pieces, key=lambda p: (
        _LARGEST_FIRST.index(p.name) if p.name in _LARGEST_FIRST else len(_LARGEST_FIRST)))
  rows = []
  for piece in pieces:
    if not all_of_it and any(not row["fits"] for row in rows):
      break
    rows.append(_row(piece, compile_piece(piece, where, request), where))
  order = [piece.name for piece in stage.pieces]
  rows.sort(key=lambda row: order.index(row["program"]))
  return _summary(request, plan, stage, rows, where)


def topology(where: Any) -> Sequence[Any]:
  """The devices of a slice that need not be there."""
  import jax
  from jax.experimental import topologies

  # Two cores of a v4 chip are one device, as in any run since v4.
  options = {"chip_config_name": "megacore"} if where.chip.name == "v4" else {}
  try:
    return topologies.get_topology_desc(
        platform="tpu", topology_name=where.name, **options).devices
  except jax.errors.JaxRuntimeError as error:
    if "lockfile" not in str(error):
      raise
    raise UserError("libtpu is in use by another process; try again when that has ended") from error


def _row(piece: Any, result: dict[str, Any], where: Any) -> dict[str, Any]:
  from jaxrl_vlm import roofline
  from jaxrl_vlm.parallel.hlo import Cost

  peak = result["needs"] + result["unused"] + piece.alive
  row = {
      "program": piece.name, "part": piece.part, "runs": piece.times,
      **{key: result.get(key) for key in ("arguments", "outputs", "aliased", "temporaries")},
      "needs": result["needs"], "beside": result["unused"] + piece.alive, "peak": peak,
      "fits": bool(result["compiled"] and peak <= where.chip.memory),
      "model_flops": piece.flops / where.chips, "compiled_flops": None, "bytes": None,
      "collectives": None, "kernels": None, "seconds": None, "bound": None, "step_seconds": None,
      "unknown_loops": None, "compile_seconds": result["compile_seconds"]}
  if result["compiled"]:
    cost = Cost(**result["cost"])
    if any("splash" in name for name in cost.kernels):
      cost = cost + Cost(flops=piece.kernels / where.chips)
    least = roofline.bound(cost, where)
    row |= {
        "compiled_flops": cost.flops, "bytes": cost.bytes, "collectives": cost.collectives,
        "kernels": cost.kernels, "unknown_loops": cost.unknown,
        "seconds": {"compute": least.compute, "HBM": least.memory, "ICI": least.links},
        "bound": least.rules, "step_seconds": least.seconds * piece.times}
  return row


def _summary(request: Request, plan: Any, stage: Any, rows: list[dict[str, Any]], where: Any
             ) -> dict[str, Any]:
  chosen = request.config.stages[plan.index]
  fits = all(row["fits"] for row in rows) and not stage.refusal
  result = {
      "model": pathlib.Path(request.config.model.path).name or "a new model",
      "stage": plan.index,
      "kind": chosen.kind, "objective": chosen.objective.name, "topology": where.name,
      "chips": where.chips, "chip_memory": where.chip.memory, **stage.facts,
      "groups_at_once": plan.at_once, "holds": stage.holds,
      "programs": rows, "fits": fits, "refusal": stage.refusal,
      "peak": max((row["peak"] for row in rows), default=0.0)}
  seconds = [row["step_seconds"] for row in rows if row["runs"]]
  if stage.refusal or any(value is None for value in seconds):
    return result | {"step_seconds": None, "tokens_per_second_per_chip": None, "split": {}}
  total = sum(seconds)
  parts = dict.fromkeys(row["part"] for row in rows if row["runs"])
  split = {part: sum(row["step_seconds"] for row in rows if row["runs"] and row["part"] == part)
           for part in parts}
  return result | {"step_seconds": total, "split": split,
                   "tokens_per_second_per_chip": stage.tokens / total / where.chips}


# -- What to do where it does not fit -------------------------------------------------------------


def complaint(request: Request, result: dict[str, Any], where: Any) -> str:
  """One line: what does not fit, by how much, what holds the memory, what would help most."""
  worst = max((row for row in result["programs"] if not row["fits"]),
              key=lambda row: row["peak"], default=None)
  if worst is None:
    return f"{where.name}: the run would not begin: {result['refusal']}"
  capacity = result["chip_memory"]
  holds = {name: count for name, count in result["holds"].items() if count > 0.005 * capacity}
  rest = worst["peak"] - sum(holds.values())
  shown = ", ".join(f"{name} {count / _GIB:.1f}" for name, count in holds.items())
  need, more = worst["peak"] / _GIB, (worst["peak"] - capacity) / _GIB
  return (f"{where.name}: {worst['program']} does not fit: it needs {need:.2f} GiB on a chip, "
          f"{more:.2f} more than the {capacity / _GIB:.2f} there are: {shown}, its own "
          f"{rest / _GIB:.1f}; {advice(request, result, worst, where)}")


def advice(request: Request, result: dict[str, Any], worst: dict[str, Any], where: Any) -> str:
  """Which one field saves most, by the formulas of memory.py."""
  from jaxrl_vlm import roofline

  rollout = worst["part"] == "rollout"
  before = _formula(request.config, request, result["stage"], where, rollout)
  saved: dict[str, float] = {}
  for label, changed in _knobs(request.config, result, where, rollout):
    with contextlib.suppress(UserError):
      saved[label] = before - _formula(changed, request, result["stage"], where, rollout)
  best = max(saved, key=lambda label: saved[label], default="")
  text = "no single field helps"
  if best and saved[best] > 0:
    text = f"by formula {best} helps most, {saved[best] / _GIB:.1f} GiB"
  larger = [s for s in roofline.slices(where.chip) if s.chips > where.chips]
  for bigger in larger[:1]:
    with contextlib.suppress(UserError):
      more = before - _formula(_fitted(request.config, result["stage"], bigger.chips), request,
                               result["stage"], bigger, rollout)
      text += f"; {bigger.name} {more / _GIB:.1f} GiB"
  return text


def _formula(config: Any, request: Request, index: int, where: Any, rollout: bool) -> float:
  from jaxrl_vlm import step

  model = step.architecture(config)
  length, patches = step.buckets(config, model, request.length, request.patches)
  plan = step.Plan(config, index, model, topology(where), where.chip.memory, length, patches,
                   request.response_tokens)
  holds, programs, shapes = sum(plan.holds.values()), plan.programs, plan.shapes
  if rollout:
    sampler = programs.rollout
    groups = sampler.groups_at_once(shapes.prompts, length)
    return holds + sampler.need(groups, shapes.prompts, length)
  return holds + programs.update_bytes(
      shapes.prompts, length, patches, shapes.group, shapes.tokens)


def _knobs(config: Any, result: dict[str, Any], where: Any, rollout: bool
           ) -> Iterator[tuple[str, Any]]:
  """Configs that differ in one field each, with that field as a flag shows it."""
  index = result["stage"]
  stage = config.stages[index]

  def changed(change: Callable[[Any], None]) -> Any:
    other = copy.deepcopy(config)
    change(other)
    return other

  def set_mesh(c, tensor):
    c.mesh.fsdp, c.mesh.tensor = -1, tensor

  if rollout:
    groups = (result["groups_at_once"] or 0) // 2
    if groups:
      yield (f"config.rollout.groups={groups}",
             changed(lambda c: setattr(c.rollout, "groups", groups)))
    if config.rollout.prefix_dtype != "int8":
      yield ("config.rollout.prefix_dtype=int8",
             changed(lambda c: setattr(c.rollout, "prefix_dtype", "int8")))
  else:
    each = stage.prompts_per_step // stage.get("minibatches", 1) // (
        where.chips // result["mesh"]["tensor"])
    count = next((n for n in range(stage.microbatches + 1, each + 1) if each % n == 0), 0)
    if count:
      yield (f"config.stages[{index}].microbatches={count}",
             changed(lambda c: setattr(c.stages[index], "microbatches", count)))
    half = stage.get("part_tokens", 0) // 2
    if half >= 512:
      yield (f"config.stages[{index}].part_tokens={half}",
             changed(lambda c: setattr(c.stages[index], "part_tokens", half)))
    if config.model.remat != "full":
      yield "config.model.remat=full", changed(lambda c: setattr(c.model, "remat", "full"))
  tensor = 2 * result["mesh"]["tensor"]
  if where.chips % tensor == 0:
    yield f"config.mesh.tensor={tensor}", changed(lambda c: set_mesh(c, tensor))


# -- Search ---------------------------------------------------------------------------------------


def _fitted(config: Any, index: int, chips: int, tensor: int = 0) -> Any:
  """The config for so many chips: as many microbatches as set, or else as its prompts allow.

  Raises:
    UserError: its prompts cannot be split over so many.
  """
  tensor = tensor or config.mesh.tensor
  rows, stage = chips // tensor, config.stages[index]
  each, rest = divmod(stage.prompts_per_step // stage.get("minibatches", 1), rows)
  if rest or not each:
    raise UserError(
        f"config.stages[{index}].prompts_per_step={stage.prompts_per_step}: cannot be split over "
        f"{rows} rows of chips in {stage.get('minibatches', 1)} minibatches")
  other = copy.deepcopy(config)
  other.mesh.slice, other.mesh.fsdp, other.mesh.tensor = 1, rows, tensor
  other.stages[index].microbatches = max(
      n for n in range(1, each + 1) if each % n == 0 and n <= max(stage.microbatches, 1))
  return other


def meshes(request: Request, index: int, where: Any) -> list[tuple[int, Request]]:
  """Mesh shapes of a slice that could fit, by formula, each with its `tensor`; roomiest first.

  The formulas are within a factor of two of the compiler: what would not fit at half of what they
  say is left out.
  """
  from jaxrl_vlm import step

  model, found = step.architecture(request.config), []
  for tensor in (1, 2, 4, 8, 16):
    if where.chips % tensor or model.num_heads % tensor:
      continue
    with contextlib.suppress(UserError):
      config = _fitted(request.config, index, where.chips, tensor)
      length, patches = step.buckets(config, model, request.length, request.patches)
      plan = step.Plan(config, index, model, topology(where), where.chip.memory, length, patches,
                       request.response_tokens)
      shapes = plan.shapes
      holds = sum(plan.holds.values())
      needs = plan.programs.update_bytes(
          shapes.prompts, length, patches, shapes.group, shapes.tokens)
      if holds + needs / 2 <= where.chip.memory:
        found.append((holds + needs, tensor, dataclasses.replace(request, config=config)))
  return [(tensor, asked) for _, tensor, asked in sorted(found, key=lambda f: f[0])]


def smallest(request: Request, index: int, chip: Any) -> tuple[Any, dict[str, Any]]:
  """The smallest slice of a generation on which some mesh fits, and its plan.

  Raises:
    UserError: there is none.
  """
  from jaxrl_vlm import roofline

  for where in roofline.slices(chip):
    for tensor, asked in meshes(request, index, where):
      asked.say(f"{where.name}, config.mesh.tensor={tensor}")
      if plan_stage(asked, index, where, all_of_it=False)["fits"]:
        return where, plan_stage(asked, index, where)
    request.say(f"{where.name}: does not fit")
  raise UserError(
      f"--topology={chip.name}: no slice of up to {chip.slices[-1]} fits with any mesh; smaller "
      "config.prompt_buckets, or adapters (config.model.lora), need less")


def fastest(request: Request, index: int, where: Any) -> list[dict[str, Any]]:
  """Plans of all meshes of a slice that fit, the fastest first.

  Raises:
    UserError: none fits.
  """
  found = []
  for tensor, asked in meshes(request, index, where):
    asked.say(f"{where.name}, config.mesh.tensor={tensor}")
    result = plan_stage(asked, index, where, all_of_it=False)
    if result["fits"]:
      found.append(result)
  if not found:
    raise UserError(f"--topology={where.name}: no mesh fits; --search with "
                    f"--topology={where.chip.name} finds the smallest slice that does")
  return sorted(found, key=lambda result: result["step_seconds"])


# -- What is shown --------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns, the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  lines = [[cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(
      zip(row, widths, strict=True))] for row in (head, *rows)]
  return "\n".join("  ".join(line).rstrip() for line in lines)


def _number(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
  return "-" if value is None else f"{value / scale:.{digits}f}"


def memory_table(result: dict[str, Any]) -> str:
  rows = [[row["program"], *(_number(row[key], _GIB) for key in (
      "arguments", "temporaries", "needs", "beside", "peak")), "yes" if row["fits"] else "NO"]
          for row in result["programs"]]
  return table(["GiB on a chip", "arguments", "temporaries", "program", "beside", "peak", "fits"],
               rows)


def time_table(result: dict[str, Any]) -> str:
  kinds = list(dict.fromkeys(
      kind for row in result["programs"] for kind in row["collectives"] or ()))
  rows = []
  for row in result["programs"]:
    seconds, sent = row["seconds"] or {}, row["collectives"]
    rows.append([
        row["program"], f"{row['runs']:g}", _number(row["model_flops"], 1e12),
        _number(row["compiled_flops"], 1e12), _number(row["bytes"], 1e9, 1),
        *(_number(None if sent is None else sent.get(kind, 0.0), 1e9) for kind in kinds),
        *(_number(seconds.get(key), 1, 3) for key in ("compute", "HBM", "ICI")),
        row["bound"] or "-", _number(row["step_seconds"])])
  return table(["one run, one chip", "runs", "model TFLOP", "compiled", "HBM GB",
                *(f"{kind} GB" for kind in kinds), "compute s", "HBM s", "ICI s", "bound",
                "step s"], rows)


def report(result: dict[str, Any]) -> str:
  """A plan for people."""
  mesh = " ".join(f"{axis}={count}" for axis, count in result["mesh"].items() if count > 1)
  splash = sorted({name for row in result["programs"] for name in row["kernels"] or ()
                   if "splash" in name and row["program"] == "update"})
  lines = [
      f"{result['model']}, {result['objective']} on {result['topology']} ({result['chips']} chips, "
      f"{result['chip_memory'] / _GIB:.2f} GiB each), mesh {mesh or 'of one'}",
      f"{result['prompts']} prompts of {result['prompt_tokens']} tokens and {result['patches']} "
      f"patches, {result['samples']} samples of {result['response_tokens']:g} tokens (most "
      f"{result['max_tokens']}), {result['minibatches']} minibatches of {result['microbatches']} "
      f"microbatches, remat {result['remat']}, {result['groups_at_once']} groups decoded at once",
      "", memory_table(result), "", time_table(result), "",
      f"kernels of the update: {', '.join(splash) or 'none'}"]
  if result["step_seconds"] is None:
    lines.append("a step: not estimated, because not all of it compiles")
  else:
    total = result["step_seconds"]
    split = ", ".join(f"{part} {seconds:.1f} s ({seconds / total:.0%})"
                      for part, seconds in result["split"].items())
    lines.append(f"a step: at least {total:.1f} s: {split}")
    lines.append(f"response tokens a second and chip: at most "
                 f"{result['tokens_per_second_per_chip']:.0f}")
    lines.append("(a bound from the chip's numbers, not a measurement: nothing waits for the host, "
                 "no time is lost between programs)")
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
      args.config, *(_whole(args, name) for name in ("length", "patches", "response_tokens")),
      cache=pathlib.Path(args.cache).expanduser())
  if not args.config.stages:
    raise UserError("config.stages=(): expected at least one stage")
  with compiler():
    from jaxrl_vlm import roofline

    chip = roofline.find_chip(args.topology) if search and ":" not in args.topology else None
    where = None if chip is not None else roofline.find_slice(args.topology)
    results, complaints = [], []
    for index in range(len(args.config.stages)):
      if chip is not None:
        where, result = smallest(request, index, chip)
      elif search:
        result, *others = fastest(request, index, where)
        for other in (result, *others):
          mesh = " ".join(f"{axis}={count}" for axis, count in other["mesh"].items())
          say(f"{mesh}: at least {other['step_seconds']:.1f} s a step")
      else:
        result = plan_stage(request, index, where)
        if not result["fits"]:
          complaints.append(complaint(request, result, where))
      results.append(result)
  text = json.dumps({"stages": results}, indent=2)
  if args.out:
    pathlib.Path(args.out).write_text(text + "\n")
  print(text if as_json else "\n\n".join(map(report, results)))
  if complaints:
    raise UserError("; ".join(complaints))


def run(argv: Sequence[str] | None = None) -> None:
  """The command; --search and --json need no value."""
  words = list(sys.argv[1:] if argv is None else argv)
  sys.argv[1:] = [f"{word}=true" if word in ("--search", "--json") else word for word in words]
  config_lib.run_cli(main, "jaxrl_vlm.plan", ABOUT, FLAGS)


if __name__ == "__main__":
  run()

"""Compiles the programs of a stage for a TPU slice, on a machine without a TPU.

The result of each program is its memory, its work and an estimate of its time.

jax is imported only inside functions, after `prepare` has set the environment variables that make
libtpu a compiler only.
"""

import contextlib
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

from jaxrl_vlm.errors import UserError

LOCK = "jaxrl_vlm_libtpu.lock"  # in the directory for temporary files
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_MIN_LOG_LEVEL": "3",
}
# Plans ask for less optimization than runs, which shortens compilation. If the user has set the
# variable, its value is kept.
_EFFORT, _LEAST = "JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0"
# If planning may stop at the first program that does not fit, these are compiled first.
_LARGEST_FIRST = ("update", "score_masked", "score_reference", "score_ref", "score_base", "score")
_GIB = 2**30


def prepare() -> None:
  """Makes libtpu a compiler only. Call it before the first use of jax.

  It sets environment variables and JAX options, so that JAX runs on the CPU and libtpu does not
  look for a TPU.

  Raises:
    UserError: libtpu is not installed.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("libtpu, the TPU compiler, is not installed: pip install -e '.[plan]'")
  effort = os.environ.get(_EFFORT) or _LEAST
  os.environ.update({**_ENVIRONMENT, _EFFORT: effort})
  import jax

  # The variables have no effect if jax was imported before.
  jax.config.update("jax_platforms", _ENVIRONMENT["JAX_PLATFORMS"])
  jax.config.update(_EFFORT.lower(), float(effort))


@contextlib.contextmanager
def compiler() -> Iterator[None]:
  """Calls `prepare`, and reserves libtpu for this process.

  Only one process of a machine can use libtpu. Another process that enters this context waits until
  this one leaves it.
  """
  prepare()
  with open(pathlib.Path(tempfile.gettempdir()) / LOCK, "a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      say("waiting for another process that is compiling for TPUs")
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def say(text: str) -> None:
  """Prints progress to stderr."""
  print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Request:
  """The options of a command that apply to all of its plans.

  Attributes:
    config: config of the run.
    length: tokens of each prompt; 0 for the largest bucket of the config.
    patches: image patches of each prompt; 0 for the largest bucket that such a prompt can hold.
    response_tokens: tokens of each response; 0 for max_tokens.
    cache: directory where the results of compiled programs are stored.
    say: function that shows a line of progress.
  """

  config: Any
  length: int = 0
  patches: int = 0
  response_tokens: int = 0
  cache: pathlib.Path = pathlib.Path("plan")
  say: Callable[[str], None] = say


# -- One program ----------------------------------------------------------------------------------


def needed(message: str) -> float:
  """Returns the bytes that a program needs, from the compiler's error message.

  Args:
    message: the message for a program that does not fit into the memory of a chip.

  Raises:
    ValueError: the message contains no size.
  """
  for pattern in (
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
    r"Attempting to reserve ([\d.]+)([KMGT]?)",
  ):
    if match := re.search(pattern, message):
      return float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")
  raise ValueError(f"no size in the compiler's message {message[:200]!r}")


def compile_program(program: Any, tpu_slice: Any, request: Request) -> dict[str, Any]:
  """Compiles one program, or reads its result from the cache.

  Args:
    program: `step.StageProgram`.
    tpu_slice: `roofline.Slice`.
    request: options of the command.

  Returns:
    A result in JSON types: memory in bytes on each chip, and the cost (`hlo.Cost`). If the program
    is too large to compile, `compiled` is False, and only `needs` and `unused` are known.
  """
  import jax

  from jaxrl_vlm.planning import hlo

  began = time.monotonic()
  lowered = program.lower()
  versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
  versions += [effort] if (effort := os.environ.get(_EFFORT, _LEAST)) != _LEAST else []
  key = hashlib.sha256(
    "\n".join(
      map(
        str,
        (
          lowered.as_text(),
          tpu_slice.name,
          versions,
          program.steps,
          sorted(program.shares.items()),
          pathlib.Path(hlo.__file__).read_text(),
          pathlib.Path(__file__).read_text(),
          sorted(program.shardings),
        ),
      )
    ).encode()
  ).hexdigest()[:32]
  path = request.cache / f"{key}.json"
  if path.exists():
    request.say(f"{program.name}: read from the cache")
    return json.loads(path.read_text())
  result: dict[str, Any] = {"program": program.name, "topology": tpu_slice.name, "compiled": True}
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    result |= {"compiled": False, "needs": needed(str(error)), "unused": 0.0}
  else:
    memory = compiled.memory_analysis()
    result |= {
      "arguments": memory.argument_size_in_bytes,
      "outputs": memory.output_size_in_bytes,
      "aliased": memory.alias_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "unused": unused(compiled, lowered, program.shardings),
    }
    # The peak that the compiler compares with the memory of a chip, less the memory on the host,
    # which it includes. The sum of arguments, outputs and temporaries would be too large: where
    # results are written over arguments, the temporaries count some memory twice.
    result["needs"] = memory.peak_memory_in_bytes - (
      memory.host_argument_size_in_bytes
      + memory.host_output_size_in_bytes
      - memory.host_alias_size_in_bytes
      + memory.host_temp_size_in_bytes
    )
    result["cost"] = dataclasses.asdict(
      hlo.analyse(compiled.as_text(), program.steps, program.shares)
    )
  result["compile_seconds"] = round(time.monotonic() - began, 1)
  request.say(
    f"{program.name}: {result['compile_seconds']:.0f} s, {result['needs'] / _GIB:.1f} GiB"
    + ("" if result["compiled"] else ", more than a chip has")
  )
  request.cache.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix(f".{os.getpid()}")
  unfinished.write_text(json.dumps(result))
  unfinished.replace(path)
  return result


def unused(compiled: Any, lowered: Any, shardings: Any) -> float:
  """Returns the bytes on each device of arguments that the program does not use.

  JAX removes unused arguments from a compiled program, so the compiler does not count them. They
  still occupy memory while the program runs if they outlive it.

  Args:
    compiled: the compiled program.
    lowered: the program before compilation.
    shardings: `StageProgram.shardings`. Only these arguments are counted.
  """
  import jax
  from jax.sharding import NamedSharding

  from jaxrl_vlm import memory

  def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)

  total = 0.0
  formats, shapes = compiled.input_formats[0], lowered.args_info[0]
  for number, sharding in shardings.items():
    argument = leaves(shapes[number])
    each = [sharding] * len(argument) if isinstance(sharding, NamedSharding) else leaves(sharding)
    for form, shape, placed in zip(leaves(formats[number]), argument, each, strict=True):
      if shape is not None and (form is None or form.sharding is None):
        total += memory.held(jax.ShapeDtypeStruct(shape.shape, shape.dtype), placed)
  return total


# -- One stage ------------------------------------------------------------------------------------


def plan_stage(
  request: Request, index: int, tpu_slice: Any, all_of_it: bool = True
) -> dict[str, Any]:
  """Plans one stage on a slice.

  Args:
    request: options of the command.
    index: index of the stage in `config.stages`.
    tpu_slice: `roofline.Slice`.
    all_of_it: whether to compile all programs. If False, planning stops after the first program
      that does not fit.

  Returns:
    The plan in JSON types.
  """
  plan = stage_on(request, index, tpu_slice)
  stage = plan.plan()
  programs = stage.programs
  if not all_of_it:
    programs = sorted(
      programs,
      key=lambda p: (
        _LARGEST_FIRST.index(p.name) if p.name in _LARGEST_FIRST else len(_LARGEST_FIRST)
      ),
    )
  rows = []
  for program in programs:
    if not all_of_it and any(not row["fits"] for row in rows):
      break
    rows.append(_row(program, compile_program(program, tpu_slice, request), tpu_slice))
  order = [program.name for program in stage.programs]
  rows.sort(key=lambda row: order.index(row["program"]))
  return _summary(request, plan, stage, rows, tpu_slice)


def stage_on(request: Request, index: int, tpu_slice: Any) -> Any:
  """Returns the `step.Plan` of a stage on a slice, without compiling anything.

  Args:
    request: options of the command.
    index: index of the stage in `config.stages`.
    tpu_slice: `roofline.Slice`.
  """
  from jaxrl_vlm.planning import step

  config, model = request.config, step.architecture(request.config)
  length, patches = step.buckets(config, model, request.length, request.patches)
  return step.Plan(
    config,
    index,
    model,
    topology(tpu_slice),
    tpu_slice.chip.memory,
    length,
    patches,
    request.response_tokens,
  )


def topology(tpu_slice: Any) -> Sequence[Any]:
  """Returns descriptions of the devices of a slice, for compilation. They need not exist.

  Args:
    tpu_slice: `roofline.Slice`.

  Raises:
    UserError: another process is using libtpu.
  """
  import jax
  from jax.experimental import topologies

  # The two cores of a v4 chip are one device ("megacore"), as in runs on v4 and later generations.
  options = {"chip_config_name": "megacore"} if tpu_slice.chip.name == "v4" else {}
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=tpu_slice.name, **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    if "lockfile" not in str(error):
      raise
    raise UserError(
      "libtpu is in use by another process; try again when that process has ended"
    ) from error


def _row(program: Any, result: dict[str, Any], tpu_slice: Any) -> dict[str, Any]:
  from jaxrl_vlm.planning import roofline
  from jaxrl_vlm.planning.hlo import Cost

  peak = result["needs"] + result["unused"] + program.beside
  row = {
    "program": program.name,
    "part": program.phase,
    "runs": program.runs,
    **{key: result.get(key) for key in ("arguments", "outputs", "aliased", "temporaries")},
    "needs": result["needs"],
    "beside": result["unused"] + program.beside,
    "peak": peak,
    "fits": bool(result["compiled"] and peak <= tpu_slice.chip.memory),
    "model_flops": program.flops / tpu_slice.chips,
    "compiled_flops": None,
    "bytes": None,
    "collectives": None,
    "kernels": None,
    "seconds": None,
    "bound": None,
    "step_seconds": None,
    "unknown_loops": None,
    "compile_seconds": result["compile_seconds"],
  }
  if result["compiled"]:
    cost = Cost(**result["cost"])
    if any("splash" in name for name in cost.kernels):
      cost = cost + Cost(flops=program.kernels / tpu_slice.chips)
    least = roofline.bound(cost, tpu_slice)
    row |= {
      "compiled_flops": cost.flops,
      "bytes": cost.bytes,
      "collectives": cost.collectives,
      "kernels": cost.kernels,
      "unknown_loops": cost.unknown,
      "seconds": {"compute": least.compute, "HBM": least.memory, "ICI": least.links},
      "bound": least.resource,
      "step_seconds": least.seconds * program.runs,
    }
  return row


def _summary(
  request: Request, plan: Any, stage: Any, rows: list[dict[str, Any]], tpu_slice: Any
) -> dict[str, Any]:
  chosen = request.config.stages[plan.index]
  fits = all(row["fits"] for row in rows) and not stage.refusal
  result = {
    "model": pathlib.Path(request.config.model.path).name or "a new model",
    "stage": plan.index,
    "kind": chosen.kind,
    "objective": chosen.objective.name,
    "topology": tpu_slice.name,
    "chips": tpu_slice.chips,
    "chip_memory": tpu_slice.chip.memory,
    **stage.facts,
    "groups_at_once": plan.groups_at_once,
    "holds": stage.holds,
    "programs": rows,
    "fits": fits,
    "refusal": stage.refusal,
    "peak": max((row["peak"] for row in rows), default=0.0),
  }
  seconds = [row["step_seconds"] for row in rows if row["runs"]]
  if stage.refusal or any(value is None for value in seconds):
    return result | {"step_seconds": None, "tokens_per_second_per_chip": None, "split": {}}
  total = sum(seconds)
  phases = dict.fromkeys(row["part"] for row in rows if row["runs"])
  split = {
    phase: sum(row["step_seconds"] for row in rows if row["runs"] and row["part"] == phase)
    for phase in phases
  }
  return result | {
    "step_seconds": total,
    "split": split,
    "tokens_per_second_per_chip": stage.tokens / total / tpu_slice.chips,
  }

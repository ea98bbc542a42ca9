"""Programs compiled for TPUs that are not there: their memory, what they do, how long it takes.

jax is imported only within functions, once the environment is set by which libtpu compiles and does
nothing else.
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
# Unless it is set: less optimisation, which more than halves the time to compile.
_EFFORT, _LEAST = "JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0"
# The first to be compiled where one that does not fit is enough to know.
_LARGEST_FIRST = ("update", "score_masked", "score_reference", "score_ref", "score_base", "score")
_GIB = 2**30


def prepare() -> None:
  """Sets what makes of libtpu a compiler and nothing else; ahead of the first use of jax.

  Raises:
    UserError: libtpu is not installed.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("libtpu, the TPU compiler, is not installed: pip install -e '.[plan]'")
  effort = os.environ.get(_EFFORT) or _LEAST
  os.environ.update({**_ENVIRONMENT, _EFFORT: effort})
  import jax

  # Also where jax has been imported before.
  jax.config.update("jax_platforms", _ENVIRONMENT["JAX_PLATFORMS"])
  jax.config.update(_EFFORT.lower(), float(effort))


@contextlib.contextmanager
def compiler() -> Iterator[None]:
  """libtpu for this process alone, prepared: another that asks for it waits."""
  prepare()
  with open(pathlib.Path(tempfile.gettempdir()) / LOCK, "a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      say("waiting for another process that compiles for TPUs")
      fcntl.flock(lock, fcntl.LOCK_EX)
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
  for pattern in (
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
    r"Attempting to reserve ([\d.]+)([KMGT]?)",
  ):
    if found := re.search(pattern, message):
      return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")
  raise ValueError(f"no size in {message[:200]!r}")


def compile_piece(piece: Any, where: Any, request: Request) -> dict[str, Any]:
  """Memory and cost of one program: compiled, or from the cache."""
  import jax

  from jaxrl_vlm.planning import hlo

  began = time.monotonic()
  lowered = piece.lower()
  versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
  versions += [effort] if (effort := os.environ.get(_EFFORT, _LEAST)) != _LEAST else []
  key = hashlib.sha256(
    "\n".join(
      map(
        str,
        (
          lowered.as_text(),
          where.name,
          versions,
          piece.steps,
          sorted(piece.shares.items()),
          pathlib.Path(hlo.__file__).read_text(),
          pathlib.Path(__file__).read_text(),
          sorted(piece.places),
        ),
      )
    ).encode()
  ).hexdigest()[:32]
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
      "arguments": memory.argument_size_in_bytes,
      "outputs": memory.output_size_in_bytes,
      "aliased": memory.alias_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "unused": unused(compiled, lowered, piece.places),
    }
    # What the compiler holds against the memory of a chip; its temporaries count some of what is
    # written over arguments twice. It counts what lies in the host's memory too.
    result["needs"] = memory.peak_memory_in_bytes - (
      memory.host_argument_size_in_bytes
      + memory.host_output_size_in_bytes
      - memory.host_alias_size_in_bytes
      + memory.host_temp_size_in_bytes
    )
    result["cost"] = dataclasses.asdict(hlo.analyse(compiled.as_text(), piece.steps, piece.shares))
  result["compile_seconds"] = round(time.monotonic() - began, 1)
  request.say(
    f"{piece.name}: {result['compile_seconds']:.0f} s, {result['needs'] / _GIB:.1f} GiB"
    + ("" if result["compiled"] else ", too much")
  )
  request.cache.mkdir(parents=True, exist_ok=True)
  half = path.with_suffix(f".{os.getpid()}")
  half.write_text(json.dumps(result))
  half.replace(path)
  return result


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
  plan = stage_on(request, index, where)
  stage = plan.plan()
  pieces = stage.pieces
  if not all_of_it:
    pieces = sorted(
      pieces,
      key=lambda p: (
        _LARGEST_FIRST.index(p.name) if p.name in _LARGEST_FIRST else len(_LARGEST_FIRST)
      ),
    )
  rows = []
  for piece in pieces:
    if not all_of_it and any(not row["fits"] for row in rows):
      break
    rows.append(_row(piece, compile_piece(piece, where, request), where))
  order = [piece.name for piece in stage.pieces]
  rows.sort(key=lambda row: order.index(row["program"]))
  return _summary(request, plan, stage, rows, where)


def stage_on(request: Request, index: int, where: Any) -> Any:
  """A stage on a slice, `step.Plan`: nothing is compiled."""
  from jaxrl_vlm.planning import step

  config, model = request.config, step.architecture(request.config)
  length, patches = step.buckets(config, model, request.length, request.patches)
  return step.Plan(
    config,
    index,
    model,
    topology(where),
    where.chip.memory,
    length,
    patches,
    request.response_tokens,
  )


def topology(where: Any) -> Sequence[Any]:
  """The devices of a slice that need not be there."""
  import jax
  from jax.experimental import topologies

  # Two cores of a v4 chip are one device, as in any run since v4.
  options = {"chip_config_name": "megacore"} if where.chip.name == "v4" else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=where.name, **options).devices
  except jax.errors.JaxRuntimeError as error:
    if "lockfile" not in str(error):
      raise
    raise UserError("libtpu is in use by another process; try again when that has ended") from error


def _row(piece: Any, result: dict[str, Any], where: Any) -> dict[str, Any]:
  from jaxrl_vlm.planning import roofline
  from jaxrl_vlm.planning.hlo import Cost

  peak = result["needs"] + result["unused"] + piece.alive
  row = {
    "program": piece.name,
    "part": piece.part,
    "runs": piece.times,
    **{key: result.get(key) for key in ("arguments", "outputs", "aliased", "temporaries")},
    "needs": result["needs"],
    "beside": result["unused"] + piece.alive,
    "peak": peak,
    "fits": bool(result["compiled"] and peak <= where.chip.memory),
    "model_flops": piece.flops / where.chips,
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
      cost = cost + Cost(flops=piece.kernels / where.chips)
    least = roofline.bound(cost, where)
    row |= {
      "compiled_flops": cost.flops,
      "bytes": cost.bytes,
      "collectives": cost.collectives,
      "kernels": cost.kernels,
      "unknown_loops": cost.unknown,
      "seconds": {"compute": least.compute, "HBM": least.memory, "ICI": least.links},
      "bound": least.rules,
      "step_seconds": least.seconds * piece.times,
    }
  return row


def _summary(
  request: Request, plan: Any, stage: Any, rows: list[dict[str, Any]], where: Any
) -> dict[str, Any]:
  chosen = request.config.stages[plan.index]
  fits = all(row["fits"] for row in rows) and not stage.refusal
  result = {
    "model": pathlib.Path(request.config.model.path).name or "a new model",
    "stage": plan.index,
    "kind": chosen.kind,
    "objective": chosen.objective.name,
    "topology": where.name,
    "chips": where.chips,
    "chip_memory": where.chip.memory,
    **stage.facts,
    "groups_at_once": plan.at_once,
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
  parts = dict.fromkeys(row["part"] for row in rows if row["runs"])
  split = {
    part: sum(row["step_seconds"] for row in rows if row["runs"] and row["part"] == part)
    for part in parts
  }
  return result | {
    "step_seconds": total,
    "split": split,
    "tokens_per_second_per_chip": stage.tokens / total / where.chips,
  }

"""Counts the FLOPs, memory traffic and collective traffic of a compiled program from its HLO text.

All numbers are per device. They differ from XLA's own count (`compiled.cost_analysis()`), which
counts the body of a loop once and does not count collectives:

- A loop counts as often as it runs.
- A conditional counts as its most expensive branch, or as the average of its branches if the caller
  passes how often each one is taken.
- FLOPs are those of matrix products: `dot` instructions, and `convolution` instructions, into which
  the TPU compiler turns them. A multiplication and its addition count as 2 FLOPs.
- The FLOPs inside custom kernels (custom calls) are unknown. The kernels are only listed.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "tf32": 32, "c64": 64, "c128": 128}
# Instructions that move no data: they refer to existing values, or finish an operation that is
# already counted.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "add-dependency",
  "domain",
}
_FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound"}
_ALIASES = {"bitcast", "reshape", "copy", "convert"}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = r"%?([\w.\-]+)"


@dataclasses.dataclass
class Cost:
  """The work of one device in one run of a program.

  Attributes:
    flops: FLOPs of matrix products.
    bytes: bytes that instructions read from and write to the device's memory (HBM). A fused
      instruction counts only through its fusion. Arrays in on-chip memory do not count.
    collectives: bytes that the device sends, by kind of collective. With g devices and an unsharded
      array of n bytes, this is n (g-1)/g for all-gather, reduce-scatter and all-to-all, and
      2n (g-1)/g for all-reduce. For collective-permute, it is the bytes of the operand.
    kernels: how often each custom kernel runs, by name.
    unknown: number of loops whose trip count the text does not determine.
  """

  flops: float = 0.0
  bytes: float = 0.0
  collectives: dict[str, float] = dataclasses.field(default_factory=dict)
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)
  unknown: int = 0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.flops + other.flops,
      self.bytes + other.bytes,
      _merged(self.collectives, other.collectives, sum),
      _merged(self.kernels, other.kernels, sum),
      self.unknown + other.unknown,
    )

  def __mul__(self, times: float) -> "Cost":
    return Cost(
      self.flops * times,
      self.bytes * times,
      {k: v * times for k, v in self.collectives.items()},
      {k: v * times for k, v in self.kernels.items()},
      self.unknown,
    )

  @property
  def sent(self) -> float:
    """Bytes that the device sends in all collectives together."""
    return sum(self.collectives.values())

  def maximum(self, other: "Cost") -> "Cost":
    """Returns the larger of both costs for each number."""
    return Cost(
      max(self.flops, other.flops),
      max(self.bytes, other.bytes),
      _merged(self.collectives, other.collectives, max),
      _merged(self.kernels, other.kernels, max),
      max(self.unknown, other.unknown),
    )


def _merged(a: Mapping[str, float], b: Mapping[str, float], combine: Any) -> dict[str, float]:
  return {key: combine((a.get(key, 0.0), b.get(key, 0.0))) for key in (*a, *b)}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of an array.

  Attributes:
    dims: its dimensions.
    bits: bits per element.
    in_hbm: whether it is stored in the device's memory (HBM), not in on-chip memory.
  """

  dims: tuple[int, ...]
  bits: int
  in_hbm: bool = True

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * self.bits / 8 if self.in_hbm else 0.0


@dataclasses.dataclass
class Instruction:
  """One instruction (line) of a computation.

  Attributes:
    name: its name.
    op: its opcode, e.g. "dot".
    shapes: shapes of its results.
    operands: names of its operands.
    arguments: the text in the parentheses after the opcode.
    attributes: the text after these parentheses.
    root: whether it is the root of its computation.
  """

  name: str
  op: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  root: bool

  @property
  def bytes(self) -> float:
    return sum(shape.bytes for shape in self.shapes)

  def called(self, *keys: str) -> list[str]:
    """Returns the names of the computations in the attributes `keys`."""
    names: list[str] = []
    for key in keys:
      match = re.search(rf"[ ,]{key}=(?:\{{([^}}]*)\}}|{_NAME})", self.attributes)
      if match:
        names += re.findall(_NAME, match[1] if match[1] is not None else match[2])
    return names

  def numbers(self, key: str) -> list[int]:
    """Returns the numbers of an attribute of the form `key={1,2}`, or [] if it is absent."""
    match = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
    return [int(n) for n in match[1].split(",") if n] if match else []

  def number(self, key: str, default: int = 1) -> int:
    """Returns the number of an attribute of the form `key=1`, or `default` if it is absent."""
    match = re.search(rf"\b{key}=(\d+)", self.attributes)
    return int(match[1]) if match else default


@dataclasses.dataclass
class Computation:
  """A computation (function) of a program: its instructions by name.

  `users` maps the name of an instruction to the instructions that take its result as an operand,
  each with the position of that operand.
  """

  instructions: dict[str, Instruction]

  def __post_init__(self):
    self.users: dict[str, list[tuple[Instruction, int]]] = collections.defaultdict(list)
    for instruction in self.instructions.values():
      for position, operand in enumerate(instruction.operands):
        self.users[operand].append((instruction, position))

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(i.arguments): i for i in self.instructions.values() if i.op == "parameter"}

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)


def _shapes(text: str) -> tuple[Shape, ...]:
  shapes = []
  for kind, dims, layout in _SHAPE.findall(text):
    digits = re.search(r"\d+", kind)
    bits = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    shapes.append(Shape(sizes, bits, not re.search(r"S\([1-9]", layout)))
  return tuple(shapes)


def _closing(text: str, start: int) -> int:
  """Returns the position of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    if text[i] == "(":
      depth += 1
    elif text[i] == ")":
      depth -= 1
      if not depth:
        return i
  return len(text)


def _instruction(line: str) -> Instruction | None:
  head = re.match(rf"\s+(ROOT )?{_NAME} = ", line)
  if not head:
    return None
  text = line[head.end() :]
  end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
  opcode = re.match(r"\s*([\w\-]+)\(", text[end:])
  if not opcode:
    return None
  opening = end + opcode.end() - 1
  close = _closing(text, opening)
  arguments = re.sub(r"/\*.*?\*/", "", text[opening + 1 : close])
  operands: tuple[str, ...] = ()
  if opcode[1] not in ("parameter", "constant"):
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    if not operands and arguments and "[" not in arguments:
      operands = tuple(name.strip() for name in arguments.split(","))
  return Instruction(
    head[2], opcode[1], _shapes(text[:end]), operands, arguments, text[close + 1 :], bool(head[1])
  )


class Program:
  """A compiled program, parsed from its HLO text (`compiled.as_text()`).

  Attributes:
    devices: number of devices that run it.
    computations: its computations by name.
    entry: name of the computation that is the program.
  """

  def __init__(self, text: str):
    partitions, replicas = (
      re.search(rf"{kind}=(\d+)", text[:100_000]) for kind in ("num_partitions", "replica_count")
    )
    self.devices = (int(partitions[1]) if partitions else 1) * (int(replicas[1]) if replicas else 1)
    self.computations: dict[str, Computation] = {}
    self.entry = ""
    name, lines = "", {}
    for line in text.splitlines():
      head = re.match(rf"(ENTRY )?{_NAME} (?:\(.*)?\{{$", line)
      if head:
        name, lines = head[2], {}
        if head[1]:
          self.entry = name
      elif line.rstrip() == "}" and name:  # attributes of kernels span several lines
        self.computations[name] = Computation(lines)
        name = ""
      elif name and (instruction := _instruction(line)) is not None:
        lines[instruction.name] = instruction

  # -- Loops and devices --------------------------------------------------------------------------

  def trips(self, loop: Instruction, parent: Computation) -> int | None:
    """Returns how often a loop runs.

    The trip count is the one that the compiler states (`known_trip_count`). If there is none, it is
    computed from a counter that the condition of the loop compares with a constant upper limit. In
    that case, other conditions that can end the loop earlier are ignored.

    Args:
      loop: a `while` instruction.
      parent: the computation that contains it.

    Returns:
      The number of iterations, or None if the text does not determine it.
    """
    known = re.search(r"known_trip_count\D*(\d+)", loop.attributes)
    if known:
      return int(known[1])
    condition = self.computations.get((loop.called("condition") or [""])[0])
    if condition is None:
      return None
    for compare in self._compares(condition):
      direction = re.search(r"direction=(\w+)", compare[1].attributes)
      if direction is None or direction[1] not in ("LT", "LE", "GT", "GE"):
        continue
      scope, instruction = compare
      sides = [self._value(scope, name, loop, parent) for name in instruction.operands]
      if direction[1] in ("GT", "GE"):
        sides.reverse()
      (counter, start), (_, limit) = sides
      if counter is not None and start is not None and limit is not None:
        distance = max(0, limit - start + (direction[1] in ("LE", "GE")))
        return -(-distance // self._stride(loop, counter, parent))
    return None

  def _stride(self, loop: Instruction, counter: int, parent: Computation) -> int:
    """Returns what a loop's body adds to its counter: more than 1 if XLA has unrolled the loop."""
    body = self.computations[loop.called("body")[0]]
    if body.root.op != "tuple":
      return 1
    total, instruction = 0, body.instructions.get(body.root.operands[counter])
    while instruction is not None and instruction.op in (*_ALIASES, "add"):
      following = instruction.operands[0]
      if instruction.op == "add":
        values = [self._value(body, name, loop, parent) for name in instruction.operands]
        # One operand is a constant increment. Follow the other one back to the counter.
        follow = next(
          (i for i, (index, value) in enumerate(values) if index == counter or value is None), 0
        )
        total, following = total + (values[1 - follow][1] or 0), instruction.operands[follow]
      instruction = body.instructions.get(following)
    return max(total, 1)

  def _compares(self, condition: Computation) -> Iterator[tuple[Any, Instruction]]:
    """Yields the comparisons of a condition and of its fusions, each with its scope.

    The scope of a comparison is what `_value` needs to resolve its operands: the condition, or for
    a comparison in a fusion (fused computation, condition, fusion instruction).
    """
    for instruction in condition.instructions.values():
      if instruction.op == "compare":
        yield condition, instruction
      elif instruction.op == "fusion":
        inner = self.computations[instruction.called("calls")[0]]
        for nested in inner.instructions.values():
          if nested.op == "compare":
            yield (inner, condition, instruction), nested

  def _value(
    self, scope: Any, name: str, loop: Instruction, parent: Computation
  ) -> tuple[int | None, int | None]:
    """Returns the index of a value in the loop's state and its integer value before the loop.

    Each of the two is None if it is unknown. The index of a constant is None.
    """
    computation, *outer = scope if isinstance(scope, tuple) else (scope,)
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.op in _ALIASES:
      instruction = computation.instructions.get(instruction.operands[0])
    if instruction is None:
      return None, None
    if instruction.op == "constant":
      return None, _integer(instruction)
    if instruction.op == "parameter" and outer:
      return self._value(outer[0], outer[1].operands[int(instruction.arguments)], loop, parent)
    if instruction.op != "get-tuple-element":
      return None, None
    index, state = instruction.number("index", 0), parent.instructions.get(loop.operands[0])
    if state is None or state.op != "tuple":
      return index, None
    first = parent.instructions.get(state.operands[index])
    while first is not None and first.op in _ALIASES:
      first = parent.instructions.get(first.operands[0])
    return index, _integer(first) if first is not None and first.op == "constant" else None

  def group_size(self, instruction: Instruction) -> int:
    """Returns how many devices take part in a collective together (its replica group)."""
    attributes = instruction.attributes
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
      return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
      return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*?\{([^}]*)\}", attributes):
      sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
      used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
      return math.prod(int(size) if size else sizes[axis] for axis, size in used)
    return self.devices

  # -- Cost ---------------------------------------------------------------------------------------

  def cost(self, steps: float = 1, shares: Mapping[str, Sequence[float]] | None = None) -> Cost:
    """Returns the cost of the program, see `analyse`."""
    done: dict[tuple[str, bool], Cost] = {}

    def of_computation(name: str, fused: bool) -> Cost:
      if (name, fused) not in done:
        computation, total, counted = self.computations[name], Cost(), set()
        for instruction in computation.instructions.values():
          cost = of_instruction(instruction, computation, fused)
          # A collective that overlaps with several fusions appears in each of them.
          if cost.collectives and (channels := self._channels(instruction)):
            if channels <= counted:
              cost = dataclasses.replace(cost, collectives={})
            counted |= channels
          total = total + cost
        done[name, fused] = total
      return done[name, fused]

    def of_instruction(instruction: Instruction, parent: Computation, fused: bool) -> Cost:
      op = instruction.op
      if op == "while":
        count = self.trips(instruction, parent)
        (body,) = instruction.called("body")
        (condition,) = instruction.called("condition")
        if count is not None:
          return of_computation(body, fused) * count + of_computation(condition, fused) * (
            count + 1
          )
        return (
          of_computation(body, fused) * steps
          + of_computation(condition, fused) * (steps + 1)
          + Cost(unknown=1)
        )
      if op == "conditional":
        return self._chosen(
          instruction,
          [
            of_computation(name, fused)
            for name in instruction.called(
              "branch_computations", "true_computation", "false_computation"
            )
          ],
          shares or {},
        )
      if op in ("call", "async-start"):
        inner = instruction.called("to_apply", "calls")
        return sum((of_computation(name, fused) for name in inner), Cost())
      cost = Cost()
      if op == "fusion":
        (inner,) = instruction.called("calls")
        cost = of_computation(inner, True)
        if inner.startswith("all-reduce-scatter") and "all-reduce" in cost.collectives:
          # Each device keeps only its shard of the sum, and sends half of what an all-reduce sends.
          kinds = dict(cost.collectives)
          kinds["reduce-scatter"] = kinds.get("reduce-scatter", 0) + kinds.pop("all-reduce") / 2
          cost = dataclasses.replace(cost, collectives=kinds)
      kind = op.removesuffix("-start")
      if kind in COLLECTIVES:
        sent = self._sent(kind, instruction, parent)
        cost = cost + Cost(collectives={kind: sent} if sent else {})
      elif op == "dot":
        cost = cost + Cost(flops=_dot(instruction, parent))
      elif op == "convolution":
        cost = cost + Cost(flops=_convolution(instruction, parent))
      elif op == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if target and target[1] == "tpu_custom_call":
          cost = cost + Cost(kernels={re.sub(r"[.\d]+$", "", instruction.name): 1.0})
        elif target and target[1] in _FREE_CALLS:
          return cost
      if not fused:
        cost = cost + Cost(bytes=self.bytes_moved(instruction, parent))
      return cost

    return of_computation(self.entry, False)

  def _channels(self, instruction: Instruction) -> set[str]:
    """Returns the channels of the asynchronous collectives that a fusion overlaps with."""
    names = instruction.called("calls") if instruction.op == "fusion" else []
    return {
      channel
      for name in names
      if name.startswith("async_collective_fusion")
      for inner in self.computations[name].instructions.values()
      for channel in re.findall(r"channel_id=(\d+)", inner.attributes)
    }

  def _chosen(
    self, instruction: Instruction, branches: list[Cost], shares: Mapping[str, Sequence[float]]
  ) -> Cost:
    """Returns the cost of a conditional from the costs of its branches."""
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    for end, weights in shares.items():
      if name and name[1].endswith(end) and len(weights) == len(branches):
        return sum((b * w for b, w in zip(branches, weights, strict=True)), Cost())
    return functools.reduce(Cost.maximum, branches)

  def _sent(self, kind: str, instruction: Instruction, parent: Computation) -> float:
    """Returns the bytes that a device sends in a collective, from HBM or on-chip memory."""
    shapes = [s for name in instruction.operands for s in parent.instructions[name].shapes]
    size = sum(math.prod(s.dims) * s.bits / 8 for s in shapes)
    if kind == "collective-permute":
      return size
    devices = self.group_size(instruction)
    if kind == "all-gather":
      return size * (devices - 1)  # the operand is one shard of the result
    return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)

  def bytes_moved(self, instruction: Instruction, parent: Computation) -> float:
    """Returns the bytes that an instruction reads from and writes to the device's memory.

    Args:
      instruction: the instruction.
      parent: the computation that contains it.
    """
    op, operands = (
      instruction.op,
      [parent.instructions[n] for n in instruction.operands if n in parent.instructions],
    )
    if op in _FREE or op.endswith(("-done", "-update")):
      return 0.0
    if op in ("dynamic-slice", "slice", "gather"):
      return 2 * instruction.bytes
    if op == "dynamic-update-slice":
      return 2 * operands[1].bytes
    if op == "scatter":
      return 2 * sum(o.bytes for o in operands[len(operands) // 2 + 1 :])
    if op.endswith("-start"):  # the result includes the operands
      read = sum(o.bytes for o in operands)
      return read + max(instruction.bytes - read, 0.0)
    if op == "fusion":
      (inner,) = instruction.called("calls")
      read = sum(self._read(inner, i, o.bytes) for i, o in enumerate(operands))
      return read + self._written(inner, instruction.bytes)
    return instruction.bytes + sum(o.bytes for o in operands)

  def _read(self, name: str, number: int, most: float) -> float:
    """Returns the bytes that a fusion reads of one operand: all of it, or only slices.

    Args:
      name: the fused computation.
      number: index of the operand.
      most: bytes of the operand.
    """
    fused = self.computations[name]
    parameter = fused.parameters.get(number)
    if parameter is None or not most:
      return 0.0
    total, todo = 0.0, [parameter.name]
    while todo:
      value = todo.pop()
      for user, position in fused.users[value]:
        if user.op in ("bitcast", "reshape") and not user.root:
          todo.append(user.name)
        elif user.op in ("dynamic-slice", "slice", "gather") and position == 0:
          total += user.bytes
        elif user.op == "dynamic-update-slice" and position == 0:
          pass  # updated in place, not read
        elif user.op == "fusion":
          total += self._read(user.called("calls")[0], position, most)
        else:
          return most
    return min(total, most)

  def _written(self, name: str, most: float) -> float:
    """Returns the bytes that a fusion writes: all of its result, or only slices of it.

    Args:
      name: the fused computation.
      most: bytes of the result.
    """
    fused = self.computations[name]

    def of_result(instruction: Instruction) -> float:
      while instruction.op == "bitcast":
        instruction = fused.instructions[instruction.operands[0]]
      if instruction.op == "dynamic-update-slice":
        return fused.instructions[instruction.operands[1]].bytes
      if instruction.op == "fusion":
        return self._written(instruction.called("calls")[0], instruction.bytes)
      return instruction.bytes

    root = fused.root
    results: Iterable[Instruction] = [root]
    if root.op == "tuple":
      results = [fused.instructions[name] for name in root.operands]
    return min(most, sum(map(of_result, results)))


def _integer(constant: Instruction) -> int | None:
  return int(constant.arguments) if re.fullmatch(r"-?\d+", constant.arguments) else None


def _dot(instruction: Instruction, parent: Computation) -> float:
  left = parent.instructions[instruction.operands[0]].shapes[0].dims
  summed = math.prod(left[i] for i in instruction.numbers("lhs_contracting_dims"))
  return 2.0 * math.prod(instruction.shapes[0].dims) * summed


def _convolution(instruction: Instruction, parent: Computation) -> float:
  """Returns the FLOPs of a convolution.

  Only products of an input element and a window element count. Window elements that fall into
  padding, or between elements of a dilated input, have no product.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  assert labels, instruction.attributes
  left, right = (parent.instructions[name].shapes[0].dims for name in instruction.operands[:2])
  out = instruction.shapes[0].dims
  options = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}

  def option(key: str, axis: int, default: str) -> str:
    return options[key].split("x")[axis] if key in options else default

  pairs = 1
  for axis, label in enumerate(c for c in labels[3] if c.isdigit()):
    low, _ = option("pad", axis, "0_0").split("_")
    pairs *= _pairs(
      left[labels[1].index(label)],
      right[labels[2].index(label)],
      out[labels[3].index(label)],
      int(option("stride", axis, "1")),
      int(low),
      int(option("lhs_dilate", axis, "1")),
      int(option("rhs_dilate", axis, "1")),
    )
  features = out[labels[3].index("f")] * right[labels[2].index("i")]
  rows = left[labels[1].index("b")] // instruction.number("batch_group_count")
  return 2.0 * rows * features * pairs


@functools.lru_cache(maxsize=4096)
def _pairs(
  size: int, kernel: int, out: int, stride: int, padding: int, lhs_dilation: int, rhs_dilation: int
) -> int:
  """Returns the number of products of an input and a window element along one axis.

  Args:
    size, kernel, out: lengths of the input, the window and the output.
    stride: stride of the window.
    padding: padding before the input.
    lhs_dilation, rhs_dilation: dilations of the input and of the window.
  """
  last = (size - 1) * lhs_dilation
  starts = np.arange(out) * stride - padding
  total = 0
  for k in range(kernel):
    positions = starts + k * rhs_dilation
    inside = (positions >= 0) & (positions <= last) & (positions % lhs_dilation == 0)
    total += int(inside.sum())
  return total


def analyse(
  text: str, steps: float = 1, shares: Mapping[str, Sequence[float]] | None = None
) -> Cost:
  """Returns the work of one device in one run of a compiled program.

  Args:
    text: `compiled.as_text()`.
    steps: trip count of loops whose trip count the text does not determine.
    shares: how often each branch of a conditional is taken, from 0 to 1. The key is the end of the
      name that JAX gives to the conditional. Other conditionals count as their most expensive
      branch, separately for each number of the cost.
  """
  return Program(text).cost(steps, shares)

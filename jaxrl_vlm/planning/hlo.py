"""What a compiled program does, read from its text: FLOPs, bytes of memory, bytes of collectives.

XLA's own count (`compiled.cost_analysis()`) takes the body of a loop once, and knows no
collectives. Here every loop counts as often as it runs, a condition as its dearest branch, or as
the caller says how often each is taken. All numbers are of one device.

FLOPs are those of products of matrices (`dot`, and `convolution`, which is what becomes of them on
TPU), 2 for a multiplication and its addition. Kernels (custom calls) are opaque: they are listed.
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
# What moves nothing by itself: names for what is there, and ends of what has been counted.
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
  """What one device does in one run of a program.

  Attributes:
    flops: of products of matrices.
    bytes: read from and written to the device's memory by instructions that are not part of
      another one; what lies in memory on the chip does not count.
    collectives: by kind, bytes that the device sends: of an array of n bytes in a group of g
      devices n (g-1)/g to gather, to scatter or to swap it, twice that to sum it everywhere.
    kernels: how often each custom call runs, by name.
    unknown: loops of which the text does not say how often they run.
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
    """Bytes that the device sends in all collectives."""
    return sum(self.collectives.values())

  def dearest(self, other: "Cost") -> "Cost":
    """The larger of each number."""
    return Cost(
      max(self.flops, other.flops),
      max(self.bytes, other.bytes),
      _merged(self.collectives, other.collectives, max),
      _merged(self.kernels, other.kernels, max),
      max(self.unknown, other.unknown),
    )


def _merged(a: Mapping[str, float], b: Mapping[str, float], how: Any) -> dict[str, float]:
  return {key: how((a.get(key, 0.0), b.get(key, 0.0))) for key in (*a, *b)}


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array: its dimensions, the bits of a number, and whether it lies in the device's memory."""

  dims: tuple[int, ...]
  bits: int
  here: bool = True

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * self.bits / 8 if self.here else 0.0


@dataclasses.dataclass
class Instruction:
  """A line of a computation; `rest` is what stands behind the operands."""

  name: str
  op: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  inside: str
  rest: str
  root: bool

  @property
  def bytes(self) -> float:
    return sum(shape.bytes for shape in self.shapes)

  def called(self, *keys: str) -> list[str]:
    """Computations that the attributes `keys` name."""
    names: list[str] = []
    for key in keys:
      found = re.search(rf"[ ,]{key}=(?:\{{([^}}]*)\}}|{_NAME})", self.rest)
      if found:
        names += re.findall(_NAME, found[1] if found[1] is not None else found[2])
    return names

  def numbers(self, key: str) -> list[int]:
    """The attribute `key={1,2}`."""
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.rest)
    return [int(n) for n in found[1].split(",") if n] if found else []

  def number(self, key: str, default: int = 1) -> int:
    found = re.search(rf"\b{key}=(\d+)", self.rest)
    return int(found[1]) if found else default


@dataclasses.dataclass
class Computation:
  instructions: dict[str, Instruction]

  def __post_init__(self):
    self.users: dict[str, list[tuple[Instruction, int]]] = collections.defaultdict(list)
    for instruction in self.instructions.values():
      for position, operand in enumerate(instruction.operands):
        self.users[operand].append((instruction, position))

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(i.inside): i for i in self.instructions.values() if i.op == "parameter"}

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)


def _shapes(text: str) -> tuple[Shape, ...]:
  found = []
  for kind, dims, layout in _SHAPE.findall(text):
    digits = re.search(r"\d+", kind)
    bits = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    found.append(Shape(sizes, bits, not re.search(r"S\([1-9]", layout)))
  return tuple(found)


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
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
  found = re.match(r"\s*([\w\-]+)\(", text[end:])
  if not found:
    return None
  opening = end + found.end() - 1
  close = _closing(text, opening)
  inside = re.sub(r"/\*.*?\*/", "", text[opening + 1 : close])
  operands: tuple[str, ...] = ()
  if found[1] not in ("parameter", "constant"):
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if not operands and inside and "[" not in inside:
      operands = tuple(name.strip() for name in inside.split(","))
  return Instruction(
    head[2], found[1], _shapes(text[:end]), operands, inside, text[close + 1 :], bool(head[1])
  )


class Program:
  """The computations of a program's text."""

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
      elif line.rstrip() == "}" and name:  # attributes of kernels go over several lines
        self.computations[name] = Computation(lines)
        name = ""
      elif name and (found := _instruction(line)) is not None:
        lines[found.name] = found

  # -- Loops and groups ---------------------------------------------------------------------------

  def trips(self, loop: Instruction, inside: Computation) -> int | None:
    """How often a loop runs; None if the text does not say so.

    From what the compiler notes, or from a counter that the condition compares with a constant
    from above; what else ends the loop earlier is not looked at.
    """
    noted = re.search(r"known_trip_count\D*(\d+)", loop.rest)
    if noted:
      return int(noted[1])
    condition = self.computations.get((loop.called("condition") or [""])[0])
    if condition is None:
      return None
    for compare in self._compares(condition):
      direction = re.search(r"direction=(\w+)", compare[1].rest)
      if direction is None or direction[1] not in ("LT", "LE", "GT", "GE"):
        continue
      where, instruction = compare
      sides = [self._value(where, name, loop, inside) for name in instruction.operands]
      if direction[1] in ("GT", "GE"):
        sides.reverse()
      (counter, start), (_, limit) = sides
      if counter is not None and start is not None and limit is not None:
        way = max(0, limit - start + (direction[1] in ("LE", "GE")))
        return -(-way // self._stride(loop, counter, inside))
    return None

  def _stride(self, loop: Instruction, counter: int, inside: Computation) -> int:
    """What a loop's body adds to its counter: more than 1 where XLA has unrolled it."""
    body = self.computations[loop.called("body")[0]]
    if body.root.op != "tuple":
      return 1
    total, at = 0, body.instructions.get(body.root.operands[counter])
    while at is not None and at.op in (*_ALIASES, "add"):
      following = at.operands[0]
      if at.op == "add":
        values = [self._value(body, name, loop, inside) for name in at.operands]
        # The one that is no number, or else the counter itself, leads on.
        follow = next(
          (i for i, (number, value) in enumerate(values) if number == counter or value is None), 0
        )
        total, following = total + (values[1 - follow][1] or 0), at.operands[follow]
      at = body.instructions.get(following)
    return max(total, 1)

  def _compares(self, condition: Computation) -> Iterator[tuple[Any, Instruction]]:
    """Comparisons of a condition, within its fusions too."""
    for instruction in condition.instructions.values():
      if instruction.op == "compare":
        yield condition, instruction
      elif instruction.op == "fusion":
        inner = self.computations[instruction.called("calls")[0]]
        for nested in inner.instructions.values():
          if nested.op == "compare":
            yield (inner, condition, instruction), nested

  def _value(
    self, where: Any, name: str, loop: Instruction, inside: Computation
  ) -> tuple[int | None, int | None]:
    """(its number in the loop's state, the integer it is before the loop) of an operand."""
    here, *outer = where if isinstance(where, tuple) else (where,)
    instruction = here.instructions.get(name)
    while instruction is not None and instruction.op in _ALIASES:
      instruction = here.instructions.get(instruction.operands[0])
    if instruction is None:
      return None, None
    if instruction.op == "constant":
      return None, _integer(instruction)
    if instruction.op == "parameter" and outer:
      return self._value(outer[0], outer[1].operands[int(instruction.inside)], loop, inside)
    if instruction.op != "get-tuple-element":
      return None, None
    number, state = instruction.number("index", 0), inside.instructions.get(loop.operands[0])
    if state is None or state.op != "tuple":
      return number, None
    first = inside.instructions.get(state.operands[number])
    while first is not None and first.op in _ALIASES:
      first = inside.instructions.get(first.operands[0])
    return number, _integer(first) if first is not None and first.op == "constant" else None

  def group(self, instruction: Instruction) -> int:
    """How many devices a collective is among."""
    rest = instruction.rest
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
      return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
      return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*?\{([^}]*)\}", rest):
      sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
      used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])
      return math.prod(int(part) if part else sizes[axis] for axis, part in used)
    return self.devices

  # -- Cost ---------------------------------------------------------------------------------------

  def cost(self, steps: float = 1, shares: Mapping[str, Sequence[float]] | None = None) -> Cost:
    """See `analyse`."""
    done: dict[tuple[str, bool], Cost] = {}

    def of(name: str, fused: bool) -> Cost:
      if (name, fused) not in done:
        here, total, under_way = self.computations[name], Cost(), set()
        for instruction in here.instructions.values():
          cost = one(instruction, here, fused)
          # A collective that goes on while several fusions compute stands in each of them.
          if cost.collectives and (channels := self._channels(instruction)):
            if channels <= under_way:
              cost = dataclasses.replace(cost, collectives={})
            under_way |= channels
          total = total + cost
        done[name, fused] = total
      return done[name, fused]

    def one(instruction: Instruction, here: Computation, fused: bool) -> Cost:
      op = instruction.op
      if op == "while":
        count = self.trips(instruction, here)
        (body,) = instruction.called("body")
        (condition,) = instruction.called("condition")
        if count is not None:
          return of(body, fused) * count + of(condition, fused) * (count + 1)
        return of(body, fused) * steps + of(condition, fused) * (steps + 1) + Cost(unknown=1)
      if op == "conditional":
        return self._chosen(
          instruction,
          [
            of(name, fused)
            for name in instruction.called(
              "branch_computations", "true_computation", "false_computation"
            )
          ],
          shares or {},
        )
      if op in ("call", "async-start"):
        inner = instruction.called("to_apply", "calls")
        return sum((of(name, fused) for name in inner), Cost())
      cost = Cost()
      if op == "fusion":
        (inner,) = instruction.called("calls")
        cost = of(inner, True)
        if inner.startswith("all-reduce-scatter") and "all-reduce" in cost.collectives:
          # Of a sum everywhere each keeps its own part: half of what it would send.
          moved = dict(cost.collectives)
          moved["reduce-scatter"] = moved.get("reduce-scatter", 0) + moved.pop("all-reduce") / 2
          cost = dataclasses.replace(cost, collectives=moved)
      kind = op.removesuffix("-start")
      if kind in COLLECTIVES:
        sent = self._sent(kind, instruction, here)
        cost = cost + Cost(collectives={kind: sent} if sent else {})
      elif op == "dot":
        cost = cost + Cost(flops=_dot(instruction, here))
      elif op == "convolution":
        cost = cost + Cost(flops=_convolution(instruction, here))
      elif op == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        if target and target[1] == "tpu_custom_call":
          cost = cost + Cost(kernels={re.sub(r"[.\d]+$", "", instruction.name): 1.0})
        elif target and target[1] in _FREE_CALLS:
          return cost
      if not fused:
        cost = cost + Cost(bytes=self.moved(instruction, here))
      return cost

    return of(self.entry, False)

  def _channels(self, instruction: Instruction) -> set[str]:
    """Channels of collectives that a fusion only takes a part of."""
    names = instruction.called("calls") if instruction.op == "fusion" else []
    return {
      channel
      for name in names
      if name.startswith("async_collective_fusion")
      for inner in self.computations[name].instructions.values()
      for channel in re.findall(r"channel_id=(\d+)", inner.rest)
    }

  def _chosen(
    self, instruction: Instruction, branches: list[Cost], shares: Mapping[str, Sequence[float]]
  ) -> Cost:
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    for end, weights in shares.items():
      if name and name[1].endswith(end) and len(weights) == len(branches):
        return sum((b * w for b, w in zip(branches, weights, strict=True)), Cost())
    return functools.reduce(Cost.dearest, branches)

  def _sent(self, kind: str, instruction: Instruction, here: Computation) -> float:
    """Bytes that a device sends; those in memory on the chip too."""
    given = [s for name in instruction.operands for s in here.instructions[name].shapes]
    size = sum(math.prod(s.dims) * s.bits / 8 for s in given)
    if kind == "collective-permute":
      return size
    group = self.group(instruction)
    if kind == "all-gather":
      return size * (group - 1)  # each has a part
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)

  def moved(self, instruction: Instruction, here: Computation) -> float:
    """Bytes that an instruction reads from and writes to the device's memory."""
    op, operands = (
      instruction.op,
      [here.instructions[n] for n in instruction.operands if n in here.instructions],
    )
    if op in _FREE or op.endswith(("-done", "-update")):
      return 0.0
    if op in ("dynamic-slice", "slice", "gather"):
      return 2 * instruction.bytes
    if op == "dynamic-update-slice":
      return 2 * operands[1].bytes
    if op == "scatter":
      return 2 * sum(o.bytes for o in operands[len(operands) // 2 + 1 :])
    if op.endswith("-start"):  # what is given stands in the result too
      given = sum(o.bytes for o in operands)
      return given + max(instruction.bytes - given, 0.0)
    if op == "fusion":
      (inner,) = instruction.called("calls")
      read = sum(self._read(inner, i, o.bytes) for i, o in enumerate(operands))
      return read + self._written(inner, instruction.bytes)
    return instruction.bytes + sum(o.bytes for o in operands)

  def _read(self, name: str, number: int, most: float) -> float:
    """What a fusion reads of an operand of so many bytes: all of it, or only slices."""
    here = self.computations[name]
    parameter = here.parameters.get(number)
    if parameter is None or not most:
      return 0.0
    total, todo = 0.0, [parameter.name]
    while todo:
      at = todo.pop()
      for user, position in here.users[at]:
        if user.op in ("bitcast", "reshape") and not user.root:
          todo.append(user.name)
        elif user.op in ("dynamic-slice", "slice", "gather") and position == 0:
          total += user.bytes
        elif user.op == "dynamic-update-slice" and position == 0:
          pass  # it is changed where it lies
        elif user.op == "fusion":
          total += self._read(user.called("calls")[0], position, most)
        else:
          return most
    return min(total, most)

  def _written(self, name: str, most: float) -> float:
    """What a fusion writes, whose result has so many bytes: all of it, or a slice."""
    here = self.computations[name]

    def one(instruction: Instruction) -> float:
      while instruction.op == "bitcast":
        instruction = here.instructions[instruction.operands[0]]
      if instruction.op == "dynamic-update-slice":
        return here.instructions[instruction.operands[1]].bytes
      if instruction.op == "fusion":
        return self._written(instruction.called("calls")[0], instruction.bytes)
      return instruction.bytes

    root = here.root
    parts: Iterable[Instruction] = [root]
    if root.op == "tuple":
      parts = [here.instructions[name] for name in root.operands]
    return min(most, sum(map(one, parts)))


def _integer(constant: Instruction) -> int | None:
  return int(constant.inside) if re.fullmatch(r"-?\d+", constant.inside) else None


def _dot(instruction: Instruction, here: Computation) -> float:
  left = here.instructions[instruction.operands[0]].shapes[0].dims
  summed = math.prod(left[i] for i in instruction.numbers("lhs_contracting_dims"))
  return 2.0 * math.prod(instruction.shapes[0].dims) * summed


def _convolution(instruction: Instruction, here: Computation) -> float:
  """Pairs of numbers that meet: what falls into padding or between dilated ones does not count."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
  window = re.search(r"window=\{([^}]*)\}", instruction.rest)
  assert labels, instruction.rest
  left, right = (here.instructions[name].shapes[0].dims for name in instruction.operands[:2])
  out = instruction.shapes[0].dims
  given = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}

  def of(key: str, axis: int, default: str) -> str:
    return given[key].split("x")[axis] if key in given else default

  pairs = 1
  for axis, label in enumerate(c for c in labels[3] if c.isdigit()):
    low, _ = of("pad", axis, "0_0").split("_")
    pairs *= _met(
      left[labels[1].index(label)],
      right[labels[2].index(label)],
      out[labels[3].index(label)],
      int(of("stride", axis, "1")),
      int(low),
      int(of("lhs_dilate", axis, "1")),
      int(of("rhs_dilate", axis, "1")),
    )
  features = out[labels[3].index("f")] * right[labels[2].index("i")]
  rows = left[labels[1].index("b")] // instruction.number("batch_group_count")
  return 2.0 * rows * features * pairs


@functools.lru_cache(maxsize=4096)
def _met(size: int, kernel: int, out: int, stride: int, low: int, spread: int, reach: int) -> int:
  """Positions of one axis at which a number of the window meets one of the input."""
  most = (size - 1) * spread
  ends = np.arange(out) * stride - low
  total = 0
  for k in range(kernel):
    at = ends + k * reach
    total += int(((at >= 0) & (at <= most) & (at % spread == 0)).sum())
  return total


def analyse(
  text: str, steps: float = 1, shares: Mapping[str, Sequence[float]] | None = None
) -> Cost:
  """What one device does in one run of a program.

  Args:
    text: `compiled.as_text()`.
    steps: how often loops run of which the text does not say it.
    shares: how often each branch of a condition is taken, from 0 to 1, by the end of the name
      that JAX gives to the condition; of others every number is that of the dearest branch.
  """
  return Program(text).cost(steps, shares)

"""TPU chips and slices, and how fast a program could run on them at best.

A program takes at least as long as the busiest of three: the matrix units with its FLOPs, the
memory with its bytes, the links to the neighbours with what its collectives send. It is a bound: it
takes for granted that the three work at once, each at its full speed, and knows nothing of what is
not a product of matrices.
"""

import dataclasses
import math
from collections.abc import Mapping

from jaxrl_vlm.errors import UserError, hint
from jaxrl_vlm.planning.hlo import Cost

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip of a generation of TPUs.

  Attributes:
    name: "v5e" ...
    flops: of bfloat16 in a second.
    memory: bytes that programs can have; what libtpu's compiler names as available.
    bandwidth: of the memory, bytes in a second.
    link: bytes that one link to a neighbour sends in a second.
    slices: the shapes that can be had, from 4 to 256 chips.
    around: links lead around along a side of a slice that is a multiple of this, if `cubes` asks
      nothing else.
    cubes: only where all sides are such.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  link: float
  slices: tuple[str, ...]
  around: int
  cubes: bool


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")

# From docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (November 2026). A link's rate is half of
# the chip's bidirectional bandwidth by its ports: 300, 200, 600 and 400 GB/s one way by 6, 4, 6
# and 4. Memory: libtpu 0.0.44, "available HBM" in its message where a program is too large.
CHIPS: Mapping[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 30.75 * GIB, 1228e9, 50e9, _DEEP, 4, True),
    Chip("v5e", 197e12, 15.75 * GIB, 819e9, 50e9, _FLAT, 16, False),
    Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, _DEEP, 4, True),
    Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, _FLAT, 16, False),
  )
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips that are connected by their own links."""

  chip: Chip
  sides: tuple[int, ...]

  @property
  def name(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

  @property
  def chips(self) -> int:
    return math.prod(self.sides)

  @property
  def links(self) -> int:
    """Of the chip with the fewest: one in a corner, or any where all links lead around."""
    round_trip = [side % self.chip.around == 0 for side in self.sides]
    if self.chip.cubes and not all(round_trip):
      round_trip = [False] * len(self.sides)
    return sum(
      0 if side == 1 else 2 if leads else 1
      for side, leads in zip(self.sides, round_trip, strict=True)
    )


def find_slice(name: str) -> Slice:
  """The slice that `--topology` names, e.g. "v5e:4x4".

  Raises:
    UserError: there is none of this name; says which there are.
  """
  generation, _, sides = name.partition(":")
  chip = CHIPS.get(generation)
  if chip is not None and sides in chip.slices:
    return Slice(chip, tuple(map(int, sides.split("x"))))
  every = [f"{c.name}:{sides}" for c in CHIPS.values() for sides in c.slices]
  raise UserError(f"--topology={name}: no such topology; {_near(name, every)}{_listed(chip)}")


def find_chip(name: str) -> Chip:
  """The generation of a name, e.g. "v5e"."""
  if name not in CHIPS:
    raise UserError(f"--topology={name}: no such TPU; {hint(name, CHIPS)}")
  return CHIPS[name]


def _near(name: str, every: list[str]) -> str:
  found = hint(name, every)
  return f"{found.removesuffix('?')}? " if found.startswith("did you mean") else ""


def _listed(chip: Chip | None) -> str:
  chips = CHIPS.values() if chip is None else (chip,)
  return "valid: " + "; ".join(f"{c.name}:{{{','.join(c.slices)}}}" for c in chips)


def slices(chip: Chip) -> list[Slice]:
  """All of a generation, the smallest first."""
  return [Slice(chip, tuple(map(int, sides.split("x")))) for sides in chip.slices]


@dataclasses.dataclass(frozen=True)
class Bound:
  """Seconds that a program takes at least, by what it waits for."""

  compute: float
  memory: float
  links: float

  @property
  def seconds(self) -> float:
    return max(self.compute, self.memory, self.links)

  @property
  def rules(self) -> str:
    """What takes longest: "compute", "HBM" or "ICI"."""
    return max(
      ("compute", self.compute), ("HBM", self.memory), ("ICI", self.links), key=lambda pair: pair[1]
    )[0]


def bound(cost: Cost, where: Slice) -> Bound:
  """The least time of a program with this cost on every chip of a slice."""
  chip = where.chip
  links = cost.sent / (where.links * chip.link) if where.links else 0.0
  return Bound(cost.flops / chip.flops, cost.bytes / chip.bandwidth, links)

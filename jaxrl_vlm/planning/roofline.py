"""TPU chips and slices, and a roofline model: a lower bound on the time of a program on them.

A program takes at least as long as its slowest resource needs:

- the matrix units, for its FLOPs;
- the memory (HBM), for the bytes that it reads and writes;
- the links to neighbouring chips (ICI), for the bytes that its collectives send.

The bound assumes that all three work at the same time, each at its peak rate. It ignores all
computation other than matrix products.
"""

import dataclasses
import math
from collections.abc import Mapping

from jaxrl_vlm.errors import UserError, hint
from jaxrl_vlm.planning.hlo import Cost

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip of a TPU generation.

  Attributes:
    name: the generation, e.g. "v5e".
    flops: peak bfloat16 FLOPs per second.
    memory: bytes available to programs, as reported by libtpu's compiler.
    bandwidth: bytes per second of the memory.
    link: bytes per second that one link to a neighbour sends.
    slices: the available slice shapes with 4 to 256 chips.
    wraparound: a side of a slice has wraparound links if its length is a multiple of this number.
    all_sides: whether a slice has wraparound links only if all of its sides qualify.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  link: float
  slices: tuple[str, ...]
  wraparound: int
  all_sides: bool


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")

# From docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (November 2026). The rate of a link is half
# of the chip's bidirectional bandwidth divided by its ports: 300, 200, 600 and 400 GB/s in one
# direction, divided by 6, 4, 6 and 4. Memory is the "available HBM" in the error message of
# libtpu 0.0.44 for a program that is too large.
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
  """TPU chips that are connected by their own links (ICI).

  Attributes:
    chip: the chips.
    sides: number of chips along each side.
  """

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
    """Number of links of the chip with the fewest, for example of a chip in a corner."""
    wraps = [side % self.chip.wraparound == 0 for side in self.sides]
    if self.chip.all_sides and not all(wraps):
      wraps = [False] * len(self.sides)
    return sum(
      0 if side == 1 else 2 if wrap else 1 for side, wrap in zip(self.sides, wraps, strict=True)
    )


def find_slice(name: str) -> Slice:
  """Returns the slice of a name, the value of `--topology`.

  Args:
    name: e.g. "v5e:4x4".

  Raises:
    UserError: there is no such slice. The message lists the valid names.
  """
  generation, _, sides = name.partition(":")
  chip = CHIPS.get(generation)
  if chip is not None and sides in chip.slices:
    return Slice(chip, tuple(map(int, sides.split("x"))))
  every = [f"{c.name}:{sides}" for c in CHIPS.values() for sides in c.slices]
  raise UserError(f"--topology={name}: no such topology; {_near(name, every)}{_listed(chip)}")


def find_chip(name: str) -> Chip:
  """Returns the chip of a generation, e.g. "v5e".

  Raises:
    UserError: there is no such generation.
  """
  if name not in CHIPS:
    raise UserError(f"--topology={name}: no such TPU; {hint(name, CHIPS)}")
  return CHIPS[name]


def _near(name: str, every: list[str]) -> str:
  nearest = hint(name, every)
  return f"{nearest.removesuffix('?')}? " if nearest.startswith("did you mean") else ""


def _listed(chip: Chip | None) -> str:
  chips = CHIPS.values() if chip is None else (chip,)
  return "valid: " + "; ".join(f"{c.name}:{{{','.join(c.slices)}}}" for c in chips)


def slices(chip: Chip) -> list[Slice]:
  """Returns the available slices of a generation, the smallest first."""
  return [Slice(chip, tuple(map(int, sides.split("x")))) for sides in chip.slices]


@dataclasses.dataclass(frozen=True)
class Bound:
  """The least seconds that a program takes on each resource.

  Attributes:
    compute: seconds of the matrix units.
    memory: seconds of the memory (HBM).
    links: seconds of the links (ICI).
  """

  compute: float
  memory: float
  links: float

  @property
  def seconds(self) -> float:
    """The least seconds of the program: those of its slowest resource."""
    return max(self.compute, self.memory, self.links)

  @property
  def resource(self) -> str:
    """The slowest resource: "compute", "HBM" or "ICI"."""
    return max(
      ("compute", self.compute), ("HBM", self.memory), ("ICI", self.links), key=lambda pair: pair[1]
    )[0]


def bound(cost: Cost, tpu_slice: Slice) -> Bound:
  """Returns the least time of a program on a slice.

  Args:
    cost: work of one chip.
    tpu_slice: the slice. The chip with the fewest links counts.
  """
  chip = tpu_slice.chip
  links = cost.sent / (tpu_slice.links * chip.link) if tpu_slice.links else 0.0
  return Bound(cost.flops / chip.flops, cost.bytes / chip.bandwidth, links)

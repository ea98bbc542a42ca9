"""The digit boards dataset: questions about boards of handwritten digits.

A board is a small grid. Each cell contains one coloured digit of `sklearn.datasets.load_digits()`.
Every fifth image of each digit is held out: `test` boards use only held-out images, and `train`
boards use only the others. An example is a function of (split, seed, index), so the dataset needs
no storage. `builder()` can also write it to disk as a TFDS dataset.

    example = make_example("train", seed=0, index=7, style="local")
    example.question   # What is the sum of row 2?
    example.target     # <think>row 2: 3 8 1; 3+8=11; 11+1=12</think>\\boxed{12}

The target of a question has one of three styles. Shorter targets are harder to get right:
  direct: A guess, without reading cells and without steps.
  local:  Reads the cells that the question is about, then solves the question step by step.
  board:  Reads the whole board (digits and initials of colours), then continues like `local`.

With `slips`, targets contain errors at given rates. A model trained on them misreads digits and
miscalculates sums, which leaves room for reinforcement learning to improve it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import operator
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxrl_vlm.example import Example

CELL = 16  # pixels
ROWS = (2, 3)
COLUMNS = (2, 3)
GLYPH = (12, 16)  # smallest and largest side of a drawn digit in pixels
SPLITS = ("train", "test")
STYLES = ("direct", "local", "board")
TRAIN, TEST = 6_000, 1_000  # default numbers of questions in the dataset on disk
COLOURS = ("red", "green", "blue", "yellow")
SLIPS = ("digit", "colour", "sum")

PERCEPTION = ("read", "colour", "where")
REASONING = ("sum_row", "sum_column", "count", "largest_colour", "compare")
QUESTION_TASKS = PERCEPTION + REASONING
# Only for supervised training of a base model. Their targets have no styles.
BASE_TASKS = ("transcribe", "arithmetic")

_QUESTIONS = {
  "read": "What digit is in row {row}, column {column}?",
  "colour": "What colour is the digit in row {row}, column {column}?",
  "where": "Where is the {digit}? Answer as row,column.",
  "sum_row": "What is the sum of row {row}?",
  "sum_column": "What is the sum of column {column}?",
  "count": "How many times does the digit {digit} appear?",
  "largest_colour": "What is the largest {colour} digit?",
  "compare": "Which row has the larger sum, {row} or {other}?",
  "transcribe": "Read the board.",
}
_INK = np.array([[240, 70, 60], [70, 205, 80], [80, 135, 255], [245, 215, 60]], np.float32)

# One name, several equally likely names, or names with weights.
Choice = str | Sequence[str] | Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Cell:
  """One drawn digit.

  Attributes:
    digit: The digit, 0 to 9.
    colour: One of COLOURS.
    source: Index of its image in load_digits().
    x, y: Position of its top left corner on the board in pixels.
    size: Its side in pixels.
    brightness: Factor on its colour.
  """

  digit: int
  colour: str
  source: int
  x: int
  y: int
  size: int
  brightness: float


@dataclasses.dataclass(frozen=True)
class Board:
  """A board of cells.

  Attributes:
    cells: cells[row][column].
    background: Red, green and blue value of the background, 0 to 255.
  """

  cells: tuple[tuple[Cell, ...], ...]
  background: tuple[int, int, int]

  @property
  def digits(self) -> list[list[int]]:
    return [[cell.digit for cell in row] for row in self.cells]

  @property
  def colours(self) -> list[list[str]]:
    return [[cell.colour for cell in row] for row in self.cells]


# ------------------------------------------------------------------------------------------------
# Handwritten digits
# ------------------------------------------------------------------------------------------------


@functools.cache
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
  """Returns the images uint8[1797, 8, 8], scaled to 0..255, and their labels int[1797]."""
  from sklearn.datasets import load_digits  # slow to import

  data: Any = load_digits()
  return np.round(data.images * (255 / 16)).astype(np.uint8), data.target.astype(int)


@functools.cache
def sources(split: str) -> tuple[np.ndarray, ...]:
  """Returns for each digit 0..9 the indices into load_digits() that boards of a split may use."""
  if split not in SPLITS:
    raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
  _, labels = _handwritten()
  indices = []
  for digit in range(10):
    of_class = np.flatnonzero(labels == digit)
    held_out = np.arange(len(of_class)) % 5 == 4
    indices.append(of_class[held_out if split == "test" else ~held_out])
  return tuple(indices)


@functools.cache
def _glyph(source: int, size: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
  """Returns a handwritten digit and its bounding box.

  Args:
    source: Index of the image in load_digits().
    size: Side of the digit in pixels.

  Returns:
    The opacity of the ink float32[size, size, 1], 0 to 1, and the box (x0, y0, x1, y1) of pixels
    whose opacity is above 0.25.
  """
  small = Image.fromarray(_handwritten()[0][source])
  ink = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
  visible = ink > 0.25
  ys, xs = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
  return ink[:, :, None], (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)


# ------------------------------------------------------------------------------------------------
# Boards
# ------------------------------------------------------------------------------------------------


def _draw_board(rng: np.random.Generator, split: str, digits: np.ndarray) -> Board:
  """Samples the appearance of a board with the given digits int[rows, cols]."""
  rows, cols = digits.shape
  pool = sources(split)
  background = rng.integers(0, 51) + rng.integers(0, 15, 3)  # dark and slightly coloured
  shape = (rows, cols)
  colours = rng.integers(0, len(COLOURS), shape).tolist()
  picks = rng.random(shape).tolist()
  sizes = rng.integers(GLYPH[0], GLYPH[1] + 1, shape).tolist()
  jitter = rng.random((*shape, 2)).tolist()
  brightness = rng.uniform(0.85, 1.1, shape).round(3).tolist()
  cells = []
  for r, row in enumerate(digits.tolist()):
    line = []
    for c, digit in enumerate(row):
      size = sizes[r][c]
      room = CELL - size + 1
      line.append(
        Cell(
          digit=digit,
          colour=COLOURS[colours[r][c]],
          source=int(pool[digit][int(picks[r][c] * len(pool[digit]))]),
          x=CELL * c + int(jitter[r][c][0] * room),
          y=CELL * r + int(jitter[r][c][1] * room),
          size=size,
          brightness=brightness[r][c],
        )
      )
    cells.append(tuple(line))
  red, green, blue = background.tolist()
  return Board(tuple(cells), (red, green, blue))


def render(board: Board) -> np.ndarray:
  """Renders a board as an image uint8[16 * rows, 16 * cols, 3]."""
  shape = CELL * len(board.cells), CELL * len(board.cells[0]), 3
  canvas = np.empty(shape, np.float32)
  canvas[:] = board.background
  for row in board.cells:
    for cell in row:
      ink, _ = _glyph(cell.source, cell.size)
      window = canvas[cell.y : cell.y + cell.size, cell.x : cell.x + cell.size]
      window += ink * (_INK[COLOURS.index(cell.colour)] * cell.brightness - window)
  return np.clip(canvas, 0, 255).astype(np.uint8)


def encode_png(image: np.ndarray) -> bytes:
  """Encodes an image uint8[H, W, 3] as a PNG file."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "png", compress_level=1)
  return buffer.getvalue()


def _cells(board: Board) -> list[list[dict[str, Any]]]:
  """Returns the ground truth of a board in JSON types. Boxes are [x0, y0, x1, y1] in pixels."""
  truth = []
  for row in board.cells:
    line = []
    for cell in row:
      x0, y0, x1, y1 = _glyph(cell.source, cell.size)[1]
      line.append(
        {
          "digit": cell.digit,
          "colour": cell.colour,
          "source": cell.source,
          "box": [cell.x + x0, cell.y + y0, cell.x + x1, cell.y + y1],
        }
      )
    truth.append(line)
  return truth


# ------------------------------------------------------------------------------------------------
# Questions
# ------------------------------------------------------------------------------------------------


def _draw_question(
  rng: np.random.Generator,
  split: str,
  task: str,
  rows_range: Sequence[int],
  columns_range: Sequence[int],
) -> tuple[Board, dict[str, Any]]:
  """Samples a board, and the values for the question of a task. Rows and columns count from 1."""
  rows = int(rng.integers(rows_range[0], rows_range[1] + 1))
  cols = int(rng.integers(columns_range[0], columns_range[1] + 1))
  digits = rng.integers(0, 10, (rows, cols))
  row, column = int(rng.integers(rows)) + 1, int(rng.integers(cols)) + 1
  asked: dict[str, Any] = {}
  if task in ("read", "colour"):
    asked = {"row": row, "column": column}
  elif task == "sum_row":
    asked = {"row": row}
  elif task == "sum_column":
    asked = {"column": column}
  elif task in ("where", "count"):
    # Uniformly random digits would rarely repeat. Therefore place the digit a sampled number of
    # times among the nine other digits.
    digit = int(rng.integers(10))
    digits = (digit + rng.integers(1, 10, (rows, cols))) % 10
    times = 1 if task == "where" or rng.random() < 0.1 else int(rng.integers(1, 5))
    if task == "count" and rng.random() < 0.1:
      times = 0
    digits.flat[rng.permutation(rows * cols)[:times]] = digit
    asked = {"digit": digit}
  elif task == "compare":
    row, other = sorted(int(r) + 1 for r in rng.permutation(rows)[:2])
    while digits[row - 1].sum() == digits[other - 1].sum():
      digits = rng.integers(0, 10, (rows, cols))
    asked = {"row": row, "other": other}
  board = _draw_board(rng, split, digits)
  if task == "largest_colour":
    asked = {"colour": board.colours[row - 1][column - 1]}  # a colour on the board
  return board, asked


def _spaced(items: Sequence[Any]) -> str:
  return " ".join(map(str, items))


def _running_sum(numbers: Sequence[int], add: Callable[[int, int], int]) -> tuple[list[str], int]:
  """Adds numbers one at a time: [3, 8, 1] gives ["3+8=11", "11+1=12"] and 12."""
  steps, total = [], numbers[0]
  for number in numbers[1:]:
    before, total = total, add(total, number)
    steps.append(f"{before}+{number}={total}")
  return steps, total


def board_text(board: Board) -> str:
  """Returns the digits and colours of a board as text: "1: 3r 8b; 2: 0g 5y"."""
  return "; ".join(
    f"{r}: " + _spaced([f"{cell.digit}{cell.colour[0]}" for cell in row])
    for r, row in enumerate(board.cells, 1)
  )


def solve(
  board: Board, task: str, asked: Mapping[str, Any], add: Callable[[int, int], int] = operator.add
) -> tuple[list[str], str]:
  """Solves a question.

  Args:
    board: The board.
    task: One of QUESTION_TASKS.
    asked: The values in the question.
    add: The addition used for running sums.

  Returns:
    The steps of a target in the `local` style, and the answer.

  Raises:
    ValueError: The question has no answer, because the board lacks the digit or colour or because
      both rows have the same sum, or the task is unknown.
  """
  digits, colours = board.digits, board.colours
  numbered = list(enumerate(digits, 1))
  if task in ("read", "colour"):
    grid = digits if task == "read" else colours
    row = grid[asked["row"] - 1]
    answer = str(row[asked["column"] - 1])
    return [f"row {asked['row']}: {_spaced(row)}", f"column {asked['column']}: {answer}"], answer
  if task == "where":
    steps = []
    for r, row in numbered:
      steps.append(f"row {r}: {_spaced(row)}")
      if asked["digit"] in row:
        column = row.index(asked["digit"]) + 1
        return [*steps, f"{asked['digit']} in column {column}"], f"{r},{column}"
    raise ValueError(f"the board has no {asked['digit']}")
  if task == "sum_row":
    row = digits[asked["row"] - 1]
    steps, total = _running_sum(row, add)
    return [f"row {asked['row']}: {_spaced(row)}", *steps], str(total)
  if task == "sum_column":
    column = [row[asked["column"] - 1] for row in digits]
    steps, total = _running_sum(column, add)
    return [f"column {asked['column']}: {_spaced(column)}", *steps], str(total)
  if task == "count":
    steps, total = [], 0
    for r, row in numbered:
      total += row.count(asked["digit"])
      steps.append(f"row {r}: {_spaced(row)}; count {total}")
    return steps, str(total)
  if task == "largest_colour":
    steps, found = [], []
    for r, row in numbered:
      names = colours[r - 1]
      of_colour = [row[c] for c in range(len(row)) if names[c] == asked["colour"]]
      steps.append(f"row {r}: {_spaced(of_colour) or 'none'}")
      found += of_colour
    if not found:
      raise ValueError(f"the board has no {asked['colour']} digit")
    return [*steps, f"largest {max(found)}"], str(max(found))
  if task == "compare":
    steps, sums = [], []
    for r in (asked["row"], asked["other"]):
      row = digits[r - 1]
      more, total = _running_sum(row, add)
      steps += [f"row {r}: {_spaced(row)}", *more]
      sums.append(total)
    if sums[0] == sums[1]:
      raise ValueError(f"rows {asked['row']} and {asked['other']} have the same sum")
    steps.append(f"{sums[0]}{'<' if sums[0] < sums[1] else '>'}{sums[1]}")
    return steps, str(asked["row"] if sums[0] > sums[1] else asked["other"])
  raise ValueError(f"task={task!r}: expected one of {', '.join(QUESTION_TASKS)}")


def _check_slips(slips: Mapping[str, float]) -> None:
  for name, rate in slips.items():
    if name not in SLIPS:
      raise ValueError(f"slips={name!r}: expected one of {', '.join(SLIPS)}")
    if not 0 <= rate < 1:
      raise ValueError(f"slips.{name}={rate!r}: expected a probability, 0 or more and below 1")


class _Slips:
  """Solves questions with errors in reading and addition, at given rates.

  It uses a random generator of its own, so boards and questions do not depend on the rates.
  """

  def __init__(self, rates: Mapping[str, float], *seed: int):
    self._rates, self._seed = rates, seed

  @functools.cached_property
  def _rng(self) -> np.random.Generator:
    return np.random.default_rng(self._seed)  # slow, therefore created only if needed

  def _slips(self, name: str) -> bool:
    rate = self._rates.get(name, 0.0)
    return rate > 0 and self._rng.random() < rate

  def _cell(self, cell: Cell) -> Cell:
    digit, colour = cell.digit, COLOURS.index(cell.colour)
    if self._slips("digit"):
      digit = (digit + int(self._rng.integers(1, 10))) % 10
    if self._slips("colour"):
      colour = (colour + int(self._rng.integers(1, len(COLOURS)))) % len(COLOURS)
    return dataclasses.replace(cell, digit=digit, colour=COLOURS[colour])

  def read(self, board: Board) -> Board:
    if not self._rates:
      return board
    return dataclasses.replace(
      board, cells=tuple(tuple(self._cell(cell) for cell in row) for row in board.cells)
    )

  def add(self, a: int, b: int) -> int:
    """Returns a + b or, in the case of an error, another number that differs from it by up to 3."""
    if not self._slips("sum"):
      return a + b
    return int(self._rng.choice([n for n in range(max(0, a + b - 3), a + b + 4) if n != a + b]))

  def solve(
    self, board: Board, task: str, asked: Mapping[str, Any]
  ) -> tuple[Board, list[str], str]:
    """Reads a board with errors and solves it. Returns the board as read, the steps and answer."""
    for _ in range(1000):
      seen = self.read(board)
      # A misread board may have no answer. In this case it is read again.
      with contextlib.suppress(ValueError):
        return seen, *solve(seen, task, asked, self.add)
    raise ValueError(
      f"slips={dict(self._rates)!r}: expected rates at which {task!r} can be answered"
    )


def _response(thought: str, answer: str) -> str:
  return f"<think>{thought}</think>\\boxed{{{answer}}}"


# ------------------------------------------------------------------------------------------------
# Samples
# ------------------------------------------------------------------------------------------------


def _choose(rng: np.random.Generator, field: str, choice: Choice, known: Sequence[str]) -> str:
  weighted = choice if isinstance(choice, Mapping) else None
  names = [choice] if isinstance(choice, str) else list(choice)
  for name in names:
    if name not in known:
      raise ValueError(f"{field}={name!r}: expected one of {', '.join(known)}")
  weights = [float(weighted[name]) for name in names] if weighted else [1.0] * len(names)
  # Use one random number for any number of names, so that later random numbers do not change.
  at = rng.random() * sum(weights)
  for name, weight in zip(names, weights, strict=True):
    at -= weight
    if at < 0:
      return name
  raise ValueError(f"{field}={choice!r}: expected at least one name with a positive weight")


def sample(
  split: str,
  seed: int,
  index: int,
  tasks: Choice | None = None,
  style: Choice | None = None,
  rows: Sequence[int] = ROWS,
  columns: Sequence[int] = COLUMNS,
  slips: Mapping[str, float] | None = None,
) -> tuple[Board | None, Example]:
  """Like `make_example`, but returns the board (None for arithmetic) instead of its image."""
  if split not in SPLITS:
    raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
  _check_slips(slips or {})
  rng = np.random.default_rng((SPLITS.index(split), seed, index))
  teacher = _Slips(slips or {}, SPLITS.index(split), seed, index, 1)
  task = _choose(
    rng, "tasks", QUESTION_TASKS if tasks is None else tasks, QUESTION_TASKS + BASE_TASKS
  )
  name = f"{split}-{seed}-{index}"
  meta: dict[str, Any] = {
    "skill": "reasoning" if task in (*REASONING, "arithmetic") else "perception",
    "task": task,
  }
  if task == "arithmetic":
    # Additions like those in running sums of up to four digits.
    more = int(rng.integers(1, 4))
    numbers = [int(rng.integers(0, 37 - 9 * more)), *rng.integers(0, 10, more).tolist()]
    steps, total = _running_sum(numbers, teacher.add)
    return None, Example(
      id=name,
      question="+".join(map(str, numbers)) + "=",
      answer=str(sum(numbers)),
      target=_response("; ".join(steps), str(total)),
      meta=meta,
    )

  board, asked = _draw_question(rng, split, task, rows, columns)
  target = None
  if task == "transcribe":
    answer = board_text(board)
    target = board_text(teacher.read(board))
  else:
    _, answer = solve(board, task, asked)
    if style is not None:  # sampled last, so that the board and question do not depend on it
      meta["style"] = _choose(rng, "style", style, STYLES)
      seen, steps, reached = teacher.solve(board, task, asked)
      thought = {"direct": ["guess"], "local": steps, "board": [board_text(seen), *steps]}
      target = _response("; ".join(thought[meta["style"]]), reached)
  meta |= {
    "asked": asked,
    "rows": len(board.cells),
    "cols": len(board.cells[0]),
    "cells": _cells(board),
  }
  return board, Example(
    id=name, question=_QUESTIONS[task].format(**asked), answer=answer, target=target, meta=meta
  )


def make_example(
  split: str,
  seed: int,
  index: int,
  tasks: Choice | None = None,
  style: Choice | None = None,
  rows: Sequence[int] = ROWS,
  columns: Sequence[int] = COLUMNS,
  slips: Mapping[str, float] | None = None,
) -> Example:
  """Returns the example with the given index.

  Args:
    split: "train" or "test". It determines which handwritten digits the board may use.
    seed, index: Non-negative integers. Equal numbers give equal examples.
    tasks: Names from QUESTION_TASKS and BASE_TASKS. A mapping gives their weights. None means all
      of QUESTION_TASKS.
    style: Names from STYLES. A mapping gives their weights. With None, questions get no `target`.
    rows, columns: Smallest and largest number of rows and of columns.
    slips: Probabilities of errors in the target: that the `digit` or the `colour` of a cell is
      mistaken for another one, and that an addition (`sum`) is wrong by up to 3. The final answer
      of the target follows from its steps. Slips change only the target; `answer` is always right.

  Returns:
    An Example with one PNG image of 16 * rows x 16 * cols pixels, or no image for arithmetic. Its
    meta contains skill and task and, except for arithmetic, asked (the values in the question),
    rows, cols, cells[row][column] = {digit, colour, source, box}, and style if there is one.
  """
  board, example = sample(split, seed, index, tasks, style, rows, columns, slips)
  return example if board is None else example.replace(images=(encode_png(render(board)),))


# ------------------------------------------------------------------------------------------------
# As a dataset
# ------------------------------------------------------------------------------------------------


class LiveBoards:
  """A dataset of `size` examples with random access, generated when they are read."""

  def __init__(
    self,
    split: str,
    size: int = 1_000_000,
    seed: int = 0,
    tasks: Choice | None = None,
    style: Choice | None = None,
    rows: Sequence[int] = ROWS,
    columns: Sequence[int] = COLUMNS,
    slips: Mapping[str, float] | None = None,
  ):
    if size < 1:
      raise ValueError(f"{split}={size}: expected at least 1 question")
    self._split, self._size, self._seed = split, size, seed
    self._how = (tasks, style, rows, columns, slips)
    sample(split, seed, 0, *self._how)  # raises an error for wrong arguments now, not in a worker

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < self._size:
      raise IndexError(index)
    return make_example(self._split, self._seed, int(index), *self._how)


def _make_builder(data_dir: pathlib.Path, settings: Mapping[str, Any]) -> Any:
  """Returns the TFDS builder for the given settings. The dataset may not be written yet."""
  import tensorflow_datasets as tfds  # slow to import

  # Other settings have another configuration name, so a dataset is never read in place of another.
  digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10]

  class DigitBoards(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Questions about boards of handwritten digits. Writing them does not need TensorFlow."""

    VERSION = tfds.core.Version("1.1.0")  # increase it with every change of boards or questions
    BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(
        name="default" if settings == check_settings() else digest, description=json.dumps(settings)
      )
    ]

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        description=__doc__,
        features=tfds.features.FeaturesDict(
          {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "target": tfds.features.Text(),
            "meta": tfds.features.Text(doc="JSON"),
          }
        ),
        homepage="https://scikit-learn.org/stable/modules/generated/"
        "sklearn.datasets.load_digits.html",
        disable_shuffling=True,  # readers shuffle
      )

    def _split_generators(self, dl_manager):
      del dl_manager  # nothing to download
      return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
      boards = LiveBoards(
        split,
        settings[split],
        settings["seed"],
        settings["tasks"],
        settings["style"],
        slips=settings.get("slips"),
      )
      for index in range(len(boards)):
        example = boards[index]
        yield (
          index,
          {
            "id": example.id,
            "image": io.BytesIO(example.images[0]),
            "question": example.question,
            "answer": example.answer,
            "target": example.target or "",
            "meta": json.dumps(example.meta),
          },
        )

  return DigitBoards(data_dir=data_dir)


def check_settings(
  train: int = TRAIN,
  test: int = TEST,
  seed: int = 0,
  tasks: Choice | None = None,
  style: Choice | None = ("local", "board"),
  slips: Mapping[str, float] | None = None,
) -> dict[str, Any]:
  """Returns the settings of `builder` in JSON types.

  Raises:
    ValueError: A setting is wrong. The message names the first wrong one.
  """
  if tasks is not None and "arithmetic" in ([tasks] if isinstance(tasks, str) else tasks):
    raise ValueError("tasks='arithmetic': has no image to store; set live=True")
  for split, size in (("train", train), ("test", test)):
    LiveBoards(split, size, seed, tasks, style, slips=slips)
  settings = {
    "train": train,
    "test": test,
    "seed": seed,
    "tasks": _plain(tasks),
    "style": _plain(style),
  }
  # Datasets on disk are named after their settings. Without slips, their names must not change.
  return settings | {"slips": dict(slips)} if slips else settings


def builder(data_dir: str | os.PathLike, **settings: Any) -> Any:
  """Returns a prepared TFDS builder. The first call writes the dataset under `data_dir`.

  Several processes may call this function at once. After a call that was killed, the next call
  writes the dataset again; an incomplete dataset is never read. Each combination of settings is a
  separate dataset. Writing the default one takes about ten seconds.

  Args:
    data_dir: The TFDS directory.
    **settings: `train` and `test` are numbers of questions. `seed`, `tasks`, `style` and `slips`
      are documented in `make_example`.

  Returns:
    A tfds.core.DatasetBuilder with the splits train and test. Its features are id, image (PNG),
    question, answer, target and meta (JSON text).

  Raises:
    ValueError: A task or style is unknown, or is arithmetic, which has no image.
  """
  settings = check_settings(**settings)
  root = pathlib.Path(data_dir).expanduser()
  made = _make_builder(root, settings)
  path = pathlib.Path(made.data_path)
  if path.exists():
    return made
  import tensorflow_datasets as tfds

  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path.parent / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    # The lock excludes other builds, so what is incomplete is left from a killed build.
    for leftover in path.parent.glob("incomplete*"):
      shutil.rmtree(leftover)
    made = _make_builder(root, settings)  # another process may have written it meanwhile
    tfds.disable_progress_bar()
    try:
      with contextlib.redirect_stdout(io.StringIO()):  # hide misleading output about downloads
        made.download_and_prepare(file_format="array_record")
    finally:
      tfds.enable_progress_bar()
  return made


def _plain(choice: Choice | None) -> Any:
  """Converts a choice to a string, list or dict, which JSON represents."""
  if choice is None or isinstance(choice, str):
    return choice
  return dict(choice) if isinstance(choice, Mapping) else list(choice)

"""Tests the digit boards dataset.

Answers must follow from the ground truth, and `train` boards must not use held-out digits.
"""

import io
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from jaxrl_vlm.data import digit_boards as boards


def decode(example):
  return np.asarray(Image.open(io.BytesIO(example.images[0])))


def expected_answer(question, cells):
  """Answers a question from its text and the ground truth alone."""
  numbers = [int(n) for n in re.findall(r"\d+", question)]
  digits = np.array([[cell["digit"] for cell in row] for row in cells])
  colours = np.array([[cell["colour"] for cell in row] for row in cells])
  if question.startswith("What digit"):
    return str(digits[numbers[0] - 1, numbers[1] - 1])
  if question.startswith("What colour"):
    return str(colours[numbers[0] - 1, numbers[1] - 1])
  if question.startswith("Where is"):
    (row,), (column,) = np.nonzero(digits == numbers[0])  # exactly one
    return f"{row + 1},{column + 1}"
  if "sum of row" in question:
    return str(digits[numbers[0] - 1].sum())
  if "sum of column" in question:
    return str(digits[:, numbers[0] - 1].sum())
  if "How many times" in question:
    return str((digits == numbers[0]).sum())
  if "largest" in question:
    (colour,) = [name for name in boards.COLOURS if name in question]
    return str(digits[colours == colour].max())
  if "larger sum" in question:
    sums = {row: digits[row - 1].sum() for row in numbers}
    assert len(set(sums.values())) == 2
    return str(max(sums, key=lambda row: sums[row]))
  raise AssertionError(question)


@pytest.mark.parametrize("task", boards.QUESTION_TASKS)
def test_answers_follow_from_the_cells(task):
  answers = set()
  for index in range(200):
    _, example = boards.sample("train", 3, index, tasks=task)
    assert example.meta["task"] == task
    assert example.answer == expected_answer(example.question, example.meta["cells"])
    assert example.target is None
    answers.add(example.answer)
  assert len(answers) > 1


@pytest.mark.parametrize("style", boards.STYLES)
def test_targets_have_correct_steps_and_end_with_the_answer(style):
  for index in range(300):
    board, example = boards.sample("train", 4, index, style=style)
    assert board is not None and example.target is not None
    found = re.fullmatch(r"<think>(.*)</think>\\boxed\{(.*)\}", example.target)
    assert found and found[2] == example.answer
    thought = found[1]
    for left, right, total in re.findall(r"(\d+)\+(\d+)=(\d+)", thought):
      assert int(left) + int(right) == int(total)
    for row, read in re.findall(r"row (\d): ((?:\d )+\d)", thought):
      if example.meta["task"] != "largest_colour":
        assert read.split() == [str(d) for d in board.digits[int(row) - 1]]
    assert thought.startswith(boards.board_text(board)) == (style == "board")
    assert (thought == "guess") == (style == "direct")


def test_steps_and_answers_of_a_board_equal_those_written_by_hand():
  def cell(text):
    colour = next(name for name in boards.COLOURS if name[0] == text[1])
    return boards.Cell(int(text[0]), colour, source=0, x=0, y=0, size=16, brightness=1.0)

  rows = ("3r 8b 1g", "4r 4b 0y")
  board = boards.Board(tuple(tuple(map(cell, row.split())) for row in rows), (0, 0, 0))
  assert boards.board_text(board) == "1: 3r 8b 1g; 2: 4r 4b 0y"
  for task, asked, steps, answer in [
    ("read", {"row": 1, "column": 3}, "row 1: 3 8 1; column 3: 1", "1"),
    ("colour", {"row": 2, "column": 2}, "row 2: red blue yellow; column 2: blue", "blue"),
    ("where", {"digit": 0}, "row 1: 3 8 1; row 2: 4 4 0; 0 in column 3", "2,3"),
    ("sum_row", {"row": 1}, "row 1: 3 8 1; 3+8=11; 11+1=12", "12"),
    ("sum_column", {"column": 2}, "column 2: 8 4; 8+4=12", "12"),
    ("count", {"digit": 4}, "row 1: 3 8 1; count 0; row 2: 4 4 0; count 2", "2"),
    ("largest_colour", {"colour": "yellow"}, "row 1: none; row 2: 0; largest 0", "0"),
    (
      "compare",
      {"row": 1, "other": 2},
      "row 1: 3 8 1; 3+8=11; 11+1=12; row 2: 4 4 0; 4+4=8; 8+0=8; 12>8",
      "1",
    ),
  ]:
    got, right = boards.solve(board, task, asked)
    assert ("; ".join(got), right) == (steps, answer)


def test_test_boards_use_only_held_out_digits():
  from sklearn.datasets import load_digits

  labels = load_digits(return_X_y=True)[1]
  drawn = {}
  for split in boards.SPLITS:
    drawn[split] = set()
    for index in range(600):
      _, example = boards.sample(split, 0, index)
      for row in example.meta["cells"]:
        for cell in row:
          assert labels[cell["source"]] == cell["digit"]
          drawn[split].add(cell["source"])
  allowed = {split: set(np.concatenate(boards.sources(split)).tolist()) for split in boards.SPLITS}
  assert not allowed["train"] & allowed["test"]
  assert allowed["train"] | allowed["test"] == set(range(1797))
  assert drawn["train"] <= allowed["train"] and drawn["test"] <= allowed["test"]
  assert 0.18 < len(allowed["test"]) / 1797 < 0.22


def test_images_agree_with_the_ground_truth_of_their_cells():
  for index in range(100):
    example = boards.make_example("train", 5, index)
    image, meta = decode(example).astype(int), example.meta
    assert image.shape == (16 * meta["rows"], 16 * meta["cols"], 3)
    ground = image[0, 0] if meta["cells"][0][0]["box"][:2] != [0, 0] else None
    for r, row in enumerate(meta["cells"]):
      for c, cell in enumerate(row):
        x0, y0, x1, y1 = cell["box"]
        assert 16 * c <= x0 < x1 <= 16 * c + 16 and 16 * r <= y0 < y1 <= 16 * r + 16
        if ground is None:
          continue
        window = image[y0:y1, x0:x1].reshape(-1, 3)
        # The pixel that differs most from the background is pure ink and shows the colour.
        red, green, blue = window[np.abs(window - ground).sum(1).argmax()]
        seen = (
          "yellow"
          if min(red, green) > 1.5 * blue and green > 0.6 * red
          else ("red", "green", "blue")[int(np.argmax([red, green, blue]))]
        )
        assert seen == cell["colour"]


def test_an_example_is_a_function_of_split_seed_and_index():
  first = boards.make_example("train", 1, 2, style="local")
  assert first == boards.make_example("train", 1, 2, style="local")
  for other in (("test", 1, 2), ("train", 2, 2), ("train", 1, 3)):
    assert boards.make_example(*other).images != first.images
  # The question and the board do not depend on the style.
  direct = boards.make_example("train", 1, 2, style="direct")
  assert (direct.question, direct.images) == (first.question, first.images)


def test_tasks_and_styles_can_be_weighted():
  tasks = [
    boards.sample("train", 0, i, tasks={"read": 3, "count": 1, "where": 0})[1].meta["task"]
    for i in range(800)
  ]
  assert set(tasks) == {"read", "count"}
  assert 0.70 < tasks.count("read") / 800 < 0.80  # 0.75, and 3 standard deviations


def test_examples_for_the_base_model():
  board, read = boards.sample("train", 0, 0, tasks="transcribe")
  assert board is not None and read.answer == read.target == boards.board_text(board)
  for index in range(300):
    example = boards.make_example("train", 0, index, tasks="arithmetic")
    numbers = [int(n) for n in example.question.rstrip("=").split("+")]
    assert example.images == () and example.answer == str(sum(numbers)) and sum(numbers) <= 36
    assert example.target is not None and example.target.count("=") == len(numbers) - 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"split": "valid"}, "split='valid': expected one of train, test"),
    ({"tasks": "reed"}, "tasks='reed': expected one of read, colour"),
    ({"style": ("local", "bord")}, "style='bord': expected one of direct, local, board"),
    ({"tasks": {"read": 0}}, "expected at least one name with a positive weight"),
  ],
)
def test_unknown_names_are_errors_that_name_them(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    boards.make_example(**({"split": "train", "seed": 0, "index": 0} | arguments))


def test_tfds_contains_the_same_examples_and_is_written_once(tmp_path):
  settings = {"train": 12, "test": 5, "tasks": ("read", "count"), "style": "local"}
  built = boards.builder(tmp_path, **settings)
  record = built.as_data_source("test")[3]
  example = boards.make_example("test", 0, 3, settings["tasks"], settings["style"])
  assert record["question"].decode() == example.question
  assert record["target"].decode() == example.target
  np.testing.assert_array_equal(record["image"], decode(example))
  assert {name: split.num_examples for name, split in built.info.splits.items()} == {
    "train": 12,
    "test": 5,
  }

  stamp = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
  assert boards.builder(tmp_path, **settings).data_path == built.data_path
  assert stamp == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
  # This dataset is never read for other settings.
  assert boards.builder(tmp_path, **settings | {"test": 6}).info.splits["test"].num_examples == 6


def test_a_build_succeeds_after_a_killed_build(tmp_path):
  code = f"from jaxrl_vlm.data import digit_boards as b; b.builder({str(tmp_path)!r}, train=10**6)"
  process = subprocess.Popen([sys.executable, "-c", code])
  try:
    while not list(tmp_path.rglob("incomplete*")):
      assert process.poll() is None
      time.sleep(0.1)
  finally:
    process.kill()  # sends SIGKILL, so the process cannot clean up
    process.wait()
  (leftover,) = tmp_path.rglob("incomplete*")
  # Move the leftover to where a killed build with these small settings would have left it.
  small = boards.check_settings(train=3, test=2)
  wanted = boards._make_builder(tmp_path, small).data_path.parent
  wanted.mkdir(parents=True)
  leftover.rename(wanted / leftover.name)
  built = boards.builder(tmp_path, **small)
  assert len(built.as_data_source("train")) == 3
  assert not list(wanted.glob("incomplete*"))


# -- Slips: errors in targets ---------------------------------------------------------------------

RATES = {"digit": 0.3, "colour": 0.2, "sum": 0.25}


def thought_and_answer(example):
  assert example.target is not None
  found = re.fullmatch(r"<think>(.*)</think>\\boxed\{(.*)\}", example.target)
  assert found
  return found[1], found[2]


def test_slips_change_only_the_target():
  tasks = boards.QUESTION_TASKS + boards.BASE_TASKS
  changed = 0
  for index in range(400):
    plain = boards.make_example("train", 6, index, tasks=tasks, style=boards.STYLES)
    nothing = boards.make_example("train", 6, index, tasks=tasks, style=boards.STYLES, slips={})
    slipped = boards.make_example("train", 6, index, tasks=tasks, style=boards.STYLES, slips=RATES)
    assert plain == nothing
    assert plain == slipped.replace(target=plain.target)
    assert slipped == boards.make_example(
      "train", 6, index, tasks=tasks, style=boards.STYLES, slips=RATES
    )
    changed += plain.target != slipped.target
  assert 200 < changed < 400
  # Without a target, slips have no effect.
  assert boards.make_example("test", 6, 0, slips=RATES) == boards.make_example("test", 6, 0)


def test_slips_have_the_given_rates():
  cells = wrong_digits = wrong_colours = sums = wrong_sums = 0
  for index in range(1500):
    board, example = boards.sample("train", 7, index, tasks="transcribe", slips=RATES)
    assert board is not None and example.target is not None
    right, seen = example.answer.split(), example.target.split()
    for a, b in zip(right, seen, strict=True):
      if a[0].isdigit() and not a.endswith(":"):
        cells += 1
        wrong_digits += a[0] != b[0]
        wrong_colours += a[1] != b[1]
    _, example = boards.sample("train", 7, index, tasks="arithmetic", slips=RATES)
    thought, answer = thought_and_answer(example)
    for left, more, total in re.findall(r"(\d+)\+(\d+)=(\d+)", thought):
      apart = int(total) - int(left) - int(more)
      assert abs(apart) <= 3
      sums += 1
      wrong_sums += apart != 0
    assert thought.endswith(f"={answer}")
  # The tolerance is four standard deviations.
  for name, wrong, of in (
    ("digit", wrong_digits, cells),
    ("colour", wrong_colours, cells),
    ("sum", wrong_sums, sums),
  ):
    rate = RATES[name]
    assert of > 2000 and abs(wrong / of - rate) < 4 * (rate * (1 - rate) / of) ** 0.5


@pytest.mark.parametrize("task", boards.QUESTION_TASKS)
def test_with_slips_the_answer_of_the_target_follows_from_its_steps(task):
  wrong = 0
  for index in range(150):
    _, example = boards.sample("train", 8, index, tasks=task, style="local", slips=RATES)
    thought, answer = thought_and_answer(example)
    asked, wrong = example.meta["asked"], wrong + (answer != example.answer)
    rows = dict(re.findall(r"row (\d): ([^;]*)", thought))
    totals = [int(n) for n in re.findall(r"\d+\+\d+=(\d+)", thought)]
    if task in ("read", "colour"):
      assert answer == rows[str(asked["row"])].split()[asked["column"] - 1]
    elif task == "where":
      row, column = map(int, answer.split(","))
      assert rows[str(row)].split()[column - 1] == str(asked["digit"])
    elif task in ("sum_row", "sum_column"):
      assert int(answer) == totals[-1]
    elif task == "count":
      assert int(answer) == sum(row.split().count(str(asked["digit"])) for row in rows.values())
    elif task == "largest_colour":
      assert int(answer) == max(int(d) for row in rows.values() for d in re.findall(r"\d", row))
    else:
      ((left, sign, right),) = re.findall(r"; (\d+)([<>])(\d+)$", thought)
      assert (int(left) > int(right)) == (sign == ">")
      assert answer == str(asked["row"] if sign == ">" else asked["other"])
  assert 10 < wrong < 150


def test_boards_without_an_answer_are_errors():
  board, _ = boards.sample("train", 0, 0, tasks="sum_row", rows=(2, 2), columns=(1, 1))
  assert board is not None
  (a,), (b,) = board.digits
  equal = boards.Board((board.cells[0], board.cells[0]), board.background)
  missing = next(d for d in range(10) if d not in (a, b))
  colour = next(c for c in boards.COLOURS if [c] not in board.colours)
  for at, task, asked, message in (
    (board, "where", {"digit": missing}, f"the board has no {missing}"),
    (board, "largest_colour", {"colour": colour}, f"the board has no {colour} digit"),
    (equal, "compare", {"row": 1, "other": 2}, "rows 1 and 2 have the same sum"),
  ):
    with pytest.raises(ValueError, match=message):
      boards.solve(at, task, asked)


@pytest.mark.parametrize(
  ("slips", "message"),
  [
    ({"digits": 0.1}, "slips='digits': expected one of digit, colour, sum"),
    ({"sum": 1.0}, "slips.sum=1.0: expected a probability, 0 or more and below 1"),
  ],
)
def test_unknown_slips_and_bad_rates_are_errors_that_name_them(slips, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    boards.LiveBoards("train", slips=slips)


def test_slips_make_another_dataset_on_disk():
  settings = boards.check_settings()
  assert "slips" not in settings and settings == boards.check_settings(slips={})
  assert boards.check_settings(slips={"sum": 0.5}) == settings | {"slips": {"sum": 0.5}}

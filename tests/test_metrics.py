"""Tests the metrics files, also of a run that was resumed, and the output of the live display."""

import contextlib
import importlib
import io
import json
import math
import os
import pty
import threading
import time
from typing import Any

import numpy as np
import pytest

from jaxrl_vlm import metrics
from jaxrl_vlm.errors import UserError


def test_records_round_trip_and_non_finite_values_are_null(tmp_path):
  with metrics.MetricsWriter(tmp_path / "run") as writer:
    writer.write(
      1, "rl", {"train/reward": np.float32(0.5), "n": 3, "nan": math.nan, "inf": -math.inf}
    )
    # The record is on disk when write() returns, so a kill afterwards does not lose it.
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert text == (
    '{"step": 1, "stage": "rl", "train/reward": 0.5, "n": 3, "nan": null, "inf": null}\n'
  )
  assert metrics.read(tmp_path / "run") == [json.loads(text)]
  assert metrics.read(tmp_path / "no_such_run") == []


def test_resumed_run_has_no_duplicate_records_and_loses_none(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    for step in range(1, 7):
      writer.write(step, "rl", {"life": 1})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 7, "sta')  # cut short by a kill
  assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6]

  with metrics.MetricsWriter(tmp_path, start=5) as writer:
    for step in range(5, 8):
      writer.write(step, "rl", {"life": 2})
  assert [(r["step"], r["life"]) for r in metrics.read(tmp_path)] == [
    (1, 1),
    (2, 1),
    (3, 1),
    (4, 1),
    (5, 2),
    (6, 2),
    (7, 2),
  ]
  assert (tmp_path / "metrics.dropped.jsonl").read_text().splitlines() == [
    '{"step": 5, "stage": "rl", "life": 1}',
    '{"step": 6, "stage": "rl", "life": 1}',
    '{"step": 7, "sta',
  ]

  # If no record is repeated, the file is unchanged.
  before = (tmp_path / "metrics.jsonl").read_bytes()
  metrics.MetricsWriter(tmp_path, start=8).close()
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_complete_last_line_without_a_line_break_is_kept(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "rl"}')
  with metrics.MetricsWriter(tmp_path, start=2) as writer:
    writer.write(2, "rl", {})
  assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2]


def test_tensorboard_events_contain_the_values_and_purge_repeated_steps(tmp_path):
  protos: Any = importlib.import_module("tensorboardX.proto.event_pb2")
  for start in (0, 2):
    with metrics.MetricsWriter(tmp_path, start=start) as writer:
      writer.write(start + 1, "rl", {"train/reward": 0.25 + start})
  runs = []
  files = (tmp_path / "tensorboard").iterdir()
  for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
    data, events = path.read_bytes(), []
    while data:  # a record: length (8 bytes), checksum (4), event, checksum (4)
      size = int.from_bytes(data[:8], "little")
      events.append(protos.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
    runs.append(events)
  assert [events[1].step for events in runs] == [0, 2]
  # Status 1 is START: TensorBoard purges earlier events from this step on.
  assert [events[1].session_log.status for events in runs] == [1, 1]
  assert [
    (events[2].step, events[2].summary.value[0].tag, events[2].summary.value[0].simple_value)
    for events in runs
  ] == [(1, "train/reward", 0.25), (3, "train/reward", 2.25)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a full disk")
def test_error_of_a_full_disk_names_the_file(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  with pytest.raises(UserError) as error:
    writer.write(1, "rl", {"x": 1})
  assert str(error.value) == (
    f"{tmp_path}/metrics.jsonl: cannot write metrics: No space left on device; correct this and run"
    " the same command again to resume the run"
  )


def test_error_of_a_damaged_file_names_its_line(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "rl"}\noops\n{"step": 2}\n')
  with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a metrics record: 'oops'"):
    metrics.read(tmp_path)


def evaluation(step, stage, overall, perception):
  return {
    "step": step,
    "stage": stage,
    "eval/accuracy": overall,
    "eval/accuracy/perception": perception,
    "eval/accuracy_of_something_else": 1.0,
  }


def test_before_and_after_are_those_of_the_last_stage():
  train = [
    {"step": step, "stage": stage, "train/loss": 1.0}
    for step, stage in ((1, "sft"), (2, "sft"), (3, "rl"), (4, "rl"))
  ]
  start, middle, end = (
    evaluation(0, "sft", 0.1, 0.2),
    evaluation(2, "sft", 0.5, 0.6),
    evaluation(4, "rl", 0.7, 0.9),
  )
  expected = [("overall", 0.5, 0.7), ("perception", 0.6, 0.9)]
  assert metrics.before_and_after([start, *train[:2], middle, *train[2:], end]) == expected
  # The stage evaluates again before its first step.
  again = evaluation(2, "rl", 0.4, 0.6)
  assert metrics.before_and_after([start, *train[:2], middle, again, *train[2:], end])[0] == (
    "overall",
    0.4,
    0.7,
  )
  # Two consecutive stages of the same kind.
  third = [
    evaluation(4, "rl", 0.65, 0.9),
    {"step": 5, "stage": "rl", "train/loss": 1.0},
    evaluation(5, "rl", 0.8, 0.9),
  ]
  assert metrics.before_and_after([start, *train[:2], middle, *train[2:], end, *third])[0] == (
    "overall",
    0.65,
    0.8,
  )
  assert metrics.before_and_after([*train[:2], end]) == [
    ("overall", 0.7, None),
    ("perception", 0.9, None),
  ]
  assert metrics.before_and_after(train) == []


STEP = {
  "train/reward": 0.622,
  "train/reward/math": 0.58,
  "train/reward/format": 1.0,
  "train/accuracy": 0.58,
  "train/response_length": 21.3,
  "time/tokens_per_second": 3120.0,
}


def test_display_prints_plain_lines_if_the_output_is_no_terminal(monkeypatch):
  clock = iter(range(0, 1000, 2))  # each step takes two seconds
  monkeypatch.setattr(time, "monotonic", lambda: next(clock))
  out = io.StringIO()
  with metrics.Progress(total=8, every=3, stream=out) as progress:
    progress.update(1, "sft", {"train/loss": 1.234, "time/tokens_per_second": 950})
    progress.update(2, "sft", {"train/loss": 1.0})
    progress.log("[bold]saved[/bold] " + "x" * 200)
    for step in range(3, 8):
      progress.update(step, "rl", STEP)
  numbers = "reward 0.62 (math 0.58 format 1.00)  acc 0.58  len 21  3.1k tok/s"
  assert out.getvalue().splitlines() == [
    "sft  1/8  loss 1.23  950 tok/s",
    "[bold]saved[/bold] " + "x" * 200,
    "sft  2/8  loss 1.00  0:12 left",
    f"rl  3/8  {numbers}",
    f"rl  6/8  {numbers}  0:04 left",
    f"rl  7/8  {numbers}  0:02 left",
  ]


def on_a_terminal(show, monkeypatch):
  """Returns what `show(stream)` writes to a pseudo-terminal."""
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "100")
  for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
    monkeypatch.delenv(name, raising=False)
  main, terminal = pty.openpty()
  chunks = []

  def collect():
    with contextlib.suppress(OSError):  # read() raises it when the other end is closed
      while chunk := os.read(main, 1 << 16):
        chunks.append(chunk)

  reader = threading.Thread(target=collect)
  reader.start()
  with open(terminal, "w", encoding="utf-8") as stream:
    show(stream)
  reader.join()
  os.close(main)
  return b"".join(chunks).decode()


def test_display_on_a_terminal_is_live(monkeypatch):
  def show(stream):
    with metrics.Progress(total=8, stream=stream) as progress:
      progress.update(1, "rl", STEP)
      progress.log("[bold]saved")
      progress.update(2, "rl", STEP)

  text = on_a_terminal(show, monkeypatch)
  assert "\x1b[" in text
  assert "[bold]saved" in text
  assert "2/8" in text and "left, ends " in text
  assert "reward 0.62 (math 0.58 format 1.00)  acc 0.58  len 21  3.1k tok/s" in text


def test_results_table(monkeypatch):
  changes = [
    metrics.Change("overall", 0.5, 0.625),
    metrics.Change("perception", 0.75, 0.7),
    metrics.Change("reasoning", 0.1, None),
  ]
  out = io.StringIO()
  metrics.results_table(changes, stream=out)
  assert out.getvalue() == (
    "held-out accuracy  before  after          gain\n"
    "overall             50.0%  62.5%  +12.5 points\n"
    "perception          75.0%  70.0%   -5.0 points\n"
    "reasoning           10.0%      -             -\n"
  )
  text = on_a_terminal(lambda stream: metrics.results_table(changes, stream=stream), monkeypatch)
  assert "\x1b[32m" in text and "+12.5 points" in text


def test_duration():
  assert [metrics.duration(s) for s in (0, 59.6, 100, 7509)] == ["0:00", "1:00", "1:40", "2:05:09"]

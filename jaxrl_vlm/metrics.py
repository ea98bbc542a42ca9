"""Metrics of a run: a JSON-lines file, TensorBoard events, and a live display.

Every record has `step`, counted over all stages, and `stage` ("sft" or "rl"). The other keys are
metrics, for example `train/reward`, `train/reward/<verifier>`, `train/accuracy`,
`train/response_length`, `time/tokens_per_second`, `objective/<name>`, `eval/accuracy` and
`eval/accuracy/<skill>`.
"""

import collections
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from jaxrl_vlm.config import write_atomically
from jaxrl_vlm.errors import UserError

METRICS_FILE = "metrics.jsonl"
DROPPED_FILE = "metrics.dropped.jsonl"
TENSORBOARD_DIR = "tensorboard"

Record = dict[str, Any]


class MetricsWriter:
  """Appends records to `metrics.jsonl` and to TensorBoard events.

  Only one process of a run writes. A run that is resumed from a checkpoint repeats the steps after
  it. The records of these steps are moved to `metrics.dropped.jsonl`, so that `metrics.jsonl`
  contains no step twice.

  Args:
    workdir: directory of the run. It is created if it does not exist.
    start: first step that this writer will write; 0 for a new run.
    keep: maximum number of existing records to keep, because a resumed run can also repeat an
      evaluation, whose record has a step before `start`. None keeps all records of steps before
      `start`.

  Attributes:
    records: number of records in `metrics.jsonl`.

  Raises:
    UserError: a file cannot be written (full disk, permissions); the message names the file.
  """

  def __init__(self, workdir: str | os.PathLike, start: int = 0, keep: int | None = None):
    self._path = pathlib.Path(workdir) / METRICS_FILE
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self.records = _drop_from(self._path, start, keep)
      self._events = _EventFile(self._path.parent / TENSORBOARD_DIR, start)
    except OSError as error:
      raise _cannot_write(error, self._path) from error

  def write(self, step: int, stage: str, values: Mapping[str, Any]) -> None:
    """Writes one record. It is in both files when this method returns.

    Args:
      step: number of finished steps, over all stages.
      stage: kind of the current stage, "sft" or "rl".
      values: metrics by key, each a number or a value that float() accepts. NaN and infinities are
        written as null in `metrics.jsonl`.

    Raises:
      UserError: a file cannot be written; the message names the file.
    """
    numbers = {
      key: int(value) if isinstance(value, int) else float(value) for key, value in values.items()
    }
    record = {"step": int(step), "stage": stage}
    record.update({key: value if math.isfinite(value) else None for key, value in numbers.items()})
    try:
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
      self.records += 1
      self._events.write(int(step), numbers)
    except OSError as error:
      raise _cannot_write(error, self._path) from error

  def close(self) -> None:
    self._events.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


class _EventFile:
  """A TensorBoard event file that is written in the calling thread.

  tensorboardX.SummaryWriter writes in a thread of its own. A full disk ends this thread, and the
  next flush then waits for it forever.
  """

  def __init__(self, folder: pathlib.Path, start: int):
    from tensorboardX.event_file_writer import EventsWriter  # slow to import
    from tensorboardX.proto import event_pb2, summary_pb2

    events: Any = event_pb2  # generated on import, therefore unknown to type checkers
    summaries: Any = summary_pb2
    self._event, self._summary = events.Event, summaries.Summary
    folder.mkdir(exist_ok=True)
    # The suffix makes the name unique if the run is restarted within a second.
    self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns()}")
    # TensorBoard then ignores the events of earlier files from this step on.
    log = events.SessionLog(status=events.SessionLog.START)
    self._writer.write_event(events.Event(wall_time=time.time(), step=start, session_log=log))
    self._writer.flush()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    summary = self._summary(
      value=[self._summary.Value(tag=key, simple_value=value) for key, value in values.items()]
    )
    self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _cannot_write(error: OSError, path: pathlib.Path) -> UserError:
  return UserError(
    f"{error.filename or path}: cannot write metrics: {error.strerror}; correct this and run the"
    " same command again to resume the run"
  )


def _drop_from(path: pathlib.Path, start: int, keep: int | None) -> int:
  """Moves records that a resumed run repeats, and incomplete lines, to `DROPPED_FILE`.

  Records are moved if their step is at least `start`, or if they come after the first `keep`
  records.

  Returns:
    The number of remaining records.
  """
  if not path.exists():
    return 0
  kept, dropped = [], []
  text = path.read_text(encoding="utf-8", errors="replace")
  for line in text.splitlines():
    record = _parse(line)
    known = record is not None and record["step"] < start and (keep is None or len(kept) < keep)
    (kept if known else dropped).append(line + "\n")
  if not dropped and text.endswith("\n"):
    return len(kept)
  # Copy before removing: if the process is killed in between, no record is lost.
  with open(path.with_name(DROPPED_FILE), "a", encoding="utf-8") as file:
    file.writelines(dropped)
    file.flush()
    os.fsync(file.fileno())
  write_atomically(path, "".join(kept))
  return len(kept)


def _parse(line: str) -> Record | None:
  try:
    record = json.loads(line)
  except ValueError:
    return None
  return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read(workdir: str | os.PathLike) -> list[Record]:
  """Returns the records of a run in the order in which they were written.

  The list is empty if there is no file. An incomplete last line, which may still be being written,
  is ignored.

  Raises:
    UserError: a line before the last one is not a record.
  """
  path = pathlib.Path(workdir) / METRICS_FILE
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  records = []
  for number, line in enumerate(lines, 1):
    record = _parse(line)
    if record is not None:
      records.append(record)
    elif number < len(lines):
      raise UserError(f"{path}:{number}: not a metrics record: {line[:60]!r}")
  return records


class Change(NamedTuple):
  """A held-out accuracy (0 to 1) before and after the last stage that was evaluated.

  Attributes:
    name: "overall", or the skill.
    before: accuracy before the stage.
    after: accuracy of the last evaluation. None if it was not evaluated again.
  """

  name: str
  before: float
  after: float | None


def before_and_after(records: Sequence[Record]) -> list[Change]:
  """Returns the held-out accuracies before and after the last stage that was evaluated.

  *After* is the last evaluation of the run. *Before* is the first evaluation of the same stage,
  which is recognized because no training step separates it from the evaluation at the end of the
  previous stage. If there is none, it is the last evaluation of a stage of another kind, or else
  the first evaluation of the run.

  Args:
    records: all records of a run, from `read`.

  Returns:
    The overall accuracy, then the skills in alphabetical order. The list is empty if the run has no
    evaluation.
  """
  evals = [i for i, record in enumerate(records) if record.get("eval/accuracy") is not None]
  if not evals:
    return []
  first, last = evals[0], evals[-1]
  for i, j in itertools.pairwise(evals):
    trained = any(key.startswith("train/") for record in records[i:j] for key in record)
    if not trained and j != last:
      first = j
    elif records[i]["stage"] != records[j]["stage"]:
      first = i
  changes = []
  for key, before in records[first].items():
    if (key + "/").startswith("eval/accuracy/") and before is not None:
      name = key.removeprefix("eval/accuracy").strip("/") or "overall"
      changes.append(Change(name, before, records[last].get(key) if last != first else None))
  return sorted(changes, key=lambda change: (change.name != "overall", change.name))


class Progress:
  """Live display of a run.

  On a terminal it shows a progress bar and the current metrics. Otherwise it prints a line every
  `every` steps.

      with Progress(total=120) as progress:
        progress.update(12, "rl", {"train/reward": 0.62, ...})

  Args:
    total: number of steps of all stages together.
    every: number of steps between two lines if the output is not a terminal. The first and the last
      step of a stage are always printed.
    stream: output stream; stdout by default.
  """

  def __init__(self, total: int, every: int = 10, stream: TextIO | None = None):
    self._total, self._every = total, every
    self._console = Console(file=stream or sys.stdout, highlight=False)
    self._stage = ""
    self._line = ""
    self._step = self._printed = -1
    self._clock: collections.deque[tuple[int, float]] = collections.deque(maxlen=50)
    self._bar = RichProgress(
      TextColumn("{task.description}", markup=False),
      BarColumn(bar_width=None),
      TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[left]}", markup=False),
      console=self._console,
      expand=True,
    )
    self._task = self._bar.add_task("", total=total, left="")
    self._live: Live | None = None

  def __enter__(self) -> "Progress":
    if self._console.is_terminal:
      self._live = Live(self._bar, console=self._console, refresh_per_second=4)
      self._live.start()
    return self

  def __exit__(self, *exception) -> None:
    if self._live:
      self._live.stop()
    elif self._printed != self._step:
      self.log(self._line)

  def update(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
    """Shows the metrics of one training step.

    Args:
      step: number of finished steps, over all stages.
      stage: kind of the current stage, "sft" or "rl".
      metrics: metrics by key, as in the records. `describe` selects the ones that are shown.
    """
    new_stage = stage != self._stage
    if new_stage:
      if self._stage and not self._live and self._printed != self._step:
        self.log(self._line)
      self._clock.clear()  # the speed of another stage says nothing about this one
    self._stage, self._step = stage, step
    self._clock.append((step, time.monotonic()))
    seconds = self._seconds_left()
    left = "" if seconds is None else f"{duration(seconds)} left"
    summary = describe(metrics)
    self._line = "  ".join(filter(None, (stage, f"{step}/{self._total}", summary, left)))
    if self._live:
      if seconds is not None:
        left += time.strftime(", ends %H:%M", time.localtime(time.time() + seconds))
      self._bar.update(self._task, completed=step, description=stage, left=left)
      self._live.update(Group(self._bar, Text(summary)))
    elif new_stage or step % self._every == 0:
      self.log(self._line)

  def log(self, text: str) -> None:
    """Prints a separate line, above the progress bar if there is one."""
    if self._console.is_terminal:
      self._console.print(text, markup=False)
    else:
      # Not with rich, which would wrap the line at 80 columns.
      print(text, file=self._console.file, flush=True)
      if text == self._line:
        self._printed = self._step

  def _seconds_left(self) -> float | None:
    """Estimates the remaining seconds from the mean time of the last steps.

    None until a second step has ended, because the first step compiles.
    """
    (first_step, first), (step, now) = self._clock[0], self._clock[-1]
    if step <= first_step:
      return None
    return (now - first) / (step - first_step) * (self._total - step)


def describe(metrics: Mapping[str, Any]) -> str:
  """Returns a one-line summary such as `reward 0.62 (math 0.58 format 1.00)  acc 0.58  len 21`."""
  parts = []
  if "train/reward" in metrics:
    prefix = "train/reward/"
    components = " ".join(
      f"{key.removeprefix(prefix)} {_number(value)}"
      for key, value in metrics.items()
      if key.startswith(prefix)
    )
    parts.append(
      f"reward {_number(metrics['train/reward'])}" + (f" ({components})" if components else "")
    )
  elif "train/loss" in metrics:
    parts.append(f"loss {_number(metrics['train/loss'])}")
  if "train/accuracy" in metrics:
    parts.append(f"acc {_number(metrics['train/accuracy'])}")
  if "train/response_length" in metrics:
    parts.append(f"len {float(metrics['train/response_length']):.0f}")
  if "time/tokens_per_second" in metrics:
    parts.append(f"{_compact(float(metrics['time/tokens_per_second']))} tok/s")
  return "  ".join(parts)


def _number(value: Any) -> str:
  return f"{float(value):.2f}"


def _compact(value: float) -> str:
  """Formats 3120 as 3.1k."""
  for unit, size in (("M", 1e6), ("k", 1e3)):
    if value >= size:
      return f"{value / size:.1f}{unit}"
  return f"{value:.0f}"


def duration(seconds: float) -> str:
  """Formats seconds as 1:40 (minutes:seconds) or 2:05:09 (hours:minutes:seconds)."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def results_table(
  changes: Sequence[Change], title: str = "held-out accuracy", stream: TextIO | None = None
) -> None:
  """Prints a table of accuracies before and after in percent, with the gain in percentage points.

  Args:
    changes: from `before_and_after`.
    title: heading of the first column.
    stream: output stream; stdout by default. If it is not a terminal, the table is plain text.
  """
  rows = [[title, "before", "after", "gain"]]
  for change in changes:
    after, gain = "-", "-"
    if change.after is not None:
      after, gain = f"{change.after:.1%}", f"{100 * (change.after - change.before):+.1f} points"
    rows.append([change.name, f"{change.before:.1%}", after, gain])
  stream = stream or sys.stdout
  console = Console(file=stream)
  if console.is_terminal:
    table = Table()
    for index, name in enumerate(rows[0]):
      table.add_column(Text(name), justify="right" if index else "left")
    for row in rows[1:]:
      style = "green" if row[-1].startswith("+") else "red" if len(row[-1]) > 1 else ""
      table.add_row(*[Text(cell) for cell in row[:-1]], Text(row[-1], style=style))
    console.print(table)
    return
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  for row in rows:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    print("  ".join(cells), file=stream, flush=True)

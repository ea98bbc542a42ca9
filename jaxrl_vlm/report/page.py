"""`report.html`: one page about a run that opens from disk, without scripts or other files."""

import base64
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxrl_vlm import config as config_lib
from jaxrl_vlm import metrics as metrics_lib
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.report import plots, rollouts

REPORT_FILE = "report.html"

_MAX_SIDE = 640  # pixels: an embedded picture is no wider and no higher, to keep the page small
_MAX_EXAMPLES = 8  # per sampled step
_MAX_TEXT = 4000  # characters of one response


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes `report.html` from the metrics, rollouts and config in `workdir`; returns its path.

  What a run has not written (yet) is left out. Texts of the model and of the data are untrusted:
  the template escapes them all, and the page's policy forbids scripts and every request.

  Raises:
    UserError: a file of the run cannot be read, or the report cannot be written; names it.
  """
  import jinja2  # here: reward workers import the entry points too, and need none of it

  workdir = pathlib.Path(workdir)
  folder = pathlib.Path(__file__).parent
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(folder),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  page = environment.get_template("report.html").render(
    style_hash=_style_hash(folder / "report.html"), **_facts(workdir)
  )
  path = workdir / REPORT_FILE
  try:
    config_lib.write_atomically(path, page)
  except OSError as error:
    raise UserError(f"{path}: cannot write the report: {error.strerror}") from error
  return path


def _style_hash(template: pathlib.Path) -> str:
  """The page's policy admits our one style sheet by its hash, and no other style."""
  style = template.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
  return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _facts(workdir: pathlib.Path) -> dict[str, Any]:
  """Everything that the template shows."""
  records = metrics_lib.read(workdir)
  config_file = workdir / config_lib.CONFIG_FILE
  config_text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
  main, other = _charts(records)
  return {
    "title": workdir.resolve().name,
    "plan": _plan(config_text),
    "changes": metrics_lib.before_and_after(records),
    "tiles": _tiles(records),
    "charts": main,
    "other_charts": other,
    "width": plots.WIDTH,
    "height": plots.HEIGHT,
    "sampled": _sampled(workdir),
    "config": config_text,
  }


def _plan(config_text: str) -> list[str]:
  """What each stage did, e.g. "rl: grpo, 120 steps"; of the usual fields, those that are there."""
  stages = json.loads(config_text).get("stages", []) if config_text else []
  plan = []
  for stage in stages:
    objective = (stage.get("objective") or {}).get("name")
    if objective == stage.get("kind"):
      objective = None
    steps = f"{stage['steps']} steps" if "steps" in stage else None
    facts = ", ".join(filter(None, (objective, steps)))
    plan.append(": ".join(filter(None, (stage.get("kind"), facts))))
  return plan


def _tiles(records: Sequence[metrics_lib.Record]) -> list[tuple[str, str]]:
  """Name and last value of the few numbers to see at a glance."""

  def last(key: str) -> float | None:
    return next((r[key] for r in reversed(records) if r.get(key) is not None), None)

  steps = str(records[-1]["step"]) if records else None
  formats = (
    ("reward", "train/reward", "{:.2f}"),
    ("train accuracy", "train/accuracy", "{:.1%}"),
    ("response tokens", "train/response_length", "{:.0f}"),
    ("tokens / s", "time/tokens_per_second", "{:,.0f}"),
  )
  tiles = [("steps", steps)] if steps else []
  for name, key, form in formats:
    value = last(key)
    if value is not None:
      tiles.append((name, form.format(value)))
  return tiles


def _charts(records: Sequence[metrics_lib.Record]) -> tuple[list[plots.Chart], list[plots.Chart]]:
  """The charts that matter, and one for each other metric."""
  curves: dict[str, plots.Series] = {}
  stages: list[tuple[float, str]] = []
  for record in records:
    if not stages or stages[-1][1] != record["stage"]:
      stages.append((record["step"], record["stage"]))
    for key, value in record.items():
      if key not in ("step", "stage") and (value is None or isinstance(value, (int, float))):
        steps, values = curves.setdefault(key, ([], []))
        steps.append(record["step"])  # type: ignore[attr-defined]
        values.append(value)  # type: ignore[attr-defined]

  def take(names: Iterable[tuple[str, str]]) -> dict[str, plots.Series]:
    return {name: curves.pop(key) for key, name in names if key in curves}

  def below(prefix: str) -> list[tuple[str, str]]:
    return [(key, key.removeprefix(prefix)) for key in sorted(curves) if key.startswith(prefix)]

  main = [
    plots.chart("Reward", take([("train/reward", "total")]), stages),
    plots.chart("Reward by component", take(below("train/reward/")), stages),
    plots.chart(
      "Accuracy",
      take(
        [
          ("train/accuracy", "train"),
          ("eval/accuracy", "held-out"),
          *((key, f"held-out {name}") for key, name in below("eval/accuracy/")),
        ]
      ),
      stages,
    ),
    plots.chart("Response length, tokens", take([("train/response_length", "train")]), stages),
  ]
  other = [plots.chart(key, {key: curve}, stages) for key, curve in sorted(curves.items())]
  return [c for c in main if c], [c for c in other if c]


def _sampled(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The first, the middle and the last logged step, with pictures embedded and texts cut up."""
  steps = list(rollouts.read_rollouts(workdir).items())
  chosen = sorted({0, len(steps) // 2, len(steps) - 1}) if steps else []
  sampled = []
  for step, records in (steps[index] for index in chosen):
    examples = []
    for record in records[:_MAX_EXAMPLES]:
      images = [_embed(workdir / rollouts.FOLDER / name) for name in record["images"]]
      samples = [{**sample, "parts": _parts(sample["text"])} for sample in record["samples"]]
      examples.append({**record, "images": images, "samples": samples})
    sampled.append(
      {
        "step": step,
        "stage": records[0]["stage"] if records else "",
        "examples": examples,
        "more": max(0, len(records) - _MAX_EXAMPLES),
      }
    )
  return sampled


def _parts(text: str) -> list[tuple[str, str]]:
  """A response as (kind, text): `think` for the chain of thought, `boxed` for the final answer."""
  cut = text[:_MAX_TEXT]
  parts = []
  for part in re.split(r"(<think>.*?</think>|\\boxed\{[^{}]*\})", cut, flags=re.DOTALL):
    kind = (
      "think"
      if part.startswith("<think>") and part.endswith("</think>")
      else "boxed"
      if part.startswith("\\boxed{")
      else "plain"
    )
    if part:
      parts.append((kind, part))
  if len(text) > len(cut):
    parts.append(("think", f" … and {len(text) - len(cut)} characters more"))
  return parts


def _embed(path: pathlib.Path) -> dict[str, Any] | None:
  """A picture as a data URI with its size; None if the file is missing or does not decode."""
  from PIL import Image

  try:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
      if max(image.size) > _MAX_SIDE:
        image.thumbnail((_MAX_SIDE, _MAX_SIDE))
        out = io.BytesIO()
        image.save(out, format="PNG")
        data = out.getvalue()
      # Small boards are shown enlarged, with their pixels kept sharp.
      scale = max(1, 224 // max(image.size))
      size = (image.width * scale, image.height * scale)
  except (OSError, ValueError, Image.DecompressionBombError):
    return None
  uri = "data:image/png;base64," + base64.b64encode(data).decode()
  return {"uri": uri, "width": size[0], "height": size[1], "sharp": scale > 1}

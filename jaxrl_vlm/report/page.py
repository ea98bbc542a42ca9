"""Writes `report.html`, a page about a run. It has no scripts and needs no other files."""

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

_MAX_SIDE = 640  # maximum width and height of an embedded image in pixels
_MAX_EXAMPLES = 8  # maximum number of examples of each step
_MAX_TEXT = 4000  # maximum number of characters of a response


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes `report.html` from the metrics, rollouts and config in `workdir`. Returns its path.

  Sections whose files do not exist (yet) are left out. Texts of the model and of the dataset are
  untrusted. The template escapes them, and the content security policy of the page forbids scripts
  and requests.

  Raises:
    UserError: a file of the run cannot be read, or the report cannot be written. The message names
      the file.
  """
  import jinja2  # not at the top, so that importing this package imports only what it needs

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
  """Returns the hash of the style sheet. The security policy of the page allows only this style."""
  style = template.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
  return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _facts(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns all variables of the template."""
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
  """Returns a description of each stage, such as "rl: grpo, 120 steps"."""
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
  """Returns name and last value of the most important metrics."""

  def last(key: str) -> float | None:
    return next((r[key] for r in reversed(records) if r.get(key) is not None), None)

  steps = str(records[-1]["step"]) if records else None
  formats = (
    ("reward", "train/reward", "{:.2f}"),
    ("train accuracy", "train/accuracy", "{:.1%}"),
    ("tokens per response", "train/response_length", "{:.0f}"),
    ("tokens per second", "time/tokens_per_second", "{:,.0f}"),
  )
  tiles = [("steps", steps)] if steps else []
  for name, key, form in formats:
    value = last(key)
    if value is not None:
      tiles.append((name, form.format(value)))
  return tiles


def _charts(records: Sequence[metrics_lib.Record]) -> tuple[list[plots.Chart], list[plots.Chart]]:
  """Returns the main charts, and the charts of all other metrics."""
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
    plots.chart("Reward by verifier", take(below("train/reward/")), stages),
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
  """Returns the rollouts of the first, the middle and the last saved step, for the template."""
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
  """Splits a response into (kind, text). The kind is `think`, `boxed` (an answer) or `plain`."""
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
    parts.append(("think", f" … and {len(text) - len(cut)} more characters"))
  return parts


def _embed(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns an image as a data URI and its size. None if the file is missing or does not decode."""
  from PIL import Image

  try:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
      if max(image.size) > _MAX_SIDE:
        image.thumbnail((_MAX_SIDE, _MAX_SIDE))
        out = io.BytesIO()
        image.save(out, format="PNG")
        data = out.getvalue()
      # Small images, such as digit boards, are enlarged without interpolation.
      scale = max(1, 224 // max(image.size))
      size = (image.width * scale, image.height * scale)
  except (OSError, ValueError, Image.DecompressionBombError):
    return None
  uri = "data:image/png;base64," + base64.b64encode(data).decode()
  return {"uri": uri, "width": size[0], "height": size[1], "sharp": scale > 1}

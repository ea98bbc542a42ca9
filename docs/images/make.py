"""Draws the README's pictures from a finished run.

    python docs/images/make.py runs/quickstart

board.png: the first held-out questions that the start of the run answers wrong and its end right,
each of another task. curve.png: held-out and training accuracy by step.
"""

import io
import pathlib
import sys
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import jaxrl_vlm as jv
from jaxrl_vlm import config, metrics, report
from jaxrl_vlm.data import sources

HERE = pathlib.Path(__file__).parent
BOARDS = 3


def answers(path, settings, examples) -> list[str]:
  model, params, processor = jv.load_pretrained(
    path, prompt_buckets=settings.prompt_buckets, patch_buckets=settings.patch_buckets)
  system = settings.system_prompt or None
  prompt = processor.collate([processor.encode(example, system) for example in examples])
  sampling = jv.Sampling(max_tokens=settings.stages[-1].max_tokens, temperature=0.0)
  rollout = jv.generate(model, params, prompt, sampling, processor=processor)
  return [row[0] for row in rollout.text]


def draw_boards(run: pathlib.Path, settings) -> None:
  stage = settings.stages[-1]
  source = sources.open_source(stage.data, "test")
  examples = [source[i] for i in range(min(128, len(source)))]
  before = answers(settings.model.path, settings, examples)
  after = answers(run / "model", settings, examples)
  reward = jv.rewards.create({"exact": 1.0})
  chosen = {}
  for example, old, new in zip(examples, before, after, strict=True):
    if reward(example, old)["total"] < 1 <= reward(example, new)["total"]:
      chosen.setdefault(example.meta.get("task"), (example, old, new))

  figure = Figure(figsize=(12, 4.6), dpi=130, layout="constrained")
  FigureCanvasAgg(figure)
  for number, (example, old, new) in enumerate(list(chosen.values())[:BOARDS]):
    axes = figure.add_subplot(1, BOARDS, number + 1)
    board = Image.open(io.BytesIO(example.images[0]))
    axes.imshow(np.asarray(board), interpolation="nearest")
    axes.set_title(example.question, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    texts = (f"right:  {example.answer}", f"before: {old}", f"after:  {new}")
    lines = [textwrap.fill(text, 40, subsequent_indent=" " * 8) for text in texts]
    axes.set_xlabel("\n".join(lines), fontsize=9, family="monospace", loc="left")
  figure.savefig(HERE / "board.png")


def draw_curve(run: pathlib.Path) -> None:
  records = metrics.read(run)

  def series(key):
    points = [(r["step"], 100 * r[key]) for r in records if r.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]

  report.save_curve(HERE / "curve.png", {
    "held-out, greedy": series("eval/accuracy"),
    "while training, sampled": series("train/accuracy"),
  }, y_label="accuracy, %")


def main() -> None:
  run = pathlib.Path(sys.argv[1])
  draw_boards(run, config.from_json((run / "config.json").read_text()))
  draw_curve(run)


if __name__ == "__main__":
  main()

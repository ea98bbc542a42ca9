"""Draws the images of the README from a finished run of the quickstart.

    python benchmarks/picture.py --run runs/quickstart

docs/images/board.png shows a board with the answers before and after RL. docs/images/curve.png
shows the accuracy during training.
"""

import argparse
import io
import json
import pathlib
import sys
import textwrap

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import jaxrl_vlm as jv  # noqa: E402
from jaxrl_vlm import metrics, report  # noqa: E402
from jaxrl_vlm.data import digit_boards  # noqa: E402

EXACT = jv.rewards.create({"exact": 1.0})


def answers(path: pathlib.Path, examples) -> list[str]:
  model, params, processor = jv.load_pretrained(path)
  prompt = processor.collate([processor.encode(e) for e in examples])
  rollout = jv.generate(
    model, params, prompt, jv.Sampling(max_tokens=64, temperature=0), jax.random.key(0), processor
  )
  return [row[0] for row in rollout.text]


def draw(path: pathlib.Path, example, before: str, after: str) -> None:
  figure = Figure(figsize=(9, 3.2), layout="constrained")
  image, words = figure.subplots(1, 2, width_ratios=(1, 2))
  image.imshow(np.asarray(Image.open(io.BytesIO(example.images[0]))), interpolation="nearest")
  image.axis("off")
  words.axis("off")
  y = 1.0
  for head, text, colour in (
    (example.question, f"(right answer: {example.answer})", "black"),
    ("before RL", before, "firebrick"),
    ("after RL", after, "darkgreen"),
  ):
    lines = textwrap.wrap(text, 58)
    words.text(0, y, head, weight="bold", va="top", size=12)
    words.text(0, y - 0.11, "\n".join(lines), va="top", size=11, color=colour, family="monospace")
    y -= 0.18 + 0.085 * len(lines)
  figure.savefig(path, dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", type=pathlib.Path, default=ROOT / "runs" / "quickstart")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "images")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  base = json.loads((args.run / "config.json").read_text())["model"]["path"]
  examples = [
    digit_boards.make_example("test", 2, i, tasks=("sum_row", "sum_column", "count"))
    for i in range(64)
  ]
  pairs = zip(answers(ROOT / base, examples), answers(args.run / "model", examples), strict=True)
  changed = [
    (e, b, a)
    for e, (b, a) in zip(examples, pairs, strict=True)
    if EXACT(e, b)["total"] < 1 and EXACT(e, a)["total"] == 1
  ]
  print(f"{len(changed)} of {len(examples)} questions are right after RL and were wrong before")
  # Draw the largest board.
  draw(args.out / "board.png", *max(changed, key=lambda c: c[0].meta["rows"] * c[0].meta["cols"]))

  records = metrics.read(args.run)
  curves = {}
  for name, key in (("training, sampled", "train/accuracy"), ("held-out, greedy", "eval/accuracy")):
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    curves[name] = tuple(zip(*points, strict=True))
  report.save_curve(
    args.out / "curve.png", curves, "Accuracy on digit boards", "RL step", "accuracy"
  )


if __name__ == "__main__":
  main()

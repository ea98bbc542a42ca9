"""Prints the tables of docs/performance.md from the results of the other benchmarks.

    python benchmarks/performance.py

It measures nothing: it formats the JSON files in `benchmarks/`.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import growth, rl_step, speed  # noqa: E402
from jaxrl_vlm import flops, scratch  # noqa: E402


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table. The first column is text, the others are numbers."""
  cells = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
  return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def cases(values: dict) -> dict[str, dict]:
  """The results of a benchmark by case, without the entry that describes the machine."""
  return {name: r for name, r in values.items() if name != "about"}


def flop_ratio(side: int) -> float:
  """Returns the model FLOPs of a step with repeated prompts, divided by those with shared prompts.

  Args:
    side: width and height of the images in pixels.
  """
  config = scratch.model_config(rl_step.ARCHITECTURE)
  length, grid = (side // 28) ** 2 + len(rl_step.QUESTION.split()), side // 14

  def work(shared):
    args = config, length, [rl_step.TOKENS] * rl_step.GROUP, [(grid, grid)], shared
    return flops.forward(*args) + flops.forward_backward(*args)

  return work(False) / work(True)


def rl_step_table(values: dict) -> str:
  """A whole RL step, compared with TRL."""
  head = ["prompts with", "jaxrl_vlm, samples/s", "TRL, samples/s", "speedup", "FLOP ratio"]
  return markdown(
    head,
    [
      [
        name,
        f"{r['ours']:.1f}",
        f"{r['trl']:.2f}",
        f"{r['ratio']:.2f}",
        f"{flop_ratio(rl_step.CASES[name][0]):.1f}",
      ]
      for name, r in cases(values).items()
    ],
  )


def decode_table(values: dict) -> str:
  """Generation of responses, compared with `generate` of transformers."""
  head = [
    "responses",
    "jaxrl_vlm, tokens/s",
    "transformers, dynamic cache, tokens/s",
    "transformers, static cache, tokens/s",
    "speedup",
  ]
  return markdown(
    head,
    [
      [
        name,
        *(f"{r[side]:.0f}" for side in ("ours", "dynamic", "static")),
        f"{r['ratio']:.2f}",
      ]
      for name, r in cases(values).items()
    ],
  )


def update_table(values: dict) -> str:
  """The gradient of GRPO with shared prompts, with repeated prompts, and by transformers."""
  head = [
    "case",
    "shared, s",
    "repeated, s",
    "transformers, s",
    "speedup",
    "FLOP ratio",
    "realized saving",
    "MFU",
    "MFU of transformers",
    "padding",
  ]
  return markdown(
    head,
    [
      [
        name,
        *(f"{r['medians'][side]:.2f}" for side in ("shared", "separate", "torch")),
        f"{r['faster']:.2f}",
        f"{r['fewer_flops']:.2f}",
        f"{r['share']:.0%}",
        f"{r['mfu']['shared']:.0%}",
        f"{r['mfu']['torch']:.0%}",
        f"{r['padding']:.0%}",
      ]
      for name, r in cases(values).items()
      if "medians" in r
    ],
  )


def padding_table(values: dict) -> str:
  """The share of padding in the packed responses of a batch."""
  shares = values["padding of runs"]
  return markdown(
    ["length of the responses", "padding"],
    [[name, f"{share:.0%}"] for name, share in shares.items() if name != "date"],
  )


def host_table(values: dict) -> str:
  """Image preprocessing and grading on the host."""
  rows = [
    [
      f"{kind} images of 1024 x 768 pixels, images/s per core",
      f"{r['ours']:.1f}",
      f"{r['theirs']:.1f}",
    ]
    for kind, r in values["preprocessing"].items()
    if kind != "date"
  ]
  for name, r in values.items():
    if "samples_per_second" in r:
      verifier, _, workers = name.partition(", ")
      count = int(workers.split()[0])
      label = f"responses graded by `{verifier}`, {count} worker{'s' if count > 1 else ''}"
      rows.append([f"{label}, responses/s", f"{r['samples_per_second']:.0f}", ""])
  return markdown(["measurement", "jaxrl_vlm", "transformers"], rows)


def wait_table(values: dict) -> str:
  """What the main thread does during a step, and while the device is idle."""
  steps = {name: r for name, r in values.items() if "shares" in r}
  names = list(dict.fromkeys(key for r in steps.values() for key in r["shares"]))
  kinds = {"main_thread": "share of the step", "device_idle": "device idle"}
  head = ["main thread", *(f"{name}: {label}" for name in steps for label in kinds.values())]
  return markdown(
    head,
    [
      [name, *(f"{r['shares'][name][kind]:.1%}" for r in steps.values() for kind in kinds)]
      for name in names
    ],
  )


def gpu_table(values: dict) -> str:
  """The utilization of each GPU that was measured."""
  rows = []
  for card, r in cases(values).items():
    rows += [
      [f"{card}, {r['date']}: MFU of the update", f"{r['update_mfu']:.1%}"],
      ["decoding: share of the memory-bandwidth bound", f"{r['decode_bandwidth']:.1%}"],
    ]
    rows += [[f"one step: {part}, s", f"{seconds:.2f}"] for part, seconds in r["parts"].items()]
    rows.append(["one step: total, s", f"{r['step_seconds']:.2f}"])
  return markdown(["measurement on a GPU", "value"], rows)


TABLES = {
  "rl_step": (rl_step_table,),
  "decode": (decode_table,),
  "update": (update_table, padding_table),
  "host": (host_table, wait_table),
  "growth": (growth.table,),
  "gpu": (gpu_table,),
}


def tables() -> dict[str, list[str]]:
  """Returns the Markdown tables of each benchmark that has results, by name of the benchmark."""
  found = {}
  for name, makers in TABLES.items():
    path = speed.FOLDER / f"{name}.json"
    if path.exists():
      values = json.loads(path.read_text())
      found[name] = [make(values) for make in makers]
  return found


def main() -> None:
  for name, several in tables().items():
    print(f"{name}\n", *several, sep="\n", end="\n\n")


if __name__ == "__main__":
  main()

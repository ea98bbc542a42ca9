"""The tables of docs/performance.md, from what the other benchmarks have measured.

python benchmarks/performance.py
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
  """A table whose first column is text and whose others are numbers."""
  cells = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
  return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def cases(values: dict) -> dict[str, dict]:
  return {name: r for name, r in values.items() if name != "about"}


def fewer_flops(side: int) -> float:
  """How many times fewer model FLOPs a step has if a group shares its prompt."""
  config = scratch.model_config(rl_step.ARCHITECTURE)
  length, grid = (side // 28) ** 2 + len(rl_step.QUESTION.split()), side // 14

  def work(sharing):
    args = config, length, [rl_step.TOKENS] * rl_step.GROUP, [(grid, grid)], sharing
    return flops.forward(*args) + flops.forward_backward(*args)

  return work(False) / work(True)


def rl_step_table(values: dict) -> str:
  head = [
    "prompts of",
    "jaxrl_vlm, samples/s",
    "TRL, samples/s",
    "times as many",
    "asked",
    "times fewer model FLOPs",
  ]
  return markdown(
    head,
    [
      [
        name,
        f"{r['ours']:.1f}",
        f"{r['trl']:.2f}",
        f"{r['ratio']:.2f}",
        f"{r['asked']:.0f}",
        f"{fewer_flops(rl_step.CASES[name][0]):.1f}",
      ]
      for name, r in cases(values).items()
    ],
  )


def decode_table(values: dict) -> str:
  head = [
    "responses",
    "jaxrl_vlm, tokens/s",
    "generate, dynamic cache",
    "generate, static cache",
    "times the better one",
    "asked",
  ]
  return markdown(
    head,
    [
      [
        name,
        *(f"{r[side]:.0f}" for side in ("ours", "dynamic", "static")),
        f"{r['ratio']:.2f}",
        f"{r['asked']:.0f}",
      ]
      for name, r in cases(values).items()
    ],
  )


def update_table(values: dict) -> str:
  head = [
    "gradient of",
    "shared, s",
    "separate, s",
    "torch, s",
    "times faster",
    "times fewer FLOPs",
    "share of that",
    "asked",
    "MFU",
    "asked",
    "torch's MFU",
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
        f"{r['asked']['share']:.0%}",
        f"{r['mfu']['shared']:.0%}",
        f"{r['asked']['mfu']:.0%}",
        f"{r['mfu']['torch']:.0%}",
        f"{r['padding']:.0%}",
      ]
      for name, r in cases(values).items()
      if "medians" in r
    ],
  )


def padding_table(values: dict) -> str:
  found = values["padding of runs"]
  return markdown(
    ["64 prompts of 8 responses", "padding", "asked: under"],
    [[name, f"{share:.0%}", "15%"] for name, share in found.items() if name != "date"],
  )


def host_table(values: dict) -> str:
  rows = [
    [
      f"{kind} images of 1024 x 768, a second and core",
      f"{r['ours']:.1f}",
      f"transformers: {r['theirs']:.1f}",
    ]
    for kind, r in values["preprocessing"].items()
    if kind != "date"
  ]
  rows += [
    [
      f"responses graded a second by `{name.split(',')[0]}`,{name.split(',')[1]}",
      f"{r['samples_per_second']:.0f}",
      "",
    ]
    for name, r in values.items()
    if "samples_per_second" in r
  ]
  return markdown(["on the host", "here", "beside it"], rows)


def wait_table(values: dict) -> str:
  """Of the main thread's time in a step, and of it where nothing was in flight."""
  steps = {name: r for name, r in values.items() if "shares" in r}
  names = list(dict.fromkeys(key for r in steps.values() for key in r["shares"]))
  head = ["main thread", *steps]
  return markdown(
    head,
    [
      [
        name,
        *(
          "{main_thread:.1%}, waited for {device_idle:.1%}".format_map(r["shares"][name])
          for r in steps.values()
        ),
      ]
      for name in names
    ],
  )


def gpu_table(values: dict) -> str:
  rows = []
  for card, r in cases(values).items():
    rows += [
      [
        f"{card}, {r['date']}: update, MFU",
        f"{r['update_mfu']:.1%}",
        f"{r['asked']['update_mfu']:.0%}",
      ],
      [
        "decoding, of the bandwidth's bound",
        f"{r['decode_bandwidth']:.1%}",
        f"{r['asked']['decode_bandwidth']:.0%}",
      ],
    ]
    rows += [[f"a step: {part}, s", f"{seconds:.2f}", ""] for part, seconds in r["parts"].items()]
    rows.append(["a whole step, s", f"{r['step_seconds']:.2f}", ""])
  return markdown(["on a GPU", "measured", "asked"], rows)


TABLES = {
  "rl_step": (rl_step_table,),
  "decode": (decode_table,),
  "update": (update_table, padding_table),
  "host": (host_table, wait_table),
  "growth": (growth.table,),
  "gpu": (gpu_table,),
}


def tables() -> dict[str, list[str]]:
  """The tables of each benchmark that has results."""
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

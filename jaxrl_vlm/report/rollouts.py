"""Writes and reads saved rollouts: `rollouts/step_000010.jsonl`, and each image as one PNG file."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_vlm.config import write_atomically
from jaxrl_vlm.data.images import ImageError, decode_image
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.example import Example

FOLDER = "rollouts"
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Sample:
  """One response with its reward and advantage.

  Attributes:
    text: the response.
    reward: weighted sum of the verifiers.
    components: value of each verifier, without its weight, by metric name.
    advantage: advantage of the response, or of its first token if advantages differ by token.
    length: number of response tokens, including the end token.
  """

  text: str
  reward: float
  components: Mapping[str, float]
  advantage: float
  length: int


class RolloutLog:
  """Writes rollouts of a run. If a resumed run repeats a step, its rollouts are replaced."""

  def __init__(self, workdir: str | os.PathLike):
    self._folder = pathlib.Path(workdir) / FOLDER

  def write(
    self, step: int, stage: str, groups: Sequence[tuple[Example, Sequence[Sample]]]
  ) -> None:
    """Writes the rollouts of one step, one line for each example.

    Args:
      step: number of steps finished so far, over all stages.
      stage: name of the current stage.
      groups: examples (with their images), each with its samples.

    Raises:
      UserError: a file cannot be written (full disk, permissions), or an image does not decode.
    """
    try:
      (self._folder / "images").mkdir(parents=True, exist_ok=True)
      lines = []
      for example, samples in groups:
        lines.append(
          json.dumps(
            {
              "step": step,
              "stage": stage,
              "id": example.id,
              "question": example.question,
              "answer": example.answer,
              "images": [self._write_image(image, example.id) for image in example.images],
              "samples": [_plain(sample) for sample in samples],
            }
          )
        )
      path = self._folder / f"step_{step:06}.jsonl"
      write_atomically(path, "".join(line + "\n" for line in lines))
    except OSError as error:
      path = error.filename or self._folder
      raise UserError(f"{path}: cannot write rollouts: {error.strerror}") from error

  def _write_image(self, image: bytes, example_id: str) -> str:
    """Stores an image as a PNG file. Returns its path relative to the folder of rollouts."""
    name = f"images/{hashlib.sha256(image).hexdigest()[:24]}.png"
    path = self._folder / name
    if path.exists():
      return name
    if not image.startswith(_PNG):
      image = _as_png(image, example_id)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(image)
    os.replace(temporary, path)
    return name


def _as_png(image: bytes, example_id: str) -> bytes:
  """Decodes an image as for the model (`decode_image`), and encodes it as PNG."""
  out = io.BytesIO()
  try:
    decode_image(image, f"example {example_id!r}: its image").save(out, format="PNG")
  except ImageError as error:
    raise UserError(str(error)) from error
  return out.getvalue()


def _plain(sample: Sample) -> dict[str, Any]:
  return {
    "text": sample.text,
    "reward": float(sample.reward),
    "components": {name: float(value) for name, value in sample.components.items()},
    "advantage": float(sample.advantage),
    "length": int(sample.length),
  }


def read_rollouts(workdir: str | os.PathLike) -> dict[int, list[dict[str, Any]]]:
  """Returns the saved records by step, in ascending order.

  The paths of images in the records are relative to `workdir/rollouts`.

  Raises:
    UserError: a file does not contain records as `RolloutLog` writes them.
  """
  steps = {}
  for path in sorted((pathlib.Path(workdir) / FOLDER).glob("step_*.jsonl")):
    try:
      text = path.read_text(encoding="utf-8")
      steps[int(path.stem.removeprefix("step_"))] = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
      raise UserError(f"{path}: not a file of rollouts: {error}") from error
  return dict(sorted(steps.items()))

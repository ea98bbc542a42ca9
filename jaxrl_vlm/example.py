"""One question about images. Free of jax: reward workers and data workers import it."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
  """One task: images, a question, and what a right answer is.

  Attributes:
    id: unique within its dataset; stable between runs.
    question: the user's text. `<image>` marks where each image goes; without any mark the images
      come first.
    answer: the ground truth that verifiers compare with; may be empty only in supervised stages.
    images: encoded PNG or JPEG files (bytes), in order. Empty when sent to reward workers.
    target: the response to imitate in a supervised stage (None elsewhere).
    rewards: verifiers that judge this sample and their weights, e.g. {"math": 0.9, "format": 0.1};
      None means the stage's own.
    meta: JSON-like facts about the sample: `skill` groups accuracies; anything else is for
      verifiers and reports (cells, boxes, choices ...).
    origin: Where the example was read, for error messages, such as "data/train.jsonl:17"; empty if
      unknown. Comparisons ignore it.
  """

  id: str
  question: str
  answer: str
  images: tuple[bytes, ...] = ()
  target: str | None = None
  rewards: Mapping[str, float] | None = None
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  origin: str = dataclasses.field(default="", compare=False)

  @property
  def name(self) -> str:
    """What error messages call the example: where it was read, if that is known, and its id."""
    return f"{self.origin}: example {self.id!r}" if self.origin else f"example {self.id!r}"

  def replace(self, **changes) -> "Example":
    return dataclasses.replace(self, **changes)

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
  """

  id: str
  question: str
  answer: str
  images: tuple[bytes, ...] = ()
  target: str | None = None
  rewards: Mapping[str, float] | None = None
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def replace(self, **changes) -> "Example":
    return dataclasses.replace(self, **changes)

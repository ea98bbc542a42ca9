"""One entry of a dataset. This module does not import jax, because worker processes import it."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
  """One entry of a dataset: images, a question, and the right answer.

  Attributes:
    id: unique in the dataset, and the same in every run.
    question: text of the user. `<image>` marks the position of each image. Without marks, the
      images come first.
    answer: the right answer, with which verifiers compare. It may be empty in supervised training.
    images: encoded image files (bytes), in order. Empty in reward workers.
    target: the response to train on in a supervised stage, otherwise None.
    rewards: verifiers of this example and their weights, e.g. {"math": 0.9, "format": 0.1}. None
      means those of the stage.
    meta: further JSON values, for verifiers and reports. Accuracy is also reported separately for
      each value of `skill`.
    origin: where the example was read, for error messages, such as "data/train.jsonl:17"; empty if
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
    """The name of the example in error messages: its origin, if known, and its id."""
    return f"{self.origin}: example {self.id!r}" if self.origin else f"example {self.id!r}"

  def replace(self, **changes) -> "Example":
    return dataclasses.replace(self, **changes)

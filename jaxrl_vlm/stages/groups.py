"""What a step of reinforcement learning knows of its prompts, between two programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_vlm.data.processor import EncodedPrompt
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards.pool import Grading
from jaxrl_vlm.stages.programs import Packing
from jaxrl_vlm.types import Prompt, Rollout


@dataclasses.dataclass
class Groups:
  """P graded groups on the host. A row is one prompt and its G samples.

  All processes have them, but for what is marked with *: None where a row is not this process's.

  Attributes:
    places: [P]; batch and row of the data that each prompt comes from.
    examples*, encoded*, texts*: [P], [P], [P][G].
    tokens, mask, logp: [P, G, T], as in Rollout.
    rewards: f32[P, G], total.
    components: by verifier, f32[P, G].
    failures: graders that failed, by kind.
    truncated: bool[P, G]; responses that fill the buffer without an end token.
    baseline: f32[P]; reward of the prompt's greedy response, if the objective wants it, else None.
    weights: [P]; of the verifiers, by metric name, if the objective wants components, else {}.
  """

  places: list[tuple[int, int]]
  examples: list[Example | None]
  encoded: list[EncodedPrompt | None]
  texts: list[list[str] | None]
  tokens: np.ndarray
  mask: np.ndarray
  logp: np.ndarray
  rewards: np.ndarray
  components: dict[str, np.ndarray]
  failures: dict[str, int]
  truncated: np.ndarray
  baseline: np.ndarray | None
  weights: list[dict[str, float]]

  def rows(self, index: Sequence[int] | np.ndarray) -> "Groups":
    chosen = [int(i) for i in index]
    return Groups(
      places=[self.places[i] for i in chosen],
      examples=[self.examples[i] for i in chosen],
      encoded=[self.encoded[i] for i in chosen],
      texts=[self.texts[i] for i in chosen],
      tokens=self.tokens[chosen],
      mask=self.mask[chosen],
      logp=self.logp[chosen],
      rewards=self.rewards[chosen],
      components={k: v[chosen] for k, v in self.components.items()},
      failures=self.failures,
      truncated=self.truncated[chosen],
      baseline=None if self.baseline is None else self.baseline[chosen],
      weights=[self.weights[i] for i in chosen],
    )

  def __add__(self, other: "Groups") -> "Groups":
    def join(a, b):
      return np.concatenate([a, b])

    names = self.components | other.components  # samples may bring verifiers of their own
    nothing = [np.full_like(g.rewards, np.nan) for g in (self, other)]
    return Groups(
      self.places + other.places,
      self.examples + other.examples,
      self.encoded + other.encoded,
      self.texts + other.texts,
      join(self.tokens, other.tokens),
      join(self.mask, other.mask),
      join(self.logp, other.logp),
      join(self.rewards, other.rewards),
      {
        k: join(self.components.get(k, nothing[0]), other.components.get(k, nothing[1]))
        for k in names
      },
      {k: v + other.failures[k] for k, v in self.failures.items()},
      join(self.truncated, other.truncated),
      None if self.baseline is None else join(self.baseline, other.baseline),
      self.weights + other.weights,
    )


@dataclasses.dataclass
class Drawn:
  """P prompts, whose responses are drawn and being graded.

  Attributes:
    places, examples, encoded, texts: [P], as in Groups.
    prompt: on the device, with visual tokens, as long as it is wanted.
    rollout: arrays on the host.
    grading: of the responses to the prompts that this process owns.
    error: why they cannot be graded.
    greedy, greedy_grading: the greedy response of each prompt, if the objective wants it.
  """

  places: list[tuple[int, int]]
  examples: list[Any]
  encoded: list[Any]
  texts: list[Any]
  prompt: Any
  rollout: Any
  grading: Grading
  error: UserError | None = None
  greedy: Rollout | None = None
  greedy_grading: Grading | None = None


@dataclasses.dataclass
class Scored:
  """Responses on the device, and what is known of them before they are graded.

  Attributes:
    tokens, mask: [P, G, T].
    packing: of the mask.
    masked: prompts under images that the host has corrupted; None if the device does that.
    views: TokenStats by name: `old` (current parameters, clean image), where it is scored, and the
      objective's views.
  """

  tokens: jax.Array
  mask: jax.Array
  packing: Packing
  masked: Prompt | None
  views: dict[str, Any]

"""Host-side data of an RL step: sampled prompts, graded groups, and scored responses."""

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
  """P graded groups on the host. A row is one prompt with its G samples.

  All processes have the same values, except for `examples`, `encoded` and `texts`: a process has
  None for rows that it does not own.

  Attributes:
    places: [P], batch and row of the dataset that each prompt comes from.
    examples, encoded: [P].
    texts: [P][G].
    tokens, mask, logp: [P, G, T], as in Rollout.
    rewards: f32[P, G], the weighted sum of the verifiers.
    components: f32[P, G] for each verifier, by metric name.
    failures: number of failed gradings, by kind.
    truncated: bool[P, G], responses that reach max_tokens without an end token.
    baseline: f32[P], reward of the greedy response to each prompt. None if the objective does not
      use it.
    weights: [P], weight of each verifier by metric name. Empty if the objective does not use
      components.
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

    names = self.components | other.components  # examples may have verifiers of their own
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
class Sampled:
  """P prompts with sampled responses that are being graded.

  Attributes:
    places, examples, encoded, texts: [P], as in Groups.
    prompt: the prompts on the devices with visual tokens, or None after they were freed.
    rollout: the responses, in arrays on the host.
    grading: the grading of the responses to the prompts that this process owns.
    error: the reason why they cannot be graded, or None.
    greedy, greedy_grading: the greedy response to each prompt, if the objective uses it.
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
  """Responses on the devices with their scores.

  Attributes:
    tokens, mask: [P, G, T].
    packing: how the response tokens are packed.
    masked: prompts with images that the host has corrupted, or None if the device does this.
    views: TokenStats by name: the views of the objective and, if it is scored, `old` (current
      parameters, original image).
  """

  tokens: jax.Array
  mask: jax.Array
  packing: Packing
  masked: Prompt | None
  views: dict[str, Any]

"""Held-out accuracy of a policy: its answers, graded by the verifiers of the stage.

The accuracy is that of one greedy answer to each question, or the mean over several samples
(avg@k). The mean has less noise. It also increases when the policy becomes more certain of right
answers that it already gave greedily.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxrl_vlm import parallel
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.errors import UserError, validation
from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards.pool import RewardPool
from jaxrl_vlm.rollout import Sampling, texts_of
from jaxrl_vlm.types import Params, Prompt, Rollout


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Result of `evaluate`.

  Attributes:
    metrics: `accuracy`, `accuracy/<skill>` for every `meta["skill"]`, `reward`, `response_length`
      (tokens).
    examples: [N], the questions.
    texts: [N][S], the answers. None where another process has graded them.
    correct: f32[N, S], accuracy of each answer.
  """

  metrics: dict[str, float]
  examples: Sequence[Example]
  texts: list[list[str] | None]
  correct: np.ndarray


def sampling(stage: ConfigDict) -> Sampling:
  """Returns the sampling settings of evaluations. Raises ValueError if a field is out of range."""
  samples, temperature = stage.eval.samples, stage.eval.temperature
  if samples < 1:
    raise ValueError(f"eval.samples={samples}: expected at least 1")
  if temperature < 0:
    raise ValueError(f"eval.temperature={temperature}: expected 0 (greedy) or more")
  if samples > 1 and temperature == 0:
    raise ValueError(
      f"eval.samples={samples}: expected 1 with eval.temperature=0.0, which gives "
      "the same answer every time"
    )
  return Sampling(samples, stage.max_tokens, temperature)


def evaluate(
  rollout: Callable[[Params, Prompt, jax.Array], Rollout],
  params: Params,
  processor: Processor,
  examples: Sequence[Example],
  pool: RewardPool,
  *,
  correct: Callable[..., np.ndarray],
  batch: int,
  mesh: Any,
  place: Callable[..., Prompt],
  key: jax.Array,
  system: str | None = None,
) -> Evaluation:
  """Answers all examples and grades the answers. Each process reads and grades its own rows.

  Args:
    rollout: a compiled program that samples S responses to each prompt.
    params, processor: the policy.
    examples: questions with answers.
    pool: grades the answers.
    correct: a function of components and total of graded answers that returns their accuracy.
    batch: number of questions that are answered together. The last batch is filled with copies of
      its last question, which are not counted.
    mesh: the mesh of the prompts.
    place: function that puts prompts on the mesh (`Run.place`).
    key: random key; greedy answers do not depend on it.
    system: system prompt.

  Raises:
    UserError: in all processes, if an example cannot be read or graded in one of them.
  """
  rows = parallel.own_rows(mesh, batch)
  texts: list[list[str] | None] = [None] * len(examples)
  lengths: list[np.ndarray] = []
  handles, mine, wrong = [], [], []
  for start in range(0, len(examples), batch):
    last = min(start + batch, len(examples)) - 1

    def encode(start=start, last=last):
      with validation():
        return [processor.encode(examples[min(start + row, last)], system) for row in rows.here]

    encoded, sizes = parallel.exchange(encode, processor.sizes)
    result = rollout(params, place(encoded, sizes, rows), jax.random.fold_in(key, start))
    tokens, mask = np.asarray(result.tokens), np.asarray(result.mask)
    lengths.append(mask.sum(-1)[: last + 1 - start])
    own = [row for row in rows.owned if start + row <= last]
    answers = texts_of(tokens[own], mask[own], processor)
    mine += [start + row for row in own]
    for row, answer in zip(own, answers, strict=True):
      texts[start + row] = answer
    # Workers grade this batch while the devices generate the next one.
    try:
      with validation():
        if own:
          handles.append(pool.submit([examples[start + row] for row in own], answers))
    except UserError as error:  # raised in all processes, after the last batch
      wrong.append(error)

  def grade() -> dict[str, Any]:
    if wrong:
      raise wrong[0]
    graded = [handle.result() for handle in handles]
    return {
      "which": mine,
      "skill": [str(examples[i].meta.get("skill", "")) for i in mine],
      "correct": [correct(g.components, g.total) for g in graded],
      "total": [g.total for g in graded],
    }

  _, everyone = parallel.exchange(grade)
  correct_each = np.zeros((len(examples), mask.shape[1]), np.float32)
  total_each, skills = np.zeros_like(correct_each), np.full(len(examples), "", object)
  for one in everyone:
    which = one["which"]
    skills[which] = one["skill"]
    if which:
      correct_each[which], total_each[which] = map(np.concatenate, (one["correct"], one["total"]))
  right = correct_each.mean(-1)
  metrics = {
    "accuracy": float(right.mean()),
    "reward": float(total_each.mean(-1).mean()),
    "response_length": float(np.concatenate(lengths).mean()),
  }
  for skill in sorted(set(skills) - {""}):
    metrics[f"accuracy/{skill}"] = float(right[skills == skill].mean())
  return Evaluation(metrics, examples, texts, correct_each)

"""Held-out accuracy of a policy: greedy answers, graded by the stage's verifiers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_vlm import parallel
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.errors import validation
from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards.pool import RewardPool
from jaxrl_vlm.rollout import with_text
from jaxrl_vlm.types import Params, Prompt, Rollout


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Result of `evaluate`.

  Attributes:
    metrics: `accuracy`, `accuracy/<skill>` for every `meta["skill"]`, `reward`, `response_length`
      (tokens).
    examples, texts, correct: what was asked, the answers, and the accuracy of each.
  """

  metrics: dict[str, float]
  examples: Sequence[Example]
  texts: list[str]
  correct: np.ndarray


def evaluate(
    rollout: Callable[[Params, Prompt, jax.Array], Rollout], params: Params, processor: Processor,
    examples: Sequence[Example], pool: RewardPool, *, correct: Callable[..., np.ndarray],
    batch: int, mesh: Any, system: str | None = None) -> Evaluation:
  """Answers every example once and grades it.

  Args:
    rollout: a compiled program that draws one response of each prompt.
    params, processor: the policy.
    examples: questions with answers.
    pool: grades.
    correct: (components, total) of graded answers -> the accuracy of each.
    batch: questions at a time; the last batch is filled up with copies that are not counted.
    mesh: where the prompts go.
    system: system prompt.
  """
  texts: list[str] = []
  lengths: list[int] = []
  handles = []
  for start in range(0, len(examples), batch):
    chunk = list(examples[start:start + batch])
    filled = chunk + [chunk[-1]] * (batch - len(chunk))
    with validation():
      prompt = processor.collate([processor.encode(e, system) for e in filled])
    result = with_text(rollout(params, parallel.put_batch(mesh, prompt), jax.random.key(0)),
                       processor)
    rows = [row[0] for row in result.text][:len(chunk)]
    # Grading of this batch goes on while the next is generated.
    with validation():
      handles.append(pool.submit(chunk, [[text] for text in rows]))
    texts += rows
    lengths += np.asarray(result.mask).sum(-1)[:len(chunk), 0].tolist()
  graded = [handle.result() for handle in handles]
  right = np.concatenate([correct(g.components, g.total)[:, 0] for g in graded])
  total = np.concatenate([g.total[:, 0] for g in graded])
  metrics = {"accuracy": float(right.mean()), "reward": float(total.mean()),
             "response_length": float(np.mean(lengths))}
  skills = np.array([str(e.meta.get("skill", "")) for e in examples])
  for skill in sorted(set(skills) - {""}):
    metrics[f"accuracy/{skill}"] = float(right[skills == skill].mean())
  return Evaluation(metrics, examples, texts, right)

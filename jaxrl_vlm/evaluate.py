"""Held-out accuracy of a policy: its answers, graded by the stage's verifiers.

One greedy answer to each question, or the mean over several samples (avg@k), which has less noise
and sees a policy that is surer of what it knew as the better one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxrl_vlm import parallel
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.errors import validation
from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards.pool import RewardPool
from jaxrl_vlm.rollout import Sampling, with_text
from jaxrl_vlm.types import Params, Prompt, Rollout


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Result of `evaluate`.

  Attributes:
    metrics: `accuracy`, `accuracy/<skill>` for every `meta["skill"]`, `reward`, `response_length`
      (tokens).
    examples, texts, correct: what was asked [N], the answers [N][S], and the accuracy of each
      f32[N, S].
  """

  metrics: dict[str, float]
  examples: Sequence[Example]
  texts: list[list[str]]
  correct: np.ndarray


def sampling(stage: ConfigDict) -> Sampling:
  """How the stage's evaluations draw answers; ValueError names a field that is out of range."""
  samples, temperature = stage.eval.samples, stage.eval.temperature
  if samples < 1:
    raise ValueError(f"eval.samples={samples}: expected at least 1")
  if temperature < 0:
    raise ValueError(f"eval.temperature={temperature}: expected 0 (greedy) or more")
  if samples > 1 and temperature == 0:
    raise ValueError(f"eval.samples={samples}: expected 1 with eval.temperature=0.0, which gives "
                     "the same answer every time")
  return Sampling(samples, stage.max_tokens, temperature)


def evaluate(
    rollout: Callable[[Params, Prompt, jax.Array], Rollout], params: Params, processor: Processor,
    examples: Sequence[Example], pool: RewardPool, *, correct: Callable[..., np.ndarray],
    batch: int, mesh: Any, key: jax.Array, system: str | None = None) -> Evaluation:
  """Answers every example and grades the answers.

  Args:
    rollout: a compiled program that draws S responses of each prompt.
    params, processor: the policy.
    examples: questions with answers.
    pool: grades.
    correct: (components, total) of graded answers -> the accuracy of each.
    batch: questions at a time; the last batch is filled up with copies that are not counted.
    mesh: where the prompts go.
    key: decides what is drawn; of no effect on greedy answers.
    system: system prompt.
  """
  texts: list[list[str]] = []
  lengths: list[np.ndarray] = []
  handles = []
  for start in range(0, len(examples), batch):
    chunk = list(examples[start:start + batch])
    filled = chunk + [chunk[-1]] * (batch - len(chunk))
    with validation():
      prompt = processor.collate([processor.encode(e, system) for e in filled])
    result = with_text(
        rollout(params, parallel.put_batch(mesh, prompt), jax.random.fold_in(key, start)),
        processor)
    rows = result.text[:len(chunk)]
    # Grading of this batch goes on while the next is generated.
    with validation():
      handles.append(pool.submit(chunk, rows))
    texts += rows
    lengths.append(np.asarray(result.mask).sum(-1)[:len(chunk)])
  graded = [handle.result() for handle in handles]
  correct_each = np.concatenate([correct(g.components, g.total) for g in graded])
  right = correct_each.mean(-1)
  total = np.concatenate([g.total for g in graded]).mean(-1)
  metrics = {"accuracy": float(right.mean()), "reward": float(total.mean()),
             "response_length": float(np.concatenate(lengths).mean())}
  skills = np.array([str(e.meta.get("skill", "")) for e in examples])
  for skill in sorted(set(skills) - {""}):
    metrics[f"accuracy/{skill}"] = float(right[skills == skill].mean())
  return Evaluation(metrics, examples, texts, correct_each)

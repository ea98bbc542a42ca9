"""Supervised fine-tuning on the target of each example.

The update is the same program as in reinforcement learning, with one response per prompt (G = 1).
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_vlm import parallel
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.errors import UserError, validation
from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards.pool import RewardPool
from jaxrl_vlm.stages.loading import objective_of
from jaxrl_vlm.stages.optimizer import make_optimizer
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.stages.run import Run, StageRun
from jaxrl_vlm.types import Experience


def train(run: Run, index: int) -> None:
  """Runs stage `index` to its end, from its start or from a checkpoint."""
  stage = run.config.stages[index]
  with validation(f"config.stages[{index}]: "):
    objective = objective_of(stage)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
  programs = Programs(
    run.model,
    run.mesh,
    objective,
    optimizer,
    run.abstract_params,
    trainable=run.trainable,
    microbatches=stage.microbatches,
    capacity=run.capacity,
    state_on_host=stage.optimizer.moments == "host",
    fields=f"config.stages[{index}].",
  )
  # Fail before the first step if not even the shortest prompts fit in device memory.
  programs.check_update(
    stage.prompts_per_step,
    min(run.config.prompt_buckets),
    min(run.config.patch_buckets),
    1,
    stage.max_tokens,
  )

  grading: contextlib.AbstractContextManager[RewardPool | None] = contextlib.nullcontext()
  if stage.eval.examples:
    grading = RewardPool(
      stage.rewards.to_dict(), run.config.reward_workers, run.config.reward_timeout
    )
  with grading as pool:
    loop = StageRun(run, index, programs, pool)
    for _ in loop.steps():
      with loop.before_update():
        examples, _, prompt = run.read(lambda: next(loop.data), loop.rows.count)
        tokens, mask = _targets(run, loop.rows, examples, stage.max_tokens)
        programs.check_update(
          loop.rows.count, prompt.tokens.shape[1], prompt.patches.shape[1], *mask.shape[1:]
        )
      experience = Experience(
        mask=mask, advantages=np.ones(mask.shape, np.float32), old=None, rewards=None
      )
      packing = programs.pack(mask)
      experience = parallel.put_batch(run.mesh, experience)
      loop.state, metrics = programs.update(
        loop.state, run.frozen, prompt, tokens, experience, run.random_key(0), None, packing
      )
      loop.log(metrics, {}, int(mask.sum()))


def _targets(
  run: Run, rows: parallel.Rows, examples: list[Any], max_tokens: int
) -> tuple[jax.Array, np.ndarray]:
  """Collates the targets of P examples. Each process has the examples of its own rows.

  Returns:
    tokens i32[P, 1, T] on the mesh, and mask bool[P, 1, T], complete in every process.

  Raises:
    UserError: in all processes, if `collate_targets` raises it in one of them.
  """

  def collate():
    return collate_targets(run.processor, [examples[row] for row in rows.here], max_tokens)

  (tokens, _), masks = parallel.exchange(
    collate, lambda mine: {"rows": list(rows.here), "mask": mine[1]}
  )
  mask = np.zeros((rows.count, 1, max_tokens), bool)
  for one in masks:
    mask[one["rows"]] = one["mask"]
  return parallel.put_rows(run.mesh, tokens, rows), mask


def collate_targets(
  processor: Processor, examples: Sequence[Example], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
  """Tokenizes the targets, one response per prompt.

  Returns:
    tokens i32[P, 1, T], padded with the pad token, and mask bool[P, 1, T]. T is `max_tokens`.

  Raises:
    UserError: an example has no target, or its target has more than T tokens. Targets are never
      truncated.
  """
  tokens = np.full((len(examples), 1, max_tokens), processor.pad_token_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, example in enumerate(examples):
    if not example.target:
      raise UserError(f"{example.name} has no target, which a supervised stage needs")
    ids = processor.encode_target(example.target)
    if len(ids) > max_tokens:
      raise UserError(
        f"{example.name}: the target has {len(ids)} tokens, more than "
        f"max_tokens={max_tokens} of the stage"
      )
    tokens[row, 0, : len(ids)] = ids
    mask[row, 0, : len(ids)] = True
  return tokens, mask

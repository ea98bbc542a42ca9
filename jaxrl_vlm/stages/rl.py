"""Reinforcement learning: sample, grade, score, update."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxrl_vlm import objectives, parallel
from jaxrl_vlm.data.processor import EncodedPrompt
from jaxrl_vlm.errors import validation
from jaxrl_vlm.example import Example
from jaxrl_vlm.report import Sample
from jaxrl_vlm.rewards.pool import RewardPool
from jaxrl_vlm.rollout import Sampling, with_text
from jaxrl_vlm.stages.programs import Programs, make_optimizer
from jaxrl_vlm.stages.run import Run, StageRun
from jaxrl_vlm.types import Experience, Prompt
from jaxrl_vlm.views import level_patch

# What a random key is for.
_ROLLOUT, _MASK, _UPDATE = range(3)


@dataclasses.dataclass
class Groups:
  """P graded groups on the host. A row is one prompt and its G samples.

  Attributes:
    examples, encoded, texts: [P], [P], [P][G].
    tokens, mask, logp: [P, G, T], as in Rollout.
    rewards: f32[P, G], total.
    components: by verifier, f32[P, G].
    failures: graders that failed, by kind.
  """

  examples: list[Example]
  encoded: list[EncodedPrompt]
  texts: list[list[str]]
  tokens: np.ndarray
  mask: np.ndarray
  logp: np.ndarray
  rewards: np.ndarray
  components: dict[str, np.ndarray]
  failures: dict[str, int]

  def rows(self, index: Sequence[int] | np.ndarray) -> "Groups":
    chosen = [int(i) for i in index]
    return Groups(
        examples=[self.examples[i] for i in chosen],
        encoded=[self.encoded[i] for i in chosen],
        texts=[self.texts[i] for i in chosen],
        tokens=self.tokens[chosen], mask=self.mask[chosen], logp=self.logp[chosen],
        rewards=self.rewards[chosen],
        components={k: v[chosen] for k, v in self.components.items()}, failures=self.failures)

  def __add__(self, other: "Groups") -> "Groups":
    def join(a, b):
      return np.concatenate([a, b])

    names = self.components | other.components  # samples may bring verifiers of their own
    nothing = [np.full_like(g.rewards, np.nan) for g in (self, other)]
    return Groups(
        self.examples + other.examples, self.encoded + other.encoded, self.texts + other.texts,
        join(self.tokens, other.tokens), join(self.mask, other.mask), join(self.logp, other.logp),
        join(self.rewards, other.rewards),
        {k: join(self.components.get(k, nothing[0]), other.components.get(k, nothing[1]))
         for k in names},
        {k: v + other.failures[k] for k, v in self.failures.items()})


def train(run: Run, index: int) -> None:
  """Runs stage `index` to its end, or from where a checkpoint left it."""
  stage = run.config.stages[index]
  with validation(f"config.stages[{index}]: "):
    objective = objectives.create(**stage.objective.to_dict())
    optimizer = make_optimizer(stage.optimizer, stage.steps * stage.minibatches)
    draws = sampling(stage)
  images = run.processor.image_settings
  white = level_patch(255, images.image_mean, images.image_std, images.patch_dim,
                      images.rescale_factor)
  programs = Programs(
      run.model, run.mesh, objective, optimizer, run.abstract_params,
      trainable=run.trainable, temperature=stage.temperature or 1.0,
      microbatches=stage.microbatches, minibatches=stage.minibatches, sampling=draws,
      black=run.processor.black_patch, white=white)

  with RewardPool(stage.rewards.to_dict(), run.config.reward_workers,
                  run.config.reward_timeout) as pool:
    loop = StageRun(run, index, programs, pool)
    for step in loop.steps():
      groups, prompt, scored, sampled = _collect(loop)
      views = _score_views(loop, prompt, groups, scored)
      mask, rewards = parallel.put_batch(run.mesh, (groups.mask, groups.rewards))
      advantages = programs.advantages(rewards, mask)
      experience = Experience(
          mask=mask, advantages=advantages, old=views.pop("old"), rewards=rewards, views=views)
      tokens = parallel.put_batch(run.mesh, groups.tokens)
      metrics = programs.compare(experience.old.logp, groups.logp, mask)
      loop.state, updated = programs.update(
          loop.state, run.frozen, prompt, tokens, experience, run.random_key(_UPDATE))
      loop.log(metrics | updated, sampled, int(groups.mask.sum()))
      if step == 0 or (step + 1) % run.config.rollouts_every == 0 or step + 1 == stage.steps:
        _keep_rollouts(loop, groups, np.asarray(advantages))


def sampling(stage: ConfigDict) -> Sampling:
  """How the stage draws responses; ValueError names a field that is out of range."""
  return Sampling(stage.num_samples, stage.max_tokens, stage.temperature, stage.top_p, stage.top_k)


def _collect(loop: StageRun) -> tuple[Groups, Prompt, Any, dict[str, float]]:
  """Samples and grades until there are P groups that the objective keeps.

  Returns the groups, their prompts on the device, their scores if those were computed while the
  host graded (else None), and metrics of everything that was sampled.
  """
  run, programs, objective = loop.run, loop.programs, loop.programs.objective
  want = loop.stage.prompts_per_step
  kept: Groups | None = None
  spare: Groups | None = None
  drawn: list[Groups] = []
  while True:
    with loop.reading():
      examples = next(loop.data)
      encoded = run.encode(examples)
    prompt = parallel.put_batch(run.mesh, run.processor.collate(encoded))
    rollout = with_text(
        programs.rollout(loop.params, prompt, run.random_key(_ROLLOUT, len(drawn))),
        run.processor)
    assert loop.pool is not None  # an RL stage always has one
    with validation():
      handle = loop.pool.submit(examples, rollout.text)
    scored = None
    if not objective.filter_groups:  # the device scores while the host grades
      scored = programs.score(loop.params, prompt, rollout.tokens, rollout.mask)
    graded = handle.result()
    for kind, message in graded.messages.items():
      run.progress.log(f"grader {kind}: {message}")
    groups = Groups(
        examples, encoded, rollout.text, np.asarray(rollout.tokens), np.asarray(rollout.mask),
        np.asarray(rollout.logp), graded.total, dict(graded.components), dict(graded.failures))
    drawn.append(groups)
    if not objective.filter_groups:
      return groups, prompt, scored, _summary(loop, drawn)

    keep = np.asarray(objective.kept(loop.correct(groups.components, groups.rewards)))
    good, bad = groups.rows(np.flatnonzero(keep)), groups.rows(np.flatnonzero(~keep))
    kept, spare = (good, bad) if kept is None or spare is None else (kept + good, spare + bad)
    count = len(kept.examples)
    if count >= want or len(drawn) == objective.max_tries:
      break
  summary = _summary(loop, drawn) | {
      "train/tries": float(len(drawn)),
      "train/kept_groups": count / (want * len(drawn))}
  if count < want:
    # Too few after all tries: fill up to the compiled shape with groups that count for nothing.
    filler = spare.rows(range(want - count))
    filler.mask = np.zeros_like(filler.mask)
    kept = kept + filler
  kept = kept.rows(range(want))
  return kept, parallel.put_batch(run.mesh, run.processor.collate(kept.encoded)), None, summary


def _score_views(loop: StageRun, prompt: Prompt, groups: Groups, scored: Any) -> dict[str, Any]:
  """TokenStats by name: `old` (current parameters, clean image) and the objective's views."""
  run, programs, params = loop.run, loop.programs, loop.params
  tokens, mask = parallel.put_batch(run.mesh, (groups.tokens, groups.mask))
  views = {"old": scored if scored is not None else programs.score(params, prompt, tokens, mask)}
  for name in programs.objective.views:
    if name == "ref":
      score = programs.score_base if loop.reference_is_base else programs.score
      views[name] = score(loop.reference_params, prompt, tokens, mask)
    elif name == "masked":
      views[name] = programs.score_masked(params, prompt, tokens, mask, run.random_key(_MASK))
    else:
      raise ValueError(f"objective.views: no such view {name!r}; known: 'ref', 'masked'")
  return views


def _summary(loop: StageRun, drawn: list[Groups]) -> dict[str, float]:
  """Means over all that was sampled, the filtered groups included."""
  groups = drawn[0]
  for more in drawn[1:]:
    groups = groups + more
  lengths = groups.mask.sum(-1)
  values = {
      "train/reward": groups.rewards.mean(),
      "train/reward_std": groups.rewards.std(axis=1).mean(),
      "train/accuracy": loop.correct(groups.components, groups.rewards).mean(),
      "train/response_length": lengths.mean(),
      # A response that fills the buffer without an end token was cut.
      "train/cut_share": np.mean(
          (lengths == groups.mask.shape[-1])
          & ~np.isin(groups.tokens[..., -1], loop.run.model.config.stop_tokens)),
  }
  # A verifier that a sample's own `rewards` leave out has no value there.
  values |= {f"train/reward/{k}": np.nanmean(v) for k, v in groups.components.items()}
  values |= {f"train/grader_{k}": v for k, v in groups.failures.items()}
  return {k: float(v) for k, v in values.items()}


def _keep_rollouts(loop: StageRun, groups: Groups, advantages: np.ndarray) -> None:
  """Writes some groups for the report."""
  lengths = groups.mask.sum(-1)
  kept = []
  for p in range(min(loop.run.config.rollouts_kept, len(groups.examples))):
    kept.append((groups.examples[p], [
        Sample(text=groups.texts[p][g], reward=float(groups.rewards[p, g]),
               components={k: float(v[p, g]) for k, v in groups.components.items()
                           if not np.isnan(v[p, g])},
               advantage=float(advantages[p, g, 0]), length=int(lengths[p, g]))
        for g in range(groups.rewards.shape[1])]))
  loop.run.rollouts.write(loop.run.step, loop.stage.kind, kept)

"""Reinforcement learning: sample, grade, score, update."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxrl_vlm import memory, parallel
from jaxrl_vlm import rewards as verifiers
from jaxrl_vlm.data import sources
from jaxrl_vlm.data.corrupt import corrupt_images
from jaxrl_vlm.errors import UserError, hint, validation
from jaxrl_vlm.example import Example
from jaxrl_vlm.models.vlm import VLM
from jaxrl_vlm.report import Sample
from jaxrl_vlm.rewards.pool import RewardPool
from jaxrl_vlm.rollout import Sampling, texts_of
from jaxrl_vlm.stages.groups import Drawn, Groups, Scored
from jaxrl_vlm.stages.loading import objective_of, trainable_of
from jaxrl_vlm.stages.optimizer import make_optimizer
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.stages.run import Run, StageRun, source_spec
from jaxrl_vlm.types import Experience, Params, Prompt, Rollout
from jaxrl_vlm.views import level_patch

# What a random key is for.
_ROLLOUT, _MASK, _UPDATE, _AHEAD = range(4)


def train(run: Run, index: int) -> None:
  """Runs stage `index` to its end, or from where a checkpoint left it.

  With `config.pipeline` "one_step_off" the responses of the next step are drawn ahead of this
  step's update, by the policy that it changes. The host never waits for graders: they have the time
  of a rollout, and what is on the host between two programs is done while the device updates.
  """
  stage = run.config.stages[index]
  images = run.processor.image_settings
  white = level_patch(
    255, images.image_mean, images.image_std, images.patch_dim, images.rescale_factor
  )
  programs = make_programs(
    run.config,
    index,
    run.model,
    run.mesh,
    run.abstract_params,
    capacity=run.capacity,
    black=run.processor.black_patch,
    white=white,
  )
  objective = programs.objective

  _plan_memory(run, index, programs)
  with RewardPool(
    stage.rewards.to_dict(), run.config.reward_workers, run.config.reward_timeout
  ) as pool:
    loop = StageRun(run, index, programs, pool)
    drawn = None
    for step in loop.steps():
      with loop.before_update():
        now = drawn or _draw(loop, run.random_key(_ROLLOUT, 0))
        if drawn is not None and programs.trains_vision:
          now.prompt = _seen_again(loop, now)  # by the tower that will be updated
        loop.ahead = drawn = None
        # Not where a checkpoint follows: whoever resumes there draws the next batch itself.
        ahead = run.config.pipeline == "one_step_off" and not loop.saves(step)
        if ahead and not objective.filter_groups:
          loop.ahead, drawn = loop.data.get_state(), _draw(loop, run.random_key(_AHEAD))
        groups, prompt, scored, sampled = _collect(loop, now)
        if ahead and objective.filter_groups:  # which may have wanted more of the data
          loop.ahead, drawn = loop.data.get_state(), _draw(loop, run.random_key(_AHEAD))
        views, mask = scored.views, scored.mask
        rewards, logp, truncated = parallel.put_batch(
          run.mesh, (groups.rewards, groups.logp, groups.truncated)
        )
        advantages = programs.advantages(
          rewards, mask, _advantage_needs(loop, groups, views), loop.state.objective
        )
        # The update cannot be ended once it waits for the device.
        jax.block_until_ready(advantages)
        loop.stop_if_asked()
      experience = Experience(
        mask=mask,
        advantages=advantages,
        old=views.pop("old", None),
        rewards=rewards,
        views=views,
        sampler_logp=logp,
        truncated=truncated,
      )
      metrics = {}
      if experience.old is not None:
        metrics = programs.compare(experience.old.logp, logp, mask)
      reference = loop.reference_params if "ref" in objective.grad_views else None
      loop.state, updated = programs.update(
        loop.state,
        run.frozen,
        _to_train_on(programs, prompt),
        scored.tokens,
        experience,
        run.random_key(_UPDATE) if scored.masked is None else scored.masked,
        reference,
        scored.packing,
      )
      loop.log(metrics | updated, sampled, int(groups.mask.sum()))
      # The next step draws with as much memory as the first.
      del now, prompt, scored, experience, views, mask, rewards, logp, truncated
      if step == 0 or (step + 1) % run.config.rollouts_every == 0 or loop.ends(step + 1):
        _keep_rollouts(loop, groups, parallel.taken(advantages))


def make_programs(
  config: ConfigDict, index: int, model: VLM, mesh: Mesh, abstract_params: Params, **more: Any
) -> Programs:
  """The programs of stage `index`; `more`: what the config does not say (`Programs`).

  Raises:
    UserError: a field is out of range; names it.
  """
  stage = config.stages[index]
  with validation(f"config.stages[{index}]: "):
    objective = objective_of(stage, config.pipeline)
    optimizer = make_optimizer(stage.optimizer, stage.steps * stage.minibatches)
    draws = sampling(stage)
  return Programs(
    model,
    mesh,
    objective,
    optimizer,
    abstract_params,
    trainable=trainable_of(config),
    temperature=stage.temperature or 1.0,
    microbatches=stage.microbatches,
    minibatches=stage.minibatches,
    sampling=draws,
    rollout=config.rollout.to_dict(),
    part_tokens=stage.part_tokens,
    state_on_host=stage.optimizer.moments == "host",
    fields=f"config.stages[{index}].",
    **more,
  )


def _plan_memory(run: Run, index: int, programs: Programs) -> None:
  """Says how many groups are decoded at once; the shortest prompts must fit."""
  stage, lengths = run.config.stages[index], sorted(run.config.prompt_buckets)
  if not programs.room:
    return
  least, groups, warning = min(run.config.patch_buckets), {}, ""
  _check_room(programs, stage, stage.prompts_per_step, lengths[0], least)
  for length in lengths:
    # As many as a prompt of that length can have.
    most = length * run.model.config.vision.spatial_merge_size**2
    patches = max((n for n in run.config.patch_buckets if n <= most), default=least)
    try:
      groups[length] = _check_room(programs, stage, stage.prompts_per_step, length, patches)
    except UserError as error:
      warning = f"; not every prompt will fit: {error}"
      break
  shown = ", ".join(f"{length}: {count}" for length, count in groups.items())
  room, held = run.capacity / memory.GIB, programs.held / memory.GIB
  run.progress.log(
    f"rl  a device has {room:.1f} GiB to fill, {held:.1f} with weights and optimizer; "
    f"groups decoded at once, by prompt tokens: {shown}{warning}"
  )


def _check_room(
  programs: Programs, stage: ConfigDict, prompts: int, length: int, patches: int
) -> int:
  """Groups of such prompts that are decoded at once; UserError if there is no room for them."""
  groups = programs.rollout.groups_at_once(prompts, length, patches)
  programs.check_update(prompts, length, patches, stage.num_samples, stage.max_tokens)
  return groups


def check_objective(stage: ConfigDict) -> None:
  """Checks that the stage can give its objective what that asks for.

  Raises:
    ValueError, UserError: names the field, its value and the reason.
  """
  objective = objective_of(stage)
  known = {"accuracy", "reward", *verifiers.metric_names(stage.rewards.to_dict())}
  for key in objective.filter_keys:
    if key not in known:
      raise ValueError(
        f"config.objective.filter_keys={objective.filter_keys!r}: no such verifier in rewards of "
        f"the stage (a weight of 0.0 will do); {hint(key, sorted(known))}"
      )
  if "masked" not in (*objective.views, *objective.grad_views):
    return
  spec = source_spec(stage, "train")
  if spec["name"] == "digit_boards":  # nothing is written for a look
    spec["options"] = {**spec["options"], "live": True}
  source = sources.open_source(spec, "train", verifiers=tuple(stage.rewards.to_dict()))
  some = np.linspace(0, len(source) - 1, 64).astype(int)
  if not any(source[int(i)].images for i in sorted(set(some))):
    raise ValueError(
      f"objective.name={stage.objective.name!r}: needs the view 'masked', the prompt under a "
      f"corrupted image, but the examples of data.name={stage.data.name!r} have no images"
    )


def sampling(stage: ConfigDict) -> Sampling:
  """How the stage draws responses; ValueError names a field that is out of range."""
  return Sampling(stage.num_samples, stage.max_tokens, stage.temperature, stage.top_p, stage.top_k)


def _draw(loop: StageRun, key: jax.Array) -> Drawn:
  """Draws responses of the next prompts; a group is graded as soon as it has ended."""
  run, programs, rows = loop.run, loop.programs, loop.rows
  assert loop.pool is not None  # an RL stage always has one
  batch = loop.data.given
  examples, encoded, prompt = run.read(lambda: next(loop.data), rows.count)
  prompt = _seen(loop, prompt)
  place = {row: i for i, row in enumerate(rows.owned)}
  drawn = Drawn(
    [(batch, row) for row in range(rows.count)],
    examples,
    encoded,
    [None] * rows.count,
    prompt,
    None,
    loop.pool.begin(len(place), loop.stage.num_samples),
  )

  def ended(which, tokens, mask):
    mine = [i for i, row in enumerate(which) if row in place]
    for i, new in zip(mine, texts_of(tokens[mine], mask[mine], run.processor), strict=True):
      drawn.texts[which[i]] = new
    which = [which[i] for i in mine]
    try:
      with validation():
        drawn.grading.add(
          [place[row] for row in which],
          [examples[row] for row in which],
          [drawn.texts[row] for row in which],
        )
    except UserError as error:  # not now: the others go on with the rollout
      drawn.error = error

  drawn.rollout = programs.rollout(
    loop.params, prompt, key, finished=ended, each_chunk=loop.stop_if_asked
  )
  if "baseline" in programs.objective.advantage_needs:
    drawn.greedy = programs.rollout_greedy(
      loop.params, prompt, jax.random.key(0), each_chunk=loop.stop_if_asked
    )
    mine = list(rows.owned)
    tokens, mask = np.asarray(drawn.greedy.tokens), np.asarray(drawn.greedy.mask)
    texts = texts_of(tokens[mine], mask[mine], run.processor)
    drawn.greedy_grading = loop.pool.begin(len(mine), 1)
    try:
      with validation():
        drawn.greedy_grading.add(range(len(mine)), [examples[row] for row in mine], texts)
    except UserError as error:
      drawn.error = drawn.error or error
  return drawn


def _collect(loop: StageRun, drawn: Drawn) -> tuple[Groups, Prompt, Scored, dict[str, float]]:
  """Grades, and samples more until there are P groups that the objective keeps.

  Returns the groups, their prompts on the device, their scores, and metrics of everything that was
  sampled.
  """
  run, objective = loop.run, loop.programs.objective
  want = loop.stage.prompts_per_step
  kept: Groups | None = None
  spare: Groups | None = None
  batches: list[Groups] = []
  while True:
    prompt, rollout = drawn.prompt, drawn.rollout
    loop.generated(int(rollout.mask.sum()))
    if drawn.greedy is not None:
      loop.generated(int(drawn.greedy.mask.sum()))
    scored = None
    if not objective.filter_groups:  # the device scores while the host grades
      scored = _score(loop, prompt, drawn.examples, rollout.tokens, rollout.mask)
    groups = _graded(loop, drawn)
    batches.append(groups)
    if scored is not None:
      return groups, prompt, scored, _summary(loop, batches)

    drawn.prompt = prompt = None  # those of the groups that are kept are seen again
    with validation():
      keep = objective.kept(
        loop.correct(groups.components, groups.rewards), groups.rewards, groups.components
      )
    good, bad = groups.rows(np.flatnonzero(keep)), groups.rows(np.flatnonzero(~keep))
    kept, spare = (good, bad) if kept is None or spare is None else (kept + good, spare + bad)
    count = len(kept.examples)
    if count >= want or len(batches) == objective.max_tries:
      break
    drawn = _draw(loop, run.random_key(_ROLLOUT, len(batches)))
  summary = _summary(loop, batches) | {
    "train/tries": float(len(batches)),
    "train/kept_groups": count / (want * len(batches)),
  }
  if count < want:
    # Too few after all tries: fill up to the compiled shape with groups that count for nothing.
    filler = spare.rows(range(want - count))
    filler.mask = np.zeros_like(filler.mask)
    kept = kept + filler
  kept = kept.rows(range(want))
  prompt = _seen_again(loop, kept)
  return kept, prompt, _score(loop, prompt, kept.examples, kept.tokens, kept.mask), summary


def _graded(loop: StageRun, drawn: Drawn) -> Groups:
  """What has been drawn, with its rewards, of which each process knows those of its own rows."""
  rows, rollout = loop.rows, drawn.rollout
  wants_weights = "components" in loop.programs.objective.advantage_needs

  def grade() -> dict[str, Any]:
    if drawn.error is not None:
      raise drawn.error
    graded = drawn.grading.result()
    failures, messages = collections.Counter(graded.failures), dict(graded.messages)
    baseline = None
    if drawn.greedy_grading is not None:
      of_greedy = drawn.greedy_grading.result()
      baseline = of_greedy.total[:, 0]
      failures.update(of_greedy.failures)
      messages = {**of_greedy.messages, **messages}
    weights = [
      _verifier_weights(loop, drawn.examples[row]) if wants_weights else {} for row in rows.owned
    ]
    return {
      "rows": list(rows.owned),
      "total": graded.total,
      "components": graded.components,
      "failures": dict(failures),
      "messages": messages,
      "baseline": baseline,
      "weights": weights,
    }

  _, everyone = parallel.exchange(grade)
  failures: collections.Counter[str] = collections.Counter()
  messages: dict[str, str] = {}
  weights: list[dict[str, float]] = [{}] * rows.count
  total = np.zeros((rows.count, loop.stage.num_samples), np.float32)
  components: dict[str, np.ndarray] = {}
  baseline = None if drawn.greedy is None else np.zeros(rows.count, np.float32)
  for one in everyone:
    failures.update(one["failures"])
    messages = {**one["messages"], **messages}
    total[one["rows"]] = one["total"]
    for name, values in one["components"].items():
      components.setdefault(name, np.full_like(total, np.nan))[one["rows"]] = values
    if baseline is not None:
      baseline[one["rows"]] = one["baseline"]
    for row, weight in zip(one["rows"], one["weights"], strict=True):
      weights[row] = weight
  for kind, message in messages.items():
    loop.run.progress.log(f"grader {kind}: {message}")
  return Groups(
    drawn.places,
    drawn.examples,
    drawn.encoded,
    drawn.texts,
    np.asarray(rollout.tokens),
    np.asarray(rollout.mask),
    np.asarray(rollout.logp),
    total,
    components,
    dict(failures),
    _truncated(loop, rollout),
    baseline,
    weights,
  )


def _seen(loop: StageRun, prompt: Prompt) -> Prompt:
  """Prompts on the device get their visual tokens; UserError if a step has no room for them."""
  prompts, length = prompt.tokens.shape
  _check_room(loop.programs, loop.stage, prompts, length, prompt.patches.shape[1])
  return loop.programs.see(loop.params, prompt)


def _seen_again(loop: StageRun, groups: Groups | Drawn) -> Prompt:
  """The prompts of groups, which may have moved to rows of other processes, on the device."""

  def read() -> list[int]:
    for row in loop.rows.here:
      if groups.encoded[row] is None:
        example = loop.data.example(*groups.places[row])
        groups.examples[row], groups.encoded[row] = example, loop.run.encode([example])[0]
    return loop.run.processor.sizes(mine())

  def mine() -> list[Any]:
    return [groups.encoded[row] for row in loop.rows.here]

  _, sizes = parallel.exchange(read)
  return _seen(loop, loop.run.place(mine(), sizes, loop.rows))


def _to_train_on(programs: Programs, prompt: Prompt) -> Prompt:
  """Without visual tokens if the update itself must make them: it trains the vision tower."""
  return dataclasses.replace(prompt, features=None) if programs.trains_vision else prompt


def _truncated(loop: StageRun, rollout: Rollout) -> np.ndarray:
  """bool[P, G]; responses that fill the buffer without an end token."""
  ended = np.isin(np.asarray(rollout.tokens)[..., -1], loop.run.model.config.stop_tokens)
  return np.asarray(rollout.mask).all(axis=-1) & ~ended


def _masked_source(loop: StageRun, examples: Sequence[Any], group: int) -> Prompt | None:
  """Prompts whose images the host has corrupted, on the device; None if the device does that.

  A row for each prompt, or for each of the G samples of each prompt. The draws depend on the seed,
  the step and the row.
  """
  run, objective = loop.run, loop.programs.objective
  views = (*objective.views, *objective.grad_views)
  if "masked" not in views or objective.mask_on != "original":
    return None
  random = objective.mask_kind in ("patches", "noise")
  rows = group if random and objective.mask_per == "sample" else 1
  prompts = parallel.own_rows(run.mesh, len(examples))

  def corrupted() -> list[Example]:
    return [
      corrupt_images(
        examples[p],
        kind=objective.mask_kind,
        seed=(run.config.seed, run.step, p, g),
        rate=objective.mask_rate,
        patch=objective.mask_pixels,
        level=objective.mask_level,
        noise=objective.mask_noise,
        blur=objective.mask_blur,
      )
      for p in prompts.here
      for g in range(rows)
    ]

  return run.read(corrupted, len(examples) * rows)[2]


def _score(
  loop: StageRun, prompt: Prompt, examples: Sequence[Any], tokens: Any, mask: Any
) -> Scored:
  """What the update needs of responses [P, G, T] besides their rewards."""
  run, programs, params = loop.run, loop.programs, loop.params
  packing, views = programs.pack(np.asarray(mask)), {}
  tokens, mask = parallel.put_batch(run.mesh, (np.asarray(tokens), np.asarray(mask)))
  if programs.scores_old:
    views["old"] = programs.score(params, prompt, tokens, mask, packing)
  masked = _masked_source(loop, examples, tokens.shape[1])
  for name in programs.objective.views:
    unseen = _to_train_on(programs, prompt)  # the reference may have another vision tower
    if name == "ref" and name in programs.objective.full_kl:
      views[name] = programs.score_reference(
        params, loop.reference_params, unseen, tokens, mask, packing
      )
    elif name == "ref":
      score = programs.score_base if loop.reference_is_base else programs.score
      views[name] = score(loop.reference_params, unseen, tokens, mask, packing)
    elif name == "masked":
      source = run.random_key(_MASK) if masked is None else masked
      views[name] = programs.score_masked(params, prompt, tokens, mask, source, packing)
    else:
      raise ValueError(f"objective.views: no such view {name!r}; known: 'ref', 'masked'")
  return Scored(tokens, mask, packing, masked, views)


def _advantage_needs(loop: StageRun, groups: Groups, views: dict[str, Any]) -> dict[str, Any]:
  """What the objective's advantages want besides rewards and mask, on the device."""
  needs, more = loop.programs.objective.advantage_needs, {}
  if "components" in needs:
    weights = groups.weights
    # Whoever has judged stays, or every other set of verifiers would be another compilation.
    loop.verifiers |= {name for row in weights for name in row}
    nothing = np.full_like(groups.rewards, np.nan)
    more["components"] = {
      name: groups.components.get(name, nothing) for name in sorted(loop.verifiers)
    }
    more["component_weights"] = {
      name: np.repeat(
        np.array([[row.get(name, 0.0)] for row in weights], np.float32),
        groups.rewards.shape[1],
        axis=1,
      )
      for name in sorted(loop.verifiers)
    }
  if "baseline" in needs:
    more["baseline"] = groups.baseline
  more = parallel.put_batch(loop.run.mesh, more)
  if "penalty" in needs:
    more |= {"old": views["old"], "ref": views["ref"]}
  return more


def _verifier_weights(loop: StageRun, example: Example) -> dict[str, float]:
  """The weight of each verifier in the reward of this example, by metric name."""
  weights = dict(example.rewards or loop.stage.rewards.to_dict())
  return dict(zip(verifiers.metric_names(weights), weights.values(), strict=True))


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
    "train/cut_share": groups.truncated.mean(),
  }
  # A verifier that a sample's own `rewards` leave out has no value there.
  values |= {f"train/reward/{k}": np.nanmean(v) for k, v in groups.components.items()}
  values |= {f"train/grader_{k}": v for k, v in groups.failures.items()}
  return {k: float(v) for k, v in values.items()}


def _keep_rollouts(loop: StageRun, groups: Groups, advantages: dict[int, np.ndarray]) -> None:
  """Writes some groups for the report: of those that the first process has."""
  if not parallel.is_first():
    return
  lengths = groups.mask.sum(-1)
  whole = [p for p, texts in enumerate(groups.texts) if texts is not None and p in advantages]
  kept = []
  for p in whole[: loop.run.config.rollouts_kept]:
    kept.append(
      (
        groups.examples[p],
        [
          Sample(
            text=text,
            reward=float(groups.rewards[p, g]),
            components={
              k: float(v[p, g]) for k, v in groups.components.items() if not np.isnan(v[p, g])
            },
            advantage=float(advantages[p][g, 0]),
            length=int(lengths[p, g]),
          )
          for g, text in enumerate(groups.texts[p] or ())
        ],
      )
    )
  loop.run.rollouts.write(loop.run.step, loop.stage.kind, kept)

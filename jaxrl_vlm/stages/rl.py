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
from jaxrl_vlm.stages.groups import Groups, Sampled, Scored
from jaxrl_vlm.stages.loading import objective_of, trainable_of
from jaxrl_vlm.stages.optimizer import make_optimizer
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.stages.run import Run, StageRun, source_spec
from jaxrl_vlm.types import Experience, Params, Prompt, Rollout
from jaxrl_vlm.views import level_patch

# Random keys of a step, by use.
_ROLLOUT, _MASK, _UPDATE, _NEXT_ROLLOUT = range(4)


def train(run: Run, index: int) -> None:
  """Runs stage `index` to its end, from its start or from a checkpoint.

  Worker processes grade the responses of a prompt as soon as these responses have ended, while the
  devices generate others.

  If `config.pipeline` is "one_step_off", each step generates the responses of the next step before
  its own update. The graders then have the time of the update and of the next rollout.
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
    sampled = None
    for step in loop.steps():
      with loop.before_update():
        now = sampled or _sample(loop, run.random_key(_ROLLOUT, 0))
        if sampled is not None and programs.trains_vision:
          # The last update changed the vision tower, so the visual tokens are computed again.
          now.prompt = _read_prompts(loop, now)
        loop.ahead = sampled = None
        # Nothing is sampled ahead before a checkpoint, because a resumed run samples it itself.
        ahead = run.config.pipeline == "one_step_off" and not loop.saves(step)
        if ahead and not objective.filter_groups:
          loop.ahead, sampled = loop.data.get_state(), _sample(loop, run.random_key(_NEXT_ROLLOUT))
        groups, prompt, scored, summary = _collect(loop, now)
        if ahead and objective.filter_groups:  # `_collect` may have read further batches
          loop.ahead, sampled = loop.data.get_state(), _sample(loop, run.random_key(_NEXT_ROLLOUT))
        views, mask = scored.views, scored.mask
        rewards, logp, truncated = parallel.put_batch(
          run.mesh, (groups.rewards, groups.logp, groups.truncated)
        )
        advantages = programs.advantages(
          rewards, mask, _advantage_needs(loop, groups, views), loop.state.objective
        )
        # A signal stops the run here. After this point, the update is queued and must complete.
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
        _for_training(programs, prompt),
        scored.tokens,
        experience,
        run.random_key(_UPDATE) if scored.masked is None else scored.masked,
        reference,
        scored.packing,
      )
      loop.log(metrics | updated, summary, int(groups.mask.sum()))
      # Free these arrays before the next rollout, which needs the memory.
      del now, prompt, scored, experience, views, mask, rewards, logp, truncated
      if step == 0 or (step + 1) % run.config.rollouts_every == 0 or loop.ends(step + 1):
        _log_rollouts(loop, groups, parallel.taken(advantages))


def make_programs(
  config: ConfigDict, index: int, model: VLM, mesh: Mesh, abstract_params: Params, **more: Any
) -> Programs:
  """Makes the programs of stage `index`.

  Args:
    **more: arguments of `Programs` that do not depend on the config.

  Raises:
    UserError: a field is out of range. The message names it.
  """
  stage = config.stages[index]
  with validation(f"config.stages[{index}]: "):
    objective = objective_of(stage, config.pipeline)
    optimizer = make_optimizer(stage.optimizer, stage.steps * stage.minibatches)
    sampling_of_stage = sampling(stage)
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
    sampling=sampling_of_stage,
    rollout=config.rollout.to_dict(),
    part_tokens=stage.part_tokens,
    state_on_host=stage.optimizer.moments == "host",
    fields=f"config.stages[{index}].",
    **more,
  )


def _plan_memory(run: Run, index: int, programs: Programs) -> None:
  """Logs how many groups are decoded at once for each prompt bucket.

  Raises:
    UserError: not even the shortest prompts fit into the memory of a device.
  """
  stage, lengths = run.config.stages[index], sorted(run.config.prompt_buckets)
  if not programs.room:
    return
  least, groups, warning = min(run.config.patch_buckets), {}, ""
  _check_room(programs, stage, stage.prompts_per_step, lengths[0], least)
  for length in lengths:
    # The largest patch bucket whose visual tokens a prompt of this length can contain.
    most = length * run.model.config.vision.spatial_merge_size**2
    patches = max((n for n in run.config.patch_buckets if n <= most), default=least)
    try:
      groups[length] = _check_room(programs, stage, stage.prompts_per_step, length, patches)
    except UserError as error:
      warning = f"; longer prompts do not fit: {error}"
      break
  shown = ", ".join(f"{length}: {count}" for length, count in groups.items())
  room, held = run.capacity / memory.GIB, programs.held / memory.GIB
  run.progress.log(
    f"rl  a device has {room:.1f} GiB available, {held:.1f} GiB of it for weights and optimizer; "
    f"groups decoded at once, by prompt tokens: {shown}{warning}"
  )


def _check_room(
  programs: Programs, stage: ConfigDict, prompts: int, length: int, patches: int
) -> int:
  """Returns the number of groups that are decoded at once.

  Raises:
    UserError: the rollout or the update does not fit into the memory of a device.
  """
  groups = programs.rollout.groups_at_once(prompts, length, patches)
  programs.check_update(prompts, length, patches, stage.num_samples, stage.max_tokens)
  return groups


def check_objective(stage: ConfigDict) -> None:
  """Checks that the stage has the verifiers and the images that its objective needs.

  Raises:
    ValueError, UserError: they are missing. The message names the field and its value.
  """
  objective = objective_of(stage)
  known = {"accuracy", "reward", *verifiers.metric_names(stage.rewards.to_dict())}
  for key in objective.filter_keys:
    if key not in known:
      raise ValueError(
        f"config.objective.filter_keys={objective.filter_keys!r}: no such verifier in rewards of "
        f"the stage (its weight may be 0.0); {hint(key, sorted(known))}"
      )
  if "masked" not in (*objective.views, *objective.grad_views):
    return
  spec = source_spec(stage, "train")
  if spec["name"] == "digit_boards":  # avoids preparing the dataset on disk
    spec["options"] = {**spec["options"], "live": True}
  source = sources.open_source(spec, "train", verifiers=tuple(stage.rewards.to_dict()))
  some = np.linspace(0, len(source) - 1, 64).astype(int)
  if not any(source[int(i)].images for i in sorted(set(some))):
    raise ValueError(
      f"objective.name={stage.objective.name!r}: needs the view 'masked', the prompt under a "
      f"corrupted image, but the examples of data.name={stage.data.name!r} have no images"
    )


def sampling(stage: ConfigDict) -> Sampling:
  """Returns the sampling settings of the stage. Raises ValueError if a field is out of range."""
  return Sampling(stage.num_samples, stage.max_tokens, stage.temperature, stage.top_p, stage.top_k)


def _sample(loop: StageRun, key: jax.Array) -> Sampled:
  """Samples responses to the next prompts, and starts to grade each group when it has ended."""
  run, programs, rows = loop.run, loop.programs, loop.rows
  assert loop.pool is not None  # an RL stage always has one
  batch = loop.data.given
  examples, encoded, prompt = run.read(lambda: next(loop.data), rows.count)
  prompt = _with_features(loop, prompt)
  place = {row: i for i, row in enumerate(rows.owned)}
  sampled = Sampled(
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
      sampled.texts[which[i]] = new
    which = [which[i] for i in mine]
    try:
      with validation():
        sampled.grading.add(
          [place[row] for row in which],
          [examples[row] for row in which],
          [sampled.texts[row] for row in which],
        )
    except UserError as error:  # raised later, because other processes are in the rollout too
      sampled.error = error

  sampled.rollout = programs.rollout(
    loop.params, prompt, key, finished=ended, each_chunk=loop.stop_if_asked
  )
  if "baseline" in programs.objective.advantage_needs:
    sampled.greedy = programs.rollout_greedy(
      loop.params, prompt, jax.random.key(0), each_chunk=loop.stop_if_asked
    )
    mine = list(rows.owned)
    tokens, mask = np.asarray(sampled.greedy.tokens), np.asarray(sampled.greedy.mask)
    texts = texts_of(tokens[mine], mask[mine], run.processor)
    sampled.greedy_grading = loop.pool.begin(len(mine), 1)
    try:
      with validation():
        sampled.greedy_grading.add(range(len(mine)), [examples[row] for row in mine], texts)
    except UserError as error:
      sampled.error = sampled.error or error
  return sampled


def _collect(loop: StageRun, sampled: Sampled) -> tuple[Groups, Prompt, Scored, dict[str, float]]:
  """Waits for the rewards, and samples further batches until the objective keeps P groups.

  Returns:
    The groups, their prompts on the device, their scores, and metrics over all sampled groups.
  """
  run, objective = loop.run, loop.programs.objective
  want = loop.stage.prompts_per_step
  kept: Groups | None = None
  spare: Groups | None = None
  batches: list[Groups] = []
  while True:
    prompt, rollout = sampled.prompt, sampled.rollout
    loop.generated(int(rollout.mask.sum()))
    if sampled.greedy is not None:
      loop.generated(int(sampled.greedy.mask.sum()))
    scored = None
    if not objective.filter_groups:  # the devices score while the workers grade
      scored = _score(loop, prompt, sampled.examples, rollout.tokens, rollout.mask)
    groups = _graded(loop, sampled)
    batches.append(groups)
    if scored is not None:
      return groups, prompt, scored, _summary(loop, batches)

    sampled.prompt = prompt = None  # freed; the prompts of the kept groups are read again below
    with validation():
      keep = objective.kept(
        loop.correct(groups.components, groups.rewards), groups.rewards, groups.components
      )
    good, bad = groups.rows(np.flatnonzero(keep)), groups.rows(np.flatnonzero(~keep))
    kept, spare = (good, bad) if kept is None or spare is None else (kept + good, spare + bad)
    count = len(kept.examples)
    if count >= want or len(batches) == objective.max_tries:
      break
    sampled = _sample(loop, run.random_key(_ROLLOUT, len(batches)))
  summary = _summary(loop, batches) | {
    "train/tries": float(len(batches)),
    "train/kept_groups": count / (want * len(batches)),
  }
  if count < want:
    # Too few groups after all tries. Fill the batch to its compiled shape with masked groups.
    filler = spare.rows(range(want - count))
    filler.mask = np.zeros_like(filler.mask)
    kept = kept + filler
  kept = kept.rows(range(want))
  prompt = _read_prompts(loop, kept)
  return kept, prompt, _score(loop, prompt, kept.examples, kept.tokens, kept.mask), summary


def _graded(loop: StageRun, sampled: Sampled) -> Groups:
  """Returns the sampled groups with their rewards.

  Each process grades the rows that it owns, and sends their rewards to the others.
  """
  rows, rollout = loop.rows, sampled.rollout
  wants_weights = "components" in loop.programs.objective.advantage_needs

  def grade() -> dict[str, Any]:
    if sampled.error is not None:
      raise sampled.error
    graded = sampled.grading.result()
    failures, messages = collections.Counter(graded.failures), dict(graded.messages)
    baseline = None
    if sampled.greedy_grading is not None:
      of_greedy = sampled.greedy_grading.result()
      baseline = of_greedy.total[:, 0]
      failures.update(of_greedy.failures)
      messages = {**of_greedy.messages, **messages}
    weights = [
      _verifier_weights(loop, sampled.examples[row]) if wants_weights else {} for row in rows.owned
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
  baseline = None if sampled.greedy is None else np.zeros(rows.count, np.float32)
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
    sampled.places,
    sampled.examples,
    sampled.encoded,
    sampled.texts,
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


def _with_features(loop: StageRun, prompt: Prompt) -> Prompt:
  """Adds the visual tokens to prompts on the device. Raises UserError if a step does not fit."""
  prompts, length = prompt.tokens.shape
  _check_room(loop.programs, loop.stage, prompts, length, prompt.patches.shape[1])
  return loop.programs.see(loop.params, prompt)


def _read_prompts(loop: StageRun, groups: Groups | Sampled) -> Prompt:
  """Puts the prompts of the groups on the devices, with their visual tokens.

  Dynamic sampling and one step off can assign a prompt to another process than the one that sampled
  its responses. That process reads the example again.
  """

  def read() -> list[int]:
    for row in loop.rows.here:
      if groups.encoded[row] is None:
        example = loop.data.example(*groups.places[row])
        groups.examples[row], groups.encoded[row] = example, loop.run.encode([example])[0]
    return loop.run.processor.sizes(mine())

  def mine() -> list[Any]:
    return [groups.encoded[row] for row in loop.rows.here]

  _, sizes = parallel.exchange(read)
  return _with_features(loop, loop.run.place(mine(), sizes, loop.rows))


def _for_training(programs: Programs, prompt: Prompt) -> Prompt:
  """Removes the visual tokens if the update computes them itself to train the vision tower."""
  return dataclasses.replace(prompt, features=None) if programs.trains_vision else prompt


def _truncated(loop: StageRun, rollout: Rollout) -> np.ndarray:
  """bool[P, G]: responses that reach max_tokens without an end token."""
  ended = np.isin(np.asarray(rollout.tokens)[..., -1], loop.run.model.config.stop_tokens)
  return np.asarray(rollout.mask).all(axis=-1) & ~ended


def _masked_source(loop: StageRun, examples: Sequence[Any], group: int) -> Prompt | None:
  """Returns prompts with images that the host has corrupted, or None if the device does this.

  There is one row for each prompt, or one for each of its G samples. The random numbers depend on
  the seed, the step and the row.
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
  """Puts responses [P, G, T] on the devices and scores them under all views of the objective."""
  run, programs, params = loop.run, loop.programs, loop.params
  packing, views = programs.pack(np.asarray(mask)), {}
  tokens, mask = parallel.put_batch(run.mesh, (np.asarray(tokens), np.asarray(mask)))
  if programs.scores_old:
    views["old"] = programs.score(params, prompt, tokens, mask, packing)
  masked = _masked_source(loop, examples, tokens.shape[1])
  for name in programs.objective.views:
    # The vision tower of the reference may differ, so it computes its own visual tokens.
    unseen = _for_training(programs, prompt)
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
  """Returns what the objective's advantages need besides rewards and mask, on the devices."""
  needs, more = loop.programs.objective.advantage_needs, {}
  if "components" in needs:
    weights = groups.weights
    # Verifiers of earlier steps stay, because each new set of names compiles the program again.
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
  """Returns the weight of each verifier in the reward of this example, by metric name."""
  weights = dict(example.rewards or loop.stage.rewards.to_dict())
  return dict(zip(verifiers.metric_names(weights), weights.values(), strict=True))


def _summary(loop: StageRun, sampled: list[Groups]) -> dict[str, float]:
  """Returns means over all sampled groups, including those that the objective filters out."""
  groups = sampled[0]
  for more in sampled[1:]:
    groups = groups + more
  lengths = groups.mask.sum(-1)
  values = {
    "train/reward": groups.rewards.mean(),
    "train/reward_std": groups.rewards.std(axis=1).mean(),
    "train/accuracy": loop.correct(groups.components, groups.rewards).mean(),
    "train/response_length": lengths.mean(),
    "train/cut_share": groups.truncated.mean(),
  }
  # Examples with their own `rewards` may lack a verifier. Its value is NaN there.
  values |= {f"train/reward/{k}": np.nanmean(v) for k, v in groups.components.items()}
  values |= {f"train/grader_{k}": v for k, v in groups.failures.items()}
  return {k: float(v) for k, v in values.items()}


def _log_rollouts(loop: StageRun, groups: Groups, advantages: dict[int, np.ndarray]) -> None:
  """Writes some groups for the report. They are among the groups of the first process."""
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

"""The stages of a run, each with a training loop of its own, and the checks of a config."""

import functools
import pathlib
from typing import Any

from ml_collections import ConfigDict

from jaxrl_vlm import evaluate, models, parallel, rewards
from jaxrl_vlm.checkpoint import Unreadable
from jaxrl_vlm.data import sources
from jaxrl_vlm.errors import UserError, hint, one_line, validation
from jaxrl_vlm.models import lora
from jaxrl_vlm.models.config import REMAT
from jaxrl_vlm.rollout.sampler import PREFIX_DTYPES
from jaxrl_vlm.stages import rl, sft
from jaxrl_vlm.stages.loading import lora_of, objective_of, trainable_of
from jaxrl_vlm.stages.optimizer import make_optimizer
from jaxrl_vlm.stages.run import Run, Stopped, source_spec

__all__ = ["KINDS", "MAY_CHANGE", "Run", "Stopped", "check", "run_all", "run_stage"]

KINDS = {"sft": sft.train, "rl": rl.train}

# Config fields that may be changed when a run is resumed. All others must stay the same.
MAY_CHANGE = (
  "config.log_every",
  "config.reward_workers",
  "config.checkpoint.every",
  "config.checkpoint.keep",
  "config.rollouts_every",
  "config.rollouts_kept",
  "config.rollout.groups",
  "config.device_memory",
  # How a step is computed, which may have to change on another number of devices. Except for
  # rounding, the result of the step stays the same.
  "config.mesh",
  "config.rollout.tensor",
  "config.model.remat",
  "config.stages[].microbatches",
  "config.stages[].part_tokens",
  "config.stages[].eval.batch",
)


def run_stage(run: Run, index: int) -> None:
  """Runs a stage to its end, or restores its result if a checkpoint shows that it is finished."""
  KINDS[run.config.stages[index].kind](run, index)


def run_all(config: ConfigDict, workdir: pathlib.Path) -> Run:
  """Runs all stages, starting from the newest readable checkpoint if there is one.

  Raises:
    Stopped: the run was asked to stop, and has saved a checkpoint.
  """
  unreadable: frozenset[int] = frozenset()
  while True:
    run = Run(config, workdir, unreadable)
    try:
      with run.running():
        for index in range(run.position["stage"], len(config.stages)):
          run_stage(run, index)
      return run
    except Unreadable as error:
      unreadable = error.steps


def check(config: ConfigDict) -> None:
  """Checks the fields of a config before a model is loaded or a program is compiled.

  Raises:
    UserError: a field is invalid. The message is one line with the field, its value, and what was
      expected.
  """

  def expect(ok: bool, field: str, value: object, wanted: str) -> None:
    if not ok:
      raise UserError(f"{field}={value!r}: expected {wanted}")

  expect(len(config.stages) > 0, "config.stages", (), "at least one stage")
  model = config.model
  expect(
    bool(model.path) or bool(model.scratch),
    "config.model.path",
    model.path,
    "a Hugging Face model directory",
  )
  if model.path and not model.scratch:
    expect(
      pathlib.Path(model.path).is_dir(), "config.model.path", model.path, "an existing directory"
    )
  expect(
    model.dtype in ("auto", "float32", "bfloat16"),
    "config.model.dtype",
    model.dtype,
    "'auto', 'float32' or 'bfloat16'",
  )
  expect(model.remat in REMAT, "config.model.remat", model.remat, " or ".join(map(repr, REMAT)))
  for name in ("min_pixels", "max_pixels"):
    expect(
      model[name] >= 0,
      f"config.model.{name}",
      model[name],
      "at least 0 (0 keeps the setting of the checkpoint)",
    )
  settings = model.lora
  expect(
    settings.rank >= 0, "config.model.lora.rank", settings.rank, "at least 0 (0 adds no adapters)"
  )
  expect(settings.alpha > 0, "config.model.lora.alpha", settings.alpha, "a number above 0")
  expect(
    not (settings.path and not settings.rank),
    "config.model.lora.rank",
    settings.rank,
    f"the rank of config.model.lora.path={settings.path!r}",
  )
  for field, patterns in (("trainable", model.trainable), ("lora.targets", settings.targets)):
    expect(
      all(isinstance(p, str) and p.strip("!") for p in patterns),
      f"config.model.{field}",
      tuple(patterns),
      "a tuple of patterns, e.g. ('decoder',)",
    )
  expect(
    not settings.rank or len(settings.targets) > 0,
    "config.model.lora.targets",
    (),
    "at least one pattern",
  )
  if model.trainable or settings.rank:
    _check_patterns(config)
  for name in (
    "checkpoint.every",
    "checkpoint.keep",
    "reward_workers",
    "max_bad_steps",
    "log_every",
    "rollouts_every",
  ):
    value: Any = functools.reduce(getattr, name.split("."), config)
    expect(value >= 1, f"config.{name}", value, "at least 1")
  expect(config.seed >= 0, "config.seed", config.seed, "at least 0")
  expect(
    config.device_memory >= 0,
    "config.device_memory",
    config.device_memory,
    "GiB, at least 0 (0 uses what the device reports)",
  )
  rollout = config.rollout
  expect(rollout.chunk >= 1, "config.rollout.chunk", rollout.chunk, "at least 1")
  expect(
    rollout.groups >= 0,
    "config.rollout.groups",
    rollout.groups,
    "at least 0 (0 decodes all prompts at once, or as many as fit)",
  )
  expect(
    rollout.prefix_dtype in PREFIX_DTYPES,
    "config.rollout.prefix_dtype",
    rollout.prefix_dtype,
    " or ".join(map(repr, PREFIX_DTYPES)),
  )
  expect(
    config.pipeline in ("synchronous", "one_step_off"),
    "config.pipeline",
    config.pipeline,
    "'synchronous' or 'one_step_off'",
  )
  expect(
    config.reward_timeout > 0,
    "config.reward_timeout",
    config.reward_timeout,
    "a number of seconds above 0",
  )
  with validation():
    parallel.rules_of(config.sharding.to_dict())
    mesh = parallel.make_mesh(config.mesh)
    if rollout.tensor:
      parallel.with_tensor(mesh, rollout.tensor)
  rows = parallel.rows(mesh)
  for i, stage in enumerate(config.stages):
    field = f"config.stages[{i}]"
    if stage.kind not in KINDS:
      raise UserError(f"{field}.kind={stage.kind!r}: no such stage; {hint(stage.kind, KINDS)}")
    for name in (
      "steps",
      "prompts_per_step",
      "max_tokens",
      "microbatches",
      "minibatches",
      "part_tokens",
    ):
      value = stage.get(name, 1)
      expect(value >= 1, f"{field}.{name}", value, "at least 1")
    divisor = stage.microbatches * stage.get("minibatches", 1) * rows
    expect(
      stage.prompts_per_step % divisor == 0,
      f"{field}.prompts_per_step",
      stage.prompts_per_step,
      f"a multiple of minibatches x microbatches x mesh.slice x mesh.fsdp = {divisor}",
    )
    budget = stage.get("token_budget", 0)
    expect(budget >= 0, f"{field}.token_budget", budget, "at least 0 (0 sets no limit)")
    with validation(f"{field}: "):
      evaluate.sampling(stage)
      objective_of(stage, config.pipeline)
      if stage.kind == "rl":
        rl.sampling(stage)
      make_optimizer(stage.optimizer, stage.steps)
    if stage.eval.examples:
      expect(
        stage.eval.batch >= 1 and stage.eval.batch % rows == 0,
        f"{field}.eval.batch",
        stage.eval.batch,
        f"a multiple of mesh.slice x mesh.fsdp = {rows}",
      )
    if stage.kind == "rl" or stage.eval.examples:
      expect(len(stage.rewards) > 0, f"{field}.rewards", {}, "at least one verifier")
      with validation(f"{field}: "):
        names = rewards.metric_names(stage.rewards.to_dict())
      if stage.accuracy and stage.accuracy not in names:
        raise UserError(
          f"{field}.accuracy={stage.accuracy!r}: no such verifier in "
          f"{field}.rewards; {hint(stage.accuracy, names)}"
        )
    for split in ("train", "test") if stage.eval.examples else ("train",):
      try:
        sources.check(source_spec(stage, split))
      except UserError as error:
        raise UserError(f"{field}.{error}") from error
    if stage.kind == "rl":
      with validation(f"{field}: "):
        rl.check_objective(stage)


def _check_patterns(config: ConfigDict) -> None:
  """Checks `trainable` and `lora.targets` against the parameters that the model will have."""
  model = config.model
  try:
    if model.scratch:
      from jaxrl_vlm import scratch

      architecture = scratch.model_config(model.scratch.to_dict())
    else:
      architecture = models.from_directory(model.path)
  except (OSError, ValueError) as error:
    raise UserError(f"config.model.path={model.path!r}: {one_line(str(error))}") from error
  everywhere = models.LoRA(rank=1, alpha=1.0, targets=("*",))
  adapters = lora_of(config)
  if adapters is not None and model.lora.path:
    try:
      lora.check_adapter(model.lora.path, adapters)
    except (OSError, ValueError) as error:
      raise UserError(f"config.model.lora.path={model.lora.path!r}: {error}") from error
  with validation():
    lora.check(
      models.abstract_params(architecture.replace(lora=everywhere)), adapters, trainable_of(config)
    )

"""What a config says that is more than a number: the model, what of it trains, the objective."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from jaxrl_vlm import models, objectives, parallel
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.errors import UserError, one_line, validation
from jaxrl_vlm.models import lora
from jaxrl_vlm.types import Params


def lora_of(config: ConfigDict) -> models.LoRA | None:
  """`config.model.lora`; None for no adapters."""
  settings = config.model.lora
  if not settings.rank:
    return None
  return models.LoRA(settings.rank, settings.alpha, tuple(settings.targets))


def trainable_of(config: ConfigDict) -> tuple[str, ...]:
  """`config.model.trainable`, or its default: with LoRA the adapters, otherwise everything."""
  return tuple(config.model.trainable) or (("lora",) if config.model.lora.rank else ())


def model_path(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """The directory that a run begins with."""
  return workdir / "scratch" if config.model.scratch else pathlib.Path(config.model.path)


def load_model(
  config: ConfigDict, path: pathlib.Path, mesh: Any
) -> tuple[models.VLM, Params, Processor]:
  """What a run begins with: the directory, with the adapters of the config, on a mesh.

  Raises:
    UserError: one line naming the field or file.
  """
  settings, adapters = config.model, lora_of(config)
  dtype = None if settings.dtype == "auto" else settings.dtype
  try:
    architecture = models.from_directory(path, dtype).replace(lora=adapters)
    with validation():
      rules = parallel.rules_of(config.sharding.to_dict())
      attention = models.choose_attention(settings.attention, mesh.devices.flat, architecture)
    shapes = models.abstract_params(architecture, settings.param_dtype)
    shardings = parallel.param_shardings(mesh, shapes, rules)
    model, params, processor = models.load_pretrained(
      path,
      dtype=dtype,
      param_dtype=settings.param_dtype,
      remat=settings.remat,
      lora=adapters,
      trainable=trainable_of(config),
      seed=config.seed,
      shardings=shardings,
      min_pixels=settings.min_pixels or None,
      max_pixels=settings.max_pixels or None,
      prompt_buckets=config.prompt_buckets,
      patch_buckets=config.patch_buckets,
    )
  except (OSError, ValueError) as error:  # of the files; their messages name the file or field
    raise UserError(f"config.model.path={str(path)!r}: {one_line(str(error))}") from error
  if adapters is not None and settings.lora.path:
    try:
      loaded = lora.load_adapter(settings.lora.path, model.config, shapes, shardings)
    except (OSError, ValueError) as error:
      raise UserError(
        f"config.model.lora.path={settings.lora.path!r}: {one_line(str(error))}"
      ) from error
    params = lora.merge(lora.strip(params), loaded)
  return models.VLM(model.config.replace(attention=attention, rules=rules)), params, processor


def objective_of(stage: ConfigDict, pipeline: str = "synchronous") -> objectives.Objective:
  """The stage's objective; ValueError names a field that is out of range.

  Unless it says otherwise its `max_length` is the stage's `max_tokens`, and with `config.pipeline`
  "one_step_off" its `correction` is "tis": another policy than the one that is updated has sampled.
  """
  settings = {"max_length": stage.max_tokens}
  if pipeline == "one_step_off" and stage.kind == "rl":
    settings["correction"] = "tis"
  objective = objectives.create(**settings | stage.objective.to_dict())
  if objective.kind != stage.kind:
    raise ValueError(
      f"objective.name={stage.objective.name!r}: expected an objective of "
      f"{stage.kind!r} stages, this is one of {objective.kind!r} stages"
    )
  samples = stage.get("num_samples", 1)
  if samples < objective.min_samples:
    raise ValueError(
      f"num_samples={samples!r}: expected at least {objective.min_samples}, because objective "
      f"{stage.objective.name!r} compares the samples of a prompt with each other (advantages "
      "'remax' and 'reinforce_pp' do not)"
    )
  return objective

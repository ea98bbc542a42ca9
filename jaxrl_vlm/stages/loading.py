"""Builds objects from a config: the model, the selection of trained parameters, the objective."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from jaxrl_vlm import models, objectives, parallel
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.errors import UserError, one_line, validation
from jaxrl_vlm.models import lora
from jaxrl_vlm.types import Params


def lora_of(config: ConfigDict) -> models.LoRA | None:
  """Returns the LoRA settings of `config.model.lora`, or None if the model has no adapters."""
  settings = config.model.lora
  if not settings.rank:
    return None
  return models.LoRA(settings.rank, settings.alpha, tuple(settings.targets))


def trainable_of(config: ConfigDict) -> tuple[str, ...]:
  """Returns the patterns of the trained parameters, from `config.model.trainable`.

  By default, these are the adapters if there are any. Otherwise the result is (), which trains all
  parameters.
  """
  return tuple(config.model.trainable) or (("lora",) if config.model.lora.rank else ())


def model_path(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Returns the Hugging Face directory of the start model of a run."""
  return workdir / "scratch" if config.model.scratch else pathlib.Path(config.model.path)


def load_model(
  config: ConfigDict, path: pathlib.Path, mesh: Any
) -> tuple[models.VLM, Params, Processor]:
  """Loads the start model and its processor, with the adapters of the config.

  Args:
    config: config of the run.
    path: Hugging Face directory of the model.
    mesh: mesh that the parameters are sharded over.

  Raises:
    UserError: a field is invalid, or a file cannot be read. The message names the field or file.
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
  except (OSError, ValueError) as error:  # the message names the file, or the field in it
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
  """Creates the objective of a stage from `stage.objective`.

  Two fields of the objective have a default that depends on the run. `max_length` is the
  `max_tokens` of the stage. In an RL stage with `config.pipeline` "one_step_off", `correction` is
  "tis", because the policy that sampled the responses is not the policy that is updated.

  Raises:
    ValueError: a field is out of range, or the objective does not fit the stage. The message names
      the field.
  """
  settings = {"max_length": stage.max_tokens}
  if pipeline == "one_step_off" and stage.kind == "rl":
    settings["correction"] = "tis"
  objective = objectives.create(**settings | stage.objective.to_dict())
  if objective.kind != stage.kind:
    raise ValueError(
      f"objective.name={stage.objective.name!r}: expected an objective of "
      f"{stage.kind!r} stages, got one of {objective.kind!r} stages"
    )
  samples = stage.get("num_samples", 1)
  if samples < objective.min_samples:
    raise ValueError(
      f"num_samples={samples!r}: expected at least {objective.min_samples}, because objective "
      f"{stage.objective.name!r} compares the samples of a prompt with each other (advantages "
      "'remax' and 'reinforce_pp' do not)"
    )
  return objective

"""Makes a `config.json` like transformers 4: fields that equal the defaults are left out."""

import copy
from typing import Any

import transformers


def sparse(config: dict[str, Any]) -> dict[str, Any]:
  """Returns `config` without the fields that equal the defaults, also of its text and vision."""
  default = transformers.AutoConfig.for_model(config["model_type"])
  own = vars(type(default))["__annotations__"]
  kept: dict[str, Any] = {}
  for name, value in copy.deepcopy(config).items():
    if name in ("text_config", "vision_config"):
      section = type(getattr(default, name))
      kept[name] = {k: v for k, v in value.items() if not is_default(section, k, v)}
    # In a flat file, fields that the config class itself does not define belong to the decoder.
    elif not is_default(type(default if name in own else default.text_config), name, value):
      kept[name] = value
  return kept | {"model_type": config["model_type"]}


def is_default(section: type, name: str, value: Any) -> bool:
  """Whether `value` is the default of the class, before the class derives fields from others."""
  if name == "rope_theta":
    return value == getattr(section, "default_theta", None)
  default = getattr(section, name, None)
  return value is not None and value == (list(default) if isinstance(default, tuple) else default)

"""`config.json` as transformers 4 wrote it: without what its classes have as defaults."""

import copy
from typing import Any

import transformers


def sparse(config: dict[str, Any]) -> dict[str, Any]:
  """`config` without the fields, of text and vision in it too, that are defaults."""
  whole = transformers.AutoConfig.for_model(config["model_type"])
  own = vars(type(whole))["__annotations__"]
  less: dict[str, Any] = {}
  for name, value in copy.deepcopy(config).items():
    if name in ("text_config", "vision_config"):
      section = type(getattr(whole, name))
      less[name] = {k: v for k, v in value.items() if not is_default(section, k, v)}
    # What the whole does not name is the decoder's, of a flat file.
    elif not is_default(type(whole if name in own else whole.text_config), name, value):
      less[name] = value
  return less | {"model_type": config["model_type"]}


def is_default(section: type, name: str, value: Any) -> bool:
  """Whether `value` is that of the class, before other fields are derived from each other."""
  if name == "rope_theta":
    return value == getattr(section, "default_theta", None)
  default = getattr(section, name, None)
  return value is not None and value == (list(default) if isinstance(default, tuple) else default)

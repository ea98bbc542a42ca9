"""The files of a Hugging Face directory that are not the model's: read, changed, written again."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxrl_vlm.hf_config import parse_json

_PREPROCESSOR = "preprocessor_config.json"
_VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
_PROCESSOR = "processor_config.json"  # transformers 5 may keep the contents of both others in it
_TEMPLATE = "chat_template.json"
_NAMES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.jinja",
  _TEMPLATE,
  _PREPROCESSOR,
  _VIDEO_PREPROCESSOR,
  _PROCESSOR,
  "generation_config.json",
)


class ProcessorFiles:
  """What tokenizer, chat template and image processors are made of, and generation_config.json.

  Attributes:
    contents: from the name of each file that there is to its bytes.
  """

  def __init__(self, path: str | pathlib.Path):
    """Reads them; FileNotFoundError without any for images."""
    path = pathlib.Path(path)
    self.contents = {n: (path / n).read_bytes() for n in _NAMES if (path / n).exists()}
    if self._image_processor()[1] is None:
      raise FileNotFoundError(f"{path / _PREPROCESSOR}: no such file")

  def write(self, path: str | pathlib.Path) -> None:
    """Writes them, all that was not changed byte for byte."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in self.contents.items():
      (path / name).write_bytes(content)

  def json(self, name: str) -> dict[str, Any]:
    """A file's contents; empty if there is none."""
    return parse_json(name, self.contents.get(name, b"{}"))

  @property
  def processor(self) -> dict[str, Any]:
    return self.json(_PROCESSOR)

  @property
  def chat_template(self) -> str | None:
    """The processor's own, which transformers prefers to that of tokenizer_config.json.

    None if it has none, or has it in chat_template.jinja, which the tokenizer reads itself.
    """
    if "chat_template.jinja" in self.contents:
      return None
    return self.json(_TEMPLATE).get("chat_template")

  def image_processor(self) -> tuple[str, Mapping[str, Any]]:
    """Where the settings for images are, and they."""
    name, settings = self._image_processor()
    assert settings is not None
    return name, settings

  def video_processor(self) -> tuple[str, Mapping[str, Any]]:
    """Where the settings for videos are, and they; as in transformers, maybe those for images."""
    nested = self.processor.get("video_processor")
    if nested is not None:
      return f"{_PROCESSOR}: video_processor", nested
    name = _VIDEO_PREPROCESSOR if _VIDEO_PREPROCESSOR in self.contents else _PREPROCESSOR
    return name, self.json(name)

  def override_bounds(self, min_pixels: int | None, max_pixels: int | None) -> None:
    """Changes the area of images, wherever it stands; None keeps it."""
    name, settings = self.image_processor()
    settings = dict(settings)
    for field, edge, value in (
      ("min_pixels", "shortest_edge", min_pixels),
      ("max_pixels", "longest_edge", max_pixels),
    ):
      if value is not None:
        settings[field] = value
        if edge in (settings.get("size") or {}):
          settings["size"] = settings["size"] | {edge: value}
    if (min_pixels, max_pixels) != (None, None):
      whole = settings if name == _PREPROCESSOR else self.processor | {"image_processor": settings}
      name = name.partition(":")[0]
      self.contents[name] = (json.dumps(whole, indent=2) + "\n").encode()

  def _image_processor(self) -> tuple[str, Mapping[str, Any] | None]:
    nested = self.processor.get("image_processor")
    if nested is not None:
      return f"{_PROCESSOR}: image_processor", nested
    return _PREPROCESSOR, self.json(_PREPROCESSOR) if _PREPROCESSOR in self.contents else None

"""Reads, changes and writes the processor files of a Hugging Face directory.

These are the files of the tokenizer, the chat template, and the image and video processors, and
`generation_config.json`. Weights and `config.json` belong to the model.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxrl_vlm.hf_config import parse_json

_PREPROCESSOR = "preprocessor_config.json"
_VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
_PROCESSOR = "processor_config.json"  # in transformers 5 it may contain both of the files above
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
  """The processor files of a Hugging Face directory, as bytes.

  Attributes:
    contents: Maps the name of each file that exists to its bytes.
  """

  def __init__(self, path: str | pathlib.Path):
    """Reads the files of a directory.

    Args:
      path: The directory.

    Raises:
      FileNotFoundError: No file contains image settings.
    """
    path = pathlib.Path(path)
    self.contents = {name: (path / name).read_bytes() for name in _NAMES if (path / name).exists()}
    if self._image_processor()[1] is None:
      raise FileNotFoundError(f"{path / _PREPROCESSOR}: no such file")

  def write(self, path: str | pathlib.Path) -> None:
    """Writes the files to a directory. Files that were not changed are the same bytes."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in self.contents.items():
      (path / name).write_bytes(content)

  def json(self, name: str) -> dict[str, Any]:
    """Returns the contents of a JSON file, or an empty dict if the file does not exist.

    Raises:
      ValueError: The file is not a JSON object.
    """
    return parse_json(name, self.contents.get(name, b"{}"))

  @property
  def processor(self) -> dict[str, Any]:
    """Contents of `processor_config.json`."""
    return self.json(_PROCESSOR)

  @property
  def chat_template(self) -> str | None:
    """Chat template of `chat_template.json`.

    As in transformers, it takes precedence over the template in `tokenizer_config.json`. The value
    is None if there is no such template, or if `chat_template.jinja` exists, which the tokenizer
    reads itself.
    """
    if "chat_template.jinja" in self.contents:
      return None
    return self.json(_TEMPLATE).get("chat_template")

  def image_processor(self) -> tuple[str, Mapping[str, Any]]:
    """Returns where the image settings were found, for error messages, and the settings."""
    name, settings = self._image_processor()
    assert settings is not None
    return name, settings

  def video_processor(self) -> tuple[str, Mapping[str, Any]]:
    """Returns where the video settings were found, for error messages, and the settings.

    As in transformers, videos use the image settings if there are no video settings.
    """
    nested = self.processor.get("video_processor")
    if nested is not None:
      return f"{_PROCESSOR}: video_processor", nested
    name = _VIDEO_PREPROCESSOR if _VIDEO_PREPROCESSOR in self.contents else _PREPROCESSOR
    return name, self.json(name)

  def override_bounds(self, min_pixels: int | None, max_pixels: int | None) -> None:
    """Changes the bounds of the area of images, in pixels, in the file that contains them.

    Args:
      min_pixels: Smallest area. None keeps the file's value.
      max_pixels: Largest area. None keeps the file's value.
    """
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
      content = settings
      if name != _PREPROCESSOR:
        content = self.processor | {"image_processor": settings}
      name = name.partition(":")[0]
      self.contents[name] = (json.dumps(content, indent=2) + "\n").encode()

  def _image_processor(self) -> tuple[str, Mapping[str, Any] | None]:
    nested = self.processor.get("image_processor")
    if nested is not None:
      return f"{_PROCESSOR}: image_processor", nested
    return _PREPROCESSOR, self.json(_PREPROCESSOR) if _PREPROCESSOR in self.contents else None

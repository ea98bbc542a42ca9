"""Where examples come from: handwritten digit boards, any TFDS dataset, a JSON-lines file.

A source is a random-access sequence of Example (`__len__`, `__getitem__`), which grain reads and
may send to worker processes. Everything that is wrong with a dataset's text is found on opening.

    open_source({"name": "digit_boards", "options": {"tasks": ("read", "sum_row")}}, "train")
    open_source({"name": "data/{split}.jsonl"}, "test")
    open_source({"name": "my_tfds", "options": {"fields": {"answer": "label"}}}, "train[:90%]")
"""

import array
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ml_collections import ConfigDict

from jaxrl_vlm.data import digit_boards
from jaxrl_vlm.errors import UserError, hint, one_line, validation
from jaxrl_vlm.example import Example

# Options of each kind of source, config.data.options.
OPTIONS = {
  # As digit_boards.builder; live: draw the boards as they are read and store nothing.
  # rows, columns: with live, the least and the most of them.
  "digit_boards": ("tasks", "style", "slips", "seed", "train", "test", "live", "rows", "columns"),
  # fields: names of the dataset's features, {"question": "text", ...}; by default our own names.
  "tfds": ("fields",),
  # allow_outside: images may lie outside the directory of the file.
  "jsonl": ("allow_outside",),
}
_FIELDS = ("id", "question", "answer", "images", "image", "target", "rewards", "meta")


class Source(Protocol):
  """A random-access sequence of examples."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Example: ...


def open_source(spec: Mapping[str, Any] | ConfigDict, split: str, need: str = "answer") -> Source:
  """Opens the dataset that `spec` (config.data) describes.

  Args:
    spec: `name`: "digit_boards", a TFDS name, or the path of a .jsonl file, where {split} stands
      for the split; `options`: of the kind of source, see OPTIONS; `dir`: where prepared TFDS
      datasets are kept, "" for $JAXRL_VLM_CACHE or ~/.cache/jaxrl_vlm, and for datasets that are
      not ours TFDS's own default.
    split: "train" or "test"; for TFDS whatever its splits are called.
    need: "answer", or "target" where responses are imitated and answers are not asked for. An
      example without it is an error.

  Raises:
    UserError: names the file, the line and the field.
  """
  kind, name, options = check(spec)
  if kind == "jsonl":
    return JsonLines(name.replace("{split}", split), need=need, **options)
  data_dir = str(spec.get("dir") or "") or None
  if kind == "tfds":
    return TfdsSource(
      name, functools.partial(_open_tfds, name, data_dir), split, need=need, **options
    )
  if split not in digit_boards.SPLITS:
    raise UserError(f"split {split!r} of digit_boards: {hint(split, digit_boards.SPLITS)}")
  with validation("data.options."):
    if options.pop("live", False):
      size = options.get(split, 1_000_000)
      drawn = {
        key: value for key, value in options.items() if key not in ("live", *digit_boards.SPLITS)
      }
      return digit_boards.LiveBoards(split, size, **drawn)
    digit_boards.check_settings(**options)
  cache = data_dir or os.environ.get("JAXRL_VLM_CACHE") or "~/.cache/jaxrl_vlm"
  make = functools.partial(digit_boards.builder, cache, **options)
  return TfdsSource(name, make, split, need=need)


def check(spec: Mapping[str, Any] | ConfigDict) -> tuple[str, str, dict[str, Any]]:
  """Kind ("digit_boards", "jsonl", "tfds"), name and options of `spec`; opens nothing.

  Raises:
    UserError: no name, or an option that this kind of source does not have.
  """
  name, options = str(spec.get("name") or ""), _plain(spec.get("options") or {})
  if not name:
    raise UserError("data.name='': expected digit_boards, a TFDS name or a path of a .jsonl file")
  if name == "digit_boards":
    kind = "digit_boards"
  else:
    kind = "jsonl" if name.endswith((".jsonl", ".json")) else "tfds"
  for option in options:
    if option not in OPTIONS[kind]:
      raise UserError(
        f"data.options.{option}: no such option of {name}; {hint(option, OPTIONS[kind])}"
      )
  return kind, name, options


def _plain(options: Any) -> dict[str, Any]:
  """A ConfigDict, nested ones too, as a dict; another mapping as a copy."""
  return options.to_dict() if isinstance(options, ConfigDict) else dict(options)


# ------------------------------------------------------------------------------------------------
# TFDS
# ------------------------------------------------------------------------------------------------


def _open_tfds(name: str, data_dir: str | None) -> Any:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    near = hint(name, [*tfds.list_builders(with_community_datasets=False), "digit_boards"])
    raise UserError(
      f"data.name={name!r}: neither a .jsonl file nor a TFDS dataset; {near}"
    ) from error
  builder.download_and_prepare(file_format="array_record")
  return builder


def _png(value: Any) -> bytes:
  """An image as TFDS gives it (encoded, or uint8[H, W, C]) as an encoded file."""
  if isinstance(value, bytes):
    return value
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value).save(buffer, "png")
  return buffer.getvalue()


class TfdsSource:
  """A split of a prepared TFDS dataset that can be read without TensorFlow.

  Args:
    name: for messages and ids.
    make: gives the builder; called again in every worker process.
    split: as TFDS writes it, "train[:90%]" included.
    fields: Example's field to the dataset's feature; `images` may be one image or a sequence of
      them. By default our own names, and `image` for images.
    need: "answer" or "target".
  """

  def __init__(
    self,
    name: str,
    make: Callable[[], Any],
    split: str,
    fields: Mapping[str, str] | None = None,
    need: str = "answer",
  ):
    self._name, self._make, self._split, self._need = name, make, split, need
    self._labels: dict[str, list[str]] = {}
    builder = make()
    features = builder.info.features
    fields = dict(fields or {})
    for field, feature in fields.items():
      if field not in _FIELDS:
        raise UserError(f"data.options.fields.{field}: no such field; {hint(field, _FIELDS)}")
      if feature not in features:
        raise UserError(
          f"data.options.fields.{field}={feature!r}: no such feature of {name}; "
          f"{hint(feature, features)}"
        )
    if "image" in fields:
      fields["images"] = fields.pop("image")
    elif "images" not in fields and "images" not in features and "image" in features:
      fields["images"] = "image"
    self._fields = {field: field for field in _FIELDS if field in features and field != "image"}
    self._fields |= fields
    for field in ("question", need):
      if field not in self._fields:
        raise UserError(
          f"data.options.fields.{field}: {name} has no feature of this name; name "
          f"the one to use, of: {', '.join(sorted(features))}"
        )
    base = split.partition("[")[0]
    if base not in builder.info.splits:
      raise UserError(f"split {split!r} of {name}: {hint(base, builder.info.splits)}")
    for field, feature in self._fields.items():
      if hasattr(features[feature], "names"):  # class labels are stored as numbers
        self._labels[field] = list(features[feature].names)
    self._data: Any = self._open(builder)

  def _open(self, builder: Any) -> Any:
    import tensorflow_datasets as tfds

    images = self._fields.get("images")
    one = images and isinstance(builder.info.features[images], tfds.features.Image)
    # A sequence of images cannot be left encoded.
    decoders: Any = {images: tfds.decode.SkipDecoding()} if one else None
    return builder.as_data_source(self._split, decoders=decoders)

  def __getstate__(self):
    return self.__dict__ | {"_data": None}  # open files stay in their process

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__ |= state
    self._data = self._open(self._make())

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> Example:
    record = self._data[int(index)]
    found: dict[str, Any] = {"id": f"{self._name}/{self._split}/{index}", "answer": ""}
    for field, feature in self._fields.items():
      value = record[feature]
      if field == "images":
        single = isinstance(value, bytes) or getattr(value, "ndim", 0) == 3
        found[field] = tuple(_png(image) for image in ([value] if single else value))
      elif field in self._labels:
        found[field] = self._labels[field][int(value)]
      elif field in ("rewards", "meta"):
        found[field] = json.loads(value) if isinstance(value, str | bytes) else value
      else:
        found[field] = value.decode() if isinstance(value, bytes) else str(value)
    for field in ("question", self._need):
      if not found[field].strip():
        raise UserError(f"{self._name}/{self._split} example {index}: {field} is empty")
    found["target"] = found.get("target") or None
    return Example(**found)


# ------------------------------------------------------------------------------------------------
# JSON lines
# ------------------------------------------------------------------------------------------------


class JsonLines:
  """A file with one JSON object a line; see the README for its fields.

  Opening reads the file once, checks every line and remembers where it starts; the text and the
  images themselves are read when asked for.

  Args:
    path: the file. Images are relative to its directory.
    allow_outside: permits images elsewhere (absolute paths, `..`, links that lead out).
    need: "answer" or "target".
  """

  def __init__(self, path: str | os.PathLike, allow_outside: bool = False, need: str = "answer"):
    self._path = pathlib.Path(path)
    self._root = self._path.resolve().parent
    self._allow_outside, self._need = allow_outside, need
    self._starts, self._lines = array.array("Q"), array.array("Q")
    self._file: int | None = None
    seen: dict[str, int] = {}
    start = 0
    try:
      with open(self._path, "rb") as file:
        for number, line in enumerate(file, 1):
          if line.strip():
            example, _ = self._parse(line, number)
            if example.id in seen:
              raise UserError(
                f"{self._path}:{number}: field 'id': {example.id!r} is also that of "
                f"line {seen[example.id]}"
              )
            seen[example.id] = number
            self._starts.append(start)
            self._lines.append(number)
          start += len(line)
    except OSError as error:
      raise UserError(f"{self._path}: {error.strerror}") from error
    if not self._lines:
      raise UserError(f"{self._path}: holds no example")
    self._starts.append(start)

  def __getstate__(self):
    return self.__dict__ | {"_file": None}

  def __len__(self) -> int:
    return len(self._lines)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(index)
    if self._file is None:
      self._file = os.open(self._path, os.O_RDONLY)
    start, stop = self._starts[index], self._starts[index + 1]
    # pread has no position of its own: reading threads do not disturb one another.
    line = os.pread(self._file, stop - start, start)
    example, images = self._parse(line, self._lines[index])
    return example.replace(images=tuple(path.read_bytes() for path in images))

  def _parse(self, line: bytes, number: int) -> tuple[Example, list[pathlib.Path]]:
    """The example of a line, without its images, and their paths."""
    where = f"{self._path}:{number}: "
    try:
      record = json.loads(line)
    except ValueError as error:
      raise UserError(f"{where}not JSON: {one_line(str(error))}") from error
    if not isinstance(record, dict):
      raise UserError(f"{where}expected an object {{...}}, got {type(record).__name__}")
    for field in record:
      if field not in _FIELDS:
        raise UserError(
          f"{where}field {field!r}: no such field; {hint(field, _FIELDS)} "
          "(other facts go into 'meta')"
        )

    def text(field: str, needed: bool) -> str:
      value = record.get(field)
      if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
      if value is None or isinstance(value, str) and not value.strip():
        if needed:
          raise UserError(f"{where}field {field!r} is {'missing' if value is None else 'empty'}")
        return ""
      if not isinstance(value, str):
        raise UserError(f"{where}field {field!r}: expected text, got {json.dumps(value)[:60]}")
      return value

    rewards, meta = record.get("rewards"), record.get("meta") or {}
    if rewards is not None and not (
      isinstance(rewards, dict)
      and all(isinstance(weight, int | float) for weight in rewards.values())
    ):
      raise UserError(
        f"{where}field 'rewards': expected {{\"name\": weight, ...}}, "
        f"got {json.dumps(rewards)[:60]}"
      )
    if not isinstance(meta, dict):
      raise UserError(
        f"{where}field 'meta': expected an object {{...}}, got {json.dumps(meta)[:60]}"
      )
    example = Example(
      id=text("id", False) or f"{self._path.name}:{number}",
      question=text("question", True),
      answer=text("answer", self._need == "answer"),
      target=text("target", self._need == "target") or None,
      rewards=rewards,
      meta=meta,
    )
    return example, self._images(record, where)

  def _images(self, record: Mapping[str, Any], where: str) -> list[pathlib.Path]:
    if "image" in record and "images" in record:
      raise UserError(f"{where}fields 'image' and 'images': expected one of them")
    field = "image" if "image" in record else "images"
    names = record.get(field) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise UserError(f"{where}field {field!r}: expected paths, got {json.dumps(names)[:60]}")
    paths = []
    for name in names:
      path = (self._root / name).resolve()
      if not self._allow_outside and not path.is_relative_to(self._root):
        raise UserError(
          f"{where}field {field!r}: {name} is outside {self._root}; "
          "set data.options.allow_outside=True to permit it"
        )
      if not path.is_file():
        raise UserError(f"{where}field {field!r}: no such file: {name}")
      paths.append(path)
    return paths

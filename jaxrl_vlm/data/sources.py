"""Opens datasets of examples: generated digit boards, any TFDS dataset, or a JSON-lines file.

A source is a random-access sequence of `Example` (`__len__` and `__getitem__`). grain reads it and
may send it to worker processes. Opening a JSON-lines file checks all of its text. The records of a
TFDS dataset are checked when they are read, because reading its text also reads its images.

    open_source({"name": "digit_boards", "options": {"tasks": ("read", "sum_row")}}, "train")
    open_source({"name": "data/{split}.jsonl"}, "test")
    open_source({"name": "my_tfds", "options": {"fields": {"answer": "label"}}}, "train[:90%]")
"""

import array
import difflib
import functools
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from jaxrl_vlm import rewards as verifiers_lib
from jaxrl_vlm.data import digit_boards
from jaxrl_vlm.data.chat import check_unicode
from jaxrl_vlm.data.processor import IMAGE_MARK
from jaxrl_vlm.errors import UserError, hint, one_line, validation
from jaxrl_vlm.example import Example

# Options of each kind of source (config.data.options).
OPTIONS = {
  # The options of digit_boards.builder, and: `live` generates the boards when they are read and
  # stores nothing; `rows` and `columns` bound the size of live boards.
  "digit_boards": ("tasks", "style", "slips", "seed", "train", "test", "live", "rows", "columns"),
  # `fields` maps a field of Example to a feature of the dataset, as in {"question": "text"}. By
  # default a field has the feature of the same name.
  "tfds": ("fields",),
  # `allow_outside` permits images outside the directory of the file.
  "jsonl": ("allow_outside",),
}
_FIELDS = ("id", "question", "answer", "images", "image", "target", "rewards", "meta")

_KINDS = (
  "expected 'digit_boards', the path of a JSON-lines file (*.jsonl), or the name of a TFDS dataset "
  "such as 'name', 'name/config' or 'name:1.0.0'"
)
_TFDS_NAME = re.compile(r"([\w-]+:)?[A-Za-z]\w*(/[\w+.-]+)?(:[\d.*]+)?(/\w+=.+)?")
# Endings that show that a name is a file of another kind, and not a TFDS name.
_OTHER_FILES = (
  *(".arrow", ".csv", ".feather", ".gz", ".h5", ".jsonlines", ".ndjson", ".npz"),
  *(".parquet", ".pkl", ".pt", ".tar", ".tfrecord", ".tsv", ".txt", ".xlsx", ".yaml", ".zip"),
  *(".zst",),
)


class Source(Protocol):
  """A random-access sequence of examples."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Example: ...


def open_source(
  spec: Mapping[str, Any] | ConfigDict,
  split: str,
  need: str = "answer",
  verifiers: Collection[str] = (),
) -> Source:
  """Opens a dataset.

  Args:
    spec: Describes the dataset (config.data). `name` is "digit_boards", a TFDS name, or the path of
      a .jsonl file, in which {split} stands for the split. `options` are those of the kind of
      source (see OPTIONS). `dir` is the directory of prepared TFDS datasets. If it is empty,
      digit_boards uses $JAXRL_VLM_CACHE or ~/.cache/jaxrl_vlm, and other datasets use the default
      of TFDS.
    split: "train" or "test"; for TFDS, the name of one of the dataset's splits.
    need: "answer", or "target" for supervised stages, which imitate responses and need no answers.
      An example without this field is an error.
    verifiers: Verifiers that the stage's own `rewards` name. An example's `rewards` may name these
      and built-in verifiers, but no other "package.module:function" or "file.py:function": a
      dataset must not choose which code runs. With need="target" examples are not graded, and names
      of functions are not checked.

  Raises:
    UserError: Names the field of the config, or the file, line and field.
  """
  kind, name, options = check(spec)
  if kind == "jsonl":
    path = name.replace("{split}", split)
    return JsonLines(path, need=need, verifiers=verifiers, **options)
  data_dir = str(spec.get("dir") or "") or None
  if kind == "tfds":
    make = functools.partial(_open_tfds, name, data_dir)
    return TfdsSource(name, make, split, need=need, verifiers=verifiers, **options)
  if split not in digit_boards.SPLITS:
    raise UserError(f"split {split!r} of digit_boards: {hint(split, digit_boards.SPLITS)}")
  with validation("data.options."):
    if options.pop("live", False):
      size = options.get(split, 1_000_000)
      board_options = {
        key: value for key, value in options.items() if key not in ("live", *digit_boards.SPLITS)
      }
      return digit_boards.LiveBoards(split, size, **board_options)
    digit_boards.check_settings(**options)
  cache = data_dir or os.environ.get("JAXRL_VLM_CACHE") or "~/.cache/jaxrl_vlm"
  make = functools.partial(digit_boards.builder, cache, **options)
  return TfdsSource(name, make, split, need=need)


def check(spec: Mapping[str, Any] | ConfigDict) -> tuple[str, str, dict[str, Any]]:
  """Checks the name and the options of a dataset without opening it.

  Returns:
    The kind ("digit_boards", "jsonl" or "tfds"), the name and the options of `spec`.

  Raises:
    UserError: The name is missing or of no known kind, or the kind has no such option.
  """
  name, options = str(spec.get("name") or ""), _plain(spec.get("options") or {})
  if not name:
    raise UserError(f"data.name='': {_KINDS}")
  if name == "digit_boards":
    kind = "digit_boards"
  elif name.endswith((".jsonl", ".json")):
    kind = "jsonl"
  elif _TFDS_NAME.fullmatch(name) and not name.lower().endswith(_OTHER_FILES):
    kind = "tfds"
  else:
    convert = "; convert the file to JSON lines, one object per line"
    suffix = pathlib.PurePath(name).suffix.lower()
    raise UserError(f"data.name={name!r}: {_KINDS}{convert if suffix in _OTHER_FILES else ''}")
  for option in options:
    if option not in OPTIONS[kind]:
      raise UserError(
        f"data.options.{option}: no such option of {name}; {hint(option, OPTIONS[kind])}"
      )
  return kind, name, options


def _plain(options: Any) -> dict[str, Any]:
  """Returns a ConfigDict, including nested ones, as a dict. Copies another mapping."""
  return options.to_dict() if isinstance(options, ConfigDict) else dict(options)


# ------------------------------------------------------------------------------------------------
# Checks that all datasets share
# ------------------------------------------------------------------------------------------------


def _check_text(value: Any, where: str) -> None:
  """Raises UserError if a string in `value` contains a lone surrogate."""
  if isinstance(value, str):
    with validation():
      check_unicode(value, where)
  elif isinstance(value, Mapping):
    for key, item in value.items():
      _check_text(key, where)
      _check_text(item, where)
  elif isinstance(value, list):
    for item in value:
      _check_text(item, where)


def _check_marks(question: str, images: int, where: str) -> None:
  """Raises UserError if a question has image marks, but not one for each image."""
  marks = question.count(IMAGE_MARK)
  if marks and marks != images:
    raise UserError(
      f"{where}field 'question': {marks} {IMAGE_MARK} marks, but the example has {images} images; "
      "expected one mark per image, or no marks to put all images first"
    )


def _check_rewards(weights: Any, verifiers: Collection[str] | None, where: str) -> None:
  """Raises UserError unless an example's `rewards` can grade a response.

  Imports nothing that the dataset names.

  Args:
    weights: Value of the field.
    verifiers: Functions that the example may name. None if the example is not graded.
    where: Start of error messages.
  """
  where += "field 'rewards': "
  if not isinstance(weights, Mapping) or not weights:
    raise UserError(f'{where}expected {{"name": weight, ...}}, got {_shown(weights)}')
  keys: dict[str, str] = {}
  for key, weight in weights.items():
    if ":" not in key:
      try:
        verifiers_lib.resolve(key)
      except ValueError as error:
        raise UserError(where + str(error).removeprefix("rewards: ")) from error
    elif verifiers is not None and key not in verifiers:
      raise UserError(
        f"{where}{key!r} is neither built in nor among the stage's own rewards; "
        "name it there (with weight 0.0 if other examples do not need it)"
      )
    if not isinstance(weight, int | float) or not verifiers_lib.fits_float32(weight):
      raise UserError(f"{where}{key!r}: expected a finite number, the weight; got {_shown(weight)}")
    name = key.rpartition(":")[2]  # the name of the verifier's metric
    if name == "total" or name in keys:
      other = repr(keys[name]) if name in keys else "the weighted sum"
      raise UserError(f"{where}{key!r}: its metric name {name!r} is that of {other}")
    keys[name] = key


def _with_absolute_paths(verifiers: Collection[str]) -> frozenset[str]:
  """Returns verifiers, and those in files also with the absolute path of the file."""
  absolute = set()
  for key in verifiers:
    path, _, function = key.rpartition(":")
    if path.endswith(".py"):
      absolute.add(f"{os.path.abspath(os.path.expanduser(path))}:{function}")
  return frozenset(verifiers) | absolute


def _shown(value: Any) -> str:
  """Returns the beginning of a value as JSON, for an error message."""
  return json.dumps(value, default=str)[:60]


# ------------------------------------------------------------------------------------------------
# TFDS
# ------------------------------------------------------------------------------------------------


def _open_tfds(name: str, data_dir: str | None) -> Any:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    known = [*tfds.list_builders(with_community_datasets=False), "digit_boards"]
    base = re.split("[/:]", name)[0]
    near = difflib.get_close_matches(base, known, n=2)
    raise UserError(
      f"data.name={name!r}: neither a .jsonl file nor a TFDS dataset; "
      + (hint(base, near) if near else _KINDS)
    ) from error
  except (ValueError, AssertionError) as error:  # a config or a version that does not exist
    raise UserError(f"data.name={name!r}: TFDS: {one_line(str(error))[:300]}") from error
  builder.download_and_prepare(file_format="array_record")
  return builder


def _encode_image(value: Any) -> bytes:
  """Returns an image of TFDS as an encoded file.

  Args:
    value: Bytes of an encoded file, or u8, u16 or f32 [H, W, C].

  Raises:
    ValueError: The array is not an image.
  """
  from PIL import Image

  if isinstance(value, bytes):
    return value
  value = np.asarray(value)
  if value.ndim == 3 and value.shape[-1] == 1:
    value = value[..., 0]
  elif value.ndim == 3 and value.dtype == np.uint16:  # Pillow has no colours of 16 bits
    value = np.rint(value / 257).astype(np.uint8)
  buffer = io.BytesIO()
  try:
    # A TIFF file keeps floats, which `decode_image` scales.
    Image.fromarray(value).save(buffer, "tiff" if value.dtype.kind == "f" else "png")
  except (TypeError, KeyError, OSError, ValueError) as error:
    raise ValueError(
      f"expected an image, u8[H, W, 3], got {value.dtype}{list(value.shape)}"
    ) from error
  return buffer.getvalue()


class TfdsSource:
  """A split of a prepared TFDS dataset that can be read without TensorFlow.

  Opening checks the names of features and splits, but no records. A record is checked when it is
  read, because its text is stored together with its images: a check of all text would read the
  whole dataset.

  Args:
    name: Name of the dataset, for error messages and ids.
    make: Returns the builder. Every worker process calls it again.
    split: Split as TFDS writes it, for example "train[:90%]".
    fields: Maps a field of Example to a feature of the dataset. `images` may be one image or a
      sequence of images. By default a field has the feature of the same name, and `images` may be
      called `image`.
    need: "answer" or "target", as in `open_source`.
    verifiers: As in `open_source`.

  Raises:
    UserError: The dataset has no such split or feature. Reading an example raises UserError that
      names the split, the index and the field if the example has no text where it needs one, lone
      surrogates, marks that do not fit its images, or `rewards` that cannot grade it.
  """

  def __init__(
    self,
    name: str,
    make: Callable[[], Any],
    split: str,
    fields: Mapping[str, str] | None = None,
    need: str = "answer",
    verifiers: Collection[str] = (),
  ):
    self._name, self._make, self._split, self._need = name, make, split, need
    self._verifiers = _with_absolute_paths(verifiers) if need == "answer" else None
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
          f"data.options.fields.{field}: {name} has no feature of this name; set it to one of its "
          f"features: {', '.join(sorted(features))}"
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
    feature = builder.info.features[images] if images else None
    # TFDS can leave a single image encoded, but not a sequence of images. It stores the bytes of
    # floats as the channels of a PNG file, which only TFDS decodes.
    encoded = isinstance(feature, tfds.features.Image) and feature.np_dtype != np.float32
    decoders: Any = {images: tfds.decode.SkipDecoding()} if encoded else None
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
    where = f"{self._name}/{self._split} example {index}: "
    values: dict[str, Any] = {"id": f"{self._name}/{self._split}/{index}", "answer": ""}
    for field, feature in self._fields.items():
      try:
        values[field] = self._value(field, record[feature])
      except ValueError as error:
        raise UserError(f"{where}field {field!r}: {one_line(str(error))}") from error
      if field != "images":
        _check_text(values[field], f"{where}field {field!r}")
    for field in ("question", self._need):
      if not values[field].strip():
        raise UserError(f"{where}{field} is empty")
    _check_marks(values["question"], len(values.get("images", ())), where)
    if values.get("rewards") is not None:
      _check_rewards(values["rewards"], self._verifiers, where)
    values["target"] = values.get("target") or None
    origin = f"{self._name}/{self._split}/{index}"
    return Example(**values, origin="" if origin == values["id"] else origin)

  def _value(self, field: str, value: Any) -> Any:
    """Returns the value of Example's `field` for a feature's value; may raise ValueError."""
    if field == "images":
      single = isinstance(value, bytes) or getattr(value, "ndim", 0) == 3
      return tuple(_encode_image(image) for image in ([value] if single else value))
    if field in self._labels:
      if value < 0:  # TFDS's value for an example without a label
        raise ValueError(f"expected a class label, got {value}")
      return self._labels[field][int(value)]
    if isinstance(value, bytes):
      value = value.decode()
    if field in ("rewards", "meta"):
      if isinstance(value, str):
        value = json.loads(value or "null")
      if value is None:
        return None if field == "rewards" else {}
      if not isinstance(value, Mapping):
        raise ValueError(f"expected an object {{...}}, got {_shown(value)}")
      return {k: v.item() if isinstance(v, np.generic) else v for k, v in value.items()}
    if np.ndim(value) or isinstance(value, Mapping):
      raise ValueError(f"expected text or a number, got {one_line(str(value))[:60]}")
    if isinstance(value, float | np.floating) and not np.isfinite(value):
      raise ValueError(f"expected text or a finite number, got {value}")
    return str(value)


# ------------------------------------------------------------------------------------------------
# JSON lines
# ------------------------------------------------------------------------------------------------


class JsonLines:
  """A file with one JSON object per line. The README describes the fields of the objects.

  Opening reads the file once, checks every line and remembers where it starts. The text and the
  images are read again when an example is read.

  A number in a text field such as `answer` becomes text with the digits that the file has: 1.50
  stays "1.50", and 1e20 stays "1e20". Numbers in `meta` stay numbers.

  Args:
    path: The file. Paths of images are relative to its directory.
    allow_outside: Whether images may be outside that directory, through absolute paths, `..` or
      links.
    need: "answer" or "target", as in `open_source`.
    verifiers: As in `open_source`.

  Raises:
    UserError: Names the file, the line and the field.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    allow_outside: bool = False,
    need: str = "answer",
    verifiers: Collection[str] = (),
  ):
    self._path = pathlib.Path(path)
    self._root = self._path.resolve().parent
    self._allow_outside, self._need = allow_outside, need
    self._verifiers = _with_absolute_paths(verifiers) if need == "answer" else None
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
                f"{self._path}:{number}: field 'id': {example.id!r} is also the id of "
                f"line {seen[example.id]}"
              )
            seen[example.id] = number
            self._starts.append(start)
            self._lines.append(number)
          start += len(line)
    except OSError as error:
      raise UserError(f"{self._path}: {error.strerror}") from error
    if not self._lines:
      raise UserError(f"{self._path}: no examples; expected one JSON object per line")
    self._starts.append(start)

  def __getstate__(self):
    return self.__dict__ | {"_file": None}

  def __len__(self) -> int:
    return len(self._lines)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(index)
    start, stop = self._starts[index], self._starts[index + 1]
    try:
      if self._file is None:
        self._file = os.open(self._path, os.O_RDONLY)
      # pread does not move the file's position, which other threads share.
      line = os.pread(self._file, stop - start, start)
    except OSError as error:
      raise UserError(f"{self._path}: {error.strerror}") from error
    example, paths = self._parse(line, self._lines[index])
    try:
      return example.replace(images=tuple(path.read_bytes() for path in paths))
    except OSError as error:
      raise UserError(f"{example.origin}: {error.filename}: {error.strerror}") from error

  def _parse(self, line: bytes, number: int) -> tuple[Example, list[pathlib.Path]]:
    """Returns the example of a line, without its images, and the paths of its images."""
    origin = f"{self._path}:{number}"
    where = f"{origin}: "
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      is_array = number == 1 and line.lstrip().startswith(b"[")
      advice = "; convert the array to JSON lines, one object per line" if is_array else ""
      raise UserError(f"{where}not JSON: {one_line(str(error))}{advice}") from error
    if not isinstance(record, dict):
      raise UserError(f"{where}expected an object {{...}}, got {type(record).__name__}")
    for field, value in record.items():
      if field not in _FIELDS:
        raise UserError(
          f"{where}field {field!r}: no such field; {hint(field, _FIELDS)} "
          "(put other facts into 'meta')"
        )
      _check_text(value, f"{where}field {field!r}")

    def text(field: str, needed: bool) -> str:
      value = record.get(field)
      if isinstance(value, int | float) and not isinstance(value, bool):
        value = _digits(line, field)
        if value.removeprefix("-") in ("NaN", "Infinity"):
          raise UserError(f"{where}field {field!r}: expected text or a finite number, got {value}")
      if value is None or isinstance(value, str) and not value.strip():
        if needed:
          raise UserError(f"{where}field {field!r} is {'missing' if value is None else 'empty'}")
        return ""
      if not isinstance(value, str):
        raise UserError(f"{where}field {field!r}: expected text, got {_shown(value)}")
      return value

    weights, meta = record.get("rewards"), record.get("meta") or {}
    if weights is not None:
      _check_rewards(weights, self._verifiers, where)
    if not isinstance(meta, dict):
      raise UserError(f"{where}field 'meta': expected an object {{...}}, got {_shown(meta)}")
    example = Example(
      id=text("id", False) or f"{self._path.name}:{number}",
      question=text("question", True),
      answer=text("answer", self._need == "answer"),
      target=text("target", self._need == "target") or None,
      rewards=weights,
      meta=meta,
      origin=origin,
    )
    paths = self._images(record, where)
    _check_marks(example.question, len(paths), where)
    return example, paths

  def _images(self, record: Mapping[str, Any], where: str) -> list[pathlib.Path]:
    """Returns the paths of an example's images."""
    if "image" in record and "images" in record:
      raise UserError(f"{where}fields 'image' and 'images': expected only one of them")
    field = "image" if "image" in record else "images"
    names = record.get(field) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise UserError(f"{where}field {field!r}: expected paths, got {_shown(names)}")
    paths = []
    for name in names:
      try:
        path = (self._root / name).resolve()
        is_file = path.is_file()
      except (OSError, ValueError) as error:  # too long, or with a null character
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"{where}field {field!r}: {_shown(name)}: {problem}") from error
      if not self._allow_outside and not path.is_relative_to(self._root):
        raise UserError(
          f"{where}field {field!r}: {name} is outside {self._root}; "
          "set data.options.allow_outside=True to permit it"
        )
      if not is_file:
        raise UserError(f"{where}field {field!r}: no such file: {name}")
      paths.append(path)
    return paths


def _digits(line: bytes, field: str) -> str:
  """Returns a number in a JSON object as the file writes it."""
  return json.loads(line, parse_float=str, parse_int=str, parse_constant=str)[field]

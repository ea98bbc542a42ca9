"""Command lines and configs: `--config=FILE --config.FIELD=VALUE --workdir=DIRECTORY`.

A config file is a Python file with `get_config() -> ml_collections.ConfigDict`. Overrides have the
syntax of ml_collections (`config.stages[1].objective.name`) but are implemented here, because the
flags of ml_collections cannot override None, cannot add fields to open mappings, and report a typo
with a traceback.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from jaxrl_vlm.errors import UserError, WorkdirError, hint, one_line

# Mappings to which an override may add keys. The object that such a mapping configures knows the
# valid keys and checks them when it is created.
OPEN_MAPPINGS = ("objective", "rewards", "options", "scratch")

CONFIG_FILE = "config.json"
_ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag of an entry point, `--name=VALUE`. With `default` None, the flag is required."""

  name: str
  help: str
  example: str
  default: str | None = None


CONFIG = Flag("config", "Python file with get_config()", "configs/quickstart.py")
WORKDIR = Flag("workdir", "directory for all files of the run", "runs/quickstart")


def run_cli(
  main: Callable[[types.SimpleNamespace], Any],
  program: str,
  about: str,
  flags: Sequence[Flag] = (CONFIG, WORKDIR),
) -> None:
  """Parses sys.argv and calls `main(args)`.

  A UserError is printed as one line on stderr, and the process exits with code 2. Other exceptions
  keep their traceback. Code that checks user input and raises ValueError should run inside
  `errors.validation()`, which converts it.

  Args:
    main: receives the result of `load`.
    program: module after `python -m`, such as "jaxrl_vlm.train".
    about: description of the program, with which the help text begins.
    flags: flags of the program.
  """
  if {"-h", "--help"} & set(sys.argv[1:]):
    print(help_text(program, about, flags))
    return
  try:
    args = load(sys.argv[1:], program, flags)
    # grain and orbax read absl flags and fail if these are not parsed. All of them have defaults.
    if not absl_flags.FLAGS.is_parsed():
      absl_flags.FLAGS(sys.argv[:1])
    main(args)
  except UserError as error:
    print(one_line(str(error)), file=sys.stderr)
    sys.exit(2)


def load(
  argv: Sequence[str],
  program: str = "jaxrl_vlm.train",
  flags: Sequence[Flag] = (CONFIG, WORKDIR),
) -> types.SimpleNamespace:
  """Parses command-line flags.

  `--name=value` and `--name value` are equivalent. `--config.field` without a value sets a bool to
  True.

  Args:
    argv: the command line without the program.
    program: module after `python -m`, for the example in error messages.
    flags: flags of the program.

  Returns:
    The values of the flags by name. `config` is the ConfigDict of the file with all overrides
    applied.

  Raises:
    UserError: one line that names the flag or field, its value, and the nearest valid names.
  """
  known = {flag.name: flag for flag in flags}
  values: dict[str, Any] = {}
  overrides: list[tuple[str, str | None]] = []
  for name, value in _split(argv):
    if "config" in known and re.match(r"config[.\[]", name):
      overrides.append((name, value))
    elif name not in known:
      fields = "; config fields are written --config.FIELD=VALUE" if "config" in known else ""
      raise UserError(f"--{name}: no such flag; {hint(name, known)}{fields}")
    elif not value:
      raise UserError(f"--{name}: no value given; example: --{name}={known[name].example}")
    else:
      values[name] = value
  for flag in flags:
    if flag.name not in values and flag.default is None:
      example = _example(program, flags)
      raise UserError(f"--{flag.name} is missing ({flag.help}); example: {example}")
    values.setdefault(flag.name, flag.default)
  if "config" in values:
    values["config"] = load_config_file(values["config"])
    for path, text in overrides:
      override(values["config"], path, text)
  return types.SimpleNamespace(**values)


def _split(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
  """Yields pairs of flag name (without dashes) and value, which is None if no value follows."""
  position = 0
  while position < len(argv):
    word = argv[position]
    position += 1
    if not word.startswith("-") or not word.strip("-"):
      raise UserError(f"{word!r}: flags look like --name=value; see --help")
    name, equals, value = word.lstrip("-").partition("=")
    if equals:
      yield name, value
    elif position < len(argv) and not argv[position].startswith("--"):
      yield name, argv[position]
      position += 1
    else:
      yield name, None


def _example(program: str, flags: Sequence[Flag]) -> str:
  needed = [f"--{flag.name}={flag.example}" for flag in flags if flag.default is None]
  return " ".join([f"python -m {program}", *needed])


def help_text(program: str, about: str, flags: Sequence[Flag] = (CONFIG, WORKDIR)) -> str:
  """Returns the text of `--help`."""
  example = _example(program, flags)
  width = max(len(flag.name) for flag in flags) + 10
  lines = [about.strip(), "", "Flags:"]
  for flag in flags:
    default = f" (default: {flag.default})" if flag.default else ""
    lines.append(f"  {'--' + flag.name + '=VALUE':<{width}} {flag.help}{default}")
  lines += ["", "Example:", f"  {example}"]
  if any(flag.name == "config" for flag in flags):
    lines += [
      "",
      "Flags can set any field of the config. configs/base.py documents all fields:",
      f"  {example} --config.seed=3",
      f"  {example} '--config.stages[0].objective.name=vppo'",
      f"  {example} '--config.stages[0].objective.clip_high=0.3'",
      "Quotes prevent some shells from expanding the brackets. Write None, numbers, True, False",
      "and tuples as in Python.",
    ]
  return "\n".join(lines)


def load_config_file(path: str) -> ConfigDict:
  """Returns the result of `get_config()` of a Python file.

  The file may import files of its directory (`import base` or `from configs import base`).

  Raises:
    UserError: the file is missing, cannot be imported, or has no `get_config` that returns a
      ConfigDict.
  """
  flag = f"--config={path}"
  file = pathlib.Path(path)
  if not file.is_file():
    siblings = [str(sibling) for sibling in sorted(file.parent.glob("*.py"))]
    raise UserError(f"{flag}: no such file" + (f"; {hint(path, siblings)}" if siblings else ""))
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  if spec is None or spec.loader is None:
    raise UserError(f"{flag}: not a Python file (its name must end in .py)")
  module = importlib.util.module_from_spec(spec)
  folder = file.resolve().parent
  with _import_path(str(folder.parent), str(folder)):
    with _one_line_failure(f"{flag}: does not import"):
      spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
      raise UserError(f"{flag}: has no function get_config() that returns a ConfigDict")
    with _one_line_failure(f"{flag}: get_config() fails"):
      config = module.get_config()
  if not isinstance(config, ConfigDict):
    kind = type(config).__name__
    raise UserError(f"{flag}: get_config() returned a {kind}, expected a ConfigDict")
  _convert_dicts(config)
  return config


def _convert_dicts(value: Any) -> Any:
  """Converts dicts inside tuples and lists to ConfigDicts, which ml_collections does not do."""
  if isinstance(value, ConfigDict):
    for key in value:
      item = value[key]
      converted = _convert_dicts(item)
      if converted is not item:
        with value.unlocked(), value.ignore_type():
          value[key] = converted
  elif isinstance(value, dict):
    return _convert_dicts(ConfigDict(value, allow_dotted_keys=True))
  elif isinstance(value, (tuple, list)):
    items = [_convert_dicts(item) for item in value]
    if any(new is not old for new, old in zip(items, value, strict=True)):
      return type(value)(items)
  return value


@contextlib.contextmanager
def _import_path(*folders: str) -> Iterator[None]:
  """Temporarily appends `folders` to the import path. Other modules take precedence."""
  sys.path.extend(folders)
  try:
    yield
  finally:
    for folder in folders:
      # Delete the last occurrence, because the folder may have been on the path before.
      del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


@contextlib.contextmanager
def _one_line_failure(what: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    if isinstance(error, SyntaxError):  # the traceback has no frame in the config file
      place = f"{error.filename}:{error.lineno}"
    else:
      frame = traceback.extract_tb(error.__traceback__)[-1]
      place = f"{frame.filename}:{frame.lineno}"
    text = f"{what}: {type(error).__name__}: {one_line(str(error))} ({place})"
    raise UserError(text) from error


def override(config: ConfigDict, path: str, text: str | None) -> None:
  """Sets one field of `config` in place, e.g. `override(c, "config.stages[0].steps", "10")`.

  The type of the current value determines how `text` is read. A field that is None accepts any
  Python literal. Only mappings in `OPEN_MAPPINGS` accept new fields.

  Args:
    config: the config to change.
    path: the field, such as "config.stages[0].steps".
    text: the value, as in Python; strings need no quotes. None sets a bool to True.

  Raises:
    UserError: the field or index does not exist, or the value has the wrong type.
  """
  if not re.fullmatch(r"config(\.\w+|\[-?\d+\])+", path):
    raise UserError(f"--{path}: fields look like config.field or config.stages[1].field")
  keys: list[str | int] = []
  for name, index in re.findall(r"\.(\w+)|\[(-?\d+)\]", path):
    keys.append(name or int(index))
  _assign(config, keys, text, "config", is_open=False)


def _assign(holder: Any, keys: list[str | int], text: str | None, path: str, is_open: bool) -> Any:
  """Sets the field at `keys` and returns `holder`: a ConfigDict changed in place, a new tuple."""
  key, rest = keys[0], keys[1:]
  field = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}"
  new = False
  if isinstance(key, int):
    if not isinstance(holder, (tuple, list)):
      raise UserError(f"{field}: {path} is not a list, so it has no [{key}]")
    if not -len(holder) <= key < len(holder):
      valid = f"valid: 0 to {len(holder) - 1}" if holder else "it is empty"
      raise UserError(f"{field}: index out of range; {valid}")
  elif not isinstance(holder, ConfigDict):
    what = f"a list: write {path}[0].{key}" if isinstance(holder, (tuple, list)) else repr(holder)
    raise UserError(f"{field}: no such field; {path} is {what}")
  elif key not in holder:
    if not (is_open and not rest):
      raise UserError(f"{field}: no such field; {hint(key, holder.keys())}")
    new = True
  current = None if new else holder[key]  # type: ignore[index]  # checked above
  is_open = is_open or key in OPEN_MAPPINGS
  if rest:
    inner = ConfigDict() if current is None and is_open else current
    value = _assign(inner, rest, text, field, is_open)
  else:
    value = _convert(text, current, field, is_open)
  if isinstance(holder, ConfigDict):
    if value is not current or new:
      # `_convert` has checked the type, so ConfigDict's own check is not needed.
      with holder.unlocked(), holder.ignore_type():
        holder[key] = value
    return holder
  items = list(holder)
  items[key] = value  # type: ignore[index]
  return type(holder)(items)


def _convert(text: str | None, current: Any, path: str, is_open: bool) -> Any:
  """Converts `text` to a value of the type of `current`."""
  if text is None:
    if isinstance(current, bool):
      return True
    raise UserError(f"{path}: no value given; write --{path}=VALUE")
  if isinstance(current, str):
    return text
  value = _literal({"true": "True", "false": "False"}.get(text, text))
  if isinstance(current, ConfigDict):
    if is_open and isinstance(value, dict) and all(isinstance(key, str) for key in value):
      return _from_plain(value)
    expected = "a dict such as {'math': 1.0}" if is_open else "a field of it"
    raise UserError(
      f"{path}={text!r}: expected {expected}; fields: {', '.join(sorted(current.keys()))}"
    )
  try:
    return _cast(value, current)
  except TypeError as error:
    raise UserError(f"{path}={text!r}: expected {error}") from None


def _literal(text: str) -> Any:
  """Parses `text` as a Python literal. Returns `text` itself if it is not a literal."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text


def _cast(value: Any, like: Any) -> Any:
  """Converts `value` to the type of `like`.

  Raises:
    TypeError: `value` is of another type; the message is the expected type.
  """
  if like is None:
    return tuple(value) if isinstance(value, list) else value
  if isinstance(like, bool):
    if isinstance(value, bool) or value in (0, 1):
      return bool(value)
    raise TypeError("bool (True or False)")
  if isinstance(like, int):
    if isinstance(value, int) and not isinstance(value, bool):
      return value
    raise TypeError("int")
  if isinstance(like, float):
    if value == "inf":
      return float("inf")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(value)
    raise TypeError("float")
  if isinstance(like, (tuple, list)):
    if any(isinstance(item, ConfigDict) for item in like):
      raise TypeError("one field of one item, e.g. [0].name")
    if not isinstance(value, (tuple, list)):
      raise TypeError("tuple, e.g. (1, 2)")
    # New items are checked only if all current items have the same type.
    shared = like[0] if len({type(item) for item in like}) == 1 else None
    try:
      return type(like)(_cast(item, shared) for item in value)
    except TypeError as error:
      raise TypeError(f"tuple of {error}") from None
  if isinstance(value, type(like)):
    return value
  raise TypeError(type(like).__name__)


def to_json(config: ConfigDict) -> str:
  """Returns the config as JSON with sorted keys and indentation. Tuples become lists.

  Raises:
    UserError: JSON cannot represent a value (a function, an array); the message names its field.
  """
  return json.dumps(_plain(config, "config"), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
  """Returns the config that `to_json` wrote. Lists become tuples.

  Raises:
    ValueError: `text` is not a JSON object.
  """
  values = json.loads(text)
  if not isinstance(values, dict):
    raise ValueError(f"expected a JSON object, got {type(values).__name__}")
  return _from_plain(values)


def _plain(value: Any, path: str) -> Any:
  if isinstance(value, (ConfigDict, dict)):
    return {str(key): _plain(item, f"{path}.{key}") for key, item in value.items()}
  if isinstance(value, (tuple, list)):
    return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise UserError(f"{path}={value!r}: expected a number, string, bool, None, tuple or ConfigDict")


def _from_plain(value: Any) -> Any:
  if isinstance(value, dict):
    # Keys may contain dots, as the verifier "package.module:function".
    return ConfigDict(
      {key: _from_plain(item) for key, item in value.items()}, allow_dotted_keys=True
    )
  if isinstance(value, list):
    return tuple(_from_plain(item) for item in value)
  return value


def diff(old: ConfigDict, new: ConfigDict) -> list[str]:
  """Returns the differences as lines `config.stages[1].steps: 10 -> 20`, sorted by field."""
  before, after = _leaves(old), _leaves(new)
  lines = []
  for path in sorted(before.keys() | after.keys()):
    a, b = before.get(path, _ABSENT), after.get(path, _ABSENT)
    if a != b:
      lines.append(f"{path}: {a} -> {b}")
  return lines


def _leaves(config: ConfigDict) -> dict[str, str]:
  """Returns all fields that contain no other fields, with their values as written in Python."""
  leaves = {}

  def walk(value: Any, path: str):
    if isinstance(value, dict) and value:
      for key, item in value.items():
        walk(item, f"{path}.{key}")
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
      for index, item in enumerate(value):
        walk(item, f"{path}[{index}]")
    else:
      leaves[path] = repr(tuple(value) if isinstance(value, list) else value)

  walk(_plain(config, "config"), "config")
  return leaves


def check_workdir(
  workdir: str | os.PathLike, config: ConfigDict, may_change: Sequence[str] = ()
) -> None:
  """Writes config.json to the workdir of a run, or compares `config` with the file that exists.

  If the config is the same, the existing run can be resumed. All processes of a run may call this
  function, in any order.

  Args:
    workdir: created if it does not exist.
    config: the config with all overrides applied.
    may_change: fields that a resumed run may change, including all fields below them.
      `config.stages[].steps` means this field of all stages.

  Raises:
    WorkdirError: the workdir contains a run with another config; the message lists the fields.
    UserError: the workdir cannot be written.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  text = to_json(config)
  try:
    if path.exists():
      _check_same(path, config, may_change)
      if path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
  except OSError as error:
    raise UserError(f"--workdir={workdir}: cannot write {path}: {error.strerror}") from error


def _check_same(path: pathlib.Path, config: ConfigDict, may_change: Sequence[str]) -> None:
  try:
    old = from_json(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise WorkdirError(
      f"{path}: not a config ({one_line(str(error))}); choose another --workdir"
    ) from error
  free = [re.escape(field).replace(r"\[\]", r"\[\d+\]") + r"[.\[:]" for field in may_change]
  lines = [line for line in diff(old, config) if not any(re.match(one, line) for one in free)]
  if lines:
    shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
    raise WorkdirError(
      f"--workdir={path.parent}: holds a run with another config ({shown}); choose another"
      " --workdir for a new run, or set these fields back to resume that one"
    )


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a text file atomically: it is written completely or, after a kill, not at all.

  Raises:
    OSError: the directory does not exist, is not writable, or is full; `path` is unchanged.
  """
  # The temporary name is unique, because several hosts may write the same file at the same time.
  descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
  try:
    with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # mkstemp creates files that only the owner can read
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise

"""Command lines and configs: `--config=FILE --config.FIELD=VALUE --workdir=DIRECTORY`.

A config file is Python with `get_config() -> ml_collections.ConfigDict`. Overrides follow
ml_collections' syntax (`config.stages[1].objective.name`), but are applied here: its own flags do
not override None, do not add fields to open mappings, and report a typo as a traceback.
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

# Mappings whose keys are not all listed in the config: what they configure has its own list, and
# checks them against it when it is made.
OPEN_MAPPINGS = ("objective", "rewards", "options", "scratch")

CONFIG_FILE = "config.json"
_ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag of an entry point, `--name=VALUE`; `default` None means that it must be given."""

  name: str
  help: str
  example: str
  default: str | None = None


CONFIG = Flag("config", "Python file with get_config()", "configs/quickstart.py")
WORKDIR = Flag("workdir", "directory for everything the run writes", "runs/quickstart")


def run_cli(
  main: Callable[[types.SimpleNamespace], Any],
  program: str,
  about: str,
  flags: Sequence[Flag] = (CONFIG, WORKDIR),
) -> None:
  """Parses sys.argv, calls `main(args)`; a UserError becomes one line on stderr and exit code 2.

  Other exceptions keep their traceback. Wrap checks that raise ValueError in
  `errors.validation()`.

  Args:
    main: takes what `load` returns.
    program: module after `python -m`, e.g. "jaxrl_vlm.train".
    about: what it does; the start of the help text.
    flags: see `load`.
  """
  if {"-h", "--help"} & set(sys.argv[1:]):
    print(help_text(program, about, flags))
    return
  try:
    args = load(sys.argv[1:], program, flags)
    # Libraries (grain, orbax) read absl flags, which must count as parsed: all have defaults.
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
  """Flags by name; `config` is the ConfigDict with every override applied.

  `--name=value` and `--name value` are the same; `--config.field` alone sets a bool to True.

  Raises:
    UserError: one line naming the flag or field, its value, and the nearest valid names.
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
  """Pairs of flag name (without dashes) and value, None where no value follows."""
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
  """The text of `--help`."""
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
      "Any field of the config can be set; configs/base.py documents them all:",
      f"  {example} --config.seed=3",
      f"  {example} '--config.stages[0].objective.name=vppo'",
      f"  {example} '--config.stages[0].objective.clip_high=0.3'",
      "Quotes keep some shells from expanding the brackets. None, numbers, True and False and",
      "tuples are written as in Python.",
    ]
  return "\n".join(lines)


def load_config_file(path: str) -> ConfigDict:
  """`get_config()` of a Python file, which may import its neighbours (`from configs import base`).

  Raises:
    UserError: the file is missing, does not import, or has no get_config that returns a ConfigDict.
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
  """`value` with dicts in tuples and lists as ConfigDicts too, where ml_collections keeps them."""
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
  """Makes modules in `folders` importable, after everything that already is."""
  sys.path.extend(folders)
  try:
    yield
  finally:
    for folder in folders:
      # From the end: the folder may also have been there before.
      del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


@contextlib.contextmanager
def _one_line_failure(what: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    if isinstance(error, SyntaxError):  # raised by the compiler: the frame is not in the file
      place = f"{error.filename}:{error.lineno}"
    else:
      frame = traceback.extract_tb(error.__traceback__)[-1]
      place = f"{frame.filename}:{frame.lineno}"
    text = f"{what}: {type(error).__name__}: {one_line(str(error))} ({place})"
    raise UserError(text) from error


def override(config: ConfigDict, path: str, text: str | None) -> None:
  """Sets one field of `config` in place, e.g. `override(c, "config.stages[0].steps", "10")`.

  The type of the present value decides how `text` is read. A field that is None accepts any
  literal; under `OPEN_MAPPINGS` a field may be new.

  Raises:
    UserError: no such field or index, or a value of the wrong type.
  """
  if not re.fullmatch(r"config(\.\w+|\[-?\d+\])+", path):
    raise UserError(f"--{path}: fields look like config.field or config.stages[1].field")
  keys: list[str | int] = []
  for name, index in re.findall(r"\.(\w+)|\[(-?\d+)\]", path):
    keys.append(name or int(index))
  _assign(config, keys, text, "config", is_open=False)


def _assign(holder: Any, keys: list[str | int], text: str | None, path: str, is_open: bool) -> Any:
  """`holder` with the field at `keys` set; ConfigDicts change in place, tuples are made anew."""
  key, rest = keys[0], keys[1:]
  here = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}"
  new = False
  if isinstance(key, int):
    if not isinstance(holder, (tuple, list)):
      raise UserError(f"{here}: {path} is not a list, so it has no [{key}]")
    if not -len(holder) <= key < len(holder):
      valid = f"valid: 0 to {len(holder) - 1}" if holder else "it is empty"
      raise UserError(f"{here}: index out of range; {valid}")
  elif not isinstance(holder, ConfigDict):
    what = f"a list: write {path}[0].{key}" if isinstance(holder, (tuple, list)) else repr(holder)
    raise UserError(f"{here}: no such field; {path} is {what}")
  elif key not in holder:
    if not (is_open and not rest):
      raise UserError(f"{here}: no such field; {hint(key, holder.keys())}")
    new = True
  present = None if new else holder[key]  # type: ignore[index]  # as checked above
  is_open = is_open or key in OPEN_MAPPINGS
  if rest:
    group = ConfigDict() if present is None and is_open else present
    value = _assign(group, rest, text, here, is_open)
  else:
    value = _convert(text, present, here, is_open)
  if isinstance(holder, ConfigDict):
    if value is not present or new:
      # Types are checked above; ConfigDict would refuse e.g. a number where a rewards dict was.
      with holder.unlocked(), holder.ignore_type():
        holder[key] = value
    return holder
  items = list(holder)
  items[key] = value  # type: ignore[index]
  return type(holder)(items)


def _convert(text: str | None, current: Any, path: str, is_open: bool) -> Any:
  """`text` as a value of the type of `current`."""
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
  """`text` read as a Python literal, or itself when it is none."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text


def _cast(value: Any, like: Any) -> Any:
  """`value` with the type of `like`; TypeError says which type was expected."""
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
    # Items have a type to check only where all present ones share it.
    shared = like[0] if len({type(item) for item in like}) == 1 else None
    try:
      return type(like)(_cast(item, shared) for item in value)
    except TypeError as error:
      raise TypeError(f"tuple of {error}") from None
  if isinstance(value, type(like)):
    return value
  raise TypeError(type(like).__name__)


def to_json(config: ConfigDict) -> str:
  """The resolved config as sorted, indented JSON; tuples become lists.

  Raises:
    UserError: a value that JSON cannot hold (a function, an array); names its field.
  """
  return json.dumps(_plain(config, "config"), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
  """The config that `to_json` wrote; lists become tuples.

  Raises:
    ValueError: `text` is not a JSON object.
  """
  values = json.loads(text)
  if not isinstance(values, dict):
    raise ValueError(f"expected a JSON object, found {type(values).__name__}")
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
    # Dotted keys: a verifier may be called "package.module:function".
    return ConfigDict(
      {key: _from_plain(item) for key, item in value.items()}, allow_dotted_keys=True
    )
  if isinstance(value, list):
    return tuple(_from_plain(item) for item in value)
  return value


def diff(old: ConfigDict, new: ConfigDict) -> list[str]:
  """The fields that differ, as lines `config.stages[1].steps: 10 -> 20`, sorted by field."""
  before, after = _leaves(old), _leaves(new)
  lines = []
  for path in sorted(before.keys() | after.keys()):
    a, b = before.get(path, _ABSENT), after.get(path, _ABSENT)
    if a != b:
      lines.append(f"{path}: {a} -> {b}")
  return lines


def _leaves(config: ConfigDict) -> dict[str, str]:
  """Every field that holds no further field, and its value as written in Python."""
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
  """Claims `workdir` for `config`: writes config.json, or checks the one that is there.

  The same config passes: that run is resumed. Every host of a run may call it, at any time.

  Args:
    workdir: made if it does not exist.
    config: the resolved config.
    may_change: fields (`config.log`, and all below them; `config.stages[].steps` of all stages)
      that a resumed run may change.

  Raises:
    WorkdirError: the workdir holds a run with another config; lists the fields.
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
  """Writes a text file that readers see whole or not at all, also after a kill.

  Raises:
    OSError: the directory is missing, not writable, or full; `path` is as it was.
  """
  # A name of its own: several hosts may write the same file at once.
  descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
  try:
    with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from the rest of the group
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise

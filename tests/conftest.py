"""Configures JAX before its first use: the CPU, eight virtual devices and quick compilation."""

import os
import pathlib

import jax
import pytest

from tests import compile_once, tiny_run
from tests.ordinary import ORDINARY

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = tiny_run.xla_flags(8)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# All test processes and the runs that they start share a compilation cache on disk. As in a run,
# programs of several CPU devices are not cached there (`parallel.cache_compilations`).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxrl_vlm/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
  jax.config.update(name.lower(), os.environ[name])
jax.config.update(
  "jax_persistent_cache_min_compile_time_secs",
  float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)
jax.config.update("jax_enable_compilation_cache", False)
compile_once.install()


@pytest.fixture
def one_device():
  """Runs in this process use one of its virtual devices."""
  with tiny_run.one_device():
    yield


@pytest.fixture(autouse=True)
def few_compiled_programs():
  """Frees compiled programs before the process runs out of memory maps.

  Linux gives a process 65,530 memory maps. Large compiled programs take thousands of them, and XLA
  aborts if there are no more.
  """
  before = compile_once.count()
  yield
  if compile_once.count() == before:  # reading the maps of a large process is slow
    return
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
    compile_once.clear()
    jax.clear_caches()


def _mark_exhaustive(items, check_ids: bool) -> None:
  """Puts the marker `exhaustive` on all cases that `tests/ordinary.py` does not list.

  Args:
    items: the collected tests.
    check_ids: raise an error if `tests/ordinary.py` lists ids that were not collected.
  """
  cases: dict[str, set[str]] = {name: set() for name in ORDINARY}
  files = set()
  for item in items:
    file = item.path.relative_to(pathlib.Path(__file__).parent).as_posix()
    files.add(file)
    name = f"{file}::{getattr(item, 'originalname', item.name)}"
    if name not in ORDINARY:
      continue
    case = item.callspec.id if hasattr(item, "callspec") else ""
    cases[name].add(case)
    if case not in ORDINARY[name]:
      item.add_marker(pytest.mark.exhaustive)
  for name, ids in ORDINARY.items() if check_ids else ():
    if name.partition("::")[0] in files and (not cases[name] or set(ids) - cases[name]):
      raise pytest.UsageError(
        f"tests/ordinary.py: {name!r}: expected ids of its cases {sorted(cases[name])}, got {ids}"
      )


def pytest_collection_modifyitems(config, items):
  named = [argument.partition("::") for argument in config.args if "::" in argument]
  _mark_exhaustive(items, check_ids=not named)

  def is_named(item) -> bool:
    """Whether the command line names the test, as `file.py::test` or `file.py::test[case]`."""
    test = item.nodeid.partition("::")[2]
    return any(
      item.path.name == pathlib.Path(file).name and (test == name or test.startswith(f"{name}["))
      for file, _, name in named
    )

  if "exhaustive" not in config.option.markexpr:
    left_out = [i for i in items if i.get_closest_marker("exhaustive") and not is_named(i)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
  # Files with slow tests come first. If several processes share the files, none of these files is
  # started last.
  slow = dict.fromkeys((item.path for item in items), 0)
  for item in items:
    slow[item.path] += item.get_closest_marker("slow") is not None
  items.sort(key=lambda item: -slow[item.path])

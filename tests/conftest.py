"""The CPU, eight virtual devices and quick compiling, all set before jax is first used."""

import os
import pathlib

import jax
import pytest

from tests import tiny_run

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = tiny_run.xla_flags(8)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled programs, for all test processes and the runs that they start; as in those, nothing is
# kept of several CPU devices (`parallel.cache_compilations`).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxrl_vlm/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
  jax.config.update(name.lower(), os.environ[name])
jax.config.update(
  "jax_persistent_cache_min_compile_time_secs",
  float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture
def one_device():
  """The runs of this process use one of its virtual devices."""
  with tiny_run.one_device():
    yield


@pytest.fixture(autouse=True)
def few_compiled_programs():
  """Linux gives a process 65,530 memory maps; compiled programs take up to thousands each, and XLA
  aborts when there are no more."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
    jax.clear_caches()


def pytest_collection_modifyitems(items):
  """Files with long tests first: where files are shared out, none of them is left for the end."""
  long = dict.fromkeys((item.path for item in items), 0)
  for item in items:
    long[item.path] += item.get_closest_marker("slow") is not None
  items.sort(key=lambda item: -long[item.path])

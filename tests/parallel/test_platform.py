"""Tests which platforms JAX is told to use on simulated machines, and the compilation cache."""

import jax
import pytest

from jaxrl_vlm.parallel import platform


@pytest.mark.parametrize(
  ("devices", "installed", "expected"),
  [
    ((), (), "cpu"),
    # JAX fails if `jax_platforms` names a platform that it cannot use. A GPU without JAX's plugin
    # therefore does not count.
    (("/dev/nvidia[0-9]*",), (), "cpu"),
    (("/dev/nvidia[0-9]*",), ("jax_cuda13_plugin",), "cuda,cpu"),
    ((), ("jax_cuda13_plugin",), "cpu"),
    ((), ("jax_rocm7_plugin",), None),
    (("/dev/accel*",), (), None),
  ],
)
def test_only_platforms_of_the_machine_are_chosen(monkeypatch, devices, installed, expected):
  chosen = []
  for name in ("JAX_PLATFORMS", "TPU_NAME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(platform.glob, "glob", lambda pattern: [pattern] * (pattern in devices))
  monkeypatch.setattr(platform.os.path, "exists", lambda path: path in devices)
  monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: name in installed or None)
  monkeypatch.setattr(jax.config, "update", lambda key, value: chosen.append(value))
  platform.choose_platform()
  assert chosen == ([] if expected is None else [expected])


@pytest.mark.parametrize(
  ("variables", "expected"),
  [
    ({}, "/home/me/.cache/jaxrl_vlm/xla"),
    ({"JAXRL_VLM_CACHE": "/fast"}, "/fast/xla"),
    ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, None),
  ],
)
def test_compiled_programs_are_cached_in_the_configured_directory(monkeypatch, variables, expected):
  for name in ("JAXRL_VLM_CACHE", "JAX_COMPILATION_CACHE_DIR"):
    monkeypatch.delenv(name, raising=False)
  for name, value in {"HOME": "/home/me", **variables}.items():
    monkeypatch.setenv(name, value)
  chosen = {}
  monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  platform.cache_compilations()
  assert chosen.get("jax_compilation_cache_dir") == expected
  assert "jax_enable_compilation_cache" not in chosen


def test_nothing_is_cached_with_several_cpu_devices(monkeypatch):
  chosen = {}
  monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
  platform.cache_compilations()
  assert chosen == {"jax_enable_compilation_cache": False}

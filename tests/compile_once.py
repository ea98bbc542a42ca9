"""Compiles each program once per process, even if tests build the same program several times.

Tests build many objects (samplers, updates, whole runs) around the same small models. Each object
has `jax.jit` functions of its own, so JAX traces and compiles equal programs again. Tracing is
cheap; XLA is not. This module keeps every compiled program under the key that JAX's cache on disk
uses, which covers the program, the compiler's options and the devices. In contrast to the cache on
disk it also works for programs of several CPU devices: nothing is written and read back.
"""

from typing import Any

_programs: dict[Any, Any] = {}


def install() -> None:
  """Makes JAX look for compiled programs in this process before it compiles for the CPU."""
  from jax._src import cache_key, compiler

  compile_ = compiler.compile_or_get_cached

  def compile_once(backend, module, devices, options, host_callbacks, *rest, **kwargs):
    def compiled():
      return compile_(backend, module, devices, options, host_callbacks, *rest, **kwargs)

    if backend.platform != "cpu" or host_callbacks:  # callbacks belong to one object
      return compiled()
    ids = tuple(device.id for device in devices.flatten())
    key = cache_key.get(module, devices, options, backend), ids
    if key not in _programs:
      _programs[key] = compiled()
    return _programs[key]

  compiler.compile_or_get_cached = compile_once


def count() -> int:
  """Returns the number of programs that are kept."""
  return len(_programs)


def clear() -> None:
  """Frees the programs that no other object uses."""
  _programs.clear()

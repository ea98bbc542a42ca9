"""Compiles each program once per process, even if several tests build the same program.

Many tests create samplers, updates or whole runs of the same small models. Each of these objects
has its own `jax.jit` functions, so JAX would compile identical programs again. This module keeps
every compiled program in memory. It uses the key of JAX's persistent compilation cache, which
depends on the program, the compiler options and the devices. The tests do not use the persistent
cache for programs of several CPU devices (`parallel.cache_compilations`). This module keeps those
programs too, because it does not serialize them.
"""

from typing import Any

_programs: dict[Any, Any] = {}


def install() -> None:
  """Patches JAX so that it reuses the CPU programs that this process has already compiled."""
  from jax._src import cache_key, compiler

  compile_ = compiler.compile_or_get_cached

  def compile_once(backend, module, devices, options, host_callbacks, *rest, **kwargs):
    def compiled():
      return compile_(backend, module, devices, options, host_callbacks, *rest, **kwargs)

    if backend.platform != "cpu" or host_callbacks:  # a callback belongs to one object
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

"""Chooses the backend of a run, and the cache of compiled programs."""

import glob
import importlib.util
import os


def choose_platform() -> None:
  """Prevents JAX from looking for a TPU on machines that have libtpu but no TPU.

  Call it before the first use of jax.

  libtpu may be installed only as a compiler (the extra `plan`). JAX takes its presence for a TPU,
  waits for it, and prints warnings. If the machine has no TPU device, this function sets
  `jax_platforms` to the other platforms. If JAX_PLATFORMS is set, nothing changes.
  """
  if os.environ.get("JAX_PLATFORMS"):
    return
  if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") or os.environ.get("TPU_NAME"):
    return
  import jax

  # JAX fails if a platform in `jax_platforms` does not work. So a GPU counts only if JAX's plugin
  # for it is installed (the extra `gpu`), and with a ROCm plugin the choice is left to JAX.
  def installed(*names: str) -> bool:
    return any(importlib.util.find_spec(name) for name in names)

  if installed("jax_rocm60_plugin", "jax_rocm7_plugin"):
    return
  cuda = installed("jax_cuda12_plugin", "jax_cuda13_plugin") and (
    glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/dxg")
  )
  jax.config.update("jax_platforms", "cuda,cpu" if cuda else "cpu")


def cache_compilations() -> None:
  """Caches compiled programs on disk, so that a repeated or resumed run reads them from there.

  The directory is $JAXRL_VLM_CACHE/xla, or ~/.cache/jaxrl_vlm/xla by default.
  JAX_COMPILATION_CACHE_DIR overrides it. Call it after all processes of the run have joined.

  With several CPU devices, nothing is cached. XLA for CPU does not store the order of the
  collectives of a program, so devices that run a cached program can start with different
  collectives and wait for each other forever.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  if jax.default_backend() == "cpu" and jax.device_count() > 1:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the option only when the cache is initialized
  elif not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = os.environ.get("JAXRL_VLM_CACHE") or "~/.cache/jaxrl_vlm"
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser(cache), "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

"""Which backend an ordinary run uses, and where compiled programs are kept."""

import glob
import importlib.util
import os


def choose_platform() -> None:
  """Keeps an installed libtpu from disturbing machines without a TPU.

  Call before the first use of jax.

  libtpu is also a compiler that runs anywhere (the extra `plan`), but JAX takes its presence for
  a TPU, complains and waits. Where no TPU device exists this names the other platforms to JAX.
  An explicit JAX_PLATFORMS is left alone.
  """
  if os.environ.get("JAX_PLATFORMS"):
    return
  if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") or os.environ.get("TPU_NAME"):
    return
  import jax

  # A platform that is named must be there: a GPU counts only with JAX's plugin for it (the extra
  # `gpu`), and where another plugin is installed the choice is left to JAX.
  def installed(*names: str) -> bool:
    return any(importlib.util.find_spec(name) for name in names)

  if installed("jax_rocm60_plugin", "jax_rocm7_plugin"):
    return
  cuda = installed("jax_cuda12_plugin", "jax_cuda13_plugin") and (
    glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/dxg")
  )
  jax.config.update("jax_platforms", "cuda,cpu" if cuda else "cpu")


def cache_compilations() -> None:
  """Keeps compiled programs on disk, so that a repeated or resumed run starts at once.

  In $JAXRL_VLM_CACHE/xla or ~/.cache/jaxrl_vlm/xla; JAX_COMPILATION_CACHE_DIR overrides it. Call
  once all processes of the run have joined. On several CPU devices nothing is kept: XLA for CPU
  forgets the order of the collectives of a program when it writes it, so that devices which read
  it begin with different ones and wait for each other for ever.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  if jax.default_backend() == "cpu" and jax.device_count() > 1:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks at that once
  elif not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = os.environ.get("JAXRL_VLM_CACHE") or "~/.cache/jaxrl_vlm"
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser(cache), "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

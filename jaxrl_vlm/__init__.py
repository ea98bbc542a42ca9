"""Reinforcement-learning post-training for vision-language models, in JAX."""

import importlib

__version__ = "0.1.0"

# Imported on first use, because reward workers import `jaxrl_vlm.rewards` and must not import jax.
_PUBLIC = {
  "Example": "jaxrl_vlm.example",
  "Prompt": "jaxrl_vlm.types",
  "Rollout": "jaxrl_vlm.types",
  "Experience": "jaxrl_vlm.types",
  "TokenStats": "jaxrl_vlm.types",
  "Sampling": "jaxrl_vlm.rollout",
  "generate": "jaxrl_vlm.rollout",
  "score": "jaxrl_vlm.scoring",
  "logits": "jaxrl_vlm.models",
  "load_pretrained": "jaxrl_vlm.models",
  "save_pretrained": "jaxrl_vlm.models",
}
_MODULES = ("objectives", "rewards")

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str):
  if name in _PUBLIC:
    if name != "Example":
      # Before jax is used: jax takes an installed libtpu for a TPU, also where there is none.
      importlib.import_module("jaxrl_vlm.parallel.platform").choose_platform()
    return getattr(importlib.import_module(_PUBLIC[name]), name)
  if name in _MODULES:
    return importlib.import_module(f"jaxrl_vlm.{name}")
  raise AttributeError(f"module 'jaxrl_vlm' has no attribute {name!r}")


def __dir__():
  return sorted(__all__)

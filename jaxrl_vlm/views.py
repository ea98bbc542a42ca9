"""Views: a prompt with other pixels. The same tokens, scored under another image."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_vlm.types import Array, Prompt


def repeat_prompts(prompt: Prompt, times: int) -> Prompt:
  """Every prompt `times` times: leading axis P·times, a prompt's copies adjacent."""
  return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), prompt)


def black_patches(key: Array, prompt: Prompt, rate: float, black: Array) -> Prompt:
  """Blackens each patch with probability `rate`, independently.

  The grid is that of the processed image: one patch of the vision tower. VPPO's released code
  does this (14-pixel squares after resizing, rate 0.5, drawn anew for every sample); PAPO's draws
  on the original image before resizing, rate 0.6, once a prompt.

  Args:
    key: of jax.random.
    prompt: P prompts.
    rate: probability of each patch.
    black: f32[C·t·p·p]; a black patch as the processor normalises it.
  """
  hit = jax.random.bernoulli(key, rate, prompt.patches.shape[:2])
  return dataclasses.replace(prompt, patches=jnp.where(hit[..., None], black, prompt.patches))

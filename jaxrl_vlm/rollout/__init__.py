"""Sampling responses: prefill once a prompt, then decode the groups together, chunk by chunk."""

from jaxrl_vlm.rollout.sampler import Sampler, generate, make_sampler, texts_of, with_text
from jaxrl_vlm.rollout.sampling import Sampling

__all__ = ["Sampler", "Sampling", "generate", "make_sampler", "texts_of", "with_text"]

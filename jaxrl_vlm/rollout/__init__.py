"""Samples responses: prefills each prompt once, then decodes all groups together in chunks."""

from jaxrl_vlm.rollout.sampler import Sampler, generate, make_sampler, texts_of, with_text
from jaxrl_vlm.rollout.sampling import Sampling

__all__ = ["Sampler", "Sampling", "generate", "make_sampler", "texts_of", "with_text"]

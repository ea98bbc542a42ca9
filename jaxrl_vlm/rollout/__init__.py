"""Sampling responses: prefill once a prompt, then decode its group together."""

from jaxrl_vlm.rollout.generate import Sampling, generate, sample_responses, with_text

__all__ = ["Sampling", "generate", "sample_responses", "with_text"]

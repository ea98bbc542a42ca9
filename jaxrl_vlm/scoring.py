"""What a policy says of given responses: log-probabilities and entropies, never the full logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_vlm.models.vlm import VLM
from jaxrl_vlm.types import Array, Params, Prompt, Rollout, TokenStats


def token_stats(
    model: VLM, params: Params, hidden: Array, tokens: Array, *, temperature: float = 1.0,
    chunk: int = 128) -> TokenStats:
  """Log-probability and entropy of tokens [P, G, T] from hidden [P, G, T, D].

  Works through T in chunks and recomputes each in the backward pass, so that logits exist for
  P·G·chunk positions at a time.
  """
  t = tokens.shape[-1]
  size = min(chunk, t)
  pad = -t % size

  @jax.checkpoint
  def one(hidden, tokens):
    logits: Any = model.apply({"params": params}, hidden, temperature, method="response_logits")
    logp = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    # A suppressed token has probability 0 and log-probability -1e30: the product is 0, not NaN.
    return picked, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

  if pad == 0 and t == size:
    return TokenStats(*one(hidden, tokens))
  hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, pad), (0, 0)))
  tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, pad)))

  def split(a):  # [P, G, n·size, ...] -> [n, P, G, size, ...]
    return jnp.moveaxis(a.reshape(*a.shape[:2], -1, size, *a.shape[3:]), 2, 0)

  _, parts = jax.lax.scan(lambda _, x: (None, one(*x)), None, (split(hidden), split(tokens)))
  logp, entropy = (jnp.moveaxis(a, 0, 2).reshape(tokens.shape)[..., :t] for a in parts)
  return TokenStats(logp, entropy)


def score_tokens(
    model: VLM, params: Params, prompt: Prompt, tokens: Array, mask: Array, *,
    temperature: float = 1.0, chunk: int = 128) -> TokenStats:
  """Scores responses tokens [P, G, T] of P prompts; 0 where mask is false. Differentiable."""
  variables = {"params": params}
  _, prefix = model.apply(variables, prompt, method="prefill")
  hidden = model.apply(variables, prompt, prefix, tokens, method="respond")
  stats = token_stats(model, params, hidden, tokens, temperature=temperature, chunk=chunk)
  return TokenStats(jnp.where(mask, stats.logp, 0.0), jnp.where(mask, stats.entropy, 0.0))


def score_per_sample(
    model: VLM, params: Params, prompt: Prompt, tokens: Array, mask: Array, **kwargs) -> TokenStats:
  """As `score_tokens` with a prompt of its own for every sample: prompt's leading axis is P·G."""
  p, g, t = tokens.shape
  alone = (p * g, 1, t)
  stats = score_tokens(model, params, prompt, tokens.reshape(alone), mask.reshape(alone), **kwargs)
  return jax.tree.map(lambda a: a.reshape(p, g, t), stats)


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _score(model, params, prompt, tokens, mask, temperature):
  return score_tokens(model, params, prompt, tokens, mask, temperature=temperature)


def score(
    model: VLM, params: Params, prompt: Prompt, rollout: Rollout, *, temperature: float = 1.0
) -> TokenStats:
  """TokenStats [P, G, T] of a rollout under `params`, at the temperature it was sampled with."""
  return _score(model, params, prompt, rollout.tokens, rollout.mask, temperature)

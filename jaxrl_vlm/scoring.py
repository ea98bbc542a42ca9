"""What a policy says of given responses: log-probabilities and entropies, never the full logits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_vlm.models.vlm import VLM
from jaxrl_vlm.types import Array, Params, Prompt, Rollout, TokenStats


def token_stats(
    model: VLM, params: Params, hidden: Array, tokens: Array, *, temperature: float = 1.0,
    chunk: int = 128, axis: int = 2) -> TokenStats:
  """Log-probability and entropy of tokens [P, G, T] from hidden [P, G, T, D].

  Works through an axis in chunks and recomputes each in the backward pass, so that logits exist for
  P·G·chunk positions at a time.
  """

  def one(hidden, tokens):
    logp = _log_probs(model, params, hidden, temperature)
    picked = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    # A suppressed token has probability 0 and log-probability -1e30: the product is 0, not NaN.
    return picked, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

  return TokenStats(*_in_chunks(one, (hidden, tokens), chunk, axis))


def full_kl(
    model: VLM, params: Params, hidden: Array, other_params: Params, other_hidden: Array,
    temperature: float = 1.0, chunk: int = 128, axis: int = 2) -> Array:
  """Divergence over the whole vocabulary: f32[P, G, T], >= 0 but for rounding.

      KL_t = Σ_v π(v | I, q, o_<t) (log π(v | I, q, o_<t) − log π′(v | I′, q, o_<t))

  at the sampling temperature, without the tokens that are never sampled. With π′ = π and a
  corrupted image I′ it is S of VPPO (arXiv 2510.09285) and the D_KL of PAPO (arXiv 2507.06448) as
  the papers write them; with I′ = I and the reference π′ the KL penalty of GRPO. The released codes
  estimate all three from the sampled token.

  Chunks and recomputes as `token_stats`: twice P·G·chunk rows of logits at a time.

  Args:
    model, params, hidden: the policy, and its `hidden_states` [P, G, T, D].
    other_params, other_hidden: of π′ and its view. The gradient goes through all of them:
      `jax.lax.stop_gradient` for what should stay.
    temperature: of sampling.
    chunk: how much of an axis at a time.
    axis: 1 or 2.
  """

  def one(hidden, other_hidden):
    logp = _log_probs(model, params, hidden, temperature)
    other = _log_probs(model, other_params, other_hidden, temperature)
    # A suppressed token is -1e30 in both: probability 0 times a finite difference.
    return (jnp.sum(jnp.exp(logp) * (logp - other), axis=-1),)

  return _in_chunks(one, (hidden, other_hidden), chunk, axis)[0]


def _log_probs(model: VLM, params: Params, hidden: Array, temperature: float) -> Array:
  logits: Any = model.apply({"params": params}, hidden, temperature, method="response_logits")
  return jax.nn.log_softmax(logits, axis=-1)


def _in_chunks(
    function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], chunk: int, axis: int
) -> tuple[Array, ...]:
  """function of arrays [P, G, T, ...] -> arrays [P, G, T], `chunk` of an axis at a time.

  Each chunk is recomputed in the backward pass.
  """
  one = jax.checkpoint(function)
  t = arrays[0].shape[axis]
  size = min(chunk, t)
  if t == size:
    return one(*arrays)

  def split(a):  # [.., T, ...] -> [n, .., size, ...]
    room = [(0, 0)] * a.ndim
    room[axis] = (0, -t % size)
    a = jnp.pad(a, room)
    return jnp.moveaxis(a.reshape(*a.shape[:axis], -1, size, *a.shape[axis + 1:]), axis, 0)

  def joined(a):
    a = jnp.moveaxis(a, 0, axis)
    a = a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2:])
    return jax.lax.slice_in_dim(a, 0, t, axis=axis)

  _, parts = jax.lax.scan(lambda _, x: (None, one(*x)), None, tuple(map(split, arrays)))
  return tuple(map(joined, parts))


def hidden_states(model: VLM, params: Params, prompt: Prompt, tokens: Array) -> Array:
  """[P, G, T, D]; position t predicts tokens[..., t]. `prompt` may have a row for every sample."""
  variables = {"params": params}
  _, prefix = model.apply(variables, prompt, method="prefill")
  hidden: Any = model.apply(variables, prompt, prefix, tokens, method="respond")
  return hidden


def score_tokens(
    model: VLM, params: Params, prompt: Prompt, tokens: Array, mask: Array, *,
    temperature: float = 1.0, chunk: int = 128) -> TokenStats:
  """Scores responses tokens [P, G, T]; 0 where mask is false. Differentiable.

  `prompt` has P rows, or P·G: one for every sample.
  """
  hidden = hidden_states(model, params, prompt, tokens)
  stats = token_stats(model, params, hidden, tokens, temperature=temperature, chunk=chunk)
  return TokenStats(jnp.where(mask, stats.logp, 0.0), jnp.where(mask, stats.entropy, 0.0))


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _score(model, params, prompt, tokens, mask, temperature):
  return score_tokens(model, params, prompt, tokens, mask, temperature=temperature)


def score(
    model: VLM, params: Params, prompt: Prompt, rollout: Rollout, *, temperature: float = 1.0
) -> TokenStats:
  """TokenStats [P, G, T] of a rollout under `params`, at the temperature it was sampled with."""
  return _score(model, params, prompt, rollout.tokens, rollout.mask, temperature)

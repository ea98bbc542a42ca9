"""Scores of given responses: log-probabilities and entropies, without storing all logits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from jaxrl_vlm import parallel
from jaxrl_vlm.models import layers
from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.models.vlm import VLM, head_of, response_logits
from jaxrl_vlm.types import Array, Params, Prompt, Rollout, TokenStats


def token_stats(
  model: VLM,
  params: Params,
  hidden: Array,
  tokens: Array,
  *,
  temperature: float = 1.0,
  chunk: int = 128,
  axis: int = 2,
) -> TokenStats:
  """Computes log-probabilities and entropies of tokens [P, G, T] from hidden states [P, G, T, D].

  The computation processes one axis in chunks, and recomputes each chunk in the backward pass.
  Logits of only P·G·chunk positions exist at the same time (for `axis` 2).

  Args:
    model, params: the policy.
    hidden: [P, G, T, D]; `hidden_states` of the tokens.
    tokens: i32[P, G, T].
    temperature: sampling temperature.
    chunk: number of entries of `axis` that are processed at a time.
    axis: the axis that is divided into chunks, 1 or 2.
  """

  def one(shard, hidden, tokens):
    logp = shard.log_probs(hidden)
    # Summing selects the token, which may be in the vocabulary shard of another device.
    chosen = shard.token_ids() == tokens[..., None]
    # A suppressed token has probability 0 and log-probability -1e30: the product is 0, not NaN.
    return (jnp.sum(jnp.where(chosen, logp, 0.0), axis=-1), -jnp.sum(jnp.exp(logp) * logp, axis=-1))

  return TokenStats(
    *_over_vocabulary(one, model, (params,), (hidden, tokens), temperature, chunk, axis)
  )


def full_kl(
  model: VLM,
  params: Params,
  hidden: Array,
  other_params: Params,
  other_hidden: Array,
  temperature: float = 1.0,
  chunk: int = 128,
  axis: int = 2,
) -> Array:
  """Computes the KL divergence over the whole vocabulary: f32[P, G, T], ≥ 0 except for rounding.

      KL_t = Σ_v π(v | I, q, o_<t) (log π(v | I, q, o_<t) − log π′(v | I′, q, o_<t))

  The distributions are those at the sampling temperature, without suppressed tokens.

  With π′ = π and a corrupted image I′, this is S of VPPO (arXiv 2510.09285) and D_KL of PAPO (arXiv
  2507.06448), as the papers define them. With I′ = I and the reference policy π′, it is the KL
  penalty of GRPO. The released code estimates all three from the sampled token.

  Like `token_stats`, the computation uses chunks. Logits of 2·P·G·chunk positions exist at the same
  time (for `axis` 2).

  Args:
    model, params, hidden: the policy, and its `hidden_states` [P, G, T, D].
    other_params, other_hidden: the same for π′ and its image I′. These four arguments have a
      gradient. Apply `jax.lax.stop_gradient` to those that should not.
    temperature, chunk, axis: as in `token_stats`.
  """

  def one(shard, other_shard, hidden, other_hidden):
    logp, other = shard.log_probs(hidden), other_shard.log_probs(other_hidden)
    # A suppressed token is -1e30 in both: probability 0 times a finite difference.
    return (jnp.sum(jnp.exp(logp) * (logp - other), axis=-1),)

  return _over_vocabulary(
    one, model, (params, other_params), (hidden, other_hidden), temperature, chunk, axis
  )[0]


@dataclasses.dataclass(frozen=True)
class _Shard:
  """The vocabulary shard of a device.

  Attributes:
    config: config of the model.
    head: [D, V'], weights of the V' tokens of the shard.
    temperature: sampling temperature.
    over: mesh axes that shard the vocabulary, or () if it is not sharded.
  """

  config: ModelConfig
  head: Array
  temperature: float
  over: tuple[str, ...] = ()

  @property
  def _first(self) -> Array | int:
    return jax.lax.axis_index(self.over) * self.head.shape[1] if self.over else 0

  def token_ids(self) -> Array:
    """Returns the token ids of the shard, i32[V']."""
    return self._first + jnp.arange(self.head.shape[1])

  def log_probs(self, hidden: Array) -> Array:
    """Returns f32[..., V'] from hidden states [..., D], normalized over the whole vocabulary."""
    logits = response_logits(self.config, self.head, hidden, self.temperature, self._first)
    top = jax.lax.stop_gradient(logits).max(axis=-1, keepdims=True)
    if self.over:
      top = jax.lax.pmax(top, self.over)
    shifted = logits - top
    total = jnp.exp(shifted).sum(axis=-1, keepdims=True)
    return shifted - jnp.log(jax.lax.psum(total, self.over) if self.over else total)


def _over_vocabulary(
  function: Callable[..., tuple[Array, ...]],
  model: VLM,
  params: tuple[Params, ...],
  arrays: tuple[Array, ...],
  temperature: float,
  chunk: int,
  axis: int,
) -> tuple[Array, ...]:
  """Computes sums over the vocabulary for each token, one chunk of tokens after another.

  If the vocabulary is sharded, the devices that share it gather their tokens. Each device computes
  the sums over its shard for all these tokens, and the sums are added. No device ever holds all
  weights or their whole gradient.

  Args:
    function: receives a `_Shard` for each of `params` and the arrays of a chunk; returns sums over
      the shard.
    model, params: the model, and the parameters with the weights of each `_Shard`.
    arrays: [P, G, T, ...].
    temperature, chunk, axis: as in `token_stats`.

  Returns:
    Arrays [P, G, T].
  """
  config = model.config
  heads = tuple(head_of(config, tree) for tree in params)
  mesh, over, shared, others = config.mesh, (), (), ()
  if mesh is not None and mesh.size > 1:
    over, shared, others = layers.vocabulary(config, mesh, config.vocab_size)
  if not over or mesh is None:
    shards = [_Shard(config, head, temperature) for head in heads]
    return _in_chunks(functools.partial(function, *shards), arrays, chunk, axis)

  def local(heads, arrays):
    def one(*arrays):
      shards = [_Shard(config, head, temperature, over) for head in heads]
      arrays = jax.lax.all_gather(arrays, shared, tiled=True)
      sums = jax.lax.psum_scatter(function(*shards, *arrays), shared, tiled=True)
      return jax.lax.psum(sums, others)

    return _in_chunks(one, arrays, chunk, axis)

  rows = Spec(parallel.ROWS)
  return jax.shard_map(
    local, mesh=mesh, in_specs=(Spec(None, over), rows), out_specs=rows, check_vma=False
  )(heads, arrays)


def _in_chunks(
  function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], chunk: int, axis: int
) -> tuple[Array, ...]:
  """Applies a function of arrays [P, G, T, ...] to chunks along one axis; returns arrays [P, G, T].

  The backward pass recomputes each chunk.
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
    return jnp.moveaxis(a.reshape(*a.shape[:axis], -1, size, *a.shape[axis + 1 :]), axis, 0)

  def joined(a):
    a = jnp.moveaxis(a, 0, axis)
    a = a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])
    return jax.lax.slice_in_dim(a, 0, t, axis=axis)

  _, chunks = jax.lax.scan(lambda _, x: (None, one(*x)), None, tuple(map(split, arrays)))
  return tuple(map(joined, chunks))


def hidden_states(model: VLM, params: Params, prompt: Prompt, tokens: Array) -> Array:
  """Returns the hidden states [P, G, T, D] of responses. Position t predicts tokens[..., t].

  Args:
    model, params: the policy.
    prompt: P prompts, or P·G: one for every sample.
    tokens: i32[P, G, T].
  """
  variables = {"params": params}
  _, prefix = model.apply(variables, prompt, method="prefill")
  hidden: Any = model.apply(variables, prompt, prefix, tokens, method="respond")
  return hidden


def score_tokens(
  model: VLM,
  params: Params,
  prompt: Prompt,
  tokens: Array,
  mask: Array,
  *,
  temperature: float = 1.0,
  chunk: int = 128,
) -> TokenStats:
  """Scores responses. The result is differentiable.

  Args:
    model, params: the policy.
    prompt: P prompts, or P·G: one for every sample.
    tokens, mask: [P, G, T].
    temperature: sampling temperature.
    chunk: number of response tokens for which logits are computed at a time.

  Returns:
    TokenStats [P, G, T], 0 where the mask is false.
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
  """Scores the responses of a rollout with a jitted program.

  Args:
    model, params: the policy.
    prompt: the prompts of the rollout.
    rollout: the responses.
    temperature: the temperature at which they were sampled.

  Returns:
    TokenStats [P, G, T], 0 where the mask is false.
  """
  return _score(model, params, prompt, rollout.tokens, rollout.mask, temperature)

"""One compiled loop that decodes G samples of P prompts until all have ended."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_vlm.models.vlm import VLM, empty_cache
from jaxrl_vlm.types import Array, Params, Prompt, Rollout

if TYPE_CHECKING:
  from jaxrl_vlm.data.processor import Processor


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How responses are drawn.

  Attributes:
    num_samples: G, responses per prompt.
    max_tokens: T, the most tokens of a response, the end token included.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: keep the likeliest tokens whose probabilities sum to this.
    top_k: keep this many of the likeliest tokens; 0 keeps all.
  """

  num_samples: int = 1
  max_tokens: int = 256
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0

  def __post_init__(self):
    for name, ok, want in (
        ("num_samples", self.num_samples >= 1, "at least 1"),
        ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ("temperature", self.temperature >= 0, "0 or more"),
        ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ("top_k", self.top_k >= 0, "0 or more")):
      if not ok:
        raise ValueError(f"sampling.{name}={getattr(self, name)!r}: expected {want}")


def _truncate(logits: Array, top_p: float, top_k: int) -> Array:
  """Sets to -inf what top-k and top-p leave out. logits: f32[..., V]."""
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # A token stays if what is likelier than it does not reach top_p: the first always stays.
    keep_sorted = jnp.cumsum(probs, axis=-1) - probs < top_p
    keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(keep, logits, -jnp.inf)
  return logits


def _pick(key: Array, logits: Array, sampling: Sampling) -> tuple[Array, Array]:
  """A token i32[P, G] and its log-probability before truncation, from logits [P, G, V]."""
  if sampling.temperature == 0:
    token = jnp.argmax(logits, axis=-1)
  else:
    token = jax.random.categorical(key, _truncate(logits, sampling.top_p, sampling.top_k))
  logp = jax.nn.log_softmax(logits, axis=-1)
  return token.astype(jnp.int32), jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0]


def sample_responses(
    model: VLM, params: Params, prompt: Prompt, key: Array, sampling: Sampling) -> Rollout:
  """Draws responses; traceable. The prompts' keys and values exist once for their G samples."""
  variables = {"params": params}
  config = model.config
  p, g, t_max = prompt.tokens.shape[0], sampling.num_samples, sampling.max_tokens
  stops = jnp.array(config.stop_tokens, jnp.int32)
  # Greedy choice has no temperature; its log-probabilities are reported at 1.
  temperature = sampling.temperature or 1.0
  _, prefix = model.apply(variables, prompt, method="prefill")

  def step(state):
    t, token, done, cache, tokens, mask, logps = state
    hidden, cache = model.apply(
        variables, token, prompt.next_position - 1 + t, prefix, cache, method="decode")
    logits = model.apply(variables, hidden, temperature, method="response_logits")
    token, logp = _pick(jax.random.fold_in(key, t), logits, sampling)
    token = jnp.where(done, config.pad_token, token)

    def write(into, value):
      return jax.lax.dynamic_update_slice(into, value[..., None].astype(into.dtype), (0, 0, t))

    tokens, mask = write(tokens, token), write(mask, ~done)
    logps = write(logps, jnp.where(done, 0.0, logp))
    done = done | jnp.isin(token, stops)
    return t + 1, token, done, cache, tokens, mask, logps

  def unfinished(state):
    return (state[0] < t_max) & ~jnp.all(state[2])

  last = jnp.take_along_axis(prompt.tokens, prompt.length[:, None] - 1, axis=1)
  shape = (p, g, t_max)
  state = (
      jnp.zeros((), jnp.int32),
      jnp.broadcast_to(last, (p, g)),
      jnp.zeros((p, g), bool),
      empty_cache(config, p, g, t_max),
      jnp.full(shape, config.pad_token, jnp.int32),
      jnp.zeros(shape, bool),
      jnp.zeros(shape, jnp.float32),
  )
  _, _, _, _, tokens, mask, logp = jax.lax.while_loop(unfinished, step, state)
  return Rollout(tokens=tokens, mask=mask, logp=logp)


_sample_responses = functools.partial(jax.jit, static_argnames=("model", "sampling"))(
    sample_responses)


def with_text(rollout: Rollout, processor: "Processor") -> Rollout:
  """Decodes the tokens on the host: rollout.text becomes nested lists [P][G]."""
  tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
  text = [[processor.decode(row[keep]) for row, keep in zip(rows, keeps, strict=True)]
          for rows, keeps in zip(tokens, mask, strict=True)]
  return dataclasses.replace(rollout, text=text)


def generate(
    model: VLM, params: Params, prompt: Prompt, sampling: Sampling, key: Array | None = None,
    processor: "Processor | None" = None) -> Rollout:
  """Samples G responses of each prompt.

  Args:
    model, params, processor: as `load_pretrained` returns them; without a processor
      `rollout.text` is None.
    prompt: P prompts.
    sampling: how to draw.
    key: of jax.random; may be None at temperature 0.

  Returns:
    Rollout with tokens, mask, logp [P, G, T] and text [P][G].
  """
  if key is None:
    if sampling.temperature > 0:
      raise ValueError("generate: a key is needed unless sampling.temperature=0")
    key = jax.random.key(0)
  rollout = _sample_responses(model, params, prompt, key, sampling)
  return rollout if processor is None else with_text(rollout, processor)

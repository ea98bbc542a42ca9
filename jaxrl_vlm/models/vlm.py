"""The vision-language model: embed, see, decode, unembed. Methods are pure through `apply`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from jaxrl_vlm import parallel
from jaxrl_vlm.models import layers
from jaxrl_vlm.models.config import ModelConfig
from jaxrl_vlm.models.decoder import Blocks, Cells, Decoder, Prefix
from jaxrl_vlm.models.vision import VisionTower
from jaxrl_vlm.types import Array, Params, Prompt


class VLM(nn.Module):
  """All families. `VLM(config).apply({"params": params}, ..., method="prefill")` and so on."""

  config: ModelConfig

  @nn.nowrap
  def on(self, mesh: Mesh, rules: parallel.Rules | None = None) -> "VLM":
    """This model on a mesh, with parameters as the rules say (None: as they are)."""
    return VLM(self.config.replace(mesh=mesh, rules=rules or self.config.rules))

  def setup(self):
    config = self.config
    self.vision = VisionTower(config)
    self.tokens = nn.Embed(config.vocab_size, config.hidden_size, dtype=config.dtype, name="embed")
    self.decoder = Decoder(config)
    if not config.tied:
      self.head = self.param(
        "head", nn.initializers.lecun_normal(), (config.hidden_size, config.vocab_size)
      )

  def __call__(self, prompt: Prompt) -> Array:
    """Logits f32[P, Lp, V] of the whole prompt. For initialisation, checks and small inputs."""
    hidden, _ = self.prefill(prompt)
    return self.unembed(hidden)

  def embed(self, tokens: Array) -> Array:
    """i32[...] -> [..., D]."""
    x = layers.lookup(self.config, self.tokens.embedding, tokens)
    scale = self.config.embed_scale
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

  def see(self, prompt: Prompt) -> Prompt:
    """The prompts with their `features`: whatever follows has no need of the vision tower."""
    if prompt.features is not None or not prompt.patches.shape[1]:
      return prompt
    features, taken = self.vision(prompt)
    return dataclasses.replace(prompt, features=(features, *taken))

  def prefill(self, prompt: Prompt) -> tuple[Array, Prefix]:
    """Runs the prompts once. Returns hidden [P, Lp, D] and the prefix that responses stand on.

    The prefix stops before the last prompt token: that one opens every response stream.
    """
    features = self.see(prompt).features
    x = self.embed(prompt.tokens)
    index = prompt.feature_index
    is_image = index >= 0
    deepstack = None
    if features is not None:

      def placed(features):
        taken = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where(is_image[..., None], taken.astype(x.dtype), 0)

      x = jnp.where(is_image[..., None], placed(features[0]), x)
      if features[1:]:
        deepstack = jnp.stack([placed(taken) for taken in features[1:]])
    images = None
    if self.config.bidirectional_images:
      starts = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
      images = jnp.cumsum(starts, axis=1) * is_image
    hidden, (k, v), _ = self.decoder(
      x[:, None], prompt.positions[:, None], images=images, deepstack=deepstack
    )
    return hidden[:, 0], Prefix(k=k[:, :, 0], v=v[:, :, 0], length=prompt.length - 1)

  def saliency(self, prompt: Prompt) -> Array:
    """f32[P, N]; what attention each patch receives (`VisionTower.saliency`), 0 at padding.

    For `views.salient_patches`. It has no gradient; within one give it `stop_gradient(params)`,
    so that nothing is kept for the backward pass.
    """
    if not prompt.patches.shape[1]:
      return jnp.zeros(prompt.patches.shape[:2])
    return self.vision.saliency(prompt)

  def respond(
    self, prompt: Prompt, prefix: Prefix, tokens: Array, blocks: Blocks | None = None
  ) -> Array:
    """Hidden states whose position t predicts tokens[..., t]. tokens: i32[P, G, T] -> [P, G, T, D].

    The stream is fed the last prompt token and then the responses shifted by one, so that G
    separate sequences and one shared prompt are the same mathematics. `prompt` has P rows, or P·G:
    one for every sample. With `blocks` only what they name is computed: [R, N, B, D].
    """
    p, g, t = tokens.shape
    rows = prompt.tokens.shape[0]
    last = jnp.take_along_axis(prompt.tokens, prompt.length[:, None] - 1, axis=1)  # [rows, 1]

    def of_samples(a):  # [rows] -> [rows, P·G / rows, 1]
      return jnp.broadcast_to(a.reshape(rows, 1, 1), (rows, p * g // rows, 1))

    tokens = tokens.reshape(rows, -1, t)
    inputs = jnp.concatenate([of_samples(last), tokens[..., :-1]], axis=-1)
    at = of_samples(prompt.next_position - 1) + jnp.arange(t)
    places = None
    if blocks is not None:
      inputs, at = (blocks.take(a.reshape(p, g, t)) for a in (inputs, at))
      places = blocks.place((p, g, t), rows)
    positions = jnp.broadcast_to(at[..., None], (*at.shape, 3))
    hidden, _, _ = self.decoder(self.embed(inputs), positions, prefix, places=places)
    return hidden if blocks is not None else hidden.reshape(p, g, t, -1)

  def decode(
    self,
    x: Array,
    position: Array,
    prefix: Prefix,
    cells: Cells,
    begin: bool = True,
    finish: bool = True,
  ):
    """One step: token i32[R, C] at position i32[R, C] -> hidden [R, C, D] and the cells.

    Of a model that has only some of the layers, x and what is returned lie between layers: x is
    tokens if it has the first (`begin`), hidden is normed if it has the last (`finish`).
    """
    positions = jnp.broadcast_to(position[..., None, None], (*position.shape, 1, 3))
    x = self.embed(x) if begin else x
    hidden, _, cells = self.decoder(x[:, :, None], positions, prefix, cells, finish=finish)
    return hidden[:, :, 0], cells

  def unembed(self, hidden: Array) -> Array:
    """Logits f32[..., V] of hidden [..., D]."""
    return layers.product(hidden, self._head().astype(hidden.dtype), jnp.float32)

  def response_logits(self, hidden: Array, temperature: Array | float = 1.0) -> Array:
    """`response_logits` of the whole vocabulary, f32[P, ..., V] of hidden [P, ..., D]."""
    config, mesh = self.config, self.config.mesh
    if mesh is None:
      return response_logits(config, self._head(), hidden, temperature)
    # Each device has its part of the vocabulary, for the tokens of all that share it: the weights
    # are not gathered.
    vocab, shared, others = layers.vocabulary(config, mesh, config.vocab_size)
    rows = tuple(axis for axis in parallel.ROWS if axis not in shared)
    logits = response_logits(
      config, self._head(), parallel.constrained(mesh, hidden, rows), temperature
    )
    middle = [None] * (logits.ndim - 2)
    logits = parallel.constrained(mesh, logits, rows, *middle, vocab)
    return parallel.constrained(mesh, logits, parallel.ROWS, *middle, others)

  def _head(self) -> Array:
    return self.tokens.embedding.T if self.config.tied else self.head


def head_of(config: ModelConfig, params: Params) -> Array:
  """[D, V]; what hidden states are unembedded with."""
  return params["embed"]["embedding"].T if config.tied else params["head"]


def response_logits(
  config: ModelConfig,
  head: Array,
  hidden: Array,
  temperature: Array | float = 1.0,
  first: Array | int = 0,
) -> Array:
  """Logits f32[..., V'] of the policy: at a temperature, and never a vision special token.

  Sampling and scoring both use this, so their log-probabilities are of one distribution. The image
  placeholder must be impossible: generated, it would ask for a feature that is not there.

  Args:
    config: of the model.
    head: [D, V'], of tokens `first` to `first` + V' - 1.
    hidden: [..., D].
    temperature: of sampling.
    first: number of the first of these tokens.
  """
  logits: Any = layers.product(hidden, head.astype(hidden.dtype), jnp.float32)
  logits /= temperature
  if config.suppressed_tokens:
    banned = jnp.isin(first + jnp.arange(head.shape[1]), jnp.array(config.suppressed_tokens))
    logits = jnp.where(banned, -1e30, logits)
  return logits


def logits(model: VLM, params: Params, prompt: Prompt) -> Array:
  """Logits f32[P, Lp, V] of the prompts, every position. For checking, on small inputs."""
  return _logits(model, params, prompt)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, params, prompt):
  return model.apply({"params": params}, prompt)

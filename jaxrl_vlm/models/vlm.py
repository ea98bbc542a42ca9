"""The vision-language model: token embedding, vision tower, text decoder and output head.

`VLM` is a Flax module. Its methods are pure functions when called through `apply`.
"""

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
from jaxrl_vlm.models.decoder import Blocks, DecodeCache, Decoder, Prefix
from jaxrl_vlm.models.vision import VisionTower
from jaxrl_vlm.types import Array, Params, Prompt


class VLM(nn.Module):
  """A vision-language model of any supported family.

  Call a method with `VLM(config).apply({"params": params}, ..., method="prefill")`.
  """

  config: ModelConfig

  @nn.nowrap
  def on(self, mesh: Mesh, rules: parallel.Rules | None = None) -> "VLM":
    """Returns this model configured for a mesh.

    Args:
      mesh: the mesh that activations are sharded over.
      rules: sharding rules of the parameters. None keeps those of the config.
    """
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
    """Returns logits f32[P, Lp, V] of all prompt tokens.

    Use it for initialisation, checks and small inputs.
    """
    hidden, _ = self.prefill(prompt)
    return self.unembed(hidden)

  def embed(self, tokens: Array) -> Array:
    """Embeds tokens: i32[...] -> [..., D]."""
    x = layers.lookup(self.config, self.tokens.embedding, tokens)
    scale = self.config.embed_scale
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

  def see(self, prompt: Prompt) -> Prompt:
    """Runs the vision tower and returns the prompts with `features` set.

    `prefill` then does not run the vision tower again. Prompts that have `features` or no patches
    are returned unchanged.
    """
    if prompt.features is not None or not prompt.patches.shape[1]:
      return prompt
    features, deepstack = self.vision(prompt)
    return dataclasses.replace(prompt, features=(features, *deepstack))

  def prefill(self, prompt: Prompt) -> tuple[Array, Prefix]:
    """Runs the model on the prompts.

    Returns:
      The hidden states [P, Lp, D], and the prefix that responses attend to. The prefix excludes the
      last prompt token, because that token is the first input of every response.
    """
    features = self.see(prompt).features
    x = self.embed(prompt.tokens)
    index = prompt.feature_index
    is_image = index >= 0
    deepstack = None
    if features is not None:

      def at_tokens(features):
        gathered = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where(is_image[..., None], gathered.astype(x.dtype), 0)

      x = jnp.where(is_image[..., None], at_tokens(features[0]), x)
      if features[1:]:
        deepstack = jnp.stack([at_tokens(layer) for layer in features[1:]])
    images = None
    if self.config.bidirectional_images:
      starts = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
      images = jnp.cumsum(starts, axis=1) * is_image
    hidden, (k, v), _ = self.decoder(
      x[:, None], prompt.positions[:, None], images=images, deepstack=deepstack
    )
    return hidden[:, 0], Prefix(k=k[:, :, 0], v=v[:, :, 0], length=prompt.length - 1)

  def saliency(self, prompt: Prompt) -> Array:
    """Returns the attention that each patch receives, f32[P, N], 0 at padding.

    See `VisionTower.saliency`; `views.salient_patches` uses it. The result has no gradient. Inside
    a differentiated function, pass `stop_gradient(params)`, so that nothing is kept for the
    backward pass.
    """
    if not prompt.patches.shape[1]:
      return jnp.zeros(prompt.patches.shape[:2])
    return self.vision.saliency(prompt)

  def respond(
    self, prompt: Prompt, prefix: Prefix, tokens: Array, blocks: Blocks | None = None
  ) -> Array:
    """Runs the model on given responses after their prompts.

    The inputs are the last prompt token, then the response tokens shifted by one. The result is
    mathematically the same as for G separate sequences that each contain the whole prompt.

    Args:
      prompt: P prompts, or P·G: one for every sample.
      prefix: result of `prefill` for the same prompts.
      tokens: i32[P, G, T].
      blocks: if given, only these blocks of the responses are computed. A block is a fixed number
        of consecutive response tokens, the unit of packing.

    Returns:
      Hidden states [P, G, T, D]; position t predicts tokens[..., t]. With `blocks`, [R, N, B, D].
    """
    p, g, t = tokens.shape
    rows = prompt.tokens.shape[0]
    last = jnp.take_along_axis(prompt.tokens, prompt.length[:, None] - 1, axis=1)  # [rows, 1]

    def of_samples(a):  # [rows] -> [rows, P·G / rows, 1]
      return jnp.broadcast_to(a.reshape(rows, 1, 1), (rows, p * g // rows, 1))

    tokens = tokens.reshape(rows, -1, t)
    inputs = jnp.concatenate([of_samples(last), tokens[..., :-1]], axis=-1)
    at = of_samples(prompt.next_position - 1) + jnp.arange(t)
    block_info = None
    if blocks is not None:
      inputs, at = (blocks.take(a.reshape(p, g, t)) for a in (inputs, at))
      block_info = blocks.info((p, g, t), rows)
    positions = jnp.broadcast_to(at[..., None], (*at.shape, 3))
    hidden, _, _ = self.decoder(self.embed(inputs), positions, prefix, block_info=block_info)
    return hidden if blocks is not None else hidden.reshape(p, g, t, -1)

  def decode(
    self,
    x: Array,
    position: Array,
    prefix: Prefix,
    cache: DecodeCache,
    begin: bool = True,
    finish: bool = True,
  ):
    """Decodes one token of each sequence.

    A model can also have only some of the layers. It then takes the output of the layers before it
    and returns the input of the layers after it.

    Args:
      x: i32[R, C] tokens with `begin`, else [R, C, D], the output of the previous layers.
      position: i32[R, C]; M-RoPE id of the token.
      prefix: keys and values of the prompts.
      cache: keys and values of the responses decoded so far.
      begin: whether this model has the first layer.
      finish: whether this model has the last layer, which the final norm follows.

    Returns:
      The hidden states [R, C, D], and the cache with one more token per sequence.
    """
    positions = jnp.broadcast_to(position[..., None, None], (*position.shape, 1, 3))
    x = self.embed(x) if begin else x
    hidden, _, cache = self.decoder(x[:, :, None], positions, prefix, cache, finish=finish)
    return hidden[:, :, 0], cache

  def unembed(self, hidden: Array) -> Array:
    """Returns logits f32[..., V] of hidden states [..., D]."""
    return layers.product(hidden, self._head().astype(hidden.dtype), jnp.float32)

  def response_logits(self, hidden: Array, temperature: Array | float = 1.0) -> Array:
    """Returns `response_logits` over the vocabulary: hidden [P, ..., D] -> f32[P, ..., V]."""
    config, mesh = self.config, self.config.mesh
    if mesh is None:
      return response_logits(config, self._head(), hidden, temperature)
    # Each device computes the logits of its shard of the vocabulary, for the tokens of all devices
    # that share the vocabulary. The weights are not gathered.
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
  """Returns the output head [D, V], which is the transposed embedding if the weights are tied."""
  return params["embed"]["embedding"].T if config.tied else params["head"]


def response_logits(
  config: ModelConfig,
  head: Array,
  hidden: Array,
  temperature: Array | float = 1.0,
  first: Array | int = 0,
) -> Array:
  """Returns the logits of the policy's distribution over response tokens.

  Logits are divided by the temperature, and those of vision special tokens are set to -1e30.
  Sampling and scoring both use this function, so that their log-probabilities refer to the same
  distribution. The image placeholder must have probability 0, because a generated placeholder would
  require an image feature that does not exist.

  Args:
    config: config of the model.
    head: [D, V']; output weights of tokens `first` to `first` + V' - 1.
    hidden: [..., D]; hidden states.
    temperature: sampling temperature.
    first: id of the first token in `head`.

  Returns:
    f32[..., V'].
  """
  logits: Any = layers.product(hidden, head.astype(hidden.dtype), jnp.float32)
  logits /= temperature
  if config.suppressed_tokens:
    banned = jnp.isin(first + jnp.arange(head.shape[1]), jnp.array(config.suppressed_tokens))
    logits = jnp.where(banned, -1e30, logits)
  return logits


def logits(model: VLM, params: Params, prompt: Prompt) -> Array:
  """Returns logits f32[P, Lp, V] of all prompt tokens. Use it for checks on small inputs."""
  return _logits(model, params, prompt)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, params, prompt):
  return model.apply({"params": params}, prompt)

"""The arrays that move between the parts of a training step, with every shape written down.

Axes: P prompts, G samples of each prompt, T response tokens, Lp prompt tokens (padded),
N image patches (padded), F = N / spatial_merge_size² visual tokens, D width, L layers,
K key/value heads, V vocabulary. The group axis is explicit: nothing is a flat batch with ids.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import struct

from jaxrl_vlm.example import Example

Array = jax.Array | Any  # a jax array on the device, a numpy array on the host
Params = Any  # a pytree of arrays

__all__ = ["Array", "Example", "Experience", "Params", "Prompt", "Rollout", "TokenStats"]


@struct.dataclass
class Prompt:
  """P prompts, right-padded to one length, with their images as patches.

  Host code makes it (`data/processor.py`); the device never computes an index from a value.

  Attributes:
    tokens: i32[P, Lp]; `<|image_pad|>` stands once for every visual token.
    length: i32[P]; real tokens are tokens[p, :length[p]]. The last one is fed to the response
      stream, whose first output predicts the first response token.
    positions: i32[P, Lp, 3]; M-RoPE time, height and width ids.
    next_position: i32[P]; the id (all three axes) of the first response token.
    feature_index: i32[P, Lp]; which visual token of the row goes here, -1 for text.
    patches: f32[P, N, C·t·p·p]; normalised pixels, the patches of one merged token adjacent.
    patch_positions: i32[P, N, 2]; row and column of the patch in its image.
    patch_grids: i32[P, N, 2]; rows and columns of patches of its image (1, 1 for padding).
    patch_segments: i32[P, N]; number of its image frame in the row, from 1; 0 is padding.
    patch_windows: i32[P, N]; number of its attention window in the row, from 1; 0 is padding.
    features: what the vision tower makes of the patches (`VLM.see`): [P, F, D], and those of the
      DeepStack layers; None before it has seen them.
  """

  tokens: Array
  length: Array
  positions: Array
  next_position: Array
  feature_index: Array
  patches: Array
  patch_positions: Array
  patch_grids: Array
  patch_segments: Array
  patch_windows: Array
  features: tuple[Array, ...] | None = None


@struct.dataclass
class Rollout:
  """G sampled responses of each prompt.

  Attributes:
    tokens: i32[P, G, T]; padded with the pad token after the end token.
    mask: bool[P, G, T]; true on response tokens, the end token included.
    logp: f32[P, G, T]; log-probability under the sampling policy at its temperature, before
      top-p and top-k cut anything; 0 where masked.
    text: nested lists [P][G] of decoded responses without special tokens (host side, not a leaf).
  """

  tokens: Array
  mask: Array
  logp: Array
  text: Any = struct.field(pytree_node=False, default=None)


@struct.dataclass
class TokenStats:
  """What a policy says of given response tokens.

  Attributes:
    logp: f32[P, G, T]; log-probability of each response token at the sampling temperature.
    entropy: f32[P, G, T]; entropy of the distribution it was drawn from, nats.
    kl: f32[P, G, T] or None; of a view: KL(policy on the clean image ‖ this view) over the whole
      vocabulary, if the objective names the view in `full_kl`.
  """

  logp: Array
  entropy: Array
  kl: Array | None = None


@struct.dataclass
class Experience:
  """Everything an objective may look at besides the current policy's TokenStats.

  Attributes:
    mask: bool[P, G, T]; response tokens that count.
    advantages: f32[P, G, T]; from `objective.advantages`, then reshaped by `objective.prepare`.
    old: TokenStats of the policy that made the rollout, no gradient; None in supervised stages,
      as is `rewards`.
    rewards: f32[P, G]; total reward.
    views: no-gradient TokenStats by name: `ref` (reference policy, clean image), `masked`
      (rollout policy, corrupted image) ...
    weights: f32[P, G, T] or None; set by `objective.prepare` over the whole minibatch: a policy
      loss is the sum of weight × token loss, so any split into microbatches or hosts adds up
      to exactly the full-batch loss.
    token_weights: f32[P, G, T] or None; mask / number of tokens of the minibatch: the weights of
      a token mean, for penalties and metrics.
    extras: f32[P, G, T] arrays that one objective hands from `prepare` to `loss`.
    sampler_logp: f32[P, G, T] or None; `Rollout.logp`: what the sampler said of its tokens, which
      is not exactly what the scorer (`old`) says.
    truncated: bool[P, G] or None; responses that filled the buffer without an end token.
    current: TokenStats of the current policy over the whole minibatch, no gradient, if the
      minibatch is split and the objective says `needs_current`; else None.
    state: scalars that change from update to update, see `Objective.initial_state`; without
      leading axis P.
  """

  mask: Array
  advantages: Array
  old: TokenStats | Any
  rewards: Array
  views: Mapping[str, TokenStats] = struct.field(default_factory=dict)
  weights: Array | None = None
  token_weights: Array | None = None
  extras: Mapping[str, Array] = struct.field(default_factory=dict)
  sampler_logp: Array | None = None
  truncated: Array | None = None
  current: TokenStats | None = None
  state: Mapping[str, Array] = struct.field(default_factory=dict)

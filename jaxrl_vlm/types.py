"""Arrays that are passed between the phases of a training step, with their shapes.

Axes: P prompts, G samples of each prompt, T response tokens, Lp prompt tokens (padded),
N image patches (padded), F = N / spatial_merge_size² visual tokens, D width, L layers,
K key/value heads, V vocabulary. Samples have an axis of their own (G).
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

  `data/processor.py` makes prompts on the host.

  Attributes:
    tokens: i32[P, Lp]; one `<|image_pad|>` for each visual token.
    length: i32[P]; the tokens of prompt p are tokens[p, :length[p]]. The last one is processed
      together with the response, because its output predicts the first response token.
    positions: i32[P, Lp, 3]; M-RoPE position ids for time, height and width.
    next_position: i32[P]; position id of the first response token, on all three axes.
    feature_index: i32[P, Lp]; index of the visual token at this position, or -1 for text.
    patches: f32[P, N, C·t·p·p]; normalized pixels. The patches of a visual token are adjacent.
    patch_positions: i32[P, N, 2]; row and column of the patch in its image.
    patch_grids: i32[P, N, 2]; number of patch rows and columns of its image (1, 1 for padding).
    patch_segments: i32[P, N]; index of its image frame in the prompt, from 1. 0 is padding.
    patch_windows: i32[P, N]; index of its attention window in the prompt, from 1. 0 is padding.
    features: outputs of the vision tower (`VLM.see`): visual tokens [P, F, D], and those of the
      DeepStack layers. None before they are computed.
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
    tokens: i32[P, G, T]; the pad token follows the end token.
    mask: bool[P, G, T]; true for response tokens, including the end token.
    logp: f32[P, G, T]; log-probability under the sampling policy at its temperature, before top-p
      and top-k are applied. 0 where the mask is false.
    text: decoded responses without special tokens, nested lists [P][G]. Not a leaf of the pytree.
  """

  tokens: Array
  mask: Array
  logp: Array
  text: Any = struct.field(pytree_node=False, default=None)


@struct.dataclass
class TokenStats:
  """Scores of given response tokens under a policy.

  Attributes:
    logp: f32[P, G, T]; log-probability of each response token at the sampling temperature.
    entropy: f32[P, G, T]; entropy of the predicted distribution, in nats.
    kl: f32[P, G, T] or None; KL(policy with the original image ‖ this view) over the whole
      vocabulary, if the objective names the view in `full_kl`.
  """

  logp: Array
  entropy: Array
  kl: Array | None = None


@struct.dataclass
class Experience:
  """The inputs of an objective, besides the TokenStats of the current policy.

  Attributes:
    mask: bool[P, G, T]; response tokens that the loss uses.
    advantages: f32[P, G, T]; from `objective.advantages`. `objective.prepare` may change them.
    old: TokenStats of the policy before the updates of the step, without gradient. This policy has
      sampled the responses, except with `pipeline="one_step_off"`. None in supervised stages, as is
      `rewards`.
    rewards: f32[P, G]; weighted sum of the verifiers.
    views: TokenStats without gradient, by name: `ref` (reference policy, original image), `masked`
      (the policy of `old`, corrupted image).
    weights: f32[P, G, T] or None; set by `objective.prepare` for the whole minibatch. The policy
      loss is the sum of weight × token loss, so that the losses of microbatches and hosts add up to
      the loss of the minibatch.
    token_weights: f32[P, G, T] or None; mask / number of tokens of the minibatch, the weights of a
      mean over tokens in penalties and metrics.
    extras: f32[P, G, T] arrays that an objective passes from `prepare` to `loss`.
    sampler_logp: f32[P, G, T] or None; `Rollout.logp`, the log-probabilities of the sampler. They
      differ slightly from those of the scorer (`old`).
    truncated: bool[P, G] or None; responses that reach max_tokens without an end token.
    current: TokenStats of the current policy for the whole minibatch, without gradient, if the
      minibatch is split and `needs_current` is True for the objective. Otherwise None.
    state: scalars that change with each update, see `Objective.initial_state`. They have no axis P.
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

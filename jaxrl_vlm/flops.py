"""Model FLOPs by formula: what the mathematics asks for, from the config alone.

A product of matrices [m, k] and [k, n] is 2·m·k·n, a multiplication and an addition each; norms,
rotations, softmax and activations are not counted, nor what is computed in vain (padding, masked
scores, layers that the backward pass computes again). A query is counted over the keys that it
sees: half of them in a causal stream. Of a mixture of experts each token's own count. Adapters
are not counted, nor that tokens of one image may see each other in both directions.
"""

from collections.abc import Sequence

from jaxrl_vlm.models.config import ModelConfig

Frame = tuple[int, int]  # rows and columns of patches, of an image or of a frame of a video


def vision(config: ModelConfig, frame: Frame) -> float:
  """The vision tower over one frame, DeepStack's mergers included."""
  v = config.vision
  rows, columns = frame
  patches, width = rows * columns, v.hidden_size
  every = range(v.depth)
  full = len(every if v.full_attention_layers is None else v.full_attention_layers)
  seen = full * patches**2
  if full < v.depth:
    side = round(v.window_patches**0.5)
    seen += (v.depth - full) * _squares(rows, side) * _squares(columns, side)
  layer = 4 * width**2 + (3 if v.gated_mlp else 2) * width * v.intermediate_size
  tokens, merged = patches // v.spatial_merge_size**2, width * v.spatial_merge_size**2
  merger = merged**2 + merged * v.out_hidden_size
  last = merger if v.merger == "mlp" else width * v.out_hidden_size
  return 2.0 * (
    patches * (v.patch_dim * width + v.depth * layer)
    + 2 * width * seen
    + tokens * (last + len(v.deepstack_layers) * merger)
  )


def _squares(length: int, side: int) -> int:
  """Σ n² over the pieces of at most `side` into which a length is cut."""
  whole, rest = divmod(length, side)
  return whole * side**2 + rest**2


def seen(tokens: int, before: int = 0, window: int = 0) -> int:
  """Keys that the queries of a causal stream see, all together: Σ_i min(before + i, window).

  Args:
    tokens: of the stream, i = 1 ... tokens.
    before: keys that all of them see besides.
    window: how far back they see, itself included; 0 is everything.
  """
  rising = tokens
  if window:  # the first queries see all there is, the others as much as the window holds
    rising = min(tokens, max(0, window - before))
  return rising * before + rising * (rising + 1) // 2 + (tokens - rising) * window


def decoder(config: ModelConfig, tokens: float, keys: float, near: float | None = None) -> float:
  """All layers over some tokens.

  Args:
    config: of the model.
    tokens: that pass through.
    keys: that they see in a layer, all together (`seen`).
    near: in a sliding layer; None: as many.
  """
  width, head = config.hidden_size, config.head_dim
  if config.moe is None:
    mlp = 3 * width * config.intermediate_size
  else:
    moe = config.moe
    mlp = width * moe.num_experts + 3 * width * moe.intermediate_size * moe.experts_per_token
  dense = 2 * width * head * (config.num_heads + config.num_kv_heads) + mlp
  sliding = sum(config.sliding_layers)
  over = (config.num_layers - sliding) * keys + sliding * (keys if near is None else near)
  return 2.0 * (config.num_layers * tokens * dense + 2 * config.num_heads * head * over)


def unembedding(config: ModelConfig, tokens: float) -> float:
  """Logits of some tokens."""
  return 2.0 * tokens * config.hidden_size * config.vocab_size


def stream(config: ModelConfig, tokens: int, before: int = 0) -> float:
  """All layers over a causal stream of tokens that see `before` keys besides."""
  return decoder(config, tokens, seen(tokens, before), seen(tokens, before, config.sliding_window))


def prefill(config: ModelConfig, length: int, frames: Sequence[Frame] = ()) -> float:
  """Reads a prompt of so many tokens and the images in it; no logits.

  `frames`: () also if the prompt has its visual tokens already (`VLM.see`).
  """
  return stream(config, length) + sum(vision(config, frame) for frame in frames)


def responses(config: ModelConfig, lengths: Sequence[int], length: int) -> float:
  """Responses of so many tokens over one prompt of `length` that has been read, with logits.

  As much to score them as to draw them. The prompt's last token opens every response, so that
  they see length - 1 keys of it.
  """
  return unembedding(config, sum(lengths)) + sum(
    stream(config, int(tokens), length - 1) for tokens in lengths
  )


def forward(
  config: ModelConfig,
  length: int,
  lengths: Sequence[int],
  frames: Sequence[Frame] = (),
  shared: bool = True,
) -> float:
  """Reads a prompt and scores responses to it: a prompt for all, or one for each if not `shared`.

  The prompt's last token is in the responses' streams.
  """
  return (1 if shared else len(lengths)) * prefill(config, length - 1, frames) + responses(
    config, lengths, length
  )


def forward_backward(
  config: ModelConfig,
  length: int,
  lengths: Sequence[int],
  frames: Sequence[Frame] = (),
  shared: bool = True,
  trains_vision: bool = True,
) -> float:
  """`forward`, and the gradient, which costs twice as much; a frozen tower only sees."""
  everything = forward(config, length, lengths, frames, shared)
  frozen = 0.0
  if not trains_vision:
    frozen = (1 if shared else len(lengths)) * sum(vision(config, frame) for frame in frames)
  return 3 * everything - 2 * frozen

"""Model FLOPs: the floating-point operations of the model's matrix products, from the config alone.

A product of matrices [m, k] and [k, n] counts as 2·m·k·n FLOPs, one multiplication and one addition
per term. A query counts with the keys that it attends to, which are half of all keys in a causal
stream. A token of a mixture of experts counts with the experts that it passes through.

Not counted are:
- norms, rotary embeddings, softmax and activation functions;
- padding, masked attention scores, and what the backward pass recomputes;
- LoRA adapters;
- bidirectional attention among the tokens of one image, which count as causal.
"""

from collections.abc import Sequence

from jaxrl_vlm.models.config import ModelConfig

Frame = tuple[int, int]  # rows and columns of patches of an image or a video frame


def vision(config: ModelConfig, frame: Frame) -> float:
  """Returns the FLOPs of the vision tower for one frame, including the DeepStack mergers."""
  v = config.vision
  rows, columns = frame
  patches, width = rows * columns, v.hidden_size
  every = range(v.depth)
  full = len(every if v.full_attention_layers is None else v.full_attention_layers)
  keys = full * patches**2  # attended to by all queries of all layers together
  if full < v.depth:
    side = round(v.window_patches**0.5)
    keys += (v.depth - full) * _squares(rows, side) * _squares(columns, side)
  layer = 4 * width**2 + (3 if v.gated_mlp else 2) * width * v.intermediate_size
  tokens, merged = patches // v.spatial_merge_size**2, width * v.spatial_merge_size**2
  merger = merged**2 + merged * v.out_hidden_size
  last = merger if v.merger == "mlp" else width * v.out_hidden_size
  return 2.0 * (
    patches * (v.patch_dim * width + v.depth * layer)
    + 2 * width * keys
    + tokens * (last + len(v.deepstack_layers) * merger)
  )


def _squares(length: int, side: int) -> int:
  """Σ n² over the lengths n of the windows: `length` split into windows of at most `side`."""
  full, rest = divmod(length, side)
  return full * side**2 + rest**2


def seen(tokens: int, before: int = 0, window: int = 0) -> int:
  """Returns the number of keys that all queries of a causal stream attend to.

  The result is Σ_i min(before + i, window) over the queries i = 1 ... `tokens`.

  Args:
    tokens: number of tokens of the stream.
    before: number of keys before the stream, to which every query attends.
    window: size of the sliding window, including the query itself; 0 for full attention.
  """
  rising = tokens
  if window:  # the first queries attend to all earlier keys, the others to a full window
    rising = min(tokens, max(0, window - before))
  return rising * before + rising * (rising + 1) // 2 + (tokens - rising) * window


def decoder(config: ModelConfig, tokens: float, keys: float, near: float | None = None) -> float:
  """Returns the FLOPs of all decoder layers for some tokens.

  Args:
    config: config of the model.
    tokens: number of tokens.
    keys: number of keys that all of them together attend to in one layer (`seen`).
    near: the same number in a sliding layer. None: as `keys`.
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
  """Returns the FLOPs of the logits of some tokens."""
  return 2.0 * tokens * config.hidden_size * config.vocab_size


def stream(config: ModelConfig, tokens: int, before: int = 0) -> float:
  """Returns the FLOPs of all decoder layers for a causal stream with `before` keys before it."""
  return decoder(config, tokens, seen(tokens, before), seen(tokens, before, config.sliding_window))


def prefill(config: ModelConfig, length: int, frames: Sequence[Frame] = ()) -> float:
  """Returns the FLOPs of prefilling one prompt, without logits.

  Args:
    config: config of the model.
    length: number of tokens of the prompt.
    frames: sizes of its images. () if the visual tokens are already computed (`VLM.see`).
  """
  return stream(config, length) + sum(vision(config, frame) for frame in frames)


def responses(config: ModelConfig, lengths: Sequence[int], length: int) -> float:
  """Returns the FLOPs of generating or scoring responses after a prefilled prompt, with logits.

  Generating and scoring have the same FLOPs. The last token of the prompt is the first input of
  every response, so the responses attend to length - 1 keys of the prompt.

  Args:
    config: config of the model.
    lengths: number of tokens of each response.
    length: number of tokens of the prompt.
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
  """Returns the FLOPs of prefilling a prompt and scoring responses to it.

  Args:
    config: config of the model.
    length: number of tokens of the prompt. The last one counts with each response.
    lengths: number of tokens of each response.
    frames: sizes of the images of the prompt.
    shared: whether the prompt is prefilled once for all responses, or else once for each.
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
  """Returns the FLOPs of `forward` and its gradient.

  The gradient has twice the FLOPs of the forward pass. If the vision tower is frozen
  (`trains_vision=False`), it has no gradient.
  """
  everything = forward(config, length, lengths, frames, shared)
  frozen = 0.0
  if not trains_vision:
    frozen = (1 if shared else len(lengths)) * sum(vision(config, frame) for frame in frames)
  return 3 * everything - 2 * frozen

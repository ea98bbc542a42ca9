"""The architecture of a model. `families.py` makes it from `config.json`."""

import dataclasses

from jax.sharding import Mesh

from jaxrl_vlm import parallel

# What a layer keeps for its backward pass: everything; only the results of matrix products and of
# attention; only its input.
REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank adapters: y = W·x + alpha / rank · B·A·x (arXiv 2106.09685).

  Attributes:
    rank: the rank of the product B·A.
    alpha: the output of the adapter is multiplied by alpha / rank.
    targets: patterns (`models/patterns.py`) of the linear layers that have an adapter.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...] = ("decoder",)


@dataclasses.dataclass(frozen=True)
class MoE:
  """A mixture of experts, which replaces the MLP of the decoder.

  Attributes:
    num_experts: number of experts in each layer.
    experts_per_token: number of experts that process each token.
    intermediate_size: number of hidden units of one expert.
  """

  num_experts: int
  experts_per_token: int
  intermediate_size: int


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower.

  Attributes:
    norm: kind of the norms, "rms" or "layer".
    gated_mlp: whether MLPs have three linear layers (gate, up, down) instead of two.
    activation: activation of the MLPs; a key of `layers.ACTIVATIONS`.
    fused_qkv: whether queries, keys and values come from one projection.
    rope_theta: base of the 2-D rotary positions; 0 means no rotary positions.
    position_grid: side of the square table of learned positions, which is interpolated to the grid
      of each image; 0 means no table.
    window_size: side of an attention window, in pixels.
    full_attention_layers: layers that attend to the whole frame; None means all. The others attend
      within windows of `window_size` pixels.
    deepstack_layers: layers whose output is also added in the first layers of the decoder
      (DeepStack).
    merger: how spatial_merge_size² patches become one visual token: "mlp", or "pool" (mean, norm
      and projection).
  """

  depth: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  out_hidden_size: int
  patch_size: int
  temporal_patch_size: int
  spatial_merge_size: int
  in_channels: int = 3
  norm: str = "rms"
  norm_eps: float = 1e-6
  gated_mlp: bool = True
  activation: str = "silu"
  fused_qkv: bool = True
  patch_bias: bool = False
  rope_theta: float = 10000.0
  position_grid: int = 0
  window_size: int | None = None
  full_attention_layers: tuple[int, ...] | None = None
  deepstack_layers: tuple[int, ...] = ()
  merger: str = "mlp"

  @property
  def patch_dim(self) -> int:
    return self.in_channels * self.temporal_patch_size * self.patch_size**2

  @property
  def window_patches(self) -> int:
    """Number of patches in a full window, whose side is rounded down to whole visual tokens."""
    assert self.window_size is not None, "window_size=None: this vision tower has no windows"
    merge = self.spatial_merge_size
    return (self.window_size // merge // self.patch_size * merge) ** 2

  @property
  def segments(self) -> tuple[tuple[int, int], ...]:
    """Ranges (first, last + 1) that divide the layers after each DeepStack layer.

    The output of a DeepStack layer is taken out at the end of a range.
    """
    ends = [i + 1 for i in self.deepstack_layers]
    ends = ends if ends and ends[-1] == self.depth else [*ends, self.depth]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A vision-language model: its decoder, its vision tower, and how they are computed.

  Attributes:
    family: `model_type` of `config.json`.
    activation: activation of the MLPs; a key of `layers.ACTIVATIONS`.
    attention_scale: factor on the products of queries and keys.
    qkv_bias: whether the projections to queries, keys and values have a bias.
    qk_norm: whether the queries and keys of each head pass through an RMS norm before rotation.
    norm_offset: whether RMS norms multiply by 1 + scale instead of scale.
    post_norms: whether there is also a norm after attention and after the MLP, before their output
      is added to the residual stream.
    embed_scale: factor on the embeddings of tokens (not of images).
    rope_factor: divisor of the positions (linear rotary scaling).
    mrope_section: number of rotary frequencies that use the position in time, height and width
      (M-RoPE); () if all use the position in the text.
    mrope_interleaved: whether the frequencies of time, height and width alternate. Otherwise they
      are in three consecutive sections.
    sliding_window: number of tokens that sliding layers attend to, up to and including the token
      of the query; 0 if no layer slides.
    sliding_layers: whether each layer slides; () if none does.
    sliding_rope_theta: rotary base of the sliding layers.
    bidirectional_images: whether the tokens of an image attend to each other in both directions.
    moe: the experts that replace the MLPs, or None.
    suppressed_tokens: ids that the policy never generates (image and vision special tokens). Its
      distribution over response tokens is renormalised without them.
    stop_tokens: ids that end a response.
    pad_token: id of the padding after the end of a response.
    lora: the adapters, or None.
    dtype: dtype of activations, "float32" or "bfloat16".
    attention: "xla" (`layers.attend`), or a kernel of `models/attention.py`: "splash" or "cudnn".
      Decoding, window attention of the vision tower, and responses in models with sliding layers
      always use "xla".
    mesh: the mesh that activations and kernels are sharded over (`VLM.on`). None if everything is
      on one device.
    rules: sharding rules of the parameters (`parallel.param_shardings`).
    remat: what each layer keeps for the backward pass, one of `REMAT`. The rest is recomputed.
    hf: the text of the `config.json` that this config was made from. `save_pretrained` writes it.
  """

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_theta: float
  tied: bool
  vision: VisionConfig
  activation: str = "silu"
  attention_scale: float = 1.0
  qkv_bias: bool = False
  qk_norm: bool = False
  norm_offset: bool = False
  post_norms: bool = False
  embed_scale: float = 1.0
  rope_factor: float = 1.0
  mrope_section: tuple[int, ...] = ()
  mrope_interleaved: bool = False
  sliding_window: int = 0
  sliding_layers: tuple[bool, ...] = ()
  sliding_rope_theta: float = 10000.0
  bidirectional_images: bool = False
  moe: MoE | None = None
  suppressed_tokens: tuple[int, ...] = ()
  stop_tokens: tuple[int, ...] = ()
  pad_token: int = 0
  lora: LoRA | None = None
  dtype: str = "float32"
  attention: str = "xla"
  mesh: Mesh | None = dataclasses.field(default=None, repr=False)
  rules: parallel.Rules = dataclasses.field(default=parallel.RULES, repr=False)
  remat: str = "dots"
  hf: str = dataclasses.field(default="{}", repr=False)

  def __post_init__(self):
    if self.remat not in REMAT:
      raise ValueError(f"remat={self.remat!r}: expected one of {', '.join(REMAT)}")

  def replace(self, **changes) -> "ModelConfig":
    return dataclasses.replace(self, **changes)

"""What a model is: sizes and switches of its parts. `families.py` reads it from `config.json`."""

import dataclasses

from jax.sharding import Mesh

from jaxrl_vlm import parallel

# What a layer keeps for its backward pass: everything; only what matrix products and attention
# gave; nothing but its input.
REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank adapters: y = W·x + alpha / rank · B·A·x (arXiv 2106.09685).

  Attributes:
    rank: columns of A.
    alpha: the adapter's output is scaled by alpha / rank.
    targets: patterns (`models/patterns.py`) of the linear layers that get one.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...] = ("decoder",)


@dataclasses.dataclass(frozen=True)
class MoE:
  """A mixture of experts in place of the decoder's MLP.

  Attributes:
    num_experts: of every layer.
    experts_per_token: how many of them each token passes through.
    intermediate_size: hidden units of one expert.
  """

  num_experts: int
  experts_per_token: int
  intermediate_size: int


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower.

  Attributes:
    norm: "rms" or "layer".
    gated_mlp: gate, up and down; otherwise two layers.
    activation: of the MLP; a key of `layers.ACTIVATIONS`.
    fused_qkv: one projection for queries, keys and values.
    rope_theta: of 2-D rotary positions; 0 for none.
    position_grid: side of the learned table of positions, interpolated to each image's grid; 0
      for none.
    full_attention_layers: layers that attend to the whole frame; None is all. The others attend
      within windows of `window_size` pixels.
    deepstack_layers: layers whose output is also added in the first layers of the decoder.
    merger: how merge² patches become a visual token: "mlp", or "pool" (mean, norm, projection).
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
    """Patches of a whole window, which is rounded down to whole visual tokens."""
    assert self.window_size is not None, "this tower has no windows"
    merge = self.spatial_merge_size
    return (self.window_size // merge // self.patch_size * merge) ** 2

  @property
  def segments(self) -> tuple[tuple[int, int], ...]:
    """(first, last + 1) layers of the stretches between which features are taken out."""
    ends = [i + 1 for i in self.deepstack_layers]
    ends = ends if ends and ends[-1] == self.depth else [*ends, self.depth]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A vision-language model: its decoder, its vision tower, and how to compute.

  Attributes:
    family: `model_type` of `config.json`.
    activation: of the MLP; a key of `layers.ACTIVATIONS`.
    attention_scale: multiplies queries · keys.
    qkv_bias: queries, keys and values have a bias.
    qk_norm: RMS norm of each head's queries and keys, before rotation.
    norm_offset: RMS norms multiply by 1 + scale.
    post_norms: also a norm after attention and after the MLP, before they are added.
    embed_scale: multiplies the embeddings of tokens (not of images).
    rope_factor: divides the positions (linear rotary scaling).
    mrope_section: how many rotary frequencies follow time, height and width; () when all
      positions are those in the text.
    mrope_interleaved: time, height and width alternate instead of one after the other.
    sliding_window: how far back the sliding layers see, in tokens; 0 where there are none.
    sliding_layers: of each layer; () where there are none.
    sliding_rope_theta: rotary base of the sliding layers.
    bidirectional_images: an image's tokens see each other in both directions.
    moe: experts in place of the MLP.
    suppressed_tokens: ids that the policy never produces (image and vision special tokens); its
      distribution over responses is renormalised without them.
    stop_tokens: ids that end a response.
    pad_token: id after the end.
    lora: where adapters are, if there are any.
    dtype: of activations; "float32" or "bfloat16".
    attention: "xla" (`layers.attend`), or a kernel of `models/attention.py`: "splash" or "cudnn".
      Decoding is always "xla", and so are window attention and responses in models whose layers
      slide.
    mesh: over whose devices activations and kernels are spread (`VLM.on`); None where everything
      is on one device.
    rules: how parameters lie on the mesh (`parallel.param_shardings`).
    remat: what each layer keeps for the backward pass, one of `REMAT`; the rest is computed again.
    hf: the `config.json` this came from, as text; `save_pretrained` writes it back.
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

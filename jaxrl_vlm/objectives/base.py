"""The base class of objectives: hashable settings with pure functions on [P, G, T] arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxrl_vlm.objectives import fields, masked
from jaxrl_vlm.types import Array, Experience, TokenStats

Metrics = dict[str, Array]
MASKS = ("patches", "semantic", "blank", "solid", "noise", "blur")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Base class of all objectives. It computes the weights of tokens, but no loss.

  A training loop uses an objective like this. `experience` holds everything about a minibatch that
  needs no gradient, and `stats` the log-probabilities of its tokens under the current policy:

      experience = objective.prepare(experience)         # once per minibatch
      metrics = objective.prepare_metrics(experience)    # once per minibatch
      for piece, stats in microbatches:                  # any split of `experience` along P
        loss, sums = objective.loss(stats, piece)        # losses, gradients and sums add up
      state = objective.next_state(experience, metrics | sums)  # scalars for the next minibatch

  Fields:
    aggregation: the rule that combines token losses into one number, see
      `masked.aggregation_weights`.
    max_length: maximum length of a response in tokens. A stage sets it to its `max_tokens`.
    loss_length: the constant by which seq-mean-token-sum-norm divides (Dr.GRPO). None means
      `max_length`. verl divides by the padded length of the batch by default, so that its loss
      depends on padding.
    filter_groups: dynamic sampling of DAPO. The loop samples until `kept` accepts enough groups.
    filter_low, filter_high: a group is kept if the mean of a value that `filter_keys` names lies
      strictly between these bounds.
    filter_keys: "accuracy", "reward" (the weighted sum), or names of verifiers. With several keys,
      it is enough that one of them keeps the group. This is the soft filter of PEARL (arXiv
      2511.18437): it keeps groups whose answers are all right but differ in another reward.
    max_tries: maximum number of rollouts per step. After them, the step uses the groups it has.
    mask_kind: corruption of the image in the `masked` view.
      "patches": random squares are black.
      "semantic": the squares that the vision tower attends to most are black.
      "blank": the image is black.
      "solid": the image has one grey level.
      "noise": Gaussian noise is added to each pixel.
      "blur": Gaussian blur.
    mask_on: "processed" corrupts the image on the device, as the model receives it (VPPO).
      "original" corrupts it on the host, before it is resized (PAPO). "semantic" requires
      "processed".
    mask_rate: for "patches", the probability that a square is black. For "semantic", the share of
      black squares.
    mask_patch: for "patches" and "semantic", the side of a square in patches of the vision tower.
      The default 1 equals the 14 pixels of VPPO on Qwen2.5-VL.
    mask_pixels: for "patches" on the original image, the side of a square in pixels.
    mask_level: for "solid", the grey level from 0 to 255. VPPO's code has 128.
    mask_noise: for "noise", the standard deviation in grey levels. VPPO's code has 189.
    mask_blur: for "blur", the standard deviation in pixels. VPPO's code has 6.
    mask_per: for "patches" and "noise", "sample" scores each sample with its own mask, which
      repeats the computation on the prompt for each sample. "prompt" uses one mask for all samples
      of a prompt. The other kinds have the same mask for all samples.
  """

  # The kind of stage that uses the objective.
  kind: ClassVar[str] = "rl"

  aggregation: str = fields.choice("token-mean", masked.AGGREGATIONS)
  max_length: int | None = fields.count(None, optional=True)
  loss_length: int | None = fields.count(None, optional=True)
  filter_groups: bool = fields.flag(False)
  filter_low: float = fields.number(0.01, least=0, most=1)
  filter_high: float = fields.number(0.99, least=0, most=1)
  filter_keys: tuple[str, ...] = fields.names(("accuracy",))
  max_tries: int = fields.count(20)
  mask_kind: str = fields.choice("patches", MASKS)
  mask_on: str = fields.choice("processed", ("processed", "original"))
  mask_rate: float = fields.number(0.5, above=0, most=1)
  mask_patch: int = fields.count(1)
  mask_pixels: int = fields.count(14)
  mask_level: float = fields.number(128.0, least=0, most=255)
  mask_noise: float = fields.number(189.0, above=0)
  mask_blur: float = fields.number(6.0, above=0)
  mask_per: str = fields.choice("sample", ("sample", "prompt"))

  def __post_init__(self):
    fields.check(self)
    if self.aggregation == "seq-mean-token-sum-norm" and not (self.loss_length or self.max_length):
      raise ValueError(
        "config.objective.loss_length=None: expected a whole number >= 1, because "
        "aggregation='seq-mean-token-sum-norm' divides by it"
      )
    if self.mask_kind == "semantic" and self.mask_on == "original":
      raise ValueError(
        "config.objective.mask_on='original': expected 'processed', because mask_kind='semantic' "
        "uses the attention of the vision tower"
      )
    if self.filter_low >= self.filter_high:
      raise ValueError(
        f"config.objective.filter_low={self.filter_low!r}: expected less than "
        f"filter_high={self.filter_high!r}"
      )

  @property
  def views(self) -> tuple[str, ...]:
    """Views that are scored without gradient. Their scores are in `experience.views`."""
    return ()

  @property
  def grad_views(self) -> tuple[str, ...]:
    """Views that are scored with gradient. Their scores are keyword arguments of `loss`."""
    return ()

  @property
  def full_kl(self) -> tuple[str, ...]:
    """Views, with or without gradient, whose TokenStats must contain `kl`."""
    return ()

  @property
  def needs_old(self) -> bool:
    """Whether more than `loss` uses `experience.old`.

    If False, a stage with one update per rollout skips the forward pass that scores `old`, because
    `old` then equals the policy that is updated.
    """
    return False

  @property
  def needs_current(self) -> bool:
    """Whether `prepare` uses `experience.current` if the minibatch is split.

    This costs one more forward pass. Without `current`, each microbatch is treated as a minibatch.
    """
    return False

  @property
  def advantage_needs(self) -> tuple[str, ...]:
    """Names of the arguments of `advantages` besides rewards and mask, see `advantages.py`."""
    return ()

  @property
  def min_samples(self) -> int:
    """Minimum number of samples of each prompt."""
    return 1

  def kept(
    self,
    accuracy: Array,
    rewards: Array | None = None,
    components: Mapping[str, Array] | None = None,
  ) -> Array:
    """Selects the groups to train on, on the host: numpy bool[P].

    A group is kept if filter_low < mean over the group < filter_high for one of `filter_keys`. All
    groups are kept if `filter_groups` is False. A verifier that does not grade the samples of a
    group has the mean NaN and does not keep the group.

    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, with the bounds of EasyR1's online filtering.

    Args:
      accuracy: [P, G], accuracy of each response.
      rewards: [P, G], weighted sum of the verifiers.
      components: [P, G] for each verifier.

    Raises:
      ValueError: `filter_keys` names a verifier that is not among the components.
    """
    keep = np.full(np.shape(accuracy)[0], not self.filter_groups)
    known = {**(components or {}), "accuracy": accuracy, "reward": rewards}
    for key in self.filter_keys if self.filter_groups else ():
      if known.get(key) is None:
        raise ValueError(
          f"config.objective.filter_keys={self.filter_keys!r}: no such verifier {key!r} "
          f"(known: {', '.join(k for k, v in known.items() if v is not None)})"
        )
      mean = np.asarray(known[key]).mean(axis=1)
      keep |= (mean > self.filter_low) & (mean < self.filter_high)
    return keep

  def advantages(self, rewards: Array, mask: Array | None = None, **more: Any) -> Array:
    """Computes the advantages from rewards [P, G] and the mask [P, G, T].

    Args:
      rewards: [P, G].
      mask: bool[P, G, T].
      **more: the arguments that `advantage_needs` names.

    Returns:
      A float32 array that broadcasts to [P, G, T].
    """
    del mask, more
    return jnp.asarray(rewards).astype(jnp.float32)[..., None]

  def penalty(
    self, old: TokenStats, ref: TokenStats, mask: Array, state: Mapping[str, Array]
  ) -> Array:
    """Returns the penalty that each token subtracts from the reward, f32[P, G, T]."""
    raise NotImplementedError

  def initial_state(self) -> dict[str, Array]:
    """Returns the first value of `experience.state`: scalars that change with each update."""
    return {}

  def next_state(self, experience: Experience, metrics: Metrics) -> dict[str, Array]:
    """Returns `experience.state` of the next minibatch, given this one and its metrics."""
    del metrics
    return dict(experience.state)

  def prepare(self, experience: Experience) -> Experience:
    """Computes the values that depend on the whole minibatch and need no gradient.

    Sets `weights` and `token_weights`, and removes from `mask` the tokens that the loss does not
    use.

    Raises:
      ValueError: the experience has been prepared before.
    """
    if experience.weights is not None:
      raise ValueError("experience.weights is set: this experience has been prepared already")
    mask = self._counts(experience, jnp.asarray(experience.mask).astype(bool))
    length = self.loss_length or self.max_length
    return dataclasses.replace(
      experience,
      mask=mask,
      weights=masked.aggregation_weights(mask, self.aggregation, length),
      token_weights=masked.aggregation_weights(mask, "token-mean"),
    )

  def prepare_metrics(self, experience: Experience) -> Metrics:
    """Returns metrics of a prepared minibatch that are not sums over microbatches."""
    del experience
    return {}

  def loss(
    self, stats: TokenStats, experience: Experience, **grad_views: TokenStats
  ) -> tuple[Array, Metrics]:
    """Returns the loss of a microbatch, a scalar, and its metrics, a dict of scalars.

    `prepare` divides the weights by totals of the minibatch. So the losses and metrics of
    microbatches add up to those of the minibatch. An experience that is not prepared is treated as
    a whole minibatch.
    """
    raise NotImplementedError

  def _counts(self, experience: Experience, mask: Array) -> Array:
    """Returns the tokens of the mask that the loss uses, bool[P, G, T]."""
    del experience
    return mask

  def _prepared(self, experience: Experience) -> Experience:
    return self.prepare(experience) if experience.weights is None else experience

  def _view(self, experience: Experience, name: str) -> TokenStats:
    if name not in experience.views:
      raise ValueError(
        f"experience.views={sorted(experience.views)}: this objective needs the view {name!r}"
      )
    return experience.views[name]

  def _check_grad_views(self, grad_views: dict[str, Any]) -> None:
    if set(grad_views) != set(self.grad_views):
      raise ValueError(
        f"objective.loss: expected stats with gradient of the views {list(self.grad_views)}, "
        f"got {sorted(grad_views)}"
      )


def minibatch_weights(experience: Experience) -> tuple[Array, Array]:
  """Returns `weights` and `token_weights` of a prepared experience."""
  assert experience.weights is not None and experience.token_weights is not None
  return experience.weights, experience.token_weights

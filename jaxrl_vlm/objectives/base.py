"""What every objective is: a hashable record of numbers with pure functions on [P, G, T] arrays."""

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
  """Interface and token weights; no loss.

  One minibatch goes through it like this (experience: everything about the minibatch that needs no
  gradient; stats: the current policy's log-probabilities of its tokens):

      experience = objective.prepare(experience)              # once, the whole minibatch
      metrics = objective.prepare_metrics(experience)         # once, the whole minibatch
      for part, stats in microbatches:                        # any split along P
        loss, sums = objective.loss(stats, part)              # losses, gradients, sums add up
      state = objective.next_state(experience, metrics | sums)  # scalars for the next minibatch

  Fields:
    aggregation: how token losses become one number, see `masked.aggregation_weights`.
    max_length: tokens of the longest response allowed; a stage fills in its `max_tokens`.
    loss_length: the constant that seq-mean-token-sum-norm divides by (Dr.GRPO); None is
      `max_length`. verl's default is the padded length of the batch, which would make the loss
      depend on padding.
    filter_groups: DAPO's dynamic sampling: the loop samples until it has enough groups of which
      `kept` is true.
    filter_low, filter_high: a group is kept if the mean of what `filter_keys` names lies strictly
      between.
    filter_keys: "accuracy", "reward" (the total) or verifiers. Of several one is enough: a soft
      filter (PEARL, arXiv 2511.18437), which keeps a group that is all right in one respect and
      mixed in another.
    max_tries: how many times the loop samples before it goes on with the groups it has.
    mask_kind: how the image of the `masked` view is corrupted: "patches", random squares black;
      "semantic", the squares black that the vision tower attends to most; "blank", all black;
      "solid", one grey; "noise", Gaussian noise on every pixel; "blur", Gaussian blur.
    mask_on: "processed": drawn on the device, of the image as the model sees it (VPPO); "original":
      drawn on the host, of the image before it is resized (PAPO). Not of "semantic".
    mask_rate: of patches: the probability that a square is blackened; of semantic: the share of
      squares.
    mask_patch: of patches and semantic: side of a square in patches of the vision tower; 1 is
      VPPO's 14 pixels on Qwen2.5-VL.
    mask_pixels: of patches on the original: side of a square in pixels.
    mask_level: of solid: the grey level, 0 to 255; VPPO's code offers 128.
    mask_noise: of noise: standard deviation in grey levels; VPPO's code offers 189.
    mask_blur: of blur: standard deviation in pixels; VPPO's code offers 6.
    mask_per: "sample": every sample is scored under a mask of its own, so the prompt's work is done
      once for each; "prompt": the samples of a prompt share one. Of patches and noise; the others
      are the same for all samples.
  """

  # The kind of stage that runs it.
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
        "asks the vision tower"
      )
    if self.filter_low >= self.filter_high:
      raise ValueError(
        f"config.objective.filter_low={self.filter_low!r}: expected less than "
        f"filter_high={self.filter_high!r}"
      )

  @property
  def views(self) -> tuple[str, ...]:
    """Views to score without gradient, into `experience.views`."""
    return ()

  @property
  def grad_views(self) -> tuple[str, ...]:
    """Views that the current policy scores with gradient: keyword arguments of `loss`."""
    return ()

  @property
  def full_kl(self) -> tuple[str, ...]:
    """Views, with or without gradient, whose TokenStats must carry `kl`."""
    return ()

  @property
  def needs_old(self) -> bool:
    """Whether anything but `loss` wants `experience.old`. If not, a stage with one update for each
    rollout does without a pass that scores it: it is the policy that is updated."""
    return False

  @property
  def needs_current(self) -> bool:
    """Whether `prepare` wants `experience.current` if a minibatch is split; without, each
    microbatch is taken for a minibatch. Costs a forward pass."""
    return False

  @property
  def advantage_needs(self) -> tuple[str, ...]:
    """What `advantages` wants besides rewards and mask, see `advantages.py`."""
    return ()

  @property
  def min_samples(self) -> int:
    """The least number of samples of a prompt for which the objective means something."""
    return 1

  def kept(
    self,
    accuracy: Array,
    rewards: Array | None = None,
    components: Mapping[str, Array] | None = None,
  ) -> Array:
    """Which groups are worth training on: numpy bool[P] from arrays [P, G]; host work.

    filter_low < mean over the group < filter_high for one of `filter_keys`; all groups if not
    `filter_groups`. NaN, a verifier that does not judge the sample, keeps nothing. Yu et al. 2025
    (DAPO), arXiv 2503.14476, with the bounds of EasyR1's online filtering.

    Args:
      accuracy: of each response.
      rewards: total.
      components: by verifier.
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
    """f32 array that broadcasts to [P, G, T], from rewards [P, G] and the mask [P, G, T].

    `more`: what `advantage_needs` names.
    """
    del mask, more
    return jnp.asarray(rewards).astype(jnp.float32)[..., None]

  def penalty(
    self, old: TokenStats, ref: TokenStats, mask: Array, state: Mapping[str, Array]
  ) -> Array:
    """What each token costs of its response's reward, f32[P, G, T]; see `advantage_needs`."""
    raise NotImplementedError

  def initial_state(self) -> dict[str, Array]:
    """Scalars that change from update to update: what `experience.state` is at first."""
    return {}

  def next_state(self, experience: Experience, metrics: Metrics) -> dict[str, Array]:
    """`experience.state` for the next minibatch, from this one and its metrics."""
    del metrics
    return dict(experience.state)

  def prepare(self, experience: Experience) -> Experience:
    """Work on the whole minibatch that needs no gradient; fills `weights` and `token_weights`.

    Raises ValueError if the experience is prepared already.
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
    """Scalars of a prepared whole minibatch; means, minima and maxima that no split adds up to."""
    del experience
    return {}

  def loss(
    self, stats: TokenStats, experience: Experience, **grad_views: TokenStats
  ) -> tuple[Array, Metrics]:
    """The loss of one microbatch, a scalar, and its metrics, a dict of scalars.

    Loss and metrics are sums of contributions that `prepare` has divided by the minibatch's
    totals: added over microbatches they are the minibatch's. An experience that is not prepared
    is taken for a whole minibatch.
    """
    raise NotImplementedError

  def _counts(self, experience: Experience, mask: Array) -> Array:
    """bool[P, G, T]; the tokens of the mask that count anywhere in the loss."""
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
  """weights and token_weights of a prepared experience."""
  assert experience.weights is not None and experience.token_weights is not None
  return experience.weights, experience.token_weights

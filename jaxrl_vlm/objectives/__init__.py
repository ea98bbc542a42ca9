"""Objectives: what is minimised, as pure functions on [P, G, T] arrays.

`create` makes one by name. A name is a class and the fields in which the method differs from the
class's defaults; overrides change any field, so methods combine: `create("vppo",
policy_loss="gspo")` is VPPO's token filter and shaping over GSPO's loss.
"""

import dataclasses
from typing import Any

from jaxrl_vlm.objectives import fields
from jaxrl_vlm.objectives.base import Metrics, Objective
from jaxrl_vlm.objectives.papo import PAPO
from jaxrl_vlm.objectives.policy_gradient import PolicyGradient
from jaxrl_vlm.objectives.sft import SFT
from jaxrl_vlm.objectives.vppo import VPPO

__all__ = ["PAPO", "SFT", "VPPO", "Metrics", "Objective", "PolicyGradient", "create", "names"]

_DAPO: dict[str, Any] = {"clip_high": 0.28, "kl_coef": 0.0, "filter_groups": True}
# PAPO's masks: a rate of 0.6, one mask for all samples of a prompt. VPPO's are `Objective`'s own.
_PAPO_MASK: dict[str, Any] = {"mask_rate": 0.6, "mask_per": "prompt"}
_SEQUENCE: dict[str, Any] = {"kl_coef": 0.0, "aggregation": "seq-mean-token-mean"}

_METHODS: dict[str, tuple[type[Objective], dict[str, Any]]] = {
  # EasyR1's GRPO: clip 0.2/0.3, dual clip 3, k3 to the reference at 0.01, token-mean. The paper
  # (arXiv 2402.03300) has clip 0.2, KL 0.04, seq-mean-token-mean and no dual clip.
  "grpo": (PolicyGradient, {}),
  # Liu et al. 2025, arXiv 2503.20783; wants loss_length.
  "dr_grpo": (
    PolicyGradient,
    {
      "advantage": "dr_grpo",
      "aggregation": "seq-mean-token-sum-norm",
      "clip_high": 0.2,
      "kl_coef": 0.0,
    },
  ),
  # Yu et al. 2025, arXiv 2503.14476; the dual clip of verl's DAPO recipe.
  "dapo": (PolicyGradient, {**_DAPO, "clip_dual": 10.0}),
  # EasyR1's and verl's GSPO examples; verl has no dual clip.
  "gspo": (
    PolicyGradient,
    {**_SEQUENCE, "policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "clip_dual": None},
  ),
  # The clip on logarithms that GMPO's authors chose, (e^-0.4, e^0.4).
  "gmpo": (
    PolicyGradient,
    {**_SEQUENCE, "policy_loss": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
  ),
  "sapo": (PolicyGradient, {**_SEQUENCE, "policy_loss": "sapo"}),
  # EasyR1's example: weights in [1, 5]. MiniMax-M1 leaves the lower side open: clip_low=1.
  "cispo": (
    PolicyGradient,
    {"policy_loss": "cispo", "clip_low": 0.0, "clip_high": 4.0, "kl_coef": 0.0},
  ),
  "papo": (PAPO, {**_PAPO_MASK, "entropy_penalty": 0.05, "masked_entropy_penalty": 0.05}),
  "papo_d": (
    PAPO,
    {
      **_DAPO,
      **_PAPO_MASK,
      "perception_coef": 0.01,
      "entropy_penalty": 0.03,
      "masked_entropy_penalty": 0.03,
    },
  ),
  "vppo": (VPPO, {**_DAPO, "entropy_penalty": 0.06}),
  "sft": (SFT, {}),
}


def names() -> tuple[str, ...]:
  """The names `create` knows."""
  return tuple(_METHODS)


def create(name: str, **overrides: Any) -> Objective:
  """The objective of that name, with some fields set to other values.

  Args:
    name: one of `names()`.
    **overrides: fields of the objective's class; its docstring says what each means.

  Raises:
    ValueError: in one line, for a name, a field or a value that does not exist.
  """
  if name not in _METHODS:
    raise ValueError(
      f"config.objective.name={name!r}: no such objective{fields.did_you_mean(name, _METHODS)} "
      f"(known: {', '.join(_METHODS)})"
    )
  cls, defaults = _METHODS[name]
  known = [field.name for field in dataclasses.fields(cls)]
  for field in overrides:
    if field not in known:
      raise ValueError(
        f"config.objective.{field}: no such field of {name!r}{fields.did_you_mean(field, known)} "
        f"(fields: {', '.join(known)})"
      )
  return cls(**(defaults | overrides))

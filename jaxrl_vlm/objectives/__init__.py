"""Objectives: losses and advantages, as pure functions on [P, G, T] arrays.

`create` makes an objective by its name. A name stands for a class, and for the fields in which the
method differs from the defaults of the class. Overrides change any field, so methods can be
combined: `create("vppo", policy_loss="gspo")` applies the token filter and the shaping of VPPO to
the loss of GSPO.
"""

import dataclasses
from typing import Any

from jaxrl_vlm.objectives import fields
from jaxrl_vlm.objectives.base import Metrics, Objective
from jaxrl_vlm.objectives.dpo import DPO
from jaxrl_vlm.objectives.papo import PAPO
from jaxrl_vlm.objectives.policy_gradient import PolicyGradient
from jaxrl_vlm.objectives.sft import SFT
from jaxrl_vlm.objectives.vppo import VPPO

__all__ = ["DPO", "PAPO", "SFT", "VPPO", "Metrics", "Objective", "PolicyGradient", "create",
           "names"]  # fmt: skip

_DAPO: dict[str, Any] = {"clip_high": 0.28, "kl_coef": 0.0, "filter_groups": True}
# The masks of PAPO: a rate of 0.6, one mask for all samples of a prompt, before the image is
# resized. The masks of VPPO are the defaults of `Objective`.
_PAPO_MASK: dict[str, Any] = {"mask_on": "original", "mask_rate": 0.6, "mask_per": "prompt"}
_SEQUENCE: dict[str, Any] = {"kl_coef": 0.0, "aggregation": "seq-mean-token-mean"}
_GSPO: dict[str, Any] = {**_SEQUENCE, "clip_low": 3e-4, "clip_high": 4e-4, "clip_dual": None}

# Fields that differ from the defaults of the class. The defaults of PolicyGradient are GRPO's.
_METHODS: dict[str, tuple[type[Objective], dict[str, Any]]] = {
  # EasyR1's GRPO: clip 0.2/0.3, dual clip 3, k3 to the reference at 0.01, token-mean. The paper
  # (arXiv 2402.03300) has clip 0.2, KL 0.04, seq-mean-token-mean and no dual clip.
  "grpo": (PolicyGradient, {}),
  # Liu et al. 2025, arXiv 2503.20783; the constant is max_length, which a stage sets to max_tokens.
  "dr_grpo": (
    PolicyGradient,
    {
      "advantage": "dr_grpo",
      "aggregation": "seq-mean-token-sum-norm",
      "clip_high": 0.2,
      "kl_coef": 0.0,
    },
  ),
  # As in verl and EasyR1: another estimator with the same clipped loss. The papers of RLOO and
  # ReMax have plain REINFORCE (policy_loss="gpg") with the KL in the reward.
  "rloo": (PolicyGradient, {"advantage": "rloo"}),
  "remax": (PolicyGradient, {"advantage": "remax"}),
  "grpo_passk": (PolicyGradient, {"advantage": "grpo_passk"}),
  "gdpo": (PolicyGradient, {"advantage": "gdpo"}),
  # arXiv 2505.23585: exactly on-policy, without KL.
  "opo": (PolicyGradient, {"advantage": "opo", "kl_coef": 0.0}),
  # The example of EasyR1: k1 in the reward at 0.001. In verl, the baseline variant has no penalty.
  "reinforce_pp": (
    PolicyGradient,
    {"advantage": "reinforce_pp", "kl": "k1", "kl_coef": 1e-3, "kl_in": "reward"},
  ),
  "reinforce_pp_baseline": (
    PolicyGradient,
    {"advantage": "reinforce_pp_baseline", "kl_coef": 0.0},
  ),
  "gpg": (PolicyGradient, {"advantage": "gpg", "policy_loss": "gpg", "kl_coef": 0.0}),
  # Yu et al. 2025, arXiv 2503.14476; the dual clip is that of verl's DAPO recipe.
  "dapo": (PolicyGradient, {**_DAPO, "clip_dual": 10.0}),
  # The examples of EasyR1 and verl. verl has no dual clip, and its gspo is gspo_token. With one
  # advantage per response, both are equal, except for token filters and other aggregations.
  "gspo": (PolicyGradient, {**_GSPO, "policy_loss": "gspo"}),
  "gspo_token": (PolicyGradient, {**_GSPO, "policy_loss": "gspo_token"}),
  # The clip of the GMPO authors, (e^-0.4, e^0.4).
  "gmpo": (
    PolicyGradient,
    {**_SEQUENCE, "policy_loss": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
  ),
  "sapo": (PolicyGradient, {**_SEQUENCE, "policy_loss": "sapo"}),
  # The example of EasyR1: weights in [1, 5]. MiniMax-M1 has no lower bound: clip_low=1.
  "cispo": (
    PolicyGradient,
    {"policy_loss": "cispo", "clip_low": 0.0, "clip_high": 4.0, "kl_coef": 0.0},
  ),
  # The shares of arXiv 2505.22617 for 7B models, and the clip of its recipe: ratios in [0, 2].
  "clip_cov": (
    PolicyGradient,
    {
      "policy_loss": "clip_cov",
      "clip_low": 1.0,
      "clip_high": 1.0,
      "cov_share": 2e-4,
      "kl_coef": 0.0,
    },
  ),
  "kl_cov": (PolicyGradient, {"policy_loss": "kl_cov", "cov_share": 2e-3, "kl_coef": 0.0}),
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
  # Wang et al. 2025, arXiv 2506.01939, with DAPO: a gradient only for the 20% of tokens with the
  # highest entropy. The paper ranks all tokens of the batch. The released VPPO code and this method
  # rank the tokens of each response.
  "token_entropy": (VPPO, {**_DAPO, "tokens": "entropy", "shaping": "none"}),
  "sft": (SFT, {}),
  "dpo": (DPO, {}),
}


def names() -> tuple[str, ...]:
  """Returns the names of all objectives."""
  return tuple(_METHODS)


def create(name: str, **overrides: Any) -> Objective:
  """Makes an objective by its name.

  Args:
    name: one of `names()`.
    **overrides: fields of the objective to change. The docstring of its class describes them.

  Raises:
    ValueError: the name, a field or a value does not exist. The message is one line.
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

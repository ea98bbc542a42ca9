"""Losses, gradients, metrics and advantages equal those computed by released PyTorch code.

`tests/reference/*.npz` contains the results of VPPO-RL a23c54b, PAPO fb63bf4 and verl 1dda039 for
random inputs, in float32 and with one microbatch. The tolerances allow for sums of some hundred
float32 terms in another order.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_vlm import objectives
from jaxrl_vlm.objectives import kl
from jaxrl_vlm.types import Experience, TokenStats

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
FILES = {name: np.load(REFERENCE / f"{name}_shared.npz") for name in ("vppo", "papo", "verl")}
CASES = [(name, case) for name, file in FILES.items() for case in json.loads(str(file["cases"]))]
BASE = {"clip_high": 0.28, "clip_dual": 3.0, "kl_coef": 0.0, "entropy_penalty": 0.0}


def inputs(name: str, key: str) -> dict[str, np.ndarray]:
  """Returns the arrays of one input set, of shapes [P, G] and [P, G, T]."""
  file = FILES[name]
  arrays = {k.split("/")[1]: file[k] for k in file.files if k.startswith(f"{key}/")}
  size = int(np.sum(arrays["group"] == arrays["group"][0]))
  return {k: x.reshape(-1, size, *x.shape[1:]) for k, x in arrays.items()}


def experience_of(x: dict[str, np.ndarray]) -> Experience:
  return Experience(
    mask=x["response_mask"].astype(bool),
    advantages=x["advantages"],
    old=TokenStats(logp=x["old_log_probs"], entropy=x["entropy"]),
    rewards=x["rewards"],
    views={
      "ref": TokenStats(logp=x["ref_log_probs"], entropy=x["entropy"]),
      "masked": TokenStats(logp=x["aug_log_probs"], entropy=x["entropy"]),
    },
  )


def fields_of(config: dict) -> dict[str, Any]:
  """Translates the options that VPPO's and PAPO's code have in common to fields of objectives."""
  fields: dict[str, Any] = dict(BASE)
  if config.get("use_kl_loss"):
    fields |= {"kl": "k3", "kl_coef": 0.01}
  if config.get("loss_avg_mode") == "seq":
    fields["aggregation"] = "seq-mean-token-mean"
  if "clip_ratio_high" in config:
    fields["clip_high"] = config["clip_ratio_high"]
  return fields


def vppo(config: dict) -> objectives.Objective:
  fields = fields_of(config)
  perception, entropy = (config.get(f"use_vppo_on_{x}") for x in ("perception", "entropy"))
  fields["tokens"] = {
    (True, None): "dependency",
    (None, True): "entropy",
    (True, True): "either",
    (None, None): "all",
  }[perception, entropy]
  fields["shaping"] = "minibatch" if config.get("use_advantage_shaping") else "none"
  fields["keep_share"] = config.get("top_p_perception_tokens", 0.4)
  fields["shaping_min"] = config.get("advantage_scaling_min", 0.9)
  fields["policy_loss"] = {None: "ppo", "gspo": "gspo"}.get(
    config.get("loss_type"), config.get("loss_type")
  )
  if config.get("use_entropy_penalty"):
    fields["entropy_penalty"] = 0.06
  return objectives.create("vppo", **fields)


def papo(config: dict) -> objectives.Objective:
  fields = fields_of(config)
  if not config.get("use_kl_prcp"):
    return objectives.create("dapo", **fields)
  fields |= {"perception_coef": 0.01, "masked_entropy_penalty": 0.0}
  if config.get("use_ori_entropy_loss"):
    fields["entropy_penalty"] = 0.03
  if config.get("use_aug_entropy_loss"):
    fields["masked_entropy_penalty"] = 0.03
  if config.get("use_kl_prcp_clipping"):
    fields["perception_clip"] = 0.2
  if config.get("use_kl_prcp_token_level_mask"):
    fields["perception_share"] = 0.2
  if config.get("kl_prcp_penalty") == "kl":
    fields["perception_kl"] = "k1"
  return objectives.create("papo_d", **fields)


def verl(case: dict, length: int) -> objectives.Objective:
  config = case["config"]
  name = {"vanilla": "ppo", "geo_mean": "gmpo", "gspo": "gspo_token"}.get(
    case["loss_name"], case["loss_name"]
  )
  fields = BASE | {
    "policy_loss": name,
    "aggregation": case["agg"],
    "clip_low": config["clip_ratio_low"],
    "clip_high": config["clip_ratio_high"],
    "clip_dual": None if name == "gspo_token" else config["clip_ratio_c"],
    "tau_positive": config["tau_pos"],
    "tau_negative": config["tau_neg"],
    "loss_length": length,
  }
  if name == "kl_cov":
    fields |= {"cov_share": config["kl_cov_ratio"], "cov_coef": config["ppo_kl_coef"]}
  return objectives.create("grpo", **fields)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[case["key"] for _, case in CASES])
def test_loss_gradient_and_metrics_equal_released_code(name, case):
  x = inputs(name, case["inputs"])
  if name == "verl":
    objective = verl(case, x["response_mask"].shape[-1])
  else:
    objective = {"vppo": vppo, "papo": papo}[name](case["config"])
  experience = objective.prepare(experience_of(x))

  def loss(logp):
    return objective.loss(TokenStats(logp=logp, entropy=x["entropy"]), experience)

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(x["log_probs"])
  expected = FILES[name][f"{case['key']}/grad"].reshape(gradient.shape)
  np.testing.assert_allclose(value, case["loss"], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
  assert np.max(np.abs(expected)) > 1e-3

  ours = objective.prepare_metrics(experience) | metrics
  if "clip_low" in ours:
    # The released code counts both sides of the clip as `higher`, and the dual clip as `lower`.
    ours["clip_low_or_high"] = ours["clip_low"] + ours["clip_high"]
  if fields_of(case["config"]).get("aggregation", "token-mean") != "token-mean":
    # The released code aggregates it like the loss. Ours is always a mean over tokens.
    del ours["nll"]
  theirs = case.get("metrics", {})
  names = {
    "approx_kl_k1": "ppo_kl",
    "nll": "entropy_loss",
    "clip_low_or_high": "pg_clipfrac_higher",
    "clip_dual": "pg_clipfrac_lower",
    "ref_kl": "kl_loss",
    "dependency_kept": "low_var_kl_mean_selected",
    "dependency_rejected": "low_var_kl_mean_rejected",
    "shaping_mean": "scaling_factor_mean",
    "masked_nll": "aug_entropy_loss",
  }
  if "combined_token_fraction" in str(theirs):
    names |= {
      "kept_share": "combined_token_fraction",
      "dependency_kept": "combined_perception_mean_selected",
      "dependency_rejected": "combined_perception_mean_rejected",
    }
  elif "perception_token_fraction" in str(theirs):
    names["kept_share"] = "perception_token_fraction"
  for ours_name, theirs_name in names.items():
    if ours_name in ours and f"actor/{theirs_name}" in theirs:
      np.testing.assert_allclose(
        ours[ours_name], theirs[f"actor/{theirs_name}"], rtol=1e-4, atol=1e-6, err_msg=ours_name
      )
  if "actor/kl_prcp_loss" in theirs:
    np.testing.assert_allclose(
      ours["perception_kl"], -theirs["actor/kl_prcp_loss"], rtol=1e-5, err_msg="perception_kl"
    )


ADVANTAGES = [
  ("vppo", "grpo", "grpo"),
  ("vppo", "rloo", "rloo"),
  ("vppo", "reinforce_pp", "reinforce_plus_plus"),
  ("verl", "grpo", "grpo"),
  ("verl", "dr_grpo", "grpo_nostd"),
  ("verl", "rloo", "rloo"),
  ("verl", "opo", "opo"),
  ("verl", "grpo_passk", "grpo_passk"),
  ("verl", "reinforce_pp", "reinforce_plus_plus"),
  ("verl", "reinforce_pp_baseline", "reinforce_plus_plus_baseline"),
]


@pytest.mark.parametrize("key", ["in0", "in1"])
@pytest.mark.parametrize(("name", "ours", "theirs"), ADVANTAGES)
def test_advantages_equal_released_code(name, ours, theirs, key):
  x = inputs(name, key)
  objective = objectives.create("grpo", advantage=ours)
  mask = x["response_mask"].astype(bool)
  advantages = np.broadcast_to(objective.advantages(x["rewards"], mask), mask.shape)
  # Compare only response tokens, because VPPO's copy of REINFORCE++ leaves values on padding.
  expected = x[f"adv_{theirs}"][mask]
  atol = 1e-6 * np.abs(expected).max()
  np.testing.assert_allclose(advantages[mask], expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("key", ["in0", "in1"])
@pytest.mark.parametrize(
  ("ours", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl"), ("abs", "abs")]
)
def test_kl_estimators_equal_released_code(ours, theirs, key):
  x = inputs("vppo", key)
  penalty = kl.ESTIMATORS[ours](jnp.asarray(x["log_probs"]), jnp.asarray(x["ref_log_probs"]))
  valid = x["response_mask"].astype(bool)
  # The released code computes exp(d) − d − 1 with an error of up to one ulp of 1.
  expected = x[f"klpen_{theirs}"][valid]
  np.testing.assert_allclose(penalty[valid], expected, rtol=1e-5, atol=2e-7)

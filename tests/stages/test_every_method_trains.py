"""Runs the RL loop with every method, which must get its inputs and have its metrics logged."""

import shutil

import numpy as np
import pytest

from jaxrl_vlm import metrics, objectives, train
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.stages import loading, rl
from tests import tiny_run


def get_config(steps=2, **objective):
  config = tiny_run.get_config()
  _, stage = config.stages
  stage.steps, stage.eval.examples = steps, 0
  stage.rewards["format"] = 0.1  # in addition to variety
  stage.accuracy = "variety"
  stage.objective.name = objective.pop("name")
  for field, value in objective.items():
    stage.objective[field] = value
  config.stages = (stage,)
  return config


def records_of(workdir):
  return [r for r in metrics.read(workdir) if "train/loss" in r]


# Name of the method: (fields of the objective, metrics that the run must log). Together, these
# methods need every input that the loop can provide.
CASES = {
    "dr_grpo": ({"overlong_buffer": 4, "mask_overlong": True},
                {"overlong_penalty", "truncated_share", "zero_advantage_share"}),
    "rloo": ({"kl": "full", "kl_target": 0.01}, {"ref_kl", "kl_coef"}),
    "reinforce_pp": ({"kl": "full"}, {"ref_kl"}),
    "remax": ({"correction": "mis"}, {"correction_mean", "correction_cut"}),
    "gdpo": ({}, {"entropy", "nll", "approx_kl_k1", "clip_high", "clip_low"}),
    "clip_cov": ({"cov_low": 0.0, "cov_share": 0.2}, {"cov_tokens"}),
    "dapo": ({"filter_keys": ("accuracy", "reward"), "max_tries": 2}, {"clip_dual"}),
    "papo": ({"anneal_updates": 8}, {"perception_kl", "masked_nll", "anneal"}),
    "papo_d": ({"perception_kl": "full", "masked_gradient": True, "mask_per": "sample",
                "filter_groups": False}, {"perception_kl", "masked_nll"}),
    "vppo": ({"dependency": "full", "mask_kind": "semantic", "filter_groups": False},
             {"dependency", "dependency_kept", "dependency_rejected", "kept_share",
              "shaping_mean", "shaping_min", "shaping_max"}),
    "token_entropy": ({"filter_groups": False}, {"kept_share"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_and_logs_its_metrics(name, tmp_path, one_device):
  settings, logged = CASES[name]
  config = get_config(name=name, **settings)
  config.stages[0].microbatches = 2 if name == "clip_cov" else 1
  config.stages[0].minibatches = 2 if name == "papo_d" else 1
  train.train(config, tmp_path)
  records = records_of(tmp_path)
  assert [r["step"] for r in records] == [1, 2]
  for record in records:
    assert all(np.isfinite(v) for v in record.values() if isinstance(v, float)), record
    # This model rarely ends a response. If all responses are truncated, a method that excludes
    # truncated responses has no gradient.
    truncated = record.get("objective/truncated_share", 0)
    assert (record["train/grad_norm"] > 0) == (truncated < 1)
    assert {f"objective/{metric}" for metric in logged} <= record.keys()
    if name == "dr_grpo":
      assert truncated == record["train/cut_share"] > 0
  if name == "vppo":
    assert records[0]["objective/dependency"] > 0
  if name == "papo":
    assert records[1]["objective/anneal"] == 1 - 1 / 8


@pytest.mark.slow
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_new_adapters_have_zero_kl_to_the_reference(kl_in, tmp_path, one_device):
  """The reference is the model without adapters. After the first update, the KL is above 0."""
  config = tiny_run.get_lora_config()
  stage = config.stages[0]
  stage.steps, stage.objective.name = 2, "grpo"
  stage.objective.kl, stage.objective.kl_in = "full", kl_in
  config.stages = (stage,)
  train.train(config, tmp_path)
  first, second = (r["objective/ref_kl"] for r in records_of(tmp_path))
  assert first == pytest.approx(0, abs=1e-6)
  assert second > 1e-5


def test_host_masks_depend_on_the_seed_the_step_and_the_row(monkeypatch, tmp_path, one_device):
  """`mask_per` selects one masked image per prompt or per sample. Each has a seed of its own.

  A second run of the same config corrupts the images in the same way.
  """
  calls = []
  corrupt = rl.corrupt_images

  def recorded(example, **settings):
    calls.append((settings, corrupt(example, **settings).images))
    return corrupt(example, **settings)

  monkeypatch.setattr(rl, "corrupt_images", recorded)
  for per, rows in (("prompt", 1), ("sample", 2)):
    runs = []
    for attempt in range(2):
      calls.clear()
      config = get_config(name="papo", mask_per=per, mask_pixels=9)
      train.train(config, tmp_path / f"{per}{attempt}")
      assert len(calls) == 2 * 4 * rows and calls[0][0]["patch"] == 9 and calls[0][0]["rate"] == 0.6
      assert len({settings["seed"] for settings, _ in calls}) == len(calls)
      runs.append([images for _, images in calls])
    assert runs[0] == runs[1]


def test_a_resumed_run_restores_the_state_of_the_objective(tmp_path, one_device):
  settings = {"kl_target": 1e-4, "kl_horizon": 20, "anneal_updates": 5}
  config = get_config(steps=3, name="papo", **settings)
  config.checkpoint.every, config.checkpoint.keep = 1, 10
  train.train(config, tmp_path / "once")
  shutil.copytree(tmp_path / "once", tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "3")
  shutil.rmtree(tmp_path / "again" / "model")
  train.train(config, tmp_path / "again")
  once, again = (records_of(tmp_path / name) for name in ("once", "again"))
  for key in ("objective/kl_coef", "objective/anneal", "train/loss"):
    assert [r[key] for r in again] == [r[key] for r in once]
  assert [r["objective/anneal"] for r in once] == pytest.approx([1, 0.8, 0.6])
  # A step has 8 responses, and kl_horizon is 20. So kl_coef changes by a factor of at most
  # 1 ± 0.2 · 8 / 20 per step.
  factors = np.divide(
    *(
      np.array([r["objective/kl_coef"] for r in once])[s] for s in (slice(1, None), slice(None, -1))
    )
  )
  assert np.all(np.abs(factors - 1) <= 0.08 + 1e-6) and np.any(np.abs(factors - 1) > 0.01)


# -- Errors that are raised before training -------------------------------------------------------


def refusal(config, tmp_path):
  """Returns the message of the UserError of a run, which must not write a checkpoint."""
  with pytest.raises(UserError) as error:
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run" / "checkpoints").exists()
  return str(error.value)


@pytest.mark.parametrize("name", ["vppo", "papo"])
def test_a_masked_view_requires_images_in_the_dataset(name, tmp_path, one_device):
  config = get_config(name=name)
  config.stages[0].data.options = {"live": True, "tasks": ("arithmetic",)}
  assert refusal(config, tmp_path).startswith(
    f"config.stages[0]: objective.name='{name}': needs the view 'masked'"
  )
  path = tmp_path / "text.jsonl"
  path.write_text('{"id": "1", "question": "1+1?", "answer": "2"}\n')
  config.stages[0].data.name, config.stages[0].data.options = str(path), {}
  assert "have no images" in refusal(config, tmp_path)


def test_grpo_requires_at_least_two_samples_per_prompt(tmp_path, one_device):
  config = get_config(name="grpo")
  config.stages[0].num_samples = 1
  assert "num_samples=1: expected at least 2" in refusal(config, tmp_path)


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_an_rl_stage_refuses_an_objective_of_another_kind(name, tmp_path, one_device):
  message = refusal(get_config(name=name), tmp_path)
  assert f"objective.name='{name}': expected an objective of 'rl' stages" in message


def test_filter_keys_must_name_a_verifier(tmp_path, one_device):
  config = get_config(name="dapo", filter_keys=("acuracy",))
  message = refusal(config, tmp_path)
  assert "filter_keys=('acuracy',): no such verifier" in message and "accuracy" in message


def test_a_negative_kl_coef_is_refused(tmp_path, one_device):
  assert "config.objective.kl_coef=-1: expected a number >= 0" in refusal(
    get_config(name="grpo", kl_coef=-1), tmp_path
  )


def test_max_length_defaults_to_the_max_tokens_of_the_stage():
  config = get_config(name="dr_grpo")
  assert loading.objective_of(config.stages[0]).max_length == 8
  config.stages[0].objective.max_length = 5
  assert loading.objective_of(config.stages[0]).max_length == 5
  assert objectives.create("dr_grpo", loss_length=3).max_length is None

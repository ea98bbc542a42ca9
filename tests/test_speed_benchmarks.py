"""Tests the calculations of the speed benchmarks, and runs each of them on a tiny model.

No test asserts a speed.
"""

import dataclasses
import json
import sys
import time

import jax
import numpy as np
import pytest

from benchmarks import gpu, growth, host, speed, update
from jaxrl_vlm import flops, models, scratch
from jaxrl_vlm.stages import programs
from tests import tiny_run

TEXTS = [f"the word {i}" for i in range(400)]


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
  """Turns off most optimizations of XLA, because these programs run only once or twice."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def config():
  return scratch.model_config(tiny_run.ARCHITECTURE)


# -- Shared code ----------------------------------------------------------------------------------


def test_stored_results_are_not_measured_again(tmp_path):
  path, calls = tmp_path / "results.json", []

  def measure():
    calls.append(1)
    return {"value": len(calls)}

  results = speed.Results(path)
  assert results.get("one", measure, threads=2)["value"] == 1
  assert results.get("two", measure, "torch")["value"] == 2
  assert list(json.loads(path.read_text())) == ["one", "two", "about"]
  again = speed.Results(path)
  assert again.get("one", measure)["value"] == 1 and len(calls) == 2
  about = json.loads(path.read_text())["about"]
  assert about["versions"]["jax"] == jax.__version__ and "torch" in about["versions"]
  assert {"date", "machine", "python"} <= set(about)
  assert speed.Results(path, again=True).get("one", measure)["value"] == 3


def test_measured_functions_run_alternately_and_warm_up_turns_are_not_counted():
  order = []
  seconds = speed.take_turns({name: lambda n=name: order.append(n) for name in "ab"}, 2)
  assert order == list("ababab")
  assert [len(values) for values in seconds.values()] == [2, 2]
  turns = {"slow": [2.0, 9.0, 3.0], "fast": [1.0, 3.0, 1.0]}
  assert speed.ratio(turns, "slow", "fast") == 3.0
  assert speed.median(turns) == {"slow": 3.0, "fast": 1.0}


@pytest.mark.parametrize("side", [0, 4])
def test_synthetic_prompts_have_the_structure_of_real_prompts(config, side):
  prompt = speed.make_prompt(config, 2, 10, side)
  tokens, image = side**2 // 4, json.loads(config.hf)["image_token_id"]
  assert prompt.tokens.shape == (2, 10 + tokens) and (prompt.length == 10 + tokens).all()
  assert ((prompt.tokens == image).sum(1) == tokens).all()
  np.testing.assert_array_equal(prompt.feature_index >= 0, prompt.tokens == image)
  assert (prompt.patch_segments > 0).sum() == 2 * side**2
  assert (prompt.next_position == 10 + side // 2).all()
  want = models.dummy_prompt(config, 2, 10 + tokens, max(side**2, 4))
  assert jax.tree.map(np.shape, prompt) == jax.tree.map(np.shape, want)


# -- Benchmarks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  scratch.create(path, tiny_run.ARCHITECTURE, TEXTS)
  return path


def test_update_benchmark(folder, monkeypatch):
  monkeypatch.setattr(update, "GROUP", 2)
  case = update.Case("small", side=4, prompts=2)
  # `measure` raises an error if the norms of the three gradients differ.
  result = update.measure(folder, case, repeats=1, product=64)
  lengths = [64] * 2
  config = models.from_directory(folder)
  shared = 2 * flops.forward_backward(config, update.TEXT + 4, lengths, [(4, 4)])
  assert result["model_flops"]["shared"] == shared
  separate = 4 * flops.forward_backward(config, update.TEXT + 4, lengths[:1], [(4, 4)])
  assert result["fewer_flops"] == pytest.approx(separate / shared)
  assert result["share"] == pytest.approx((result["faster"] - 1) / (result["fewer_flops"] - 1))
  assert result["padding"] == 0  # the 256 response tokens fill a pass of 256 tokens
  assert "target: 70%" in update.describe(case.name, result)


def test_padding_is_the_share_of_computed_tokens_outside_responses():
  mask = np.arange(32) < np.array([[[20], [4]]])
  packing = programs.Packing(np.zeros((1, 2, 1, 3), np.int32), np.array([2]), 16)
  assert update.padding(packing, mask) == 1 - 24 / (2 * 3 * 16)
  lengths = update.tail((4000,), 1024)
  assert lengths.max() == 1024 and 60 < np.median(lengths) < 110


@pytest.mark.slow
def test_preprocessing_and_grading_benchmarks():
  # `preprocessing` raises an error if the patches differ from those of transformers.
  found = host.preprocessing(count=1, repeats=1)
  assert set(found) == {"decoded", "JPEG"}
  graded = {
    name: host.grading(name, 1, prompts=4, group=2, repeats=1) for name in ("math", "exact")
  }
  # Half of the responses are right. Unlike `exact`, `math` accepts any notation of a fraction.
  assert graded["math"]["mean_reward"] == 0.5
  assert graded["exact"]["mean_reward"] == 0.25


def test_the_trace_counts_calls_with_an_idle_device_separately():
  trace = host.Trace()
  busy = iter([True, False, True])
  trace.in_flight = lambda: next(busy)
  wait = trace.watch("grade", time.sleep)
  trace.next_step()
  for _ in range(3):
    wait(0.02)
  trace.next_step()
  assert 0.06 <= trace.inside[0]["grade"] <= trace.steps[0]
  assert 0.02 <= trace.idle[0]["grade"] <= trace.inside[0]["grade"] - 0.04
  share = trace.shares(warm_up=0)["grade"]
  assert share["main_thread"] == trace.inside[0]["grade"] / trace.steps[0]
  text = host.describe("tiny", {"shares": {"grade": share}, "step_seconds": 1.0})
  assert text.startswith("RL step, tiny, 1.00 s: grade ")


def test_the_phases_of_a_step_are_drawn(tmp_path):
  parts = {part: 0.5 + i for i, part in enumerate([*host.PARTS, "everything else"])}
  values = {
    f"parts, {name}": {"parts": parts, "step_seconds": sum(parts.values())} for name in host.RUNS
  }
  host.draw(values, tmp_path / "step.png")
  assert (tmp_path / "step.png").stat().st_size > 5_000


@pytest.mark.slow
def test_growth_benchmark_measures_a_point(config, monkeypatch):
  monkeypatch.setattr(growth, "ARCHITECTURE", tiny_run.ARCHITECTURE)
  point = growth.Point(prompts=2, group=2, prompt=16, response=8, vocabulary=320)
  found = growth.measure("rollout", point, repeats=1)
  assert found["memory"] >= 0 and found["process"] >= found["before"]
  assert growth.model_flops("update", point) == 3 * growth.model_flops("rollout", point)
  assert growth.model_flops("rollout", point) == 2 * flops.forward(config, 16, [8, 8])


@pytest.mark.slow
def test_growth_benchmark_prints_its_table_and_draws_its_plot(tmp_path, monkeypatch, capsys):
  assert growth.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
  values = {}
  for axis, sizes in growth.AXES.items():
    for size in sizes:
      for work in growth.WORK:
        point = dataclasses.replace(growth.Point(), **{axis: size})
        values[point.name(work)] = {
          "seconds": 1e-12 * growth.model_flops(work, point),
          "memory": float(size),
        }
  path = tmp_path / "growth.json"
  path.write_text(json.dumps(values))
  monkeypatch.setattr(sys, "argv", ["growth.py", "--page", f"--out={path}"])
  growth.main()
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2 + 2 * len(growth.AXES)
  # The seconds of this test are proportional to model FLOPs, so the slopes must be equal.
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines[2:]]
  assert all(row[6] == row[7] for row in cells)
  assert cells[0][:4] == ["responses of a prompt (G)", "1", "32", "rollout"]
  growth.draw(values, tmp_path / "growth.png")
  assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_gpu_benchmark_on_a_very_small_model(config, tmp_path, monkeypatch):
  size = gpu.TINY
  result = gpu.measure(config, size)
  parts = result["parts"]
  assert set(parts) == {
    "copy of the prompts",
    "vision tower",
    "rollout",
    "packing and advantages",
    "update",
  }
  assert 0 < sum(parts.values()) <= result["step_seconds"]
  assert result["update_mfu"] == pytest.approx(
    result["model_flops"] / parts["update"] / result["product_flops"]
  )
  assert "target: 45%" in gpu.describe("card", result)

  params = models.abstract_params(config)
  weights = sum(x.size for x in jax.tree.leaves((params["decoder"], params["head"])))
  # Bytes of a position: keys and values, 2 layers, 2 heads of size 8, float32.
  kv = 2 * 2 * 2 * 8 * 4
  step = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
  want = 4 * weights + size.prompts * kv * (12 - 1 + size.group * 6)
  assert gpu.decode_bytes(config, step, 12, size) == want

  monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={tmp_path / 'gpu.json'}"])
  with pytest.raises(SystemExit, match="no GPU: jax finds 'cpu'"):
    gpu.main()


def test_gpu_benchmark_chooses_the_attention_kernel_of_the_gpu():
  class Card:
    platform, device_kind, compute_capability = "gpu", "a card", "9.0"

  config = gpu.large([Card()])
  assert (config.attention, config.dtype, config.remat) == ("cudnn", "bfloat16", "dots")
  assert gpu.large(jax.devices()).attention == "xla"

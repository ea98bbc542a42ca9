"""Tests `jaxrl_vlm.plan`: the numbers of a plan, the search for a mesh, and its error messages."""

import contextlib
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys
import types

import pytest

from benchmarks import plan as benchmark
from jaxrl_vlm import config as config_lib
from jaxrl_vlm import flops, models, plan
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.models.published import CONFIGS
from jaxrl_vlm.planning import compiled, roofline, step
from jaxrl_vlm.planning.hlo import Cost
from jaxrl_vlm.rollout.schedule import Layout

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30

# A small model with the head size of published models (128), trained with dynamic sampling.
TINY = """
import base


def get_config():
  c = base.get_config()
  c.model.scratch = {
      "tie_word_embeddings": True, "min_pixels": 28 * 28, "max_pixels": 896 * 896,
      "text": {
          "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2,
          "rope_parameters": {
              "rope_type": "default", "mrope_section": (16, 24, 24), "rope_theta": 1e6}},
      "vision": {
          "depth": 2, "hidden_size": 160, "intermediate_size": 256, "num_heads": 2,
          "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
          "fullatt_block_indexes": (1,)}}
  c.prompt_buckets, c.patch_buckets = (256,), (256,)
  c.rollout.tensor = 2
  stage = base.rl()
  stage.steps, stage.prompts_per_step, stage.num_samples, stage.max_tokens = 1, 8, 2, 256
  stage.objective.name = "vppo"
  stage.rewards = {"exact": 1.0}
  stage.data.name = "digit_boards"
  c.stages = (stage,)
  return c
"""
PROGRAMS = [
  "init_state",
  "see",
  "reshard",
  "prefill",
  "decode",
  "compact",
  "score",
  "score_masked",
  "advantages",
  "compare",
  "update",
]


@pytest.fixture
def tiny(tmp_path):
  path = tmp_path / "tiny.py"
  path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'configs')!r})\n{TINY}")
  return path


def command(*arguments, cwd=ROOT):
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
  return subprocess.run(
    [sys.executable, "-m", "jaxrl_vlm.plan", *map(str, arguments)],
    cwd=cwd,
    env=env | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=500,
  )


# -- The whole command ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_plan_of_a_small_model(tiny, tmp_path):
  pytest.importorskip("libtpu")
  out = tmp_path / "plan.json"
  given = f"--config={tiny}", "--topology=v5e:2x2", f"--cache={tmp_path / 'cache'}", f"--out={out}"
  done = command(*given)
  assert done.returncode == 0, done.stderr
  (result,) = json.loads(out.read_text())["stages"]
  rows = {row["program"]: row for row in result["programs"]}
  assert list(rows) == PROGRAMS
  assert result["fits"] and all(row["fits"] for row in rows.values()) and not result["refusal"]

  # Full attention of the vision tower and attention of the decoder use the splash kernels: one for
  # the forward pass and two for the gradient.
  assert {name.split("_")[2] for name in rows["update"]["kernels"]} == {"fwd", "dq", "dkv"}
  assert "splash_mha_dq" in done.stdout
  # The sizes of this config need no padding, so the compiled FLOPs are close to the model FLOPs.
  for name in ("see", "prefill", "decode", "score", "score_masked", "update"):
    row = rows[name]
    assert row["compiled_flops"] == pytest.approx(row["model_flops"], rel=0.06), name
    assert row["seconds"][row["bound"]] == max(row["seconds"].values())
    assert row["step_seconds"] == row["runs"] * max(row["seconds"].values())
  # Only the loops over the passes of packed responses have a trip count that depends on the data.
  assert {name: row["unknown_loops"] for name, row in rows.items() if row["unknown_loops"]} == {
    "score": 1,
    "score_masked": 1,
    "update": 1,
  }
  # Weights are sharded over four chips: each chip gathers three quarters of them from the others.
  assert rows["update"]["collectives"]["all-gather"] > 0
  held = result["holds"]
  for name in ("prefill", "decode"):
    assert rows[name]["peak"] > held["parameters"] + held["optimizer"]
  assert sum(result["split"].values()) == pytest.approx(result["step_seconds"])
  assert result["tokens_per_second_per_chip"] == pytest.approx(
    8 * 2 * 256 / result["step_seconds"] / 4
  )

  # The printed tables contain the same numbers as the JSON file.
  assert done.stdout.strip() == plan.report(result)
  shown = done.stdout.splitlines()
  for name, row in rows.items():
    memory, times = (line.split() for line in shown if line.startswith(f"{name} "))
    assert memory[1:] == [
      *(f"{row[k] / GIB:.2f}" for k in ("arguments", "temporaries", "needs", "beside", "peak")),
      "yes",
    ]
    assert times[1] == f"{row['runs']:g}" and times[-1] == f"{row['step_seconds']:.2f}"

  # The second time, all programs come from the cache. With --json, only the result is printed.
  again = command(*given, "--json")
  assert again.returncode == 0, again.stderr
  assert again.stderr.count("read from the cache") == len(PROGRAMS)
  assert json.loads(again.stdout) == json.loads(out.read_text())


@pytest.mark.slow
def test_a_plan_that_does_not_fit_ends_with_one_line_of_advice(tiny, tmp_path):
  pytest.importorskip("libtpu")
  done = command(
    f"--config={tiny}",
    "--topology=v5e:2x2",
    f"--cache={tmp_path}",
    "--config.prompt_buckets=(4096,)",
    "--config.patch_buckets=(16384,)",
    "--config.stages[0].prompts_per_step=1024",
    "--config.stages[0].microbatches=2",
    "--config.stages[0].max_tokens=32",
    "--config.rollout.groups=8",
  )
  assert done.returncode == 2, done.stderr
  message = done.stderr.splitlines()[-1]
  assert message.startswith("v5e:2x2: update does not fit (also too large, in GiB: ")
  assert "GiB more than the 15.75 GiB available (prompts " in message
  assert "by the formulas, config.stages[0].microbatches=4 saves most" in message
  assert "the slice v5e:2x4 saves " in message
  assert "  NO" in done.stdout


@pytest.mark.slow
def test_a_search_finds_a_mesh_for_all_stages_and_prints_its_flags(tiny, tmp_path):
  """The model has two heads, so only `mesh.tensor` 1 and 2 are possible.

  On four chips, two prompts can be divided only with `mesh.tensor=2`.
  """
  pytest.importorskip("libtpu")
  stages = tmp_path / "stages.py"
  two_heads = tiny.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 2')
  two_heads = two_heads.replace('"hidden_size": 512', '"hidden_size": 256')
  stages.write_text(
    two_heads.replace(
      "  c.stages = (stage,)",
      """
  first, second = base.sft(), base.sft()
  for one, prompts in ((first, 4), (second, 8)):
    one.prompts_per_step, one.max_tokens, one.steps = prompts, 256, 5
    one.data.name = "digit_boards"
  c.stages = (first, second)""",
    )
  )
  given = f"--config={stages}", f"--cache={tmp_path / 'cache'}"

  wrong = command(*given, "--topology=v5e", "--search", "--response_tokens=999")
  assert wrong.returncode == 2
  assert wrong.stderr.splitlines()[-1] == (
    "--response_tokens=999: expected 1 to config.stages[0].max_tokens=256"
  )

  done = command(*given, "--topology=v5e:2x2", "--search", f"--out={tmp_path / 'found.json'}")
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "found.json").read_text())["stages"]
  tried = [line for line in done.stderr.splitlines() if " s per step: --config.mesh" in line]
  assert len(tried) == 2 and "mesh.fsdp=4" in "".join(tried)
  label, _, flags = done.stdout.splitlines()[-1].partition(": ")
  assert label == "flags" and flags == tried[0].partition(" per step: ")[2]
  assert [stage["mesh"] for stage in found] == 2 * [found[0]["mesh"]]
  again = command(*given, "--topology=v5e:2x2", "--json", *shlex.split(flags))
  assert again.returncode == 0, again.stderr
  assert json.loads(again.stdout)["stages"] == found

  smallest = command(
    *given, "--topology=v5e", "--search", "--json", "--config.stages[0].prompts_per_step=2"
  )
  assert smallest.returncode == 0, smallest.stderr
  found = json.loads(smallest.stdout)["stages"]
  assert [(stage["topology"], stage["mesh"]["tensor"]) for stage in found] == 2 * [("v5e:2x2", 2)]


def test_a_search_sorts_meshes_by_time_and_stops_at_the_smallest_slice(monkeypatch):
  """Plans are replaced by numbers. The second stage has `steps=0`, which counts as one step."""
  stages = [types.SimpleNamespace(steps=5), types.SimpleNamespace(steps=0)]
  said: list[str] = []

  def request(tensor):
    config = types.SimpleNamespace(stages=stages)
    return types.SimpleNamespace(config=config, tensor=tensor, say=said.append)

  def plan_stage(candidate, index, tpu_slice, all_of_it):
    tensor, chips = candidate.tensor, tpu_slice.chips
    return {
      "stage": index,
      "fits": chips * tensor >= 16,
      # tensor=2 is faster in the first stage, tensor=4 in the second one.
      "step_seconds": {1: 9.0, 2: 1.0 + index, 4: 1.2 - index}[tensor],
      "mesh": {"slice": 1, "fsdp": chips // tensor, "tensor": tensor},
      "rollout_tensor": 4 if tensor == 4 else 0,
      "microbatches": index + 1,
      "complete": all_of_it,
    }

  monkeypatch.setattr(plan, "plan_stage", plan_stage)
  monkeypatch.setattr(plan, "meshes", lambda *_: ((n, request(n)) for n in (1, 2, 4)))
  slices = {tpu_slice.chips: tpu_slice for tpu_slice in roofline.slices(roofline.CHIPS["v5e"])}

  found = plan.fastest(request(0), slices[8])
  assert [results[0]["mesh"]["tensor"] for results in found] == [4, 2]  # 5 * 1.2 + 0.2, 5 * 1 + 2
  assert plan.flags(found[0]) == (
    "--config.mesh.slice=1 --config.mesh.fsdp=2 --config.mesh.tensor=4 --config.rollout.tensor=4 "
    "'--config.stages[0].microbatches=1' '--config.stages[1].microbatches=2'"
  )
  assert said == [f"v5e:2x4, config.mesh.tensor={n}" for n in (1, 2, 4)]

  results = plan.smallest(request(0), roofline.CHIPS["v5e"])
  assert [result["mesh"] for result in results] == [{"slice": 1, "fsdp": 1, "tensor": 4}] * 2
  assert all(result["complete"] for result in results)

  monkeypatch.setattr(plan, "meshes", lambda *_: iter(()))
  with pytest.raises(UserError, match="^--topology=v5e:2x4: no mesh fits; .*--topology=v5e$"):
    plan.fastest(request(0), slices[8])
  with pytest.raises(UserError, match="^--topology=v5e: the config does not fit on any slice"):
    plan.smallest(request(0), roofline.CHIPS["v5e"])


# -- Errors ---------------------------------------------------------------------------------------


def assert_refused(*arguments):
  """Runs the command in this process and checks that it exits with status 2."""
  given = [sys.argv[0], *map(str, arguments)]
  old, sys.argv = sys.argv, given
  try:
    with pytest.raises(SystemExit) as stopped:
      plan.run(given[1:])
  finally:
    sys.argv = old
  assert stopped.value.code == 2


def test_error_messages_are_one_line(tiny, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(plan, "prepare", lambda: None)
  monkeypatch.setattr(plan, "compiler", contextlib.nullcontext)

  def message(*arguments):
    assert_refused(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    return line

  config = f"--config={tiny}"
  line = message(config, "--topology=v5e:4x5")
  assert line.startswith("--topology=v5e:4x5: no such topology; did you mean 'v5e:4x")
  assert "valid: v5e:{2x2,2x4,4x4,4x8,8x8,8x16,16x16}" in line
  line = message(config, "--topology=v5e")
  assert "no such topology" in line and "v5e:{2x2," in line
  line = message(config, "--topology=v9:2x2")
  assert all(f"{name}:{{" in line for name in roofline.CHIPS)
  assert message(config, "--topology=v5", "--search") == (
    "--topology=v5: no such TPU; did you mean 'v5p' or 'v5e'?"
  )
  assert message(config, "--topology=v5e:2x2", "--length=many") == (
    "--length=many: expected a whole number"
  )
  assert message(config, "--topology=v5e:2x2", "--search=maybe") == (
    "--search=maybe: expected true or false"
  )
  assert "no such file" in message("--config=nothing.py", "--topology=v5e:2x2")
  assert message(config).startswith("--topology is missing")


def test_without_libtpu_the_error_says_how_to_install_it(tiny, capsys, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
  )
  assert_refused(f"--config={tiny}", "--topology=v5e:2x2")
  assert capsys.readouterr().err == (
    "libtpu, the TPU compiler, is not installed: pip install -e '.[plan]'\n"
  )


def test_the_architecture_is_read_from_a_directory_or_a_published_name(tiny, tmp_path):
  config = config_lib.load_config_file(str(ROOT / "configs" / "vppo_7b.py"))
  for path, name in (
    ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B"),
    ("/models/Qwen2.5-VL-72B-Instruct", "Qwen2.5-VL-72B"),
    ("Qwen3-VL-30B-A3B-Thinking", "Qwen3-VL-30B-A3B"),
    ("gemma-3-4b", "gemma-3-4b"),
  ):
    config.model.path = path
    found = step.architecture(config)
    assert found == models.from_hf(CONFIGS[name], dtype="bfloat16", remat="full")
  config.model.path = "Qwen2.5-VL-8B"
  with pytest.raises(UserError, match=r"config\.model\.path='Qwen2.5-VL-8B'.*did you mean 'Qwen2"):
    step.architecture(config)
  directory = tmp_path / "mine"
  directory.mkdir()
  (directory / "config.json").write_text(json.dumps(CONFIGS["Qwen3-VL-2B"]))
  config.model.path, config.model.dtype = str(directory), "float32"
  found = step.architecture(config)
  assert found.num_layers == 28 and found.dtype == "float32"


def test_needed_memory_is_read_from_compiler_errors():
  for text, gib in (
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
      "temporaries (16.02G) exceeds available HBM (15.75G).",
      16.02,
    ),
    ("... total memory required for HLO temporaries (1.19T) exceeds", 1.19 * 1024),
    ("Ran out of memory in memory space hbm. Used 512.0M of 95.74G hbm.", 0.5),
  ):
    assert compiled.needed(text) == pytest.approx(gib * GIB)


# -- Chips ----------------------------------------------------------------------------------------


def test_numbers_of_chips_and_links_of_slices():
  for chip in roofline.CHIPS.values():
    assert [s.chips for s in roofline.slices(chip)] == [4, 8, 16, 32, 64, 128, 256]
    for where in roofline.slices(chip):
      assert roofline.find_slice(where.name) == where
  links = {
    name: roofline.find_slice(name).links
    for name in (
      "v5e:2x2",
      "v5e:4x4",
      "v5e:8x16",
      "v5e:16x16",
      "v5p:2x2x1",
      "v5p:2x4x4",
      "v5p:4x4x4",
    )
  }
  assert links == {
    "v5e:2x2": 2,
    "v5e:4x4": 2,
    "v5e:8x16": 3,
    "v5e:16x16": 4,
    "v5p:2x2x1": 2,
    "v5p:2x4x4": 3,
    "v5p:4x4x4": 6,
  }


@pytest.mark.parametrize(
  ("cost", "resource", "seconds"),
  [
    (Cost(flops=197e12, bytes=1e9), "compute", 1.0),
    (Cost(flops=1e12, bytes=2 * 819e9), "HBM", 2.0),
    (Cost(bytes=1e9, collectives={"all-gather": 2e11, "all-reduce": 1e11}), "ICI", 3.0),
  ],
)
def test_the_slowest_resource_determines_the_bound(cost, resource, seconds):
  found = roofline.bound(cost, roofline.find_slice("v5e:4x4"))
  assert found.resource == resource and found.seconds == pytest.approx(seconds)


# -- A step ---------------------------------------------------------------------------------------


def test_image_frames_and_default_buckets():
  model = models.from_hf(CONFIGS["Qwen2.5-VL-7B"])
  assert step.frame(model, 5120) == (64, 80) and step.frame(model, 28) == (2, 14)
  config = types.SimpleNamespace(prompt_buckets=(256, 1024), patch_buckets=(64, 2048, 8192))
  assert step.buckets(config, model) == (1024, 2048)
  assert step.buckets(config, model, 16) == (16, 64)
  assert step.buckets(config, model, 512, 256) == (512, 256)


def test_simulated_runs_of_the_rollout_programs():
  """6 prompts with 4 samples each in 8 sequences; 100 tokens per response in chunks of 32.

  Two prompts are decoded at a time. Each one is prefilled separately.
  """
  runs, shares = step._rollout_runs(6, 4, Layout(8, 4), 1, 100, 32, 96)
  assert runs == {"prefill": 6, "decode": 12, "compact": 0}
  # The four chunks of a response begin after 0, 32, 64 and 96 tokens. The branches of attention
  # read up to 0, 24, 48, 72 and 96 positions. The first sufficient branch is taken.
  assert shares == [0.25, 0, 0.25, 0.25, 0.25]


def test_model_flops_of_scoring_are_those_of_prefill_and_decode():
  model = models.from_hf(CONFIGS["Qwen2.5-VL-7B"])
  prefill = flops.prefill(model, 4096)
  decode = flops.responses(model, [2048] * 8, 4096)
  scoring = flops.forward(model, 4096, [2048] * 8)
  # `forward` counts the last prompt token only with the responses.
  assert scoring == pytest.approx(prefill + decode, rel=1e-3)


@pytest.mark.parametrize(
  ("model", "name", "shared"),
  [
    ("Qwen2.5-VL-3B", "v5e:16x16", 2),  # value of the benchmark's config: two key/value heads
    ("Qwen2.5-VL-32B", "v5p:4x4x4", 4),  # value of the config: weights fill 1/6 of a chip
    ("Qwen2.5-VL-32B", "v6e:8x8", 8),  # weights fill a quarter of a chip
    # Half of a chip. With 16, every chip would store all eight key/value heads.
    ("Qwen2.5-VL-32B", "v5e:16x16", 8),
    ("Qwen2.5-VL-72B", "v6e:8x8", 16),  # with 8, more than half of a chip
  ],
)
def test_number_of_chips_that_share_the_weights_of_rollouts(model, name, shared):
  fitted = plan._fitted(benchmark.config_of(model), 0, roofline.find_slice(name), 2)
  assert (fitted.mesh.tensor, fitted.rollout.tensor) == (2, shared)


# -- docs/plan.md ---------------------------------------------------------------------------------


def test_the_tables_in_the_docs_show_the_stored_results():
  results = json.loads(benchmark.RESULTS.read_text())
  page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
  shown = benchmark.tables(results)
  assert shown and shown in page, "python benchmarks/plan.py --write"


def test_the_main_cases_fit_with_full_optimization():
  results = json.loads(benchmark.RESULTS.read_text())
  for model, name in benchmark.FIRST:
    row = results[model][name]
    assert row["fits"] and row["as_run"]["fits"], (model, name)


def test_every_case_of_the_benchmark_has_a_valid_slice_and_config():
  cases = benchmark.cases()
  assert len(cases) == len(set(cases)) == 5 * 3 * 7 and cases[0] == ("Qwen2.5-VL-7B", "v5e:4x4")
  for model, name in cases:
    assert roofline.find_slice(name).name == name
    config = benchmark.config_of(model)
    assert step.buckets(config, step.architecture(config))[0] == 4096

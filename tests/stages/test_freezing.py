"""Tests `config.model.trainable`: frozen parameters have no gradient, optimizer state or copy."""

import collections
import json
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from jaxrl_vlm import models, objectives, parallel, scratch, stages, train
from jaxrl_vlm.data import digit_boards
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.models import lora, names, weights
from jaxrl_vlm.models.patterns import matches
from jaxrl_vlm.stages import run as run_lib
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience
from tests import tiny_run

ADAPTERS = models.LoRA(rank=4, alpha=8.0, targets=("decoder", "vision/blocks"))


# -- One update -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  """A model with adapters that are not 0, its parameters, and a supervised batch."""
  path = tmp_path_factory.mktemp("scratch")
  boards = digit_boards.LiveBoards("train", 2, tasks=("read",), style="direct")
  examples = [boards[i] for i in range(2)]
  scratch.create(path, tiny_run.ARCHITECTURE, [e.question for e in examples])
  model, params, processor = models.load_pretrained(
    path, prompt_buckets=(64,), patch_buckets=(36,), lora=ADAPTERS
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jax.numpy.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.dtype), params
  )
  tokens = rng.integers(1, 99, (2, 1, 4)).astype(np.int32)
  experience = Experience(
    mask=np.ones(tokens.shape, bool),
    rewards=None,
    old=None,
    advantages=np.ones(tokens.shape, np.float32),
  )
  batch = processor.collate([processor.encode(e) for e in examples]), tokens, experience
  return model, params, batch


def update(setup, trainable: tuple[str, ...]):
  """Applies one step of SGD with momentum.

  Returns:
    The trained and the frozen parameters before the step, the state after it, and the metrics.
  """
  model, params, batch = setup
  mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
  programs = Programs(
    model, mesh, objectives.create("sft"), optax.sgd(0.1, momentum=0.9), params, trainable=trainable
  )
  trained, frozen = lora.split(params, trainable)
  state = programs.init_state(jax.tree.map(jax.numpy.copy, trained))
  state, metrics = programs.update(state, frozen, *batch, jax.random.key(0), None)
  return trained, frozen, state, metrics


@pytest.fixture(scope="module")
def all_trained(setup):
  """The result of `update` if all parameters train."""
  return update(setup, ())


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [("!vision",), ("decoder", "!lora"), ("lora",)], ids=str)
def test_only_trained_parameters_have_gradients_and_optimizer_state(setup, all_trained, trainable):
  before = jax.device_get(setup[1])
  trained, frozen, state, metrics = update(setup, trainable)
  # After the first step, the momentum equals the gradient.
  gradient = lora.split(all_trained[2].opt_state[0].trace, trainable)[0]
  momentum = state.opt_state[0].trace
  assert jax.tree.structure(momentum) == jax.tree.structure(state.params)
  assert jax.tree.structure(momentum) == jax.tree.structure(trained)
  assert len(jax.tree.leaves(state.opt_state)) == len(jax.tree.leaves(trained))
  assert 0 < len(jax.tree.leaves(trained)) < len(jax.tree.leaves(setup[1]))
  np.testing.assert_allclose(metrics["loss"], all_trained[3]["loss"], rtol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
  for path, expected in weights.by_path(gradient).items():
    # Another program computes the gradient, so float32 sums may be in another order.
    scale = max(float(np.abs(expected).max()), 1e-6)
    got = weights.by_path(momentum)[path]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * scale, err_msg=str(path))
    assert np.any(got), path
    after = weights.by_path(state.params)[path]
    assert not np.array_equal(after, weights.by_path(before)[path]), path
  # Frozen parameters have not changed, and their buffers are not donated to the update.
  for path, array in weights.by_path(frozen).items():
    np.testing.assert_array_equal(array, weights.by_path(before)[path], err_msg=str(path))


# -- A run with adapters --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A complete run with adapters.

  Returns:
    The workdir; for each step, the number of live arrays of each shape; for each step, the
    reference parameters.
  """
  workdir = tmp_path_factory.mktemp("finished") / "run"
  others = jax.live_arrays()
  alive, references = {}, {}
  log = run_lib.StageRun.log

  def count(self, *args):
    new = {id(x): x for x in jax.live_arrays()}
    for x in others:
      new.pop(id(x), None)
    alive[self.run.step] = collections.Counter(x.shape for x in new.values())
    references[self.run.step] = jax.device_get(self.reference)
    log(self, *args)

  with pytest.MonkeyPatch.context() as patch, tiny_run.one_device():
    patch.setattr(run_lib.StageRun, "log", count)
    train.train(tiny_run.get_lora_config(), workdir)
  return workdir, alive, references


def tensors(folder):
  return load_file(next(folder.glob("*.safetensors")))


def records(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_frozen_weights_exist_only_once_on_the_device(finished):
  workdir, alive, _ = finished
  config = models.from_directory(workdir / "scratch")
  frozen = collections.Counter(
    x.shape for x in jax.tree.leaves(models.abstract_params(config)) if x.ndim > 1
  )
  assert list(alive) == [1, 2, 3, 4, 5, 6]
  for step, counts in alive.items():
    assert {shape: counts[shape] for shape in frozen} == frozen, step


@pytest.mark.slow
def test_the_reference_is_the_policy_at_the_start_of_the_stage(finished):
  workdir, _, references = finished
  kl = {r["step"]: r["objective/ref_kl"] for r in records(workdir) if "objective/ref_kl" in r}
  for start in (1, 4):
    # Two programs compute the same log-probabilities, so only rounding differs.
    assert abs(kl[start]) < 1e-8
    assert kl[start + 2] > 1e3 * abs(kl[start]) and kl[start + 2] > 1e-6
  # In the first stage, the reference is the model without adapters, which needs no copy. In the
  # second stage, it is a copy of the adapters that does not change.
  assert references[1] == references[3] == {}
  assert jax.tree.leaves(references[4])
  jax.tree.map(np.testing.assert_array_equal, references[4], references[6])


@pytest.mark.slow
def test_a_run_with_adapters_writes_a_merged_model_and_the_adapter(finished, tmp_path):
  workdir, *_ = finished
  base = models.from_directory(workdir / "scratch")
  config = base.replace(lora=ADAPTERS)
  start, merged = tensors(workdir / "scratch"), tensors(workdir / "model")
  adapters = lora.load_adapter(workdir / "adapter", config, models.abstract_params(config))
  params = weights.load_params(workdir / "scratch", base, models.abstract_params(base))
  weights.save_params(tmp_path, base, lora.merged(lora.merge(params, adapters), config))
  by_hand = tensors(tmp_path)
  assert merged.keys() == start.keys() == by_hand.keys()
  changed = set()
  for name, tensor in merged.items():
    np.testing.assert_array_equal(tensor, by_hand[name], err_msg=name)
    if not np.array_equal(tensor, start[name]):
      changed.add(name)
  adapted = sum(
    len(e.names())
    for e in names.entries(base)
    if e.path[-1] == "kernel" and matches(ADAPTERS.targets, e.path[:-1])
  )
  assert len(changed) == adapted
  settings = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
  assert settings["base_model_name_or_path"] == str(workdir / "scratch")
  # A checkpoint contains the adapters and their two moments. In the second stage, it also contains
  # the adapters of the reference.
  size = sum(x.nbytes for x in jax.tree.leaves(adapters))
  for step, copies in ((2, 3), (4, 4)):
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert copies * size <= held < copies * size + 100, step


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_with_adapters_equals_an_uninterrupted_run(
  finished, step, tmp_path, one_device
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  for folder in ("model", "adapter"):
    shutil.rmtree(workdir / folder)
  for folder in (workdir / "checkpoints").iterdir():
    if int(folder.name) > step:
      shutil.rmtree(folder)
  train.train(tiny_run.get_lora_config(), workdir)
  for folder in ("model", "adapter"):
    ours, theirs = tensors(workdir / folder), tensors(finished[0] / folder)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
      np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_directory(finished, tmp_path, one_device):
  config = tiny_run.get_lora_config()
  config.model.path, config.model.scratch = str(finished[0] / "scratch"), {}
  config.model.lora.path = str(finished[0] / "adapter")
  config.stages = config.stages[:1]
  config.stages[0].steps = 1
  config.stages[0].optimizer.learning_rate = 0.0
  train.train(config, tmp_path / "run")
  (record,) = [r for r in records(tmp_path / "run") if "objective/ref_kl" in r]
  assert abs(record["objective/ref_kl"]) < 1e-8  # the reference has the same adapters
  for folder in ("model", "adapter"):
    ours, theirs = tensors(tmp_path / "run" / folder), tensors(finished[0] / folder)
    for name, tensor in ours.items():
      np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


# -- Errors in the config -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"lora.rank": -1}, "config.model.lora.rank=-1: expected at least 0 (0 adds no adapters)"),
    ({"lora.alpha": 0.0}, "config.model.lora.alpha=0.0: expected a number above 0"),
    (
      {"trainable": ("lora",)},
      "config.model.trainable=('lora',): 'lora' matches only adapters; "
      "expected config.model.lora.rank above 0, got 0",
    ),
    (
      {"trainable": ("visoin",)},
      "config.model.trainable=('visoin',): 'visoin' matches no parameter; did you mean 'vision'?",
    ),
    (
      {"trainable": (1,)},
      "config.model.trainable=(1,): expected a tuple of patterns, e.g. ('decoder',)",
    ),
    (
      {"lora.rank": 4, "lora.targets": ()},
      "config.model.lora.targets=(): expected at least one pattern",
    ),
    (
      {"lora.rank": 4, "lora.targets": ("q_proj",)},
      "config.model.lora.targets=('q_proj',): 'q_proj' matches no linear layer; did you mean 'q'?",
    ),
    (
      {"lora.path": "adapter"},
      "config.model.lora.rank=0: expected the rank of config.model.lora.path='adapter'",
    ),
    (
      {"lora.rank": 4, "lora.path": "nowhere"},
      "config.model.lora.path='nowhere': "
      "nowhere/adapter_config.json: no such file; expected a PEFT adapter directory",
    ),
  ],
)
def test_an_invalid_field_is_named(fields, message):
  config = tiny_run.get_config()
  for name, value in fields.items():
    *groups, last = name.split(".")
    holder = config.model
    for group in groups:
      holder = holder[group]
    with holder.ignore_type():
      holder[last] = value
  with pytest.raises(UserError) as error:
    stages.check(config)
  assert str(error.value) == message


def test_patterns_can_be_lists_and_flags_of_the_command_line(one_device):
  from jaxrl_vlm import config as config_lib

  config = tiny_run.get_config()
  config.model.trainable = ["decoder"]
  stages.check(config)
  config_lib.override(config, "config.model.trainable", "('!vision',)")
  config_lib.override(config, "config.model.lora.targets", "('decoder', 'vision')")
  config_lib.override(config, "config.model.lora.rank", "8")
  config_lib.override(config, "config.model.lora.alpha", "16")
  assert tuple(config.model.trainable) == ("!vision",)
  assert config.model.lora.targets == ("decoder", "vision")
  assert (config.model.lora.rank, config.model.lora.alpha) == (8, 16.0)
  stages.check(config)

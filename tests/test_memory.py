"""Memory formulas, and how a run uses them before it compiles anything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_vlm import memory, models, objectives, parallel, train
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.models.published import CONFIGS
from jaxrl_vlm.rollout import Sampler, Sampling
from jaxrl_vlm.stages.optimizer import make_optimizer
from jaxrl_vlm.stages.programs import Programs
from tests import tiny_run


@pytest.fixture(scope="module")
def config():
  return models.from_hf(CONFIGS["Qwen2.5-VL-3B"], dtype="bfloat16")


def test_keys_and_values_match_a_count_by_hand(config):
  # 36 layers, keys and values, 2 heads of 128 elements, 2 bytes.
  assert memory.Model(config).keys_and_values(1) == 36 * 2 * 2 * 128 * 2
  assert memory.Model(config, tensor=2).keys_and_values(10) == 10 * 36 * 2 * 1 * 128 * 2
  # With more devices than heads, each device stores all heads.
  assert memory.Model(config, tensor=4).keys_and_values(1) == 36 * 2 * 2 * 128 * 2
  # 1 byte per element, and a float32 scale for each position and head.
  assert memory.Model(config).keys_and_values(1, int8=True) == 36 * 2 * 2 * (128 + 4)


def test_held_counts_the_bytes_on_each_device():
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
  tree = {"q": {"kernel": jnp.zeros((8, 6))}, "norm": {"scale": jnp.zeros(3)}}
  shardings = parallel.param_shardings(mesh, tree)
  placed = jax.device_put(tree, shardings)
  stored = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(placed)
    for shard in leaf.addressable_shards
    if shard.device == jax.devices()[0]
  )
  assert memory.held(tree, shardings) == stored == (2 * 3 + 3) * 4


def sampler(config, room, **options):
  mesh = parallel.make_mesh({"fsdp": 2, "tensor": 1}, jax.devices()[:2])
  shapes = models.abstract_params(config)
  return Sampler(
    models.VLM(config),
    mesh,
    Sampling(8, 1024),
    parallel.param_shardings(mesh, shapes),
    room=room,
    **options,
  )


def test_groups_at_once_is_the_largest_number_that_fits(config):
  for room in (2e9, 4e9, 8e9, 64e9):
    generate = sampler(config, room)
    groups = generate.groups_at_once(64, 1024)
    assert groups % 2 == 0 and generate.need(groups, 64, 1024) <= room
    assert groups == 64 or generate.need(groups + 2, 64, 1024) > room
  assert sampler(config, 0).groups_at_once(64, 1024) == 64
  auto = sampler(config, 4e9)
  assert auto.groups_at_once(64, 4096) < auto.groups_at_once(64, 512)
  int8 = sampler(config, 4e9, prefix_dtype="int8")
  assert int8.groups_at_once(64, 4096) > auto.groups_at_once(64, 4096)
  # The prompts need memory too, 32 on each of two devices, and again if they are resharded.
  model, patches = memory.Model(config), 4096
  inputs, copied = memory.prompts(model, patches, 32), memory.features(model, patches, 64)
  assert 0.2e9 < inputs < 2e9 and 0.2e9 < copied < 2e9
  assert sampler(config, 4e9 + inputs).groups_at_once(64, 1024, patches) == (
    auto.groups_at_once(64, 1024)
  )
  with_patches, without = (sampler(config, 12e9 + more, tensor=2) for more in (inputs + copied, 0))
  assert with_patches.groups_at_once(64, 1024, patches) == without.groups_at_once(64, 1024) < 64
  # The number in the config is rounded up to a multiple of the devices, and used if it fits.
  assert sampler(config, 8e9, groups=3).groups_at_once(64, 1024) == 4
  assert sampler(config, 0, groups=64).groups_at_once(64, 1024) == 64
  most = auto.groups_at_once(64, 1024)
  with pytest.raises(UserError, match=rf"rollout.groups=63: .* at most {most} groups fit$"):
    sampler(config, 4e9, groups=63).groups_at_once(64, 1024)


def test_if_no_group_fits_the_error_names_the_samples_that_do(config):
  generate = sampler(config, 0.55e9)
  most = max(g for g in range(1, 9) if generate.need(2, 64, 1024, g) <= generate.room)
  assert 1 < most < 8
  with pytest.raises(
    UserError, match=rf"num_samples=8: .* 0.5 GiB are free; .* num_samples={most}$"
  ):
    generate.groups_at_once(64, 1024)
  with pytest.raises(UserError, match="not even one sample fits: use more devices"):
    sampler(config, 1e6).groups_at_once(64, 1024)
  with pytest.raises(UserError, match=rf"^eval.samples=8: .* eval.samples={most}$"):
    sampler(config, 0.55e9, samples_field="eval.samples").groups_at_once(64, 1024)


def test_if_an_update_does_not_fit_the_error_names_the_microbatches_that_do(config):
  mesh = parallel.make_mesh({"fsdp": 2, "tensor": 1}, jax.devices()[:2])
  settings = tiny_run.get_config().stages[1].optimizer
  programs = Programs(
    models.VLM(config),
    mesh,
    objectives.create("grpo", kl_coef=0.0),
    make_optimizer(settings, 1),
    models.abstract_params(config),
    capacity=70e9,
  )
  # float32 weights and two moments of 3.75e9 parameters, on two devices.
  assert np.isclose(programs.held, 3.75e9 * 12 / 2, rtol=0.01)
  assert programs.room == 70e9 - programs.held
  sizes = 64, 2048, 1024, 8, 1024
  fits = next(n for n in (1, 2, 4, 8, 16, 32) if programs.update_bytes(*sizes, n) <= programs.room)
  assert fits > 1
  with pytest.raises(UserError, match=rf"microbatches=1: .*; microbatches={fits} fits$"):
    programs.check_update(*sizes)
  programs.room = 1.0
  with pytest.raises(UserError, match="no number of microbatches fits: use more devices"):
    programs.check_update(*sizes)


def test_each_view_adds_to_the_memory_estimate(config):
  """A view scores the same tokens under another image or another set of parameters."""
  model = memory.Model(dataclasses.replace(config, attention="splash"))  # stores no scores
  plain = dict(
    length=1024,
    patches=4096,
    prompts=2,
    group=8,
    tokens=512,
    part_tokens=4096,
    gradient=0.0,
    trains_vision=False,
  )
  # Each further row per prompt adds its kept activations, and its keys and values with their
  # float32 gradient. Each further view also adds the kept activations of a pass of 4,096 tokens.
  row = 2 * (model.kept(1024) + model.keys_and_values(1024) * 3)
  one, two, nine = (memory.update(model, **plain, views=v) for v in ((1,), (1, 1), (1, 8)))
  assert np.isclose(two - one, row + model.kept(4096))
  assert np.isclose(nine - two, 7 * row)

  mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, jax.devices()[:1])
  full_remat = dataclasses.replace(config, remat="full")

  def need(name, **fields):
    programs = Programs(
      models.VLM(full_remat),
      mesh,
      objectives.create(name, **fields),
      optax.sgd(0.0),
      models.abstract_params(full_remat),
      trainable=("!vision",),
      capacity=70e9,
      black=np.zeros(1),
      white=np.ones(1),
    )
    return programs.update_bytes(32, 2048, 4096, 8, 64)

  by_prompt = need("vppo", mask_per="prompt")
  # Scoring stores the keys and values of 8 rows per prompt, which are prefilled one after another.
  # A masked view with a gradient adds as many rows again.
  model = memory.Model(full_remat)
  one, eight = (memory.score(model, 2048, 32, rows, 64, 1024) for rows in (1, 8))
  assert np.isclose(eight - one, 7 * 32 * model.keys_and_values(2048))
  assert need("papo", masked_gradient=True, mask_per="prompt", kl_coef=0.0) > 1.3 * by_prompt


@pytest.mark.slow
def test_a_run_prints_its_plan_and_fails_before_compiling_if_it_cannot_fit(
  tmp_path, one_device, capsys, monkeypatch
):
  config = tiny_run.get_config()
  config.stages = (config.stages[1],)
  config.stages[0].steps = 1
  config.stages[0].eval.examples = 0
  train.train(config, tmp_path / "fits")
  assert "groups decoded at once, by prompt tokens: 64: 4" in capsys.readouterr().out
  config.device_memory = 0.001
  compiled = []
  monkeypatch.setattr(Programs, "_update", lambda *_: compiled.append(1))
  with pytest.raises(UserError, match=r"^config.stages\[0\].num_samples=2: decoding the samples"):
    train.train(config, tmp_path / "does not fit")
  # The rollout fits but the update does not. This error also comes before any data is read.
  monkeypatch.setattr(Programs, "update_bytes", lambda *_: 2e9)
  config.device_memory = 1.0
  with pytest.raises(UserError, match=r"^config.stages\[0\].microbatches=1: an update"):
    train.train(config, tmp_path / "no update")
  monkeypatch.undo()
  monkeypatch.setattr(Programs, "_update", lambda *_: compiled.append(1))
  config.device_memory = 0.001
  config.stages = (tiny_run.get_config().stages[0],)  # supervised
  with pytest.raises(UserError, match="microbatches=1: an update with prompts of 64 tokens"):
    train.train(config, tmp_path / "does not fit either")
  assert not compiled


@pytest.mark.slow
def test_a_run_warns_if_only_short_prompts_fit(tmp_path, one_device, capsys, monkeypatch):
  config = tiny_run.get_config()
  config.stages = (config.stages[1],)
  config.stages[0].steps = 1
  config.stages[0].eval.examples = 0
  config.prompt_buckets, config.patch_buckets, config.device_memory = (64, 128), (36, 144), 2.0
  monkeypatch.setattr(Programs, "update_bytes", lambda self, _, length, *more: 2e7 * length)
  train.train(config, tmp_path / "run")
  out = " ".join(capsys.readouterr().out.split())
  assert (
    "tokens: 64: 4; longer prompts do not fit: config.stages[0].microbatches=1: an update "
    "with prompts of 128 tokens and 144 patches needs 2.4 GiB"
  ) in out


def test_the_memory_limit_of_a_container_is_respected(tmp_path, monkeypatch):
  share = memory.capacity(jax.devices()[0])
  limit = tmp_path / "memory.max"
  limit.write_text(f"{share}\n")  # for all eight devices together
  monkeypatch.setattr(memory, "_LIMITS", (str(limit), str(tmp_path / "no such file")))
  assert memory.capacity(jax.devices()[0]) == share // len(jax.devices())
  limit.write_text("max\n")
  assert memory.capacity(jax.devices()[0]) >= share


def test_scores_of_packed_responses_match_a_count_by_hand(config):
  # 4,096 tokens are 32 tiles of 4 blocks of 32 tokens. A tile attends to 1,024 prompt tokens and
  # 256 response tokens at a time.
  expected = 32 * 2 * 4 * config.num_heads * 128 * (1024 + 256)
  assert memory.Model(config).scores_of_blocks(4096, 1024, 512, 3) == expected
  kernels = dataclasses.replace(config, attention="splash")
  assert memory.Model(kernels).scores_of_blocks(4096, 1024, 512, 3) == 0
  slides = dataclasses.replace(kernels, sliding_window=512)  # the kernel has no sliding windows
  assert memory.Model(slides).scores_of_blocks(4096, 1024, 512, 3) == expected
  # The cuDNN kernel takes a mask of two bytes per query and key, over the keys of all prompts.
  masked = memory.Model(dataclasses.replace(config, attention="cudnn"))
  assert masked.scores_of_blocks(4096, 1024, 512, 3) == 2 * 4096 * (3 * 1024 + 4096)
  assert masked.scores(64, 64) == 2 * 64 * 64


def test_prompts_match_a_count_by_hand(config):
  # 1,176 elements of 2 bytes for a patch, and 2,048 for a visual token of 4 patches.
  assert memory.prompts(memory.Model(config), 4096, 3) == 3 * 2 * (4096 * 1176 + 1024 * 2048)

  def need(devices, **fields):
    mesh = parallel.make_mesh({"fsdp": devices, "tensor": 1}, jax.devices()[:devices])
    programs = Programs(
      models.VLM(config),
      mesh,
      objectives.create("papo", **fields),
      optax.sgd(0.0),
      models.abstract_params(config),
      capacity=70e9,
      black=np.zeros(1),
      white=np.ones(1),
    )
    return programs.update_bytes(32 * devices, 2048, 4096, 8, 64) + programs.held

  # With several devices, prompts are in memory twice, and so are masked images made by the host.
  inputs = memory.prompts(memory.Model(config), 4096, 32)
  by_host = need(1, mask_per="sample") - need(1, mask_per="sample", mask_on="processed")
  assert np.isclose(by_host, 8 * inputs)
  two = need(2, mask_per="sample") - need(2, mask_per="sample", mask_on="processed")
  assert np.isclose(two, 2 * 8 * inputs)


def test_the_vision_tower_matches_a_count_by_hand(config):
  vision = config.vision
  # Scores are stored for at most 2^19 pairs of a query and a key per head at a time.
  scores = 2 * 4 * vision.num_heads * 2**19
  assert memory.see(memory.Model(config), 4096, 3) == 3 * (
    4096 * 2 * (2 * vision.hidden_size + 3 * vision.intermediate_size) + scores
  )
  kernels = dataclasses.replace(config, attention="splash")
  assert (
    memory.see(memory.Model(kernels), 4096, 3)
    == memory.see(memory.Model(config), 4096, 3) - 3 * scores
  )

"""Compiles the programs for TPU topologies on a machine without a TPU.

Only one process of a machine can use libtpu at a time. Each test therefore compiles in a new
process, which holds a lock.
"""

import fcntl
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]

SETUP = """
import json
import sys

import jax
import numpy as np
import optax
from jax.experimental import topologies

from jaxrl_vlm import models, objectives, parallel
from jaxrl_vlm.models import lora
from jaxrl_vlm.rollout import Sampling
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience, TokenStats

P, G, T, LENGTH, PATCHES = 8, 4, 256, 512, 1024
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2}, devices=topology.devices)
config = models.from_hf({
    "model_type": "qwen2_5_vl", "image_token_id": 4090, "eos_token_id": 4091,
    "text_config": {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [8, 12, 12], "rope_theta": 1e6}},
    "vision_config": {
        "depth": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4,
        "out_hidden_size": 512, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [1]}}, dtype="bfloat16")
config = config.replace(
    attention=models.choose_attention("auto", mesh.devices.flat, config))
model, params = models.VLM(config), models.abstract_params(config)
programs = Programs(
    model, mesh, objectives.create("papo"), optax.adamw(1e-6), params,
    sampling=Sampling(G, T), black=jax.numpy.zeros(config.vision.patch_dim))


def shape(dtype, *sizes):
  return jax.ShapeDtypeStruct(sizes, dtype)


prompt = jax.tree.map(
    lambda x: shape(x.dtype, *x.shape), models.dummy_prompt(config, P, LENGTH, PATCHES))
tokens, mask, number = (shape(d, P, G, T) for d in ("int32", "bool", "float32"))
key = jax.eval_shape(lambda: jax.random.key(0))
stats = TokenStats(number, number)
experience = Experience(mask=mask, advantages=number, old=stats, rewards=shape("float32", P, G),
                        views={"ref": stats, "masked": stats})


def packing_of(programs):
  return jax.tree.map(lambda x: shape(x.dtype, *x.shape),
                      programs.packed(np.ones((P, G, T), bool)))


packing = packing_of(programs)
"""


COMPILE = (
  SETUP
  + """
arguments = {
    "see": (params, prompt),
    "score": (params, prompt, tokens, mask, packing),
    "score_masked": (params, prompt, tokens, mask, key, packing),
    "update": (programs.abstract_state, {}, prompt, tokens, experience, key, None, packing),
}


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.size > 1)


# Adapters of the decoder and the vision tower. All other parameters are frozen, in bfloat16.
adapted = config.replace(lora=models.LoRA(16, 32.0, ("decoder", "vision")))
adapted_params = models.abstract_params(adapted, trainable=("lora",))
adapters = Programs(
    models.VLM(adapted), mesh, objectives.create("grpo"), optax.adamw(1e-6), adapted_params,
    trainable=("lora",))
_, frozen = lora.split(adapted_params, ("lora",))

compiled = {name: (getattr(programs, name), *given) for name, given in arguments.items()}
compiled["update_adapters"] = (
    adapters.update, adapters.abstract_state, frozen, prompt, tokens,
    experience.replace(views={"ref": stats}), key, None, packing)
result = {"kind": topology.devices[0].device_kind, "frozen": size(frozen),
          "planned": {
              "rollout": programs.rollout.need(P, P, LENGTH),
              "update": programs.update_bytes(P, LENGTH, PATCHES, G, T)},
          "rollout": [list(map(int, (m.argument_size_in_bytes, m.temp_size_in_bytes))) for m in (
              program.compile().memory_analysis()
              for program in programs.rollout.lower(params, prompt).values())]}
for name, (program, first, *batch) in compiled.items():
  memory = program.lower(first, *batch).compile().memory_analysis()
  result[name] = {
      # This vision tower does not use the grids, so they are no argument of the compiled program.
      "params": size(first), "batch": size(batch) - size(prompt.patch_grids),
      "arguments": memory.argument_size_in_bytes,
      "outputs": memory.output_size_in_bytes, "aliased": memory.alias_size_in_bytes,
      "temporary": memory.temp_size_in_bytes}
print(json.dumps(result))
"""
)


# Programs that only some objectives need: KL over the whole vocabulary in the loss and in the
# reward, a gradient through the masked view, masks from the attention of the vision tower, greedy
# baselines, and a forward pass before the update that selects tokens.
VIEWS = (
  SETUP
  + """
def programs_of(name, microbatches=1, **fields):
  return Programs(
      model, mesh, objectives.create(name, **fields), optax.adamw(1e-6), params,
      microbatches=microbatches, sampling=Sampling(G, T),
      black=jax.numpy.zeros(config.vision.patch_dim))


full = TokenStats(number, number, number)
rewards = shape("float32", P, G)


def lowered_update(objective_state, name, fields, more, *given):
  # Lowers the update of the objective. The experience has the additional fields `more`.
  update = programs_of(name, **fields).update
  state = programs.abstract_state.replace(objective=objective_state)
  batch = prompt, tokens, experience.replace(**more), key
  return {"update": update.lower(state, {}, *batch, *given)}


def with_full_kl():
  fields = dict(masked_gradient=True, perception_kl="full", kl="full", kl_target=0.1)
  return lowered_update({"kl_coef": shape("float32")}, "papo", fields, {}, params, packing)


def with_chosen_tokens():
  fields = dict(microbatches=2, correction="mis")
  packing = packing_of(programs_of("kl_cov", **fields))
  return lowered_update({}, "kl_cov", fields, {"sampler_logp": number}, None, packing)


def scores():
  in_reward = programs_of("reinforce_pp", kl="full")
  vppo = programs_of("vppo", dependency="full", mask_kind="semantic")
  return {
      "reference": in_reward.score_reference.lower(params, params, prompt, tokens, mask, packing),
      "advantages": in_reward.advantages.lower(rewards, mask, {"old": stats, "ref": full}, {}),
      "masked": vppo.score_masked.lower(params, prompt, tokens, mask, key, packing),
      "masked_on_host": vppo.score_masked.lower(params, prompt, tokens, mask, prompt, packing)}


def greedy_baseline():
  return programs_of("remax").rollout_greedy.lower(params, prompt)


for name, program in globals()[sys.argv[1]]().items():
  program.compile()
  print(name)
"""
)


# Only the update, with the head size of published models (128).
SPLASH = """
import re

import jax
import numpy as np
import optax
from jax.experimental import topologies

from jaxrl_vlm import models, objectives, parallel
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience, TokenStats

P, G, T = 4, 2, 256
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2}, devices=topology.devices)
config = models.from_hf({
    "model_type": "qwen2_5_vl", "image_token_id": 1000, "eos_token_id": 1001,
    "text_config": {
        "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6}},
    "vision_config": {
        "depth": 2, "hidden_size": 160, "intermediate_size": 256, "num_heads": 2,
        "out_hidden_size": 512, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [1]}}, dtype="bfloat16")
assert config.head_dim == 128
config = config.replace(
    attention=models.choose_attention("auto", mesh.devices.flat, config))
params = models.abstract_params(config)
shape = jax.ShapeDtypeStruct
prompt = jax.tree.map(
    lambda x: shape(x.shape, x.dtype), models.dummy_prompt(config, P, 256, 256))
tokens, mask, number = (shape((P, G, T), d) for d in ("int32", "bool", "float32"))
key = jax.eval_shape(lambda: jax.random.key(0))
stats = TokenStats(number, number)
experience = Experience(mask=mask, advantages=number, old=stats,
                        rewards=shape((P, G), "float32"), views={"ref": stats})
for on_host in (False, True):
  programs = Programs(models.VLM(config), mesh, objectives.create("grpo"), optax.adamw(1e-3),
                      params, state_on_host=on_host)
  packing = jax.tree.map(
      lambda x: shape(x.shape, x.dtype), programs.packed(np.ones((P, G, T), bool)))
  update = programs.update.lower(
      programs.abstract_state, {}, prompt, tokens, experience, key, None, packing).compile()
  memory = update.memory_analysis()
  print(*sorted(re.findall(r"%splash_mha_([a-z]+)_\\S+ = .*tpu_custom_call", update.as_text())),
        memory.argument_size_in_bytes, memory.host_argument_size_in_bytes)
"""


FAMILY = """
import copy
import sys

import jax
import numpy as np
import optax
from jax.experimental import topologies

from jaxrl_vlm import models, objectives, parallel
from jaxrl_vlm.models.published import CONFIGS
from jaxrl_vlm.rollout import Sampling
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience, TokenStats

P, G, T, LENGTH, PATCHES = 4, 2, 32, 128, 256
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2}, devices=topology.devices)
for name in sys.argv[1:]:
  hf = copy.deepcopy(CONFIGS[name])
  text, vision = hf.get("text_config", hf), hf["vision_config"]
  # The settings of the family, in a small model.
  text |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 128,
           "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
           "sliding_window_pattern": 2}
  text |= {k: v for k, v in (("moe_intermediate_size", 128), ("num_experts", 8),
                             ("num_experts_per_tok", 2)) if k in text}
  vision |= {k: 2 for k in ("depth", "num_hidden_layers") if k in vision}
  vision |= {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "out_hidden_size": 256}
  if "embed_dim" in vision:
    vision["hidden_size"] = 256
  config = models.from_hf(
      hf, dtype="bfloat16", suppressed_tokens=(5,), stop_tokens=(1,), pad_token=0)
  config = config.replace(
      attention=models.choose_attention("auto", mesh.devices.flat, config))
  params = models.abstract_params(config)
  programs = Programs(models.VLM(config), mesh, objectives.create("grpo"), optax.adamw(1e-6),
                      params, sampling=Sampling(G, T))
  shape = jax.ShapeDtypeStruct
  prompt = jax.tree.map(
      lambda x: shape(x.shape, x.dtype), models.dummy_prompt(config, P, LENGTH, PATCHES))
  tokens, mask, number = (shape((P, G, T), d) for d in ("int32", "bool", "float32"))
  key = jax.eval_shape(lambda: jax.random.key(0))
  stats = TokenStats(number, number)
  experience = Experience(mask=mask, advantages=number, old=stats,
                          rewards=shape((P, G), "float32"), views={"ref": stats})
  for program in programs.rollout.lower(params, prompt).values():
    program.compile()
  packing = jax.tree.map(
      lambda x: shape(x.shape, x.dtype), programs.packed(np.ones((P, G, T), bool)))
  programs.update.lower(
      programs.abstract_state, {}, prompt, tokens, experience, key, None, packing).compile()
  print(name)
"""


SLICES = """
from jax.experimental import topologies

from jaxrl_vlm import parallel

devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
mesh = parallel.make_mesh({"slice": 2, "fsdp": 2, "tensor": 2}, devices)
print([sorted({device.slice_index for device in group.flat}) for group in mesh.devices])
try:
  parallel.make_mesh({"fsdp": 8}, devices)
except ValueError as error:
  print(error)
"""


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
  """Runs code in a new process without the JAX settings of this one, under a lock for libtpu."""
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
  with open(pathlib.Path(tempfile.gettempdir()) / "jaxrl_vlm_libtpu.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    return subprocess.run(
      [sys.executable, "-c", code, *arguments],
      env=env | variables,
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=500,
    )


@pytest.mark.slow
def test_programs_compile_for_four_v5e_chips():
  pytest.importorskip("libtpu")
  # Effort -1: faster compilation with less optimization.
  done = python(
    COMPILE, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0"
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert "v5" in result["kind"]
  assert all(0 < sum(used) < 16 * 2**30 for used in result["rollout"]), result["rollout"]
  for name in ("see", "score", "score_masked", "update"):
    memory = result[name]
    used = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporary"]
    assert 0 < used < 16 * 2**30, (name, memory)
    if name == "see":  # the arguments of the decoder are unused
      continue
    # The shard of a chip is a quarter of the parameters (or of the training state) and half of the
    # prompts. In addition, norms are replicated, and arrays are padded to the tiles of the chip.
    share = memory["params"] / 4 + memory["batch"] / 2
    assert share <= memory["arguments"] < 1.1 * share, (name, share, memory)
  # The formulas of the planned memory agree with the compiler within a factor of two. The formula
  # of the rollout does not count its arguments, the parameters and prompts.
  given = result["see"]["params"] / 4 + result["see"]["batch"] / 2
  rollout = max(map(sum, result["rollout"])) - given
  assert 0.5 < rollout / result["planned"]["rollout"] < 2, (rollout, result["planned"])
  update = result["update"]["temporary"]
  assert 0.5 < update / result["planned"]["update"] < 2, (update, result["planned"])
  # The new training state is written to the memory of the old one.
  assert result["update"]["aliased"] >= result["update"]["params"] / 4
  # With adapters, the update also takes the frozen parameters in bfloat16. It returns only the
  # state of the adapters. A chip has half of each adapter matrix, because the rank is not sharded.
  memory, frozen = result["update_adapters"], result["frozen"]
  share = memory["params"] / 2 + frozen / 4 + (memory["batch"] - frozen) / 2
  assert 0.95 * share <= memory["arguments"] < 1.1 * share, (share, memory)
  assert memory["outputs"] < 1.1 * memory["params"] / 2, memory


@pytest.mark.slow
@pytest.mark.parametrize(
  ("what", "programs"),
  [
    ("with_full_kl", ["update"]),
    ("with_chosen_tokens", ["update"]),
    ("scores", ["reference", "advantages", "masked", "masked_on_host"]),
    ("greedy_baseline", ["prefill", "decode", "compact"]),
  ],
  ids=["full KL", "chosen tokens", "scores", "greedy baseline"],
)
def test_programs_of_specific_objectives_compile(what, programs):
  pytest.importorskip("libtpu")
  done = python(
    VIEWS,
    what,
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == programs


@pytest.mark.slow
def test_the_update_uses_splash_attention_with_moments_on_device_and_host():
  """One forward kernel and two gradient kernels for the vision tower, prompts and packed responses.

  With moments on the host, the moments are arguments in host memory and take no device memory.
  """
  pytest.importorskip("libtpu")
  done = python(
    SPLASH, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0"
  )
  assert done.returncode == 0, done.stderr
  on_device, on_host = (line.split() for line in done.stdout.splitlines())
  assert on_device[:-2] == on_host[:-2] == ["dkv"] * 3 + ["dq"] * 3 + ["fwd"] * 3
  (total, no_moments), (rest, moments) = (map(int, line[-2:]) for line in (on_device, on_host))
  assert no_moments == 0 and moments > rest and abs(total - rest - moments) < 1e-3 * total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2-VL-2B", "Qwen3-VL-2B", "Qwen3-VL-30B-A3B", "gemma-3-4b"])
def test_every_family_compiles(name):
  pytest.importorskip("libtpu")
  done = python(
    FAMILY,
    name,
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == [name]


def test_the_slice_axis_of_the_mesh_separates_tpu_slices():
  pytest.importorskip("libtpu")
  done = python(SLICES, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    "[[0], [1]]",
    "config.mesh.slice=1: expected 2, the number of TPU slices of this run",
  ]


def test_an_installed_libtpu_does_not_affect_a_run_without_tpu():
  pytest.importorskip("libtpu")
  if any(map(glob.glob, ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*"))):
    pytest.skip("this machine has an accelerator")
  done = python(
    "from jaxrl_vlm import parallel\n"
    "parallel.choose_platform()\n"
    "import jax\n"
    "print(jax.default_backend(), jax.numpy.arange(3).sum())"
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "cpu 3\n", "")

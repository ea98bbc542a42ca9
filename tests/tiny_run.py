"""A run that takes seconds: a supervised stage and an RL stage with a tiny untrained model."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import signal
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]

ARCHITECTURE = {
  "tie_word_embeddings": False,
  "min_pixels": 16 * 16,
  "max_pixels": 48 * 48,
  "text": {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "mrope_section": (1, 1, 2), "rope_theta": 10000.0},
  },
  "vision": {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 32,
    "fullatt_block_indexes": (1,),
  },
}
BOARDS = {"live": True, "train": 64, "test": 8, "tasks": ("read", "colour"), "style": "direct"}


def xla_flags(devices: int) -> str:
  """Returns XLA_FLAGS for virtual CPU devices, with quick compilation.

  The programs of the tests are small and run a few times, so compiling them takes most of the time.
  These flags turn off XLA's optimizations and select its older code generator for fusions.
  """
  return (
    f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
  )


def variety(example, text: str) -> float:
  """A reward that differs between random responses, so that the advantages are not all 0."""
  del example
  return len(set(text)) / 32


def get_config():
  """Returns the config of an SFT stage and a PAPO stage.

  PAPO needs the reference parameters, the masked view and a random key for the masks.
  """
  spec = importlib.util.spec_from_file_location("base_config", ROOT / "configs" / "base.py")
  assert spec is not None and spec.loader is not None
  base = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(base)
  c = base.get_config()
  c.model.scratch = ARCHITECTURE
  c.prompt_buckets = (64,)
  c.patch_buckets = (36,)
  sft, rl = base.sft(), base.rl()
  for stage in (sft, rl):
    stage.prompts_per_step = 4
    stage.max_tokens = 24
    stage.data.name = "digit_boards"
    stage.data.options = BOARDS
    stage.optimizer.learning_rate = 1e-3
    stage.rewards["tests.tiny_run:variety"] = 1.0
  sft.steps = 3
  rl.steps = 5
  rl.num_samples = 2
  rl.max_tokens = 8
  rl.objective.name = "papo"
  rl.eval.examples = 3
  rl.eval.batch = 4
  c.stages = (sft, rl)
  c.checkpoint.every = 2
  c.checkpoint.keep = 3
  c.reward_workers = 1
  c.reward_timeout = 60.0  # long enough that a busy machine does not cause a timeout
  c.max_bad_steps = 2
  return c


def get_lora_config():
  """Returns the config of two RL stages that train only adapters.

  The reference of the first stage is the model without adapters. The reference of the second stage
  is the model with the adapters that the first stage trained.
  """
  c = get_config()
  c.model.lora.rank, c.model.lora.alpha = 4, 8.0
  c.model.lora.targets = ("decoder", "vision/blocks")
  _, rl = c.stages
  rl.steps = 3
  rl.eval.examples = 0
  rl.optimizer.learning_rate = 1e-2
  c.stages = (rl.copy_and_resolve_references(), rl.copy_and_resolve_references())
  c.checkpoint.keep = 10
  return c


def use_one_device() -> None:
  """Limits meshes to the first device of this process and turns on JAX's compilation cache."""
  import jax

  from jaxrl_vlm import parallel

  parallel.make_mesh = functools.partial(parallel.make_mesh, devices=jax.devices()[:1])
  parallel.cache_compilations = lambda: None
  _cache_programs(True)


@contextlib.contextmanager
def one_device() -> Iterator[None]:
  """A context manager that applies `use_one_device` and undoes it at the end."""
  from jaxrl_vlm import parallel

  before = parallel.make_mesh, parallel.cache_compilations
  use_one_device()
  try:
    yield
  finally:
    parallel.make_mesh, parallel.cache_compilations = before
    _cache_programs(False)


def _cache_programs(enabled: bool) -> None:
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  jax.config.update("jax_enable_compilation_cache", enabled)
  # JAX reads this setting once, when it compiles the first program.
  compilation_cache.reset_cache()


def signal_at_step() -> None:
  """Makes this process send itself a signal at a step, as the variable SIGNAL_AT_STEP says.

  With SIGNAL_AT_STEP="SIGTERM:5", the process sends SIGTERM after it has written the metrics of
  step 5. With "SIGKILL:5", it sends SIGKILL as soon as the checkpoint of step 5 is complete.
  """
  setting = os.environ.get("SIGNAL_AT_STEP")
  if not setting:
    return
  from jaxrl_vlm import checkpoint, metrics

  name, at = setting.split(":")
  write, save = metrics.MetricsWriter.write, checkpoint.Checkpoints.save

  def write_then_signal(self, step, stage, values):
    write(self, step, stage, values)
    if name == "SIGTERM" and step == int(at) and "train/loss" in values:
      os.kill(os.getpid(), signal.SIGTERM)

  def save_then_kill(self, step, state, meta, accuracy=None):
    save(self, step, state, meta, accuracy)
    if name == "SIGKILL" and step == int(at):
      self.wait()
      os.kill(os.getpid(), signal.SIGKILL)

  metrics.MetricsWriter.write = write_then_signal
  checkpoint.Checkpoints.save = save_then_kill

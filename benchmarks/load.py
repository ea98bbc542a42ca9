"""Peak host memory of loading a checkpoint, over the device arrays and the largest tensor.

    python benchmarks/load.py

Writes a random Qwen2.5-VL-3B checkpoint (7.5 GB in bfloat16, real names, shapes and shards) to
`runs/load`, loads it in a fresh process as a run does, and records in `benchmarks/load.json`:
bytes of the files, of the device arrays, of the largest tensor, the highest resident memory while
loading, what of it is left after the device arrays (`excess`), and seconds. Also saves what was
loaded and measures the same. The directory may be deleted afterwards; with it the command is
repeated in seconds.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).parent
GIB = 2**30


def write_checkpoint(path: pathlib.Path, name: str) -> None:
  """A directory of the published size with random bfloat16 weights; finished files are kept."""
  import jax.numpy as jnp
  from safetensors.numpy import save_file

  from jaxrl_vlm import models
  from jaxrl_vlm.models import weights
  from jaxrl_vlm.models.published import CONFIGS

  path.mkdir(parents=True, exist_ok=True)
  config = models.from_hf(CONFIGS[name])
  flat = weights.by_path(models.abstract_params(config))
  wanted = {}
  for entry in weights.entries(config):
    shape = flat[entry.path].shape
    one = shape if entry.layers is None else shape[1:]
    for tensor in entry.names():
      wanted[weights.published_name(tensor, config.family)] = entry.file_shape(one, config)
  shards, size = [[]], 0
  for tensor, shape in wanted.items():
    nbytes = 2 * int(np.prod(shape))
    if size and size + nbytes > 2 * GIB:
      shards, size = [*shards, []], 0
    shards[-1].append(tensor)
    size += nbytes
  index = {}
  rng = np.random.default_rng(0)
  for i, names in enumerate(shards):
    file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    index |= dict.fromkeys(names, file)
    if not (path / file).exists():
      held = {n: (rng.standard_normal(wanted[n], np.float32) * 0.02).astype(jnp.bfloat16)
              for n in names}
      weights.write_file(path / file, lambda f, held=held: save_file(held, f))
      print(f"wrote {path / file}", flush=True)
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  (path / "config.json").write_text(json.dumps(CONFIGS[name]))


def resident() -> tuple[int, int]:
  """Resident bytes of this process: now, and the most since `forget_peak`."""
  status = dict(line.split(":", 1) for line in
                pathlib.Path("/proc/self/status").read_text().splitlines())
  return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def forget_peak() -> None:
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def measure(path: pathlib.Path) -> dict[str, float]:
  """Loads and saves in this process, which must have done nothing else."""
  import jax

  from jaxrl_vlm import models
  from jaxrl_vlm.models import weights

  config = models.from_directory(path)
  jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the backend's own memory is not the loader's
  shapes = models.abstract_params(config, "bfloat16")
  forget_peak()
  before, _ = resident()
  began = time.monotonic()
  params = jax.block_until_ready(weights.load_params(path, config, shapes))
  seconds = time.monotonic() - began
  _, peak = resident()
  arrays = sum(x.nbytes for x in jax.tree.leaves(params))
  largest = max(x.nbytes // len(e.layers or [0]) for e, x in (
      (e, weights.by_path(params)[e.path]) for e in weights.entries(config)))
  saved = path / "saved"
  forget_peak()
  held, _ = resident()
  began = time.monotonic()
  weights.save_params(saved, config, params, shard_bytes=2 * GIB)
  save_seconds = time.monotonic() - began
  _, save_peak = resident()
  files = sum(f.stat().st_size for f in path.glob("*.safetensors"))
  for file in saved.iterdir():
    file.unlink()
  saved.rmdir()
  return {
      "file_gib": files / GIB, "device_arrays_gib": arrays / GIB, "largest_tensor_gib":
      largest / GIB, "peak_gib": (peak - before) / GIB,
      "excess_gib": (peak - before - arrays) / GIB,
      "excess_over_largest_tensor": (peak - before - arrays) / largest, "seconds": seconds,
      "save_seconds": save_seconds, "save_excess_gib": (save_peak - held) / GIB,
      "save_shard_gib": 2.0}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="Qwen2.5-VL-3B")
  parser.add_argument("--path", type=pathlib.Path, default=pathlib.Path("runs/load"))
  parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.path)))
    return
  write_checkpoint(args.path, args.model)
  done = subprocess.run(
      [sys.executable, __file__, "--measure", f"--path={args.path}"], check=True,
      capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  result = {"model": args.model, "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU backend",
            **{k: round(v, 3) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}}
  (HERE / "load.json").write_text(json.dumps(result, indent=1) + "\n")
  for key, value in result.items():
    print(f"{key:28} {value}")


if __name__ == "__main__":
  main()

"""Measures the peak host memory of loading a checkpoint.

    python benchmarks/load.py

The benchmark writes a random Qwen2.5-VL-3B checkpoint to `runs/load` (7.5 GB in bfloat16, with the
published names and shapes, in files of at most 2 GiB). It loads it in a new process as a run
does, once with parameters in bfloat16 and once in float32. In bfloat16 it also saves them.

It records the results in `benchmarks/load.json` and docs/models.md: the size of the files, of the
device arrays and of the largest tensor, the peak resident memory while loading, the part of it
beyond the device arrays (`excess`), and the seconds. You can delete `runs/load` afterwards. If you
keep it, the next run does not have to write it again.
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

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks" / "load.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- load: benchmarks/load.py -->", "<!-- end of load -->"
GIB = 2**30


def write_checkpoint(path: pathlib.Path, name: str) -> None:
  """Writes a checkpoint of a published model with random bfloat16 weights.

  Args:
    path: directory to write. Files that exist are kept.
    name: name of the published model.
  """
  import jax.numpy as jnp
  from safetensors.numpy import save_file

  from jaxrl_vlm import models
  from jaxrl_vlm.models import names, weights
  from jaxrl_vlm.models.published import CONFIGS

  path.mkdir(parents=True, exist_ok=True)
  config = models.from_hf(CONFIGS[name])
  flat = weights.by_path(models.abstract_params(config))
  wanted = {}
  for entry in names.entries(config):
    shape = flat[entry.path].shape
    layer_shape = shape if entry.layers is None else shape[1:]
    for tensor in entry.names():
      wanted[names.published_name(tensor, config.family)] = entry.file_shape(layer_shape, config)
  shards, size = [[]], 0
  for tensor, shape in wanted.items():
    nbytes = 2 * int(np.prod(shape))
    if size and size + nbytes > 2 * GIB:
      shards, size = [*shards, []], 0
    shards[-1].append(tensor)
    size += nbytes
  index = {}
  rng = np.random.default_rng(0)
  for i, shard in enumerate(shards):
    file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    index |= dict.fromkeys(shard, file)
    if not (path / file).exists():
      held = {
        n: (rng.standard_normal(wanted[n], np.float32) * 0.02).astype(jnp.bfloat16) for n in shard
      }
      weights.write_file(path / file, lambda f, held=held: save_file(held, f))
      print(f"wrote {path / file}", flush=True)
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  (path / "config.json").write_text(json.dumps(CONFIGS[name]))


def resident() -> tuple[int, int]:
  """Returns the resident bytes of this process: now, and their peak since `forget_peak`."""
  status = dict(
    line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines()
  )
  return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def forget_peak() -> None:
  """Resets the peak of the resident memory of this process (Linux only)."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def measure(path: pathlib.Path, dtype: str) -> dict[str, float]:
  """Measures loading, and in bfloat16 saving, in this process.

  The process must not have done anything else before.

  Args:
    path: directory of the checkpoint.
    dtype: dtype of the loaded parameters.

  Returns:
    Sizes in GiB, seconds, and the ratio of `excess` to the largest tensor.
  """
  import jax

  from jaxrl_vlm import models
  from jaxrl_vlm.models import names, weights

  config = models.from_directory(path)
  jax.block_until_ready(jax.numpy.zeros(8) + 1)  # excludes the memory of the backend itself
  shapes = models.abstract_params(config, dtype)
  forget_peak()
  before, _ = resident()
  began = time.monotonic()
  params = jax.block_until_ready(weights.load_params(path, config, shapes))
  seconds = time.monotonic() - began
  _, peak = resident()
  flat = weights.by_path(params)
  arrays = sum(x.nbytes for x in flat.values())
  largest = 2 * max(flat[e.path].size // len(e.layers or [0]) for e in names.entries(config))
  result = {
    "files": sum(f.stat().st_size for f in path.glob("*.safetensors")) / GIB,
    "device_arrays": arrays / GIB,
    "largest_tensor": largest / GIB,
    "peak": (peak - before) / GIB,
    "excess": (peak - before - arrays) / GIB,
    "excess_over_largest_tensor": (peak - before - arrays) / largest,
    "seconds": seconds,
  }
  if dtype != "bfloat16":
    return result
  saved = path / "saved"
  forget_peak()
  held, _ = resident()
  began = time.monotonic()
  weights.save_params(saved, config, params, shard_bytes=2 * GIB)
  result |= {
    "save_seconds": time.monotonic() - began,
    "save_shard": 2.0,
    "save_excess": (resident()[1] - held) / GIB,
  }
  for file in saved.iterdir():
    file.unlink()
  saved.rmdir()
  return result


def table(results: dict[str, dict[str, float]]) -> str:
  """Returns the Markdown table of the results by dtype."""
  head = [
    "parameter dtype",
    "checkpoint files",
    "device arrays",
    "largest tensor",
    "peak memory",
    "peak minus arrays",
    "seconds",
  ]
  rows = [head, ["---"] + ["--:"] * (len(head) - 1)]
  for dtype, r in results.items():
    sizes = (r[k] for k in ("files", "device_arrays", "largest_tensor", "peak", "excess"))
    rows.append([dtype, *(f"{x:.2f} GiB" for x in sizes), f"{r['seconds']:.0f}"])
  return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="Qwen2.5-VL-3B", help="name of a published model")
  parser.add_argument(
    "--path",
    type=pathlib.Path,
    default=pathlib.Path("runs/load"),
    help="directory of the checkpoint; it is written if it does not exist",
  )
  parser.add_argument("--measure", help=argparse.SUPPRESS)  # a dtype
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.path, args.measure)))
    return
  write_checkpoint(args.path, args.model)
  results = {}
  for dtype in ("bfloat16", "float32"):
    done = subprocess.run(
      [sys.executable, __file__, f"--measure={dtype}", f"--path={args.path}"],
      check=True,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    results[dtype] = json.loads(done.stdout.splitlines()[-1])
  date = datetime.date.today().isoformat()
  machine = f"{platform.machine()}, {os.cpu_count()} cores, CPU backend"
  RESULT.write_text(
    json.dumps(
      {
        "model": args.model,
        "date": date,
        "machine": machine,
        **{dtype: {k: round(v, 3) for k, v in r.items()} for dtype, r in results.items()},
      },
      indent=1,
    )
    + "\n"
  )
  page = f"{table(results)}\n\nMeasured on {date}: {machine}."
  before, _, rest = PAGE.read_text().partition(BEGIN)
  PAGE.write_text(f"{before}{BEGIN}\n\n{page}\n\n{END}{rest.partition(END)[2]}")
  print(page)


if __name__ == "__main__":
  main()

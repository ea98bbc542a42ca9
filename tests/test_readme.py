"""Runs the examples of the README in their order."""

import io
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_vlm import metrics
from tests import tiny_run

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Flags that are added to a training command, so that it takes seconds.
SMALL = (
  "steps=2",
  "prompts_per_step=4",
  "num_samples=2",
  "max_tokens=8",
  "eval.examples=4",
  "eval.batch=4",
)


def blocks(text: str) -> list[tuple[str, str]]:
  """Returns (language, content) of the fenced code blocks that have a language."""
  return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def write_tfds(folder: pathlib.Path) -> None:
  """Prepares a TFDS dataset `my_digits` with the features that the command of the README names."""
  import tensorflow_datasets as tfds
  from PIL import Image

  class MyDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            "picture": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "question": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=[str(i) for i in range(10)]),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples() for split in ("train", "test")}

    def _generate_examples(self):
      for i in range(8):
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), 25 * i, np.uint8)).save(file, "png")
        file.seek(0)
        yield i, {"picture": file, "question": "What digit is this?", "label": i}

  MyDigits(data_dir=folder).download_and_prepare(file_format="array_record")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A folder with the files of a clone that the examples use, and a TFDS dataset."""
  path = tmp_path_factory.mktemp("readme")
  for name in ("configs", "checkpoints"):
    (path / name).symlink_to(ROOT / name)
  write_tfds(path / "tfds")
  return path


def shell(command: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
  path = [os.path.dirname(sys.executable), os.environ["PATH"]]
  environment = os.environ | {
    "PATH": os.pathsep.join(path),
    "PYTHONPATH": str(ROOT),
    "TFDS_DATA_DIR": str(folder / "tfds"),
    "XLA_FLAGS": tiny_run.xla_flags(1),
  }  # one device, as most users have
  return subprocess.run(
    ["bash", "-euo", "pipefail", "-c", command],
    cwd=folder,
    env=environment,
    text=True,
    capture_output=True,
    timeout=300,
  )


def smaller(command: str) -> str:
  return command.rstrip() + "".join(f" '--config.stages[0].{setting}'" for setting in SMALL)


@pytest.mark.slow
def test_the_examples_run(folder):
  """Runs every block except the installation commands and plans.

  A Python block that starts with the name of a file is written to that file instead.
  """
  # Plans take minutes and have their own tests.
  examples = [
    block for block in blocks(README) if "venv" not in block[1] and "jaxrl_vlm.plan" not in block[1]
  ]
  assert [language for language, _ in examples] == [
    "bash",
    "bash",
    "python",
    "bash",
    "bash",
    "python",
    "bash",
    "python",
  ]
  for language, text in examples:
    name = re.match(r"# (\w+\.py)\n", text)
    if name:
      (folder / name[1]).write_text(text)
      continue
    if language == "python":
      (folder / "example.py").write_text(text)
      text = "python example.py"
    run = shell(smaller(text) if language == "bash" else text, folder)
    assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"

  last = run.stdout.splitlines()  # output of the example of the Python API
  assert last[0].endswith("Right: 17") and len(last) >= 5
  assert (folder / "my_model" / "model.safetensors").stat().st_size > 0

  runs = {path.name: metrics.read(path) for path in (folder / "runs").iterdir()}
  assert set(runs) == {"vppo", "lora", "my_data", "my_tfds", "my_reward"}
  for name, records in runs.items():
    trained = [record for record in records if "train/reward" in record]
    assert [record["step"] for record in trained] == [1, 2], name
    assert (folder / "runs" / name / "model" / "model.safetensors").exists()
    assert (folder / "runs" / name / "report.html").exists()
  assert (folder / "runs" / "lora" / "adapter" / "adapter_model.safetensors").exists()
  for record in runs["my_reward"]:
    if "train/reward" in record:
      parts = record["train/reward/near"], record["train/reward/format"]
      assert record["train/reward"] == pytest.approx(0.9 * parts[0] + 0.1 * parts[1])
      assert record["train/accuracy"] == record["train/reward/exact"]


def test_ci_runs_the_test_command_of_the_readme():
  """After it, CI runs the exhaustive tests."""
  commands = [text.strip() for _, text in blocks(README) if "venv" in text]
  assert len(commands) == 2
  script = (ROOT / ".ci" / "run").read_text()
  environment, install, test = commands[1].split(" && ")
  lines = script.splitlines()
  assert environment in lines and install in lines and test in lines
  assert lines[-1] == f"exec {test} -m exhaustive"
  assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_linked_files_exist():
  for target in re.findall(r"\]\(([^)]+)\)", README):
    assert (ROOT / target).exists(), target
  for path in re.findall(r"`((?:configs|colabs|checkpoints)/[\w./]+)`", README):
    assert (ROOT / path).exists(), path

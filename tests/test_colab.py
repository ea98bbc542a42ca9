"""Tests that the notebook runs from top to bottom, with settings that take seconds."""

import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

from jaxrl_vlm import metrics
from tests import tiny_run

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "colabs" / "quickstart.ipynb"


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_valid_and_has_no_outputs(notebook):
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
  monkeypatch.setenv("JAXRL_VLM_COLAB_STEPS", "2")
  monkeypatch.setenv("JAXRL_VLM_COLAB_RUNS", str(tmp_path))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("XLA_FLAGS", tiny_run.xla_flags(1))  # one device, as most users have
  NotebookClient(
    notebook,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(NOTEBOOK.parent)}},
  ).execute()
  printed = {
    cell.id: "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
    for cell in notebook.cells
    if cell.cell_type == "code"
  }
  pictures = {
    cell.id
    for cell in notebook.cells
    if cell.cell_type == "code"
    for output in cell.outputs
    if "image/png" in output.get("data", {})
  }
  # The cell prints eight greedy answers with their rewards.
  assert len(re.findall(r"^\d\.\d  .*[?.]  ", printed["model"], flags=re.MULTILINE)) == 8
  assert pictures == {"boards", "after", "table", "rollouts"}
  for name in ("grpo", "vppo"):
    change = metrics.before_and_after(metrics.read(tmp_path / name))[0]
    assert f"{name}: held-out accuracy {change.before:.1%} -> {change.after:.1%}" in printed["swap"]
    assert (tmp_path / name / "model" / "model.safetensors").exists()

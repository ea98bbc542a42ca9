"""Pages hold what the commands they name print."""

import json
import pathlib

from benchmarks import load, memory

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "models.md").read_text()


def test_memory_table_is_that_of_its_command():
  assert memory.table() in PAGE


def test_load_table_is_what_was_measured():
  measured = json.loads(load.RESULT.read_text())
  results = {dtype: measured[dtype] for dtype in ("bfloat16", "float32")}
  assert load.table(results) in PAGE and measured["date"] in PAGE
  for result in results.values():
    assert result["files"] > 6e9 / 2**30
    assert result["excess"] < 2 * result["largest_tensor"]

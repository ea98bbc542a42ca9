"""Pages hold what the commands they name print."""

import pathlib

from benchmarks import memory


def test_memory_table_is_that_of_its_command():
  page = (pathlib.Path(__file__).parents[1] / "docs" / "models.md").read_text()
  assert memory.table() in page

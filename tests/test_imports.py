"""Checks the order of imports: a part of the package imports only parts of lower layers."""

import ast
import pathlib
from collections.abc import Iterator, Mapping

import pytest

PACKAGE = "jaxrl_vlm"
ROOT = pathlib.Path(__file__).parent.parent / PACKAGE

# The layers from top to bottom. A part is a module or subpackage of jaxrl_vlm. Add new parts here.
LAYERS = (
  {"train", "plan", "convert", "view"},  # entry points: nothing imports them
  {"planning"},
  {"stages"},
  {"rollout", "scoring", "report", "evaluate", "scratch"},
  {
    "objectives",
    "models",
    "rewards",
    "data",
    "checkpoint",
    "metrics",
    "views",
    "packing",
    "flops",
    "memory",
  },
  {"types", "config", "parallel"},
  {"example", "errors", "hf_config"},
)
# Imports that are allowed although both parts are in the same layer: (importing, imported).
NEIGHBOURS = {
  ("evaluate", "rollout"),
  ("models", "data"),
  ("data", "rewards"),
  ("flops", "models"),
  ("memory", "models"),
  ("memory", "packing"),
}
# Parts with stricter rules: the only parts that they may import.
ONLY = {
  "objectives": {"types"},
  "rewards": {"example", "errors"},
  "types": {"example"},
}
# Worker processes import these parts, which must not load jax, directly or indirectly.
NO_JAX = ("rewards", "data", "config", "metrics", "train", "plan", "example", "errors", "hf_config")
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


def part_of(module: str) -> str:
  """Returns "data" for jaxrl_vlm.data.images, and "" for the package itself."""
  return module.partition(".")[2].partition(".")[0]


def is_type_checking(node: ast.AST) -> bool:
  test = node.test if isinstance(node, ast.If) else None
  return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def imports(
  tree: ast.AST, module: str, known: Mapping[str, ast.AST], loading: bool = False
) -> Iterator[str]:
  """Yields the full names of all modules that a module imports.

  Args:
    tree: syntax tree of the module.
    module: its name.
    known: syntax trees of all modules of the package, by name.
    loading: yield only modules that are loaded when this module is imported, and not those that
      functions import or that are imported for type checking.
  """
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{module}: relative import; write the full name"
      for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield inner if inner in known else str(node.module)
    elif loading and (
      isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
      or is_type_checking(node)
    ):
      continue
    else:
      yield from imports(node, module, known, loading)


def violations(sources: Mapping[str, str]) -> list[str]:
  """Returns a message for each import that breaks the rules. `sources`: source text by module."""
  trees = {module: ast.parse(text) for module, text in sources.items()}
  level = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}
  found = []

  loads: dict[str, set[str]] = {}
  for module, tree in trees.items():
    part = part_of(module)
    loads[module] = set(imports(tree, module, trees, loading=True))
    if not part:
      continue  # the public API may import everything, because it does so on first use
    if part not in level:
      found.append(f"{module}: {part} has no place in LAYERS")
      continue
    for target in set(imports(tree, module, trees)):
      if target.partition(".")[0] != PACKAGE:
        continue
      other = part_of(target)
      if not other:
        found.append(f"{module} imports the public API; import the module that defines the name")
      elif other == part:
        continue
      elif other not in level:
        found.append(f"{module} imports {target}, which has no place in LAYERS")
      elif part in ONLY and other not in ONLY[part]:
        found.append(f"{module} imports {target}; {part} may import {sorted(ONLY[part])}")
      elif level[other] <= level[part] and (part, other) not in NEIGHBOURS:
        found.append(f"{module} imports {target}, which is not below it")

  for module in trees:
    if part_of(module) not in (*NO_JAX, ""):
      continue
    reached, todo = set(), [module]
    while todo:
      for name in loads.get(todo.pop(), ()):
        # Importing a.b.c also imports a and a.b.
        pieces = name.split(".")
        for end in range(1, len(pieces) + 1):
          whole = ".".join(pieces[:end])
          if whole not in reached:
            reached.add(whole)
            todo.append(whole)
    if reached & JAX:
      found.append(f"{module} loads {', '.join(sorted(reached & JAX))} when imported")
  return sorted(found)


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_package_follows_the_import_rules():
  sources = {module_name(path): path.read_text() for path in ROOT.rglob("*.py")}
  assert PACKAGE in sources and f"{PACKAGE}.stages.rl" in sources
  assert violations(sources) == []


BASE = {
  "jaxrl_vlm": "",
  "jaxrl_vlm.example": "import dataclasses",
  "jaxrl_vlm.types": "import jax\nfrom jaxrl_vlm.example import Example",
  "jaxrl_vlm.models": "import jax",
  "jaxrl_vlm.stages": "from jaxrl_vlm import models, types",
}


@pytest.mark.parametrize(
  ("module", "source", "complaint"),
  [
    (
      "jaxrl_vlm.models.qwen",
      "from jaxrl_vlm import stages",
      "jaxrl_vlm.stages, which is not below",
    ),
    ("jaxrl_vlm.models.qwen", "def f():\n  import jaxrl_vlm.stages", "jaxrl_vlm.stages, which is"),
    ("jaxrl_vlm.objectives", "from jaxrl_vlm import models", "objectives may import ['types']"),
    ("jaxrl_vlm.rollout", "from jaxrl_vlm import Example", "imports the public API"),
    ("jaxrl_vlm.train", "import jax", "jaxrl_vlm.train loads jax"),
    ("jaxrl_vlm.rewards", "import optax.losses", "jaxrl_vlm.rewards loads optax"),
    ("jaxrl_vlm.data", "from jaxrl_vlm.types import Prompt", "jaxrl_vlm.data loads jax"),
    ("jaxrl_vlm.data", "try:\n  import jax\nexcept ImportError:\n  pass", "data loads jax"),
    ("jaxrl_vlm.helpers", "", "helpers has no place in LAYERS"),
  ],
)
def test_violations_are_found(module, source, complaint):
  assert violations(BASE) == []
  found = violations(BASE | {module: source})
  assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize(
  "source",
  [
    "def f():\n  import jax",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from jaxrl_vlm.types import Prompt",
    "from jaxrl_vlm.example import Example",
  ],
)
def test_imports_that_do_not_load_jax_are_allowed_in_data(source):
  assert violations(BASE | {"jaxrl_vlm.data": source}) == []

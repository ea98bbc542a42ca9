"""Tests that the pages agree with the code and contain the output of the commands they name."""

import ast
import dataclasses
import functools
import json
import pathlib
import re
import shlex
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import load, memory, performance, suite
from benchmarks import objectives as comparison
from jaxrl_vlm import config as config_lib
from jaxrl_vlm import objectives, stages
from jaxrl_vlm.objectives import dpo
from jaxrl_vlm.stages import loading
from jaxrl_vlm.stages.programs import Programs
from tests.objectives import test_properties as properties

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
OBJECTIVES = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_memory_table_is_the_output_of_its_command():
  assert memory.table() in PAGE


def test_the_load_table_has_the_measured_values():
  measured = json.loads(load.RESULT.read_text())
  results = {dtype: measured[dtype] for dtype in ("bfloat16", "float32")}
  assert load.table(results) in PAGE and measured["date"] in PAGE
  for result in results.values():
    assert result["files"] > 6e9 / 2**30
    assert result["excess"] < 2 * result["largest_tensor"]


def test_the_performance_tables_have_the_measured_values():
  found = performance.tables()
  assert {"rl_step", "decode", "host"} <= set(found)
  page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
  for name, tables in found.items():
    for table in tables:
      assert table in page, f"{name}: python benchmarks/performance.py prints\n{table}"
    assert f"benchmarks/{name}.py" in page


# -- docs/objectives.md ---------------------------------------------------------------------------

# Heading of a section: the class that defines the fields in its table.
OWNERS: dict[str, type] = {
  "Aggregation": objectives.Objective,
  "Advantages": objectives.PolicyGradient,
  "Policy loss": objectives.PolicyGradient,
  "KL to the reference": objectives.PolicyGradient,
  "Sampler and trainer": objectives.PolicyGradient,
  "Groups": objectives.Objective,
  "Excluded responses": objectives.PolicyGradient,
  "VPPO": objectives.VPPO,
  "PAPO": objectives.PAPO,
  "Masks": objectives.Objective,
  "DPO": objectives.DPO,
}
CLASSES = (*dict.fromkeys(OWNERS.values()), objectives.SFT)


def section(title: str) -> str:
  """Returns the text below a heading, up to the next heading of level 2 or deeper."""
  found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^##|\Z)", OBJECTIVES, re.M | re.S)
  assert found, title
  return found[1]


def rows(text: str) -> list[list[str]]:
  """Returns the cells of all tables, without the header rows."""
  lines = [line for line in text.splitlines() if line.startswith("|")]
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  return [
    row
    for row, after in zip(cells, [*cells[1:], [""]], strict=True)
    if "---" not in row[0] and "---" not in after[0]
  ]


def blocks(language: str) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```$", OBJECTIVES, re.M | re.S)


def spans(text: str) -> list[str]:
  return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def own(cls: type) -> dict[str, Any]:
  """Returns the fields that a class adds or whose default it changes, with their defaults."""
  parents = {
    f.name: f.default
    for base in cls.__mro__[1:]
    if dataclasses.is_dataclass(base)
    for f in dataclasses.fields(base)
  }
  return {
    f.name: f.default
    for f in dataclasses.fields(cls)
    if f.name not in parents or parents[f.name] != f.default
  }


def test_every_method_is_in_the_table_with_the_fields_that_it_changes():
  table = {row[0].strip("`"): row for row in rows(section("Methods")) if row[0].startswith("`")}
  assert tuple(sorted(table)) == tuple(sorted(objectives.names()))
  for name, (_, what, changes, *_) in table.items():
    objective = objectives.create(name, max_length=16)
    expected = {
      field.name: getattr(objective, field.name)
      for field in dataclasses.fields(objective)
      if field.name != "max_length" and getattr(objective, field.name) != field.default
    }
    written = {key: literal(value) for key, value in (x.split("=") for x in spans(changes))}
    assert what and written == expected, name


def test_every_field_is_in_the_tables_with_its_default():
  for cls in CLASSES:
    written = {}
    for title in (title for title, owner in OWNERS.items() if owner is cls):
      for name, default, meaning in rows(section(title)):
        assert meaning and name not in written
        written[name.strip("`")] = literal(default.strip("`"))
    assert written == own(cls), cls.__name__


def test_the_page_names_every_choice_of_a_field_and_only_valid_settings():
  known = [field for cls in CLASSES for field in dataclasses.fields(cls)]
  everything = set(spans(OBJECTIVES))
  for field in known:
    if field.metadata["expected"].startswith("one of "):
      for choice in re.findall(r"'([^']+)'", field.metadata["expected"]):
        assert choice in everything, (field.name, choice)
  for span in everything:
    setting = re.fullmatch(r"(\w+)=(\S+)", span)
    if setting:
      name, value = setting[1], literal(setting[2])
      assert any(f.name == name and f.metadata["valid"](value) for f in known), span


def metrics_of(objective: objectives.Objective, stats, masked_stats, experience) -> set[str]:
  """Returns the names of the metrics of a minibatch, without computing them."""

  def everything(stats, masked_stats, experience):
    experience = objective.prepare(experience)
    views: Any = dict.fromkeys(objective.grad_views, masked_stats)
    return objective.prepare_metrics(experience) | objective.loss(stats, experience, **views)[1]

  return set(jax.eval_shape(everything, stats, masked_stats, experience))


def test_every_metric_is_in_the_table():
  written = {row[0].strip("`") for row in rows(section("Metrics"))}
  inputs = properties.batch(0)
  pairs = jax.tree.map(lambda x: x[:, :2], inputs)
  every = properties.OBJECTIVES | {
    "sft": objectives.create("sft"),
    "overlong": objectives.create("grpo", max_length=16, overlong_buffer=4),
  }
  assert every.keys() | {"dpo"} >= set(objectives.names())
  produced = metrics_of(dpo.DPO(), *pairs)
  for objective in every.values():
    produced |= metrics_of(objective, *inputs)
  experience = inputs[-1]
  no_self: Any = None  # the method does not use its instance
  compare = functools.partial(Programs._compare, no_self)
  logp, mask = experience.sampler_logp, experience.mask
  produced |= set(jax.eval_shape(compare, logp, logp, mask))
  assert {x for x in written if x.startswith("objective/")} == {f"objective/{x}" for x in produced}

  source = "".join(
    (ROOT / "jaxrl_vlm" / "stages" / name).read_text() for name in ("rl.py", "run.py")
  )
  logged = {"train/loss", "train/grad_norm", "train/bad_steps"}
  for name in re.findall(r'"(train/[^"]+)"', source):
    logged.add(name.replace("reward/{k}", "reward/NAME").replace("grader_{k}", "grader_KIND"))
  assert {x for x in written if x.startswith("train/")} == logged - {"train/{key}"}


def test_the_commands_are_valid_and_every_flag_changes_the_objective(monkeypatch):
  monkeypatch.chdir(ROOT)
  commands = blocks("bash")
  assert len(commands) == 4
  for command in commands:
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "jaxrl_vlm.train"]
    config = config_lib.load(words[3:]).config
    stages.check(config)
    # Every flag changes a field of the objective.
    objective = loading.objective_of(config.stages[0])
    plain = objectives.create(config.stages[0].objective.name, max_length=objective.max_length)
    flags = [word for word in words if ".objective." in word and ".name=" not in word]
    assert sum(
      getattr(objective, f.name) != getattr(plain, f.name) for f in dataclasses.fields(objective)
    ) == len(flags)


def test_the_example_of_a_new_objective_works(monkeypatch):
  namespace: dict[str, Any] = {"__name__": "example"}
  (text,) = blocks("python")
  exec(text, namespace)
  line = re.search(r'`("entropy_advantage": .*?\}\))`', OBJECTIVES)
  assert line
  ((name, method),) = eval("{" + line[1] + "}", namespace).items()
  monkeypatch.setitem(objectives._METHODS, name, method)

  objective = objectives.create(name, bonus=0.7)
  stats, masked_stats, experience = properties.batch(0)
  prepared = jax.device_get(properties.prepare(objective, experience))
  plain = np.where(experience.mask, experience.advantages, 0)
  bonus = np.minimum(0.7 * experience.old.entropy, np.abs(plain) / 2)
  np.testing.assert_allclose(prepared.advantages, plain + bonus, rtol=1e-6)
  assert float(objective.prepare_metrics(prepared)["bonus"]) == pytest.approx(
    bonus[experience.mask].mean(), rel=1e-5
  )

  whole, gradients = properties.loss(objective, stats, masked_stats, prepared)
  assert np.any(gradients[0]) and not np.any(np.where(experience.mask, 0, gradients[0]))
  halves = [
    properties.loss(
      objective, *jax.tree.map(lambda x, i=i: x[i : i + 2], (stats, masked_stats, prepared))
    )
    for i in (0, 2)
  ]
  assert sum(float(half[0][0]) for half in halves) == pytest.approx(float(whole[0]), rel=1e-5)
  with pytest.raises(ValueError, match=r"config\.objective\.bonus_limit=1: expected a number > 1"):
    objectives.create(name, bonus_limit=1)


def test_linked_files_exist_and_the_comparison_has_its_markers():
  for target in re.findall(r"\]\(([^)]+)\)", OBJECTIVES):
    assert (ROOT / "docs" / target).exists(), target
  for path in re.findall(r"`((?:tests|benchmarks|configs|jaxrl_vlm)/[\w/]+\.py)`", OBJECTIVES):
    assert (ROOT / path).exists(), path
  compared = section("Comparison").splitlines()
  assert compared.count(comparison.BEGIN) == 1 == compared.count(comparison.END)
  assert compared.index(comparison.BEGIN) < compared.index(comparison.END)


def test_the_tables_of_test_times_are_those_of_their_benchmark():
  results = json.loads(suite.RESULT.read_text())
  for page, table in zip(
    ("CONTRIBUTING.md", "docs/testing.md"), suite.tables(results), strict=True
  ):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.partition(suite.BEGIN)[2].partition(suite.END)[0].strip() == table, page

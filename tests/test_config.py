"""Tests command lines, overrides, and the check that a workdir belongs to one config."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from ml_collections import ConfigDict, config_dict

from jaxrl_vlm import config as config_lib
from jaxrl_vlm.errors import UserError, WorkdirError, hint, validation

CONFIG_TEXT = """
from ml_collections import ConfigDict

def get_config():
  config = ConfigDict({"seed": 0, "learning_rate": 1e-3, "remat": False, "name": "q", "init": None,
                       "mesh": (1, 1)})
  config.stages = (
      dict(name="sft", steps=5, objective=dict(name="nll"), rewards=None),
      ConfigDict(dict(name="rl", steps=9, objective=dict(name="grpo"), rewards=dict(math=1.0))),
  )
  return config
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "quick.py"
  path.write_text(CONFIG_TEXT)
  return str(path)


def load(config_file, *overrides):
  return config_lib.load([f"--config={config_file}", "--workdir=w", *overrides]).config


def read_back(config) -> Any:
  return config_lib.from_json(config_lib.to_json(config))


def failure(*argv):
  with pytest.raises(UserError) as error:
    config_lib.load(argv)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  ("flag", "read", "expected"),
  [
    ("--config.seed=3", lambda c: c.seed, 3),
    ("--config.seed=-3", lambda c: c.seed, -3),
    ("--config.learning_rate=1", lambda c: c.learning_rate, 1.0),
    ("--config.learning_rate=2e-5", lambda c: c.learning_rate, 2e-5),
    ("--config.remat=true", lambda c: c.remat, True),
    ("--config.remat", lambda c: c.remat, True),
    ("--config.name=a=b, c", lambda c: c.name, "a=b, c"),
    ("--config.name=7", lambda c: c.name, "7"),
    ("--config.init=base/model", lambda c: c.init, "base/model"),
    ("--config.init=0.5", lambda c: c.init, 0.5),
    ("--config.mesh=(4, 2)", lambda c: c.mesh, (4, 2)),
    ("--config.mesh=[4, 2]", lambda c: c.mesh, (4, 2)),
    ("--config.mesh[1]=2", lambda c: c.mesh, (1, 2)),
    ("--config.stages[0].steps=10", lambda c: c.stages[0].steps, 10),
    ("--config.stages[-1].steps=10", lambda c: c.stages[1].steps, 10),
    ("--config.stages[1].objective.name=vppo", lambda c: c.stages[1].objective.name, "vppo"),
    ("--config.stages[1].objective.clip_high=0.3", lambda c: c.stages[1].objective.clip_high, 0.3),
    ("--config.stages[1].objective.ratio=token", lambda c: c.stages[1].objective.ratio, "token"),
    (
      "--config.stages[1].rewards.format=1",
      lambda c: c.stages[1].rewards.to_dict(),
      {"math": 1.0, "format": 1},
    ),
    (
      "--config.stages[1].rewards={'exact': 0.5}",
      lambda c: c.stages[1].rewards.to_dict(),
      {"exact": 0.5},
    ),
    (
      "--config.stages[1].rewards={'own.module:judge': 1.0}",
      lambda c: read_back(c).stages[1].rewards.to_dict(),
      {"own.module:judge": 1.0},
    ),
    ("--config.stages[0].rewards.math=0.9", lambda c: c.stages[0].rewards.to_dict(), {"math": 0.9}),
  ],
)
def test_override_sets_the_value_with_the_type_of_the_field(config_file, flag, read, expected):
  value = read(load(config_file, flag))
  assert value == expected
  assert type(value) is type(expected)


def test_overrides_change_no_other_field_and_the_last_one_wins(config_file):
  base = load(config_file)
  config = load(config_file, "--config.stages[0].steps", "10", "--config.seed=1", "--config.seed=2")
  assert config_lib.diff(base, config) == ["config.seed: 0 -> 2", "config.stages[0].steps: 5 -> 10"]


def test_override_of_a_referenced_field_changes_the_fields_that_refer_to_it():
  config = ConfigDict({"steps": 4, "n": config_dict.placeholder(int)})
  config.warmup = config.get_ref("steps") * 2
  config_lib.override(config, "config.steps", "5")
  config_lib.override(config, "config.n", "6")
  assert (config.steps, config.warmup, config.n) == (5, 10, 6)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.sed=3", "config.sed: no such field; did you mean 'seed'?"),
    (
      "--config.stages[1].objectiv.name=vppo",
      "config.stages[1].objectiv: no such field; did you mean 'objective'?",
    ),
    (
      "--config.stages[1].zzz=1",
      "config.stages[1].zzz: no such field; valid: name, objective, rewards, steps",
    ),
    ("--config.stages[2].steps=1", "config.stages[2]: index out of range; valid: 0 to 1"),
    (
      "--config.stages.steps=1",
      "config.stages.steps: no such field; config.stages is a list: write config.stages[0].steps",
    ),
    ("--config.seed[0]=1", "config.seed[0]: config.seed is not a list, so it has no [0]"),
    ("--config.seed.x=1", "config.seed.x: no such field; config.seed is 0"),
    ("--config.seed=abc", "config.seed='abc': expected int"),
    ("--config.seed=1.5", "config.seed='1.5': expected int"),
    ("--config.seed=True", "config.seed='True': expected int"),
    ("--config.seed", "config.seed: no value given; write --config.seed=VALUE"),
    ("--config.learning_rate=fast", "config.learning_rate='fast': expected float"),
    ("--config.remat=maybe", "config.remat='maybe': expected bool (True or False)"),
    ("--config.mesh=4", "config.mesh='4': expected tuple, e.g. (1, 2)"),
    ("--config.mesh=(4, 'x')", "config.mesh=\"(4, 'x')\": expected tuple of int"),
    ("--config.stages=3", "config.stages='3': expected one field of one item, e.g. [0].name"),
    (
      "--config.stages[0]=3",
      "config.stages[0]='3': expected a field of it; fields: name, objective, rewards, steps",
    ),
    ("--config..seed=3", "--config..seed: fields look like config.field or config.stages[1].field"),
    (
      "--workdr=x",
      "--workdr: no such flag; did you mean 'workdir'?; config fields are written"
      " --config.FIELD=VALUE",
    ),
    (
      "--seed=3",
      "--seed: no such flag; valid: config, workdir; config fields are written"
      " --config.FIELD=VALUE",
    ),
    ("stray", "'stray': flags look like --name=value; see --help"),
  ],
)
def test_error_of_a_wrong_flag_is_one_line_that_names_it(config_file, flag, message):
  assert failure(f"--config={config_file}", "--workdir=w", flag) == message


def test_error_of_a_missing_flag_has_an_example(config_file):
  example = (
    "; example: python -m jaxrl_vlm.train --config=configs/quickstart.py --workdir=runs/quickstart"
  )
  assert failure(f"--config={config_file}") == (
    "--workdir is missing (directory for all files of the run)" + example
  )
  assert failure("--workdir=w") == "--config is missing (Python file with get_config())" + example
  assert failure("--workdir=", f"--config={config_file}") == (
    "--workdir: no value given; example: --workdir=runs/quickstart"
  )


def test_errors_of_invalid_config_files(tmp_path, config_file):
  def message(name, text=None):
    path = tmp_path / name
    if text is not None:
      path.write_text(text)
    return failure(f"--config={path}", "--workdir=w").replace(f"{tmp_path}{os.sep}", "")

  assert message("quik.py") == "--config=quik.py: no such file; did you mean 'quick.py'?"
  assert message("a.py", "import nothing_of_that_name\n") == (
    "--config=a.py: does not import: ModuleNotFoundError: No module named 'nothing_of_that_name'"
    " (a.py:1)"
  )
  assert message("b.py", "\nx = (\n").startswith("--config=b.py: does not import: SyntaxError:")
  assert message("c.py", "x = 1\n") == (
    "--config=c.py: has no function get_config() that returns a ConfigDict"
  )
  assert message("d.py", "def get_config():\n  return {}['lr']\n") == (
    "--config=d.py: get_config() fails: KeyError: 'lr' (d.py:2)"
  )
  assert message("e.py", "def get_config():\n  return {}\n") == (
    "--config=e.py: get_config() returned a dict, expected a ConfigDict"
  )


def test_config_file_imports_files_of_its_directory_from_any_working_directory(
  tmp_path, monkeypatch
):
  folder = tmp_path / "recipes_of_this_test"
  folder.mkdir()
  (folder / "common.py").write_text(CONFIG_TEXT)
  (folder / "mine.py").write_text(
    "from recipes_of_this_test import common\n"
    "def get_config():\n  c = common.get_config()\n  c.seed = 7\n  return c\n"
  )
  monkeypatch.chdir("/")
  path = list(sys.path)
  assert load(str(folder / "mine.py")).seed == 7
  assert sys.path == path


def test_json_round_trip_is_stable(config_file):
  config = load(config_file)
  text = config_lib.to_json(config)
  again = read_back(config)
  assert config_lib.to_json(again) == text
  assert config_lib.diff(config, again) == []
  assert again.mesh == (1, 1)
  assert again.stages[1].objective.name == "grpo"
  assert list(json.loads(text)) == sorted(json.loads(text))
  with pytest.raises(UserError, match=r"^config\.stages\[0\]\.f=.*: expected a number"):
    config_lib.to_json(ConfigDict({"stages": (ConfigDict({"f": object()}),)}))


def test_diff_shows_added_and_removed_fields(config_file):
  old = load(config_file, "--config.mesh=(2, 1)")
  new = load(config_file, "--config.stages[1].objective.clip_high=0.3")
  assert config_lib.diff(old, new) == [
    "config.mesh: (2, 1) -> (1, 1)",
    "config.stages[1].objective.clip_high: (absent) -> 0.3",
  ]


def test_workdir_belongs_to_one_config(tmp_path, config_file):
  workdir = tmp_path / "deep" / "run"
  config = load(config_file)
  config_lib.check_workdir(workdir, config)
  written = (workdir / "config.json").read_text()
  assert written == config_lib.to_json(config)
  config_lib.check_workdir(workdir, load(config_file))

  other = load(config_file, "--config.seed=1", "--config.stages[1].steps=8")
  with pytest.raises(WorkdirError) as error:
    config_lib.check_workdir(workdir, other)
  assert str(error.value) == (
    f"--workdir={workdir}: holds a run with another config (config.seed: 0 -> 1;"
    " config.stages[1].steps: 9 -> 8); choose another --workdir for a new run, or set these"
    " fields back to resume that one"
  )
  assert (workdir / "config.json").read_text() == written

  config_lib.check_workdir(workdir, other, may_change=("config.seed", "config.stages[1]"))
  assert (workdir / "config.json").read_text() == config_lib.to_json(other)
  assert os.listdir(workdir) == ["config.json"]

  other = load(config_file, "--config.seed=1", "--config.stages[1].steps=7")
  with pytest.raises(WorkdirError, match=r"another config \(config.stages\[1\].steps: 8 -> 7\)"):
    config_lib.check_workdir(workdir, other, ("config.stages[].step", "config.stages[2]"))
  config_lib.check_workdir(workdir, other, may_change=("config.stages[].steps",))


def test_errors_of_unusable_workdirs(tmp_path, config_file):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"^--workdir=.*file: cannot write .*config\.json: "):
    config_lib.check_workdir(tmp_path / "file", load(config_file))
  (tmp_path / "config.json").write_text('{"seed": ')
  with pytest.raises(WorkdirError, match=r"config\.json: not a config .* choose another --workdir"):
    config_lib.check_workdir(tmp_path, load(config_file))


def test_errors_are_one_line_with_code_2_and_bugs_keep_their_traceback(tmp_path, config_file):
  program = tmp_path / "program.py"
  program.write_text("""
import sys
from jaxrl_vlm import config
from jaxrl_vlm.errors import validation

def main(args):
  with validation("config.stages[1]."):
    if args.config.seed == 1:
      raise ValueError("objective.name='vpo': no such objective;\\n did you mean 'vppo'?")
  if args.config.seed == 2:
    raise ValueError("a bug")
  print(args.workdir, args.config.stages[1].objective.name, "jax" in sys.modules)

config.run_cli(main, "jaxrl_vlm.train", "Trains a model.")
""")

  def run(*argv):
    done = subprocess.run([sys.executable, str(program), *argv], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

  flags = (f"--config={config_file}", "--workdir", "runs/w")
  assert run(*flags, "--config.stages[1].objective.name=vppo") == (0, "runs/w vppo False\n", "")
  assert run(*flags, "--config.stages[1].stepz=1") == (
    2,
    "",
    "config.stages[1].stepz: no such field; did you mean 'steps'?\n",
  )
  assert run(*flags, "--config.seed=1") == (
    2,
    "",
    "config.stages[1].objective.name='vpo': no such objective; did you mean 'vppo'?\n",
  )
  code, _, stderr = run(*flags, "--config.seed=2")
  assert code == 1
  assert stderr.startswith("Traceback") and stderr.endswith("ValueError: a bug\n")
  code, stdout, _ = run("--help")
  assert code == 0
  assert stdout.startswith("Trains a model.\n")
  assert "'--config.stages[0].objective.name=vppo'" in stdout


def test_flags_of_other_entry_points():
  flags = (config_lib.WORKDIR, config_lib.Flag("port", "of the server", "8000", default="8000"))
  args = config_lib.load(["--workdir=w"], "jaxrl_vlm.view", flags)
  assert vars(args) == {"workdir": "w", "port": "8000"}
  with pytest.raises(UserError, match="^--config.x: no such flag; valid: port, workdir$"):
    config_lib.load(["--workdir=w", "--config.x=1"], "jaxrl_vlm.view", flags)
  assert "--port=VALUE" in config_lib.help_text("jaxrl_vlm.view", "Shows a run.", flags)


def test_hint_and_validation():
  assert hint("vpo", ["grpo", "vppo"]) == "did you mean 'vppo'?"
  assert hint("rowards", ["rewards", "forwards"]) == "did you mean 'rewards' or 'forwards'?"
  assert hint("zzz", ["b", "a"]) == "valid: a, b"
  assert hint("zzz", []) == "there are none"
  with pytest.raises(KeyError), validation():
    raise KeyError("not a mistake of the user")

"""Tests the scripts of tpu_scripts/ with a fake cloud. They have not been run on a real one."""

import json
import os
import pathlib
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
ALL = sorted(SCRIPTS.rglob("*.sh"))
PAGE = ROOT / "docs" / "pods.md"
CONFIG = "configs/quickstart.py"
# Flags with characters that have a meaning for shells.
FLAGS = [
  "--config.stages[0].objective.name=vppo",
  '--config.model.lora.targets=("decoder","vision")',
  "--config.x=it's $HOME `id` $(id) $$ & two  words %i",
  "--config.y=",
  "--config.z=a\\b*?;|<>#~\t!",
]

# A fake of gcloud, kubectl, ssh and other programs. Its file name says which of them it is. It uses
# these files in the directory $WORLD:
# - calls.jsonl: all calls.
# - answers.json: pairs of a pattern and a list of answers. Each call that matches the pattern takes
#   the next answer, and the last answer is repeated. An answer is [output, exit status], or
#   ["do", command] to run a shell command before the call goes on as usual.
# Calls without an answer act on a small cloud with two workers. The bucket and the home directories
# of the workers are directories in $WORLD.
FAKE_PROGRAM = r"""#!PYTHON -SE
import fcntl, json, os, pathlib, re, shutil, subprocess, sys

world = pathlib.Path(os.environ["WORLD"])
name = pathlib.Path(sys.argv[0]).name
words = sys.argv[1:]
line = " ".join([name, *words])

def answer():
  with open(world / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(world / "calls.jsonl", "a") as calls:
      calls.write(json.dumps([name, *words]) + "\n")
    path = world / "answers.json"
    answers = json.loads(path.read_text()) if path.exists() else []
    for pattern, given in answers:
      if re.search(pattern, line):
        first = given.pop(0) if len(given) > 1 else given[0]
        path.write_text(json.dumps(answers))
        return first

def at_home(home, command):
  os.makedirs(home, exist_ok=True)
  return subprocess.run(["bash", "-c", command], cwd=home, stdin=subprocess.DEVNULL,
                        env=os.environ | {"HOME": str(home), "HOST": home.name}).returncode

def flag(prefix):
  return next(word[len(prefix):] for word in words if word.startswith(prefix))

def homes():
  which = flag("--worker=")
  return [world / "homes" / i for i in ("0", "1") if which in ("all", i)]

def cloud():
  node, bucket = world / "node", world / "bucket"
  if "describe" in words:
    if "queued-resources" in words or not node.exists():
      sys.exit("ERROR: NOT_FOUND: Resource was not found")
    print(node.read_text())
  elif "create" in words:
    node.write_text("READY")
  elif "delete" in words:
    node.unlink()
    for home in (world / "homes").glob("*"):
      at_home(home, "kill -KILL -- -$(cat .jaxrl_vlm/*/keeper) 2>/dev/null")
      shutil.rmtree(home)
    (world / "mnt").unlink(missing_ok=True)
  elif "ssh" in words:
    sys.exit(max(at_home(home, flag("--command=")) for home in homes()))
  elif "scp" in words:
    for home in homes():
      os.makedirs(home, exist_ok=True)
      shutil.copy(words[4], home / words[5].split(":")[1])
  elif "ls" in words:
    path = bucket / words[-1].removeprefix("gs://my-bucket/")
    if not path.exists():
      sys.exit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
      print(f"gs://my-bucket/{each.relative_to(bucket)}" + "/" * each.is_dir())

first = answer()
if first is not None:
  if first[0] == "do":
    subprocess.run(["bash", "-c", first[1]], check=True)
  else:
    print(first[0], file=sys.stderr if first[1] else sys.stdout)
    sys.exit(first[1])
if name == "gcloud":
  cloud()
elif name == "ssh":
  sys.exit(at_home(world / "homes" / words[-2], words[-1]))
elif name == "scp":
  home = world / "homes" / words[-1].split(":")[0]
  os.makedirs(home, exist_ok=True)
  shutil.copy(words[-2], home / words[-1].split(":")[1])
elif name == "kubectl":
  shutil.copy(words[-1], world / "applied.yaml")
elif name == "sudo":
  sys.exit(subprocess.run(words).returncode)
elif name == "mountpoint":
  sys.exit(0 if os.path.islink(words[-1]) else 1)
elif name == "gcsfuse":
  if words == ["--version"]:
    print("gcsfuse version 3.4.4 (Go version go1.24.11)")
  elif not os.path.islink(words[-1]):  # both workers use the same directory
    os.rmdir(words[-1])
    os.symlink(world / "bucket", words[-1])
    (world / "mounted").write_text(words[-2])
elif name == "findmnt":
  print((world / "mounted").read_text())
elif name == "curl":
  print(pathlib.Path(os.environ["HOME"]).name)
elif name == "uv" and words[0] == "venv":
  os.makedirs(".venv/bin")
  os.symlink(world / "bin" / "trainer", ".venv/bin/python")
"""

# The name of a host is the name of its home directory. These calls are not recorded.
FAKE_UNAME = """#!/bin/sh
echo "${HOST:-here}"
"""

# A fake of Python on the hosts. Each launch on a host does what the next line of $WORLD/behaviour
# says, and the last line is repeated:
# - wait: runs until SIGTERM.
# - save N: writes checkpoint N, then runs until SIGTERM.
# - deaf: ignores SIGTERM.
# - finish: writes the final model.
# - any other text: prints the text and fails with status 3.
FAKE_PYTHON = r"""#!/usr/bin/env bash
set -eu
for word in "$@"; do case $word in --workdir=*) workdir=${word#*=};; esac; done
mkdir -p "$HOME/launches"
PYTHON -SE -c 'import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))' \
  "$@" >>"$HOME/launches/all"
what=$(sed -n "$(wc -l <"$HOME/launches/all")p" "$WORLD/behaviour")
if [ -z "$what" ]; then what=$(tail -n 1 "$WORLD/behaviour"); fi
trap 'echo "SIGTERM: stopped after step 7; the same command continues."; exit 0' TERM
echo "begins: $what"
case $what in
  save*) mkdir -p "$workdir/checkpoints/${what#save }" "$workdir/checkpoints/99.tmp-1" ;;
esac
case $what in
  deaf) trap '' TERM; echo "hears nothing"; while :; do sleep 0.05; done ;;
  finish) mkdir -p "$workdir/model"; echo {} >"$workdir/model/config.json"
    echo "finished in 1 s" ;;
  wait* | save*) while :; do sleep 0.05; done ;;
  *) echo "$what"; exit 3 ;;
esac
"""


class World:
  """A clone, and fake programs that come first on the PATH.

  Attributes:
    folder: the directory $WORLD.
    clone: the clone from which the scripts run.
    settings: environment variables of the scripts.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.clone = folder / "clone"
    (folder / "bin").mkdir()
    (folder / "bucket").mkdir()
    for name in (
      "gcloud",
      "kubectl",
      "ssh",
      "scp",
      "sudo",
      "mountpoint",
      "findmnt",
      "gcsfuse",
      "curl",
      "uv",
    ):
      self._program(name, FAKE_PROGRAM)
    self._program("trainer", FAKE_PYTHON)
    self._program("uname", FAKE_UNAME)
    shutil.copytree(SCRIPTS, self.clone / "tpu_scripts")
    (self.clone / "configs").mkdir()
    shutil.copy(ROOT / CONFIG, self.clone / CONFIG)
    (self.clone / ".gitignore").write_text("ignored\n.venv\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
      subprocess.run([*git, *words], cwd=self.clone, check=True)
    self.settings = {
      "NAME": "my-tpu",
      "ZONE": "us-west4-a",
      "TYPE": "v5litepod-16",
      "BUCKET": "gs://my-bucket",
      "MOUNT": str(folder / "mnt"),
      "POLL": "0.1",
      "WORLD": str(folder),
      "STOP_SECONDS": "10",
    }

  def _program(self, name: str, text: str) -> None:
    path = self.folder / "bin" / name
    path.write_text(text.replace("PYTHON", sys.executable))
    path.chmod(0o755)

  def environment(self, **settings) -> dict[str, str]:
    """Returns the environment of a script. Settings that are None are not set."""
    inherited = {
      k: v
      for k, v in os.environ.items()
      if k not in ("PROJECT", "RUN", "RUNTIME", "HOSTS", "WORKDIR", "PYTHONPATH")
    }
    everything = (
      inherited
      | self.settings
      | settings
      | {"PATH": os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])}
    )
    return {k: v for k, v in everything.items() if v is not None}

  def script(self, name: str, *words: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
      [str(self.clone / "tpu_scripts" / name), *words],
      cwd=self.folder,
      text=True,
      timeout=120,
      env=self.environment(**settings),
      capture_output=True,
      stdin=subprocess.DEVNULL,
    )

  def answer(self, *answers) -> None:
    """Sets the answers of the fake programs, see `FAKE_PROGRAM`."""
    (self.folder / "answers.json").write_text(json.dumps(answers))

  def behave(self, *what: str) -> None:
    """Sets what the launches of each host do, one after another, see `FAKE_PYTHON`."""
    (self.folder / "behaviour").write_text("\n".join(what) + "\n")

  def calls(self, name: str = "") -> list[list[str]]:
    """Returns all calls of a fake program, or of all of them."""
    path = self.folder / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [call for call in map(json.loads, lines) if call[0] == name or not name]

  def launches(self, home: str) -> list[tuple[list[str], dict[str, str]]]:
    """Returns the arguments and the environment of each launch of a host."""
    path = self.folder / "homes" / home / "launches" / "all"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]

  def wait_for(self, text: str, count: int = 1) -> None:
    """Waits until the newest logs of `count` hosts contain the text.

    Tests call it before they send a signal, so that the signal arrives in a run that has begun.
    """
    for _ in range(300):
      notes = {note.resolve() for note in self.folder.glob("homes/*/.jaxrl_vlm/*/log")}
      if sum(text in pathlib.Path(note.read_text().strip()).read_text() for note in notes) == count:
        return
      time.sleep(0.1)
    raise AssertionError(text)

  def kill_runs(self) -> None:
    for note in self.folder.glob("**/.jaxrl_vlm/*/keeper"):
      try:
        os.killpg(int(note.read_text()), signal.SIGKILL)
      except (ProcessLookupError, ValueError):
        continue


@pytest.fixture
def world(tmp_path):
  made = World(tmp_path)
  yield made
  made.kill_runs()


def ok(process: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
  assert process.returncode == 0, process.stdout + process.stderr
  return process


def printed(process: subprocess.CompletedProcess) -> list[list[str]]:
  return [shlex.split(line[2:]) for line in process.stderr.splitlines() if line.startswith("+ ")]


def test_shellcheck_finds_nothing():
  checker = pathlib.Path(sys.executable).with_name("shellcheck")
  result = subprocess.run([checker, *ALL], text=True, capture_output=True)
  assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", [p for p in ALL if p.name != "common.sh"], ids=lambda p: p.name)
def test_every_script_parses_and_has_help(world, path):
  subprocess.run(["bash", "-n", path], check=True)
  text = ok(world.script(str(path.relative_to(SCRIPTS)), "--help")).stdout
  assert f"  {path.name} " in text and not world.calls()
  assert os.access(path, os.X_OK)


# -- Settings and flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name, missing, words",
  [
    ("create.sh", "NAME", []),
    ("create.sh", "ZONE", []),
    ("create.sh", "TYPE", []),
    ("setup.sh", "BUCKET", []),
    ("launch.sh", "BUCKET", [CONFIG]),
    ("watch.sh", "TYPE", [CONFIG]),
    ("sync.sh", "BUCKET", []),
    ("delete.sh", "NAME", ["--yes"]),
    ("gpu_host.sh", "WORKDIR", ["launch", CONFIG]),
    ("kubernetes/launch.sh", "IMAGE", [CONFIG]),
  ],
)
def test_a_missing_setting_is_an_error_of_one_line(world, name, missing, words):
  kubernetes = {"TOPOLOGY": "4x4", "IMAGE": "i"} if "kubernetes" in name else {}
  result = world.script(name, *words, **kubernetes | {missing: None})
  assert result.returncode == 2 and not world.calls()
  assert re.fullmatch(rf"{missing} is not set; export {missing}=\S+\n", result.stderr)


@pytest.mark.parametrize(
  "name, words, said",
  [
    ("create.sh", ["--spto"], r"--spto: create.sh has no such flag; expected one of: .*--spot"),
    ("create.sh", ["now"], "now: create.sh takes no such argument"),
    ("launch.sh", [], r"no config; expected: launch.sh configs/NAME.py"),
    ("launch.sh", ["configs/nothing.py"], "configs/nothing.py: no such file in .*clone"),
    ("gpu_host.sh", ["fly"], "fly: no such command; expected setup, launch"),
  ],
)
def test_a_wrong_argument_is_an_error_of_one_line(world, name, words, said):
  result = world.script(name, *words)
  assert result.returncode == 2 and not world.calls()
  assert re.match(said, result.stderr) and result.stderr.count("\n") == 1


def test_an_unknown_type_and_a_missing_gcloud_are_errors(world):
  result = world.script("create.sh", TYPE="v9-8")
  assert result.returncode == 2 and "TYPE=v9-8" in result.stderr and "RUNTIME" in result.stderr
  (world.folder / "bin" / "gcloud").unlink()
  if not shutil.which("gcloud"):
    result = world.script("create.sh")
    assert result.returncode == 2 and result.stderr.startswith("gcloud is not on the PATH;")


ACTIONS = [
  ("create.sh", []),
  ("create.sh", ["--spot"]),
  ("create.sh", ["--queued"]),
  ("setup.sh", []),
  ("launch.sh", [CONFIG, *FLAGS]),
  ("launch.sh", ["--stop"]),
  ("launch.sh", ["--follow"]),
  ("watch.sh", ["--spot", "--queued", "--delete", CONFIG]),
  ("sync.sh", []),
  ("delete.sh", []),
  ("delete.sh", ["--yes"]),
  ("gpu_host.sh", ["setup"]),
  ("gpu_host.sh", ["launch", CONFIG]),
  ("gpu_host.sh", ["watch", CONFIG]),
  ("gpu_host.sh", ["stop"]),
  ("gpu_host.sh", ["follow"]),
  ("kubernetes/launch.sh", [CONFIG]),
]


@pytest.mark.parametrize(
  "name, words, hosts",
  [
    (*action, hosts)
    for action in ACTIONS
    for hosts in (["", "one two"] if action[0] == "gpu_host.sh" else [""])
  ],
)
def test_a_dry_run_prints_commands_and_runs_none(world, name, words, hosts):
  before = sorted(world.clone.rglob("*"))
  result = ok(
    world.script(
      name, "--dry-run", *words, HOSTS=hosts, WORKDIR="/shared/run", IMAGE="i", TOPOLOGY="4x4"
    )
  )
  assert not world.calls() and printed(result)
  assert sorted(world.clone.rglob("*")) == before and not (world.folder / "homes").exists()


# -- From creation to deletion --------------------------------------------------------------------


@pytest.mark.parametrize(
  "words, group, kind",
  [
    ([], "tpu-vm", []),
    (["--spot"], "tpu-vm", ["--spot"]),
    (["--queued"], "queued-resources", []),
    (["--queued", "--spot"], "queued-resources", ["--spot"]),
  ],
)
def test_create_runs_one_creation_command(world, words, group, kind):
  if group == "queued-resources":
    world.answer(
      [
        "queued-resources describe",
        [["NOT_FOUND", 1], ["WAITING_FOR_RESOURCES", 0], ["PROVISIONING", 0], ["ACTIVE", 0]],
      ]
    )
  result = ok(world.script("create.sh", *words, PROJECT="mine"))
  (create,) = [call for call in world.calls() if "create" in call]
  version = "--version" if group == "tpu-vm" else "--runtime-version"
  name = [] if group == "tpu-vm" else ["--node-id=my-tpu"]
  assert create[:6] == ["gcloud", "compute", "tpus", group, "create", "my-tpu"]
  assert set(create[6:]) == {
    "--zone=us-west4-a",
    "--project=mine",
    "--quiet",
    "--accelerator-type=v5litepod-16",
    f"{version}=v2-alpha-tpuv5-lite",
    *name,
    *kind,
  }
  # Every command is printed, in the order in which it runs.
  assert printed(result) == world.calls()

  before = len(world.calls())
  assert "exists and is ready" in ok(world.script("create.sh", *words)).stderr
  assert not [call for call in world.calls()[before:] if "create" in call]


def test_create_refuses_a_tpu_in_an_unusable_state(world):
  world.answer(["tpu-vm describe", [["PREEMPTED", 0]]])
  result = world.script("create.sh")
  assert (
    result.returncode == 2 and "my-tpu is PREEMPTED; run tpu_scripts/delete.sh" in result.stderr
  )
  world.answer(["tpu-vm describe", [["NOT_FOUND", 1]]], ["queued.* describe", [["FAILED", 0]]])
  result = world.script("create.sh", "--queued")
  assert result.returncode == 2 and "my-tpu is FAILED" in result.stderr


def test_a_network_failure_is_not_taken_for_a_missing_tpu(world):
  world.answer(["describe", [["ERROR: network is unreachable", 1]]])
  for name, words in (("create.sh", []), ("delete.sh", ["--yes"])):
    result = world.script(name, *words)
    assert result.returncode != 0 and "network is unreachable" in result.stderr
  assert not [call for call in world.calls() if "create" in call or "delete" in call]


def clone_of(world, home: str) -> pathlib.Path:
  return world.folder / "homes" / home / ".jaxrl_vlm" / home / "clone"


def set_up(world) -> None:
  ok(world.script("create.sh"))
  ok(world.script("setup.sh"))


def test_setup_copies_the_clone_to_every_worker(world):
  (world.clone / "configs" / "mine.py").write_text("# new")
  (world.clone / CONFIG).write_text("# changed")
  (world.clone / "ignored").write_text("no")
  ok(world.script("create.sh"))
  result = ok(world.script("setup.sh"))
  for home in ("0", "1"):
    copy = clone_of(world, home)
    assert (copy / "configs" / "mine.py").read_text() == "# new"
    assert (copy / CONFIG).read_text() == "# changed"
    assert not (copy / "ignored").exists()
    assert (copy / ".venv" / "bin" / "python").exists()
  assert [c[1:] for c in world.calls("uv") if c[1] == "pip"] == [
    ["pip", "install", "-q", "--python=.venv/bin/python", "-e", ".[plan]"]
  ] * 2
  (mount,) = [c for c in world.calls("gcsfuse") if c[1] != "--version"]
  assert mount[-2:] == ["my-bucket", str(world.folder / "mnt")]
  assert {"--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"} <= set(mount)
  assert [words for words in printed(result) if words[0] == "gcloud"] == world.calls("gcloud")[3:]
  # The git index of the clone has not changed.
  status = subprocess.run(
    ["git", "status", "--short"], cwd=world.clone, text=True, capture_output=True, check=True
  ).stdout
  assert "?? configs/mine.py" in status
  ok(world.script("setup.sh"))  # a second setup succeeds


@pytest.mark.parametrize(("name", "home"), [("setup.sh", "1"), ("gpu_host.sh", "one")])
def test_setup_does_not_change_other_files_of_a_host(world, name, home):
  ok(world.script("create.sh"))
  theirs = world.folder / "homes" / home
  for path in (
    "jaxrl_vlm/configs/mine.py",
    "jaxrl_vlm/jaxrl_vlm/mine.py",
    f"jaxrl_vlm/{CONFIG}",
    "jaxrl_vlm.tar.gz",
  ):
    (theirs / path).parent.mkdir(parents=True, exist_ok=True)
    (theirs / path).write_text("the user's")
  before = {path: path.read_text() for path in theirs.rglob("*") if path.is_file()}
  words = ["setup"] if name == "gpu_host.sh" else []
  # The second setup replaces the copy of the first, and deletes files that the clone does not have.
  for _ in range(2):
    ok(world.script(name, *words, HOSTS="one"))
    assert (clone_of(world, home) / CONFIG).exists()
    assert not (clone_of(world, home) / "configs" / "gone.py").exists()
    (clone_of(world, home) / "configs" / "gone.py").write_text("")
  ours = theirs / ".jaxrl_vlm"
  after = {path for path in theirs.rglob("*") if path.is_file() and ours not in path.parents}
  assert after == {*before, theirs / ".jaxrl_vlm.tar.gz"}
  assert {path: path.read_text() for path in before} == before


def test_a_bucket_other_than_the_mounted_one_is_an_error(world):
  set_up(world)
  for name, words in (("setup.sh", []), ("launch.sh", [CONFIG])):
    result = world.script(name, *words, BUCKET="gs://other")
    mount = world.folder / "mnt"
    assert result.returncode != 0
    for worker in "01":
      assert (
        f"worker {worker}: {mount} is my-bucket, not the bucket BUCKET=other; unmount it on "
        f"all workers (fusermount -u {mount}), or set BUCKET"
      ) in result.stderr
  assert not [call for call in world.calls() if "worker.sh start" in " ".join(call)]
  world.behave("finish")
  ok(world.script("launch.sh", CONFIG))


def test_launch_passes_flags_unchanged_to_every_worker(world):
  set_up(world)
  world.behave("finish")
  result = ok(world.script("launch.sh", CONFIG, *FLAGS))
  workdir = world.folder / "mnt" / "runs" / "my-tpu"
  for home in ("0", "1"):
    ((words, _),) = world.launches(home)
    assert words == [
      "-u",
      "-m",
      "jaxrl_vlm.train",
      f"--config={CONFIG}",
      *FLAGS,
      f"--workdir={workdir}",
    ]
  assert "finished in 1 s" in result.stdout
  assert result.stderr.endswith("finished: gs://my-bucket/runs/my-tpu/model\n")
  logs = {path.name: path.read_text() for path in workdir.glob("logs/*/*.log")}
  assert set(logs) == {"worker-0.log", "worker-1.log"}
  assert all("finished in 1 s" in log for log in logs.values())
  starts = [words for words in printed(result) if any("worker.sh start" in w for w in words)]
  assert [words for words in world.calls("gcloud") if words in starts] == starts != []


def test_launch_stop_and_launch_again(world):
  set_up(world)
  world.behave("wait", "wait", "broken")
  ok(world.script("launch.sh", "--detach", CONFIG))
  for _ in range(2):  # during a run, a second run and a new copy of the code are refused
    for name, words in (("launch.sh", [CONFIG]), ("setup.sh", [])):
      result = world.script(name, *words)
      assert result.returncode != 0 and "a run is going on here; stop it first" in result.stderr
  world.wait_for("begins", 2)
  follower = subprocess.Popen(
    [str(world.clone / "tpu_scripts" / "launch.sh"), "--follow"],
    env=world.environment(),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  result = ok(world.script("launch.sh", "--stop"))
  for worker in "01":
    assert f"worker {worker}: stopped: SIGTERM: stopped after step 7" in result.stdout
  out, err = follower.communicate(timeout=30)
  assert "begins: wait" in out and "not finished; the same command resumes the run" in err
  assert "no run to stop" in ok(world.script("launch.sh", "--stop")).stdout

  ok(world.script("launch.sh", "--detach", CONFIG))
  world.wait_for("begins", 2)
  ok(world.script("launch.sh", "--stop"))
  result = world.script("launch.sh", CONFIG)
  assert result.returncode == 3 and "broken" in result.stdout
  assert "gs://my-bucket/runs/my-tpu/logs/" in result.stderr


def test_a_run_that_does_not_stop_is_killed(world):
  set_up(world)
  world.behave("deaf")
  ok(world.script("launch.sh", "--detach", CONFIG))
  world.wait_for("hears nothing", 2)
  result = ok(world.script("launch.sh", "--stop", STOP_SECONDS="1"))
  assert result.stdout.count("killed, after 1 s") == 2
  assert "no run to stop" in ok(world.script("launch.sh", "--stop")).stdout


def test_sync_copies_the_run_from_the_bucket(world):
  ok(world.script("sync.sh", "here"))
  ok(world.script("sync.sh", "--checkpoints"))
  source = "gs://my-bucket/runs/my-tpu"
  assert [call[1:] for call in world.calls()] == [
    ["storage", "rsync", "--recursive", "--exclude=^checkpoints/.*", source, "here"],
    ["storage", "rsync", "--recursive", source, "runs/my-tpu"],
  ]
  assert (world.folder / "here").is_dir() and (world.folder / "runs" / "my-tpu").is_dir()


def test_delete_asks_for_confirmation(world):
  ok(world.script("create.sh"))
  before = len(world.calls())
  result = world.script("delete.sh")
  assert result.returncode == 2 and "pass --yes" in result.stderr and len(world.calls()) == before

  for answer, deleted in (("n", False), ("", False), ("y", True)):
    keyboard, terminal = pty.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    result = subprocess.run(
      [str(world.clone / "tpu_scripts" / "delete.sh")],
      stdin=terminal,
      text=True,
      timeout=60,
      env=world.environment(),
      capture_output=True,
    )
    os.close(keyboard)
    os.close(terminal)
    assert "Delete the TPU my-tpu in us-west4-a?" in result.stderr
    assert (result.returncode == 0) == deleted
    assert (world.folder / "node").exists() != deleted
  words = [word for call in world.calls() for word in call]
  assert "rm" not in words and "buckets" not in words


def test_delete_removes_the_queued_resource_with_its_node(world):
  world.answer(
    ["queued-resources describe", [["ACTIVE", 0]]],
    ["queued.* delete", [["", 0]]],
    ["tpu-vm describe", [["DELETING", 0], ["NOT_FOUND", 1]]],
  )
  ok(world.script("delete.sh", "--yes"))
  (delete,) = [call for call in world.calls() if "delete" in call]
  assert delete == [
    "gcloud",
    "compute",
    "tpus",
    "queued-resources",
    "delete",
    "my-tpu",
    "--zone=us-west4-a",
    "--force",
    "--quiet",
  ]


# -- Watching -------------------------------------------------------------------------------------


def tpu_actions(world) -> list[str]:
  """Returns what the scripts did with the TPU, in order."""
  done = []
  for call in world.calls("gcloud"):
    found = re.search(r"tpu-vm (create|delete)|worker\.sh (start|stop)| (scp) ", " ".join(call))
    if found:
      done.append(found[1] or found[2] or found[3])
  return done


@pytest.mark.slow
def test_watch_relaunches_after_preemption_and_failure_until_the_run_is_finished(world):
  # At first, there is no TPU. The first launch saves checkpoint 10. Then the TPU is preempted while
  # its state is checked. The second launch fails by itself, and the third one finishes.
  kill = f"echo PREEMPTED >{world.folder}/node"
  world.behave("save 10")
  world.answer(
    [
      "tpu-vm describe",
      [
        ["do", ":"],
        ["do", ":"],
        ["do", ":"],
        ["do", ":"],
        ["do", ":"],
        [
          "do",
          f"until [ -e {world.folder}/bucket/runs/my-tpu/checkpoints/10 ]; do sleep 0.1; done;"
          f" {kill}; printf 'broken\\nfinish\\n' >{world.folder}/behaviour",
        ],
        ["do", ":"],
      ],
    ]
  )
  result = ok(world.script("watch.sh", "--spot", "--delete", CONFIG, *FLAGS))
  assert tpu_actions(world) == [
    "create",
    "scp",
    "start",  # there was no TPU
    "delete",
    "create",
    "scp",
    "start",  # preempted
    "stop",
    "scp",
    "start",  # failed
    "delete",
  ]
  creations = [call for call in world.calls() if "create" in call]
  assert all("--spot" in call for call in creations)
  assert "my-tpu: gone, checkpoint none; launch 1 of 5" in result.stderr
  assert "my-tpu: PREEMPTED" in result.stderr
  assert "my-tpu: gone, checkpoint 10; launch 1 of 5" in result.stderr
  assert "worker 0: ended with status 3: broken" in result.stderr
  assert "my-tpu: idle, checkpoint 10; launch 2 of 5" in result.stderr
  assert "my-tpu: finished" in result.stderr
  starts = [call for call in world.calls() if "worker.sh start" in " ".join(call)]
  commands = {re.sub(r"\d{8}T\d{6}Z", "", call[-1]) for call in starts}
  assert len(starts) == 3 and len(commands) == 1  # the same command resumes the run
  # The logs of deleted machines are in the bucket, and every launch has its own logs.
  logs = [p.read_text() for p in (world.folder / "bucket").rglob("worker-1.log")]
  assert sum("broken" in log for log in logs) == sum("finished in" in log for log in logs) == 1


@pytest.mark.slow
def test_watch_waits_until_all_processes_of_a_running_run_have_ended(world):
  set_up(world)
  world.behave("wait", "finish")
  ok(world.script("launch.sh", "--detach", CONFIG))
  world.wait_for("begins", 2)
  before = len(tpu_actions(world))
  model = world.folder / "bucket" / "runs" / "my-tpu" / "model"
  # The model appears while processes still run. The run is not yet finished.
  world.answer(
    [
      "tpu-vm describe",
      [
        ["do", ":"],
        ["do", f"mkdir -p {model}; touch {model}/config.json"],
        ["do", ":"],
        ["do", f"kill $(cat {world.folder}/homes/*/.jaxrl_vlm/*/child)"],
        ["do", "sleep 2"],
        ["do", ":"],
      ],
    ]
  )
  result = ok(world.script("watch.sh", CONFIG))
  assert "my-tpu: finished" in result.stderr and len(tpu_actions(world)) == before
  assert "worker.sh status" in " ".join(world.calls("gcloud")[-1])
  assert result.stderr.index("ended with status 0") < result.stderr.index("my-tpu: finished")
  assert (world.folder / "node").exists()  # not deleted without --delete


@pytest.mark.slow
def test_watch_sets_up_a_tpu_that_was_only_created(world):
  ok(world.script("create.sh"))
  world.behave("finish")
  ok(world.script("watch.sh", CONFIG))
  assert tpu_actions(world) == ["create", "stop", "scp", "start"]


@pytest.mark.slow
def test_watch_gives_up_if_launches_reach_no_newer_checkpoint(world):
  world.behave("broken: no such file")
  result = world.script("watch.sh", CONFIG, RELAUNCHES="2")
  assert result.returncode == 1
  assert tpu_actions(world).count("start") == 2 and tpu_actions(world)[-1] == "start"
  assert "worker 1: ended with status 3: broken: no such file" in result.stderr
  assert "launched 2 times from checkpoint none without reaching a newer one" in result.stderr
  assert "costs money until you run tpu_scripts/delete.sh" in result.stderr


@pytest.mark.slow
def test_watch_retries_failed_creations_up_to_a_limit(world):
  world.answer(["tpu-vm create", [["ERROR: there is no more capacity in the zone", 1]]])
  result = world.script("watch.sh", CONFIG, CREATES="12")
  assert result.returncode == 1
  assert result.stderr.count("ERROR: there is no more capacity in the zone") == 12
  assert "my-tpu: could not be created 12 times in a row; giving up" in result.stderr


@pytest.mark.slow
def test_watch_changes_nothing_if_the_cloud_or_a_worker_does_not_answer(world):
  set_up(world)
  before = tpu_actions(world)
  world.answer(["tpu-vm describe", [["ERROR: not authorised", 1]]])
  result = world.script("watch.sh", CONFIG)
  assert result.returncode == 1 and "ten failures in a row" in result.stderr
  assert result.stderr.count("ERROR: not authorised") == 10
  world.answer(["tpu-vm ssh", [["ERROR: worker 1 is unreachable", 255]]])
  assert world.script("watch.sh", CONFIG).returncode == 1
  assert tpu_actions(world) == before


@pytest.mark.slow
def test_watch_keeps_a_queued_request(world):
  world.behave("finish")
  world.answer(
    [
      "queued-resources describe",
      [["WAITING_FOR_RESOURCES", 0], ["WAITING_FOR_RESOURCES", 0], ["ACTIVE", 0]],
    ],
    ["tpu-vm describe", [["NOT_FOUND", 1]] * 3 + [["READY", 0]]],
  )
  ok(world.script("watch.sh", "--queued", CONFIG))
  assert not [call for call in world.calls("gcloud") if "delete" in call or "create" in call]


# -- Hosts with GPUs ------------------------------------------------------------------------------


def test_gpu_host_runs_on_several_hosts_over_ssh(world):
  settings = {"HOSTS": "one me@two", "WORKDIR": str(world.folder / "shared" / "run")}
  result = ok(world.script("gpu_host.sh", "setup", **settings))
  assert [c[-1] for c in world.calls("uv") if c[1] == "pip"] == [".[gpu]"] * 2
  world.behave("broken", "finish")
  result = ok(world.script("gpu_host.sh", "watch", CONFIG, *FLAGS, **settings))
  assert "ended with status 3: broken" in result.stderr and "finished" in result.stderr
  for number, home in enumerate(("one", "me@two")):
    launches = world.launches(home)
    assert len(launches) == 2
    for words, environment in launches:
      assert words[2:-1] == ["jaxrl_vlm.train", f"--config={CONFIG}", *FLAGS]
      assert environment["JAX_COORDINATOR_ADDRESS"] == "one:8476"
      assert environment["JAX_NUM_PROCESSES"] == "2"
      assert environment["JAX_PROCESS_ID"] == str(number)
  logs = {path.name for path in (world.folder / "shared").rglob("*.log")}
  assert logs == {"worker-0.log", "worker-1.log"}
  # The run is finished, so a second watch only looks.
  calls = len(world.calls())
  ok(world.script("gpu_host.sh", "watch", CONFIG, **settings))
  assert len(world.calls()) == calls + 2

  result = world.script("gpu_host.sh", "launch", CONFIG, **settings | {"WORKDIR": "runs/x"})
  assert result.returncode == 2 and "WORKDIR=runs/x: expected the absolute path" in result.stderr


def test_gpu_hosts_with_a_shared_home_directory_have_separate_runs(world):
  (world.folder / "nfs").mkdir()
  (world.folder / "homes").mkdir()
  for host in ("one", "two"):
    (world.folder / "homes" / host).symlink_to(world.folder / "nfs")
  settings = {"HOSTS": "one two", "WORKDIR": str(world.folder / "run")}

  def status(host: str) -> str:
    return ok(
      subprocess.run(
        [clone_of(world, host) / "tpu_scripts" / "worker.sh", "status"],
        text=True,
        env=world.environment(HOME=str(world.folder / "nfs"), HOST=host),
        capture_output=True,
      )
    ).stdout

  ok(world.script("gpu_host.sh", "setup", **settings))
  for host in ("one", "two"):
    assert (clone_of(world, host) / CONFIG).exists()
    assert (clone_of(world, host) / ".venv" / "bin" / "python").exists()
  world.behave("wait")
  ok(world.script("gpu_host.sh", "--detach", "launch", CONFIG, **settings))
  world.wait_for("begins", 2)
  # Each host knows its own run. After one has ended, the other can still be stopped.
  os.kill(int((clone_of(world, "one").parent / "child").read_text()), signal.SIGTERM)
  for _ in range(300):
    if "running" not in status("one"):
      break
    time.sleep(0.1)
  assert status("one").startswith("worker 0: ended with status 0: SIGTERM")
  assert status("two") == "worker 1: running\n"
  result = ok(world.script("gpu_host.sh", "stop", **settings))
  assert sorted(result.stdout.splitlines()) == [
    "worker 0: no run to stop",
    "worker 1: stopped: SIGTERM: stopped after step 7; the same command continues.",
  ]


def test_gpu_host_without_hosts_runs_on_this_machine(world):
  home = world.folder / "homes" / "me"
  home.mkdir(parents=True)
  settings = {"HOME": str(home), "WORKDIR": str(world.folder / "run")}
  ok(world.script("gpu_host.sh", "setup", **settings))
  assert not world.calls("ssh") and not world.calls("scp")
  world.behave("wait", "broken")
  ok(world.script("gpu_host.sh", "--detach", "launch", CONFIG, *FLAGS, **settings))
  world.wait_for("begins")
  assert "stopped: SIGTERM" in ok(world.script("gpu_host.sh", "stop", **settings)).stdout
  result = world.script("gpu_host.sh", "launch", CONFIG, *FLAGS, **settings)
  assert result.returncode == 3 and "broken" in result.stdout
  for words, environment in world.launches("me"):
    assert words[2:-1] == ["jaxrl_vlm.train", f"--config={CONFIG}", *FLAGS]
    assert "JAX_COORDINATOR_ADDRESS" not in environment


# -- Kubernetes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "topology, hosts, chips, spot",
  [("4x4", 4, 4, ["--spot"]), ("2x2x4", 4, 4, []), ("2x2", 1, 4, []), ("1x1", 1, 1, [])],
)
def test_the_jobset_has_the_settings_and_flags(world, topology, hosts, chips, spot):
  ok(
    world.script(
      "kubernetes/launch.sh", *spot, CONFIG, *FLAGS, IMAGE="image:1", TOPOLOGY=topology, MOUNT=None
    )
  )
  ((*command, path),) = world.calls("kubectl")
  assert command == ["kubectl", "apply", "-f"] and path.endswith("jobset.yaml")
  text = (world.folder / "applied.yaml").read_text()
  assert "${" not in text
  jobset = yaml.safe_load(text)
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 5
  (rule,) = policy["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"

  (workers,) = jobset["spec"]["replicatedJobs"]
  job = workers["template"]["spec"]
  assert workers["replicas"] == 1 and job["parallelism"] == job["completions"] == hosts
  assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
  assert {"DisruptionTarget", "75"} == {
    str(r.get("onPodConditions", [{}])[0].get("type") or r["onExitCodes"]["values"][0])
    for r in job["podFailurePolicy"]["rules"]
  }

  pod = job["template"]["spec"]
  assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
  assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": topology,
    **({"cloud.google.com/gke-spot": "true"} if spot else {}),
  }
  (container,) = pod["containers"]
  assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == container["name"]
  assert container["image"] == "image:1"
  assert container["resources"]["limits"] == {"google.com/tpu": chips}
  assert container["command"][:3] == ["tpu_scripts/worker.sh", "pod", "/bucket/runs/my-tpu"]
  # Kubernetes replaces $$ by $. A single $ would begin a variable.
  assert [arg.replace("$$", "$") for arg in container["args"]] == [f"--config={CONFIG}", *FLAGS]
  assert all("$" not in arg.replace("$$", "") for arg in container["args"])
  environment = {entry["name"]: entry for entry in container["env"]}
  address = f"my-tpu-{workers['name']}-0-0.my-tpu:8476"  # the first pod's name in the JobSet
  assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == address
  assert environment["JAX_NUM_PROCESSES"]["value"] == str(hosts)
  source = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert source == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  volume = next(v for v in pod["volumes"] if v["name"] == "bucket")["csi"]
  assert volume["driver"] == "gcsfuse.csi.storage.gke.io"
  assert volume["volumeAttributes"]["bucketName"] == "my-bucket"
  assert {"name": "bucket", "mountPath": "/bucket"} in container["volumeMounts"]


@pytest.mark.parametrize(
  "setting, value", [("TOPOLOGY", "16"), ("TOPOLOGY", "4x"), ("CHIPS", "3"), ("NAME", "My_TPU")]
)
def test_invalid_jobset_settings_are_errors(world, setting, value):
  settings = {"IMAGE": "i", "TOPOLOGY": "4x4"} | {setting: value}
  result = world.script("kubernetes/launch.sh", CONFIG, **settings)
  assert result.returncode == 2 and f"{setting}={value}" in result.stderr and not world.calls()


def test_the_template_of_the_manifest_is_valid_yaml():
  assert yaml.safe_load((SCRIPTS / "kubernetes" / "jobset.yaml").read_text())["kind"] == "JobSet"


@pytest.mark.parametrize("what, status", [("finish", 0), ("wait", 75), ("broken", 3)])
def test_a_pod_ends_with_status_0_only_when_the_run_is_finished(world, what, status):
  world.behave(what)
  os.symlink(world.folder / "bin" / "trainer", world.folder / "bin" / "python3")
  home = world.folder / "homes" / "pod"
  home.mkdir(parents=True)
  pod = subprocess.Popen(
    [str(world.clone / "tpu_scripts" / "worker.sh"), "pod", str(world.folder / "run"), "0", *FLAGS],
    env=world.environment(HOME=str(home), JAX_PROCESS_ID="1"),
    text=True,
    stdout=subprocess.PIPE,
  )
  assert pod.stdout
  lines = [pod.stdout.readline() for _ in range(2)]
  assert f"begins: {what}" in lines[-1]
  if what == "wait":
    pod.send_signal(signal.SIGTERM)  # only to the first process of the container
  out, _ = pod.communicate(timeout=60)
  assert pod.returncode == status
  if what == "wait":
    assert "SIGTERM: stopped after step 7" in out
  assert world.launches("pod")[0][0][3:-1] == FLAGS
  assert f"begins: {what}" in (world.folder / "run" / "logs" / "0" / "worker-1.log").read_text()


# -- docs/pods.md ---------------------------------------------------------------------------------


def page_commands() -> list[str]:
  blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
  lines = "".join(blocks).replace("\\\n", " ").splitlines()
  return [line for line in lines if line.strip() and not line.startswith("#")]


def test_the_page_names_every_script_and_its_commands_are_accepted(world):
  text = PAGE.read_text()
  for path in ALL:
    if path.name not in ("common.sh", "worker.sh"):
      assert f"tpu_scripts/{path.relative_to(SCRIPTS)}" in text, path
  for target in re.findall(r"\]\(([^)#]+)\)", text):
    assert target.startswith("https://") or (PAGE.parent / target).exists()

  settings: dict[str, str] = {}
  seen = set()
  runs: dict[str, list[str]] = {}
  for line in page_commands():
    words = shlex.split(line, comments=True)
    if words[0] == "export":
      settings |= dict(word.split("=", 1) for word in words[1:])
    if words[0].startswith("tpu_scripts/"):
      name = words[0].removeprefix("tpu_scripts/")
      plain = dict.fromkeys(("NAME", "ZONE", "TYPE", "BUCKET", "MOUNT"))
      ok(world.script(name, "--dry-run", *words[1:], **plain | settings))
      seen.add(name)
      if CONFIG in words and "--dry-run" not in words:
        # In the directory of another run, a command is refused, and in the directory of a finished
        # run, it does nothing. So each command of the page needs its own directory.
        folder = settings["WORKDIR"] if name == "gpu_host.sh" else settings.get("RUN", "runs/NAME")
        asked = words[words.index(CONFIG) :]
        assert runs.setdefault(folder, asked) == asked, (
          f"{line}: {folder} is the directory of another run"
        )
    elif words[:2] == ["python", "-m"]:
      assert words[2] in ("jaxrl_vlm.plan", "jaxrl_vlm.train"), line
  assert len(runs) == 5
  assert {
    "create.sh",
    "setup.sh",
    "launch.sh",
    "watch.sh",
    "sync.sh",
    "delete.sh",
    "gpu_host.sh",
    "kubernetes/launch.sh",
  } <= seen and not world.calls()


def test_the_page_names_only_settings_that_exist():
  scripts = "".join(path.read_text() for path in ALL)
  for line in page_commands():
    if line.startswith("export "):
      for name in re.findall(r"(\w+)=", line):
        assert re.search(rf"\b{name}\b", scripts), name

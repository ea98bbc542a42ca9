"""Tests that a response that hangs, crashes or exhausts memory loses only its own reward."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards import pool as pool_lib

BOMB = r"\boxed{9^{9^{9^{9}}}}"

VERIFIERS = """
  import ctypes, os, sys, time

  def obey(example, text):
    if text == "hang":
      return float(9 ** 9 ** 9 ** 9 > 0)  # a single C call, during which no signal handler runs
    if text == "sleep":
      time.sleep(60)
    if text == "slow":
      time.sleep(0.4)
    if text == "memory":
      kept = []
      while True:
        kept.append(bytearray(2 ** 26))
    if text == "exit":
      os._exit(3)
    if text == "exit 0":
      os._exit(0)
    if text == "segfault":
      ctypes.string_at(0)
    if text == "sys.exit":
      sys.exit(0)
    if text == "raise":
      raise KeyError("so be it")
    if text in ("nan", "1e39"):
      return float(text)
    return float(text == example.answer)

  def modules(example, text):
    return {"modules": 1.0, **{m: float(m in sys.modules) for m in ("jax", "numpy")}}

  def size(example, text):
    return {"size": len(text), "images": len(example.images), "pid": os.getpid()}
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("verifiers") / "mine.py"
  path.write_text(textwrap.dedent(VERIFIERS))
  return path


@pytest.fixture(scope="module")
def pool(user_file):
  with pool_lib.RewardPool(
    {f"{user_file}:obey": 1.0}, workers=2, timeout_s=1.5, memory_gb=0.5
  ) as pool:
    yield pool


def examples(number, **fields):
  return [Example(id=str(i), question="q", answer="yes", **fields) for i in range(number)]


NONE = {"timeout": 0, "crash": 0, "error": 0}


def test_totals_and_components_have_the_positions_of_their_responses(pool):
  batch = pool.grade(examples(2), [["yes", "no", "no"], ["no", "yes", "yes"]])
  np.testing.assert_array_equal(batch.total, [[1, 0, 0], [0, 1, 1]])
  np.testing.assert_array_equal(batch.components["obey"], batch.total)
  assert batch.total.dtype == batch.components["obey"].dtype == np.float32
  assert batch.failures == NONE and batch.messages == {}


@pytest.mark.parametrize(
  "bad, kind, message",
  [
    ("hang", "timeout", "grading it exceeded the time limit"),
    ("memory", "error", "MemoryError"),
    ("exit", "crash", "its worker died with exit code 3"),
    ("exit 0", "timeout", "grading it exceeded the time limit"),
    ("segfault", "crash", "its worker died with exit code -11"),
    ("sys.exit", "error", "SystemExit: 0 in verifier 'obey'"),
    ("raise", "error", "KeyError: 'so be it' in verifier 'obey'"),
    ("1e39", "error", "returned obey=1e+39, expected a number that float32 can hold in verifier"),
    ("nan", "error", "returned obey=nan, expected a finite number in verifier 'obey'"),
  ],
)
def test_only_the_failing_response_loses_its_reward(pool, bad, kind, message):
  texts = [["yes"] * 8 for _ in range(4)]
  texts[2][3] = bad
  batch = pool.grade(examples(4), texts)
  expected = np.ones((4, 8))
  expected[2, 3] = 0
  np.testing.assert_array_equal(batch.total, expected)
  np.testing.assert_array_equal(batch.components["obey"], expected)
  assert batch.failures == {**NONE, kind: 1}
  assert list(batch.messages) == [kind]
  assert batch.messages[kind].startswith("id='2': ") and message in batch.messages[kind]


def test_failures_of_several_kinds_in_one_batch(pool):
  texts = [["yes", "exit", "raise", "yes"], ["hang", "no", "raise", "yes"]]
  batch = pool.grade(examples(2), texts)
  np.testing.assert_array_equal(batch.total, [[1, 0, 0, 1], [0, 0, 0, 1]])
  assert batch.failures == {"timeout": 1, "crash": 1, "error": 2}
  assert batch.messages["error"].startswith("id='0'")


def test_a_huge_power_in_math_times_out():
  texts = [["\\boxed{7}"] * 4, ["\\boxed{\\frac{14}{2}}", BOMB, "\\boxed{8}", "7"]]
  with pool_lib.RewardPool({"math": 1}, workers=2, timeout_s=1.5) as pool:
    batch = pool.grade([Example("0", "q", "7"), Example("1", "q", "7")], texts)
  np.testing.assert_array_equal(batch.total, [[1] * 4, [1, 0, 0, 1]])
  assert batch.failures == {**NONE, "timeout": 1}
  assert BOMB in batch.messages["timeout"].replace("\\\\", "\\")


def test_slow_responses_do_not_time_out_together(pool):
  # Tasks have five responses. 5 · 0.4 s exceed the limit of 1.5 s, but no single response does.
  batch = pool.grade(examples(1), [["slow"] * 10 + ["yes"] * 30])
  np.testing.assert_array_equal(batch.total, [[0] * 10 + [1] * 30])
  assert batch.failures == NONE


def test_examples_may_have_their_own_verifiers(pool):
  mixed = examples(2)
  mixed[1] = Example("1", "q", "B", rewards={"choice": 0.5, "format": 0.25})
  batch = pool.grade(mixed, [["yes", "hang"], [r"<think>a</think>\boxed{B}", "B"]])
  np.testing.assert_array_equal(batch.total, [[1, 0], [0.75, 0.5]])
  np.testing.assert_array_equal(batch.components["obey"], [[1, 0], [np.nan, np.nan]])
  np.testing.assert_array_equal(batch.components["choice"], [[np.nan, np.nan], [1, 1]])
  np.testing.assert_array_equal(batch.components["format"], [[np.nan, np.nan], [1, 0]])


def test_workers_receive_the_end_of_long_responses_and_no_images(user_file):
  with pool_lib.RewardPool({f"{user_file}:size": 1}, workers=1, max_chars=100) as pool:
    batch = pool.grade(examples(1, images=(b"png",)), [["a" * 1000, "a", "\ud800\0"]])
  np.testing.assert_array_equal(batch.components["size"], [[100, 1, 2]])
  np.testing.assert_array_equal(batch.components["size/images"], [[0, 0, 0]])


def test_an_example_that_cannot_be_pickled_fails_alone(pool):
  two = [*examples(1), Example("bad", "q", "yes", meta={"f": lambda: 0})]
  batch = pool.grade(two, [["yes"], ["yes"]])
  np.testing.assert_array_equal(batch.total, [[1], [0]])
  assert batch.failures == {**NONE, "error": 1} and "id='bad'" in batch.messages["error"]


def test_batches_may_overlap_and_results_are_kept(pool):
  first = pool.submit(examples(1), [["yes", "hang"]])
  second = pool.submit(examples(1), [["no", "yes"]])
  np.testing.assert_array_equal(second.result().total, [[0, 1]])
  np.testing.assert_array_equal(first.result().total, [[1, 0]])
  assert first.result() is first.result()


def test_workers_killed_while_idle_are_replaced(user_file):
  with pool_lib.RewardPool({f"{user_file}:size": 1}, workers=1) as pool:
    pid = int(pool.grade(examples(1), [["a"]]).components["size/pid"][0, 0])
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    batch = pool.grade(examples(1), [["a", "bc"]])
  np.testing.assert_array_equal(batch.total, [[1, 2]])
  assert batch.failures == NONE


def test_workers_that_cannot_start_raise_an_error_instead_of_zero_rewards(monkeypatch):
  monkeypatch.setattr(pool_lib, "_start_worker", int.bit_length)  # raises for its arguments
  with (
    pool_lib.RewardPool({"exact": 1}, workers=1) as pool,
    pytest.raises(RuntimeError, match="RewardPool: the workers die before they grade a response"),
  ):
    pool.grade(examples(1), [["yes"]])


def test_grading_no_responses_returns_empty_arrays(pool):
  assert pool.grade([], []).total.shape == (0, 0)
  assert pool.grade(examples(2), [[], []]).total.shape == (2, 0)


@pytest.mark.parametrize(
  "number, texts, error, message",
  [
    (2, [["a"]], ValueError, r"rows of \[1\] responses, expected 2 rows"),
    (2, [["a"], ["a", "b"]], ValueError, r"rows of \[1, 2\] responses, expected 2 rows"),
    (1, [[b"a"]], TypeError, "a response to id='0' is bytes"),
  ],
)
def test_submit_refuses_texts_of_wrong_shape_or_type(pool, number, texts, error, message):
  with pytest.raises(error, match=message):
    pool.submit(examples(number), texts)


def test_error_for_an_unknown_verifier_names_the_example(pool):
  with pytest.raises(ValueError, match="example.rewards of id='0': rewards: 'mth': no such"):
    pool.submit(examples(1, rewards={"mth": 1}), [["a"]])


def test_an_example_may_only_name_functions_that_the_stage_names(pool):
  with pytest.raises(ValueError, match="'os:getpid' is neither built in nor among the stage's own"):
    pool.submit(examples(1, rewards={"os:getpid": 1}), [["a"]])


@pytest.mark.parametrize("limit", ["workers", "timeout_s", "memory_gb", "max_chars"])
def test_limits_must_be_positive(limit):
  with pytest.raises(ValueError, match=f"RewardPool: {limit}=0: expected a positive number"):
    pool_lib.RewardPool({"math": 1}, **{limit: 0})


def test_using_a_closed_pool_is_an_error(user_file):
  pool = pool_lib.RewardPool({f"{user_file}:obey": 1}, workers=1)
  grading = pool.submit(examples(1), [["sleep"]])
  pool.close()
  pool.close()
  with pytest.raises(RuntimeError, match="RewardPool: the pool is closed"):
    grading.result()
  with pytest.raises(RuntimeError, match="RewardPool: the pool is closed"):
    pool.grade(examples(1), [["yes"]])


def test_workers_do_not_import_the_modules_of_the_script(user_file, tmp_path):
  # Without `if __name__ == "__main__"`, a worker that imports the script would start a worker too.
  script = tmp_path / "script.py"
  script.write_text(
    textwrap.dedent(f"""
      import sys, types
      sys.modules["jax"] = types.ModuleType("jax")
      from jaxrl_vlm.example import Example
      from jaxrl_vlm.rewards.pool import RewardPool
      pool = RewardPool({{"{user_file}:modules": 1}}, workers=1)
      batch = pool.grade([Example("0", "q", "a")], [["a"]])
      print({{name: float(value[0, 0]) for name, value in batch.components.items()}})
    """)
  )
  env = {**os.environ, "PYTHONPATH": str(tmp_path)}
  for command in (["script.py"], ["-m", "script"]):
    out = subprocess.run(
      [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60
    )
    assert out.returncode == 0, out.stderr
    expected = {"modules": 1.0}
    expected |= {f"modules/{name}": 0.0 for name in ("jax", "numpy")}
    assert out.stdout.strip() == str(expected)

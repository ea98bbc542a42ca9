r"""Tests the built-in verifiers with answers graded by hand, and the names of rewards."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_vlm import rewards
from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards import answers


def example(answer: str, **fields) -> Example:
  return Example(id="e", question="q", answer=answer, **fields)


@pytest.mark.parametrize(
  "text, expected",
  [
    (r"\boxed{5}", "5"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed {5}", "5"),
    (r"\boxed{4} and cut off: \boxed{5", "4"),
    (r"} { \boxed{4} }", "4"),
    (r"\boxed{}", ""),
    (r"\boxed{4} \boxed{ }", ""),
    (r"<think>\boxed{4}</think> \boxed{5}", "5"),
    (r"<think>\boxed{4}</think>", ""),
    (r"<think>a</think>b<think>\boxed{4}</ think >", ""),
    (r"<think>\boxed{4} is cut off", "4"),
    ("<answer>3</answer><answer> 4 </answer>", "4"),
    (r"<answer>3</answer>\boxed{4}", "4"),
    ("</answer>3", "</answer>3"),
    (" 7\n", "7"),
    ("", ""),
  ],
)
def test_final_answer(text, expected):
  assert answers.final_answer(text) == expected


@pytest.mark.parametrize(
  "truth, text, expected",
  [
    ("Red Cat", r"\boxed{\text{red  cat}.}", 1),
    ("red", "<answer>$red$</answer>", 1),
    ("red", "red", 1),
    ("red", r"\boxed{reddish}", 0),
    ("red", "it is red", 0),
    ("red", r"red \boxed{}", 0),
    ("red", r"<think>\boxed{red}</think>", 0),
    ("red", "", 0),
    (".", r"\boxed{}", 0),  # nothing is left of this truth
  ],
)
def test_exact(truth, text, expected):
  assert answers.exact(example(truth), text) == expected


@pytest.mark.parametrize(
  "truth, answer, expected",
  [
    ("1234", "1,234", 1),
    ("1,234.5", "1{,}234.50", 1),
    ("1234", "1,23,4", 0),
    ("12", r"\$12", 1),
    ("-12", "-$12", 1),
    ("-3", "\u22123", 1),
    ("2000", "2e3", 1),
    ("0.75", "3/4", 1),
    ("-0.75", r"-\frac{3}{4}", 1),
    ("12", "x = 12", 1),
    ("12", "12.", 1),
    ("12%", r"12\%", 1),
    ("12%", "0.12", 1),
    ("12%", "12", 1),
    ("12", "12%", 1),
    ("0.12", "12%", 1),
    ("12", "0.12", 0),
    ("12", "1200%", 1),
    ("12", "12 or 13", 0),
    ("12", "12 cm", 0),
    ("12", "1_2", 0),
    ("12", "1/0", 0),
    ("12", "nan", 0),
    ("12", "9" * 400, 0),
    ("0", "1e-9", 0),
    ("0", "-0.0", 1),
    ("100", "100.001", 0),
    ("100", "", 0),
  ],
)
def test_number(truth, answer, expected):
  assert answers.number(example(truth), rf"\boxed{{{answer}}}") == expected


def test_number_tolerance_is_relative_to_the_truth():
  lenient = example("200", meta={"tolerance": 0.05})
  assert answers.number(lenient, r"\boxed{210}") == 1
  assert answers.number(lenient, r"\boxed{190}") == 1
  assert answers.number(lenient, r"\boxed{210.1}") == 0


@pytest.mark.parametrize(
  "truth, text, expected",
  [
    ("B", r"\boxed{B}", 1),
    ("B", r"\boxed{\text{(B)}}", 1),
    ("(B)", "B.", 1),
    ("B", "(b)", 1),
    ("B", r"\boxed{B. a black cat}", 1),
    ("B", "**B**", 1),
    ("B", "[B] a black cat", 1),
    ("C. 5", r"\boxed{C}", 1),
    ("C", "A cat, so the answer is C.", 1),
    ("C", "Answer: (C)", 1),
    ("C", "The answer is option **C**", 1),
    ("A", "A cat sits there", 0),
    ("B", "Because it is black", 0),
    ("B", r"\boxed{Black}", 0),
    ("B", "B or C", 0),
    ("B", "(B) (C)", 0),
    ("B", "B. or C.", 0),
    ("A", "A. B. C. D.", 0),
    ("B", "The answer is A. The answer is B.", 0),
    ("B", "The answer is Black.", 0),
    ("A", "The answer is A cat.", 0),
    ("B", r"<think>\boxed{B}</think>", 0),
    ("B", r"B \boxed{}", 0),
    ("B", "", 0),
  ],
)
def test_choice(truth, text, expected):
  assert answers.choice(example(truth), text) == expected


@pytest.mark.parametrize(
  "text, expected",
  [
    (r"<think>a</think>\boxed{5}", 1),
    ("\n< think >\na\n< / think >\nso \\boxed{\\frac{1}{2}}.\n", 1),
    (r"<think>\boxed{4}?</think> \boxed{5}", 1),
    (r"<think>a</think>\boxed{5} \boxed{6}", 0),
    (r"<think>a</think>\boxed{}", 0),
    (r"<think>a</think>\boxed{5", 0),
    (r"<think>a</think>5", 0),
    (r"<think>\boxed{5}</think>", 0),
    (r"<think>a</think>b</think>\boxed{5}", 0),
    (r"Well, <think>a</think>\boxed{5}", 0),
    (r"\boxed{5}", 0),
    ("", 0),
  ],
)
def test_format(text, expected):
  assert answers.response_format(example("5"), text) == expected


@pytest.mark.parametrize(
  "truth, answer, expected",
  [
    ("0.5", r"\frac{1}{2}", 1),
    (r"\frac{1}{2}", "0.5", 1),
    ("1/2", r"50\%", 1),
    ("5", "x = 5", 1),
    ("$5$", "5", 1),
    (r"\boxed{5}", "5", 1),
    ("2\\sqrt{3}", r"\sqrt{12}", 1),
    ("x^2+1", "1 + x^2", 1),
    (r"\{1, 2\}", r"\{2, 1\}", 1),
    ("(3, 4)", "(3,4)", 1),
    ("12", r"12\text{ cm}", 1),
    ("5", "5, 6", 0),
    ("5", "5 or 6", 0),
    ("5", r"\infty", 0),
    ("5", "", 0),
    ("3.14", r"\pi", 0),
    ("yes", "Yes.", 1),
    ("yes", "sey", 0),
    ("5", "5" * 2000, 0),
    ("5", "}{", 0),
  ],
)
def test_math(truth, answer, expected):
  text = rf"<think>\boxed{{{truth}}}</think> \boxed{{{answer}}}"
  assert rewards.create({"math": 1})(example(truth), text)["math"] == expected


def test_math_ignores_an_answer_inside_think_tags():
  assert rewards.resolve("math")(example("5"), r"<think>\boxed{5}</think>") == 0


def test_math_does_not_evaluate_text_as_python(tmp_path):
  mark = tmp_path / "mark"
  attack = f"__import__('pathlib').Path({str(mark)!r}).touch()"
  for text in (attack, rf"\boxed{{{attack}}}", rf"\boxed{{\text{{{attack}}}}}"):
    assert rewards.resolve("math")(example("5"), text) == 0
  assert not mark.exists()


@pytest.mark.parametrize("name", ["exact", "number", "choice", "math"])
def test_an_empty_ground_truth_is_an_error(name):
  with pytest.raises(ValueError, match=r"example.answer='' of id='e': expected an answer"):
    rewards.resolve(name)(example(""), "")


@pytest.mark.parametrize("name, expected", [("number", "a number"), ("choice", "a letter")])
def test_a_ground_truth_of_the_wrong_type_is_an_error(name, expected):
  with pytest.raises(ValueError, match=f"example.answer='cat' of id='e': expected {expected}"):
    rewards.resolve(name)(example("cat"), "cat")


PIECES = ["\\boxed{", "{", "}", "\\", "<think>", "</think>", "<answer>", "</answer>", "answer is "]
PIECES += ["B", "(", ")", ".", "5", ",", "%", "/", "\\frac{", "$", " ", "\n", "\ud800", "\u0661"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_verifiers_return_zero_or_one_for_any_text(text):
  inside = answers.final_answer(text)
  assert inside in text
  for verifier, truth in [(answers.exact, "x"), (answers.number, "5"), (answers.choice, "B")]:
    assert verifier(example(truth), text) in (0.0, 1.0)
    if not inside:
      assert verifier(example(truth), text) == 0
  assert answers.response_format(example("5"), text) in (0.0, 1.0)


@given(st.text(alphabet=st.characters(exclude_characters="{}\\<")), st.text(alphabet="ab {}"))
def test_a_box_at_the_end_is_the_answer(answer, before):
  assert answers.final_answer(before + r"</think>\boxed{" + answer + "}") == answer.strip()


@pytest.mark.parametrize("piece", [*PIECES, "<", "answer is", "(A)", "A. ", "\\boxed{}", "1,"])
def test_repetitive_text_takes_linear_time(piece):
  text = piece * (300_000 // len(piece))  # with quadratic time, the test would not end
  for name, truth in [("exact", "x"), ("number", "7"), ("choice", "Z"), ("format", "5")]:
    assert rewards.resolve(name)(example(truth), text) == 0


def test_the_total_is_the_weighted_sum():
  reward = rewards.create({"math": 0.9, "format": 0.1})
  assert reward(example("5"), r"\boxed{5}") == {"math": 1.0, "format": 0.0, "total": 0.9}
  result = reward(example("5"), r"<think>a</think>\boxed{5}")
  assert result == {"math": 1.0, "format": 1.0, "total": 1.0}


def test_an_example_may_have_its_own_verifiers_and_weights():
  reward = rewards.create({"math": 0.9, "format": 0.1})
  own = example("B", rewards={"choice": 2.0})
  assert reward(own, "(B)") == {"choice": 1.0, "total": 2.0}


@pytest.fixture
def user_file(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    textwrap.dedent("""
      import dataclasses
      import numpy
      @dataclasses.dataclass
      class Box:
        left: int
      def length(example, text): return len(text) / 10
      def boxes(example, text): return {"boxes": 0.5, "iou": 0.25}
      def nameless(example, text): return {"iou": 0.25}
      def word(example, text): return "1"
      def nothing(example, text): return None
      def nan(example, text): return float("nan")
      def large(example, text): return 1e39
      def negative(example, text): return -1e39
      def largest(example, text): return 3.4028234663852886e38
      def large_part(example, text): return {"large_part": 1.0, "part": 1e39}
      def large_integer(example, text): return 10**400
      def numpy_float64(example, text): return numpy.float64(1e39)
      def numpy_float32(example, text): return numpy.float32("inf")
      def numpy_int64(example, text): return numpy.int64(3)
      def numpy_float16(example, text): return numpy.float16(0.5)
      def small_float32(example, text): return numpy.float32(0.75)
      def boolean(example, text): return True
      def math(example, text): return 1.0
      NUMBER = 3
    """)
  )
  return path


def test_a_function_in_a_file_is_a_verifier(user_file):
  reward = rewards.create({f"{user_file}:length": 0.5, f"{user_file}:boxes": 2})
  expected = {"length": 0.3, "boxes": 0.5, "boxes/iou": 0.25, "total": 1.15}
  assert reward(example("5"), "abc") == pytest.approx(expected)


def test_a_function_in_a_module_is_a_verifier(user_file, monkeypatch):
  monkeypatch.syspath_prepend(user_file.parent)
  assert rewards.create({"mine:length": 1})(example("5"), "abc")["total"] == pytest.approx(0.3)


@pytest.mark.parametrize(
  "weights, message",
  [
    ({"mth": 1}, "rewards: 'mth': no such verifier; did you mean 'math'[?] known: choice, exact"),
    ({"{dir}/no.py:f": 1}, "rewards: '.*no.py:f': no such file: .*no.py"),
    ({"{dir}/mine.py:f": 1}, "rewards: '.*mine.py:f': no such function; .* has: Box, length,"),
    (
      {"{dir}/mine.py:NUMBER": 1},
      "rewards: '.*mine.py:NUMBER': expected a function, got int; .* has: Box",
    ),
    ({"no.such.module:f": 1}, "rewards: 'no.such.module:f': cannot import: ModuleNotFoundError"),
    ({"{dir}/bad.py:f": 1}, "rewards: '.*bad.py:f': cannot import: ZeroDivisionError: division"),
    (
      {"math": 1, "{dir}/mine.py:math": 1},
      "'.*mine.py:math': its metric name 'math' is already used",
    ),
    ({"{dir}/mine.py:total": 1}, "no such function"),
    ({"math": math.nan}, r"rewards\['math'\]=nan: expected a weight that is finite"),
    ({"math": 1e39}, r"rewards\['math'\]=1e\+39: expected a weight that is finite"),
    ({"math": 10**400}, r"rewards\['math'\]=an integer of 1329 bits: expected a weight"),
    ({"math": "1"}, r"rewards\['math'\]='1': expected a weight that is finite"),
    ({3: 1}, "rewards: 3: expected the name of a verifier"),
    ({}, "rewards={}: expected a mapping"),
    (None, "rewards=None: expected a mapping"),
  ],
)
def test_create_refuses_unknown_verifiers_and_bad_weights(user_file, weights, message):
  (user_file.parent / "bad.py").write_text("1 / 0")
  if weights:
    at = str(user_file.parent)
    weights = {k.replace("{dir}", at) if isinstance(k, str) else k: v for k, v in weights.items()}
  with pytest.raises(ValueError, match=message) as caught:
    rewards.create(weights)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "name, message",
  [
    ("nameless", r"returned the entries \['iou'\], expected also the entry 'nameless'"),
    ("word", "returned word='1', expected a number"),
    ("nothing", "returned nothing of type NoneType, expected a number"),
    ("nan", "returned nan=nan, expected a finite number"),
    ("large", r"returned large=1e\+39, expected a number that float32 can hold"),
    ("negative", r"returned negative=-1e\+39, expected a number that float32 can hold"),
    ("large_part", r"returned part=1e\+39, expected a number that float32 can hold"),
    ("large_integer", "returned large_integer of type int that is too large, expected a number"),
    ("numpy_float64", r"returned numpy_float64=1e\+39, expected a number that float32 can hold"),
    ("numpy_float32", "returned numpy_float32=inf, expected a finite number"),
  ],
)
def test_bad_return_values_of_a_verifier_are_errors(user_file, name, message):
  with pytest.raises(ValueError, match=message) as caught:
    rewards.create({f"{user_file}:{name}": 1})(example("5"), "")
  assert caught.value.__notes__ == [f"in verifier {name!r}"]


@pytest.mark.parametrize(
  "name, value",
  [
    ("largest", 3.4028234663852886e38),
    ("numpy_int64", 3.0),
    ("numpy_float16", 0.5),
    ("small_float32", 0.75),
    ("boolean", 1.0),
  ],
)
def test_finite_float32_numbers_of_any_type_are_rewards(user_file, name, value):
  assert rewards.create({f"{user_file}:{name}": 1})(example("5"), "")["total"] == value
  assert np.isfinite(np.float32(value))


def test_a_weighted_sum_that_overflows_float32_is_an_error(user_file):
  with pytest.raises(
    ValueError, match=r"the weighted sum of the rewards is 6\.8\S*e\+38, expected"
  ):
    rewards.create({f"{user_file}:largest": 2.0})(example("5"), "")


def test_importing_rewards_imports_no_jax():
  code = (
    "import sys, jaxrl_vlm.rewards, jaxrl_vlm.rewards.pool; "
    "print([m for m in ('jax', 'flax', 'transformers', 'numpy', 'sympy') if m in sys.modules])"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"

r"""The `math` verifier: symbolic equality of answers, by the `math-verify` library."""

import functools
import logging
import re

from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards import answers

# Longer than any ground truth; parsing takes about half a millisecond per character.
_MAX_CHARS = 1000
_WORDS = re.compile(r"[a-z]{3,}(?:[ ,.'-]+[a-z]+)*")


def math(example: Example, text: str) -> float:
  r"""1 if the response's answer equals the ground truth as mathematics.

  Both are read as LaTeX by `math_verify.parse` and compared by `math_verify.verify`: 0.5 equals
  \frac{1}{2}, 50\% and x=1/2; {1, 2} equals {2, 1} but not 1. A ground truth in words is compared
  as `exact` does, since LaTeX reads "yes" as the product y·e·s.

  The library's own time limits are off: they are signals, which exist in a main thread only and
  do not interrupt one long operation on integers (9^{9^{9^{9}}} is one). Run model text in a
  `RewardPool`, which sets limits from outside. Its plain-expression reader is off as well, because
  that one calls `eval`.
  """
  truth, answer = answers.ground_truth(example), answers.final_answer(text)
  if not answer or len(answer) > _MAX_CHARS:
    return 0.0
  if answers.normalise(answer) == answers.normalise(truth) != "":
    return 1.0
  if _WORDS.fullmatch(answers.normalise(truth)):
    return 0.0
  math_verify, config = _library()
  parsed = [
    math_verify.parse(rf"\boxed{{{latex}}}", extraction_config=config, parsing_timeout=None)
    for latex in (truth, answer)
  ]
  return float(math_verify.verify(*parsed, timeout_seconds=None))


@functools.cache
def _library():
  import math_verify  # Half a second: only where it is used.

  for module in ("parser", "grader"):  # They warn that their time limits are off.
    logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
  return math_verify, [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

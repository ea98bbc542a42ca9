r"""The verifier `math`: symbolic equality of answers, computed by the library `math-verify`."""

import functools
import logging
import re

from jaxrl_vlm.example import Example
from jaxrl_vlm.rewards import answers

# Longer answers count as wrong, because no ground truth is that long. Parsing takes about half a
# millisecond per character.
_MAX_CHARS = 1000
_WORDS = re.compile(r"[a-z]{3,}(?:[ ,.'-]+[a-z]+)*")


def math(example: Example, text: str) -> float:
  r"""Returns 1 if the answer of the response is mathematically equal to the ground truth, else 0.

  `math_verify.parse` reads both as LaTeX, and `math_verify.verify` compares them: 0.5 equals
  \frac{1}{2}, 50\% and x=1/2; {1, 2} equals {2, 1} but not 1. A ground truth that consists of words
  is compared as `exact` does, because LaTeX reads "yes" as the product y·e·s.

  The library's own time limits are disabled. They use signals, which work in the main thread only
  and do not interrupt a single long integer operation such as 9^{9^{9^{9}}}. Use a `RewardPool` to
  grade model output, because it enforces limits from outside the process. The library's parser for
  plain expressions is disabled too, because it calls `eval`.
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
  import math_verify  # imported on first use, because the import takes half a second

  for module in ("parser", "grader"):  # They would warn that their time limits are disabled.
    logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
  return math_verify, [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

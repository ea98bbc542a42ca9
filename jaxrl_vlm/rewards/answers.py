r"""The answer in a response, and the verifiers that look at text: exact, number, choice, format.

The answer of a response is, in what follows its last `</think>` (all of it when there is none):
the last balanced `\boxed{...}`; without a box the last `<answer>...</answer>`; without either,
everything. An empty answer earns nothing. Every regular expression here takes linear time:
repetitive text of any length is cheap.
"""

import math
import re
import unicodedata

from jaxrl_vlm.example import Example

_THINK_TAG = re.compile(r"<\s*+(/?+)\s*+think\s*+>")
_BRACES = re.compile(r"\\boxed\s*+\{|\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\boxed(?![A-Za-z])")
_FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*+\{([^{}]*)\}")
_LATEX_CHARS = ((r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r"\,", ""), (r"\!", ""), ("\u2212", "-"))

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?"
_NUMBER = re.compile(rf"([-+]?)\s*+[$€£]?\s*+({_DECIMAL})", re.ASCII)
_FRACTION = re.compile(
  rf"([-+]?)\s*+(?:\\[dt]?frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}|({_DECIMAL})\s*+/\s*+({_DECIMAL}))",
  re.ASCII,
)

_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]?")
_LETTER_THEN_TEXT = re.compile(r"(?:[(\[]([A-Z])[)\]]|([A-Z])[.):])[.:]?\s+(.*)", re.DOTALL)
_ANOTHER_LETTER = re.compile(
  r"[(\[][A-Z][)\]]|(?:^|[\s,;/])[A-Z](?:[.):]\s|[):]$)|^(?:or|and|,|/)\s*+[(\[]?[A-Z]\b"
)
_CLAIM = re.compile(
  r"\b(?i:answer)(?i:\s++is)?+\s*+:?+\s*+(?i:option\s++|choice\s++)?+"
  r"[*(\[]*+([A-Z])[*)\]]*+(?=[.,;:\n]|\s*+$)"
)


def after_thinking(text: str) -> str:
  """What follows the last `</think>`; the whole text when nothing closes the thinking."""
  end = 0
  for tag in _THINK_TAG.finditer(text):
    if tag.group(1):
      end = tag.end()
  return text[end:]


def last_boxed(text: str) -> str | None:
  r"""The content of the last `\boxed{...}` whose braces balance, or None.

  The last is the one that opens last, so a box in a box gives the inner one. `\{` and `\}` are
  characters of the answer, not braces.
  """
  opened: list[int | None] = []  # for each open brace: where a box's content starts, or None
  start, content = -1, None
  for token in _BRACES.finditer(text):
    if token.group().startswith(r"\boxed"):
      opened.append(token.end())
    elif token.group() == "{":
      opened.append(None)
    elif token.group() == "}" and opened:
      begin = opened.pop()
      if begin is not None and begin > start:
        start, content = begin, text[begin : token.start()]
  return content


def final_answer(text: str) -> str:
  """The answer of a response (see the module's text), stripped; empty when there is none."""
  text = after_thinking(text)
  boxed = last_boxed(text)
  if boxed is not None:
    return boxed.strip()
  end = text.rfind("</answer>")
  start = text.rfind("<answer>", 0, end) if end >= 0 else -1
  if start >= 0:
    return text[start + len("<answer>") : end].strip()
  return text.strip()


def normalise(answer: str) -> str:
  r"""Drops what does not change an answer: case, spacing, `$...$`, `\text{}`, the final stop."""
  return _plain(answer).removesuffix(".").rstrip().casefold()


def ground_truth(example: Example) -> str:
  """The example's answer; ValueError when it is empty, for nothing can be compared with it."""
  if not example.answer.strip():
    raise ValueError(f"example.answer={example.answer!r} of id={example.id!r}: expected an answer")
  return example.answer


def exact(example: Example, text: str) -> float:
  """1 if the response's answer and the ground truth are the same string once normalised."""
  truth, answer = normalise(ground_truth(example)), normalise(final_answer(text))
  return float(answer == truth != "")


def number(example: Example, text: str) -> float:
  r"""1 if the response's answer is the ground truth's number.

  |answer - truth| ≤ tolerance · |truth|, with `example.meta["tolerance"]` (default 1e-6; charts are
  often judged with 0.05). Understood: 1,234.5; -2e3; 3/4; \frac{3}{4}; $12; 12%; x=12. When one
  side only has a percent sign, both readings of it count (12% is 12 and 0.12). Anything besides
  the number (a unit, a second number) earns nothing.

  Raises:
    ValueError: the ground truth is not a number.
  """
  truth = _number(ground_truth(example))
  if truth is None:
    raise ValueError(f"example.answer={example.answer!r} of id={example.id!r}: expected a number")
  answer = _number(final_answer(text))
  if answer is None:
    return 0.0
  tolerance = float(example.meta.get("tolerance", 1e-6))
  scales = (1.0,) if answer[1] == truth[1] else (1.0, 0.01 if answer[1] else 100.0)
  return float(any(abs(answer[0] * s - truth[0]) <= tolerance * abs(truth[0]) for s in scales))


def choice(example: Example, text: str) -> float:
  r"""1 if the response chooses the ground truth's letter.

  Understood as the answer: B, b, (B), B., [B], \boxed{B}, "B. a cat", "(B) a cat"; in a response
  with neither box nor answer tags also "the answer is B." if it claims one letter only. A word
  that begins with the letter ("Because", "A cat") is no choice, nor are two letters.

  Raises:
    ValueError: the ground truth is not a letter.
  """
  truth = _letter(ground_truth(example))
  if truth is None:
    raise ValueError(f"example.answer={example.answer!r} of id={example.id!r}: expected a letter")
  answer = final_answer(text)
  letter = _letter(answer)
  if letter is None:
    # In a box or tags these words are as much a claim as outside of them.
    claims = set(_CLAIM.findall(answer))
    letter = claims.pop() if len(claims) == 1 else None
  return float(letter == truth)


def response_format(example: Example, text: str) -> float:
  r"""1 if the response is `<think>...</think>`, then text with exactly one, filled `\boxed{...}`.

  The pattern of EasyR1's `math` reward (`<think>.*</think>.*\\boxed\{.*\}.*`, spaces in and around
  tags ignored), but stricter: one pair of tags, one box after it, its braces balanced and not
  empty. EasyR1 credits a second box, an empty box, and a box before `</think>` closes again.
  """
  del example
  text = text.strip()
  tags = list(_THINK_TAG.finditer(text))
  if [tag.group(1) for tag in tags] != ["", "/"] or tags[0].start() != 0:
    return 0.0
  rest = text[tags[1].end() :]
  return float(len(_BOX.findall(rest)) == 1 and bool((last_boxed(rest) or "").strip()))


def _plain(answer: str) -> str:
  """Without font commands, dollar signs around it, emphasis and superfluous spaces."""
  answer = unicodedata.normalize("NFC", answer)
  for latex, char in _LATEX_CHARS:
    answer = answer.replace(latex, char)
  answer = _FONT.sub(r"\1", answer)
  return " ".join(answer.split()).strip("$*` ")


def _number(answer: str) -> tuple[float, bool] | None:
  """The value of an answer that is one number, and whether a percent sign follows it."""
  answer = normalise(answer).rsplit("=", 1)[-1].strip()
  percent = answer.endswith("%")
  answer = answer.removesuffix("%").rstrip("$ ")
  if match := _NUMBER.fullmatch(answer):
    value = _float(match.group(2))
  elif match := _FRACTION.fullmatch(answer):
    top, bottom = (_float(part) for part in match.groups()[1:] if part is not None)
    value = top / bottom if bottom else math.inf
  else:
    return None
  return (-value if match.group(1) == "-" else value, percent) if math.isfinite(value) else None


def _float(digits: str) -> float:
  return float(digits.replace(",", ""))


def _letter(answer: str) -> str | None:
  answer = _plain(answer)
  if match := _LETTER.fullmatch(answer):
    return match.group(1).upper()
  match = _LETTER_THEN_TEXT.fullmatch(answer)
  if match and not _ANOTHER_LETTER.search(match.group(3)):
    return match.group(1) or match.group(2)
  return None

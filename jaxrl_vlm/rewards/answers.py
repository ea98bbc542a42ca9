r"""Extracts the answer of a response, and defines the verifiers exact, number, choice and format.

The answer of a response is taken from the text after its last `</think>`, or from the whole text if
there is no `</think>`. In this text, the answer is the first of these that exists:

1. the content of the last `\boxed{...}` with balanced braces;
2. the content of the last `<answer>...</answer>`;
3. the whole text.

An empty answer has reward 0. All regular expressions in this file take linear time, also for long
repetitive text.
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
  """Returns the text after the last `</think>`, or the whole text if there is no `</think>`."""
  end = 0
  for tag in _THINK_TAG.finditer(text):
    if tag.group(1):
      end = tag.end()
  return text[end:]


def last_boxed(text: str) -> str | None:
  r"""Returns the content of the last `\boxed{...}` with balanced braces, or None.

  The last box is the one that opens last. Of nested boxes, this is the inner one. `\{` and `\}` are
  characters of the answer and do not count as braces.
  """
  opened: list[int | None] = []  # for each open brace, the start of the box's content, or None
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
  """Returns the stripped answer of a response (see the module docstring). It may be empty."""
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
  r"""Removes differences of notation: case, spacing, `$...$`, `\text{}` and a final period."""
  return _plain(answer).removesuffix(".").rstrip().casefold()


def ground_truth(example: Example) -> str:
  """Returns the answer of the example. Raises ValueError if it is empty."""
  if not example.answer.strip():
    raise ValueError(f"example.answer={example.answer!r} of id={example.id!r}: expected an answer")
  return example.answer


def exact(example: Example, text: str) -> float:
  """Returns 1 if answer and ground truth are the same string after normalisation, otherwise 0."""
  truth, answer = normalise(ground_truth(example)), normalise(final_answer(text))
  return float(answer == truth != "")


def number(example: Example, text: str) -> float:
  r"""Returns 1 if the answer is a number that is close enough to the ground truth, otherwise 0.

  The condition is |answer - truth| ≤ tolerance · |truth|, with `example.meta["tolerance"]` (default
  1e-6; charts are often judged with 0.05). Numbers may be written as 1,234.5; -2e3; 3/4;
  \frac{3}{4}; $12; 12%; x=12. If only one of answer and truth has a percent sign, both meanings of
  it are accepted: 12% is 12 or 0.12. The result is 0 if the answer contains anything else, such as
  a unit or a second number.

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
  r"""Returns 1 if the response chooses the letter of the ground truth, otherwise 0.

  The answer may be B, b, (B), B., [B], \boxed{B}, "B. a cat" or "(B) a cat". It may also be a
  sentence such as "The answer is B.", if all sentences of this form name the same letter. A word
  that begins with the letter ("Because", "A cat") does not choose it, and two letters choose
  neither.

  Raises:
    ValueError: the ground truth is not a letter.
  """
  truth = _letter(ground_truth(example))
  if truth is None:
    raise ValueError(f"example.answer={example.answer!r} of id={example.id!r}: expected a letter")
  answer = final_answer(text)
  letter = _letter(answer)
  if letter is None:
    # A sentence such as "the answer is B" counts inside a box or tags as well.
    claims = set(_CLAIM.findall(answer))
    letter = claims.pop() if len(claims) == 1 else None
  return float(letter == truth)


def response_format(example: Example, text: str) -> float:
  r"""Returns 1 if the response is `<think>...</think>`, then text with one `\boxed{...}`, else 0.

  This is the pattern of EasyR1's `math` reward (`<think>.*</think>.*\\boxed\{.*\}.*`, spaces in and
  around tags ignored) with more conditions: there is exactly one pair of tags and exactly one box
  after it, whose braces are balanced and whose content is not empty. EasyR1 also accepts a second
  box, an empty box, and a box before a second `</think>`.
  """
  del example
  text = text.strip()
  tags = list(_THINK_TAG.finditer(text))
  if [tag.group(1) for tag in tags] != ["", "/"] or tags[0].start() != 0:
    return 0.0
  rest = text[tags[1].end() :]
  return float(len(_BOX.findall(rest)) == 1 and bool((last_boxed(rest) or "").strip()))


def _plain(answer: str) -> str:
  """Removes font commands, surrounding dollar signs, emphasis and superfluous spaces."""
  answer = unicodedata.normalize("NFC", answer)
  for latex, char in _LATEX_CHARS:
    answer = answer.replace(latex, char)
  answer = _FONT.sub(r"\1", answer)
  return " ".join(answer.split()).strip("$*` ")


def _number(answer: str) -> tuple[float, bool] | None:
  """Returns the value of the answer and whether it has a percent sign. None: it is no number."""
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

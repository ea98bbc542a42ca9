"""Turns chat messages into text and token ids with a checkpoint's tokenizer and chat template.

Text from a dataset never becomes a special token. A question that contains `<|image_pad|>` or
`<|im_end|>` is encoded as those characters. Only the chat template writes special tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_vlm.errors import one_line

# A reference that replaces text which the chat template and the search for special tokens must not
# read: the text's index in a list, between two private-use characters.
_HIDDEN = "\ue000(\\d+)\ue001"
_PART_TYPES = ("text", "image", "video")

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Chat:
  """A rendered conversation up to the header of the assistant's turn.

  Attributes:
    pieces: The text, split at special tokens. Each special token is a piece with an odd index.
    hidden: Text of the messages that would have been read as special tokens. `pieces` refers to it
      by index.
    begins: Whether the template wrote the beginning-of-sequence token.
  """

  pieces: list[str]
  hidden: list[str]
  begins: bool


class ChatTokenizer:
  """A tokenizer that distinguishes special tokens of the template from the same text in messages.

  Attributes:
    special_ids: Maps the text of every special token to its id.
  """

  def __init__(self, tokenizer: Any):
    """Wraps a tokenizer.

    Args:
      tokenizer: A Hugging Face tokenizer with a chat template.

    Raises:
      ValueError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
      raise ValueError(
        "tokenizer_config.json: no chat_template; expected one in tokenizer_config.json, "
        "chat_template.jinja or chat_template.json"
      )
    self._tokenizer = tokenizer
    self.special_ids: dict[str, int] = {
      token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    # Longest first, because regular expressions take the first alternative that matches.
    names = "|".join(re.escape(t) for t in sorted(self.special_ids, key=len, reverse=True))
    self._special = re.compile(f"({names})")
    self._to_hide = re.compile(f"{names}|{_HIDDEN}")
    # A copy, because the flag `encode_special_tokens` is shared state of the tokenizer.
    self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
    self._plain.no_truncation()
    self._plain.no_padding()
    self._plain.encode_special_tokens = True

  def __setstate__(self, state: dict[str, Any]):
    self.__dict__.update(state)
    # Pickling, which sends the tokenizer to data workers, loses the flag.
    self._plain.encode_special_tokens = True

  def render(self, messages: Sequence[Message], name: str = "conversation") -> Chat:
    """Renders messages with the chat template, up to the header of the assistant's turn.

    Args:
      messages: As in `check_messages`.
      name: What error messages call the conversation.

    Raises:
      ValueError: A message is malformed (see `check_messages`).
    """
    check_messages(messages, name)
    hidden: list[str] = []
    text = self._tokenizer.apply_chat_template(
      self._hide(messages, hidden), tokenize=False, add_generation_prompt=True
    )
    bos = self._tokenizer.bos_token
    return Chat(self._special.split(text), hidden, bos is not None and text.startswith(bos))

  def encode(self, chat: Chat) -> list[int]:
    """Returns the token ids of a chat. Callers may have replaced special tokens in its pieces."""
    # A template that writes no beginning-of-sequence token leaves it to the tokenizer.
    ids = [] if chat.begins else self._plain.encode("", add_special_tokens=True).ids
    for text in self._special.split("".join(chat.pieces)):
      if text in self.special_ids:
        ids.append(self.special_ids[text])
      elif text:
        if chat.hidden:
          text = re.sub(_HIDDEN, lambda match: chat.hidden[int(match[1])], text)
        ids.extend(self.encode_plain(text))
    return ids

  def encode_plain(self, text: str) -> list[int]:
    """Returns the token ids of text. Special tokens in it are encoded as ordinary characters.

    Raises:
      ValueError: The text contains a lone surrogate.
    """
    check_unicode(text, "text")
    return self._plain.encode(text, add_special_tokens=False).ids

  def _hide(self, value: Any, hidden: list[str]) -> Any:
    """Returns `value` with special tokens in its strings replaced by references to `hidden`."""

    def refer(text: str) -> str:
      hidden.append(text)
      return f"\ue000{len(hidden) - 1}\ue001"

    if isinstance(value, str):
      return self._to_hide.sub(lambda match: refer(match[0]), value)
    if isinstance(value, Mapping):
      return {key: self._hide(item, hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      items = [self._hide(item, hidden) for item in value]
      # Two adjacent texts could form a special token together. An empty reference separates them.
      for before, item in zip(items, items[1:], strict=False):
        if _is_text(before) and _is_text(item):
          text = item["text"]
          # The reference follows leading white space, because some templates strip that.
          start = len(text) - len(text.lstrip())
          item["text"] = text[:start] + refer("") + text[start:]
      return items
    return value


def has_video(messages: Sequence[Message]) -> bool:
  """Returns whether the content of any message contains a video."""
  contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
  parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
  return any(isinstance(part, Mapping) and part.get("type") == "video" for part in parts)


def check_messages(messages: Sequence[Message], name: str = "conversation") -> None:
  """Checks the form of messages, because a chat template drops or misprints what it does not know.

  A message is a dict with `role`, a string, and `content`. The content is a string or a list of
  parts: `{"type": "text", "text": "..."}`, `{"type": "image"}` or `{"type": "video"}`. A plain
  string in the list is an error, because the chat templates of published checkpoints skip it.

  Args:
    messages: The messages of one conversation.
    name: What error messages call the conversation.

  Raises:
    ValueError: The message names the conversation, the field, its value and what was expected.
  """
  if isinstance(messages, str) or not isinstance(messages, Sequence):
    raise ValueError(f"{name}: messages={_shown(messages)}: expected a list of messages")
  for i, message in enumerate(messages):
    field = f"{name}: messages[{i}]"
    if not isinstance(message, Mapping):
      raise ValueError(
        f"{field}={_shown(message)}: expected a dict such as {{'role': 'user', 'content': 'Hi'}}"
      )
    role = _get(message, "role", field, "a string such as 'user'")
    if not isinstance(role, str) or not role:
      raise ValueError(f"{field}['role']={_shown(role)}: expected a string such as 'user'")
    check_unicode(role, f"{field}['role']")
    content = _get(message, "content", field, "a string or a list of parts")
    if isinstance(content, str):
      check_unicode(content, f"{field}['content']")
    elif isinstance(content, list | tuple):
      for j, part in enumerate(content):
        _check_part(part, f"{field}['content'][{j}]")
    else:
      raise ValueError(
        f"{field}['content']={_shown(content)}: expected a string or a list of parts such as "
        "{'type': 'text', 'text': 'Hi'}"
      )


def check_unicode(text: str, name: str) -> None:
  r"""Raises ValueError if text contains a lone surrogate, such as the JSON string "\ud800".

  No tokenizer encodes such text, and no UTF-8 file can hold it.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{name}: character {error.start} is the lone surrogate {text[error.start]!r}; "
      "expected valid Unicode text"
    ) from None


def _check_part(part: Any, field: str) -> None:
  """Checks one item of a message's content. `field` names it."""
  if isinstance(part, str):
    raise ValueError(
      f"{field}={_shown(part)}: expected a dict; write {{'type': 'text', 'text': ...}} for text"
    )
  if not isinstance(part, Mapping):
    raise ValueError(f"{field}={_shown(part)}: expected a dict such as {{'type': 'image'}}")
  expected = ", ".join(map(repr, _PART_TYPES[:-1])) + f" or {_PART_TYPES[-1]!r}"
  kind = _get(part, "type", field, expected)
  if kind not in _PART_TYPES:
    raise ValueError(f"{field}['type']={_shown(kind)}: expected {expected}")
  if kind == "text":
    text = _get(part, "text", field, "a string")
    if not isinstance(text, str):
      raise ValueError(f"{field}['text']={_shown(text)}: expected a string")
    check_unicode(text, f"{field}['text']")


def _get(mapping: Mapping[str, Any], key: str, field: str, expected: str) -> Any:
  if key not in mapping:
    raise ValueError(f"{field}[{key!r}] is missing; expected {expected}")
  return mapping[key]


def _shown(value: Any) -> str:
  text = one_line(repr(value))
  return text if len(text) <= 60 else f"{text[:57]}..."


def _is_text(item: Any) -> bool:
  return isinstance(item, dict) and isinstance(item.get("text"), str)

"""Chat messages to text and token ids, by the tokenizer and chat template of a checkpoint.

Text from data never becomes a special token: a question that contains `<|image_pad|>` or
`<|im_end|>` is encoded as those characters. Only the chat template writes special tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

# A stretch of text that must not be seen by the chat template or by the search for special tokens,
# written with private-use characters as its index in a list.
_HIDDEN = "\ue000(\\d+)\ue001"

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Chat:
  """A rendered conversation up to the header of the assistant's turn.

  Attributes:
    pieces: its text; special tokens, each a piece, at the odd indices.
    hidden: what was special tokens in the messages; the pieces refer to it.
    begins: whether the template itself wrote the token of the beginning.
  """

  pieces: list[str]
  hidden: list[str]
  begins: bool


class ChatTokenizer:
  """A tokenizer that tells the special tokens of the template from those in the messages.

  Attributes:
    special_ids: from the text of every special token to its id.
  """

  def __init__(self, tokenizer: Any):
    """tokenizer: a Hugging Face one; ValueError if it has no chat template."""
    if not tokenizer.chat_template:
      raise ValueError("tokenizer_config.json: no chat_template, nor chat_template.jinja or .json")
    self._tokenizer = tokenizer
    self.special_ids: dict[str, int] = {
      token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    # Longest first, because regular expressions take the first alternative that matches.
    names = "|".join(re.escape(t) for t in sorted(self.special_ids, key=len, reverse=True))
    self._special = re.compile(f"({names})")
    self._to_hide = re.compile(f"{names}|{_HIDDEN}")
    # A copy, because the flag is a state of the tokenizer that its other users set too.
    self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
    self._plain.no_truncation()
    self._plain.no_padding()
    self._plain.encode_special_tokens = True

  def __setstate__(self, state: dict[str, Any]):
    self.__dict__.update(state)
    self._plain.encode_special_tokens = True  # pickling (to data workers) forgets it

  def render(self, messages: Sequence[Message]) -> Chat:
    hidden: list[str] = []
    text = self._tokenizer.apply_chat_template(
      self._hide(messages, hidden), tokenize=False, add_generation_prompt=True
    )
    bos = self._tokenizer.bos_token
    return Chat(self._special.split(text), hidden, bos is not None and text.startswith(bos))

  def encode(self, chat: Chat) -> list[int]:
    """Token ids of a chat, into whose pieces other special tokens may have been put."""
    # A template that does not write the token of the beginning leaves it to the tokenizer.
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
    """Token ids of text, special tokens in it as the characters they are written with."""
    return self._plain.encode(text, add_special_tokens=False).ids

  def _hide(self, value: Any, hidden: list[str]) -> Any:
    """`value` with every special token inside a string replaced by a reference into `hidden`."""

    def refer(text: str) -> str:
      hidden.append(text)
      return f"\ue000{len(hidden) - 1}\ue001"

    if isinstance(value, str):
      return self._to_hide.sub(lambda match: refer(match[0]), value)
    if isinstance(value, Mapping):
      return {key: self._hide(item, hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      items = [self._hide(item, hidden) for item in value]
      # Two texts without anything between them could make a special token together.
      for before, item in zip(items, items[1:], strict=False):
        if _is_text(before) and _is_text(item):
          text = item["text"]
          # After the white space, which some templates strip.
          start = len(text) - len(text.lstrip())
          item["text"] = text[:start] + refer("") + text[start:]
      return items
    return value


def has_video(messages: Sequence[Message]) -> bool:
  """Whether a message has a video among its parts."""
  contents = [message.get("content") for message in messages]
  parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
  return any(isinstance(part, Mapping) and part.get("type") == "video" for part in parts)


def _is_text(item: Any) -> bool:
  return isinstance(item, dict) and isinstance(item.get("text"), str)

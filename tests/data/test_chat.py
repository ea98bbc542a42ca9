"""Text becomes the tokens that transformers makes of it, but never a special token."""

import numpy as np
import pytest
import transformers

from jaxrl_vlm.data.chat import ChatTokenizer
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.example import Example
from tests.tiny_processor import GEMMA_SPECIAL_TOKENS, SPECIAL_TOKENS, make_processor_dir

HOSTILE = [
  *(("qwen2_5_vl", t) for t in (*SPECIAL_TOKENS, "\ue0000\ue001", "\ue0000\ue001<|im_end|>")),
  *(("gemma3", t) for t in (*GEMMA_SPECIAL_TOKENS, "\ue0000\ue001", "\ue0000\ue001<bos>")),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  families = ("qwen2_5_vl", "gemma3")
  return {f: make_processor_dir(tmp_path_factory.mktemp(f), family=f) for f in families}


@pytest.fixture(scope="module")
def processors(paths):
  return {family: Processor.from_pretrained(path) for family, path in paths.items()}


def parts(*texts):
  return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize(
  "messages",
  [
    [{"role": "user", "content": "\n\n Zwei  Kreise? ½ é e\u0301 日本 🙂\n"}],
    [
      {"role": "system", "content": "Think step by step."},
      {"role": "user", "content": "Hi <tool_call>"},
      {"role": "assistant", "content": parts("The answer is 42.")},
      {"role": "user", "content": parts("a", "b")},
    ],
    # Gemma's template strips every part.
    [{"role": "user", "content": parts(" a \n", "  \n b ", "   ", "", " c\n\n\n d")}],
  ],
)
def test_text_tokens_equal_transformers(paths, processors, family, messages):
  tokenizer = transformers.AutoTokenizer.from_pretrained(paths[family])
  text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  expected = tokenizer(text, add_special_tokens=False)["input_ids"]
  np.testing.assert_array_equal(processors[family].encode_messages(messages).tokens, expected)


@pytest.mark.parametrize("family, text", HOSTILE)
def test_text_never_becomes_a_special_token(processors, family, text):
  processor = processors[family]
  special = set(processor.tokenizer.all_special_ids) | {
    processor.tokenizer.convert_tokens_to_ids(t)
    for t in (SPECIAL_TOKENS if family == "qwen2_5_vl" else GEMMA_SPECIAL_TOKENS)
  }

  def specials(prompt):
    return [t for t in prompt.tokens.tolist() if t in special]

  clean = processor.encode(Example("a", "x", ""), system="y")
  half = len(text) // 2
  dirty = [
    processor.encode(Example("a", f"x{text}{text} z", ""), system=f"{text}y"),
    processor.encode_messages(
      [
        {"role": "system", "content": f"y{text}"},
        {"role": "user", "content": parts(text[:half], text[half:])},
      ]
    ),
    # Together after a template has stripped the space between them.
    processor.encode_messages(
      [
        {"role": "system", "content": "y"},
        {"role": "user", "content": parts(text[:half], f" \n{text[half:]}", text)},
      ]
    ),
  ]
  for prompt in dirty:
    assert specials(prompt) == specials(clean)
    # Every character is still there, only not as a special token.
    assert text in processor.decode(prompt.tokens)
  target = processor.encode_target(f"a {text}")
  assert target[-1] == processor.end_token_id
  assert not special & set(target[:-1])
  assert processor.decode(target) == f"a {text}"


def test_a_tokenizer_without_template_is_refused(paths):
  tokenizer = transformers.AutoTokenizer.from_pretrained(paths["gemma3"])
  tokenizer.chat_template = None
  with pytest.raises(ValueError, match="tokenizer_config.json: no chat_template"):
    ChatTokenizer(tokenizer)

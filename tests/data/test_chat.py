"""Tests that text becomes the same tokens as in transformers, and never a special token."""

import re

import numpy as np
import pytest
import transformers

from jaxrl_vlm.data.chat import ChatTokenizer, check_messages
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
    # Gemma's template strips white space around every text.
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
    # A template that strips the white space between these texts joins them.
    processor.encode_messages(
      [
        {"role": "system", "content": "y"},
        {"role": "user", "content": parts(text[:half], f" \n{text[half:]}", text)},
      ]
    ),
  ]
  for prompt in dirty:
    assert specials(prompt) == specials(clean)
    # All characters are kept, as ordinary text.
    assert text in processor.decode(prompt.tokens)
  target = processor.encode_target(f"a {text}")
  assert target[-1] == processor.end_token_id
  assert not special & set(target[:-1])
  assert processor.decode(target) == f"a {text}"


def test_tokenizer_without_chat_template_is_refused(paths):
  tokenizer = transformers.AutoTokenizer.from_pretrained(paths["gemma3"])
  tokenizer.chat_template = None
  with pytest.raises(ValueError, match="tokenizer_config.json: no chat_template"):
    ChatTokenizer(tokenizer)


def user(content):
  return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
  ("messages", "message"),
  [
    (user(parts("a", None)), "messages[0]['content'][1]['text']=None: expected a string"),
    (user(parts("a", 3)), "messages[0]['content'][1]['text']=3: expected a string"),
    (user([{"type": "text"}]), "messages[0]['content'][0]['text'] is missing; expected a string"),
    (user(["a"]), "messages[0]['content'][0]='a': expected a dict; write {'type': 'text', "),
    (user([None]), "messages[0]['content'][0]=None: expected a dict such as {'type': 'image'}"),
    (user([7]), "messages[0]['content'][0]=7: expected a dict"),
    (user([{"text": "a"}]), "messages[0]['content'][0]['type'] is missing; expected 'text', 'im"),
    (user([{"type": "img"}]), "messages[0]['content'][0]['type']='img': expected 'text', 'image' "),
    (user([{"type": None}]), "messages[0]['content'][0]['type']=None: expected 'text', 'image' "),
    (user(None), "messages[0]['content']=None: expected a string or a list of parts"),
    (user(5), "messages[0]['content']=5: expected a string or a list of parts"),
    (user({"type": "text", "text": "a"}), "messages[0]['content']={'type': 'text', 'text': 'a'}: "),
    ([{"role": "user"}], "messages[0]['content'] is missing; expected a string or a list of parts"),
    ([{"content": "a"}], "messages[0]['role'] is missing; expected a string such as 'user'"),
    ([{"role": None, "content": "a"}], "messages[0]['role']=None: expected a string such as 'us"),
    ([*user("a"), "b"], "messages[1]='b': expected a dict such as {'role': 'user', "),
    ("a", "messages='a': expected a list of messages"),
    (user("a \ud800 b"), "messages[0]['content']: character 2 is the lone surrogate '\\ud800'"),
    (user(parts("\udfff")), "messages[0]['content'][0]['text']: character 0 is the lone surrogate"),
    (
      [{"role": "\ud800", "content": "a"}],
      "messages[0]['role']: character 0 is the lone surrogate",
    ),
  ],
)
def test_malformed_message_is_named(messages, message):
  with pytest.raises(ValueError, match=f"^conversation 3: {re.escape(message)}") as error:
    check_messages(messages, "conversation 3")
  assert "\n" not in str(error.value)


def test_wellformed_messages_are_accepted():
  content = [{"type": "image"}, {"type": "video", "fps": 2}, *parts("", "Größe \U0001f642")]
  check_messages([{"role": "system", "content": ""}, *user(content), *user(tuple(content))])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_processor_names_the_example_with_malformed_text(processors, family):
  processor = processors[family]
  example = Example("q7", "a \ud800 b", "", origin="data.jsonl:3")
  with pytest.raises(ValueError, match=r"^data.jsonl:3: example 'q7': messages\[0\]\['content'\]"):
    processor.encode(example)
  with pytest.raises(
    ValueError, match=r"^example 'q8': messages\[0\]\['content'\]: character 1 is"
  ):
    processor.encode(Example("q8", "a", ""), system="b\ud800")
  with pytest.raises(ValueError, match="^conversation 0: .*'text'.=None: expected a string"):
    processor(user(parts(None)))
  with pytest.raises(ValueError, match="lone surrogate"):
    processor.encode_target("a \ud800")

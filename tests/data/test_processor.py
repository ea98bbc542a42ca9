"""Prompts hold exactly what transformers computes for the same messages and images."""

import io
import itertools
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import vision_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from jaxrl_vlm.data import processor as processor_lib
from jaxrl_vlm.data.images import ImageError
from jaxrl_vlm.example import Example
from tests.tiny_processor import SPECIAL_TOKENS, make_processor_dir

# The window cases: smaller than a window, whole windows, windows cut at one or both borders.
IMAGE_SETS = [
  [],
  [(28, 28)],
  [(112, 224)],
  [(113, 225), (300, 80)],
  [(56, 84), (28, 200), (140, 140)],
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return make_processor_dir(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def processor(path):
  return processor_lib.Processor.from_pretrained(path)


@pytest.fixture(scope="module")
def hf_model(processor):
  """Only its index functions are used, which read nothing but the config."""
  config = transformers.Qwen2_5_VLConfig(
    image_token_id=processor.image_token_id,
    video_token_id=processor.video_token_id,
    vision_start_token_id=processor.vision_start_token_id,
    vision_end_token_id=processor.vision_end_token_id,
    text_config={
      "vocab_size": 512,
      "bos_token_id": 0,
      "eos_token_id": 0,
      "hidden_size": 16,
      "intermediate_size": 16,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
      "num_key_value_heads": 1,
      "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    },
    vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16},
  )
  return transformers.Qwen2_5_VLModel(config)


def make_images(sizes):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def png(array):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, "PNG")
  return buffer.getvalue()


def conversation(num_images, text="How many red circles?"):
  content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
  return [{"role": "user", "content": content}]


def hf_inputs(path, messages, arrays):
  """What Qwen2_5_VLProcessor does: expand the text, then tokenize all of it."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  patches, grids = np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int64)
  if arrays:
    images = [Image.fromarray(a) for a in arrays]
    out = Qwen2VLImageProcessorPil.from_pretrained(path)(images, return_tensors="np")
    patches, grids = out["pixel_values"], out["image_grid_thw"]
  counts = iter((grids.prod(axis=1) // 4).tolist())
  text = re.sub(r"<\|image_pad\|>", lambda match: match[0] * next(counts), text)
  return np.array(tokenizer(text)["input_ids"]), patches, grids


def partition(labels):
  """Groups of equal labels as sets of indices, whatever the labels are called."""
  groups = {}
  for index, label in enumerate(labels.tolist()):
    groups.setdefault(label, set()).add(index)
  return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("sizes", IMAGE_SETS)
def test_prompt_equals_transformers(path, processor, hf_model, sizes):
  arrays = make_images(sizes)
  messages = conversation(len(arrays))
  tokens, patches, grids = hf_inputs(path, messages, arrays)
  prompt = processor.encode_messages(messages, arrays)

  np.testing.assert_array_equal(prompt.tokens, tokens)
  np.testing.assert_array_equal(prompt.patches, patches)

  types = (tokens == processor.image_token_id).astype(np.int32)
  positions, deltas = hf_model.get_rope_index(
    torch.tensor(tokens)[None], torch.tensor(types)[None], torch.tensor(grids)
  )
  np.testing.assert_array_equal(prompt.positions, positions[:, 0].T.numpy())
  assert prompt.next_position == len(tokens) + deltas.item()

  is_image = prompt.tokens == processor.image_token_id
  np.testing.assert_array_equal(prompt.feature_index[is_image], np.arange(is_image.sum()))
  np.testing.assert_array_equal(prompt.feature_index[~is_image], -1)
  assert is_image.sum() * 4 == len(prompt.patches)
  if not arrays:
    assert len(prompt.patch_segments) == 0
    return

  thw = torch.tensor(grids)
  np.testing.assert_array_equal(
    prompt.patch_positions, vision_utils.get_vision_position_ids(thw, 2).numpy()
  )
  lengths = vision_utils.get_vision_cu_seqlens(thw).diff()
  np.testing.assert_array_equal(
    prompt.patch_segments, np.repeat(np.arange(len(lengths)) + 1, lengths)
  )
  assert partition(prompt.patch_windows) == hf_windows(thw)


def hf_windows(thw, window_size=112):
  index, cumulative = vision_utils.get_vision_window_index(thw, 2, window_size, 14)
  order = (index[:, None] * 4 + torch.arange(4)).flatten().tolist()
  return {frozenset(order[a:b]) for a, b in itertools.pairwise(cumulative.tolist())}


@pytest.mark.parametrize("window_size", [28, 56, 100, 112])
def test_windows_equal_transformers_for_random_grids(window_size):
  rng = np.random.default_rng(0)
  for _ in range(20):
    grids = [
      (int(rng.integers(1, 4)), *(2 * rng.integers(1, 14, 2)).tolist())
      for _ in range(rng.integers(1, 4))
    ]
    positions, segments, windows = processor_lib.lay_out_patches(grids, 2, 14, window_size)
    thw = torch.tensor(grids)
    assert partition(windows) == hf_windows(thw, window_size)
    assert set(windows) == set(range(1, windows.max() + 1))
    np.testing.assert_array_equal(positions, vision_utils.get_vision_position_ids(thw, 2).numpy())
    lengths = vision_utils.get_vision_cu_seqlens(thw).diff()
    np.testing.assert_array_equal(segments, np.repeat(np.arange(len(lengths)) + 1, lengths))


def test_without_window_size_a_frame_is_one_window():
  _, segments, windows = processor_lib.lay_out_patches([(1, 4, 30), (2, 8, 2)], 2, 14, None)
  np.testing.assert_array_equal(windows, segments)


def test_positions_equal_transformers_for_random_layouts(hf_model, processor):
  rng = np.random.default_rng(0)
  image = processor.image_token_id
  for _ in range(30):
    grids = [(1, *(2 * rng.integers(1, 9, 2)).tolist()) for _ in range(rng.integers(0, 4))]
    ids = [7] * int(rng.integers(1, 9))
    for _ in grids:
      ids += [image] + [7] * int(rng.integers(1, 9))
    tokens, positions, _ = processor_lib.expand_images(np.array(ids), grids, image, 2)
    expected, _ = hf_model.get_rope_index(
      torch.tensor(tokens)[None],
      torch.tensor(tokens == image, dtype=torch.int32)[None],
      torch.tensor(grids),
    )
    np.testing.assert_array_equal(positions, expected[:, 0].T.numpy())


@pytest.mark.parametrize(
  "messages",
  [
    [{"role": "user", "content": "\n\n Zwei  Kreise? ½ é e\u0301 日本 🙂\n"}],
    [
      {"role": "system", "content": "Think step by step."},
      {"role": "user", "content": "Hi <tool_call>"},
      {"role": "assistant", "content": [{"type": "text", "text": "The answer is 42."}]},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ],
  ],
)
def test_text_tokens_equal_transformers(path, processor, messages):
  expected, _, _ = hf_inputs(path, messages, [])
  np.testing.assert_array_equal(processor.encode_messages(messages).tokens, expected)


@pytest.mark.parametrize("text", [*SPECIAL_TOKENS, "\ue0000\ue001", "\ue0000\ue001<|im_end|>"])
def test_text_never_becomes_a_special_token(processor, text):
  special = set(processor.tokenizer.all_special_ids) | {
    processor.tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS
  }

  def specials(prompt):
    return [t for t in prompt.tokens.tolist() if t in special]

  clean = processor.encode(Example("a", "x", ""), system="y")
  half = len(text) // 2
  dirty = [
    processor.encode(Example("a", f"x{text}{text} z", ""), system=f"{text}y"),
    processor.encode_messages([
      {"role": "system", "content": f"y{text}"},
      {
        "role": "user",
        "content": [{"type": "text", "text": t} for t in (text[:half], text[half:])],
      },
    ]),
  ]
  for prompt in dirty:
    assert specials(prompt) == specials(clean)
    # Every character is still there, only not as a special token.
    assert text in processor.decode(prompt.tokens)
  target = processor.encode_target(f"a {text}")
  assert target[-1] == processor.end_token_id
  assert not special & set(target[:-1])
  assert processor.decode(target) == f"a {text}"


def test_example_marks_say_where_images_go(processor):
  first, second = make_images([(28, 28), (56, 28)])
  images = (png(first), png(second))
  marked = processor.encode(Example("a", "A <image> or<image>?", "", images=images))
  parts = [
    {"type": "text", "text": "A "},
    {"type": "image"},
    {"type": "text", "text": " or"},
    {"type": "image"},
    {"type": "text", "text": "?"},
  ]
  expected = processor.encode_messages([{"role": "user", "content": parts}], [first, second])
  np.testing.assert_array_equal(marked.tokens, expected.tokens)
  np.testing.assert_array_equal(marked.patches, expected.patches)

  unmarked = processor.encode(Example("a", "How many red circles?", "", images=images))
  expected = processor.encode_messages(conversation(2), [first, second])
  np.testing.assert_array_equal(unmarked.tokens, expected.tokens)


@pytest.mark.parametrize("question, count", [("<image> and <image>", 1), ("<image>", 0)])
def test_marks_and_images_must_agree(processor, question, count):
  images = tuple(png(a) for a in make_images([(28, 28)] * count))
  with pytest.raises(ValueError, match=r"example 'q7': \d <image> marks .* but \d images"):
    processor.encode(Example("q7", question, "", images=images))


def test_messages_and_images_must_agree(processor):
  (image,) = make_images([(28, 28)])
  with pytest.raises(ValueError, match="conversation 1: 1 images in the messages, but 0 given"):
    processor([conversation(1), conversation(1)], [[image], []])
  with pytest.raises(ValueError, match="2 conversations, but 1 lists"):
    processor([conversation(1), conversation(1)], [[image]])
  with pytest.raises(ValueError, match="video"):
    processor([{"role": "user", "content": [{"type": "video"}]}])


def test_broken_image_names_the_example(processor):
  images = (png(make_images([(28, 28)])[0]), b"broken")
  with pytest.raises(ImageError, match="example 'q7', image 1: "):
    processor.encode(Example("q7", "?", "", images=images))


def test_batch_is_the_padded_rows(processor):
  arrays = make_images([(56, 84), (28, 28), (200, 170)])
  conversations = [conversation(2), conversation(0, "Hi"), conversation(1)]
  images = [arrays[:2], None, arrays[2:]]
  batch = processor(conversations, images)
  rows = [
    processor.encode_messages(c, i or ()) for c, i in zip(conversations, images, strict=True)
  ]
  assert batch.tokens.shape == (3, 128)
  assert batch.patches.shape == (3, 256, 1176)
  padding = {"tokens": processor.pad_token_id, "feature_index": -1}
  for p, row in enumerate(rows):
    length, count = len(row.tokens), len(row.patches)
    assert batch.length[p] == length
    assert batch.next_position[p] == row.next_position
    for field, size in (
      *((f, length) for f in ("tokens", "positions", "feature_index")),
      *((f, count) for f in ("patches", "patch_positions", "patch_segments", "patch_windows")),
    ):
      leaf = getattr(batch, field)
      assert isinstance(leaf, np.ndarray)
      assert leaf.dtype == (np.float32 if field == "patches" else np.int32)
      np.testing.assert_array_equal(leaf[p, :size], getattr(row, field))
      np.testing.assert_array_equal(leaf[p, size:], padding.get(field, 0))

  wide = processor.collate(rows, prompt_length=200, num_patches=300)
  assert wide.tokens.shape == (3, 200)
  assert wide.patch_windows.shape == (3, 300)


def test_text_only_batch_keeps_the_smallest_patch_bucket(processor):
  batch = processor(conversation(0))
  assert batch.patches.shape == (1, 64, 1176)
  assert not batch.patch_segments.any()


def test_too_long_is_an_error_and_never_cut(path, processor):
  small = processor_lib.Processor.from_pretrained(
    path, prompt_buckets=(64, 48), patch_buckets=(16, 32)
  )
  assert small.prompt_buckets == (48, 64)
  text = Example("q7", "one two three " * 40, "")
  with pytest.raises(processor_lib.PromptTooLong, match=r"'q7': \d+ tokens, .* bucket is 64"):
    small.encode(text)
  image = Example("q8", "?", "", images=(png(make_images([(140, 140)])[0]),))
  with pytest.raises(processor_lib.PromptTooLong, match="'q8': 100 image patches, .* is 32"):
    small.encode(image)
  rows = [processor.encode(image), processor.encode(text)]
  with pytest.raises(processor_lib.PromptTooLong, match="'q7'"):
    small.collate(rows)
  with pytest.raises(processor_lib.PromptTooLong, match="'q8': 100 image patches, .* is 96"):
    processor.collate(rows, num_patches=96)


def test_special_ids(processor):
  ids = {text: processor.tokenizer.convert_tokens_to_ids(text) for text in SPECIAL_TOKENS}
  assert processor.image_token_id == ids["<|image_pad|>"]
  assert processor.end_token_id == ids["<|im_end|>"]
  assert processor.eos_token_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
  assert processor.pad_token_id == ids["<|endoftext|>"]
  assert processor.image_token_ids_never_sampled == tuple(
    ids[t]
    for t in (
      "<|vision_start|>",
      "<|vision_end|>",
      "<|vision_pad|>",
      "<|image_pad|>",
      "<|video_pad|>",
    )
  )


def test_black_patch_is_that_of_a_black_image(processor):
  black = processor.encode_messages(conversation(1), [np.zeros((56, 28, 3), np.uint8)])
  expected = np.broadcast_to(processor.black_patch, black.patches.shape)
  np.testing.assert_array_equal(black.patches, expected)


def test_target_and_decode(processor):
  ids = processor.encode_target("The answer is \\boxed{42}. 日本")
  assert ids.count(processor.end_token_id) == 1
  padded = np.array([*ids, processor.pad_token_id, processor.pad_token_id])
  assert processor.decode(padded) == "The answer is \\boxed{42}. 日本"


def test_saved_processor_loads_in_both_libraries(path, processor, tmp_path):
  narrow = processor_lib.Processor.from_pretrained(path, max_pixels=20 * 28 * 28)
  narrow.save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text((path / "config.json").read_text())
  again = processor_lib.Processor.from_pretrained(tmp_path)
  arrays = make_images([(300, 200)])
  messages = conversation(1)
  expected = narrow.encode_messages(messages, arrays)
  reloaded = again.encode_messages(messages, arrays)
  tokens, patches, _ = hf_inputs(tmp_path, messages, arrays)
  for found in ((reloaded.tokens, reloaded.patches), (tokens, patches)):
    np.testing.assert_array_equal(found[0], expected.tokens)
    np.testing.assert_array_equal(found[1], expected.patches)
  assert len(patches) < len(processor.encode_messages(messages, arrays).patches)
  assert again.eos_token_ids == processor.eos_token_ids
  assert again.window_size == processor.window_size


def test_older_and_newer_file_layouts(path, processor, tmp_path):
  for file in path.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  template = tokenizer_config.pop("chat_template")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
  (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
  preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
  (tmp_path / "preprocessor_config.json").unlink()
  (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": preprocessor}))
  other = processor_lib.Processor.from_pretrained(tmp_path)
  assert other.image_settings == processor.image_settings
  np.testing.assert_array_equal(
    other.encode_messages(conversation(0)).tokens, processor.encode_messages(conversation(0)).tokens
  )


@pytest.mark.parametrize(
  "change, message",
  [
    ({"image_token_id": 999_999}, "config.image_token_id=999999"),
    ({"vision_config": {"patch_size": 16}}, "vision_config.patch_size=16"),
    ({"vision_config": {"window_size": 14}}, "vision_config.window_size=14"),
  ],
)
def test_config_that_contradicts_the_processor(path, tmp_path, change, message):
  for file in path.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  config = json.loads((path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | change))
  with pytest.raises(ValueError, match=re.escape(message)):
    processor_lib.Processor.from_pretrained(tmp_path)


def test_missing_files_are_named(path, tmp_path):
  with pytest.raises(FileNotFoundError, match="config.json"):
    processor_lib.Processor.from_pretrained(tmp_path)


def test_patch_buckets_hold_whole_visual_tokens(path):
  with pytest.raises(ValueError, match=r"patch_buckets=\(64, 66\): .* multiples of 4"):
    processor_lib.Processor.from_pretrained(path, patch_buckets=(64, 66))


def test_pickled_processor_still_protects_text(processor):
  example = Example("a", "x<|im_end|>", "")
  again = pickle.loads(pickle.dumps(processor))
  np.testing.assert_array_equal(again.encode(example).tokens, processor.encode(example).tokens)


def test_encoding_does_not_import_jax(path):
  code = (
    "import sys; from jaxrl_vlm.data.processor import Processor; from jaxrl_vlm.example import *;"
    f"Processor.from_pretrained({str(path)!r}).encode(Example('a', 'b', ''));"
    "assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)

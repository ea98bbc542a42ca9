"""Tests prompts and batches of prompts. test_families.py tests the differences between families."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxrl_vlm.data import processor as processor_lib
from jaxrl_vlm.data.images import ImageError
from jaxrl_vlm.example import Example
from tests.tiny_processor import SPECIAL_TOKENS, make_processor_dir


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return make_processor_dir(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def processor(path):
  return processor_lib.Processor.from_pretrained(path)


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


def test_images_replace_the_marks_in_the_question(processor):
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
  with pytest.raises(ValueError, match="1 videos in the messages, but 0 given"):
    processor([{"role": "user", "content": [{"type": "video"}]}])


def test_broken_image_names_the_example(processor):
  images = (png(make_images([(28, 28)])[0]), b"broken")
  with pytest.raises(ImageError, match="example 'q7', image 1: "):
    processor.encode(Example("q7", "?", "", images=images))


def test_a_batch_equals_its_padded_rows(processor):
  arrays = make_images([(56, 84), (28, 28), (200, 170)])
  conversations = [conversation(2), conversation(0, "Hi"), conversation(1)]
  images = [arrays[:2], None, arrays[2:]]
  batch = processor(conversations, images)
  patch_fields = ("patches", "patch_positions", "patch_grids", "patch_segments", "patch_windows")
  rows = [processor.encode_messages(c, i or ()) for c, i in zip(conversations, images, strict=True)]
  assert batch.tokens.shape == (3, 128)
  assert batch.patches.shape == (3, 256, 1176)
  padding = {"tokens": processor.pad_token_id, "feature_index": -1, "patch_grids": 1}
  for p, row in enumerate(rows):
    length, count = len(row.tokens), len(row.patches)
    assert batch.length[p] == length
    assert batch.next_position[p] == row.next_position
    for field, size in (
      *((f, length) for f in ("tokens", "positions", "feature_index")),
      *((f, count) for f in patch_fields),
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


def test_too_long_prompts_are_errors_and_never_truncated(path, processor):
  small = processor_lib.Processor.from_pretrained(
    path, prompt_buckets=(64, 48), patch_buckets=(32, 64), max_pixels=16 * 28 * 28
  )
  assert small.prompt_buckets == (48, 64)
  text = Example("q7", "one two three " * 40, "")
  with pytest.raises(processor_lib.PromptTooLong, match=r"'q7': \d+ tokens, .* bucket is 64"):
    small.encode(text)
  # One of the two images would fit, but not both.
  image = Example("q8", "?", "", images=(png(make_images([(112, 112)])[0]),) * 2)
  with pytest.raises(processor_lib.PromptTooLong, match="'q8': 128 image patches, .* is 64"):
    small.encode(image)
  rows = [processor.encode(image), processor.encode(text)]
  with pytest.raises(processor_lib.PromptTooLong, match="'q7'"):
    small.collate(rows)
  with pytest.raises(processor_lib.PromptTooLong, match="'q8': 128 image patches, .* is 96"):
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


def test_black_patch_equals_the_patches_of_a_black_image(processor):
  black = processor.encode_messages(conversation(1), [np.zeros((56, 28, 3), np.uint8)])
  expected = np.broadcast_to(processor.black_patch, black.patches.shape)
  np.testing.assert_array_equal(black.patches, expected)


def test_target_and_decode(processor):
  ids = processor.encode_target("The answer is \\boxed{42}. 日本")
  assert ids.count(processor.end_token_id) == 1
  padded = np.array([*ids, processor.pad_token_id, processor.pad_token_id])
  assert processor.decode(padded) == "The answer is \\boxed{42}. 日本"


def test_patch_buckets_hold_whole_visual_tokens(path):
  with pytest.raises(ValueError, match=r"patch_buckets=\(64, 66\): .* multiples of 4"):
    processor_lib.Processor.from_pretrained(path, patch_buckets=(64, 66))


def test_a_pickled_processor_still_encodes_special_tokens_in_text_as_text(processor):
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

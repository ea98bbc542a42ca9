"""Tests that a saved processor loads with the same results, in this library and in transformers."""

import json
import shutil

import numpy as np
import pytest
import transformers
from PIL import Image

from jaxrl_vlm.data.processor import Processor
from tests.data.reference import hf_processor
from tests.tiny_processor import FAMILIES, make_processor_dir

WORD = "Think step by step. "  # text that only the template of chat_template.json writes


def make_dir(path, family, layout):
  """Makes a processor directory in one of the file layouts of published checkpoints."""
  make_processor_dir(path, family=family)
  if layout == "as made":
    return path
  config = json.loads((path / "tokenizer_config.json").read_text())
  template = config.pop("chat_template")
  if layout == "two templates":
    template += f"{{{{ '{WORD}' }}}}"
  if layout in ("chat_template.json", "chat_template.jinja"):
    (path / "tokenizer_config.json").write_text(json.dumps(config))
  if layout == "chat_template.jinja":
    (path / layout).write_text(template)
  elif layout != "nested":
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
  if layout == "nested":
    processor = {"processor_class": "Any"}
    if (path / "processor_config.json").exists():
      processor = json.loads((path / "processor_config.json").read_text())
    for name, key in (
      ("preprocessor_config.json", "image_processor"),
      ("video_preprocessor_config.json", "video_processor"),
    ):
      if (path / name).exists():
        processor[key] = json.loads((path / name).read_text())
        (path / name).unlink()
    (path / "processor_config.json").write_text(json.dumps(processor))
  return path


LAYOUTS = ["as made", "chat_template.json", "chat_template.jinja", "two templates", "nested"]


def encoded(processor):
  image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
  content = [{"type": "image"}, {"type": "text", "text": "How many red circles?"}]
  messages = [{"role": "user", "content": content}]
  return messages, image, processor.encode_messages(messages, [image])


def hf_encoded(path, family, messages, image):
  processor = hf_processor(family, path)
  template = processor.tokenizer.chat_template
  # chat_template.json takes precedence over tokenizer_config.json.
  if (path / "chat_template.json").exists():
    template = json.loads((path / "chat_template.json").read_text())["chat_template"]
  text = processor.tokenizer.apply_chat_template(
    messages, chat_template=template, tokenize=False, add_generation_prompt=True
  )
  image = Image.fromarray(image)
  gemma = family == "gemma3"
  return processor(
    text=[text],
    images=[[image]] if gemma else [image],
    add_special_tokens=not gemma,
    return_tensors="np",
  )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_processor_loads_in_both_libraries(tmp_path, family, layout):
  path = make_dir(tmp_path / "read", family, layout)
  processor = Processor.from_pretrained(path)
  files = {file.name: file.read_bytes() for file in path.iterdir()}
  messages, image, expected = encoded(processor)
  hf = hf_encoded(path, family, messages, image)
  np.testing.assert_array_equal(expected.tokens, hf["input_ids"][0])
  assert (WORD in processor.decode(expected.tokens)) == (layout == "two templates")

  shutil.rmtree(path)  # saving does not need the directory
  saved = tmp_path / "saved"
  processor.save_pretrained(saved)
  model_files = {"config.json"}
  written = {file.name: file.read_bytes() for file in saved.iterdir()}
  assert written == {name: text for name, text in files.items() if name not in model_files}
  (saved / "config.json").write_bytes(files["config.json"])
  *_, again = encoded(Processor.from_pretrained(saved))
  np.testing.assert_array_equal(again.tokens, expected.tokens)
  np.testing.assert_array_equal(again.patches, expected.patches)


@pytest.mark.parametrize("layout", ["as made", "nested"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_overridden_bounds_are_saved(tmp_path, family, layout):
  path = make_dir(tmp_path / "read", family, layout)
  before = {file.name: file.read_bytes() for file in path.iterdir()}
  full = Processor.from_pretrained(path)
  narrow = Processor.from_pretrained(path, max_pixels=20 * 28 * 28)
  messages, image, expected = encoded(narrow)
  assert len(expected.patches) < len(encoded(full)[-1].patches)
  saved = tmp_path / "saved"
  narrow.save_pretrained(saved)
  (saved / "config.json").write_bytes(before["config.json"])
  again = Processor.from_pretrained(saved)
  assert again.image_settings == narrow.image_settings
  assert again.video_settings == narrow.video_settings
  for found in (
    encoded(again)[-1].patches,
    hf_encoded(saved, family, messages, image)["pixel_values"],
  ):
    np.testing.assert_array_equal(found, expected.patches)
  name = "processor_config.json" if layout == "nested" else "preprocessor_config.json"
  for file in saved.iterdir():
    if file.name == name:
      after, prior = json.loads(file.read_text()), json.loads(before[name])
      if layout == "nested":
        after_image, prior_image = after.pop("image_processor"), prior.pop("image_processor")
        assert after == prior
        after, prior = after_image, prior_image
      assert after.pop("max_pixels") == 20 * 28 * 28
      prior.pop("max_pixels", None)
      if "size" in prior:
        assert after["size"].pop("longest_edge") == 20 * 28 * 28
        prior["size"].pop("longest_edge")
      assert after == prior
    else:
      assert file.read_bytes() == before[file.name]


def test_saved_directory_gives_the_same_transformers_processor(tmp_path):
  path = make_processor_dir(tmp_path / "read", family="gemma3")
  Processor.from_pretrained(path).save_pretrained(tmp_path / "saved")
  (tmp_path / "saved" / "config.json").write_bytes((path / "config.json").read_bytes())
  read, saved = (transformers.AutoProcessor.from_pretrained(p) for p in (path, tmp_path / "saved"))
  assert repr(saved.image_processor) == repr(read.image_processor)
  assert saved.to_dict() == read.to_dict()
  assert saved.tokenizer.get_vocab() == read.tokenizer.get_vocab()


def test_video_settings_come_from_the_most_specific_file(tmp_path):
  path = make_processor_dir(tmp_path, family="qwen2_vl", max_pixels=5 * 28 * 28)
  # As in transformers, videos use the image settings if there are no video settings.
  assert Processor.from_pretrained(path).video_settings.images.max_pixels == 5 * 28 * 28
  video = {"size": {"shortest_edge": 4, "longest_edge": 7}, "fps": 3, "do_sample_frames": True}
  (path / "video_preprocessor_config.json").write_text(json.dumps(video))
  settings = Processor.from_pretrained(path).video_settings
  assert (settings.images.min_pixels, settings.images.max_pixels) == (4, 7)
  assert (settings.fps, settings.do_sample_frames, settings.max_frames) == (3, True, 768)
  nested = {"video_processor": {"num_frames": 8}}
  (path / "processor_config.json").write_text(json.dumps(nested))
  settings = Processor.from_pretrained(path).video_settings
  assert (settings.num_frames, settings.images.max_pixels) == (8, 768 * 28 * 28)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
  "content, message", [("{", "not JSON: "), ("[]", "expected a JSON object")]
)
def test_error_for_malformed_file_names_it(tmp_path, name, content, message):
  make_processor_dir(tmp_path)
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=f"^{name}: {message}"):
    Processor.from_pretrained(tmp_path)


def test_error_for_missing_file_names_it(tmp_path):
  with pytest.raises(FileNotFoundError, match="/config.json: no such file"):
    Processor.from_pretrained(tmp_path)
  make_processor_dir(tmp_path)
  (tmp_path / "preprocessor_config.json").unlink()
  with pytest.raises(FileNotFoundError, match="/preprocessor_config.json: no such file"):
    Processor.from_pretrained(tmp_path)

"""The prompts of every family equal those of its processor class in transformers."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from jaxrl_vlm.data import families
from jaxrl_vlm.data.processor import Processor
from jaxrl_vlm.data.video import Video
from jaxrl_vlm.models.published import CONFIGS
from tests.data import make_video_reference as cases
from tests.data.reference import QWEN, VIDEOS, hf_processor, hf_windows, partition, rope_index
from tests.sparse import sparse
from tests.tiny_processor import FAMILIES, make_processor_dir

SIZES = [[], [(28, 28)], [(113, 225), (300, 80)], [(56, 84), (28, 200), (140, 140)]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  return {f: make_processor_dir(tmp_path_factory.mktemp(f), family=f) for f in FAMILIES}


@pytest.fixture(scope="module")
def ours(paths):
  return {family: Processor.from_pretrained(path) for family, path in paths.items()}


def changed(path, to, file="config.json", **fields):
  """Copies a directory and changes fields in one of its files."""
  for each in path.iterdir():
    (to / each.name).write_bytes(each.read_bytes())
  content = json.loads((to / file).read_text()) if (to / file).exists() else {}
  (to / file).write_text(json.dumps(content | fields))
  return to


def make_images(sizes):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def conversation(count):
  """A conversation whose last turn has `count` images between texts with white space around."""
  parts = [{"type": "text", "text": " Zwei Kreise?\n"}]
  for i in range(count):
    parts += [{"type": "image"}, {"type": "text", "text": f"  {i} of the image\n\n"}]
  return [
    {"role": "system", "content": "Think step by step. "},
    {"role": "user", "content": "Hi \n"},
    {"role": "assistant", "content": [{"type": "text", "text": "The answer is 42. 日本"}]},
    {"role": "user", "content": parts},
  ]


def hf_inputs(processor, messages, arrays):
  text = processor.tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
  )
  images = [Image.fromarray(a) for a in arrays]
  gemma = "Gemma" in type(processor).__name__
  return processor(
    text=[text],
    images=([images] if gemma else images) if images else None,
    # Gemma's template already writes the beginning-of-sequence token. `apply_chat_template` with
    # tokenize=True would take that into account.
    add_special_tokens=not gemma,
    return_tensors="np",
  )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_equals_transformers(paths, ours, family, sizes):
  arrays, messages = make_images(sizes), conversation(len(sizes))
  expected = hf_inputs(hf_processor(family, paths[family]), messages, arrays)
  prompt = ours[family].encode_messages(messages, arrays)
  np.testing.assert_array_equal(prompt.tokens, expected["input_ids"][0])
  if not arrays:
    assert len(prompt.patches) == 0
  elif family == "gemma3":
    check_gemma_pixels(prompt, ours[family], expected["pixel_values"])
  else:
    np.testing.assert_array_equal(prompt.patches, expected["pixel_values"])
    counts = expected["image_grid_thw"].prod(axis=1)
    np.testing.assert_array_equal(
      prompt.patch_grids, np.repeat(expected["image_grid_thw"][:, 1:], counts, axis=0)
    )
  if family in QWEN:
    grids = expected.get("image_grid_thw", ())
    if arrays and family == "qwen2_5_vl":
      assert partition(prompt.patch_windows) == hf_windows(torch.tensor(grids), 112)
    elif arrays:
      np.testing.assert_array_equal(prompt.patch_windows, prompt.patch_segments)
    check_positions(family, ours[family], prompt, [tuple(g) for g in grids], [], [])


def check_positions(family, processor, prompt, image_grids, video_grids, seconds):
  positions, following = rope_index(
    family,
    prompt.tokens,
    processor.image_token_id,
    processor.video_token_id,
    image_grids,
    video_grids,
    seconds,
  )
  np.testing.assert_array_equal(prompt.positions, positions)
  assert prompt.next_position == following


def check_gemma_pixels(prompt, processor, pixels):
  """pixels: f32[views, C, H, W]."""
  settings = processor.image_settings
  p, side = settings.patch_size, settings.height // settings.patch_size
  assert len(prompt.patches) == len(pixels) * side**2
  patches = prompt.patches.reshape(len(pixels), side**2, 3, p, p)
  positions = prompt.patch_positions.reshape(len(pixels), side**2, 2)
  for view, places, image in zip(patches, positions, pixels, strict=True):
    assert len({tuple(place) for place in places.tolist()}) == side**2
    for patch, (row, col) in zip(view, places, strict=True):
      np.testing.assert_array_equal(
        patch, image[:, row * p : (row + 1) * p, col * p : (col + 1) * p]
      )


@pytest.mark.parametrize("sizes", [[(30, 90)], [(90, 30), (40, 40)], [(20, 200), (29, 31)]])
def test_pan_and_scan_equals_transformers(paths, tmp_path, sizes):
  crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 10}
  path = changed(paths["gemma3"], tmp_path, "preprocessor_config.json", **crops)
  processor = Processor.from_pretrained(path)
  arrays, messages = make_images(sizes), conversation(len(sizes))
  hf = hf_processor("gemma3", path)
  # The defaults of the processor class turn crops off and take precedence over the file.
  hf.images_kwargs = hf.images_kwargs | crops
  expected = hf_inputs(hf, messages, arrays)
  prompt = processor.encode_messages(messages, arrays)
  np.testing.assert_array_equal(prompt.tokens, expected["input_ids"][0])
  check_gemma_pixels(prompt, processor, expected["pixel_values"])
  views = len(expected["pixel_values"])
  assert views > len(sizes)
  np.testing.assert_array_equal(prompt.patch_segments, np.repeat(np.arange(views) + 1, 16))
  np.testing.assert_array_equal(prompt.patch_windows, prompt.patch_segments)


def test_gemma_positions_are_consecutive_for_text_and_images(ours):
  prompt = ours["gemma3"].encode_messages(conversation(2), make_images([(30, 40), (50, 60)]))
  line = np.arange(len(prompt.tokens))
  np.testing.assert_array_equal(prompt.positions, np.stack([line] * 3, axis=1))
  assert prompt.next_position == len(line)
  assert (prompt.tokens == ours["gemma3"].tokenizer.bos_token_id).sum() == 1
  assert (prompt.patch_grids == 4).all()


def test_the_tokenizer_adds_bos_if_the_template_does_not(paths, tmp_path):
  config = json.loads((paths["gemma3"] / "tokenizer_config.json").read_text())
  template = config["chat_template"].replace("{{ bos_token }}", "")
  path = changed(paths["gemma3"], tmp_path, "tokenizer_config.json", chat_template=template)
  messages = conversation(0)
  prompt = Processor.from_pretrained(path).encode_messages(messages)
  hf = hf_processor("gemma3", path)
  expected = hf.apply_chat_template(
    messages, template, tokenize=True, add_generation_prompt=True, return_dict=True
  )
  np.testing.assert_array_equal(prompt.tokens, expected["input_ids"][0])
  assert prompt.tokens[0] == hf.tokenizer.bos_token_id


@pytest.mark.parametrize("index, letters", list(enumerate(cases.CHATS)))
@pytest.mark.parametrize("family", list(cases.CLIPS))
def test_videos_equal_transformers(tmp_path, family, index, letters):
  expected = json.loads(VIDEOS.read_text())["chats"][family][index]
  path = make_processor_dir(tmp_path, family=family, **cases.directory_options(family))
  processor = Processor.from_pretrained(path)
  messages, images, videos = cases.make_chat(family, letters)
  clips = [Video(frames, fps) for frames, fps in videos]
  prompt = processor.encode_messages(messages, images, videos=clips)
  np.testing.assert_array_equal(prompt.tokens, expected["input_ids"][0])
  seconds = expected.get("second_per_grid_ts", ())
  image_grids, video_grids = expected.get("image_grid_thw", ()), expected["video_grid_thw"]
  check_positions(family, processor, prompt, image_grids, video_grids, seconds)

  # Features and patches are numbered in order of appearance.
  visual = np.isin(prompt.tokens, [processor.image_token_id, processor.video_token_id])
  np.testing.assert_array_equal(prompt.feature_index[visual], np.arange(visual.sum()))
  assert (prompt.feature_index[~visual] == -1).all()
  grids = {"I": iter(image_grids), "V": iter(video_grids)}
  frames = [
    (rows, cols)
    for letter in letters
    if letter in grids
    for t, rows, cols in [next(grids[letter])]
    for _ in range(t)
  ]
  counts = [rows * cols for rows, cols in frames]
  np.testing.assert_array_equal(prompt.patch_grids, np.repeat(frames, counts, axis=0))
  segments = np.repeat(np.arange(len(counts)) + 1, counts)
  np.testing.assert_array_equal(prompt.patch_segments, segments)
  assert visual.sum() * 4 == len(prompt.patches) == sum(counts)


def test_videos_of_a_batch(ours):
  processor = ours["qwen3_vl"]
  clip = Video(np.zeros((8, 28, 56, 3), np.uint8), 4)
  messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]
  batch = processor([messages, conversation(0)], videos=[[clip], None])
  row = processor.encode_messages(messages, videos=[clip])
  count = len(row.patches)
  np.testing.assert_array_equal(batch.patches[0, :count], row.patches)
  np.testing.assert_array_equal(batch.patch_grids[0, :count], row.patch_grids)
  assert (batch.patch_grids[0, count:] == 1).all() and (batch.patch_grids[1] == 1).all()
  np.testing.assert_array_equal(processor(messages, videos=[clip]).tokens[0, :3], row.tokens[:3])
  with pytest.raises(ValueError, match="conversation 0: 1 videos in the messages, but 0 given"):
    processor(messages)
  with pytest.raises(ValueError, match="1 conversations, but 2 lists of videos"):
    processor([messages], videos=[[clip], [clip]])


def test_gemma_takes_no_videos(ours):
  messages = [{"role": "user", "content": [{"type": "video"}]}]
  with pytest.raises(ValueError, match="conversation: got a video, but gemma3 takes only images"):
    ours["gemma3"].encode_messages(messages)
  with pytest.raises(ValueError, match="gemma3 takes only images"):
    ours["gemma3"].encode_messages(
      conversation(0), videos=[Video(np.zeros((2, 9, 9, 3), np.uint8), 1)]
    )


def test_only_qwen2_5_vl_has_attention_windows(ours):
  assert [f for f in FAMILIES if ours[f].window_size is not None] == ["qwen2_5_vl"]


@pytest.mark.parametrize(
  "family, tokens",
  [
    (
      "qwen3_vl",
      ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    ),
    ("gemma3", ("<start_of_image>", "<end_of_image>", "<image_soft_token>")),
  ],
)
def test_image_tokens_are_never_sampled(ours, family, tokens):
  processor = ours[family]
  ids = processor.tokenizer.convert_tokens_to_ids(list(tokens))
  assert processor.image_token_ids_never_sampled == tuple(sorted(ids))


def test_gemma_ids(ours):
  ids = ours["gemma3"].tokenizer.convert_tokens_to_ids
  gemma = ours["gemma3"]
  assert gemma.end_token_id == ids("<end_of_turn>")
  assert gemma.eos_token_ids == (ids("<end_of_turn>"), ids("<eos>"))
  assert gemma.pad_token_id == ids("<pad>")
  assert gemma.image_token_id == ids("<image_soft_token>")
  assert gemma.vision_start_token_id == ids("<start_of_image>")
  assert gemma.vision_end_token_id == ids("<end_of_image>")
  assert gemma.video_token_id is None
  assert gemma.encode_target("a<end_of_turn>")[-1] == ids("<end_of_turn>")
  assert gemma.encode_target("a<end_of_turn>").count(ids("<end_of_turn>")) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_of_a_config_without_defaults(tmp_path, name):
  """Files as transformers 4 wrote them, without fields that have their default value.

  The sizes must equal those that transformers reads from the same file.
  """
  family, vision = CONFIGS[name]["model_type"], sparse(CONFIGS[name])["vision_config"]
  theirs = transformers.AutoConfig.for_model(family, vision_config=dict(vision)).vision_config
  gemma = family == "gemma3"
  path = make_processor_dir(
    tmp_path,
    family=family,
    patch_size=theirs.patch_size,
    image_size=896,
    merge_size=4 if gemma else theirs.spatial_merge_size,
  )
  changed(path, path, vision_config=vision)
  processor = Processor.from_pretrained(path)
  assert processor.window_size == getattr(theirs, "window_size", None)
  settings = processor.image_settings
  assert settings.patch_size == theirs.patch_size == (16 if family.startswith("qwen3") else 14)
  if gemma:
    assert settings.height == theirs.image_size
  else:
    assert settings.merge_size == theirs.spatial_merge_size
    assert settings.temporal_patch_size == theirs.temporal_patch_size


@pytest.mark.parametrize(
  "family, vision, window, rate",
  [
    (
      "qwen2_5_vl",
      {
        "hidden_size": 1280,
        "in_chans": 3,
        "model_type": "qwen2_5_vl",
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
      },
      112,
      2,
    ),
    ("qwen2_5_vl", {}, 112, 4),
    ("qwen2_vl", {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}, None, None),
  ],
)
def test_towers_of_fine_tuned_checkpoints(paths, tmp_path, family, vision, window, rate):
  """Configs as transformers 4.49 wrote them.

  They lack window_size and may lack tokens_per_second. Transformers then uses its defaults.
  """
  theirs = transformers.AutoConfig.for_model(family, vision_config=dict(vision)).vision_config
  processor = Processor.from_pretrained(changed(paths[family], tmp_path, vision_config=vision))
  assert processor.window_size == getattr(theirs, "window_size", None) == window
  assert getattr(theirs, "tokens_per_second", None) == rate
  clip = Video(np.zeros((8, 28, 28, 3), np.uint8), fps=4.0)
  grid = (2, 2, 2)  # 4 of the 8 frames are sampled, which is two frames per second
  expected = [(grid, 1.0 if rate is None else float(rate))]
  assert processor.family.video_stretches(grid, clip, 4) == expected


def test_default_sizes_must_fit_the_images_too(tmp_path):
  path = make_processor_dir(tmp_path, family="qwen3_vl")
  with pytest.raises(ValueError, match="config.json: vision_config.patch_size=16: expected 14, "):
    Processor.from_pretrained(changed(path, path, vision_config={}))


def test_unknown_family_names_the_known_ones(paths, tmp_path):
  path = changed(paths["qwen2_vl"], tmp_path, model_type="llava")
  with pytest.raises(ValueError, match="config.json: model_type='llava' is not supp") as info:
    Processor.from_pretrained(path)
  assert all(repr(family) in str(info.value) for family in FAMILIES)
  assert set(families.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize(
  "family, file, change, message",
  [
    (
      "qwen3_vl",
      "config.json",
      {"image_token_id": 999_999},
      "config.json: image_token_id=999999: "
      "expected 388, which is '<|image_pad|>' in tokenizer.json",
    ),
    ("gemma3", "config.json", {"boi_token_index": 3}, "config.json: boi_token_index=3: expected"),
    (
      "qwen2_vl",
      "config.json",
      {"vision_config": {"patch_size": 16}},
      "config.json: vision_config.patch_size=16: expected 14, because preprocessor_config.json "
      "has patch_size=14",
    ),
    (
      "qwen2_5_vl",
      "config.json",
      {"vision_config": {"window_size": 14}},
      "config.json: vision_config.window_size=14: expected at least 28",
    ),
    (
      "qwen3_vl",
      "video_preprocessor_config.json",
      {"patch_size": 16},
      "video_preprocessor_config.json: patch_size=16: expected 14, the value for images",
    ),
    (
      "gemma3",
      "config.json",
      {"vision_config": {"image_size": 112, "patch_size": 14}},
      "config.json: vision_config.image_size=112: expected 56, because preprocessor_config.json "
      "has size=56x56",
    ),
    (
      "gemma3",
      "config.json",
      {"mm_tokens_per_image": 5},
      "config.json: mm_tokens_per_image=5: expected a square number",
    ),
    (
      "gemma3",
      "processor_config.json",
      {"image_seq_length": 9},
      "processor_config.json: image_seq_length=9: expected 4",
    ),
    ("gemma3", "preprocessor_config.json", {"merge_size": 2}, "merge_size=2: Gemma 3 has no"),
    ("gemma3", "preprocessor_config.json", {"resample": 3}, "resample=3 is not supported, only 2"),
    (
      "gemma3",
      "preprocessor_config.json",
      {"max_pixels": 9},
      "max_pixels=9: expected no such field, because every image is resized to",
    ),
  ],
)
def test_files_that_contradict_each_other(paths, tmp_path, family, file, change, message):
  with pytest.raises(ValueError, match=re.escape(message)) as info:
    Processor.from_pretrained(changed(paths[family], tmp_path, file, **change))
  assert "\n" not in str(info.value)


@pytest.mark.parametrize("family, other", [("qwen2_vl", "gemma3"), ("gemma3", "qwen2_vl")])
def test_tokenizer_without_the_vision_tokens(paths, tmp_path, family, other):
  path = changed(paths[family], tmp_path)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    (path / name).write_bytes((paths[other] / name).read_bytes())
  with pytest.raises(
    ValueError,
    match="tokenizer.json: no special token '<.*>': expected one, because "
    f"config.json has model_type='{family}'",
  ):
    Processor.from_pretrained(path)


@pytest.mark.parametrize(
  "family, buckets, message",
  [
    (
      "qwen2_vl",
      {"patch_buckets": (64, 128)},
      "preprocessor_config.json: max_pixels=50176 allows up to 256 patches per image, but the "
      "largest of config.patch_buckets is 128; set config.model.max_pixels to at most 25088, or "
      "add a bucket",
    ),
    (
      "qwen3_vl",
      {"prompt_buckets": (48, 16)},
      "preprocessor_config.json: max_pixels=50176 allows up to 64 tokens per image, but the "
      "largest of config.prompt_buckets is 48; set config.model.max_pixels to at most 37632, or "
      "add a bucket",
    ),
    (
      "gemma3",
      {"patch_buckets": (12,)},
      "preprocessor_config.json: size=56x56 allows up to 16 patches per image, but the largest of "
      "config.patch_buckets is 12; add a bucket",
    ),
  ],
)
def test_the_largest_image_must_fit_a_bucket(paths, family, buckets, message):
  with pytest.raises(ValueError) as info:
    Processor.from_pretrained(paths[family], **buckets)
  assert str(info.value) == message


def test_bounds_of_published_checkpoints_fit_the_default_buckets(paths):
  for family, bound in (("qwen2_vl", 12_845_056), ("qwen2_5_vl", 12_845_056)):
    processor = Processor.from_pretrained(paths[family], max_pixels=bound)
    assert processor.image_settings.max_patches == 65_536
  with pytest.raises(ValueError, match="set config.model.max_pixels to at most 3211264, or add a"):
    Processor.from_pretrained(paths["qwen2_vl"], max_pixels=12_845_056, patch_buckets=(1024, 16384))
  Processor.from_pretrained(paths["qwen2_vl"], max_pixels=3_211_264, patch_buckets=(1024, 16384))


def test_suggested_bound_is_right_for_the_largest_images(paths):
  processor = Processor.from_pretrained(
    paths["qwen2_vl"], max_pixels=25_088, patch_buckets=(64, 128)
  )
  for size in [(158, 158), (100, 260), (50, 1000)]:
    prompt = processor.encode_messages(conversation(1), make_images([size]))
    assert len(prompt.patches) <= 128

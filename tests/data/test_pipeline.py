"""Tests that iteration is reproducible and resumable, and that sources report bad data."""

import io
import json
import pathlib
import pickle
import re
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxrl_vlm.data import digit_boards, images, pipeline, sources
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.example import Example


class Numbers:
  """A source of examples with the ids 0 .. size - 1."""

  def __init__(self, size):
    self.size = size

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    return Example(id=str(index), question="?", answer="!")


def ids(batches):
  return [[int(example.id) for example in batch] for batch in batches]


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def png(value=0):
  buffer = io.BytesIO()
  Image.fromarray(np.full((8, 16, 3), value, np.uint8)).save(buffer, "png")
  return buffer.getvalue()


# ------------------------------------------------------------------------------------------------
# Pipeline
# ------------------------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation():
  stream = sum(ids(take(pipeline.make_iterator(Numbers(10), batch_size=4, seed=0), 10)), [])
  epochs = [stream[10 * e : 10 * e + 10] for e in range(4)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  again = sum(ids(take(pipeline.make_iterator(Numbers(10), batch_size=4, seed=0), 10)), [])
  assert again == stream
  other = sum(ids(take(pipeline.make_iterator(Numbers(10), batch_size=4, seed=1), 10)), [])
  # The other seed's first epoch is none of the first seed's epochs.
  assert other[:10] not in epochs


def test_batches_without_shuffle_and_repeat_follow_the_source():
  arguments: dict[str, Any] = {"batch_size": 4, "seed": 0, "shuffle": False, "repeat": False}
  assert ids(pipeline.make_iterator(Numbers(10), **arguments)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert ids(pipeline.make_iterator(Numbers(10), drop_remainder=False, **arguments)) == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9],
  ]


def test_resumed_iterator_continues_the_same_stream():
  arguments: dict[str, Any] = {"batch_size": 4, "seed": 7}
  whole = ids(take(pipeline.make_iterator(Numbers(11), **arguments), 12))
  for stop in (0, 1, 5):
    iterator = pipeline.make_iterator(Numbers(11), **arguments)
    assert ids(take(iterator, stop)) == whole[:stop]
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = pipeline.make_iterator(Numbers(11), **arguments)
    take(resumed, 3)  # an iterator that was already used can be moved too
    resumed.set_state(state)
    assert ids(take(resumed, 12 - stop)) == whole[stop:]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 3}, "batch_size was 4, now 3"),
    ({"seed": 1}, "seed was 0, now 1"),
    ({"shuffle": False}, "shuffle was True, now False"),
  ],
)
def test_state_of_other_settings_is_refused(change, message):
  arguments: dict[str, Any] = {"batch_size": 4, "seed": 0}
  state = pipeline.make_iterator(Numbers(11), **arguments).get_state()
  with pytest.raises(UserError, match=re.escape(message)):
    pipeline.make_iterator(Numbers(11), **arguments | change).set_state(state)


def test_order_does_not_depend_on_the_number_of_hosts():
  arguments: dict[str, Any] = {"batch_size": 6, "seed": 0}
  whole = take(pipeline.make_iterator(Numbers(20), **arguments), 7)
  for count in (1, 2, 3, 6):
    hosts = [
      pipeline.make_iterator(Numbers(20), rows=range(i, 6, count), **arguments)
      for i in range(count)
    ]
    # All hosts have the same state, so a run can resume with another number of hosts.
    for i, host in enumerate(hosts):
      host.set_state(
        {
          "batches": 2,
          "examples": 20,
          "batch_size": 6,
          "seed": 0,
          "shuffle": True,
          "repeat": True,
          "shard": [0, 1],
        }
      )
      assert take(host, 5) == [batch[i::count] for batch in whole[2:]]
      assert host.given == 7


def test_example_returns_any_row_of_any_batch():
  for shuffle in (True, False):
    iterator = pipeline.make_iterator(Numbers(11), batch_size=4, seed=3, shuffle=shuffle, rows=[1])
    whole = take(pipeline.make_iterator(Numbers(11), batch_size=4, seed=3, shuffle=shuffle), 9)
    for batch, row in ((8, 3), (0, 0), (4, 2)):
      assert iterator.example(batch, row) == whole[batch][row]


def test_too_few_examples_for_a_batch_are_refused():
  with pytest.raises(UserError, match="3 examples: too few for a batch of 4"):
    pipeline.make_iterator(Numbers(3), batch_size=4, seed=0, repeat=False)
  # With repeat, a batch may hold an example twice.
  assert len(next(pipeline.make_iterator(Numbers(3), batch_size=4, seed=0))) == 4


@pytest.mark.slow
def test_worker_processes_return_the_same_batches(tmp_path):
  """The source is pickled, and the workers open its files."""
  code = f"""
import sys
from typing import Any
from absl import flags
from jaxrl_vlm.data import pipeline, sources
if __name__ == "__main__":
  flags.FLAGS(sys.argv[:1])
  source = sources.open_source({{"name": "digit_boards", "dir": {str(tmp_path)!r},
                                "options": {{"train": 9, "test": 2}}}}, "train")
  alone, shared = (pipeline.make_iterator(source, batch_size=2, seed=0, workers=workers)
                   for workers in (0, 2))
  next(alone)
  shared.set_state(alone.get_state())
  for _ in range(5):
    assert next(alone) == next(shared)
  shared.close()
  print("equal")
"""
  script = tmp_path / "script.py"
  script.write_text(code)
  done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
  assert done.stdout.strip() == "equal", done.stderr


# ------------------------------------------------------------------------------------------------
# Sources
# ------------------------------------------------------------------------------------------------


def write_jsonl(directory, *lines):
  path = directory / "data.jsonl"
  path.write_text(
    "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
  )
  return str(path)


def test_json_lines_are_read(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a.png").write_bytes(png(1))
  (tmp_path / "b.png").write_bytes(png(2))
  path = write_jsonl(
    tmp_path,
    {
      "images": ["images/a.png", "b.png"],
      "question": "Which?",
      "answer": "a",
      "id": "first",
      "rewards": {"exact": 1},
      "meta": {"skill": "reasoning"},
      "target": "a, I think",
    },
    "",
    {"image": "b.png", "question": "How many — é?", "answer": 2},
    {"question": "1+1=", "answer": "2"},
  )
  source = sources.open_source(ConfigDict({"name": path}), "train")
  assert len(source) == 3
  assert source[0] == Example(
    id="first",
    question="Which?",
    answer="a",
    images=(png(1), png(2)),
    target="a, I think",
    rewards={"exact": 1},
    meta={"skill": "reasoning"},
  )
  assert source[1] == Example(
    id="data.jsonl:3", question="How many — é?", answer="2", images=(png(2),)
  )
  assert source[2].images == ()
  assert pickle.loads(pickle.dumps(source))[1] == source[1]
  split = str(tmp_path / "{split}.jsonl")
  assert len(sources.open_source({"name": split}, "data")) == 3


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"question": "a", ', "data.jsonl:2: not JSON: Expecting property name"),
    ("[1]", "data.jsonl:2: expected an object {...}, got list"),
    ({"question": "a"}, "data.jsonl:2: field 'answer' is missing"),
    ({"question": "a", "answer": ""}, "data.jsonl:2: field 'answer' is empty"),
    ({"question": " ", "answer": "b"}, "data.jsonl:2: field 'question' is empty"),
    (
      {"question": ["a"], "answer": "b"},
      "data.jsonl:2: field 'question': expected text, got [\"a\"]",
    ),
    (
      {"question": "a", "answer": "b", "imagse": ["a.png"]},
      "data.jsonl:2: field 'imagse': no such field; did you mean 'image' or 'images'?",
    ),
    (
      {"question": "a", "answer": "b", "image": "a.png"},
      "data.jsonl:2: field 'image': no such file: a.png",
    ),
    (
      {"question": "a", "answer": "b", "images": [3]},
      "data.jsonl:2: field 'images': expected paths, got [3]",
    ),
    (
      {"question": "a", "answer": "b", "images": ["../b.png"]},
      "data.jsonl:2: field 'images': ../b.png is outside",
    ),
    (
      {"question": "a", "answer": "b", "rewards": {"exakt": 1.0}},
      "data.jsonl:2: field 'rewards': 'exakt': no such verifier; did you mean 'exact'?",
    ),
    (
      {"question": "a", "answer": "b", "rewards": {}},
      "data.jsonl:2: field 'rewards': expected {\"name\": weight, ...}, got {}",
    ),
    (
      {"question": "a", "answer": "b", "rewards": {"exact": 1.0, "no_such_module:grade": 0.5}},
      "data.jsonl:2: field 'rewards': 'no_such_module:grade' is neither built in nor among the "
      "stage's own rewards",
    ),
    (
      {"question": "a", "answer": "b", "rewards": {"exact": "1"}},
      "data.jsonl:2: field 'rewards': 'exact': expected a finite number, the weight; got \"1\"",
    ),
    (
      {"question": "a", "answer": "b", "rewards": {"exact": float("nan")}},
      "data.jsonl:2: field 'rewards': 'exact': expected a finite number, the weight; got NaN",
    ),
    (
      {"question": "a", "answer": "b", "rewards": {"exact": 1e39}},
      "data.jsonl:2: field 'rewards': 'exact': expected a finite number, the weight; got 1e+39",
    ),
    (
      {"question": "a", "answer": "b", "rewards": {"exact": 10**400}},
      "data.jsonl:2: field 'rewards': 'exact': expected a finite number, the weight; got 1000",
    ),
    (
      {"question": "<image> a", "answer": "b"},
      "data.jsonl:2: field 'question': 1 <image> marks, but the example has 0 images",
    ),
    (
      {"question": "<image> a <image>", "answer": "b", "image": "c.png"},
      "data.jsonl:2: field 'question': 2 <image> marks, but the example has 1 images",
    ),
    (
      {"question": "<image> a", "answer": "b", "images": ["c.png", "c.png"]},
      "data.jsonl:2: field 'question': 1 <image> marks, but the example has 2 images",
    ),
    (
      {"question": "a \ud800 b", "answer": "1"},
      "data.jsonl:2: field 'question': character 2 is the lone surrogate '\\ud800'; expected valid",
    ),
    (
      {"question": "a", "answer": "\udfff"},
      "data.jsonl:2: field 'answer': character 0 is the lone surrogate '\\udfff'",
    ),
    (
      {"question": "a", "answer": "1", "target": "\ud800"},
      "data.jsonl:2: field 'target': character 0 is the lone surrogate",
    ),
    (
      {"question": "a", "answer": "1", "id": "\ud800"},
      "data.jsonl:2: field 'id': character 0 is the lone surrogate",
    ),
    (
      {"question": "a", "answer": "1", "meta": {"skill": ["b", "\ud800"]}},
      "data.jsonl:2: field 'meta': character 0 is the lone surrogate",
    ),
    (
      {"question": "a", "answer": "1", "image": "\ud800.png"},
      "data.jsonl:2: field 'image': character 0 is the lone surrogate",
    ),
    (
      {"question": "a", "answer": float("nan")},
      "data.jsonl:2: field 'answer': expected text or a finite number, got NaN",
    ),
    (
      {"question": "a", "answer": float("-inf")},
      "data.jsonl:2: field 'answer': expected text or a finite number, got -Infinity",
    ),
    (
      {"question": "a", "answer": True},
      "data.jsonl:2: field 'answer': expected text, got true",
    ),
    (
      {"question": "a", "answer": "b", "image": "a\0.png"},
      "data.jsonl:2: field 'image': \"a\\u0000.png\": embedded null byte",
    ),
    pytest.param(
      "[" * 100_000, "data.jsonl:2: not JSON: maximum recursion depth exceeded", id="deep nesting"
    ),
    (
      {"question": "a", "answer": "b", "rewards": "math"},
      'data.jsonl:2: field \'rewards\': expected {"name": weight, ...}, got "math"',
    ),
    (
      {"question": "a", "answer": "b", "id": "x"},
      "data.jsonl:2: field 'id': 'x' is also the id of line 1",
    ),
  ],
)
def test_error_for_json_lines_names_file_line_and_field(tmp_path, line, message):
  (tmp_path / "b.png").write_bytes(png())
  (tmp_path / "inside").mkdir()
  (tmp_path / "inside" / "c.png").write_bytes(png())
  path = write_jsonl(tmp_path / "inside", {"question": "a", "answer": "b", "id": "x"}, line)
  with pytest.raises(UserError) as error:
    sources.open_source({"name": path}, "train")
  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "number",
  [
    "0.00001",
    "1e20",
    "1E-7",
    "1.50",
    "-0",
    "7",
    "12345678901234567890123",
    "0.1234567890123456789",
  ],
)
def test_answer_that_is_a_number_keeps_its_digits(tmp_path, number):
  line = f'{{"question": {number}, "answer": {number}, "id": {number}, "meta": {{"x": {number}}}}}'
  example = sources.open_source({"name": write_jsonl(tmp_path, line)}, "train")[0]
  assert (example.question, example.answer, example.id) == (number, number, number)
  assert example.meta == {"x": json.loads(number)}
  assert type(example.meta["x"]) is type(json.loads(number))


def test_examples_may_name_the_functions_that_the_stage_names(tmp_path):
  weights = {"exact": 0.5, "my_rewards.py:near": 0.5}
  path = write_jsonl(tmp_path, {"question": "a", "answer": "b", "target": "b", "rewards": weights})
  with pytest.raises(UserError, match="data.jsonl:1: field 'rewards': 'my_rewards.py:near' is"):
    sources.open_source({"name": path}, "train")
  for verifiers in ({"my_rewards.py:near": 1.0}, ["format", "my_rewards.py:near"]):
    source = sources.open_source({"name": path}, "train", verifiers=verifiers)
    assert pickle.loads(pickle.dumps(source))[0].rewards == weights
  absolute = {f"{pathlib.Path('my_rewards.py').resolve()}:near": 1.0}
  path = write_jsonl(tmp_path, {"question": "a", "answer": "b", "target": "b", "rewards": absolute})
  sources.open_source({"name": path}, "train", verifiers=["my_rewards.py:near"])
  # A supervised stage grades no training examples.
  sources.open_source({"name": path}, "train", need="target")


def test_error_for_image_that_disappeared_names_file_and_line(tmp_path):
  (tmp_path / "a.png").write_bytes(png())
  path = write_jsonl(tmp_path, {"question": "a", "answer": "b", "id": "x", "image": "a.png"})
  source = sources.open_source({"name": path}, "train")
  assert source[0].name == f"{path}:1: example 'x'"
  (tmp_path / "a.png").unlink()
  with pytest.raises(UserError, match=r"data.jsonl:1: "):
    source[0]


def test_images_outside_the_directory_are_refused_unless_allowed(tmp_path):
  (tmp_path / "b.png").write_bytes(png())
  (tmp_path / "inside").mkdir()
  (tmp_path / "inside" / "link.png").symlink_to(tmp_path / "b.png")
  for name in ("../b.png", str(tmp_path / "b.png"), "link.png"):
    path = write_jsonl(tmp_path / "inside", {"question": "a", "answer": "b", "image": name})
    with pytest.raises(UserError, match="allow_outside=True"):
      sources.open_source({"name": path}, "train")
    source = sources.open_source({"name": path, "options": {"allow_outside": True}}, "train")
    assert source[0].images == (png(),)


def test_supervised_data_needs_a_target_instead_of_an_answer(tmp_path):
  path = write_jsonl(tmp_path, {"question": "a", "target": "b"})
  with pytest.raises(UserError, match="field 'answer' is missing"):
    sources.open_source({"name": path}, "train")
  assert sources.open_source({"name": path}, "train", need="target")[0].target == "b"
  path = write_jsonl(tmp_path, {"question": "a", "answer": "b"})
  with pytest.raises(UserError, match="field 'target' is missing"):
    sources.open_source({"name": path}, "train", need="target")


def test_a_json_file_with_json_lines_opens_and_an_array_is_an_error(tmp_path):
  path = tmp_path / "train.json"
  path.write_text('{"question": "a", "answer": "b"}\n')
  assert sources.open_source({"name": str(path)}, "train")[0].answer == "b"
  path.write_text('[\n  {"question": "a", "answer": "b"}\n]\n')
  with pytest.raises(
    UserError, match="train.json:1: not JSON: .*; convert the array to JSON lines"
  ):
    sources.open_source({"name": str(path)}, "train")


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"name": ""}, "data.name=''"),
    ({"name": "nowhere.jsonl"}, "nowhere.jsonl: No such file or directory"),
    *(
      (
        {"name": name},
        f"data.name={name!r}: expected 'digit_boards', the path of a JSON-lines file (*.jsonl), or "
        "the name of a TFDS dataset such as 'name', 'name/config' or 'name:1.0.0'; convert",
      )
      for name in ("train.parquet", "data/a.csv", "a.tsv", "/b/a.arrow", "a.jsonl.gz")
    ),
    *(
      (
        {"name": name},
        f"data.name={name!r}: expected 'digit_boards', the path of a JSON-lines file",
      )
      for name in ("/data/train", "./train", "data/{split}", "my data")
    ),
    (
      {"name": "no_such_folder/train"},
      "data.name='no_such_folder/train': neither a .jsonl file nor a TFDS dataset; expected "
      "'digit_boards', the path of a JSON-lines file (*.jsonl), or the name of a TFDS dataset",
    ),
    (
      {"name": "digit_bords"},
      "data.name='digit_bords': neither a .jsonl file nor a TFDS dataset; "
      "did you mean 'digit_boards'?",
    ),
    (
      {"name": "digit_boards", "options": {"taks": "read"}},
      "data.options.taks: no such option of digit_boards; did you mean 'tasks'?",
    ),
    (
      {"name": "digit_boards", "options": {"tasks": ("reed",)}},
      "data.options.tasks='reed': expected one of read",
    ),
    (
      {"name": "digit_boards", "options": {"tasks": "arithmetic"}},
      "data.options.tasks='arithmetic': has no image to store; set live=True",
    ),
  ],
)
def test_error_for_bad_spec_names_the_field(tmp_path, spec, message):
  with pytest.raises(UserError, match=re.escape(message)) as error:
    sources.open_source(spec | {"dir": str(tmp_path)}, "train")
  assert "\n" not in str(error.value)


def test_stored_and_live_digit_boards_are_equal(tmp_path):
  options = {"train": 4, "test": 3, "style": "board", "tasks": {"count": 1.0, "where": 2.0}}
  spec = ConfigDict({"name": "digit_boards", "options": options, "dir": str(tmp_path)})
  stored = sources.open_source(spec, "test")
  spec.options = options | {"live": True}
  live = sources.open_source(spec, "test")
  assert len(stored) == len(live) == 3
  for index in range(3):
    assert (
      stored[index]
      == live[index]
      == digit_boards.make_example("test", 0, index, options["tasks"], "board")
    )


def test_tfds_dataset_with_other_feature_names_is_read(tmp_path):
  import tensorflow_datasets as tfds

  class Quiz(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            "photos": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(2):
        yield i, {"photos": [io.BytesIO(png(i))] * i, "text": f"{i}?", "label": i}

  def make():
    builder = Quiz(data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    return builder

  fields = {"images": "photos", "question": "text", "answer": "label"}
  source = sources.TfdsSource("quiz", make, "train", fields=fields)
  found = {source[i].question: source[i] for i in range(2)}
  assert (found["0?"].answer, found["1?"].answer) == ("cat", "dog")
  assert found["0?"].images == () and len(found["1?"].images) == 1
  image = Image.open(io.BytesIO(found["1?"].images[0]))
  np.testing.assert_array_equal(np.asarray(image), np.full((8, 16, 3), 1))

  with pytest.raises(UserError, match="split 'tset' of quiz: valid: train"):
    sources.TfdsSource("quiz", make, "tset", fields=fields)
  with pytest.raises(UserError, match="data.options.fields.question: quiz has no feature"):
    sources.TfdsSource("quiz", make, "train", fields={"answer": "label"})
  with pytest.raises(UserError, match="fields.answer='lable': no such feature of quiz; did you"):
    sources.TfdsSource("quiz", make, "train", fields=fields | {"answer": "lable"})


class Records:
  """A TFDS builder that is already prepared, with records in memory."""

  def __init__(self, features, records):
    self.info = types.SimpleNamespace(features=features, splits={"train": None})
    self.records = records

  def as_data_source(self, split, decoders=None):
    return self.records


def tfds_source(record, **options):
  features = {name: types.SimpleNamespace() for name in record}
  return sources.TfdsSource("quiz", lambda: Records(features, [record]), "train", **options)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"question": "<image> a"}, "field 'question': 1 <image> marks, but the example has 0 images"),
    ({"question": b"a \xff"}, "field 'question': 'utf-8' codec can't decode byte 0xff"),
    ({"question": "\ud800"}, "field 'question': character 0 is the lone surrogate"),
    ({"question": " "}, "question is empty"),
    ({"answer": np.float32(np.nan)}, "field 'answer': expected text or a finite number, got nan"),
    ({"answer": np.array([1, 2])}, "field 'answer': expected text or a number, got [1 2]"),
    ({"rewards": '{"exakt": 1}'}, "field 'rewards': 'exakt': no such verifier; did you mean 'exa"),
    ({"rewards": "{}"}, "field 'rewards': expected {\"name\": weight, ...}, got {}"),
    ({"rewards": {"os:abort": np.float32(1)}}, "field 'rewards': 'os:abort' is neither built in"),
    ({"rewards": "{"}, "field 'rewards': Expecting property name"),
    ({"meta": "[1]"}, "field 'meta': expected an object {...}, got [1]"),
    ({"images": [np.zeros((2, 2, 3), np.int64)]}, "field 'images': expected an image, u8[H, W, 3]"),
  ],
)
def test_error_for_tfds_record_names_split_index_and_field(change, message):
  source = tfds_source({"question": "a", "answer": "b"} | change)
  with pytest.raises(UserError) as error:
    source[0]
  assert str(error.value).startswith(f"quiz/train example 0: {message}")
  assert "\n" not in str(error.value)


def test_tfds_values_become_text_and_encoded_images():
  grey = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (4, 1))[..., None]
  record = {
    "id": b"first",
    "question": "What is it?",
    "answer": np.float32(0.1),
    "rewards": {"exact": np.float32(0.5)},
    "meta": "",
    "images": [
      grey,
      grey.repeat(3, -1),
      (grey / 65535).astype(np.float32),
      np.zeros((4, 16, 3), np.uint8),
    ],
  }
  example = tfds_source(record)[0]
  assert (example.answer, example.rewards, example.meta) == ("0.1", {"exact": 0.5}, {})
  assert example.name == "quiz/train/0: example 'first'"
  *ramps, black = (np.asarray(images.decode_image(image)) for image in example.images)
  for ramp in ramps:
    np.testing.assert_allclose(ramp[..., 0], grey[..., 0] / 257, atol=1)
  assert not black.any()


def test_tfds_example_without_class_label_is_refused():
  features = {"question": types.SimpleNamespace(), "answer": types.SimpleNamespace(names=["cat"])}
  builder = Records(features, [{"question": "a", "answer": np.int64(-1)}])
  source = sources.TfdsSource("quiz", lambda: builder, "train")
  with pytest.raises(UserError, match="field 'answer': expected a class label, got -1"):
    source[0]


def test_importing_data_modules_imports_no_jax():
  code = (
    "import sys, jaxrl_vlm.data.digit_boards, jaxrl_vlm.data.sources, "
    "jaxrl_vlm.data.pipeline; print('jax' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "False"

"""Tests rollout files and the report, which must be complete, self-contained and safe to open."""

import base64
import hashlib
import html.parser
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxrl_vlm import config as config_lib
from jaxrl_vlm import metrics
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.example import Example
from jaxrl_vlm.report import RolloutLog, Sample, plots, read_rollouts, save_curve, write_report


def picture(color, size=(28, 28), form="PNG"):
  out = io.BytesIO()
  Image.new("RGB", size, color).save(out, format=form)
  return out.getvalue()


def sample(text="<think>2 + 2</think>\\boxed{4}", reward=0.9, advantage=1.0):
  return Sample(text, reward, {"math": 1.0, "format": 0.0}, advantage, 12)


class Page(html.parser.HTMLParser):
  """The elements, attributes and text of a page as a browser parses them."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.text = [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, name, value) for name, value in attrs]

  def handle_data(self, data):
    self.text += data


@pytest.fixture
def workdir(tmp_path):
  """A run of two stages and 40 steps, with rollouts of four steps."""
  config_lib.check_workdir(
    tmp_path,
    ConfigDict(
      {
        "seed": 0,
        "stages": (
          ConfigDict({"kind": "sft", "steps": 2, "objective": ConfigDict({"name": "sft"})}),
          ConfigDict({"kind": "rl", "steps": 38, "objective": ConfigDict({"name": "vppo"})}),
        ),
      }
    ),
  )
  with metrics.MetricsWriter(tmp_path) as writer:
    for step in (1, 2):
      writer.write(step, "sft", {"train/loss": 1.0 / step})
    writer.write(2, "rl", {"eval/accuracy": 0.5, "eval/accuracy/perception": 0.75})
    for step in range(3, 41):
      writer.write(
        step,
        "rl",
        {
          "train/reward": step / 40,
          "train/reward/math": step / 50,
          "train/reward/format": 1.0,
          "train/accuracy": step / 50,
          "train/response_length": 20.0 + step,
          "objective/kl": float("nan"),
          "time/tokens_per_second": 3120.0,
        },
      )
    writer.write(40, "rl", {"eval/accuracy": 0.625, "eval/accuracy/perception": 0.875})
  log = RolloutLog(tmp_path)
  for step in (10, 20, 30, 40):
    example = Example(f"board-{step}", f"Question at {step}?", "4", (picture("red"),))
    log.write(step, "rl", [(example, [sample(), sample("four", 0.0, -1.0)])])
  return tmp_path


def test_rollouts_round_trip_and_images_are_stored_once(tmp_path):
  log = RolloutLog(tmp_path)
  red, blue = picture("red"), picture("blue", form="JPEG")
  log.write(
    10,
    "rl",
    [
      (Example("a", "How many?", "4", (red, blue)), [sample()]),
      (Example("b", "And now?", "5", (red,)), []),
    ],
  )
  log.write(20, "rl", [(Example("a", "How many?", "4", (red, blue)), [sample("\ud800 lone")])])
  steps = read_rollouts(tmp_path)
  assert list(steps) == [10, 20]
  first, second = steps[10]
  assert (tmp_path / "rollouts" / "step_000010.jsonl").exists()
  assert {k: v for k, v in first.items() if k != "images"} == {
    "step": 10,
    "stage": "rl",
    "id": "a",
    "question": "How many?",
    "answer": "4",
    "samples": [
      {
        "text": "<think>2 + 2</think>\\boxed{4}",
        "reward": 0.9,
        "components": {"math": 1.0, "format": 0.0},
        "advantage": 1.0,
        "length": 12,
      }
    ],
  }
  assert first["images"][:1] == second["images"]
  files = sorted((tmp_path / "rollouts" / "images").iterdir())
  assert len(files) == 2
  assert (tmp_path / "rollouts" / first["images"][0]).read_bytes() == red
  with Image.open(tmp_path / "rollouts" / first["images"][1]) as image:
    assert image.format == "PNG"
    np.testing.assert_allclose(np.asarray(image)[0, 0], (0, 0, 255), atol=2)  # JPEG is lossy
  assert steps[20][0]["samples"][0]["text"] == "\ud800 lone"

  log.write(20, "rl", [(Example("c", "Again?", "6"), [])])
  assert [record["id"] for record in read_rollouts(tmp_path)[20]] == ["c"]


def test_stored_images_are_what_the_model_receives(tmp_path):
  """A 16-bit grey ramp keeps its levels, and EXIF orientation is applied."""
  ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
  tiff, turned = io.BytesIO(), io.BytesIO()
  Image.fromarray(ramp).save(tiff, format="TIFF")
  exif = Image.Exif()
  exif[0x0112] = 6  # the picture is displayed rotated by 90 degrees
  Image.new("RGB", (32, 16), "red").save(turned, format="JPEG", exif=exif)
  images = tiff.getvalue(), turned.getvalue()
  RolloutLog(tmp_path).write(1, "rl", [(Example("a", "?", "", images), [])])
  stored = [tmp_path / "rollouts" / name for name in read_rollouts(tmp_path)[1][0]["images"]]
  grey = np.asarray(Image.open(stored[0]).convert("L"))
  assert abs(grey.mean() - 127) < 2 and len(np.unique(grey)) >= 64
  assert Image.open(stored[1]).size == (16, 32)


def test_errors_name_bad_images_and_files(tmp_path):
  log = RolloutLog(tmp_path)
  with pytest.raises(UserError, match=r"^example 'a': its image: not an image: text"):
    log.write(1, "rl", [(Example("a", "?", "", (b"no image",)), [])])
  (tmp_path / "rollouts" / "step_000003.jsonl").write_text("oops\n")
  with pytest.raises(UserError, match=r"step_000003\.jsonl: not a file of rollouts"):
    read_rollouts(tmp_path)


def test_report_contains_stages_curves_and_samples(workdir):
  path = write_report(workdir)
  assert path == workdir / "report.html"
  page = Page(path.read_text(encoding="utf-8"))
  words = " ".join(page.text.split())
  assert "sft: 2 stepsrl: vppo, 38 steps" in words
  assert "overall50.0% 62.5%+12.5 points" in words
  assert "perception75.0% 87.5%+12.5 points" in words
  assert "tokens per second3,120" in words
  for title in (
    "Reward",
    "Reward by verifier",
    "Accuracy",
    "Response length, tokens",
    "train/loss",
    "time/tokens_per_second",
  ):
    assert ("svg", "aria-label", f"{title} by step") in page.attributes
  assert ("svg", "aria-label", "objective/kl by step") not in page.attributes  # never finite
  assert [step for step in (10, 20, 30, 40) if f"Question at {step}?" in words] == [10, 30, 40]
  assert "reward 0.90 format 0.00 math 1.00 advantage +1.00 12 tokens" in words
  assert page.tags.count("img") == 3
  assert ("span", "class", "think") in page.attributes
  assert '"seed": 0' in page.text


def test_report_is_self_contained(workdir):
  page = Page(write_report(workdir).read_text(encoding="utf-8"))
  assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
  assert page.tags.count("style") == 1
  for tag, name, value in page.attributes:
    assert name not in ("href", "srcset", "action", "style") and not name.startswith("on")
    if name == "src":
      assert tag == "img" and value.startswith("data:image/png;base64,")


ATTACKS = (
  "<script>alert(1)</script>",
  "</style><script>alert(2)</script>",
  "</p></article></main><img src=x onerror=alert(3)>",
  "\"'><svg onload=alert(4)>",
  "<a href='javascript:alert(5)'>x</a> javascript:alert(5)",
  "<think><iframe src=//evil.example></think>\\boxed{<b onclick=alert(6)>}",
  "{{ 7 * 7 }}{% for x in y %}",
  "<!-- ]]> --><style>*{display:none}</style>",
  "<meta http-equiv=refresh content='0;url=//evil.example'>",
)


def test_untrusted_text_is_escaped_everywhere(workdir):
  safe = Page(write_report(workdir).read_text(encoding="utf-8"))
  for step in (10, 30, 40):
    examples = [
      (
        Example(attack, attack, attack, (picture("red"),)),
        [Sample(attack, 1.0, {attack: 1.0}, 0.0, 3)],
      )
      for attack in ATTACKS[:8]
    ]
    RolloutLog(workdir).write(step, ATTACKS[0], examples)
  with metrics.MetricsWriter(workdir, start=100) as writer:
    for number, attack in enumerate(ATTACKS):
      writer.write(100 + number, attack, {attack: 1.0, f"train/reward/{attack}": 1.0})
    writer.write(
      200,
      ATTACKS[0],
      {f"eval/accuracy/{attack}": 0.5 for attack in ATTACKS} | {"eval/accuracy": 0.5},
    )
  config = config_lib.from_json((workdir / "config.json").read_text())
  config.note = "".join(ATTACKS)
  (workdir / "config.json").write_text(config_lib.to_json(config))
  text = write_report(workdir).read_text(encoding="utf-8")
  page = Page(text)
  assert set(page.tags) <= set(safe.tags)
  assert page.tags.count("style") == 1
  assert page.tags.count("meta") == safe.tags.count("meta")
  assert {(tag, name) for tag, name, _ in page.attributes} <= {
    (tag, name) for tag, name, _ in safe.attributes
  }
  for attack in ATTACKS[:5]:
    assert attack in page.text  # shown unchanged
  assert "{{ 7 * 7 }}" in page.text
  assert "<script" not in text and "<iframe" not in text


def test_content_security_policy_allows_only_our_style_and_embedded_images(workdir):
  text = write_report(workdir).read_text(encoding="utf-8")
  policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
  assert policy
  # A policy applies only to elements after it.
  assert policy.start() < text.index("<style>")
  assert re.fullmatch(
    r"default-src 'none'; img-src data:; style-src 'sha256-([A-Za-z0-9+/=]{44})';"
    r" base-uri 'none'; form-action 'none'",
    policy[1],
  )
  # A browser computes the hash over exactly the text between the tags.
  style = text.partition("<style>")[2].partition("</style>")[0]
  assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy[1]


def test_report_of_a_run_without_metrics_and_with_a_missing_image(tmp_path):
  assert "<h1>" in write_report(tmp_path).read_text()
  RolloutLog(tmp_path).write(1, "rl", [(Example("a", "?", "4", (picture("red"),)), [sample()])])
  next((tmp_path / "rollouts" / "images").iterdir()).unlink()
  assert "image missing" in write_report(tmp_path).read_text()


def test_large_images_are_embedded_at_a_smaller_size(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (1000, 2000, 3), dtype=np.uint8)
  out = io.BytesIO()
  Image.fromarray(noise).save(out, format="PNG")
  RolloutLog(tmp_path).write(1, "rl", [(Example("a", "?", "", (out.getvalue(),)), [])])
  page = Page(write_report(tmp_path).read_text())
  assert ("img", "width", "640") in page.attributes
  assert ("img", "height", "320") in page.attributes


def test_chart_places_points_by_its_axes():
  chart = plots.chart(
    "t",
    {"a": ([0, 5, 10], [0.0, None, 1.0]), "none": ([0], [float("nan")])},
    stages=[(0, "sft"), (5, "rl")],
  )
  assert chart is not None
  (line,) = chart.lines
  ticks = {label: y for y, label in chart.y_ticks}
  assert line["points"] == f"46.0,{ticks['0']} 448.0,{ticks['1']}"
  assert [dot[2] for dot in line["dots"]] == ["step 0: 0", "step 10: 1"]
  assert chart.marks == [(247.0, "rl")]
  assert plots.chart("t", {"none": ([0], [None])}) is None
  flat = plots.chart("t", {"flat": ([3], [0.0])})
  assert flat is not None and "nan" not in flat.lines[0]["points"]


def test_save_curve_writes_an_image(tmp_path):
  save_curve(
    tmp_path / "curve.png",
    {"a": (range(50), range(50)), "b": ([0, 9], [1, None])},
    title="Held-out accuracy",
    y_label="accuracy",
  )
  with Image.open(tmp_path / "curve.png") as image:
    assert (image.format, image.size) == ("PNG", (1280, 720))
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_importing_the_report_imports_no_jax_or_slow_modules():
  # The report needs the other modules only when it is written.
  code = (
    "import sys, json; import jaxrl_vlm.config, jaxrl_vlm.metrics, jaxrl_vlm.report;"
    "print(json.dumps([m for m in ('jax', 'matplotlib', 'jinja2', 'tensorboardX')"
    " if m in sys.modules]))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert json.loads(done.stdout) == []

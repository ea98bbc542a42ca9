"""Corruptions of images against slow ones, written on whole images from their definitions."""

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import jaxrl_vlm as jv
from jaxrl_vlm import models, views
from jaxrl_vlm.data.images import PatchSettings, patchify
from jaxrl_vlm.data.layout import lay_out_patches
from jaxrl_vlm.types import Prompt
from tests import tiny

SIDE, N = 4, 160  # pixels of a patch, patches of a row
# (frames, rows, columns) of patches: two images and a video of two temporal patches; a single
# large image; text only.
GRIDS = {
  2: ([(1, 6, 4), (1, 2, 10), (2, 4, 6)], [(1, 12, 8)], []),
  4: ([(1, 4, 8), (1, 8, 4), (2, 4, 4)], [(1, 12, 8)], []),
}


@functools.cache
def make(merge: int, frames: int = 2):
  """(settings, prompt, videos): the prompt and the pixels [T·t, H, W, 3] it was made of."""
  settings = PatchSettings(patch_size=SIDE, temporal_patch_size=frames, merge_size=merge)
  rng = np.random.default_rng(merge)
  fields = {
    "patches": np.full((3, N, settings.patch_dim), 7, "f4"),
    "patch_positions": np.zeros((3, N, 2), "i4"),
    "patch_grids": np.ones((3, N, 2), "i4"),
    "patch_segments": np.zeros((3, N), "i4"),
    "patch_windows": np.zeros((3, N), "i4"),
  }
  videos = []
  for row, grids in enumerate(GRIDS[merge]):
    videos.append([])
    for t, height, width in grids:
      shape = (t * frames, height * SIDE, width * SIDE, 3)
      pixels = rng.integers(0, 256, shape).astype(np.uint8)
      if t == 1:
        pixels[:] = pixels[:1]  # a still image is repeated
      videos[-1].append(pixels)
    patches = [patchify(v, settings) for v in videos[-1]]
    laid = lay_out_patches(grids, merge, SIDE, None)
    names = ("patch_positions", "patch_grids", "patch_segments", "patch_windows")
    for name, values in zip(names, laid, strict=True):
      fields[name][row, : len(values)] = values
    if patches:
      values = np.concatenate(patches)
      fields["patches"][row, : len(values)] = values
  empty = np.zeros((3, 1), "i4")
  prompt = Prompt(
    tokens=empty,
    length=empty[:, 0],
    positions=np.zeros((3, 1, 3), "i4"),
    next_position=empty[:, 0],
    feature_index=empty - 1,
    **fields,
  )
  return settings, prompt, videos


def level_patch(settings: PatchSettings, level: float) -> np.ndarray:
  return views.level_patch(
    level, settings.image_mean, settings.image_std, settings.patch_dim, settings.rescale_factor
  )


def levels(settings):
  return jnp.asarray(level_patch(settings, 0)), jnp.asarray(level_patch(settings, 255))


def shape(settings: PatchSettings) -> tuple[int, int, int, int]:
  return 3, settings.temporal_patch_size, settings.patch_size, settings.patch_size


def frames_of(settings: PatchSettings, prompt: Prompt, row: int) -> list[np.ndarray]:
  """Grey levels [t, H, W, 3] of each frame of a row, put together by patch_positions."""
  t, p = settings.temporal_patch_size, settings.patch_size
  mean, std = (np.array(a)[:, None, None, None] for a in (settings.image_mean, settings.image_std))
  segments = np.asarray(prompt.patch_segments[row])
  out = []
  for segment in range(1, segments.max() + 1):
    at = np.flatnonzero(segments == segment)
    rows, cols = np.asarray(prompt.patch_grids[row, at[0]])
    frame = np.full((t, rows * p, cols * p, 3), np.nan)
    for i in at:
      r, c = np.asarray(prompt.patch_positions[row, i]) * p
      patch = np.asarray(prompt.patches[row, i], np.float64).reshape(3, t, p, p)
      frame[:, r : r + p, c : c + p] = ((patch * std + mean) * 255).transpose(1, 2, 3, 0)
    out.append(frame)
  return out


def assert_only_patches_of_images_changed(new: Prompt, old: Prompt) -> None:
  for field in dataclasses.fields(Prompt):
    if field.name != "patches":
      np.testing.assert_array_equal(getattr(new, field.name), getattr(old, field.name))
  padding = np.asarray(old.patch_segments) == 0
  np.testing.assert_array_equal(np.asarray(new.patches)[padding], old.patches[padding])


def test_level_patch_is_what_the_processor_makes_of_an_image_of_one_level():
  settings, *_ = make(2)
  for level in (0, 128, 255):
    pixels = np.full((2, 8, 8, 3), level, np.uint8)
    for patch in patchify(pixels, settings):
      np.testing.assert_array_equal(level_patch(settings, level), patch)


def draws(key, rate: float, prompt: Prompt) -> np.ndarray:
  """bool[P, N]; each row with a key of its own."""
  keys, count = jax.random.split(key, prompt.patches.shape[0]), prompt.patches.shape[1]
  return np.stack([jax.random.bernoulli(key, rate, (count,)) for key in keys])


@pytest.mark.parametrize("merge", [2, 4])
@pytest.mark.parametrize("block", [1, 2, 3, 5, 20])
def test_black_patches_are_squares_of_the_grid_drawn_at_their_corners(merge, block):
  settings, prompt, _ = make(merge)
  black, _ = levels(settings)
  key = jax.random.key(3)
  new = jax.jit(
    lambda prompt: views.black_patches(key, prompt, 0.4, black, block=block, merge_size=merge)
  )(prompt)
  assert_only_patches_of_images_changed(new, prompt)
  drawn = draws(key, 0.4, prompt)
  for row, grids in enumerate(GRIDS[merge]):
    frames, places = frames_of(settings, new, row), frames_of(settings, prompt, row)
    # The draw of each patch, laid over the frames.
    index = prompt.replace(
      patches=np.broadcast_to(drawn[..., None], prompt.patches.shape).astype("f4")
    )
    # patches of 0 and 1 come back as grey levels mean·255 and (mean + std)·255
    hits = [
      f > 255 * (np.array(settings.image_mean) + np.array(settings.image_std) / 2)
      for f in frames_of(settings, index, row)
    ]
    assert len(frames) == sum(grid[0] for grid in grids)
    square = block * SIDE
    for frame, expected, hit in zip(frames, places, hits, strict=True):
      for y in range(0, frame.shape[1], square):
        for x in range(0, frame.shape[2], square):
          if hit[0, y, x, 0]:
            expected[:, y : y + square, x : x + square] = 0
      # float32 pixels of up to 255.
      np.testing.assert_allclose(frame, expected, atol=1e-4)


def test_black_patches_are_as_many_as_the_rate_and_follow_the_key():
  settings, prompt, _ = make(2)
  black, _ = levels(settings)
  many = views.repeat_prompts(prompt, 200)
  real = np.asarray(many.patch_segments) > 0
  for block, per_sample in ((1, 188), (2, 47)):

    def darkened(seed, block=block):
      new = views.black_patches(jax.random.key(seed), many, 0.3, black, block=block, merge_size=2)
      return np.asarray((new.patches == black).all(-1))

    hit = darkened(0)
    np.testing.assert_array_equal(hit, darkened(0))
    assert (hit != darkened(1)).any()
    assert (hit[0] != hit[1]).any()  # copies of a prompt are drawn each for itself
    # Five standard deviations of the mean of independent squares of equal size.
    spread = 5 * np.sqrt(0.3 * 0.7 / (200 * per_sample))
    assert abs(hit[real].mean() - 0.3) < spread


def test_one_patch_a_square_needs_no_layout_and_is_the_plain_draw():
  settings, prompt, _ = make(2)
  black, _ = levels(settings)
  key = jax.random.key(7)
  drawn = draws(key, 0.5, prompt)
  chosen = drawn & (prompt.patch_segments > 0)
  expected = np.where(chosen[..., None], black, prompt.patches)
  np.testing.assert_array_equal(views.black_patches(key, prompt, 0.5, black).patches, expected)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_solid_is_what_the_processor_makes_of_a_grey_image(level):
  settings, prompt, videos = make(2)
  new = views.solid(prompt, level, *levels(settings))
  assert_only_patches_of_images_changed(new, prompt)
  for row, pixels in enumerate(videos):
    expected = [patchify(np.full_like(v, level), settings) for v in pixels]
    expected = np.concatenate([np.zeros((0, settings.patch_dim)), *expected])
    # Two roundings of float32.
    np.testing.assert_allclose(new.patches[row, : len(expected)], expected, rtol=1e-6, atol=1e-6)


def test_noise_is_gaussian_in_grey_levels_and_cut_at_black_and_white():
  settings, prompt, _ = make(2)
  black, white = levels(settings)
  many = views.repeat_prompts(prompt, 40)

  def noisy(seed, std):
    return views.noise(jax.random.key(seed), many, std, black, white, shape(settings))

  new = noisy(0, 189.0)
  assert_only_patches_of_images_changed(new, many)
  np.testing.assert_array_equal(new.patches, noisy(0, 189.0).patches)
  assert (np.asarray(new.patches) != noisy(1, 189.0).patches).any()

  # The same draws at a 1000th of the size tell ε wherever nothing is cut.
  cases = [
    (row, *pair)
    for row in (0, 40)
    for pair in zip(
      *(frames_of(settings, p, row) for p in (many, new, noisy(0, 0.189))), strict=True
    )
  ]
  drawn = []
  for row, before, after, little in cases:
    assert after.min() > -1e-4 and after.max() < 255 + 1e-4
    free = (before > 1) & (before < 254)
    added = (little - before) * 1000
    drawn.append(added[0][free[0]])
    # float32 of values near 255, times 1000.
    expected = np.clip(before + added, 0, 255)
    np.testing.assert_allclose(after[free], expected[free], atol=0.2)
    # One draw for the frames within a temporal patch.
    both = free.all(axis=0)
    np.testing.assert_allclose(added[0][both], added[1][both], atol=0.2)
    if row == 40:  # every channel has draws of its own
      assert abs(np.corrcoef(added[0, ..., 0].ravel(), added[0, ..., 1].ravel())[0, 1]) < 0.15
  drawn = np.concatenate([d.ravel() for d in drawn])
  # Five standard errors of a mean and of a standard deviation.
  assert abs(drawn.mean()) < 5 * 189 / np.sqrt(len(drawn))
  assert abs(drawn.std() / 189 - 1) < 5 / np.sqrt(2 * len(drawn))


def slow_blur(frame: np.ndarray, radius: float) -> np.ndarray:
  """[t, H, W, 3]: every pixel a weighted mean of the pixels around it, repeated at the border."""
  reach = int(np.ceil(3 * radius))
  weights = {j: np.exp(-(j**2) / (2 * radius**2)) for j in range(-reach, reach + 1)}
  total = sum(weights.values())
  for axis in (1, 2):
    size = frame.shape[axis]
    frame = sum(
      w / total * frame.take(np.clip(np.arange(size) + j, 0, size - 1), axis=axis)
      for j, w in weights.items()
    )
  return frame


@pytest.mark.parametrize(("merge", "frames", "radius"), [(2, 2, 0.5), (2, 2, 6.0), (4, 1, 1.7)])
def test_blur_is_that_of_whole_frames(merge, frames, radius):
  settings, prompt, _ = make(merge, frames)
  new = jax.jit(lambda prompt: views.blur(prompt, radius, shape(settings), settings.merge_size))(
    prompt
  )
  assert_only_patches_of_images_changed(new, prompt)
  for row in range(2):
    pairs = zip(frames_of(settings, prompt, row), frames_of(settings, new, row), strict=True)
    for before, after in pairs:
      # Sums of some tens of float32 up to 255.
      np.testing.assert_allclose(after, slow_blur(before, radius), atol=1e-3)
      assert np.abs(after - before).max() > 10


def test_blur_is_close_to_pillows_away_from_the_border():
  settings, prompt, videos = make(2)
  new = views.blur(prompt, 2.0, shape(settings), settings.merge_size)
  image = Image.fromarray(videos[1][0][0])
  theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(2.0)), np.float64)
  ours = frames_of(settings, new, 1)[0][0]
  # Pillow's is three box filters, rounded to whole levels; the image is white noise, with a spread
  # of 74 levels before and about 10 after. Closer to the border each of the three repeats it anew.
  inside = (slice(8, -8), slice(8, -8))
  np.testing.assert_allclose(ours[inside], theirs[inside], atol=3)
  assert ours[inside].std() > 8


# ------------------------------------------------------------------------------------------------
# The most salient squares
# ------------------------------------------------------------------------------------------------


def slow_salient(prompt: Prompt, row: int, saliency: np.ndarray, rate: float, block: int):
  """bool[N]; which patches of a row go black."""
  hit = np.zeros(prompt.patches.shape[1], bool)
  segments, places = prompt.patch_segments[row], prompt.patch_positions[row]
  for segment in range(1, segments.max() + 1):
    squares: dict[tuple, list[int]] = {}
    for i in np.flatnonzero(segments == segment):
      squares.setdefault(tuple(places[i] // block), []).append(i)
    means = {
      at: np.mean(saliency[row, members], dtype=np.float64) for at, members in squares.items()
    }
    count = int(np.ceil(round(rate * len(squares), 9)))
    for at in sorted(squares, key=lambda at: (-means[at], at))[:count]:
      hit[squares[at]] = True
  return hit


@pytest.mark.parametrize("merge", [2, 4])
@pytest.mark.parametrize(
  ("block", "rate"),
  [(1, 0.5), (1, 0.33), (1, 1.0), (2, 0.3), (3, 0.6), (4, 0.01), (5, 0.4), (20, 0.5)],
)
def test_the_most_salient_squares_of_every_image_go_black(merge, block, rate):
  settings, prompt, _ = make(merge)
  black, _ = levels(settings)
  rng = np.random.default_rng(block)
  # Few whole values: means are exact, and many are equal.
  few = rng.integers(0, 3, prompt.patches.shape[:2]).astype("f4")
  apart = rng.permutation(few.size).reshape(few.shape).astype("f4")
  scaled = apart * 10.0 ** -(prompt.patch_segments % 3)  # images of all magnitudes
  fast = jax.jit(
    lambda prompt, saliency: views.salient_patches(
      prompt, saliency, rate, black, block=block, merge_size=merge
    )
  )
  for saliency in (few, apart, scaled.astype("f4"), np.zeros_like(few)):
    saliency = np.where(prompt.patch_segments > 0, saliency, 1e9).astype("f4")
    new = fast(prompt, saliency)
    assert_only_patches_of_images_changed(new, prompt)
    for row in range(3):
      hit = slow_salient(prompt, row, saliency, rate, block)
      expected = np.where(hit[:, None], black, prompt.patches[row])
      np.testing.assert_array_equal(new.patches[row], expected)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(request, tmp_path_factory):
  """Family; transformers' model; our model and parameters; a mixed batch and its saliency."""
  path = tmp_path_factory.mktemp("hf")
  theirs = tiny.make_hf(path, family=request.param)
  model, params, processor = jv.load_pretrained(path)
  prompt = tiny.mixed_batch(processor, request.param)
  return request.param, theirs, model, params, prompt, saliency_of(model, params, prompt)


@functools.partial(jax.jit, static_argnums=0)
def saliency_of(model, params, prompt):
  return model.apply({"params": params}, prompt, method="saliency")


def attention_of(theirs, prompt: Prompt, row: int, layer: int, monkeypatch) -> list[np.ndarray]:
  """[H, n, n] probabilities in a layer of transformers' tower for each frame of a row."""
  name = re.compile(rf"(visual\.blocks\.{layer}\.attn|vision_.*layers\.{layer}\.self_attn)$")
  (module,) = (m for n, m in theirs.named_modules() if name.search(n))
  file = sys.modules[type(module).__module__]
  eager, seen = vars(file)["eager_attention_forward"], []

  def spy(here, *args, **kwargs):
    out = eager(here, *args, **kwargs)
    if here is module:
      seen.extend(out[1])
    return out

  with monkeypatch.context() as patched:
    patched.setattr(file, "eager_attention_forward", spy)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
      theirs(**tiny.torch_inputs(theirs, prompt, row))
  return [a.float().numpy() for a in seen]


def test_saliency_is_the_attention_received_in_transformers(pair, monkeypatch):
  family, theirs, model, _, prompt, ours = pair
  vision, ours = model.config.vision, np.asarray(ours)
  layer = 1 if family == "qwen2_5_vl" else vision.depth - 1  # the last that attends fully
  assert vision.full_attention_layers in (None, (layer,))
  assert ours.dtype == np.float32
  frames = 0
  for row, segments in enumerate(prompt.patch_segments):
    expected = np.zeros(len(segments))
    if segments.any():
      for frame, weights in enumerate(attention_of(theirs, prompt, row, layer, monkeypatch)):
        index = np.flatnonzero(segments == frame + 1)
        if family == "gemma3":  # reading order
          order = prompt.patch_positions[row, index] @ [10**6, 1]
        else:  # windows one after the other
          order = prompt.patch_windows[row, index]
        index = index[np.argsort(order, kind="stable")]
        assert weights.shape == (vision.num_heads, len(index), len(index))
        expected[index] = weights.mean(axis=(0, 1))
        frames += 1
    np.testing.assert_allclose(ours[row], expected, atol=1e-5, err_msg=f"row {row}")
    assert not ours[row, segments == 0].any()
  assert frames == sum(segments.max() for segments in prompt.patch_segments)
  assert np.ptp(ours[1][prompt.patch_segments[1] > 0]) > 1e-3  # not all the same


def test_saliency_does_not_depend_on_padding_or_other_images(pair):
  _, _, model, params, prompt, expected = pair
  segments = np.array(prompt.patch_segments)
  gone = np.zeros(segments.shape, bool)
  gone[2] = segments[2] == 2  # the second image of a row becomes padding
  assert gone.any()

  fields = {}
  for name, fill in {
    "patches": 9,
    "patch_positions": 0,
    "patch_grids": 1,
    "patch_segments": 0,
    "patch_windows": 0,
  }.items():
    field = np.array(getattr(prompt, name))
    field[gone] = fill
    field = np.pad(field, [(0, 0), (0, 40), (0, 0)][: field.ndim], constant_values=fill)
    fields[name] = field
  other = prompt.replace(**fields)
  found = np.asarray(saliency_of(model, params, other))
  assert not found[other.patch_segments == 0].any()
  np.testing.assert_allclose(found[:, : segments.shape[1]], np.where(gone, 0, expected), atol=1e-6)


def test_saliency_in_bfloat16_with_recomputed_layers(pair):
  _, _, model, params, prompt, expected = pair
  coarse = models.VLM(model.config.replace(dtype="bfloat16", remat="full"))
  found, expected = np.asarray(saliency_of(coarse, params, prompt)), np.asarray(expected)
  assert found.dtype == np.float32
  # A frame's adds up to 1 all the same: probabilities are not rounded before they are summed.
  np.testing.assert_allclose(found.sum(axis=1), prompt.patch_segments.max(axis=1), atol=1e-4)
  # Eight bits of activations through up to three layers of large weights.
  real = prompt.patch_segments > 0
  assert np.corrcoef(found[real], expected[real])[0, 1] > 0.98


@pytest.mark.parametrize("pair", ["qwen2_5_vl"], indirect=True)
def test_saliency_within_a_gradient_has_none(pair):
  _, _, model, params, prompt, _ = pair
  model = models.VLM(model.config.replace(remat="full"))

  def loss(params, patches):
    saliency = saliency_of(model, params, prompt.replace(patches=patches))
    view = views.salient_patches(
      prompt, saliency, 0.4, jnp.zeros(patches.shape[-1]), block=2, merge_size=2
    )
    return (saliency**2).sum() + (view.patches**2).sum()

  grads = jax.jit(jax.grad(loss, (0, 1)))(params, prompt.patches)
  assert not any(g.any() for g in jax.tree.leaves(grads))


def test_saliency_without_patches_or_without_full_attention():
  vision = models.VisionConfig(
    depth=2,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    out_hidden_size=16,
    patch_size=SIDE,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=16,
    full_attention_layers=(),
  )
  config = models.ModelConfig(
    family="qwen2_5_vl",
    vocab_size=8,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tied=True,
    mrope_section=(1, 1, 2),
    vision=vision,
  )
  _, prompt, _ = make(2)
  model, params = models.VLM(config), models.abstract_params(config)
  with pytest.raises(ValueError, match=r"vision.full_attention_layers=\(\): expected at least one"):
    jax.eval_shape(functools.partial(saliency_of, model), params, prompt)
  text = prompt.replace(
    **{
      name: getattr(prompt, name)[:, :0]
      for name in ("patches", "patch_positions", "patch_grids", "patch_segments", "patch_windows")
    }
  )
  found = jax.eval_shape(functools.partial(saliency_of, model), params, text)
  assert (found.shape, found.dtype) == ((3, 0), np.float32)

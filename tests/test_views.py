"""Compares the corruptions of images with slow versions that work on whole images."""

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

SIDE, N = 4, 160  # side of a patch in pixels, number of patches in a row
# For each merge size, the grids (temporal patches, rows, columns) of the images of three prompts:
# two images and a video of two temporal patches, one large image, text only.
GRIDS = {
  2: ([(1, 6, 4), (1, 2, 10), (2, 4, 6)], [(1, 12, 8)], []),
  4: ([(1, 4, 8), (1, 8, 4), (2, 4, 4)], [(1, 12, 8)], []),
}


@functools.cache
def make(merge: int, frames: int = 2):
  """Returns (settings, prompt, videos) with the pixels [T·t, H, W, 3] of each image of the prompt.

  T is the number of temporal patches, and t the number of frames in a temporal patch.
  """
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
        pixels[:] = pixels[:1]  # an image fills a temporal patch by repetition
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
  """Assembles the patches of a row into the grey levels [t, H, W, 3] of each temporal patch."""
  t, p = settings.temporal_patch_size, settings.patch_size
  mean, std = (np.array(a)[:, None, None, None] for a in (settings.image_mean, settings.image_std))
  segments = np.asarray(prompt.patch_segments[row])
  out = []
  for segment in range(1, segments.max() + 1):
    index = np.flatnonzero(segments == segment)
    rows, cols = np.asarray(prompt.patch_grids[row, index[0]])
    frame = np.full((t, rows * p, cols * p, 3), np.nan)
    for i in index:
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


def test_level_patch_equals_a_processed_image_of_one_grey_level():
  settings, *_ = make(2)
  for level in (0, 128, 255):
    pixels = np.full((2, 8, 8, 3), level, np.uint8)
    for patch in patchify(pixels, settings):
      np.testing.assert_array_equal(level_patch(settings, level), patch)


def selected_patches(key, rate: float, prompt: Prompt) -> np.ndarray:
  """Selects each patch with probability `rate`: bool[P, N]. Each row has its own random key."""
  keys, count = jax.random.split(key, prompt.patches.shape[0]), prompt.patches.shape[1]
  return np.stack([jax.random.bernoulli(key, rate, (count,)) for key in keys])


@pytest.mark.parametrize("merge", [2, 4])
@pytest.mark.parametrize("block", [1, 2, 3, 5, 20])
def test_black_squares_are_selected_by_their_upper_left_patch(merge, block):
  settings, prompt, _ = make(merge)
  black, _ = levels(settings)
  key = jax.random.key(3)
  new = jax.jit(
    lambda prompt: views.black_patches(key, prompt, 0.4, black, block=block, merge_size=merge)
  )(prompt)
  assert_only_patches_of_images_changed(new, prompt)
  selected = selected_patches(key, 0.4, prompt)
  for row, grids in enumerate(GRIDS[merge]):
    frames, clean_frames = frames_of(settings, new, row), frames_of(settings, prompt, row)
    # Frames that show which patches are selected. Patches of 0 and 1 become the grey levels
    # mean·255 and (mean + std)·255.
    selection = prompt.replace(
      patches=np.broadcast_to(selected[..., None], prompt.patches.shape).astype("f4")
    )
    hits = [
      f > 255 * (np.array(settings.image_mean) + np.array(settings.image_std) / 2)
      for f in frames_of(settings, selection, row)
    ]
    assert len(frames) == sum(grid[0] for grid in grids)
    square = block * SIDE
    for frame, expected, hit in zip(frames, clean_frames, hits, strict=True):
      for y in range(0, frame.shape[1], square):
        for x in range(0, frame.shape[2], square):
          if hit[0, y, x, 0]:
            expected[:, y : y + square, x : x + square] = 0
      # Grey levels of up to 255 in float32.
      np.testing.assert_allclose(frame, expected, atol=1e-4)


def test_the_share_of_black_patches_is_the_rate_and_the_key_selects_them():
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
    assert (hit[0] != hit[1]).any()  # copies of a prompt have different masks
    # Five standard deviations of the mean over independent squares of equal size.
    spread = 5 * np.sqrt(0.3 * 0.7 / (200 * per_sample))
    assert abs(hit[real].mean() - 0.3) < spread


def test_squares_of_one_patch_are_selected_independently_without_a_merge_size():
  settings, prompt, _ = make(2)
  black, _ = levels(settings)
  key = jax.random.key(7)
  chosen = selected_patches(key, 0.5, prompt) & (prompt.patch_segments > 0)
  expected = np.where(chosen[..., None], black, prompt.patches)
  np.testing.assert_array_equal(views.black_patches(key, prompt, 0.5, black).patches, expected)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_solid_equals_a_processed_grey_image(level):
  settings, prompt, videos = make(2)
  new = views.solid(prompt, level, *levels(settings))
  assert_only_patches_of_images_changed(new, prompt)
  for row, pixels in enumerate(videos):
    expected = [patchify(np.full_like(v, level), settings) for v in pixels]
    expected = np.concatenate([np.zeros((0, settings.patch_dim)), *expected])
    # Two float32 operations are rounded.
    np.testing.assert_allclose(new.patches[row, : len(expected)], expected, rtol=1e-6, atol=1e-6)


def test_noise_is_gaussian_in_grey_levels_and_clipped_at_black_and_white():
  settings, prompt, _ = make(2)
  black, white = levels(settings)
  many = views.repeat_prompts(prompt, 40)

  def noisy(seed, std):
    return views.noise(jax.random.key(seed), many, std, black, white, shape(settings))

  new = noisy(0, 189.0)
  assert_only_patches_of_images_changed(new, many)
  np.testing.assert_array_equal(new.patches, noisy(0, 189.0).patches)
  assert (np.asarray(new.patches) != noisy(1, 189.0).patches).any()

  # The same key with a thousandth of the std gives ε, wherever nothing is clipped.
  cases = [
    (row, *pair)
    for row in (0, 40)
    for pair in zip(
      *(frames_of(settings, p, row) for p in (many, new, noisy(0, 0.189))), strict=True
    )
  ]
  samples = []
  for row, before, after, little in cases:
    assert after.min() > -1e-4 and after.max() < 255 + 1e-4
    free = (before > 1) & (before < 254)
    added = (little - before) * 1000
    samples.append(added[0][free[0]])
    # The tolerance is the float32 precision of values near 255, times 1000.
    expected = np.clip(before + added, 0, 255)
    np.testing.assert_allclose(after[free], expected[free], atol=0.2)
    # The frames within a temporal patch have the same noise.
    both = free.all(axis=0)
    np.testing.assert_allclose(added[0][both], added[1][both], atol=0.2)
    if row == 40:  # the noise of the channels is independent
      assert abs(np.corrcoef(added[0, ..., 0].ravel(), added[0, ..., 1].ravel())[0, 1]) < 0.15
  samples = np.concatenate([s.ravel() for s in samples])
  # Five standard errors of the mean and of the standard deviation.
  assert abs(samples.mean()) < 5 * 189 / np.sqrt(len(samples))
  assert abs(samples.std() / 189 - 1) < 5 / np.sqrt(2 * len(samples))


def slow_blur(frame: np.ndarray, radius: float) -> np.ndarray:
  """Blurs a frame [t, H, W, 3]. Every pixel becomes a Gaussian mean of the pixels around it.

  The pixels at the border are repeated outwards.
  """
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
def test_blur_across_patches_equals_blur_of_whole_frames(merge, frames, radius):
  settings, prompt, _ = make(merge, frames)
  new = jax.jit(lambda prompt: views.blur(prompt, radius, shape(settings), settings.merge_size))(
    prompt
  )
  assert_only_patches_of_images_changed(new, prompt)
  for row in range(2):
    pairs = zip(frames_of(settings, prompt, row), frames_of(settings, new, row), strict=True)
    for before, after in pairs:
      # Sums of some tens of float32 values of up to 255.
      np.testing.assert_allclose(after, slow_blur(before, radius), atol=1e-3)
      assert np.abs(after - before).max() > 10


def test_blur_is_close_to_pillow_away_from_the_border():
  settings, prompt, videos = make(2)
  new = views.blur(prompt, 2.0, shape(settings), settings.merge_size)
  image = Image.fromarray(videos[1][0][0])
  theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(2.0)), np.float64)
  ours = frames_of(settings, new, 1)[0][0]
  # Pillow applies three box filters and rounds to whole levels. Each of them repeats the border
  # again, so this comparison leaves the border out. The image is white noise with a standard
  # deviation of 74 levels before and about 10 levels after the blur.
  inside = (slice(8, -8), slice(8, -8))
  np.testing.assert_allclose(ours[inside], theirs[inside], atol=3)
  assert ours[inside].std() > 8


# -- The most salient squares ---------------------------------------------------------------------


def slow_salient(prompt: Prompt, row: int, saliency: np.ndarray, rate: float, block: int):
  """Returns which patches of a row become black: bool[N]."""
  hit = np.zeros(prompt.patches.shape[1], bool)
  segments, positions = prompt.patch_segments[row], prompt.patch_positions[row]
  for segment in range(1, segments.max() + 1):
    squares: dict[tuple, list[int]] = {}
    for i in np.flatnonzero(segments == segment):
      squares.setdefault(tuple(positions[i] // block), []).append(i)
    means = {
      square: np.mean(saliency[row, members], dtype=np.float64)
      for square, members in squares.items()
    }
    count = int(np.ceil(round(rate * len(squares), 9)))
    for square in sorted(squares, key=lambda square: (-means[square], square))[:count]:
      hit[squares[square]] = True
  return hit


@pytest.mark.parametrize("merge", [2, 4])
@pytest.mark.parametrize(
  ("block", "rate"),
  [(1, 0.5), (1, 0.33), (1, 1.0), (2, 0.3), (3, 0.6), (4, 0.01), (5, 0.4), (20, 0.5)],
)
def test_the_most_salient_squares_of_every_image_become_black(merge, block, rate):
  settings, prompt, _ = make(merge)
  black, _ = levels(settings)
  rng = np.random.default_rng(block)
  # With few integer values, means are exact, and many are equal.
  few = rng.integers(0, 3, prompt.patches.shape[:2]).astype("f4")
  distinct = rng.permutation(few.size).reshape(few.shape).astype("f4")
  scaled = distinct * 10.0 ** -(prompt.patch_segments % 3)  # a different magnitude for each image
  fast = jax.jit(
    lambda prompt, saliency: views.salient_patches(
      prompt, saliency, rate, black, block=block, merge_size=merge
    )
  )
  for saliency in (few, distinct, scaled.astype("f4"), np.zeros_like(few)):
    saliency = np.where(prompt.patch_segments > 0, saliency, 1e9).astype("f4")
    new = fast(prompt, saliency)
    assert_only_patches_of_images_changed(new, prompt)
    for row in range(3):
      hit = slow_salient(prompt, row, saliency, rate, block)
      expected = np.where(hit[:, None], black, prompt.patches[row])
      np.testing.assert_array_equal(new.patches[row], expected)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(request, tmp_path_factory):
  """Family, model of transformers, our model and parameters, a mixed batch and its saliency."""
  path = tmp_path_factory.mktemp("hf")
  theirs = tiny.make_hf(path, family=request.param)
  model, params, processor = jv.load_pretrained(path)
  prompt = tiny.mixed_batch(processor, request.param)
  return request.param, theirs, model, params, prompt, saliency_of(model, params, prompt)


@functools.partial(jax.jit, static_argnums=0)
def saliency_of(model, params, prompt):
  return model.apply({"params": params}, prompt, method="saliency")


def attention_of(theirs, prompt: Prompt, row: int, layer: int, monkeypatch) -> list[np.ndarray]:
  """Returns the attention [H, n, n] in a layer of the vision tower of transformers, by frame."""
  name = re.compile(rf"(visual\.blocks\.{layer}\.attn|vision_.*layers\.{layer}\.self_attn)$")
  (module,) = (m for n, m in theirs.named_modules() if name.search(n))
  file = sys.modules[type(module).__module__]
  eager, recorded = vars(file)["eager_attention_forward"], []

  def recording(caller, *args, **kwargs):
    out = eager(caller, *args, **kwargs)
    if caller is module:
      recorded.extend(out[1])
    return out

  with monkeypatch.context() as patched:
    patched.setattr(file, "eager_attention_forward", recording)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
      theirs(**tiny.torch_inputs(theirs, prompt, row))
  return [a.float().numpy() for a in recorded]


def test_saliency_is_the_attention_received_by_a_patch_in_transformers(pair, monkeypatch):
  family, theirs, model, _, prompt, ours = pair
  vision, ours = model.config.vision, np.asarray(ours)
  layer = 1 if family == "qwen2_5_vl" else vision.depth - 1  # the last layer with full attention
  assert vision.full_attention_layers in (None, (layer,))
  assert ours.dtype == np.float32
  frames = 0
  for row, segments in enumerate(prompt.patch_segments):
    expected = np.zeros(len(segments))
    if segments.any():
      for frame, weights in enumerate(attention_of(theirs, prompt, row, layer, monkeypatch)):
        index = np.flatnonzero(segments == frame + 1)
        if family == "gemma3":  # patches are in reading order
          order = prompt.patch_positions[row, index] @ [10**6, 1]
        else:  # patches are ordered by window
          order = prompt.patch_windows[row, index]
        index = index[np.argsort(order, kind="stable")]
        assert weights.shape == (vision.num_heads, len(index), len(index))
        expected[index] = weights.mean(axis=(0, 1))
        frames += 1
    np.testing.assert_allclose(ours[row], expected, atol=1e-5, err_msg=f"row {row}")
    assert not ours[row, segments == 0].any()
  assert frames == sum(segments.max() for segments in prompt.patch_segments)
  assert np.ptp(ours[1][prompt.patch_segments[1] > 0]) > 1e-3  # patches differ


def test_saliency_does_not_depend_on_padding_or_other_images(pair):
  _, _, model, params, prompt, expected = pair
  segments = np.array(prompt.patch_segments)
  removed = np.zeros(segments.shape, bool)
  removed[2] = segments[2] == 2  # the second image of a row becomes padding
  assert removed.any()

  fields = {}
  for name, fill in {
    "patches": 9,
    "patch_positions": 0,
    "patch_grids": 1,
    "patch_segments": 0,
    "patch_windows": 0,
  }.items():
    field = np.array(getattr(prompt, name))
    field[removed] = fill
    field = np.pad(field, [(0, 0), (0, 40), (0, 0)][: field.ndim], constant_values=fill)
    fields[name] = field
  other = prompt.replace(**fields)
  found = np.asarray(saliency_of(model, params, other))
  assert not found[other.patch_segments == 0].any()
  np.testing.assert_allclose(
    found[:, : segments.shape[1]], np.where(removed, 0, expected), atol=1e-6
  )


def test_saliency_in_bfloat16_with_remat_is_close_to_float32(pair):
  _, _, model, params, prompt, expected = pair
  coarse = models.VLM(model.config.replace(dtype="bfloat16", remat="full"))
  found, expected = np.asarray(saliency_of(coarse, params, prompt)), np.asarray(expected)
  assert found.dtype == np.float32
  # The saliency of a frame still adds up to 1, because the sum is over unrounded probabilities.
  np.testing.assert_allclose(found.sum(axis=1), prompt.patch_segments.max(axis=1), atol=1e-4)
  # Activations have eight bits of precision, and there are up to three layers with large weights.
  real = prompt.patch_segments > 0
  assert np.corrcoef(found[real], expected[real])[0, 1] > 0.98


@pytest.mark.parametrize("pair", ["qwen2_5_vl"], indirect=True)
def test_saliency_has_no_gradient(pair):
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


def test_saliency_requires_a_layer_with_full_attention_but_no_patches():
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

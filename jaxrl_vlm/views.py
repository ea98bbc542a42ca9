"""Views: a prompt with other pixels. The same tokens, scored under another image.

Every corruption is a pure function Prompt -> Prompt that changes `patches` alone, not those of the
padding. Pixels are grey levels 0..255 in the processed image, after resizing; `black` and `white`
say how they are normalised (`level_patch`).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_vlm.types import Array, Prompt

PatchShape = tuple[int, int, int, int]

LEVELS = 255  # the grey level of white; black is 0


def repeat_prompts(prompt: Prompt, times: int) -> Prompt:
  """Every prompt `times` times: leading axis P·times, a prompt's copies adjacent."""
  return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), prompt)


def level_patch(
  level: float,
  mean: Sequence[float],
  std: Sequence[float],
  patch_dim: int,
  rescale_factor: float = 1 / LEVELS,
) -> np.ndarray:
  """f32[C·t·p·p]; a patch of one grey level 0..255 as the processor normalises it.

  Args:
    level: grey level of every pixel.
    mean, std: of each channel, after rescaling; `image_mean` and `image_std` of the processor.
    patch_dim: C·t·p·p.
    rescale_factor: multiplies the levels before normalisation.
  """
  shift, scale = (np.array(v, np.float32) for v in (mean, std))
  value = (np.float32(level * rescale_factor) - shift) / scale
  return np.repeat(value, patch_dim // len(value))


def black_patches(
  key: Array, prompt: Prompt, rate: float, black: Array, *, block: int = 1, merge_size: int = 1
) -> Prompt:
  """Blackens squares of `block` x `block` patches, each with probability `rate`, independently.

  The grid is that of the processed image, from its upper left corner; squares are cut at its right
  and lower border. Every frame of a video is drawn anew. VPPO's released code
  (`random_patch_blackening`) does this with 14-pixel squares after resizing, one patch of the
  vision tower, rate 0.5, drawn anew for every sample; PAPO's draws on the original image before
  resizing, rate 0.6, once a prompt.

  Args:
    key: of jax.random; one, or one for each row.
    prompt: P prompts.
    rate: probability of each square.
    black: f32[C·t·p·p]; a black patch as the processor normalises it.
    block: side of a square in patches of the tower.
    merge_size: merge_size² patches of one visual token are adjacent; needed where block > 1.
  """
  count = prompt.patches.shape[1]
  hit = jax.vmap(lambda key: jax.random.bernoulli(key, rate, (count,)))(_row_keys(key, prompt))
  if block > 1:  # a square goes as the draw of its upper left patch does
    corner = prompt.patch_positions // block * block
    hit = jnp.take_along_axis(hit, _patch_index(prompt, corner, merge_size), axis=1)
  return _replace(prompt, hit, black)


def salient_patches(
  prompt: Prompt, saliency: Array, rate: float, black: Array, *, block: int = 1, merge_size: int = 1
) -> Prompt:
  """Blackens the ⌈rate · n⌉ squares of each image with the largest mean saliency.

  Squares as in `black_patches`, n of them in an image; a cut one has the mean of what is left of
  it. Every frame of a video has a ranking of its own. Of equal squares the first in reading order
  goes. Nothing is drawn, so all samples of a prompt share one view.

  PAPO (arXiv 2507.06448) compares this with random patches, its saliency being DINOv2's
  self-attention; how it is made is not released.

  Args:
    prompt: P prompts.
    saliency: f32[P, N]; of each patch, `VLM.saliency`. What stands at padding has no effect.
    rate: share of squares.
    black: f32[C·t·p·p]; a black patch as the processor normalises it.
    block: side of a square in patches of the tower.
    merge_size: merge_size² patches of one visual token are adjacent; needed where block > 1.
  """
  place, grid = (jnp.asarray(a) for a in (prompt.patch_positions, prompt.patch_grids))
  segments = jnp.asarray(prompt.patch_segments)
  real = segments > 0
  corner = place // block * block
  mean, squares = jax.lax.stop_gradient(jnp.where(real, saliency, 0.0)), grid
  if block > 1:
    for axis in range(2):  # along a column of the square, then along its columns

      def add(step, total, axis=axis, values=mean):
        there = corner[..., axis] + step
        at = place.at[..., axis].set(there)
        index = jnp.clip(_patch_index(prompt, at, merge_size), 0, place.shape[1] - 1)
        value = jnp.take_along_axis(values, index, axis=1)
        return total + jnp.where(there < grid[..., axis], value, 0.0)

      mean = jax.lax.fori_loop(0, block, add, jnp.zeros_like(mean))
    mean = mean / jnp.minimum(grid - corner, block).prod(axis=-1)
    squares = -(-grid // block)

  # The squares, each at its upper left patch, in order: images, the most salient first. The rest
  # comes last.
  own = jnp.broadcast_to(jnp.arange(place.shape[1]), segments.shape)
  stands = real & (place == corner).all(axis=-1)
  image = jnp.where(stands, segments, np.iinfo(np.int32).max)
  reading = place[..., 0] * grid[..., 1] + place[..., 1]
  image, _, _, order = jax.lax.sort((image, -mean, reading, own), num_keys=3)
  first = image != jnp.pad(image, ((0, 0), (1, 0)))[:, :-1]  # of its image
  rank = own - jax.lax.cummax(jnp.where(first, own, 0), axis=1)
  rank = jnp.take_along_axis(rank, jnp.argsort(order, axis=1), axis=1)

  # From the host in float64: ⌈0.4 · 5⌉ is 2 on every device.
  counts = np.ceil(np.round(rate * np.arange(place.shape[1] + 1), 9)).astype(np.int32)
  hit = stands & (rank < jnp.asarray(counts)[squares.prod(axis=-1)])
  if block > 1:
    hit = jnp.take_along_axis(hit, _patch_index(prompt, corner, merge_size), axis=1)
  return _replace(prompt, hit, black)


def solid(prompt: Prompt, level: float, black: Array, white: Array) -> Prompt:
  """Every pixel of every image is the grey `level`, 0..255; nothing but the size is left.

      y = black + level / 255 · (white − black)

  VPPO's released code has it at level 128 (`complete_masking`), beside the patches that its
  runs use. The normalisation is affine, so black and white say what is between.

  Args:
    prompt: P prompts.
    level: 0 is black, and needs no `white`.
    black, white: f32[C·t·p·p]; `level_patch` of 0 and of 255.
  """
  grey = black if level == 0 else black + level / LEVELS * (white - black)
  return _replace(prompt, True, grey)


def noise(
  key: Array, prompt: Prompt, std: float, black: Array, white: Array, patch_shape: PatchShape
) -> Prompt:
  """Adds Gaussian noise of `std` grey levels to every pixel and channel, cut to what pixels can be.

      x′ = clip(x + std · ε, 0, 255),  ε ~ N(0, 1),  x in grey levels

  VPPO's released code has it with std 189 (`add_gaussian_noise`), beside the patches that its runs
  use; it then drops the fraction of x′, which is kept here. A still image is noisy before it is
  repeated, so the frames within one temporal patch share ε, those of a video too.

  Args:
    key: of jax.random; one, or one for each row.
    prompt: P prompts.
    std: in grey levels.
    black, white: f32[C·t·p·p]; `level_patch` of 0 and of 255.
    patch_shape: (C, t, p, p) of one patch.
  """
  c, t, p, _ = patch_shape
  patches = prompt.patches
  shape = (patches.shape[1], c, 1, p, p)
  drawn = jax.vmap(lambda key: jax.random.normal(key, shape))(_row_keys(key, prompt))
  drawn = jnp.broadcast_to(drawn, (*patches.shape[:2], c, t, p, p)).reshape(patches.shape)
  noisy = patches + std / LEVELS * (white - black) * drawn
  return _replace(prompt, True, jnp.clip(noisy, black, white))


def blur(prompt: Prompt, radius: float, patch_shape: PatchShape, merge_size: int) -> Prompt:
  """Gaussian blur of every frame, across patches; the pixels at its border are repeated outwards.

      x′[i] = Σ_j w_j x[i + j],  w_j ∝ exp(−j² / 2 radius²),  |j| ≤ ⌈3 radius⌉

  along rows, then along columns. Weights add up to 1 and the normalisation of pixels is affine, so
  normalised or not makes no difference. VPPO's released code has it with radius 6
  (`gaussian_blur`), beside the patches that its runs use: Pillow's filter, which approximates the
  same Gaussian by three box filters, repeats the border anew for each, and rounds to whole levels.

  On the device: where a neighbouring patch stands follows from row, column and grid, so gathers
  find it and no image is put together.

  Args:
    prompt: P prompts.
    radius: standard deviation in pixels.
    patch_shape: (C, t, p, p) of one patch.
    merge_size: merge_size² patches of one visual token are adjacent.
  """
  c, t, p, _ = patch_shape
  reach = math.ceil(3 * radius)
  weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / radius) ** 2)
  weights = np.append(weights / weights.sum(), 0)  # what is out of reach weighs 0
  far = math.ceil(reach / p)  # patches to either side

  x = jnp.reshape(prompt.patches, (*prompt.patches.shape[:2], c * t, p, p))
  for axis, product in enumerate(("ij,pnxjk->pnxik", "ij,pnxkj->pnxki")):
    place, size = prompt.patch_positions[..., axis], prompt.patch_grids[..., axis]
    total = jnp.zeros_like(x)
    for distance in range(-far, far + 1):
      there = place + distance
      other = jnp.stack(
        [
          prompt.patch_positions[..., i] if i != axis else jnp.clip(there, 0, size - 1)
          for i in range(2)
        ],
        axis=-1,
      )
      index = _patch_index(prompt, other, merge_size)
      patch = jnp.take_along_axis(x, index[..., None, None, None], axis=1)
      first, last = (jax.lax.slice_in_dim(patch, i, i + 1, axis=3 + axis) for i in (0, p - 1))
      before, after = (a[..., None, None, None] for a in (there < 0, there >= size))
      patch = jnp.where(before, first, jnp.where(after, last, patch))
      apart = distance * p + np.arange(p)[None, :] - np.arange(p)[:, None]
      taps = weights[np.where(abs(apart) <= reach, apart + reach, -1)].astype(np.float32)
      total += jnp.einsum(product, taps, patch, precision="highest")
    x = total
  return _replace(prompt, True, x.reshape(prompt.patches.shape))


def _row_keys(key: Array, prompt: Prompt) -> Array:
  """A key for each row, so that the draws of a row do not depend on which others are beside it."""
  return key if key.ndim else jax.random.split(key, prompt.patches.shape[0])


def _replace(prompt: Prompt, where: Array | bool, patches: Array) -> Prompt:
  """`patches` in place of those `where` it is true, bool[P, N], that are not padding."""
  chosen = (jnp.asarray(prompt.patch_segments) > 0) & where
  return dataclasses.replace(
    prompt, patches=jnp.where(chosen[..., None], patches, prompt.patches), features=None
  )


def _patch_index(prompt: Prompt, positions: Array, merge_size: int) -> Array:
  """i32[P, N]; where in the row the patch at another position of the same frame stands.

  Within a frame the order is a formula (`data.layout.lay_out_patches`), so the distance to a
  patch's own index is one too. positions: i32[P, N, 2], in the frame.
  """
  m = merge_size

  def rank(at):  # in its frame
    row, col = at[..., 0], at[..., 1]
    token = row // m * (prompt.patch_grids[..., 1] // m) + col // m
    return token * m**2 + row % m * m + col % m

  own = jnp.arange(prompt.patches.shape[1])
  return own - rank(prompt.patch_positions) + rank(positions)

"""Image corruptions for the `masked` view, under which responses are scored again.

Each corruption is a pure function Prompt -> Prompt. It changes only `patches`, and not the padding.
It applies to the processed image, after resizing, and its parameters are in grey levels from 0 to
255. `black` and `white` are normalized patches of these two levels (`level_patch`).
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
  """Repeats each prompt. The leading axis becomes P·times, with adjacent copies of a prompt."""
  return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), prompt)


def level_patch(
  level: float,
  mean: Sequence[float],
  std: Sequence[float],
  patch_dim: int,
  rescale_factor: float = 1 / LEVELS,
) -> np.ndarray:
  """Returns a patch with one grey level, normalized as by the processor: f32[C·t·p·p].

  Args:
    level: grey level of all pixels, 0 to 255.
    mean, std: `image_mean` and `image_std` of the processor, for each channel.
    patch_dim: C·t·p·p.
    rescale_factor: factor of the grey level before the normalization.
  """
  shift, scale = (np.array(v, np.float32) for v in (mean, std))
  value = (np.float32(level * rescale_factor) - shift) / scale
  return np.repeat(value, patch_dim // len(value))


def black_patches(
  key: Array, prompt: Prompt, rate: float, black: Array, *, block: int = 1, merge_size: int = 1
) -> Prompt:
  """Makes random squares of `block` x `block` patches black, each with probability `rate`.

  The grid of squares starts at the upper left corner of the processed image. Squares at the right
  and lower border may be smaller. The frames of a video have independent masks.

  The released code of VPPO (`random_patch_blackening`) uses squares of 14 pixels after resizing,
  which is one patch of the vision tower, rate 0.5, and an independent mask for each sample. PAPO
  masks the original image before resizing, with rate 0.6 and one mask per prompt.

  Args:
    key: a key of jax.random, or one key for each prompt.
    prompt: P prompts.
    rate: probability that a square is black.
    black: f32[C·t·p·p]; a black patch (`level_patch`).
    block: side of a square in patches of the vision tower.
    merge_size: the merge_size² patches of a visual token are adjacent. Needed if block > 1.
  """
  count = prompt.patches.shape[1]
  hit = jax.vmap(lambda key: jax.random.bernoulli(key, rate, (count,)))(_row_keys(key, prompt))
  if block > 1:  # a square has the random value of its upper left patch
    corner = prompt.patch_positions // block * block
    hit = jnp.take_along_axis(hit, _patch_index(prompt, corner, merge_size), axis=1)
  return _replace(prompt, hit, black)


def salient_patches(
  prompt: Prompt, saliency: Array, rate: float, black: Array, *, block: int = 1, merge_size: int = 1
) -> Prompt:
  """Makes the ⌈rate · n⌉ of n squares with the largest mean saliency black, in each image.

  The squares are those of `black_patches`. The mean of a square at the border is over its existing
  patches. The squares of each frame of a video are ranked separately. Among squares with equal
  saliency, the first in reading order comes first. There is no randomness, so all samples of a
  prompt share one view.

  PAPO (arXiv 2507.06448) compares this with random patches. Its saliency is the self-attention of
  DINOv2, and its code for this is not released.

  Args:
    prompt: P prompts.
    saliency: f32[P, N]; saliency of each patch (`VLM.saliency`). Values at padding have no effect.
    rate: share of black squares.
    black: f32[C·t·p·p]; a black patch (`level_patch`).
    block: side of a square in patches of the vision tower.
    merge_size: the merge_size² patches of a visual token are adjacent. Needed if block > 1.
  """
  place, grid = (jnp.asarray(a) for a in (prompt.patch_positions, prompt.patch_grids))
  segments = jnp.asarray(prompt.patch_segments)
  real = segments > 0
  corner = place // block * block
  mean, squares = jax.lax.stop_gradient(jnp.where(real, saliency, 0.0)), grid
  if block > 1:
    for axis in range(2):  # sums over the rows, then over the columns of each square

      def add(step, total, axis=axis, values=mean):
        there = corner[..., axis] + step
        at = place.at[..., axis].set(there)
        index = jnp.clip(_patch_index(prompt, at, merge_size), 0, place.shape[1] - 1)
        value = jnp.take_along_axis(values, index, axis=1)
        return total + jnp.where(there < grid[..., axis], value, 0.0)

      mean = jax.lax.fori_loop(0, block, add, jnp.zeros_like(mean))
    mean = mean / jnp.minimum(grid - corner, block).prod(axis=-1)
    squares = -(-grid // block)

  # Sort the squares, each represented by its upper left patch: by image, then by decreasing
  # saliency. All other patches come last.
  own = jnp.broadcast_to(jnp.arange(place.shape[1]), segments.shape)
  stands = real & (place == corner).all(axis=-1)
  image = jnp.where(stands, segments, np.iinfo(np.int32).max)
  reading = place[..., 0] * grid[..., 1] + place[..., 1]
  image, _, _, order = jax.lax.sort((image, -mean, reading, own), num_keys=3)
  first = image != jnp.pad(image, ((0, 0), (1, 0)))[:, :-1]  # first square of its image
  rank = own - jax.lax.cummax(jnp.where(first, own, 0), axis=1)
  rank = jnp.take_along_axis(rank, jnp.argsort(order, axis=1), axis=1)

  # Computed on the host in float64, so that ⌈0.4 · 5⌉ is 2 on every device.
  counts = np.ceil(np.round(rate * np.arange(place.shape[1] + 1), 9)).astype(np.int32)
  hit = stands & (rank < jnp.asarray(counts)[squares.prod(axis=-1)])
  if block > 1:
    hit = jnp.take_along_axis(hit, _patch_index(prompt, corner, merge_size), axis=1)
  return _replace(prompt, hit, black)


def solid(prompt: Prompt, level: float, black: Array, white: Array) -> Prompt:
  """Gives all pixels of all images the grey level `level`, from 0 to 255.

      y = black + level / 255 · (white − black)

  The released code of VPPO has this corruption with level 128 (`complete_masking`), but its runs
  use patches. The normalization is affine, so levels between black and white are interpolated.

  Args:
    prompt: P prompts.
    level: grey level. Level 0 does not use `white`.
    black, white: f32[C·t·p·p]; `level_patch` of 0 and 255.
  """
  grey = black if level == 0 else black + level / LEVELS * (white - black)
  return _replace(prompt, True, grey)


def noise(
  key: Array, prompt: Prompt, std: float, black: Array, white: Array, patch_shape: PatchShape
) -> Prompt:
  """Adds Gaussian noise to each pixel and channel, and clips the result to valid pixels.

      x′ = clip(x + std · ε, 0, 255),  ε ~ N(0, 1),  x in grey levels

  The released code of VPPO has this corruption with std 189 (`add_gaussian_noise`), but its runs
  use patches. It rounds x′ down to whole levels; this function does not. The frames of a temporal
  patch share ε, because a still image becomes noisy before it is repeated. This holds for videos
  too.

  Args:
    key: a key of jax.random, or one key for each prompt.
    prompt: P prompts.
    std: standard deviation in grey levels.
    black, white: f32[C·t·p·p]; `level_patch` of 0 and 255.
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
  """Blurs each frame with a Gaussian. The pixels at its border are repeated beyond the border.

      x′[i] = Σ_j w_j x[i + j],  w_j ∝ exp(−j² / 2 radius²),  |j| ≤ ⌈3 radius⌉

  along rows, then along columns. The weights add up to 1 and the normalization is affine, so the
  blur applies to normalized pixels directly.

  The released code of VPPO has this corruption with radius 6 (`gaussian_blur`), but its runs use
  patches. It uses the filter of Pillow, which approximates the Gaussian by three box filters,
  repeats the border for each of them, and rounds to whole levels.

  The image is never assembled: the index of a neighbouring patch follows from row, column and grid,
  and a gather reads it.

  Args:
    prompt: P prompts.
    radius: standard deviation in pixels.
    patch_shape: (C, t, p, p) of one patch.
    merge_size: the merge_size² patches of a visual token are adjacent.
  """
  c, t, p, _ = patch_shape
  reach = math.ceil(3 * radius)
  weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / radius) ** 2)
  weights = np.append(weights / weights.sum(), 0)  # the weight of pixels out of reach
  far = math.ceil(reach / p)  # patches on either side

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
  """Returns one key per prompt, so that the mask of a prompt does not depend on other prompts."""
  return key if key.ndim else jax.random.split(key, prompt.patches.shape[0])


def _replace(prompt: Prompt, where: Array | bool, patches: Array) -> Prompt:
  """Replaces the patches for which `where`, bool[P, N], is true, except padding."""
  chosen = (jnp.asarray(prompt.patch_segments) > 0) & where
  return dataclasses.replace(
    prompt, patches=jnp.where(chosen[..., None], patches, prompt.patches), features=None
  )


def _patch_index(prompt: Prompt, positions: Array, merge_size: int) -> Array:
  """Returns the index of the patch at another position of the same frame: i32[P, N].

  `data.layout.lay_out_patches` defines the order of the patches of a frame. The difference between
  the ranks of two positions is the difference between their indices.

  Args:
    prompt: P prompts.
    positions: i32[P, N, 2]; row and column in the frame.
    merge_size: the merge_size² patches of a visual token are adjacent.
  """
  m = merge_size

  def rank(at):  # in the order of the frame
    row, col = at[..., 0], at[..., 1]
    token = row // m * (prompt.patch_grids[..., 1] // m) + col // m
    return token * m**2 + row % m * m + col % m

  own = jnp.arange(prompt.patches.shape[1])
  return own - rank(prompt.patch_positions) + rank(positions)

"""Which blocks of which responses pass through the model together. Host work, numpy only.

Responses are cut into blocks of B tokens; what lies behind a response's end is no block at all.
"""

import dataclasses

import numpy as np


def block_shape(max_tokens: int, kernel: bool) -> tuple[int, int]:
  """(B, W): tokens of a block, and blocks of one prompt whose queries read its keys together.

  Small blocks hold little padding. Where no `kernel` computes attention, larger ones and tiles of
  some make fewer steps of it.
  """
  if kernel:
    return min(max_tokens, 16), 1
  return min(max_tokens, max(16, min(32, max_tokens // 16))), 4


@dataclasses.dataclass(frozen=True)
class Packer:
  """Fills parts of N blocks with whole responses.

  Attributes:
    splits: pieces of the batch that are worked through one after another, strided over prompts.
    devices: R; each has P / (splits · R) neighbouring prompts of a piece.
    size: B, tokens of a block.
    room: N, blocks of a part on each device.
    tile: W; where a prompt's responses begin in a part is a multiple of W, so that no tile of W
      blocks holds two prompts. N is a multiple too.
  """

  splits: int
  devices: int
  size: int
  room: int
  tile: int = 1

  def __call__(self, lengths: np.ndarray, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """index i32[splits, parts, R, N] and used i32[splits], from lengths i[P, G].

    `index`: of `models.decoder.Blocks`; `used`: how many parts of the piece hold anything. There
    are as many parts as the longest responses would need.
    """
    p, g = lengths.shape
    each = -(-max_tokens // self.size)
    here = p // self.splits // self.devices
    most = -(-each // self.tile) * self.tile
    if self.room < most or self.room % self.tile:
      raise ValueError(
        f"room={self.room}: expected a multiple of tile={self.tile}, at least the "
        f"{most} blocks of {self.size} tokens of a response of "
        f"max_tokens={max_tokens}"
      )
    parts = -(-here * g // (self.room // most))
    index = np.full((self.splits, parts, self.devices, self.room), here * g * each, np.int32)
    used = np.zeros(self.splits, np.int32)
    # A piece holds the prompts i · splits + piece.
    blocks = -(-lengths // self.size).reshape(self.devices, here, self.splits, g)
    for piece in range(self.splits):
      for device in range(self.devices):
        count = self._fill(blocks[device, :, piece], each, index[piece, :, device])
        used[piece] = max(used[piece], count)
    return index, used

  def _fill(self, blocks: np.ndarray, each: int, index: np.ndarray) -> int:
    """Responses of long groups first, each into the first part that has room; blocks: i[P', G].

    Returns the parts used.
    """
    taken: list[int] = []
    for prompt in np.argsort(-blocks.sum(axis=1), kind="stable"):
      begun: set[int] = set()  # parts in which this prompt stands last
      for sample in np.argsort(-blocks[prompt], kind="stable"):
        count = int(blocks[prompt, sample])
        if not count:
          break
        starts = (n if i in begun else -(-n // self.tile) * self.tile for i, n in enumerate(taken))
        part, start = next(
          ((i, n) for i, n in enumerate(starts) if n + count <= self.room), (len(taken), 0)
        )
        if part == len(taken):
          taken.append(0)
        response = prompt * blocks.shape[1] + sample
        index[part, start : start + count] = response * each + np.arange(count)
        taken[part] = start + count
        begun.add(part)
    return len(taken)


def balanced(
  loads: np.ndarray, devices: int, microbatches: int, minibatches: int = 1
) -> np.ndarray:
  """An order of prompts in which devices have about as much to do in each piece. i32[P].

  A piece takes as long as its fullest device, so prompts of similar load share one, and are dealt
  to devices back and forth. Nobody leaves its minibatch, the prompts i · minibatches + j.

  Args:
    loads: [P]; tokens of each prompt's responses.
    devices: R.
    microbatches: pieces of a minibatch, strided over prompts as in `Packer`.
    minibatches: of the batch.
  """
  here = len(loads) // (devices * microbatches * minibatches)
  order = np.zeros((devices, here, microbatches, minibatches), np.int32)
  for j in range(minibatches):
    members = np.arange(j, len(loads), minibatches)
    members = members[np.argsort(-loads[members], kind="stable")]
    dealt = members.reshape(microbatches, here, devices)
    dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
    order[..., j] = dealt.transpose(2, 1, 0)
  return order.reshape(-1)

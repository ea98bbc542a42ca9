"""Which blocks of which responses pass through the model together. Host work, numpy only.

Responses are cut into blocks of B tokens; what lies behind a response's end is no block at all.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packer:
  """Fills parts of N blocks with whole responses.

  Attributes:
    splits: pieces of the batch that are worked through one after another, strided over prompts.
    devices: R; each has P / (splits · R) neighbouring prompts of a piece.
    size: B, tokens of a block.
    room: N, blocks of a part on each device.
  """

  splits: int
  devices: int
  size: int
  room: int

  def __call__(self, lengths: np.ndarray, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """index i32[splits, parts, R, N] and used i32[splits], from lengths i[P, G].

    `index`: of `models.decoder.Blocks`; `used`: how many parts of the piece hold anything. There
    are as many parts as the longest responses would need.
    """
    p, g = lengths.shape
    each = -(-max_tokens // self.size)
    here = p // self.splits // self.devices
    if self.room < each:
      raise ValueError(f"room={self.room}: expected at least the {each} blocks of {self.size} "
                       f"tokens of a response of max_tokens={max_tokens}")
    parts = -(-here * g // (self.room // each))
    index = np.full((self.splits, parts, self.devices, self.room), here * g * each, np.int32)
    used = np.zeros(self.splits, np.int32)
    # A piece holds the prompts i · splits + piece.
    blocks = -(-lengths // self.size).reshape(self.devices, here, self.splits, g)
    for piece in range(self.splits):
      for device in range(self.devices):
        count = self._fill(blocks[device, :, piece].reshape(-1), each, index[piece, :, device])
        used[piece] = max(used[piece], count)
    return index, used

  def _fill(self, blocks: np.ndarray, each: int, index: np.ndarray) -> int:
    """Long responses first, each into the first part that has room. Returns the parts used."""
    taken: list[int] = []
    for response in np.argsort(-blocks, kind="stable"):
      count = int(blocks[response])
      if not count:
        break
      part = next((i for i, n in enumerate(taken) if n + count <= self.room), len(taken))
      if part == len(taken):
        taken.append(0)
      index[part, taken[part]:taken[part] + count] = response * each + np.arange(count)
      taken[part] += count
    return len(taken)

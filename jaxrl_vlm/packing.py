"""Packing: which blocks of response tokens the model processes together. Runs on the host (numpy).

Each response is divided into blocks of B tokens. Only blocks with response tokens are packed, so
padding exists only in the last block of each response. A pass processes N blocks on each device.
"""

import dataclasses

import numpy as np


def block_shape(max_tokens: int, kernel: bool) -> tuple[int, int]:
  """Returns (B, W): tokens per block, and blocks per tile.

  The blocks of a tile belong to the same prompt, and attention reads the keys of the prompt once
  for all of them. Small blocks contain little padding. Without an attention kernel, larger blocks
  and tiles reduce the number of steps of the attention loop.
  """
  if kernel:
    return min(max_tokens, 16), 1
  return min(max_tokens, max(16, min(32, max_tokens // 16))), 4


@dataclasses.dataclass(frozen=True)
class Packer:
  """Packs responses into passes of N blocks per device.

  Attributes:
    splits: number of microbatches in the batch. They are processed one after another, and
      microbatch i has the prompts i, i + splits, ...
    devices: R. Each device has P / (splits · R) consecutive prompts of a microbatch.
    size: B, tokens per block.
    room: N, blocks of a pass on each device. A multiple of `tile`.
    tile: W. In a pass, the responses of each prompt begin at a multiple of W blocks, so that no
      tile contains blocks of two prompts.
  """

  splits: int
  devices: int
  size: int
  room: int
  tile: int = 1

  def __call__(self, lengths: np.ndarray, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs responses.

    Args:
      lengths: i[P, G], tokens of each response.
      max_tokens: maximum number of tokens of a response.

    Returns:
      index: i32[splits, passes, R, N], see `models.decoder.Blocks`. The number of passes is enough
        for responses that all have the maximum length.
      used: i32[splits], number of passes that contain any blocks.

    Raises:
      ValueError: a response may not fit into a pass.
    """
    p, g = lengths.shape
    each = -(-max_tokens // self.size)
    prompts_per_device = p // self.splits // self.devices
    most = -(-each // self.tile) * self.tile
    if self.room < most or self.room % self.tile:
      raise ValueError(
        f"room={self.room}: expected a multiple of tile={self.tile}, at least the "
        f"{most} blocks of {self.size} tokens of a response of "
        f"max_tokens={max_tokens}"
      )
    passes = -(-prompts_per_device * g // (self.room // most))
    index = np.full(
      (self.splits, passes, self.devices, self.room), prompts_per_device * g * each, np.int32
    )
    used = np.zeros(self.splits, np.int32)
    blocks = -(-lengths // self.size).reshape(self.devices, prompts_per_device, self.splits, g)
    for microbatch in range(self.splits):
      for device in range(self.devices):
        count = self._fill(blocks[device, :, microbatch], each, index[microbatch, :, device])
        used[microbatch] = max(used[microbatch], count)
    return index, used

  def _fill(self, blocks: np.ndarray, each: int, index: np.ndarray) -> int:
    """Packs the responses of one device, with blocks i[P', G]; returns the number of passes used.

    The groups with the most blocks come first. Each response goes into the first pass with enough
    room.
    """
    taken: list[int] = []
    for prompt in np.argsort(-blocks.sum(axis=1), kind="stable"):
      begun: set[int] = set()  # passes whose last response belongs to this prompt
      for sample in np.argsort(-blocks[prompt], kind="stable"):
        count = int(blocks[prompt, sample])
        if not count:
          break
        starts = (n if i in begun else -(-n // self.tile) * self.tile for i, n in enumerate(taken))
        number, start = next(
          ((i, n) for i, n in enumerate(starts) if n + count <= self.room), (len(taken), 0)
        )
        if number == len(taken):
          taken.append(0)
        response = prompt * blocks.shape[1] + sample
        index[number, start : start + count] = response * each + np.arange(count)
        taken[number] = start + count
        begun.add(number)
    return len(taken)


def balanced(
  loads: np.ndarray, devices: int, microbatches: int, minibatches: int = 1
) -> np.ndarray:
  """Returns an order of the prompts that balances the load of devices: i32[P].

  A microbatch takes as long as the device with the most tokens. So prompts with similar load share
  a microbatch, and are assigned to the devices in alternating direction. Each prompt stays in its
  minibatch: minibatch j has the prompts j, j + minibatches, ...

  Args:
    loads: [P], number of tokens of all responses of each prompt.
    devices: R.
    microbatches: number of microbatches of a minibatch.
    minibatches: number of minibatches of the batch.
  """
  prompts_per_device = len(loads) // (devices * microbatches * minibatches)
  order = np.zeros((devices, prompts_per_device, microbatches, minibatches), np.int32)
  for j in range(minibatches):
    members = np.arange(j, len(loads), minibatches)
    members = members[np.argsort(-loads[members], kind="stable")]
    dealt = members.reshape(microbatches, prompts_per_device, devices)
    dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
    order[..., j] = dealt.transpose(2, 1, 0)
  return order.reshape(-1)

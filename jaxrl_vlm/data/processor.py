"""Chat messages and images to `Prompt` arrays, for the Qwen2-VL and Qwen2.5-VL architectures.

The tokenizer and the chat template come from the Hugging Face directory; everything the device
would otherwise have to compute from values (M-RoPE ids, attention windows, where each visual token
goes) is computed here in numpy.

Text from data never becomes a special token: a question that contains `<|image_pad|>` or
`<|im_end|>` is encoded as those characters. Only the chat template writes special tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrl_vlm.data.images import Grid, ImageLike, ImageSettings, preprocess_image
from jaxrl_vlm.example import Example

if TYPE_CHECKING:
  from jaxrl_vlm.types import Prompt

IMAGE_MARK = "<image>"  # in Example.question
PROMPT_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
PATCH_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

# A stretch of text that must not be seen by the chat template or by the search for special tokens,
# written with private-use characters as its index in a list.
_HIDDEN = "\ue000(\\d+)\ue001"

Message = Mapping[str, Any]


class PromptTooLong(ValueError):
  """A prompt, or its images, exceeds the largest bucket; nothing is ever cut."""


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
  """One prompt in numpy, not padded: a row of `Prompt`, whose fields it has.

  Attributes:
    name: of the example, for error messages.
    tokens: i32[L].
    positions: i32[L, 3].
    next_position: the id of the first response token.
    feature_index: i32[L].
    patches: f32[N, C·t·p·p].
    patch_positions: i32[N, 2].
    patch_segments: i32[N], from 1.
    patch_windows: i32[N], from 1.
  """

  name: str
  tokens: np.ndarray
  positions: np.ndarray
  next_position: int
  feature_index: np.ndarray
  patches: np.ndarray
  patch_positions: np.ndarray
  patch_segments: np.ndarray
  patch_windows: np.ndarray


class Processor:
  """Tokenizer, chat template and image settings of one checkpoint.

  Attributes:
    tokenizer: the Hugging Face tokenizer.
    image_settings: sizes, resizing bounds and normalisation of images.
    window_size: side of a vision attention window in pixels; None where the tower has no windows.
    image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: ids.
    end_token_id: `<|im_end|>`, which ends every response.
    eos_token_ids: ids that end sampling, `end_token_id` first.
    pad_token_id: fills tokens after the end.
    image_token_ids_never_sampled: ids a sampler must suppress, sorted: a generated image token
      would have no image features behind it.
    prompt_buckets, patch_buckets: the padded lengths a batch may have, ascending.
  """

  def __init__(
    self,
    tokenizer: Any,
    config: Mapping[str, Any],
    preprocessor_config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    *,
    prompt_buckets: Sequence[int] = PROMPT_BUCKETS,
    patch_buckets: Sequence[int] = PATCH_BUCKETS,
  ):
    """Use `from_pretrained`; the three mappings are the JSON files of the same names."""
    if not tokenizer.chat_template:
      raise ValueError("the tokenizer has no chat template")
    self.tokenizer = tokenizer
    self.image_settings = ImageSettings.from_config(preprocessor_config)
    self._preprocessor_config = dict(preprocessor_config)
    self._generation_config = dict(generation_config or {})

    vision = config.get("vision_config", {})
    self.window_size: int | None = vision.get("window_size")
    for field, ours in (
      ("patch_size", "patch_size"),
      ("temporal_patch_size", "temporal_patch_size"),
      ("spatial_merge_size", "merge_size"),
    ):
      expected = getattr(self.image_settings, ours)
      if vision.get(field, expected) != expected:
        raise ValueError(
          f"config.vision_config.{field}={vision[field]}, but the preprocessor config has "
          f"{ours}={expected}"
        )

    token_side = self.image_settings.patch_size * self.image_settings.merge_size
    if self.window_size is not None and self.window_size < token_side:
      raise ValueError(
        f"config.vision_config.window_size={self.window_size}: expected at least {token_side}, "
        "the side of one visual token"
      )

    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    self._special_ids = added
    self.image_token_id = self._special_id(config, "image_token_id", "<|image_pad|>")
    self.video_token_id = self._special_id(config, "video_token_id", "<|video_pad|>")
    self.vision_start_token_id = self._special_id(
      config, "vision_start_token_id", "<|vision_start|>"
    )
    self.vision_end_token_id = self._special_id(config, "vision_end_token_id", "<|vision_end|>")
    self.image_token_ids_never_sampled = tuple(
      sorted(i for text, i in added.items() if re.search("image|video|vision", text))
    )
    self.end_token_id: int = added.get("<|im_end|>", tokenizer.eos_token_id)
    eos = self._generation_config.get("eos_token_id") or []
    eos = [eos] if isinstance(eos, int) else eos
    self.eos_token_ids: tuple[int, ...] = tuple(
      dict.fromkeys(i for i in (self.end_token_id, *eos, tokenizer.eos_token_id) if i is not None)
    )
    pad = tokenizer.pad_token_id
    self.pad_token_id: int = self.end_token_id if pad is None else pad

    self.prompt_buckets = _ascending("prompt_buckets", prompt_buckets, 1)
    self.patch_buckets = _ascending(
      "patch_buckets", patch_buckets, self.image_settings.merge_size**2
    )

    # Longest first, because regular expressions take the first alternative that matches.
    names = "|".join(re.escape(text) for text in sorted(added, key=len, reverse=True))
    self._special = re.compile(f"({names})")
    self._to_hide = re.compile(f"{names}|{_HIDDEN}")
    # A copy, because the flag is a state of the tokenizer that its other users set too.
    self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
    self._plain.no_truncation()
    self._plain.no_padding()
    self._plain.encode_special_tokens = True

  def __setstate__(self, state: dict[str, Any]):
    self.__dict__.update(state)
    self._plain.encode_special_tokens = True  # pickling (to data workers) forgets it

  def _special_id(self, config: Mapping[str, Any], field: str, text: str) -> int:
    token_id = config.get(field, self._special_ids.get(text))
    if token_id is None or token_id not in self._special_ids.values():
      raise ValueError(f"config.{field}={token_id}: no such special token in the tokenizer")
    return token_id

  @classmethod
  def from_pretrained(
    cls,
    path: str | pathlib.Path,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    prompt_buckets: Sequence[int] = PROMPT_BUCKETS,
    patch_buckets: Sequence[int] = PATCH_BUCKETS,
  ) -> Processor:
    """Reads a Hugging Face directory; `min_pixels` and `max_pixels` override its own."""
    import transformers  # slow to import

    path = pathlib.Path(path)
    preprocessor = _read_json(path / "preprocessor_config.json")
    if preprocessor is None:  # transformers 5 may keep it here instead
      preprocessor = (_read_json(path / "processor_config.json") or {}).get("image_processor")
    config = _read_json(path / "config.json")
    for name, found in (("config.json", config), ("preprocessor_config.json", preprocessor)):
      if found is None:
        raise FileNotFoundError(f"{path / name}: no such file")
    assert config is not None and preprocessor is not None
    for field, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
      if value is not None:
        preprocessor[field] = value
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:  # older checkpoints keep it apart
      tokenizer.chat_template = (_read_json(path / "chat_template.json") or {}).get("chat_template")
    return cls(
      tokenizer,
      config,
      preprocessor,
      _read_json(path / "generation_config.json"),
      prompt_buckets=prompt_buckets,
      patch_buckets=patch_buckets,
    )

  def save_pretrained(self, path: str | pathlib.Path) -> None:
    """Writes tokenizer, chat template, preprocessor_config.json and generation_config.json.

    The preprocessor config holds the pixel bounds in use. `config.json`, which `from_pretrained`
    also needs, is the model's to write.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    self.tokenizer.save_pretrained(path)
    bounds = self.image_settings.min_pixels, self.image_settings.max_pixels
    preprocessor = self._preprocessor_config | {
      "min_pixels": bounds[0],
      "max_pixels": bounds[1],
      "size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]},
    }
    _write_json(path / "preprocessor_config.json", preprocessor)
    if self._generation_config:
      _write_json(path / "generation_config.json", self._generation_config)

  def __call__(
    self,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    images: Sequence[Any] | None = None,
  ) -> Prompt:
    """One conversation or a list of them -> `Prompt` with numpy leaves, P = conversations.

    Args:
      messages: dicts with `role` and `content`, the content a string or a list of
        `{"type": "image"}` and `{"type": "text", "text": ...}`.
      images: bytes, Pillow images or u8[H, W, 3] arrays in order of appearance; for a list of
        conversations, one such list for each.

    Raises:
      ImageError, PromptTooLong: both name the conversation by its index.
      ValueError: the number of images is not what the messages say.
    """
    if not messages:
      raise ValueError("messages=[]: expected at least one message")
    conversations: Any = messages
    if isinstance(messages[0], Mapping):
      conversations, images = [messages], [images]
    images = [None] * len(conversations) if images is None else images
    if len(images) != len(conversations):
      raise ValueError(f"{len(conversations)} conversations, but {len(images)} lists of images")
    return self.collate([
      self.encode_messages(messages, () if row is None else row, name=f"conversation {i}")
      for i, (messages, row) in enumerate(zip(conversations, images, strict=True))
    ])

  def encode(self, example: Example, system: str | None = None) -> EncodedPrompt:
    """The question of an example as a user turn, after a system turn when given.

    Raises: as `__call__`; also ValueError when the question has `<image>` marks and their number
      is not the number of images.
    """
    name = f"example {example.id!r}"
    pieces = example.question.split(IMAGE_MARK)
    if len(pieces) == 1:
      pieces = [""] * len(example.images) + pieces
    elif len(pieces) - 1 != len(example.images):
      raise ValueError(
        f"{name}: {len(pieces) - 1} {IMAGE_MARK} marks in the question, "
        f"but {len(example.images)} images"
      )
    content: list[Message] = []
    for i, piece in enumerate(pieces):
      if i:
        content.append({"type": "image"})
      if piece:
        content.append({"type": "text", "text": piece})
    messages: list[Message] = []
    if system is not None:
      messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": content})
    return self.encode_messages(messages, example.images, name)

  def encode_messages(
    self,
    messages: Sequence[Message],
    images: Sequence[ImageLike] = (),
    name: str = "conversation",
  ) -> EncodedPrompt:
    """One conversation up to the header of the assistant's turn; raises as `__call__`."""
    ids = np.asarray(self._encode_chat(messages), np.int32)
    marks = int((ids == self.image_token_id).sum())
    if marks != len(images):
      raise ValueError(f"{name}: {marks} images in the messages, but {len(images)} given")
    if (ids == self.video_token_id).any():
      raise ValueError(f"{name}: video input is not supported")
    settings = self.image_settings
    encoded = [
      preprocess_image(image, settings, f"{name}, image {i}") for i, image in enumerate(images)
    ]
    grids = [grid for _, grid in encoded]
    tokens, positions, feature_index = expand_images(
      ids, grids, self.image_token_id, settings.merge_size
    )
    patch_positions, segments, windows = lay_out_patches(
      grids, settings.merge_size, settings.patch_size, self.window_size
    )
    _fit(len(tokens), self.prompt_buckets, "tokens", "prompt_buckets", name)
    _fit(len(segments), self.patch_buckets, "image patches", "patch_buckets", name)
    return EncodedPrompt(
      name=name,
      tokens=tokens,
      positions=positions,
      next_position=int(positions.max()) + 1,
      feature_index=feature_index,
      patches=np.concatenate(
        [np.zeros((0, settings.patch_dim), np.float32), *(patches for patches, _ in encoded)]
      ),
      patch_positions=patch_positions,
      patch_segments=segments,
      patch_windows=windows,
    )

  def collate(
    self,
    prompts: Sequence[EncodedPrompt],
    prompt_length: int | None = None,
    num_patches: int | None = None,
  ) -> Prompt:
    """Rows -> `Prompt` [P, ...], padded to the given sizes or to the smallest buckets that fit.

    Without any image there is still the smallest bucket of patches, all padding.

    Raises:
      PromptTooLong: a row does not fit; names the example, its size and the limit.
    """
    from jaxrl_vlm.types import Prompt  # imports jax, which data workers must not

    if not prompts:
      raise ValueError("collate: expected at least one prompt")
    longest = max(prompts, key=lambda p: len(p.tokens))
    largest = max(prompts, key=lambda p: len(p.patches))
    length = _fit(
      len(longest.tokens),
      self.prompt_buckets if prompt_length is None else (prompt_length,),
      "tokens",
      "prompt_buckets",
      longest.name,
    )
    count = _fit(
      len(largest.patches),
      self.patch_buckets if num_patches is None else (num_patches,),
      "image patches",
      "patch_buckets",
      largest.name,
    )

    def stack(field: str, size: int, fill: int = 0) -> np.ndarray:
      rows = [getattr(prompt, field) for prompt in prompts]
      out = np.full((len(rows), size, *rows[0].shape[1:]), fill, rows[0].dtype)
      for padded, row in zip(out, rows, strict=True):
        padded[: len(row)] = row
      return out

    return Prompt(
      tokens=stack("tokens", length, self.pad_token_id),
      length=np.array([len(p.tokens) for p in prompts], np.int32),
      positions=stack("positions", length),
      next_position=np.array([p.next_position for p in prompts], np.int32),
      feature_index=stack("feature_index", length, -1),
      patches=stack("patches", count),
      patch_positions=stack("patch_positions", count),
      patch_segments=stack("patch_segments", count),
      patch_windows=stack("patch_windows", count),
    )

  @property
  def black_patch(self) -> np.ndarray:
    """f32[C·t·p·p]; a black patch as images are normalised."""
    settings = self.image_settings
    mean, std = (np.array(v, np.float32) for v in (settings.image_mean, settings.image_std))
    black = -mean / std
    return np.repeat(black, settings.patch_dim // len(black))

  def encode_target(self, text: str) -> list[int]:
    """Token ids of a response to imitate, `<|im_end|>` last; special tokens in it stay text."""
    return [*self._encode_plain(text), self.end_token_id]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """i[T] -> text without special tokens."""
    ids = np.asarray(ids).tolist()
    return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

  def _encode_plain(self, text: str) -> list[int]:
    return self._plain.encode(text, add_special_tokens=False).ids

  def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
    """Token ids of the rendered chat, special tokens only where the template wrote them."""
    hidden: list[str] = []
    rendered = self.tokenizer.apply_chat_template(
      self._hide(messages, hidden), tokenize=False, add_generation_prompt=True
    )
    ids = []
    for text in self._special.split(rendered):
      if text in self._special_ids:
        ids.append(self._special_ids[text])
      elif text:
        if hidden:
          text = re.sub(_HIDDEN, lambda match: hidden[int(match[1])], text)
        ids.extend(self._encode_plain(text))
    return ids

  def _hide(self, value: Any, hidden: list[str]) -> Any:
    """`value` with every special token inside a string replaced by a reference into `hidden`."""

    def refer(text: str) -> str:
      hidden.append(text)
      return f"\ue000{len(hidden) - 1}\ue001"

    if isinstance(value, str):
      return self._to_hide.sub(lambda match: refer(match[0]), value)
    if isinstance(value, Mapping):
      return {key: self._hide(item, hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      items = [self._hide(item, hidden) for item in value]
      # Two texts without anything between them could make a special token together.
      for before, item in zip(items, items[1:], strict=False):
        if _is_text(before) and _is_text(item):
          item["text"] = refer("") + item["text"]
      return items
    return value


def expand_images(
  ids: np.ndarray, grids: Sequence[Grid], image_token_id: int, merge_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Each image token becomes as many as its image has visual tokens, and all get M-RoPE ids.

  A text token has one id on all three axes; an image's tokens have (frame, row, column) ids from
  where the text stopped, and the text goes on after the largest of rows and columns. Equals
  `get_rope_index` of Qwen2_5_VLModel in transformers.

  Args:
    ids: i32[l], one image token for each of the `grids`.
    grids: (frames, rows, columns) of patches.
    image_token_id: the token to expand.
    merge_size: merge_size² patches are one visual token.

  Returns:
    tokens i32[L], positions i32[L, 3], feature_index i32[L] (-1 for text).
  """
  tokens, positions, features = [], [], []
  start = position = feature = 0

  def add_text(end: int):
    tokens.append(ids[start:end])
    line = np.arange(position, position + end - start)
    positions.append(np.repeat(line[:, None], 3, axis=1))
    features.append(np.full(end - start, -1))

  for mark, (frames, rows, cols) in zip(
    np.flatnonzero(ids == image_token_id).tolist(), grids, strict=True
  ):
    add_text(mark)
    position += mark - start
    rows, cols = rows // merge_size, cols // merge_size
    grid = np.indices((frames, rows, cols)).reshape(3, -1).T
    tokens.append(np.full(len(grid), image_token_id))
    positions.append(grid + position)
    features.append(np.arange(feature, feature + len(grid)))
    position += max(rows, cols)
    feature += len(grid)
    start = mark + 1
  add_text(len(ids))
  return (
    np.concatenate(tokens).astype(np.int32),
    np.concatenate(positions).astype(np.int32),
    np.concatenate(features).astype(np.int32),
  )


def lay_out_patches(
  grids: Sequence[Grid], merge_size: int, patch_size: int, window_size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Where each patch is, and with which others it attends.

  Windows are squares of window_size pixels, rounded down to whole visual tokens, cut at the right
  and lower border. Equals `get_vision_position_ids` and, as a partition, `get_vision_window_index`
  of transformers; without window_size a frame is one window.

  Returns:
    patch_positions i32[N, 2] (row, column), patch_segments i32[N] (frames, from 1),
    patch_windows i32[N] (from 1, all images together).
  """
  positions = [np.zeros((0, 2), np.int32)]
  segments = [np.zeros(0, np.int32)]
  windows = [np.zeros(0, np.int32)]
  num_segments = num_windows = 0
  for frames, rows, cols in grids:
    side = max(rows, cols)
    if window_size is not None:
      side = window_size // merge_size // patch_size * merge_size
    down, across = -(-rows // side), -(-cols // side)
    grid = np.indices((rows, cols), dtype=np.int32)
    grid = grid.reshape(2, rows // merge_size, merge_size, cols // merge_size, merge_size)
    grid = grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)  # the patches of one token adjacent
    window = grid[:, 0] // side * across + grid[:, 1] // side
    for _ in range(frames):
      positions.append(grid)
      num_segments += 1
      segments.append(np.full(len(grid), num_segments, np.int32))
      windows.append(window + num_windows + 1)
      num_windows += down * across
  return np.concatenate(positions), np.concatenate(segments), np.concatenate(windows)


def _fit(size: int, buckets: Sequence[int], what: str, field: str, name: str) -> int:
  for bucket in buckets:
    if size <= bucket:
      return bucket
  raise PromptTooLong(f"{name}: {size} {what}, but the largest bucket is {buckets[-1]} "
                      f"(config.{field})")


def _ascending(field: str, buckets: Sequence[int], multiple: int) -> tuple[int, ...]:
  if not buckets or any(b < 1 or b % multiple for b in buckets):
    raise ValueError(f"{field}={tuple(buckets)}: expected positive multiples of {multiple}")
  return tuple(sorted(buckets))


def _is_text(item: Any) -> bool:
  return isinstance(item, dict) and isinstance(item.get("text"), str)


def _read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

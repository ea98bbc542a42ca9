"""Turns chat messages, images and videos into `Prompt` arrays.

The tokenizer, the chat template and all sizes come from the Hugging Face directory. `families.py`
contains what differs between architectures, `chat.py` turns messages into token ids, and
`layout.py` computes everything about patches and visual tokens that does not depend on pixels.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrl_vlm import hf_config
from jaxrl_vlm.data import families
from jaxrl_vlm.data.chat import ChatTokenizer, Message, has_video
from jaxrl_vlm.data.files import ProcessorFiles
from jaxrl_vlm.data.images import ImageLike, PatchSettings, decode_image, preprocess_image
from jaxrl_vlm.data.layout import Visual, expand_visuals, lay_out_patches
from jaxrl_vlm.data.video import Video, VideoSettings, preprocess_video
from jaxrl_vlm.example import Example

if TYPE_CHECKING:
  from jaxrl_vlm.types import Prompt

IMAGE_MARK = "<image>"  # in Example.question
# The largest buckets fit the largest image that the published checkpoints allow.
PROMPT_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PATCH_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


class PromptTooLong(ValueError):
  """Raised if a prompt or its images exceed the largest bucket. Prompts are never truncated."""


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
  """One prompt as numpy arrays without padding. `Prompt` documents the fields.

  Attributes:
    name: Name of the example, used in error messages.
    tokens: i32[L].
    positions: i32[L, 3].
    next_position: Position id of the first response token.
    feature_index: i32[L].
    patches: f32[N, C·t·p·p].
    patch_positions: i32[N, 2].
    patch_grids: i32[N, 2].
    patch_segments: i32[N]. Segments are numbered from 1.
    patch_windows: i32[N]. Windows are numbered from 1.
  """

  name: str
  tokens: np.ndarray
  positions: np.ndarray
  next_position: int
  feature_index: np.ndarray
  patches: np.ndarray
  patch_positions: np.ndarray
  patch_grids: np.ndarray
  patch_segments: np.ndarray
  patch_windows: np.ndarray


class Processor:
  """Tokenizer, chat template and image settings of one checkpoint.

  Attributes:
    tokenizer: The Hugging Face tokenizer.
    family: The parts of prompt preparation that are specific to the architecture.
    image_settings: Sizes and normalisation of images.
    video_settings: Sampling, sizes and normalisation of video frames. None if the model accepts no
      videos.
    window_size: Side of a vision attention window in pixels. None if the vision tower has no
      windows.
    image_token_id: Id in `tokens` of every visual token of an image.
    video_token_id: Id in `tokens` of every visual token of a video. None if the model accepts no
      videos.
    vision_start_token_id, vision_end_token_id: Ids of the tokens before and after visual tokens.
    end_token_id: Id of `<|im_end|>` or `<end_of_turn>`, which ends every response.
    eos_token_ids: Ids that end sampling, `end_token_id` first.
    pad_token_id: Id that fills `tokens` after the end.
    image_token_ids_never_sampled: Ids that a sampler must suppress, sorted. A generated image token
      would have no image features.
    prompt_buckets, patch_buckets: The padded lengths that a batch may have, ascending.
  """

  def __init__(
    self,
    tokenizer: Any,
    family: families.Family,
    files: ProcessorFiles,
    *,
    prompt_buckets: Sequence[int] = PROMPT_BUCKETS,
    patch_buckets: Sequence[int] = PATCH_BUCKETS,
  ):
    """Creates a processor from loaded files. Use `from_pretrained` instead."""
    self.tokenizer = tokenizer
    self.family = family
    self._files = files
    self._chat = ChatTokenizer(tokenizer)

    image_file, config = files.image_processor()
    self.image_settings: PatchSettings = family.image_settings(config, image_file)
    file, config = files.video_processor()
    self.video_settings: VideoSettings | None = family.video_settings(
      config, file, self.image_settings
    )
    self.window_size: int | None = family.window_size(self.image_settings)

    special = self._chat.special_ids
    ids = family.vision_ids(special)
    self.image_token_id: int = ids["IMAGE_TOKEN"]
    self.video_token_id: int | None = ids.get("VIDEO_TOKEN")
    self.vision_start_token_id: int = ids["START_TOKEN"]
    self.vision_end_token_id: int = ids["END_TOKEN"]
    self.image_token_ids_never_sampled = tuple(
      sorted(i for text, i in special.items() if re.search("image|video|vision", text))
    )
    end = special.get(family.END_OF_TURN)
    self.end_token_id: int = tokenizer.eos_token_id if end is None else end
    generation = "generation_config.json"
    eos = hf_config.stop_tokens(files.json(generation), generation)
    self.eos_token_ids: tuple[int, ...] = tuple(
      dict.fromkeys(i for i in (self.end_token_id, *eos, tokenizer.eos_token_id) if i is not None)
    )
    pad = tokenizer.pad_token_id
    self.pad_token_id: int = self.end_token_id if pad is None else pad

    merged = self.image_settings.merge_size**2
    self.prompt_buckets = _ascending("prompt_buckets", prompt_buckets, 1)
    self.patch_buckets = _ascending("patch_buckets", patch_buckets, merged)
    for field, largest, patches, what in (
      ("patch_buckets", self.patch_buckets[-1], 1, "patches"),
      ("prompt_buckets", self.prompt_buckets[-1], merged, "tokens"),
    ):
      count = self.image_settings.max_patches // patches
      if count > largest:
        cause, remedy = self.image_settings.bound(largest * patches)
        raise ValueError(
          f"{image_file}: {cause} allows up to {count} {what} per image, but the largest of "
          f"config.{field} is {largest}; {remedy}"
        )

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
    """Creates a processor from a Hugging Face directory.

    Args:
      path: The directory.
      min_pixels: Smallest area of an image in pixels. None keeps the directory's value.
      max_pixels: Largest area of an image in pixels. None keeps the directory's value.
      prompt_buckets: The padded numbers of prompt tokens that a batch may have.
      patch_buckets: The padded numbers of image patches that a batch may have.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: The files contradict each other, request something that is not supported, or
        allow images that fit no bucket. The message names file, field, value and what was expected.
    """
    import transformers  # slow to import

    path = pathlib.Path(path)
    config = hf_config.read(path)
    files = ProcessorFiles(path)
    files.override_bounds(min_pixels, max_pixels)
    family = families.create(config, files.processor)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if files.chat_template is not None:
      tokenizer.chat_template = files.chat_template
    return cls(tokenizer, family, files, prompt_buckets=prompt_buckets, patch_buckets=patch_buckets)

  def save_pretrained(self, path: str | pathlib.Path) -> None:
    """Writes the files that were read. Only overridden pixel bounds are changed.

    `from_pretrained` also needs `config.json`, which is written with the model.
    """
    self._files.write(path)

  def __call__(
    self,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
  ) -> Prompt:
    """Encodes one conversation or a list of P conversations as a `Prompt` of numpy arrays.

    Args:
      messages: Dicts with `role` and `content`. The content is a string or a list of
        `{"type": "image"}`, `{"type": "video"}` and `{"type": "text", "text": ...}`.
      images: Bytes, Pillow images or u8[H, W, 3] arrays in order of appearance. For a list of
        conversations, a list of images for each conversation.
      videos: `Video` objects in order of appearance, or a list of them for each conversation.

    Raises:
      ImageError: An image or video cannot be used. The message names the conversation by its index.
      PromptTooLong: A conversation fits no bucket. The message names it by its index.
      ValueError: The number of images or videos differs from the number in the messages, or the
        model accepts no videos.
    """
    if not messages:
      raise ValueError("messages=[]: expected at least one message")
    conversations: Any = messages
    if isinstance(messages[0], Mapping):
      conversations, images, videos = [messages], [images], [videos]

    def rows(field: str, given: Sequence[Any] | None) -> list[Sequence[Any]]:
      given = [None] * len(conversations) if given is None else given
      if len(given) != len(conversations):
        raise ValueError(f"{len(conversations)} conversations, but {len(given)} lists of {field}")
      return [() if row is None else row for row in given]

    return self.collate(
      [
        self.encode_messages(messages, images, f"conversation {i}", videos)
        for i, (messages, images, videos) in enumerate(
          zip(conversations, rows("images", images), rows("videos", videos), strict=True)
        )
      ]
    )

  def encode(self, example: Example, system: str | None = None) -> EncodedPrompt:
    """Encodes the question of an example as a user turn.

    Args:
      example: The example. Without any `<image>` mark in its question, the images come first.
      system: Text of a system turn before the user turn, or None for no system turn.

    Raises:
      ValueError: The question has `<image>` marks and their number differs from the number of
        images. Also raises what `__call__` raises.
    """
    name = example.name
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
    videos: Sequence[Video] = (),
  ) -> EncodedPrompt:
    """Encodes one conversation, followed by the header of the assistant's turn.

    Args:
      messages: As in `__call__`.
      images: As in `__call__`, for one conversation.
      name: What error messages call the conversation.
      videos: As in `__call__`, for one conversation.

    Raises:
      ImageError, PromptTooLong, ValueError: As in `__call__`.
    """
    family, settings = self.family, self.image_settings
    if self.video_settings is None and (videos or has_video(messages)):
      raise ValueError(f"{name}: got a video, but {family.config['model_type']} takes only images")
    chat = self._chat.render(messages, name)
    pieces = chat.pieces
    for mark, given, what in (
      (family.IMAGE_MARK, images, "images"),
      (family.VIDEO_MARK, videos, "videos"),
    ):
      marks = pieces[1::2].count(mark)
      if marks != len(given):
        raise ValueError(f"{name}: {marks} {what} in the messages, but {len(given)} given")

    patches = [np.zeros((0, settings.patch_dim), np.float32)]
    visuals: list[Visual] = []
    next_image, next_video = enumerate(images), enumerate(videos)
    for at in range(1, len(pieces), 2):
      if pieces[at] == family.IMAGE_MARK:
        i, image = next(next_image)
        more, stretches, pieces[at] = self._encode_image(image, f"{name}, image {i}")
      elif pieces[at] == family.VIDEO_MARK:
        i, video = next(next_video)
        more, stretches, pieces[at] = self._encode_video(video, f"{name}, video {i}")
      else:
        continue
      patches += more
      visuals += stretches

    # Tokenize after all marks are replaced, because the new text and the text around it may form
    # common tokens.
    ids = np.asarray(self._chat.encode(chat), np.int32)
    tokens, positions, feature_index = expand_visuals(ids, visuals, settings.merge_size)
    if not family.MROPE:
      positions = np.repeat(np.arange(len(tokens), dtype=np.int32)[:, None], 3, axis=1)
    patch_positions, grids, segments, windows = lay_out_patches(
      [visual.grid for visual in visuals],
      settings.merge_size,
      settings.patch_size,
      self.window_size,
    )
    _fit(len(tokens), self.prompt_buckets, "tokens", "prompt_buckets", name)
    _fit(len(segments), self.patch_buckets, "image patches", "patch_buckets", name)
    return EncodedPrompt(
      name=name,
      tokens=tokens,
      positions=positions,
      next_position=int(positions.max()) + 1,
      feature_index=feature_index,
      patches=np.concatenate(patches),
      patch_positions=patch_positions,
      patch_grids=grids,
      patch_segments=segments,
      patch_windows=windows,
    )

  def _encode_image(
    self, image: ImageLike, name: str
  ) -> tuple[list[np.ndarray], list[Visual], str]:
    """Encodes an image: the patches and grids of its views, and the text that replaces its mark."""
    views = self.image_settings.views(decode_image(image, name))
    encoded = [preprocess_image(view, self.image_settings, name) for view in views]
    visuals = [Visual(grid, self.image_token_id) for _, grid in encoded]
    return [patches for patches, _ in encoded], visuals, self.family.image_text(len(views))

  def _encode_video(self, video: Video, name: str) -> tuple[list[np.ndarray], list[Visual], str]:
    """Encodes a video: its patches and grids, and the text that replaces its mark."""
    assert self.video_settings is not None and self.video_token_id is not None
    patches, grid, indices = preprocess_video(video, self.video_settings, name)
    visuals = [
      Visual(stretch, self.video_token_id, step)
      for stretch, step in self.family.video_stretches(grid, video, len(indices))
    ]
    times = families.group_times(indices, video.fps, self.image_settings.temporal_patch_size)
    return [patches], visuals, self.family.video_text(times)

  def sizes(self, prompts: Sequence[EncodedPrompt]) -> list[int]:
    """Returns the smallest prompt bucket and the smallest patch bucket that fit all prompts.

    Without prompts, these are the smallest buckets.
    """
    return [
      min(bucket for bucket in buckets if bucket >= max(map(len, lengths), default=0))
      for buckets, lengths in (
        (self.prompt_buckets, [p.tokens for p in prompts]),
        (self.patch_buckets, [p.patches for p in prompts]),
      )
    ]

  def collate(
    self,
    prompts: Sequence[EncodedPrompt],
    prompt_length: int | None = None,
    num_patches: int | None = None,
  ) -> Prompt:
    """Stacks P encoded prompts into a `Prompt` whose arrays begin with an axis P.

    If no prompt has an image, the batch still has the smallest bucket of patches, all padding.

    Args:
      prompts: The encoded prompts, at least one.
      prompt_length: Number of tokens to pad to. By default the smallest bucket that fits.
      num_patches: Number of patches to pad to. By default the smallest bucket that fits.

    Raises:
      PromptTooLong: A prompt does not fit. The message names the example, its size and the limit.
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
      patch_grids=stack("patch_grids", count, 1),
      patch_segments=stack("patch_segments", count),
      patch_windows=stack("patch_windows", count),
    )

  @property
  def black_patch(self) -> np.ndarray:
    """A black patch, normalised like the patches of images: f32[C·t·p·p]."""
    settings = self.image_settings
    mean, std = (np.array(v, np.float32) for v in (settings.image_mean, settings.image_std))
    black = -mean / std
    return np.repeat(black, settings.patch_dim // len(black))

  def encode_target(self, text: str) -> list[int]:
    """Returns the token ids of a target response, followed by `end_token_id`.

    Special tokens in `text` are encoded as ordinary text.
    """
    return [*self._chat.encode_plain(text), self.end_token_id]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Decodes token ids i[T] to text without special tokens."""
    ids = np.asarray(ids).tolist()
    return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _fit(size: int, buckets: Sequence[int], what: str, field: str, name: str) -> int:
  for bucket in buckets:
    if size <= bucket:
      return bucket
  raise PromptTooLong(
    f"{name}: {size} {what}, but the largest bucket is {buckets[-1]} (config.{field})"
  )


def _ascending(field: str, buckets: Sequence[int], multiple: int) -> tuple[int, ...]:
  if not buckets or any(b < 1 or b % multiple for b in buckets):
    raise ValueError(f"{field}={tuple(buckets)}: expected positive multiples of {multiple}")
  return tuple(sorted(buckets))

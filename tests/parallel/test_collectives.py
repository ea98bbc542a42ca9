"""Tests which collectives the programs of a step contain.

Devices gather the weights of one layer at a time, and few other arrays.
"""

import collections
import re

import jax
import numpy as np
import optax
import pytest

from jaxrl_vlm import models, objectives, parallel
from jaxrl_vlm.planning import hlo
from jaxrl_vlm.rollout import Sampling
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience, TokenStats

G, T, LENGTH, PATCHES = 2, 8, 24, 96
VOCAB, WIDTH, HIDDEN, LAYERS = 2048, 32, 64, 3
TOWER, TOWER_HIDDEN = 16, 48
VOCAB_BLOCKS = 8  # blocks of 256 tokens, whose cumulative sums `sampling.sample_index` computes
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# The largest number of collectives of each kind in the text of each program, in the order of KINDS.
# A collective in a loop counts once. The case "fsdp x tensor" shards the weights for rollouts over
# four devices (`rollout.tensor`). In all other cases, rollouts use the sharding of training.
COMMON = {
  "init_state": (0, 0, 0, 0, 0),
  "advantages": (0, 0, 0, 0, 0),
  "compare": (0, 3, 0, 0, 0),
  "score_reference": (6, 4, 4, 0, 10),
  "compact": (0, 0, 0, 0, 0),
}
WITH_TENSOR = COMMON | {
  "see": (13, 5, 0, 0, 0),
  "score": (25, 8, 4, 1, 11),
  "score_masked": (37, 13, 4, 1, 14),
}
WITHOUT_TENSOR = COMMON | {
  "see": (8, 0, 0, 0, 0),
  "score": (20, 4, 4, 0, 10),
  "score_masked": (28, 5, 4, 0, 13),
  "update": (61, 20, 5, 0, 15),
  "prefill": (9, 1, 1, 0, 0),
  "decode": (10, 2, 1, 0, 0),
}
COUNTS = {
  "fsdp": WITHOUT_TENSOR,
  "fsdp, minibatches": WITHOUT_TENSOR,
  "slice x fsdp": WITHOUT_TENSOR
  | {"see": (8, 1, 0, 0, 0), "update": (61, 25, 5, 0, 15), "decode": (10, 2, 1, 1, 0)},
  "fsdp x tensor": WITH_TENSOR
  | {
    "update": (84, 40, 5, 4, 18),
    "reshard": (30, 0, 0, 20, 30),
    "prefill": (0, 5, 0, 0, 0),
    "decode": (4, 12, 0, 0, 0),
  },
  "slice x fsdp x tensor": WITH_TENSOR
  | {"update": (84, 45, 5, 4, 18), "prefill": (9, 5, 1, 0, 0), "decode": (13, 12, 1, 1, 1)},
}


def lowered(axes, tensor, p, splits):
  """Lowers all programs of a step of VPPO with a reference.

  Args:
    axes: sizes of the axes of the mesh.
    tensor: `rollout.tensor`.
    p: P.
    splits: number of minibatches, and number of microbatches of each minibatch.

  Returns:
    The abstract parameters, the shape [R, N, B] of packed responses, and the lowered programs by
    name.
  """
  config = models.from_hf(
    {
      "model_type": "qwen2_5_vl",
      "image_token_id": 1990,
      "eos_token_id": 1991,
      "text_config": {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_theta": 1e6},
      },
      "vision_config": {
        "depth": 2,
        "hidden_size": TOWER,
        "intermediate_size": TOWER_HIDDEN,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [1],
      },
    },
    dtype="float32",
  )
  params, shape = models.abstract_params(config), jax.ShapeDtypeStruct
  programs = Programs(
    models.VLM(config),
    parallel.make_mesh(axes),
    objectives.create("vppo", kl_coef=0.1),
    optax.adamw(1e-3),
    params,
    microbatches=splits,
    minibatches=splits,
    sampling=Sampling(G, T),
    rollout={"tensor": tensor, "layers": LAYERS},
    black=np.zeros(config.vision.patch_dim, np.float32),
  )
  prompt = jax.tree.map(
    lambda x: shape(x.shape, x.dtype), models.dummy_prompt(config, p, LENGTH, PATCHES)
  )
  tokens, mask, number = (shape((p, G, T), d) for d in ("int32", "bool", "float32"))
  key = jax.eval_shape(lambda: jax.random.key(0))
  stats = TokenStats(number, number)
  experience = Experience(
    mask=mask,
    advantages=number,
    old=stats,
    rewards=shape((p, G), "float32"),
    views=dict.fromkeys(programs.objective.views, stats),
  )
  packing = jax.tree.map(
    lambda x: shape(x.shape, x.dtype), programs.packed(np.ones((p, G, T), bool))
  )
  encoded = jax.eval_shape(programs.see, params, prompt)  # prompts with visual tokens
  blocks = (*packing.index.shape[2:], packing.size)  # [R, N, B]
  return (
    params,
    blocks,
    {
      "init_state": programs.init_state.lower(params),
      "see": programs.see.lower(params, prompt),
      "score": programs.score.lower(params, encoded, tokens, mask, packing),
      "score_masked": programs.score_masked.lower(params, encoded, tokens, mask, key, packing),
      "score_reference": programs.score_reference.lower(
        params, params, encoded, tokens, mask, packing
      ),
      "advantages": programs.advantages.lower(
        experience.rewards, mask, {}, programs.abstract_state.objective
      ),
      "compare": programs.compare.lower(number, number, mask),
      "update": programs.update.lower(
        programs.abstract_state, {}, prompt, tokens, experience, key, None, packing
      ),
      **programs.rollout.lower(params, encoded),
    },
  )


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """Returns the kind and the shape of the first result of each collective of a program."""
  kinds = "|".join(KINDS)
  return [
    (kind, tuple(int(n) for n in sizes.split(",") if n))
    for sizes, kind in re.findall(rf"= \(?\w+\[([\d,]*)\][^=]*? ({kinds})(?:-start)?\(", text)
  ]


def all_gather_sizes(text: str) -> set[int]:
  """Returns the group sizes of all all-gathers of a compiled program."""
  program = hlo.Program(text)
  return {
    program.group_size(instruction)
    for computation in program.computations.values()
    for instruction in computation.instructions.values()
    if instruction.op.startswith("all-gather")
  }


def layer_shapes(params, tensor: int) -> set[tuple[int, ...]]:
  """Returns the shapes of the parameters of one layer, complete or sharded over `tensor`."""
  found = set()
  for keys, x in jax.tree.leaves_with_path(params):
    sizes = (
      x.shape[1:] if any(getattr(k, "key", "") in ("layers", "blocks") for k in keys) else (x.shape)
    )
    if VOCAB in sizes:  # no program may gather these
      continue
    if len(sizes) == 1:  # biases and norms of all layers may be gathered together
      found |= {x.shape, (*x.shape[:-1], x.shape[-1] // tensor)}
    for axis in (None, *range(len(sizes))):
      shard = [n // tensor if i == axis else n for i, n in enumerate(sizes)]
      found |= {tuple(shard), tuple(reversed(shard))}
  return found


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "axes", "tensor", "splits"),
  [
    ("fsdp", {"fsdp": 8}, 0, 1),
    ("fsdp x tensor", {"fsdp": 4, "tensor": 2}, 4, 1),
    ("slice x fsdp", {"slice": 2, "fsdp": 4}, 0, 1),
    ("fsdp, minibatches", {"fsdp": 8}, 0, 2),
    ("slice x fsdp x tensor", {"slice": 2, "fsdp": 2, "tensor": 2}, 0, 1),
  ],
)
def test_devices_gather_only_weights_of_one_layer_and_small_arrays(name, axes, tensor, splits):
  """There are `splits` minibatches with `splits` microbatches of 16 prompts each."""
  p, slices, rows, split = 16 * splits**2, axes.get("slice", 1), axes["fsdp"], axes.get("tensor", 1)
  params, blocks, programs = lowered(axes, tensor, p, splits)
  weights, blocks = layer_shapes(params, split), (rows, *blocks[1:])
  # Prompts of a slice, in a microbatch and in a rollout. Nothing is gathered from other slices.
  microbatch, rollout = 16 // slices, p // slices
  sequences = (rows, rollout // rows * G)
  expected = {
    "tokens, on all devices that share the vocabulary": {
      (microbatch, LENGTH),
      (rollout, LENGTH),
      blocks,
      sequences,
    },
    "hidden states before the output layer": {(*blocks, WIDTH), (*sequences, WIDTH)},
    "gradients of token embeddings": {(microbatch, LENGTH, WIDTH), (*blocks, WIDTH)},
  }
  if (shards := tensor or split) > 1:
    local = p * G * shards // 8  # sequences of a shard of the batch
    expected["statistics of each token, from all shards of the vocabulary"] = {(local, shards)} | (
      set() if tensor else {(local, VOCAB_BLOCKS)}
    )
  if split > 1:  # the shards of a qkv kernel do not coincide with queries, keys and values
    wide = {(microbatch // rows, PATCHES, n) for n in (TOWER, TOWER_HIDDEN)}
    expected["activations of the vision tower"] = wide | {
      (microbatch // rows, PATCHES, 3, 2, TOWER // 2),
      (microbatch // rows * PATCHES, TOWER),
    }
  assert set(programs) == set(COUNTS[name])
  for program, low in programs.items():
    text = low.compile().as_text()
    found = collectives(text)
    if "slice" in axes:  # nothing is gathered from another slice
      assert all_gather_sizes(text) <= {rows}, program
    if program != "reshard":
      for kind, sizes in found:
        plain = tuple(n for n in sizes if n > 1)
        known = {
          tuple(n for n in s if n > 1) for group in (weights, *expected.values()) for s in group
        }
        assert kind != "all-gather" or plain in known, (program, sizes)
    counts = collections.Counter(kind for kind, _ in found)
    for kind, most in zip(KINDS, COUNTS[name][program], strict=True):
      assert counts[kind] <= most, (program, kind, counts)

"""Compares training on eight devices with one device, and tests the sharding of arrays."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as Spec

from jaxrl_vlm import models, objectives, parallel, scratch
from jaxrl_vlm.data import digit_boards
from jaxrl_vlm.models import lora
from jaxrl_vlm.rollout import Sampling
from jaxrl_vlm.stages.programs import Programs
from jaxrl_vlm.types import Experience
from tests import tiny_run

P, G, T = 8, 2, 8
STEPS = 3
ADAPTERS = models.LoRA(rank=4, alpha=8.0, targets=("decoder", "vision/blocks"))


def train(path, examples, axes, devices, adapters=None):
  """Trains for STEPS steps. Returns samples and metrics of each step, and the final state."""
  mesh = parallel.make_mesh(axes, devices)
  config = models.from_directory(path).replace(lora=adapters)
  trainable = () if adapters is None else ("lora",)
  shardings = parallel.param_shardings(mesh, models.abstract_params(config))
  model, params, processor = models.load_pretrained(
    path,
    prompt_buckets=(64,),
    patch_buckets=(36,),
    lora=adapters,
    trainable=trainable,
    shardings=shardings,
  )
  program = Programs(
    model,
    mesh,
    objectives.create("grpo"),
    optax.chain(
      optax.clip_by_global_norm(1.0), optax.sgd(0.1 if adapters is None else 1.0, momentum=0.9)
    ),
    params,
    trainable=trainable,
    sampling=Sampling(G, T),
  )
  prompt = parallel.put_batch(mesh, processor.collate([processor.encode(e) for e in examples]))
  trained, frozen = lora.split(params, trainable)
  state, history = program.init_state(trained), []
  for step in range(STEPS):
    key = jax.random.fold_in(jax.random.key(0), step)
    params = lora.merge(frozen, state.params)
    rollout = program.rollout(params, prompt, key)
    tokens = np.asarray(rollout.tokens)
    rewards = parallel.put_batch(mesh, (tokens % 7).mean(-1).astype("f4"))
    old = program.score(params, prompt, rollout.tokens, rollout.mask)
    base = program.score_base(lora.strip(params), prompt, rollout.tokens, rollout.mask)
    history.append({"tokens": tokens, "logp": np.asarray(old.logp)})
    reference = history[0].setdefault("reference", old) if adapters is None else base
    experience = Experience(
      mask=rollout.mask,
      advantages=program.advantages(rewards, rollout.mask, {}, state.objective),
      old=old,
      rewards=rewards,
      views={"ref": reference},
    )
    state, metrics = program.update(state, frozen, prompt, rollout.tokens, experience, key, None)
    history[-1] |= {name: float(metrics[name]) for name in ("loss", "grad_norm", "ref_kl")}
  return history, state


@pytest.fixture(
  scope="module",
  ids=["fsdp8", "fsdp4-tensor2", "slice2-fsdp2-tensor2", "adapters"],
  params=[
    ({"fsdp": 8}, None),
    ({"fsdp": 4, "tensor": 2}, None),
    ({"slice": 2, "fsdp": 2, "tensor": 2}, None),
    ({"fsdp": 4, "tensor": 2}, ADAPTERS),
  ],
)
def both(request, tmp_path_factory):
  axes, adapters = request.param
  path = tmp_path_factory.mktemp("scratch")
  boards = digit_boards.LiveBoards("train", P, tasks=("read", "count"), style="direct")
  examples = [boards[i] for i in range(P)]
  scratch.create(path, tiny_run.ARCHITECTURE, [e.question for e in examples])
  one = train(path, examples, {"fsdp": 1}, jax.devices()[:1], adapters)
  eight = train(path, examples, axes, jax.devices(), adapters)
  return one, eight, parallel.make_mesh(axes).shape


@pytest.mark.slow
def test_training_on_eight_devices_equals_one_device(both):
  (one, first), (eight, second), _ = both
  for step, (a, b) in enumerate(zip(one, eight, strict=True)):
    np.testing.assert_array_equal(a["tokens"], b["tokens"], err_msg=f"step {step}")
    # Sums over sharded axes add float32 numbers in another order.
    np.testing.assert_allclose(a["logp"], b["logp"], atol=5e-5)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
    # In the first step, the loss is 0 up to rounding, because the advantages of a group sum to 0.
    np.testing.assert_allclose(a["loss"], b["loss"], atol=1e-6)
    # In the first step, the policy equals its reference, so the KL is 0 up to rounding.
    np.testing.assert_allclose(a["ref_kl"], b["ref_kl"], rtol=1e-5, atol=1e-9)
  assert one[-1]["ref_kl"] > 0.1  # the updates changed the policy

  def close(path, a, b):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=3e-5 * float(np.abs(a).max()), err_msg=jax.tree_util.keystr(path)
    )

  jax.tree.map_with_path(close, jax.device_get(first.params), jax.device_get(second.params))


@pytest.mark.slow
def test_parameters_and_optimizer_state_are_sharded(both):
  _, (_, state), axes = both
  fsdp, tensor = axes["fsdp"], axes["tensor"]  # every slice has all parameters

  def share_of_a_device(tree):
    leaves = jax.tree.leaves(tree)
    return sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)

  assert share_of_a_device(state.opt_state) == share_of_a_device(state.params)
  if "head" not in state.params:  # adapters: `a` is sharded over fsdp, and `b` over tensor
    for keys, x in jax.tree.leaves_with_path(state.params):
      shards = {"a": fsdp, "b": tensor}[keys[-1].key]
      assert np.prod(x.addressable_shards[0].data.shape) * shards == x.size, keys
    return
  # Kernels and embeddings are sharded over all devices of a slice, and biases over `tensor` only or
  # not at all. Norms are replicated.
  shards = fsdp * tensor
  assert 1 / shards <= share_of_a_device(state.params) < 1.25 / shards
  for keys, x in jax.tree.leaves_with_path(state.params):
    shard = x.addressable_shards[0].data.shape
    name = jax.tree_util.keystr(keys)
    if name.endswith("['kernel']") or "embedding" in name or "head" in name:
      assert np.prod(shard) * shards == x.size, name
    elif name.endswith("['bias']"):
      assert (
        np.prod(shard) * (1 if "proj" in name or "merger_out" in name or "down" in name else tensor)
        == x.size
      ), name
    else:
      assert shard == x.shape, name


def test_rules_refer_to_the_last_axes_and_indivisible_axes_are_not_sharded():
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})

  def spec(*path_and_shape):
    *path, shape = path_and_shape
    tree = jax.ShapeDtypeStruct(shape, "float32")
    for key in reversed(path):
      tree = {key: tree}
    (leaf,) = jax.tree.leaves(parallel.param_shardings(mesh, tree))
    return leaf.spec

  assert spec("decoder", "layers", "q", "kernel", (3, 8, 6)) == Spec(None, "fsdp", "tensor")
  assert spec("q", "kernel", (8, 6)) == Spec("fsdp", "tensor")
  assert spec("o", "kernel", (8, 4)) == Spec("tensor", "fsdp")
  assert spec("embed", "embedding", (321, 8)) == Spec(None, "fsdp")
  assert spec("head", (8, 321)) == Spec("fsdp", None)
  assert spec("layers", "norm1", "scale", (3, 8)) == Spec()
  # A name that only ends with the name in a rule does not match the rule.
  assert spec("seq", "kernel", (8, 6)) == Spec()


def test_minus_one_stands_for_the_remaining_devices():
  assert dict(parallel.make_mesh({"fsdp": -1, "tensor": 2}).shape) == {
    "slice": 1,
    "fsdp": 4,
    "tensor": 2,
  }
  assert dict(parallel.make_mesh({"fsdp": 2, "tensor": -1}).shape) == {
    "slice": 1,
    "fsdp": 2,
    "tensor": 4,
  }
  assert dict(parallel.make_mesh({"slice": 2, "fsdp": -1}).shape) == {
    "slice": 2,
    "fsdp": 4,
    "tensor": 1,
  }
  one = parallel.make_mesh({"fsdp": -1, "tensor": 1}, jax.devices()[:1])
  assert dict(one.shape) == {"slice": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
  ("axes", "complaint"),
  [
    ({"fsdp": 3, "tensor": 2}, "the axes must multiply to 8 devices, got 6"),
    ({"fsdp": -1, "tensor": 3}, "the axes must multiply to 8 devices, got 6"),
    ({"fsdp": -1, "tensor": -1}, "the axes must multiply to 8 devices, got 64"),
    ({"fsdp": -1, "tensor": 0}, "expected positive sizes, or -1 for one of them"),
    ({"fsdp": -4, "tensor": -2}, "expected positive sizes, or -1 for one of them"),
  ],
)
def test_errors_of_invalid_meshes_name_the_axes_and_the_number_of_devices(axes, complaint):
  with pytest.raises(ValueError) as error:
    parallel.make_mesh(axes)
  assert str(error.value) == f"config.mesh={axes}: {complaint}"


@pytest.mark.parametrize(
  "axes", [{"fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"slice": 2, "fsdp": 2, "tensor": 2}]
)
def test_reordered_rows_equal_numpy_indexing(axes):
  devices = jax.devices()[:1] if axes == {"fsdp": 1} else jax.devices()
  mesh = parallel.make_mesh(axes, devices)
  rng = np.random.default_rng(0)
  tree = {"a": rng.normal(size=(16, 3)).astype("f4"), "b": [rng.random(16) < 0.5, None]}
  slices = mesh.shape["slice"]  # rows must not move between slices
  order = np.concatenate(
    [i * 16 // slices + rng.permutation(16 // slices) for i in range(slices)]
  ).astype(np.int32)
  placed = parallel.put_batch(mesh, tree)
  found = jax.jit(lambda tree, order: parallel.reordered(mesh, tree, order))(placed, order)
  np.testing.assert_array_equal(found["a"], tree["a"][order])
  np.testing.assert_array_equal(found["b"][0], tree["b"][0][order])
  if len(devices) > 1:
    assert found["a"].sharding.spec[0] == parallel.ROWS

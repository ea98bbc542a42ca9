"""Compares embeddings and log-probabilities with a sharded vocabulary to those on one device."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from jaxrl_vlm import models, parallel, scoring
from jaxrl_vlm.models import layers
from jaxrl_vlm.models.published import CONFIGS

V, D = 48, 4
CASES = pytest.mark.parametrize(
  ("axes", "vocab"),
  [
    ({"fsdp": 8}, ("fsdp", "tensor")),
    ({"fsdp": 8}, ()),
    ({"fsdp": 4, "tensor": 2}, ("fsdp",)),
    ({"fsdp": 4, "tensor": 2}, ("fsdp", "tensor")),
    ({"slice": 2, "fsdp": 2, "tensor": 2}, ("fsdp", "tensor")),
    ({"slice": 2, "fsdp": 2, "tensor": 2}, ("slice", "fsdp", "tensor")),
    ({"slice": 2, "fsdp": 1, "tensor": 4}, ("tensor",)),
  ],
)


# Tokens of each row. For few tokens, devices gather the tokens; for many, they gather the table.
@pytest.mark.parametrize("tokens", [1, 40])
@CASES
def test_lookup_in_a_sharded_embedding_table(axes, vocab, tokens):
  rng = np.random.default_rng(0)
  table = rng.normal(size=(V, D)).astype("f4")
  tokens = rng.integers(0, V, size=(8, tokens))
  weights = rng.normal(size=(*tokens.shape, D)).astype("f4")
  config = types.SimpleNamespace(
    mesh=parallel.make_mesh(axes), rules=parallel.rules_of({"vocab": vocab}), dtype="float32"
  )

  def loss(lookup):
    return lambda table: (lookup(table) * weights).sum()

  found = jax.jit(lambda t: layers.lookup(config, t, tokens))
  np.testing.assert_array_equal(found(table), table[tokens])
  np.testing.assert_allclose(
    jax.jit(jax.grad(loss(found)))(table),
    jax.grad(loss(lambda t: t[tokens]))(table),
    rtol=1e-5,
    atol=1e-5,
  )


@CASES
def test_log_probabilities_entropy_and_kl_with_a_sharded_vocabulary(axes, vocab):
  """Values and gradients, with respect to hidden states and weights, equal those of one device."""
  tied = axes == {"fsdp": 8}
  config = models.from_hf(CONFIGS["Qwen2.5-VL-7B"]).replace(
    vocab_size=V, hidden_size=D, tied=tied, suppressed_tokens=(3, 41), dtype="float32"
  )
  rng = np.random.default_rng(1)

  def weights():
    w = rng.normal(size=(V, D)).astype("f4")
    return {"embed": {"embedding": w}} if tied else {"head": w.T}

  params, other_params = weights(), weights()
  hidden, other_hidden = rng.normal(size=(2, 8, 2, 5, D)).astype("f4")
  tokens = rng.choice([v for v in range(V) if v not in (3, 41)], size=(8, 2, 5))
  model = models.VLM(config)
  sharded = model.on(parallel.make_mesh(axes), parallel.rules_of({"vocab": vocab}))

  def values(model):
    def compute(params, other_params, hidden, other_hidden):
      stats = scoring.token_stats(model, params, hidden, tokens, temperature=0.7, chunk=2)
      kl = scoring.full_kl(model, params, hidden, other_params, other_hidden, 0.7, 3)
      return stats.logp, stats.entropy, kl

    return compute

  def loss(model):
    w = np.random.default_rng(2).normal(size=(3, 8, 2, 5))
    return lambda *a: sum((x * y).sum() for x, y in zip(values(model)(*a), w, strict=True))

  given = params, other_params, hidden, other_hidden
  for a, b in zip(jax.jit(values(model))(*given), jax.jit(values(sharded))(*given), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  grads = [jax.jit(jax.grad(loss(m), argnums=(0, 1, 2, 3)))(*given) for m in (model, sharded)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)


def test_config_sharding_overrides_the_rules():
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})

  def specs(**sharding):
    tree = {
      "embed": {"embedding": jax.ShapeDtypeStruct((48, 8), jnp.float32)},
      "q": {"kernel": jax.ShapeDtypeStruct((3, 8, 6), jnp.float32)},
    }
    shardings = parallel.param_shardings(mesh, tree, parallel.rules_of(sharding))
    return shardings["embed"]["embedding"].spec, shardings["q"]["kernel"].spec

  assert specs() == (Spec(("fsdp", "tensor"), None), Spec(None, "fsdp", "tensor"))
  assert specs(vocab=("tensor",)) == (Spec("tensor", "fsdp"), Spec(None, "fsdp", "tensor"))
  assert specs(width=()) == (Spec(("fsdp", "tensor"), None), Spec(None, None, "tensor"))
  assert specs(hidden=()) == (Spec(("fsdp", "tensor"), None), Spec(None, "fsdp", None))


@pytest.mark.parametrize(
  ("sharding", "complaint"),
  [
    (
      {"vocabulary": ("tensor",)},
      "config.sharding.vocabulary: no such axis; expected one of hidden, vocab, width",
    ),
    (
      {"vocab": ("data",)},
      "config.sharding.vocab=('data',): expected a tuple of some of slice, fsdp, tensor",
    ),
    (
      {"vocab": "tensor"},
      "config.sharding.vocab='tensor': expected a tuple of some of slice, fsdp, tensor",
    ),
  ],
)
def test_invalid_rules_are_errors(sharding, complaint):
  with pytest.raises(ValueError) as error:
    parallel.rules_of(sharding)
  assert str(error.value) == complaint


def test_the_mesh_of_rollouts_has_the_same_devices_in_the_same_order():
  mesh = parallel.make_mesh({"slice": 2, "fsdp": 2, "tensor": 2})
  other = parallel.with_tensor(mesh, 4)
  assert dict(other.shape) == {"slice": 2, "fsdp": 1, "tensor": 4}
  assert list(other.devices.flat) == list(mesh.devices.flat)
  for tensor in (1, 3, 8, -2):
    with pytest.raises(
      ValueError,
      match=rf"^config.rollout.tensor={tensor}: expected a multiple "
      "of config.mesh.tensor=2 that divides the 4 devices of a slice, or 0",
    ):
      parallel.with_tensor(mesh, tensor)

"""Compares scores, and the full KL between two views, with their definitions on all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_vlm import models, scoring
from jaxrl_vlm.models.config import ModelConfig, VisionConfig

P, G, T, V, D = 2, 3, 7, 50, 16
SUPPRESSED = (3, 17, 49)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "head"])
def setup(request):
  """A model, parameters of its unembedding, and hidden states of two views.

  The tests use only the unembedding of the model.
  """
  vision = VisionConfig(
    depth=1,
    hidden_size=8,
    intermediate_size=8,
    num_heads=1,
    out_hidden_size=D,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
  )
  model = models.VLM(
    ModelConfig(
      family="qwen2_5_vl",
      vocab_size=V,
      hidden_size=D,
      intermediate_size=8,
      num_layers=1,
      num_heads=1,
      num_kv_heads=1,
      head_dim=8,
      rms_norm_eps=1e-6,
      rope_theta=1e4,
      tied=request.param,
      vision=vision,
      suppressed_tokens=SUPPRESSED,
    )
  )
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
  params = {"embed": {"embedding": table}} if request.param else {"head": table.T}
  hidden, hidden_masked = (
    jnp.asarray(rng.normal(size=(P, G, T, D)), jnp.float32) for _ in range(2)
  )
  return model, params, table, hidden, hidden_masked


def slow_kl(table, hidden, hidden_masked, temperature):
  """Computes the KL f32[P, G, T] from all logits of the tokens that can be sampled."""
  allowed = np.setdiff1d(np.arange(V), SUPPRESSED)
  clean, masked = (h @ table[allowed].T / temperature for h in (hidden, hidden_masked))
  # Uses log_softmax, because probabilities can be too small for float32.
  p, q = jax.nn.log_softmax(clean), jax.nn.log_softmax(masked)
  return (jnp.exp(p) * (p - q)).sum(axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_and_entropies_equal_the_definition_on_all_logits(setup, temperature):
  model, params, table, hidden, _ = setup
  allowed = np.setdiff1d(np.arange(V), SUPPRESSED)
  chosen = np.random.default_rng(2).integers(len(allowed), size=(P, G, T))
  stats = scoring.token_stats(model, params, hidden, allowed[chosen], temperature=temperature)
  logp = jax.nn.log_softmax(hidden @ table[allowed].T / temperature)
  expected = np.take_along_axis(np.asarray(logp), chosen[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(stats.logp, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(stats.entropy, -(jnp.exp(logp) * logp).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [128, 3, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_full_kl_and_its_gradients_equal_the_definition(setup, chunk, temperature):
  model, params, table, hidden, hidden_masked = setup
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(P, G, T)), jnp.float32)

  def fast(params, hidden, hidden_masked):
    kl = scoring.full_kl(model, params, hidden, params, hidden_masked, temperature, chunk)
    return (weights * kl).sum(), kl

  def slow(params, hidden, hidden_masked):
    (table,) = jax.tree.leaves(params)
    table = table if model.config.tied else table.T
    kl = slow_kl(table, hidden, hidden_masked, temperature)
    return (weights * kl).sum(), kl

  grads, kl = {}, {}
  for name, function in (("fast", fast), ("slow", slow)):
    run = jax.jit(jax.grad(function, argnums=(0, 1, 2), has_aux=True))
    grads[name], kl[name] = run(params, hidden, hidden_masked)
  assert kl["fast"].shape == (P, G, T) and kl["fast"].dtype == jnp.float32
  assert np.asarray(kl["fast"]).min() > 0.1
  # float32 sums over the vocabulary are in another order.
  np.testing.assert_allclose(kl["fast"], kl["slow"], rtol=1e-4)

  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

  jax.tree.map(close, grads["fast"], grads["slow"])


def test_full_kl_of_equal_views_and_its_gradient_are_zero(setup):
  model, params, _, hidden, _ = setup
  kl = scoring.full_kl(model, params, hidden, params, hidden, 0.8, 3)
  np.testing.assert_array_equal(kl, np.zeros((P, G, T)))
  grads = jax.grad(lambda a, b: scoring.full_kl(model, params, a, params, b).sum(), argnums=(0, 1))(
    hidden, hidden
  )
  for grad in grads:  # 0 at the minimum, up to the rounding of p − q in float32
    np.testing.assert_allclose(grad, np.zeros_like(grad), atol=1e-5)


def test_full_kl_is_finite_if_a_suppressed_token_has_almost_all_probability(setup):
  model, params, table, hidden, hidden_masked = setup
  # Without suppression, both views would give this token a probability close to 1.
  offset = 20 * table[SUPPRESSED[0]]
  hidden, hidden_masked = offset + hidden, offset + hidden_masked

  def total(params, hidden, hidden_masked):
    return scoring.full_kl(model, params, hidden, params, hidden_masked, 1.0, 2).sum()

  value, grads = jax.value_and_grad(total, argnums=(0, 1, 2))(params, hidden, hidden_masked)
  np.testing.assert_allclose(value, slow_kl(table, hidden, hidden_masked, 1.0).sum(), rtol=1e-3)
  for grad in jax.tree.leaves(grads):
    assert np.isfinite(grad).all()
  (of_table,) = jax.tree.leaves(grads[0])
  of_table = of_table if model.config.tied else of_table.T
  np.testing.assert_array_equal(of_table[np.array(SUPPRESSED)], 0)


def test_logits_never_exist_for_all_response_tokens_at_once(setup):
  """Checks the shapes in the forward and backward pass of `full_kl` and `token_stats`."""
  model, params, _, *both = setup
  length, chunk = 24, 4
  hidden, hidden_masked = (jnp.tile(h[:, :, :1], (1, 1, length, 1)) for h in both)
  tokens = jnp.zeros((P, G, length), jnp.int32)

  def divergence(params, hidden):
    return scoring.full_kl(model, params, hidden, params, hidden_masked, 1.0, chunk).sum()

  def stats(params, hidden):
    stats = scoring.token_stats(model, params, hidden, tokens, chunk=chunk)
    return stats.logp.sum() + stats.entropy.sum()

  for function in (divergence, stats):
    jaxpr = jax.make_jaxpr(jax.grad(function, argnums=(0, 1)))(params, hidden)
    shapes = list(shapes_in(jaxpr.jaxpr))
    assert any(V in shape for shape in shapes)
    assert max(np.prod(shape) for shape in shapes if V in shape) <= max(P * G * chunk * V, V * D)


def shapes_in(jaxpr):
  """Yields the shape of every value in a jaxpr and in the jaxprs that it contains."""
  for equation in jaxpr.eqns:
    yield from (out.aval.shape for out in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from shapes_in(inner)

"""Tests the moments of the optimizer in bfloat16 and in host memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import base
from jaxrl_vlm import models, objectives, parallel
from jaxrl_vlm.models.published import CONFIGS
from jaxrl_vlm.stages.optimizer import in_bfloat16, make_optimizer
from jaxrl_vlm.stages.programs import Programs


def after(optimizer: optax.GradientTransformation, gradients: np.ndarray):
  """Returns the parameters and the optimizer state after one step for each of the gradients."""

  @jax.jit
  def run(gradients):
    def step(carry, gradient):
      params, state = carry
      updates, state = optimizer.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros(gradients.shape[1:])
    return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[0]

  return run(gradients)


@pytest.mark.slow
def test_small_changes_of_moments_in_bfloat16_add_up():
  """With b2 = 0.999, a step changes the second moment by about a thousandth of its value.

  Rounding to the nearest bfloat16 number would lose such changes. Stochastic rounding keeps them on
  average.
  """
  rng = np.random.default_rng(0)
  gradients = (rng.normal(size=(3000, 4096)) * np.linspace(0.1, 10, 4096)).astype("f4")
  adam = optax.scale_by_adam(b2=0.999)
  (_, wide), (_, narrow) = after(adam, gradients), after(in_bfloat16(adam), gradients)
  assert {x.dtype for x in (narrow.inner.mu, narrow.inner.nu)} == {jnp.dtype("bfloat16")}
  ratio = np.asarray(narrow.inner.nu, "f4") / np.asarray(wide.nu)
  # A step changes the moment by about a thousandth of its value. Stochastic rounding makes this
  # change either 0 or one unit in the last place, which is 2^-8 to 2^-7 of the value. The variance
  # is about 0.001 · 0.0055 per step, and the decay sums it over about the last 500 steps.
  assert abs(ratio.mean() - 1) < 0.003 and ratio.std() < 1.2 * (500 * 0.001 * 0.0055) ** 0.5

  def nearest(nu, gradient):
    return (0.999 * nu.astype("f4") + 0.001 * gradient**2).astype(jnp.bfloat16), None

  stuck, _ = jax.lax.scan(nearest, jnp.zeros(4096, jnp.bfloat16), jnp.asarray(gradients))
  assert abs((np.asarray(stuck, "f4") / np.asarray(wide.nu)).mean() - 1) > 0.05


def test_training_with_moments_in_bfloat16_is_close_to_float32():
  rng = np.random.default_rng(1)
  gradients = rng.normal(0.3, 1.0, size=(300, 512)).astype("f4")
  settings = base.optimizer()
  settings.learning_rate, settings.clip_norm = 1e-3, 1e9
  wide, _ = after(make_optimizer(settings, 300), gradients)
  settings.moments = "bfloat16"
  narrow, _ = after(make_optimizer(settings, 300), gradients)
  np.testing.assert_allclose(narrow, wide, atol=0.02 * float(np.abs(wide).max()))


def test_an_unknown_kind_of_moments_is_refused():
  settings = ConfigDict(base.optimizer())
  settings.moments = "float16"
  with pytest.raises(
    ValueError, match="config.optimizer.moments='float16': expected one of float32, bfloat16, host"
  ):
    make_optimizer(settings, 1)


def test_moments_on_the_host_need_no_device_memory():
  """Checks the computed memory. `test_programs.py` checks where the moments are stored."""
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
  config = models.from_hf(CONFIGS["Qwen2.5-VL-3B"])
  held = [
    Programs(
      models.VLM(config),
      mesh,
      objectives.create("grpo", kl_coef=0.0),
      make_optimizer(base.optimizer(), 1),
      models.abstract_params(config),
      state_on_host=on_host,
    ).held
    for on_host in (False, True)
  ]
  assert held[1] < 0.34 * held[0]

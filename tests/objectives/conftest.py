import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
  """Each program here runs a few times on tiny arrays: what takes time is to compile it."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def explicit_ranks():
  """[P, G] meets [P, G, T] only where the code says how."""
  with jax.numpy_rank_promotion("raise"):
    yield

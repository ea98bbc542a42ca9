import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
  """Turns off most of XLA's optimizations.

  The programs of these tests run a few times on tiny arrays, so compiling them takes most of the
  time.
  """
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def explicit_ranks():
  """Forbids implicit broadcasting of arrays of different rank, such as [P, G] and [P, G, T]."""
  with jax.numpy_rank_promotion("raise"):
    yield

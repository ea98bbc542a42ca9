"""Tests the order in which a step starts its programs, grades responses and writes metrics."""

import pytest

from jaxrl_vlm import train
from jaxrl_vlm.metrics import MetricsWriter
from jaxrl_vlm.rewards.pool import Grading
from jaxrl_vlm.rollout import Sampler
from jaxrl_vlm.stages.programs import Programs
from tests import tiny_run

pytestmark = pytest.mark.slow

STEPS = 3


@pytest.fixture(scope="module")
def events(tmp_path_factory):
  """The names of the calls that a run made, in order."""
  found = []

  def recorded(call, name, after=""):
    def wrapper(*args, **kwargs):
      found.append(name)
      result = call(*args, **kwargs)
      found.extend([after] * bool(after))
      return result

    return wrapper

  build = Programs.__init__

  def built(self, *args, **kwargs):
    build(self, *args, **kwargs)
    for name in ("see", "score", "score_masked", "update"):
      setattr(self, name, recorded(getattr(self, name), name))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Programs, "__init__", built)
    patch.setattr(Sampler, "__call__", recorded(Sampler.__call__, "rollout", "rollout ended"))
    for owner, name in ((Grading, "add"), (Grading, "result"), (MetricsWriter, "write")):
      patch.setattr(owner, name, recorded(getattr(owner, name), name))
    config = tiny_run.get_config()
    rl = config.stages[1]
    rl.steps, rl.eval.examples = STEPS, 0
    rl.max_tokens, config.rollout.chunk, config.rollout.groups = 8, 2, 2
    config.stages, config.checkpoint.every = (rl,), 100
    with tiny_run.one_device():
      train.train(config, tmp_path_factory.mktemp("order") / "run")
  return found


def assert_order_in_each_step(events, *names):
  """Every step made each of these calls once, in this order."""
  found = [event for event in events if event in names]
  assert found == list(names) * STEPS, found


def test_visual_tokens_are_computed_once_per_step_before_the_rollout(events):
  assert_order_in_each_step(events, "see", "rollout", "update")


def test_grading_starts_during_the_rollout_and_scoring_does_not_wait_for_it(events):
  # `score` scores the reference.
  assert_order_in_each_step(events, "rollout ended", "score", "score_masked", "result")
  first = events.index("add")
  assert events.index("rollout") < first < events.index("rollout ended")
  assert events.count("add") > STEPS


def test_metrics_are_fetched_while_the_next_step_runs(events):
  found = [event for event in events if event in ("update", "write")]
  assert found == ["update", *["update", "write"] * (STEPS - 1), "write"], found

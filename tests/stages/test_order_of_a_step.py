"""What the host does while the device works, and what a step does once."""

import pytest

from jaxrl_vlm import train
from jaxrl_vlm.metrics import MetricsWriter
from jaxrl_vlm.rewards.pool import Grading
from jaxrl_vlm.rollout import Sampler
from jaxrl_vlm.stages.programs import Programs
from tests import tiny_run

STEPS = 3


@pytest.fixture(scope="module")
def events(tmp_path_factory):
  """Names of what a run did, in order."""
  found = []

  def noted(call, name, after=""):
    def noting(*args, **kwargs):
      found.append(name)
      result = call(*args, **kwargs)
      found.extend([after] * bool(after))
      return result

    return noting

  build = Programs.__init__

  def built(self, *args, **kwargs):
    build(self, *args, **kwargs)
    for name in ("see", "score", "score_masked", "update"):
      setattr(self, name, noted(getattr(self, name), name))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Programs, "__init__", built)
    patch.setattr(Sampler, "__call__", noted(Sampler.__call__, "rollout", "drawn"))
    for owner, name in ((Grading, "add"), (Grading, "result"), (MetricsWriter, "write")):
      patch.setattr(owner, name, noted(getattr(owner, name), name))
    config = tiny_run.get_config()
    rl = config.stages[1]
    rl.steps, rl.eval.examples = STEPS, 0
    rl.max_tokens, config.rollout.chunk, config.rollout.groups = 8, 2, 2
    config.stages, config.checkpoint.every = (rl,), 100
    with tiny_run.one_device():
      train.train(config, tmp_path_factory.mktemp("order") / "run")
  return found


def of_steps(events, *names):
  """Of these there was nothing but that, in every step."""
  mine = [event for event in events if event in names]
  assert mine == list(names) * STEPS, mine


def test_the_tower_passes_once_per_prompt(events):
  of_steps(events, "see", "rollout", "update")


def test_responses_are_graded_while_others_are_drawn_and_all_are_scored(events):
  of_steps(events, "drawn", "score", "score_masked", "result")  # by the reference, and blind
  first = events.index("add")
  assert events.index("rollout") < first < events.index("drawn")
  assert events.count("add") > STEPS


def test_metrics_are_fetched_while_the_next_step_runs(events):
  mine = [event for event in events if event in ("update", "write")]
  assert mine == ["update", *["update", "write"] * (STEPS - 1), "write"], mine

"""An RL stage trains a Hugging Face checkpoint of every family and saves one of that family."""

import numpy as np
import pytest
import transformers

from jaxrl_vlm import metrics, train
from tests import tiny, tiny_run


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_rl_stage_trains_and_saves_every_family(family, tmp_path, one_device):
  start = tiny.make_hf(tmp_path / "hf", family=family)
  config = tiny_run.get_config()
  config.model.scratch = {}
  config.model.path = str(tmp_path / "hf")
  config.prompt_buckets, config.patch_buckets = (256,), (256,)
  stage = config.stages[-1]
  stage.steps, stage.eval.examples = 2, 0
  config.stages = (stage,)
  train.train(config, tmp_path / "run")
  records = [r for r in metrics.read(tmp_path / "run") if "train/loss" in r]
  assert [r["step"] for r in records] == [1, 2]
  for record in records:
    assert np.isfinite(record["train/loss"]) and record["train/grad_norm"] > 0
    # The sampler, which decodes with a KV cache, and the scorer agree on every token.
    assert record["objective/sampler_logp_difference_max"] < 1e-3
  saved = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
  assert type(saved) is type(start)
  assert any(
    (a != b).any()
    for a, b in zip(start.state_dict().values(), saved.state_dict().values(), strict=True)
  )

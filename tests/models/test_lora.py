"""Compares adapters with PEFT, with the same random weights, and tests patterns of parameters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import jaxrl_vlm as jv
from jaxrl_vlm import models, parallel
from jaxrl_vlm.models import LoRA, lora, weights
from tests import tiny

EVERYWHERE = LoRA(rank=4, alpha=6.0, targets=("decoder", "vision"))


def randomised(params, seed: int = 0):
  """Returns `params` with random adapters, because new adapters do not change the output."""
  rng = np.random.default_rng(seed)
  return lora.merge(
    lora.strip(params),
    jax.tree.map(
      lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), lora.adapters(params)
    ),
  )


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def adapted(request, tmp_path_factory):
  """Returns a model of every family with adapters.

  The result is the directory, the model of transformers, its logits of a batch, (model, params,
  processor), and the batch.
  """
  path = tmp_path_factory.mktemp("hf")
  theirs = tiny.make_hf(path, family=request.param)
  model, params, processor = models.load_pretrained(path, lora=EVERYWHERE)
  prompt = processor(*tiny.conversations())
  base = [tiny.torch_logits(theirs, prompt, row) for row in range(3)]
  return path, theirs, base, (model, params, processor), prompt


@pytest.fixture(scope="module")
def trained(adapted):
  """Returns parameters with random adapters, as after training, and their logits."""
  _, _, _, (model, params, _), prompt = adapted
  params = randomised(params)
  return params, np.asarray(jv.logits(model, params, prompt))


def assert_rows(logits, rows) -> None:
  for row, expected in enumerate(rows):
    # float32 sums in another order, over a few layers.
    np.testing.assert_allclose(logits[row, : len(expected)], expected, atol=1e-4, err_msg=str(row))


@pytest.mark.slow
def test_a_saved_adapter_has_the_same_logits_in_peft(adapted, trained, tmp_path):
  path, _, base, (model, _, _), prompt = adapted
  params, logits = trained
  lora.save_adapter(tmp_path, model.config, params, path)
  theirs = transformers.AutoModelForImageTextToText.from_pretrained(path).eval()
  theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
  assert_rows(logits, [tiny.torch_logits(theirs, prompt, row) for row in range(3)])
  assert np.abs(logits[1, : len(base[1])] - base[1]).max() > 0.5  # the adapters change the logits

  saved = load_file(tmp_path / "adapter_model.safetensors")
  loaded = peft.get_peft_model_state_dict(theirs)
  assert loaded.keys() == saved.keys()  # no tensor is missing or unknown
  for name, tensor in loaded.items():
    np.testing.assert_array_equal(tensor.numpy(), saved[name], err_msg=name)
  assert sum(x.size for x in saved.values()) == sum(
    x.size for x in jax.tree.leaves(lora.adapters(params))
  )
  assert theirs.peft_config["default"].base_model_name_or_path == str(path)


def test_adapters_are_merged_into_a_saved_model(adapted, trained, tmp_path):
  _, _, _, (model, _, processor), prompt = adapted
  params, logits = trained
  jv.save_pretrained(tmp_path, model, params, processor)
  theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
  assert_rows(logits, [tiny.torch_logits(theirs, prompt, row) for row in range(3)])


def test_a_model_with_new_or_removed_adapters_equals_the_base_model(adapted, trained):
  _, _, base, (model, fresh, _), prompt = adapted
  assert_rows(np.asarray(jv.logits(model, fresh, prompt)), base)
  stripped = np.asarray(jv.logits(model, lora.strip(trained[0]), prompt))
  assert_rows(stripped, base)
  np.testing.assert_array_equal(stripped, jv.logits(model, lora.strip(fresh), prompt))


def test_a_saved_adapter_is_loaded_unchanged(adapted, trained, tmp_path):
  model, params = adapted[3][0], trained[0]
  lora.save_adapter(tmp_path, model.config, params)
  again = lora.load_adapter(tmp_path, model.config, models.abstract_params(model.config))
  assert jax.tree.structure(again) == jax.tree.structure(lora.adapters(params))
  jax.tree.map(np.testing.assert_array_equal, again, lora.adapters(params))


def test_experts_and_their_router_have_no_adapters(adapted):
  config = adapted[3][0].config
  layers = {path[:-2] for path in weights.by_path(lora.adapters(adapted[3][1]))}
  mlp = {layer[-1] for layer in layers if layer[:3] == ("decoder", "layers", "mlp")}
  assert mlp == (set() if config.moe else {"gate", "up", "down"})


# -- Tests of one family ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  path = tmp_path_factory.mktemp("hf")
  tiny.make_hf(path)
  return path


def test_split_and_merge_do_not_copy_leaves(qwen):
  _, params, _ = models.load_pretrained(qwen, lora=EVERYWHERE)
  flat = weights.by_path(params)
  for patterns, chooses in {
    ("lora",): lambda path: "lora" in path,
    ("decoder",): lambda path: path[0] == "decoder",
    ("!vision",): lambda path: path[0] != "vision",
    ("head", "layers/q"): lambda path: path[0] == "head" or path[1:3] == ("layers", "q"),
    (): lambda path: True,
  }.items():
    trainable, frozen = (weights.by_path(part) for part in lora.split(params, patterns))
    assert set(trainable) == set(filter(chooses, flat))
    assert set(frozen) == set(flat) - set(trainable)
    whole = lora.merge(*lora.split(params, patterns))
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(leaf is flat[path] for path, leaf in weights.by_path(whole).items())


def test_storing_frozen_parameters_in_bfloat16_does_not_change_logits(qwen):
  trainable = ("decoder/layers/q",)
  prompts = None
  logits = []
  for patterns in ((), trainable):
    model, params, processor = models.load_pretrained(qwen, dtype="bfloat16", trainable=patterns)
    prompts = prompts or processor(*tiny.conversations())
    logits.append(np.asarray(jv.logits(model, params, prompts)))
  np.testing.assert_array_equal(*logits)
  trained, frozen = (weights.by_path(part) for part in lora.split(params, trainable))
  assert {x.dtype.name for x in trained.values()} == {"float32"}
  assert {
    x.dtype.name for path, x in frozen.items() if path[-1] in ("kernel", "embedding", "head")
  } == {"bfloat16"}


def test_merging_adapters_in_place_in_bfloat16_and_on_a_mesh():
  rng = np.random.default_rng(0)
  config = models.from_hf(tiny_config()).replace(lora=LoRA(2, 3.0))
  for shape in ((8, 6), (3, 8, 6)):
    kernel, a, b = (
      rng.normal(size=(*shape[:-2], *last)).astype("f4") for last in ((8, 6), (8, 2), (2, 6))
    )
    layer = {
      "kernel": jnp.asarray(kernel, jnp.bfloat16),
      "lora": {"a": jnp.asarray(a), "b": jnp.asarray(b)},
    }
    expected = np.asarray(layer["kernel"], np.float64) + 1.5 * a.astype("f8") @ b.astype("f8")
    kept, norm = layer["kernel"], jnp.ones(3)
    once = lora.merged({"x": layer, "norm": norm}, config)
    assert once["norm"] is norm and once["x"].keys() == {"kernel"}
    assert once["x"]["kernel"].dtype == jnp.bfloat16
    # One rounding to the 8 significant bits of bfloat16.
    np.testing.assert_allclose(np.asarray(once["x"]["kernel"], "f8"), expected, rtol=2**-8)
    in_place = lora.merged({"x": layer, "norm": norm}, config, donate=True)
    np.testing.assert_array_equal(in_place["x"]["kernel"], once["x"]["kernel"])
    assert kept.is_deleted()

    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    split = {"o": layer | {"kernel": once["x"]["kernel"]}}
    split = jax.device_put(split, parallel.param_shardings(mesh, split))
    whole = lora.merged({"o": {**layer, "kernel": once["x"]["kernel"]}}, config)
    sharded = lora.merged(split, config)["o"]["kernel"]
    assert sharded.sharding == split["o"]["kernel"].sharding
    np.testing.assert_array_equal(sharded, whole["o"]["kernel"])


def tiny_config():
  return {
    "model_type": "qwen2_5_vl",
    "image_token_id": 90,
    "eos_token_id": 91,
    "text_config": {
      "vocab_size": 96,
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "rope_parameters": {"mrope_section": [1, 1, 2], "rope_theta": 1e4},
    },
    "vision_config": {
      "depth": 2,
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_heads": 2,
      "out_hidden_size": 32,
      "patch_size": 8,
      "window_size": 32,
      "fullatt_block_indexes": [1],
    },
  }


def test_new_adapters_are_initialised_as_in_peft_and_do_not_depend_on_the_mesh():
  config = models.from_hf(tiny_config()).replace(lora=EVERYWHERE)
  shapes = models.abstract_params(config)
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
  shardings = parallel.param_shardings(mesh, shapes)
  one = lora.init_adapters(shapes, jax.random.key(3))
  jax.tree.map(
    np.testing.assert_array_equal, one, lora.init_adapters(shapes, jax.random.key(3), shardings)
  )
  flat = weights.by_path(one)
  assert not any(x.any() for path, x in flat.items() if path[-1] == "b")
  for path, x in flat.items():
    if path[-1] == "a":
      bound = x.shape[-2] ** -0.5
      assert 0.9 * bound < np.abs(x).max() <= bound, path
  assert len({float(x.ravel()[0]) for path, x in flat.items() if path[-1] == "a"}) == len(flat) / 2


@pytest.mark.parametrize(
  ("change", "complaint"),
  [
    (
      lambda path: (path / "adapter_config.json").unlink(),
      "adapter_config.json: no such file; expected a PEFT adapter directory",
    ),
    (
      lambda path: (path / "adapter_model.safetensors").write_bytes(b"12345678"),
      "adapter_model.safetensors: not a complete safetensors file",
    ),
    (
      lambda path: rewrite(path, r=8),
      "config.model.lora.rank=4: expected 8, the value of r in .*config.json",
    ),
    (
      lambda path: rewrite(path, lora_alpha=1),
      "config.model.lora.alpha=6.0: expected 1, the value of lora_alpha in",
    ),
    (lambda path: rewrite(path, use_dora=True), "use_dora=True is not supported"),
    (
      lambda path: tensors(path, drop="layers.1.mlp.up_proj.lora_A"),
      r"layers.1.mlp.up_proj.lora_A.weight' is missing; config.model.lora.targets=",
    ),
    (
      lambda path: tensors(path, add="base_model.model.lm_head.lora_A.weight"),
      "'base_model.model.lm_head.lora_A.weight' belongs to no adapter of this model",
    ),
  ],
)
def test_a_directory_that_does_not_match_is_an_error_in_one_line(change, complaint, tmp_path):
  config = models.from_hf(tiny_config()).replace(lora=EVERYWHERE)
  shapes = models.abstract_params(config)
  lora.save_adapter(tmp_path, config, lora.init_adapters(shapes, jax.random.key(0)))
  change(tmp_path)
  with pytest.raises((ValueError, FileNotFoundError), match=complaint) as error:
    lora.load_adapter(tmp_path, config, shapes)
  assert "\n" not in str(error.value)


def rewrite(path, **changes) -> None:
  file = path / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tensors(path, drop: str = "\0", add: str = "") -> None:
  file = path / "adapter_model.safetensors"
  kept = {k: v for k, v in load_file(file).items() if drop not in k}
  save_file(kept | ({add: np.zeros((4, 32), np.float32)} if add else {}), file)


def test_tensor_names_of_earlier_versions_of_transformers_are_read(tmp_path):
  config = models.from_hf(tiny_config()).replace(lora=EVERYWHERE)
  shapes = models.abstract_params(config)
  params = randomised(lora.merge(lora.init_adapters(shapes, jax.random.key(0)), {"head": 0}))
  lora.save_adapter(tmp_path, config, params)
  file = tmp_path / "adapter_model.safetensors"
  old = {
    k.replace("model.model.language_model.", "model.model.").replace(
      "model.model.visual.", "model.visual."
    ): v
    for k, v in load_file(file).items()
  }
  save_file(old, file)
  again = lora.load_adapter(tmp_path, config, shapes)
  jax.tree.map(np.testing.assert_array_equal, again, lora.adapters(params))


@pytest.mark.parametrize(
  ("settings", "trainable", "complaint"),
  [
    (
      None,
      ("decodr",),
      "config.model.trainable=('decodr',): 'decodr' matches no parameter; did you mean 'decoder'?",
    ),
    (
      None,
      ("!q_proj",),
      "config.model.trainable=('!q_proj',): 'q_proj' matches no parameter; "
      "valid: decoder, embed, head, vision",
    ),
    (
      None,
      ("decoder", "!*"),
      "config.model.trainable=('decoder', '!*'): expected patterns that "
      "select at least one parameter",
    ),
    (
      None,
      ("lora",),
      "config.model.trainable=('lora',): 'lora' matches only adapters; expected "
      "config.model.lora.rank above 0, got 0",
    ),
    (
      LoRA(4, 8.0, ("q_proj",)),
      (),
      "config.model.lora.targets=('q_proj',): 'q_proj' matches no linear layer; did you mean 'q'?",
    ),
    (
      LoRA(4, 8.0, ("fc1",)),
      (),
      "config.model.lora.targets=('fc1',): 'fc1' matches no "
      "linear layer; valid: decoder, down, gate, k, o, patch_embed, proj, q, qkv, up, v, vision",
    ),
    (
      LoRA(4, 8.0, ("vision", "!vision")),
      (),
      "config.model.lora.targets=('vision', '!vision'): "
      "expected patterns that select at least one linear layer",
    ),
    (
      LoRA(4, 8.0, ("decoder",)),
      ("vision/lora",),
      "config.model.trainable=('vision/lora',): "
      "'vision/lora' matches no parameter; did you mean 'vision'?",
    ),
  ],
)
def test_errors_in_patterns_name_field_value_and_expectation(settings, trainable, complaint):
  config = models.from_hf(tiny_config()).replace(lora=LoRA(1, 1.0, ("*",)))
  with pytest.raises(ValueError) as error:
    lora.check(models.abstract_params(config), settings, trainable)
  assert str(error.value) == complaint


def test_patterns_that_fit_pass():
  shapes = models.abstract_params(models.from_hf(tiny_config()).replace(lora=LoRA(1, 1.0, ("*",))))
  lora.check(shapes, None, ())
  lora.check(shapes, None, ("!vision",))
  lora.check(shapes, EVERYWHERE, ("lora",))
  lora.check(shapes, EVERYWHERE, ("decoder/layers/*/lora", "head"))

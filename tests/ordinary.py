"""Which cases of the large parametrized tests the ordinary test run contains.

Full products of families, methods, dtypes and devices take most of the time and run the same lines
again and again. The ordinary run therefore contains a covering set: every value at least once, and
every combination that has ever failed. All other cases of the tests below carry the marker
`exhaustive`, and run with `pytest -m exhaustive`.

Each key is a test, `file::function`, with the file relative to `tests/`. Each value lists the ids
of its ordinary cases; an empty tuple makes the whole test exhaustive. Ids that no longer exist are
an error (see `tests/conftest.py`).
"""

ORDINARY: dict[str, tuple[str, ...]] = {
  # Every estimator, policy loss and view has tests of its own in tests/objectives and
  # tests/stages/test_programs.py. A run adds how they are connected: a greedy baseline with
  # importance weights, several rewards, tokens chosen over the minibatch, a gradient through two
  # views, and a view for each sample with dynamic sampling off.
  "stages/test_every_method_trains.py::test_every_method_trains_and_logs_its_metrics": (
    "remax",
    "gdpo",
    "clip_cov",
    "papo_d",
    "vppo",
  ),
  "stages/test_every_method_trains.py::test_kl_to_the_model_without_adapters_is_zero_at_the_first_step": (
    "reward",
  ),
  # The tiny run itself is a Qwen2.5-VL; these two have other layers, experts and another tower.
  "stages/test_every_family_trains.py::test_an_rl_stage_trains_and_saves_every_family": (
    "qwen3_vl_moe",
    "gemma3",
  ),
  "stages/test_whole_gradient.py::test_every_parameter_has_the_gradient_of_the_formula": (
    "papo_full-qwen2_5_vl",
    "grpo-qwen3_vl",
  ),
  "stages/test_programs.py::test_gradient_is_that_of_separate_sequences_and_the_formula": (
    "papo_masked_gradient",
    "vppo",
  ),
  "stages/test_programs.py::test_microbatches_do_not_change_the_gradient": ("papo_per_sample",),
  "stages/test_programs.py::test_images_of_the_host_go_with_their_prompts": ("sample",),
  "stages/test_programs.py::test_dealt_to_devices_and_microbatches_prompts_stay_themselves": (
    "sample",
  ),
  # Several microbatches and minibatches, and gradients through all views. test_packing.py checks
  # the layout itself.
  "stages/test_programs.py::test_packing_changes_nothing": (
    "vppo-fields3-split3",
    "papo-fields6-split6",
  ),
  "stages/test_programs.py::test_minibatches_are_updates_one_after_another": ("papo",),
  "stages/test_programs.py::test_masked_views_are_the_same_on_four_devices": ("noise",),
  # All three axes of the mesh at once.
  "parallel/test_mesh.py::test_training_on_eight_devices_equals_one_device": (
    "slice2-fsdp2-tensor2",
  ),
  "parallel/test_mesh.py::test_parameters_and_optimizer_state_are_sharded": (
    "slice2-fsdp2-tensor2",
  ),
  # Rollouts with their own sharding, and minibatches with microbatches.
  "parallel/test_collectives.py::test_devices_gather_only_weights_of_one_layer_and_small_arrays": (
    "fsdp x tensor-axes1-4-1",
    "fsdp, minibatches-axes3-0-2",
  ),
  # libtpu compiles the programs of PAPO in the same file, and those of VPPO in test_plan.py.
  "parallel/test_tpu.py::test_programs_of_specific_objectives_compile": ("full KL",),
  "parallel/test_tpu.py::test_every_family_compiles": ("Qwen3-VL-30B-A3B",),
  # Every family, and both embeddings (tied, and with a head of their own).
  "models/test_models.py::test_greedy_generation_equals_transformers": (
    "qwen2_vl-tied",
    "qwen2_5_vl-head",
    "qwen3_vl-tied",
    "qwen3_vl_moe-head",
    "gemma3-tied",
  ),
  # Qwen2-VL has the decoder of Qwen2.5-VL.
  "models/test_models.py::test_remat_does_not_change_gradients": (
    "qwen2_5_vl-head-dots",
    "qwen3_vl-tied-full",
    "qwen3_vl_moe-head-full",
    "gemma3-tied-dots",
  ),
  # Gemma 3 has sliding windows besides; the other tests of the file use Qwen2.5-VL.
  "rollout/test_sampler.py::test_responses_do_not_depend_on_the_schedule": ("gemma3",),
  "stages/test_resume.py::test_moments_of_another_kind_are_resumed": ("host",),
  "stages/test_resume.py::test_asked_within_a_step_it_stops_there": (
    "in the first rollout",
    "before the update",
  ),
  # Sums, sorts and choices over the minibatch.
  "objectives/test_properties.py::test_eight_devices_equal_one": (
    "clip_cov",
    "gmpo",
    "papo_share",
    "vppo",
    "vppo_gspo",
  ),
  "test_train.py::test_every_method_trains": ("vppo",),
  # Runs of two processes cover the same code. Another test of the file starts four processes.
  "parallel/test_processes.py::test_four_processes_with_dynamic_sampling_equal_one": (),
  "parallel/test_processes.py::test_two_processes_equal_one_in_other_configs": (
    "adapters, greedy baseline",
  ),
  # The test after this one also kills process 0, the coordinator, without a training run.
  "parallel/test_processes.py::test_the_other_process_names_a_killed_process_and_the_run_resumes": (
    "1-in a save",
  ),
  "parallel/test_processes.py::test_all_other_processes_name_the_process_that_ended": (
    "0-killed",
    "2-bug",
  ),
}

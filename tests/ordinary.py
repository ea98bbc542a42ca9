"""Lists the cases of large parametrized tests that run by default.

Some tests are parametrized over all combinations of families, methods, dtypes or devices. Most of
these combinations execute the same code. By default, `pytest` therefore runs a covering set. The
comments name the tests that cover what is left out. All other cases get the marker `exhaustive`,
and `pytest -m exhaustive` runs them. A few long tests are exhaustive as a whole.

Each key is a test, `file::function`, with the file relative to `tests/`. Each value lists the ids
of the cases that run by default. With an empty tuple, the whole test is exhaustive. An id that does
not exist is an error (`tests/conftest.py` checks this).
"""

ORDINARY: dict[str, tuple[str, ...]] = {
  # tests/objectives and tests/stages/test_programs.py test each estimator, policy loss and view
  # separately, and tests/test_train.py trains with VPPO. The runs of this test check that a stage
  # connects them correctly.
  "stages/test_every_method_trains.py::test_every_method_trains_and_logs_its_metrics": (
    "remax",  # a greedy baseline and importance weights
    "gdpo",  # several rewards
    "papo_d",  # a gradient through two views, and a mask for each sample
  ),
  "stages/test_every_method_trains.py::test_new_adapters_have_zero_kl_to_the_reference": (
    "reward",
  ),
  # Other tests train a tiny Qwen2.5-VL. Gemma 3 differs most from it: it has other decoder layers
  # and another vision tower. tests/models checks the layers of all families.
  "stages/test_every_family_trains.py::test_an_rl_stage_trains_and_saves_every_family": ("gemma3",),
  "stages/test_whole_gradient.py::test_every_parameter_has_the_gradient_of_the_formula": (
    "papo_full-qwen2_5_vl",
  ),
  "stages/test_programs.py::test_the_gradient_equals_that_of_the_formula_on_separate_sequences": (
    "papo_masked_gradient",
    "vppo",
  ),
  "stages/test_programs.py::test_microbatches_do_not_change_the_gradient": ("papo_per_sample",),
  "stages/test_programs.py::test_images_masked_on_the_host_equal_images_masked_on_the_device": (
    "sample",
  ),
  # Another test compares packed updates of two devices and one.
  "stages/test_programs.py::test_balancing_prompts_over_devices_does_not_change_an_update": (),
  # Several microbatches and minibatches, and gradients through several views. test_packing.py tests
  # the packing itself.
  "stages/test_programs.py::test_packing_does_not_change_scores_gradients_or_metrics": (
    "vppo-fields3-split3",
    "papo-fields6-split6",
  ),
  "stages/test_programs.py::test_minibatches_equal_consecutive_updates": ("papo",),
  "stages/test_programs.py::test_masked_views_are_equal_on_one_and_four_devices": ("noise",),
  # All three axes of the mesh are larger than 1.
  "parallel/test_mesh.py::test_training_on_eight_devices_equals_one_device": (
    "slice2-fsdp2-tensor2",
  ),
  "parallel/test_mesh.py::test_parameters_and_optimizer_state_are_sharded": (
    "slice2-fsdp2-tensor2",
  ),
  # All axes of the mesh, and the only ordinary check of what is gathered between slices.
  "parallel/test_collectives.py::test_devices_gather_only_weights_of_one_layer_and_small_arrays": (
    "slice x fsdp x tensor-axes4-0-1",
  ),
  # Only the programs of PAPO and VPPO with a Qwen2.5-VL compile for TPUs in the ordinary run, in
  # other tests of this file and of test_plan.py.
  "parallel/test_tpu.py::test_programs_of_specific_objectives_compile": (),
  "parallel/test_tpu.py::test_every_family_compiles": (),
  # Every family. Both kinds of output layer: tied to the input embedding, and a separate head.
  "models/test_models.py::test_greedy_generation_equals_transformers": (
    "qwen2_vl-tied",
    "qwen2_5_vl-head",
    "qwen3_vl-tied",
    "qwen3_vl_moe-head",
    "gemma3-tied",
  ),
  # Qwen2-VL is left out, because it has the same decoder as Qwen2.5-VL.
  "models/test_models.py::test_remat_does_not_change_gradients": (
    "qwen2_5_vl-head-dots",
    "qwen3_vl-tied-full",
    "qwen3_vl_moe-head-full",
    "gemma3-tied-dots",
  ),
  # Other tests of the file compare responses with other numbers of chunks, groups and devices.
  "rollout/test_sampler.py::test_responses_do_not_depend_on_the_schedule": (),
  # test_optimizer.py and test_programs.py test both kinds of moments.
  "stages/test_resume.py::test_a_run_with_moments_on_the_host_or_in_bfloat16_resumes": (),
  "stages/test_resume.py::test_a_signal_within_a_step_stops_the_run_before_its_update": (
    "in the first rollout",
    "before the update",
  ),
  # Objectives that sum, sort or select over the whole minibatch.
  "objectives/test_properties.py::test_eight_devices_equal_one": (
    "clip_cov",
    "gmpo",
    "papo_share",
    "vppo",
    "vppo_gspo",
  ),
  # A benchmark, not a part of the package.
  "test_speed_benchmarks.py::test_update_benchmark": (),
  # One objective of each class and kind of policy loss.
  "objectives/test_properties.py::test_jit_equals_no_jit": (
    "clip_cov",
    "gspo",
    "papo_share",
    "sft",
    "vppo",
  ),
  # Each plan compiles all programs of a run. One test of the file compiles and prints a plan.
  "test_plan.py::test_a_plan_that_does_not_fit_ends_with_one_line_of_advice": (),
  "test_plan.py::test_a_search_finds_a_mesh_for_all_stages_and_prints_its_flags": (),
  "test_train.py::test_every_method_trains": ("vppo",),
  "parallel/test_processes.py::test_several_processes_with_dynamic_sampling_equal_one": ("2",),
  # SFT, one step off, masks from the host and adapters are tested with one process, too.
  "parallel/test_processes.py::test_two_processes_equal_one_in_other_configs": (),
  # The next test also kills processes, but without a training run. Other tests of the file resume
  # runs of two processes, also from an incomplete checkpoint.
  "parallel/test_processes.py::"
  "test_the_other_process_names_a_killed_process_and_the_run_resumes": (),
  "parallel/test_processes.py::test_all_other_processes_name_the_process_that_ended": (
    "0-killed",
    "2-bug",
    "2-killed",
  ),
}

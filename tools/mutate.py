"""Small faults put into the core, one at a time: which of them do the tests notice?

    python -m tools.mutate [--sample 40] [--seed 7] [--only adapters/sites.py ...]
                           [--lines 40-60 ...] [--jobs 2] [--csv FILE]

A fault is one changed comparison, number, operator or condition, or one statement left out. A
file's tests run once without a fault, which says in which of them a line runs; those come first,
and of the others OTHERS seconds (they may start processes, or trace the line for a compiler). Tests
longer than LONG are left out. Then every fault is tried in a fork of the process that ran them: the
functions it changes get their new code. What that cannot show is tried from memory in a process
that has not imported the package yet. Nothing is written to the sources. Faults are drawn over all
of FILES, or --sample 0 tries every one. A fault that passes is printed as a diff; one that cannot
change any result belongs in EQUIVALENT, with the reason.

A file with tests in KERNELS has all its tests run in Triton's interpreter, which has to be chosen
before torch loads Triton: those files come last, in processes that start anew.

Not here: mutmut and cosmic-ray start a process and import torch for every fault, ten seconds each.
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import gc
import importlib.abc
import importlib.util
import itertools
import linecache
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "efft_kernels"
SECONDS = 900.0  # for a file's tests without a fault, traced
LONG = 10.0  # seconds of a test that is not run for every fault
NOWHERE = -1  # a line that no test runs
OTHERS = 20.0  # seconds of tests in which a line did not run, where there are some in which it did

KERNELS = "ops/backends/triton/kernels"
CHAINED = tuple(
    f"adapters/test_chained.py::{name}"
    for name in (
        "test_is_the_model_of_lone_linears",
        "test_layer_scale",
        "test_one_block_and_linears_without_bias",
        "test_one_block_without_layer_scale",
        "test_a_weight_that_is_computed_gets_its_gradient",
        "test_heads_changed_and_blocks_compiled_after_attach",
        "test_dropout_of_the_projection",
        "test_the_modules_run_where_the_chain_does_not_do",
        "test_describe_says_why_a_chain_does_not_run_in_training",
        "TestTraining",
        "TestTheModelIsTheSame",
        "TestAttach",
    )
)
# Module → the tests that are about it, files or classes of them; these alone are run.
FILES: dict[str, tuple[str, ...]] = {
    "adapters/adapter.py": (
        "adapters/test_adapter.py",
        "adapters/test_adapter_state.py",
        "adapters/test_attach.py",
        "adapters/test_description.py",
        "adapters/test_distributed.py::test_on_one_process",
        "adapters/test_chained.py::test_describe_says_why_a_chain_does_not_run_in_training",
        "adapters/test_chained.py::TestTheModelIsTheSame",
        "adapters/test_chained.py::TestAttach",
        "adapters/test_shared_input.py",
        "adapters/test_swin_and_others.py::test_a_bias_made_in_forward_is_added_apart",
        "adapters/test_torch_attention.py::TestEncoders",
    ),
    "adapters/adapter_file.py": (
        "adapters/test_adapter_file.py",
        "adapters/test_adapter_state.py",
        "interop/test_damaged_files.py::TestAdapterFile",
        "adapters/test_adapter_set.py",
    ),
    "adapters/adapter_set.py": (
        "adapters/test_adapter_set.py",
        "adapters/test_adapter_set_calls.py",
        "adapters/test_adapter_set_compiled.py",
        "adapters/test_adapter_state.py::TestBuffersOfASet",
        "adapters/test_refusals.py::test_adapter_set_arguments",
    ),
    "adapters/architectures.py": (
        "adapters/test_sites.py",
        "adapters/test_coverage.py",
        "adapters/test_swin_and_others.py",
        "adapters/test_shared_input.py",
        "adapters/test_adapter_state.py",
    ),
    "adapters/attach.py": (
        "adapters/test_attach.py",
        "adapters/test_refusals.py",
        "adapters/test_coverage.py",
        "adapters/test_keep_head.py",
        "adapters/test_joint_factors.py",
        "adapters/test_adapter_state.py::TestImageSize",
        "adapters/test_call_watch.py",
        "adapters/test_chained.py::TestAttach",
        "adapters/test_distributed.py::test_on_one_process",
        "adapters/test_pairs.py::test_what_describe_tells",
        "adapters/test_shared_input.py",
        "adapters/test_swin_and_others.py::test_a_bias_made_in_forward_is_added_apart",
        "adapters/test_torch_attention.py::TestEncoders",
        "interop/test_serialization.py::TestPeft",
        "test_nn.py::test_computed_weights_are_refused_with_the_way_out",
    ),
    "adapters/attachment.py": (
        "adapters/test_attach.py",
        "adapters/test_adapter.py",
        "adapters/test_adapter_state.py",
        "adapters/test_adapter_set_calls.py",
        "adapters/test_call_watch.py",
        "adapters/test_chained.py::TestAttach",
        "test_nn.py::TestFactorBank",
    ),
    "adapters/batch_layout.py": ("adapters/test_adapter_set_calls.py",),
    "adapters/bypassed.py": (
        "adapters/test_coverage.py",
        "adapters/test_call_watch.py",
        "adapters/test_torch_attention.py::test_attentions_that_cannot_be_adapted",
    ),
    "adapters/call_watch.py": ("adapters/test_call_watch.py",),
    "adapters/chain_blocks.py": (*CHAINED, "adapters/test_chained_huggingface.py"),
    "adapters/chained.py": (
        *CHAINED,
        "adapters/test_chained.py::test_linears_of_one_kind_with_several_ranks",
        "adapters/test_chained.py::test_a_graphs_products_are_in_autocasts_dtype",
        "adapters/test_chained.py::TestGroupsThatAreExchanged",
        "adapters/test_chained.py::TestInAGraph",
        "adapters/test_chained.py::TestTransforms",
        "adapters/test_chained_huggingface.py",
    ),
    "adapters/coverage.py": ("adapters/test_coverage.py",),
    "adapters/description.py": ("adapters/test_description.py", "adapters/test_coverage.py"),
    "adapters/hints.py": ("adapters/test_coverage.py", "adapters/test_refusals.py"),
    "adapters/roles.py": ("adapters/test_sites.py", "adapters/test_coverage.py"),
    "adapters/sites.py": (
        "adapters/test_sites.py",
        "adapters/test_attach.py",
        "adapters/test_torch_attention.py::test_attentions_that_cannot_be_adapted",
    ),
    "adapters/swapping.py": (
        "adapters/test_attach.py",
        "adapters/test_adapter.py",
        "adapters/test_torch_attention.py",
    ),
    "adapters/torch_attention.py": ("adapters/test_torch_attention.py",),
    "atomic_files.py": ("test_atomic_files.py",),
    "interop/fact.py": ("interop/test_fact.py", "interop/test_damaged_files.py::TestFact"),
    "interop/files.py": (
        "interop/test_damaged_files.py::TestFiles",
        "interop/test_damaged_files.py::TestFact",
        "interop/test_damaged_files.py::test_a_config_of_many_bytes_is_not_read",
        "interop/test_damaged_files.py::test_a_failure_at_the_last_moment_takes_the_adapter_off_again",
        "interop/test_fact.py",
        "interop/test_peft.py",
    ),
    "interop/hub.py": ("interop/test_hub.py",),
    "interop/left_out.py": ("interop/test_left_out.py",),
    "interop/lightning.py": ("interop/test_lightning.py",),
    "interop/name_patterns.py": ("interop/test_damaged_files.py::TestNamePatterns",),
    "interop/peft.py": ("interop/test_peft.py", "interop/test_damaged_files.py::TestPeft"),
    "interop/trainer.py": ("interop/test_trainer.py",),
    "methods/base.py": (
        "methods/test_base.py",
        "methods/test_registry.py",
        "adapters/test_joint_factors.py::test_a_subclass_with_joint_factors_of_its_own",
    ),
    "methods/efft.py": (
        "methods/test_efft.py",
        "methods/test_base.py",
        "methods/test_tensor_train.py",
    ),
    "methods/fact.py": (
        "methods/test_fact.py",
        "methods/test_base.py",
        "methods/test_tensor_train.py",
    ),
    "methods/joint.py": ("adapters/test_joint_factors.py",),
    "methods/kadaptation.py": ("methods/test_kadaptation.py", "methods/test_base.py"),
    "methods/lora.py": ("methods/test_lora.py", "methods/test_base.py"),
    "methods/picked_rows.py": ("methods/test_picked_rows.py",),
    "methods/registry.py": ("methods/test_base.py", "methods/test_registry.py"),
    "methods/sharded.py": ("adapters/test_distributed.py::test_on_one_process",),
    "methods/tensor_train.py": (
        "methods/test_tensor_train.py",
        "methods/test_base.py::test_a_group_takes_no_class_arguments",
        "methods/test_base.py::test_attention_of_two_widths_has_no_place_in_a_tensor",
        "methods/test_efft.py",
        "methods/test_fact.py",
        "adapters/test_joint_factors.py",
        "adapters/test_attach.py::test_refused_and_left_as_it_was",
    ),
    "nn.py": (
        "test_nn.py",
        "adapters/test_adapter.py",
        "adapters/test_adapter_set.py::test_parts_run_once_the_layout_is_known",
        "adapters/test_adapter_set_calls.py",
        "adapters/test_distributed.py::test_on_one_process",
        "adapters/test_joint_factors.py::test_is_the_model_whose_linears_make_their_own",
        "ops/test_recompute.py::test_compiled",
        "ops/test_recompute.py::test_no_tensor_at_all",
        "ops/test_recompute.py::test_what_is_kept",
    ),
    "ops/backends/chain_steps.py": (
        "ops/backends/test_chain_steps.py",
        "ops/test_chains.py",
        "ops/backends/test_cuda_chain.py",
    ),
    "ops/backends/cpp_backend.py": (
        "ops/backends/test_cpp_backend.py",
        "ops/test_dispatch.py",
        "ops/test_cost_model.py",
        "ops/test_functional.py",
        "ops/backends/cpp/test_values.py",
    ),
    "ops/backends/cuda_backend.py": (
        "ops/test_dispatch.py::test_which_backends_are_operators_of_csrc",
        "ops/backends/test_cuda_backend.py",
        "ops/test_cost_model.py",
    ),
    "ops/backends/cuda_chain.py": ("ops/backends/test_cuda_chain.py",),
    "ops/backends/cuda_cost.py": ("ops/test_cost_model.py", "testing/test_gpu_cases.py"),
    "ops/backends/fallback.py": (
        "ops/backends/test_cuda_backend.py",
        "ops/backends/triton/test_backend.py::test_padded_rank",
    ),
    "ops/backends/native_library.py": (
        "ops/test_dispatch.py",
        "ops/backends/test_cuda_backend.py",
        "ops/backends/test_native_library.py",
        "csrc/test_build.py::test_a_library_that_was_never_built_names_the_command",
        "csrc/test_build.py::test_in_a_clone_the_command_names_it",
        "csrc/test_build.py::test_the_first_import_says_that_the_build_had_no_compiler",
        "csrc/test_build.py::test_the_reason_of_the_build_is_repeated",
        "csrc/test_build.py::test_a_library_that_does_not_load_gives_the_loaders_message",
        "csrc/test_build.py::test_a_gpu_is_compared_with_what_was_built",
        "ops/entry/test_routes.py",
    ),
    "ops/backends/torch_backend.py": (
        "ops/test_dispatch.py::test_which_backends_are_operators_of_csrc",
        "ops/backends/test_torch_backend.py",
        "ops/test_cost_model.py",
        "ops/test_functional.py",
        "ops/test_gradients.py",
    ),
    "ops/backends/triton/__init__.py": (
        "ops/test_dispatch.py::test_which_backends_are_operators_of_csrc",
        "ops/backends/triton/test_backend.py",
        "ops/test_dispatch.py::test_nothing_to_multiply_is_out_of_reach",
    ),
    "ops/backends/triton/act.py": (
        f"{KERNELS}/test_act.py",
        f"{KERNELS}/test_launches.py::test_whole_blocks_take_no_masks",
    ),
    "ops/backends/triton/backward.py": (
        f"{KERNELS}/test_launches.py::test_how_many_launches_a_call_takes",
        f"{KERNELS}/test_operands.py::test_a_backward_of_columns_first_and_one_without_x",
        f"{KERNELS}/test_operands.py::test_only_what_is_needed",
        f"{KERNELS}/test_ranks.py::test_rb_has_no_limit",
        f"{KERNELS}/test_budget.py::test_no_rows",
        f"{KERNELS}/test_operands.py::test_the_same_sizes_at_any_address",
    ),
    "ops/backends/triton/chain.py": (
        "ops/backends/triton/test_chain.py",
        f"{KERNELS}/test_chain_steps.py::test_is_the_step_of_plain_torch",
    ),
    "ops/backends/triton/configs.py": (
        "ops/backends/triton/test_backend.py",
        "ops/backends/triton/test_launch_cache.py",
        "tools/test_tune_triton.py",
    ),
    "ops/backends/triton/cost.py": ("ops/test_cost_model.py",),
    "ops/backends/triton/device.py": ("ops/backends/triton/test_backend.py",),
    "ops/backends/triton/epilogue.py": (
        f"{KERNELS}/test_operands.py::test_an_infinity_stays_an_infinity_in_its_row",
        f"{KERNELS}/test_operands.py::test_float64_factors_beside_half_precision_rows",
        f"{KERNELS}/test_exact.py::test_slices_of_any_size",
    ),
    "ops/backends/triton/factors.py": ("ops/backends/triton/test_factors.py",),
    "ops/backends/triton/fold.py": (
        f"{KERNELS}/test_chain.py::test_fold",
        f"{KERNELS}/test_launches.py::test_how_many_launches_a_call_takes",
        f"{KERNELS}/test_ranks.py::test_rb_has_no_limit",
        f"{KERNELS}/test_operands.py::test_float64_factors_beside_half_precision_rows",
        f"{KERNELS}/test_operands.py::test_an_infinity_stays_an_infinity_in_its_row",
    ),
    "ops/backends/triton/forward.py": (
        "ops/backends/triton/test_backend.py::test_what_runs_in_torch",
        "ops/backends/triton/test_backend.py::test_off_16_bytes_p_is_a_pass_of_its_own",
        f"{KERNELS}/test_launches.py::test_how_many_launches_a_call_takes",
        f"{KERNELS}/test_ranks.py::test_rb_has_no_limit",
        f"{KERNELS}/test_ranks.py::test_a_rank_beyond_the_kernels_runs_in_torch",
        f"{KERNELS}/test_budget.py::test_no_rows",
        f"{KERNELS}/test_operands.py::test_a_bias_of_any_stride",
        f"{KERNELS}/test_operands.py::test_the_same_sizes_at_any_address",
    ),
    "ops/backends/triton/gather.py": (
        f"{KERNELS}/test_chain.py::test_gather",
        f"{KERNELS}/test_launches.py::test_whole_blocks_take_no_masks",
    ),
    "ops/backends/triton/gemm.py": (
        f"{KERNELS}/test_gemm.py",
        f"{KERNELS}/test_launches.py::test_whole_blocks_take_no_masks",
        f"{KERNELS}/test_budget.py::test_sizes_that_blocks_divide",
        f"{KERNELS}/test_operands.py::test_an_infinity_stays_an_infinity_in_its_row",
    ),
    "ops/backends/triton/keep.py": (f"{KERNELS}/test_keep.py",),
    "ops/backends/triton/launch_cache.py": ("ops/backends/triton/test_launch_cache.py",),
    "ops/backends/triton/limits.py": ("ops/backends/triton/test_backend.py",),
    "ops/backends/triton/merge.py": (
        f"{KERNELS}/test_chain.py::test_merge",
        f"{KERNELS}/test_chain.py::test_tiles_of_a_merge",
    ),
    "ops/backends/triton/merge_stack.py": (
        f"{KERNELS}/test_chain.py::test_merge_stack",
        f"{KERNELS}/test_chain_steps.py::test_merges_from_the_weights_as_they_are_stored",
        f"{KERNELS}/test_chain_steps.py::test_merges_each_layer_from_its_own_weight",
    ),
    "ops/backends/triton/norm.py": (f"{KERNELS}/test_norm.py",),
    "ops/backends/triton/pair_grad.py": (
        f"{KERNELS}/test_chain.py::test_pair_grad",
        f"{KERNELS}/test_launches.py::test_whole_blocks_take_no_masks",
    ),
    "ops/backends/triton/reduce.py": (
        "ops/backends/triton/test_chain.py",
        f"{KERNELS}/test_chain.py::test_reduce",
        f"{KERNELS}/test_exact.py::test_a_program_adds_to_its_own_partial_sums",
    ),
    "ops/backends/triton/remake.py": (f"{KERNELS}/test_remake.py",),
    "ops/backends/triton/thin.py": (
        f"{KERNELS}/test_exact.py::test_a_program_adds_to_its_own_partial_sums",
        f"{KERNELS}/test_launches.py::test_whole_blocks_take_no_masks",
        f"{KERNELS}/test_operands.py::test_an_infinity_in_dy_stays_in_its_column",
        f"{KERNELS}/test_operands.py::test_gradients_of_any_magnitude_in_float16",
        f"{KERNELS}/test_budget.py::test_every_number_of_rows",
    ),
    "ops/backends/triton/tuning.py": (
        "ops/backends/triton/test_backend.py",
        "ops/backends/triton/test_launch_cache.py",
    ),
    "ops/chain_passes.py": ("ops/test_chains.py", "adapters/test_chained.py"),
    "ops/chains.py": ("ops/test_chains.py", *CHAINED),
    "ops/checks.py": (
        "ops/test_functional.py",
        "ops/test_autocast.py",
        "ops/entry/test_refusals.py",
        "ops/test_dispatch.py::test_a_backend_is_called_without_autocast_and_on_xs_device",
    ),
    "ops/compiled_chain.py": (
        "ops/test_chains.py::TestAsTwoOperators",
        "adapters/test_chained.py::TestInAGraph",
    ),
    "ops/cost_model.py": ("ops/test_cost_model.py", "ops/entry/test_choices.py"),
    "ops/dispatch.py": (
        "ops/test_dispatch.py",
        "ops/test_forward_over_reverse.py",
        "ops/entry/test_routes.py",
    ),
    "ops/dropout.py": ("ops/test_dropout.py",),
    "ops/dropout_mask.py": ("ops/test_dropout.py::TestMask",),
    "ops/eager_entry.py": (
        "ops/entry/test_choices.py",
        "ops/entry/test_routes.py",
        "ops/entry/test_python_backends.py",
    ),
    "ops/explain.py": ("ops/test_cost_model.py",),
    "ops/functional.py": (
        "ops/test_functional.py",
        "ops/test_gradients.py",
        "ops/test_forward_over_reverse.py::test_of_the_operators",
        "ops/test_recompute.py::test_what_is_kept",
        "ops/test_dispatch.py::test_compiled_backend_refuses_torch_func",
        "adapters/test_shared_input.py::test_torch_func",
        "ops/test_compile.py::test_frozen_weight_asks_for_no_weight_gradient",
    ),
    "ops/layer.py": (
        "ops/test_layer.py",
        "test_nn.py",
        "adapters/test_shared_input.py",
        "adapters/test_adapter_set_calls.py",
    ),
    "ops/mixed_batch.py": ("ops/test_mixed_batch.py",),
    "ops/recompute.py": ("ops/test_recompute.py",),
    "ops/reference.py": (
        "ops/test_reference.py",
        "ops/test_dropout.py::test_the_specification_takes_the_mask",
    ),
    "ops/schemas.py": (
        "ops/test_codes.py",
        "ops/test_dispatch.py::test_opcheck_forward",
        "ops/test_dispatch.py::test_opcheck_backward",
    ),
    "ops/shared_projection.py": (
        "ops/test_shared_projection.py",
        "adapters/test_shared_input.py",
    ),
    "testing/error_budget.py": ("testing/test_error_budget.py",),
    "training/averaging.py": ("training/test_updates.py",),
    "training/curves.py": ("training/test_curves.py",),
    "training/evaluation.py": ("training/test_evaluation.py", "training/test_run.py"),
    "training/loop.py": ("training/test_loop.py", "training/test_updates.py"),
    "training/rank_batches.py": (
        "training/test_rank_batches.py",
        "training/test_updates.py::test_an_image_that_does_not_count_has_no_loss",
    ),
    "training/ranks.py": ("training/test_rank_sessions.py",),
    "training/run.py": ("training/test_run.py",),
    "training/run_folder.py": ("training/test_run_folder.py",),
    "training/settings.py": ("training/test_run_folder.py", "training/test_run.py"),
    "training/updates.py": ("training/test_updates.py",),
}

# (file, line of code without its indent, what it becomes): why no result can tell.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "adapters/adapter.py",
        "if tensor.dtype != own[name].dtype and not (",
        "{tensor.dtype, own[name].dtype} < set(FLOAT_DTYPES)",
    ): "two dtypes are not all four",
    (
        "adapters/adapter_set.py",
        "for weight, bias in zip(weights, biases, strict=True):",
        "False",
    ): "they are as many, whatever the call",
    (
        "adapters/attach.py",
        'site.removeprefix(f"{block}.") for site, block in zip(linears, others, strict=True)',
        "False",
    ): "they are as many, whatever the call",
    (
        "adapters/call_watch.py",
        "warnings.warn(message, stacklevel=2)",
        "3",
    ): "a hook is called by torch, not by the user's line",
    (
        "adapters/chained.py",
        "first = self.linears[0]",
        "1",
    ): "all linears are compared with it",
    (
        "adapters/chained.py",
        "weight = parts.linears[0].weight",
        "1",
    ): "all weights are compared with it",
    (
        "adapters/chained.py",
        "if x.shape[2] != parts.linears[0].in_features or not parts.learns(x):",
        "1",
    ): "the projection is as wide",
    (
        "adapters/chained.py",
        "if x.shape[2] != parts.linears[0].in_features:",
        "1",
    ): "the projection is as wide",
    (
        "adapters/chained.py",
        "bank.group(site) is not group or type(group) is not made_of",
        "bank.group(site) is group",
    ): "kinds are then made at every call",
    (
        "adapters/chained.py",
        "bank.group(site) is not group or type(group) is not made_of",
        "type(group) is made_of",
    ): "kinds are then made at every call",
    (
        "adapters/batch_layout.py",
        "other = 1 - 2 * last if value.is_floating_point() else value.max() - last + value.min()",
        "2",
    ): "any other image does",
    (
        "adapters/batch_layout.py",
        "other = 1 - 2 * last if value.is_floating_point() else value.max() - last + value.min()",
        "3",
    ): "any other image does",
    (
        "adapters/batch_layout.py",
        "return bool((others <= _TOUCHED * change.max()).all())",
        "others < _TOUCHED * change.max()",
    ): "no change is a hundredth of the largest to the last bit",
    (
        "adapters/batch_layout.py",
        "for (name, a), (_, b) in zip(before, after, strict=False):",
        "True",
    ): "the numbers of calls are compared in the first round",
    (
        "adapters/chained.py",
        "with torch.autocast(x.device.type, enabled=False):",
        "True",
    ): "every product in it is made without autocast; this switches it once for all",
    (
        "adapters/chained.py",
        "with torch.autocast(input.device.type, enabled=False):",
        "True",
    ): "every product in it is made without autocast; this switches it once for all",
    (
        "adapters/coverage.py",
        "return known and not not_chosen(method, [Site(name, role, 0, 0, 1, 1)])",
        "1",
    ): "the role alone tells which matrices a linear stacks",
    (
        "adapters/coverage.py",
        "return known and not not_chosen(method, [Site(name, role, 0, 0, 1, 1)])",
        "2",
    ): "the role alone tells which matrices a linear stacks",
    (
        "methods/joint.py",
        "with _without_autocast(ctx.inputs[0].device):",
        "1",
    ): "all inputs are on one device",
    (
        "methods/joint.py",
        "for p, (own, version, learns) in zip(now, self.sources, strict=True)",
        "False",
    ): "they are as many",
    (
        "methods/joint.py",
        "torch._C._autograd._top_saved_tensors_default_hooks(False),",
        "True",
    ): "where something is traced, _is_traced tells",
    (
        "methods/joint.py",
        "if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:",
        "True",
    ): "where something is traced, nothing is made at once",
    (
        "methods/joint.py",
        "if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):",
        "torch.is_grad_enabled() or any((t.requires_grad for t in inputs))",
    ): "spares a node that nothing is differentiated by",
    (
        "methods/joint.py",
        "pairs = zip(outputs, inner, strict=True)",
        "False",
    ): "made from one another",
    (
        "methods/joint.py",
        "pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]",
        "False",
    ): "autograd gives a gradient for each output",
    (
        "methods/joint.py",
        "[source for source, need in zip(sources, needs, strict=True) if need],",
        "False",
    ): "autograd has a need for each input",
    (
        "interop/fact.py",
        "name = adapter.bank.group_of[sites[0].name]",
        "1",
    ): "all are of one group",
    (
        "interop/fact.py",
        "group = adapter.bank.group(sites[0].name)",
        "1",
    ): "all are of one group",
    (
        "interop/fact.py",
        "d = sites[0].width",
        "1",
    ): "a block's linears are compared with it",
    (
        "interop/name_patterns.py",
        "elif low == high and high * inside <= 8 and inner ** min(high, 64) <= MOST_WAYS:",
        "65",
    ): "2**64 is beyond the bound already, and 1**64 is 1",
    (
        "interop/files.py",
        "if unpacked > path.stat().st_size:",
        "unpacked >= path.stat().st_size",
    ): "an archive has headers beside what it holds",
    (
        "adapters/sites.py",
        "{name: Site(name, split_name(name)[1], 0, 0, *shape) for name, shape in shapes.items()},",
        "1",
    ): "block and stage are replaced by the numbers counted below",
    (
        "methods/lora.py",
        "rows = dict(zip(chosen, up.unbind(), strict=True))",
        "False",
    ): "both have the adapted matrices' number",
    (
        "methods/lora.py",
        "if dropout and self.dropout > 0:",
        "self.dropout >= 0",
    ): "spares every linear two calls",
    (
        "methods/lora.py",
        "return dict(zip(stages, ranks, strict=True))",
        "False",
    ): "the lengths were compared above",
    (
        "adapters/sites.py",
        'known = first.setdefault((id(module), IN_PROJ if stacked else ""), own)',
        "'' if stacked else IN_PROJ",
    ): "the same two keys, exchanged",
    (
        "training/averaging.py",
        "for parameter, value in zip(parameters, values, strict=True):",
        "False",
    ): "they are as many, whatever the call",
    (
        "training/settings.py",
        "torch.empty(0, device=device)",
        "1",
    ): "any tensor shows whether the device is there",
    (
        "training/loop.py",
        "updates_done = 0 if batches is None else epoch * updates.of_epoch(batches)",
        "1",
    ): "nothing counts the updates where the batches have no number",
    (
        "training/loop.py",
        "images = images.to(device, non_blocking=True)",
        "False",
    ): "spares a wait for the copy",
    (
        "training/loop.py",
        "targets = targets.to(device, non_blocking=True)",
        "False",
    ): "spares a wait for the copy",
    (
        "training/loop.py",
        "logits = model(images.to(device, non_blocking=True))",
        "False",
    ): "spares a wait for the copy",
    (
        "training/loop.py",
        "accuracy.update(logits, targets.to(device, non_blocking=True))",
        "False",
    ): "spares a wait for the copy",
    (
        "training/loop.py",
        "optimizer.zero_grad(set_to_none=True)",
        "False",
    ): "spares the zeros",
    (
        "training/updates.py",
        "if even < len(images):",
        "even <= len(images)",
    ): "an empty rest adds nothing",
    (
        "training/updates.py",
        "alone = mixup_target(targets[even:] * ~ignored, num_classes, 1.0, label_smoothing)",
        "2.5",
    ): "the rest is one image, mixed with itself",
    (
        "ops/chains.py",
        "pairs = zip(kind.biases, gammas, strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chains.py",
        "hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)",
        "True",
    ): "it differs while a graph is traced, in which there is another operator",
    (
        "ops/compiled_chain.py",
        "FORM = 3",
        "4",
    ): "a version's number, which nothing reads",
    (
        "ops/compiled_chain.py",
        "grads = [g.to(f.dtype) for g, f in zip(grads, factors, strict=True)]",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chain_passes.py",
        "return stream",
        "return None",
    ): "the gradient of x, which is not wanted here",
    (
        "ops/chain_passes.py",
        "biases = zip(*_biases(frozen, engine.dtype), strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chain_passes.py",
        "layers = zip(*(stack.unbind() for stack in (*weights, *thin)), biases, strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chain_passes.py",
        "layers = list(zip(*(stack.unbind() for stack in stacks), strict=True))",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chain_passes.py",
        "outs = list(zip(*(grad.unbind() for grad in grads), strict=True))",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chain_passes.py",
        "for kind, down, b in zip(frozen.kinds, thin[::2], thin[1::2], strict=True):",
        "False",
    ): "they are as many, whatever the call",
    (
        "methods/tensor_train.py",
        "self.place = dataclasses.replace(place, first_core=0)",
        "1",
    ): "alike in all blocks; nobody reads it",
    (
        "methods/tensor_train.py",
        "_CUDA_PARTS = 8",
        "9",
    ): "the same sum in other parts",
    (
        "methods/tensor_train.py",
        "stacks += kept, _products(other, matrices, _CUDA_PARTS if u.is_cuda else 1)",
        "1 if u.is_cuda else _CUDA_PARTS",
    ): "the same sum in other parts",
    (
        "methods/tensor_train.py",
        "stacks += kept, _products(other, matrices, _CUDA_PARTS if u.is_cuda else 1)",
        "2",
    ): "the same sum in other parts",
    (
        "methods/tensor_train.py",
        "pieces = zip(per_site.unbind(), self.sites.values(), strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "methods/tensor_train.py",
        "t * m for t, m in zip((kept, other, matrices), masks[i], strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "methods/tensor_train.py",
        "pairs = zip(products[::2], products[1::2], strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "methods/tensor_train.py",
        "for family, (kept_stack, folded_stack) in zip(self._families, pairs, strict=True):",
        "False",
    ): "they are as many, whatever the call",
    (
        "methods/tensor_train.py",
        "for site, plain, fold in zip(family.sites, kept, folded, strict=True):",
        "False",
    ): "they are as many, whatever the call",
    (
        "adapters/chained.py",
        "columns = list(zip(*(block.linears for block in self.blocks), strict=True))",
        "False",
    ): "they are as many, whatever the call",
    (
        "adapters/chained.py",
        "self._columns = list(zip(columns, zip(*places, strict=True), strict=True))",
        "False",
    ): "they are as many, whatever the call",
    (
        "adapters/chained.py",
        "keys = {group.down_key(linear._site) for group, linear in zip(groups, linears,"
        " strict=True)}",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chains.py",
        "downs, bs = zip(*linears, strict=True)",
        "False",
    ): "they are pairs, whatever the call",
    (
        "ops/dropout.py",
        "pairs = zip(dy_slices, _by_slice(d, ups, slices), strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/shared_projection.py",
        "torch._C._autograd._top_saved_tensors_default_hooks(False),",
        "True",
    ): "it differs while a graph is traced, where nothing is shared",
    (
        "methods/picked_rows.py",
        "_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]",
        "False",
    ): "torch 2.11's Dynamo can read both from Python; the mark keeps them from being guarded",
    (
        "ops/recompute.py",
        "hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)",
        "True",
    ): "it differs while a graph is traced, where nothing is looked for",
    (
        "ops/recompute.py",
        "if hooks is not None and _is_checkpoints(hooks[0]):",
        "1",
    ): "a checkpoint's two hooks are of one module",
    (
        "ops/recompute.py",
        "return tuple(n - (1 << 64) if n >= 1 << 63 else n for n in numbers)",
        "n > 1 << 63",
    ): "no dim, shift or width is -2^63",
    ("ops/explain.py", "return False", "return None"): "as false as False",
    (
        "ops/functional.py",
        "grad if needed else None for grad, needed in zip(grads, needs, strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/backends/cuda_chain.py",
        "self._finish(later, few=1)",
        "2",
    ): "how many elements a program adds up; the sums are the same",
    (
        "ops/backends/triton/configs.py",
        "return False",
        "return None",
    ): "as false as False",
    (
        "ops/backends/cuda_chain.py",
        "MOST_WIDTH, COLUMNS, MOST_RANK = 1280, 64, 16",
        "1281",
    ): "widths are multiples of 64",
    (
        "ops/backends/cuda_chain.py",
        "MOST_WIDTH_BEFORE, MOST_WIDTH_PAIR, MOST_WIDTH_GELU = 768, 1024, 4096",
        "769",
    ): "widths are multiples of 64",
    (
        "ops/backends/cuda_chain.py",
        "MOST_WIDTH_BEFORE, MOST_WIDTH_PAIR, MOST_WIDTH_GELU = 768, 1024, 4096",
        "4097",
    ): "widths are multiples of 64",
    (
        "ops/backends/cuda_chain.py",
        "MOST_WIDTH_BEFORE, MOST_WIDTH_PAIR, MOST_WIDTH_GELU = 768, 1024, 4096",
        "1025",
    ): "widths are multiples of 64",
    (
        "ops/backends/triton/tuning.py",
        "_INTERPRETER_GEMM = GemmConfig(32, 64, 16, 2, 4, 1)",
        "2",
    ): "the interpreter has no stages",
    (
        "ops/backends/triton/tuning.py",
        "_INTERPRETER_PASS = PassConfig(32, 16, 2, 4, 1)",
        "2",
    ): "the interpreter has no stages",
    (
        "ops/backends/triton/tuning.py",
        "MOST_CROSSED = 128",
        "129",
    ): "blocks are powers of two",
    (
        "ops/backends/triton/tuning.py",
        "wide = sizes % 16 == 0 and (rank % 16 == 0 or rank <= 16)",
        "rank < 16",
    ): "16 is a multiple of itself",
    (
        "ops/backends/triton/tuning.py",
        "return sizes % 16 == 0 and (rank % 16 == 0 or rank <= TRITON_IN_PLACE_RANK)",
        "rank < TRITON_IN_PLACE_RANK",
    ): "32 is a multiple of 16",
    (
        "ops/backends/chain_steps.py",
        "mean.view(-1, 1),",
        "2",
    ): "the operator reads the numbers alone",
    (
        "ops/backends/chain_steps.py",
        "rstd.view(-1, 1),",
        "2",
    ): "the operator reads the numbers alone",
    (
        "ops/backends/triton/configs.py",
        "if rank > 16 and config.block_c > 128:  # spills at ranks of 17 to 31",
        "129",
    ): "blocks are powers of two",
}
# Of the kernels, by the same three; and why what a masked load gives instead is of no account.
_DROPPED = "what lies outside is not stored"
_MEETS_ZERO = "what lies outside is multiplied by zero, or not stored"
_KERNELS: dict[tuple[str, str, str], str] = {
    ("keep", '{"num_warps": 4},', "5"): "warps change the time alone",
    ("remake", "_BLOCK_M, _BLOCK_C, _NUM_WARPS = 8, 256, 4", "5"): "warps change the time alone",
    ("merge_stack", "_CONFIG = (64, 64, 4)  # rows, columns, warps", "5"): (
        "warps change the time alone"
    ),
    ("reduce", "_WARPS = 4", "5"): "warps change the time alone",
    (
        "norm",
        "inside = in_m[:, None] if K % BLOCK_C == 0 else in_m[:, None] & in_c",
        "K * BLOCK_C",
    ): "spares a mask",
    ("norm", "ra = 1 if down is None else down.shape[1]", "2"): "of a factor that is not there",
    ("norm", "ra = 1 if s is None else s.shape[1]", "2"): "of a factor that is not there",
    ("norm", "rb = 1 if up is None else up.shape[1]", "2"): "of a factor that is not there",
    ("act", "ra = 1 if down is None else down.shape[1]", "2"): "of a factor that is not there",
    ("act", "ra = 1 if s is None else s.shape[1]", "2"): "of a factor that is not there",
    ("act", "rb = 1 if up is None else up.shape[1]", "2"): "of a factor that is not there",
    (
        "chain",
        "MAX_WIDTH = 2048  # of the stream: the norm's kernels go over a row in one unrolled loop",
        "2049",
    ): "bounds the time of compilation: the kernels take any width",
    (
        "remake",
        "x = tl.load(x_ptr + offs_m[:, None] * stride_x_m + offs_c[None, :], mask=inside,"
        " other=0.0)",
        "0.5",
    ): _DROPPED,
    ("remake", "mean = tl.load(mean_ptr + offs_m, mask=in_m, other=0.0).to(tl.float32)", "0.5"): (
        _DROPPED
    ),
    ("remake", "rstd = tl.load(rstd_ptr + offs_m, mask=in_m, other=0.0).to(tl.float32)", "0.5"): (
        _DROPPED
    ),
    (
        "remake",
        "y *= tl.load(weight_ptr + offs_c, mask=in_c, other=0.0).to(tl.float32)[None, :]",
        "0.5",
    ): _DROPPED,
    (
        "remake",
        "y += tl.load(bias_ptr + offs_c, mask=in_c, other=0.0).to(tl.float32)[None, :]",
        "0.5",
    ): _DROPPED,
    (
        "merge_stack",
        "weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)",
        "0.5",
    ): _DROPPED,
    (
        "merge_stack",
        "gamma = tl.load(gamma_ptr + first * N + offs_n, mask=offs_n < N, other=0.0)",
        "0.5",
    ): _DROPPED,
    ("act", "da = tl.load(dout_ptr + offs, mask=inside, other=0.0).to(tl.float32)", "0.5"): (
        _MEETS_ZERO
    ),
    (
        "norm",
        "return tl.load(ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]",
        "0.5",
    ): _MEETS_ZERO,
    (
        "norm",
        "z = tl.load(z_ptr + offs, mask=in_m[:, None] & in_c, other=0.0).to(tl.float32)",
        "0.5",
    ): _MEETS_ZERO,
    (
        "norm",
        "z = tl.load(z_ptr + offs_m[:, None] * K + offs_c[None, :], mask=inside, other=0.0)",
        "0.5",
    ): _MEETS_ZERO,
    (
        "gather",
        "p = tl.load(p_ptr + offs_m[:, None] * ra + offs_a[None, :], mask=in_p, other=0.0)",
        "0.5",
    ): _MEETS_ZERO,
    (
        "pair_grad",
        "tall = tl.load(tall_ptr + offs_m[:, None] * C + offs_c[None, :], mask=inside, other=0.0)",
        "0.5",
    ): _MEETS_ZERO,
    (
        "backward",
        "strided=any(t is not None and rows(t) is not t for t in (dy, x, p)),",
        "t is not None or rows(t) is not t",
    ): "spares what rows finds to do nothing",
    ("forward", "return buffer if ra == rank_a else buffer[:, :ra]", "ra != rank_a"): (
        "whole, the buffer gets zeros beyond the rank, which nothing reads"
    ),
    ("reduce", "TILE = tl.constexpr(4096)  # and its loads at a time", "4097"): (
        "the same whole number of parts"
    ),
    ("reduce", "elif pid < end_4:", "pid <= end_4"): "the grid ends there",
    ("reduce", "rows: int = 0", "1"): "of a sum that is not there",
    ("reduce", "cols: int = 1", "2"): "of a sum that is not there",
    ("reduce", "padded_cols: int = 16", "17"): "of a sum that is not there",
    ("reduce", "for i, (size, end) in enumerate(zip(sizes, ends, strict=True)):", "False"): (
        "made from one another"
    ),
    ("thin", "tall = tl.load(tall_ptrs, mask=in_m[:, None], other=0.0)", "0.5"): _MEETS_ZERO,
    (
        "thin",
        "tall = tl.load(tall_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)",
        "0.5",
    ): _MEETS_ZERO,
    ("epilogue", "t = tl.load(p_ptrs + offs_b[None, :], mask=in_p, other=0.0)", "0.5"): (
        _MEETS_ZERO
    ),
    ("epilogue", "t = tl.where(in_b[None, :], t_acc, 0.0).to(dtype)", "0.5"): _MEETS_ZERO,
    ("epilogue", "other=0.0,", "0.5"): _MEETS_ZERO,
    (
        "epilogue",
        "p_block = tl.load(p_ptrs + offs_a[None, :], mask=in_m[:, None] & in_a, other=0.0)",
        "0.5",
    ): _MEETS_ZERO,
    (
        "gemm",
        "a = tl.load(a_ptrs, mask=(offs_i < shape.I - i)[None, :], other=0.0)",
        "0.5",
    ): _MEETS_ZERO,
    ("gemm", "stride_p_m=0 if p is None else p.stride(0),", "1"): "of a P that is not there",
    (
        "chain",
        'cache = self._cache("merge", b, weight.shape, weight.dtype, gamma is None)',
        "gamma is not None",
    ): "the same two keys, exchanged",
    (
        "merge",
        "weight_ptr + rows[:, None] * stride_weight_n + offs_k[None, :], mask=inside, other=0.0",
        "0.5",
    ): _DROPPED,
    ("merge", "other=0.0,", "0.5"): _MEETS_ZERO,
    ("gather", "dy = tl.load(dy_ptrs, mask=inside, other=0.0)", "0.5"): _MEETS_ZERO,
}
EQUIVALENT |= {
    (f"ops/backends/triton/{name}.py", before, after): why
    for (name, before, after), why in _KERNELS.items()
}

Tests = dict[str, tuple[float, set[int]]]  # by name: seconds, and the lines that ran
Steps = tuple[tuple[str, int], ...]  # field, and index in a list or -1, from the module to a node

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitAnd,
    ast.RShift: ast.LShift,
}


@dataclass(frozen=True)
class Fault:
    """One change to one file.

    Attributes:
        file: within the package.
        line: its number.
        before: the line of code, without its indent.
        after: the changed piece of it.
        module: the whole, unchanged, which all faults of a file share.
        path: to the piece, from the module.
        piece: what stands there instead.
    """

    file: str
    line: int
    before: str
    after: str
    module: ast.Module
    path: Steps
    piece: ast.AST

    @property
    def tree(self) -> ast.Module:
        """The whole changed module."""
        return _put(self.module, self.path, self.piece)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}\n  - {self.before}\n  + {self.after}"


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
        yield ast.Compare(node.left, [_COMPARED[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        yield ast.BinOp(node.left, _COMPUTED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(node.value * 2 + 0.5)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Return) and node.value is not None:
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(ast.Constant(None))
    elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(
        node, ast.AugAssign
    ):
        yield ast.Pass()


def _left_alone(node: ast.AST) -> bool:
    """Texts of errors, annotations, and what the type checker alone reads."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "extra_repr", "__str__"):
        return True
    return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)


def _places(node: ast.AST, where: Steps = ()) -> Iterator[tuple[Steps, ast.AST]]:
    """(path to a node, the node) of all that may be changed."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST) and not _left_alone(child):
                path = (*where, (field, index if isinstance(value, list) else -1))
                yield path, child
                yield from _places(child, path)


def _put(tree: ast.Module, path: Steps, new: ast.AST) -> ast.Module:
    tree = copy.deepcopy(tree)
    node: object = tree
    for field, index in path[:-1]:
        value = getattr(node, field)
        node = value if index < 0 else value[index]
    field, index = path[-1]
    if index < 0:
        setattr(node, field, new)
    else:
        getattr(node, field)[index] = new
    return ast.fix_missing_locations(tree)


def faults_of(file: str) -> list[Fault]:
    """Every fault of a file that may change a result."""
    return [f for f in all_of(file) if (f.file, f.before, f.after) not in EQUIVALENT]


def all_of(file: str) -> list[Fault]:
    """Every fault of a file."""
    source = (PACKAGE / file).read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    found: list[Fault] = []
    for path, node in _places(tree):
        for new in _changes(node):
            ast.copy_location(new, node)
            line: int = node.lineno  # type: ignore[attr-defined]
            before, after = lines[line - 1].strip(), ast.unparse(new)
            found.append(Fault(file, line, before, after, tree, path, new))
    return found


class _FromMemory(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module of the package with a fault in it."""

    def __init__(self, fault: Fault) -> None:
        self.path = PACKAGE / fault.file
        parts = ("efft_kernels", *Path(fault.file).with_suffix("").parts)
        self.name = ".".join(parts).removesuffix(".__init__")
        self.source = ast.unparse(fault.tree)

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        # Triton takes a kernel's source, not its code.
        lines = self.source.splitlines(keepends=True)
        linecache.cache[str(self.path)] = (len(self.source), None, lines, str(self.path))
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


class _Warm:
    """A file's tests in a fork that imports what they need once: first as they are, noting of each
    its seconds and which lines of the file ran; then, in forks of the fork, again for every fault
    that can be put in place of functions that are there already.

    Sends the tests, or None where one fails; then a set of the faults that were noticed.
    """

    def __init__(self, file: str, faults: Sequence[Fault], found: Connection) -> None:
        self.path = str(PACKAGE / file)
        self.faults, self.found = faults, found
        self.tests: Tests = {}
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = session.items
        for item, after in zip(items, [*items[1:], None], strict=True):
            start, lines = time.monotonic(), self._lines_of(item, after)
            self.tests[item.nodeid] = (time.monotonic() - start, lines)
        self.found.send(None if self.failed else self.tests)
        if not self.failed:
            self.found.send(self._noticed(items))
        return True

    def _lines_of(self, item: pytest.Item, after: pytest.Item | None) -> set[int]:
        lines: set[int] = set()

        def line(frame: FrameType, event: str, argument: object) -> Any:
            lines.add(frame.f_lineno)
            return line

        def call(frame: FrameType, event: str, argument: object) -> Any:
            return line if frame.f_code.co_filename == self.path else None

        sys.settrace(call)
        try:
            item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
        finally:
            sys.settrace(None)
        return lines

    def _noticed(self, items: Sequence[pytest.Item]) -> set[int]:
        """The faults, by their number, that a test noticed."""
        live = _live_functions(self.path)
        gc.collect()
        gc.freeze()
        # First without a fault, in the order of seconds, which is that of faults: tests that cannot
        # run again so would notice everything.
        if not self.faults or not self._pass_again(items, [], NOWHERE):
            return set()
        noticed = set()
        for number, fault in enumerate(self.faults):
            swaps = _swaps(fault, live)
            if swaps and not self._pass_again(items, swaps, fault.line):
                noticed.add(number)
        return noticed

    def _pass_again(self, items: Sequence[pytest.Item], swaps: _Swaps, line: int) -> bool:
        """Whether the tests pass once more, in a fork with the functions' other code."""
        process = os.fork()
        if not process:
            try:
                os._exit(self._run_again(list(items), swaps, line))
            except BaseException:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0

    def _run_again(self, items: list[pytest.Item], swaps: _Swaps, line: int) -> int:
        for function, code in swaps:
            function.__code__ = code
        order = _Order(self.tests, line)
        order.pytest_collection_modifyitems(items)
        for item, after in zip(items, [*items[1:], None], strict=True):
            order.pytest_runtest_protocol(item)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
            if self.failed:
                return 1
        return 0


_Place = tuple[str, int]  # of a function in its file: its name and first line
_Swaps = list[tuple[FunctionType, CodeType]]


def _live_functions(path: str) -> dict[_Place, list[FunctionType]]:
    """All functions that a file has made."""
    gc.unfreeze()
    found: dict[_Place, list[FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename == path:
            found.setdefault(_place(thing.__code__), []).append(thing)
    return found


def _place(code: CodeType) -> _Place:
    return code.co_name, code.co_firstlineno


def _codes(
    code: CodeType, around: tuple[CodeType, ...] = ()
) -> Iterator[tuple[CodeType, tuple[CodeType, ...]]]:
    """A module's code and that of all its functions, each with those that it is written in."""
    yield code, around
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant, (*around, code))


def _is_same(code: CodeType, other: CodeType) -> bool:
    """Whether they differ at most in the functions within."""

    def own(code: CodeType) -> tuple[object, ...]:
        constants = [repr(c) for c in code.co_consts if not isinstance(c, CodeType)]
        return code.co_code, code.co_names, code.co_varnames, constants

    return own(code) == own(other)


def _as_it_runs(tree: ast.Module) -> ast.Module:
    """A module; in the interpreter with the functions that Triton makes of its kernels, whose first
    line is that of `def`."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return tree
    from triton.runtime.interpreter import FunctionRewriter

    tree = copy.deepcopy(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and is_kernel(node):
            node.decorator_list = []
            FunctionRewriter.ast_transformer.visit(node)
    return ast.fix_missing_locations(tree)


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether Triton takes it from Python, be it to launch or for another kernel to call."""
    return any("triton.jit" in ast.unparse(each) for each in function.decorator_list)


def _swaps(fault: Fault, live: dict[_Place, list[FunctionType]]) -> _Swaps | None:
    """The functions that a fault changes, with the code that they then have; None where it changes
    what runs at import, or which variables a function has from around it, or where two functions
    stand in one place."""
    path = str(PACKAGE / fault.file)
    modules = (_as_it_runs(tree) for tree in (fault.module, fault.tree))
    before, after = (list(_codes(compile(module, path, "exec"))) for module in modules)
    places = [_place(code) for code, _ in after]
    if [_place(code) for code, _ in before] != places:
        return None
    found: dict[_Place, _Swaps] = {}
    for (old, _), (new, around) in zip(before, after, strict=True):
        if _is_same(old, new):
            continue
        # What makes it anew has its code within its own.
        changed = [code for code in (new, *around) if _place(code) in live]
        if not changed or any(places.count(_place(code)) > 1 for code in (new, *around)):
            return None
        for code in changed:
            functions = live[_place(code)]
            if any(f.__code__.co_freevars != code.co_freevars for f in functions):
                return None  # it reads other variables of what is around it
            found[_place(code)] = [(function, code) for function in functions]
    return list(itertools.chain(*found.values())) or None


class _Order:
    """First the tests in which the faulty line ran, the short ones before the long ones, each for
    ten times what it took without the fault."""

    def __init__(self, tests: Tests, line: int) -> None:
        self.tests, self.line = tests, line

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def place(item: pytest.Item) -> tuple[bool, float]:
            seconds, lines = self.tests.get(item.nodeid, (0.0, {self.line}))
            return self.line not in lines, seconds

        short = sorted((item for item in items if place(item)[1] < LONG), key=place)
        ran = [item for item in short if not place(item)[0]]
        others = short[len(ran) :]
        ends = itertools.accumulate(place(item)[1] for item in others)
        within = [item for item, end in zip(others, ends, strict=True) if end <= OTHERS]
        items[:] = ran + (within if ran else others)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        signal.setitimer(signal.ITIMER_REAL, 10 + 10 * self.tests.get(item.nodeid, (0.0,))[0])


def _pytest(tests: Sequence[str], plugin: object) -> int:
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half a second a fault
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    return int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)], [plugin]))


def _warm(file: str, faults: Sequence[Fault], found: Connection) -> None:
    _pytest(FILES[file], _Warm(file, faults, found))
    found.close()
    os._exit(0)


def _try(fault: Fault, files: Sequence[str], tests: Tests) -> None:
    sys.meta_path.insert(0, _FromMemory(fault))
    os._exit(_pytest(files, _Order(tests, fault.line)))


def try_all(file: str, faults: Sequence[Fault]) -> list[Fault] | None:
    """The faults of a file that no test notices, or None where a test fails without a fault.

    One that is not noticed where it is swapped in, or cannot be, is tried in a process of its own:
    what ran at import or was cached has it only there.
    """
    context = multiprocessing.get_context("fork")
    found, end = context.Pipe(duplex=False)
    process = context.Process(target=_warm, args=(file, faults, end))
    process.start()
    end.close()
    try:
        tests = found.recv() if found.poll(SECONDS) else None
        if tests is None:
            return None
        try:
            noticed = found.recv()
        except EOFError:  # the fork died: all are tried alone
            noticed = set()
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()
    left = [fault for number, fault in enumerate(faults) if number not in noticed]
    return [fault for fault in left if passes(fault, tests)]


def passes(fault: Fault, tests: Tests) -> bool:
    """Whether the tests of its file pass with a fault, in a fork, within the time."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_try, args=(fault, FILES[fault.file], tests))
    process.start()
    process.join(60 + 10 * sum(seconds for seconds, _ in tests.values()))
    if process.exitcode is None:
        process.kill()
        process.join()
        return False
    return process.exitcode == 0


def is_interpreted(file: str) -> bool:
    """Whether a file's tests run in Triton's interpreter."""
    return any(test.startswith(KERNELS) for test in FILES[file])


def load() -> None:
    """What the tests import is loaded once, before the forks."""
    import hypothesis  # noqa: F401
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    assert not any(name.partition(".")[0] == "efft_kernels" for name in sys.modules)


def try_files(
    of_files: Mapping[str, Sequence[Fault]], jobs: int
) -> Iterator[tuple[str, list[Fault] | None]]:
    """(file, what `try_all` says of it), so many files at a time."""
    for interpreted in (False, True):
        own = [file for file in of_files if is_interpreted(file) == interpreted]
        if not own:
            continue
        # Processes, not threads: a fork of a thread is no main thread to those who ask.
        if interpreted:
            os.environ["TRITON_INTERPRET"] = "1"
            pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), load)
        else:
            load()
            pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"))
        try:
            results = pool.map(try_all, own, [of_files[file] for file in own])
            yield from zip(own, results, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def draw(faults: Sequence[Fault], count: int, seed: int) -> list[Fault]:
    """`count` of the faults, or all for 0, as many of each file as its share."""
    if not count or count >= len(faults):
        return list(faults)
    step, start = len(faults) / count, random.Random(seed).random()
    return [faults[int((start + i) * step)] for i in range(count)]


def line_range(text: str) -> range:
    """The lines of "N" or "N-M"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Small faults: which do the tests notice?")
    parser.add_argument("--sample", type=int, default=40, help="how many faults; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", nargs="+", choices=FILES, default=list(FILES), metavar="FILE")
    parser.add_argument(
        "--lines", nargs="+", type=line_range, metavar="N[-M]", help="of these lines alone"
    )
    parser.add_argument("--jobs", type=int, default=1, help="files tried at a time")
    parser.add_argument("--csv", type=Path, help="append the score of each file to this one")
    options = parser.parse_args()
    commit = present_commit()
    everything = [fault for file in options.only for fault in faults_of(file)]
    if options.lines is not None:
        lines = set().union(*options.lines)
        everything = [fault for fault in everything if fault.line in lines]
        if not everything:
            parser.error("--lines: no fault is known in these lines of the files chosen")
    chosen = draw(everything, options.sample, options.seed)
    start, passed = time.monotonic(), 0
    of_files = {
        file: list(faults)
        for file, faults in itertools.groupby(chosen, key=lambda fault: fault.file)
    }
    for file, survivors in try_files(of_files, options.jobs):
        if survivors is None:
            named = " ".join(FILES[file])
            sys.exit(f"error: without a fault the tests of {file} fail or take too long: {named}")
        for fault in survivors:
            print(f"passes: {fault}")
        tried = len(of_files[file])
        print(f"{file}: {tried - len(survivors)} of {tried}", flush=True)
        if options.csv is not None:
            numbers = [options.seed, file, tried, tried - len(survivors)]
            append_score(options.csv, commit, numbers)
        passed += len(survivors)
    caught = len(chosen) - passed
    score = 100 * caught / len(chosen)
    print(f"{caught} of {len(chosen)} caught, {score:.1f} %, {time.monotonic() - start:.0f} s")
    sys.exit(0)


def present_commit() -> str:
    """HEAD's short name, "+" behind it where files are changed: to be asked for before a run."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def append_score(path: Path, commit: str, numbers: Sequence[object]) -> None:
    """Append (seed, file, faults tried, caught) to a CSV file, with date and the commit tried."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["date", "commit", "seed", "file", "faults", "caught"])
        writer.writerow([time.strftime("%Y-%m-%d"), commit, *numbers])


if __name__ == "__main__":
    main()

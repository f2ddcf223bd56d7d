"""Small faults put into the core, one at a time: which of them do the tests notice?

    python -m tools.mutate [--sample 40] [--seed 7] [--only adapters/sites.py ...] [--jobs 2]
                           [--csv FILE]

A fault is one changed comparison, number, operator or condition, or one statement left out. Each is
tried in a fork of this process, which has torch and the test's libraries loaded already and gets
the changed module from memory: nothing is written to the sources. A file's tests run once without a
fault, which says in which of them a line runs; those come first. Tests longer than LONG are left
out. Faults are drawn over all of FILES, or --sample 0 tries every one. A fault that passes is
printed as a diff; one that cannot change any result belongs in EQUIVALENT, with the reason.

Not here: mutmut and cosmic-ray start a process and import torch for every fault, ten seconds each.
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import functools
import gc
import importlib.abc
import importlib.util
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "efft_kernels"
SECONDS = 900.0  # for a file's tests without a fault, traced
LONG = 10.0  # seconds of a test that is not run for every fault

CHAINED = tuple(
    f"adapters/test_chained.py::{name}"
    for name in (
        "test_is_the_model_of_lone_linears",
        "test_layer_scale",
        "test_one_block_without_layer_scale",
        "test_the_modules_run_where_the_chain_does_not_do",
        "test_describe_says_why_a_chain_does_not_run_in_training",
        "TestTraining",
        "TestTheModelIsTheSame",
        "TestAttach",
    )
)
# Module → the tests that are about it, files or classes of them; these alone are run. Not
# training/ranks.py, whose tests start processes of their own that would not have the fault.
FILES: dict[str, tuple[str, ...]] = {
    "adapters/adapter.py": (
        "adapters/test_adapter.py",
        "adapters/test_adapter_state.py",
        "adapters/test_attach.py",
        "adapters/test_description.py",
        "adapters/test_distributed.py::test_on_one_process",
        "adapters/test_chained.py::test_describe_says_why_a_chain_does_not_run_in_training",
        "adapters/test_chained.py::TestTheModelIsTheSame",
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
        "adapters/test_chained.py::TestAttach",
    ),
    "adapters/attachment.py": (
        "adapters/test_attach.py",
        "adapters/test_adapter.py",
        "adapters/test_adapter_state.py",
        "adapters/test_adapter_set_calls.py",
        "adapters/test_call_watch.py",
        "test_nn.py::TestFactorBank",
    ),
    "adapters/batch_layout.py": ("adapters/test_adapter_set_calls.py",),
    "adapters/bypassed.py": (
        "adapters/test_coverage.py",
        "adapters/test_call_watch.py",
        "adapters/test_torch_attention.py::test_attentions_that_cannot_be_adapted",
    ),
    "adapters/call_watch.py": ("adapters/test_call_watch.py",),
    "adapters/chained.py": (*CHAINED, "adapters/test_chained.py::TestInAGraph"),
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
    "interop/left_out.py": ("interop/test_hub.py", "interop/test_trainer.py"),
    "interop/lightning.py": ("interop/test_lightning.py",),
    "interop/name_patterns.py": ("interop/test_damaged_files.py::TestNamePatterns",),
    "interop/peft.py": ("interop/test_peft.py", "interop/test_damaged_files.py::TestPeft"),
    "interop/trainer.py": ("interop/test_trainer.py",),
    "methods/base.py": ("methods/test_base.py", "methods/test_registry.py"),
    "methods/efft.py": ("methods/test_efft.py", "methods/test_base.py"),
    "methods/fact.py": ("methods/test_fact.py", "methods/test_base.py"),
    "methods/joint.py": ("adapters/test_joint_factors.py",),
    "methods/kadaptation.py": ("methods/test_kadaptation.py", "methods/test_base.py"),
    "methods/lora.py": ("methods/test_lora.py", "methods/test_base.py"),
    "methods/registry.py": ("methods/test_base.py", "methods/test_registry.py"),
    "methods/sharded.py": ("adapters/test_distributed.py::test_on_one_process",),
    "methods/tensor_train.py": (
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
    ),
    "ops/backends/chain_steps.py": ("ops/test_chains.py", "ops/backends/test_cuda_chain.py"),
    "ops/backends/cpp_backend.py": (
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
    "ops/backends/triton/configs.py": (
        "ops/backends/triton/test_backend.py",
        "ops/backends/triton/test_launch_cache.py",
        "tools/test_tune_triton.py",
    ),
    "ops/backends/triton/cost.py": ("ops/test_cost_model.py",),
    "ops/backends/triton/device.py": ("ops/backends/triton/test_backend.py",),
    "ops/backends/triton/launch_cache.py": ("ops/backends/triton/test_launch_cache.py",),
    "ops/backends/triton/tuning.py": (
        "ops/backends/triton/test_backend.py",
        "ops/backends/triton/test_launch_cache.py",
    ),
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
    "ops/functional.py": ("ops/test_functional.py", "ops/test_gradients.py"),
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
    "training/evaluation.py": ("training/test_loop.py", "training/test_run.py"),
    "training/loop.py": ("training/test_loop.py", "training/test_updates.py"),
    "training/rank_batches.py": ("training/test_rank_batches.py",),
    "training/run.py": ("training/test_run.py",),
    "training/run_folder.py": ("training/test_run_folder.py",),
    "training/settings.py": ("training/test_run_folder.py", "training/test_run.py"),
    "training/updates.py": ("training/test_updates.py",),
}

# (file, line of code without its indent, what it becomes): why no result can tell.
EQUIVALENT: dict[tuple[str, str, str], str] = {
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
        "with torch.autocast(ctx.inputs[0].device.type, enabled=False):",
        "1",
    ): "all inputs are on one device",
    (
        "methods/joint.py",
        "for (p, version), now in zip(self.sources, group._parameters.values(), strict=True)",
        "False",
    ): "a group has as many parameters later in a forward",
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
        "interop/files.py",
        "if unpacked > path.stat().st_size:",
        "unpacked >= path.stat().st_size",
    ): "an archive has headers beside what it holds",
    (
        "methods/efft.py",
        "placements[site.name] = Placement(first, site.slices, side, (0, 4 * d))",
        "5",
    ): "rows beyond the last of U are none",
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
        "return dict(zip(stages, ranks, strict=True))",
        "False",
    ): "the lengths were compared above",
    (
        "methods/lora.py",
        "up = up if self.scale == 1.0 else up * self.scale",
        "2.5",
    ): "spares a product by one",
    (
        "adapters/sites.py",
        'known = first.setdefault((id(module), IN_PROJ if stacked else ""), own)',
        "'' if stacked else IN_PROJ",
    ): "the same two keys, exchanged",
    (
    (
        "ops/chains.py",
        "more = [o if t is None else t for t, o in zip(saved, ctx.others, strict=True)]",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chains.py",
        "for first, *others in zip(*map(_linears, layers), strict=True):",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chains.py",
        "for layer, qkv, proj, fc1, fc2 in zip(layers, *stacks, strict=True):",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chains.py",
        "kinds = zip(*map(_linears, layers), strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/chains.py",
        "stacks = zip(merged.unbind(), biases, down.unbind(), b.unbind(), strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/compiled_chain.py",
        "for layer, qkv, proj, fc1, fc2 in zip(layers, *stacks, strict=True):",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/compiled_chain.py",
        "[Linear(w, None, w, b) for w, b in zip(*map(torch.unbind, pair), strict=True)]",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/compiled_chain.py",
        "for pair in zip(weights, bs, strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/compiled_chain.py",
        "return dx, [g.to(f.dtype) for g, f in zip(grads, factors, strict=True)]",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/dropout.py",
        "pairs = zip(dy_slices, _by_slice(d, ups, slices), strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/functional.py",
        "grad if needed else None for grad, needed in zip(grads, needs, strict=True)",
        "False",
    ): "they are as many, whatever the call",
    (
        "ops/backends/cuda_chain.py",
        "MOST_WIDTH, COLUMNS, MOST_RANK = 1024, 64, 16  # csrc/cuda/norm/sizes.h",
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

"""The C++ entry point with the Triton backend, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from efft_kernels import low_rank_linear, use_backend

from .both_ways import (
    FACTORS,
    FORMS,
    NAMES,
    assert_identical,
    on_both_ways,
    operands,
    step,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
class TestTriton:
    """By test_triton_in_the_interpreter, in a process of its own."""

    @pytest.fixture(autouse=True)
    def _triton(self) -> Iterator[None]:
        with use_backend("triton"):
            yield

    @pytest.mark.parametrize("strategy", ["fused", "split", "merged"])
    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_same_bits(self, dtype, form, strategy, python_calls):
        for lead in ((11,), (2, 3), (0,)):
            tensors = operands(lead, **form, dtype=dtype)
            found, expected = on_both_ways(lambda t=tensors: step(t, strategy=strategy))
            assert_identical(found, expected)
        assert len(python_calls) == 3

    @pytest.mark.parametrize("wanted", [(n,) for n in NAMES] + [FACTORS, ("x", "up")], ids=str)
    def test_same_gradients_of_any_subset(self, wanted):
        tensors = operands()
        found, expected = on_both_ways(lambda: step(tensors, wanted))
        assert_identical(found, expected)
        for name, grad in zip(NAMES, found[1:], strict=True):
            assert (grad is not None) == (name in wanted)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_under_autocast(self, use_reentrant):
        tensors = operands((4, 3))

        def run():
            leaves = [t.clone().requires_grad_() for t in tensors.values()]
            with torch.autocast("cpu", torch.float16):
                y = checkpoint(low_rank_linear, *leaves, use_reentrant=use_reentrant)
            y.float().sin().sum().backward()
            return [y.detach(), *(t.grad for t in leaves)]

        assert_identical(*on_both_ways(run))

    def test_second_derivatives_and_a_vmap(self):
        tensors = operands()
        inputs = [t.requires_grad_() for t in tensors.values()]

        def run():
            y = low_rank_linear(**tensors)
            first = torch.autograd.grad(y.tanh().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)
            y = low_rank_linear(**tensors)
            dys = torch.ones(2, *y.shape)
            return [*second, *torch.autograd.grad(y, inputs, dys, is_grads_batched=True)]

        for found, expected in zip(*on_both_ways(run), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="is itself")
def test_triton_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ("-q", "--no-header", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:xdist", f"{__file__}::TestTriton"],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout

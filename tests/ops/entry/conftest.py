"""Fixtures of the C++ entry point's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from efft_kernels import use_backend
from efft_kernels.ops import checks
from efft_kernels.ops.backends import torch_backend


@pytest.fixture(params=["auto", "torch"])
def backend(request) -> Iterator[str]:
    """What runs a call that names none: the native kernels, or a backend in Python."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def python_calls(monkeypatch) -> list[str]:
    """One entry for every call that functional.py checked, and so took."""
    seen = []
    real = checks.check_operands

    def check(x, *args):
        seen.append(type(x).__name__)
        return real(x, *args)

    monkeypatch.setattr(checks, "check_operands", check)
    return seen


@pytest.fixture
def torch_calls(monkeypatch) -> list[str]:
    """The strategy of every forward of the torch backend."""
    seen = []
    real = torch_backend.forward

    def forward(*args, strategy, **kwargs):
        seen.append(strategy)
        return real(*args, strategy=strategy, **kwargs)

    monkeypatch.setattr(torch_backend, "forward", forward)
    return seen

"""What the tests of the handle and of its file share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from efft_kernels import EFFT1, Adapter, attach, use_backend
from efft_kernels.methods import Method
from efft_kernels.ops import chains
from efft_kernels.testing.cpu_chain import cpu_engine


@pytest.fixture
def in_torch() -> Iterator[None]:
    """Plain torch, where separate q, k and v share one x·down."""
    with use_backend("torch"):
        yield


@pytest.fixture
def adapted(
    make_vit: Callable[..., nn.Module], randomize: Callable[[Any], None]
) -> Callable[..., tuple[nn.Module, Adapter]]:
    """(model, adapter) with random factors and a head that has moved."""

    def make(
        method: Method | None = None,
        distilled: bool = False,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> tuple[nn.Module, Adapter]:
        model = make_vit(distilled, dtype)
        adapter = attach(model, method or EFFT1(rank=3, scale=0.5), **options)
        randomize(adapter)
        with torch.no_grad():
            model.get_submodule("head").weight.add_(1.0)
        return model.eval(), adapter

    return make


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The chains that ran. What runs one takes tensors of the CPU, in any dtype."""

    def run_stacks(*arguments: Any) -> torch.Tensor:
        found.append(arguments)
        return run(*arguments)

    found: list[tuple[Any, ...]] = []
    run = chains.run_stacks
    monkeypatch.setattr(chains, "refusal", lambda x: None)
    monkeypatch.setattr(chains, "engine_for", lambda x, heads, rank: cpu_engine(x.dtype))
    monkeypatch.setattr(chains, "run_stacks", run_stacks)
    return found


@pytest.fixture
def exchange_groups() -> Callable[[nn.Module], None]:
    """Put a copy in the place of each group in a model's bank, with other cores."""

    def exchange(model: nn.Module) -> None:
        bank: Any = model.factor_bank
        for name, group in list(bank.named_children()):
            other = copy.deepcopy(group)
            with torch.no_grad():
                other.core.mul_(-3.0)
            setattr(bank, name, other)

    return exchange

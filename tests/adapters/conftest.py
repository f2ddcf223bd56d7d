"""What the tests of the handle and of its file share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from efft_kernels import EFFT1, Adapter, attach
from efft_kernels.methods import Method


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
def unchanged() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """A context at whose end a model has the module types, very parameters and values it had."""

    def snapshot(model: nn.Module) -> Any:
        return (
            [(name, type(module)) for name, module in model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        )

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = snapshot(model)
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        yield
        assert snapshot(model) == before
        state = model.state_dict()
        assert state.keys() == values.keys()
        assert all(torch.equal(tensor, values[name]) for name, tensor in state.items())

    return check

"""What the tests of the handle and of its file share."""

from __future__ import annotations

from collections.abc import Callable
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

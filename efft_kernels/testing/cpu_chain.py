"""What runs a chain on the CPU, in any dtype: plain torch, in the place of a GPU's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.backends.chain_steps import TorchSteps, aten
from ..ops.chains import Attention, Engine


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return o, (lse,)


def _attention_grad(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, False
    )


CPU_ATTENTION = Attention(_attention, _attention_grad, 1, lambda tensors, _: tensors)


def cpu_engine(dtype: torch.dtype, steps: TorchSteps | None = None) -> Engine:
    """An engine whose GEMMs are in `dtype`; its steps are plain torch's unless others are given."""
    return Engine(steps or TorchSteps(), CPU_ATTENTION, dtype)

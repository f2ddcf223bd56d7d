"""What runs a chain on the CPU, in any dtype: plain torch, in the place of a GPU's kernels. And
blocks for one, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import chains
from ..ops.backends.chain_steps import Norm, TorchSteps, aten
from ..ops.chain_passes import Attention, Engine, Frozen, FrozenLinears


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


class Adapted(NamedTuple):
    """An adapted linear of one layer as the model has it, and the LayerScale after it."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    down: Tensor  # [K, r], differentiable
    b: Tensor  # [N, r], differentiable
    gamma: Tensor | None = None  # [N], of all layers' linears of one kind or of none


class Layer(NamedTuple):
    """One block."""

    norm1: Norm
    qkv: Adapted
    proj: Adapted
    norm2: Norm
    fc1: Adapted
    fc2: Adapted
    heads: int

    @property
    def linears(self) -> tuple[Adapted, Adapted, Adapted, Adapted]:
        return self.qkv, self.proj, self.fc1, self.fc2


def operands(layers: Sequence[Layer]) -> tuple[Frozen, list[Tensor]]:
    """What `chains.run_stacks` runs over."""
    kinds = list(zip(*(layer.linears for layer in layers), strict=True))
    frozen = Frozen(
        [norm for layer in layers for norm in (layer.norm1, layer.norm2)],
        [
            FrozenLinears([a.weight for a in kind], [a.bias for a in kind], [a.gamma for a in kind])
            for kind in kinds
        ],
        layers[0].heads,
    )
    factors = [
        torch.stack(parts)
        for kind in kinds
        for parts in ([a.down for a in kind], [a.b for a in kind])
    ]
    return chains.scaled(frozen, factors)


def run_chain(x: Tensor, layers: Sequence[Layer], engine: Engine) -> Tensor:
    """`chains.run_stacks` over at least one layer; a kind of linear has one rank in all of them."""
    return chains.run_stacks(x, *operands(layers), engine)

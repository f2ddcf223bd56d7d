"""One layer's tensors, its implementations by name, and the correctness gate before every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels import low_rank_linear, reference
from efft_kernels.testing.error_budget import worst_ratio

from .shapes import Layer

FLOOR = "F.linear"
# On a CPU float64 einsums of all rows would take longer than the timing. On a GPU the number of
# rows decides which kernel runs, so that all are checked.
CPU_GATE_ROWS = 256


@dataclass
class Operands:
    """One layer's tensors; x and the factors are leaves that require grad."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K], frozen
    bias: Tensor  # [N]
    down: Tensor  # [K, r]
    core: Tensor  # [G, r, r]
    up: Tensor  # [1, N/G, r]
    dy: Tensor  # [M, N]

    @classmethod
    def draw(cls, layer: Layer, rank: int, dtype: torch.dtype, device: str) -> Operands:
        _, M, K, N, G = layer
        torch.manual_seed(0)

        def normal(*size: int, scale: float = 1.0, grad: bool = False) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype).mul_(scale).requires_grad_(grad)

        return cls(
            normal(M, K, grad=True),
            normal(N, K, scale=K**-0.5),
            normal(N),
            normal(K, rank, scale=K**-0.5, grad=True),
            normal(G, rank, rank, scale=rank**-0.5, grad=True),
            normal(1, N // G, rank, scale=rank**-0.5, grad=True),
            normal(M, N),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.bias, self.down, self.core, self.up


def forward_of(impl: str, o: Operands) -> Callable[[], Tensor]:
    """The forward of an implementation by name."""
    if impl == FLOOR:
        return lambda: F.linear(o.x, o.weight, o.bias)
    if impl == "peft":

        def unfused() -> Tensor:
            t = torch.einsum("ma,gab->gmb", o.x @ o.down, o.core) @ o.up.mT
            return F.linear(o.x, o.weight, o.bias) + t.transpose(0, 1).flatten(1)

        return unfused
    backend, _, strategy = impl.partition(":")
    if backend == "reference":
        return lambda: reference.low_rank_linear(*o.tensors())
    return lambda: low_rank_linear(*o.tensors(), backend=backend, strategy=strategy or "auto")


def call_of(impl: str, mode: str, o: Operands) -> Callable[[], object]:
    """What is timed, without the drawing of operands.

    Modes: "fwd" the forward without a graph; "train fwd" the forward as in training, which saves P;
    "bwd" the backward of a graph that is there already; "fwd+bwd" both.
    """
    forward = forward_of(impl, o)
    if mode == "fwd":

        def inference() -> Tensor:
            with torch.no_grad():
                return forward()

        return inference
    if mode == "train fwd":
        return forward
    wanted = [o.x] if impl == FLOOR else [o.x, o.down, o.core, o.up]
    if mode == "bwd":
        y = forward()
        return lambda: torch.autograd.grad(y, wanted, o.dy, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), wanted, o.dy)


class Gate:
    """The error of an implementation on a layer, over plain torch's.

    Both are taken against float64; a ratio of at most 2 passes.
    """

    def __init__(self, layer: Layer, rank: int, dtype: torch.dtype, device: str) -> None:
        name, m, k, n, g = layer
        m = min(m, CPU_GATE_ROWS) if device == "cpu" else m
        self.operands = o = Operands.draw((name, m, k, n, g), rank, dtype, device)
        exact = Operands(
            *(t.detach().double().requires_grad_(t.requires_grad) for t in (*o.tensors(), o.dy))
        )
        self.exact = _results("reference", exact)
        self.plain = _results("reference", o)

    def error(self, impl: str) -> float:
        """The largest ratio over y and the gradients.

        Raises:
            RuntimeError, ValueError: the implementation cannot run here.
        """
        return worst_ratio(_results(impl, self.operands), self.plain, self.exact)


def _results(impl: str, o: Operands) -> list[Tensor]:
    y = forward_of(impl, o)()
    return [y.detach(), *torch.autograd.grad(y, (o.x, o.down, o.core, o.up), o.dy)]

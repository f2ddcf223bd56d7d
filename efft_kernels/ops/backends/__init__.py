"""What computes the operator: plain torch, the compiled libraries of csrc, and Triton.

A backend is a module with the names of `Implementation` and one line in `REGISTRY`. The dispatcher
and the cost model know of it what these declare, and no backend by its name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from ..cost_model import Priced, Problem

if TYPE_CHECKING:
    from . import cpp_backend, cuda_backend, torch_backend, triton
    from .torch_backend import Grads


class Implementation(Priced, Protocol):
    """What a backend's module has, besides what the cost model needs of it (NAME, STRATEGIES,
    `excluded`, `launches`)."""

    @property
    def DTYPES(self) -> tuple[torch.dtype, ...]:
        """The dtypes of x that it takes."""
        ...

    @property
    def NATIVE(self) -> bool:
        """Whether its kernels are the native operators of csrc/schemas.cpp."""
        ...

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, and what would change that; None where it can."""
        ...

    def rejects(self, x: Tensor) -> str | None:
        """Why it cannot take an input like x; None where it can."""
        ...

    def out_of_reach(self, problem: Problem) -> bool:
        """Whether its kernels cannot compute the problem, so that plain torch runs inside it."""
        ...

    def preferred(self, problem: Problem) -> bool:
        """Whether `auto` may take it for the problem: it was measured to pay."""
        ...

    def forward(
        self,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        down: Tensor,  # [K, Ra]
        core: Tensor | None,  # [G, Ra, Rb]
        up: Tensor,  # [1 or G, N/G, Rb]
        *,
        save_p: bool,
        strategy: str,
    ) -> tuple[Tensor, Tensor | None]:
        """(y [M, N], P [M, Ra] if save_p else None), both in x's dtype."""
        ...

    def backward(
        self,
        dy: Tensor,  # [M, N]
        x: Tensor | None,  # [M, K]
        weight: Tensor,  # [N, K]
        p: Tensor | None,  # [M, Ra]
        down: Tensor,  # [K, Ra]
        core: Tensor | None,  # [G, Ra, Rb]
        up: Tensor,  # [1 or G, N/G, Rb]
        *,
        needs: tuple[bool, ...],
        strategy: str,
    ) -> Grads:
        """(dx, d_weight, d_bias, d_down, d_core, d_up); None where `needs` is False."""
        ...


@dataclass(frozen=True)
class Backend:
    """An entry of the registry: what is known of a backend before its module is imported.

    Args:
        name: what a user asks for.
        module: an `Implementation`, imported when first needed: Triton's takes seconds.
        devices: the types of x's device for which `auto` considers it; None means all.
    """

    name: str
    module: str
    devices: tuple[str, ...] | None = None

    def load(self) -> Implementation:
        """The module. Raises ImportError where something it needs is missing."""
        return cast(Implementation, importlib.import_module(self.module))


# Of those that are available and take the input, `auto` uses the last. Triton's interpreter takes
# CPU tensors, but is for tests alone, so `devices` leaves them out.
REGISTRY = {
    backend.name: backend
    for backend in (
        Backend("torch", "efft_kernels.ops.backends.torch_backend"),
        Backend("cpp", "efft_kernels.ops.backends.cpp_backend", ("cpu",)),
        Backend("triton", "efft_kernels.ops.backends.triton", ("cuda",)),
        Backend("cuda", "efft_kernels.ops.backends.cuda_backend", ("cuda",)),
    )
}

if TYPE_CHECKING:
    _ALL: tuple[Implementation, ...] = (torch_backend, cpp_backend, triton, cuda_backend)

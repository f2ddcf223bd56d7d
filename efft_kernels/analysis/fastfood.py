"""A random d-dimensional subspace of a module's D parameters, Θ = Θ0 + P·θ, in memory O(D).

P is Fastfood's product of diagonal matrices, permutations and Hadamard transforms (Le, Sarlós and
Smola, arXiv:1408.3060): with n the power of two at or above d, and ⌈D/n⌉ independent blocks below
each other, cut to D rows and d columns,

    P = 1/√(n·D) · S·H·G·Π·H·B

    B  n random signs                       H  the Hadamard matrix of ±1, H·H^T = n·I
    Π  a random permutation                 G  n standard normal numbers
    S  s/‖G‖, s² chi-squared with n degrees of freedom, so that rows are as long as Gaussian ones

It takes D·log d operations and behaves like a matrix of independent normal numbers of variance 1/D:
the columns have unit length and are orthogonal on average, E[P^T·P] = I.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


def hadamard_transform(x: Tensor) -> Tensor:
    """x·H for the Hadamard matrix H of ±1 (Sylvester's order, not normalised), in n·log n.

    Args:
        x: [..., n], n a power of two.

    Returns:
        [..., n]; applied twice it is n·x.

    Raises:
        ValueError: n is no power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"x must be [..., n] with n a power of two, got {list(x.shape)}")
    y = x.reshape(-1, n)
    half = 1
    while half < n:
        first, second = y.reshape(-1, n // (2 * half), 2, half).unbind(2)
        y = torch.stack((first + second, first - second), 2)
        half *= 2
    return y.reshape(x.shape)


class Fastfood(nn.Module):
    """θ [d] → P·θ [D], P [D, d] as in the head of this file; differentiable in θ.

    Holds 17 bytes per row of P in float32, in buffers that no state dict shows.

    Args:
        rows: D.
        dim: d.
        seed: of everything random; the same on every machine.
        total_rows: the D in P's scale where this P is only some of the rows of a larger one.
        dtype: of P.
        device: of P.

    Raises:
        ValueError: rows or dim below 1.
    """

    signs: Tensor
    permutation: Tensor
    gaussian: Tensor
    lengths: Tensor

    def __init__(
        self,
        rows: int,
        dim: int,
        seed: int,
        *,
        total_rows: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if rows < 1 or dim < 1:
            raise ValueError(f"rows and dim must be at least 1, got {rows} and {dim}")
        self.rows, self.dim = rows, dim
        n = 1 << (dim - 1).bit_length()
        blocks = math.ceil(rows / n)
        random = np.random.default_rng(seed)
        signs = random.integers(0, 2, (blocks, n), dtype=np.int8) * 2 - 1
        permutation = random.permuted(np.tile(np.arange(n), (blocks, 1)), axis=1)
        gaussian = random.standard_normal((blocks, n))
        lengths = np.sqrt(random.chisquare(n, (blocks, n)))
        lengths /= np.linalg.norm(gaussian, axis=1, keepdims=True)
        lengths /= math.sqrt(n * (total_rows or rows))
        for name, array, kind in (
            ("signs", signs, torch.int8),
            ("permutation", permutation, torch.int64),
            ("gaussian", gaussian, dtype),
            ("lengths", lengths, dtype),
        ):
            tensor = torch.from_numpy(array).to(device=device, dtype=kind)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        """[d] → [D]."""
        n = self.signs.shape[1]
        x = F.pad(theta, (0, n - self.dim)) * self.signs  # [blocks, n]
        x = hadamard_transform(x).gather(1, self.permutation) * self.gaussian
        return (hadamard_transform(x) * self.lengths).flatten()[: self.rows]

    def extra_repr(self) -> str:
        return f"rows={self.rows}, dim={self.dim}"


class _Offset(nn.Module):
    """The parametrisation of one tensor: original + its rows of P·θ, θ shared."""

    def __init__(self, theta: nn.Parameter, projection: Fastfood) -> None:
        super().__init__()
        self.theta = theta
        self.projection = projection

    def forward(self, original: Tensor) -> Tensor:
        offset: Tensor = self.projection(self.theta)
        return (original + offset.view_as(original)).to(original.dtype)


@contextmanager
def random_subspace(module: nn.Module, dim: int, seed: int = 0) -> Iterator[nn.Parameter]:
    """Inside the block all parameters of `module` are Θ0 + P·θ; afterwards they are Θ0 again.

    Θ0 is frozen inside, so θ is all that learns. Afterwards the module has the very same parameter
    objects, in the same order, with the same values and requires_grad, and the same classes.

    Args:
        module: with D parameters, all floating, on one device.
        dim: d, 1 to D.
        seed: of P.

    Yields:
        θ [d], zero, in the first parameter's dtype (at least float32).

    Raises:
        ValueError: d outside 1..D, no parameters, or one that is tied or parametrised already.

    Source: KAdaptation (arXiv:2203.16329), section 3.2.1, Eq. 1.
    """
    owners = _own_parameters(module)
    total = sum(parameter.numel() for _, _, parameter in owners)
    if not 1 <= dim <= total:
        raise ValueError(f"dim must be within 1..D={total}, got {dim}")
    first = owners[0][2]
    dtype = torch.promote_types(first.dtype, torch.float32)
    theta = nn.Parameter(torch.zeros(dim, dtype=dtype, device=first.device))
    required_grad = [parameter.requires_grad for _, _, parameter in owners]
    projections = [
        Fastfood(
            parameter.numel(),
            dim,
            int(np.random.SeedSequence([seed, index]).generate_state(1)[0]),
            total_rows=total,
            dtype=dtype,
            device=parameter.device,
        )
        for index, (_, _, parameter) in enumerate(owners)
    ]
    done: list[tuple[nn.Module, str]] = []
    try:
        for (owner, name, parameter), projection in zip(owners, projections, strict=True):
            parameter.requires_grad_(False)
            offset = _Offset(theta, projection)
            parametrize.register_parametrization(owner, name, offset)
            done.append((owner, name))
        yield theta
    finally:
        for owner, name in done:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        for (_, _, parameter), required in zip(owners, required_grad, strict=True):
            parameter.requires_grad_(required)


def _own_parameters(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, name, parameter) of every parameter in the module's order."""
    found: list[tuple[nn.Module, str, nn.Parameter]] = []
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        if parametrize.is_parametrized(owner):
            raise ValueError(f"module must not be parametrised already, got {prefix or 'it'} so")
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                raise ValueError(f"parameters must not be tied, got {prefix}.{name} a second time")
            seen.add(id(parameter))
            found.append((owner, name, parameter))
    if not found:
        raise ValueError(f"module must have parameters, got a {type(module).__name__} without")
    return found

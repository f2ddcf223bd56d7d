"""Operands of one `low_rank_linear` call: sizes, forms of the factors, values and layouts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NAMES = ("x", "weight", "bias", "down", "core", "up")  # in the operator's order
FACTORS = NAMES[3:]
ALL = (True,) * len(NAMES)  # `needs` of every gradient

Operands = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call and the form of its factors.

    The defaults are distinct primes, so that no two axes can be taken for each other.

    Attributes:
        M: rows of x.
        K: in_features.
        n: N/G, the columns of one slice.
        G: slices.
        Ra: rank on the input side.
        Rb: rank on the output side; without a core it is Ra, whatever is given here.
        core: whether there is a core.
        shared: whether the slices share one up; without a core each has its own.
        bias: whether there is a bias.
    """

    M: int = 67
    K: int = 71
    n: int = 29
    G: int = 3
    Ra: int = 7
    Rb: int = 5
    core: bool = True
    shared: bool = True
    bias: bool = True

    def __str__(self) -> str:
        up = "none" if not self.core else "shared" if self.shared else "each"
        return f"M{self.M}-K{self.K}-n{self.n}-G{self.G}-r{self.Ra}x{self.Rb}-{up}"

    @property
    def N(self) -> int:
        """out_features."""
        return self.G * self.n

    def sizes(self, lead: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...] | None]:
        """The size of every operand and of dy, None for an absent one.

        Args:
            lead: leading dims of x and dy in place of (M,).
        """
        lead = (self.M,) if lead is None else lead
        rb = self.Rb if self.core else self.Ra
        return {
            "x": (*lead, self.K),
            "weight": (self.N, self.K),
            "bias": (self.N,) if self.bias else None,
            "down": (self.K, self.Ra),
            "core": (self.G, self.Ra, rb) if self.core else None,
            "up": (1 if self.core and self.shared else self.G, self.n, rb),
            "dy": (*lead, self.N),
        }


# One of each form, none with an axis that blocks divide.
SHARED = Shape()
EACH = Shape(M=53, K=83, n=37, Ra=5, Rb=11, shared=False)
NO_CORE = Shape(M=41, K=97, n=23, Ra=3, Rb=3, core=False, shared=False, bias=False)
ONE_SLICE = Shape(M=103, K=37, n=131, G=1, Ra=13, Rb=7)
SHAPES = (SHARED, EACH, NO_CORE, ONE_SLICE)


def forms(shape: Shape) -> dict[str, Shape]:
    """`shape` with every form that the factors and the bias may take, by a name for test ids."""
    return {
        "shared up": shape,
        "own up": replace(shape, shared=False, bias=False),
        "no core": replace(shape, core=False, shared=False),
        "one slice": replace(shape, G=1),
        "one slice, no core": replace(shape, G=1, core=False, shared=False, bias=False),
    }


def operands_and_dy(
    shape: Shape,
    dtype: torch.dtype = torch.float64,
    *,
    lead: tuple[int, ...] | None = None,
    frozen_dtype: torch.dtype | None = None,
    factor_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    density: float | None = None,
    bound: int = 1,
) -> tuple[Tensor | None, ...]:
    """(x, weight, bias, down, core, up, dy) of one call, the same values for the same arguments.

    Values are normal, scaled so that both terms of y are of order one. With `density` they are
    whole numbers, so that sums are exact in every order and results can be compared bit for bit.
    They are drawn in float64 on the CPU and rounded to their dtype once.

    Args:
        shape: sizes and form.
        dtype: of x and dy, and of whatever the next two do not say.
        lead: leading dims of x and dy in place of (M,).
        frozen_dtype: of weight and bias.
        factor_dtype: of down, core and up.
        device: where the tensors are.
        seed: of the generator.
        density: the share of entries that are not zero, for whole numbers.
        bound: the largest magnitude of a whole number.
    """
    generator = torch.Generator().manual_seed(seed)
    summed = {"weight": -1, "down": 0, "core": 1, "up": -1}  # the axis that a product sums over
    kinds = dict.fromkeys(("weight", "bias"), frozen_dtype) | dict.fromkeys(FACTORS, factor_dtype)

    def draw(name: str, size: tuple[int, ...]) -> Tensor:
        if density is None:
            values = torch.randn(size, generator=generator, dtype=torch.float64)
            if name in summed:
                values *= size[summed[name]] ** -0.5
        else:
            values = torch.randint(0, 2, size, generator=generator) * 2 - 1
            values = values * (torch.rand(size, generator=generator) < density)
            if bound > 1:
                values *= torch.randint(1, bound + 1, size, generator=generator)
        return values.to(device, kinds.get(name) or dtype)

    sizes = shape.sizes(lead).items()
    return tuple(None if size is None else draw(name, size) for name, size in sizes)


def operands(
    shape: Shape, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Tensor | None]:
    """The six operands by name, without dy; arguments and values as in `operands_and_dy`."""
    return dict(zip(NAMES, operands_and_dy(shape, dtype, **options), strict=False))


def leaves(tensors: Operands, wanted: Collection[str] = NAMES) -> dict[str, Tensor | None]:
    """Copies of the same layout, cut from any graph, those in `wanted` requiring grad."""
    return {
        name: None
        if t is None
        else t.detach().clone(memory_format=torch.preserve_format).requires_grad_(name in wanted)
        for name, t in tensors.items()
    }


def cast(tensors: Operands, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Every tensor in `dtype`."""
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def _padded_rows(t: Tensor, before: int) -> Tensor:
    """A view of rows that are 16 elements further apart than they are long."""
    storage = t.new_full((*t.shape[:-1], t.shape[-1] + 16), torch.nan)
    storage[..., before : before + t.shape[-1]] = t
    return storage[..., before : before + t.shape[-1]]


def _every_second(t: Tensor, dim: int) -> Tensor:
    return torch.stack((t, torch.full_like(t, torch.nan)), dim).select(dim, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "aligned padded rows": lambda t: _padded_rows(t, 8),
    "misaligned padded rows": lambda t: _padded_rows(t, 3),
    "every second row": lambda t: _every_second(t, 1),
    "every second column": lambda t: _every_second(t, t.dim()),
    "offset": lambda t: torch.cat((torch.full_like(t[:1], torch.nan), t))[1:],
    "expanded": lambda t: t[:1].expand_as(t),
}
"""Layouts of a tensor of two dims or more, by name; what its storage holds beside it is NaN.

Values are kept, but for "expanded", which repeats the first row at stride 0.
"""

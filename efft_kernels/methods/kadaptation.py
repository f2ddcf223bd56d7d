"""KAdaptation: ΔW = Σ_i A_i ⊗ (u_i·v_i^T), A shared by all layers (arXiv:2203.16329, Eq. 3, 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import (
    FactorGroup,
    Factors,
    Method,
    Site,
    check_choice,
    check_number,
    check_ranks,
    constant_float,
    undotted_names,
    wide,
)
from .followed_table import FollowedTable
from .lora import check_matrices, chosen_slices, stack_matrices
from .registry import register_method


@register_method
@dataclass(frozen=True)
class KAdaptation(Method):
    """A sum of n Kronecker products for each matrix, seen as x·ΔW with ΔW [K, N].

    A [n, n, n] is one tensor for the whole model (the slow weights); each matrix has u [n, K/n, r]
    and v [n, N/n, r] (the fast weights): n³ + Σ (K + N)·r parameters. Written as (down, core, up)
    the effective rank is n²·r.

    Attributes:
        products: n, the number of Kronecker products and the size of each A_i; divides K and N.
        rank: r of the fast weights.
        scale: s, a factor on ΔW (1 in the paper).
        init: the fast weight that starts at zero, "v" or "u". The release starts both at zero,
            after which neither learns; here the other starts with xavier_uniform_.
        matrices: as in LoRA; the paper adapts the attention's.
        factor_init: how A starts: "xavier", or "release", each A_i a product of two vectors within
            ±0.01 as in the PEViT release, whose scale is 160. It keeps A_i of rank 1; here A is
            trained whole, as in the paper (Eq. 3).
    """

    products: int = 4
    rank: int = 1
    scale: float = 1.0
    init: str = "v"
    matrices: tuple[str, ...] | None = ("q", "k", "v", "o")
    factor_init: str = "xavier"

    name: ClassVar[str] = "kadaptation"
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"products"}

    def __post_init__(self) -> None:
        for field in ("products", "rank"):
            if not isinstance(getattr(self, field), int):
                raise TypeError(f"{field} must be an int, got {getattr(self, field)!r}")
            check_ranks(field, getattr(self, field))
        check_number("scale", self.scale)
        check_choice("init", self.init, ("u", "v"))
        check_matrices(self.matrices)
        check_choice("factor_init", self.factor_init, ("xavier", "release"))

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if chosen_slices(site, self.matrices)[0]]

    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        return {self.name: KroneckerGroup(self, sites)}


class KroneckerGroup(FactorGroup):
    """A [n, n, n], and for each site u [m, n, K/n, r], v [m, n, N/(G·n), r] of its m matrices."""

    scale: float = constant_float("scale")

    def __init__(self, method: KAdaptation, sites: Sequence[Site]) -> None:
        super().__init__()
        n = method.products
        self.init = method.init
        self.factor_init = method.factor_init
        self.scale = float(method.scale)
        self.chosen = {site.name: chosen_slices(site, method.matrices) for site in sites}
        for site in sites:
            out = site.out_features // self.chosen[site.name][1]
            if site.in_features % n or out % n:
                raise ValueError(
                    f"products must divide K={site.in_features} and N={out} of each matrix in"
                    f" {site.name!r}, got {n}"
                )
            if n * n * method.rank > min(site.in_features, out):
                raise ValueError(
                    f"the effective rank products²·rank must be at most min(K, N)="
                    f"{min(site.in_features, out)} of each matrix in {site.name!r}, got"
                    f" {n * n * method.rank}"
                )
        self.A = nn.Parameter(torch.empty(n, n, n))
        self.u = nn.ParameterDict()
        self.v = nn.ParameterDict()
        self.names = undotted_names(sites)
        for site in sites:
            chosen, slices = self.chosen[site.name]
            m, out, key = len(chosen), site.out_features // slices, self.names[site.name]
            self.u[key] = nn.Parameter(torch.empty(m, n, site.in_features // n, method.rank))
            self.v[key] = nn.Parameter(torch.empty(m, n, out // n, method.rank))
        self._fast = {
            self.names[site.name]: _FastWeights(*self.chosen[site.name]) for site in sites
        }
        for attribute in ("u", "v"):
            table: Any = getattr(self, attribute)
            followers = {key: [weights] for key, weights in self._fast.items()}
            table._parameters = FollowedTable(table._parameters, followers, attribute)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for matrix in self.A.unbind():
            if self.factor_init == "xavier":
                nn.init.xavier_uniform_(matrix)
            else:
                column, row = (matrix.new_empty(len(matrix)).uniform_(-0.01, 0.01) for _ in "ab")
                with torch.no_grad():
                    matrix.copy_(torch.outer(column, row))
        zero, random = (self.v, self.u) if self.init == "v" else (self.u, self.v)
        for parameter in zero.values():
            nn.init.zeros_(parameter)
        for parameter in random.values():
            for matrix in parameter.flatten(0, 1).unbind():
                nn.init.xavier_uniform_(matrix)

    def factors(self, site: str, dropout: bool) -> Factors:
        key = self.names[site]
        return self._compose(self.u[key], self.v[key], *self.chosen[site])

    def position(self, site: str) -> _FastWeights:
        return self._fast[self.names[site]]

    def factors_at(self, position: _FastWeights, dropout: bool) -> Factors | None:
        u, v = position.u, position.v
        if u is None or v is None:  # parametrized, say
            return None
        return self._compose(u, v, position.chosen, position.slices)

    def _compose(self, u: Tensor, v: Tensor, chosen: tuple[int, ...], slices: int) -> Factors:
        # With (i, b, r) as rank index: down[(a, p), (i, b, r)] = A_i[a, b]·u_i[p, r] and
        # up[(b', q), (i, b, r)] = v_i[q, r] where b' = b, else 0.
        A, u, v = (wide(t) for t in (self.A, u, v))
        eye = torch.eye(len(A), dtype=v.dtype, device=v.device)
        down = torch.einsum("iab,mipr->mapibr", A * self.scale, u)
        up = torch.einsum("bc,miqr->mbqicr", eye, v)
        return stack_matrices(
            down.flatten(3, 5).flatten(1, 2),
            up.flatten(3, 5).flatten(1, 2),
            chosen,
            slices,
        )


class _FastWeights:
    """The u and v of one site, which follow the group's."""

    u: Tensor | None = None
    v: Tensor | None = None

    def __init__(self, chosen: tuple[int, ...], slices: int) -> None:
        self.chosen = chosen
        self.slices = slices

"""Tensor-Train groups: ΔW_i = s·U·Σ_i·V^T, U and V shared by all slices (FacT Eq. 8, EFFT Eq. 2).

One class serves EFFT1, EFFT2, FacT-TT and a standalone layer; FacT-TK's Σ_i come from a Tucker
core.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    FFN_ROLES,
    MHSA_ROLES,
    FactorGroup,
    Factors,
    Method,
    Rank,
    Site,
    by_stage,
    check_number,
    check_rank_fits,
    check_ranks,
    require_roles,
)


@dataclass(frozen=True)
class Placement:
    """Where one site sits in the group's tensor.

    Attributes:
        first_core: index of the site's first Σ_i; the following slices take the following cores.
        slices: how many cores the site takes.
        u_side: "in" where U spans the site's in_features (y += x·U·Σ·V^T), "out" where it spans its
            out_features (y += x·V·Σ^T·U^T).
        u_rows: (start, stop), the rows of U that the site uses.
        stacked: the axis along which the slices are stacked, "out" (each gives part of y) or "in"
            (each takes part of x, and their products add up).
    """

    first_core: int
    slices: int
    u_side: str
    u_rows: tuple[int, int]
    stacked: str = "out"


class CoreIndex:
    """Hands out Σ indices: each (block, kind) has cores of its own, numbered as they are taken.

    Args:
        shared: cores belong to the kind alone, whatever the block.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.total = 0
        self._first: dict[tuple[int, str], int] = {}

    def take(self, block: int, kind: str, count: int = 1) -> int:
        """The index of the first of `count` consecutive cores."""
        key = (0 if self.shared else block, kind)
        if key not in self._first:
            self._first[key] = self.total
            self.total += count
        return self._first[key]


class TensorTrainGroup(FactorGroup):
    """U [D1, r1], V [D2, r2], core Σ [n, r1, r2] and a scale s, a float or a learnable scalar.

    The factor that `init` names starts at zero, so that ΔW does; the other and each Σ_i, as an
    r1×r2 matrix, with xavier_uniform_.

    Args:
        placements: site → where it sits.
        dims: (D1, D2), the rows of U and of V.
        rank: (r1, r2).
        cores: n, the number of Σ_i.
        scale: s.
        learn_scale: make s a learnable scalar.
        init: the factor that starts at zero, "v" or "u".
        dropout: probability of dropping an entry of U, V and Σ in training; masks are drawn anew
            for each site.
        activation_dropout: probability of dropping an entry of x·U·Σ in training.
    """

    factor_matrices: ClassVar[tuple[str, ...]] = ("U", "V")

    U: nn.Parameter
    V: nn.Parameter
    core: nn.Parameter
    scale: float | nn.Parameter

    def __init__(
        self,
        placements: Mapping[str, Placement],
        *,
        dims: tuple[int, int],
        rank: tuple[int, int],
        cores: int,
        scale: float,
        learn_scale: bool = False,
        init: str = "v",
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.placements = dict(placements)
        self.init = init
        self.initial_scale = float(scale)
        # Settled here: torch.compile would guard a comparison in factors(), vmap refuse it.
        self._scaled = learn_scale or self.initial_scale != 1.0
        self._whole = {name for name, p in self.placements.items() if p.u_rows == (0, dims[0])}
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.U = nn.Parameter(torch.empty(dims[0], rank[0]))
        self.V = nn.Parameter(torch.empty(dims[1], rank[1]))
        self._add_cores(cores, rank)
        self.scale = nn.Parameter(torch.empty(())) if learn_scale else self.initial_scale
        self.reset_parameters()

    def _add_cores(self, count: int, rank: tuple[int, int]) -> None:
        self.core = nn.Parameter(torch.empty(count, *rank))

    def reset_parameters(self) -> None:
        zero, random = (self.V, self.U) if self.init == "v" else (self.U, self.V)
        nn.init.zeros_(zero)
        nn.init.xavier_uniform_(random)
        for matrix in self.core.unbind():
            nn.init.xavier_uniform_(matrix)
        if isinstance(self.scale, nn.Parameter):
            nn.init.constant_(self.scale, self.initial_scale)

    def cores(self, first: int, count: int) -> Tensor:
        """Σ_first ... Σ_(first+count-1), [count, r1, r2], without scale and dropout."""
        return self.core[first : first + count]

    def down_key(self, site: str) -> tuple[object, ...] | None:
        place = self.placements[site]
        if place.stacked == "in":
            return None
        return ("U", place.u_rows) if place.u_side == "in" else ("V",)

    def factors(self, site: str, dropout: bool) -> Factors:
        place = self.placements[site]
        # A slice's backward fills a gradient of U's size with zeros, for every linear of the group.
        whole = site in self._whole
        u: Tensor = self.U if whole else self.U[place.u_rows[0] : place.u_rows[1]]
        v: Tensor = self.V
        core = self.cores(place.first_core, place.slices)
        if dropout and self.dropout > 0:
            u, v, core = (F.dropout(t, self.dropout) for t in (u, v, core))
        if self._scaled:
            core = core * self.scale
        if place.stacked == "in":
            return Factors(torch.matmul(u, core).flatten(0, 1), None, v.unsqueeze(0))
        if place.u_side == "in":
            return Factors(u, core, v.unsqueeze(0))
        return Factors(v, core.mT, u.unsqueeze(0))

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters())
        return (
            f"{shapes}, scale={self.initial_scale:g}, init={self.init!r}, dropout={self.dropout:g}"
        )


class Layout(NamedTuple):
    """One group's tensor: where each site sits in it, and its sizes."""

    placements: dict[str, Placement]
    dims: tuple[int, int]  # the rows of U and of V
    rank: tuple[int, int]
    cores: int


class TensorTrainMethod(Method):
    """What EFFT and FacT share: checks, groups by stage, one tensor for each.

    Not a dataclass: a subclass lists its fields in its own order, these among them.
    """

    rank: Rank | list[Rank]
    scale: float
    dropout: float
    learn_scale: bool

    def __post_init__(self) -> None:
        check_ranks("rank", self.rank)
        check_number("scale", self.scale)
        check_number("dropout", self.dropout, low=0.0, below=1.0)
        if not isinstance(self.learn_scale, bool):
            raise TypeError(f"learn_scale must be a bool, got {type(self.learn_scale).__name__}")

    def part(self, site: Site) -> str:
        """The name of the group, within its stage, that a site belongs to."""
        return "all"

    @abstractmethod
    def layout(self, members: Sequence[Site], sites: Sequence[Site]) -> Layout:
        """The tensor of one group, whose sites are `members` of all `sites`."""

    @abstractmethod
    def new_group(self, layout: Layout) -> TensorTrainGroup:
        """The parameters for a layout."""

    def members(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        require_roles(self, sites, MHSA_ROLES + FFN_ROLES)
        return by_stage(sites, self.part)

    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        groups: dict[str, FactorGroup] = {}
        for name, members in self.members(sites).items():
            layout = self.layout(members, sites)
            check_rank_fits("rank", layout.rank, members)
            groups[name] = self.new_group(layout)
        return groups


def check_square(site: Site, d: int, what: str) -> None:
    """Raise ValueError unless each of the site's matrices is d×d."""
    if (site.in_features, site.out_features) != (d, site.slices * d):
        raise ValueError(
            f"{what} holds d×d matrices (d={d}), got {site.name!r} with K={site.in_features},"
            f" N={site.out_features}"
        )

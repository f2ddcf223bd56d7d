"""FacT-TT and FacT-TK: one 12L×d×d tensor for the whole ViT (arXiv:2212.03145, Eq. 8 to 11).

fc1 and fc2 count as hidden/d slices of d×d each (Eq. 3): fc1's are stacked along its output, fc2's
along its input, so that y += Σ_i x_i·U·Σ_i·V^T for fc2's input chunks x_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import MHSA_ROLES, Method, Rank, Site, check_ranks, stage_rank, wide
from .picked_rows import picked_rows
from .registry import register_method
from .tensor_train import (
    CoreIndex,
    Draw,
    Layout,
    Placement,
    TensorTrainGroup,
    TensorTrainMethod,
    check_square,
    draw_xavier,
)


@dataclass(frozen=True)
class _FacT(TensorTrainMethod):
    """What FacT-TT and FacT-TK share. V starts at zero.

    Attributes:
        rank: r, or (r1, r2) for U and V, or a list with one of these per stage (Swin).
        scale: s in ΔW = s·Σ ×2 U^T ×3 V^T.
        dropout: probability of dropping an entry of the rank-r activation x·U·Σ in training.
        learn_scale: make s a learnable scalar, one per stage.
        factor_init: how the rest starts: "xavier", each factor and slice as a matrix, or "release",
            as fact_tt.py and fact_tk.py draw it, which the release's scales presuppose.
    """

    rank: Rank | list[Rank] = 16
    scale: float = 1.0
    dropout: float = 0.1
    learn_scale: bool = False
    factor_init: str = field(default="xavier", kw_only=True)

    released: ClassVar[Draw]

    def layout(self, members: Sequence[Site], sites: Sequence[Site]) -> Layout:
        d, index = members[0].width, CoreIndex(shared=False)
        placements = {site.name: _place(site, d, index) for site in members}
        rank = stage_rank("rank", self.rank, sites, members[0].stage)
        draw = draw_xavier if self.factor_init == "xavier" else type(self).released
        return Layout(placements, (d, d), rank, index.total, draw=draw)

    def new_group(self, layout: Layout) -> TensorTrainGroup:
        return TensorTrainGroup(layout.placements, **self._options(layout))

    def _options(self, layout: Layout) -> dict[str, Any]:
        return {
            "dims": layout.dims,
            "rank": layout.rank,
            "cores": layout.cores,
            "scale": self.scale,
            "learn_scale": self.learn_scale,
            "draw": layout.draw,
            "activation_dropout": self.dropout,
        }


def _place(site: Site, d: int, index: CoreIndex) -> Placement:
    if site.role in MHSA_ROLES:
        check_square(site, d, "FacT's tensor")
        first = index.take(site.block, site.role, site.slices)
        return Placement(first, site.slices, "in", (0, d))
    hidden = site.in_features if site.role == "fc2" else site.out_features
    if hidden % d:
        raise ValueError(
            f"FacT cuts FFN linears into d×d matrices (d={d}), got {hidden} hidden features in"
            f" {site.name!r}, not a multiple of d"
        )
    slices = hidden // d
    stacked = "in" if site.role == "fc2" else "out"
    return Placement(index.take(site.block, site.role, slices), slices, "in", (0, d), stacked)


def _draw_linears(group: TensorTrainGroup, factor: nn.Parameter) -> None:
    """As fact_tt.py: U and Σ are nn.Linear's own start, within ±1/√in_features, and fc2's cores are
    one nn.Linear of all its slices."""
    _draw_uniform(factor, factor.shape[0])
    for place in group.placements.values():
        joined = place.slices if place.stacked == "in" else 1
        cores = group.core[place.first_core : place.first_core + place.slices]
        _draw_uniform(cores, joined * cores.shape[1])


def _draw_tucker(group: TensorTrainGroup, factor: nn.Parameter) -> None:
    """As fact_tk.py: U is nn.Linear's own start, C [r1, r2, t] and P are xavier_uniform_."""
    _draw_uniform(factor, factor.shape[0])
    layer_rank, r1, r2 = group.core.shape
    _draw_uniform(group.core, layer_rank * (r1 + r2) / 6)


@torch.no_grad()
def _draw_uniform(tensor: Tensor, fan: float) -> None:
    bound = 1 / math.sqrt(fan)
    tensor.uniform_(-bound, bound)


@register_method
@dataclass(frozen=True)
class FacTTT(_FacT):
    """FacT in Tensor-Train format: ΔW = s·Σ ×2 U^T ×3 V^T (Eq. 8, 9).

    U [d, r1], V [d, r2], Σ [12L, r1, r2]: 2dr + 12L·r² parameters; 61,440 on ViT-B at r = 16.
    """

    name: ClassVar[str] = "fact_tt"
    released: ClassVar[Draw] = staticmethod(_draw_linears)


@register_method
@dataclass(frozen=True)
class FacTTK(_FacT):
    """FacT in Tucker format: ΔW = s·C ×1 P^T ×2 U^T ×3 V^T (Eq. 10, 11), so Σ_i = Σ_t P[i, t]·C[t].

    U [d, r1], V [d, r2], P [12L, r], C [r, r1, r2]: 2dr + r³ + 12L·r parameters; 86,528 on ViT-B at
    r = 32.

    Attributes:
        layer_rank: the mode-1 rank r of P and C; by default the larger of (r1, r2).
    """

    name: ClassVar[str] = "fact_tk"
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"layer_rank"}
    released: ClassVar[Draw] = staticmethod(_draw_tucker)
    layer_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_rank is not None:
            if not isinstance(self.layer_rank, int):
                raise TypeError(f"layer_rank must be an int, got {self.layer_rank!r}")
            check_ranks("layer_rank", self.layer_rank)

    def new_group(self, layout: Layout) -> TensorTrainGroup:
        return TuckerGroup(layout.placements, self.layer_rank, **self._options(layout))


class TuckerGroup(TensorTrainGroup):
    """A Tensor-Train group whose Σ_i = Σ_t P[i, t]·C[t], P [n, r] and C [r, r1, r2] in `core`.

    Args:
        placements: as in TensorTrainGroup.
        layer_rank: r; None for the larger of (r1, r2).
        kwargs: as in TensorTrainGroup.
    """

    P: nn.Parameter

    def __init__(
        self, placements: dict[str, Placement], layer_rank: int | None, **kwargs: Any
    ) -> None:
        self._layer_rank = layer_rank
        super().__init__(placements, **kwargs)

    def _add_cores(self, count: int, rank: tuple[int, int]) -> None:
        layer_rank = self._layer_rank or max(rank)
        if layer_rank > (most := max(count, rank[0] * rank[1])):
            raise ValueError(
                f"layer_rank must be at most max(cores, r1·r2)={most}, got {layer_rank}: beyond the"
                " smaller of the two it adds nothing"
            )
        self.P = nn.Parameter(torch.empty(count, layer_rank))
        self.core = nn.Parameter(torch.empty(layer_rank, *rank))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.P)

    def cores(self, first: int, count: int) -> Tensor:
        return torch.einsum("nt,tab->nab", wide(self.P[first : first + count]), wide(self.core))

    def _picked_cores(self, indices: Tensor) -> Tensor:
        return torch.einsum("nt,tab->nab", wide(picked_rows(self.P, indices)), wide(self.core))

    def _core_parameters(self) -> tuple[Tensor, ...]:
        return self.P, self.core

    def _all_cores(self, *parameters: Tensor) -> Tensor:
        return torch.einsum("nt,tab->nab", *parameters)

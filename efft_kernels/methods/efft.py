"""EFFT1 and EFFT2: Aggregate, Decompose, and Fine-Tune (arXiv:2311.06749, Eq. 2 and 3)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import (
    FFN_ROLES,
    MHSA_ROLES,
    Method,
    Rank,
    Site,
    check_choice,
    check_ranks,
    ffn_hidden,
    stage_rank,
)
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
class _EFFT(TensorTrainMethod):
    """What EFFT1 and EFFT2 share.

    Attributes:
        rank: r, or (r1, r2) for U and V, or a list with one of these per stage (Swin).
        scale: s in ΔW = s·Σ ×2 U^T ×3 V^T.
        init: the factor that starts at zero, "v" or "u".
        dropout: probability of dropping an entry of U, V and Σ in training.
        cores: "per_layer" (one Σ per slice and layer, the papers' counts) or "shared" (one Σ per
            slice kind for all layers, as released).
        learn_scale: make s a learnable scalar, one per group.
    """

    rank: Rank | list[Rank] = 16
    scale: float = 10.0
    init: str = "v"
    dropout: float = 0.1
    cores: str = "per_layer"
    learn_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, ("u", "v"))
        check_choice("cores", self.cores, ("per_layer", "shared"))

    def new_group(self, layout: Layout) -> TensorTrainGroup:
        return TensorTrainGroup(
            layout.placements,
            dims=layout.dims,
            rank=layout.rank,
            cores=layout.cores,
            scale=self.scale,
            learn_scale=self.learn_scale,
            init=layout.init,
            draw=layout.draw,
            dropout=self.dropout,
        )


@register_method
@dataclass(frozen=True)
class EFFT1(_EFFT):
    """One group of three 4d×d slices per layer: [q;k;v;o], fc1, fc2^T.

    U [4d, r1], V [d, r2], Σ [3L, r1, r2]: 5dr + 3L·r² parameters (r1 = r2 = r); 70,656 on ViT-B at
    r = 16. Needs FFN linears of 4d hidden features. With MHSA alone U has rows only for the
    matrices that are there. Factors and cores that are not zero start with xavier_uniform_, as the
    paper has no other and the release has no code for EFFT1.

    Attributes:
        attention_side: the side of q, k, v and o that U's 4d rows span, "out" or "in". The paper
            stacks the four to 4d×d (3.2) and does not say along which side; it writes x·W, where
            "in" is the stack along the rows, while "out" is the same in torch's W [out, in]. The
            counts are equal, the functions are not: with "out" ΔW_q = (V·Σ^T·U_q^T)^T and q, k and
            v share x·V; with "in" ΔW_q = (U_q·Σ·V^T)^T and each has a projection of its own, so
            that a fused qkv costs rank 3·r1.
    """

    name: ClassVar[str] = "efft1"
    attention_side: str = "out"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("attention_side", self.attention_side, ("out", "in"))

    def layout(self, members: Sequence[Site], sites: Sequence[Site]) -> Layout:
        d = members[0].width
        ffn = [site for site in members if site.role in FFN_ROLES]
        if ffn and ffn_hidden(ffn) != 4 * d:
            raise ValueError(
                f"EFFT1 needs FFN linears with 4d={4 * d} hidden features, got {ffn_hidden(ffn)} in"
                f" {ffn[0].name!r}; use EFFT2, whose FFN group has its own U"
            )
        present = {matrix for site in members for matrix in site.matrices}
        stacked = [matrix for matrix in ("q", "k", "v", "o") if ffn or matrix in present]
        index = CoreIndex(shared=self.cores == "shared")
        placements = {}
        for site in members:
            if site.role in MHSA_ROLES:
                check_square(site, d, "EFFT1's attention slice")
                start = stacked.index(site.matrices[0]) * d
                rows = (start, start + site.out_features)
                first, side = index.take(site.block, "mhsa"), self.attention_side
                chunks = site.slices if side == "in" else 1
                placements[site.name] = Placement(first, 1, side, rows, u_chunks=chunks)
            else:
                first = index.take(site.block, site.role, site.slices)
                side = "in" if site.role == "fc2" else "out"
                placements[site.name] = Placement(first, site.slices, side, (0, 4 * d))
        rank = stage_rank("rank", self.rank, sites, members[0].stage)
        return Layout(placements, (len(stacked) * d, d), rank, index.total, self.init)


@register_method
@dataclass(frozen=True)
class EFFT2(_EFFT):
    """Two groups: q, k, v, o (d×d) and fc1^T, fc2 (hidden×d), each with its own U, Σ and V.

    MHSA: U [d, r1] on the input side, V [d, r2], Σ [4L, r1, r2]. FFN: U [hidden, r1], V [d, r2],
    Σ [2L, r1, r2]. 7dr + 6L·r² parameters (r1 = r2 = r, hidden = 4d); 104,448 on ViT-B at r = 16.

    Attributes:
        ffn_rank: the FFN group's rank where it differs from `rank`.
        ffn_init: the FFN group's factor that starts at zero, where it differs from `init`. "u" is
            the hidden side, "v" the d side: 12 of the release's 19 VTAB-1K recipes ("vv" in its
            configs/EFFT2.json) are init="v", ffn_init="u", as its second letter names the FFN's
            factors the other way round than the paper does.
        factor_init: how the rest starts, "xavier" or "release", which the release's scales
            presuppose. There (Set_EFFT.py) xavier_uniform_ takes a group's cores as one tensor and
            its extra axis for a convolution's window, so that they are 2 (attention) and √2 (FFN)
            times smaller than each Σ_i as a matrix.
    """

    name: ClassVar[str] = "efft2"
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"ffn_rank", "ffn_init"}
    ffn_rank: Rank | list[Rank] | None = None
    ffn_init: str | None = None
    factor_init: str = "xavier"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_rank is not None:
            check_ranks("ffn_rank", self.ffn_rank)
        if self.ffn_init is not None:
            check_choice("ffn_init", self.ffn_init, ("u", "v"))

    def part(self, site: Site) -> str:
        return "mhsa" if site.role in MHSA_ROLES else "ffn"

    def layout(self, members: Sequence[Site], sites: Sequence[Site]) -> Layout:
        d, stage = members[0].width, members[0].stage
        index = CoreIndex(shared=self.cores == "shared")
        staged = len({site.stage for site in sites}) > 1
        placements = {}
        if members[0].role in MHSA_ROLES:
            rank = stage_rank("rank", self.rank, sites, stage)
            for site in members:
                check_square(site, d, "EFFT2's attention group")
                first = index.take(site.block, site.role, site.slices)
                placements[site.name] = Placement(first, site.slices, "in", (0, d))
            draw = self._draw(_KINDS["mhsa"], staged)
            return Layout(placements, (d, d), rank, index.total, self.init, draw)
        own = self.ffn_rank is not None
        rank = stage_rank("ffn_rank" if own else "rank", self.ffn_rank or self.rank, sites, stage)
        hidden = ffn_hidden(members)
        for site in members:
            first = index.take(site.block, site.role, site.slices)
            side = "in" if site.role == "fc2" else "out"
            placements[site.name] = Placement(first, site.slices, side, (0, hidden))
        kinds = _SWIN_STAGE_3_KINDS if staged and stage == 2 else _KINDS["ffn"]
        init = self.ffn_init or self.init
        return Layout(placements, (hidden, d), rank, index.total, init, self._draw(kinds, staged))

    def _draw(self, kinds: int, staged: bool) -> Draw:
        if self.factor_init == "xavier":
            return draw_xavier
        return functools.partial(_draw_as_released, kinds=kinds, staged=staged)


# How many slices the release's core tensors hold. Of those of Swin's third stage it reads two.
_KINDS = {"mhsa": 4, "ffn": 2}
_SWIN_STAGE_3_KINDS = 18


def _draw_as_released(
    group: TensorTrainGroup, factor: nn.Parameter, kinds: int, staged: bool
) -> None:
    """As Set_EFFT.py: xavier_uniform_ on a core tensor [r, r, kinds] of a ViT, or [kinds, r2, r1]
    of a Swin, whose last axis is that of the 4d side."""
    nn.init.xavier_uniform_(factor)
    r1, r2 = group.core.shape[1:]
    fans = r1 * (r2 + kinds) if staged else kinds * (r1 + r2)
    bound = math.sqrt(6 / fans)
    nn.init.uniform_(group.core, -bound, bound)

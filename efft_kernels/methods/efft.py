"""EFFT1 and EFFT2: Aggregate, Decompose, and Fine-Tune (arXiv:2311.06749, Eq. 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import (
    FFN_ROLES,
    MHSA_ROLES,
    FactorGroup,
    Method,
    Rank,
    Site,
    by_stage,
    check_choice,
    check_number,
    check_rank_fits,
    check_ranks,
    ffn_hidden,
    require_roles,
    stage_rank,
)
from .tensor_train import CoreIndex, Placement, TensorTrainGroup


@dataclass(frozen=True)
class _EFFT(Method):
    """What EFFT1 and EFFT2 share.

    Attributes:
        rank: r, or (r1, r2) for U and V, or a list with one of these per stage (Swin).
        scale: s in ΔW = s·Σ ×2 U^T ×3 V^T.
        init: the factor that starts at zero, "v" or "u"; the others start with xavier_uniform_.
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
        check_ranks("rank", self.rank)
        check_number("scale", self.scale)
        check_choice("init", self.init, ("u", "v"))
        check_number("dropout", self.dropout, low=0.0, below=1.0)
        check_choice("cores", self.cores, ("per_layer", "shared"))
        if not isinstance(self.learn_scale, bool):
            raise TypeError(f"learn_scale must be a bool, got {type(self.learn_scale).__name__}")

    def _part(self, site: Site) -> str:
        """The name of the group, within its stage, that a site belongs to."""
        raise NotImplementedError

    def _build_group(
        self, members: Sequence[Site], sites: Sequence[Site]
    ) -> tuple[dict[str, Placement], tuple[int, int], tuple[int, int], int]:
        """(placements, (rows of U, rows of V), rank, number of cores) of one group."""
        raise NotImplementedError

    def members(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        require_roles(self, sites, MHSA_ROLES + FFN_ROLES)
        return by_stage(sites, self._part)

    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        groups: dict[str, FactorGroup] = {}
        for name, members in self.members(sites).items():
            placements, dims, rank, cores = self._build_group(members, sites)
            check_rank_fits("rank", rank, members)
            groups[name] = TensorTrainGroup(
                placements,
                dims=dims,
                rank=rank,
                cores=cores,
                scale=self.scale,
                learn_scale=self.learn_scale,
                init=self.init,
                dropout=self.dropout,
            )
        return groups


@dataclass(frozen=True)
class EFFT1(_EFFT):
    """One group of three 4d×d slices per layer: [q;k;v;o] stacked along out, fc1, fc2^T.

    U [4d, r1], V [d, r2], Σ [3L, r1, r2]: 5dr + 3L·r² parameters (r1 = r2 = r); 70,656 on ViT-B at
    r = 16. Needs FFN linears of 4d hidden features. With MHSA alone U has rows only for the
    matrices that are there.
    """

    name: ClassVar[str] = "efft1"

    def _part(self, site: Site) -> str:
        return "all"

    def _build_group(
        self, members: Sequence[Site], sites: Sequence[Site]
    ) -> tuple[dict[str, Placement], tuple[int, int], tuple[int, int], int]:
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
                placements[site.name] = Placement(index.take(site.block, "mhsa"), 1, "out", rows)
            else:
                first = index.take(site.block, site.role, site.slices)
                side = "in" if site.role == "fc2" else "out"
                placements[site.name] = Placement(first, site.slices, side, (0, 4 * d))
        rank = stage_rank("rank", self.rank, sites, members[0].stage)
        return placements, (len(stacked) * d, d), rank, index.total


@dataclass(frozen=True)
class EFFT2(_EFFT):
    """Two groups: q, k, v, o (d×d) and fc1^T, fc2 (hidden×d), each with its own U, Σ and V.

    MHSA: U [d, r1] on the input side, V [d, r2], Σ [4L, r1, r2]. FFN: U [hidden, r1], V [d, r2],
    Σ [2L, r1, r2]. 7dr + 6L·r² parameters (r1 = r2 = r, hidden = 4d); 104,448 on ViT-B at r = 16.

    Attributes:
        ffn_rank: the FFN group's rank where it differs from `rank`.
    """

    name: ClassVar[str] = "efft2"
    ffn_rank: Rank | list[Rank] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_rank is not None:
            check_ranks("ffn_rank", self.ffn_rank)

    def _part(self, site: Site) -> str:
        return "mhsa" if site.role in MHSA_ROLES else "ffn"

    def _build_group(
        self, members: Sequence[Site], sites: Sequence[Site]
    ) -> tuple[dict[str, Placement], tuple[int, int], tuple[int, int], int]:
        d, stage = members[0].width, members[0].stage
        index = CoreIndex(shared=self.cores == "shared")
        placements = {}
        if members[0].role in MHSA_ROLES:
            rank = stage_rank("rank", self.rank, sites, stage)
            for site in members:
                check_square(site, d, "EFFT2's attention group")
                first = index.take(site.block, site.role, site.slices)
                placements[site.name] = Placement(first, site.slices, "in", (0, d))
            return placements, (d, d), rank, index.total
        own = self.ffn_rank is not None
        rank = stage_rank("ffn_rank" if own else "rank", self.ffn_rank or self.rank, sites, stage)
        hidden = ffn_hidden(members)
        for site in members:
            first = index.take(site.block, site.role, site.slices)
            side = "in" if site.role == "fc2" else "out"
            placements[site.name] = Placement(first, site.slices, side, (0, hidden))
        return placements, (hidden, d), rank, index.total


def check_square(site: Site, d: int, what: str) -> None:
    """Raise ValueError unless each of the site's matrices is d×d."""
    if (site.in_features, site.out_features) != (d, site.slices * d):
        raise ValueError(
            f"{what} holds d×d matrices (d={d}), got {site.name!r} with K={site.in_features},"
            f" N={site.out_features}"
        )

"""EFFT1 and EFFT2: Aggregate, Decompose, and Fine-Tune (arXiv:2311.06749, Eq. 2 and 3, section
3.2)."""

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
    check_choice,
    check_number,
    check_rank_fits,
    rank_pair,
)
from .tensor_train import Placement, TensorTrainGroup

# The order of the papers' matrices in a block; the fused qkv stands at q and takes three places.
_MHSA_ORDER = {"qkv": 0, "q": 0, "k": 1, "v": 2, "o": 3}
_FFN_ORDER = {"fc1": 0, "fc2": 1}


@dataclass(frozen=True)
class _EFFT(Method):
    """What EFFT1 and EFFT2 share: the options and the walk over stages.

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

    roles: ClassVar[tuple[str, ...]] = MHSA_ROLES + FFN_ROLES

    def __post_init__(self) -> None:
        for rank in self.rank if isinstance(self.rank, list) else [self.rank]:
            rank_pair("rank", rank)
        check_number("scale", self.scale)
        check_choice("init", self.init, ("u", "v"))
        check_number("dropout", self.dropout, low=0.0, below=1.0)
        check_choice("cores", self.cores, ("per_layer", "shared"))
        if not isinstance(self.learn_scale, bool):
            raise TypeError(f"learn_scale must be a bool, got {type(self.learn_scale).__name__}")

    def _part(self, site: Site) -> str:
        """The name of the group, within its stage, that a site belongs to."""
        raise NotImplementedError

    def _stage_rank(
        self, rank: Rank | list[Rank], name: str, stage: int, stages: int
    ) -> tuple[int, int]:
        if isinstance(rank, list):
            if len(rank) != stages:
                raise ValueError(
                    f"{name} must have one entry per stage ({stages}), got {len(rank)}"
                )
            return rank_pair(name, rank[stage])
        return rank_pair(name, rank)

    def members(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        stages = sorted({site.stage for site in sites})
        groups: dict[str, list[Site]] = {}
        for site in sorted(sites, key=_block_order):
            if site.role not in self.roles:
                raise ValueError(
                    f"targets must be attention or FFN linears for {type(self).__name__}, which"
                    f" places {', '.join(self.roles)}; {site.name!r} is none of these (use LoRA for it)"
                )
            part = self._part(site)
            name = part if len(stages) == 1 else f"stage{site.stage}_{part}"
            groups.setdefault(name, []).append(site)
        for name, members in groups.items():
            widths = sorted({site.width for site in members})
            if len(widths) > 1:
                raise ValueError(f"targets of group {name!r} must have one width d, got {widths}")
        return groups

    def _group(
        self,
        placements: dict[str, Placement],
        sites: Sequence[Site],
        dims: tuple[int, int],
        cores: int,
        rank: tuple[int, int],
    ) -> TensorTrainGroup:
        check_rank_fits("rank", rank, sites)
        return TensorTrainGroup(
            placements,
            dims=dims,
            rank=rank,
            cores=cores,
            scale=self.scale,
            learn_scale=self.learn_scale,
            init=self.init,
            dropout=self.dropout,
        )

    def _core_indices(self, keys: Sequence[tuple[tuple[int, str], int]]) -> tuple[list[int], int]:
        """Σ's first index for each (block, kind) key that takes `count` cores, and how many Σ there
        are.

        The same key always gets the same cores; with `cores="shared"` the block does not count.
        """
        first: dict[tuple[int, str], int] = {}
        total = 0
        indices = []
        for (block, kind), count in keys:
            key = (0 if self.cores == "shared" else block, kind)
            if key not in first:
                first[key] = total
                total += count
            indices.append(first[key])
        return indices, total


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

    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        members = self.members(sites)
        return {
            name: self._build_group(group, self._stage_rank(self.rank, "rank", i, len(members)))
            for i, (name, group) in enumerate(members.items())
        }

    def _build_group(self, sites: Sequence[Site], rank: tuple[int, int]) -> FactorGroup:
        d = sites[0].width
        has_ffn = any(site.role in FFN_ROLES for site in sites)
        for site in sites:
            hidden = max(site.in_features, site.out_features)
            if site.role in FFN_ROLES and hidden != 4 * d:
                raise ValueError(
                    f"EFFT1 needs FFN linears with 4d={4 * d} hidden features, got {hidden} in"
                    f" {site.name!r}; use EFFT2, whose FFN group has its own U"
                )
        kinds = [
            kind
            for kind in ("q", "k", "v", "o")
            if has_ffn or any(kind in site.role and site.role in MHSA_ROLES for site in sites)
        ]
        indices, cores = self._core_indices(
            [((s.block, "mhsa" if s.role in MHSA_ROLES else s.role), 1) for s in sites]
        )
        placements = {}
        for site, index in zip(sites, indices, strict=True):
            if site.role in MHSA_ROLES:
                start = kinds.index("q" if site.role == "qkv" else site.role) * d
                placements[site.name] = Placement(
                    index, 1, "out", (start, start + site.out_features)
                )
            else:
                side = "out" if site.role == "fc1" else "in"
                placements[site.name] = Placement(index, 1, side, (0, 4 * d))
        return self._group(placements, sites, (len(kinds) * d, d), cores, rank)


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
            for rank in self.ffn_rank if isinstance(self.ffn_rank, list) else [self.ffn_rank]:
                rank_pair("ffn_rank", rank)

    def _part(self, site: Site) -> str:
        return "mhsa" if site.role in MHSA_ROLES else "ffn"

    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        stages = sorted({site.stage for site in sites})
        groups: dict[str, FactorGroup] = {}
        for name, members in self.members(sites).items():
            stage = stages.index(members[0].stage)
            if members[0].role in MHSA_ROLES:
                rank = self._stage_rank(self.rank, "rank", stage, len(stages))
                groups[name] = self._build_mhsa(members, rank)
            else:
                ffn_rank = self.rank if self.ffn_rank is None else self.ffn_rank
                rank = self._stage_rank(ffn_rank, "ffn_rank", stage, len(stages))
                groups[name] = self._build_ffn(members, rank)
        return groups

    def _build_mhsa(self, sites: Sequence[Site], rank: tuple[int, int]) -> FactorGroup:
        d = sites[0].width
        for site in sites:
            if (site.in_features, site.out_features) != (d, site.slices * d):
                raise ValueError(
                    f"EFFT2's attention group holds d×d matrices (d={d}), got {site.name!r} with"
                    f" K={site.in_features}, N={site.out_features}"
                )
        indices, cores = self._core_indices([((s.block, s.role), s.slices) for s in sites])
        placements = {
            site.name: Placement(index, site.slices, "in", (0, d))
            for site, index in zip(sites, indices, strict=True)
        }
        return self._group(placements, sites, (d, d), cores, rank)

    def _build_ffn(self, sites: Sequence[Site], rank: tuple[int, int]) -> FactorGroup:
        d = sites[0].width
        hidden = sorted({s.out_features if s.role == "fc1" else s.in_features for s in sites})
        if len(hidden) > 1:
            raise ValueError(f"EFFT2's FFN group needs one hidden width, got {hidden}")
        indices, cores = self._core_indices([((s.block, s.role), 1) for s in sites])
        placements = {
            site.name: Placement(index, 1, "in" if site.role == "fc2" else "out", (0, hidden[0]))
            for site, index in zip(sites, indices, strict=True)
        }
        return self._group(placements, sites, (hidden[0], d), cores, rank)


def _block_order(site: Site) -> tuple[int, int]:
    order = _MHSA_ORDER if site.role in MHSA_ROLES else _FFN_ORDER
    return site.block, order.get(site.role, 0) + (4 if site.role in FFN_ROLES else 0)

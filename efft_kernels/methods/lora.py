"""LoRA: independent low-rank factors per layer and matrix (FacT's Matrix-Batch, its Eq. 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    FactorGroup,
    Factors,
    Method,
    Site,
    check_choice,
    check_number,
    check_rank_fits,
    check_ranks,
    constant_float,
    rank_pair,
    undotted_names,
)
from .registry import register_method

KINDS = ("q", "k", "v", "o", "gate", "fc1", "fc2")


def chosen_slices(site: Site, matrices: tuple[str, ...] | None) -> tuple[tuple[int, ...], int]:
    """(which of the site's stacked matrices are adapted, how many are stacked); () means none.

    With matrices None, or where the site's role is unknown, the weight is one adapted matrix.
    """
    if matrices is None or site.role == "linear":
        return (0,), 1
    return tuple(i for i, kind in enumerate(site.matrices) if kind in matrices), site.slices


def check_matrices(matrices: object) -> None:
    """Raise unless matrices is None or a non-empty tuple of `KINDS`."""
    if matrices is None:
        return
    if not isinstance(matrices, tuple) or not matrices:
        raise TypeError(f"matrices must be None or a tuple of {KINDS}, got {matrices!r}")
    for matrix in matrices:
        check_choice("matrices", matrix, KINDS)


def stack_matrices(
    down: Tensor,  # [m, K, r]
    up: Tensor,  # [m, N/G, r]
    chosen: tuple[int, ...],
    slices: int,
) -> Factors:
    """The operands for m independent pairs, pair i acting on output slice chosen[i] alone.

    Returns:
        down [K, m·r]; no core; up [G, N/G, m·r], zero but for its slice's own columns, so that an
        unchosen slice gets an exact zero.
    """
    m, k, r = down.shape
    if slices == 1:
        return Factors(down[0], None, up)
    rows = dict(zip(chosen, up.unbind(), strict=True))
    stacked = [
        F.pad(rows[g], (chosen.index(g) * r, (m - 1 - chosen.index(g)) * r))
        if g in rows
        else up.new_zeros(up.shape[1], m * r)
        for g in range(slices)
    ]
    return Factors(down.transpose(0, 1).reshape(k, m * r), None, torch.stack(stacked))


@register_method
@dataclass(frozen=True)
class LoRA(Method):
    """ΔW = s·(A·B)^T for each matrix by itself, A [K, r] and B [r, N] (arXiv:2106.09685).

    r·(K + N) parameters a matrix; on ViT-B with q and v at r = 8: 294,912. B starts at zero.

    Attributes:
        rank: r, or a list with one per stage (Swin), where 0 leaves a stage alone: the EFFT
            release's is (d // 128)·k for the width d, e.g. [2, 4, 8, 16] for Swin-B.
        scale: s, the original's α/r.
        matrices: the kinds of matrix adapted, of q, k, v, o, gate, fc1, fc2; in a fused qkv the
            others' outputs stay exactly as they are. None adapts every targeted linear as one
            matrix, a fused qkv included.
        dropout: probability of dropping an entry of A and B in training; 0.1 in the EFFT release.
        factor_init: how A starts: "kaiming", kaiming_uniform_(a=√5) as the original, or "release",
            xavier_uniform_ as in the EFFT release's Set_LoRA.py.

    `LoRA(rank=8, alpha=16)` is `LoRA(rank=8, scale=16 / 8)`, as other libraries spell it. What is
    stored is the scale; both at once are refused, and so is alpha with a rank for each stage.
    """

    rank: int | list[int] = 8
    scale: float = 1.0
    matrices: tuple[str, ...] | None = ("q", "v")
    dropout: float = 0.0
    factor_init: str = "kaiming"

    name: ClassVar[str] = "lora"

    def __init__(
        self,
        rank: int | list[int] = rank,
        scale: float | None = None,
        matrices: tuple[str, ...] | None = matrices,
        dropout: float = dropout,
        factor_init: str = factor_init,
        *,
        alpha: float | None = None,
    ) -> None:
        values: dict[str, object] = {"rank": rank, "matrices": matrices, "dropout": dropout}
        values |= {"factor_init": factor_init, "scale": _scale(rank, scale, alpha)}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        _check_ranks(self.rank)
        check_number("scale", self.scale)
        check_matrices(self.matrices)
        check_number("dropout", self.dropout, low=0.0, below=1.0)
        check_choice("factor_init", self.factor_init, ("kaiming", "release"))

    def select(self, sites: Sequence[Site]) -> list[Site]:
        chosen = [site for site in sites if chosen_slices(site, self.matrices)[0]]
        if isinstance(self.rank, int):
            return chosen
        ranks = self._stage_ranks(chosen)
        return [site for site in chosen if ranks[site.stage]]

    def _stage_ranks(self, sites: Sequence[Site]) -> dict[int, int]:
        """Stage → its rank, among those that `sites` span: all, or those whose rank is not 0.

        Raises:
            ValueError: a list whose length is not the number of stages.
        """
        stages = sorted({site.stage for site in sites})
        if isinstance(self.rank, int):
            return dict.fromkeys(stages, self.rank)
        adapted = [rank for rank in self.rank if rank]
        ranks = adapted if len(adapted) == len(stages) else self.rank
        if len(ranks) != len(stages):
            raise ValueError(
                f"rank must have one entry per stage ({len(stages)}), got {len(self.rank)}"
            )
        return dict(zip(stages, ranks, strict=True))

    def members(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        names = undotted_names(sites)
        return {names[site.name]: [site] for site in sites}

    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        ranks = self._stage_ranks(sites)
        for stage, rank in ranks.items():
            members = [site for site in sites if site.stage == stage]
            check_rank_fits("rank", rank_pair("rank", rank), members)
        return {
            name: LoRAGroup(self, site, ranks[site.stage])
            for name, (site,) in self.members(sites).items()
        }


def _scale(rank: int | list[int], scale: float | None, alpha: float | None) -> float:
    """The scale that was given, or alpha/rank, or 1.

    Raises:
        ValueError: both, or alpha with a rank for each stage.
    """
    if alpha is None:
        return 1.0 if scale is None else scale
    if scale is not None:
        raise ValueError(
            f"scale and alpha must not both be given, got scale={scale!r} and alpha={alpha!r};"
            " alpha is for scale=alpha/rank"
        )
    _check_ranks(rank)
    check_number("alpha", alpha)
    if isinstance(rank, list):
        raise ValueError(
            f"alpha must go with one rank for all stages, got rank={rank!r}; pass scale"
        )
    return alpha / rank


def _check_ranks(rank: object) -> None:
    """Raise unless rank is an int, at least 1, or a list of these and 0, not all 0."""
    ranks = rank if isinstance(rank, list) else [rank]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in ranks):
        raise TypeError(f"rank must be an int, or a list with one per stage, got {rank!r}")
    adapted = [each for each in ranks if each]
    if ranks and not adapted:
        raise ValueError(f"rank must be at least 1 in one stage, got {rank!r}")
    check_ranks("rank", adapted)


class LoRAGroup(FactorGroup):
    """A [m, r, K] and B [m, N/G, r] of one linear's m adapted matrices."""

    dropout: float = constant_float("dropout")

    def __init__(self, method: LoRA, site: Site, rank: int) -> None:
        super().__init__()
        self.chosen, self.slices = chosen_slices(site, method.matrices)
        self.scale = float(method.scale)
        self.dropout = method.dropout
        self.factor_init = method.factor_init
        n = site.out_features // self.slices
        self.A = nn.Parameter(torch.empty(len(self.chosen), rank, site.in_features))
        self.B = nn.Parameter(torch.empty(len(self.chosen), n, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for matrix in self.A.unbind():
            if self.factor_init == "kaiming":
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            else:
                nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.B)

    def factors(self, site: str, dropout: bool) -> Factors:
        down: Tensor = self.A.transpose(-2, -1)
        up: Tensor = self.B
        if dropout and self.dropout > 0:
            down, up = F.dropout(down, self.dropout), F.dropout(up, self.dropout)
        up = up if self.scale == 1.0 else up * self.scale
        return stack_matrices(down, up, self.chosen, self.slices)

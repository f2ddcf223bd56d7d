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

    r·(K + N) parameters a matrix; on ViT-B with q and v at r = 8: 294,912. A starts with
    kaiming_uniform_(a=√5), B at zero.

    Attributes:
        rank: r.
        scale: s, the original's α/r.
        matrices: the kinds of matrix adapted, of q, k, v, o, gate, fc1, fc2; in a fused qkv the
            others' outputs stay exactly as they are. None adapts every targeted linear as one
            matrix, a fused qkv included.
    """

    rank: int = 8
    scale: float = 1.0
    matrices: tuple[str, ...] | None = ("q", "v")

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int):
            raise TypeError(f"rank must be an int, got {self.rank!r}")
        check_ranks("rank", self.rank)
        check_number("scale", self.scale)
        check_matrices(self.matrices)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if chosen_slices(site, self.matrices)[0]]

    def members(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        names = undotted_names(sites)
        return {names[site.name]: [site] for site in sites}

    def build(self, sites: Sequence[Site]) -> dict[str, FactorGroup]:
        check_rank_fits("rank", rank_pair("rank", self.rank), sites)
        return {
            name: LoRAGroup(site, *chosen_slices(site, self.matrices), self.rank, self.scale)
            for name, (site,) in self.members(sites).items()
        }


class LoRAGroup(FactorGroup):
    """A [m, r, K] and B [m, N/G, r] of one linear's m adapted matrices."""

    def __init__(
        self, site: Site, chosen: tuple[int, ...], slices: int, rank: int, scale: float
    ) -> None:
        super().__init__()
        self.chosen = chosen
        self.slices = slices
        self.scale = float(scale)
        n = site.out_features // slices
        self.A = nn.Parameter(torch.empty(len(chosen), rank, site.in_features))
        self.B = nn.Parameter(torch.empty(len(chosen), n, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for matrix in self.A.unbind():
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def factors(self, site: str, dropout: bool) -> Factors:
        up = self.B if self.scale == 1.0 else self.B * self.scale
        return stack_matrices(self.A.mT, up, self.chosen, self.slices)

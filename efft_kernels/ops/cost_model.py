"""Which strategy is cheapest for a problem: arithmetic on shapes, corrected by measured constants."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """The numbers a strategy's cost depends on (glossary of DESIGN.md; bytes are per element)."""

    M: int
    K: int
    N: int
    G: int
    rank: int  # Ra, the width of the fold
    training: bool
    weight_bytes: int  # as stored
    compute_bytes: int
    device_type: str

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        down: Tensor,
        core: Tensor | None,
        up: Tensor,
        training: bool,
    ) -> Problem:
        """The problem of one call. `x` may be dY as well: only its rows, dtype and device are read."""
        return cls(
            M=x.shape[0],
            K=weight.shape[1],
            N=weight.shape[0],
            G=up.shape[0] if core is None else core.shape[0],
            rank=down.shape[1],
            training=training,
            weight_bytes=weight.element_size(),
            compute_bytes=x.element_size(),
            device_type=x.device.type,
        )


def choose(problem: Problem, strategies: tuple[str, ...], backend: str) -> str:
    """The strategy of `strategies` with the least predicted cost.

    `merged` adds ΔW (2·N·K·r FLOPs, one pass over the weight) where `split` makes one more thin product and
    another pass over the output (2·M·N·r FLOPs). It is ruled out for weights stored in half precision,
    where an increment below half an ulp of W0 would vanish.
    """
    if "fused" in strategies:
        return "fused"
    if problem.weight_bytes < 4:
        return "split"
    p = problem
    merged_traffic = p.N * p.K * (p.weight_bytes + 2 * p.compute_bytes)
    split_traffic = 2 * p.M * p.N * p.compute_bytes
    return (
        "merged"
        if merged_traffic + 2 * p.N * p.K * p.rank < split_traffic + 2 * p.M * p.N * p.rank
        else "split"
    )

"""A step's launches on paper: how many, their bytes, and ViT-B's time beside the measured one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import host_overhead
from benchmarks import step_predictions as predictions
from benchmarks.lib.rows import RESULTS, read_rows
from efft_kernels.ops import cost_model

pytestmark = pytest.mark.skipif(host_overhead.host_only() is not None, reason="interpreted")
VIT_B = predictions.MODELS["ViT-B/16"]
H100 = cost_model.DEVICES["H100"]
COMMITS = "6fa1396", "e79a1a6"  # of the rows that KERNELS was fitted to


def measured_ms(impl: str, mode: str) -> float:
    rows: list[Any] = [
        row
        for row in read_rows(RESULTS / "step.csv")
        if (row["impl"], row["mode"]) == (impl, mode) and row["commit"] in COMMITS
    ]
    return float(rows[-1]["ms_p50"])


def test_vit_b_takes_what_it_was_measured_to_take() -> None:
    step = predictions.Step.of(VIT_B, 64, 16)
    for launches, impl, mode in (
        (step.frozen, "frozen, gradient to its input", "graph"),
        (step.compiled, "frozen, gradient to its input", "compiled-graph"),
        (step.chain, "EFFT2", "graph"),
    ):
        found = predictions.milliseconds(launches, H100)
        assert found == pytest.approx(measured_ms(impl, mode), rel=0.06)


def test_a_frozen_step_launches_what_a_real_one_does() -> None:
    rows: list[Any] = [
        row
        for row in read_rows(RESULTS / "launches.csv")
        if row["impl"].startswith("frozen") and "autocast" in row["weights"]
    ]
    counted = int(rows[-1]["forward"]) + int(rows[-1]["backward"])
    assert len(predictions.frozen_step(VIT_B, 2)) == counted


def test_bytes_and_operations_of_a_block() -> None:
    """By hand, for one block of the chain; partial sums aside, as its kernels' sources say."""
    vit, images, r = predictions.Vit(1, 768, 12), 8, 16
    m, k = images * vit.tokens, vit.K
    launches = predictions.chain_step(vit, images, r)
    products = [x for x in launches if x.name == "library gemm"]
    # qkv, proj, fc1, fc2, and back but for qkv's
    assert sum(x.flops for x in products) == 2 * m * k * k * (12 + 9)

    def moved(name: str) -> list[int]:
        return [x.bytes_moved for x in launches if x.name == name]

    first, second = moved("norm")
    thin = k * r * 2 + m * r * 2 + 2 * m * 4 + 2 * k * 4  # down, P, statistics, weight and bias
    assert first == m * k * (4 + 2) + thin
    assert second == m * k * (4 + 2 + 4 + 2) + thin
    (gelu,) = moved("act_fwd")
    assert gelu == 2 * m * 4 * k * 2 + 4 * k * r * 2 + m * r * 2
    # The weights of one layer, in a launch a kind.
    merged = sum(n * c * (4 + 2) + (n + c) * r * 2 for n, c in sizes(k))
    assert sum(moved("merge_stack")) == merged


def test_what_the_untimed_steps_leave() -> None:
    """fc2's pass but that of the last layer, and Triton's kernels in CUDA C++'s place."""
    vit, images, r = predictions.Vit(3, 768, 12), 8, 16
    steps = [predictions.chain_step(vit, images, r, untimed) for untimed in (False, True)]
    timed, untimed = (Counter(launch.name for launch in launches) for launches in steps)
    assert timed["thin_grad"] == 3 and untimed["thin_grad"] == 1
    assert timed - untimed == Counter({"thin_grad": 2, "pair_grad": 3, "act_fwd": 3, "act_bwd": 3})
    assert untimed - timed == Counter({"pair_grad_cuda": 3, "gelu_cuda": 3, "gelu_grad_cuda": 3})
    m, k, c = images * vit.tokens, 768, 3072
    (moved,) = {x.bytes_moved for x in steps[1] if x.name == "gelu_grad_cuda"}
    sums = 4 * 16 * (4 * m + 2 * 33 * c)
    assert moved == 3 * m * c * 2 + 2 * (2 * m * r + c * r) + sums
    (moved,) = {x.bytes_moved for x in steps[1] if x.name == "pair_grad_cuda"}
    assert moved == 2 * (2 * m * k + 2 * k * r) + 2 * 132 * k * 16 * 4


def test_wide_streams() -> None:
    """ViT-H's norms are CUDA C++'s; its pair and GELU are Triton's, S of fc2 a pass of its own."""
    launches = predictions.chain_step(predictions.Vit(2, 1280, 16, 14), 8, 16, untimed=True)
    names = Counter(launch.name for launch in launches)
    assert names["norm"] == 4 and names["norm_grad"] == 3 and not names["norm_bwd"]
    assert names["pair_grad"] == names["thin_grad"] == names["gelu_grad_cuda"] == 2
    assert names["act_fwd"] == 2


def sizes(k: int) -> tuple[tuple[int, int], ...]:
    return (3 * k, k), (k, k), (4 * k, k), (k, 4 * k)

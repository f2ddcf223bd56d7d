"""The host's share of a call, timed without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import host_overhead
from benchmarks.lib import rows as csv_rows
from efft_kernels.ops import dispatch

pytestmark = pytest.mark.skipif(host_overhead.host_only() is not None, reason="interpreted")


@pytest.mark.parametrize("strategy,forward", [("fused", 1), ("split", 2)])
def test_launches_and_times_of_a_small_layer(strategy: str, forward: int) -> None:
    rows = host_overhead.measure(("tiny", 64, 48, 96, 2), strategy, True, 16, 1)
    rows += host_overhead.measure(("tiny", 64, 48, 96, 2), strategy, False, 16, 1)
    # A core costs no launch more.
    assert [row["launches"] for row in rows] == [forward, 4, forward, 4]
    for row in rows:
        assert all(row[c] > 0 for c in ("kernels_us", "triton_us", "operator_us", "floor_us"))
        # Generous: a guard against doing the work of the first call in every call.
        assert row["kernels_us"] < 400


def test_nothing_of_the_pretence_stays() -> None:
    before = dispatch.available_backends()
    host_overhead.measure(("tiny", 64, 48, 96, 2), "fused", True, 16, 1)
    assert dispatch.available_backends() == before


def test_rows_go_to_a_csv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_overhead, "CALLS", 2)
    out = tmp_path / "host.csv"
    command = ["host_overhead", "--images", "1", "--layers", "proj", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    host_overhead.main()
    rows = csv_rows.read_rows(out)
    assert len(rows) == 2 * 2 * 2
    assert tuple(rows[0]) == host_overhead.COLUMNS

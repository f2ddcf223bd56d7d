"""The host-time benchmark: every way gives the same numbers, and its rows are complete."""

from __future__ import annotations

import torch

from benchmarks import native_overhead


def test_all_ways_but_the_floor_compute_the_same() -> None:
    results = {}
    for impl, way in native_overhead.ways().items():
        if impl != native_overhead.FLOOR:
            with way.setting():
                results[impl] = way.forward()
    expected = results.pop("eager torch")
    assert len(results) >= 1
    for impl, y in results.items():
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, msg=impl)


def test_a_row_for_every_way_and_part() -> None:
    rows = native_overhead.measure(repeats=1)
    assert len(rows) == 2 * len(native_overhead.ways())
    for row in rows:
        assert set(native_overhead.COLUMNS) == set(row)
        assert float(str(row["us"])) > 0
        assert int(str(row["launches"])) >= 1
    # One operator forward and one backward, however it is reached.
    fused = {str(row["impl"]): row["launches"] for row in rows if row["part"] == "fwd+bwd"}
    assert fused["torch backend"] == 2

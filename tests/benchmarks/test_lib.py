"""Interleaved rounds, spreads, the CSVs and the correctness gate."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lib import rows as csv_rows
from benchmarks.lib import timing


def test_every_call_runs_once_in_each_round() -> None:
    ran: list[str] = []
    calls = {name: (lambda name=name: ran.append(name)) for name in ("a", "b", "c")}
    timings = timing.interleave(calls, seconds=0.0, fewest_rounds=4, warm_ups=0)
    assert timings.rounds == 4 and len(ran) == 12
    for start in range(0, 12, 3):
        assert sorted(ran[start : start + 3]) == ["a", "b", "c"]


def test_what_warms_up_is_not_timed() -> None:
    ran: list[str] = []
    calls = {"a": lambda: ran.append("a")}
    timings = timing.interleave(calls, seconds=0.0, fewest_rounds=3, warm_ups=2)
    assert len(ran) == 5 and len(timings.ms["a"]) == timings.rounds == 3
    timer = timing.Timer("cpu", eager=True)
    assert timer.prepare(calls["a"]) is calls["a"] and len(ran) == 5 + 3


def test_rounds_stop_at_the_most() -> None:
    timings = timing.interleave({"a": lambda: None}, seconds=60.0, most_rounds=7)
    assert timings.rounds == 7


def test_a_ratio_is_taken_within_each_round() -> None:
    timings = timing.Timings({"own": [2.0, 20.0, 6.0], "floor": [1.0, 10.0, 2.0]})
    assert timings.ratio("own", "floor").p50 == 2.0
    assert timings.ratio("floor", "floor") == timing.Spread(1.0, 1.0, 1.0)


def test_a_spread_is_its_sample_s_percentiles() -> None:
    spread = timing.Spread.of([float(i) for i in range(11)])
    assert (spread.p20, spread.p50, spread.p80) == (2.0, 5.0, 8.0)
    assert timing.Spread.of([3.0]) == timing.Spread(3.0, 3.0, 3.0)


def test_rows_are_only_ever_appended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    csv_rows.append_rows(path, ("a", "b"), [{"a": 1, "b": 2}])
    before = path.read_text()
    csv_rows.append_rows(path, ("a", "b"), [{"a": 3}])
    assert path.read_text() == before + "3,\n"
    assert csv_rows.read_rows(path) == [{"a": "1", "b": "2"}, {"a": "3", "b": ""}]
    with pytest.raises(ValueError, match="must have the columns"):
        csv_rows.append_rows(path, ("a", "c"), [{"a": 1, "c": 2}])


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert csv_rows.read_rows(tmp_path / "none.csv") == []


def test_the_newest_row_of_each_key_counts() -> None:
    rows = [
        {"op": "a", "timestamp": "2026-01-02", "v": 1},
        {"op": "b", "timestamp": "2026-01-01", "v": 2},
        {"op": "a", "timestamp": "2026-01-03", "v": 3},
        {"op": "a", "timestamp": "2026-01-01", "v": 4},
    ]
    assert [row["v"] for row in csv_rows.newest(rows, ("op",))] == [3, 2]


def test_rows_of_an_earlier_run_do_not_stand_beside_those_of_the_last() -> None:
    rows = [
        {"op": "a", "impl": "x", "commit": "1", "timestamp": "1", "v": 1},
        {"op": "a", "impl": "gone", "commit": "1", "timestamp": "2", "v": 2},
        {"op": "b", "impl": "x", "commit": "1", "timestamp": "3", "v": 3},
        {"op": "a", "impl": "x", "commit": "2", "timestamp": "4", "v": 4},
        {"op": "a", "impl": "new", "commit": "2", "timestamp": "5", "v": 5},
    ]
    assert [row["v"] for row in csv_rows.last_comparisons(rows, ("op", "impl"))] == [4, 3, 5]


def test_provenance_names_where_and_when() -> None:
    where = csv_rows.provenance("cpu", ("timm",))
    assert csv_rows.is_cpu(where["device"]) and where["timm"] and where["commit"]
    assert where["timestamp"].endswith("+00:00")
    assert not csv_rows.is_cpu("NVIDIA H200")

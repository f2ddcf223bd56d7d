"""From made-up GPU rows to the file that the cost model reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measured, operators, roofline
from benchmarks.lib import rows as csv_rows
from efft_kernels.ops import cost_model
from efft_kernels.ops.backends import triton

H200 = "NVIDIA H200"
QKV = cost_model.Problem(12608, 768, 2304, 3, 16, True, 2, 2, "cuda")
ALL = ("fused", "split", "merged")


def row(strategy: str, mode: str, ms: float, **changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(csv_rows.OPERATOR_COLUMNS, "")
    return (
        row
        | {
            "op": "ViT-B/16 qkv",
            "impl": "triton",
            "strategy": strategy,
            "mode": mode,
            "dtype": "bfloat16",
            "M": "12608",
            "K": "768",
            "N": "2304",
            "G": "3",
            "r": "16",
            "ms_p50": str(ms),
            "err_ratio": "1.01",
            "device": H200,
            "torch": "2.11",
            "triton": "3.6",
            "commit": "abc1234",
            "timestamp": "2026-01-01T00:00:00",
        }
        | changes
    )


def both(strategy: str, forward: float, total: float, **changes: Any) -> list[dict[str, Any]]:
    return [
        row(strategy, "train fwd", forward, **changes),
        row(strategy, "fwd+bwd", total, **changes),
    ]


@pytest.fixture
def on_an_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The cost model reads measured.json here, as on a machine with an H200."""
    path = tmp_path / "measured.json"
    monkeypatch.setattr(cost_model, "MEASURED", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H200)

    def forget() -> None:
        cost_model._measured.clear()
        for cached in (cost_model.choose, cost_model._load_shipped, cost_model.device_of):
            cached.cache_clear()

    forget()
    yield path
    forget()


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[dict], out: Path) -> None:
    csv = tmp_path / "operators.csv"
    csv.unlink(missing_ok=True)
    csv_rows.append_rows(csv, csv_rows.OPERATOR_COLUMNS, rows)
    monkeypatch.setattr(sys, "argv", ["measured", str(csv), "--out", str(out)])
    measured.main()


@pytest.mark.parametrize("winner", ["fused", "split"])
def test_the_cost_model_follows_the_rows(
    on_an_h200: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, winner: str
) -> None:
    other = {"fused": "split", "split": "fused"}[winner]
    # The winner of the forward loses the backward.
    run(monkeypatch, tmp_path, [*both(winner, 0.08, 0.28), *both(other, 0.09, 0.20)], on_an_h200)
    assert cost_model.choose(QKV, triton) == winner
    assert cost_model.choose(QKV._replace(backward=True), triton) == other
    times = cost_model.measured_ms(QKV._replace(backward=True), ALL, "triton")
    assert times == {winner: pytest.approx(0.20), other: pytest.approx(0.11)}


def test_rows_are_named_and_typed() -> None:
    (found,) = measured.convert([*both("fused", 0.1, 0.3), *both("split", 0.2, 0.3)]).values()
    assert [(r["strategy"], r["backward"]) for r in found] == [
        ("fused", False),
        ("split", False),
        ("fused", True),
        ("split", True),
    ]
    for r in found:
        assert tuple(r) == measured.FIELDS
        assert (r["M"], r["K"], r["N"], r["rank"]) == (12608, 768, 2304, 16)
        assert (r["compute_bytes"], r["weight_bytes"], r["backend"]) == (2, 2, "triton")
        assert r["commit"] == "abc1234"


def test_the_newest_row_counts() -> None:
    old = both("fused", 0.5, 0.9, timestamp="2025-01-01T00:00:00")
    rows = [*both("fused", 0.1, 0.3), *old, *both("split", 0.2, 0.3)]
    (found,) = measured.convert(rows).values()
    assert found[0]["ms_p50"] == 0.1


def test_what_decides_nothing_is_left_out() -> None:
    alone = both("fused", 0.1, 0.3)
    assert measured.convert(alone) == {}
    pair = [*alone, *both("split", 0.2, 0.3)]
    assert measured.convert([r | {"device": "Some Processor, 2 threads"} for r in pair]) == {}
    assert measured.convert([r | {"mode": r["mode"] + " (eager)"} for r in pair]) == {}
    assert measured.convert([r | {"impl": "peft"} for r in pair]) == {}
    assert measured.convert([r | {"strategy": "auto"} for r in pair]) == {}
    # Without the forward that saves P there is nothing to take from the sum.
    assert measured.convert([r for r in pair if r["mode"] == "fwd+bwd"]) == {}
    # A difference that is no time: the forward alone is kept.
    (found,) = measured.convert([*alone, *both("split", 0.4, 0.3)]).values()
    assert [r["backward"] for r in found] == [False, False]
    # The two modes were measured on different code.
    changed = [r | {"commit": r["commit"] + r["mode"][:1]} for r in pair]
    (found,) = measured.convert(changed).values()
    assert [r["backward"] for r in found] == [False, False]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"ms_p50": "nan"}, "ms_p50 must be positive, got nan"),
        ({"ms_p50": "0"}, "ms_p50 must be positive, got 0"),
        ({"err_ratio": "2.5"}, "err_ratio must be at most 2, got 2.5"),
        ({"err_ratio": "nan"}, "err_ratio must be at most 2, got nan"),
        ({"dtype": "float8"}, "dtype must be one of .*got float8"),
    ],
)
def test_a_row_that_is_no_measurement_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured.convert([row("fused", "train fwd", 0.1) | changes])


def test_other_devices_keep_their_rows(
    on_an_h200: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_an_h200.write_text(json.dumps({"NVIDIA A100": [{"kept": 1}]}))
    pair = [*both("fused", 0.1, 0.3), *both("split", 0.2, 0.3)]
    run(monkeypatch, tmp_path, pair, on_an_h200)
    changed = [*both("fused", 0.7, 0.9), *both("split", 0.2, 0.3)]
    run(monkeypatch, tmp_path, changed, on_an_h200)
    table = json.loads(on_an_h200.read_text())
    assert table["NVIDIA A100"] == [{"kept": 1}]
    assert len(table[H200]) == 4
    assert {r["ms_p50"] for r in table[H200] if r["strategy"] == "fused" and not r["backward"]} == {
        0.7
    }
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".json"] == ["measured.json"]


def test_the_benchmark_writes_the_modes_that_are_read() -> None:
    layer = ("tiny", 13, 17, 33, 3)
    impls, modes = ["torch:split", "torch:merged"], list(operators.MODES)
    peaks = roofline.Peaks(0.1, 20.0)
    rows = operators.measure_layer(
        "Tiny", layer, 3, peaks=peaks, impls=impls, modes=modes, rounds=3
    )
    assert {measured.FORWARD, measured.BOTH} < set(modes)
    assert [r["mode"] for r in rows] == [mode for mode in modes for _ in range(3)]
    assert measured.convert(rows) == {}  # a CPU's
    # As from a GPU: one of a few microseconds may take less time with its backward than without.
    (found,) = measured.convert([r | {"device": H200} for r in rows]).values()
    assert {r["strategy"] for r in found} == {"split", "merged"}


def test_rows_without_a_choice_are_an_error(
    on_an_h200: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="no case with two strategies on a GPU"):
        run(monkeypatch, tmp_path, both("fused", 0.1, 0.3), on_an_h200)
    assert not on_an_h200.exists()

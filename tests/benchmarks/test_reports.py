"""Peaks, tables, pictures and the regression gate, from made-up rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import check, peers, plots, roofline, tables
from benchmarks.lib import operands
from benchmarks.lib import rows as csv_rows
from benchmarks.lib.shapes import models
from benchmarks.operators import RANKS, cases, measure_layer

CPU = "Some Processor, 2 threads"


def whole_row(impl: str, ratio: float, **changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(csv_rows.WHOLE_MODEL_COLUMNS, "")
    return (
        row
        | {
            "model": "vit_small_patch16_224",
            "impl": impl,
            "dtype": "float32",
            "batch": "8",
            "r": "16",
            "rounds": "9",
            "ms_p20": "90",
            "ms_p50": "100",
            "ms_p80": "120",
            "ratio_to_floor": str(ratio),
            "ratio_p20": str(ratio - 0.01),
            "ratio_p80": str(ratio + 0.01),
            "saved_mib": "12.5",
            "trainable": "1234",
            "device": CPU,
            "torch": "2.11",
            "commit": "abc1234",
            "timestamp": "2026-01-01T00:00:00",
        }
        | changes
    )


def operator_row(impl: str, strategy: str, ratio: float, **changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(csv_rows.OPERATOR_COLUMNS, "")
    return (
        row
        | {
            "op": "ViT-S/16 qkv",
            "impl": impl,
            "strategy": strategy,
            "mode": "fwd+bwd",
            "dtype": "float32",
            "M": "197",
            "K": "384",
            "N": "1152",
            "G": "3",
            "r": "16",
            "ms_p50": "1",
            "tflops": "0.05",
            "gbps": "2",
            "ratio_to_linear": str(ratio),
            "device": CPU,
            "torch": "2.11",
            "commit": "abc1234",
            "timestamp": "2026-01-01T00:00:00",
        }
        | changes
    )


@pytest.fixture
def whole() -> list[dict[str, Any]]:
    rows = [whole_row(peers.FLOOR, 1.0), whole_row("EFFT2", 1.1), whole_row("LoRA", 1.2)]
    return rows + [
        whole_row(row["impl"], 1.0, batch=str(batch), ms_p50="", saved_mib=str(4 * batch + 1))
        for row in rows
        for batch in (1, 2, 4)
    ]


@pytest.fixture
def operators() -> list[dict[str, Any]]:
    peaks = [
        operator_row("torch", "", 1, op=roofline.COPY, gbps="20", r="", mode=""),
        operator_row("torch", "", 1, op=roofline.GEMM, tflops="0.1", r="", mode=""),
    ]
    return peaks + [
        operator_row(impl, strategy, 1 + int(r) / 100, op=f"ViT-S/16 {op}", r=r)
        for op in ("qkv", "proj")
        for impl, strategy in (("F.linear", ""), ("torch", "split"), ("peft", ""))
        for r in ("4", "16", "64")
    ]


def test_peaks_are_measured_and_read_back_from_their_rows() -> None:
    peaks = roofline.Peaks(tflops=0.1, gbps=20.0)
    rows = roofline.peak_rows(peaks, torch.float32, "cpu")
    assert all(tuple(row) == csv_rows.OPERATOR_COLUMNS for row in rows)
    assert roofline.peaks_of(rows) == peaks
    assert roofline.peaks_of(rows[:1]) is None
    assert peaks.attainable_tflops(1.0) == pytest.approx(0.02)
    assert peaks.attainable_tflops(1e6) == 0.1
    assert peaks.floor_ms(flops=1e8, bytes_moved=4e7) == pytest.approx(2.0)


def test_a_sweep_writes_gated_rows_for_every_mode() -> None:
    rows = measure_layer(
        "Tiny",
        ("qkv", 13, 17, 33, 3),
        5,
        peaks=roofline.Peaks(0.1, 20.0),
        seconds=0.0,
        impls=("torch:split", "torch:merged"),
    )
    assert len(rows) == 9 and all(tuple(sorted(r)) == tuple(sorted(rows[0])) for r in rows)
    assert set(rows[0]) == set(csv_rows.OPERATOR_COLUMNS)
    for row in rows:
        assert float(row["ms_p50"]) > 0 and float(row["err_ratio"]) <= 2
        if row["impl"] == "F.linear":
            assert float(row["ratio_to_linear"]) == 1.0


def test_a_wrong_implementation_gets_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = operands.forward_of

    def wrong(impl: str, o: Any) -> Any:
        return (lambda: real("torch:split", o)() * 1.01) if impl == "wrong" else real(impl, o)

    monkeypatch.setattr(operands, "forward_of", wrong)
    rows = measure_layer(
        "Tiny",
        ("proj", 13, 17, 11, 1),
        5,
        peaks=roofline.Peaks(0.1, 20.0),
        seconds=0.0,
        impls=("wrong", "torch:split"),
        modes=("fwd",),
    )
    assert [row["impl"] for row in rows] == ["F.linear", "torch"]


def test_every_layer_and_rank_is_in_the_sweep() -> None:
    names = list(models(1))
    assert names[:2] == ["ViT-Ti/16", "ViT-S/16"]
    todo = cases(names, RANKS, 1)
    assert {rank for model, _, rank in todo if model == "ViT-B/16"} == {4, 8, 16, 32, 64}
    assert {rank for model, _, rank in todo if model == "Swin-B"} == {4, 16, 64}


def test_a_section_is_idempotent_and_says_what_is_not_measured(
    whole: list[dict[str, Any]], operators: list[dict[str, Any]]
) -> None:
    section = tables.measured_section(whole, operators, [])
    assert "1.10× (12 MiB)" in section and "`abc1234`" in section and CPU in section
    assert "Whole models on a GPU: not measured." in section
    assert "The operator on a GPU: not measured." in section
    readme = f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n"
    once = tables.with_section(readme, section)
    assert once.startswith("above\n") and once.endswith("below\n") and "old" not in once
    assert tables.with_section(once, section) == once
    with pytest.raises(ValueError, match="the page must have one"):
        tables.with_section("no markers", section)


def test_a_gpu_s_rows_get_their_own_table(whole: list[dict[str, Any]]) -> None:
    gpu = [row | {"device": "NVIDIA H200", "peak_mem_mb": "99"} for row in whole]
    page = tables.results_page(whole + gpu, [], [])
    assert "NVIDIA H200" in page and "| 99 |" in page and "not measured" in page


def test_what_is_resident_is_of_rows_without_times(whole: list[dict[str, Any]]) -> None:
    cpu = [row | {"peak_mem_mb": "77"} for row in whole if row["ms_p50"]]
    assert cpu and tables.memory_summary(cpu) == []
    untimed = [row | {"ms_p50": "", "saved_mib": "70"} for row in cpu]
    assert "70 (1.00×), 77 (1.00×)" in "\n".join(tables.memory_summary([*untimed, *cpu]))


def test_a_gpu_s_steps_are_a_table_with_a_column_for_every_mode() -> None:
    shared = dict.fromkeys(csv_rows.STEP_COLUMNS, "") | {
        "model": "vit_base_patch16_224", "dtype": "bfloat16 autocast", "frozen_dtype": "float32",
        "batch": "64", "r": "16", "device": "NVIDIA H200", "torch": "2.11", "commit": "abc1234",
        "timestamp": "2026-11-26T12:00:00+00:00",
    }  # fmt: skip
    steps = [
        shared | {"impl": impl, "mode": mode, "ms_p50": ms, "ratio_to_floor": ratio} | more
        for impl, mode, ms, ratio, more in (
            ("frozen", "eager", "20.5", "1.0", {"saved_mib": "2869.7", "peak_mem_mb": "3000"}),
            ("EFFT2", "eager", "22.5", "1.098", {"saved_mib": "2900.2", "peak_mem_mb": "3100"}),
            ("EFFT2", "graph", "19.1", "", {}),
        )
    ]
    older = steps[1] | {"ms_p50": "99", "timestamp": "2026-11-25T12:00:00+00:00"}
    section = tables.measured_section([], [], [older, *steps])
    assert "| EFFT2 | 22.5 (1.10×) | 19.1 | 2,900 | 3,100 |" in section
    assert "| frozen | 20.5 (1.00×) | – | 2,870 | 3,000 |" in section
    assert "99" not in section and "weights float32. 2026-11-26, NVIDIA H200" in section
    assert "Whole models on a GPU: not measured" not in section


def test_pages_show_what_the_csvs_give() -> None:
    files = (csv_rows.WHOLE_MODEL_CSV, csv_rows.OPERATORS_CSV, csv_rows.STEP_CSV)
    whole, operators, steps = map(csv_rows.read_rows, files)
    measured = tables.measured_section(whole, operators, steps)
    for path, section in (
        (tables.MEASURED, measured),
        (tables.README, tables.short_summary(whole, steps)),
    ):
        page = path.read_text()
        assert tables.with_section(page, section) == page, f"{path.name} is stale: `make tables`"


def test_readme_shows_float32_on_a_cpu() -> None:
    """Whatever dtype was measured last."""
    whole, steps = map(csv_rows.read_rows, (csv_rows.WHOLE_MODEL_CSV, csv_rows.STEP_CSV))
    later = [
        row
        | {
            "dtype": "bfloat16",
            "ratio_to_floor": "9.99",
            "timestamp": "2999" + row["timestamp"][4:],
        }
        for row in whole
    ]
    assert tables.short_summary([*whole, *later], steps) == tables.short_summary(whole, steps)


def test_pictures_come_from_rows_alone(
    tmp_path: Path, whole: list[dict[str, Any]], operators: list[dict[str, Any]]
) -> None:
    paths = plots.draw(operators, whole, tmp_path)
    names = {path.name for path in paths}
    for name in plots.PICTURES:
        assert f"{name}-some-processor-2-threads.png" in names
    assert all(path.stat().st_size > 1000 for path in paths)
    assert plots.draw([], [], tmp_path) == []


def test_a_picture_can_be_drawn_to_be_edited(
    tmp_path: Path, operators: list[dict[str, Any]]
) -> None:
    drawn = plots.draw(operators, [], tmp_path / "first", "svg")
    again = plots.draw(operators, [], tmp_path / "second", "svg")
    assert {path.suffix for path in drawn} == {".svg"}
    assert [path.read_bytes() for path in drawn] == [path.read_bytes() for path in again]


def test_the_gate_fails_beyond_its_band_and_only_for_this_package() -> None:
    committed = [whole_row("EFFT2", 1.10), whole_row("PEFT LoRA", 1.20)]
    fresh = [
        whole_row(peers.FLOOR, 1.0),
        whole_row("EFFT2", 1.30),
        whole_row("PEFT LoRA", 1.9),
        whole_row("LoRA", 1.2),
    ]
    ours, peft = check.compare(fresh, committed)
    assert (ours.impl, peft.impl) == ("EFFT2", "PEFT LoRA")
    assert ours.slower(0.10) and not ours.slower(0.20)
    assert not peft.slower(0.10)
    (other,) = check.compare([whole_row("EFFT2", 1.15)], committed)
    assert not other.slower(0.10)
    # A disturbed run whose fast rounds are as fast as ever decides nothing.
    (noisy,) = check.compare([whole_row("EFFT2", 1.30, ratio_p20="1.05")], committed)
    assert not noisy.slower(0.10)


def test_a_stage_and_a_dtype_have_a_panel_of_their_own() -> None:
    rows = [
        operator_row("torch", strategy, 1.5, op=f"Swin-B stage {stage} {layer}", dtype=dtype)
        | {"ms_p20": "0.9", "ms_p80": "1.2"}
        for stage in (1, 2)
        for layer in ("qkv", "fc1")
        for strategy, dtype in (("split", "float32"), ("merged", "float32"), ("split", "bfloat16"))
    ]
    figure = plots.ratio_bars(rows)
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title() for axes in panels]
    assert titles == [f"Swin-B stage {stage}, {dtype}" for stage in (1, 2)
                      for dtype in ("float32", "bfloat16")]  # fmt: skip
    assert [len(axes.patches) for axes in panels] == [4, 2, 4, 2]  # no slot stays empty
    (whisker, *_) = panels[0].collections[0].get_segments()
    assert list(whisker[:, 1]) == pytest.approx([1.35, 1.8])


def test_a_roof_is_named_where_it_is_drawn(operators: list[dict[str, Any]]) -> None:
    figure = plots.roofline(operators + [row | {"dtype": "bfloat16"} for row in operators])
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["float32", "bfloat16"]
    for axes in figure.axes:
        texts = [text.get_text() for text in axes.texts]
        assert texts == ["torch's GEMM, 100 GFLOP/s", "copy, 20 GB/s"]


def test_every_committed_picture_is_one_of_these_and_explained() -> None:
    found = {path.name for path in plots.PLOTS.glob("*")}
    sources = (csv_rows.OPERATORS_CSV, csv_rows.WHOLE_MODEL_CSV)
    rows = [row for path in sources for row in csv_rows.read_rows(path)]
    devices = {plots.slug(row["device"]) for row in rows}
    assert found <= {f"{name}-{device}.png" for name in plots.PICTURES for device in devices}
    page = (csv_rows.ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"results/plots/{name})" in page for name in found), "each is shown and explained"

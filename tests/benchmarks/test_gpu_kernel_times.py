"""Kernel times without a GPU: the flow, and what names a kernel gets."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks.gpu import kernel_times

TINY = ("--device", "cpu", "--model", "ViT-Ti/16", "--images", "1", "--impl", "torch:split")


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_every_layer_and_pass_has_rows(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    monkeypatch.setattr(kernel_times, "REPEATS", 1)
    assert kernel_times.main([*TINY, "--weights", weights, "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert {row["weights"] for row in rows} == {weights}
    assert len({(row["layer"], row["impl"], row["pass"]) for row in rows}) == 4 * 2 * 2
    assert all(float(row["us"]) > 0 for row in rows)


def test_another_profiler_sees_each_call_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_times, "kernels_of", None)
    assert kernel_times.main([*TINY, "--no-profiler"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 * 2 * 2


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void efft_kernels::cuda::low_rank_gemm_sm90_kernel<__nv_bfloat16, ...>", "gemm sm90"),
        ("void a::thin_kernel<__nv_bfloat16, PassConfig<16>, true>(b)", "thin_grad"),
        ("void a::thin_kernel<__nv_bfloat16, PassConfig<16>, false>(b)", "thin"),
        ("void a::thin_grad_kernel<__nv_bfloat16>(b)", "thin_grad"),
        ("_thin_kernel", "thin"),
        ("a::unfold_kernel(b)", "unfold"),
        ("a::fold_kernel(b)", "fold"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "library gemm"),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "library gemm"),
    ],
)  # fmt: skip
def test_a_kernel_is_named_by_its_work(kernel: str, name: str) -> None:
    assert kernel_times.short(kernel) == name


def test_a_kernel_that_waits_for_another_adds_what_it_runs_behind_it() -> None:
    def event(name: str, start: float, end: float, kind: DeviceType = DeviceType.CUDA) -> Any:
        spanned = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, device_type=kind, is_user_annotation=False, time_range=spanned
        )

    events = [
        event("reduce", 25, 42),  # started under tall_grad
        event("tall_grad", 0, 40),
        event("copy", 30, 35),  # within it
        event("launch", 0, 99, DeviceType.CPU),
        event("gemm", 50, 60),
    ]
    found = [("tall_grad", 40), ("reduce", 2), ("copy", 0), ("gemm", 10)]
    assert list(kernel_times.times(events)) == found

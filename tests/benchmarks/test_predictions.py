"""The tables of predictions, alone and beside measured kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import predictions
from benchmarks.gpu.kernel_times import COLUMNS
from benchmarks.lib.rows import append_rows

H100 = "NVIDIA H100 80GB HBM3"
GEMM = "void efft_kernels::cuda::low_rank_gemm_sm90_kernel<__nv_bfloat16>(a)"
# cuda:split and cuda:fused of ViT-B's fc2 and torch's floor, which is no strategy.
KERNELS = (
    ("F.linear", "nvjet_sm90_tst_192x192", 78.0),
    ("cuda:split", GEMM, 83.5),
    ("cuda:split", "void a::thin_kernel<PassConfig<16>, false>(b)", 37.5),
    ("cuda:split", "a::fold_kernel(b)", 4.1),
    ("cuda:fused", GEMM, 87.5),
    ("cuda:fused", "a::fold_kernel(b)", 4.1),
)


def kernel_rows(**changes: Any) -> list[dict[str, Any]]:
    sizes = dict(zip("MKNGr", (12608, 3072, 768, 1, 16), strict=True))
    shared = {"model": "ViT-B/16", "layer": "fc2", "weights": "bfloat16", "device": H100} | sizes
    return [
        {**shared, "pass": "train fwd", "impl": impl, "kernel": kernel, "us": us, **changes}
        for impl, kernel, us in KERNELS
    ]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["predictions", *arguments])
        predictions.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("markdown", [[], ["--markdown"]], ids=["table", "markdown"])
def test_every_model_is_predicted(markdown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--device", "H100", "--backend", "triton", *markdown)
    assert all(f"{model}, triton on H100" in out for model in predictions.MODELS)
    assert out.count("geometric mean x floor") == len(predictions.MODELS)


def test_measured_kernels_stand_beside_their_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernel_times.csv"
    append_rows(path, COLUMNS, kernel_rows())
    out = shown(capsys, "--measured", str(path), "--markdown")
    assert f"{H100}: measured / predicted us" in out
    assert "| fc2 | forward | cuda:fused | 92 | 91 |" in out
    assert "thin 38 / 35, gemm 84 / 82" in out
    assert out.splitlines()[-1] == "1 of 1 picks were the fastest"


def test_a_pick_that_was_slower_is_named() -> None:
    rows = [row | {"us": 2 * row["us"]} if "fused" in row["impl"] else row for row in kernel_rows()]
    lines = predictions.agreement(predictions.compared(rows, "H100"))
    assert lines == [
        "0 of 1 picks were the fastest",
        "cuda, fc2 forward: fused is picked, split was 58 us faster",
    ]


def test_an_unknown_gpu_has_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernel_times.csv"
    append_rows(path, COLUMNS, kernel_rows(device="Some GPU"))
    with pytest.raises(SystemExit):
        shown(capsys, "--measured", str(path))
    assert "--device must be given: the cost model knows no Some GPU" in capsys.readouterr().err
    assert "| fc2 |" in shown(capsys, "--measured", str(path), "--device", "H200", "--markdown")

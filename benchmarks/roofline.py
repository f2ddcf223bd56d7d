"""The roofline's two peaks, measured on this device in the same run as the rows below it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .lib.rows import OPERATOR_COLUMNS, Row, provenance

COPY, GEMM = "peak: copy", "peak: GEMM"


@dataclass(frozen=True)
class Peaks:
    """What the device reached: a square GEMM's TFLOP/s, a copy's GB/s (read plus written)."""

    tflops: float
    gbps: float

    def floor_ms(self, flops: float, bytes_moved: float) -> float:
        """The least time for so many operations and bytes."""
        return max(1e-9 * flops / self.tflops, 1e-6 * bytes_moved / self.gbps)

    def attainable_tflops(self, flops_per_byte: float) -> float:
        """The roof above an arithmetic intensity."""
        return min(self.tflops, 1e-3 * flops_per_byte * self.gbps)


def measure_peaks(dtype: torch.dtype, device: str, seconds: float = 2.0) -> Peaks:
    """A copy far larger than the last-level cache's usual share, and a square GEMM on random data.

    The fastest fifth of the repetitions counts: a peak is what the device can do.
    """
    cuda = device == "cuda"
    size = 8192 if cuda else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    source = torch.randint(
        256, ((1 << 30) if cuda else (1 << 29),), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    gemm_ms = _fast_ms(lambda: torch.mm(a, b), seconds / 2, cuda)
    copy_ms = _fast_ms(lambda: target.copy_(source), seconds / 2, cuda)
    return Peaks(2e-9 * size**3 / gemm_ms, 2e-6 * source.numel() / copy_ms)


def _fast_ms(call: Callable[[], object], seconds: float, cuda: bool) -> float:
    def run() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    run()
    sample = [run() for _ in range(5)]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and len(sample) < 200:
        sample.append(run())
    return statistics.quantiles(sample, n=5, method="inclusive")[0]


def peak_rows(peaks: Peaks, dtype: torch.dtype, device: str) -> list[Row]:
    """The peaks as rows of the operators' CSV, so that a roofline can be drawn from it alone."""
    where = provenance(device)
    rows = []
    for op, values in (
        (COPY, {"gbps": f"{peaks.gbps:.1f}"}),
        (GEMM, {"tflops": f"{peaks.tflops:.4f}"}),
    ):
        row: dict[str, Any] = dict.fromkeys(OPERATOR_COLUMNS, "")
        rows.append(
            row
            | {"op": op, "impl": "torch", "dtype": str(dtype).removeprefix("torch.")}
            | values
            | where
        )
    return rows


def peaks_of(rows: list[Row]) -> Peaks | None:
    """The newest pair of peaks among a device's rows."""
    found = {}
    for row in rows:
        if row["op"] in (COPY, GEMM):
            found[row["op"]] = row
    if len(found) < 2:
        return None
    return Peaks(float(found[GEMM]["tflops"]), float(found[COPY]["gbps"]))

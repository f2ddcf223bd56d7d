"""Where a step's time goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.lib import profiles


def test_kernels_are_summed_by_their_short_names() -> None:
    def event(name: str, us: float, kind: DeviceType = DeviceType.CUDA, note: bool = False) -> Any:
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(
            name=name, device_type=kind, is_user_annotation=note, time_range=span
        )

    gemm = "void efft::gemm_kernel<__nv_bfloat16, (bool)1, cfg::Sm90<(int)192, (int)0>>(P)"
    events = [
        event(gemm, 600.0),
        event("_thin_kernel", 1.0),
        event(gemm, 399.0),
        event("Optimizer.step#AdamW.step", 500.0, note=True),
        event("cudaLaunchKernel", 5.0, DeviceType.CPU),
    ]
    totals = profiles.kernel_totals(events, "cuda")
    name = "gemm_kernel<__nv_bfloat16, 1, Sm90<192, 0>>"
    assert totals == {name: (2, 999.0), "_thin_kernel": (1, 1.0)}
    rows = list(profiles.kernel_rows(totals))
    assert [(r["kernel"], r["calls"], r["share"]) for r in rows] == [
        ("all", 3, "1.0000"),
        (name, 2, "0.9990"),
    ]
    assert profiles.short_kernel("(lambda)") == "(lambda)"


def test_operators_of_a_step_on_a_cpu() -> None:
    a = torch.ones(8, 8)
    totals = profiles.profile_step(lambda: (a @ a).exp(), "cpu")
    assert totals["mm"][0] == totals["exp"][0] == 1
    assert all(us > 0 for _, us in totals.values())


def test_medians_of_steps_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that a run does not have took no time in it."""
    ours = iter([{"mm": (2, 5.0)}, {"mm": (2, 7.0), "exp": (1, 8.0)}, {"mm": (2, 6.0)}])
    frozen = iter([{"mm": (1, us)} for us in (1.0, 3.0, 2.0)])

    monkeypatch.setattr(profiles, "profile_step", lambda step, device: next(step))
    steps: Any = {"ours": ours, "frozen": frozen}
    found = profiles.profile_in_turn(steps, "cpu", rounds=3)
    assert found == {"ours": {"mm": (2, 6.0), "exp": (0, 0.0)}, "frozen": {"mm": (1, 2.0)}}
    assert list(found["ours"]) == ["mm", "exp"]

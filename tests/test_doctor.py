"""The doctor's findings."""

from __future__ import annotations

import pytest
import torch

from efft_kernels import doctor


def test_the_torch_backend_is_found_usable() -> None:
    diagnosis = doctor.diagnose()
    assert diagnosis.healthy
    assert diagnosis.backends["torch"] is None
    assert diagnosis.backends["reference"] is None
    assert diagnosis.versions["torch"] == torch.__version__.split("+")[0]
    assert diagnosis.devices[0].startswith("cpu: ")
    assert all(reason for reason in diagnosis.backends.values() if reason is not None)


def test_a_backend_that_fails_or_lies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, backend: str) -> torch.Tensor:
        if backend == "torch":
            raise RuntimeError("no kernel image\nand more")
        return torch.zeros(7, 64, requires_grad=True) * 1.0

    monkeypatch.setattr(doctor, "low_rank_linear", failing)
    diagnosis = doctor.diagnose()
    assert diagnosis.backends["torch"] == "a trial run failed: RuntimeError: no kernel image"
    assert "deviates from the reference by 1.0e+00" in str(diagnosis.backends["reference"])
    assert not diagnosis.healthy
    assert diagnosis.to_json()["backends"]["torch"]["usable"] is False

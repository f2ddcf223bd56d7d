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


def test_the_native_libraries_are_listed_with_what_they_were_built_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = {
        "compiler": "c++ 12.2.0",
        "torch_version": "2.11.0",
        "target_version": "2.11",
        "cuda_version": "13.0.88",
        "cuda_archs": ["8.0", "9.0a"],
        "cutlass_version": "4.2.0",
    }
    monkeypatch.setattr(doctor.native_library, "build_info", lambda: built)
    monkeypatch.setattr(doctor.native_library, "load_cpu", lambda: None)
    monkeypatch.setattr(doctor.native_library, "load_cuda", lambda: "no nvcc was found")
    diagnosis = doctor.diagnose()
    assert diagnosis.versions["_native"] == "loads"
    assert diagnosis.versions["_native_cuda"] == "no nvcc was found"
    assert diagnosis.versions["built with"] == "c++ 12.2.0, torch 2.11.0"
    assert diagnosis.versions["built with nvcc"] == "13.0.88, CUTLASS 4.2.0"
    assert diagnosis.versions["built for GPUs"] == "8.0, 9.0a"
    report = diagnosis.to_json()
    assert report["libraries"]["_native"] == {"usable": True, "reason": None}
    assert report["libraries"]["_native_cuda"] == {"usable": False, "reason": "no nvcc was found"}
    assert report["build"] == built


def test_without_native_libraries_it_is_still_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.native_library, "build_info", lambda: None)
    diagnosis = doctor.diagnose()
    assert diagnosis.healthy
    assert "built with" not in diagnosis.versions
    assert diagnosis.to_json()["build"] is None
    assert set(diagnosis.libraries) == set(doctor.native_library.LIBRARIES)

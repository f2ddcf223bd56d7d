"""The doctor's findings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from efft_kernels import doctor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


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


@pytest.mark.parametrize(
    ("devices", "dtypes", "with_gpu", "expected"),
    [
        (None, FLOATS, False, ("cpu", torch.float32)),
        (None, FLOATS, True, ("cuda", torch.float32)),
        (("cpu",), FLOATS, True, ("cpu", torch.float32)),
        (("cuda",), FLOATS, True, ("cuda", torch.float32)),
        (("cuda",), FLOATS[:2], True, ("cuda", torch.float16)),
        (("cuda",), FLOATS, False, ("cpu", torch.float32)),  # an interpreter of GPU kernels
    ],
    ids=str,
)
def test_a_backend_is_tried_where_and_with_what_it_takes(
    devices: tuple[str, ...] | None,
    dtypes: tuple[torch.dtype, ...],
    with_gpu: bool,
    expected: tuple[str, torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Entry:
        def load(self) -> SimpleNamespace:
            return SimpleNamespace(DTYPES=dtypes)

    entry: Any = Entry()
    entry.devices = devices
    monkeypatch.setattr(doctor, "REGISTRY", {"own": entry})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: with_gpu)
    assert doctor._place_of("own") == expected
    assert doctor._place_of("reference") == ("cuda" if with_gpu else "cpu", torch.float32)


def test_every_backend_takes_the_operands_of_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU as well: none is tried on a device or in a dtype that it rejects."""
    for with_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=with_gpu: found)
        for name, entry in doctor.REGISTRY.items():
            device, dtype = doctor._place_of(name)
            assert dtype in entry.load().DTYPES
            assert entry.devices is None or device in entry.devices or not with_gpu


def test_a_half_precision_backend_is_tried_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def recording(*operands: torch.Tensor, backend: str) -> torch.Tensor:
        seen[backend] = {t.dtype for t in operands}
        return doctor.reference.low_rank_linear(*operands)

    half = SimpleNamespace(DTYPES=FLOATS[:2])
    entry: Any = SimpleNamespace(devices=("cpu",), load=lambda: half)
    monkeypatch.setattr(doctor, "REGISTRY", {"torch": entry})
    monkeypatch.setattr(doctor, "low_rank_linear", recording)
    assert doctor._trial("torch") is None
    assert seen == {"torch": {torch.float16}}


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

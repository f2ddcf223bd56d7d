"""Where the C++ backend runs; its results are in cpp/."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends import cpp_backend, native_library


def test_it_runs_where_its_library_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason in ("not built", None):
        monkeypatch.setattr(native_library, "load_cpu", lambda found=reason: found)
        assert cpp_backend.unavailable() == reason


def test_rejects_names_what_came() -> None:
    x = torch.empty(2, 3)
    assert [cpp_backend.rejects(x.to(dtype)) for dtype in cpp_backend.DTYPES] == [None] * 3
    assert "x is on meta; move it to the CPU" in str(cpp_backend.rejects(x.to("meta")))
    assert "got torch.float16" in str(cpp_backend.rejects(x.half()))

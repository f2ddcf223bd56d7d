"""The ways a call on the CPU reaches its kernels, as a fixture for the tests that hold for all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from efft_kernels import available_backends, use_backend
from efft_kernels.ops.backends import native_library

ROUTES = ("torch", "entry-point", "python")


@pytest.fixture(scope="module", params=ROUTES)
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """`torch`: that backend. `entry-point`: `auto`, from C++ to the C++ kernels. `python`: `auto`
    without the entry point, through the autograd.Function to the C++ kernels.
    """
    if request.param == "torch":
        with use_backend("torch"):
            yield request.param
        return
    missing = native_library.not_built("_native")
    if missing is None and request.param == "entry-point":
        missing = native_library.not_built("_autograd")
    if missing is not None:
        pytest.skip(missing)
    assert native_library.load_cpu() is None
    assert request.param == "python" or native_library.autograd_unavailable() is None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(native_library, "autograd_module", lambda: None)
        yield request.param


@pytest.fixture
def no_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call goes through functional.py and dispatch.py, where a test can watch it."""
    monkeypatch.setattr(native_library, "autograd_module", lambda: None)


@pytest.fixture
def default_backend() -> str:
    """What `auto` takes for float32, float64 and bfloat16 on the CPU."""
    return "cpp" if available_backends()["cpp"] is None else "torch"

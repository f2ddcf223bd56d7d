"""The fake GPU: kernels are compiled for the architecture asked for, and nothing of it stays."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from efft_kernels.ops.backends import triton as backend
from efft_kernels.ops.backends.triton import device
from efft_kernels.testing.fake_gpu import fake_gpu

if device.INTERPRETED:
    pytest.skip("the kernels are interpreted", allow_module_level=True)


def forward() -> None:
    x, weight, down = (
        torch.ones(size, dtype=torch.bfloat16) for size in ((9, 32), (48, 32), (32, 16))
    )
    up = torch.ones(1, 48, 16, dtype=torch.bfloat16)
    backend.forward(x, weight, None, down, None, up, save_p=False, strategy="fused")


def test_a_launch_says_what_was_compiled_and_how_it_was_started():
    for arch in (80, 100):
        with fake_gpu(arch) as gpu:
            gpu.stream = 3
            forward()
            forward()
        first, again = gpu.launches
        assert first.compiled is again.compiled and first.compiled.asm["cubin"]
        assert first.compiled.metadata.target.arch == arch
        assert first.grid == again.grid == (1, 1, 1) and first.stream == 3
        assert None in first.constants.values()  # there is no bias
        assert first.arguments[0].shape == (9, 32)


def test_launches_that_are_not_recorded_do_nothing():
    with fake_gpu(90, record=False) as gpu:
        forward()
    assert gpu.launches == []


def test_the_backend_is_as_before_afterwards():
    before = backend.unavailable()
    with fake_gpu(90):
        assert backend.unavailable() is None
        assert device.multiprocessors(0) == 132
    assert backend.unavailable() == before


def test_an_architecture_must_be_known():
    with pytest.raises(ValueError, match=r"arch must be one of \[80, .* got 70"), fake_gpu(70):
        pass

"""The count of a step's launches, on a model small enough to check it by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from benchmarks import host_overhead, peers, step_launches

pytestmark = pytest.mark.skipif(host_overhead.host_only() is not None, reason="interpreted")
MODEL = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """One transformer block: qkv, proj, fc1 and fc2."""
    make_base = step_launches.make_base

    def first_block_alone(name: str, device: str) -> Any:
        model: Any = make_base(name, device)
        model.blocks = nn.Sequential(model.blocks[0])
        return model

    monkeypatch.setattr(step_launches, "make_base", first_block_alone)


def test_views_and_allocations_are_no_launches() -> None:
    launches = step_launches.Launches()
    with launches:
        a = torch.empty(4, 6).new_empty(4, 6).zero_()
        b = a.t().unsqueeze(0)[:, 1:].detach()
        torch.ops.aten._unsafe_view(a, [24])
        assert launches.count == 1  # zero_
        b + 1
        torch.mm(a, a.t())
    assert launches.count == 3


def test_ours_adds_one_kernel_forward_and_three_backward_to_each_linear() -> None:
    """Beside them, however many linears there are: for qkv with proj, for fc1 and for fc2 one
    product forward; backward two, the gradients put together, summed and placed in the cores'.
    """
    floor = step_launches.count(peers.FLOOR, MODEL, 16, False)
    ours = step_launches.count(step_launches.OURS, MODEL, 16, False)
    assert ours[0] - floor[0] == 4 + 3
    extra = ours[1] - floor[1] - 3 * 4 - 3 * 8
    assert abs(extra) <= 4, extra  # the first block's input needs no gradient here
    unfused = step_launches.count(peers.PEFT_LORA, MODEL, 16, False)
    assert sum(unfused) > sum(ours)


def test_nothing_of_the_pretence_stays() -> None:
    from efft_kernels.ops import cost_model, dispatch

    before = dispatch.available_backends(), cost_model.device_of
    step_launches.count(step_launches.OURS, MODEL, 16, False)
    assert (dispatch.available_backends(), cost_model.device_of) == before

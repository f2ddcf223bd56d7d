"""The steps of a chain in plain torch: the sums that are still to be added up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efft_kernels.ops.backends.chain_steps import Sums, TorchSteps

STEPS = TorchSteps()


def draw(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


@pytest.fixture
def later() -> tuple[Sums, Tensor, Tensor]:
    """(sums of an earlier step, that sum, where it belongs)."""
    found, out = draw(2, 3), torch.empty(2, 3, dtype=torch.float64)
    return [(found, out)], found, out


def test_finished_sums_are_forgotten(later: tuple[Sums, Tensor, Tensor]) -> None:
    sums, found, out = later
    STEPS.finish(sums)
    assert torch.equal(out, found) and not sums


def test_parts_side_by_side(later: tuple[Sums, Tensor, Tensor]) -> None:
    sums, found, out = later
    parts, b, p, d_b = (draw(5, 3), draw(5, 4)), draw(7, 2), draw(5, 2), draw(7, 2)
    for copy in (True, False):
        whole, s = STEPS.gather_grad(parts, b, p, copy, d_b, sums)
        assert (whole is not None) == copy and not sums
        assert whole is None or torch.equal(whole, torch.cat(parts, 1))
        torch.testing.assert_close((s, d_b), (torch.cat(parts, 1) @ b, torch.cat(parts, 1).T @ p))
    assert torch.equal(out, found)


def test_the_gradients_of_gelu(later: tuple[Sums, Tensor, Tensor]) -> None:
    sums, found, out = later
    da, h, s = draw(5, 6), draw(5, 6).requires_grad_(), draw(5, 2)
    b, p, d_b, d_down = draw(6, 3), draw(5, 3), draw(6, 3), draw(6, 2)
    a = torch.nn.functional.gelu(h)
    (dh,) = torch.autograd.grad(a, h, da)
    results = STEPS.gelu_grad(da, h.detach(), s, b, p, d_b, d_down, sums)
    torch.testing.assert_close((*results, d_b, d_down), (dh, dh @ b, dh.T @ p, a.detach().T @ s))
    assert torch.equal(out, found) and not sums

"""What a block needs between its GEMMs beside the norm and the activation, against float64."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends.triton.configs import PassConfig
from efft_kernels.ops.backends.triton.gather import launch_gather
from efft_kernels.ops.backends.triton.merge_stack import launch_merge_stack
from efft_kernels.testing.error_budget import assert_within_budget

M, C, RA = 37, 41, 5
CONFIGS = [PassConfig(16, 16, 2, 4, 1), PassConfig(32, 64, 1, 4, 2)]


def make(*size, dtype, device):
    return torch.randn(*size, device="cpu").to(device, dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("copy", [True, False], ids=["copy", ""])
def test_gather(copy, config, dtype, device):
    """Slices that are columns of a wider matrix, too."""
    torch.manual_seed(0)
    wide = make(M, 3 * C + 2, dtype=dtype, device=device)
    slices = tuple(wide[:, g * C : (g + 1) * C] for g in range(3))
    b, p = (make(rows, RA, dtype=dtype, device=device) for rows in (3 * C, M))
    whole, s, d_b = launch_gather(slices, b, p, copy=copy, config=config)
    dy = torch.cat(slices, 1)
    assert torch.equal(whole, dy) if copy else whole is None
    found = {"s": s.sum(0)[:, :RA], "d_b": d_b.sum(0)[:, :RA]}
    plain = {"s": dy @ b, "d_b": dy.T @ p}
    exact = {"s": dy.double() @ b.double(), "d_b": dy.double().T @ p.double()}
    assert_within_budget(found, plain, exact)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "LayerScale"])
def test_merge_stack(scaled, dtype, device):
    """Two layers of a weight that no tile divides."""
    torch.manual_seed(0)
    weight, b, down = (
        make(2, *s, dtype=dtype, device=device) for s in ((71, C), (71, RA), (C, RA))
    )
    gamma = 1 + make(2, 71, dtype=torch.float32, device=device) / 2 if scaled else None
    found = launch_merge_stack(weight, b, down, gamma)
    if gamma is None:
        gamma = torch.ones(2, 71, device=device)
    plain = torch.baddbmm((weight * gamma[:, :, None]).to(dtype), b, down.mT)
    wide = weight.double() * gamma.double()[:, :, None]
    exact = torch.baddbmm(wide, b.double(), down.double().mT)
    assert found.dtype == dtype
    assert_within_budget({"w": found}, {"w": plain}, {"w": exact})

"""The kernel that makes a LayerNorm's output again from what the norm keeps."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends.triton.remake import launch_remake
from efft_kernels.testing.error_budget import assert_within_budget


@pytest.mark.parametrize("across", [False, True], ids=["", "columns first"])
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "none"])
@pytest.mark.parametrize(("m", "k"), [(37, 41), (8, 256), (1, 300), (19, 515)])
def test_remake(m, k, affine, across, dtype, device):
    """Rows of a wider matrix, of sizes that no tile divides."""
    torch.manual_seed(0)
    wide = torch.randn(m, k + 3).mul_(3).add_(5).to(device, dtype)
    x = wide.t().contiguous().t()[:, 1 : k + 1] if across else wide[:, 1 : k + 1]
    weight = torch.randn(k).to(device, dtype) if affine != "none" else None
    bias = torch.randn(k).to(device, dtype) if affine == "weight and bias" else None
    _, mean, rstd = torch.native_layer_norm(x.float(), (k,), None, None, 1e-5)
    found = launch_remake(x, mean.view(-1), rstd.view(-1), weight, bias)

    def normalised(kind):
        y = (x.to(kind) - mean.to(kind)) * rstd.to(kind)
        y = y if weight is None else y * weight.to(kind)
        return y if bias is None else y + bias.to(kind)

    assert found.dtype == dtype and found.is_contiguous()
    plain = normalised(torch.float32).to(dtype)
    assert_within_budget({"x": found}, {"x": plain}, {"x": normalised(torch.float64)})


def test_rows_of_a_wider_matrix_are_not_copied(device, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    wide, ones = torch.ones(37, 44, device=device), torch.ones(37, device=device)
    x = wide[:, 1:42]
    found = launch_remake(x, 0 * ones, ones, None, None)
    assert torch.equal(found, x)

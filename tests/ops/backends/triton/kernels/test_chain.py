"""What a block needs between its GEMMs beside the norm and the activation, against float64."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends.triton.configs import PassConfig
from efft_kernels.ops.backends.triton.fold import launch_fold
from efft_kernels.ops.backends.triton.gather import launch_gather
from efft_kernels.ops.backends.triton.merge import launch_merge
from efft_kernels.ops.backends.triton.merge_stack import launch_merge_stack
from efft_kernels.ops.backends.triton.pair_grad import launch_pair_grad
from efft_kernels.ops.backends.triton.reduce import launch_reduce
from efft_kernels.ops.backends.triton.tuning import cdiv
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
    assert s.shape == (3 * cdiv(C, config.block_c), M, 16)
    assert d_b.shape == (config.programs, 3 * C, 16)
    found = {"s": s.sum(0)[:, :RA], "d_b": d_b.sum(0)[:, :RA]}
    plain = {"s": dy @ b, "d_b": dy.T @ p}
    exact = {"s": dy.double() @ b.double(), "d_b": dy.double().T @ p.double()}
    assert_within_budget(found, plain, exact)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "LayerScale"])
def test_merge_stack(scaled, dtype, device):
    """Two layers of a weight of several tiles each way, none of them whole but the first."""
    torch.manual_seed(0)
    n, k = 131, 71
    weight, b, down = (make(2, *s, dtype=dtype, device=device) for s in ((n, k), (n, RA), (k, RA)))
    gamma = 1 + make(2, n, dtype=torch.float32, device=device) / 2 if scaled else None
    found = launch_merge_stack(weight, b, down, gamma)
    if gamma is None:
        gamma = torch.ones(2, n, device=device)
    plain = torch.baddbmm((weight * gamma[:, :, None]).to(dtype), b, down.mT)
    wide = weight.double() * gamma.double()[:, :, None]
    exact = torch.baddbmm(wide, b.double(), down.double().mT)
    assert found.dtype == dtype
    assert_within_budget({"w": found}, {"w": plain}, {"w": exact})


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("k", "n"), [(C, 71), (64, 128), (64, C)], ids=str)
def test_pair_grad(k, n, config, dtype, device):
    """More rows than all programs take at once, and columns that blocks divide or do not."""
    torch.manual_seed(0)
    m = 2 * M
    x, dy, down, b = (
        make(*s, dtype=dtype, device=device) for s in ((m, k), (m, n), (k, RA), (n, RA))
    )
    d_down, d_b = launch_pair_grad(x, dy, down, b, config=config)
    assert d_down.shape == (config.programs, k, 16) and d_b.shape == (config.programs, n, 16)

    def products(x, dy, down, b):
        p, s = (x @ down).to(dtype).to(x.dtype), (dy @ b).to(dtype).to(x.dtype)
        return {"d_down": x.T @ s, "d_b": dy.T @ p}

    operands = x, dy, down, b
    found = {"d_down": d_down.sum(0)[:, :RA], "d_b": d_b.sum(0)[:, :RA]}
    assert_within_budget(found, products(*operands), products(*(t.double() for t in operands)))


@pytest.mark.parametrize("cores", [False, True], ids=["", "cores"])
def test_fold(cores, dtype, device):
    """Three slices, each with its own up: whole numbers, and zeros beyond the rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randint(-2, 3, size, generator=generator).to(device, dtype)

    up, core = draw(3, 23, 5), draw(3, 7, 5) if cores else None
    b = up if core is None else torch.einsum("gnb,gab->gna", up, core)
    expected = torch.nn.functional.pad(b.flatten(0, 1), (0, 16 - b.shape[2]))
    assert torch.equal(launch_fold(up, core, dtype), expected)
    folded = draw(3, 23, 16)
    found = launch_fold(folded, None, dtype)
    assert found.shape == (69, 16) and found.data_ptr() == folded.data_ptr()


@pytest.mark.parametrize("cores", [False, True], ids=["", "cores"])
@pytest.mark.parametrize(("n", "k", "ra"), [(37, 41, 19), (64, 80, 16)], ids=str)
def test_merge(n, k, ra, cores, device):
    """Three slices of several tiles each way, of whole numbers, that lie apart."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randint(-2, 3, size, generator=generator).to(device, torch.float16)

    weight, down = draw(3 * n, k + 3)[:, :k], draw(ra, k).t()
    core = draw(3, 5, ra).mT if cores else None
    up = draw(3, n + 2, 5 if cores else ra)[:, :n]
    b = up if core is None else torch.einsum("gnb,gab->gna", up, core)
    found = launch_merge(weight, down, core, up, torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, weight.float() + b.flatten(0, 1).float() @ down.float().t())


@pytest.mark.parametrize(("between", "tiles"), [(0, 4), (16, 4), (3, 8)])
def test_tiles_of_a_merge(between, tiles, device, recorded):
    """Narrow where rows of the weight are not aligned."""
    weight = torch.ones(64, 64 + between, device=device)[:, :64]
    launch_merge(weight, weight[:, :16], None, weight[None, :, :16], torch.float32)
    assert recorded[-1].grid == (tiles, 1, 1)


@pytest.mark.parametrize(
    ("left_out", "few"), [*(("", few) for few in range(6)), ("partial", 2), ("out", 0)]
)
def test_reduce(left_out, few, device, recorded):
    """Up to five sums, of sizes of their own, `few` of them in wider blocks."""
    generator = torch.Generator().manual_seed(0)
    sums = []
    for i, (parts, rows, padded, cols) in enumerate(
        [(1, 11, 16, 5), (70, 11, 16, 16), (5, 7, 32, 17), (67, 11, 16, 1), (3, 5, 64, 33)]
    ):
        partial = torch.randint(-2, 3, (parts, rows, padded), generator=generator)
        dtype = torch.float16 if i % 2 else torch.float32
        out = torch.full((rows, cols), torch.nan, dtype=dtype, device=device)
        sums.append((partial.to(device, torch.float32), out))
    if left_out:
        partial, out = sums[3]
        sums[3] = (None, out) if left_out == "partial" else (partial, None)
    launch_reduce(sums, **({"few": few} if few else {}))
    programs = 0
    for i, (partial, out) in enumerate(sums[:3] + sums[3 + bool(left_out) :]):
        assert torch.equal(out.float(), partial.sum(0)[:, : out.shape[1]])
        programs += cdiv(partial[0].numel(), 128 if i < few else 64)
    assert recorded[-1].grid == (programs, 1, 1)

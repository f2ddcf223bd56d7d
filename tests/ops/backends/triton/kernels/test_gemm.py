"""The GEMM with block shapes of its own: tiles by TMA, persistent programs, their grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efft_kernels.ops.backends.triton.configs import GemmConfig
from efft_kernels.ops.backends.triton.device import INTERPRETED, multiprocessors
from efft_kernels.ops.backends.triton.gemm import launch_gemm
from efft_kernels.ops.backends.triton.tuning import cdiv

BLOCK = (32, 64, 16, 2, 4, 1) if INTERPRETED else (64, 64, 32, 8, 8, 3)
RANK = 16

needs_hopper = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (9, 0),
    reason="needs compute capability 9.0",
)


def assert_exact_product(
    sizes: tuple[int, int, int],
    direction: str,
    compute_p: bool,
    config: GemmConfig,
    slices: int = 0,
) -> None:
    """The GEMM of small integers and its P are exact with the given config.

    Args:
        sizes: (rows, inner, columns).
        direction: "forward" for a weight read transposed.
        compute_p: whether the GEMM computes P itself.
        slices: through as many cores and a shared up; 0 for no core.
    """
    rows, inner, columns = sizes
    device = "cpu" if INTERPRETED else "cuda"
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randint(-1, 2, size, generator=g).to(device, torch.float16)

    a, down = draw(rows, inner), draw(inner, RANK)
    up = draw(1, columns // slices, RANK) if slices else draw(columns, RANK)
    core = draw(slices, RANK, RANK) * (torch.arange(RANK, device=device) < 3) if slices else None
    w = draw(columns, inner).t() if direction == "forward" else draw(inner, columns)
    exact_p = a.double() @ down.double()
    p = torch.empty_like(exact_p, dtype=a.dtype) if compute_p else exact_p.to(a.dtype)
    out = launch_gemm(a, w, None, down if compute_p else None, core, up, p, ra=RANK, config=config)
    b = up.double()
    if core is not None:
        b = torch.einsum("gab,nb->gna", core.double(), b[0]).flatten(0, 1)
    exact = a.double() @ w.double() + exact_p @ b.t()
    assert exact.abs().max() < 2048
    assert torch.equal(p.double(), exact_p)
    assert torch.equal(out.double(), exact)


@needs_hopper
@pytest.mark.parametrize("compute_p", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("columns,slices", [(208, 0), (208, 13), (256, 2)])
@pytest.mark.parametrize("persistent", [False, True])
def test_tiles_by_tma(persistent, columns, slices, direction, compute_p, recorded):
    """Config.tma, which only a measurement turns on, on ragged tiles in every direction; without
    slices, with tiles that slices share, and with tiles within a slice.
    """
    block = BLOCK if INTERPRETED else (64, 128, 64, 8, 4, 3)
    config = GemmConfig(*block, tma=True, persistent=persistent)
    rows = 201 if INTERPRETED else 20_011  # several tiles to a persistent program
    assert_exact_product((rows, 176, columns), direction, compute_p, config, slices)
    if persistent and slices != 13:  # a loop over slices would keep the tiles' loop from fusing
        assert recorded[-1].grid[0] == 3 or not INTERPRETED


@pytest.mark.parametrize("compute_p", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("sizes", [(67, 71, 131), (1, 37, 13), (263, 41, 97)], ids=str)
def test_persistent_programs_by_pointers(sizes, direction, compute_p):
    """Distinct primes: one tile for all programs, a few for each, and fewer tiles than programs."""
    rows, inner, columns = sizes
    rows *= 1 if INTERPRETED else 101
    config = GemmConfig(*BLOCK, persistent=True)
    assert_exact_product((rows, inner, columns), direction, compute_p, config)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_persistent_grid_has_a_program_per_multiprocessor(persistent, recorded):
    config = GemmConfig(*BLOCK, persistent=persistent)
    programs = multiprocessors(None if INTERPRETED else 0)
    for rows in (1, 64 * programs + 1):
        assert_exact_product((rows, 48, 80), "forward", True, config)
        tiles = cdiv(rows, BLOCK[0]) * cdiv(80, BLOCK[1])
        expected = min(tiles, programs) if persistent else tiles
        assert recorded[-1].grid == (expected, 1, 1)
        assert (tiles > programs) == (rows > 1)


def test_no_tma_where_down_starts_off_16_bytes(device):
    x, w, up, storage = (
        torch.ones(size, device=device, dtype=torch.float16)
        for size in ((67, 32), (32, 80), (80, RANK), (32 * RANK + 1,))
    )
    config = GemmConfig(*BLOCK, tma=True)
    for down in (storage[:-1].view(32, RANK), storage[1:].view(32, RANK)):
        out = launch_gemm(x, w, None, down, None, up, None, ra=RANK, config=config)
        assert torch.equal(out, torch.full_like(out, 32 + 32 * RANK))


def test_no_tma_where_x_starts_off_16_bytes(device, recorded):
    config = GemmConfig(*BLOCK, tma=True, persistent=True)
    padded, w, down, up = (
        torch.ones(size, device=device, dtype=torch.float16)
        for size in ((67, 48), (32, 80), (32, RANK), (80, RANK))
    )
    out = launch_gemm(padded[:, 3:35], w, None, down, None, up, None, ra=RANK, config=config)
    assert torch.equal(out, torch.full_like(out, 32 + 32 * RANK))
    assert recorded[-1].grid == (3 * 2, 1, 1) or not INTERPRETED

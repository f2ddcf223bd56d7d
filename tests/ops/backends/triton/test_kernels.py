"""The Triton kernels against the float64 reference: the same cases in the interpreter and on a GPU.

On a CUDA device they run there, bfloat16 included. With TRITON_INTERPRET=1 they run on the CPU in
float32 and float16 (tests/ops/test_triton_interpreter.py runs this file so). Every buffer the
launchers allocate starts as NaN, so a tile that nothing writes cannot pass.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from efft_kernels.ops import cost_model, dispatch, reference, schemas  # noqa: F401
from efft_kernels.ops.functional import low_rank_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

backend = pytest.importorskip("efft_kernels.ops.backends.triton")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

STRATEGIES = backend.STRATEGIES
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
NAMES = ("x", "weight", "bias", "down", "core", "up")
ALL = (True,) * 6


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Every uninitialised floating buffer is NaN."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))


@dataclass(frozen=True)
class Shape:
    """Distinct primes (n = N/G), so that no two axes can be taken for each other."""

    M: int = 67
    K: int = 71
    n: int = 29
    G: int = 3
    Ra: int = 7
    Rb: int = 5
    core: bool = True
    shared: bool = True
    bias: bool = True

    def __str__(self) -> str:
        up = "none" if not self.core else "shared" if self.shared else "each"
        return f"M{self.M}-K{self.K}-n{self.n}-G{self.G}-r{self.Ra}x{self.Rb}-{up}"


SHARED = Shape()
EACH = Shape(M=53, K=83, n=37, Ra=5, Rb=11, shared=False)
NO_CORE = Shape(M=41, K=97, n=23, Ra=3, Rb=3, core=False, shared=False, bias=False)
ONE_SLICE = Shape(M=103, K=37, n=131, G=1, Ra=13, Rb=7)
SHAPES = (SHARED, EACH, NO_CORE, ONE_SLICE)


def operands(shape: Shape, dtype: torch.dtype, *, exact: bool = False, seed: int = 0):
    """(x, weight, bias, down, core, up, dy), values of order one; with `exact`, sparse small
    integers.
    """
    g = torch.Generator().manual_seed(seed)
    s = shape

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        if exact:
            signs = torch.randint(0, 2, size, generator=g) * 2 - 1
            return (signs * (torch.rand(size, generator=g) < 0.25)).to(DEVICE, dtype)
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(DEVICE, dtype)

    return (
        draw(s.M, s.K),
        draw(s.n * s.G, s.K, scale=s.K**-0.5),
        draw(s.n * s.G) if s.bias else None,
        draw(s.K, s.Ra, scale=s.K**-0.5),
        draw(s.G, s.Ra, s.Rb, scale=s.Ra**-0.5) if s.core else None,
        draw(1 if s.core and s.shared else s.G, s.n, s.Rb, scale=s.Rb**-0.5),
        draw(s.M, s.n * s.G),
    )


def by_reference(operands, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and the gradients by the reference and torch's autograd, computed in `dtype`."""
    *tensors, dy = operands
    leaves = [None if t is None else t.to(dtype).detach().requires_grad_() for t in tensors]
    y = reference.low_rank_linear(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(y, present, dy.to(dtype))
    out = {"y": y.detach()}
    out.update(
        zip(
            (n for n, leaf in zip(NAMES, leaves, strict=True) if leaf is not None),
            grads,
            strict=True,
        )
    )
    return out


def by_kernels(operands, strategy: str, needs=ALL) -> dict[str, Tensor]:
    """y, P and the gradients by the Triton backend."""
    *tensors, dy = operands
    x, weight, _, down, core, up = tensors
    y, p = backend.forward(*tensors, save_p=True, strategy=strategy)
    grads = backend.backward(dy, x, weight, p, down, core, up, needs=needs, strategy=strategy)
    out = {"y": y, "p": p}
    for name, tensor, grad, need in zip(NAMES, tensors, grads, needs, strict=True):
        assert (grad is None) == (not need or (name == "core" and tensor is None)) or name == "bias"
        if grad is not None and tensor is not None:
            assert grad.shape == tensor.shape, name
            assert grad.dtype == tensor.dtype, name
            out[name] = grad
    return out


def error(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖ in float64."""
    exact = exact.double()
    norm = exact.norm().clamp_min(1e-300)
    return float((value.double() - exact).norm() / norm)


def assert_within_budget(got, operands) -> None:
    """Each result errs at most twice as much as plain torch in its dtype (or as one rounding)."""
    dtype = operands[0].dtype
    exact = by_reference(operands, torch.float64)
    same_dtype = by_reference([None if t is None else t.to(dtype) for t in operands], dtype)
    for name, value in got.items():
        if name == "p":
            continue
        budget = 2 * max(error(same_dtype[name], exact[name]), torch.finfo(dtype).eps / 2)
        found = error(value, exact[name])
        assert found <= budget, f"{name}: error {found:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_results_within_the_error_budget(shape, dtype, strategy):
    tensors = operands(shape, dtype)
    assert_within_budget(by_kernels(tensors, strategy), tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_operands_give_exact_results(shape, dtype, strategy):
    tensors = operands(shape, dtype, exact=True)
    exact = by_reference(tensors, torch.float64)
    limit = 256 if dtype == torch.bfloat16 else 2048
    for name, value in by_kernels(tensors, strategy).items():
        expected = tensors[0].double() @ tensors[3].double() if name == "p" else exact[name]
        if expected.abs().max() < limit:
            assert torch.equal(value.double(), expected), name
        else:
            assert torch.equal(value, expected.to(dtype)), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", [(1, 1), (4, 2), (16, 16), (33, 17), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank(dtype, ranks, strategy):
    shape = Shape(M=37, K=41, n=23, G=2, Ra=ranks[0], Rb=ranks[1])
    tensors = operands(shape, dtype)
    assert_within_budget(by_kernels(tensors, strategy), tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 131])
def test_every_number_of_rows(rows, strategy):
    shape = Shape(M=rows, K=37, n=13)
    tensors = operands(shape, torch.float32)
    got = by_kernels(tensors, strategy)
    if rows:
        assert_within_budget(got, tensors)
    else:
        assert got["y"].shape == (0, 39) and got["p"].shape == (0, 7)
        assert all(not got[name].any() for name in NAMES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sizes_that_blocks_divide(strategy):
    tensors = operands(Shape(M=64, K=64, n=64, G=2, Ra=16, Rb=16), torch.float16)
    assert_within_budget(by_kernels(tensors, strategy), tensors)


def layouts() -> dict[str, object]:
    """Layouts of a [rows, columns] tensor whose values are the argument's."""

    def padded(t: Tensor) -> Tensor:
        out = t.new_full((t.shape[0], t.shape[1] + 6), float("nan"))
        out[:, 3:-3] = t
        return out[:, 3:-3]

    def every_second_row(t: Tensor) -> Tensor:
        out = t.new_full((2 * t.shape[0], t.shape[1]), float("nan"))
        out[::2] = t
        return out[::2]

    return {
        "transposed": lambda t: t.t().contiguous().t(),
        "padded rows": padded,
        "every second row": every_second_row,
        "expanded": lambda t: t[:1].expand_as(t),
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", layouts())
def test_every_layout(layout, strategy):
    *tensors, dy = operands(Shape(M=37, K=41, n=23), torch.float32)
    change = layouts()[layout]
    x, weight, bias, down, core, up = tensors
    changed = (
        change(x),
        change(weight),
        bias,
        change(down),
        core.mT.contiguous().mT,
        change(up[0])[None],
        change(dy),
    )
    contiguous = [t.contiguous() for t in changed]
    got, expected = by_kernels(changed, strategy), by_kernels(contiguous, strategy)
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("needed", ["x", "weight bias", "down", "x down", "down up", "core"])
def test_only_what_is_needed(needed, strategy):
    tensors = operands(Shape(M=37, K=41, n=23), torch.float32)
    needs = tuple(name in needed.split() for name in NAMES)
    got = by_kernels(tensors, strategy, needs)
    assert_within_budget(got, tensors)
    assert set(got) - {"y", "p"} == set(needed.split())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float32_weight_and_factors_beside_half_precision_rows(strategy):
    """As under autocast: y is as good as from operands cast beforehand, and factor gradients are
    float32.
    """
    *tensors, dy = operands(SHARED, torch.float32)
    x, weight, bias, down, core, up = tensors
    mixed = (x.half(), weight, bias, down, core, up, dy.half())
    got = by_kernels(mixed, strategy)
    assert got["y"].dtype == got["p"].dtype == got["x"].dtype == torch.float16
    exact = by_reference(mixed, torch.float64)
    plain = by_reference([t.half() for t in mixed], torch.float16)
    for name in (*NAMES, "y"):
        assert error(got[name], exact[name]) <= 2 * error(plain[name], exact[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_bits_every_time(strategy):
    tensors = operands(ONE_SLICE, torch.float16)
    first, second = by_kernels(tensors, strategy), by_kernels(tensors, strategy)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("save_p", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_infinity_stays_an_infinity_in_its_row(strategy, save_p):
    """The rank's padding, infinity times zero, must not make it a NaN."""
    *tensors, _ = (t.abs() for t in operands(Shape(M=37, K=41, n=23), torch.float32))
    tensors[0][5, 3] = float("inf")
    y, _ = backend.forward(*tensors, save_p=save_p, strategy=strategy)
    assert torch.equal(y.isinf(), reference.low_rank_linear(*tensors).isinf())
    assert not y.isnan().any() and y[5].isinf().all()


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_through_the_public_operator(strategy):
    *tensors, _ = operands(SHARED, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    leaves[0] = leaves[0].detach().reshape(1, 67, 71).requires_grad_()
    y = low_rank_linear(*leaves, backend="triton", strategy=strategy)
    y.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = reference.low_rank_linear(*exact)
    expected.sum().backward()
    assert error(y.detach(), expected.detach()) < 1e-6
    for name, leaf, double in zip(NAMES, leaves, exact, strict=True):
        assert error(leaf.grad, double.grad) < 2e-6, name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("ranks", [(5, 40), (3, 131)], ids=str)
def test_rb_has_no_limit(ranks, dtype, recorded):
    """Above 32 core and up are folded, and Rb is gone."""
    tensors = operands(Shape(M=37, K=41, n=23, G=2, Ra=ranks[0], Rb=ranks[1]), dtype)
    assert_within_budget(by_kernels(tensors, "fused"), tensors)
    assert [launch.name for launch in recorded][:3] == ["fold", "fold", "gemm"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", [(5, 3), (40, 3)], ids=str)
def test_float64_factors_beside_half_precision_rows(ranks, strategy):
    """Under autocast the factors may have any floating dtype."""
    *tensors, dy = operands(Shape(M=37, K=41, n=23, Ra=ranks[0], Rb=ranks[1]), torch.float64)
    x, weight, bias, down, core, up = tensors
    mixed = (x.half(), weight.float(), bias.float(), down, core, up, dy.half())
    got = by_kernels(mixed, strategy)
    exact = by_reference(mixed, torch.float64)
    plain = by_reference([t.half() for t in mixed], torch.float16)
    for name in ("x", "down", "core", "up", "y"):
        assert error(got[name], exact[name]) <= 2 * error(plain[name], exact[name]), name


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("of", ["core", "up", "dy"])
def test_gradients_of_any_magnitude_in_float16(of, scale):
    """P·core and dY·up may leave float16's range although no gradient does."""
    tensors = list(operands(SHARED, torch.float32))
    position = {"core": 4, "up": 5, "dy": 6}[of]
    tensors[position] *= min(scale, 10.0) if of == "dy" else scale  # dY itself has to fit
    tensors[0], tensors[6] = tensors[0].half(), tensors[6].half()
    x, weight, bias, down, core, up, dy = tensors
    _, p = backend.forward(x, weight, bias, down, core, up, save_p=True, strategy="split")
    needs = (False, False, False, False, True, True)
    *_, d_core, d_up = backend.backward(
        dy, x, weight, p, down, core, up, needs=needs, strategy="split"
    )
    exact = by_reference(tensors, torch.float64)
    plain = by_reference([t.half() for t in tensors], torch.float16)
    for name, value in (("core", d_core), ("up", d_up)):
        torch_error = error(plain[name], exact[name])
        budget = 2 * max(torch.finfo(torch.float16).eps, torch_error if of == "up" else 0.0)
        assert error(value, exact[name]) < budget, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("core", [True, False])
def test_a_program_adds_to_its_own_partial_sums(core, dtype):
    """Two programs over many row blocks each, which the default grid of a large GPU makes only of
    tens of thousands of rows.
    """
    from efft_kernels.ops.backends.triton.thin import launch_reduce, launch_thin
    from efft_kernels.ops.backends.triton.tuning import PassConfig

    s = Shape(M=331, K=17, n=41, G=3 if core else 1, Ra=7, Rb=5 if core else 7, core=core)
    *_, up_core, up, dy = operands(replace(s, shared=core), dtype, exact=True)
    p = operands(s, dtype, exact=True, seed=1)[0][:, : s.Ra].contiguous()
    config = PassConfig(32, 16 if INTERPRETED else 32, 2, 4, 3)
    found = dy.new_empty((s.M, s.Ra))
    partial_up, partial_core = launch_thin(dy, up, up_core, found, p, config)
    d_up, d_core = (
        up.new_empty(up.shape),
        None if up_core is None else up_core.new_empty(up_core.shape),
    )
    launch_reduce(((partial_up, d_up), (partial_core, d_core), (None, None)))
    slices = dy.double().unflatten(1, (s.G, s.n))  # [M, G, n]
    wide = up.double().expand(s.G, -1, -1)
    q = torch.einsum("mgn,gnb->mgb", slices, wide)
    cores = torch.eye(7, dtype=torch.float64, device=DEVICE)[None] if up_core is None else up_core
    cores = cores.double()
    assert torch.equal(found.double(), torch.einsum("mgb,gab->ma", q, cores))
    t = torch.einsum("ma,gab->mgb", p.double(), cores)
    expected = torch.einsum("mgn,mgb->gnb", slices, t)
    assert torch.equal(d_up.double(), expected.sum(0, keepdim=True))
    if d_core is not None:
        assert torch.equal(d_core.double(), torch.einsum("ma,mgb->gab", p.double(), q))


def test_a_rank_beyond_the_kernels_runs_in_torch(caplog):
    sys.modules["efft_kernels.ops.backends.triton.forward"]._note_rank.cache_clear()
    tensors = operands(Shape(M=37, K=41, n=23, Ra=131, Rb=5), torch.float32)
    with caplog.at_level("WARNING"):
        assert_within_budget(by_kernels(tensors, "fused"), tensors)
    assert "rank 131 is above 128" in caplog.text


needs_hopper = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (9, 0),
    reason="needs compute capability 9.0",
)


def exact_product(
    M: int, inner: int, C: int, direction: str, ride: bool, config, rank: int = 16, slices: int = 0
):
    """(out, P, expected out, expected P) of the GEMM on small integers, with the given config; with
    `slices`, through as many cores and a shared up.
    """
    from efft_kernels.ops.backends.triton.gemm import launch_gemm

    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randint(-1, 2, size, generator=g).to(DEVICE, torch.float16)

    a, thin_in = draw(M, inner), draw(inner, rank)
    thin_out = draw(1, C // slices, rank) if slices else draw(C, rank)
    core = draw(slices, rank, rank) * (torch.arange(rank, device=DEVICE) < 3) if slices else None
    w = draw(C, inner).t() if direction == "forward" else draw(inner, C)
    expected_p = a.double() @ thin_in.double()
    p = torch.empty_like(expected_p, dtype=a.dtype) if ride else expected_p.to(a.dtype)
    riding = thin_in if ride else None
    out = launch_gemm(a, w, None, riding, core, thin_out, p, width=rank, config=config)
    b = thin_out.double()
    if core is not None:
        b = torch.einsum("gab,nb->gna", core.double(), b[0]).flatten(0, 1)
    exact = a.double() @ w.double() + expected_p @ b.t()
    assert exact.abs().max() < 2048
    return out, p, exact, expected_p


@needs_hopper
@pytest.mark.parametrize("ride", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("columns,slices", [(208, 0), (208, 13), (256, 2)])
@pytest.mark.parametrize("persistent", [False, True])
def test_tiles_through_the_copy_engine(persistent, columns, slices, direction, ride, recorded):
    """Config.tma, which only a measurement turns on, on ragged tiles in every direction; without
    slices, with tiles that slices share, and with tiles within a slice.
    """
    from efft_kernels.ops.backends.triton.tuning import GemmConfig

    block = (32, 64, 16, 2, 4, 1) if INTERPRETED else (64, 128, 64, 8, 4, 3)
    config = GemmConfig(*block, tma=True, persistent=persistent)
    rows = 201 if INTERPRETED else 20_011  # several tiles to a persistent program
    out, p, exact, expected_p = exact_product(
        rows, 176, columns, direction, ride, config, 16, slices
    )
    if persistent and slices != 13:  # a loop over slices would keep the tiles' loop from fusing
        assert recorded[-1].grid[0] == 3 or not INTERPRETED
    assert torch.equal(p.double(), expected_p)
    assert torch.equal(out.double(), exact)


@pytest.mark.parametrize("ride", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("sizes", [(67, 71, 131), (1, 37, 13), (263, 41, 97)], ids=str)
def test_persistent_programs_by_pointers(sizes, direction, ride):
    """Distinct primes: one tile for all programs, a few for each, and fewer tiles than programs."""
    from efft_kernels.ops.backends.triton.tuning import GemmConfig

    block = (32, 64, 16, 2, 4, 1) if INTERPRETED else (64, 64, 32, 8, 8, 3)
    rows = sizes[0] if INTERPRETED else 101 * sizes[0]
    config = GemmConfig(*block, persistent=True)
    out, p, exact, expected_p = exact_product(rows, *sizes[1:], direction, ride, config)
    assert torch.equal(p.double(), expected_p)
    assert torch.equal(out.double(), exact)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_persistent_grid_has_a_program_per_multiprocessor(persistent, recorded):
    from efft_kernels.ops.backends.triton import device, tuning

    block = (32, 64, 16, 2, 4, 1) if INTERPRETED else (64, 64, 32, 8, 8, 3)
    config = tuning.GemmConfig(*block, persistent=persistent)
    multiprocessors = device.multiprocessors(None if INTERPRETED else 0)
    for rows in (1, 64 * multiprocessors + 1):
        exact_product(rows, 48, 80, "forward", True, config)
        tiles = tuning.cdiv(rows, block[0]) * tuning.cdiv(80, block[1])
        expected = min(tiles, multiprocessors) if persistent else tiles
        assert recorded[-1].grid == (expected, 1, 1)
        assert (tiles > multiprocessors) == (rows > 1)


def test_the_copy_engine_is_left_out_where_down_starts_off_16_bytes():
    from efft_kernels.ops.backends.triton.gemm import launch_gemm
    from efft_kernels.ops.backends.triton.tuning import GemmConfig

    block = (32, 64, 16, 2, 4, 1) if INTERPRETED else (64, 64, 32, 8, 8, 3)
    x, w, up, storage = (
        torch.ones(size, device=DEVICE, dtype=torch.float16)
        for size in ((67, 32), (32, 80), (80, 16), (32 * 16 + 1,))
    )
    for down in (storage[:-1].view(32, 16), storage[1:].view(32, 16)):
        out = launch_gemm(
            x, w, None, down, None, up, None, width=16, config=GemmConfig(*block, tma=True)
        )
        assert torch.equal(out, torch.full_like(out, 32 + 32 * 16))


def test_the_copy_engine_is_left_out_where_a_slice_starts_off_16_bytes(recorded):
    from efft_kernels.ops.backends.triton.gemm import launch_gemm
    from efft_kernels.ops.backends.triton.tuning import GemmConfig

    block = (32, 64, 16, 2, 4, 1) if INTERPRETED else (64, 64, 32, 8, 8, 3)
    config = GemmConfig(*block, tma=True, persistent=True)
    padded = torch.ones(67, 48, device=DEVICE, dtype=torch.float16)
    w = torch.ones(48, 80, device=DEVICE, dtype=torch.float16)
    thin_in, thin_out = (torch.ones(c, 16, device=DEVICE, dtype=torch.float16) for c in (32, 80))
    out = launch_gemm(
        padded[:, 3:35], w[:32], None, thin_in, None, thin_out, None, width=16, config=config
    )
    assert torch.equal(out, torch.full_like(out, 32 + 32 * 16))
    assert recorded[-1].grid == (3 * 2, 1, 1) or not INTERPRETED


def test_a_bias_of_any_stride():
    *tensors, dy = operands(Shape(M=37, K=41, n=23), torch.float32)
    bias = tensors[2]
    tensors[2] = torch.stack((bias, torch.full_like(bias, float("nan"))), 1)[:, 0]
    for strategy in STRATEGIES:
        assert_within_budget(by_kernels([*tensors, dy], strategy), [*tensors, dy])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_sizes_at_any_address(strategy):
    """Slices that start on 16 bytes and off them, in turn: sizes and strides are the same."""
    *tensors, dy = operands(Shape(M=48, K=64, n=32, Ra=16, Rb=16), torch.float16)
    expected = by_kernels([*tensors, dy], strategy)
    for offset in (1, 0, 8, 1):
        moved = []
        for t in (*tensors, dy):
            storage = t.new_full((t.numel() + offset,), float("nan"))
            storage[offset:] = t.flatten()
            moved.append(storage[offset:].view(t.shape))
        for name, value in by_kernels(moved, strategy).items():
            assert torch.equal(value, expected[name]), (name, offset)


def test_what_a_call_remembers_is_its_own():
    """The same sizes with other strides, dtypes, factors and needs, in turn, twice."""
    from efft_kernels.ops.backends.triton import launch_cache as launch

    launch.forget()
    shape = Shape(M=37, K=41, n=23, Ra=16, Rb=16)
    plain = operands(shape, torch.float32)
    strided = [t if t is None or t.dim() != 2 else t.t().contiguous().t() for t in plain]
    half = operands(shape, torch.float16)
    no_bias = [None if name == "bias" else t for name, t in zip((*NAMES, "dy"), plain, strict=True)]
    for _ in range(2):
        for tensors in (plain, strided, half, no_bias):
            for strategy in STRATEGIES:
                assert_within_budget(by_kernels(tensors, strategy), tensors)
    found = len(launch._plans)
    by_kernels(plain, "fused")
    # Forward and backward of each, but the backward does not see the bias.
    assert len(launch._plans) == found == (2 * 4 - 1) * len(STRATEGIES)


@dataclass(frozen=True)
class Recorded:
    name: str
    moved: int  # bytes of its tensor operands, each once
    grid: tuple[int, int, int]


@pytest.fixture
def recorded(monkeypatch, request) -> list[Recorded]:
    """The launches made; with the parameter False they are only noted."""
    from efft_kernels.ops.backends.triton import launch_cache as launch
    from tools import compile_triton

    names = {id(kernel): name for name, kernel in compile_triton.KERNELS.items()}
    launches: list[Recorded] = []
    start = launch.Plan.__call__

    def record(plan, tensors, *rest, **options):
        found = {t.data_ptr(): t for t in tensors if t is not None}
        moved = sum(t.numel() * t.element_size() for t in found.values())
        name = names[id(plan.kernel)]
        grad = name == "thin" and tensors[4] is not None
        launches.append(Recorded(f"{name}_grad" if grad else name, moved, plan.grid))
        if getattr(request, "param", True):
            start(plan, tensors, *rest, **options)

    monkeypatch.setattr(launch.Plan, "__call__", record)
    return launches


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_launches_and_bytes_are_the_plans(strategy, recorded):
    """What runs is what cost_model.plan says: no launch more, no pass over x or dY more, no byte
    more.
    """
    from efft_kernels.ops.backends.triton import tuning

    s = Shape(M=160, K=64, n=48, G=2, Ra=16, Rb=16, shared=False)
    *tensors, dy = operands(s, torch.float32)
    x, weight, _, down, core, up = tensors
    problem = cost_model.Problem.of(x, weight, down, core, up, training=True)
    device = cost_model.DEVICES["H200"]
    aligned = {"aligned": True, "index": None}
    thin_grad = tuning.pass_config("thin_grad", s.M, 96, 16, x.dtype, **aligned)
    by_x = tuning.pass_config("tall_grad", s.M, 64, 16, x.dtype, **aligned)
    rows = tuning.cdiv(tuning.cdiv(s.M, by_x.programs), by_x.block_m) * by_x.block_m
    tiling = cost_model.Tiling(
        min(-(-s.M // thin_grad.block_m), thin_grad.programs), tuning.cdiv(s.M, rows)
    )

    def planned(backward):
        launches = cost_model.plan(problem._replace(backward=backward), strategy, device, tiling)
        return [(name, moved) for name, _, moved, _ in launches if name != "library gemm"]

    def made():
        return [(launch.name, launch.moved) for launch in recorded]

    _, p = backend.forward(*tensors, save_p=True, strategy=strategy)
    assert made() == planned(backward=False)
    recorded.clear()
    needs = (True, False, False, True, True, True)
    backend.backward(dy, x, weight, p, down, core, up, needs=needs, strategy=strategy)
    assert made() == planned(backward=True)


@pytest.mark.parametrize("recorded", [False], indirect=True)
@pytest.mark.parametrize("factors", ["folded", "core", "float32"])
@pytest.mark.parametrize("ranks", [(16, 16), (7, 5), (32, 16), (33, 5)], ids=str)
def test_how_many_launches_a_call_takes(ranks, factors, recorded):
    """One to two forward and four backward, whatever the form of the factors; copies and folds only
    where factors.py says.
    """
    s = Shape(M=37, K=48, n=32, Ra=ranks[0], Rb=ranks[1], core=factors != "folded")
    if not s.core:
        s = replace(s, Rb=s.Ra, shared=False)
    *tensors, dy = operands(s, torch.float16)
    if factors == "float32":
        tensors[3:] = [t.float() for t in tensors[3:]]
    x, weight, _, down, core, up = tensors

    def launches(strategy, needs=None):
        recorded.clear()
        if needs is None:
            backend.forward(*tensors, save_p=True, strategy=strategy)
        else:
            p = torch.zeros(s.M, s.Ra, device=DEVICE, dtype=dy.dtype)
            backend.backward(dy, x, weight, p, down, core, up, needs=needs, strategy=strategy)
        return [launch.name for launch in recorded]

    high = max(ranks) > 32
    copied = ["fold"] if high or s.Ra not in (16, 32) or factors == "float32" else []
    folds = ["fold", "fold"] if high else []
    assert launches("fused") == [*(folds or copied), "gemm"]
    assert launches("split") == [*folds[:1], "thin", *folds[1:], "gemm"]
    for strategy in ("fused", "split"):
        steps = [*folds[:1], "thin_grad", *folds[1:], "gemm", "tall_grad", "reduce"]
        assert launches(strategy, (True, False, False, True, True, True)) == steps
    steps = [*folds[:1], "thin_grad", "merge", "tall_grad", "reduce"]
    assert launches("merged", (True, False, False, True, True, True)) == steps
    # Without a pass over dY for d_up, S rides in the GEMM.
    assert launches("fused", (True, False, False, False, False, False))[-1] == "gemm"
    assert "thin" not in launches("fused", (True, False, False, True, False, False))


SLICES = (
    Shape(M=67, K=31, n=5, G=13, Ra=7, Rb=5),  # several slices to a tile
    Shape(M=67, K=31, n=1, G=11, Ra=3, Rb=2, shared=False),
    Shape(M=67, K=31, n=97, G=2, Ra=16, Rb=16),  # tiles that two slices share
    Shape(M=67, K=31, n=64, G=2, Ra=16, Rb=16),  # none
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SLICES, ids=str)
def test_slices_of_any_size(shape, strategy):
    for dtype in DTYPES[1:]:
        tensors = operands(shape, dtype, exact=True)
        exact = by_reference(tensors, torch.float64)
        for name, value in by_kernels(tensors, strategy).items():
            if name != "p":
                assert torch.equal(value, exact[name].to(dtype)), (name, dtype)


needs_cuda = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("strategy", ["fused", "split"])
def test_a_training_step_in_a_cuda_graph(strategy):
    *tensors, dy = operands(Shape(M=256, K=128, n=64, Ra=16, Rb=16), torch.bfloat16)
    leaves = [
        t.clone().requires_grad_(name != "weight") for name, t in zip(NAMES, tensors, strict=True)
    ]

    def step():
        y = low_rank_linear(*leaves, backend="triton", strategy=strategy)
        return torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)
    # A replay reads what the tensors hold now, wherever calls in between found theirs.
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    expected = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


@needs_cuda
def test_a_compiled_training_step_has_no_graph_break():
    *tensors, dy = operands(Shape(M=256, K=128, n=64, Ra=16, Rb=16), torch.bfloat16)
    leaves = [
        t.clone().requires_grad_(name != "weight") for name, t in zip(NAMES, tensors, strict=True)
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def loss(x, *rest):
        return (low_rank_linear(x, *rest, backend="triton") * dy).float().sum()

    eager = torch.autograd.grad(loss(*leaves), wanted)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), wanted)
    for got, want in zip(compiled, eager, strict=True):
        assert error(got, want) < 1e-2


@needs_cuda
def test_offsets_beyond_32_bits():
    M, N, K = 70_001, 32_768, 32
    x = torch.randint(-1, 2, (M, K), device="cuda", dtype=torch.bfloat16)
    weight = torch.randint(-1, 2, (N, K), device="cuda", dtype=torch.bfloat16)
    down = torch.randint(-1, 2, (K, 16), device="cuda", dtype=torch.bfloat16)
    up = torch.randint(-1, 2, (1, N, 16), device="cuda", dtype=torch.bfloat16)
    for strategy in ("fused", "split"):
        y, _ = backend.forward(x, weight, None, down, None, up, save_p=False, strategy=strategy)
        tail = [t.double() for t in (x[-3:], weight, down, up)]
        expected = reference.low_rank_linear(tail[0], tail[1], None, tail[2], None, tail[3])
        assert torch.equal(y[-3:], expected.to(y.dtype))
        del y


@needs_cuda
def test_no_synchronisation():
    tensors = operands(SHARED, torch.bfloat16)
    by_kernels(tensors, "fused")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for strategy in STRATEGIES:
            *inputs, dy = tensors
            _, p = backend.forward(*inputs, save_p=True, strategy=strategy)
            x, weight, _, down, core, up = inputs
            backend.backward(dy, x, weight, p, down, core, up, needs=ALL, strategy=strategy)
    finally:
        torch.cuda.set_sync_debug_mode("default")

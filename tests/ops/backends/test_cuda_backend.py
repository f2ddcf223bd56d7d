"""The CUDA C++ backend against the float64 reference, on a GPU; its refusals everywhere.

Shapes reach both GEMMs: few or unaligned rows go to the general kernel, and on Hopper the shapes of
`BIG` have enough aligned tiles for the sm_90a one. Every buffer that is allocated starts as NaN, so
a tile that nothing writes cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from efft_kernels.ops import reference
from efft_kernels.ops.backends import cuda_backend as backend
from efft_kernels.ops.backends import native_library
from efft_kernels.ops.cost_model import Problem
from efft_kernels.ops.functional import low_rank_linear

UNAVAILABLE = "no CUDA device" if not torch.cuda.is_available() else backend.unavailable()
STRATEGIES = backend.STRATEGIES
DTYPES = [torch.float16, torch.bfloat16]
NAMES = ("x", "weight", "bias", "down", "core", "up")
ALL = (True,) * 6


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
    return pytest.mark.gpu(skip(test))


def test_rejects_names_what_came():
    assert "float32" in str(backend.rejects(torch.zeros(2, 3)))
    assert "float64" in str(backend.rejects(torch.zeros(2, 3, dtype=torch.float64)))
    assert "cpu" in str(backend.rejects(torch.zeros(2, 3, dtype=torch.bfloat16)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_unavailable_has_a_reason():
    assert backend.unavailable()


@pytest.mark.skipif(native_library.not_built("_native_cuda") is not None, reason="it was not built")
def test_the_library_loads_and_registers_without_a_gpu():
    assert native_library.load_cuda() is None
    for operator in ("native_fwd", "native_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"efft_kernels::{operator}", "CUDA")


def test_out_of_reach(caplog):
    problem = Problem(5, 7, 6, 1, 128, True, 4, 2, "cuda")
    assert not backend.out_of_reach(problem)
    assert backend.out_of_reach(problem._replace(N=0))
    assert backend.out_of_reach(problem._replace(K=0))
    backend._note_rank.cache_clear()
    assert backend.out_of_reach(problem._replace(rank=131))
    assert "rank 131 is above 128" in caplog.text


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["no rows", "rank", "float64 weight"])
def test_what_is_out_of_reach_runs_in_torch(case, strategy):
    """On any device: the kernels are not asked."""
    rows, rank = (0 if case == "no rows" else 5), (131 if case == "rank" else 4)
    wide = torch.float64 if case == "float64 weight" else torch.float32
    x = torch.randn(rows, 7).bfloat16()
    weight, down = torch.randn(6, 7, dtype=wide), torch.randn(7, rank)
    core, up = torch.randn(2, rank, 3), torch.randn(1, 3, 3)
    y, p = backend.forward(x, weight, None, down, core, up, save_p=True, strategy=strategy)
    assert y.shape == (rows, 6) and p is not None and p.shape == (rows, rank)
    dy = torch.randn(rows, 6).bfloat16()
    grads = backend.backward(dy, x, weight, p, down, core, up, needs=ALL, strategy=strategy)
    tensors = (x, weight, None, down, core, up)
    for name, grad, tensor in zip(NAMES, grads, tensors, strict=True):
        assert grad is not None, name
        assert tensor is None or (grad.shape == tensor.shape and grad.dtype == tensor.dtype), name


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
SMALL = (SHARED, EACH, NO_CORE, ONE_SLICE)
# Multiples of 8 with ragged tiles: the widths choose column blocks of 192 and of 128.
WIDE = Shape(M=12 * 128 + 37, K=8 * 103, n=8 * 97, Ra=16, Rb=8)
NARROW = Shape(M=33 * 128 + 5, K=8 * 37, n=8 * 31, G=1, Ra=13, Rb=13, core=False, shared=False)
RANK_32 = Shape(M=2 * 1031, K=8 * 67, n=8 * 53, G=2, Ra=29, Rb=16, shared=False)
RANK_128 = Shape(M=2 * 1031, K=8 * 67, n=8 * 107, G=1, Ra=128, Rb=128)
BIG = (WIDE, NARROW, RANK_32, RANK_128)


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every uninitialised floating buffer is NaN, the C++ operators' own included."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def operands(shape: Shape, dtype: torch.dtype, *, exact: bool = False, seed: int = 0):
    """(x, weight, bias, down, core, up, dy), values of order one; with `exact`, sparse small
    integers.
    """
    g = torch.Generator().manual_seed(seed)
    s = shape

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        if exact:
            signs = torch.randint(0, 2, size, generator=g) * 2 - 1
            return (signs * (torch.rand(size, generator=g) < 0.1)).to("cuda", dtype)
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to("cuda", dtype)

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
    named = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    grads = torch.autograd.grad(y, list(named.values()), dy.to(dtype))
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}


def by_kernels(operands, strategy: str, needs=ALL) -> dict[str, Tensor]:
    """y, P and the gradients by the CUDA backend."""
    *tensors, dy = operands
    x, weight, _, down, core, up = tensors
    y, p = backend.forward(*tensors, save_p=True, strategy=strategy)
    assert p is not None and p.is_contiguous()
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


def assert_within_budget(got: dict[str, Tensor], operands) -> None:
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


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL + BIG, ids=str)
def test_all_results_within_the_error_budget(shape, dtype, strategy):
    tensors = operands(shape, dtype)
    assert_within_budget(by_kernels(tensors, strategy), tensors)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL + BIG, ids=str)
def test_exact_operands_give_exact_results(shape, dtype, strategy):
    """Sparse small integers: where sums stay exact in the dtype, equality is bitwise."""
    tensors = operands(shape, dtype, exact=True)
    exact = by_reference(tensors, torch.float64)
    exact["p"] = tensors[0].double() @ tensors[3].double()
    limit = 256 if dtype == torch.bfloat16 else 2048
    for name, value in by_kernels(tensors, strategy).items():
        # P and S are rounded to the dtype on the way, and merging rounds W + ΔW.
        if exact["p"].abs().max() < limit and exact[name].abs().max() < limit:
            assert torch.equal(value.double(), exact[name]), name


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rank", [1, 2, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128])
@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
def test_every_rank(rank, aligned, strategy):
    shape = Shape(M=37, K=41, n=23, G=2, Ra=rank, Rb=3)
    if aligned:
        shape = replace(shape, M=9 * 128 + 5, K=8 * 41, n=8 * 67)
    tensors = operands(shape, torch.bfloat16)
    assert_within_budget(by_kernels(tensors, strategy), tensors)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [0, 1, 31, 63, 64, 65, 127, 128, 129, 1151, 1152, 1153])
def test_every_number_of_rows(rows, strategy):
    tensors = operands(Shape(M=rows, K=264, n=8 * 103, G=2, Ra=11), torch.float16)
    got = by_kernels(tensors, strategy)
    if rows:
        assert_within_budget(got, tensors)
    else:
        assert got["y"].shape == (0, 2 * 824) and got["p"].shape == (0, 11)
        assert all(not got[name].any() for name in NAMES)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shift", [-1, 0, 1])
@pytest.mark.parametrize("tile", [64, 128, 192])
def test_tile_borders(tile, shift, strategy):
    """A last column and a last inner tile of 8 elements, whole, and 8 short of whole."""
    shape = Shape(M=16 * 128 - 1, K=tile * 3 + 8 * shift, n=tile * 5 + 8 * shift, G=1, Ra=16)
    tensors = operands(shape, torch.bfloat16)
    assert_within_budget(by_kernels(tensors, strategy), tensors)


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    """Layouts of a [rows, columns] tensor whose values are the argument's."""

    def padded(t: Tensor, before: int) -> Tensor:
        out = t.new_full((t.shape[0], t.shape[1] + 16), float("nan"))
        out[:, before : before + t.shape[1]] = t
        return out[:, before : before + t.shape[1]]

    def every_second_row(t: Tensor) -> Tensor:
        out = t.new_full((2 * t.shape[0], t.shape[1]), float("nan"))
        out[::2] = t
        return out[::2]

    return {
        "transposed": lambda t: t.t().contiguous().t(),
        "aligned padded rows": lambda t: padded(t, 8),
        "misaligned padded rows": lambda t: padded(t, 3),
        "every second row": every_second_row,
        "expanded": lambda t: t[:1].expand_as(t),
    }


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("shape", [Shape(M=37, K=41, n=23), WIDE], ids=str)
def test_every_layout(shape, layout, strategy):
    *tensors, dy = operands(shape, torch.float16)
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
    assert_within_budget(by_kernels(changed, strategy), changed)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("needed", ["x", "weight bias", "down", "x down", "down up", "core"])
@pytest.mark.parametrize("shape", [Shape(M=37, K=41, n=23), WIDE], ids=str)
def test_only_what_is_needed(shape, needed, strategy):
    tensors = operands(shape, torch.bfloat16)
    needs = tuple(name in needed.split() for name in NAMES)
    got = by_kernels(tensors, strategy, needs)
    assert_within_budget(got, tensors)
    assert set(got) - {"y", "p"} == set(needed.split())


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [SHARED, WIDE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_weight_and_factors_beside_half_precision_rows(shape, dtype, strategy):
    """As under autocast: y is as good as from operands cast beforehand, and factor gradients are
    float32.
    """
    *tensors, dy = operands(shape, torch.float32)
    x, weight, bias, down, core, up = tensors
    mixed = (x.to(dtype), weight, bias, down, core, up, dy.to(dtype))
    got = by_kernels(mixed, strategy)
    assert got["y"].dtype == got["p"].dtype == got["x"].dtype == dtype
    exact = by_reference(mixed, torch.float64)
    plain = by_reference([t.to(dtype) for t in mixed], dtype)
    for name in (*NAMES, "y"):
        assert error(got[name], exact[name]) <= 2 * error(plain[name], exact[name]), name


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [ONE_SLICE, WIDE], ids=str)
def test_the_same_bits_every_time(shape, strategy):
    tensors = operands(shape, torch.float16)
    first, second = by_kernels(tensors, strategy), by_kernels(tensors, strategy)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@on_gpu
@pytest.mark.parametrize("save_p", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [Shape(M=37, K=41, n=23), replace(WIDE, Ra=13)], ids=str)
def test_an_infinity_stays_an_infinity_in_its_row(shape, strategy, save_p):
    """The rank's padding, infinity times zero, must not make it a NaN."""
    *tensors, _ = (t.abs() for t in operands(shape, torch.bfloat16))
    tensors[0][5, 3] = float("inf")
    y, _ = backend.forward(*tensors, save_p=save_p, strategy=strategy)
    assert not y.isnan().any() and y[5].isinf().all()
    assert int(y.isinf().any(1).sum()) == 1


@on_gpu
@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_through_the_public_operator(strategy):
    *tensors, _ = operands(WIDE, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in tensors]
    leaves[0] = leaves[0].detach()[None].requires_grad_()
    y = low_rank_linear(*leaves, backend="cuda", strategy=strategy)
    y.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = reference.low_rank_linear(*exact)
    expected.sum().backward()
    assert error(y.detach(), expected.detach()) < 1e-2
    for name, leaf, double in zip(NAMES, leaves, exact, strict=True):
        assert error(leaf.grad, double.grad) < 2e-2, name


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [SHARED, WIDE], ids=str)
def test_under_autocast(shape, strategy):
    *tensors, _ = operands(shape, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast("cuda", torch.bfloat16):
        y = low_rank_linear(*leaves, backend="cuda", strategy=strategy)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def _training_step(strategy: str):
    *tensors, dy = operands(replace(WIDE, Rb=16), torch.bfloat16)
    leaves = [
        t.clone().requires_grad_(name != "weight") for name, t in zip(NAMES, tensors, strict=True)
    ]

    def step() -> tuple[Tensor, ...]:
        y = low_rank_linear(*leaves, backend="cuda", strategy=strategy)
        return torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)

    return step


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_step_in_a_cuda_graph(strategy):
    step = _training_step(strategy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for grad in captured:
            grad.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_a_side_stream(strategy):
    """The kernels wait for what the side stream does before them, and for nothing else."""
    step = _training_step(strategy)
    expected = step()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        got = step()
    side.synchronize()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@on_gpu
def test_a_compiled_training_step_has_no_graph_break():
    *tensors, dy = operands(replace(WIDE, Rb=16), torch.bfloat16)
    leaves = [
        t.clone().requires_grad_(name != "weight") for name, t in zip(NAMES, tensors, strict=True)
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def loss(x: Tensor, *rest: Tensor) -> Tensor:
        return (low_rank_linear(x, *rest, backend="cuda") * dy).float().sum()

    eager = torch.autograd.grad(loss(*leaves), wanted)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), wanted)
    for got, want in zip(compiled, eager, strict=True):
        assert error(got, want) < 1e-2


@on_gpu
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
        dx, *_ = backend.backward(
            y, None, weight, None, down, None, up, needs=(True, *[False] * 5), strategy=strategy
        )
        assert dx is not None and dx.shape == x.shape
        del y, dx


@on_gpu
def test_no_synchronisation():
    tensors = operands(WIDE, torch.bfloat16)
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


@on_gpu
def test_the_operators_name_what_does_not_fit():
    *tensors, _ = operands(SHARED, torch.bfloat16)
    x, weight, bias, down, core, up = tensors
    with pytest.raises(RuntimeError, match=r"down must be \[K=71, 1 <= Ra <= 128\], got \(70, 7\)"):
        torch.ops.efft_kernels.native_fwd(x, weight, bias, down[1:], core, up, False, 0)
    with pytest.raises(RuntimeError, match="x must be float16 or bfloat16, got float32"):
        torch.ops.efft_kernels.native_fwd(x.float(), weight, bias, down, core, up, False, 0)

"""The CUDA C++ backend against the float64 reference, on a GPU; its refusals everywhere.

Shapes reach both GEMMs: few or unaligned rows go to the general kernel, and on Hopper the shapes of
`BIG` have enough aligned tiles for the sm_90a one. Every kernel of the library is taken by one of
`CUDA_CASES`, which say by which. Every buffer that is allocated starts as NaN, so a tile that
nothing writes cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efft_kernels import low_rank_linear, reference
from efft_kernels.ops.backends import cpp_backend, fallback, native_library
from efft_kernels.ops.backends import cuda_backend as backend
from efft_kernels.ops.cost_model import Problem
from efft_kernels.testing.cuda_kernels import kernel_of, recorded_launches
from efft_kernels.testing.error_budget import (
    assert_exact,
    assert_within_budget,
    largest_exact_integer,
    relative_error,
)
from efft_kernels.testing.gpu_cases import CUDA_CASES, NEEDS, plans_are_known
from efft_kernels.testing.operands import (
    ALL,
    LAYOUTS,
    NAMES,
    ONE_SLICE,
    SHAPES,
    SHARED,
    Shape,
    operands,
    operands_and_dy,
)
from efft_kernels.testing.results import (
    backend_results,
    differentiate,
    plain_and_exact,
    reference_results,
    results_within_budget,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

UNAVAILABLE = "no CUDA device" if not torch.cuda.is_available() else backend.unavailable()
STRATEGIES = backend.STRATEGIES
DTYPES = [torch.float16, torch.bfloat16]
draw = partial(operands_and_dy, device="cuda")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
    return pytest.mark.gpu(skip(test))


def test_rejects_names_what_came():
    assert "float32" in str(backend.rejects(torch.zeros(2, 3)))
    assert "float64" in str(backend.rejects(torch.zeros(2, 3, dtype=torch.float64)))
    assert "cpu" in str(backend.rejects(torch.zeros(2, 3, dtype=torch.bfloat16)))


def test_rejects_what_is_on_an_old_device(monkeypatch):
    monkeypatch.setattr(backend, "too_old", lambda index: f"{index} is too old")
    x = SimpleNamespace(dtype=torch.float16, is_cuda=True, device=SimpleNamespace(index=3))
    assert backend.rejects(x) == "3 is too old"


def test_a_strategy_that_torch_has_stands_for_itself():
    found = {strategy: fallback.torch_strategy(strategy) for strategy in STRATEGIES}
    assert found == {"fused": "split", "split": "split", "merged": "merged"}


def test_rows_are_copied_only_where_columns_are_apart():
    wide = torch.randn(5, 8)
    for taken in (wide, wide[:, 2:5], wide[:, ::2][:, :1], wide[:0].t()[:, :1]):
        assert fallback.rows(taken) is taken
    for apart in (wide.t(), wide[:, ::2]):
        copy = fallback.rows(apart)
        assert torch.equal(copy, apart) and copy.is_contiguous()


@pytest.mark.parametrize("capability", [(7, 5), (7, 9), (8, 0), (9, 0)])
def test_devices_before_the_first_capability_are_named(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    reason = fallback.too_old.__wrapped__(3)
    if capability < (8, 0):
        assert reason == "GPU 3 is older than compute capability 8.0; use backend='torch'"
    else:
        assert reason is None


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
    fallback.note_rank.cache_clear()
    assert not backend.out_of_reach(problem) and not caplog.text
    assert backend.out_of_reach(problem._replace(N=0))
    assert backend.out_of_reach(problem._replace(K=0))
    assert backend.out_of_reach(problem._replace(rank=131))
    assert "rank 131 is above 128" in caplog.text


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["no rows", "no columns", "rank", "float64 weight"])
def test_what_is_out_of_reach_runs_in_torch(case, strategy):
    """On any device: the kernels are not asked."""
    rows, rank = (0 if case == "no rows" else 5), (131 if case == "rank" else 4)
    wide = torch.float64 if case == "float64 weight" else torch.float32
    x = torch.randn(rows, 7).bfloat16()
    n = 0 if case == "no columns" else 3
    weight, down = torch.randn(2 * n, 7, dtype=wide), torch.randn(7, rank)
    core, up = torch.randn(2, rank, 3), torch.randn(1, n, 3)
    with Operators() as called:
        y, p = backend.forward(x, weight, None, down, core, up, save_p=True, strategy=strategy)
        dy = torch.randn(rows, 2 * n).bfloat16()
        grads = backend.backward(dy, x, weight, p, down, core, up, needs=ALL, strategy=strategy)
    assert not called
    assert y.shape == (rows, 2 * n) and p is not None and p.shape == (rows, rank)
    tensors = (x, weight, None, down, core, up)
    for name, grad, tensor in zip(NAMES, grads, tensors, strict=True):
        assert grad is not None, name
        assert tensor is None or (grad.shape == tensor.shape and grad.dtype == tensor.dtype), name


@pytest.mark.skipif(native_library.not_built("_native") is not None, reason="it was not built")
@pytest.mark.parametrize("strategy", ["split", "merged"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_the_operators_are_given(strategy, bias):
    """The CPU's kernels, which take the same calls, in the place of a GPU's; rows one by one."""
    assert native_library.load_cpu() is None
    # Of odd widths, which the CPU's kernels take in the same way whatever the rows' layout is.
    shape = Shape(M=5, K=7, n=5, G=3, Ra=4, Rb=3, bias=bias)
    tensors = operands_and_dy(shape, torch.bfloat16)
    for apart in (False, True):
        if apart:
            tensors = [t if t is None or t.dim() != 2 else t.T.contiguous().T for t in tensors]
        *given, dy = tensors
        with Operators() as called:
            results = [backend_results(each, tensors, strategy) for each in (backend, cpp_backend)]
            y, p = backend.forward(*given, save_p=False, strategy=strategy)
        assert called == ["native_fwd", "native_bwd"] * 2 + ["native_fwd"]
        assert_exact(*results)
        assert p is None and torch.equal(y, results[0]["y"])
    x, weight, _, *factors = given
    p = results[0]["p"]
    for place, name in enumerate(NAMES):
        kept = (x if name in ("weight", "down") else None, weight)
        kept += (p if name in ("core", "up") else None,)
        needs = tuple(name == one for one in NAMES)
        with Operators() as called:
            grads = backend.backward(dy, *kept, *factors, needs=needs, strategy=strategy)
        assert called == ([] if name in ("weight", "bias") else ["native_bwd"])
        assert [grad is not None for grad in grads] == list(needs)
        assert name not in results[0] or torch.equal(grads[place], results[0][name])


class Operators(TorchDispatchMode):
    """The names of this package's operators that ran."""

    def __enter__(self) -> list[str]:
        super().__enter__()
        self.names: list[str] = []
        return self.names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "efft_kernels":
            self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


# Multiples of 8, ragged tiles. With 132 multiprocessors the sm_90a GEMM takes tiles of 128 columns
# for all of them, forward and backward; CUDA_CASES have shapes for which it takes 192.
WIDE = Shape(M=12 * 128 + 37, K=8 * 103, n=8 * 97, Ra=16, Rb=8)
NARROW = Shape(M=33 * 128 + 5, K=8 * 37, n=8 * 31, G=1, Ra=13, Rb=13, core=False, shared=False)
RANK_32 = Shape(M=2 * 1031, K=8 * 67, n=8 * 53, G=2, Ra=29, Rb=16, shared=False)
RANK_128 = Shape(M=2 * 1031, K=8 * 67, n=8 * 107, G=1, Ra=128, Rb=128)
BIG = (WIDE, NARROW, RANK_32, RANK_128)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + BIG, ids=str)
def test_all_results_within_the_error_budget(shape, dtype, strategy):
    results_within_budget(backend, draw(shape, dtype), strategy)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + BIG, ids=str)
def test_exact_operands_give_exact_results(shape, dtype, strategy):
    """Sparse small integers: where sums stay exact in the dtype, equality is bitwise."""
    tensors = draw(shape, dtype, density=0.1)
    exact, limit = reference_results(tensors, torch.float64), largest_exact_integer(dtype)
    results = backend_results(backend, tensors, strategy)
    # P and S are rounded to the dtype on the way, and merging rounds W + ΔW.
    if exact["p"].abs().max() < limit:
        assert_exact(results, exact, below=limit)


@on_gpu
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_every_kernel_is_taken_and_right(case):
    """Bit for bit where operands are whole numbers; on 132 multiprocessors by the kernels that the
    case names.
    """
    tensors = case.operands("cuda")
    with recorded_launches() as launches:
        results = backend_results(backend, tensors, case.strategy, NEEDS)
        torch.cuda.synchronize()
    if case.density is None:
        assert_within_budget(results, *plain_and_exact(tensors))
    else:
        assert_exact(results, reference_results(tensors, torch.float64))
    if plans_are_known():
        assert [kernel for kernel in map(kernel_of, launches) if kernel] == case.plan


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rank", [1, 2, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128])
@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
def test_every_rank(rank, aligned, strategy):
    shape = Shape(M=37, K=41, n=23, G=2, Ra=rank, Rb=3)
    if aligned:
        shape = replace(shape, M=9 * 128 + 5, K=8 * 41, n=8 * 67)
    results_within_budget(backend, draw(shape, torch.bfloat16), strategy)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [0, 1, 31, 63, 64, 65, 127, 128, 129, 1151, 1152, 1153])
def test_every_number_of_rows(rows, strategy):
    tensors = draw(Shape(M=rows, K=264, n=8 * 103, G=2, Ra=11), torch.float16)
    got = backend_results(backend, tensors, strategy)
    if rows:
        assert_within_budget(got, *plain_and_exact(tensors))
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
    results_within_budget(backend, draw(shape, torch.bfloat16), strategy)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [Shape(M=37, K=41, n=23), WIDE], ids=str)
def test_every_layout(shape, layout, strategy):
    *tensors, dy = draw(shape, torch.float16)
    x, weight, bias, down, core, up = tensors
    # Expanded rows are all the same, and so many of them would sum to more than float16 holds.
    dy = dy / 64
    x, weight, down, up, dy = (LAYOUTS[layout](t) for t in (x, weight, down, up[0], dy))
    changed = (x, weight, bias, down, core.mT.contiguous().mT, up[None], dy)
    results_within_budget(backend, changed, strategy)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("needed", ["x", "weight bias", "down", "x down", "down up", "core"])
@pytest.mark.parametrize("shape", [Shape(M=37, K=41, n=23), WIDE], ids=str)
def test_only_what_is_needed(shape, needed, strategy):
    tensors = draw(shape, torch.bfloat16)
    needs = [name in needed.split() for name in NAMES]
    got = results_within_budget(backend, tensors, strategy, needs)
    assert set(got) - {"y", "p"} == set(needed.split())


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [SHARED, WIDE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_weight_and_factors_beside_half_precision_rows(shape, dtype, strategy):
    """As under autocast: y is as good as from operands cast beforehand, and factor gradients are
    float32.
    """
    *tensors, dy = draw(shape, torch.float32)
    mixed = (tensors[0].to(dtype), *tensors[1:], dy.to(dtype))
    got = backend_results(backend, mixed, strategy)
    p = got.pop("p")
    assert got["y"].dtype == p.dtype == got["x"].dtype == dtype
    assert_within_budget(got, *plain_and_exact(mixed), rounding=False)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [ONE_SLICE, WIDE], ids=str)
def test_the_same_bits_every_time(shape, strategy):
    tensors = draw(shape, torch.float16)
    first, second = (backend_results(backend, tensors, strategy) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@on_gpu
@pytest.mark.parametrize("save_p", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [Shape(M=37, K=41, n=23), replace(WIDE, Ra=13)], ids=str)
def test_an_infinity_stays_an_infinity_in_its_row(shape, strategy, save_p):
    """The rank's padding, infinity times zero, must not make it a NaN."""
    *tensors, _ = (t.abs() for t in draw(shape, torch.bfloat16))
    tensors[0][5, 3] = float("inf")
    y, _ = backend.forward(*tensors, save_p=save_p, strategy=strategy)
    assert not y.isnan().any() and y[5].isinf().all()
    assert int(y.isinf().any(1).sum()) == 1


@on_gpu
@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_through_the_public_operator(strategy):
    tensors = operands(WIDE, torch.bfloat16, lead=(1, WIDE.M), device="cuda")

    def function(**tensors):
        return low_rank_linear(**tensors, backend="cuda", strategy=strategy)

    wide = {name: t.double() for name, t in tensors.items()}
    y, grads = differentiate(function, tensors)
    exact_y, exact = differentiate(reference.low_rank_linear, wide)
    assert relative_error(y, exact_y) < 1e-2
    for name in NAMES:
        assert relative_error(grads[name], exact[name]) < 2e-2, name


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [SHARED, WIDE], ids=str)
def test_under_autocast(shape, strategy):
    leaves = [t.requires_grad_() for t in draw(shape, torch.float32)[:-1]]
    with torch.autocast("cuda", torch.bfloat16):
        y = low_rank_linear(*leaves, backend="cuda", strategy=strategy)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_under_autocast_a_frozen_float32_weight_is_cast_once(strategy):
    """The forward's cast is what the backward reads, as in torch's own linear; `merged` starts from
    the weight itself.
    """
    x, weight, bias, *factors = draw(WIDE, torch.float32)[:-1]
    leaves = [t.requires_grad_() for t in (x, *factors)]
    saved = []
    with (
        torch.autocast("cuda", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = low_rank_linear(leaves[0], weight, bias, *leaves[1:], backend="cuda", strategy=strategy)
    weights = [t.dtype for t in saved if t.shape == weight.shape]
    assert weights == [torch.float32 if strategy == "merged" else torch.bfloat16]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = reference.low_rank_linear(exact[0], weight.double(), bias.double(), *exact[1:])
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    for got, want in zip(grads, torch.autograd.grad(wanted, exact, dy.double()), strict=True):
        assert relative_error(got, want) < 2e-2


def leaves_and_dy():
    """(operands that require grad but for the weight, dy) of a bfloat16 step."""
    *tensors, dy = draw(replace(WIDE, Rb=16), torch.bfloat16)
    return [t.requires_grad_(n != "weight") for n, t in zip(NAMES, tensors, strict=True)], dy


def training_step(strategy: str):
    leaves, dy = leaves_and_dy()

    def step() -> tuple[Tensor, ...]:
        y = low_rank_linear(*leaves, backend="cuda", strategy=strategy)
        return torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)

    return step


@on_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_step_in_a_cuda_graph(strategy):
    step = training_step(strategy)
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
    step = training_step(strategy)
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
    leaves, dy = leaves_and_dy()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def loss(x: Tensor, *rest: Tensor) -> Tensor:
        return (low_rank_linear(x, *rest, backend="cuda") * dy).float().sum()

    eager = torch.autograd.grad(loss(*leaves), wanted)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), wanted)
    for got, want in zip(compiled, eager, strict=True):
        assert relative_error(got, want) < 1e-2


@on_gpu
def test_offsets_beyond_32_bits():
    M, N, K = 70_001, 32_768, 32
    x, weight, down, up = (
        torch.randint(-1, 2, size, device="cuda", dtype=torch.bfloat16)
        for size in ((M, K), (N, K), (K, 16), (1, N, 16))
    )
    for strategy in ("fused", "split"):
        y, _ = backend.forward(x, weight, None, down, None, up, save_p=False, strategy=strategy)
        tail, *rest = (t.double() for t in (x[-3:], weight, down, up))
        expected = reference.low_rank_linear(tail, rest[0], None, rest[1], None, rest[2])
        assert torch.equal(y[-3:], expected.to(y.dtype))
        dx, *_ = backend.backward(
            y, None, weight, None, down, None, up, needs=(True, *[False] * 5), strategy=strategy
        )
        assert dx is not None and dx.shape == x.shape
        del y, dx


@on_gpu
def test_no_synchronisation():
    tensors = draw(WIDE, torch.bfloat16)
    backend_results(backend, tensors, "fused")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for strategy in STRATEGIES:
            backend_results(backend, tensors, strategy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_the_operators_name_what_does_not_fit():
    x, weight, bias, down, core, up, _ = draw(SHARED, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"down must be \[K=71, 1 <= Ra <= 128\], got \(70, 7\)"):
        torch.ops.efft_kernels.native_fwd(x, weight, bias, down[1:], core, up, False, 0)
    with pytest.raises(RuntimeError, match="x must be float16 or bfloat16, got float32"):
        torch.ops.efft_kernels.native_fwd(x.float(), weight, bias, down, core, up, False, 0)

"""The CUDA backend end to end on the model of a GPU: `python operators.py LIBRARY`.

LIBRARY holds csrc/cuda's own operators and kernels, compiled for the host with the model's
instructions and registered for CPU tensors. Every strategy, dtype and layout of factors runs
against the float64 reference, on buffers that start as NaN, and a chain's steps against plain
torch's. EFFT_MODEL_SM90 selects the Hopper kernels.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from efft_kernels.ops.backends import cuda_backend as backend
from efft_kernels.ops.backends.chain_steps import Norm, TorchSteps
from efft_kernels.ops.backends.cuda_chain import CudaSteps
from efft_kernels.testing.error_budget import (
    assert_exact,
    assert_within_budget,
    largest_exact_integer,
)
from efft_kernels.testing.operands import NAMES, SHAPES, Shape, operands_and_dy
from efft_kernels.testing.poison import poisoned_allocations
from efft_kernels.testing.results import backend_results, plain_and_exact, reference_results

NEEDS = ("x", "weight bias", "down", "x down", "down up", "core", "x down core up")
UNALIGNED = (
    *SHAPES[:3],
    Shape(M=67, K=37, n=61, G=1, Ra=33, Rb=7),
    Shape(M=1, K=8, n=8, G=1, Ra=1, Rb=1),
    Shape(M=37, K=40, n=24, G=2, Ra=13, Rb=5),  # aligned, but few
)
ALIGNED = (
    Shape(M=133, K=136, n=72, Ra=13),
    Shape(M=70, K=72, n=200, G=1, Ra=16, core=False, bias=False),
    Shape(M=67, K=72, n=136, G=2, Ra=29, Rb=3, shared=False),
)


def run(shape: Shape, dtype: torch.dtype, strategy: str, turn: int) -> None:
    tensors = operands_and_dy(shape, dtype)
    plain, exact = plain_and_exact(tensors)
    first, second = (backend_results(backend, tensors, strategy) for _ in range(2))
    assert_within_budget(first, plain, exact)
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    integers = operands_and_dy(shape, dtype, density=0.15)
    expected, limit = reference_results(integers, torch.float64), largest_exact_integer(dtype)
    if expected["p"].abs().max() < limit:  # P is rounded to the dtype on the way
        assert_exact(backend_results(backend, integers, strategy), expected, below=limit)

    if dtype != torch.bfloat16:
        return
    # A third of them: with `turn` every one meets every strategy and every shape.
    for needed in NEEDS[turn % 3 :: 3]:
        needs = [name in needed.split() for name in NAMES]
        assert_within_budget(backend_results(backend, tensors, strategy, needs), plain, exact)

    # As under autocast: float32 weight, bias and factors.
    *inputs, dy = operands_and_dy(shape, torch.float32)
    mixed = [inputs[0].to(dtype), *inputs[1:], dy.to(dtype)]
    assert_within_budget(backend_results(backend, mixed, strategy), *plain_and_exact(mixed))

    # An infinity times the rank's padding must not become a NaN.
    inputs = [None if t is None else t.abs() for t in tensors[:-1]]
    inputs[0][-1, -1] = torch.inf
    # oneDNN, which multiplies for `merged` here, makes NaNs of it on CPUs without bfloat16.
    with torch.backends.mkldnn.flags(enabled=False):
        y, _ = backend.forward(*inputs, save_p=False, strategy=strategy)
    assert not y.isnan().any() and y[-1].isinf().all() and not y[:-1].isinf().any()


def run_chain(
    rows: int, width: int, rank: int, branch: bool, dtype: torch.dtype, before: bool
) -> None:
    """The norm, its gradient and the pair of thin ones; then operands that they refuse.

    `before`: the gradient makes S and d_B of the linear before it, in plain torch otherwise.
    """
    torch.manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size).to(dtype)

    z, residual, (weight, bias) = draw(rows, width), draw(rows, width), draw(2, width)
    y, dout = draw(2, rows, width, dtype=dtype)
    (down, b), (s, p) = draw(2, width, rank, dtype=dtype), draw(2, rows, rank, dtype=dtype)

    def results(steps: TorchSteps, as_: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        norm = Norm(as_(weight), as_(bias), 1e-6)
        added = as_(y) if branch else None
        normed = steps.norm(as_(z), added, norm, as_(down), as_(y).dtype)
        stream = (as_(t) for t in (z, *plain_statistics))
        given = as_(dout), *stream, norm, as_(residual), as_(s)
        got = steps.norm_grad(*given, (as_(b), as_(p)) if before else None)
        sums = [got.sum_down, *steps.pair_grad(as_(y), as_(dout), as_(down), as_(b))]
        if before:
            sums.append(got.sum_b)
        if got.sum_down.dim() == 3:
            assert not any(total[..., rank:].any() for total in sums)
            sums = [total.sum(0)[:, :rank] for total in sums]
        made = {"dz": got.dz, "dy": got.dy, **({"S before": got.s} if before else {})}
        return {**normed._asdict(), **made, **dict(enumerate(sums))}

    native = CudaSteps(None, pair_grad=True, before=before)
    plain_statistics = TorchSteps().norm(z, None, Norm(weight, bias, 1e-6), down.float(), z.dtype)
    plain_statistics = plain_statistics.mean, plain_statistics.rstd
    first, second = (results(native, lambda t: t) for _ in range(2))
    plain, exact = results(TorchSteps(), lambda t: t), results(TorchSteps(), Tensor.double)
    assert_within_budget(first, plain, exact)
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    ops = torch.ops.efft_kernels
    mean, rstd = plain_statistics
    for call, given in (
        (ops.native_norm, {"z": z, "y": y, "weight": weight, "bias": bias, "down": down}),
        (
            ops.native_norm_grad,
            {"dout": dout, "z": z, "mean": mean, "rstd": rstd, "weight": weight, "bias": bias}
            | {"residual": residual, "s": s}
            | ({"b": b, "p": p} if before else {"b": None, "p": None}),
        ),
        (ops.native_pair_grad, {"x": y, "dy": dout, "down": down, "b": b}),
    ):
        more = {"eps": 1e-6} if call is ops.native_norm else {}
        for name, t in given.items():
            if t is None:
                continue
            off_16 = t.new_empty(t.numel() + 1)[1:].view(t.shape)
            for wrong in (t.double(), t[:-1], off_16):
                said = refusal(lambda: call(**{**given, name: wrong}, **more))  # noqa: B023
                # All others' sizes and dtypes follow from these.
                leading = name in ("z", "x", "down", "s") and wrong is not off_16
                assert f" {name} must be " in f" {said}" or (leading and " must be " in said), said
    for k in (1088, 1344):
        wide = torch.zeros(1, k, dtype=dtype)
        thin = wide.T.contiguous()
        assert "a multiple of 64 up to 1024" in refusal(
            lambda: ops.native_pair_grad(wide, wide, thin, thin)  # noqa: B023
        )
    given = [dout, z, mean, rstd, weight, bias, residual, s]
    for lone in ((b, None), (None, p)) if before else ():
        assert "must be given where" in refusal(lambda: ops.native_norm_grad(*given, *lone))  # noqa: B023
    row, stream = torch.zeros(k), torch.zeros(1, k)
    with_norm = [wide, stream, row[:1], row[:1], row, row, stream, wide[:, :1].contiguous()]
    for more, most in (((None, None), 1280), ((thin, wide[:, :1].contiguous()), 768)):
        assert f"a multiple of 64 up to {most}" in refusal(
            lambda: ops.native_norm_grad(*with_norm, *more)  # noqa: B023
        )
    none = [t[:0] for t in (y, dout)]
    assert [t.shape for t in ops.native_pair_grad(*none, down, b)] == [(0, width, 16)] * 2


def run_gelu(rows: int, columns: int, before: int, after: int, dtype: torch.dtype) -> None:
    """GELU and its gradient with the thin products beside them; then operands they refuse."""
    torch.manual_seed(0)
    h, da = torch.randn(2, rows, columns).to(dtype)
    s, p = torch.randn(rows, after).to(dtype), torch.randn(rows, before).to(dtype)
    b = torch.randn(columns, before).to(dtype)
    down = torch.randn(columns, after).to(dtype)
    op, value = torch.ops.efft_kernels.native_gelu_grad, torch.ops.efft_kernels.native_gelu

    def plain(as_: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        d_b, d_down = as_(b).new_empty(b.shape), as_(b).new_empty(columns, after)
        dh, s_in = TorchSteps().gelu_grad(*map(as_, (da, h, s, b, p)), d_b, d_down, [])
        a, p_after = TorchSteps().gelu(as_(h), as_(down))
        return {"dh": dh, "S": s_in, "d_B": d_b, "d_down": d_down, "a": a, "P": p_after}

    def native() -> dict[str, Tensor]:
        dh = da.clone()
        sums = op(dh, h, s, b, p)
        ranks = before, before, after
        made = [t.sum(0)[:, :rank] for t, rank in zip(sums, ranks, strict=True)]
        names = "dh", "S", "d_B", "d_down", "a", "P"
        return dict(zip(names, (dh, *made, *value(h, down)), strict=True))

    first, second = native(), native()
    assert_within_budget(first, plain(lambda t: t), plain(Tensor.double))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    for call, given in (
        (op, {"da": da, "h": h, "s": s, "b": b, "p": p}),
        (value, {"h": h, "down": down}),
    ):
        for name, t in given.items():
            off_16 = t.new_empty(t.numel() + 1)[1:].view(t.shape)
            for wrong in (t.double(), t[:-1], off_16):
                if call is value and name == "h" and wrong.shape != h.shape:
                    continue  # any number of rows
                said = refusal(lambda: call(**{**given, name: wrong}))  # noqa: B023
                # All others' sizes and dtypes follow from these.
                leading = name in ("s", "b", "down") and wrong is not off_16
                leading = leading or (name == "h" and wrong.shape != h.shape)
                assert wrong is not off_16 or "2 bytes beyond one" in said
                assert f" {name} must be " in f" {said}" or (leading and " must be " in said), said
    wide = torch.zeros(1, 4160, dtype=dtype)
    assert "up to 4096" in refusal(lambda: value(wide, wide.T.contiguous()))
    assert [t.shape for t in value(h[:0], down)] == [(0, columns), (0, after)]
    assert "a multiple of 64" in refusal(lambda: op(da[:, :32], h[:, :32], s, b, p))
    sizes = [t.shape for t in op(da[:0], h[:0], s[:0], b, p[:0])]
    assert sizes[1:] == [(0, columns, 16)] * 2 and sizes[0][1:] == (0, 16)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("it was not refused")


def main(library: str) -> None:
    torch.ops.load_library(library)
    torch.set_num_threads(1)
    shapes = ALIGNED if "EFFT_MODEL_SM90" in os.environ else UNALIGNED
    dtypes = (torch.float16, torch.bfloat16)
    with poisoned_allocations():
        cases = itertools.product(enumerate(shapes), dtypes, enumerate(backend.STRATEGIES))
        for (i, shape), dtype, (j, strategy) in cases:
            # bfloat16 has every pair; of float16, which the same templates make, every other one.
            if dtype == torch.bfloat16 or (i + j) % 2 == 0:
                run(shape, dtype, strategy, i + j)
                print(shape, dtype, strategy, flush=True)
        if "EFFT_MODEL_SM90" in os.environ:
            run_chain(37, 192, 16, True, torch.bfloat16, before=True)
            run_chain(9, 832, 5, False, torch.float16, before=False)
            run_gelu(37, 192, 16, 16, torch.bfloat16)
            run_gelu(19, 832, 5, 12, torch.float16)


if __name__ == "__main__":
    main(sys.argv[1])

"""The CUDA backend end to end on the model of a GPU: `python operators.py LIBRARY`.

LIBRARY holds csrc/cuda's own operators and kernels, compiled for the host with the model's
instructions and registered for CPU tensors. Every strategy, dtype and layout of factors runs
against the float64 reference, on buffers that start as NaN. EFFT_MODEL_SM90 selects the Hopper
kernels.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from efft_kernels.ops import reference, schemas
from efft_kernels.ops.backends import cuda_backend as backend

NAMES = ("x", "weight", "bias", "down", "core", "up")
ALL = (True,) * 6
NEEDS = ("x", "weight bias", "down", "x down", "down up", "core", "x down core up")
# (M, K, N/G, G, Ra, Rb, core, shared up, bias)
UNALIGNED = [
    (67, 71, 29, 3, 7, 5, True, True, True),
    (53, 83, 37, 3, 5, 11, True, False, True),
    (41, 97, 23, 3, 3, 3, False, False, False),
    (67, 37, 61, 1, 33, 7, True, True, True),
    (1, 8, 8, 1, 1, 1, True, True, True),
]
SMALL_ALIGNED = [(37, 40, 24, 2, 13, 5, True, True, True)]
ALIGNED = [
    (133, 136, 72, 3, 13, 5, True, True, True),
    (70, 72, 200, 1, 16, 16, False, False, False),
    (67, 72, 136, 2, 29, 3, True, False, True),
]


def operands(case, dtype: torch.dtype, exact: bool) -> list[Tensor | None]:
    m, k, n, slices, ra, rb, has_core, shared, has_bias = case
    g = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        if exact:
            signs = torch.randint(0, 2, size, generator=g) * 2 - 1
            return (signs * (torch.rand(size, generator=g) < 0.15)).to(dtype)
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    return [
        draw(m, k),
        draw(n * slices, k, scale=k**-0.5),
        draw(n * slices) if has_bias else None,
        draw(k, ra, scale=k**-0.5),
        draw(slices, ra, rb, scale=ra**-0.5) if has_core else None,
        draw(1 if has_core and shared else slices, n, rb, scale=rb**-0.5),
        draw(m, n * slices),
    ]


def by_reference(tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    *inputs, dy = tensors
    leaves = [None if t is None else t.to(dtype).detach().requires_grad_() for t in inputs]
    y = reference.low_rank_linear(*leaves)
    named = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    grads = torch.autograd.grad(y, list(named.values()), dy.to(dtype))
    p = leaves[0].detach() @ leaves[3].detach()
    return {"y": y.detach(), "p": p, **dict(zip(named, grads, strict=True))}


def by_kernels(tensors, strategy: str, needs=ALL) -> dict[str, Tensor]:
    *inputs, dy = tensors
    x, weight, bias, down, core, up = inputs
    y, p = backend.forward(*inputs, save_p=True, strategy=strategy)
    grads = backend.backward(dy, x, weight, p, down, core, up, needs=needs, strategy=strategy)
    out = {"y": y, "p": p}
    for name, tensor, grad, need in zip(NAMES, inputs, grads, needs, strict=True):
        if name == "bias" and bias is None:
            continue
        assert (grad is None) == (not need or tensor is None), name
        if grad is not None:
            assert grad.shape == tensor.shape and grad.dtype == tensor.dtype, name
            out[name] = grad
    return out


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_within_budget(got, exact, plain, eps: float) -> None:
    for name, value in got.items():
        budget = 2 * max(error(plain[name], exact[name]), eps / 2)
        found = error(value, exact[name])
        assert found <= budget, f"{name}: error {found:.2e}, budget {budget:.2e}"


def run(case, dtype: torch.dtype, strategy: str) -> None:
    tensors = operands(case, dtype, exact=False)
    exact, plain = by_reference(tensors, torch.float64), by_reference(tensors, dtype)
    eps = torch.finfo(dtype).eps
    first, second = by_kernels(tensors, strategy), by_kernels(tensors, strategy)
    assert_within_budget(first, exact, plain, eps)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    integers = operands(case, dtype, exact=True)
    exact = by_reference(integers, torch.float64)
    limit = 256 if dtype == torch.bfloat16 else 2048
    for name, value in by_kernels(integers, strategy).items():
        if exact["p"].abs().max() < limit and exact[name].abs().max() < limit:
            assert torch.equal(value.double(), exact[name]), name

    if dtype != torch.bfloat16:
        return
    for needed in NEEDS:
        needs = tuple(name in needed.split() for name in NAMES)
        exact = by_reference(tensors, torch.float64)
        assert_within_budget(by_kernels(tensors, strategy, needs), exact, plain, eps)

    # As under autocast: float32 weight, bias and factors.
    *inputs, dy = operands(case, torch.float32, exact=False)
    mixed = [inputs[0].to(dtype), *inputs[1:], dy.to(dtype)]
    plain = by_reference([None if t is None else t.to(dtype) for t in mixed], dtype)
    assert_within_budget(
        by_kernels(mixed, strategy), by_reference(mixed, torch.float64), plain, eps
    )

    # An infinity times the rank's padding must not become a NaN.
    inputs = [None if t is None else t.abs() for t in tensors[:-1]]
    inputs[0][-1, -1] = float("inf")
    y, _ = backend.forward(*inputs, save_p=False, strategy=strategy)
    assert not y.isnan().any() and y[-1].isinf().all() and not y[:-1].isinf().any()


def main(library: str) -> None:
    fragment = torch.library.Library(schemas.LIBRARY.ns, "FRAGMENT")
    fragment.define(
        "native_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor? core, Tensor up,"
        " bool save_p, int strategy) -> (Tensor y, Tensor p)"
    )
    fragment.define(
        "native_bwd(Tensor dy, Tensor? x, Tensor weight, Tensor? p, Tensor down, Tensor? core,"
        " Tensor up, int needs, int strategy)"
        " -> (Tensor dx, Tensor d_down, Tensor d_core, Tensor d_up)"
    )
    torch.ops.load_library(library)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    hopper = "EFFT_MODEL_SM90" in os.environ
    for case in ALIGNED if hopper else UNALIGNED + SMALL_ALIGNED:
        for dtype in (torch.float16, torch.bfloat16):
            for strategy in backend.STRATEGIES:
                run(case, dtype, strategy)
                print(case, dtype, strategy, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

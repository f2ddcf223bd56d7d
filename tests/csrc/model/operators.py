"""The CUDA backend end to end on the model of a GPU: `python operators.py LIBRARY`.

LIBRARY holds csrc/cuda's own operators and kernels, compiled for the host with the model's
instructions and registered for CPU tensors. Every strategy, dtype and layout of factors runs
against the float64 reference, on buffers that start as NaN. EFFT_MODEL_SM90 selects the Hopper
kernels.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch

from efft_kernels.ops import schemas
from efft_kernels.ops.backends import cuda_backend as backend
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
    shapes = ALIGNED if "EFFT_MODEL_SM90" in os.environ else UNALIGNED
    dtypes = (torch.float16, torch.bfloat16)
    with poisoned_allocations():
        cases = itertools.product(enumerate(shapes), dtypes, enumerate(backend.STRATEGIES))
        for (i, shape), dtype, (j, strategy) in cases:
            # bfloat16 has every pair; of float16, which the same templates make, every other one.
            if dtype == torch.bfloat16 or (i + j) % 2 == 0:
                run(shape, dtype, strategy, i + j)
                print(shape, dtype, strategy, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

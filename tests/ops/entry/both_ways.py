"""A call by the C++ entry point and by the long way, through functional.py and dispatch.py, to the
same backend. Importing this skips a module of tests where the entry point was not built.

Most tests of the operator run on both ways already; those here compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from efft_kernels import low_rank_linear
from efft_kernels.ops.backends import native_library
from efft_kernels.testing.operands import FACTORS, NAMES, Shape

for missing in (native_library.not_built("_native"), native_library.not_built("_autograd")):
    if missing is not None:
        pytest.skip(missing, allow_module_level=True)

HALVES = [torch.bfloat16, torch.float16]


@contextmanager
def the_python_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "autograd_module", lambda: None)
        yield


def on_both_ways(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` gives through the entry point and through Python."""
    found = run()
    with the_python_way():
        return found, run()


on_each_backend = pytest.mark.usefixtures("backend")


def operands(
    lead=(11,), k=7, per_slice=5, slices=3, core=True, shared=True, bias=True, dtype=torch.float32,
    frozen_dtype=None, factor_dtype=None,
) -> dict[str, Tensor | None]:  # fmt: skip
    shape = Shape(K=k, n=per_slice, G=slices, Ra=3, Rb=2, core=core, shared=shared, bias=bias)
    kinds = {"weight": frozen_dtype, "bias": frozen_dtype} | dict.fromkeys(FACTORS, factor_dtype)
    return {
        name: None if size is None else torch.randn(size).to(kinds.get(name) or dtype)
        for name, size in shape.sizes(lead).items()
        if name in NAMES
    }


def step(tensors, wanted=NAMES, context=None, after=None, **options):
    """[y, the gradients of `wanted`] of one training step."""
    leaves = {
        name: None if t is None else t.detach().clone().requires_grad_(name in wanted)
        for name, t in tensors.items()
    }
    with context() if context is not None else nullcontext():
        y = low_rank_linear(**leaves, **options)
    result = y if after is None else after(y)
    result.float().sin().sum().backward()
    return [y.detach(), *(None if t is None else t.grad for t in leaves.values())]


def assert_identical(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
            assert torch.equal(a, b)


FORMS = [
    {},
    {"shared": False, "bias": False},
    {"core": False},
    {"slices": 1, "core": False, "bias": False},
]


def refusal(run: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as error:
        run()
    return error.type, str(error.value)

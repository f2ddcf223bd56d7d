"""The C++ operators on the CPU and their exact results, for tests that call them directly.

Importing this skips a module of tests where the library was not built.

csrc/build/asan.sh runs this folder on a library with AddressSanitizer and UBSan. What all backends
have in common is in test_functional.py, test_gradients.py and test_autocast.py of tests/ops.
"""

from __future__ import annotations

import pytest
import torch

from efft_kernels import reference
from efft_kernels.ops.backends import cpp_backend, native_library, torch_backend
from efft_kernels.testing.operands import FACTORS, NAMES, Shape

if (missing := native_library.not_built("_native")) is not None:
    pytest.skip(missing, allow_module_level=True)
assert cpp_backend.unavailable() is None, "what was built can be loaded"

GRADS = ("dx", "d_weight", "d_bias", "d_down", "d_core", "d_up")
ALL = (True, False, False, True, True, True)  # those that the operator makes
# Compiled in csrc/cpu: a step of the inner dimension, rows of a block, columns of a panel (float32
# and float64, for each instruction set), rows of a task of the fold; and rows of a tile and of a
# range of rows, columns of a tile.
DEPTH, BLOCK_ROWS, PANELS, CHUNK = 384, 200, (4, 8, 12, 24, 48), 512
TILE_ROWS, RANGE_ROWS, TILE_COLUMNS = cpp_backend.TILE_ROWS, 2048, (48, 64, 96, 128, 192)


FORMS = {
    "shared up": Shape(),
    "own up": Shape(shared=False, bias=False),
    "no core": Shape(core=False, shared=False),
    "one slice": Shape(G=1, n=89, Ra=11, Rb=13),
    "one slice, no core": Shape(G=1, n=89, core=False, bias=False),
}
# Beyond every block in every direction, none of them a multiple of one.
WIDE = Shape(M=2 * BLOCK_ROWS + 11, K=DEPTH + 101, n=DEPTH // 3 + 19, Ra=17, Rb=13)
TALL = Shape(M=BLOCK_ROWS + 3, K=2 * DEPTH + 1, n=CHUNK + 9, G=2, Ra=19, Rb=23, shared=False)
# Its inner dimensions are even: bfloat16 is multiplied two numbers at a time where it can be.
EVEN = Shape(M=BLOCK_ROWS + 3, K=2 * DEPTH + 50, n=2 * DEPTH + 18, G=1, Ra=17, Rb=16, shared=False)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (x, weight and bias, factors)
DTYPES = [
    (F32, F32, F32),
    (F64, F64, F64),
    (BF16, BF16, BF16),
    (BF16, F32, F32),
    (BF16, BF16, F32),
    (BF16, F16, F16),
    (BF16, F64, F64),
]


def name_of(value) -> str | None:
    if isinstance(value, tuple) and isinstance(value[0], torch.dtype):
        return "-".join(str(dtype).removeprefix("torch.") for dtype in value)
    return None


def integers(shape: Shape, bound: int = 2) -> dict:
    """Whole numbers, so that sums are exact in every order and equality is bitwise; float64."""
    return {
        name: None if size is None else torch.randint(-bound, bound + 1, size).double()
        for name, size in shape.sizes().items()
    }


def reals(shape: Shape) -> dict:
    """Normal numbers, scaled so that both terms of y are of order one; float64."""
    t = {
        name: None if size is None else torch.randn(size, dtype=torch.float64)
        for name, size in shape.sizes().items()
    }
    t["weight"] *= shape.K**-0.5
    t["down"] *= shape.K**-0.5
    t["up"] *= shape.Rb**-0.5
    return t


def cast(tensors: dict, dtype, frozen_dtype=None, factor_dtype=None) -> dict:
    """x, dy and p in `dtype`, weight and bias in `frozen_dtype`, the factors in `factor_dtype`."""
    kinds = dict.fromkeys(("weight", "bias"), frozen_dtype or dtype)
    kinds |= dict.fromkeys(FACTORS, factor_dtype or dtype)
    return {n: None if t is None else t.to(kinds.get(n, dtype)) for n, t in tensors.items()}


def forward(tensors: dict, strategy="split", save_p=True):
    given = [tensors[name] for name in NAMES]
    return cpp_backend.forward(*given, save_p=save_p, strategy=strategy)


def backward(tensors: dict, strategy="split", needs=ALL) -> dict:
    given = [tensors[name] for name in ("dy", "x", "weight", "p", *FACTORS)]
    grads = cpp_backend.backward(*given, needs=needs, strategy=strategy)
    return {name: grad for name, grad in zip(GRADS, grads, strict=True) if grad is not None}


def both(tensors: dict, dy, strategy="split") -> dict:
    y, p = forward(tensors, strategy)
    return {"y": y, "p": p, **backward(tensors | {"dy": dy, "p": p}, strategy)}


def exact(tensors: dict) -> dict:
    """All results in float64, of the tensors as they are and of the P among them, if any."""
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    y = reference.low_rank_linear(*(wide[name] for name in NAMES))
    p = wide["x"] @ wide["down"]
    b = torch_backend.fold(wide["core"], wide["up"])
    s = wide["dy"] @ b
    d_core, d_up = torch_backend.unfold_grads(
        wide["dy"].T @ wide.get("p", p), wide["core"], wide["up"], True, True
    )
    found = {
        "y": y,
        "p": p,
        "dx": wide["dy"] @ wide["weight"] + s @ wide["down"].T,
        "d_down": wide["x"].T @ s,
        "d_core": d_core,
        "d_up": d_up,
    }
    return {name: t for name, t in found.items() if t is not None}


def largest_error(found, right) -> float:
    return ((found.double() - right).abs().max() / right.abs().max()).item()

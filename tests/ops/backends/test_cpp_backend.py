"""The C++ operators on the CPU, called directly: every edge of their blocks, strides, dtypes,
threads, instruction sets, and arguments that they must refuse.

csrc/build/asan.sh runs this file on a library with AddressSanitizer and UBSan. What all backends
have in common is in test_functional.py, test_gradients.py and test_autocast.py.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from efft_kernels import low_rank_linear, reference
from efft_kernels.ops import checks
from efft_kernels.ops.backends import cpp_backend, native_library, torch_backend

if (missing := native_library.not_built("_native")) is not None:
    pytest.skip(missing, allow_module_level=True)
assert cpp_backend.unavailable() is None, "what was built can be loaded"

SANITIZED = native_library.NATIVE_LIBRARY_VARIABLE in os.environ
ISA_VARIABLE = "EFFT_KERNELS_CPU_ISA"
NAMES = ("x", "weight", "bias", "down", "core", "up")
GRADS = ("dx", "d_weight", "d_bias", "d_down", "d_core", "d_up")
FACTORS = ("down", "core", "up")
ALL = (True, False, False, True, True, True)  # those that the operator makes

# Compiled in csrc/cpu: a step of the inner dimension, rows of a block, columns of a panel (float32
# and float64, for each instruction set), rows of a task of the fold.
DEPTH, BLOCK_ROWS, PANELS, CHUNK = 384, 200, (4, 8, 12, 24, 48), 512


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

    def of(self) -> dict[str, tuple[int, ...] | None]:
        rb = self.Rb if self.core else self.Ra
        return {
            "x": (self.M, self.K),
            "weight": (self.G * self.n, self.K),
            "bias": (self.G * self.n,) if self.bias else None,
            "down": (self.K, self.Ra),
            "core": (self.G, self.Ra, rb) if self.core else None,
            "up": (1 if self.core and self.shared else self.G, self.n, rb),
            "dy": (self.M, self.G * self.n),
        }


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


@pytest.fixture(params=cpp_backend.STRATEGIES)
def strategy(request) -> str:
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_workspace():
    """What the calling thread keeps from call to call starts as NaN, like every allocation."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    t = {name: torch.full((64, 64), torch.nan) for name in ("x", "weight", "down")}
    both(t | {"bias": None, "core": None, "up": torch.full((1, 64, 64), torch.nan)}, t["x"])
    yield
    torch.use_deterministic_algorithms(False)


def integers(shape: Shape, bound: int = 2) -> dict:
    """Whole numbers, so that sums are exact in every order and equality is bitwise; float64."""
    return {
        name: None if size is None else torch.randint(-bound, bound + 1, size).double()
        for name, size in shape.of().items()
    }


def reals(shape: Shape) -> dict:
    """Normal numbers, scaled so that both terms of y are of order one; float64."""
    t = {
        name: None if size is None else torch.randn(size, dtype=torch.float64)
        for name, size in shape.of().items()
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


def assert_exact(tensors: dict, strategy: str) -> None:
    """Every result is the float64 one, rounded once to its own dtype."""
    tensors = tensors | {"p": exact(tensors)["p"].to(tensors["x"].dtype)}
    right = exact(tensors)
    y, p = forward(tensors, strategy)
    found = {"y": y, "p": p, **backward(tensors, strategy)}
    assert found.keys() == right.keys()
    for name, t in right.items():
        of = {"d_down": "down", "d_core": "core", "d_up": "up"}.get(name, "x")
        assert t.numel() == 0 or t.abs().max() < 2**22
        assert found[name].dtype == tensors[of].dtype and found[name].is_contiguous()
        assert torch.equal(found[name], t.to(found[name].dtype)), name
    alone, none = forward(tensors, strategy, save_p=False)
    assert none is None and torch.equal(alone, y)


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


@pytest.mark.parametrize("dtypes", DTYPES, ids=name_of)
@pytest.mark.parametrize("form", FORMS)
def test_small_integers_are_exact(form, dtypes, strategy):
    assert_exact(cast(integers(FORMS[form], bound=1), *dtypes), strategy)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=name_of)
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
def test_beyond_every_block(shape, dtypes, strategy, threads):
    assert_exact(cast(integers(shape, bound=1), *dtypes), strategy)


ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1)
COLUMNS = (1, 2, 3, *(p + d for p in PANELS for d in (-1, 0, 1)), 95, 96, 97, DEPTH - 1, DEPTH,
           DEPTH + 1, 2 * DEPTH, CHUNK + 1)  # fmt: skip
RANKS = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 97, 127, 128, 129, 130)
EDGES = [
    *(Shape(M=M, bias=False) for M in ROWS),
    *(Shape(M=13, K=K) for K in COLUMNS),
    *(Shape(M=13, n=n, G=2) for n in COLUMNS),
    *(Shape(M=13, Ra=Ra) for Ra in RANKS),
    *(Shape(M=13, Rb=Rb, shared=False) for Rb in RANKS),
    *(Shape(M=13, Ra=Ra, core=False, G=1) for Ra in RANKS),
    *(Shape(M=1, K=1, n=1, G=G, Ra=1, Rb=1) for G in (1, 2, 7)),
    Shape(M=3001, K=1, n=1, G=1),
    Shape(M=2, K=5003, n=1),
    Shape(M=2, K=2, n=5003),
    Shape(M=5, K=3, n=2, G=101),
    # so wide that the thin products take fewer rows than a block has, and the fewest
    Shape(M=BLOCK_ROWS + 33, K=1451, n=1511, G=1, Ra=3, Rb=2),
    Shape(M=37, K=20011, n=3, G=1),
    Shape(M=37, K=3, n=20011, G=1),
]


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_every_size_around_a_block(strategy, wide):
    """One test for all, since a case takes a millisecond."""
    for shape in EDGES:
        try:
            assert_exact(cast(integers(shape, bound=1), F64 if wide else F32), strategy)
        except AssertionError as error:
            raise AssertionError(f"{shape}: {error}") from error


def with_nan(t, *pads):
    """A view of t's values in a buffer whose other elements are NaN."""
    return torch.nn.functional.pad(t, pads, value=torch.nan)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "all dims turned": lambda t: (
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    ),
    "columns of a wider one": lambda t: with_nan(t, 3, 2)[..., 3:-2],
    "every second column": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "rows of a taller one": lambda t: with_nan(t, 0, 0, 3, 2)[..., 3:-2, :],
    "every second row": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -2)[..., 0, :],
    "offset": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t])[1:],
    "one row for all": lambda t: t[..., :1, :].expand_as(t),
    "one column for all": lambda t: t[..., :1].expand_as(t),
    "one number for all": lambda t: t.flatten()[0].expand_as(t),
    "rows overlap": lambda t: t.flatten()[: sum(t.shape)].as_strided(t.shape, (1,) * t.dim()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "dy", "p", "weight", *FACTORS])
def test_any_strides(name, layout, strategy):
    for dtypes in (DTYPES[0], DTYPES[4]):
        for form in ("own up", "no core"):
            t = cast(integers(FORMS[form], bound=1), *dtypes)
            t["p"] = torch.randint(-3, 4, (67, 7)).to(t["x"].dtype)
            if t[name] is None:
                continue
            t[name] = LAYOUTS[layout](t[name])
            right = exact({key: None if v is None else v.contiguous() for key, v in t.items()})
            y, p = forward(t, strategy)
            for key, found in {"y": y, "p": p, **backward(t, strategy)}.items():
                assert torch.equal(found, right[key].to(found.dtype)), key


@pytest.mark.parametrize("layout", ["every second", "offset", "one for all", "reads a row"])
def test_any_strides_of_the_bias(layout, strategy):
    t = cast(integers(FORMS["shared up"], bound=1), F32)
    bias = t["bias"]
    t["bias"] = {
        "every second": torch.stack([bias, torch.full_like(bias, torch.nan)], -1)[:, 0],
        "offset": with_nan(bias, 3, 2)[3:-2],
        "one for all": bias[:1].expand_as(bias),
        "reads a row": t["weight"][:, 3],
    }[layout]
    assert_exact(t, strategy)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_no_rows(dtype, strategy):
    """Nothing goes in; the gradients of the factors are zero, not unwritten."""
    t = cast(reals(Shape(M=0)), dtype)
    found = both(t, t["dy"], strategy)
    assert found["y"].shape == (0, 87) and found["p"].shape == (0, 7) and found["dx"].numel() == 0
    for name in FACTORS:
        grad = found[f"d_{name}"]
        assert grad.shape == t[name].shape and not grad.any()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_makes_what_is_asked_for(needs, strategy):
    """Every subset: the same gradients, nothing else, and x and P only where they are read."""
    wanted = (needs[0], False, False, *needs[1:])
    for form in FORMS.values():
        t = cast(reals(form), F32)
        t["p"] = forward(t, strategy)[1]
        everything = backward(t, strategy)
        given = t | {"x": t["x"] if needs[1] else None}
        if not needs[3] and not (needs[2] and form.core):
            given["p"] = None
        found = torch.ops.efft_kernels.native_bwd(
            *(given[name] for name in ("dy", "x", "weight", "p", *FACTORS)),
            sum(need << i for i, need in enumerate(wanted)),
            cpp_backend.STRATEGY_CODES[strategy],
        )
        for name, grad, need in zip(("dx", "d_down", "d_core", "d_up"), found, needs, strict=True):
            if need and name in everything:
                assert torch.equal(grad, everything[name]), name
            else:
                assert grad.shape == (0,), name


def largest_error(found, right) -> float:
    return ((found.double() - right).abs().max() / right.abs().max()).item()


@pytest.mark.parametrize(
    "dtypes", [DTYPES[0], DTYPES[2], DTYPES[3], DTYPES[4], DTYPES[1]], ids=name_of
)
@pytest.mark.parametrize("shape", [*FORMS.values(), WIDE, TALL], ids=[*FORMS, "wide", "tall"])
def test_error_budget(shape, dtypes, strategy):
    """At most twice the largest error of plain torch in the same dtypes, both against float64; of
    small problems over several draws, since the largest of a few numbers is a matter of luck. In
    half precision torch's `merged` rounds the sum, and ours has to be as good as its `split`."""
    in_torch = strategy if dtypes[0] == F32 else "split"
    ours, torchs = defaultdict(float), defaultdict(float)
    for _ in range(1 if shape in (WIDE, TALL) else 8):
        t = cast(reals(shape), *dtypes)
        given = [None if t[name] is None else t[name].to(dtypes[0]) for name in NAMES]
        y, p = torch_backend.forward(*given, save_p=True, strategy=in_torch)
        grads = torch_backend.backward(
            t["dy"], given[0], given[1], p, *given[3:], needs=ALL, strategy=in_torch
        )
        plain = {"y": y, "p": p, **dict(zip(GRADS, grads, strict=True))}
        found = both(t, t["dy"], strategy)
        for name, right in exact(t).items():
            ours[name] = max(ours[name], largest_error(found[name], right))
            torchs[name] = max(torchs[name], largest_error(plain[name], right))
    # float64 is judged by itself: no more than the rounding of a few thousand terms.
    for name, error in ours.items():
        assert error <= (2 * torchs[name] if dtypes[0] != F64 else 1e-14), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [WIDE, FORMS["own up"]], ids=["wide", "own up"])
def test_repeats_bit_for_bit(shape, dtype, strategy, threads):
    """For any number of threads; between numbers of threads within the rounding of the sums."""
    t = cast(reals(shape), dtype)
    first = both(t, t["dy"], strategy)
    for _ in range(5):
        again = both(t, t["dy"], strategy)
        assert all(torch.equal(first[name], again[name]) for name in first)
    torch.set_num_threads(1)
    for name, right in both(t, t["dy"], strategy).items():
        assert largest_error(first[name], right.double()) <= 4 * torch.finfo(dtype).eps, name


def test_two_callers_at_once(strategy):
    """Each has its own working memory; the operators run without Python's lock."""
    problems = [cast(reals(shape), dtype) for shape, dtype in ((WIDE, F32), (FORMS["own up"], F64))]
    problems.append(cast(reals(replace(WIDE, M=37)), BF16))
    right = [both(t, t["dy"], strategy) for t in problems]
    wrong = []

    def run(t, expected):
        for _ in range(15):
            found = both(t, t["dy"], strategy)
            wrong.extend(n for n in expected if not torch.equal(found[n], expected[n]))

    callers = [
        threading.Thread(target=run, args=each) for each in zip(problems, right, strict=True)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_a_bad_row_stays_alone(dtype, poison, strategy, threads):
    """Of x in y and P, of dY in dx: no other row changes, in its block or in the next."""
    t = cast(reals(Shape(M=BLOCK_ROWS + 27, K=DEPTH + 5, bias=False)), dtype)
    clean = both(t, t["dy"], strategy)
    bad = [0, 5, 8, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 26]
    good = [row for row in range(BLOCK_ROWS + 27) if row not in bad]
    spoiled = {name: t[name].clone() for name in ("x", "dy")}
    for i, row in enumerate(bad):
        spoiled["x"][row, 71 * i] = spoiled["dy"][row, 16 * i] = poison
    found = both(t | {"x": spoiled["x"]}, spoiled["dy"], strategy)
    for name in ("y", "p", "dx"):
        assert torch.equal(found[name][good], clean[name][good]), name
        assert not found[name][bad].isfinite().any(), name
    assert not found["d_down"].isfinite().all() and not found["d_up"].isfinite().all()


def test_infinities_come_out_as_of_torch(strategy):
    t = cast(integers(Shape(M=9, core=False, shared=False), bound=1), F32)
    t["x"][3, 5] = torch.inf
    for name in ("weight", "up", "down"):
        t[name].clamp_(min=1)  # no product with zero and no two infinities of different sign
    t["x"][3] = t["x"][3].abs()
    y, p = forward(t, strategy)
    assert (y[3] == torch.inf).all() and (p[3] == torch.inf).all()
    assert y[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


def test_bfloat16_is_rounded_once_to_nearest_even(strategy):
    """1 + 2^-9 and its neighbours: ties go to even, a float32 sum is not cut off."""
    for terms, right in (
        ((1, 2**-9), 1.0), ((1, 2**-8), 1.0), ((1, 2**-8, 2**-12), 1 + 2**-7),
        ((1 + 2**-7, 2**-8), 1 + 2**-6), ((-1, -(2**-8), -(2**-12)), -1 - 2**-7),
        ((3.3895e38, 3.3895e38), torch.inf),
    ):  # fmt: skip
        t = {
            "x": torch.tensor([terms], dtype=BF16),
            "weight": torch.ones(1, len(terms), dtype=BF16),
            "bias": None,
            "down": torch.zeros(len(terms), 1, dtype=BF16),
            "core": None,
            "up": torch.zeros(1, 1, 1, dtype=BF16),
        }
        assert forward(t, strategy)[0].item() == right


@pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps freed memory")
def test_memory_does_not_grow(strategy):
    t = cast(reals(WIDE), F32)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def call(count):
        for _ in range(count):
            both(t, t["dy"], strategy)

    call(20)
    before = resident_bytes()
    call(200)
    assert resident_bytes() - before < 4 << 20  # y alone is 0.7 MiB a call


def operator_arguments(operator: str, t: dict) -> tuple:
    if operator == "fwd":
        return (*(t[name] for name in NAMES), True, cpp_backend.STRATEGY_CODES["split"])
    given = (t[name] for name in ("dy", "x", "weight", "p", *FACTORS))
    return (*given, 0b111001, cpp_backend.STRATEGY_CODES["merged"])


def call_operator(operator: str, t: dict):
    return getattr(torch.ops.efft_kernels, f"native_{operator}")(*operator_arguments(operator, t))


# More than one line, so that a wrong size would be read beyond its end.
TARGET = Shape(M=19, K=53, n=23, G=3, Ra=7, Rb=5)


def operands_of(operator: str, shape: Shape = TARGET) -> dict:
    t = cast(integers(shape, bound=1), F32)
    t["p"] = t["x"] @ t["down"]
    return {
        n: v for n, v in t.items() if n not in (("bias",) if operator == "bwd" else ("dy", "p"))
    }


@st.composite
def broken_calls(draw):
    """(operator, operands) with one to three of them of another shape or dtype, or missing."""
    operator = draw(st.sampled_from(["fwd", "bwd"]))
    t = operands_of(operator, replace(TARGET, core=draw(st.booleans()), shared=draw(st.booleans())))
    present = [name for name, v in t.items() if v is not None]
    for name in draw(st.lists(st.sampled_from(present), min_size=1, max_size=3, unique=True)):
        shape = list(t[name].shape)
        match draw(st.sampled_from(["resize", "drop", "add", "turn", "scalar", "dtype", "none"])):
            case "resize":
                at = draw(st.integers(0, len(shape) - 1))
                shape[at] = draw(st.sampled_from([0, 1, shape[at] - 1, shape[at] + 1]))
            case "drop":
                shape.pop(draw(st.integers(0, len(shape) - 1)))
            case "add":
                shape.insert(draw(st.integers(0, len(shape))), draw(st.integers(0, 2)))
            case "turn":
                shape.reverse()
            case "scalar":
                shape = []
            case "dtype":
                kinds = [F16, F64, BF16, torch.int8, torch.int64, torch.bool, torch.complex64]
                t[name] = t[name].to(draw(st.sampled_from(kinds)))
                continue
            case "none":
                if name in ("bias", "core", "p") or (operator == "bwd" and name == "x"):
                    t[name] = None
                continue
        t[name] = torch.ones(shape)
    return operator, t


def acceptable(operator: str, t: dict) -> bool:
    """Whether the operands fit together, by the checks that every Python call goes through."""
    x = t["x"] if operator == "fwd" else t["dy"]
    kernel = (F32, F64, BF16)
    if any(v is not None and v.dtype not in (*kernel, F16) for v in t.values()):
        return False
    if x.dtype not in kernel or x.dim() != 2 or t["weight"].numel() == 0:
        return False
    if operator == "bwd":
        m, (x, p) = x.shape[0], (t["x"], t["p"])
        if x is None or p is None or x.dtype not in kernel or p.dtype not in kernel:
            return False
        if t["weight"].dim() != 2 or t["dy"].shape[1] != t["weight"].shape[0]:
            return False
        if x.dim() != 2 or x.shape[0] != m or t["down"].dim() != 2:
            return False
        if p.shape != (m, t["down"].shape[1]):
            return False
    try:
        checks.check_shapes(x, *(t.get(name) for name in NAMES[1:]))
    except ValueError:
        return False
    return True


@hypothesis.settings(max_examples=400)
@hypothesis.given(broken_calls())
def test_operands_that_do_not_fit_are_refused(call):
    """Whatever the shapes and dtypes: an error, or the right result; nothing is read beyond its end
    (under AddressSanitizer that would end the run)."""
    operator, t = call
    if not acceptable(operator, t):
        with pytest.raises(RuntimeError, match="efft_kernels"):
            call_operator(operator, t)
        return
    found = dict(zip(("y", "p") if operator == "fwd" else ("dx", "d_down", "d_core", "d_up"),
                     call_operator(operator, t), strict=True))  # fmt: skip
    right = exact({"bias": None, "dy": torch.zeros_like(found.get("y", t["x"])), **t})
    for name in found:
        if name in right:
            assert torch.equal(found[name], right[name].to(found[name].dtype)), name


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        ("fwd", {"x": (19,)}, r"x must be \[M, K\]"),
        ("fwd", {"x": (19, 54)}, r"weight must be \[N >= 1, K >= 1\]"),
        ("fwd", {"bias": (1,)}, r"bias must be \[N\]"),
        ("fwd", {"bias": (69, 1)}, r"bias must be \[N\]"),
        ("fwd", {"down": (53, 0)}, "up must be"),
        ("fwd", {"core": ()}, r"core must be \[G, Ra, Rb\]"),
        ("fwd", {"core": (3, 7)}, r"core must be \[G, Ra, Rb\]"),
        ("fwd", {"core": (3, 6, 5)}, r"core must be \[G, Ra, Rb\]"),
        ("fwd", {"core": (3, 7, 6)}, r"core must be \[G, Ra, Rb\]"),
        ("fwd", {"core": (0, 7, 5)}, "up must be"),
        ("fwd", {"core": None}, "up must be .* where core is None|up must be"),
        ("fwd", {"up": (2, 23, 5)}, "up must be"),
        ("bwd", {"dy": (19, 68)}, "weight must be"),
        ("bwd", {"x": (18, 53)}, "x must be .* for the gradient of down"),
        ("bwd", {"x": None}, "x must be .* for the gradient of down"),
        ("bwd", {"p": (18, 7)}, "p must be .* for the gradients of core and up"),
        ("bwd", {"p": (19, 6)}, "p must be .* for the gradients of core and up"),
        ("bwd", {"p": None}, "p must be .* for the gradients of core and up"),
        ("bwd", {"weight": (69, 0)}, "weight must be"),
    ],
    ids=str,
)
def test_refusals_name_the_argument(operator, changes, message):
    t = operands_of(operator)
    for name, shape in changes.items():
        t[name] = None if shape is None else torch.ones(shape)
    with pytest.raises(RuntimeError, match=f"efft_kernels: {message}"):
        call_operator(operator, t)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.int64, torch.complex64, F16], ids=str
)
@pytest.mark.parametrize(
    ("operator", "name"),
    [("fwd", name) for name in NAMES]
    + [("bwd", name) for name in ("dy", "x", "weight", "p", *FACTORS)],
)
def test_a_dtype_is_never_read_as_another(operator, name, dtype):
    """float16 parameters are widened first; as x, dY or P it is refused, like what is not real."""
    t = operands_of(operator)
    right = call_operator(operator, t)
    t[name] = t[name].to(dtype)
    if dtype == F16 and name not in ("x", "dy", "p"):
        for found, expected in zip(call_operator(operator, t), right, strict=True):
            assert torch.equal(found.float(), expected)
        return
    with pytest.raises(RuntimeError, match=f"efft_kernels: {name} must be"):
        call_operator(operator, t)


@pytest.mark.parametrize("code", [-1, 0, 3, 1 << 40])
def test_an_unknown_strategy_is_refused(code):
    for operator in ("fwd", "bwd"):
        arguments = operator_arguments(operator, operands_of(operator))[:-1]
        with pytest.raises(RuntimeError, match=r"strategy must be 1 \(split\) or 2 \(merged\)"):
            getattr(torch.ops.efft_kernels, f"native_{operator}")(*arguments, code)


@pytest.mark.parametrize("operator", ["fwd", "bwd"])
def test_memory_that_was_given_back_is_refused(operator):
    """As FSDP leaves the parameters it has resharded."""
    for name in operands_of(operator):
        t = operands_of(operator)
        t[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="must be in memory"):
            call_operator(operator, t)


def test_other_kinds_of_tensor_are_refused():
    for make in (torch.Tensor.to_sparse, lambda t: t.to("meta"), torch.Tensor.to_mkldnn):
        t = operands_of("fwd")
        t["down"] = make(t["down"])
        with pytest.raises(NotImplementedError, match="native_fwd"):
            call_operator("fwd", t)


def test_one_backend_for_every_caller(strategy):
    """The public operator with backend='cpp' is these operators, values and gradients."""
    t = cast(reals(FORMS["shared up"]), F32)
    right = both(t, t["dy"], strategy)
    leaves = {name: t[name].clone().requires_grad_(name in ("x", *FACTORS)) for name in NAMES}
    y = low_rank_linear(**leaves, backend="cpp", strategy=strategy)
    y.backward(t["dy"])
    assert torch.equal(y, right["y"]) and torch.equal(leaves["x"].grad, right["dx"])
    assert all(torch.equal(leaves[name].grad, right[f"d_{name}"]) for name in FACTORS)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


HERE_RUNS = {
    "avx512": torch.cpu._is_avx512_supported,
    "avx2": torch.cpu._is_avx2_supported,
    "baseline": lambda: True,
}


@pytest.mark.slow
@pytest.mark.parametrize("isa", HERE_RUNS)
def test_every_instruction_set(isa):
    """This file again, with the kernels of each in a process of its own."""
    if not HERE_RUNS[isa]():
        pytest.skip(f"this processor has no {isa}")
    if os.environ.get(ISA_VARIABLE) == isa:
        pytest.skip("all other tests of this run are it")
    options = ("-q", "-p", "no:cacheprovider", "--capture=sys", "--benchmark-disable")
    chosen = "exact or every_size or strides or budget"
    done = python(
        "-m", "pytest", *options, "-m", "not slow", "-k", chosen, __file__, **{ISA_VARIABLE: isa}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


CALL = """
import torch
from efft_kernels import low_rank_linear
print(low_rank_linear(*(torch.ones(s) for s in ((2, 3), (4, 3), (4,), (3, 1))), None,
                      torch.ones(1, 4, 1)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx1024", "", "AVX2"])
def test_an_unknown_instruction_set_is_an_error(isa):
    done = python("-c", CALL, **{ISA_VARIABLE: isa})
    assert done.returncode == 1
    assert f"{ISA_VARIABLE} must be avx512, avx2 or baseline" in done.stderr
    assert done.stderr.rstrip().endswith(f"got {isa}".rstrip())

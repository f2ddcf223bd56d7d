"""Rounding, NaN and infinity in the C++ operators, and the same bits from call to call."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from efft_kernels.ops.backends import native_library, torch_backend

from .operators import (
    ALL,
    BF16,
    BLOCK_ROWS,
    DEPTH,
    DTYPES,
    EVEN,
    F32,
    F64,
    FORMS,
    GRADS,
    NAMES,
    TALL,
    WIDE,
    Shape,
    both,
    cast,
    exact,
    forward,
    integers,
    largest_error,
    name_of,
    reals,
)

SANITIZED = native_library.NATIVE_LIBRARY_VARIABLE in os.environ


@pytest.mark.parametrize(
    "dtypes", [DTYPES[0], DTYPES[2], DTYPES[3], DTYPES[4], DTYPES[1]], ids=name_of
)
@pytest.mark.parametrize(
    "shape", [*FORMS.values(), WIDE, TALL, EVEN], ids=[*FORMS, "wide", "tall", "even"]
)
def test_error_budget(shape, dtypes, strategy):
    """At most twice the largest error of plain torch in the same dtypes, both against float64; of
    small problems over several draws, since the largest of a few numbers is a matter of luck. In
    half precision torch's `merged` rounds the sum, and ours has to be as good as its `split`."""
    in_torch = strategy if dtypes[0] == F32 else "split"
    ours, torchs = defaultdict(float), defaultdict(float)
    for _ in range(3 if shape in (WIDE, TALL, EVEN) else 8):
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


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_infinities_come_out_as_of_torch(dtype, strategy):
    """In bfloat16, too, where an odd rank leaves P's last column without one to be paired with."""
    t = cast(integers(Shape(M=9, K=72, core=False, shared=False), bound=1), dtype)
    t["x"][3, 5] = torch.inf
    for name in ("weight", "up", "down"):
        t[name].clamp_(min=1)  # no product with zero and no two infinities of different sign
    t["x"][3] = t["x"][3].abs()
    y, p = forward(t, strategy)
    assert (y[3] == torch.inf).all() and (p[3] == torch.inf).all()
    assert y[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


def test_bfloat16_is_rounded_once_to_nearest_even(strategy):
    """1 + 2^-9 and its neighbours: ties go to even, a float32 sum is not cut off. In columns enough
    for a vector, and some beyond it."""
    for terms, right in (
        ((1, 2**-9), 1.0), ((1, 2**-8), 1.0), ((1, 2**-8, 2**-12), 1 + 2**-7),
        ((1 + 2**-7, 2**-8), 1 + 2**-6), ((-1, -(2**-8), -(2**-12)), -1 - 2**-7),
        ((3.3895e38, 3.3895e38), torch.inf),
    ):  # fmt: skip
        t = {
            "x": torch.tensor([terms], dtype=BF16),
            "weight": torch.ones(19, len(terms), dtype=BF16),
            "bias": None,
            "down": torch.zeros(len(terms), 1, dtype=BF16),
            "core": None,
            "up": torch.zeros(1, 19, 1, dtype=BF16),
        }
        assert forward(t, strategy)[0].tolist() == [[right] * 19]


def test_every_nan_stays_one_in_bfloat16(strategy):
    """Rounded like a number, one whose bits are all set would carry into its sign, and come out as
    zero."""
    t = cast(integers(Shape(M=2, G=1, n=3 * 7), bound=1), BF16, F32)
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    t["bias"] = bits.view(F32).repeat(7)
    assert forward(t, strategy)[0].isnan().all()


def test_float16_operands_keep_their_bits(strategy):
    """1 + 2^-10, which bfloat16 has not, in every one of them: its product with itself is exact in
    float32."""
    exact_in_half = 1 + 2**-10
    t = {
        name: torch.full(size, exact_in_half, dtype=torch.float16)
        for name, size in (("weight", (3, 1)), ("bias", (3,)), ("down", (1, 1)), ("up", (1, 3, 1)))
    }
    y, p = forward({"x": torch.ones(2, 1), "core": None, **t}, strategy)
    assert (p == exact_in_half).all() and (y == 2 * exact_in_half + exact_in_half**2).all()


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

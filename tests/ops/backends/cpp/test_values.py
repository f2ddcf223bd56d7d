"""The C++ operators are exact at every edge of their blocks, for any strides and dtypes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from efft_kernels import low_rank_linear
from efft_kernels.ops.backends import cpp_backend

from .operators import (
    BF16,
    BLOCK_ROWS,
    CHUNK,
    DEPTH,
    DTYPES,
    EVEN,
    F32,
    F64,
    FACTORS,
    FORMS,
    NAMES,
    PANELS,
    RANGE_ROWS,
    TALL,
    TILE_COLUMNS,
    TILE_ROWS,
    WIDE,
    Shape,
    backward,
    both,
    cast,
    exact,
    forward,
    integers,
    name_of,
    reals,
)


def assert_exact(tensors: dict, strategy: str) -> None:
    """Every result is the float64 one, rounded once to its own dtype."""
    tensors = tensors | {"p": exact(tensors)["p"].to(tensors["x"].dtype)}
    right = exact(tensors)
    # First, since after the next the working memory holds the P that it has to make itself.
    alone, none = forward(tensors, strategy, save_p=False)
    y, p = forward(tensors, strategy)
    found = {"y": y, "p": p, **backward(tensors, strategy)}
    assert found.keys() == right.keys()
    for name, t in right.items():
        of = {"d_down": "down", "d_core": "core", "d_up": "up"}.get(name, "x")
        assert t.numel() == 0 or t.abs().max() < 2**22
        assert found[name].dtype == tensors[of].dtype and found[name].is_contiguous()
        assert torch.equal(found[name], t.to(found[name].dtype)), name
    assert none is None and torch.equal(alone, y)


@pytest.mark.parametrize("dtypes", DTYPES, ids=name_of)
@pytest.mark.parametrize("form", FORMS)
def test_small_integers_are_exact(form, dtypes, strategy):
    assert_exact(cast(integers(FORMS[form], bound=1), *dtypes), strategy)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=name_of)
@pytest.mark.parametrize("shape", [WIDE, TALL, EVEN], ids=["wide", "tall", "even"])
def test_beyond_every_block(shape, dtypes, strategy, threads):
    t = integers(shape, bound=1)
    # In bfloat16 P, B and S are rounded: all are whole numbers up to 256, which it has exactly.
    t["dy"] *= torch.rand(t["dy"].shape) < 0.25
    assert_exact(cast(t, *dtypes), strategy)


ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33,
        *(n + d for n in (BLOCK_ROWS, TILE_ROWS, RANGE_ROWS) for d in (-1, 0, 1)))  # fmt: skip
COLUMNS = (1, 2, 3, *(n + d for n in (*PANELS, *TILE_COLUMNS, DEPTH) for d in (-1, 0, 1)),
           2 * DEPTH, CHUNK + 1)  # fmt: skip
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
    # several tiles each way, in two steps, and ranges of which the last is cut off
    Shape(M=2 * TILE_ROWS + 9, K=DEPTH + 5, n=401, G=1, Ra=3, Rb=2),
    Shape(M=2 * RANGE_ROWS + 31, K=53, n=67, G=1, Ra=3, Rb=2),
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


@pytest.mark.parametrize("threads", [5], indirect=True)
@pytest.mark.parametrize("columns", [123, 267])
def test_tiles_of_several_panels(columns, strategy, threads):
    """Which these numbers of columns, rows and threads make, each for two instruction sets; where
    threads can be even, tiles are as narrow as they can be."""
    for shape in (
        Shape(M=397, K=170, n=columns, G=1, Ra=3, Rb=2),
        Shape(M=397, K=columns, n=170, G=1, Ra=3, Rb=2),
    ):
        assert_exact(cast(integers(shape, bound=1), F32), strategy)


# Inner dimensions of whole pairs, around a square of them (32 numbers) and a step (two a level).
EVENS = (2, 4, 30, 32, 34, 62, 64, 66, 98, *(2 * DEPTH + d for d in (-2, 0, 2, 34)))
PAIRS = [
    *(Shape(M=13, K=K, n=50, G=1, Ra=3, Rb=2) for K in EVENS),
    *(Shape(M=13, K=50, n=n, G=1, Ra=3, Rb=2) for n in EVENS),
    *(Shape(M=M, K=50, n=34, G=1, Ra=3, Rb=2) for M in (1, 2, 3, 7, 8, 9, BLOCK_ROWS + 1)),
    *(Shape(M=13, K=50, n=34, G=1, core=False, Ra=Ra) for Ra in RANKS),
    # whole vectors, which are written in bfloat16 at once: 16 to 240 columns, in one step and more
    *(Shape(M=2 * TILE_ROWS + 9, K=32, n=n, G=1, Ra=3, Rb=2) for n in (16, 48, 80, 192, 240)),
    Shape(M=BLOCK_ROWS + 9, K=2 * DEPTH, n=2 * DEPTH + 2, G=1, Ra=3, Rb=2),
    Shape(M=BLOCK_ROWS + 9, K=2 * DEPTH + 32, n=64, G=1, Ra=3, Rb=2),
    *(Shape(M=13, K=K, n=66, G=1, core=False, bias=False) for K in (33, 65, 2 * DEPTH + 1)),
    # many tiles both ways, blocks and slots of the thin products, and ranges
    Shape(M=2 * BLOCK_ROWS + 11, K=2 * DEPTH + 34, n=398, G=1, Ra=3, Rb=2),
    Shape(M=2 * RANGE_ROWS + 31, K=54, n=68, G=1, Ra=3, Rb=2),
]


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (BF16, F32, F32)], ids=name_of)
def test_bfloat16_at_every_edge_of_pairs(dtypes, strategy, threads):
    for shape in PAIRS:
        try:
            assert_exact(cast(integers(shape, bound=1), *dtypes), strategy)
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
    even = {"K": 72, "n": 30}  # read in pairs in bfloat16, of which DTYPES[4] has x and dY
    for dtypes, sizes in ((DTYPES[0], {}), (DTYPES[4], {}), (DTYPES[4], even)):
        for form in ("own up", "no core"):
            t = cast(integers(replace(FORMS[form], **sizes), bound=1), *dtypes)
            t["p"] = torch.randint(-3, 4, (67, 7)).to(t["x"].dtype)
            if t[name] is None:
                continue
            t[name] = LAYOUTS[layout](t[name])
            right = exact({key: None if v is None else v.contiguous() for key, v in t.items()})
            y, p = forward(t, strategy)
            for key, found in {"y": y, "p": p, **backward(t, strategy)}.items():
                assert torch.equal(found, right[key].to(found.dtype)), key


@pytest.mark.parametrize("layout", ["columns of a wider one", "rows of a taller one"])
@pytest.mark.parametrize("core", [False, True])
def test_factors_of_whole_vectors(core, layout, strategy):
    """Their columns need no padding, and `down` is read where it lies if its rows follow each
    other; 16 is a whole number of vectors of every instruction set."""
    t = cast(integers(Shape(Ra=16, Rb=16, core=core, shared=False), bound=1), F32)
    for name in FACTORS:
        t[name] = None if t[name] is None else LAYOUTS[layout](t[name])
    assert_exact(t, strategy)


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
        given = t | {"x": t["x"] if needs[1] else None}
        if not needs[3] and not (needs[2] and form.core):
            given["p"] = None
        found = torch.ops.efft_kernels.native_bwd(
            *(given[name] for name in ("dy", "x", "weight", "p", *FACTORS)),
            sum(need << i for i, need in enumerate(wanted)),
            cpp_backend.STRATEGY_CODES[strategy],
        )
        # After it, since the working memory then holds what the others alone make.
        everything = backward(t, strategy)
        for name, grad, need in zip(("dx", "d_down", "d_core", "d_up"), found, needs, strict=True):
            if need and name in everything:
                assert torch.equal(grad, everything[name]), name
            else:
                assert grad.shape == (0,), name


def test_one_backend_for_every_caller(strategy):
    """The public operator with backend='cpp' is these operators, values and gradients."""
    t = cast(reals(FORMS["shared up"]), F32)
    right = both(t, t["dy"], strategy)
    leaves = {name: t[name].clone().requires_grad_(name in ("x", *FACTORS)) for name in NAMES}
    y = low_rank_linear(**leaves, backend="cpp", strategy=strategy)
    y.backward(t["dy"])
    assert torch.equal(y, right["y"]) and torch.equal(leaves["x"].grad, right["dx"])
    assert all(torch.equal(leaves[name].grad, right[f"d_{name}"]) for name in FACTORS)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[2]], ids=name_of)
def test_a_row_has_the_same_bits_in_every_batch(dtypes, strategy, threads):
    """y, P and dX are summed in the same order whatever rows are beside a row."""
    shape = Shape(M=TILE_ROWS + 77, K=DEPTH + 20, n=68, G=3, Ra=16, Rb=5)
    t = cast(reals(shape), *dtypes)
    right = both(t, t["dy"], strategy)
    for first, rows in ((0, 1), (0, 9), (3, 13), (BLOCK_ROWS - 3, 50), (TILE_ROWS - 5, 82)):
        some = {name: t[name][first : first + rows] for name in ("x", "dy")}
        found = both(t | some, some["dy"], strategy)
        for name in ("y", "p", "dx"):
            assert torch.equal(found[name], right[name][first : first + rows]), (name, first)

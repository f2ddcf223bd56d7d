"""The cost model: what it picks, why, and that measurements overrule it."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import timeit
from pathlib import Path

import pytest
import torch

from benchmarks.lib.shapes import models
from efft_kernels.ops import cost_model
from efft_kernels.ops.backends import cpp_backend, cuda_backend, torch_backend, triton
from efft_kernels.ops.backends.triton.configs import PassConfig
from efft_kernels.ops.backends.triton.cost import default_tiling, launches
from efft_kernels.ops.backends.triton.tuning import pass_programs
from efft_kernels.ops.cost_model import DEVICES, Device, Problem, seconds
from efft_kernels.ops.explain import explain
from efft_kernels.testing.operands import Shape, operands

BACKENDS = (torch_backend, cpp_backend, triton, cuda_backend)
QKV = Problem(12608, 768, 2304, 3, 16, True, 2, 2, "cuda")


@pytest.fixture
def forget():
    yield
    cost_model._measured.clear()
    cost_model.choose.cache_clear()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_merged_is_never_picked_for_half_precision_weights(training, backward):
    for M in (1, 197, 100_000):
        for rank in (1, 16, 128, 4096):
            problem = QKV._replace(M=M, rank=rank, training=training, backward=backward)
            assert cost_model.choose(problem, triton) != "merged"
            assert cost_model.choose(problem, torch_backend) == "split"


def test_merged_is_picked_for_float32_weights_under_autocast():
    """The cast is made anyway, and adding ΔW in float32 before it is nearly free."""
    e = explain(
        *(12608, 768, 2304, 3, 16), device="H200", weight_dtype=torch.float32, backend="triton"
    )
    assert e.chosen == "merged"


def test_a_rank_beyond_the_kernels_is_planned_in_torch():
    e = explain(1024, 768, 768, rank=256, device="H200")
    assert e.chosen == "split"
    assert "rank 256 is above 128" in e.excluded["fused"]


def test_the_problem_of_a_call():
    shape = Shape(M=5, K=7, n=11, G=3, Ra=4, Rb=2)
    x, weight, _, *factors = operands(shape, torch.float16, factor_dtype=torch.float32).values()
    found = Problem.of(x, weight.double(), *factors, training=False)
    assert found == Problem(5, 7, 33, 3, 4, False, 8, 2, "cpu", False, 4)
    found = Problem.of(
        x, weight, factors[0], None, torch.zeros(2, 5, 4), training=True, backward=True
    )
    assert found == Problem(5, 7, 33, 2, 4, True, 2, 2, "cpu", True, 4)


def test_arithmetic_of_one_forward():
    """fused on ViT-B's qkv: each operand's bytes once, and P in the loop at wgmma's price."""
    (gemm,) = launches(QKV, "fused", DEVICES["H200"])
    assert gemm.name == "gemm"
    x, w, y, p = 12608 * 768, 768 * 2304, 12608 * 2304, 12608 * 16
    factors = (768 + 2304) * 16 + 3 * 16 * 16
    assert gemm.bytes_moved == 2 * (x + w + y + p + factors + 2304)
    main, share, last = 2 * 12608 * 768 * 2304, 96 / 256, 2 * 12608 * 2304 * 16
    assert gemm.flops == pytest.approx(main * (1 + share) + last)


@pytest.mark.parametrize("m", [1, 255, 256, 257, 1153, 12608, 100_000])
@pytest.mark.parametrize("k", [41, 129, 768, 40_000])
def test_default_partial_sums_are_those_of_the_launches(m, k):
    thin_grad, tall_grad = (PassConfig(rows, 128, 0, 4, 2) for rows in (128, 64))
    assert default_tiling(QKV._replace(M=m, K=k), 132) == (
        pass_programs("thin_grad", m, 2304, thin_grad, 132),
        pass_programs("tall_grad", m, k, tall_grad, 132),
    )
    assert pass_programs("thin", m, k, tall_grad, 132) == -(-m // 64)
    assert default_tiling(QKV, 132) == (99, 44)
    assert default_tiling(QKV._replace(K=128), 132) == (99, 50)
    assert default_tiling(QKV._replace(M=100_000), 132) == (264, 44)


@pytest.mark.parametrize("strategy", ["fused", "split"])
def test_factors_are_copied_only_where_a_kernel_cannot_read_them(strategy):
    def names(problem):
        return [launch.name for launch in launches(problem, strategy, DEVICES["H200"])]

    forward = ["gemm"] if strategy == "fused" else ["thin", "gemm"]
    backward = ["thin_grad", "gemm", "tall_grad", "reduce"]
    assert names(QKV) == forward
    assert names(QKV._replace(backward=True)) == backward
    wide = QKV._replace(factor_bytes=4)
    assert names(wide) == (["fold", "gemm"] if strategy == "fused" else forward)
    assert names(wide._replace(backward=True)) == backward
    assert names(QKV._replace(rank=32)) == forward
    high = QKV._replace(rank=64)
    assert names(high).count("fold") == 1 and names(wide._replace(rank=64)).count("fold") == 2
    assert names(high._replace(backward=True))[-2:] == ["unfold", "unfold"]


AFTER = ["tall_grad", "reduce", "unfold"]  # the gradients, after S


@pytest.mark.parametrize(
    ("strategy", "changes", "expected"),
    [
        ("fused", {}, ["fold", "gemm"]),
        ("fused", {"rank": 32}, ["fold", "thin", "gemm"]),  # P is in the loop up to rank 16
        ("fused", {"M": 64}, ["fold", "thin", "gemm"]),  # too few tiles for the sm_90a kernel
        ("fused", {"weight_bytes": 4}, ["cast", "fold", "gemm"]),
        ("split", {}, ["fold", "thin", "gemm"]),
        ("merged", {"weight_bytes": 4}, ["fold", "thin", "fold", "merge", "library gemm"]),
        ("merged", {"weight_bytes": 4, "training": False}, ["fold", "merge", "library gemm"]),
        ("fused", {"backward": True}, ["fold", "gemm", "tall_grad", *AFTER]),
        ("split", {"backward": True}, ["fold", "thin_grad", *AFTER, "gemm"]),
        ("split", {"backward": True, "rank": 64}, ["fold", "thin", "tall_grad", *AFTER, "gemm"]),
        (
            "merged",
            {"backward": True},
            ["fold", "thin_grad", *AFTER, "fold", "merge", "library gemm"],
        ),
    ],
    ids=str,
)
def test_cuda_is_priced_by_its_own_launches(strategy, changes, expected):
    """As csrc/cuda/ops.cpp orders them: it folds whatever the rank, and never reads a wide weight
    in the GEMM."""
    found = cuda_backend.launches(QKV._replace(**changes), strategy, DEVICES["H200"])
    assert [launch.name for launch in found] == expected


def test_cuda_has_p_in_the_loop_on_sm_90_alone():
    def names(device):
        return [launch.name for launch in cuda_backend.launches(QKV, "fused", DEVICES[device])]

    assert names("H200") == names("H100") == ["fold", "gemm"]
    assert names("A100") == names("B200") == ["fold", "thin", "gemm"]


@pytest.mark.parametrize("sizes", [(768, 2304), (768, 768), (768, 3072), (3072, 768)], ids=str)
def test_cuda_computes_p_in_the_loop_of_the_forward_and_s_before_that_of_dx(sizes):
    """As measured on an H100."""
    for backward, best in ((False, "fused"), (True, "split")):
        problem = QKV._replace(K=sizes[0], N=sizes[1], backward=backward)
        predicted, _ = cost_model.candidates(problem, cuda_backend, DEVICES["H100"])
        assert min(predicted, key=predicted.__getitem__) == best


def test_arithmetic_of_one_forward_on_cuda():
    """12608 by 2304 are 9 waves of tiles with 192 columns, to which P adds 16."""
    fold, gemm = cuda_backend.launches(QKV, "fused", DEVICES["H200"])
    x, w, y, p = 12608 * 768, 768 * 2304, 12608 * 2304, 12608 * 16
    factors = (768 + 2304) * 16
    assert fold.bytes_moved == 2 * (2 * factors + 3 * 16 * 16)
    assert gemm.bytes_moved == 2 * (x + w + y + p + factors + 2304)
    main, last = 2 * 12608 * 768 * 2304, 2 * 12608 * 2304 * 16
    assert gemm.flops == pytest.approx(main * (1 + 16 / 192) + last)


def counted(launches):
    """(name, FLOPs, bytes, of them stored after the loop) of each launch."""
    return [(x.name, x.flops, x.bytes_moved, x.stored) for x in launches]


def test_arithmetic_of_one_backward_on_cuda():
    M, K, N, r = 12608, 768, 2304, 16
    stored, padded = 2 * (K + N + 3 * r) * r, (K + N) * r
    dx = 2 * (M * (N + K) + N * K + K * r + M * r)
    # 40 parts of 320 rows for x, 14 of 960 for dY, 99 of 128 where the pass that makes S sums too
    x_pass = ("tall_grad", 2 * M * K * r, 2 * M * (K + r) + 4 * 40 * K * r, 0)
    dy_pass = ("tall_grad", 2 * M * N * r, 2 * M * (N + r) + 4 * 14 * N * r, 0)
    both = 2 * (M * (N + r) + N * r) + 2 * M * r + 4 * 99 * N * r
    fold, thin = ("fold", 0, stored + 2 * padded, 0), ("thin_grad", 4 * M * N * r, both, 0)
    unfold = ("unfold", 0, 4 * N * r + 2 * 2 * (N + 3 * r) * r, 0)
    flops = 2 * M * N * K + 2 * M * K * r

    def reduce(parts):
        return ("reduce", 0, 4 * (parts * N + 40 * K) * r + 4 * N * r + 2 * K * r, 0)

    problem = QKV._replace(backward=True)
    fused, split, merged = (
        cuda_backend.launches(problem, strategy, DEVICES["H200"])
        for strategy in ("fused", "split", "merged")
    )
    gemm = ("gemm", flops, dx, 2 * M * K)
    assert counted(split) == [fold, thin, x_pass, reduce(99), unfold, gemm]
    gemm = ("gemm", flops, dx + 2 * N * r, 2 * M * K)
    assert counted(fused) == [fold, gemm, x_pass, dy_pass, reduce(14), unfold]
    assert split[-1].efficiency / fused[1].efficiency == pytest.approx(1.2)
    again = ("fold", 0, stored + 4 * padded, 0)
    merge = ("merge", 0, 4 * N * K + 4 * padded, 0)
    library = ("library gemm", 2 * M * N * K, 2 * (M * (N + K) + N * K), 2 * M * K)
    assert counted(merged) == [fold, thin, x_pass, reduce(99), unfold, again, merge, library]
    assert [x.latency_s for x in merged] == [0, 0, 0, 0, 4e-6, 0, 0, 0]


def test_arithmetic_of_a_cast_and_of_p_on_cuda():
    M, K, N, r = 12608, 768, 2304, 32
    problem = QKV._replace(rank=29, weight_bytes=4, factor_bytes=4)
    cast, _, thin, gemm = cuda_backend.launches(problem, "split", DEVICES["A100"])
    assert counted([cast, thin]) == [
        ("cast", 0, N * K * (4 + 2), 0),
        ("thin", 2 * M * K * r, 2 * (M * (K + r) + K * r), 0),
    ]
    moved = 2 * (M * (K + N) + N * K + N * r + M * 29 + N)
    assert counted([gemm]) == [("gemm", 2 * M * N * K + 2 * M * N * r, moved, 2 * M * N)]
    down, *_ = cuda_backend.launches(problem, "merged", DEVICES["A100"])
    assert counted([down]) == [("fold", 0, K * (29 * 4 + r * 2), 0)]


@pytest.mark.parametrize(("r", "R", "f"), [(16, 16, 2), (64, 64, 2), (13, 16, 4), (61, 64, 4)])
def test_arithmetic_of_both_passes_in_triton(r, R, f):
    """Rank 64 is beyond what the kernels read in place: up is folded, and unfolded afterwards, and
    down is copied where it has another dtype or rank."""
    M, K, N = 12608, 768, 2304
    high, cores = R == 64, 3 * r * r
    up, down = (2 * N * R, 2 * K * R) if high else (f * (N * r + cores), f * K * r)
    columns = N * R + (0 if high else 3 * r * R)
    products, of_x, of_y = 2 * M * N * K, 2 * M * K * R, 2 * M * N * R
    fold = [("fold", 0, f * (N * r + cores) + 2 * N * R, 0)] if high else []
    copy = [("fold", 0, f * K * r + 2 * K * R, 0)] if f != 2 else []
    own = copy if high else []
    unfold = [("unfold", 0, 2 * f * N * r, 0)] * 2 if high else []

    def found(strategy, **changes):
        problem = QKV._replace(rank=r, factor_bytes=f, **changes)
        return counted(launches(problem, strategy, DEVICES["H200"]))

    thin = ("thin", of_x, 2 * M * (K + r) + down, 0)
    y = ("gemm", products + of_y, 2 * (M * (K + N + r) + N * K + N) + up, 2 * M * N)
    library = ("library gemm", products, 2 * (M * (N + K) + N * K), 2 * M * N)
    merge = ("merge", 0, 4 * N * K + f * ((N + K) * r + cores), 0)
    assert found("split") == found("split", training=False) == [*own, thin, *fold, y]
    assert found("merged") == [*own, thin, merge, library]
    assert found("merged", training=False) == [merge, library]
    *copies, in_loop = found("fused", training=False)
    assert copies == [*copy, *fold] and in_loop[2] == y[2] - 2 * M * r + 2 * K * R
    assert found("fused")[-1][2] == in_loop[2] + 2 * M * r
    dy_pass = ("thin_grad", 2 * of_y, 2 * M * (N + 2 * r) + up + 4 * 99 * columns, 0)
    dx = ("gemm", products + of_x, 2 * (M * (K + N + r) + N * K) + down, 2 * M * K)
    x_pass = ("tall_grad", of_x, 2 * M * (K + r) + 4 * 44 * K * R, 0)
    sums = 4 * (99 * columns + 44 * K * R) + f * ((N + K) * r + (0 if high else cores))
    after = [x_pass, ("reduce", 0, sums, 0), *unfold]
    library = (*library[:3], 2 * M * K)
    assert found("split", backward=True) == [*fold, dy_pass, *own, dx, *after]
    assert found("fused", backward=True) == [*fold, dy_pass, *own, dx, *after]
    assert found("merged", backward=True) == [*fold, dy_pass, merge, library, *after]


@pytest.mark.parametrize(("wb", "b"), [(4, 4), (4, 2), (2, 2)])
def test_arithmetic_on_a_cpu(wb, b):
    M, K, N, r = 1009, 71, 37, 5
    problem = Problem(M, K, N, 1, r, True, wb, b, "cpu")
    product = 2 * M * N * K
    pack = ("pack", 0, N * K * wb, 0)
    gemm = ("gemm", product, b * M * (N + K), 0)
    merge = ("merge", 3 * 2 * N * K * r, 0, 0)  # in each of three tiles' rows

    def thin(columns):
        return ("thin", 2 * M * columns * r, 0, 0)

    def more(columns):
        return ("r more steps", 2 * M * columns * r, 0, 0)

    def found(backend, strategy, **changes):
        return counted(backend.launches(problem._replace(**changes), strategy, DEVICES["CPU"]))

    tall = [("tall", 2 * M * N * r, 0, 0), ("tall", 2 * M * K * r, b * M * K, 0)]
    assert found(cpp_backend, "split") == [pack, gemm, more(N), thin(K)]
    assert found(cpp_backend, "merged") == [pack, merge, gemm, thin(K)]
    assert found(cpp_backend, "split", backward=True) == [pack, gemm, more(K), thin(N), *tall]
    assert found(cpp_backend, "merged", backward=True) == [pack, merge, gemm, thin(N), *tall]

    def library(columns):
        return ("library gemm", product, b * (M * (N + K) + N * K), b * M * columns)

    def pass_over(columns):
        return ("thin product", 2 * M * columns * r, b * M * columns, 0)

    def update(columns):
        return ("update in place", 2 * M * columns * r, 2 * b * M * columns, 0)

    # W + ΔW is made in four bytes, and rounded in a pass of its own
    merge = ("merge", 2 * N * K * r, N * K * (wb + 4 + (b if b < 4 else 0)), 0)
    assert found(torch_backend, "split") == [pass_over(K), library(N), update(N)]
    assert found(torch_backend, "merged") == [pass_over(K), merge, library(N)]
    assert found(torch_backend, "merged", training=False) == [merge, library(N)]
    factors = [pass_over(N), pass_over(N), pass_over(K)]
    backward = found(torch_backend, "split", backward=True)
    assert backward == [*factors, library(K), update(K)]
    assert found(torch_backend, "merged", backward=True) == [*factors, merge, library(K)]


def shares(backend, strategy, device, **changes):
    """Of the device's rates of arithmetic and of memory, by launch; those of all are left out."""
    found = backend.launches(QKV._replace(**changes), strategy, DEVICES[device])
    reached = {x.name: (x.efficiency, x.memory_efficiency) for x in found}
    return {name: share for name, share in reached.items() if share != (1, 1)}


def test_shares_of_the_rates_that_launches_reach():
    """As measured on an H100, or assumed, for each backend."""
    wide, backward = {"weight_bytes": 4}, {"backward": True}
    thin, cast, sm90, general = (1, 0.8), (1, 0.56), (0.95, 1), (0.85, 1)
    sums = {"tall_grad": thin, "reduce": thin}
    s = {"thin_grad": (1, 0.95), **sums}
    cuda = functools.partial(shares, cuda_backend)
    assert cuda("split", "A100", **wide) == {"cast": cast, "thin": thin, "gemm": general}
    assert cuda("fused", "H200") == {"gemm": sm90}
    assert cuda("fused", "H200", M=64) == {"thin": thin, "gemm": (0.55, 1)}
    assert cuda("merged", "H200", **wide) == {"thin": thin, "merge": cast}
    assert cuda("split", "H200", **backward) == {**s, "gemm": sm90}
    assert cuda("fused", "H200", **backward) == {**sums, "gemm": (0.95 / 1.2, 1)}
    assert cuda("merged", "A100", **backward) == {**s, "merge": cast}
    one, merge = (1, 0.7), (1, 0.19)
    triton_ = functools.partial(shares, triton)
    assert triton_("split", "A100") == {"thin": one, "gemm": (0.85, 1)}
    assert triton_("fused", "H200") == {"gemm": (0.56, 1)}
    assert triton_("fused", "H200", **wide)["gemm"] == (0.56 * 0.8, 1)
    assert triton_("merged", "H200") == {"thin": one, "merge": merge}
    sums = {"thin_grad": one, "tall_grad": one, "reduce": one}
    assert triton_("split", "H200", **backward) == {**sums, "gemm": (0.56, 1)}
    assert triton_("merged", "H200", **backward) == {**sums, "merge": merge}
    on_cpu = functools.partial(shares, torch_backend, device="CPU")
    assert on_cpu("split") == {"thin product": (0.25, 1), "update in place": (0.25, 1)}
    assert on_cpu("merged") == {"thin product": (0.25, 1), "merge": (0.25 / 6, 1)}
    assert shares(cpp_backend, "merged", "CPU") == {"merge": (0.5, 1)}


@pytest.mark.parametrize("backend", [triton, cuda_backend], ids=lambda backend: backend.NAME)
def test_a_rank_beyond_the_kernels_costs_what_plain_torch_does(backend):
    for rank, strategy in itertools.product((128, 129), ("split", "merged")):
        problem = QKV._replace(rank=rank, weight_bytes=4)
        found = backend.launches(problem, strategy, DEVICES["H200"])
        plain = torch_backend.launches(problem, strategy, DEVICES["H200"])
        assert (found == plain) == (rank > 128)
        assert backend.excluded(problem, strategy) is None
    assert backend.excluded(problem, "fused") == "rank 129 is above 128; plain torch runs it"
    assert backend.excluded(problem._replace(rank=128), "fused") is None


@pytest.mark.parametrize(
    ("rows", "columns", "in_loop"),
    [(4096, 128, False), (4097, 128, True), (2048, 129, False), (2049, 129, True)],
)
def test_cuda_computes_p_in_the_loop_from_a_quarter_of_the_gpus_tiles_on(rows, columns, in_loop):
    """33 tiles of 128 by 128 for 132 multiprocessors."""
    found = cuda_backend.launches(QKV._replace(M=rows, N=columns), "fused", DEVICES["H200"])
    assert [launch.name for launch in found] == ["fold", *([] if in_loop else ["thin"]), "gemm"]


@pytest.mark.parametrize(
    ("row_tiles", "columns", "block"),
    [
        (99, 2304, 192),  # 9 waves of 192 + 32 for 14 of 128 + 32
        (99, 1024, 128),  # 5 for 6
        (300, 384, 192),  # 5 for 7, which cost the same
        (2170, 896, 128),  # 83 for 116, which cost 32 less
    ],
)
def test_tiles_of_cuda_are_as_wide_as_their_waves_make_best(row_tiles, columns, block):
    """P takes 16 columns more of each."""
    M, K, r = 128 * row_tiles, 768, 16
    problem = QKV._replace(M=M, N=columns)
    gemm = cuda_backend.launches(problem, "fused", DEVICES["H200"])[-1]
    last = 2 * M * columns * r
    assert gemm.flops - last == pytest.approx(2 * M * K * columns * (1 + r / block), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "columns", "parts"),
    [(256, 768, 1), (257, 768, 2), (12608, 768, 40), (100_000, 65, 261), (100_000, 40_000, 1)],
)
def test_cuda_sums_rows_in_as_many_parts_as_fill_the_gpu(rows, columns, parts):
    """4 blocks of 64 columns a multiprocessor, and 256 rows a part at least."""
    problem = QKV._replace(M=rows, K=columns, backward=True)
    x_pass = cuda_backend.launches(problem, "split", DEVICES["H200"])[2]
    assert x_pass.bytes_moved == 2 * rows * (columns + 16) + 4 * parts * columns * 16


def test_many_rows_are_summed_by_two_programs_a_multiprocessor_on_cuda():
    M, N, r = 100_000, 2304, 16
    problem = QKV._replace(M=M, backward=True)
    _, thin, *_ = cuda_backend.launches(problem, "split", DEVICES["H200"])
    once = 2 * (M * (N + r) + N * r) + 2 * M * r
    assert thin.bytes_moved == once + 4 * 2 * 132 * N * r


def test_p_that_nobody_needs_is_kept_in_the_loop_of_cuda():
    def moved(strategy, **changes):
        problem = QKV._replace(**changes)
        return cuda_backend.launches(problem, strategy, DEVICES["H200"])[-1].bytes_moved

    for strategy, less in (("fused", 2 * 12608 * 16), ("split", 0)):
        assert moved(strategy) - moved(strategy, training=False) == less


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.NAME)
@pytest.mark.parametrize("size", ["M", "K", "N"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_problem_without_elements_has_a_choice(backend, size, backward):
    problem = QKV._replace(backward=backward, **{size: 0})
    assert cost_model.choose(problem, backend) in backend.STRATEGIES


@pytest.mark.parametrize("strategy", ["fused", "split"])
@pytest.mark.parametrize("backward", [False, True])
def test_no_pass_over_rows_that_the_formulas_do_not_need(strategy, backward):
    """x and dY: one pass beside the GEMM's own for each gradient that reduces over rows, none for y
    beyond its store.
    """
    wide = QKV._replace(M=10_000_019, backward=backward)
    moved = sum(launch.bytes_moved for launch in launches(wide, strategy, DEVICES["H200"]))
    passes = moved / wide.M / wide.compute_bytes
    thin = 6 * wide.rank
    if backward:
        expected = 2 * wide.N + 2 * wide.K  # dY twice, x once, dX stored
    else:
        expected = wide.N + (1 if strategy == "fused" else 2) * wide.K
    assert expected <= passes <= expected + thin


def test_measured_rows_overrule_the_model(forget):
    predicted = cost_model.choose(QKV, triton)
    other = "split" if predicted == "fused" else "fused"
    common = {
        "backend": "triton",
        "backward": False,
        "compute_bytes": 2,
        "weight_bytes": 2,
        "K": 768,
        "N": 2304,
        "rank": 16,
    }
    cost_model.add_measured(
        [
            {**common, "M": 12608, "strategy": other, "ms_p50": 0.05},
            {**common, "M": 12608, "strategy": predicted, "ms_p50": 0.09},
        ]
    )
    assert cost_model.choose(QKV, triton) == other
    assert cost_model.choose(QKV._replace(M=9000), triton) == other
    measured = {other: 0.05, predicted: 0.09}
    for m, known in ((6304, measured), (6303, {}), (25216, measured), (25217, {})):
        found = cost_model.measured_ms(QKV._replace(M=m), triton.STRATEGIES, "triton")
        assert found == known, m
    later = {other: 0.5, predicted: 0.9}
    cost_model.add_measured(
        common | {"M": 30_000, "strategy": name, "ms_p50": ms} for name, ms in later.items()
    )
    for m, known in ((21_000, measured), (22_000, later), (15_000, measured), (60_000, later)):
        found = cost_model.measured_ms(QKV._replace(M=m), triton.STRATEGIES, "triton")
        assert found == known, m
    assert cost_model.choose(QKV._replace(M=1000), triton) == cost_model.choose(
        QKV._replace(M=1001), triton
    )
    assert cost_model.choose(QKV._replace(backward=True), triton) in ("fused", "split")


def test_one_measured_strategy_alone_decides_nothing(forget):
    predicted = cost_model.choose(QKV, triton)
    cost_model.add_measured(
        [
            {
                "backend": "triton",
                "backward": False,
                "compute_bytes": 2,
                "weight_bytes": 2,
                "K": 768,
                "N": 2304,
                "rank": 16,
                "M": 12608,
                "strategy": "split" if predicted == "fused" else "fused",
                "ms_p50": 1e-9,
            }
        ]
    )
    assert cost_model.choose(QKV, triton) == predicted


def test_explanation_reads_as_text():
    text = str(explain(12608, 768, 2304, 3, 16, device="H200"))
    assert "[12608, 768] x [768 -> 2304], G=3, rank 16" in text
    assert "the least predicted time" in text
    assert "merged  ruled out: the weight is stored in half precision" in text


def test_explained_numbers_are_the_models():
    found = explain(12608, 768, 2304, 3, 16, device="H200", backend="triton")
    assert found.problem == QKV._replace(factor_bytes=0)
    predicted, excluded = cost_model.candidates(found.problem, triton, DEVICES["H200"])
    assert found.times_us == {name: 1e6 * seconds for name, seconds in predicted.items()}
    assert (found.excluded, found.source) == (excluded, "predicted")
    assert found.floor_us == 1e6 * cost_model.floor_seconds(found.problem, DEVICES["H200"])
    lines = str(found).splitlines()
    assert lines[0].endswith("rank 16, 16-bit compute, weight stored in 16 bits")
    assert lines[1].startswith("backend triton on H200 (measured on an H100")
    us = sorted(found.times_us.values())
    for line, one in zip(lines[2:], us, strict=False):
        assert line.endswith(f"{one:9.1f} us  {one / found.floor_us:5.2f} x the frozen layer")
    plain = explain(5, 7, 11, device="CPU").problem
    assert plain == cost_model.Problem(5, 7, 11, 1, 16, True, 2, 2, "cpu")
    kinds = {"weight_dtype": torch.float64, "training": False, "dtype": torch.float32}
    assert explain(5, 7, 11, device="CPU", **kinds).problem == plain._replace(
        training=False, weight_bytes=8, compute_bytes=4
    )
    backward = explain(5, 7, 11, device="CPU", training=False, backward=True).problem
    assert backward == plain._replace(backward=True)


def test_measured_times_are_explained_where_they_were_measured(forget):
    sizes = {"M": 5, "K": 7, "N": 11, "rank": 3, "compute_bytes": 4, "weight_bytes": 4}
    cost_model.add_measured(
        {**sizes, "backend": "cpp", "backward": False, "strategy": name, "ms_p50": ms}
        for name, ms in (("split", 0.5), ("merged", 0.25))
    )
    shape = {"M": 5, "K": 7, "N": 11, "rank": 3, "dtype": torch.float32, "backend": "cpp"}
    found = explain(**shape, device="CPU")
    assert (found.times_us, found.source) == ({"split": 500.0, "merged": 250.0}, "measured")
    assert found.chosen == "merged"
    assert explain(**shape, device="H200").source == "predicted"


def test_what_is_explained_is_the_backend_that_auto_takes():
    def backend(device, dtype, **changes):
        return explain(12608, 768, 2304, device=device, dtype=dtype, **changes).backend

    assert backend("H100", torch.bfloat16) == backend("H100", torch.float16) == "cuda"
    assert backend("H100", torch.float32) == "triton"
    assert backend("CPU", torch.float32) == "cpp"
    assert explain(197, 1024, 4096, device="CPU", dtype=torch.float32).backend == "cpp"
    assert backend("H100", torch.bfloat16, backend="triton") == "triton"


def test_without_its_library_another_backend_is_explained(monkeypatch):
    monkeypatch.setattr(cpp_backend, "unavailable", lambda: "not built")
    assert explain(12608, 768, 2304, dtype=torch.float32).backend == "torch"
    assert explain(12608, 768, 2304, dtype=torch.float32, device="CPU").backend == "cpp"


def test_explain_names_what_is_wrong():
    with pytest.raises(ValueError, match="device must be one of"):
        explain(1, 2, 3, device="TPU")
    with pytest.raises(ValueError, match="backend must be one of"):
        explain(1, 2, 3, device="H200", backend="fortran")


def test_every_layer_has_a_prediction():
    for device in ("A100", "H100", "H200", "B200"):
        for layers in models(64).values():
            for _, M, K, N, G in layers:
                e = explain(M, K, N, G, device=device)
                assert e.times_us[e.chosen] == min(e.times_us.values())
                assert e.times_us[e.chosen] > 0.99 * e.floor_us


def test_a_repeated_choice_costs_microseconds():
    cost_model.choose(QKV, triton)
    per_call = (
        min(timeit.repeat(lambda: cost_model.choose(QKV, triton), number=1000, repeat=5)) / 1000
    )
    assert per_call < 20e-6


def test_seconds_is_the_longer_of_arithmetic_and_memory():
    device = DEVICES["H200"]
    launch = cost_model.Launch("x", device.half_flops, 0)
    assert seconds([launch], QKV, device) == pytest.approx(1 + device.launch_s)
    half = launch._replace(efficiency=0.5)
    assert seconds([half], QKV, device) == pytest.approx(2 + device.launch_s)
    launch = cost_model.Launch("x", 0, int(2 * device.bandwidth))
    assert seconds([launch], QKV, device) == pytest.approx(2 + device.launch_s)
    half = launch._replace(memory_efficiency=0.5)
    assert seconds([half], QKV, device) == pytest.approx(4 + device.launch_s)


def test_what_nothing_hides_is_added():
    """A product's stores and a chain of loads."""
    device = DEVICES["H200"]
    launch = cost_model.Launch(
        "x", device.half_flops, 0, stored=int(3 * device.store_bandwidth), latency_s=5
    )
    assert seconds([launch], QKV, device) == pytest.approx(1 + 3 + 5 + device.launch_s)


# Microseconds on an H100, ViT-B/16's layers with 64 images in bfloat16, rank 16: F.linear and dX by
# the library, then the backends' GEMMs: y with P given, y with P in the loop, dX with S given.
H100_GEMMS = {
    (768, 2304): (68, 59, {"cuda": (74, 78, 62), "triton": (114, 126, 100)}),
    (768, 768): (25, 24, {"cuda": (27, 29, 24), "triton": (45, 58, 40)}),
    (768, 3072): (88, 78, {"cuda": (98, 102, 81), "triton": (147, 162, 133)}),
    (3072, 768): (78, 90, {"cuda": (83, 87, 102), "triton": (145, 185, 152)}),
}


@pytest.mark.parametrize(("sizes", "measured"), H100_GEMMS.items(), ids=str)
def test_products_are_predicted_as_an_h100_ran_them(sizes, measured):
    h100 = DEVICES["H100"]
    forward = QKV._replace(K=sizes[0], N=sizes[1])
    backward = forward._replace(backward=True)

    def us(problem, backend, strategy):
        found = backend.launches(problem, strategy, h100)
        return 1e6 * seconds([launch for launch in found if launch.name == "gemm"], problem, h100)

    y, dx, gemms = measured
    assert 1e6 * cost_model.floor_seconds(forward, h100) == pytest.approx(y, rel=0.05)
    assert 1e6 * cost_model.floor_seconds(backward, h100) == pytest.approx(dx, rel=0.05)
    for backend in (cuda_backend, triton):
        given, in_loop, dx = gemms[backend.NAME]
        assert us(forward, backend, "split") == pytest.approx(given, rel=0.15)
        assert us(forward, backend, "fused") == pytest.approx(in_loop, rel=0.22)
        assert us(backward, backend, "split") == pytest.approx(dx, rel=0.1)


@pytest.mark.parametrize("sizes", H100_GEMMS, ids=str)
def test_triton_computes_p_in_a_pass_of_its_own_on_an_h100(sizes):
    """As measured: P in the loop costs more than it saves; with float32 weights a merge wins."""
    problem = QKV._replace(K=sizes[0], N=sizes[1])
    predicted, _ = cost_model.candidates(problem, triton, DEVICES["H100"])
    assert min(predicted, key=predicted.__getitem__) == "split"
    for backward in (False, True):
        wide = problem._replace(weight_bytes=4, factor_bytes=4, backward=backward)
        predicted, _ = cost_model.candidates(wide, triton, DEVICES["H100"])
        assert min(predicted, key=predicted.__getitem__) == "merged"


@pytest.mark.parametrize("sizes", H100_GEMMS, ids=str)
def test_under_autocast_cuda_casts_and_computes_p_in_the_loop(sizes):
    """The cast serves the backward too, which merged, with less to fold, could only equal."""
    wide = QKV._replace(K=sizes[0], N=sizes[1], weight_bytes=4, factor_bytes=4)
    predicted, _ = cost_model.candidates(wide, cuda_backend, DEVICES["H100"])
    assert min(predicted, key=predicted.__getitem__) == "fused"


@pytest.mark.parametrize("amx", [False, True])
def test_the_cpp_kernels_are_preferred_at_every_size(amx, monkeypatch):
    """But for one row of a large weight, and in bfloat16 beside a library with AMX."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    cpp_backend._library_has_amx.cache_clear()
    large = cost_model.Problem(2, 1280, 5120, 1, 16, True, 4, 4, "cpu")
    assert cpp_backend.preferred(large)
    assert not cpp_backend.preferred(large._replace(M=1))
    assert not cpp_backend.preferred(large._replace(M=1, K=1024, N=1025))
    assert cpp_backend.preferred(large._replace(M=1, K=1024, N=1024))
    assert cpp_backend.preferred(large._replace(M=10**6, K=1, N=1, compute_bytes=8))
    assert cpp_backend.preferred(large._replace(compute_bytes=2)) is not amx
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    cpp_backend._library_has_amx.cache_clear()
    assert cpp_backend.preferred(large._replace(compute_bytes=2))
    monkeypatch.undo()
    cpp_backend._library_has_amx.cache_clear()


@pytest.mark.parametrize("asked", [None, "avx512_bf16", "avx512"])
@pytest.mark.parametrize("capable", [False, True])
def test_in_pairs_the_cpp_kernels_never_merge(capable, asked, monkeypatch):
    """`merged` multiplies bfloat16 in float32; where the kernels multiply it two numbers at a time,
    many rows of a narrow weight, of which it is the faster one else, are split."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    monkeypatch.delenv(cpp_backend.ISA_VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(cpp_backend.ISA_VARIABLE, asked)
    narrow = cost_model.Problem(12544, 96, 288, 1, 16, False, 4, 2, "cpu")
    try:
        cpp_backend._multiplies_pairs.cache_clear()
        pairs = capable and asked != "avx512"
        for backward in (False, True):
            problem = narrow._replace(backward=backward)
            predicted, excluded = cost_model.candidates(problem, cpp_backend)
            assert set(predicted) == ({"split"} if pairs else {"split", "merged"})
            assert set(excluded) == ({"merged"} if pairs else set())
            _, excluded = cost_model.candidates(problem._replace(compute_bytes=4), cpp_backend)
            assert excluded == {}
    finally:
        cpp_backend._multiplies_pairs.cache_clear()


def test_rows_of_a_tile_are_the_kernels_own():
    source = Path(__file__).parents[2] / "csrc" / "cpu" / "blocking.h"
    (rows,) = re.findall(r"kTileRows = (\d+);", source.read_text())
    assert int(rows) == cpp_backend.TILE_ROWS


def test_devices_stand_to_each_other_as_their_datasheets_do():
    """Dense FLOP/s of 16-bit and of TF32 operands, bytes/s, multiprocessors."""
    sheets = {
        "A100": (312e12, 156e12, 2.04e12, 108),
        "H100": (989e12, 494e12, 3.35e12, 132),
        "H200": (989e12, 494e12, 4.8e12, 132),
        "B200": (2250e12, 1125e12, 8.0e12, 148),
    }
    assert DEVICES.keys() == {*sheets, "CPU"}
    for name, (half, single, bandwidth, multiprocessors) in sheets.items():
        found, known = DEVICES[name], DEVICES["H100"]
        assert (found.name, found.multiprocessors) == (name, multiprocessors)
        assert found.half_flops / known.half_flops == pytest.approx(half / 989e12, rel=0.03)
        assert found.float_flops / known.float_flops == pytest.approx(single / 494e12, rel=0.03)
        assert found.bandwidth / known.bandwidth == pytest.approx(bandwidth / 3.35e12, rel=0.03)
        assert found.bandwidth < found.store_bandwidth < 2 * found.bandwidth
        assert found.launch_s == 2.5e-6
        assert (found.thin_efficiency, found.merge_cost) == (1.0, 1.0)
        assert found.sm90 == (name in ("H100", "H200"))
        columns = {"A100": (128, 16), "B200": (256, 128)}.get(name, (256, 96))
        assert (found.tile_columns, found.thin_columns) == columns
    rates = 60e9, 100e9, 20e9, math.inf, 5e-6  # of a CPU: assumed
    assert DEVICES["CPU"] == Device("CPU", *rates, 64, 1, 2, 0.25, 6.0, False, "assumed")


@pytest.mark.parametrize(
    ("name", "capability", "known"),
    [
        *((f"NVIDIA {known}-SXM", (3, 0), known) for known in ("A100", "H100", "H200", "B200")),
        ("NVIDIA L4", (8, 9), "A100"),
        ("NVIDIA H20", (9, 0), "H100"),
        ("NVIDIA GB10", (10, 0), "B200"),
    ],
)
def test_an_unknown_gpu_is_the_nearest_known_one(monkeypatch, caplog, name, capability, known):
    find = cost_model.device_of.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        with caplog.at_level("INFO"):
            assert find("cuda") is DEVICES[known if available else "CPU"]
        assert find("cpu") is DEVICES["CPU"]
    said = f"{name} is not in the cost model's table; {known} stands in"
    assert caplog.messages == ([] if known in name else [said])


def test_rows_of_this_device_that_came_with_the_package_decide(forget, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(cost_model, "_forget", [])
    cost_model.when_measured(lambda: told.append("told"))
    monkeypatch.setattr(cost_model, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    sizes = {"M": 12608, "K": 768, "N": 2304, "rank": 16, "compute_bytes": 2, "weight_bytes": 2}
    common = sizes | {"backend": "triton", "backward": False}
    rows = [common | {"strategy": name, "ms_p50": 0.5} for name in ("fused", "split")]

    def found(available):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        cost_model._load_shipped.__wrapped__()
        return cost_model.measured_ms(QKV, triton.STRATEGIES, "triton")

    assert found(True) == {}
    for device, available in (("NVIDIA H100", True), ("NVIDIA H200", False)):
        cost_model.MEASURED.write_text(json.dumps({device: rows}))
        assert found(available) == {}
    told.clear()
    assert found(True) == {"fused": 0.5, "split": 0.5} and told == ["told"]
    assert cost_model.measured_ms(QKV, ["fused"], "triton") == {}


def test_a_new_choice_asks_for_the_rows_that_came_with_the_package(monkeypatch):
    monkeypatch.setattr(cost_model, "_load_shipped", lambda: asked.append("asked"))
    asked = []
    cost_model.choose(QKV._replace(M=4242), triton)
    assert asked == ["asked"]


def test_where_every_strategy_is_ruled_out_the_first_runs():
    class Backend:
        NAME, STRATEGIES = "any", ("fused", "split")

        @staticmethod
        def excluded(problem, strategy):
            return "not here"

    assert cost_model.choose(QKV, Backend) == "fused"

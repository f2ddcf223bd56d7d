"""Which kernels a call launches, what they read and write, and what is remembered of a call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from efft_kernels.ops import cost_model
from efft_kernels.ops.backends import triton as backend
from efft_kernels.ops.backends.triton import act, cost, gather, gemm, launch_cache, pair_grad
from efft_kernels.ops.backends.triton import thin as thin_pass
from efft_kernels.ops.backends.triton.act import ActConfig
from efft_kernels.ops.backends.triton.configs import GemmConfig, PassConfig
from efft_kernels.ops.backends.triton.tuning import cdiv, pass_config
from efft_kernels.testing.operands import Shape, operands_and_dy
from efft_kernels.testing.results import backend_results, results_within_budget

FACTORS_AND_X = (True, False, False, True, True, True)


@pytest.mark.parametrize(
    ("rows", "factors"), [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=str
)
def test_launches_and_bytes_are_those_priced(rows, factors, strategy, device, recorded):
    """What runs is what triton/cost.py says: no launch more, no pass over x or dY more, no byte
    more.
    """
    s = Shape(M=160, K=64, n=48, G=2, Ra=16, Rb=16, shared=False)
    *tensors, dy = operands_and_dy(s, rows, factor_dtype=factors, device=device)
    x, weight, _, down, core, up = tensors
    problem = cost_model.Problem.of(x, weight, down, core, up, training=True)
    h200 = cost_model.DEVICES["H200"]
    aligned = {"aligned": True, "index": None}
    thin_grad = pass_config("thin_grad", s.M, s.N, s.Ra, x.dtype, **aligned)
    by_x = pass_config("tall_grad", s.M, s.K, s.Ra, x.dtype, **aligned)
    split = cdiv(cdiv(s.M, by_x.programs), by_x.block_m) * by_x.block_m
    tiling = cost.Tiling(min(cdiv(s.M, thin_grad.block_m), thin_grad.programs), cdiv(s.M, split))

    def priced(backward):
        launches = cost.launches(problem._replace(backward=backward), strategy, h200, tiling)
        return [(x.name, x.bytes_moved) for x in launches if x.name != "library gemm"]

    def made():
        return [(launch.name, launch.bytes_moved) for launch in recorded]

    _, p = backend.forward(*tensors, save_p=True, strategy=strategy)
    assert made() == priced(backward=False)
    recorded.clear()
    backend.backward(dy, x, weight, p, down, core, up, needs=FACTORS_AND_X, strategy=strategy)
    assert made() == priced(backward=True)


@pytest.mark.parametrize("recorded", [False], indirect=True)
@pytest.mark.parametrize("factors", ["folded", "core", "float32"])
@pytest.mark.parametrize("ranks", [(16, 16), (7, 5), (32, 16), (33, 5)], ids=str)
def test_how_many_launches_a_call_takes(ranks, factors, device, recorded):
    """One to two forward and four backward, whatever the form of the factors; copies and folds only
    where factors.py says.
    """
    s = Shape(M=37, K=48, n=32, Ra=ranks[0], Rb=ranks[1], core=factors != "folded")
    factor_dtype = torch.float32 if factors == "float32" else None
    *tensors, dy = operands_and_dy(s, torch.float16, factor_dtype=factor_dtype, device=device)
    x, weight, _, down, core, up = tensors

    def forward(strategy, save_p=True):
        recorded.clear()
        backend.forward(*tensors, save_p=save_p, strategy=strategy)
        return [launch.name for launch in recorded]

    def backward(strategy, needs=FACTORS_AND_X):
        recorded.clear()
        p = torch.zeros(s.M, s.Ra, device=device, dtype=dy.dtype)
        backend.backward(dy, x, weight, p, down, core, up, needs=needs, strategy=strategy)
        return [launch.name for launch in recorded]

    high = max(ranks) > 32
    copied = ["fold"] if high or s.Ra not in (16, 32) or factors == "float32" else []
    folds = ["fold", "fold"] if high else []
    for save_p in (True, False):
        assert forward("fused", save_p) == [*(folds or copied), "gemm"]
        assert forward("split", save_p) == [*folds[:1], "thin", *folds[1:], "gemm"]
    assert forward("merged") == [*folds[:1], "thin", "merge"]
    assert forward("merged", save_p=False) == ["merge"]
    for strategy in ("fused", "split"):
        assert backward(strategy) == [
            *folds[:1],
            "thin_grad",
            *folds[1:],
            "gemm",
            "tall_grad",
            "reduce",
        ]
    assert backward("merged") == [*folds[:1], "thin_grad", "merge", "tall_grad", "reduce"]
    # Without a pass over dY for d_up, the GEMM computes S.
    assert backward("fused", (True, False, False, False, False, False))[-1] == "gemm"
    assert "thin" not in backward("fused", (True, False, False, True, False, False))


def test_what_a_call_remembers_is_its_own(device):
    """The same sizes with other strides, dtypes, factors and needs, in turn, twice."""
    launch_cache.forget()
    shape = Shape(M=17, K=19, n=11, Ra=16, Rb=16)
    plain = operands_and_dy(shape, torch.float32, device=device)
    strided = [t if t.dim() != 2 else t.t().contiguous().t() for t in plain]
    half = operands_and_dy(shape, torch.float16, device=device)
    no_bias = operands_and_dy(replace(shape, bias=False), torch.float32, device=device)
    for _ in range(2):
        for tensors in (plain, strided, half, no_bias):
            for strategy in backend.STRATEGIES:
                results_within_budget(backend, tensors, strategy)
    found = len(launch_cache._calls)
    backend_results(backend, plain, "fused")
    # Forward and backward of each, but the backward does not see the bias.
    assert len(launch_cache._calls) == found == (2 * 4 - 1) * len(backend.STRATEGIES)


@pytest.mark.parametrize("size", [64, 65])
def test_whole_blocks_take_no_masks(size, device):
    """A mask that is not needed takes registers and time, and changes no result."""
    x, thin = (torch.ones(37, n, device=device) for n in (size, 5))
    down, wide = (torch.ones(size, n, device=device) for n in (5, size))
    config, act_config = PassConfig(16, 16, 2, 4, 1), ActConfig(16, 16, 2, 4, 1)
    gemm_config = GemmConfig(16, 16, 16, 2, 4, 1)
    launches = [
        gather._prepare_gather(x, down, config)[0],
        act._prepare_act_fwd(x, x, None, down, "gelu", act_config)[0],
        act._prepare_act_bwd(x, thin, None, "gelu", act_config)[0],
        pair_grad._prepare(x, x, down, config)[0],
        thin_pass._prepare_thin(x, down, None, thin, None, config).launch,
        thin_pass._prepare_tall_grad(x, thin, config).launch,
        gemm._prepare_gemm(x, wide, None, None, down, thin, 5, False, True, gemm_config).launch,
    ]
    found = []
    for launch in launches:
        names = launch.kernel.arg_names[-len(launch.arguments) :]
        named = dict(zip(names, launch.arguments, strict=True))
        found += [value for name, value in named.items() if name.startswith("EVEN")]
    assert found == [size == 64] * 8

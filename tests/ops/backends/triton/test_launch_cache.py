"""What a repeated call hands a compiled kernel, against what Triton's own long way hands it.

No GPU: kernels are compiled for sm_90 and given to a driver that notes their arguments.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from efft_kernels.ops.backends import triton as backend  # noqa: E402
from efft_kernels.ops.backends.fallback import padded_rank  # noqa: E402
from efft_kernels.ops.backends.triton import configs, device, launch_cache, tuning  # noqa: E402
from efft_kernels.ops.backends.triton.gemm import launch_gemm  # noqa: E402
from efft_kernels.ops.functional import low_rank_linear  # noqa: E402
from efft_kernels.testing.fake_gpu import fake_gpu  # noqa: E402
from tools import compile_triton  # noqa: E402

pytestmark = pytest.mark.skipif(device.INTERPRETED, reason="the kernels are interpreted")
NEEDS = (True, False, False, True, True, True)


@pytest.fixture
def gpu():
    """The Triton backend on CPU tensors, as on an H200, and what it launches there."""
    with fake_gpu(90) as found:
        yield found


def operands(folded: bool, dtype=torch.bfloat16) -> list[Tensor | None]:
    """x, weight, bias, down, core, up, dy: M 197, K 48, N 96, two slices, rank 16."""
    core = None if folded else torch.ones(2, 16, 16, dtype=dtype)
    up = torch.ones(1 if folded else 2, 96 if folded else 48, 16, dtype=dtype)
    sizes = ((197, 48), (96, 48), (96,), (48, 16))
    x, weight, bias, down = (torch.ones(size, dtype=dtype) for size in sizes)
    return [x, weight, bias, down, core, up, torch.ones(197, 96, dtype=dtype)]


def described(arguments: tuple) -> list:
    """Arguments as values: tensors by size, strides and dtype, inputs by address too."""
    return [
        (tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in arguments
    ]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("strategy", ["fused", "split"])
def test_the_short_way_launches_what_the_long_way_does(gpu, monkeypatch, strategy, folded):
    *tensors, dy = operands(folded)
    x, weight, _, down, core, up = tensors

    def call():
        gpu.launches.clear()
        _, p = backend.forward(*tensors, save_p=True, strategy=strategy)
        backend.backward(dy, x, weight, p, down, core, up, needs=NEEDS, strategy=strategy)
        return [
            (each.compiled, each.grid, each.stream, each.metadata, described(each.arguments))
            for each in gpu.launches
        ]

    monkeypatch.setattr(launch_cache, "DIRECT", False)
    long_way = call()
    assert call() == long_way
    monkeypatch.setattr(launch_cache, "DIRECT", True)
    assert call() == long_way

    def fail(*_, **__):
        raise AssertionError("the long way")

    for launch in gpu.launches:
        monkeypatch.setattr(launch.kernel, "run", fail)
    assert call() == long_way
    gpu.stream = 7  # of the moment, not of the first call
    assert {stream for _, _, stream, _, _ in call()} == {7}


def compilation(source, num_warps: int, num_stages: int) -> set[str]:
    """All that tells one compilation of a kernel from another: types, hints, constants."""
    arguments = source.fn.arg_names
    return {
        f"{source.name} num_warps={num_warps} num_stages={num_stages}",
        *(f"{name}: {kind}" for name, kind in source.signature.items()),
        *(f"{arguments[place]} {hints}" for (place,), hints in source.attrs.items() if hints),
        *(f"{arguments[place]}={value}" for (place,), value in source.constants.items()),
    }


@cache
def compiled_ahead(rank: int) -> list[set[str]]:
    """What aot.py compiles for sm_90 in bf16 at ranks padded to this one."""
    return [
        compilation(compile_triton.source(case), case.num_warps, case.num_stages)
        for case in compile_triton.cases((90,))
        if case.rank == rank and case.dtype == "bf16"
    ]


SIZES_AND_RANKS = [(768, 16), (768, 8), (720, 16), (720, 8), (769, 16), (768, 64), (720, 40)]


@pytest.mark.parametrize("size,width", SIZES_AND_RANKS)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("strategy", ["fused", "split", "merged"])
def test_a_step_launches_only_what_is_compiled_ahead_of_time(
    gpu, strategy, folded, transposed, factors, size, width
):
    """A qkv at 64 images: specialised on the very integers that aot.py assumes."""
    slices = 3
    x = torch.empty(64 * 197, size, dtype=torch.bfloat16)
    dy = torch.empty(64 * 197, slices * size, dtype=x.dtype)
    stored = torch.float32 if strategy == "merged" else x.dtype
    weight = torch.empty(slices * size, size, dtype=stored)
    bias = torch.empty(slices * size, dtype=x.dtype)
    down = torch.empty(size, width, dtype=factors)
    core = None if folded else torch.empty(slices, width, width, dtype=factors)
    up = torch.empty(1, slices * size if folded else size, width, dtype=factors)
    if transposed and folded:  # as methods/lora.py gives it
        down = torch.empty(width, size, dtype=factors).mT
    elif transposed:  # as methods/tensor_train.py does
        core = core.mT
    _, p = backend.forward(x, weight, bias, down, core, up, save_p=True, strategy=strategy)
    backend.backward(dy, x, weight, p, down, core, up, needs=NEEDS, strategy=strategy)
    launched = [
        compilation(compiled.src, compiled.metadata.num_warps, compiled.metadata.num_stages)
        for compiled in {launch.compiled for launch in gpu.launches}
    ]
    assert launched
    for one in launched:
        assert one == min(compiled_ahead(padded_rank(width)), key=lambda case: len(case ^ one))


def test_a_compiled_step_is_one_graph_and_takes_the_short_way(gpu, monkeypatch):
    """Sizes that repeat are remembered within torch.compile's graph as outside it."""
    *tensors, dy = operands(folded=True)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]

    def loss(x):
        y = low_rank_linear(x, *leaves[1:], backend="triton", strategy="fused")
        return (y * dy[: x.shape[0]]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    counts = []
    for rows in (197, 101, 197, 101):
        gpu.launches.clear()
        compiled(leaves[0][:rows]).backward()
        counts.append(len(gpu.launches))
        if len(counts) == 2:
            for launch in gpu.launches:
                monkeypatch.setattr(launch.kernel, "run", None)  # the long way is closed
    assert counts == [counts[0]] * 4 and counts[0] >= 4


def test_this_version_of_triton_is_one_that_was_compared():
    """Where it is not, `launch.DIRECT` is False and every launch takes the long way."""
    assert triton.__version__.startswith("3.6.") == launch_cache.DIRECT


def gemm(a: Tensor, w: Tensor, plans: launch_cache.Plans, config=None) -> None:
    thin_in, thin_out = (torch.ones(c, 16, dtype=a.dtype) for c in (a.shape[1], w.shape[1]))
    launch_gemm(a, w, None, thin_in, None, thin_out, None, width=16, config=config, plans=plans)


def test_a_pointer_off_16_bytes_gets_a_kernel_of_its_own(gpu):
    storage = torch.ones(197 * 48 + 8, dtype=torch.bfloat16)
    aligned, w = storage[:-8].view(197, 48), torch.ones(48, 96, dtype=torch.bfloat16)
    shifted = storage[1:-7].view(197, 48)
    plans: launch_cache.Plans = {}
    for a in (aligned, shifted, aligned, shifted, aligned):
        gemm(a, w, plans)
    compiled = [launch.compiled for launch in gpu.launches]
    assert compiled[0] == compiled[2] == compiled[4] != compiled[1] == compiled[3]
    assert [launch.arguments[0].data_ptr() for launch in gpu.launches] == [
        a.data_ptr() for a in (aligned, shifted, aligned, shifted, aligned)
    ]


def test_a_persistent_config_has_a_program_per_multiprocessor(gpu):
    config = configs.persistent_candidates(90, "half", 16, True)[0]
    plans: launch_cache.Plans = {}
    w = torch.ones(64, 512, dtype=torch.bfloat16)
    for rows, programs in ((128, 2), (128 * 200, gpu.properties.multiprocessors)):
        plans.clear()
        gemm(torch.ones(rows, 64, dtype=torch.bfloat16), w, plans, config)
        assert gpu.launches[-1].grid == (programs, 1, 1)


@pytest.mark.parametrize("rank", [16, 32, 64, 128])
@pytest.mark.parametrize("ride", [True, False])
def test_persistent_candidates_fit(rank, ride):
    found = configs.persistent_candidates(90, "half", rank, ride)
    assert found
    for config in found:
        assert config.persistent and config.tma and config.num_stages >= 2
        assert configs.gemm_smem_bytes(config, rank, 2, 2, ride) <= device.SMEM_BYTES[90]


def test_a_measured_row_may_be_persistent(gpu, monkeypatch, tmp_path):
    import json

    row = [128, 256, 64, 8, 8, 3, 1, 1]
    key = configs.gemm_key(2304, 768, 16, "half", True)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"device": gpu.properties.name, "rows": {key: {"14": row}}}))
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(path))
    tuning.forget()
    shape = {"wide": False, "aligned": True, "ride": True, "slice_c": 2304, "index": 0}
    found = tuning.gemm_config(12608, 2304, 768, 16, torch.bfloat16, **shape)
    assert list(found) == row and found.persistent == 1
    tuning.forget()


def test_only_so_many_calls_are_remembered(monkeypatch):
    monkeypatch.setattr(launch_cache, "MOST_CALLS", 3)
    launch_cache.forget()
    for rows in range(1, 8):
        launch_cache.plans_of((torch.empty(rows, 2),), "fwd")
        assert len(launch_cache._plans) <= 3
    launch_cache.forget()


def test_the_key_tells_calls_apart():
    launch_cache.forget()
    t = torch.empty(4, 6)
    first = launch_cache.plans_of((t, None), "fwd", True)
    assert launch_cache.plans_of((torch.empty(4, 6), None), "fwd", True) is first
    others = (
        ((t, t), "fwd", True), ((t, None), "fwd", False), ((t, None), "bwd", True),
        ((t.half(), None), "fwd", True), ((t.t(), None), "fwd", True),
        ((torch.empty(6, 4).t(), None), "fwd", True), ((t.to("meta"), None), "fwd", True),
    )  # fmt: skip
    for tensors, *choices in others:
        assert launch_cache.plans_of(tensors, *choices) is not first
    launch_cache.forget()

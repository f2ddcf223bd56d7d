"""What a repeated call hands a compiled kernel, against what Triton's own long way hands it.

No GPU: kernels are compiled for sm_90 and given to a driver that notes their arguments.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from efft_kernels.ops import dispatch  # noqa: E402
from efft_kernels.ops.backends import triton as backend  # noqa: E402
from efft_kernels.ops.backends.triton import launch_cache, tuning  # noqa: E402
from efft_kernels.ops.backends.triton.gemm import launch_gemm  # noqa: E402
from efft_kernels.ops.cost_model import padded_rank  # noqa: E402
from efft_kernels.ops.functional import low_rank_linear  # noqa: E402
from tools import compile_triton  # noqa: E402

pytestmark = pytest.mark.skipif(tuning.INTERPRETED, reason="the kernels are interpreted")
H200 = tuning.Device("NVIDIA_H200", 90, 132, 227 * 1024)
NEEDS = (True, False, False, True, True, True)


class Driver:
    """An H200's driver that notes launches: (function, grid, arguments)."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.launches: list[tuple] = []
        self.loaded = 0
        self.stream = 5
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            get_device_properties=lambda _: {"max_shared_mem": H200.smem_bytes},
        )

    def load_binary(self, *_: object) -> tuple[int, ...]:
        self.loaded += 1
        return self.loaded, self.loaded, 0, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return self.stream

    def get_current_target(self) -> object:
        return self.target

    def launcher_cls(self, *_: object):
        def launcher(x, y, z, stream, function, metadata, _launch, _enter, _exit, *arguments):
            self.launches.append((function, (x, y, z), stream, metadata, arguments))

        return launcher


@pytest.fixture
def driver(monkeypatch):
    """The Triton backend on CPU tensors, as on an H200, and what it launches there."""
    from triton.runtime import driver

    noted = Driver()
    monkeypatch.setattr(driver, "_active", noted)
    monkeypatch.setattr(tuning, "device", lambda index: H200)
    for kernel in kernels():
        kernel.device_caches.clear()
    launch_cache.forget()
    yield noted
    for kernel in kernels():
        kernel.device_caches.clear()
    launch_cache.forget()


def kernels() -> list:
    return list(compile_triton.KERNELS.values())


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
def test_the_short_way_launches_what_the_long_way_does(driver, monkeypatch, strategy, folded):
    *tensors, dy = operands(folded)
    x, weight, _, down, core, up = tensors

    def call():
        driver.launches.clear()
        _, p = backend.forward(*tensors, save_p=True, strategy=strategy)
        backend.backward(dy, x, weight, p, down, core, up, needs=NEEDS, strategy=strategy)
        return [
            (function, grid, stream, metadata, described(arguments))
            for function, grid, stream, metadata, arguments in driver.launches
        ]

    monkeypatch.setattr(launch_cache, "DIRECT", False)
    long_way = call()
    assert call() == long_way
    monkeypatch.setattr(launch_cache, "DIRECT", True)
    assert call() == long_way

    def fail(*_, **__):
        raise AssertionError("the long way")

    for kernel in kernels():
        monkeypatch.setattr(kernel, "run", fail)
    driver.stream = 5
    assert call() == long_way
    driver.stream = 7  # of the moment, not of the first call
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
    driver, strategy, folded, transposed, factors, size, width
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
        for kernel in kernels()
        for compiled in kernel.device_caches[0][0].values()
    ]
    assert launched
    for one in launched:
        assert one == min(compiled_ahead(padded_rank(width)), key=lambda case: len(case ^ one))


def test_a_compiled_step_is_one_graph_and_takes_the_short_way(driver, monkeypatch):
    """Sizes that repeat are remembered within torch.compile's graph as outside it."""
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "rejects", lambda x: None)
    dispatch._load.cache_clear()
    *tensors, dy = operands(folded=True)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]

    def loss(x):
        y = low_rank_linear(x, *leaves[1:], backend="triton", strategy="fused")
        return (y * dy[: x.shape[0]]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    counts = []
    for rows in (197, 101, 197, 101):
        driver.launches.clear()
        compiled(leaves[0][:rows]).backward()
        counts.append(len(driver.launches))
        if len(counts) == 2:
            for kernel in kernels():
                monkeypatch.setattr(kernel, "run", None)  # the long way is closed
    assert counts == [counts[0]] * 4 and counts[0] >= 4
    dispatch._load.cache_clear()


def test_this_version_of_triton_is_one_that_was_compared():
    """Where it is not, `launch.DIRECT` is False and every launch takes the long way."""
    assert triton.__version__.startswith("3.6.") == launch_cache.DIRECT


def gemm(a: Tensor, w: Tensor, plans: launch_cache.Plans, config=None) -> None:
    thin_in, thin_out = (torch.ones(c, 16, dtype=a.dtype) for c in (a.shape[1], w.shape[1]))
    launch_gemm(a, w, None, thin_in, None, thin_out, None, width=16, config=config, plans=plans)


def test_a_pointer_off_16_bytes_gets_a_kernel_of_its_own(driver):
    storage = torch.ones(197 * 48 + 8, dtype=torch.bfloat16)
    aligned, w = storage[:-8].view(197, 48), torch.ones(48, 96, dtype=torch.bfloat16)
    shifted = storage[1:-7].view(197, 48)
    plans: launch_cache.Plans = {}
    for a in (aligned, shifted, aligned, shifted, aligned):
        gemm(a, w, plans)
    functions = [function for function, *_ in driver.launches]
    assert functions[0] == functions[2] == functions[4] != functions[1] == functions[3]
    assert [arguments[0].data_ptr() for *_, arguments in driver.launches] == [
        a.data_ptr() for a in (aligned, shifted, aligned, shifted, aligned)
    ]


def test_a_persistent_config_has_a_program_per_multiprocessor(driver):
    config = tuning.persistent_candidates(90, "half", 16, True)[0]
    plans: launch_cache.Plans = {}
    w = torch.ones(64, 512, dtype=torch.bfloat16)
    for rows, programs in ((128, 2), (128 * 200, H200.multiprocessors)):
        plans.clear()
        gemm(torch.ones(rows, 64, dtype=torch.bfloat16), w, plans, config)
        assert driver.launches[-1][1] == (programs, 1, 1)


@pytest.mark.parametrize("rank", [16, 32, 64, 128])
@pytest.mark.parametrize("ride", [True, False])
def test_persistent_candidates_fit(rank, ride):
    found = tuning.persistent_candidates(90, "half", rank, ride)
    assert found
    for config in found:
        assert config.persistent and config.tma and config.num_stages >= 2
        assert tuning.gemm_smem_bytes(config, rank, 2, 2, ride) <= H200.smem_bytes


def test_a_measured_row_may_be_persistent(driver, monkeypatch, tmp_path):
    import json

    row = [128, 256, 64, 8, 8, 3, 1, 1]
    key = tuning.gemm_key(2304, 768, 16, "half", True)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"device": H200.name, "rows": {key: {"14": row}}}))
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path))
    for cached in (tuning._gemm_config, tuning._tables):
        cached.cache_clear()
    shape = {"wide": False, "aligned": True, "ride": True, "slice_c": 2304, "index": 0}
    found = tuning.gemm_config(12608, 2304, 768, 16, torch.bfloat16, **shape)
    assert list(found) == row and found.persistent == 1
    for cached in (tuning._gemm_config, tuning._tables):
        cached.cache_clear()


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

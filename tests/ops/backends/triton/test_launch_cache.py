"""What a repeated call hands a compiled kernel, against what Triton's own long way hands it.

No GPU: kernels are compiled for sm_90 and given to a driver that notes their arguments.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from efft_kernels.ops.backends import triton as backend  # noqa: E402
from efft_kernels.ops.backends.triton import configs, device, launch_cache, tuning  # noqa: E402
from efft_kernels.ops.backends.triton.gemm import launch_gemm  # noqa: E402
from efft_kernels.ops.functional import low_rank_linear  # noqa: E402
from efft_kernels.testing.fake_gpu import fake_gpu  # noqa: E402
from efft_kernels.testing.operands import Shape, operands_and_dy  # noqa: E402

pytestmark = pytest.mark.skipif(device.INTERPRETED, reason="the kernels are interpreted")
NEEDS = (True, False, False, True, True, True)


@pytest.fixture
def gpu():
    """The Triton backend on CPU tensors, as on an H200, and what it launches there."""
    with fake_gpu(90) as found:
        yield found


def operands(folded: bool) -> list[Tensor | None]:
    """x, weight, bias, down, core, up and dy in bfloat16; folded factors have no core."""
    s = Shape(M=197, K=48, n=48, G=2, Ra=16, Rb=16, shared=False)
    s = replace(s, n=s.N, G=1, core=False) if folded else s
    return list(operands_and_dy(s, torch.bfloat16))


def described(launch, inputs: dict[int, str]) -> list:
    """Arguments as values: addresses, or the tensors there, by the input's name."""
    types = list(launch.compiled.src.signature.values())

    def one(type_: str, value):
        address = value.data_ptr() if isinstance(value, Tensor) else value
        return inputs.get(address, "allocated") if type_.startswith("*") else value

    return [one(*each) for each in zip(types, launch.arguments, strict=True)]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("strategy", ["fused", "split"])
def test_the_short_way_launches_what_the_long_way_does(gpu, monkeypatch, strategy, folded):
    *tensors, dy = operands(folded)
    x, weight, _, down, core, up = tensors
    names = ("x", "weight", "bias", "down", "core", "up", "dy")
    inputs = {
        t.data_ptr(): name for name, t in zip(names, (*tensors, dy), strict=True) if t is not None
    }

    def call():
        gpu.launches.clear()
        _, p = backend.forward(*tensors, save_p=True, strategy=strategy)
        backend.backward(dy, x, weight, p, down, core, up, needs=NEEDS, strategy=strategy)
        return [
            (each.compiled, each.grid, each.stream, each.metadata, described(each, inputs))
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
    hooked = []
    with monkeypatch.context() as patch:
        for launch in gpu.launches:  # its own launcher is not called, but with a hook
            patch.setattr(type(launch.compiled.run), "__call__", lambda *_: hooked.append(1))
        assert call() == long_way and not hooked
        triton.knobs.runtime.launch_enter_hook.add(print)
        try:
            call()
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(print)
        assert len(hooked) == len(long_way)
    gpu.stream = 7  # of the moment, not of the first call
    assert {stream for _, _, stream, _, _ in call()} == {7}


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
    """Where it is not, `launch_cache.DIRECT` is False and every launch takes the long way."""
    assert triton.__version__.startswith("3.6.") == launch_cache.DIRECT


def gemm(a: Tensor, w: Tensor, cache: launch_cache.CallCache, config=None) -> None:
    thin_in, thin_out = (torch.ones(c, 16, dtype=a.dtype) for c in (a.shape[1], w.shape[1]))
    launch_gemm(a, w, None, thin_in, None, thin_out, None, ra=16, config=config, cache=cache)


def test_a_pointer_off_16_bytes_gets_a_kernel_of_its_own(gpu):
    storage = torch.ones(197 * 48 + 8, dtype=torch.bfloat16)
    aligned, w = storage[:-8].view(197, 48), torch.ones(48, 96, dtype=torch.bfloat16)
    shifted = storage[1:-7].view(197, 48)
    cache: launch_cache.CallCache = {}
    for a in (aligned, shifted, aligned, shifted, aligned):
        gemm(a, w, cache)
    compiled = [launch.compiled for launch in gpu.launches]
    assert compiled[0] == compiled[2] == compiled[4] != compiled[1] == compiled[3]
    first = [launch.arguments[0] for launch in gpu.launches]
    assert [a.data_ptr() if isinstance(a, Tensor) else a for a in first] == [
        a.data_ptr() for a in (aligned, shifted, aligned, shifted, aligned)
    ]


def test_a_persistent_config_has_a_program_per_multiprocessor(gpu):
    config = configs.persistent_candidates(90, "half", 16, True)[0]
    cache: launch_cache.CallCache = {}
    w = torch.ones(64, 512, dtype=torch.bfloat16)
    for rows, programs in ((128, 2), (128 * 200, gpu.properties.multiprocessors)):
        cache.clear()
        gemm(torch.ones(rows, 64, dtype=torch.bfloat16), w, cache, config)
        assert gpu.launches[-1].grid == (programs, 1, 1)


@pytest.mark.parametrize("rank", [16, 32, 64, 128])
@pytest.mark.parametrize("compute_p", [True, False])
def test_persistent_candidates_fit(rank, compute_p):
    found = configs.persistent_candidates(90, "half", rank, compute_p)
    assert found
    for config in found:
        assert config.persistent and config.tma and config.num_stages >= 2
        assert configs.gemm_smem_bytes(config, rank, 2, 2, compute_p) <= device.SMEM_BYTES[90]


def test_a_measured_row_may_be_persistent(gpu, monkeypatch, tmp_path):
    import json

    row = [128, 256, 64, 8, 8, 3, 1, 1]
    key = configs.gemm_key(2304, 768, 16, "half", True)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"device": gpu.properties.name, "rows": {key: {"14": row}}}))
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(path))
    tuning.forget()
    shape = {"wide": False, "aligned": True, "compute_p": True, "slice_c": 2304, "index": 0}
    found = tuning.gemm_config(12608, 2304, 768, 16, torch.bfloat16, **shape)
    assert list(found) == row and found.persistent == 1
    tuning.forget()


def test_a_launch_names_every_argument():
    stand_in = SimpleNamespace(arg_names=["x_ptr", "M", "N", "BLOCK"], __name__="kernel")
    launch = launch_cache.CachedLaunch(stand_in, (1,), {}, BLOCK=16, N=3, M=2)
    assert launch.arguments == (2, 3, 16) and launch.grid == (1, 1, 1)
    for wrong in ({"M": 2, "BLOCK": 16}, {"M": 2, "K": 3, "BLOCK": 16}):
        with pytest.raises(TypeError, match=r"kernel takes \[.*\] after its tensors"):
            launch_cache.CachedLaunch(stand_in, (1,), {}, **wrong)


def test_only_so_many_calls_are_remembered(monkeypatch):
    monkeypatch.setattr(launch_cache, "MAX_CALLS", 3)
    launch_cache.forget()
    for rows in range(1, 8):
        launch_cache.cache_of((torch.empty(rows, 2),), "fwd")
        assert len(launch_cache._calls) <= 3
    launch_cache.forget()


def test_as_many_calls_as_a_model_makes_are_remembered(monkeypatch):
    for known, left in ((2047, 2048), (2048, 1)):
        monkeypatch.setattr(launch_cache, "_calls", dict.fromkeys(range(known)))
        launch_cache.cache_of((torch.empty(1, 2),))
        assert len(launch_cache._calls) == left


def test_hooks_and_scratch_memory_take_the_long_way(gpu, monkeypatch):
    went = []

    class Compiled:
        function, packed_metadata = 0, ()

        def __init__(self, **sizes):
            settings = {"launch_cooperative_grid": False, "launch_pdl": False}
            scratch = {"global_scratch_size": 0, "profile_scratch_size": 0} | sizes
            self.run = SimpleNamespace(
                **settings, **scratch, launch=lambda *_: went.append("short")
            )

        def __getitem__(self, grid):
            return lambda *_: went.append("long")

    def way(**sizes):
        launch_cache._starter(Compiled(**sizes), (1, 1, 1))("argument")
        return went.pop()

    assert way() == "short"
    assert way(global_scratch_size=8) == way(profile_scratch_size=8) == "long"
    for name in ("launch_enter_hook", "launch_exit_hook"):
        for hook, expected in ((lambda *_: None, "long"), (SimpleNamespace(calls=[]), "short")):
            with monkeypatch.context() as patch:
                patch.setattr(triton.knobs.runtime, name, hook)
                assert way() == expected


def test_without_a_cache_everything_is_prepared_anew():
    made = itertools.count(1)
    cache: launch_cache.CallCache = {}
    found = [launch_cache.once(given, "gemm", next, made) for given in (cache, None, cache, None)]
    assert found == [1, 2, 1, 3] and cache == {"gemm": 1}


def test_the_key_tells_calls_apart():
    launch_cache.forget()
    t = torch.empty(4, 6)
    first = launch_cache.cache_of((t, None), "fwd", True)
    assert launch_cache.cache_of((torch.empty(4, 6), None), "fwd", True) is first
    others = (
        ((t, t), "fwd", True),
        ((t, None), "fwd", False),
        ((t, None), "bwd", True),
        ((t.half(), None), "fwd", True),
        ((t.t(), None), "fwd", True),
        ((torch.empty(6, 4).t(), None), "fwd", True),
        ((t.to("meta"), None), "fwd", True),
    )
    for tensors, *choices in others:
        assert launch_cache.cache_of(tensors, *choices) is not first
    launch_cache.forget()
    assert launch_cache.cache_of((t, None), "fwd", True) is not first
    launch_cache.forget()


@pytest.mark.parametrize("moved", ["x", "weight", "down"])
def test_p_is_not_computed_in_a_loop_over_rows_off_16_bytes(gpu, moved):
    """Such a loop is miscompiled (forward.on_16_bytes); `split` runs in its place."""
    *tensors, _ = operands(folded=True)

    def kernels():
        gpu.launches.clear()
        backend.forward(*tensors, save_p=True, strategy="fused")
        return [launch.kernel.__name__ for launch in gpu.launches]

    aligned = kernels()
    place = ("x", "weight", "bias", "down").index(moved)
    storage = tensors[place].new_empty(tensors[place].numel() + 1)
    tensors[place] = storage[1:].view(tensors[place].shape)
    assert "_thin_kernel" not in aligned and "_thin_kernel" in kernels()

"""What `tune` tries and what it writes; its timing needs a GPU."""

from __future__ import annotations

import json
import time

import pytest
import torch

pytest.importorskip("triton")

from efft_kernels.ops.backends import cuda_chain
from efft_kernels.ops.backends.chain_steps import TorchSteps
from efft_kernels.ops.backends.triton import configs, device
from tools import tune_triton

H200 = device.Device("NVIDIA_H200", 90, 132, 227 * 1024)
B200 = device.Device("NVIDIA_B200", 100, 148, 227 * 1024)
A100 = device.Device("NVIDIA_A100_SXM4_80GB", 80, 108, 163 * 1024)
RTX5090 = device.Device("NVIDIA_GeForce_RTX_5090", 120, 170, 99 * 1024)


@pytest.mark.parametrize("compute_p", [True, False])
@pytest.mark.parametrize("rank", [16, 32, 64, 128])
@pytest.mark.parametrize("device", [H200, B200, A100, RTX5090], ids=lambda d: d.name)
def test_what_is_tried_fits_the_device(device, rank, compute_p):
    tried = list(tune_triton.gemm_space(device, rank, compute_p, "half"))
    for config in tried:
        assert configs.gemm_smem_bytes(config, rank, 2, 2, compute_p) <= device.smem_bytes
    assert any(config.tma for config in tried) == (device.arch >= 90 and bool(tried))
    assert any(config.persistent for config in tried) == (device == H200)


def test_the_shipped_choice_comes_first():
    """The others' results are compared with the first one's."""
    first = next(tune_triton.gemm_space(H200, 16, True, "half"))
    assert first == configs.gemm_candidates(90, "half", 16)[0]
    assert not first.tma and not first.persistent


def test_the_fastest_right_one_is_kept(monkeypatch, capsys):
    ms = {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.05, 5: 0.01}
    tried = [configs.PassConfig(64, 64, programs, 4, 3) for programs in ms]

    def run(config):
        if config.programs == 5:
            raise RuntimeError("PassManager::run failed")
        return torch.full((3,), 2.0 if config.programs == 4 else 1.0)

    def timed(call, **_):
        call()
        return ms[call.args[0].programs]

    monkeypatch.setattr(tune_triton, "do_bench", timed)
    later, ran = time.monotonic() + 60, []

    def result(found):
        ran.append(found)
        return [torch.ones(2), found]

    assert tune_triton.fastest(iter(tried), run, result, later) == (tried[1], 0.1)
    said = capsys.readouterr().err
    assert "wrong result" in said and "PassManager::run failed" in said
    assert len(ran) == 4  # the comparison is not in the time
    assert tune_triton.fastest(iter(tried), run, result, time.monotonic() - 1) is None


class Steps(TorchSteps):
    """`scale`: of what is wrong in CUDA C++'s place."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def pair_grad(self, *given):
        sum_down, sum_b = super().pair_grad(*given)
        return sum_down, sum_b * self.scale


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1), (1.5, 0)])
def test_a_chain_s_steps(monkeypatch, scale, expected):
    """CUDA C++ is twice as fast here but for GELU's gradient, and taken where it is right."""

    def timed(call, **_):
        (native,) = call.args[-1]
        gelu = call.func.__name__ == "gelu_grad"
        return 1.0 if bool(native) != gelu else 2.0

    monkeypatch.setattr(
        tune_triton, "chain_steps", lambda k, rank: {(0,): Steps(), (1,): Steps(scale)}
    )
    monkeypatch.setattr(tune_triton, "do_bench", timed)
    sizes, later = (37, 64, 128, 16, torch.float32), time.monotonic() + 60
    rows = tune_triton.tune_chain(*sizes, later, on="cpu")
    assert rows == {
        "chain pair_grad|c64|r16": {"6": [expected]},
        "chain before|c64|r16": {"6": [1]},
        "chain gelu|c64|r16": {"6": [1]},
        "chain gelu_grad|c64|r16": {"6": [0]},
    }
    monkeypatch.setattr(tune_triton, "do_bench", None)
    assert tune_triton.tune_chain(*sizes, later, tune_triton.Share(0, 1), on="cpu") == {}
    monkeypatch.setattr(tune_triton, "chain_steps", lambda k, rank: {})
    assert tune_triton.tune_chain(*sizes, later, on="cpu") == {}


@pytest.mark.parametrize("fault", ["late", "raises", "nan"])
def test_a_choice_is_no_row_unless_both_were_compared(monkeypatch, fault):
    class First(TorchSteps):
        def gelu(self, h, down):
            if fault == "raises":
                raise RuntimeError("does not compile")
            return super().gelu(h * float("nan") if fault == "nan" else h, down)

    times = iter([0.0, 9.0] * 4)  # the second of each two is too late
    if fault == "late":
        monkeypatch.setattr(tune_triton.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(
        tune_triton, "chain_steps", lambda k, r: {(0,): First(), (1,): TorchSteps()}
    )
    monkeypatch.setattr(tune_triton, "do_bench", lambda call, **_: 1.0)
    rows = tune_triton.tune_chain(
        37, 64, 128, 16, torch.float32, 5.0 if fault == "late" else float("inf"), on="cpu"
    )
    assert len(rows) == (0 if fault == "late" else 3)
    assert "chain gelu|c64|r16" not in rows


def test_only_what_there_is_in_cuda_is_timed(monkeypatch):
    steps = {(0,): TorchSteps(), (1,): TorchSteps()}
    monkeypatch.setattr(tune_triton, "chain_steps", lambda k, rank: steps)
    monkeypatch.setattr(tune_triton, "do_bench", lambda call, **_: 1.0)
    rows = tune_triton.tune_chain(5, 832, 100, 16, torch.float32, float("inf"), on="cpu")
    assert list(rows) == ["chain pair_grad|c832|r16"]


def test_a_chain_s_steps_in_both_forms(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        cuda_chain, "takes", lambda k, rank, index: (k, rank, index) == (768, 16, 3)
    )
    monkeypatch.setattr(tune_triton, "configs_for", lambda k, rank, index: None)
    assert tune_triton.chain_steps(768, 32) == {}
    plain, native = tune_triton.chain_steps(768, 16).values()
    assert not (plain._native_pair or plain._before)
    assert not (plain._native_gelu or plain._native_gelu_grad)
    assert native._native_pair and native._before
    assert native._native_gelu and native._native_gelu_grad


def test_shares_hold_every_candidate_once():
    tried = [configs.PassConfig(64, 64, programs, 4, 3) for programs in (1, 2, 3, 3, 4, 5)]
    seen = []

    def run(config):
        seen.append(config.programs)
        if config.programs == 2:
            raise RuntimeError("does not compile")

    for number in range(3):
        tune_triton.Share(number, 3).compile(iter(tried), run)
    assert sorted(seen) == [1, 2, 3, 4, 5]


def test_processes_compile_and_are_stopped_in_time(monkeypatch, tmp_path):
    begun, marks = time.monotonic(), tmp_path / "shares"
    script = "import sys, time; open(sys.argv[1], 'a').write(sys.argv[-2] + ' '); time.sleep(60)"
    real = tune_triton.subprocess.Popen

    def started(command, **options):
        assert command[:3] == [tune_triton.sys.executable, "-m", "tools.tune_triton"]
        return real([command[0], "-c", script, str(marks), *command[3:]], **options)

    monkeypatch.setattr(tune_triton.subprocess, "Popen", started)
    tune_triton.compile_all(2, ["--images", "8"], seconds=5.0)
    assert time.monotonic() - begun < 30
    assert sorted(marks.read_text().split()) == ["0", "1"]


def test_written_rows_join_those_of_the_same_device(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "properties", lambda index: H200)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"device": "NVIDIA_A100", "rows": {"other": {"14": [1]}}}))
    tune_triton.write({"a": {"14": [1, 1]}}, path)
    tune_triton.write({"a": {"15": [2, 1]}, "b": {"14": [3, 0]}}, path)
    table = json.loads(path.read_text())
    assert table["device"] == H200.name and table["source"] == "measured"
    assert table["rows"] == {"a": {"14": [1, 1], "15": [2, 1]}, "b": {"14": [3, 0]}}
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]

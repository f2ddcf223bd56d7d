"""The training step by backend and mode: on a CPU, and with a CUDA that is not there."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.gpu import step
from benchmarks.lib import timing
from benchmarks.lib.rows import KERNEL_COLUMNS, STEP_COLUMNS, STEP_CSV, read_rows
from efft_kernels import Adapter, FusedEFFTLinear
from efft_kernels.ops.backends import cuda_chain

RANK = 3
CPU_RUN = ("--device", "cpu", "--images", "2", "--rank", str(RANK), "--rounds", "2")
GPU_RUN = (*CPU_RUN, "--device", "cuda", "--methods", "EFFT2", "--backends", "torch")


@pytest.fixture(autouse=True)
def small_model(make_vit: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = make_vit(embed_dim=24).requires_grad_(False)
    model.head.requires_grad_()
    batch = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    monkeypatch.setattr(step, "make_base", lambda *_: copy.deepcopy(model))
    monkeypatch.setattr(step, "draw_batch", lambda *_: batch)
    return model


class FakeGraph:
    """A captured call that is run again on every replay."""

    last: FakeGraph

    def __init__(self) -> None:
        FakeGraph.last = self
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        assert isinstance(other, FakeStream)


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return 2.0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda without a GPU: streams, events and graphs that do nothing; tensors on the CPU."""
    seen: dict[str, Any] = {"stream": FakeStream(), "captures": 0}
    default = seen["stream"]

    @contextlib.contextmanager
    def graph(captured: FakeGraph) -> Iterator[None]:
        seen["captures"] += 1
        seen["stream"] = FakeStream()
        yield  # an exception leaves the capture's stream, as torch's does
        seen["stream"] = default

    for name, value in {
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_device": lambda: 0,
        "current_stream": lambda: seen["stream"],
        "empty_cache": lambda: None,
        "get_device_name": lambda: "NVIDIA Pretended",
        "graph": graph,
        "max_memory_allocated": lambda: 3 << 20,
        "memory_allocated": lambda: 1 << 20,
        "reset_peak_memory_stats": lambda: None,
        "set_stream": lambda stream: seen.update(stream=stream),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # `with torch.device(...)` remembers torch's constructors when it is first used: not this one.
    torch.utils._device._device_constructors()
    empty, adamw = torch.empty, torch.optim.AdamW

    def empty_here(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return empty(*(8 if n == 256 << 20 else n for n in size), **options)

    def adamw_here(parameters: Any, lr: float, capturable: bool) -> torch.optim.Optimizer:
        assert capturable and lr == 0.0
        return adamw(parameters, lr=lr)

    @contextlib.contextmanager
    def profile(activities: list[Any], acc_events: bool) -> Iterator[Any]:
        assert activities == [torch.profiler.ProfilerActivity.CUDA] and acc_events
        yield SimpleNamespace(events=list)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch, "empty", empty_here)
    monkeypatch.setattr(torch.optim, "AdamW", adamw_here)
    return seen


def test_what_teaches_most_comes_first() -> None:
    names = [e.name for e in step.entries(["EFFT2", "LoRA"], ["cuda", "triton"], "auto")]
    assert names == [
        peers.FLOOR,
        "EFFT2 [cuda]",
        "LoRA [cuda]",
        peers.PEFT_LORA,
        "EFFT2 [triton]",
        "LoRA [triton]",
    ]
    (_, named, _) = step.entries(["EFFT2"], ["cuda"], "split")
    assert named.name == "EFFT2 [cuda split]"
    (_, named, _) = step.entries(["EFFT2"], [step.AUTO], "auto")
    assert named.name == "EFFT2"


def test_a_peer_s_layers_are_bound_to_its_backend(small_model: nn.Module) -> None:
    peer = step.Entry("EFFT2", "torch", "split").build(small_model, RANK)
    layers = step.fused_layers(peer.model)
    assert len(layers) == 8
    assert {(layer.backend, layer.strategy) for layer in layers} == {("torch", "split")}
    assert not any(isinstance(m, FusedEFFTLinear) for m in small_model.modules())


@pytest.mark.parametrize(("backend", "chained"), [(step.AUTO, True), ("torch", False)])
def test_only_what_chooses_runs_its_blocks_in_a_chain(
    small_model: nn.Module, backend: str, chained: bool
) -> None:
    peer = step.Entry("EFFT2", backend).build(small_model, RANK)
    assert (Adapter(peer.model).describe().alone is None) == chained


def test_steps_that_are_asked_for(small_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = step.Entry("EFFT2", "auto+pair_grad+gelu_grad")
    assert entry.name == "EFFT2 [auto+pair_grad+gelu_grad]"
    with pytest.raises(ValueError, match=r"there is no gelu_grad, pair_grad in CUDA C\+\+"):
        entry.build(small_model, RANK)
    monkeypatch.setattr(step, "steps_there", lambda *_: ["pair_grad", "gelu_grad"])
    assert Adapter(entry.build(small_model, RANK).model).describe().alone is None
    default = cuda_chain.chosen
    with entry.running():
        assert cuda_chain.chosen(768, 16, 12608, 0) == {
            "pair_grad": True,
            "before": False,
            "gelu": False,
            "gelu_grad": True,
        }
    assert cuda_chain.chosen is default
    with step.Entry("EFFT2", step.AUTO).running():
        assert cuda_chain.chosen is default


def test_the_steps_that_there_are(small_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, k = small_model.blocks[0].mlp.fc1.weight.shape  # type: ignore[index,union-attr]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_chain, "takes", lambda *sizes: sizes == (k, 16, 0))
    assert step.steps_there(small_model, 16, "cuda") == cuda_chain.choices(k, hidden) != []
    assert step.steps_there(small_model, 32, "cuda") == []
    assert step.steps_there(small_model, 16, "cpu") == []
    assert step.steps_there(nn.Linear(2, 2), 16, "cuda") == []
    config = SimpleNamespace(hidden_size=k, intermediate_size=5120)
    assert step.steps_there(SimpleNamespace(config=config), 16, "cuda") == [
        "pair_grad",
        "before",
        "gelu_grad",
    ]


@pytest.mark.parametrize(
    "backend", ["auto+before+before", "auto+before+pairs", "cuda+before", "auto+"]
)
def test_other_steps_are_refused(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.parse(["--backends", backend])
    assert (
        f"auto+ with some of pair_grad, before, gelu, gelu_grad, got {backend}"
        in capsys.readouterr().err
    )


def test_what_there_is_in_cuda_is_tried_unasked(
    small_model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(step, "steps_there", lambda *_: ["before", "gelu"])
    monkeypatch.setitem(step.BACKENDS, "cpu", (step.AUTO, "torch"))
    out = tmp_path / "step.csv"
    assert step.main((*CPU_RUN, "--methods", "EFFT2", "--out", str(out))) == 0
    ours = [row["impl"] for row in read_rows(out) if row["impl"].startswith("EFFT2")]
    assert ours == ["EFFT2", "EFFT2 [auto+before+gelu]", "EFFT2 [torch]"]


def test_a_peer_that_chooses_says_what_it_does(
    small_model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.csv"
    options = ("--methods", "EFFT2", "--backends", "auto", "--out", str(out))
    assert step.main((*CPU_RUN, *options)) == 0
    assert [row["impl"] for row in read_rows(out)] == [peers.FLOOR, "EFFT2", peers.PEFT_LORA]
    assert "EFFT2: its blocks may run in a chain" in capsys.readouterr().out


def test_a_run_on_a_cpu_writes_a_row_per_peer_and_its_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kernels = tmp_path / "step.csv", tmp_path / "kernels.csv"
    options = ("--frozen-dtype", "bfloat16", "--methods", "EFFT2", "--backends", "torch")
    files = ("--out", str(out), "--profile", str(kernels))
    step.main((*CPU_RUN, *options, *files))
    rows = read_rows(out)
    assert [row["impl"] for row in rows] == [peers.FLOOR, "EFFT2 [torch]", peers.PEFT_LORA]
    assert tuple(rows[0]) == STEP_COLUMNS
    for row in rows:
        assert (row["mode"], row["frozen_dtype"], row["rounds"]) == ("eager", "bfloat16", "2")
        assert float(row["ratio_to_floor"]) > 0 and float(row["saved_mib"]) > 0
        assert (row["gate"] == "") == (row["impl"] == peers.FLOOR)
    listed = read_rows(kernels)
    assert tuple(listed[0]) == KERNEL_COLUMNS
    assert [r["impl"] for r in listed if r["kernel"] == "all"] == [row["impl"] for row in rows]
    assert "EFFT2 [torch]" in capsys.readouterr().out.split("one training step")[1]


def test_a_run_on_a_gpu_captures_every_peer(
    fake_cuda: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.csv"
    compiled: list[nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
        code = step.main(
            (*GPU_RUN, "--modes", *step.MODES, "--out", str(out), "--profile", str(tmp_path / "k"))
        )
    rows = read_rows(out)
    names = [peers.FLOOR, "EFFT2 [torch]", peers.PEFT_LORA]
    assert [(r["impl"], r["mode"]) for r in rows] == [(n, m) for n in names for m in step.MODES]
    assert fake_cuda["captures"] == 6 and len(compiled) == 3
    assert FakeGraph.last.replays == 2 + 2  # warm-ups and rounds
    for row in rows:
        assert row["device"] == "NVIDIA Pretended" and row["ratio_to_floor"] == "1.0000"
        assert row["loss"] == next(r["loss"] for r in rows if r["impl"] == row["impl"])
        assert row["peak_mem_mb"] == ("" if row["mode"].endswith("graph") else "2.0")
    assert code == 1
    assert capsys.readouterr().err.count("RuntimeError: the profiler saw no kernel") == len(names)


def test_rows_and_floor_of_either_library(small_model: nn.Module) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    theirs = ViTForImageClassification(config).requires_grad_(False)
    assert step.tokens(theirs) == 17
    assert step.tokens(small_model) == 5
    for model in (theirs, small_model):
        floor = step.unbroken_floor(model)
        trained = [name for name, p in floor.named_parameters() if p.requires_grad]
        assert [name for name in trained if "pos" in name] and len(trained) <= 3
        assert not any(p.requires_grad for name, p in model.named_parameters() if "pos" in name)


def test_what_was_captured_lives_as_long_as_its_replay(fake_cuda: dict[str, Any]) -> None:
    """An optimizer's state, say: the graph holds its address alone."""
    state = torch.ones(3)
    alive = weakref.ref(state)
    replay = timing.captured(lambda state=state: state.add_(1))
    del state
    gc.collect()
    assert alive() is not None
    replay()
    assert FakeGraph.last.replays == 1
    del replay
    gc.collect()
    assert alive() is None


def test_a_failed_capture_is_reported_and_leaves_the_stream(
    fake_cuda: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = fake_cuda["stream"]
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("not in a capture")

    with pytest.raises(RuntimeError, match="not in a capture"):
        timing.captured(call, warm_ups=2)
    assert fake_cuda["stream"] is stream

    real = step.captured

    def fails_once(call: Callable[[], object]) -> Callable[[], object]:
        step.captured = real
        raise RuntimeError("capture refused")

    out = tmp_path / "step.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "captured", fails_once)
        code = step.main((*GPU_RUN, "--out", str(out)))
    printed = capsys.readouterr()
    assert code == 1 and "capture refused" in printed.err
    assert f"FAILED {peers.FLOOR}: graph" in printed.out
    graphs = [row for row in read_rows(out) if row["mode"] == "graph"]
    assert len(graphs) == 2 and {row["ratio_to_floor"] for row in graphs} == {""}


def test_a_wrong_peer_is_timed_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step.Gate, "ratio", lambda self, peer: float("nan"))
    out = tmp_path / "step.csv"
    arguments = (*CPU_RUN, "--methods", "EFFT2", "--backends", "torch", "--out", str(out))
    assert step.main(arguments) == 0
    assert [row["gate"] for row in read_rows(out)] == ["", "failed", "failed"]
    assert "gate failed" in capsys.readouterr().out
    assert step.main((*arguments, "--no-gate")) == 0
    assert [row["gate"] for row in read_rows(out)[3:]] == ["", "off", "off"]


def test_a_peer_that_cannot_be_built_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = peers.build

    def refusing(name: str, *arguments: Any, **options: Any) -> peers.Peer:
        if name == "EFFT2" and "formula" not in options:
            raise RuntimeError("no such method here")
        return build(name, *arguments, **options)

    monkeypatch.setattr(peers, "build", refusing)
    out = tmp_path / "step.csv"
    assert step.main((*CPU_RUN, "--backends", "torch", "--out", str(out))) == 1
    assert [row["impl"] for row in read_rows(out)] == [peers.FLOOR, "LoRA [torch]", peers.PEFT_LORA]


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(SystemExit):
        step.parse(["--device", "cpu", "--modes", "graph"])
    assert step.parse(["--device", "cuda"]).modes == ("eager", "graph")


def test_committed_rows_passed_the_gate() -> None:
    assert {row["gate"] for row in read_rows(STEP_CSV)} <= {"", "passed"}

"""The peers compute what they say they do, and the whole-model rows are gated on it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import peers, whole_model
from benchmarks.lib.rows import WHOLE_MODEL_COLUMNS, read_rows
from benchmarks.peers import Peer

RANK = 3


@pytest.fixture
def base(make_vit: Callable[..., nn.Module]) -> nn.Module:
    model = make_vit(embed_dim=24, dtype=torch.float64).requires_grad_(False)
    model.head.requires_grad_()
    return model


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 3])


@pytest.mark.parametrize("name", peers.SAME_FUNCTION)
def test_a_peer_computes_its_method_s_function(
    name: str, base: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ours = peers.build(peers.SAME_FUNCTION[name], base, RANK)
    theirs = peers.build(name, base, RANK)
    assert sorted(ours.factors) == sorted(theirs.factors)
    for own, other in zip(
        whole_model.results(ours, *batch, None),
        whole_model.results(theirs, *batch, None),
        strict=True,
    ):
        assert own.norm() > 0
        torch.testing.assert_close(other, own, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["EFFT1", "EFFT2", "FacT-TT", "FacT-TK", "LoRA"])
def test_the_eager_formula_runs_every_method(
    method: str, base: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ours = peers.build(method, base, RANK)
    eager = peers.build(method, base, RANK, formula=peers.factored)
    assert not any(type(m).__name__ == "FusedEFFTLinear" for m in eager.model.modules())
    for own, other in zip(
        whole_model.results(ours, *batch, None),
        whole_model.results(eager, *batch, None),
        strict=True,
    ):
        torch.testing.assert_close(other, own, rtol=1e-9, atol=1e-11)


def test_the_backbone_is_shared_and_full_fine_tuning_is_not(base: nn.Module) -> None:
    weight = base.blocks[0].attn.qkv.weight
    ours, full = peers.build("EFFT2", base, RANK), peers.build(peers.FULL, base, RANK)
    assert ours.model.blocks[0].attn.qkv.weight is weight
    assert full.model.blocks[0].attn.qkv.weight is not weight
    assert not weight.requires_grad and len(full.trainable()) == len(list(base.parameters()))


def test_what_trains(base: nn.Module) -> None:
    head = sum(p.numel() for p in base.head.parameters())

    def trained(name: str) -> int:
        return sum(p.numel() for p in peers.build(name, base, RANK).trainable())

    assert trained(peers.FLOOR) == trained(peers.PROBE) == head
    assert trained("LoRA") == trained(peers.PEFT_LORA) > head
    assert trained("EFFT2") == trained(peers.EAGER_EFFT2) == trained(peers.RELEASED_EFFT2) > head


def test_the_floor_s_gradient_reaches_the_first_block(
    base: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    peer = peers.build(peers.FLOOR, base, RANK)
    seen: list[bool] = []
    block = peers.first_block(peer.model)
    block.register_full_backward_hook(lambda *_: seen.append(True))
    whole_model.step_of(peer, *batch, None)()
    assert seen == [True] and base.patch_embed.proj.weight.grad is None


def test_a_wrong_peer_gets_no_row(
    base: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = base.float()
    # Two images' ten logits are too few to compare errors by: once a right peer came to 2.16.
    images, targets = torch.randn(64, 3, 8, 8), torch.arange(64) % 5
    monkeypatch.setattr(whole_model, "GATE_IMAGES", 64)

    def doubled(x: torch.Tensor, linear: nn.Linear, bank: object, site: str) -> torch.Tensor:
        return 1.001 * peers.factored(x, linear, bank, site)  # type: ignore[arg-type]

    monkeypatch.setitem(peers.FORMULAS, peers.EAGER_EFFT2, doubled)
    monkeypatch.setattr(whole_model, "make_base", lambda *_: copy.deepcopy(base))
    monkeypatch.setattr(whole_model, "draw_batch", lambda *_: (images, targets))
    rows = whole_model.bench_model(
        *("a_vit", 64, RANK),
        device="cpu",
        amp=None,
        impls=["EFFT2", peers.EAGER_EFFT2],
        seconds=0.0,
        profile=tmp_path / "operators.csv",
    )
    assert [row["impl"] for row in rows] == [peers.FLOOR, "EFFT2"]
    profiled = read_rows(tmp_path / "operators.csv")
    assert {row["impl"] for row in profiled} == {peers.FLOOR, "EFFT2"}
    assert {row["model"] for row in profiled} == {"a_vit"}
    assert {"native_forward", "all"} & {row["kernel"] for row in profiled}
    assert "no row" in capsys.readouterr().err
    for row in rows:
        assert set(row) <= set(WHOLE_MODEL_COLUMNS)
        assert float(row["saved_mib"]) > 0 and int(row["rounds"]) >= 3
    assert float(rows[0]["ratio_to_floor"]) == 1.0
    assert float(rows[1]["err_ratio"]) <= 2


def test_a_step_s_resident_memory_is_what_the_backward_keeps(tmp_path: Path) -> None:
    out = tmp_path / "memory.csv"
    command = [sys.executable, "-m", "benchmarks.whole_model", "--memory-only"]
    impls = ["EFFT2", peers.PEFT_LORA, "full fine-tuning"]
    command += ["--models", "vit_tiny_patch16_224:4", "--impls", *impls]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=600)
    frozen, ours, peft, full = read_rows(out)
    for row in (frozen, ours, peft):
        assert not row["ms_p50"]
        assert float(row["peak_mem_mb"]) == pytest.approx(float(row["saved_mib"]), rel=0.15)
    assert float(ours["peak_mem_mb"]) <= 1.07 * float(frozen["peak_mem_mb"])
    assert float(peft["peak_mem_mb"]) >= 1.4 * float(frozen["peak_mem_mb"])
    # 22 MiB less, were the gradients of the step before still there when it starts.
    assert float(full["peak_mem_mb"]) >= 0.95 * float(full["saved_mib"])


def test_gradients_are_ordered_by_name() -> None:
    first, second = (nn.Parameter(torch.zeros(n)) for n in (2, 1))
    first.grad, second.grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    peer = Peer("p", nn.Identity(), None, {"b": first, "a": second})
    assert peer.factor_grads().tolist() == [3.0, 1.0, 2.0]

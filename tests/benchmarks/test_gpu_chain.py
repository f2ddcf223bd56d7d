"""The launches of a chain by themselves: what is measured, without a GPU."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import chain
from efft_kernels.ops.backends.chain_steps import TorchSteps

pytest.importorskip("triton")


def test_the_shipped_block_shapes_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from efft_kernels.ops.backends.triton import chain as shipped

    monkeypatch.setattr(shipped, "multiprocessors", lambda index: 132)  # an H100's
    first = [configs[0] for configs in chain.candidates("cuda").values()]
    assert first == list(shipped.configs_for.__wrapped__(768, 16, None))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_candidate_is_tried_by_a_launch(device: str) -> None:
    names = chain.calls(TorchSteps(), chain.TINY, "meta", torch.bfloat16)
    tried = {shapes for name in names for shapes in chain.tried(name, device)}
    for field, configs in chain.candidates(device).items():
        assert {getattr(shapes, field) for shapes in tried} == set(configs)


def test_every_launch_has_its_step_in_torch() -> None:
    for call in chain.calls(TorchSteps(), chain.TINY, "cpu", torch.float32).values():
        assert all(t.isfinite().all() for t in chain._tensors(call()))


def test_says_which_launch_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Wrong(TorchSteps):
        def pair_grad(self, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sum_down, sum_b = super().pair_grad(*given)
            return sum_down, 2 * sum_b

        def gather_grad(self, *_):
            raise RuntimeError("out of shared memory")

    monkeypatch.setattr(chain, "make_steps", lambda shapes: Wrong())
    out = tmp_path / "chain.csv"
    assert not chain.measure(chain.TINY, "cpu", 1, out)
    rows = list(csv.DictReader(out.open()))
    assert {row["form"] for row in rows if row["launch"] == "pair_grad"} == {"torch"}
    assert all(float(row["us_p50"]) > 0 and row["M"] == str(chain.TINY.M) for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("pair_grad") and "WRONG" in line for line in lines)
    assert any(line.startswith("gather ") and "out of shared memory" in line for line in lines)
    assert any(line.startswith("norm_grad ") and "WRONG" not in line for line in lines)

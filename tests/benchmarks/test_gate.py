"""The gate before every benchmark row: one wrong or missing number in any result closes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks import operators
from benchmarks.lib import operands as lib
from benchmarks.lib import timing
from efft_kernels.testing.error_budget import BUDGET

LAYER = ("qkv", 13, 7, 15, 3)
RESULTS = ("y", "x", "down", "core", "up")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Result → what is added to one number of it, in every implementation but the reference."""
    added: dict[str, float] = {}
    results = lib._results

    def spoiled(impl: str, o: lib.Operands) -> list[Tensor]:
        found = results(impl, o)
        if impl != "reference":
            for name, value in added.items():
                found[RESULTS.index(name)].view(-1)[-1] += value
        return found

    monkeypatch.setattr(lib, "_results", spoiled)
    return added


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_one_wrong_number_in_any_result_gives_no_row(
    spoil: dict[str, float], capsys: pytest.CaptureFixture[str], name: str, value: float
) -> None:
    gate = lib.Gate(LAYER, 2, torch.float32, "cpu")
    assert gate.error("torch:split") <= BUDGET
    spoil[name] = value
    assert not gate.error("torch:split") <= BUDGET
    found = operators.errors(LAYER, 2, ("torch:split",), torch.float32, "cpu", "here")
    assert found == {lib.FLOOR: 0.0}
    assert capsys.readouterr().err.startswith("here torch:split: error ")


def test_the_largest_error_counts(spoil: dict[str, float]) -> None:
    gate = lib.Gate(LAYER, 2, torch.float32, "cpu")
    spoil["core"] = 1e-3
    small = gate.error("torch:split")
    spoil["down"] = 1.0
    large = gate.error("torch:split")
    del spoil["core"]
    assert small < large == gate.error("torch:split")


def test_what_cannot_run_is_named_and_the_others_stay(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_of = lib.forward_of

    def broken(impl: str, o: lib.Operands) -> object:
        if impl == "auto":
            raise RuntimeError("not here")
        return forward_of(impl, o)

    monkeypatch.setattr(lib, "forward_of", broken)
    impls = ("auto", "torch:split", "peft")
    found = operators.errors(LAYER, 2, impls, torch.float32, "cpu", "here")
    assert list(found) == [lib.FLOOR, "torch:split", "peft"]
    assert capsys.readouterr().err == "here auto: not here\n"


def test_each_call_warms_up_before_the_first_round() -> None:
    ran: list[str] = []
    calls = {name: (lambda name=name: ran.append(name)) for name in ("a", "b")}
    timings = timing.interleave(calls, seconds=0.0, fewest_rounds=3, warm_ups=2)
    assert ran[:4] == ["a", "a", "b", "b"]
    assert timings.rounds == 3
    assert len(ran) == 10

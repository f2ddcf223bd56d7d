"""The fuzzer passes what is right, and says how to see again what is not."""

from __future__ import annotations

import pytest
import torch

from efft_kernels import low_rank_linear
from tools import fuzz


def test_right_calls_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.fuzz(5, seconds=1.0, only=False) == 0
    assert "0 wrong of" in capsys.readouterr().out


def test_a_number_draws_the_same_call() -> None:
    for number in range(20):
        one, other = fuzz.Call(number), fuzz.Call(number)
        assert str(one) == str(other)
        (tensors, dy), (again, dy_again) = one.tensors(), other.tensors()
        assert all(t is again[n] or torch.equal(t, again[n]) for n, t in tensors.items())
        assert dy.stride() == dy_again.stride()


def scaled(by: float, name: str):
    def call(backend: str, **tensors: torch.Tensor) -> torch.Tensor:
        if backend != "reference" and tensors[name] is not None:
            tensors[name] = tensors[name] * by
        return low_rank_linear(backend=backend, **tensors)

    return call


@pytest.mark.parametrize("name", ["x", "bias", "up"])
def test_a_wrong_call_is_printed_with_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "low_rank_linear", scaled(1.2, name))
    bad = fuzz.fuzz(5, seconds=1.0, only=False)
    out = capsys.readouterr().out
    assert bad >= 5 and "is off by" in out and "python -m tools.fuzz --only " in out


def test_a_call_that_raises_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fuzz, "low_rank_linear", fail)
    assert fuzz.fuzz(5, seconds=0.3, only=False) >= 2
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_sum_that_happens_to_cancel_is_no_fault() -> None:
    """d_down is one number here, 903 terms of which all but a fiftieth cancel."""
    assert fuzz.Call(1795738387150).wrong() is None

"""The choices of backend and strategy that the C++ entry point remembers."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from efft_kernels import low_rank_linear
from efft_kernels.ops import cost_model, eager_entry
from efft_kernels.ops.backends import cpp_backend, torch_backend

from .both_ways import assert_identical, on_both_ways, operands, step


@pytest.fixture
def decisions(monkeypatch):
    """Every call of `_decide`: (M, training, answer)."""
    seen = []
    real = eager_entry._decide

    def decide(x, weight, down, core, up, rows, training, requested):
        answer = real(x, weight, down, core, up, rows, training, requested)
        seen.append((rows, training, answer))
        return answer

    monkeypatch.setattr(eager_entry, "_decide", decide)
    eager_entry.forget_choices()
    yield seen
    cost_model._measured.clear()
    cost_model.choose.cache_clear()
    eager_entry.forget_choices()


class TestRememberedChoices:
    def test_asked_once_per_kind_of_call(self, decisions):
        for _ in range(3):
            low_rank_linear(**operands())
            step(operands())
            low_rank_linear(**operands((2, 3)))
            step(operands(), wanted=("x",))  # P is not saved: the forward without training
            low_rank_linear(**operands(dtype=torch.float64))
            low_rank_linear(**operands(dtype=torch.float16))
        asked = [(rows, training) for rows, training, _ in decisions]
        assert asked == [(11, False), (11, True), (6, False), (11, False), (11, False)]
        *native_ones, (_, _, in_python) = decisions
        assert all(isinstance(part, int) for _, _, answer in native_ones for part in answer)
        assert all(map(callable, in_python[:2])), "torch takes float16"

    def test_asked_for_each_kind_of_operands(self, decisions):
        """Kinds that differ in one size or dtype alone."""
        kinds = [
            {}, {"k": 8}, {"per_slice": 6}, {"per_slice": 3, "slices": 5}, {"core": False},
            {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "factor_dtype": torch.float32},
        ]  # fmt: skip
        wider = operands() | {"down": torch.randn(7, 4), "core": torch.randn(3, 4, 2)}
        for _ in range(2):
            for kind in kinds:
                low_rank_linear(**operands(**kind))
            low_rank_linear(**wider)
            with torch.autocast("cpu", torch.bfloat16):
                low_rank_linear(**operands(factor_dtype=torch.bfloat16))
                low_rank_linear(**operands())
        assert len(decisions) == len(kinds) + 3

    def test_forgotten_when_told(self, decisions):
        for _ in range(2):
            low_rank_linear(**operands())
            eager_entry.forget_choices()
        assert len(decisions) == 2

    def test_strategy_by_name_is_kept_apart(self, decisions):
        """One kind of call for each name asked for; the answers differ."""
        for strategy in ("split", "merged", "split", "merged"):
            low_rank_linear(**operands(), strategy=strategy)
            low_rank_linear(**operands(), strategy=strategy, backend="cpp")
        codes = [answer[0] for _, _, answer in decisions]
        assert codes == [
            cpp_backend.STRATEGY_CODES[name] for name in ("split", "split", "merged", "merged")
        ]

    def test_measurements_take_effect(self, decisions):
        tensors = operands()
        low_rank_linear(**tensors)
        (_, _, predicted), = decisions  # fmt: skip
        other = "merged" if predicted[0] == cpp_backend.STRATEGY_CODES["split"] else "split"
        common = {
            "backend": "cpp", "backward": False, "compute_bytes": 4, "weight_bytes": 4,
            "M": 11, "K": 7, "N": 15, "rank": 3,
        }  # fmt: skip
        cost_model.add_measured(
            common | {"strategy": strategy, "ms_p50": 1.0 if strategy == other else 2.0}
            for strategy in cpp_backend.STRATEGIES
        )
        low_rank_linear(**tensors)
        assert len(decisions) == 2
        assert decisions[1][2] == (cpp_backend.STRATEGY_CODES[other], *predicted[1:])

    def test_refusals_are_not_remembered(self, decisions):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="'cpp' was asked for but cannot take x: dtype"):
                low_rank_linear(**operands(dtype=torch.float16), backend="cpp")
        assert decisions == []

    def test_two_backends_for_one_call_are_left_to_python(
        self, decisions, python_calls, monkeypatch
    ):
        monkeypatch.setattr(cpp_backend, "preferred", lambda problem: not problem.backward)
        tensors = operands()
        for _ in range(2):  # asked for, then remembered
            found, expected = on_both_ways(lambda: step(tensors))
            assert_identical(found, expected)
        assert [answer for _, _, answer in decisions] == [None] and len(python_calls) == 4

    def test_what_the_native_kernels_cannot_reach_is_called_in_python(
        self, decisions, python_calls, monkeypatch
    ):
        called = []
        monkeypatch.setattr(cpp_backend, "out_of_reach", lambda problem: True)
        for name in ("forward", "backward"):
            real = getattr(cpp_backend, name)
            monkeypatch.setattr(
                cpp_backend,
                name,
                lambda *a, real=real, name=name, **k: called.append(name) or real(*a, **k),
            )
        found, expected = on_both_ways(lambda: step(operands()))
        assert called == ["forward", "backward"] * 2 and len(python_calls) == 1
        torch.testing.assert_close([t.shape for t in found], [t.shape for t in expected])
        assert all(map(callable, decisions[0][2][:2]))

    @pytest.mark.parametrize(
        ("device", "weight_dtype", "strategy", "cast"),
        [
            ("cuda", torch.float32, "split", True),
            ("cuda", torch.float32, "merged", False),  # it adds to the float32 weight
            ("cuda", torch.bfloat16, "split", False),
            ("cpu", torch.float32, "split", False),
        ],
    )
    def test_a_wider_weight_is_cast_once_on_a_gpu(
        self, monkeypatch, device, weight_dtype, strategy, cast
    ):
        asked = []

        def select(backend, wanted, problem, x):
            asked.append((problem.M, problem.backward, problem.weight_bytes))
            return torch_backend, wanted

        monkeypatch.setattr(eager_entry.dispatch, "select", select)
        with FakeTensorMode():
            x, weight, down, core, up = (
                torch.empty(size, device=device, dtype=dtype)
                for size, dtype in (
                    ((3, 11, 7), torch.bfloat16),
                    ((15, 7), weight_dtype),
                    ((7, 3), torch.float32),
                    ((3, 3, 2), torch.float32),
                    ((1, 5, 2), torch.float32),
                )
            )
            code = eager_entry._BACKEND_CODES["torch"] + eager_entry._STRATEGIES.index(strategy)
            answer = eager_entry._decide(x, weight, down, core, up, 33, True, code)
        assert answer is not None and answer[2] is cast
        assert asked == [
            (33, False, weight_dtype.itemsize),
            (33, True, 2 if cast else weight_dtype.itemsize),
        ]

    def test_more_kinds_of_call_than_are_kept(self, decisions):
        t = operands((1,), k=2)
        for rows in range(4200):
            low_rank_linear(**(t | {"x": torch.ones(2).expand(rows, 2)}))
        found, expected = on_both_ways(lambda: low_rank_linear(**t))
        assert torch.equal(found, expected) and len(decisions) >= 4200

"""Errors have the same type and text with and without the C++ entry point."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from efft_kernels import low_rank_linear

from .both_ways import NAMES, on_both_ways, on_each_backend, operands, refusal

HALF, DOUBLE, WHOLE = torch.float16, torch.float64, torch.int64
SHAPES = {
    "x": (4, 7),
    "weight": (15, 7),
    "bias": (15,),
    "down": (7, 3),
    "core": (3, 3, 2),
    "up": (1, 5, 2),
}
REFUSALS = [
    *({name: value} for name in NAMES for value in ([1.0], np.ones(3), 1.0, "x")),
    *({name: None} for name in ("x", "weight", "down", "up")),
    *({name: torch.ones(SHAPES[name], dtype=d)} for name in NAMES for d in (HALF, DOUBLE, WHOLE)),
    *({name: torch.ones(SHAPES[name], device="meta")} for name in NAMES),
    *({name: torch.ones(*SHAPES[name][:-1], SHAPES[name][-1] + 1)} for name in NAMES),
    *({name: torch.ones(SHAPES[name][1:])} for name in NAMES[1:]),
    *({name: torch.ones(2, *SHAPES[name])} for name in NAMES[1:]),
    {"down": torch.ones(7, 0)},
    {"core": torch.ones(0, 3, 2)},
    {"core": torch.ones(2, 3, 2)},
    {"up": torch.ones(2, 5, 2)},
    {"core": None},
    {"core": None, "up": torch.ones(0, 5, 3)},
    {"backend": "tritton"},
    {"backend": "cuda"},
    {"strategy": "quick"},
    {"backend": "triton"},
    {"strategy": "fused", "backend": "cpp"},
    {"strategy": "fused", "backend": "torch"},
    {"strategy": "fused"},
    {"backend": "cpp", **{name: torch.ones(shape, dtype=HALF) for name, shape in SHAPES.items()}},
]


@on_each_backend
@pytest.mark.parametrize("changes", REFUSALS, ids=lambda changes: "-".join(changes))
@pytest.mark.parametrize("grad", [False, True])
def test_same_refusals(changes, grad):
    """Type and text, whether or not there is an entry point."""
    if changes.get("backend") in ("cuda", "triton") and torch.cuda.is_available():
        pytest.skip("there is one here")

    def run():
        given = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        given["down"].requires_grad_(grad)
        return low_rank_linear(**(given | changes))

    found, expected = on_both_ways(lambda: refusal(run))
    assert found == expected
    assert issubclass(found[0], TypeError | ValueError | RuntimeError)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            run()
        except (TypeError, ValueError, RuntimeError):
            found, expected = on_both_ways(lambda: refusal(run))
            assert found == expected


def test_same_refusal_of_half_precision_beside_float32_weights():
    """x in half precision outside autocast, with weights that only autocast would cast."""

    def run():
        return low_rank_linear(**(operands() | {"x": torch.ones(4, 7, dtype=torch.bfloat16)}))

    found, expected = on_both_ways(lambda: refusal(run))
    assert found == expected and "outside autocast" in found[1]


@on_each_backend
def test_inference_tensors_in_a_training_step():
    """They cannot be saved for a backward; both ways say so."""
    tensors = operands()
    with torch.inference_mode():
        tensors["x"] = tensors["x"] * 1
    tensors["down"].requires_grad_()
    found, expected = on_both_ways(lambda: refusal(lambda: low_rank_linear(**tensors)))
    assert found == expected and "Inference tensors cannot be saved" in found[1]


@on_each_backend
@pytest.mark.parametrize("wanted", [("x", "core"), ("x", "up"), ("core", "up")])
def test_same_refusal_of_a_second_derivative(wanted):
    def run():
        tensors = operands()
        inputs = [tensors[name].requires_grad_() for name in wanted]
        y = low_rank_linear(**tensors)
        return refusal(lambda: torch.autograd.grad(y.sum(), inputs, create_graph=True))

    found, expected = on_both_ways(run)
    assert found == expected

"""pytest-benchmark's view of the operator, for comparing two states of one's own tree.

    python -m pytest benchmarks/test_operators.py --benchmark-autosave
    python -m pytest benchmarks/test_operators.py --benchmark-compare

Not part of the test suite. The CSVs come from operators.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.lib.operands import FLOOR, Operands, call_of
from benchmarks.lib.shapes import models
from benchmarks.operators import CPU_IMPLS, CPU_MODES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = {layer[0]: layer for layer in models(1)["ViT-S/16"]}


@pytest.mark.parametrize("impl", [FLOOR, *CPU_IMPLS])
@pytest.mark.parametrize("mode", CPU_MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_operator(benchmark: Any, layer: str, mode: str, impl: str) -> None:
    benchmark.group = f"ViT-S/16 {layer}, r = 16, {mode}"
    operands = Operands.draw(LAYERS[layer], 16, torch.float32, DEVICE)
    call = call_of(impl, mode, operands)

    def synchronized() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)

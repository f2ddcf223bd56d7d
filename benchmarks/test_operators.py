"""pytest-benchmark's view of the operator, for comparing two states of one's own tree.

    python -m pytest benchmarks/test_operators.py --benchmark-autosave
    python -m pytest benchmarks/test_operators.py --benchmark-compare

Not part of the test suite. The CSVs come from operator_sweep.py and operator_bench.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.operator_bench import FLOOR, Operands
from benchmarks.operator_sweep import IMPLS, MODES, calls_of, vit_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = {layer[0]: layer for layer in vit_layers(384, 197, 1)}


@pytest.mark.parametrize("impl", [FLOOR, *IMPLS])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_operator(benchmark: Any, layer: str, mode: str, impl: str) -> None:
    benchmark.group = f"ViT-S/16 {layer}, r = 16, {mode}"
    operands = Operands.draw(LAYERS[layer], 16, torch.float32, DEVICE)
    call = calls_of(mode, operands, [impl])[impl]

    def synchronized() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)

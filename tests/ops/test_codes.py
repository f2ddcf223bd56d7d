"""The integers that cross from Python to the native operators are the same on both sides."""

from __future__ import annotations

import re
from pathlib import Path

from efft_kernels.ops import recompute, schemas

HEADER = Path(__file__).parents[2] / "csrc" / "codes.h"


def enumerators(name: str) -> dict[str, int]:
    """The names and values of an enum of codes.h."""
    (body,) = re.findall(rf"enum {name} : int64_t {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    found = re.findall(r"k(\w+) = (\d+)(?: << (\d+))?", body)
    assert len(found) == body.count("=")
    return {key.lower(): int(value) << int(shift or 0) for key, value, shift in found}


def test_strategies():
    assert enumerators("Strategy") == schemas.STRATEGY_CODES
    assert list(schemas.STRATEGY_CODES) == list(schemas.STRATEGIES)


def test_needs():
    needs = {
        f"need{name}": schemas.needs_code([other == name for other in schemas.OPERANDS])
        for name in schemas.OPERANDS
    }
    assert enumerators("Need") == needs
    assert schemas.needs_code([True] * len(needs)) == sum(needs.values())


def test_producers():
    codes = ("PLAIN", "LAYER_NORM", "GELU", "GELU_TANH")
    found = enumerators("MadeBy")
    assert list(found.values()) == [getattr(recompute, code) for code in codes]
    assert list(found) == [code.replace("_", "").lower() for code in codes]

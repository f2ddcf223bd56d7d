"""The ledger: finished cells are found again, everything else is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from efft_kernels.experiments.ledger import Ledger, key


@dataclass(frozen=True)
class Entry:
    """A cell of the test's own."""

    name: str
    setting: float

    def identity(self) -> dict[str, Any]:
        return {"setting": self.setting, "more": [1, "ö"]}


def test_what_is_finished_is_found_by_its_configuration(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first, other = Entry("a", 0.1), Entry("a", 0.2)
    assert ledger.find(first) is None
    ledger.finish(first, {"top1_percent": 71.5})
    assert ledger.find(first) == {"top1_percent": 71.5}
    assert ledger.find(other) is None
    assert key(first) != key(other)
    assert [path.name for path in tmp_path.iterdir()] == [f"a-{key(first)}"]
    content = json.loads((ledger.place(first) / "result.json").read_text())
    assert content["identity"] == first.identity()


def test_the_key_is_the_same_in_every_process_and_release() -> None:
    assert key(Entry("any", 0.1)) == "054efdff04afa42b"


def test_a_failure_is_kept_until_the_cell_finishes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    entry = Entry("a", 1.0)
    assert ledger.failure(entry) is None
    ledger.fail(entry, "loss is nan")
    assert ledger.failure(entry) == "loss is nan"
    assert ledger.find(entry) is None
    ledger.finish(entry, {})
    assert ledger.failure(entry) is None
    assert ledger.find(entry) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1]",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"setting": 1.0', '"setting": 2.0'),
        lambda text: text.replace('"result": {', '"other": {'),
    ],
)
def test_a_damaged_record_counts_as_none_and_is_told(tmp_path: Path, damage: Any) -> None:
    told: list[str] = []
    ledger = Ledger(tmp_path, told.append)
    entry = Entry("a", 1.0)
    ledger.finish(entry, {"top1_percent": 1})
    path = ledger.place(entry) / "result.json"
    path.write_text(damage(path.read_text()))
    assert ledger.find(entry) is None
    assert str(path) in told[0]
    ledger.finish(entry, {"top1_percent": 2})
    assert ledger.find(entry) == {"top1_percent": 2}


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    entry = Entry("a", 1.0)
    ledger.finish(entry, {"top1_percent": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        ledger.finish(entry, {"top1_percent": float("nan")})
    assert ledger.find(entry) == {"top1_percent": 1}
    assert [path.name for path in ledger.place(entry).iterdir()] == ["result.json"]

"""The soak passes what survives its kills, and finds what does not."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from efft_kernels.atomic_files import replacing
from tools import soak

pytestmark = pytest.mark.skipif(soak.PROCESSES is None, reason="this system cannot fork")


def counting(write: Callable[[Path, str], object]) -> Callable[[Path], None]:
    """Counts to five in a file, and goes on from what is there."""

    def run(output: Path) -> None:
        output.mkdir(exist_ok=True)
        path = output / "count"
        while (count := int(path.read_text() or 0) if path.exists() else 0) < 5:
            time.sleep(0.01)
            write(path, f"{count + 1}")

    return run


def whole(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def by_process(path: Path, text: str) -> None:
    (path.parent / str(os.getpid())).touch()
    whole(path, text)


def events(folder: Path, run: Callable[[Path], object], same: int) -> list[str]:
    def read(output: Path) -> dict[str, object]:
        return {path.name[:1]: path.read_text() for path in output.iterdir()} | {
            "files": len(list(output.iterdir()))
        }

    found: list[str] = []
    for event in soak._resumed(folder, random.Random(2), run, read):
        found.append(event)
        if found.count(soak.SAME) == same:
            break
    return found


def test_what_goes_on_where_it_was_passes(tmp_path: Path) -> None:
    assert soak.KILLED in events(tmp_path, counting(whole), 6)


def test_what_a_kill_changes_is_found(tmp_path: Path) -> None:
    with pytest.raises(soak.Wrong, match=r"differs from .*alone in \['files'\]"):
        events(tmp_path, counting(by_process), 100)


def test_what_fails_by_itself_is_shown(tmp_path: Path) -> None:
    with pytest.raises(soak.Wrong, match=r"exit code 1:[\s\S]*ZeroDivisionError"):
        soak.ended(lambda: 1 // 0)


def test_saving_survives(tmp_path: Path) -> None:
    steps = soak.soak_save(tmp_path, random.Random(1))
    assert [next(steps), next(steps)] == [soak.KILLED, soak.SAME]


def test_a_save_in_parts_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its file lies what nobody removes."""
    (tmp_path / "other.tmp").touch()
    with pytest.raises(soak.Wrong, match=r"a save after a kill leaves .*other"):
        next(soak.soak_save(tmp_path, random.Random(1)))

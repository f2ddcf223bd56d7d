"""Notes beside progress bars, on a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHOWN = """
from rich.console import Console
from efft_kernels.cli.terminal import bar, note, progress
with progress(Console(soft_wrap=True)) as shown:
    show = bar(shown, "images")
    for done in range(3):
        show(done, 3)
        shown.refresh()
        note(f"skipped number {done}")
note("after")
"""


BESIDE_ROWS = """
from rich.console import Console
from efft_kernels.cli.terminal import bar, progress
with progress(Console(stderr=True, soft_wrap=True)) as shown:
    show = bar(shown, "images")
    for done in range(3):
        show(done, 3)
        shown.refresh()
        print(f"row {done}")
"""


def _run_on_terminal(script: str, *, on_terminal: set[str]) -> tuple[str, str]:
    """(what a terminal gets, what the other of stdout and stderr gets)."""
    terminal, end = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=end if "stdout" in on_terminal else subprocess.PIPE,
        stderr=end if "stderr" in on_terminal else subprocess.PIPE,
        env=environment,
        text=True,
    )
    os.close(end)
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux's word for the end
            break
        if not part:
            break
        written += part
    outputs = process.communicate()
    os.close(terminal)
    assert process.returncode == 0, outputs
    return written.decode(), "".join(output or "" for output in outputs)


pytestmark = pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")


def test_notes_stand_on_lines_of_their_own() -> None:
    written, _ = _run_on_terminal(SHOWN, on_terminal={"stdout", "stderr"})
    for done in range(3):
        # The bar's line is cleared, and the note ends with a line's end.
        assert re.search(rf"\x1b\[2Knote: skipped number {done}\r?\n", written), written
    assert "note: after\r\n" in written


def test_notes_go_where_stderr_goes() -> None:
    written, errors = _run_on_terminal(SHOWN, on_terminal={"stdout"})
    assert "images" in written
    assert "note" not in written
    assert errors.splitlines() == [*(f"note: skipped number {n}" for n in range(3)), "note: after"]


def test_rows_go_where_stdout_goes() -> None:
    written, rows = _run_on_terminal(BESIDE_ROWS, on_terminal={"stderr"})
    assert "images" in written
    assert "row" not in written
    assert rows.splitlines() == ["row 0", "row 1", "row 2"]

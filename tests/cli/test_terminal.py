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


def _run_on_terminal(script: str, stderr_too: bool) -> tuple[str, str]:
    """(what a terminal gets, what stderr gets elsewhere)."""
    terminal, end = os.openpty()
    elsewhere = None if stderr_too else subprocess.PIPE
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=end,
        stderr=end if stderr_too else elsewhere,
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
    _, errors = process.communicate()
    os.close(terminal)
    assert process.returncode == 0, errors
    return written.decode(), errors or ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_notes_stand_on_lines_of_their_own() -> None:
    written, _ = _run_on_terminal(SHOWN, stderr_too=True)
    for done in range(3):
        # The bar's line is cleared, and the note ends with a line's end.
        assert re.search(rf"\x1b\[2Knote: skipped number {done}\r?\n", written), written
    assert "note: after\r\n" in written


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_notes_go_where_stderr_goes() -> None:
    written, errors = _run_on_terminal(SHOWN, stderr_too=False)
    assert "note" not in written
    assert errors.splitlines() == [*(f"note: skipped number {n}" for n in range(3)), "note: after"]

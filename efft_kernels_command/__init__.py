"""The console script `efft-kernels`, which Ctrl-C ends in one line from its first moment on.

Importing efft_kernels imports torch, which takes seconds, and nothing in a package runs before its
__init__. So what answers Ctrl-C meanwhile lies outside.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line; while it is loaded, Ctrl-C prints one line and exits with code 130."""
    waiting = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waiting:  # and not ignored, as in a shell's background
        signal.signal(signal.SIGINT, _leave)
    from efft_kernels.cli import app

    if waiting:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # No exception: an import in progress could catch it, or raise another in its place.
    os.write(2, b"error: interrupted\n")
    os._exit(130)

"""Writing a file so that its path holds either the old content or the new, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which becomes `path` in one step when the block ends well.

    On an error it is removed and `path` is as it was. The file gets the mode that the umask gives.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise FileNotFoundError(f"path must be a file in an existing folder, got {path}")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    beside.touch(exist_ok=False)
    try:
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # a writer that makes its file anew, as safetensors does, has its own
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

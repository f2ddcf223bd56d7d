"""Writing a file in one step: its path holds either the old content or the new, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which becomes `path` when the block ends well.

    On an error the temporary file is removed and `path` is as it was. The file gets the mode that
    the umask gives.

    Args:
        path: the file to make or replace; its folder must exist.

    Yields:
        The path to write to.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise FileNotFoundError(f"path must be a file in an existing folder, got {path}")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors puts a file of its own in the place of the one made here, readable by its
        # owner alone.
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`, in UTF-8; raises as `replacing` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path`; raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)

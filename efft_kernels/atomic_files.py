"""Writing a file in one step: its path holds either the old content or the new, never a part.

What is being written lies beside the file, in a folder whose name says which process writes it:
also what a library makes on its way, as safetensors does. What a killed process left there is
removed when the file is written next.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path of the same name, which becomes `path` when the block ends well.

    It lies in a new folder beside `path`, in which the block may make other files, too: they are
    removed with the folder. On an error the temporary file is removed and `path` is as it was. The
    file gets the mode that the umask gives. Of a link the file it leads to is replaced, not the
    link.

    Args:
        path: the file to make or replace; its folder must exist.

    Yields:
        The path to write to.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full; it names
            `path`.
    """
    target = follow_link(path)
    if not target.parent.is_dir() or (target.exists() and not target.is_file()):
        raise FileNotFoundError(f"path must be a file in an existing folder, got {path}")
    folder = temporary_beside(target)
    temporary = folder / target.name
    with os_errors_about(path, folder):
        folder.mkdir()
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            # safetensors puts a file of its own in the place of the one made here, readable by its
            # owner alone.
            temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`, in UTF-8; raises as `replacing` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replace the content of `path`; raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def follow_link(path: Path) -> Path:
    """What `path` leads to where it is a link, else `path`.

    Raises:
        OSError: a link that leads to itself.
    """
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def temporary_beside(target: Path) -> Path:
    """A new name beside `target`, under which this process may write a file or a folder.

    Removes what dead processes left under such names.
    """
    remove_stale(target)
    token = secrets.token_hex(4)
    return target.with_name(f".{target.name}.{os.getpid()}-{_machine()}-{token}.tmp")


def remove_stale(target: Path) -> None:
    """Remove what processes of this machine that are dead were writing as `target`."""
    own = re.compile(
        rf"\.{re.escape(target.name)}\.(?P<pid>\d{{1,9}})-{_machine()}-[0-9a-f]{{8}}\.tmp"
    )
    for path in target.parent.iterdir():
        if (match := own.fullmatch(path.name)) and _is_dead(int(match["pid"])):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with what is in it; another process may do so, too."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """Where this process's number means it: the host, and on Linux the namespace of processes."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.blake2s(f"{platform.node()} {namespace}".encode(), digest_size=4).hexdigest()


def _is_dead(pid: int) -> bool:
    if os.name != "posix":  # elsewhere os.kill ends the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


@contextmanager
def os_errors_about(path: Path, temporary: Path) -> Iterator[None]:
    """Let an OSError of writing to `temporary` name `path`, also where a library hid it."""
    try:
        yield
    except OSError as error:
        own = error.filename is None or str(error.filename).startswith(str(temporary))
        if error.errno is None or not own:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        # What is written in Rust, as safetensors is, puts the number into the text of its own kind.
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise

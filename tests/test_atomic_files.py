"""Files written in one step: whole, with ordinary permissions, or not at all."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from efft_kernels import LoRA, atomic_files, attach, export_peft_lora
from efft_kernels.atomic_files import replacing, temporary_beside, write_bytes, write_text
from efft_kernels.training.run_folder import save_state


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "ΔW\n")
    assert path.read_bytes() == "ΔW\n".encode()
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_else_the_writer_makes_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file.png"
    for text in ("new", "newer"):
        with replacing(path) as temporary:
            assert temporary.name == "file.png"
            temporary.with_suffix(".part").write_text("half")
            temporary.write_text(text)
        assert path.read_text() == text
        assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_the_umasks_whatever_the_writer_does(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as temporary:
        temporary.chmod(0o600)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_missing_folder_a_folder_and_a_device_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "absent" / "file", tmp_path, tmp_path / "fifo"):
        with pytest.raises(FileNotFoundError, match=f"existing folder, got {path}$"):
            write_text(path, "")


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "link", tmp_path / "store" / "file"
    link.symlink_to(Path("store") / "file")
    for text in ("new", "newer"):  # there is nothing at the link's end at first
        write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop") as caught:
        write_text(tmp_path / "loop", "")
    assert caught.value.errno == errno.ELOOP
    (tmp_path / "lost").symlink_to(tmp_path / "absent" / "file")
    with pytest.raises(FileNotFoundError, match="lost"):
        write_text(tmp_path / "lost", "")


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Writing fails where a file grows beyond 2 KiB, in Python and in any library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def failing_fsync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk says only at the end that it is full."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


WRITERS: dict[str, tuple[str, Callable[[Any, Path], Any]]] = {
    "text": ("file", lambda adapter, path: write_text(path, "x" * 5000)),
    "adapter": ("file", lambda adapter, path: adapter.save(path)),
    "state": ("state.pt", lambda _, path: save_state(path.parent, {"x": torch.ones(5000)})),
    "picture": ("picture.png", lambda adapter, path: save_picture(path)),
}


def save_picture(path: Path) -> None:
    from matplotlib.figure import Figure

    from efft_kernels.analysis.plots import save

    save(Figure(), path.parent, path.stem)


@pytest.mark.parametrize("failure", [full_disk, failing_fsync])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_os_error_that_names_the_file(
    make_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, writer: str
) -> None:
    name, write = WRITERS[writer]
    path = tmp_path / name
    path.write_bytes(b"old")
    adapter = attach(make_vit(), LoRA(rank=2))
    with pytest.raises(OSError) as caught, failure(monkeypatch):
        write(adapter, path)
    code = errno.EFBIG if failure is full_disk else errno.ENOSPC
    assert str(caught.value) == f"[Errno {code}] {os.strerror(code)}: '{path}'"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_peft_folder(
    make_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = attach(make_vit(), LoRA(rank=2))
    message = f"File too large: '{tmp_path / 'peft'}'$"
    with pytest.raises(OSError, match=message), full_disk(monkeypatch):
        export_peft_lora(adapter, tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="another"), replacing(tmp_path / "file"):
        (tmp_path / "another").read_text()
    with pytest.raises(ValueError, match="wrong"), replacing(tmp_path / "file"):
        raise ValueError("wrong")


KILLED = """
import os, signal, sys
from pathlib import Path
from efft_kernels.atomic_files import replacing, temporary_beside

folder = temporary_beside(Path(sys.argv[1]))
folder.mkdir()
(folder / "half").touch()
with replacing(Path(sys.argv[1])) as path:
    path.write_text("half")
    (path.parent / ".tmpx7Q").touch()  # as safetensors does
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file[1]"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert killed.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 2
    dead = left[0].name
    assert dead.startswith(".file[1].")
    kept = [
        temporary_beside(tmp_path / "file").with_name(dead.replace("file[1]", "file")),
        temporary_beside(tmp_path / "other"),  # of this process, which lives
        tmp_path / ".file[1].tmp",
        tmp_path / f"{dead}.txt",
        tmp_path / f"{dead[:-17]}ffffffff{dead[-9:]}",
    ]
    for other in kept:
        other.touch()
    mine = temporary_beside(path)
    assert not any(name.exists() for name in left)
    mine.touch()
    write_text(path, "new")
    assert sorted(tmp_path.iterdir()) == sorted([path, mine, *kept])
    named = mine.with_name(mine.name.replace(f".{os.getpid()}-", f".{dead_process()}-"))
    for touch in (Path.touch, Path.mkdir):
        touch(named)
        temporary_beside(path)
        assert not named.exists()


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_who_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert atomic_files._is_dead(os.getpid()) is False
    dead = dead_process()
    assert atomic_files._is_dead(dead) is True
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        patch.setattr(os, "kill", lambda *_: pytest.fail("it would end the process"))
        assert atomic_files._is_dead(dead) is False


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_another_process_removes_it_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    left = temporary_beside(tmp_path / "file")
    make(left)
    monkeypatch.setattr(atomic_files, "_is_dead", lambda pid: True)
    is_dir = Path.is_dir

    def removing(path: Path) -> bool:
        found = is_dir(path)
        if path == left:
            path.rmdir() if found else path.unlink()
        return found

    monkeypatch.setattr(Path, "is_dir", removing)
    write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_name_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda count: "00" * count)
    with replacing(tmp_path / "file") as first:
        with pytest.raises(FileExistsError), replacing(tmp_path / "file"):
            pass
        first.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"

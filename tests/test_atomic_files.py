"""Files written in one step: whole, with ordinary permissions, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from efft_kernels.atomic_files import replacing, write_bytes, write_text


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


def test_the_mode_is_the_umasks_whatever_the_writer_does(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as temporary:
        temporary.chmod(0o600)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_missing_folder_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "file", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"existing folder, got {path}$"):
            write_text(path, "")

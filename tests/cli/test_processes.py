"""Commands under torchrun: train shares its work, every other one is refused, by one process."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from efft_kernels.cli.commands import COMMANDS, app


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"train"}))
@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_train_takes_several_processes(
    name: str, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 2
    told = f"error: {name} works in one process, got 2 of torchrun: efft-kernels {name} ..."
    assert result.output.strip() == (told if rank == "0" else "")


@pytest.mark.parametrize("name", ["train", "papers"])
def test_one_process_is_welcome(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2" if name == "train" else "1")
    monkeypatch.setenv("RANK", "0")
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0

"""Every command of README and docs: its options exist, its targets too, and what is quick runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from efft_kernels.cli.commands import COMMANDS, app

from . import stand_ins
from .pages import PAGES, ROOT, blocks, commands

ALL = [(page, line, text) for page in PAGES for line, text in commands(page)]
# Pages whose commands are run as they stand.
EXECUTED = ("README.md", "docs/guides/images.md", "docs/guides/serving.md", "docs/install.md")
# What a command is known by → the test that runs it by itself, with its data and small, and how.
# Here such a command is only parsed.
RUN_ELSEWHERE = {
    "--recipe": ("cli/test_cli.py", 'command = ("--recipe", "vtab"'),
    "vtab": ("cli/test_benchmarks.py", 'invoke("vtab", "--data", data'),
    "sweep": ("experiments/test_sweep.py", "def test_the_command("),
    "analyse": ("cli/test_analyse.py", "def test_the_digits"),
    "papers": ("cli/test_papers.py", 'app, ["papers", "--output"'),
    "bench": ("benchmarks/test_command.py", 'app, ["--model", "Tiny"'),
    "model.onnx": ("cli/test_serving.py", '"export", run, "--output", path'),
    "torchrun": ("training/test_ranks.py", '"RANK": str(rank), "WORLD_SIZE"'),
}


def _words(text: str, values: dict[str, str]) -> list[str]:
    """The command's words, variables set before it and shell's own assignments resolved."""
    for name, value in values.items():
        text = text.replace(f"${name}", value)
    return shlex.split(text)


def _without_prefix(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def _resolved(page: str) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of the page's commands; an assignment by itself is remembered."""
    values: dict[str, str] = {}
    for line, text in commands(page):
        if match := re.fullmatch(r"(\w+)=(\S+)", text):
            values[match[1]] = match[2]
        else:
            yield line, _without_prefix(_words(text, values))


def parse(arguments: list[str]) -> None:
    """Let the real command line take the arguments, and run nothing."""
    name, *rest = arguments
    assert name in COMMANDS, f"no command {name}"
    command: Any = COMMANDS[name].load(name)
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    for parameter in command.params:
        parameter.callback = None  # --config reads its file
    with typer.Context(command) as context:
        command.parse_args(context, rest)


def _check(words: list[str]) -> None:
    program, *rest = words
    if program == "efft-kernels" or program.endswith("/efft-kernels"):
        parse(rest)
    elif program == "torchrun":
        assert rest[:4] == ["--nproc-per-node", "4", "-m", "efft_kernels"]
        parse(rest[4:])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest and {word for word in rest if "=" not in word} <= set(targets), rest
    elif program == "pip":
        _check_pip(rest)
    else:
        raise AssertionError(f"no check for {program!r}")


def _check_pip(rest: list[str]) -> None:
    assert rest[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for word in rest[1:]:
        if match := re.fullmatch(r"\.\[(\w+)\]", word):
            assert f"\n{match[1]} = [" in extras, word
        else:
            assert word in (".", "--no-build-isolation"), word


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_taken(page: str) -> None:
    for line, words in _resolved(page):
        try:
            _check(words)
        except Exception as error:
            raise AssertionError(f"{page}:{line}: {' '.join(words)}: {error}") from error


def test_inline_commands_exist() -> None:
    """`efft-kernels X`, `make X` and `python -m X` within the text."""
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = (ROOT / page).read_text()
        for name in re.findall(r"`efft-kernels ([a-z][\w-]*)", text):
            assert name in COMMANDS, f"{page}: efft-kernels {name}"
        for name in re.findall(r"`make ([a-z-]+)", text):
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"{page}: make {name}"
        for name in re.findall(r"`python ([\w/]+\.py)", text):
            assert (ROOT / name).is_file(), f"{page}: python {name}"
        for name in re.findall(r"`python -m ([\w.]+)", text):
            assert importlib.util.find_spec(name), f"{page}: python -m {name}"


@pytest.mark.parametrize("page", EXECUTED)
def test_quick_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stand_ins.install(monkeypatch)
    stand_ins.image_folders(tmp_path)
    for block in blocks(page, "yaml"):
        Path("run.yaml").write_text(block.text)
    if page == "docs/guides/serving.md":
        _run("train --data photos/ --checkpoint weights.safetensors --epochs 1 --output runs/pets")
    for line, words in _resolved(page):
        if words[0] == "efft-kernels" and not RUN_ELSEWHERE.keys() & set(words):
            _run(shlex.join(words[1:]), f"{page}:{line}")


def test_other_commands_are_run_by_tests_of_their_own() -> None:
    pages = [page for page in PAGES if page not in EXECUTED]
    for page in pages:
        for line, words in _resolved(page):
            if words[0] == "efft-kernels" and words[1] != "models":
                assert RUN_ELSEWHERE.keys() & set(words), f"{page}:{line}: nobody runs {words}"
    for test, call in RUN_ELSEWHERE.values():
        assert call in (ROOT / "tests" / test).read_text(), f"{test} does not hold {call}"


def _run(arguments: str, where: str = "") -> None:
    words = shlex.split(arguments)
    if words[0] in ("train", "eval", "predict"):
        words += ["--workers", "0"]  # processes of loading would not have the stand-ins
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{where}: {arguments}\n{result.output}\n{result.exception!r}"


def test_a_wrong_option_is_told() -> None:
    with pytest.raises(Exception, match="--no-such"):
        _check(shlex.split("efft-kernels train --data photos --no-such 3"))
    with pytest.raises(AssertionError):
        _check(["make", "no-such-target"])

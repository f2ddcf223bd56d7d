"""Every Python block of README and docs runs, top to bottom, in one namespace a page.

A block whose last line is a comment `# SomeError: text` has to raise that error with that text in
it; `...` stands for any text.
"""

from __future__ import annotations

import builtins
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from efft_kernels.methods import METHODS

from . import stand_ins
from .pages import NOTEBOOKS, PAGES, Block, blocks


@pytest.fixture(autouse=True)
def _own_methods_are_forgotten() -> Iterator[None]:
    """A page registers a method of its own; other tests go through all that are registered."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


WITH_CODE = [page for page in (*PAGES, *NOTEBOOKS) if blocks(page, "python")]
_NEEDS = {"lightning": "lightning", "accelerate": "accelerate", "huggingface": "accelerate"}


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_blocks_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(_NEEDS.get(Path(page).stem, "torch"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    stand_ins.install(monkeypatch)
    if page == "docs/guides/huggingface.md":
        _no_hub(monkeypatch)
    names = stand_ins.NAMES.get(page, dict)()
    names["__name__"] = "page"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(page, "python"):
            _run(stand_ins.shortened(block), names)


def _run(block: Block, names: dict[str, object]) -> None:
    where = f"{block.page}:{block.line}"
    padding = "\n" * (block.line - 1)
    code = compile(padding + block.text, block.page, "exec", dont_inherit=True)
    expected = re.search(r"^# (\w+(?:Error|Warning)): (.+)\n?\Z", block.text, re.MULTILINE)
    if expected is None:
        exec(code, names)
        return
    kind, text = getattr(builtins, expected[1]), expected[2].removesuffix("...")
    with pytest.raises(kind) as raised:
        exec(code, names)
    assert text in str(raised.value), f"{where}: {raised.value}"


def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ViTForImageClassification

    monkeypatch.setattr(ViTForImageClassification, "from_pretrained", stand_ins.small_vit)


def test_each_stand_in_is_of_a_page() -> None:
    assert set(stand_ins.NAMES) <= set(WITH_CODE)


def test_a_block_that_fails_or_does_not_raise_is_told() -> None:
    with pytest.raises(ZeroDivisionError):
        _run(Block("page.md", 3, "python", "1 / 0\n"), {})
    with pytest.raises(pytest.fail.Exception):
        _run(Block("page.md", 3, "python", "1\n# ValueError: ...\n"), {})
    with pytest.raises(AssertionError, match=r"page\.md:3"):
        _run(Block("page.md", 3, "python", "raise ValueError('a')\n# ValueError: b\n"), {})

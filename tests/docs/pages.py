"""The pages, and what stands in them: fenced blocks, headings, links."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")))
NOTEBOOKS = tuple(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.ipynb")))

_FENCE = re.compile(r"^```(?:\{ \.)?(\w*)(?: \})?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line it begins at, its language, its text."""

    page: str
    line: int
    language: str
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """The page's fenced blocks of these languages, snippets included, in their order; a notebook's
    cells of code."""
    if page.endswith(".ipynb"):
        cells = [cell for cell in json.loads(read(page))["cells"] if cell["cell_type"] == "code"]
        return [Block(page, i, "python", "".join(cell["source"])) for i, cell in enumerate(cells)]
    text = read(page)
    return [
        Block(page, text[: match.start()].count("\n") + 2, match[1], _with_snippets(match[2]))
        for match in _FENCE.finditer(text)
        if match[1] in languages
    ]


def _with_snippets(text: str) -> str:
    return re.sub(r'^--8<-- "(.+)"$', lambda m: read(m[1]).rstrip("\n"), text, flags=re.MULTILINE)


def commands(page: str) -> list[tuple[int, str]]:
    """(line, command) of the page's shell blocks, comments and continued lines joined away."""
    found = []
    for block in blocks(page, "bash"):
        text = re.sub(r"\\\n\s*", lambda match: " " * len(match[0]), block.text)
        for number, line in enumerate(text.splitlines()):
            if line := re.sub(r"(^|\s+)#\s.*$", "", line).strip():
                found.append((block.line + number, line))
    return found


def links(page: str) -> list[str]:
    return _LINK.findall(_FENCE.sub("", read(page)))


def anchors(page: str) -> set[str]:
    """What the page's headings are called in an address."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}

"""What the site adds to the pages: the commands, and links to files outside docs/."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs")

from efft_kernels.cli.commands import COMMANDS
from tools import docs_hooks

from .pages import PAGES, ROOT, links


def page_at(uri: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=uri))


def test_every_command_has_its_section_and_every_row_three_cells() -> None:
    page = docs_hooks.commands_page()
    for name in COMMANDS:
        assert f"\n## {name}\n" in f"\n{page}"
    assert "### analyse subspace" in page and "| `--rank " in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 100
    assert {re.sub(r"`[^`]*`|\\\|", "", line).count("|") for line in rows} == {4}


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        (
            "guides/many-tasks.md",
            "../../benchmarks/results/x.csv",
            "../repo/benchmarks/results/x.csv",
        ),
        ("measured.md", "../benchmarks/README.md#csvs", "repo/benchmarks/README.md#csvs"),
        ("repo/CHANGELOG.md", "docs/cli.md", "../cli.md"),
        ("repo/benchmarks/README.md", "NOTES.md", "NOTES.md"),
        ("index.md", "cli.md", "cli.md"),
        ("index.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_lead_to_where_the_site_has_the_file(uri: str, link: str, expected: str) -> None:
    link = link.replace("x.csv", "mixed_batch.csv")
    expected = expected.replace("x.csv", "mixed_batch.csv")
    text = docs_hooks.on_page_markdown(f"see [it]({link}).", page_at(uri), {}, [])
    assert text == f"see [it]({expected})."


def test_all_files_outside_that_pages_lead_to_are_found() -> None:
    added: list[str] = []

    class Files(list[object]):
        def documentation_pages(self) -> list[SimpleNamespace]:
            inside = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
            return [SimpleNamespace(src_uri=uri) for uri in inside]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docs_hooks, "_file", lambda config, path: added.append(path))
        docs_hooks.on_files(Files(), None)
    assert len(added) == len(set(added)) and "CHANGELOG.md" in added
    outside = [link for page in PAGES if page.startswith("docs/") for link in links(page)]
    names = {link.rpartition("/")[2].partition("#")[0] for link in outside if "benchmarks/" in link}
    assert names <= {path.rpartition("/")[2] for path in added}
    assert all((ROOT / path).is_file() for path in added)

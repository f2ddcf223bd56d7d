"""Links and anchors of README and docs lead somewhere; pictures have a text; names are public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from .pages import PAGES, ROOT, anchors, links, read


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor and "cli.md" not in path:  # that page is written when the site is
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_pictures_say_what_they_show(page: str) -> None:
    assert all(len(text) > 20 for text in re.findall(r"!\[([^\]]*)\]", read(page)))


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/.-]+\.(?:md|ipynb)", (ROOT / "mkdocs.yml").read_text())
    found = {str(path.relative_to(ROOT / "docs")) for path in Path(ROOT / "docs").rglob("*.md")}
    assert found <= set(listed)


def test_every_public_name_is_in_the_reference() -> None:
    import efft_kernels
    from efft_kernels.baselines import BASELINES

    api = "".join(read(page) for page in PAGES if page.startswith("docs/api/"))
    listed = set(re.findall(r"^::: efft_kernels\.(\w+)$", api, re.MULTILINE))
    assert set(efft_kernels.__all__) - {"reference"} <= listed
    assert "::: efft_kernels.ops.reference" in api
    baselines = {kind.__name__ for kind in BASELINES.values()}
    assert baselines <= set(re.findall(r"^::: efft_kernels\.baselines\.(\w+)$", api, re.MULTILINE))


def test_the_site_asks_no_other_host_for_anything() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in text and "http" not in yaml.dump(yaml.safe_load(text))

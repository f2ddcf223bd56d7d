"""What is published: the source distribution's files, the description's links, the metadata."""

from __future__ import annotations

import email
import email.message
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from setuptools.compat.py310 import tomllib

import efft_kernels

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PYPROJECT["project"].get("urls", {}).get("Repository")

# Tracked, and of no use where there is no repository.
LEFT_OUT: set[str] = set()
MADE_BY_SETUPTOOLS = re.compile(r"PKG-INFO|setup\.cfg|efft_kernels\.egg-info/.*")
RELATIVE_LINK = re.compile(r"\]\((?!#|[a-z]+:)|(?:src|href)=\"(?!#|[a-z]+:)")


def build_module(name: str) -> ModuleType:
    """A module of csrc/build/, which is no package."""
    sys.path.insert(0, str(ROOT / "csrc" / "build"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


description = build_module("long_description").long_description


def tracked() -> list[str]:
    """The repository's files, those included that are about to be added."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a clone")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, with what a build and a run leave between them."""
    folder = tmp_path_factory.mktemp("sdist") / "clone"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("_native.so", "_build_report.json", "__pycache__/nn.cpython-311.pyc"):
        path = folder / "efft_kernels" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    for name in ("build/native/a.o", "runs/demo/config.json", ".venv/pyvenv.cfg", "site/x.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.fixture(scope="module")
def sdist(clone: Path) -> tarfile.TarFile:
    code = f"from setuptools import build_meta as b; b.build_sdist({str(clone.parent)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    (archive,) = clone.parent.glob("*.tar.gz")
    return tarfile.open(archive)


@pytest.fixture(scope="module")
def metadata(sdist: tarfile.TarFile) -> email.message.Message:
    (name,) = (name for name in sdist.getnames() if name.count("/") == 1 and "PKG-INFO" in name)
    file = sdist.extractfile(name)
    assert file is not None
    return email.message_from_bytes(file.read())


def test_the_source_distribution_has_what_git_tracks(sdist: tarfile.TarFile) -> None:
    files = {item.name.split("/", 1)[1] for item in sdist.getmembers() if item.isfile()}
    files = {name for name in files if not MADE_BY_SETUPTOOLS.fullmatch(name)}
    wanted = set(tracked())
    assert wanted - files == LEFT_OUT
    assert files <= wanted


def test_a_script_can_still_be_run(sdist: tarfile.TarFile) -> None:
    modes = {item.name.split("/", 1)[-1]: item.mode for item in sdist.getmembers()}
    for name in (".ci/run", "csrc/build/asan.sh", "benchmarks/gpu_check.sh"):
        assert modes[name] & 0o100, name


def test_the_metadata_describes_the_package(metadata: email.message.Message) -> None:
    assert metadata["Version"] == efft_kernels.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    payload = metadata.get_payload()
    assert isinstance(payload, str) and len(payload) > 10_000
    assert not RELATIVE_LINK.search(payload), "a link that leads nowhere on an index's page"
    pythons = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", [])]
    assert {"3.10", "3.11", "3.12", "3.13"} <= set(pythons)


PAGE = """\
![A drawing](docs/a.png) [rows](./results/rows.csv "all") [`docs/x.md`](docs/x.md#part)
[![badge](b.svg)](docs/y.md) [here](#there) [paper](https://example.org/p.pdf) <me@example.org>
<img alt="wide" src="docs/wide.png"> <a href="docs/z.md">z</a> `[no](link)`
```python
tasks[0](relative)
```
"""


def test_links_lead_to_the_repository() -> None:
    blob, raw = "https://host/o/n/blob/HEAD", "https://host/o/n/raw/HEAD"
    assert description(PAGE, "https://host/o/n/").splitlines() == [
        f'![A drawing]({raw}/docs/a.png) [rows]({blob}/results/rows.csv "all")'
        f" [`docs/x.md`]({blob}/docs/x.md#part)",
        f"[![badge]({raw}/b.svg)]({blob}/docs/y.md) [here](#there)"
        " [paper](https://example.org/p.pdf) <me@example.org>",
        f'<img alt="wide" src="{raw}/docs/wide.png"> <a href="{blob}/docs/z.md">z</a> `[no](link)`',
        *PAGE.splitlines()[3:],
    ]


def test_without_a_repository_a_link_is_words() -> None:
    assert description(PAGE, None).splitlines() == [
        "A drawing rows (./results/rows.csv) `docs/x.md` (docs/x.md#part)",
        "badge (docs/y.md) [here](#there) [paper](https://example.org/p.pdf) <me@example.org>",
        " <a>z</a> `[no](link)`",
        *PAGE.splitlines()[3:],
    ]


@pytest.mark.parametrize("repository", [None, "https://host/o/n"])
def test_no_link_of_readme_is_left_behind(repository: str | None) -> None:
    page = description((ROOT / "README.md").read_text(encoding="utf-8"), repository)
    assert not RELATIVE_LINK.search(page)


def test_the_citation_is_of_this_version() -> None:
    citation: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == efft_kernels.__version__ == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation.get("repository-code") == REPOSITORY
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = [
        identifier for paper in citation["references"] for identifier in paper["identifiers"]
    ]
    cited = {identifier["value"] for identifier in numbers}
    papers = set(re.findall(r"arxiv\.org/abs/([0-9.]+)", readme))
    assert {f"arXiv:{number}" for number in papers} == cited

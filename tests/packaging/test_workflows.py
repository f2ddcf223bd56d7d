"""The workflows run what .ci/run runs, and nothing that is not there."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from setuptools.compat.py310 import tomllib

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def commands(path: Path) -> list[list[str]]:
    jobs = load(path)["jobs"].values()
    steps = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    return [shlex.split(line) for step in steps for line in step.splitlines()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_is_one_that_exists(path: Path) -> None:
    installed: set[str] = set()
    for program, *arguments in commands(path):
        if program == "make":
            assert arguments[0] in TARGETS
            assert all("=" in word for word in arguments[1:]), arguments
        elif arguments[:3] == ["-m", "pip", "install"]:
            installed |= set(arguments[3:])
        else:
            assert (program, arguments[0]) == ("python", "-m")
            assert arguments[1] in installed or find_spec(arguments[1]), arguments


def test_ci_runs_what_the_local_script_runs() -> None:
    local = {line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "make " in line}
    local = {line for line in local if not line.startswith("#")}
    ci = {shlex.join(command) for command in commands(ROOT / ".github" / "workflows" / "ci.yml")}
    assert local and local <= ci


def test_the_tests_run_on_every_python_that_is_promised() -> None:
    ci = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    assert ci["test"]["strategy"]["matrix"]["python-version"] == PYTHONS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    promised = [line.rsplit(" ", 1)[1] for line in project["project"]["classifiers"]
                if "Python :: 3." in line]  # fmt: skip
    assert promised == PYTHONS
    wheels = load(ROOT / ".github" / "workflows" / "wheels.yml")["jobs"]["wheels"]
    tags = [f"cp{version.replace('.', '')}" for version in PYTHONS]
    assert wheels["strategy"]["matrix"]["python"] == tags
    config = project["tool"]["cibuildwheel"]
    assert config["build"] == [f"{tag}-*" for tag in tags]
    names = [re.match(r"[a-z0-9-]+", line) for line in project["build-system"]["requires"]]
    wanted = {name.group() for name in names if name}
    assert wanted <= set(shlex.split(config["linux"]["before-build"]))

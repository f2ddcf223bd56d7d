"""Hooks of mkdocs.yml: the page of commands, and the repository's files that pages link to.

A page links to a file outside docs/ as it lies in the repository, which is right where the page is
read there. In the site such a file gets a place under repo/, and the links lead to it.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
OUTSIDE = "repo/"
COMMANDS_HERE = "<!-- commands -->"
ALWAYS = ("CHANGELOG.md",)

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)]*)?(\))")


# Files of the repository


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ that pages lead to, and those that these lead to."""
    todo = [file.src_uri for file in files.documentation_pages() if file.src_uri.endswith(".md")]
    todo = [DOCS + uri for uri in todo] + list(ALWAYS)
    seen = set(todo)
    while todo:
        page = todo.pop()
        if not page.startswith(DOCS):
            files.append(_file(config, page))
        if page.endswith(".md"):
            found = {path for path, _ in _links((ROOT / page).read_text(), page)} - seen
            new = sorted(path for path in found if not path.startswith(DOCS))
            seen.update(new)
            todo += new
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are in the site, and the commands where they belong."""
    uri = page.file.src_uri
    own = uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else DOCS + uri
    if COMMANDS_HERE in markdown:
        # The class keeps options in one piece; extra.css has it.
        page_of_commands = f'<div class="commands" markdown>\n\n{commands_page()}\n\n</div>'
        markdown = markdown.replace(COMMANDS_HERE, page_of_commands)
    for path, link in sorted(_links(markdown, own), key=lambda pair: -len(pair[1])):
        to = posixpath.relpath(_place(path), posixpath.dirname(uri) or ".")
        markdown = re.sub(
            rf"(\]\(){re.escape(link)}(#[^)]*)?(\))", rf"\g<1>{to}\g<2>\g<3>", markdown
        )
    return markdown


def _place(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return path.removeprefix(DOCS) if path.startswith(DOCS) else OUTSIDE + path


def _file(config: Any, path: str) -> Any:
    return File.generated(config, OUTSIDE + path, abs_src_path=str(ROOT / path))


def _links(markdown: str, page: str) -> Iterator[tuple[str, str]]:
    """(path in the repository, link) of each link to a file of it that leaves or enters docs/."""
    inside = page.startswith(DOCS)
    for link in {match[2] for match in _LINK.finditer(markdown)}:
        path = os.path.normpath(posixpath.join(posixpath.dirname(page), link))
        if "://" in link or path.startswith("..") or not (ROOT / path).is_file():
            continue
        if not (inside and path.startswith(DOCS)):
            yield path, link


# Commands


def commands_page() -> str:
    """Every command with its arguments and options, as Markdown."""
    from efft_kernels.cli.commands import COMMANDS

    lines: list[str] = []
    for name, command in COMMANDS.items():
        loaded = command.load(name)
        lines += [f"## {name}", "", command.help, ""]
        if hasattr(loaded, "commands"):
            for child in loaded.commands.values():
                lines += [f"### {name} {child.name}", "", *_command(child, f"{name} {child.name}")]
        else:
            lines += _command(loaded, name, summary=command.help)
    return "\n".join(lines)


def _command(command: Any, name: str, summary: str = "") -> list[str]:
    with typer.Context(command, info_name=f"efft-kernels {name}") as context:
        usage = " ".join(command.collect_usage_pieces(context))
        text = (command.help or "").removeprefix(summary).strip()
        lines = [text, ""] if text else []
        lines += ["```text", f"efft-kernels {name} {usage}", "```", ""]
        rows: dict[str, list[str]] = {}
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is None or parameter.name == "help":
                continue
            panel = getattr(parameter, "rich_help_panel", None) or ""
            names = re.sub(r"list\[(\w+)\]", lambda m: m[1].lower(), record[0])
            names = names.replace(" range>", ">")
            cells = (names, getattr(parameter, "help", None) or "", _default(parameter))
            rows.setdefault(panel, []).append(_row(*cells))
    for panel, found in sorted(rows.items(), key=lambda item: not item[0]):  # unnamed last
        if len(rows) > 1:
            lines += [f"**{panel or 'Others'}**", ""]
        lines += ["| option | | default |", "|---|---|---|", *found, ""]
    return lines


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if default is None or callable(default) or isinstance(default, bool):
        return {True: "on", False: "off"}.get(default, "") if isinstance(default, bool) else ""
    default = getattr(default, "value", default)
    return f"`{default}`"


def _row(names: str, text: str, default: str) -> str:
    """A row of three cells; | may stand in `code`, and nowhere else."""
    for old, new in (("\\[", "["), ("|", "\\|"), ("\n", " "), ("*", "\\*")):
        text = text.replace(old, new)
    return f"| `{names}` | {text} | {default} |"

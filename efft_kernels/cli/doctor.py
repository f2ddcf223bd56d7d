"""`efft-kernels doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .errors import FAILED


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, devices, and which backends run here, or why not."""
    from ..doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=2))
    else:
        versions = Table("what", "found", title="This machine")
        for name, version in diagnosis.versions.items():
            versions.add_row(name, version or "none")
        for device in diagnosis.devices:
            versions.add_row(*device.split(": ", 1))
        backends = Table("backend", "usable", "why not", title="Backends")
        for name, reason in diagnosis.backends.items():
            backends.add_row(name, "yes" if reason is None else "no", reason or "")
        Console().print(versions, backends)
    if not diagnosis.healthy:
        raise typer.Exit(FAILED)

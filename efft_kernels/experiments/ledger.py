"""The ledger of an experiment: one file per finished cell, written in one step.

A cell's key is a hash of its identity, so that a cell that was finished is never run again, and one
of another configuration never mistaken for it. Whatever is killed at any moment loses the cells
that were running, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..atomic_files import write_text

RESULT, FAILURE = "result.json", "failure.json"


class Entry(Protocol):
    """What can be in a ledger."""

    @property
    def name(self) -> str:
        """For people, fit for a folder's name."""

    def identity(self) -> dict[str, Any]:
        """All that decides the result, in JSON's own types."""


def key(entry: Entry) -> str:
    """SHA-256 over the identity, its first 16 digits."""
    content = json.dumps(entry.identity(), sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Ledger:
    """The finished and the failed cells in a folder."""

    folder: Path
    notify: Callable[[str], None] = lambda message: None

    def place(self, entry: Entry) -> Path:
        """The cell's folder."""
        return self.folder / f"{entry.name}-{key(entry)}"

    def find(self, entry: Entry) -> dict[str, Any] | None:
        """The result of a finished cell, or None; a damaged file counts as none."""
        return self._read(entry, RESULT)

    def failure(self, entry: Entry) -> str | None:
        """Why the cell failed when it last ran, or None."""
        found = self._read(entry, FAILURE)
        return None if found is None else str(found.get("reason"))

    def finish(self, entry: Entry, result: Mapping[str, Any]) -> None:
        """Record a result."""
        self._write(entry, RESULT, {"result": dict(result)})
        (self.place(entry) / FAILURE).unlink(missing_ok=True)

    def fail(self, entry: Entry, reason: str) -> None:
        """Record that the cell failed; it is tried again when it is asked for again."""
        self._write(entry, FAILURE, {"result": {"reason": reason}})

    def _write(self, entry: Entry, name: str, content: Mapping[str, Any]) -> None:
        place = self.place(entry)
        place.mkdir(parents=True, exist_ok=True)
        whole = {"key": key(entry), "identity": entry.identity(), **content}
        write_text(place / name, json.dumps(whole, indent=2, allow_nan=False) + "\n")

    def _read(self, entry: Entry, name: str) -> dict[str, Any] | None:
        path = self.place(entry) / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["identity"] != entry.identity():
                raise ValueError("another configuration")
            return dict(content["result"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.notify(f"{path} is no record of this cell ({error}): it counts as not there")
            return None

"""A report of what an adapter grouped with what, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import StringIO
from math import prod
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .hints import patterns


@dataclass(frozen=True)
class Description:
    """What `Adapter.describe` returns.

    Attributes:
        method: the method's configuration as text.
        rows: one per linear: name, role, block, stage, in_features, out_features, group, rank (Ra,
            the width of its fold), fused ("chain": where the circumstances allow it its block runs
            as part of a chain; "alone"), calls (how often it ran in the model's last forward; None
            before the first one; in compiled graphs nobody counts), input (what x came out of in
            the last training forward, "LayerNorm" say, where the linear makes it again in the
            backward from what that keeps; "kept" where the linear kept x itself; None before there
            was one, in a chain and under torch.compile).
        groups: group name → parameter name → shape.
        alone: why no linear is in a chain; None where some are.
        left: attention and FFN linears that are not adapted, and 1×1 convolutions in their place:
            name → "attention", "FFN", "text tower", "fusion of text and image", or why no method
            takes it.
        trained: names of the modules that are trained whole.
    """

    method: str
    rows: list[dict[str, Any]]
    groups: dict[str, dict[str, list[int]]]
    alone: str | None = None
    left: dict[str, str] = field(default_factory=dict)
    trained: tuple[str, ...] = ()

    def __rich__(self) -> Table:
        chained = [row["name"] for row in self.rows if row.get("fused") == "chain"]
        fused = f"no chain: {self.alone}"
        if chained:
            fused = f"in a chain, on a GPU under autocast: {_summary(chained)}"
        inputs = [f"x {_inputs(kind)}: {_summary(names)}" for kind, names in self._inputs().items()]
        if idle := [row["name"] for row in self.rows if row.get("calls") == 0]:
            inputs.append(f"did not run in the last forward: {_summary(idle)}")
        kinds: dict[str, list[str]] = {}
        for name, kind in self.left.items():
            kinds.setdefault(kind, []).append(name)
        left = [f"left as they are, {kind}: {_summary(names)}" for kind, names in kinds.items()]
        whole = f"trained whole: {', '.join(self.trained) or 'nothing, there is no classifier'}"
        caption = escape("\n".join([fused, *inputs, *left, whole]))
        table = Table(title=self.method, caption=caption, caption_justify="left")
        for header in ("group", "parameters", "shapes", "linears", "rank"):
            table.add_column(
                header, justify="right" if header in ("parameters", "rank") else "left"
            )
        for name, shapes in self.groups.items():
            members = [row for row in self.rows if row["group"] == name]
            count = sum(prod(shape) for shape in shapes.values())
            table.add_row(
                name,
                f"{count:,}",
                ", ".join(f"{key} {shape}" for key, shape in shapes.items()),
                _summary([row["name"] for row in members]),
                ", ".join(str(rank) for rank in sorted({row["rank"] for row in members})),
            )
        return table

    def _inputs(self) -> dict[str, list[str]]:
        """The linears' names by what their x came out of."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.get("input") is not None:
                found.setdefault(row["input"], []).append(row["name"])
        return found

    def __str__(self) -> str:
        text = StringIO()
        Console(width=120, file=text, force_jupyter=False, force_terminal=False).print(self)
        return text.getvalue()


def _inputs(kind: str) -> str:
    return "kept" if kind == "kept" else f"made again, out of {kind}"


def _summary(names: list[str]) -> str:
    """Names with their block numbers as *, each once, and how many linears that is."""
    return f"{len(names)}: " + ", ".join(patterns(names))

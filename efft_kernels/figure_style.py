"""How every picture of this project looks.

A series is told by its colour, its marker and its dashes (bars: its hatching) at once. Colours are
Okabe and Ito's, with Tol's wine for their yellow, apart under any colour vision. In a grey print
two series differ in their dashes and hatching, or clearly in their lightness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, orange, black, vermilion, sky, wine, purple, green: those that share dashes, and neighbours,
# differ by 0.15 of the way from black to white.
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#000000",
    "#D55E00",
    "#56B4E9",
    "#882255",
    "#CC79A7",
    "#009E73",
)
Dash = str | tuple[float, tuple[float, ...]]
DASHES: tuple[Dash, ...] = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (9, 3)),
    (0, (6, 1.5, 1, 1.2, 1, 1.5)),
)
MARKERS = ("o", "s", "^", "D", "X", "v", "P", "*", "<", "p", ">", "h")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "++", "|||", "oo", "//..", "OO", "**")
# So many looks differ in all that is said above; those after them in the three together.
SERIES = len(MARKERS)
REFERENCE = "#555555"  # what the series are compared with
COLOUR_MAP = "cividis"  # from dark to light in grey too


@dataclass(frozen=True)
class Look:
    """Of one series.

    Attributes:
        colour, marker, dash, hatch: in matplotlib's words.
    """

    colour: str
    marker: str
    dash: Dash
    hatch: str

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot` and `errorbar` for a line with markers."""
        return {**self.points, "linestyle": self.dash, "linewidth": 1.4}

    @property
    def points(self) -> dict[str, Any]:
        """The same for markers alone."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": 5,
            "linestyle": "none",
        }

    @property
    def bar(self) -> dict[str, Any]:
        """Arguments of `Axes.bar`."""
        return {
            "color": self.colour,
            "hatch": self.hatch,
            "edgecolor": "white",
            "linewidth": 0.5,
            "error_kw": {"ecolor": "black", "elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8},
        }


def look(place: int) -> Look:
    """The look of the series at a place, from 0."""
    return Look(
        COLOURS[place % len(COLOURS)],
        MARKERS[(place + place // SERIES) % SERIES],
        DASHES[place % len(DASHES)],
        HATCHES[(place + place // SERIES) % SERIES],
    )


def looks(names: Sequence[str], places: Mapping[str, int] | None = None) -> dict[str, Look]:
    """A look for each name, no two alike.

    Args:
        names: of one figure's series.
        places: where a name has its look in every figure; the others take what is free. Of two
            names with one place the first has it.
    """
    taken: dict[int, str] = {}
    wanted = places or {}
    for name in names:
        if name in wanted:
            taken.setdefault(wanted[name], name)
    free = (place for place in range(len(names) + len(taken)) if place not in taken)
    found = {name: place for place, name in taken.items()}
    return {name: look(found[name] if name in found else next(free)) for name in names}


def new_figure(width: float, height: float) -> Figure:
    """In inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def tidy(axes: Axes) -> None:
    """No frame, faint lines across, small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def legend(figure: Figure, panels: Sequence[Axes], columns: int = 4) -> None:
    """Below the figure, every series of the panels once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=8,
        handlelength=3.2,
    )


def mark_coinciding(axes: Axes, apart: float = 0.012) -> list[list[str]]:
    """Show lines that lie on each other as nested ones, and say in the panel that they do.

    Args:
        axes: with its scales and limits as they stay.
        apart: of the panel's height, below which two lines cannot be told apart.

    Returns:
        The labels of each set of lines that coincide.
    """
    import numpy as np
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

    axes.autoscale_view()
    low, high = axes.transData.inverted().transform(axes.transAxes.transform([(0, 0), (0, 1)]))[
        :, 1
    ]
    scale = axes.yaxis.get_transform().transform
    height = float(np.ptp(scale(np.array([low, high]))))
    groups: list[list[Any]] = []
    label: dict[Any, str] = {}
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        line = getattr(handle, "lines", [handle])[0]  # of error bars, the line through them
        if not hasattr(line, "get_xdata") or len(line.get_xdata(orig=False)) < 2:
            continue
        label[line] = name
        for group in groups:
            first = group[0]
            if np.array_equal(
                first.get_xdata(orig=False), line.get_xdata(orig=False), equal_nan=True
            ):
                gap = scale(np.asarray(first.get_ydata(orig=False), float)) - scale(
                    np.asarray(line.get_ydata(orig=False), float)
                )
                if np.all(np.abs(gap) < apart * height):
                    group.append(line)
                    break
        else:
            groups.append([line])
    found = [group for group in groups if len(group) > 1]
    notes = []
    for group in found:
        for depth, line in enumerate(reversed(group)):
            line.set_linewidth(1.4 + 2 * depth)
            line.set_markersize(5 + 3 * depth)
            line.set_zorder(3 - 0.1 * depth)
        names = [label[line].split(" (")[0] for line in group]
        notes.append(f"{', '.join(names[:-1])} and {names[-1]} coincide")
    if notes:
        # A legend finds where no line is.
        nothing = [Line2D([], [], linestyle="none")] * len(notes)
        note = Legend(axes, nothing, notes, loc="best", fontsize=7, handlelength=0, handletextpad=0)
        note.set_frame_on(False)
        axes.add_artist(note)
    return [[label[line] for line in group] for group in found]

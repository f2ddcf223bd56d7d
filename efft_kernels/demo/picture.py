"""The demo's picture: accuracy against the number of trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from ..figure_style import look, new_figure, tidy

# As the demo's table spells them out.
_WORDS = {"linear": "linear probe", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Point:
    """One method.

    Attributes:
        label: its name.
        trained_params: how many, the head's too.
        top1_mean: percent, over the seeds.
        top1_std: standard deviation over the seeds.
        top1: percent, one number per seed.
    """

    label: str
    trained_params: int
    top1_mean: float
    top1_std: float
    top1: Sequence[float]


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Write a PNG: a point with its standard deviation per method, a faint dot per seed.

    Args:
        points: one per method.
        title: of the picture.
        path: file to write.
    """
    figure = new_figure(7.2, 4.5)
    axes = figure.subplots()
    axes.set_xscale("log")
    counts = [point.trained_params for point in points]
    for place, point in enumerate(points):
        own, x = look(place), point.trained_params
        left_of_it = [x / 1.12] * len(point.top1)
        axes.scatter(
            left_of_it, point.top1, 14, own.colour, marker=own.marker, alpha=0.4, linewidths=0
        )
        bar = own.points | {"markersize": 7, "capsize": 4}
        axes.errorbar(x, point.top1_mean, yerr=point.top1_std, **bar)
        left = x == max(counts) or any(x < other < 3 * x for other in counts)
        name = _WORDS.get(point.label, point.label)
        axes.annotate(
            f"{name}\n{point.top1_mean:.1f}%, {x:,} parameters",
            (x, point.top1_mean),
            xytext=(-14 if left else 10, -12),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            fontsize=9,
        )
    axes.set_xlabel("trained parameters, classification head included (log scale)")
    axes.set_ylabel("test top-1 accuracy (%); faint: one seed each")
    axes.set_title(title, fontsize=10, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    tidy(axes)
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    figure.savefig(path, format="png")

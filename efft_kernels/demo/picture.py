"""The demo's picture: accuracy against the number of trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, told apart with any kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


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
    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for point, colour in zip(points, _COLOURS, strict=True):
        x = point.trained_params
        left_of_it = [x / 1.12] * len(point.top1)
        axes.scatter(left_of_it, point.top1, s=14, color=colour, alpha=0.4, linewidths=0)
        axes.errorbar(
            x, point.top1_mean, yerr=point.top1_std, fmt="o", markersize=7, capsize=4, color=colour
        )
    counts = [point.trained_params for point in points]
    for point, colour in zip(points, _COLOURS, strict=True):
        x = point.trained_params
        left = x == max(counts) or any(x < other < 3 * x for other in counts)
        axes.annotate(
            f"{point.label}\n{point.top1_mean:.1f}%, {point.trained_params:,} parameters",
            (x, point.top1_mean),
            xytext=(-14 if left else 10, -12),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            color=colour,
            fontsize=9,
        )
    axes.set_xlabel("trained parameters, classification head included (log scale)")
    axes.set_ylabel("test top-1 accuracy (%)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, format="png")

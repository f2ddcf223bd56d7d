"""Pictures of the results, from the CSVs alone.

    python -m benchmarks.plots                                   # the PNGs of results/plots
    python -m benchmarks.plots --out runs/plots --format svg     # to edit or to print

One set for each kind of device, in the looks of efft_kernels/figure_style.py. Whiskers reach from
the 20th to the 80th percentile of the rounds.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from efft_kernels.figure_style import (
    REFERENCE,
    Look,
    legend,
    looks,
    mark_coinciding,
    new_figure,
    tidy,
)

from . import peers
from .lib.operands import FLOOR as LINEAR
from .lib.rows import OPERATORS_CSV, RESULTS, WHOLE_MODEL_CSV, Row, last_comparisons, read_rows
from .roofline import peaks_of
from .tables import MODEL_NAMES, OPERATOR_KEY, WHOLE_KEY, impl_name, is_peak, where_and_when

PLOTS = RESULTS / "plots"
MAIN_RANK = "16"
COLUMNS = 3

# The place of an implementation's look, the same in every picture; and the order of bars.
PLACES = {
    "unfused, eager torch": 6,
    "torch, split": 1,
    "torch, merged": 7,
    "torch, auto": 4,
    "cpp, split": 3,
    "cpp, merged": 2,
    "cpp, auto": 5,
    "triton, split": 4,
    "triton, fused": 5,
    "cuda, split": 3,
    "cuda, fused": 2,
    "auto": 0,
    "EFFT2": 0,
    peers.RELEASED_EFFT2: 1,
    peers.FULL: 7,
    peers.PEFT_LORA: 6,
    peers.FLOOR: 2,
}


def _looks(names: Sequence[str]) -> dict[str, Look]:
    """In the order of `PLACES`."""
    known = [name for name in PLACES if name in names]
    return looks([*known, *(name for name in names if name not in PLACES)], PLACES)


def ratio_bars(rows: Sequence[Row]) -> Figure | None:
    """Time over the frozen layer's, forward and backward, a bar per layer and implementation."""
    own = [
        row
        for row in rows
        if row["r"] == MAIN_RANK and row["mode"] == "fwd+bwd" and row["impl"] != LINEAR
    ]
    if not own:
        return None
    by_panel: dict[str, dict[str, dict[str, Row]]] = {}
    for row in own:
        panel, layer = _panel_and_layer(row)
        by_panel.setdefault(panel, {}).setdefault(layer, {})[impl_name(row)] = row
    look_of = _looks(list(dict.fromkeys(map(impl_name, own))))
    columns = min(COLUMNS, len(by_panel))
    lines = -(-len(by_panel) // columns)
    figure = new_figure(max(7.0, 2.2 + 3.2 * columns), 1.0 + 2.3 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (panel, layers) in zip(panels.flat, by_panel.items(), strict=False):
        impls = [impl for impl in look_of if any(impl in found for found in layers.values())]
        width = 0.8 / len(impls)
        for i, impl in enumerate(impls):
            places = [x for x, found in enumerate(layers.values()) if impl in found]
            chosen = [found[impl] for found in layers.values() if impl in found]
            axes.bar(
                [x + (i - (len(impls) - 1) / 2) * width for x in places],
                [float(row["ratio_to_linear"]) for row in chosen],
                width,
                yerr=_whiskers(chosen),
                label=impl,
                **look_of[impl].bar,
            )
        axes.axhline(1, color=REFERENCE, linewidth=1)
        axes.set_xticks(range(len(layers)), list(layers))
        axes.set_title(panel, fontsize=10)
        tidy(axes)
        axes.tick_params(labelleft=True)
    for axes in panels.flat[len(by_panel) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("time / frozen layer's")
    legend(figure, panels.flat[: len(by_panel)])
    _title(figure, f"One layer, forward and backward, r = {MAIN_RANK}", own)
    return figure


def _panel_and_layer(row: Row) -> tuple[str, str]:
    """ "Swin-B stage 1, float32" and "qkv" of "Swin-B stage 1 qkv"."""
    panel, layer = str(row["op"]).rsplit(" ", 1)
    return f"{panel}, {row['dtype']}", layer


def _whiskers(rows: Sequence[Row]) -> list[list[float]] | None:
    """How far the 20th and the 80th percentile of the time lie from the ratio, in its unit."""
    if not all(row["ms_p20"] and row["ms_p80"] for row in rows):
        return None
    per_ms = [float(row["ratio_to_linear"]) / float(row["ms_p50"]) for row in rows]
    return [
        [
            scale * abs(float(row[end]) - float(row["ms_p50"]))
            for scale, row in zip(per_ms, rows, strict=True)
        ]
        for end in ("ms_p20", "ms_p80")
    ]


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Each kernel's rate over its arithmetic intensity, under the roof measured in the same run."""
    own = [
        row
        for row in rows
        if not is_peak(row) and row["r"] == MAIN_RANK and row["mode"] == "fwd+bwd"
    ]
    by_dtype = {
        dtype: peaks_of([row for row in rows if row["dtype"] == dtype])
        for dtype in dict.fromkeys(row["dtype"] for row in own)
    }
    own = [row for row in own if by_dtype[row["dtype"]] is not None]
    if not own:
        return None
    look_of = _looks(list(dict.fromkeys(impl_name(row) for row in own if row["impl"] != LINEAR)))
    roofs = {dtype: peaks for dtype, peaks in by_dtype.items() if peaks is not None}
    slow = max(peaks.tflops for peaks in roofs.values()) < 10
    unit, scale = ("GFLOP/s", 1e3) if slow else ("TFLOP/s", 1.0)
    figure = new_figure(1.6 + 4.6 * len(roofs), 5.0)
    panels = figure.subplots(1, len(roofs), squeeze=False, sharey=True)[0]
    for axes, (dtype, peaks) in zip(panels, roofs.items(), strict=True):
        of_dtype = [row for row in own if row["dtype"] == dtype]
        intensities = [_intensity(row) for row in of_dtype]
        ridge = 1e3 * peaks.tflops / peaks.gbps
        ends = (min(*intensities, ridge) / 2, max(*intensities, ridge) * 2)
        axes.plot(
            (ends[0], ridge, ends[1]),
            [scale * peaks.attainable_tflops(x) for x in (ends[0], ridge, ends[1])],
            color=REFERENCE,
            linewidth=1.5,
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for place, text, ha in (
            (ends[1], f"torch's GEMM, {scale * peaks.tflops:.0f} {unit}", "right"),
            (ends[0] * 1.1, f"copy, {peaks.gbps:.0f} GB/s", "left"),
        ):
            height = scale * peaks.attainable_tflops(place)
            angle = math.degrees(math.atan2(height, place)) if place < ridge else 0
            axes.text(
                place,
                height * 1.06,
                text,
                ha=ha,
                va="bottom",
                fontsize=8,
                color=REFERENCE,
                rotation=angle,  # of the line, in the data's units
                rotation_mode="anchor",
                transform_rotates_text=True,
            )
        for impl in [LINEAR, *look_of]:
            chosen = [row for row in of_dtype if impl in (row["impl"], impl_name(row))]
            if not chosen:
                continue
            if impl == LINEAR:
                name = "frozen nn.Linear"
                look = {"color": REFERENCE, "marker": "o", "linestyle": "none"}
                look |= {"markerfacecolor": "none", "markersize": 4.5}
            else:
                name, look = impl, look_of[impl].points
            axes.plot(
                [_intensity(row) for row in chosen],
                [scale * float(row["tflops"]) for row in chosen],
                label=name,
                **look,
            )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("FLOPs of the frozen layer per byte it must move")
        axes.set_title(dtype, fontsize=10)
        tidy(axes)
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    panels[0].set_ylabel(f"{unit} of the frozen layer's work")
    legend(figure, panels)
    _title(figure, f"Roofline, forward and backward, r = {MAIN_RANK}", own)
    return figure


def _intensity(row: Row) -> float:
    m, k, n = (int(row[column]) for column in "MKN")
    element = 2 if row["dtype"] in ("bfloat16", "float16") else 4
    return 2 * m * n * k / ((m * (k + n) + n * k) * element)


def time_against_rank(rows: Sequence[Row]) -> Figure | None:
    """Time over the frozen layer's against r, for the layers of the model with the most ranks."""
    own = [row for row in rows if not is_peak(row) and row["mode"] == "fwd+bwd"]
    own = [row for row in own if row["impl"] != LINEAR]
    ranks_of: dict[str, set[str]] = {}
    for row in own:
        ranks_of.setdefault(row["op"].split()[0], set()).add(row["r"])
    if not ranks_of:
        return None
    # Of those with the most ranks the last, which is the largest.
    model = max(reversed(ranks_of), key=lambda name: len(ranks_of[name]))
    if len(ranks_of[model]) < 2:
        return None
    own = [row for row in own if row["op"].split()[0] == model]
    ops = list(dict.fromkeys(row["op"] for row in own))[:4]
    look_of = _looks(list(dict.fromkeys(map(impl_name, own))))
    figure = new_figure(9.5, 6.4)
    panels = list(figure.subplots(-(-len(ops) // 2), 2, sharey=True, squeeze=False).flat)
    for axes in panels[len(ops) :]:
        axes.set_visible(False)
    for axes, op in zip(panels, ops, strict=False):
        for i, (impl, look) in enumerate(look_of.items()):
            beside = 2 ** (0.05 * (i - (len(look_of) - 1) / 2))  # or whiskers would hide each other
            chosen = [row for row in own if row["op"] == op and impl_name(row) == impl]
            chosen.sort(key=lambda row: int(row["r"]))
            axes.errorbar(
                [beside * int(row["r"]) for row in chosen],
                [float(row["ratio_to_linear"]) for row in chosen],
                yerr=_whiskers(chosen),
                label=impl,
                elinewidth=0.7,
                capsize=1.5,
                **look.line,
            )
        axes.axhline(1, color=REFERENCE, linewidth=1)
        _log2_ticks(axes, sorted(map(int, ranks_of[model])))
        axes.set_xlabel("rank r")
        axes.set_title(op, fontsize=10)
        tidy(axes)
        axes.set_ylabel("time / frozen layer's")
    legend(figure, panels[: len(ops)])
    _title(figure, "One layer, forward and backward", own)
    return figure


def memory_against_batch(rows: Sequence[Row]) -> Figure | None:
    """MiB saved for the backward against the batch, for the model with the most batches."""
    own = [row for row in rows if row["saved_mib"] and row["r"] == MAIN_RANK]
    batches: dict[tuple[str, str], set[int]] = {}
    for row in own:
        batches.setdefault((row["model"], row["dtype"]), set()).add(int(row["batch"]))
    if not batches:
        return None
    model, dtype = max(batches, key=lambda key: len(batches[key]))
    if len(batches[model, dtype]) < 2:
        return None
    own = [row for row in own if (row["model"], row["dtype"]) == (model, dtype)]
    impls = [
        impl
        for impl in (peers.FULL, peers.RELEASED_EFFT2, peers.PEFT_LORA, "EFFT2", peers.FLOOR)
        if len({row["batch"] for row in own if row["impl"] == impl}) > 1
    ]
    if not impls:
        return None
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    for impl, look in _looks(impls).items():
        points = sorted(
            (int(row["batch"]), float(row["saved_mib"])) for row in own if row["impl"] == impl
        )
        axes.plot(*zip(*points, strict=True), label=impl, **look.line)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _log2_ticks(axes, sorted(batches[model, dtype]))
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("MiB saved for the backward")
    tidy(axes)
    mark_coinciding(axes)
    legend(figure, [axes], 3)
    _title(figure, f"{MODEL_NAMES.get(model, model)}, r = {MAIN_RANK}, {dtype}", own)
    return figure


def _log2_ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _title(figure: Figure, title: str, rows: Sequence[Row]) -> None:
    figure.suptitle(f"{title}\n{where_and_when(rows).replace('`', '')}", fontsize=9)


def save(figure: Figure, path: Path) -> None:
    """The figure as path's suffix says, .png or .svg; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "efft-kernels"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def slug(device: str) -> str:
    """A device column as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "")).strip("-")


PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], Figure | None]]] = {
    "ratio-to-linear": ("operators", ratio_bars),
    "roofline": ("operators", roofline),
    "time-against-rank": ("operators", time_against_rank),
    "memory-against-batch": ("whole_model", memory_against_batch),
}


def draw(
    operators: Sequence[Row], whole: Sequence[Row], folder: Path = PLOTS, suffix: str = "png"
) -> list[Path]:
    """Every picture that the rows give, for every device; the paths."""
    newest_rows = {
        "operators": last_comparisons(operators, OPERATOR_KEY),
        "whole_model": last_comparisons(whole, WHOLE_KEY),
    }
    paths: list[Path] = []
    for name, (source, picture) in PICTURES.items():
        rows = newest_rows[source]
        for device in dict.fromkeys(row["device"] for row in rows):
            figure = picture([row for row in rows if row["device"] == device])
            if figure is not None:
                paths.append(folder / f"{name}-{slug(device)}.{suffix}")
                save(figure, paths[-1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PLOTS)
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    arguments = parser.parse_args()
    operators, whole = read_rows(OPERATORS_CSV), read_rows(WHOLE_MODEL_CSV)
    for path in draw(operators, whole, arguments.out, arguments.format):
        print(path)


if __name__ == "__main__":
    main()

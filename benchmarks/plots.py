"""Pictures of the results, from the CSVs alone.

    python -m benchmarks.plots                                   # the PNGs of results/plots
    python -m benchmarks.plots --out runs/plots --format svg     # to edit or to print

One set for each kind of device. Colours are Okabe and Ito's, told apart with any colour vision;
hatching and markers remain where a print loses them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from . import peers
from .lib.operands import FLOOR as LINEAR
from .lib.rows import OPERATORS_CSV, RESULTS, WHOLE_MODEL_CSV, Row, last_comparisons, read_rows
from .roofline import peaks_of
from .tables import MODEL_NAMES, OPERATOR_KEY, WHOLE_KEY, impl_name, is_peak, where_and_when

PLOTS = RESULTS / "plots"
MAIN_RANK = "16"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
FLOOR_COLOUR = "#555555"


# The place of an implementation in the lists above, the same in every picture.
PLACES = {
    "auto": 0,
    "torch, split": 1,
    "torch, merged": 2,
    "unfused, eager torch": 3,
    "cpp, split": 4,
    "cpp, merged": 5,
    "triton, fused": 4,
    "triton, split": 5,
    "cuda, fused": 6,
    "EFFT2": 0,
    peers.RELEASED_EFFT2: 1,
    peers.FULL: 2,
    peers.PEFT_LORA: 3,
    peers.FLOOR: 6,
}


def _place(name: str) -> int:
    return PLACES.get(name, len(name) % len(COLOURS))


def _bar(name: str) -> dict[str, Any]:
    i = _place(name)
    return {"color": COLOURS[i], "hatch": HATCHES[i], "edgecolor": "white", "linewidth": 0.5}


def _line(name: str) -> dict[str, Any]:
    i = _place(name)
    return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i], "markersize": 4.5}


def ratio_bars(rows: Sequence[Row]) -> Figure | None:
    """Time over the frozen layer's, forward and backward, a bar per layer and implementation."""
    own = [
        row
        for row in rows
        if row["r"] == MAIN_RANK and row["mode"] == "fwd+bwd" and row["impl"] != LINEAR
    ]
    if not own:
        return None
    models = list(dict.fromkeys(row["op"].split()[0] for row in own))
    impls = list(dict.fromkeys(map(impl_name, own)))
    columns = 2 if len(models) > 1 else 1
    lines = -(-len(models) // columns)
    figure = _figure(9.5, 0.7 + 2.3 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, model in zip(panels.flat, models, strict=False):
        ops = list(dict.fromkeys(row["op"] for row in own if row["op"].split()[0] == model))
        width = 0.8 / len(impls)
        for i, impl in enumerate(impls):
            heights = [
                next(
                    (
                        float(row["ratio_to_linear"])
                        for row in own
                        if row["op"] == op and impl_name(row) == impl
                    ),
                    0.0,
                )
                for op in ops
            ]
            places = [x + (i - (len(impls) - 1) / 2) * width for x in range(len(ops))]
            axes.bar(places, heights, width, label=impl, **_bar(impl))
        axes.axhline(1, color=FLOOR_COLOUR, linewidth=1)
        labels = [op.removeprefix(model).replace("stage ", "s").strip() for op in ops]
        axes.set_xticks(range(len(ops)), labels, rotation=45 if len(ops) > 8 else 0)
        axes.set_title(model, fontsize=10)
        _tidy(axes)
    for axes in panels.flat[len(models) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("time / frozen layer's")
    _legend(figure, panels.flat[0])
    _title(figure, f"One layer, forward and backward, r = {MAIN_RANK}", own)
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Each kernel's rate over its arithmetic intensity, under the roof measured in the same run."""
    own = [
        row
        for row in rows
        if not is_peak(row) and row["r"] == MAIN_RANK and row["mode"] == "fwd+bwd"
    ]
    if not own:
        return None
    by_dtype = {
        row["dtype"]: peaks_of([r for r in rows if r["dtype"] == row["dtype"]]) for row in own
    }
    by_dtype = {dtype: peaks for dtype, peaks in by_dtype.items() if peaks is not None}
    if not by_dtype:
        return None
    figure = _figure(7.0, 4.6)
    axes = figure.subplots()
    own = [row for row in own if row["dtype"] in by_dtype]
    intensities = [_intensity(row) for row in own]
    ends = (min(intensities) / 2, max(intensities) * 2)
    slow = max(peaks.tflops for peaks in by_dtype.values()) < 10
    unit, scale = ("GFLOP/s", 1e3) if slow else ("TFLOP/s", 1.0)
    for dtype, peaks in by_dtype.items():
        ridge = 1e3 * peaks.tflops / peaks.gbps
        xs = sorted({ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]})
        roof = [scale * peaks.attainable_tflops(x) for x in xs]
        rates = f"GEMM {scale * peaks.tflops:.3g} {unit}, copy {peaks.gbps:.3g} GB/s"
        axes.plot(xs, roof, color=FLOOR_COLOUR, linewidth=1.5, label=f"{dtype}: {rates}")
    for impl in dict.fromkeys(map(impl_name, own)):
        chosen = [row for row in own if impl_name(row) == impl]
        look = _line(impl) | {"linestyle": "none"}
        if impl == LINEAR:
            look |= {"color": FLOOR_COLOUR, "marker": "o", "markerfacecolor": "none"}
        axes.plot(
            [_intensity(row) for row in chosen],
            [scale * float(row["tflops"]) for row in chosen],
            label="frozen nn.Linear" if impl == LINEAR else impl,
            **look,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("FLOPs of the frozen layer per byte it must move")
    axes.set_ylabel(f"{unit} of the frozen layer's work")
    _tidy(axes)
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    _legend(figure, axes)
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
    impls = list(dict.fromkeys(map(impl_name, own)))
    figure = _figure(9.5, 3.2)
    panels = figure.subplots(1, len(ops), sharey=True, squeeze=False)[0]
    for axes, op in zip(panels, ops, strict=True):
        for impl in impls:
            points = sorted(
                (int(row["r"]), float(row["ratio_to_linear"]))
                for row in own
                if row["op"] == op and impl_name(row) == impl
            )
            axes.plot(*zip(*points, strict=True), label=impl, **_line(impl))
        axes.axhline(1, color=FLOOR_COLOUR, linewidth=1)
        _log2_ticks(axes, sorted(map(int, ranks_of[model])))
        axes.set_xlabel("rank r")
        axes.set_title(op, fontsize=10)
        _tidy(axes)
    panels[0].set_ylabel("time / frozen layer's")
    _legend(figure, panels[0])
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
    figure = _figure(7.0, 4.2)
    axes = figure.subplots()
    for impl in impls:
        points = sorted(
            (int(row["batch"]), float(row["saved_mib"])) for row in own if row["impl"] == impl
        )
        axes.plot(*zip(*points, strict=True), label=impl, **_line(impl))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _log2_ticks(axes, sorted(batches[model, dtype]))
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("MiB saved for the backward")
    _tidy(axes)
    _legend(figure, axes)
    _title(figure, f"{MODEL_NAMES.get(model, model)}, r = {MAIN_RANK}, {dtype}", own)
    return figure


def _log2_ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(3, len(labels)),
        frameon=False,
        fontsize=8,
    )


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

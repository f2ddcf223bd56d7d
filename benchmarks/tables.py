"""Tables from the CSVs: for the terminal, and between the markers of two pages.

    python -m benchmarks.tables
    python -m benchmarks.tables --page rows.md      # every newest row, as Markdown

docs/measured.md shows the newest rows of every kind of device, with their date, device and commit,
and README a few of them in one table. Running it twice changes nothing; a test checks that both are
what the CSVs give.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from efft_kernels.atomic_files import replacing

from .lib.operands import FLOOR as LINEAR
from .lib.rows import (
    OPERATORS_CSV,
    ROOT,
    STEP_CSV,
    WHOLE_MODEL_CSV,
    Row,
    columns,
    is_cpu,
    last_comparisons,
    read_rows,
)
from .peers import FLOOR as PEERS_FLOOR
from .roofline import COPY, GEMM

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
README = ROOT / "README.md"
MEASURED = ROOT / "docs" / "measured.md"

WHOLE_KEY = ("model", "impl", "dtype", "batch", "r", "device")
OPERATOR_KEY = columns("op impl strategy mode dtype M K N G r device")

MODEL_NAMES = {
    "vit_tiny_patch16_224": "ViT-Ti/16",
    "vit_small_patch16_224": "ViT-S/16",
    "vit_base_patch16_224": "ViT-B/16",
    "vit_large_patch16_224": "ViT-L/16",
    "swin_tiny_patch4_window7_224": "Swin-T",
    "swin_base_patch4_window7_224": "Swin-B",
    "transformers.ViT-S/16": "Hugging Face ViT-S/16",
}
PAGE_OPERATOR_RANK = "16"

Lines = list[str]


def impl_name(row: Row) -> str:
    """A row's implementation in words."""
    if row["impl"] == "peft":
        return "unfused, eager torch"
    return f"{row['impl']}, {row['strategy']}" if row["strategy"] else str(row["impl"])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """A Markdown table; columns after the first are right-aligned."""
    rule = "|---|" + "---:|" * (len(header) - 1)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(r) + " |" for r in rows)]


def where_and_when(rows: Sequence[Row]) -> str:
    """Date, device, commit and torch of rows, from the newest one."""
    last = max(rows, key=lambda row: row["timestamp"])
    commits = ", ".join(sorted({f"`{row['commit']}`" for row in rows}))
    return f"{last['timestamp'][:10]}, {last['device']}, torch {last['torch']}, commit {commits}"


# Whole models

WHOLE_HEADER = (
    "one training step",
    "ms (p20 to p80)",
    "of the floor (p20 to p80)",
    "saved MiB",
    "peak MiB",
    "trainable",
)


def whole_model_cells(row: Row) -> tuple[str, ...]:
    """A row as cells of `WHOLE_HEADER`."""
    time = ratio = "–"
    if row.get("ms_p50"):
        p20, p50, p80 = (float(row[f"ms_{p}"]) for p in ("p20", "p50", "p80"))
        time = f"{p50:.0f} ({p20:.0f} to {p80:.0f})"
        p20, p50, p80 = (float(row[f"ratio_{p}"]) for p in ("p20", "to_floor", "p80"))
        ratio = f"{p50:.2f} ({p20:.2f} to {p80:.2f})"
    return (
        str(row["impl"]),
        time,
        ratio,
        f"{float(row['saved_mib']):.1f}" if row["saved_mib"] else "",
        f"{float(row['peak_mem_mb']):.0f}" if row["peak_mem_mb"] else "not measured",
        f"{int(row['trainable']):,}",
    )


def whole_model_title(row: Row) -> str:
    model = MODEL_NAMES.get(row["model"], row["model"])
    return f"{model}, {row['batch']} images, r = {row['r']}, {row['dtype']}"


def whole_model_table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    table = Table(title=f"{whole_model_title(rows[0])}\n{where_and_when(rows)}")
    for column, name in enumerate(WHOLE_HEADER):
        table.add_column(name, justify="right" if column else "left")
    for row in rows:
        table.add_row(*whole_model_cells(row))
    return table


def timed_groups(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The newest timed rows by (device, model, dtype, batch, r)."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in last_comparisons((r for r in rows if r["ms_p50"]), WHOLE_KEY):
        key = tuple(row[c] for c in ("device", "model", "dtype", "batch", "r"))
        groups.setdefault(key, []).append(row)
    return groups


def whole_model_markdown(rows: Sequence[Row]) -> Lines:
    """Every whole-model table there is, newest rows."""
    lines: Lines = []
    for group in timed_groups(rows).values():
        lines += [f"**{whole_model_title(group[0])}** ({where_and_when(group)})", ""]
        lines += [*markdown(WHOLE_HEADER, map(whole_model_cells, group)), ""]
    return lines


def whole_model_summary(rows: Sequence[Row]) -> Lines:
    """One table per device: a line per implementation, a column per model."""
    lines: Lines = []
    by_device: dict[str, dict[tuple[str, ...], list[Row]]] = {}
    for key, group in timed_groups(rows).items():
        by_device.setdefault(key[0], {})[key[1:]] = group
    for groups in by_device.values():
        impls = list(dict.fromkeys(row["impl"] for group in groups.values() for row in group))
        cells = []
        for impl in impls:
            line = [impl]
            for group in groups.values():
                row = next((row for row in group if row["impl"] == impl), None)
                line.append("–" if row is None else _ratio_and_memory(row))
            cells.append(line)
        first = [group[0] for group in groups.values()]
        floor_ms = " · ".join(
            f"{MODEL_NAMES.get(row['model'], row['model'])} {float(row['ms_p50']):.0f} ms"
            for row in first
        )
        lines += [
            f"One training step over the frozen backbone's ({floor_ms}), and what it saves for the"
            f" backward. {where_and_when([row for group in groups.values() for row in group])}.",
            "",
            *markdown(["", *map(whole_model_title, first)], cells),
            "",
        ]
    return lines


def memory_summary(rows: Sequence[Row]) -> Lines:
    """One table per kind of CPU: a line per implementation, a column per model.

    Of rows without times: what was resident while times were taken was partly chance.
    """
    groups: dict[str, dict[tuple[str, ...], dict[str, Row]]] = {}
    measured = (
        r
        for r in rows
        if r["peak_mem_mb"] and r["saved_mib"] and not r["ms_p50"] and is_cpu(r["device"])
    )
    for row in last_comparisons(measured, WHOLE_KEY):
        case = tuple(row[c] for c in ("model", "dtype", "batch", "r"))
        groups.setdefault(row["device"], {}).setdefault(case, {})[row["impl"]] = row
    lines: Lines = []
    for cases in groups.values():
        impls = list(dict.fromkeys(impl for case in cases.values() for impl in case))
        cells = [[impl, *(_memory(case, impl) for case in cases.values())] for impl in impls]
        firsts = [next(iter(case.values())) for case in cases.values()]
        lines += [
            "Memory of a training step on a CPU: MiB that autograd keeps for the backward,"
            " parameters apart, and by how many MiB the whole step raises what is resident, under a"
            " malloc that gives back what is freed; both also over the frozen backbone's."
            f" {where_and_when([row for case in cases.values() for row in case.values()])}.",
            "",
            *markdown(["", *map(whole_model_title, firsts)], cells),
            "",
        ]
    return lines


def _memory(case: dict[str, Row], impl: str) -> str:
    if impl not in case:
        return "–"
    shown = []
    for column in ("saved_mib", "peak_mem_mb"):
        own, floor = (float(case[name][column]) for name in (impl, PEERS_FLOOR))
        shown.append(f"{own:.0f} ({own / floor:.2f}×)")
    return ", ".join(shown)


def _ratio_and_memory(row: Row) -> str:
    saved = f" ({float(row['saved_mib']):.0f} MiB)" if row["saved_mib"] else ""
    return f"{float(row['ratio_to_floor']):.2f}×{saved}"


# Operators

OPERATOR_HEADER = ("layer", "r", "M", "K → N", "implementation", "fwd", "bwd", "fwd+bwd")


def is_peak(row: Row) -> bool:
    return row["op"] in (COPY, GEMM)


def operator_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each layer, rank and implementation: ratios to F.linear in each mode."""
    grouped: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if is_peak(row) or row["impl"] == LINEAR:
            continue
        key = tuple(str(row[c]) for c in ("op", "r", "M", "K", "N", "dtype"))
        grouped.setdefault((*key, impl_name(row)), {})[str(row["mode"])] = row
    return [
        (op, r, m, f"{k} → {n}", impl, *(_ratio(modes, m) for m in ("fwd", "bwd", "fwd+bwd")))
        for (op, r, m, k, n, _, impl), modes in grouped.items()
    ]


def _ratio(modes: dict[str, Row], mode: str) -> str:
    return f"{float(modes[mode]['ratio_to_linear']):.2f}" if mode in modes else "–"


def operator_table(rows: Sequence[Row]) -> Table:
    """For the terminal: ratios to the frozen layer."""
    measured = [row for row in rows if not is_peak(row)]
    table = Table(title=f"times over the frozen nn.Linear's\n{where_and_when(measured)}")
    for column, name in enumerate(OPERATOR_HEADER):
        table.add_column(name, justify="left" if column in (0, 4) else "right")
    for line in operator_lines(measured):
        table.add_row(*line)
    return table


def operator_summary(rows: Sequence[Row]) -> Lines:
    """One table per device and dtype at the main rank: geometric means over a model's layers."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in last_comparisons((r for r in rows if not is_peak(r)), OPERATOR_KEY):
        if row["r"] == PAGE_OPERATOR_RANK and row["mode"] == "fwd+bwd" and row["impl"] != LINEAR:
            groups.setdefault((row["device"], row["dtype"]), []).append(row)
    lines: Lines = []
    for (_, dtype), group in groups.items():
        impls = list(dict.fromkeys(map(impl_name, group)))
        models = list(dict.fromkeys(row["op"].split()[0] for row in group))
        cells = []
        for model in models:
            line = [model]
            for impl in impls:
                ratios = [
                    float(row["ratio_to_linear"])
                    for row in group
                    if row["op"].split()[0] == model and impl_name(row) == impl
                ]
                line.append(f"{statistics.geometric_mean(ratios):.2f}×" if ratios else "–")
            cells.append(line)
        lines += [
            f"One layer, forward and backward, over the frozen nn.Linear with dX: geometric mean"
            f" over the model's layers, {dtype}, r = {PAGE_OPERATOR_RANK}."
            f" {where_and_when(group)}.",
            "",
            *markdown(["", *impls], cells),
            "",
        ]
    return lines


# Whole steps on a GPU

STEP_KEY = ("device", "model", "dtype", "frozen_dtype", "batch", "r", "mode", "impl")
MODE_NAMES = {
    "eager": "eager",
    "graph": "CUDA graph",
    "compiled": "torch.compile",
    "compiled-graph": "torch.compile, CUDA graph",
}


def step_summary(rows: Sequence[Row]) -> Lines:
    """A table for every device, model and batch: a line per peer, a column per mode."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    newest = sorted(last_comparisons(rows, STEP_KEY), key=lambda row: str(row["timestamp"]))
    for row in newest:
        groups.setdefault(tuple(row[c] for c in STEP_KEY[:6]), []).append(row)
    lines: Lines = []
    for group in groups.values():
        modes = [mode for mode in MODE_NAMES if any(row["mode"] == mode for row in group)]
        lines += [
            "One training step on a GPU: ms, and the ratio to the frozen model in the same mode,"
            " which ran in turn with each (the median over rounds; its own line is its first run)."
            f" {whole_model_title(group[0])}, weights {group[0]['frozen_dtype']}."
            f" {where_and_when(group)}.",
            "",
            *markdown(
                ["", *(MODE_NAMES[mode] for mode in modes), "saved MiB", "peak MiB"],
                [
                    step_cells({row["mode"]: row for row in group if row["impl"] == impl}, modes)
                    for impl in dict.fromkeys(row["impl"] for row in group)
                ],
            ),
            "",
        ]
    return lines


def step_cells(own: dict[str, Row], modes: Sequence[str]) -> list[str]:
    """One peer's line of `step_summary`; `own` are its rows by mode."""

    def time(row: Row) -> str:
        ratio = f" ({float(row['ratio_to_floor']):.2f}×)" if row["ratio_to_floor"] else ""
        return f"{float(row['ms_p50']):.1f}{ratio}"

    def memory(column: str) -> str:
        found = [row[column] for row in own.values() if row[column]]
        return f"{float(found[0]):,.0f}" if found else "–"

    times = [time(own[mode]) if mode in own else "–" for mode in modes]
    return [next(iter(own.values()))["impl"], *times, memory("saved_mib"), memory("peak_mem_mb")]


# README's table

SHOWN = (PEERS_FLOOR, "EFFT2", "LoRA", "PEFT LoRA")
SHOWN_ON_CPU = "vit_small_patch16_224"


def short_summary(whole: Sequence[Row], steps: Sequence[Row]) -> str:
    """What stands between README's markers: a step's time and memory on a CPU and on a GPU, over
    the frozen backbone's, of the newest run of each."""
    on_cpu = [
        group
        for key, group in timed_groups(whole).items()
        if is_cpu(key[0]) and key[1:3] == (SHOWN_ON_CPU, "float32")
    ]
    cpu = max(on_cpu, key=lambda group: max(row["timestamp"] for row in group))
    last = max(steps, key=lambda row: str(row["timestamp"]))["device"]
    newest = last_comparisons((row for row in steps if row["device"] == last), STEP_KEY)
    gpu = [row for row in newest if row["mode"] in ("eager", "graph")]
    by_mode = {(row["mode"], row["impl"]): row for row in gpu}
    cells = []
    for impl in SHOWN:
        own = next(row for row in cpu if row["impl"] == impl)
        eager, graph = by_mode["eager", impl], by_mode["graph", impl]
        memory = [
            f"{float(row['saved_mib']) / float(floor['saved_mib']):.2f}×"
            for row, floor in (
                (own, next(row for row in cpu if row["impl"] == PEERS_FLOOR)),
                (eager, by_mode["eager", PEERS_FLOOR]),
            )
        ]
        times = [f"{float(row['ratio_to_floor']):.2f}×" for row in (own, eager, graph)]
        cells.append([impl, times[0], memory[0], times[1], times[2], memory[1]])
    header = ["", "CPU: time", "memory", "GPU: time, eager", "time, CUDA graph", "memory"]
    lines = [
        *markdown(header, cells),
        "",
        f"CPU: {whole_model_title(cpu[0])}; {where_and_when(cpu)}.",
        f"GPU: {whole_model_title(gpu[0])}; {where_and_when(gpu)}.",
    ]
    return "\n".join(lines)


# Files


def measured_section(whole: Sequence[Row], operators: Sequence[Row], steps: Sequence[Row]) -> str:
    """What stands between the markers of docs/measured.md."""
    lines = step_summary(steps) + whole_model_summary(whole) + memory_summary(whole)
    lines += operator_summary(operators)
    on_gpu = ((steps, "Whole models on a GPU"), (operators, "The operator on a GPU"))
    for rows, what in on_gpu:
        if all(is_cpu(row["device"]) for row in rows):
            lines += [f"{what}: not measured.", ""]
    return "\n".join(lines).strip()


def with_section(page: str, section: str) -> str:
    """`page` with the text between its markers replaced.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must have one {BEGIN} and after it one {END}")
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.partition(END)[2]}"


def results_page(whole: Sequence[Row], operators: Sequence[Row], steps: Sequence[Row]) -> str:
    """Every newest row, as Markdown."""
    lines = ["# Results", ""]
    lines += ["## Whole models", "", *step_summary(steps), *whole_model_markdown(whole)]
    lines += ["## The operator: times over the frozen nn.Linear's", ""]
    groups: dict[str, list[Row]] = {}
    for row in last_comparisons((r for r in operators if not is_peak(r)), OPERATOR_KEY):
        groups.setdefault(row["device"], []).append(row)
    for group in groups.values():
        lines += [where_and_when(group), "", *markdown(OPERATOR_HEADER, operator_lines(group)), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, help="write all tables here, and nothing else")
    arguments = parser.parse_args()
    rows = [read_rows(path) for path in (WHOLE_MODEL_CSV, OPERATORS_CSV, STEP_CSV)]
    if arguments.page is not None:
        arguments.page.write_text(results_page(*rows))
        return
    whole, _, steps = rows
    sections = {MEASURED: measured_section(*rows), README: short_summary(whole, steps)}
    for path, section in sections.items():
        try:
            text = with_section(path.read_text(), section)
        except ValueError as error:
            sys.exit(f"error: {path.name}: {error}")
        with replacing(path) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()

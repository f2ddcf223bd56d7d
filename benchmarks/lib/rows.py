"""The CSVs of benchmarks/results: columns, where and with what rows were measured, which count."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OPERATORS_CSV = RESULTS / "operators.csv"
WHOLE_MODEL_CSV = RESULTS / "whole_model.csv"
STEP_CSV = RESULTS / "step.csv"
# The last columns of every CSV: `provenance`.
PROVENANCE = "device torch triton cuda commit timestamp"


def columns(names: str) -> tuple[str, ...]:
    """A CSV's columns from their names, separated by spaces."""
    return tuple(names.split())


OPERATOR_COLUMNS = columns(
    "op impl strategy mode dtype M K N G r ms_p20 ms_p50 ms_p80 tflops gbps roofline_frac"
    f" ratio_to_linear peak_mem_mb err_ratio {PROVENANCE}"
)
WHOLE_MODEL_COLUMNS = columns(
    "model impl dtype batch r rounds ms_p20 ms_p50 ms_p80 ratio_to_floor ratio_p20 ratio_p80"
    " saved_mib peak_mem_mb trainable loss err_ratio device torch timm peft triton cuda commit"
    " timestamp"
)
# A training step on a GPU. gate: "passed", "failed" or "off"; empty for a peer that is no method.
STEP_COLUMNS = columns(
    "model impl mode dtype frozen_dtype batch r rounds ms_p20 ms_p50 ms_p80 ratio_to_floor"
    " ratio_p20 ratio_p80 saved_mib peak_mem_mb trainable loss err_ratio gate device torch timm"
    " peft triton cuda commit timestamp"
)
# Its kernels: microseconds of one step, and their share of all kernels' time.
KERNEL_COLUMNS = columns(
    f"model impl dtype frozen_dtype batch r kernel calls us share {PROVENANCE}"
)
# A launch of a chain in one form: microseconds, and its results' relative difference from torch's.
CHAIN_COLUMNS = columns(f"launch form M K C r rounds us_p20 us_p50 us_p80 apart {PROVENANCE}")

Row = Mapping[str, Any]


def device_kind(device: str) -> str:
    """What a CSV's device column says: a GPU's name, or the processor's and the threads used."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


@cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def is_cpu(device: str) -> bool:
    """Whether a device column names a processor."""
    return device == "cpu" or device.endswith(" threads")


@cache
def commit() -> str:
    """The short hash of HEAD, with "-dirty" where the code that is measured differs from it.

    BENCHMARK_COMMIT says it where the sources were copied without their repository.
    """
    if said := os.environ.get("BENCHMARK_COMMIT"):
        return said

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        except FileNotFoundError:
            return ""
        return run.stdout.strip()

    head = git("rev-parse", "--short", "HEAD") or "unknown"
    return head + ("-dirty" if git("status", "--porcelain", "--", "efft_kernels", "csrc") else "")


def provenance(device: str, packages: Sequence[str] = ()) -> dict[str, str]:
    """device, versions, commit and the UTC time, as CSV columns."""
    return {
        "device": device_kind(device),
        "torch": torch.__version__,
        **{name: package_version(name) for name in (*packages, "triton")},
        "cuda": torch.version.cuda or "",
        "commit": commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Add rows to a CSV; a new file gets the header, an old one must have the very same.

    Raises:
        ValueError: the file's header is another one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if tuple(header) != tuple(columns):
            raise ValueError(f"{path} must have the columns {list(columns)}, got {header}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV's rows in their order; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def committed_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as committed in HEAD."""
    run = subprocess.run(
        ["git", "show", f"HEAD:{path.relative_to(ROOT).as_posix()}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return list(csv.DictReader(run.stdout.splitlines())) if run.returncode == 0 else []


def newest(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The newest row for each value of the key columns, in the order of first appearance."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        name = tuple(row[column] for column in key)
        if name not in found or row["timestamp"] >= found[name]["timestamp"]:
            found[name] = row
    return list(found.values())


def last_comparisons(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The newest row for each value of the key, less those not measured beside the others.

    Rows compare within one run alone, so of what differs in nothing but impl and strategy only the
    commit of the newest stays.
    """
    of_case = [column for column in key if column not in ("impl", "strategy")]
    found = newest(rows, key)
    last = {tuple(row[c] for c in of_case): row["commit"] for row in sorted(found, key=_time_of)}
    return [row for row in found if row["commit"] == last[tuple(row[c] for c in of_case)]]


def _time_of(row: Row) -> str:
    return str(row["timestamp"])

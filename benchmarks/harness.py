"""What every benchmark here shares: interleaved rounds, where and with what they ran, and the CSVs.

Times are taken in rounds: in each round every candidate runs once, so whatever else the machine is
doing falls on all of them, and the ratio of two of them is taken within a round before the median
over the rounds.
"""

from __future__ import annotations

import csv
import gc
import math
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .operator_bench import COLUMNS, Timer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPERATORS_CSV = RESULTS / "operators.csv"
WHOLE_MODEL_CSV = RESULTS / "whole_model.csv"

OPERATOR_COLUMNS = COLUMNS
WHOLE_MODEL_COLUMNS = (
    "model", "impl", "dtype", "batch", "r", "rounds", "ms_p20", "ms_p50", "ms_p80",
    "ratio_to_floor", "ratio_p20", "ratio_p80", "saved_mib", "peak_mem_mb", "trainable",
    "loss", "err_ratio", "device", "torch", "timm", "peft", "triton", "cuda", "commit", "timestamp",
)  # fmt: skip

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile of a sample."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        deciles = statistics.quantiles(sample, n=10, method="inclusive")
        return cls(deciles[1], deciles[4], deciles[7])


@dataclass
class Timings:
    """Milliseconds of every candidate in every round, by name."""

    ms: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return min(len(sample) for sample in self.ms.values())

    def time(self, name: str) -> Spread:
        return Spread.of(self.ms[name])

    def ratio(self, name: str, floor: str) -> Spread:
        """Of a candidate's time to the floor's in the same round."""
        pairs = zip(self.ms[name], self.ms[floor], strict=True)
        return Spread.of([own / floor_ms for own, floor_ms in pairs])


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    device: str = "cpu",
    graphs: bool = False,
    most_rounds: int = 200,
    fewest_rounds: int = 5,
    warm_ups: int = 1,
) -> Timings:
    """Time `calls` in rounds until `seconds` have passed; the order within a round is random.

    Args:
        calls: name → the call to time.
        seconds: the budget; at least `fewest_rounds` and at most `most_rounds` are run.
        device: "cpu" (the clock) or "cuda" (events, with the L2 cache flushed before each call).
        graphs: on a GPU, time replays of captured graphs rather than the calls themselves.
        warm_ups: how often each call runs before the first round.
    """
    timer = Timer(device, eager=not graphs)
    if device == "cuda" and graphs:
        calls = {name: timer.prepare(call) for name, call in calls.items()}
    for call in calls.values():
        for _ in range(warm_ups):
            call()
    order = list(calls)
    shuffler = random.Random(0)
    timings = Timings({name: [] for name in calls})
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while timings.rounds < fewest_rounds or (
            timings.rounds < most_rounds and time.perf_counter() - start < seconds
        ):
            shuffler.shuffle(order)
            for name in order:
                timings.ms[name].append(timer.time(calls[name]))
    finally:
        if was_enabled:
            gc.enable()
    return timings


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
    """The short hash of HEAD, with "-dirty" where the code that is measured differs from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
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
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
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


def worst_error(
    got: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> float:
    """The largest error of `got` over that of plain torch, both against float64; at most 2 passes.

    Plain torch's error counts as at least half an ulp of the exact value's norm. A NaN stays.
    """
    ratios = []
    for value, torch_value, truth in zip(got, plain, exact, strict=True):
        budget = max(
            float((torch_value.double() - truth).norm()),
            float(truth.norm()) * torch.finfo(value.dtype).eps / 2,
            torch.finfo(torch.float64).tiny,
        )
        ratios.append(float((value.double() - truth).norm()) / budget)
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)

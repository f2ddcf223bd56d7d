"""From benchmark rows to `measured.json`, which the cost model believes over its own arithmetic.

    python -m benchmarks.measured benchmarks/results/operators.csv --out measured.json

Takes the newest GPU row of every device, backend, layer, dtype and strategy. The forward's time is
the one that saves P ("train fwd"), the backward's what "fwd+bwd" takes on top of it. A case with
fewer than two strategies decides nothing and is left out. Ship the file as
efft_kernels/ops/measured.json; devices that the CSVs do not name keep the rows they have there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from efft_kernels.atomic_files import replacing
from efft_kernels.ops import cost_model
from efft_kernels.ops.dispatch import BACKENDS, STRATEGIES
from efft_kernels.testing.error_budget import BUDGET

from .lib.rows import Row, columns, is_cpu, newest, read_rows

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FORWARD, BOTH = "train fwd", "fwd+bwd"
KEY = ("device", "impl", "dtype", "M", "K", "N", "r", "strategy", "mode")
FIELDS = columns(
    "backend backward compute_bytes weight_bytes M K N rank strategy ms_p50 torch triton "
    "commit timestamp"
)

Table = dict[str, list[dict[str, Any]]]


def convert(rows: Iterable[Row]) -> Table:
    """{device: rows for `cost_model.add_measured`} from rows of operators.py.

    Raises:
        ValueError: a row's time or error is not what a measurement gives.
    """
    taken = [
        row
        for row in rows
        if row["impl"] in BACKENDS
        and row["strategy"] in STRATEGIES
        and row["mode"] in (FORWARD, BOTH)
        and not is_cpu(str(row["device"]))
    ]
    for row in taken:
        _check(row)
    by_case: dict[tuple[Any, ...], dict[str, dict[str, Row]]] = {}
    for row in newest(taken, KEY):
        case = tuple(row[column] for column in KEY[:-2])
        by_case.setdefault(case, {}).setdefault(str(row["strategy"]), {})[str(row["mode"])] = row
    table: Table = {}
    for (device, *_), by_strategy in by_case.items():
        for backward in (False, True):
            found = [
                entry
                for strategy, modes in by_strategy.items()
                if (entry := _entry(strategy, modes, backward)) is not None
            ]
            if len(found) > 1:
                table.setdefault(str(device), []).extend(found)
    return table


def _check(row: Row) -> None:
    where = f"{row['device']} {row['impl']}:{row['strategy']} {row['op']} {row['mode']}"
    ms, error = float(row["ms_p50"]), float(row["err_ratio"])
    if not (math.isfinite(ms) and ms > 0):
        raise ValueError(f"{where}: ms_p50 must be positive, got {row['ms_p50']}")
    if not error <= BUDGET:
        raise ValueError(f"{where}: err_ratio must be at most {BUDGET:g}, got {row['err_ratio']}")
    if row["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"{where}: dtype must be one of {tuple(DTYPE_BYTES)}, got {row['dtype']}")


def _entry(strategy: str, modes: dict[str, Row], backward: bool) -> dict[str, Any] | None:
    """One row of measured.json; None where the modes it needs were not measured together."""
    if FORWARD not in modes or (backward and BOTH not in modes):
        return None
    row = modes[BOTH if backward else FORWARD]
    ms = float(row["ms_p50"]) - (float(modes[FORWARD]["ms_p50"]) if backward else 0.0)
    if ms <= 0 or row["commit"] != modes[FORWARD]["commit"]:
        return None
    width = DTYPE_BYTES[str(row["dtype"])]
    values = {
        "backend": str(row["impl"]),
        "backward": backward,
        "compute_bytes": width,
        "weight_bytes": width,
        "M": int(row["M"]),
        "K": int(row["K"]),
        "N": int(row["N"]),
        "rank": int(row["r"]),
        "strategy": strategy,
        "ms_p50": round(ms, 5),
    }
    return values | {column: str(row[column]) for column in FIELDS[len(values) :]}


def merge(old: Table, new: Table) -> Table:
    """`old` with the new devices' rows; of one case and strategy the new one counts."""
    identity = FIELDS[:9]
    merged = dict(old)
    for device, rows in new.items():
        by_case = {tuple(r[f] for f in identity): r for r in (*old.get(device, ()), *rows)}
        merged[device] = [by_case[case] for case in sorted(by_case)]
    return merged


def write(table: Table, path: Path) -> None:
    """Replace the file in one step, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--base",
        type=Path,
        default=cost_model.MEASURED,
        help="rows of other devices come from here; default: the shipped file",
    )
    arguments = parser.parse_args()
    new = convert(row for path in arguments.csv for row in read_rows(path))
    if not new:
        sys.exit(f"no case with two strategies on a GPU in {', '.join(map(str, arguments.csv))}")
    base = json.loads(arguments.base.read_text()) if arguments.base.is_file() else {}
    write(merge(base, new), arguments.out)
    for device, rows in new.items():
        print(f"{device}: {len(rows)} rows in {arguments.out}")


if __name__ == "__main__":
    main()

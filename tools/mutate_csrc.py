"""Small faults put into csrc/cuda, one at a time: which of them do the tests without a GPU notice?

    python -m tools.mutate_csrc [--only thin checks ...] [--csv FILE]

Each is one changed expression in a copy of the sources, from which the tests of tests/csrc/ that
FAULTS names are compiled and run: on a plain CPU, the kernels on the model of a multiprocessor. The
sources themselves are not touched, and hold nothing for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .mutate import ROOT, append_score


class Fault(NamedTuple):
    """`right`, found once in a file of csrc/cuda, becomes `wrong`."""

    file: str
    right: str
    wrong: str


# Program of tests/csrc, by what follows `test_` in its name → faults that it is to notice.
FAULTS: dict[str, tuple[Fault, ...]] = {
    "checks": (
        Fault(
            "checks.h", "t.shape[1] > 1 && t.stride[1] != 1", "t.shape[1] > 1 && t.stride[0] < 1"
        ),
        Fault("checks.h", "q.down.shape[1] > kMaxRank", "q.down.shape[1] > kMaxRank + 1"),
        Fault("checks.h", "q.down.shape[1] > kMaxRank", "q.down.shape[1] >= kMaxRank"),
        Fault("checks.h", "{&q.rows, &q.weight, &q.x, &q.p}", "{&q.rows, &q.weight, &q.x}"),
        Fault("checks.h", "{&q.rows, &q.weight, &q.x, &q.p}", "{&q.rows, &q.weight, &q.p}"),
        Fault("checks.h", "t->present && t->dtype != q.down.dtype", "false"),
        Fault("checks.h", "slices < 1 || n % slices", "slices < 1"),
        Fault("checks.h", "q.up.shape[1] != n / slices ||", ""),
        Fault("checks.h", "t->present && t->device != q.rows.device", "false"),
    ),
    "ring": (Fault("common/ring.h", "parity ^= 1;", ""),),
    "schedule": (
        Fault("gemm/schedule.h", "rows - first < kGroup ? rows - first : kGroup", "kGroup"),
        Fault("gemm/schedule.h", "ceil_div(c, block_c) % 2 == 0", "ceil_div(c, block_c) > 0"),
        Fault("gemm/select.h", "wide <= narrow", "wide < narrow"),
        Fault("gemm/select.h", "* (kSm90WideBlockC + 32)", "* kSm90WideBlockC"),
        Fault("gemm/select.h", "return 4 * ceil_div", "return 2 * ceil_div"),
    ),
    "swizzle": (
        Fault("common/swizzle.h", "kCols == 16 ? 2 : kCols == 32 ? 1 : 0", "0"),
        Fault("common/swizzle.h", "lane / 4 + e / 2 * 8", "lane / 4 + e % 2 * 8"),
        Fault("common/swizzle.h", "(address >> 7 & 1) << 4", "(address >> 8 & 1) << 4"),
    ),
    "tensor_map": (
        Fault("gemm/tma.h", "p.row_bytes % 16", "p.row_bytes % 8"),
        Fault("gemm/tma.h", "p.box_rows > 256", "p.box_rows > 255"),
        Fault("gemm/tma.h", "p.row_bytes < p.cols * kElementBytes", "false"),
        Fault("gemm/tma.h", "p.address % 16", "p.address % 8"),
    ),
    "workspace": (
        Fault("passes/sizes.h", "if (wanted < 1) wanted = 1;", ""),
        Fault("passes/sizes.h", "ceil_div(m, 256)", "ceil_div(m, 128)"),
        Fault("passes/sizes.h", "int64_t wanted = 4 *", "int64_t wanted = 5 *"),
        Fault("passes/sizes.h", "while (padded < rank)", "while (padded <= rank)"),
    ),
    "thin": (
        Fault(
            "passes/reduce.cu", "other = 1; other < kReduceLanes", "other = 2; other < kReduceLanes"
        ),
        Fault("passes/reduce.cu", "other = 1; other < kReduceLanes;", "other = 1; other < 8;"),
        Fault("passes/reduce.cu", "from += kReduceInFlight * step;", "from += step;"),
        Fault("passes/pass.cuh", "r < t.rank ? s[j][half * 2 + e] : 0.0f", "s[j][half * 2 + e]"),
        Fault("passes/pass.cuh", "if (row >= t.rows) continue;", ""),
        Fault(
            "passes/thin_grad.cu", "first ? part[i + 2] : column[8] + part[i + 2]", "part[i + 2]"
        ),
        Fault(
            "passes/thin_grad.cu",
            "if (c + i >= t.tall.cols) continue;",
            "if (c >= t.tall.cols) continue;",
        ),
        Fault("passes/tall_grad.cu", "left < t.rows_per_split ? left : t.rows_per_split", "left"),
    ),
    "factors": (
        Fault("factors/fold.cu", "a < f.ra ? to_float(*", "a <= f.ra ? to_float(*"),
        Fault("factors/fold.cu", "to_float(core[b * f.core.stride[2]])", "to_float(core[b])"),
        Fault("factors/unfold.cu", "u.shared ? u.slices : first + 1", "first + 1"),
        Fault("factors/unfold.cu", "n + row * kRowShares < u.slice_n ? row * kRowShares : 0", "0"),
        Fault(
            "factors/unfold.cu",
            "for (int i = 1; i < kGroups; ++i) total",
            "for (int i = 2; i < kGroups; ++i) total",
        ),
        Fault("factors/unfold.cu", "u.up.stride[2] == 1 &&", ""),
    ),
    "norm": (
        Fault("norm/norm.cu", "kNormCols * apart * apart", "apart * apart"),
        Fault("norm/norm.cu", "row >= p.rows || r >= p.rank", "row >= p.rows"),
        Fault("norm/norm.cu", "z[chunk][j] += y[j]", "z[chunk][j] += y[0]"),
        Fault("norm/norm.cu", "turn ^= 1;", ""),
    ),
}


def noticed(fault: Fault | None, program: str, folder: Path) -> bool:
    """Whether the program fails, from a copy of the sources in `folder`.

    Raises:
        RuntimeError: it does not compile, which would tell nothing of the test; or there is none.
    """
    for name in ("csrc", "tests/csrc"):
        shutil.copytree(ROOT / name, folder / name)
    if fault is not None:
        path = folder / "csrc" / "cuda" / fault.file
        path.write_text(replaced(fault, path.read_text()))
    # Nothing of the package is needed: no conftest.py, no settings of pytest.
    options = [
        "-q",
        "-x",
        "--noconftest",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
    ]
    options += [f"--rootdir={folder}", f"--basetemp={folder / 'tmp'}", "-k", f"test_{program}"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder / "tests/csrc/test_host.py")],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if run.returncode not in (0, 1) or ": error:" in run.stdout:
        raise RuntimeError(run.stdout + run.stderr)
    return run.returncode == 1


def replaced(fault: Fault, source: str) -> str:
    """The source with the fault in it.

    Raises:
        ValueError: the right text is not there exactly once.
    """
    if source.count(fault.right) != 1:
        raise ValueError(f"{fault.file} must hold this once: {fault.right}")
    return source.replace(fault.right, fault.wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description="Small faults in csrc/cuda: which are noticed?")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="TEST")
    parser.add_argument("--csv", type=Path, help="append the score of each program to this file")
    options = parser.parse_args()
    tried = caught = 0
    for program in options.only:
        found = []
        for fault in (None, *FAULTS[program]):
            with tempfile.TemporaryDirectory() as folder:
                found.append(noticed(fault, program, Path(folder)))
            if fault is None and found.pop():
                sys.exit(f"error: without a fault test_{program} fails")
            if fault is not None and not found[-1]:
                print(f"passes: {fault.file}\n  - {fault.right}\n  + {fault.wrong}", flush=True)
        print(f"test_{program}: {sum(found)} of {len(found)}", flush=True)
        if options.csv is not None:
            append_score(options.csv, ["", f"csrc/cuda by test_{program}", len(found), sum(found)])
        tried, caught = tried + len(found), caught + sum(found)
    print(f"{caught} of {tried} caught, {100 * caught / tried:.1f} %")


if __name__ == "__main__":
    main()

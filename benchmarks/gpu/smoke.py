"""Does every kernel give the right numbers on this GPU, and is it the kernel that was meant?

    python -m benchmarks.gpu.smoke --out smoke.csv
    python -m benchmarks.gpu.smoke --only "cuda Hopper 192"  # cases whose name holds the text
    python -m benchmarks.gpu.smoke --list                    # every kernel, and which cases take it
    python -m benchmarks.gpu.smoke --device cpu              # a rehearsal: plain torch, fewer rows
    compute-sanitizer --tool memcheck python -m benchmarks.gpu.smoke --inline --only "cuda K tail"

The cases of efft_kernels/testing/gpu_cases.py, most of them with whole numbers, so that results are
compared bit for bit with the reference in float64. Every output starts as NaN. Cases run in child
processes: one that hangs or loses its CUDA context costs seconds, and the next child goes on behind
it. The CUDA backend comes first; then the Triton backend, in several processes, as compiling takes
most of its time. Each row is written as soon as its case is done. `--inline` runs the cases in this
process and does not look at which kernels ran, because a sanitizer and the profiler exclude each
other.

Verdicts: ok; WRONG, a result is not the reference's; PLAN, other kernels ran than were expected;
ERROR, an exception; HANG, the GPU did not finish; DIED, the process ended; LIMIT, a case took too
long; MISSED, never started. The exit code is 1 unless all are ok.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efft_kernels.ops.backends import REGISTRY
from efft_kernels.testing.cuda_kernels import kernel_of, recorded_launches
from efft_kernels.testing.error_budget import assert_within_budget, largest_exact_integer
from efft_kernels.testing.gpu_cases import (
    CUDA_CASES,
    NEEDS,
    TRITON_CASES,
    Case,
    cases_by_kernel,
    plans_are_known,
)
from efft_kernels.testing.operands import NAMES
from efft_kernels.testing.poison import poisoned_allocations
from efft_kernels.testing.results import plain_and_exact, reference_results

CASES = [*CUDA_CASES, *TRITON_CASES]
ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    *("name", "backend", "strategy", "dtype", "M", "K", "n", "G", "Ra", "Rb", "device"),
    *("expected_plan", "plan_seen", "verdict", "wrong", "seconds"),
)
HANG_SECONDS = 8.0  # for the GPU to finish what one forward or backward launched
SANITIZED_HANG_SECONDS = 300.0  # the same under a sanitizer, which slows kernels 50 times
CASE_SECONDS = 40.0  # for a whole case, compilation included
START_SECONDS = 90.0  # for a child to import torch and to start its first case
REHEARSAL_ROWS = 131  # at most so many rows without a GPU
HANG_CODE, DEAD_CODE = 3, 4
# Deterministic algorithms, which come with poisoned memory, ask cuBLAS for it.
WORKSPACE = ":4096:8"

Row = dict[str, Any]


# The child: runs cases and tells of them on its standard output, a JSON object a line.


def tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def wait_for_gpu(what: str, limit: float = HANG_SECONDS) -> None:
    """Until everything launched has run. Where that takes longer than `limit` seconds the process
    ends: whatever would be cleaned up on the way out, the profiler for one, waits for the GPU as
    well.
    """
    if not torch.cuda.is_available():
        return
    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + limit
    while not event.query():
        if time.monotonic() > end:
            tell(row={"verdict": "HANG", "wrong": f"no end of {what} in {limit:.0f} s"})
            os._exit(HANG_CODE)
        time.sleep(0.001)


def difference(name: str, value: Tensor, exact: Tensor) -> str | None:
    """Where a result is not the exact one rounded once; None where it is everywhere."""
    bad = value != exact.to(value.dtype)
    if not bad.any():
        return None
    flat = bad.reshape(-1, bad.shape[-1])
    rows, cols = (flat.any(dim).nonzero().flatten() for dim in (1, 0))
    within_64 = sorted(set((cols % 64).tolist()))
    return (
        f"{name}: {int(bad.sum())} of {bad.numel()} wrong, {int(value.isnan().sum())} NaN;"
        f" rows {int(rows[0])}..{int(rows[-1])} ({len(rows)}),"
        f" cols {int(cols[0])}..{int(cols[-1])} ({len(cols)}), col % 64 in {within_64[:8]}"
        f"{'...' if len(within_64) > 8 else ''}"
    )


def results_of(
    case: Case, backend: Any, operands: Sequence[Tensor | None], limit: float = HANG_SECONDS
) -> dict[str, Tensor]:
    """y, p and the gradients of NEEDS by a backend, each waited for `limit` seconds at most."""
    *tensors, dy = operands
    x, weight, _, down, core, up = tensors
    y, p = backend.forward(*tensors, save_p=True, strategy=case.strategy)
    wait_for_gpu("forward", limit)
    grads = backend.backward(dy, x, weight, p, down, core, up, needs=NEEDS, strategy=case.strategy)
    wait_for_gpu("backward", limit)
    found = {"y": y, "p": p}
    return found | {n: g for n, g in zip(NAMES, grads, strict=True) if g is not None}


def wrong_results(
    case: Case, results: dict[str, Tensor], operands: Sequence[Tensor | None], rehearsal: bool
) -> list[str]:
    """What is not as the reference has it."""
    if case.density is None:
        try:
            assert_within_budget(results, *plain_and_exact(operands))
        except AssertionError as error:
            return [str(error)]
        return []
    exact = reference_results(operands, torch.float64)
    if rehearsal:  # plain torch rounds on the way
        limit = largest_exact_integer(case.dtype)
        results = {n: t for n, t in results.items() if exact[n].abs().max() < limit}
    found = (difference(name, value, exact[name]) for name, value in results.items())
    return [text for text in found if text is not None]


def run_case(case: Case, device: str, *, sanitized: bool = False) -> Row:
    """The row of one case. Raises whatever the backend raises.

    Args:
        case: one of CASES.
        device: "cuda", or "cpu" for a rehearsal.
        sanitized: do not record which kernels run, and wait longer for them.
    """
    rehearsal = device == "cpu"
    if rehearsal:
        case = replace(case, shape=replace(case.shape, M=min(case.shape.M, REHEARSAL_ROWS)))
    backend = REGISTRY["torch" if rehearsal else case.backend].load()
    if (reason := backend.unavailable()) is not None:
        raise RuntimeError(reason)
    operands = case.operands(device)
    limit = SANITIZED_HANG_SECONDS if sanitized else HANG_SECONDS
    wait_for_gpu("drawing operands", limit)
    recording = nullcontext([]) if sanitized else recorded_launches()
    with recording as launches, poisoned_allocations(warn_only=True):
        results = results_of(case, backend, operands, limit)
    if case.backend == "cuda":
        seen = [kernel for kernel in map(kernel_of, launches) if kernel is not None]
    else:
        seen = [name for name in launches if name.startswith("_")]
    wrong = wrong_results(case, results, operands, rehearsal)
    verdict = "WRONG" if wrong else "ok"
    if not sanitized and plans_are_known() and case.plan and seen != case.plan:
        verdict = "WRONG" if wrong else "PLAN"
        wrong.append(f"took {' '.join(seen) or 'no known kernel'}, not {' '.join(case.plan)}")
    return {"plan_seen": " ".join(seen), "verdict": verdict, "wrong": "; ".join(wrong)}


def run_child(indices: Sequence[int], device: str) -> None:
    """Run the cases. The process ends where the GPU is of no more use to it."""
    warnings.simplefilter("ignore")
    for index in indices:
        tell(begin=index)
        try:
            tell(row=run_case(CASES[index], device))
        except Exception as error:
            traceback.print_exc()
            tell(row={"verdict": "ERROR", "wrong": f"{type(error).__name__}: {error}"[:600]})
            if device == "cuda" and context_is_dead():
                os._exit(DEAD_CODE)


def run_inline(indices: Sequence[int], device: str, report: Report, end: float) -> None:
    """Run the cases in this process until `end`, by time.monotonic."""
    warnings.simplefilter("ignore")
    for index in indices:
        start = time.monotonic()
        if start >= end or (device == "cuda" and context_is_dead()):
            row = {"verdict": "MISSED", "wrong": "never started"}
        else:
            try:
                row = run_case(CASES[index], device, sanitized=True)
            except Exception as error:
                traceback.print_exc()
                row = {"verdict": "ERROR", "wrong": f"{type(error).__name__}: {error}"[:600]}
        report.add(index, row, time.monotonic() - start)


def context_is_dead() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


# The parent: starts children, keeps time, and writes rows.


class Report:
    """Rows as they come, to a CSV file and to the terminal, from several threads."""

    def __init__(self, out: Path | None, device: str) -> None:
        self.verdicts: dict[str, str] = {}
        self._device = device
        self._lock = threading.Lock()
        self._file = None if out is None else out.open("w", newline="")
        self._writer = None if self._file is None else csv.DictWriter(self._file, COLUMNS)
        if self._writer is not None:
            self._writer.writeheader()

    def add(self, index: int, row: Row, seconds: float) -> None:
        case = CASES[index]
        shape = case.shape
        full = {name: getattr(shape, name) for name in ("M", "K", "n", "G", "Ra", "Rb")}
        full |= {"name": case.name, "backend": case.backend, "strategy": case.strategy}
        full |= {"dtype": str(case.dtype).split(".")[1], "device": self._device}
        full |= {"expected_plan": " ".join(case.plan), "plan_seen": "", "wrong": ""}
        full |= {"seconds": f"{seconds:.2f}"} | row
        with self._lock:
            self.verdicts[case.name] = row["verdict"]
            if self._writer is not None and self._file is not None:
                self._writer.writerow(full)
                self._file.flush()
            print(f"{row['verdict']:6} {case.name}  {seconds:.1f} s", flush=True)
            for text in full["wrong"].split("; ") if full["wrong"] else ():
                print(f"         {text}", flush=True)

    def summarise(self) -> bool:
        """Print how many are ok and which are not; whether all are."""
        bad = {name: verdict for name, verdict in self.verdicts.items() if verdict != "ok"}
        print(f"{len(self.verdicts) - len(bad)} ok, {len(bad)} bad", flush=True)
        for name, verdict in bad.items():
            print(f"   {verdict:6} {name}", flush=True)
        return bool(self.verdicts) and not bad


def child_command(indices: Sequence[int], device: str) -> list[str]:
    run = ",".join(map(str, indices))
    return [sys.executable, "-m", "benchmarks.gpu.smoke", "--device", device, "--run", run]


def run_lane(
    indices: Sequence[int],
    device: str,
    report: Report,
    end: float,
    command: Callable[[Sequence[int], str], list[str]] = child_command,
) -> None:
    """Run cases one after the other in a child, and in another behind a case that ended it.

    Args:
        indices: of CASES.
        device: "cuda" or "cpu".
        report: gets the row of every case.
        end: when to stop, by time.monotonic.
        command: starts a child for such indices and such a device.
    """
    pending = list(indices)
    while pending and time.monotonic() < end:
        child = subprocess.Popen(
            command(pending, device),
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": WORKSPACE},
        )
        lines = _lines_of(child)
        began = in_case = timed_out = False
        since, limit = time.monotonic(), START_SECONDS
        while pending:
            try:
                line = lines.get(timeout=max(0.0, min(since + limit, end) - time.monotonic()))
            except queue.Empty:
                timed_out = True
                child.kill()
                break
            if line is None:
                break
            if not line.startswith('{"'):
                print(line, end="", flush=True)
                continue
            message = json.loads(line)
            if "begin" in message:
                began = in_case = True
                since, limit = time.monotonic(), CASE_SECONDS
            else:
                in_case = False
                report.add(pending.pop(0), message["row"], time.monotonic() - since)
        status = _ended(child)
        if not began:
            print(f"a child ended with {status} before its first case", flush=True)
            break
        if in_case:
            row = {"verdict": "DIED", "wrong": f"the process ended with {status}"}
            if timed_out:
                row = {"verdict": "LIMIT", "wrong": "took too long"}
            report.add(pending.pop(0), row, time.monotonic() - since)
    for index in pending:
        report.add(index, {"verdict": "MISSED", "wrong": "never started"}, 0.0)


def _lines_of(child: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """The child's output as it comes, then None."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _ended(child: subprocess.Popen[str]) -> int | None:
    """The child's exit status; None where it does not end even when killed."""
    for _ in range(2):
        try:
            return child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
    return None


def lanes_of(indices: Sequence[int], jobs: int) -> list[list[int]]:
    """Cases to be run side by side: those of one shape and dtype share compiled kernels."""
    if jobs == 1:
        return [list(indices)]
    groups: dict[Any, list[int]] = {}
    for index in indices:
        case = CASES[index]
        groups.setdefault((case.shape, case.dtype, case.density), []).append(index)
    lanes: list[list[int]] = [[] for _ in range(min(jobs, len(groups)))]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(lanes, key=len).extend(group)
    return lanes


def print_kernels() -> None:
    """Every CUDA kernel and the cases that take it."""
    for kernel, names in cases_by_kernel().items():
        print(f"{kernel:22} {len(names):3}  {', '.join(names[:3])}{', ...' if names[3:] else ''}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="CSV file of the rows")
    parser.add_argument("--only", nargs="+", default=[""], help="texts, one of which a name holds")
    parser.add_argument("--list", action="store_true", help="kernels and the cases that take them")
    parser.add_argument("--seconds", type=float, default=150, help="for everything")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Triton's children")
    parser.add_argument("--inline", action="store_true", help="no children, for a sanitizer")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print_kernels()
        return 0
    if options.run is not None:
        run_child([int(index) for index in options.run.split(",")], options.device)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu is a rehearsal without one")

    end = time.monotonic() + options.seconds
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    report = Report(options.out, device)
    chosen = [i for i, case in enumerate(CASES) if any(t in case.name for t in options.only)]
    if options.inline:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACE
        run_inline(chosen, options.device, report, end)
        return 0 if report.summarise() else 1
    for backend, jobs in (("cuda", 1), ("triton", options.jobs)):
        lanes = lanes_of([i for i in chosen if CASES[i].backend == backend], jobs)
        with ThreadPoolExecutor(len(lanes) or 1) as pool:
            for _ in pool.map(lambda lane: run_lane(lane, options.device, report, end), lanes):
                pass  # raises what a lane raised
    return 0 if report.summarise() else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything that needs a GPU, in two halves of under 290 seconds each.

    benchmarks/gpu_check.sh first     is it right, and where does the time go
    benchmarks/gpu_check.sh second    tests, sanitizer, tuning, rows for the tables

A half is a list of stages in the order in which they teach most. Each is a process of its own with
a time limit, writes its rows as it makes them, and is killed with all its children when the limit
is over; whatever becomes of it, the next one runs. All output goes to RESULTS/check.log as well.
The last lines say how each stage ended; exit code 1 if any failed.

`--dry` runs the same flow without a GPU: stages that have a form for the CPU run it, the others
only print what they would run.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
HALVES = ("first", "second")
TOTAL_S = 285.0
# Where CUDA's tools lie if not on the PATH.
TOOL_FOLDERS = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda-*/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/local/cuda*/nsight-compute-*",
)
# A stage that has less than this left is not started.
LEAST_S = 5.0
# A rehearsal runs on processors, perhaps few and busy ones.
DRY_PATIENCE = 5.0


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: what the log calls it.
        half: "first" or "second".
        limit_s: seconds after which it is killed.
        command: its arguments; "{python}" and "{results}" are replaced, "{cores}" by the number of
            processes that the machine has cores for, "{tool}" by the path of what it needs.
        dry: the same for a machine without a GPU; None only prints `command`.
        needs: a program, on the PATH or among CUDA's; without it the stage is skipped by name.
    """

    name: str
    half: str
    limit_s: float
    command: tuple[str, ...]
    dry: tuple[str, ...] | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "ok", "FAILED" or "skipped", and why."""

    stage: str
    verdict: str
    seconds: float
    why: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:8}{self.stage:34}{self.seconds:6.0f} s  {self.why}".rstrip()


class Log:
    """Lines for the terminal and the log file at once, from any thread."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)
            print(line, file=self._file, flush=True)


def run_stage(stage: Stage, command: Sequence[str], limit_s: float, log: Log) -> Outcome:
    """Run one stage in a process group of its own; kill the group when the limit is over."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(stage.name, "FAILED", 0.0, str(error))
    reader = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    # Also ends what a stage that is done has left running.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reader.join(2)
    seconds = time.monotonic() - start
    if code is None:
        return Outcome(stage.name, "FAILED", seconds, f"killed after its {limit_s:.0f} s")
    return Outcome(stage.name, "FAILED" if code else "ok", seconds, f"exit {code}" if code else "")


def _copy(lines: Iterable[str] | None, log: Log) -> None:
    for line in lines or ():
        log.write(line.rstrip("\n"))


def run(
    stages: Iterable[Stage],
    log: Log,
    results: Path,
    *,
    dry: bool,
    total_s: float = TOTAL_S,
    which: Callable[[str], str | None] | None = None,
) -> list[Outcome]:
    """Run all stages, one after the other, within `total_s` seconds together."""
    which = which or find_tool
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for stage in stages:
        left = total_s - (time.monotonic() - start)
        tool = which(stage.needs) if stage.needs else None
        rehearsed = dry and stage.dry is not None
        command = filled(stage.dry if rehearsed else stage.command, results, tool or stage.needs)
        limit = min(stage.limit_s * (DRY_PATIENCE if dry else 1), max(left, 0))
        log.write(f"\n== {stage.name}, at most {limit:.0f} s")
        if dry and stage.dry is None:
            outcome = Outcome(stage.name, "skipped", 0.0, "would run: " + " ".join(command))
        elif stage.needs and tool is None and not rehearsed:
            outcome = Outcome(stage.name, "skipped", 0.0, f"{stage.needs} is not on this machine")
        elif left < LEAST_S:
            outcome = Outcome(stage.name, "FAILED", 0.0, f"not run: the {total_s:.0f} s are over")
        else:
            outcome = run_stage(stage, command, limit, log)
        outcomes.append(outcome)
        log.write(str(outcome))
    return outcomes


def find_tool(name: str) -> str | None:
    """The path of a program on the PATH or in one of `TOOL_FOLDERS`, there the newest."""
    found = [path for folder in TOOL_FOLDERS for path in sorted(glob.glob(f"{folder}/{name}"))]
    return shutil.which(name) or next(
        (path for path in reversed(found) if os.access(path, os.X_OK)), None
    )


def filled(command: Iterable[str] | None, results: Path, tool: str | None = None) -> list[str]:
    """The command with what its placeholders stand for."""
    values = {"python": sys.executable, "results": str(results), "cores": str(os.cpu_count() or 1)}
    return [argument.format(**values, tool=tool) for argument in command or ()]


def main(arguments: Sequence[str] | None = None) -> int:
    from .stages import STAGES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("half", choices=HALVES)
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    parser.add_argument(
        "--results", type=Path, default=Path(os.environ.get("RESULTS", "build/gpu_check"))
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for all stages together")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="stages whose name has this")
    options = parser.parse_args(arguments)
    stages = [stage for stage in STAGES if stage.half == options.half]
    if options.only:
        stages = [s for s in stages if any(part in s.name for part in options.only)]
        if not stages:
            parser.error(f"--only: no stage of {options.half} has {options.only} in its name")
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    os.environ.update(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    if not options.dry:
        os.environ.pop("TRITON_INTERPRET", None)
    with (results / "check.log").open("a", encoding="utf-8") as file:
        log = Log(file)
        start = time.monotonic()
        outcomes = run(stages, log, results, dry=options.dry, total_s=options.seconds)
        log.write(f"\n== {options.half} half: {time.monotonic() - start:.0f} s, files in {results}")
        for outcome in outcomes:
            log.write(str(outcome))
    return int(any(outcome.verdict == "FAILED" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())

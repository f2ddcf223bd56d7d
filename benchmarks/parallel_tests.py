"""Runs tests in several processes with nothing but pytest: a bare GPU machine has no pytest-xdist.

    python -m benchmarks.parallel_tests --jobs 12 tests/ops/backends/triton/kernels -m gpu

What is not `--jobs` goes to pytest. The tests are dealt out in turn, since neighbours tend to
compile the same kernels. Ends with the sum of the processes' closing lines; 1 if any test failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

SHARE_VARIABLE = "EFFT_KERNELS_TEST_SHARE"  # "2/12": the tests 2, 14, 26, ...
COUNTED = ("passed", "failed", "skipped", "error", "errors", "xfailed", "xpassed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep this process's share of what is selected."""
    number, of = map(int, os.environ[SHARE_VARIABLE].split("/"))
    items[:] = items[number::of]


def counts(output: str) -> Counter[str]:
    """{"passed": 12, ...} of pytest's closing line."""
    closing = [line for line in output.splitlines() if re.search(r"\b\d+ \w+.* in [\d.]+s", line)]
    found = re.findall(r"(\d+) (\w+)", closing[-1]) if closing else []
    return Counter({word: int(number) for number, word in found if word in COUNTED})


def run(jobs: int, arguments: list[str]) -> int:
    """0 if some test passed and none failed. Prints what the processes with a failure printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.parallel_tests", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(number)) for number in range(jobs)]
        running = []
        for number, log in enumerate(logs):
            environment = {**os.environ, SHARE_VARIABLE: f"{number}/{jobs}"}
            with log.open("wb") as file:
                running.append(
                    subprocess.Popen(
                        command, stdout=file, stderr=subprocess.STDOUT, env=environment
                    )
                )
        # Out of time, as `timeout` says it: what was printed so far is shown all the same.
        signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in running])
        codes = [process.wait() for process in running]
        outputs = [log.read_text(errors="replace") for log in logs]
    total: Counter[str] = Counter()
    failed = False
    for code, output in zip(codes, outputs, strict=True):
        total += counts(output)
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            failed = True
            print(output)
    print(", ".join(f"{total[word]} {word}" for word in COUNTED if total[word]) or "no tests ran")
    return int(failed or not total["passed"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=8)
    own, arguments = parser.parse_known_args()
    return run(own.jobs, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The C++ kernels of every instruction set, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ISA_VARIABLE = "EFFT_KERNELS_CPU_ISA"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


HERE_RUNS = {
    "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
    "avx512": torch.cpu._is_avx512_supported,
    "avx2": torch.cpu._is_avx2_supported,
    "baseline": lambda: True,
}


@pytest.mark.slow
@pytest.mark.parametrize("isa", HERE_RUNS)
def test_every_instruction_set(isa):
    """This folder again, with the kernels of each in a process of its own."""
    if not HERE_RUNS[isa]():
        pytest.skip(f"this processor has no {isa}")
    widest = next(name for name, runs in HERE_RUNS.items() if runs())
    if os.environ.get(ISA_VARIABLE, widest) == isa:
        pytest.skip("all other tests of this run are it")
    options = ("-q", "-p", "no:cacheprovider", "--capture=sys", "--benchmark-disable")
    chosen = "exact or every_size or strides or budget"
    done = python(
        "-m",
        "pytest",
        *options,
        "-m",
        "not slow",
        "-k",
        chosen,
        str(Path(__file__).parent),
        **{ISA_VARIABLE: isa},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


WRONG = ["avx1024", "", "AVX2"]
# One import for all; each has a process of its own, in which the kernels are chosen.
CALLS = f"""
import os, sys, torch
from efft_kernels import low_rank_linear
for isa in {WRONG}:
    if not os.fork():
        os.environ["{ISA_VARIABLE}"] = isa
        try:
            low_rank_linear(*(torch.ones(s) for s in ((2, 3), (4, 3), (4,), (3, 1))), None,
                            torch.ones(1, 4, 1))
        except RuntimeError as error:
            print(str(error).splitlines()[0])
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_an_unknown_instruction_set_is_an_error():
    done = python("-c", CALLS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{ISA_VARIABLE} must be avx512_bf16, avx512, avx2 or baseline "
        f"and run on this processor, got {isa}"
        for isa in WRONG
    ]

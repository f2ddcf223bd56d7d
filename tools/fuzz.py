"""Random calls of the operators against the specification, until the time is over.

    python -m tools.fuzz [--seconds 60] [--seed 7] [--isa avx2]
    python -m tools.fuzz --only 7042 --isa avx2      # one call again

Each call has a number, which draws all of it: sizes, form and dtypes of the operands, what lies
beside them in their storage, which gradients are asked for, autocast, backend, strategy, dropout,
and whether it goes through C++ or Python. A call that is wrong or raises is printed with the
command that makes it again; the others go on. Each instruction set of this processor gets its
share of the time, in a process of its own, since a process has one.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from efft_kernels import available_backends, low_rank_linear
from efft_kernels.ops.backends import cpp_backend, native_library, torch_backend
from efft_kernels.ops.dropout import low_rank_linear_with_dropout
from efft_kernels.testing.operands import LAYOUTS, NAMES, Shape, operands_and_dy

ISA_VARIABLE = "EFFT_KERNELS_CPU_ISA"
ISAS: dict[str, Callable[[], bool]] = {
    "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
    "avx512": torch.cpu._is_avx512_supported,
    "avx2": torch.cpu._is_avx2_supported,
    "baseline": lambda: True,
}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)
# A wrong row, stride or mask is off by a tenth at least; rounding in small calls by a few units.
TIMES_TORCH, UNITS, HALF_UNITS = 4.0, 64.0, 8.0


@dataclass
class Call:
    """One random call; its number draws the rest."""

    number: int

    def __post_init__(self) -> None:
        draw = self.draw = random.Random(self.number)
        core = draw.random() < 0.7
        sizes = (1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 67, 96, 130)
        self.lead = tuple(
            draw.choice((0, 1, 2, 3, 7, 16, 33, 65)) if draw.random() < 0.9 else 129
            for _ in range(draw.choice((0, 1, 1, 1, 2, 2, 3)))
        )
        while math.prod(self.lead) > 3000:
            self.lead = self.lead[1:]
        self.shape = Shape(
            K=draw.choice(sizes),
            n=draw.choice(sizes),
            G=draw.choice((1, 1, 2, 3, 4, 12)),
            Ra=draw.choice((1, 2, 4, 7, 8, 16, 17, 32, 40)),
            Rb=draw.choice((1, 3, 4, 8, 15, 16, 33)),
            core=core,
            shared=core and draw.random() < 0.6,
            bias=draw.random() < 0.6,
        )
        self.dtype = draw.choice(DTYPES)
        self.autocast = draw.choice(HALVES) if draw.random() < 0.25 else None
        if self.autocast is not None:
            self.frozen, self.factors = (draw.choice(DTYPES[1:]) for _ in range(2))
            self.dtype = draw.choice(DTYPES[1:])
        else:
            self.frozen = self.dtype
            wide = self.dtype in HALVES and draw.random() < 0.6
            self.factors = torch.float32 if wide else self.dtype
        # Whole numbers show a lost or doubled term at once, however small its part.
        self.density = draw.choice((None, None, 0.3))
        self.wanted = [name for name in NAMES if draw.random() < 0.6]
        self.dropout = draw.choice((0.1, 0.5)) if draw.random() < 0.15 else 0.0
        self.through_python = draw.random() < 0.4
        backends = {"auto": ("auto",), "torch": ("auto", *torch_backend.STRATEGIES)}
        computes_in = self.autocast if self.dtype != torch.float64 and self.autocast else self.dtype
        if computes_in != torch.float16 and available_backends()["cpp"] is None:
            backends["cpp"] = ("auto", *cpp_backend.STRATEGIES)
        self.backend = draw.choice(sorted(backends))
        self.strategy = draw.choice(backends[self.backend])

    def __str__(self) -> str:
        return (
            f"{self.shape} lead={self.lead} {self.dtype} frozen {self.frozen} factors"
            f" {self.factors} autocast={self.autocast} wanted={self.wanted} p={self.dropout}"
            f" {self.backend}:{self.strategy}{' through Python' * self.through_python}"
        )

    def tensors(self) -> tuple[dict[str, Tensor | None], Tensor]:
        """The operands, each in a random layout, and dY."""
        *drawn, dy = operands_and_dy(
            self.shape,
            self.dtype,
            lead=self.lead,
            frozen_dtype=self.frozen,
            factor_dtype=self.factors,
            seed=self.number,
            density=self.density,
        )
        assert dy is not None
        laid = {
            name: None if t is None else self._laid_out(t)
            for name, t in zip(NAMES, drawn, strict=True)
        }
        return laid, self._laid_out(dy.to(self.autocast or self.dtype))

    def _laid_out(self, t: Tensor) -> Tensor:
        if self.draw.random() < 0.5 or t.dim() == 0:
            return t
        if t.dim() == 1 or 0 in t.shape:
            return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]
        return LAYOUTS[self.draw.choice(sorted(LAYOUTS))](t)

    def run(
        self, tensors: dict[str, Tensor | None], dy: Tensor, backend: str, strategy: str = "auto"
    ) -> dict[str, Tensor]:
        """y and the wanted gradients, by name."""
        leaves = {
            name: None if t is None else t.detach().requires_grad_(name in self.wanted)
            for name, t in tensors.items()
        }
        torch.manual_seed(self.number)  # of dropout's mask
        call: Any = low_rank_linear
        options: dict[str, Any] = {"backend": backend, "strategy": strategy}
        if self.dropout:
            call = low_rank_linear_with_dropout
            options = {"backend": backend, "p": self.dropout}
        own = leaves["x"]
        assert own is not None
        narrow = self.autocast if own.dtype != torch.float64 else None
        with torch.autocast("cpu", narrow, enabled=narrow is not None):
            y = call(**leaves, **options)
        found = {"y": y.detach()}
        asked = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
        if asked:
            grads = torch.autograd.grad(y, list(asked.values()), dy.to(y.dtype))
            found |= dict(zip(asked, grads, strict=True))
        return found

    def wrong(self) -> str | None:
        """What is wrong with the call, None if nothing is."""
        tensors, dy = self.tensors()
        exact_of = {n: None if t is None else t.double() for n, t in tensors.items()}
        exact = self.run(exact_of, dy.double(), "reference")
        squares = {n: None if t is None else t.square() for n, t in exact_of.items()}
        squared = self.run(squares, dy.double().square(), "reference")
        plain = self.run(tensors, dy, "reference")
        with _through_python(self.through_python):
            found = self.run(tensors, dy, self.backend, self.strategy)
        for name, value in found.items():
            kind = (value.shape, value.dtype)
            if kind != (plain[name].shape, plain[name].dtype):
                return f"{name} is {kind}, not {(plain[name].shape, plain[name].dtype)}"
            if not value.numel():
                continue
            # Half precision rounds on the way, whatever a gradient is stored in.
            narrow = min((value.dtype, dy.dtype), key=lambda dtype: torch.finfo(dtype).bits)
            least = (HALF_UNITS if narrow in HALVES else UNITS) * torch.finfo(narrow).eps
            # Terms of random sign sum to the root of their squares: what happens to cancel is no
            # measure of rounding.
            scale = max(float(exact[name].norm()), float(squared[name].sum().sqrt()))
            own, torchs = (
                float((t.double() - exact[name]).norm()) / max(scale, sys.float_info.min)
                for t in (value, plain[name])
            )
            if not own <= max(TIMES_TORCH * torchs, least):
                return f"{name} is off by {own:.2e}, plain torch by {torchs:.2e}"
        return None


@contextlib.contextmanager
def _through_python(on: bool) -> Iterator[None]:
    with (
        mock.patch.object(native_library, "autograd_module", lambda: None)
        if on
        else contextlib.nullcontext()
    ):
        yield


def fuzz(first: int, seconds: float, only: bool) -> int:
    """Run calls from number `first` on.

    Returns:
        How many were wrong.
    """
    stop, number, bad, seen = time.monotonic() + seconds, first, 0, Counter[str]()
    while True:
        call = Call(number)
        try:
            why = call.wrong()
        except Exception as error:  # whatever a call raises is a finding
            why = f"{type(error).__name__}: {error}"
        seen[call.backend] += 1
        if why is not None:
            bad += 1
            isa = os.environ.get(ISA_VARIABLE)
            again = f"python -m tools.fuzz --only {number}" + (f" --isa {isa}" if isa else "")
            print(f"{why}\n  {call}\n  {again}", flush=True)
        number += 1
        if only or time.monotonic() > stop:
            break
    calls = ", ".join(f"{count} {name}" for name, count in sorted(seen.items()))
    print(f"{os.environ.get(ISA_VARIABLE, 'best')}: {bad} wrong of {calls} from --seed {first}")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description="Random calls against the specification.")
    parser.add_argument("--seconds", type=float, default=60, help="for all instruction sets")
    parser.add_argument("--seed", type=int, help="number of the first call; default: of the clock")
    parser.add_argument("--only", type=int, help="one call, by its number")
    parser.add_argument("--isa", choices=ISAS, help="one instruction set; default: all of them")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time()) * 1000
    first = seed if options.only is None else options.only
    if options.isa is None:
        here = [isa for isa, runs in ISAS.items() if runs()]
        own = [] if options.only is None else ["--only", str(options.only)]
        command = [sys.executable, "-m", "tools.fuzz", "--seed", str(first), *own]
        command += ["--seconds", str(options.seconds / len(here))]
        done = [subprocess.run([*command, "--isa", isa]).returncode for isa in here]
        sys.exit(max(done))
    if os.environ.get(ISA_VARIABLE) != options.isa:
        os.environ[ISA_VARIABLE] = options.isa  # read when the library is loaded
    torch.set_num_threads(1)
    sys.exit(bool(fuzz(first, options.seconds, options.only is not None)))


if __name__ == "__main__":
    main()

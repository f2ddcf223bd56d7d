"""Where a step's time goes: the kernels of a GPU, or torch's operators on a CPU."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from .rows import Row

LEAST_SHARE = 0.003  # of a step, for a kernel to be listed
ALL_KERNELS = "all"

Step = Callable[[], Tensor]
Totals = dict[str, tuple[int, float]]  # name → (calls, µs), the longest first


def profile_step(step: Step, device: str) -> Totals:
    """The kernels of one eager step; on a CPU torch's operators in their place."""
    kinds = torch.profiler.ProfilerActivity
    step()
    with torch.profiler.profile(
        activities=[kinds.CUDA if device == "cuda" else kinds.CPU], acc_events=True
    ) as run:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return kernel_totals(run.events() or (), device)


def kernel_totals(events: Iterable[Any], device: str) -> Totals:
    """What ran on the device."""
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in events:
        if event.device_type != wanted or event.is_user_annotation:
            continue
        us = event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
        name = short_kernel(event.name)
        calls, total = found[name]
        found[name] = (calls + 1, total + us)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def short_kernel(name: str) -> str:
    """A kernel's name without its return type, arguments and namespaces, at most 120 characters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\b(?:\w+::)+(?=\w)", "", name)
    name = re.sub(r"\([\w ]+\)(?=-?\d)", "", name)  # template arguments such as (int)192
    return re.sub(r"\(.*", "", name)[:120] or name[:120]


def kernel_rows(totals: Totals) -> Iterator[Row]:
    """All kernels in one row, then each with at least `LEAST_SHARE` of their time."""
    calls = sum(count for count, _ in totals.values())
    total = sum(us for _, us in totals.values())
    for name, (count, us) in ((ALL_KERNELS, (calls, total)), *totals.items()):
        share = us / total if total else 0.0
        if name == ALL_KERNELS or share >= LEAST_SHARE:
            yield {"kernel": name, "calls": count, "us": f"{us:.1f}", "share": f"{share:.4f}"}


def median_totals(runs: Sequence[Totals]) -> Totals:
    """Of each name the median over some runs; a run without it counts as none of its time."""
    found = {}
    for name in {name for run in runs for name in run}:
        calls, us = zip(*(run.get(name, (0, 0.0)) for run in runs), strict=True)
        found[name] = round(statistics.median(calls)), statistics.median(us)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def profile_in_turn(steps: Mapping[str, Step], device: str, rounds: int) -> dict[str, Totals]:
    """By name the totals of each step, medians over `rounds` in which they follow each other."""
    runs = [
        {name: profile_step(step, device) for name, step in steps.items()} for _ in range(rounds)
    ]
    return {name: median_totals([run[name] for run in runs]) for name in steps}

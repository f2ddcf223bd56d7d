"""Timing: single calls, and candidates in interleaved rounds.

In each round every candidate runs once, so whatever else the machine is doing falls on all of them,
and the ratio of two of them is taken within a round before the median over the rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


def captured(call: Callable[[], object], warm_ups: int = 3) -> Callable[[], object]:
    """A replay of `call` captured in a CUDA graph, after warm-ups on a side stream.

    The graph's memory is its own, and is given back with the replay. What `call` reads and writes
    beside it (parameters, an optimizer's state) lives as long as the replay, since it holds `call`.
    """
    stream = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            call()
    stream.wait_stream(side)
    gc.collect()  # an autograd graph in a cycle would tie the capture to the stream it ran on
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch.cuda.graph leaves its own where a capture fails
        raise

    def replay(captured_call: Callable[[], object] = call) -> None:
        graph.replay()

    return replay


class Timer:
    """Milliseconds of one call, on a GPU by events around a cold-cache replay, on a CPU by the
    clock.
    """

    def __init__(self, device: str, eager: bool):
        self.cuda = device == "cuda"
        self.eager = eager
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda") if self.cuda else None

    def prepare(self, call: Callable[[], object]) -> Callable[[], object]:
        """Warm up; on a GPU capture the call in a graph."""
        if not self.cuda or self.eager:
            for _ in range(3):
                call()
            return call
        replay = captured(call)
        replay()
        return replay

    def time(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        assert self.flush is not None
        self.flush.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event)


def peak_mem_mb(call: Callable[[], object], cuda: bool) -> float:
    """MiB that the call itself needs at its highest: of device memory, or of the process's resident
    memory (Linux; nan elsewhere)."""
    if not cuda:
        return _peak_resident_mb(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def give_back_what_is_freed() -> None:
    """From here on this process maps every block of 128 KiB or more for itself and unmaps it when
    it is freed (glibc; a step is slower for it).

    By default glibc raises that limit to the largest block ever freed, up to 32 MiB, and what a
    step frees stays resident in the gaps of its heap: by chance 50 to 100 MiB more or less.
    """
    of_mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(of_mmap_threshold, 128 * 1024)


def _peak_resident_mb(call: Callable[[], object]) -> float:
    """The same on a CPU, from a heap that has given back what it does not hold."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return math.nan
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # the peak starts anew
    before = _resident_mb("VmRSS")
    call()
    return _resident_mb("VmHWM") - before


def _resident_mb(name: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if name in line)
    return int(line.split()[1]) / 1024


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

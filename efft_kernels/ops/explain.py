"""What `auto` picks for a problem and why: the cost model's answer with every candidate's time.

benchmarks/predictions.py prints it for the layers of ViT and Swin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cost_model
from .backends import REGISTRY
from .cost_model import DEVICES, Device, Problem


@dataclass(frozen=True)
class Explanation:
    """What `auto` picks for a problem and why."""

    problem: Problem
    device: Device
    backend: str
    chosen: str
    source: str  # "measured" or "predicted"
    times_us: dict[str, float]
    excluded: dict[str, str]
    floor_us: float  # the frozen layer alone: its matrix product at the library's rate

    def __str__(self) -> str:
        p = self.problem
        part = "backward" if p.backward else "forward"
        lines = [
            f"{part} of [{p.M}, {p.K}] x [{p.K} -> {p.N}], G={p.G}, rank {p.rank}, "
            f"{8 * p.compute_bytes}-bit compute, weight stored in {8 * p.weight_bytes} bits",
            f"backend {self.backend} on {self.device.name} ({self.device.source}): {self.chosen}, "
            f"the least {self.source} time",
        ]
        for strategy, us in sorted(self.times_us.items(), key=lambda item: item[1]):
            lines.append(
                f"  {strategy:<7} {us:9.1f} us  {us / self.floor_us:5.2f} x the frozen layer"
            )
        lines.extend(f"  {strategy:<7} ruled out: {why}" for strategy, why in self.excluded.items())
        return "\n".join(lines)


def explain(
    M: int,
    K: int,
    N: int,
    G: int = 1,
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    *,
    backend: str | None = None,
    weight_dtype: torch.dtype | None = None,
    training: bool = True,
    backward: bool = False,
) -> Explanation:
    """Which strategy `auto` would take for this problem, with every candidate's time.

    Args:
        M, K, N, G, rank: rows, in_features, out_features, slices, Ra.
        dtype: of x and y.
        device: a name of `DEVICES` ("H200", "CPU", ...); this machine's by default.
        backend: a name of `REGISTRY`; by default what `auto` takes: of the backends that run on
            this machine, or on the named device those that would if they were built.
        weight_dtype: of the weight as stored; `dtype` by default.
        training: whether the forward saves P.
        backward: the backward operator instead of the forward.

    Raises:
        ValueError: no such device or backend.
    """
    named = device is not None
    if device is None:
        peaks = cost_model.device_of("cuda")  # the CPU where there is no GPU
    elif device in DEVICES:
        peaks = DEVICES[device]
    else:
        raise ValueError(f"device must be one of {tuple(DEVICES)}, got {device!r}")
    device_type = "cpu" if peaks.name == "CPU" else "cuda"
    if backend is not None and backend not in REGISTRY:
        raise ValueError(f"backend must be one of {tuple(REGISTRY)}, got {backend!r}")
    problem = Problem(
        M,
        K,
        N,
        G,
        rank,
        training=training or backward,
        weight_bytes=(weight_dtype or dtype).itemsize,
        compute_bytes=dtype.itemsize,
        device_type=device_type,
        backward=backward,
    )
    backend = backend or next(
        name for name in reversed(REGISTRY) if _is_taken(name, problem, dtype, built=named)
    )
    predicted, excluded = cost_model.candidates(problem, REGISTRY[backend].load(), peaks)
    here = peaks == cost_model.device_of(device_type)
    measured = cost_model.measured_ms(problem, predicted, backend) if here else {}
    times = {name: 1e3 * ms for name, ms in measured.items()} or {
        name: 1e6 * seconds for name, seconds in predicted.items()
    }
    return Explanation(
        problem=problem,
        device=peaks,
        backend=backend,
        chosen=min(times, key=lambda name: times[name]),
        source="measured" if measured else "predicted",
        times_us=times,
        excluded=excluded,
        floor_us=1e6 * cost_model.floor_seconds(problem, peaks),
    )


def _is_taken(name: str, problem: Problem, dtype: torch.dtype, *, built: bool) -> bool:
    """Whether `auto` takes the backend rather than one before it in `REGISTRY`."""
    devices = REGISTRY[name].devices
    if devices is not None and problem.device_type not in devices:
        return False
    module = REGISTRY[name].load()
    runs = dtype in module.DTYPES and module.preferred(problem)
    return runs and (built or module.unavailable() is None)

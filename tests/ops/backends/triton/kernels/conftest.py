"""The Triton kernels against float64: the same cases in the interpreter and on a GPU.

On a CUDA device they run there, bfloat16 included. With TRITON_INTERPRET=1 they run on the CPU in
float32 and float16, as ../test_interpreter.py runs every file here. Elsewhere there is nothing to
collect. Every buffer that the launchers allocate starts as NaN, so a tile that nothing writes
cannot pass, and in the interpreter no kernel touches what lies beyond its tensors.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efft_kernels.ops import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = (
    [] if find_spec("triton") and (INTERPRETED or torch.cuda.is_available()) else ["test_*.py"]
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "every_other(first): the interpreter takes every second of its combinations"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    if not INTERPRETED:
        for item in own:
            item.add_marker(pytest.mark.gpu)
        return
    left_out = set(_left_out(own))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _left_out(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Of tests marked every_other: any two parameters' values still meet, any three need not."""
    seen: dict[object, dict[str, int]] = defaultdict(dict)  # a parameter's values, numbered
    for item in items:
        if mark := item.get_closest_marker("every_other"):
            turn = mark.args[0]
            for name, value in item.callspec.params.items():
                values = seen[item.function, name]
                turn += values.setdefault(repr(value), len(values))
            if turn % 2:
                yield item


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Every uninitialised floating buffer is NaN."""


@pytest.fixture(autouse=True, scope="session")
def _language_patched_once() -> Iterator[None]:
    """The interpreter looks through all of tl for what to replace whenever a kernel calls another
    function, a fifth of its time; once a launch is enough."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    in_force: set[frozenset[str]] = set()  # the names under which a function sees tl

    def replace_once(fn: Any) -> Any:
        names = frozenset(name for name in ("tl", "core") if name in fn.__globals__)
        scope = interpreter._LangPatchScope() if names in in_force else replace(fn)
        put_back = scope.restore
        outermost = not in_force
        in_force.add(names)

        def restore() -> None:
            if outermost:
                in_force.clear()
            put_back()

        scope.restore = restore
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _within_the_tensors() -> Iterator[None]:
    """In the interpreter whatever a kernel reads or writes lies in one of the launch's tensors: a
    mask that is one too wide need not change a result."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    take = executor._init_args_hst
    tensors: list[
        tuple[int, int]
    ] = []  # of the launch: the first address, and that behind the last

    def take_and_note(self: Any, *given: Any) -> Any:
        found = take(self, *given)
        tensors[:] = [_addresses(t) for t in found[0] if torch.is_tensor(t) and t.numel()]
        return found

    def check(ptrs: Any, mask: Any) -> None:
        chosen = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        addresses = ptrs.data[chosen]
        if addresses.size:
            first, last = addresses.min(), addresses.max()
            behind = last + ptrs.get_element_ty().primitive_bitwidth // 8
            if not any(start <= first and behind <= end for start, end in tensors):
                raise IndexError("a kernel reads or writes beyond its tensors")

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest, **named)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", take_and_note)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


def _addresses(tensor: torch.Tensor) -> tuple[int, int]:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


@pytest.fixture(params=dispatch.STRATEGIES)
def strategy(request) -> str:
    return request.param


@pytest.fixture(
    params=[torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str
)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@dataclass(frozen=True)
class Recorded:
    """One launch: its kernel, the bytes of its tensor operands, each once, and its grid."""

    name: str
    bytes_moved: int
    grid: tuple[int, int, int]


@pytest.fixture
def recorded(monkeypatch, request) -> list[Recorded]:
    """The launches made; with the parameter False they are only noted."""
    from efft_kernels.ops.backends.triton import launch_cache

    launches: list[Recorded] = []
    start = launch_cache.CachedLaunch.__call__

    def record(launch, tensors, fresh=(), descriptors=()):
        found = {t.data_ptr(): t for t in (*tensors, *fresh) if t is not None}
        bytes_moved = sum(t.numel() * t.element_size() for t in found.values())
        name = launch.kernel.__name__.removeprefix("_low_rank").strip("_").removesuffix("_kernel")
        grad = name == "thin" and tensors[4] is not None
        launches.append(Recorded(f"{name}_grad" if grad else name, bytes_moved, launch.grid))
        if getattr(request, "param", True):
            start(launch, tensors, fresh, descriptors)

    monkeypatch.setattr(launch_cache.CachedLaunch, "__call__", record)
    return launches

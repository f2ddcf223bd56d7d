"""The compiled libraries in the package: loaded once, or why not; and the call of their backward.

    _native.so         C++ operators for the CPU     torch.ops.load_library
    _native_cuda.so    CUDA operators                torch.ops.load_library, when first needed
    _autograd.*.so     the C++ autograd node         a Python module for one version of torch
    _build_info.*.so   what they were built with     a Python module

The first two are on torch's stable ABI: they serve every torch from `target_version` on. The build
(csrc/build/native_build.py) leaves its reasons for what it left out in _build_report.json.

EFFT_KERNELS_NATIVE_LIBRARY names another _native.so to load in place of the installed one, e.g. one
with sanitizers (csrc/build/asan.sh).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import sysconfig
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..schemas import STRATEGY_CODES, needs_code
from .fallback import MINIMUM_CAPABILITY
from .torch_backend import Grads, frozen_grads

NATIVE_LIBRARY_VARIABLE = "EFFT_KERNELS_NATIVE_LIBRARY"
LIBRARIES = ("_native", "_native_cuda", "_autograd", "_build_info")

_PACKAGE = Path(__file__).resolve().parents[2]
_CUDA_IS_WANTED = "EFFT_KERNELS_BUILD_CUDA=1 "


def library_path(name: str) -> Path:
    """Where the library is, if it was built: `name` is one of LIBRARIES."""
    if name == "_native" and os.environ.get(NATIVE_LIBRARY_VARIABLE):
        return Path(os.environ[NATIVE_LIBRARY_VARIABLE])
    suffix = ".so" if name.startswith("_native") else sysconfig.get_config_var("EXT_SUFFIX")
    return _PACKAGE / f"{name}{suffix}"


def not_built(name: str) -> str | None:
    """Why the library is not there and the command that builds it, or None where it is there."""
    path = library_path(name)
    if path.exists():
        return None
    if name == "_native" and os.environ.get(NATIVE_LIBRARY_VARIABLE):
        return f"{NATIVE_LIBRARY_VARIABLE}={path}: there is no such file"
    reason = _reasons_of_the_build().get(name)
    settings = _CUDA_IS_WANTED if name == "_native_cuda" else ""
    because = f": {reason}" if reason else ""
    return f"{path.name} was not built{because}. To build it{_how_to_build(settings)}"


def _how_to_build(settings: str = "") -> str:
    """The end of a sentence: where, and the command. `settings` come before it."""
    if (_PACKAGE.parent / "csrc").is_dir():
        return f", in {_PACKAGE.parent}: {settings}pip install --no-build-isolation -e ."
    return (
        f": {settings}pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall"
        " SOURCES, where SOURCES is a clone of efft-kernels or its .tar.gz"
    )


def warn_of_a_build_without_compiler() -> None:
    """Warn where a build left the C++ library out: pip shows nothing of a build that succeeds."""
    reason = not_built("_native")
    if sys.platform == "linux" and reason is not None and "_native" in _reasons_of_the_build():
        warnings.warn(f"CPU calls run in plain torch: {reason}", RuntimeWarning, stacklevel=2)


def _reasons_of_the_build() -> dict[str, str | None]:
    """What the build left out -> why. Empty where no build has been made."""
    try:
        report = json.loads((_PACKAGE / "_build_report.json").read_text())
    except FileNotFoundError:
        return {}
    return {name: library["missing"] for name, library in report["libraries"].items()}


@cache
def load_cpu() -> str | None:
    """Load _native.so. None once its operators are registered, else why they are not."""
    return _load("_native")


@cache
def load_cuda() -> str | None:
    """Load _native_cuda.so, and before it _native.so, which defines the operators. None once they
    are registered, else why they are not. Needs neither a GPU nor a driver.
    """
    return not_built("_native_cuda") or load_cpu() or _load("_native_cuda")


def _load(name: str) -> str | None:
    missing = not_built(name)
    if missing is not None:
        return missing
    try:
        torch.ops.load_library(library_path(name))
    except OSError as error:
        return f"{library_path(name)} was built, but loading it failed: {error}"
    return None


@cache
def cuda_unavailable() -> str | None:
    """None where the CUDA operators run, else why not: they are not built, cannot be loaded, or no
    GPU here can run them.
    """
    missing = not_built("_native_cuda")
    if missing is not None:
        return missing
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    reasons = [device_rejected(index) for index in range(torch.cuda.device_count())]
    if all(reason is not None for reason in reasons):
        return "; ".join(reason for reason in reasons if reason is not None)
    return load_cuda()


@cache
def device_rejected(index: int) -> str | None:
    """Why the CUDA operators do not run on this device; None where they do."""
    name = torch.cuda.get_device_name(index)
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        return (
            f"cuda:{index} ({name}) has compute capability {capability[0]}.{capability[1]}, and the"
            " CUDA operators need 8.0 or newer"
        )
    archs = (build_info() or {}).get("cuda_archs", [])
    if archs and not any(_runs_on(arch, capability) for arch in archs):
        return (
            f"cuda:{index} ({name}) has compute capability {capability[0]}.{capability[1]}, and the"
            f" CUDA operators were built for {', '.join(archs)}. To build them for it"
            + _how_to_build(
                f"EFFT_KERNELS_CUDA_ARCHS={capability[0]}.{capability[1]} {_CUDA_IS_WANTED}"
            )
        )
    return None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch`, e.g. "9.0a", runs on such a GPU: portable code on all that came
    later (by its PTX), "a" code on its own architecture alone, "f" code on its family.
    """
    major, minor = (int(number) for number in arch.rstrip("af").split("."))
    if arch.endswith("a"):
        return capability == (major, minor)
    if arch.endswith("f"):
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)


def autograd_module() -> ModuleType | None:
    """The C++ autograd node's module, or None; `autograd_unavailable` says why."""
    return _autograd()[0]


def autograd_unavailable() -> str | None:
    """None where the C++ autograd node is there, else why not."""
    return _autograd()[1]


@cache
def _autograd() -> tuple[ModuleType | None, str | None]:
    missing = not_built("_autograd")
    if missing is not None:
        return None, missing
    # It uses torch's whole C++ interface, which differs between minor versions without a word.
    built_for = (build_info() or {}).get("torch_version")
    if built_for is not None and _minor(built_for) != _minor(torch.__version__):
        return None, (
            f"{library_path('_autograd')} was built for torch {built_for}, this is torch"
            f" {torch.__version__}. To build it again{_how_to_build()}"
        )
    try:
        return importlib.import_module("efft_kernels._autograd"), None
    except ImportError as error:
        path = library_path("_autograd")
        return None, f"{path} was built, but importing it failed: {error}"


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


@cache
def build_info() -> dict[str, Any] | None:
    """What the libraries were built with, or None where nothing was built: compiler, cxx_flags,
    torch_version, target_version (oldest torch that _native*.so load in), cuda_version (nvcc's),
    cuda_archs, cutlass_version, nvcc_flags.
    """
    try:
        module = importlib.import_module("efft_kernels._build_info")
    except ImportError:
        return None
    return dict(module.FACTS)


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]
    weight: Tensor,  # [N, K]
    p: Tensor | None,  # [M, Ra]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    needs: tuple[bool, ...],
    strategy: str,
) -> Grads:
    """The gradients by the native operator, as both native backends call it.

    Returns:
        (dx, d_weight, d_bias, d_down, d_core, d_up); None where `needs` is False.
    """
    need_x, need_weight, need_bias, need_down, need_core, need_up = needs
    need_core = need_core and core is not None
    d_weight, d_bias = frozen_grads(dy, x, weight, need_weight, need_bias)
    if not (need_x or need_down or need_core or need_up):
        return None, d_weight, d_bias, None, None, None
    dx, d_down, d_core, d_up = torch.ops.efft_kernels.native_bwd(
        dy,
        x if need_down else None,
        weight,
        p if need_core or need_up else None,
        down,
        core,
        up,
        needs_code(needs),  # of which it makes those of x and the factors
        STRATEGY_CODES[strategy],
    )
    return (
        dx if need_x else None,
        d_weight,
        d_bias,
        d_down if need_down else None,
        d_core if need_core else None,
        d_up if need_up else None,
    )


warn_of_a_build_without_compiler()

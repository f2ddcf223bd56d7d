"""What this machine offers: versions, native libraries, devices, and which backends really run."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from . import __version__, available_backends, low_rank_linear, reference
from .ops.backends import REGISTRY, native_library
from .testing.operands import FACTORS, Shape, leaves
from .testing.operands import operands as draw_operands

LIBRARIES = ("torch", "torchvision", "triton", "timm", "torchmetrics", "safetensors", "numpy")
TRIAL = Shape(M=7, K=48, n=32, G=2, Ra=16, Rb=16)


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        versions: name → version, None where absent.
        devices: a line of text each.
        backends: name → None where it runs here, else the reason why not.
        libraries: native library → None where it loads here, else the reason why not.
        build: what the native libraries were built with (`native_library.build_info`), None
            without them.
    """

    versions: dict[str, str | None]
    devices: list[str]
    backends: dict[str, str | None]
    libraries: dict[str, str | None]
    build: dict[str, Any] | None

    @property
    def healthy(self) -> bool:
        """Whether at least the torch backend runs."""
        return self.backends.get("torch", "unknown") is None

    def to_json(self) -> dict[str, Any]:
        """The diagnosis in JSON's own types."""
        return {
            "versions": self.versions,
            "devices": self.devices,
            "backends": _with_reasons(self.backends),
            "libraries": _with_reasons(self.libraries),
            "build": self.build,
            "healthy": self.healthy,
        }


def _with_reasons(reasons: dict[str, str | None]) -> dict[str, dict[str, Any]]:
    return {name: {"usable": reason is None, "reason": reason} for name, reason in reasons.items()}


def diagnose() -> Diagnosis:
    """Look at the machine and run every available backend once on a small problem."""
    backends = {
        name: _trial(name) if reason is None else reason
        for name, reason in available_backends().items()
    }
    libraries, build = _libraries(), native_library.build_info()
    versions = {**_versions(), **_build_rows(libraries, build)}
    return Diagnosis(versions, _devices(), backends, libraries, build)


def _libraries() -> dict[str, str | None]:
    return {
        "_native": native_library.load_cpu(),
        "_native_cuda": native_library.load_cuda(),
        "_autograd": native_library.autograd_unavailable(),
        "_build_info": native_library.not_built("_build_info"),
    }


def _build_rows(
    libraries: dict[str, str | None], build: dict[str, Any] | None
) -> dict[str, str | None]:
    """The native libraries as rows among the versions."""
    rows: dict[str, str | None] = {
        name: "loads" if reason is None else reason for name, reason in libraries.items()
    }
    if build is not None:
        rows["built with"] = f"{build['compiler']}, torch {build['torch_version']}"
        rows["runs with"] = f"torch {build['target_version']} and newer (_native*.so)"
        if build["cuda_archs"]:
            rows["built with nvcc"] = f"{build['cuda_version']}, CUTLASS {build['cutlass_version']}"
            rows["built for GPUs"] = ", ".join(build["cuda_archs"])
    return rows


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "efft-kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    versions["CUDA (torch's)"] = torch.version.cuda
    versions["NVIDIA driver"] = _driver_version()
    return versions


def _driver_version() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split("\n")
    return lines[0].strip() or None


def _devices() -> list[str]:
    devices = [
        f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()},"
        f" {torch.get_num_threads()} threads"
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor},"
            f" {properties.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _trial(backend: str) -> str | None:
    """None if the backend computes a small forward and backward as the reference does."""
    try:
        device, dtype = _place_of(backend)
        operands: Any = leaves(draw_operands(TRIAL, dtype, device=device), FACTORS)
        wide: Any = {name: None if t is None else t.float() for name, t in operands.items()}
        expected = reference.low_rank_linear(**wide).detach()
        y = low_rank_linear(*operands.values(), backend=backend)
        y.sum().backward()
    except Exception as error:  # whatever a compiler, a driver or a loader raises is the finding
        lines = str(error).strip().splitlines()
        return f"a trial run failed: {type(error).__name__}: {lines[0] if lines else ''}"
    # Relative to the largest output, wide enough for bfloat16 and for TF32 tensor cores.
    deviation = ((y.detach() - expected).abs().max() / expected.abs().max()).item()
    if not deviation < 1e-2:
        return f"a trial run was wrong: it deviates from the reference by {deviation:.1e}"
    return None


def _place_of(backend: str) -> tuple[str, torch.dtype]:
    """The device and the dtype of the backend's trial: its own, a GPU and float32 if it has the
    choice.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if backend not in REGISTRY:  # the reference takes everything
        return here, torch.float32
    devices = REGISTRY[backend].devices
    device = "cpu" if devices is not None and here not in devices else here
    dtypes = sorted(REGISTRY[backend].load().DTYPES, key=lambda dtype: dtype != torch.float32)
    return device, dtypes[0]

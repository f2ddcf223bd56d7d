"""Calls that together take every kernel of the CUDA backend, and every path of the Triton one.

Which GEMM a call gets depends on the number of multiprocessors (csrc/cuda/gemm/select.h); what is
written down here is for the 132 of an H100 or H200. The other launches follow from
csrc/cuda/ops.cpp.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.backends.cuda_cost import ONE_PASS_RANK
from ..ops.backends.fallback import padded_rank
from .cuda_kernels import DTYPES
from .operands import NAMES, Shape, operands_and_dy

MULTIPROCESSORS = 132  # of the GPU for which the plans are written down, an sm_90
NEEDS = tuple(name in ("x", "down", "core", "up") for name in NAMES)  # weight and bias are frozen


@dataclass(frozen=True)
class Case:
    """One forward and one backward.

    Attributes:
        label: what is special about it.
        shape: sizes and form.
        dtype: of x.
        strategy: one of the backend's.
        backend: "cuda" or "triton".
        gemms: of the CUDA backend, the forward's GEMM and dX's: architecture and tile.
        bias: the bias's dtype where it is not x's.
        wide: weight and factors are float32.
        view: "K tail": x and weight are views of rows of a multiple of 16 bytes that K does not
            fill; "N tail": so is dy; "bias": the bias starts one element into its storage. What is
            beside a view is NaN.
        density: the share of operands' entries that are not zero, small whole numbers; None for
            normal ones.
    """

    label: str
    shape: Shape
    dtype: torch.dtype
    strategy: str
    backend: str = "cuda"
    gemms: tuple[str, str] = ("", "")
    bias: torch.dtype | None = None
    wide: bool = False
    view: str = ""
    density: float | None = 0.1

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.backend} {self.label} {self.strategy} {str(self.dtype).split('.')[1]}"

    def __str__(self) -> str:
        return self.name

    @property
    def plan(self) -> list[str]:
        """The CUDA kernels that it takes, in their order; empty for Triton's."""
        if self.backend != "cuda":
            return []
        s, R, dtype = self.shape, padded_rank(self.shape.Ra), DTYPES[self.dtype]
        fold = "fold-f32" if self.wide else f"fold-{dtype}"
        merge = "merge-f32" if self.wide else f"merge-{dtype}"
        unfold = fold.replace("fold", "unfold")

        def named(kernel: str, *columns: int) -> str:
            return f"{kernel}-odd" if any(c % 8 for c in columns) else kernel

        p_pass = named(f"thin-{dtype}-{R}", s.K)
        s_pass = named(f"thin_grad-{dtype}" if R == ONE_PASS_RANK else f"thin-{dtype}-{R}", s.N)
        d_down = named(f"tall_grad-{dtype}-{R}", s.K, s.Ra)
        d_b = named(f"tall_grad-{dtype}-{R}", s.N, s.Ra)
        after = [d_down, "reduce"] if R == ONE_PASS_RANK else [d_down, d_b, "reduce"]
        after += [unfold] if s.core else []
        if self.strategy == "merged":
            merged = [fold, merge]
            return [fold, p_pass, *merged, fold, s_pass, *after, *merged]

        cast = ["merge-f32"] if self.wide else []
        plan = []
        for gemm, layout in zip(self.gemms, "IC", strict=True):
            kind, block = gemm.split("-")
            p_in_gemm = self.strategy == "fused" and kind == "sm90" and R == 16
            p_cols = [] if kind == "sm80" else ["16" if p_in_gemm else "0"]
            main = "-".join([kind, dtype, block, *p_cols, layout])
            plan += [*cast, fold]
            if layout == "I":
                plan += [main] if p_in_gemm else [p_pass, main]
            elif p_in_gemm:
                plan += [main, d_down, d_b, *after[1:]]
            else:
                plan += [s_pass, *after, main]
        return plan

    def operands(self, device: str) -> tuple[Tensor | None, ...]:
        """(x, weight, bias, down, core, up, dy), the same for the same device."""
        wide = torch.float32 if self.wide else self.dtype
        density = self.density
        if density is None:
            return operands_and_dy(self.shape, self.dtype, device=device)
        # Drawn on the device: the host would take longer than all kernels.
        generator = torch.Generator(device).manual_seed(0)

        def draw(name: str, size: tuple[int, ...] | None) -> Tensor | None:
            if size is None:
                return None
            value = torch.rand(size, generator=generator, device=device)
            sign = torch.rand(size, generator=generator, device=device) - 0.5
            value = sign.sign() * (value < density)
            dtype = self.dtype if name in ("x", "dy") else wide
            if name == "bias" and self.bias is not None:
                dtype = self.bias
            return self._as_viewed(name, value.to(dtype))

        return tuple(draw(name, size) for name, size in self.shape.sizes().items())

    def _as_viewed(self, name: str, t: Tensor) -> Tensor:
        viewed = {"K tail": ("x", "weight"), "N tail": ("dy",), "bias": ("bias",)}
        if name not in viewed.get(self.view, ()):
            return t
        before, after = (1, 0) if name == "bias" else (0, -t.shape[-1] % 8)
        return torch.nn.functional.pad(t, (before, after), value=torch.nan)[
            ..., before : before + t.shape[-1]
        ]


@dataclass(frozen=True)
class NormCase:
    """A chain's norm, its gradient and proj's by the CUDA kernels (ops/backends/cuda_chain.py).

    Attributes:
        M, K, rank: rows and columns of the stream, and columns of P and S.
        dtype: of the GEMMs.
        branch: whether something is added to the stream.
        before: whether the norm's gradient makes S and d_B of a linear before it.
    """

    M: int
    K: int
    rank: int
    dtype: torch.dtype
    branch: bool = True
    before: bool = False

    def __str__(self) -> str:
        branch = "" if self.branch else " first"
        branch += ", S before" if self.before else ""
        return f"norm{branch} {self.M}x{self.K} r{self.rank} {str(self.dtype).split('.')[1]}"

    @property
    def plan(self) -> list[str]:
        """The CUDA kernels of a forward and a backward."""
        threads = 384 if self.K <= 768 else 512 if self.K <= 1024 else 640
        of = f"{DTYPES[self.dtype]}-{threads}"
        pair = [f"pair_grad-{of}"] if self.K <= 1024 else []  # else Triton's
        return [f"norm-{of}", f"norm_grad-{of}{'-before' if self.before else ''}", *pair]


@dataclass(frozen=True)
class GeluCase:
    """GELU and its gradient in a chain by the CUDA kernels (ops/backends/cuda_chain.py).

    Attributes:
        M, C: rows and columns of h.
        before, after: columns of P of the linear before and of S of the one after.
        dtype: of everything.
    """

    M: int
    C: int
    before: int
    after: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"gelu {self.M}x{self.C} r{self.before} r{self.after} {str(self.dtype)[6:]}"

    @property
    def plan(self) -> list[str]:
        """The CUDA kernels of a forward and a backward."""
        stages = 3 if self.C <= 3392 else 2
        value = [f"gelu-{DTYPES[self.dtype]}-{stages}"] if self.C <= 4096 else []  # else Triton's
        return [*value, f"gelu_grad-{DTYPES[self.dtype]}"]


_HALVES = (torch.bfloat16, torch.float16)
_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32

# On 132 multiprocessors: one wave of 192 columns, and one or two of 128.
_WIDE_TILES = Shape(M=33 * 128 - 5, K=760, n=760, G=1, Ra=16, Rb=16)
_NARROW_TILES = Shape(M=12 * 128 + 37, K=824, n=776, G=3, Ra=16, Rb=8)
_UNALIGNED = Shape(M=2100, K=1543, n=521, G=3, Ra=16, Rb=8)
_VIT_B = {
    "qkv": Shape(M=12608, K=768, n=768, G=3, Ra=16, Rb=16),
    "proj": Shape(M=12608, K=768, n=768, G=1, Ra=16, Rb=16),
    "fc1": Shape(M=12608, K=768, n=768, G=4, Ra=16, Rb=16),
    "fc2": Shape(M=12608, K=3072, n=768, G=1, Ra=16, Rb=16),
}
_N64, _N128 = ("sm80-64", "sm80-64"), ("sm80-128", "sm80-128")
_H128, _H192 = ("sm90-128", "sm90-128"), ("sm90-192", "sm90-192")


def _cuda_cases() -> list[Case]:
    cases = []
    for dtype in _HALVES:
        other = _F32 if dtype is _BF16 else None  # the dtype of some biases
        for label, shape, gemms in (
            ("general 64", Shape(), _N64),
            ("general 64 r29", Shape(Ra=29, Rb=3), _N64),
            ("general 64 r61", Shape(Ra=61, Rb=3, shared=False), _N64),
            ("general 64 r128", Shape(Ra=128, core=False, shared=False), _N64),
            ("general 128", _UNALIGNED, _N128),
            ("Hopper 128", _NARROW_TILES, _H128),
            ("Hopper 128 r57", replace(_NARROW_TILES, Ra=57, shared=False), _H128),
            ("Hopper 192", _WIDE_TILES, _H192),
            ("Hopper 128 r64", replace(_NARROW_TILES, Ra=64), _H128),
            ("Hopper 192 r29", replace(_WIDE_TILES, Ra=29), _H192),
            ("Hopper 192 r32", replace(_WIDE_TILES, Ra=32), _H192),
            ("Hopper 192 r128, no bias", replace(_WIDE_TILES, Ra=128, bias=False), _H192),
        ):
            cases.append(Case(label, shape, dtype, "split", gemms=gemms))
        for label, shape, gemms in (
            ("Hopper 128", _NARROW_TILES, _H128),
            ("Hopper 192", _WIDE_TILES, _H192),
            (
                "Hopper 192 r13, no core, no bias",
                replace(_WIDE_TILES, Ra=13, core=False, shared=False, bias=False),
                _H192,
            ),
            (
                "Hopper 128, several tiles a block",
                Shape(M=6000, K=1024, n=512, G=2, Ra=16, Rb=8, shared=False),
                _H128,
            ),
            ("Hopper 192, several tiles a block (qkv)", _VIT_B["qkv"], _H192),
        ):
            cases.append(Case(label, shape, dtype, "fused", gemms=gemms, bias=other))
        # K, then N, ends inside 16 bytes.
        narrow_k, wide_k = replace(_NARROW_TILES, K=821), replace(_WIDE_TILES, K=757)
        for strategy in ("fused", "split"):
            for label, shape, gemms, view in (
                ("K tail 128", narrow_k, ("sm90-128", "sm80-64"), "K tail"),
                ("K tail 192", wide_k, ("sm90-192", "sm80-128"), "K tail"),
                ("N tail 192", replace(_WIDE_TILES, n=757), ("sm80-128", "sm90-192"), "N tail"),
            ):
                cases.append(Case(label, shape, dtype, strategy, gemms=gemms, view=view))
        cases += [
            Case(
                "bias of another alignment", _WIDE_TILES, dtype, "fused", gemms=_H192, view="bias"
            ),
            Case("merged", _NARROW_TILES, dtype, "merged"),
            Case("float32 weight", _NARROW_TILES, dtype, "split", gemms=_H128, wide=True),
        ]
    layers = (
        ("qkv", "split", _H192),
        ("proj", "fused", _H192),
        ("fc1", "fused", _H192),
        ("fc2", "fused", _H192),
        ("fc2", "split", _H192),
    )
    cases += [
        Case(f"ViT-B {layer}", _VIT_B[layer], _BF16, strategy, gemms=gemms)
        for layer, strategy, gemms in layers
    ]
    cases += [
        Case(
            "misaligned float32 bias",
            _NARROW_TILES,
            _BF16,
            "split",
            gemms=_H128,
            view="bias",
            bias=_F32,
        ),
        Case(
            "row blocks of one program",
            Shape(M=20000, K=264, n=264, G=1, Ra=16, Rb=16),
            _BF16,
            "split",
            gemms=_H128,
        ),
    ]
    return cases + _budget_cases("cuda")


def _budget_cases(backend: str) -> list[Case]:
    """Normal operands, for the error budget: two of ViT-B's layers at 8 images."""
    gemms = {"qkv": _H128, "fc2": ("sm90-128", "sm90-192")}
    return [
        Case(
            f"{layer}, normal",
            replace(_VIT_B[layer], M=1576),
            _BF16,
            strategy,
            backend,
            gemms=gemms[layer],
            density=None,
        )
        for layer in gemms
        for strategy in ("fused", "split")
    ]


def _triton_cases() -> list[Case]:
    # Sparser at rank 128: d_B is rounded to the dtype there, exact up to 256 in bfloat16.
    shapes = (
        ("aligned", _NARROW_TILES, 0.1),
        ("odd", Shape(), 0.1),
        ("r32", replace(_NARROW_TILES, Ra=32, Rb=32), 0.1),
        ("r128", replace(_NARROW_TILES, Ra=128, Rb=128), 0.03),
    )
    cases = [
        Case(label, shape, dtype, strategy, "triton", density=density)
        for label, shape, density in shapes
        for dtype in (*_HALVES, _F32)
        for strategy in ("fused", "split", "merged")
    ]
    return cases + _budget_cases("triton")


CUDA_CASES = _cuda_cases()
NORM_CASES = [
    NormCase(M, K, rank, dtype, branch, before)
    for dtype in _HALVES
    for M, K, rank, branch, before in (
        (12608, 768, 16, True, False),
        (12608, 768, 16, True, True),
        (1, 64, 1, True, True),
        (1021, 192, 5, False, False),
        (3000, 384, 16, True, True),
        (509, 832, 13, True, False),
        (2100, 1024, 16, False, False),
        (3010, 1280, 16, True, False),
    )
]
GELU_CASES = [
    GeluCase(M, C, before, after, dtype)
    for dtype in _HALVES
    for M, C, before, after in (
        (12608, 3072, 16, 16),
        (1, 64, 1, 16),
        (1021, 768, 5, 12),
        (2100, 4096, 16, 13),
        (509, 5120, 8, 7),
    )
]
TRITON_CASES = _triton_cases()


def plans_are_known() -> bool:
    """Whether the current GPU is one for which the cases' plans are written down."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return False
    return torch.cuda.get_device_properties().multi_processor_count == MULTIPROCESSORS


def cases_by_kernel() -> dict[str, list[str]]:
    """Every CUDA kernel that a case takes, with the names of those cases."""
    found = defaultdict(list)
    for case in CUDA_CASES:
        for kernel in sorted(set(case.plan)):
            found[kernel].append(case.name)
    of_chains: list[NormCase | GeluCase] = [*NORM_CASES, *GELU_CASES]
    for own in of_chains:
        for kernel in own.plan:
            found[kernel].append(str(own))
    return dict(sorted(found.items()))

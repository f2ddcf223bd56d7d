"""Which compilations the Triton backend asks for: its launchers are run on a fake GPU and noted.

The backend's own forward and backward run with tensors that hold nothing, over the layers of
`layers` and, in each, every config that its GEMMs may get: all rows of tuned/defaults.json, and on
sm_90 and later the same by TMA and as persistent programs. Each distinct compilation that they ask
for is a row. Nothing here knows the name of a kernel's argument.

Not run, hence not known to be free of spills: transposed factors of float32 rows, and by TMA; one
odd size with an aligned one; two different ranks; slices of `up` without a core that are not evenly
spaced. Left out as less of the same code: no bias, P not saved, a 16-bit weight in `merge`. The
GEMM's code in fp16 is that of bf16: one rank and size only.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from efft_kernels.ops.backends import cuda_chain
from efft_kernels.ops.backends import triton as backend
from efft_kernels.ops.backends.chain_steps import Norm
from efft_kernels.ops.backends.fallback import padded_rank
from efft_kernels.ops.backends.triton import configs, launch_cache, tuning
from efft_kernels.ops.backends.triton.chain import TritonSteps, configs_for
from efft_kernels.ops.backends.triton.configs import GemmConfig, PassConfig
from efft_kernels.ops.backends.triton.remake import launch_remake
from efft_kernels.testing.fake_gpu import fake_gpu

ARCHS = (80, 90, 100)
RANKS = (16, 32, 64, 128)
ROWS = 96  # of x; kernels are not specialised on their number
# Columns of x and y; where a tile is to lie in several slices: how many, columns of each; and how
# much a rank lacks of its padding. Blocks divide 768 and not 720; 769 is no multiple of 16.
SIZES = {"even": (768, 16, 48, 8), "ragged": (720, 2, 720, 8), "odd": (769, 2, 769, 3)}
# (strategy, part): the fused backward of all gradients makes the split one's launches.
CALLS = (
    ("fused", "forward"), ("split", "forward"), ("split", "backward"),
    ("fused", "dx d_down"), ("split", "dx d_down"),
)  # fmt: skip
MERGED = (("merged", "forward"), ("merged", "backward"))
# Of a chain's stream: a block of columns divides the first and not the second.
STREAMS = (768, 1000)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The matrix instruction of each architecture; mma.sync is the right one for what wgmma cannot take.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTC.*MMA"}


class Layer(NamedTuple):
    """What a call is specialised on; `words` of it name a row."""

    dtype: str
    ieee: bool  # float32 products outside the tensor cores
    rank: int  # the true one
    size: str  # of SIZES
    slices: str  # "": one, no core; "core": one; "cross": many, and tiles lie in several
    wide: bool  # the weight is float32, x is not
    float32: bool  # so are the factors
    transposed: bool  # core, or where there is none down, has its first stride 1

    @property
    def words(self) -> Iterator[str]:
        yield self.size
        yield from (n for n in ("ieee", "wide", "float32", "transposed") if getattr(self, n))
        if self.slices:
            yield self.slices
        if self.rank != padded_rank(self.rank):
            yield "padded"

    def tensors(self) -> list[Tensor | None]:
        """x, weight, bias, down, core, up without storage."""
        n, slices, slice_n, _ = SIZES[self.size]
        k = n
        if self.slices != "cross":
            slices, slice_n = 1, n
        dtype = DTYPES[self.dtype]
        factors = torch.float32 if self.float32 else dtype

        def empty(*size: int, dtype: torch.dtype = factors) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        core: Tensor | None = empty(slices, self.rank, self.rank)
        down = empty(k, self.rank)
        if not self.slices:
            core = None
            down = empty(self.rank, k).mT if self.transposed else down
        elif self.transposed:
            core = empty(slices, self.rank, self.rank).mT
        weight = empty(slices * slice_n, k, dtype=torch.float32 if self.wide else dtype)
        bias = empty(slices * slice_n, dtype=dtype)
        up = empty(slices, slice_n, self.rank)
        return [empty(ROWS, k, dtype=dtype), weight, bias, down, core, up]


def layers() -> Iterator[Layer]:
    """Every layer that is run: factors of x's dtype and float32; core and down as they are and
    transposed, as FacT-TT and LoRA give them; ranks that fill their padding and that do not.
    """
    no, yes = (False,), (False, True)
    for dtype, rank, size, padded in itertools.product(DTYPES, RANKS, SIZES, yes):
        half = dtype != "fp32"
        true_rank = rank - padded * SIZES[size][-1]
        for slices in ("", "core", "cross"):
            for transposed, ieee, wide, float32 in itertools.product(
                yes, no if half else yes, yes if half else no, yes if half else no
            ):
                yield Layer(dtype, ieee, true_rank, size, slices, wide, float32, transposed)


@dataclass(frozen=True)
class Row:
    """One compilation, and what its machine code must be like."""

    kernel: str
    label: str  # of the first launch that needs it
    arch: int
    dtype: str
    rank: int  # padded
    module: str  # the kernel's, and its name there
    function: str
    specialisation: str  # types, constants, hints, options: what Triton's JITFunction.preload takes
    instruction: str | None = None  # a regular expression of the matrix instruction
    overlaps: bool = False  # wgmma must not wait for the one before it
    tma: bool = False  # tiles are loaded by TMA
    one_loop: bool = False  # a persistent program's loop over tiles and the one inside are fused

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.kernel} {self.label} {self.dtype} r{self.rank}"


class Recorder:
    """Answers the launchers when they ask for a config, and keeps each compilation they ask for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.rows: dict[tuple[str, str, str], Row] = {}
        self._labels: dict[tuple[Any, ...], int] = defaultdict(int)
        self._pass_config = tuning.pass_config
        self._config: GemmConfig | PassConfig | None = None
        self._kernel = ""

    def record(self, layer: Layer) -> None:
        """Run the layer with each config that its GEMMs may get, and everything else alike."""
        self._layer, self._choice, self._choices = layer, 0, 1
        tensors = layer.tensors()
        if layer.wide or layer.dtype == "fp32":
            self._run(tensors, MERGED)
        while self._choice < self._choices:
            self._run(tensors, CALLS)
            self._choice += 1

    def record_chain(self, dtype: str, k: int, rank: int) -> None:
        """Run all steps of a chain's blocks over a float32 stream of K columns, its GEMMs in
        `dtype`, and what makes a norm's output again."""
        self._layer = Layer(dtype, False, rank, "even", "", False, False, False)
        self._call = f"chain K{k}"
        launch_cache.forget()
        steps, half = TritonSteps(configs_for(k, rank, None)), DTYPES[dtype]

        def empty(*size: int, dtype: torch.dtype = half) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        def wide(*size: int) -> Tensor:
            return empty(*size, dtype=torch.float32)

        norm = Norm(wide(k), wide(k), 1e-6)
        z, dz = wide(ROWS, k), wide(ROWS, k)
        y, dx, p, down = empty(ROWS, k), empty(ROWS, k), empty(ROWS, rank), empty(k, rank)
        steps.norm(z, None, norm, down, half)
        normed = steps.norm(z, y, norm, down, half)
        statistics = normed.z, normed.mean, normed.rstd
        steps.norm_grad(dx, *statistics, norm, dz, p)
        s, sum_b = steps.thin_grad(y, down, p)
        sums = steps.norm_down_grad(*statistics, norm, p), *steps.pair_grad(y, y, down, down)
        waiting = [(found, wide(k, rank)) for found in sums]  # as in chain_passes.backward
        for copy in (True, False):
            parts, d_b = [y, y, y], wide(3 * k, rank)
            steps.gather_grad(parts, empty(3 * k, rank), s, copy, d_b, list(waiting))
        steps.finish(waiting[:1])
        h, wide_down = empty(ROWS, 4 * k), empty(4 * k, rank)
        steps.gelu(h, wide_down)
        grads = wide(4 * k, rank), wide(4 * k, rank)
        for first in ([], waiting[:1]):  # in the last layer there is no norm's sum yet
            steps.gelu_grad(h, h, p, wide_down, s, *grads, [*first, (sum_b, wide(k, rank))])
        if rank <= cuda_chain.MOST_RANK:  # what GELU's gradient in CUDA C++ leaves to be added up
            sum_s = wide(4, ROWS, cuda_chain.MOST_RANK)
            own = [(sum_s, s), *((wide(33, *grad.shape[:1], 16), grad) for grad in grads)]
            for first in ([], waiting[:1]):
                steps._finish([*own, *first, (sum_b, wide(k, rank))], few=1)
        for gamma in (None, wide(1, k)):
            steps.merge([wide(k, k)], empty(1, k, rank), empty(1, k, rank), gamma)
        for x in (z, y):
            launch_remake(x, normed.mean, normed.rstd, norm.weight, norm.bias)
            launch_remake(x, normed.mean, normed.rstd, None, None)

    def _run(self, tensors: list[Any], calls: tuple[tuple[str, str], ...]) -> None:
        x, weight, _, down, core, up = tensors
        dy, p = x.new_empty(ROWS, len(weight)), x.new_empty(ROWS, self._layer.rank)
        for strategy, part in calls:
            self._call = f"{strategy} {part}"
            launch_cache.forget()
            if part == "forward":
                backend.forward(*tensors, save_p=True, strategy=strategy)
                continue
            factors = part == "backward"
            needs = (True, False, False, True, factors and core is not None, factors)
            backend.backward(dy, x, weight, p, down, core, up, needs=needs, strategy=strategy)

    def gemm_config(
        self, m: int, c: int, i: int, rank: int, dtype: torch.dtype, **how: Any
    ) -> GemmConfig:
        """In the place of `tuning.gemm_config`: the next of all configs that it may ever return."""
        form = tuning.operand_form(dtype, how["wide"], how["aligned"])
        found = configs.gemm_candidates(self.arch, form, rank)
        if self.arch >= 90 and form == "half" and not self._layer.transposed:
            by_tma = tuple(config._replace(tma=True) for config in found)
            found += by_tma + configs.persistent_candidates(self.arch, form, rank, how["compute_p"])
        found = tuple(
            config
            for config in found
            if not tuning.crosses(config, c, how["slice_c"])
            or (config.block_c <= tuning.MOST_CROSSED and not config.persistent)
        )
        if not self._left_out(gemm=True):
            self._choices = max(self._choices, len(found))
        config = found[min(self._choice, len(found) - 1)]
        self._config, self._kernel = config, "gemm"
        return config

    def pass_config(self, kernel: str, *shape: Any, **how: Any) -> PassConfig:
        """In the place of `tuning.pass_config`: the same, noted."""
        self._config, self._kernel = self._pass_config(kernel, *shape, **how), kernel
        return self._config

    def _left_out(self, gemm: bool) -> bool:
        """Whether this layer's GEMM, or its passes, are those that the module leaves out."""
        layer = self._layer
        once = layer.size == "even" and layer.rank == RANKS[0]
        if gemm and layer.dtype == "fp16" and not once:
            return True
        return layer.dtype == "fp32" and layer.transposed

    def hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Called by Triton before it compiles; True: it need not."""
        config, layer = self._config, self._layer
        kernel = self._kernel or fn.jit_function.__name__.strip("_").removesuffix("_kernel")
        self._config, self._kernel = None, ""
        key = fn.module, fn.name, compile["specialization_data"]
        gemm = isinstance(config, GemmConfig)
        if key in self.rows or (config is not None and self._left_out(gemm)):
            return True
        words = [self._call, *layer.words]
        overlaps = tma = one_loop = False
        instruction = None
        if config is not None:
            words.append(f"{config.block_m}x{config.block_c}")
            own = TENSOR_CORE[self.arch]
            instruction = None if layer.ieee else own if gemm else f"HMMA|{own}"
        if isinstance(config, GemmConfig):
            tma, one_loop = config.tma, config.persistent
            words[-1] += f"x{config.block_i}"
            words += ["tma"] * tma + ["persistent"] * one_loop
            # Operands of these reach the instruction without passing registers.
            overlaps = self.arch == 90 and not (
                layer.dtype == "fp32" or layer.wide or layer.size == "odd"
            )
        rank = padded_rank(layer.rank)
        label = " ".join(words)
        self._labels[kernel, label, layer.dtype, rank] += 1
        if (count := self._labels[kernel, label, layer.dtype, rank]) > 1:
            label += f" #{count}"
        self.rows[key] = Row(
            kernel, label, self.arch, layer.dtype, rank, *key, instruction, overlaps, tma, one_loop
        )
        return True


def rows(archs: Iterable[int] = ARCHS, of: Iterable[Layer] | None = None) -> list[Row]:
    """Every distinct compilation that the layers need, in the order in which they come up."""
    every = list(layers() if of is None else of)
    chains = [("bf16", k, rank) for k in STREAMS for rank in RANKS] + [("fp16", STREAMS[0], 16)]
    found: list[Row] = []
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for arch in archs:
        recorder = Recorder(arch)
        with (
            fake_gpu(arch),
            triton.knobs.runtime.scope(),
            mock.patch.object(tuning, "gemm_config", recorder.gemm_config),
            mock.patch.object(tuning, "pass_config", recorder.pass_config),
        ):
            triton.knobs.runtime.jit_cache_hook = recorder.hook
            try:
                for layer in every:
                    matmul.fp32_precision = "ieee" if layer.ieee else "tf32"
                    recorder.record(layer)
                for dtype, k, rank in chains if of is None else ():
                    recorder.record_chain(dtype, k, rank)
            finally:
                matmul.fp32_precision = before
        found += recorder.rows.values()
    return found


def sample(every: list[Row], count: int) -> list[Row]:
    """`count` rows, always the same ones, chosen by their names.

    Some of every kernel and architecture, more where there are more; in each of these groups dtypes
    and kinds of programs take turns.
    """
    groups: dict[tuple[str, int], dict[tuple[Any, ...], list[Row]]] = defaultdict(dict)
    for row in sorted(every, key=lambda row: hashlib.sha1(str(row).encode()).digest()):
        kinds = groups[row.kernel, row.arch]
        kinds.setdefault((row.dtype, row.tma, row.one_loop), []).append(row)
    order: list[tuple[float, str, Row]] = []
    for kinds in groups.values():
        size = sum(map(len, kinds.values()))
        in_turn = itertools.chain(*itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds))))
        for place, row in enumerate(filter(None, in_turn)):
            order.append((place / math.sqrt(size), str(row), row))
    chosen = {row for *_, row in sorted(order, key=lambda each: each[:2])[:count]}
    return [row for row in every if row in chosen]

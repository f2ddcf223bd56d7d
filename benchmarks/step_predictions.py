"""Predicts the training step of a whole vision transformer on a GPU, launch by launch. Measures
nothing.

    python -m benchmarks.step_predictions [--device H100] [--images 64] [--rank 16] [--launches]

The step runs on tensors without memory: what torch's operators and this package's launchers would
launch is noted with the bytes of its operands, each counted once, and its operations. A launch
takes the longer of the two times, as in ops/cost_model.py. Three steps, in bfloat16 under autocast
over float32 weights, each captured in a CUDA graph:

    frozen             eager, the gradient flows to the first block
    frozen, compiled   what torch.compile could at best leave of it: the products, attention, and
                       between them one pass over what the next product needs
    chain              EFFT2's blocks as ops/chains.py runs them; its factors' own small products
                       are left out
    CUDA               the same with what no GPU has timed yet: proj's pair of thin gradients in
                       CUDA C++, S and d_B of fc2 in the norm's gradient after it, GELU and its
                       gradient

`KERNELS` holds the share of the bandwidth or of the matrix rate that a kernel was seen to reach on
an H100 (ViT-B/16, 64 images, results/step_kernels.csv). So ViT-B is fitted, and the others are
predicted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from efft_kernels.ops import chains, cost_model
from efft_kernels.ops.backends import cuda_chain
from efft_kernels.ops.backends.chain_steps import Norm, Normed, NormedGrad, Sums
from efft_kernels.ops.backends.triton.chain import TritonSteps, configs_for
from efft_kernels.ops.backends.triton.launch_cache import CachedLaunch
from efft_kernels.ops.cost_model import Launch, Problem
from efft_kernels.testing.cpu_chain import CPU_ATTENTION, Adapted, Layer, run_chain
from efft_kernels.testing.fake_gpu import fake_gpu

from .step_launches import computes

HALF = torch.bfloat16
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
GRADIENT = "_backward"


@dataclass(frozen=True)
class Vit:
    """A vision transformer's sizes."""

    depth: int
    K: int
    heads: int
    patch: int = 16

    @property
    def tokens(self) -> int:
        """Of a picture of 224 x 224 pixels, the class token included."""
        return (224 // self.patch) ** 2 + 1


MODELS = {
    "ViT-B/16": Vit(12, 768, 12),
    "ViT-L/16": Vit(24, 1024, 16),
    "ViT-H/14": Vit(32, 1280, 16, 14),
}

# Shares of the bandwidth; for attention, of the matrix rate. What is not here: EAGER.
KERNELS = {
    "norm": 0.92,
    "norm_grad": 0.99,
    "norm_fwd": 0.7,
    "norm_bwd": 0.9,
    "norm_down_grad": 0.5,
    "act_fwd": 0.91,
    "act_bwd": 0.64,  # its result takes its operand's place, which is counted once
    "gather": 0.96,
    "reduce": 0.56,
    "thin": 0.7,
    "thin_grad": 0.68,
    "tall_grad": 0.65,
    "pair_grad": 0.5,  # reads its rows twice, which is counted once
    "pair_grad_cuda": 0.85,  # assumed: its tiles stay in shared memory
    # From its instructions: 36 for an element, 47 of 132 multiprocessors' microseconds at ViT-B's
    # size, beside 77 for memory's traffic at this share.
    "gelu_grad_cuda": 0.85,
    "gelu_cuda": 0.91,  # as Triton's on an H100
    "merge_stack": 0.87,
    ATTENTION: 0.2,
    ATTENTION + GRADIENT: 0.131,
    "stack": 0.345,
    "clone": 0.425,
    "native_layer_norm": 0.645,
    f"native_layer_norm{GRADIENT}": 0.91,
    "gelu": 0.91,
    f"gelu{GRADIENT}": 0.96,
    "convolution": 0.022,
}
EAGER = 0.88
IN_A_GRAPH = 0.26e-6  # seconds between the kernels of a CUDA graph


class Noted(TorchDispatchMode):
    """Notes what computes something: torch's operators, Triton's launches, the CUDA kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if computes(func):
            self.note(func._schema.name.split("::")[-1], args, result)
        return result

    def note(self, name: str, *operands: Any) -> None:
        """A kernel that reads and writes these tensors."""
        tensors: list[Tensor] = []
        torch.utils._pytree.tree_map_only(Tensor, tensors.append, operands)
        own = {id(t.untyped_storage()): t for t in tensors if t.numel() > 1}
        moved = sum(t.numel() * t.element_size() for t in own.values())
        if name in PRODUCTS:
            a, b = tensors[-3:-1]
            m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
            stored = tensors[-1].numel() * tensors[-1].element_size()
            count = a.shape[0] if a.dim() == 3 else 1
            self.launches.append(Launch("library gemm", 2 * count * m * k * n, moved, 1, 1, stored))
            return
        share = KERNELS.get(name, EAGER)
        flops, efficiency = 0, 1.0
        if name.startswith(ATTENTION):
            backward = name.endswith(GRADIENT)
            query = tensors[1] if backward else tensors[0]  # [images, heads, tokens, columns]
            flops = (10 if backward else 4) * query.numel() * query.shape[2]
            share, efficiency = 1.0, share
        self.launches.append(Launch(name, flops, moved, efficiency, share))


class OnPaper(cuda_chain.CudaSteps):
    """The CUDA C++ steps, noted in place of running.

    Args:
        untimed: also those that no GPU has timed.
    """

    def __init__(self, configs: Any, noted: Noted, untimed: bool) -> None:
        super().__init__(
            configs, pair_grad=untimed, before=untimed, gelu=untimed, gelu_grad=untimed
        )
        self._note = noted.note

    def norm(
        self, z: Tensor, y: Tensor | None, norm: Norm, down: Tensor, dtype: torch.dtype
    ) -> Normed:
        if not _by_cuda(z.shape[1], down.shape[1]):
            return TritonSteps.norm(self, z, y, norm, down, dtype)
        made = z if y is None else torch.empty_like(z)
        out = torch.empty_like(z, dtype=dtype)
        p = out.new_empty(z.shape[0], down.shape[1])
        mean, rstd = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
        self._note("norm", z, y, norm.weight, norm.bias, down, made, out, p, mean, rstd)
        return Normed(made, out, p, mean, rstd)

    def norm_grad(
        self,
        dout: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm: Norm,
        residual: Tensor,
        s: Tensor,
        before: tuple[Tensor, Tensor] | None = None,
    ) -> NormedGrad:
        k = z.shape[1]
        if not _by_cuda(k, s.shape[1]):
            return TritonSteps.norm_grad(self, dout, z, mean, rstd, norm, residual, s, before)
        dz, dy = torch.empty_like(z), torch.empty_like(dout)
        partial = z.new_empty(132, k, cuda_chain.MOST_RANK)
        operands = dout, z, mean, rstd, norm.weight, norm.bias, residual, s, dz, dy, partial
        if before is None or not self._before or k > cuda_chain.MOST_WIDTH_BEFORE:
            self._note("norm_grad", *operands)
            return self.with_before(dz, dy, partial, before)
        made, sum_b = torch.empty_like(s), torch.empty_like(partial)
        self._note("norm_grad", *operands, *before, made, sum_b)
        return NormedGrad(dz, dy, partial, made, sum_b)

    def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        wide = h.shape[1] > cuda_chain.MOST_WIDTH_GELU or down.shape[1] > cuda_chain.MOST_RANK
        if not self._native_gelu or wide:
            return TritonSteps.gelu(self, h, down)
        a, p = torch.empty_like(h), h.new_empty(len(h), down.shape[1])
        self._note("gelu_cuda", h, down, a, p)
        return a, p

    def gelu_grad(
        self,
        da: Tensor,
        h: Tensor,
        s: Tensor,
        b: Tensor,
        p: Tensor,
        d_b: Tensor,
        d_down: Tensor,
        later: Sums,
    ) -> tuple[Tensor, Tensor]:
        if not self._native_gelu_grad or s.shape[1] > cuda_chain.MOST_RANK:
            return TritonSteps.gelu_grad(self, da, h, s, b, p, d_b, d_down, later)
        parts = -(-h.shape[1] // 768)
        float32 = {"dtype": torch.float32}
        sum_s = h.new_empty(parts, len(h), cuda_chain.MOST_RANK, **float32)
        sum_b, sum_down = (
            h.new_empty(132 // parts, h.shape[1], cuda_chain.MOST_RANK, **float32) for _ in range(2)
        )
        self._note("gelu_grad_cuda", da, h, s, b, p, torch.empty_like(da), sum_s, sum_b, sum_down)
        s_in = torch.empty_like(p)
        later[:0] = (sum_s, s_in), (sum_b, d_b), (sum_down, d_down)
        self._finish(later, few=1)
        return da, s_in

    def pair_grad(self, x: Tensor, dy: Tensor, down: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if not self._native_pair or x.shape[1] > cuda_chain.MOST_WIDTH_PAIR:
            return TritonSteps.pair_grad(self, x, dy, down, b)
        sums = x.new_empty(2, 132, x.shape[1], cuda_chain.MOST_RANK, dtype=torch.float32)
        self._note("pair_grad_cuda", x, dy, down, b, sums)
        return sums[0], sums[1]


def _by_cuda(k: int, rank: int) -> bool:
    fits = k % cuda_chain.COLUMNS == 0 and k <= cuda_chain.MOST_WIDTH
    return fits and rank <= cuda_chain.MOST_RANK


@contextmanager
def noted() -> Iterator[Noted]:
    """Torch's operators and Triton's launches are noted; nothing has memory, nothing runs."""
    found = Noted()

    def launch(self: CachedLaunch, tensors: Any, fresh: Any = (), descriptors: Any = ()) -> None:
        name = self.kernel.__name__.strip("_").removesuffix("_kernel")
        grad = name == "thin" and tensors[4] is not None
        found.note(f"{name}_grad" if grad else name, tensors, fresh)

    with (
        fake_gpu(90, 132, record=False),
        mock.patch.object(CachedLaunch, "__call__", launch),
        FakeTensorMode(allow_non_fake_inputs=True),
        found,
    ):
        yield found


def frozen_step(vit: Vit, images: int, blocks: int | None = None) -> list[Launch]:
    """Of the eager model, or of one with so many blocks: forward, loss and backward."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"), mock.patch.object(torch.Tensor, "item", lambda self: 0.0):
        model = VisionTransformer(
            embed_dim=vit.K,
            depth=vit.depth if blocks is None else blocks,
            num_heads=vit.heads,
            patch_size=vit.patch,
        )
    model.requires_grad_(False).head.requires_grad_()
    model.to_empty(device="cpu")
    with noted() as found:
        pictures = torch.empty(images, 3, 224, 224)
        labels = torch.empty(images, dtype=torch.long)
        model.norm_pre.register_forward_hook(lambda m, i, x: x.requires_grad_())
        found.launches.clear()
        with torch.autocast("cpu", HALF):
            loss = F.cross_entropy(model(pictures), labels)
        loss.backward()
    return found.launches


def chain_step(vit: Vit, images: int, rank: int, untimed: bool = False) -> list[Launch]:
    """Of the blocks as a chain: merging, forward and backward.

    Args:
        untimed: with the steps in CUDA C++ that no GPU has timed.
    """
    k, hidden = vit.K, 4 * vit.K
    with noted() as found:
        steps = OnPaper(configs_for(k, rank, None), found, untimed)
        engine = chains.Engine(steps, CPU_ATTENTION, HALF)

        def adapted(n: int, columns: int) -> Adapted:
            down, b = torch.empty(columns, rank), torch.empty(n, rank)
            weight, bias = torch.empty(n, columns), torch.empty(n)
            return Adapted(weight, bias, down.requires_grad_(), b.requires_grad_())

        def norm() -> Norm:
            return Norm(torch.empty(k), torch.empty(k), 1e-6)

        layers = [
            Layer(
                *(norm(), adapted(3 * k, k), adapted(k, k)),
                *(norm(), adapted(hidden, k), adapted(k, hidden), vit.heads),
            )
            for _ in range(vit.depth)
        ]
        x = torch.empty(images, vit.tokens, k)
        found.launches.clear()
        y = run_chain(x, layers, engine)
        y.backward(torch.empty_like(y))
    return found.launches


def compiled_step(vit: Vit, images: int) -> list[Launch]:
    """Of the frozen model's blocks with all that lies between two products in one pass, and the
    weights cast."""
    rows, k = images * vit.tokens, vit.K
    wide, half = 4 * rows * k, 2 * rows * k  # bytes of the stream, and of x̂ or a branch
    weights = 12 * k * k

    def product(n: int, columns: int, backward: bool) -> Launch:
        problem = Problem(rows, columns, n, 1, 0, True, 2, 2, "cuda", backward)
        return cost_model.library_gemm(problem)

    sizes = ((3 * k, k), (k, k), (4 * k, k), (k, 4 * k))
    products = [product(*size, backward) for backward in (False, True) for size in sizes]
    scores = 4 * rows * k * vit.tokens
    block = [
        *products,
        *[Launch("norm", 0, 2 * wide + 2 * half, 1, KERNELS["norm"])] * 2,
        *[Launch("norm_grad", 0, 3 * wide + 2 * half, 1, KERNELS["norm_grad"])] * 2,
        Launch("gelu", 0, 8 * half, 1, KERNELS["act_fwd"]),
        Launch("gelu_backward", 0, 12 * half, 1, KERNELS["gelu_backward"]),
        Launch("cat", 0, 6 * half, 1, EAGER),
        Launch(ATTENTION, scores, 4 * half, KERNELS[ATTENTION]),
        Launch(ATTENTION + GRADIENT, 2.5 * scores, 8 * half, KERNELS[ATTENTION + GRADIENT]),
        Launch("_to_copy", 0, 6 * weights, 1, EAGER),
    ]
    return block * vit.depth


def milliseconds(launches: list[Launch], device: cost_model.Device) -> float:
    """Of launches in a CUDA graph."""
    problem = Problem(1, 1, 1, 1, 1, True, 2, 2, "cuda")
    gaps = (IN_A_GRAPH - device.launch_s) * len(launches)
    return 1e3 * (cost_model.seconds(launches, problem, device) + gaps)


@dataclass(frozen=True)
class Step:
    """One model's steps: their launches."""

    frozen: list[Launch]
    compiled: list[Launch]
    chain: list[Launch]
    untimed: list[Launch]

    @classmethod
    def of(cls, vit: Vit, images: int, rank: int) -> Step:
        """What lies outside the blocks is the same in all of them."""
        around = frozen_step(vit, images, blocks=0)
        return cls(
            frozen_step(vit, images),
            compiled_step(vit, images) + around,
            chain_step(vit, images, rank) + around,
            chain_step(vit, images, rank, untimed=True) + around,
        )


def by_kernel(launches: list[Launch], device: cost_model.Device) -> list[tuple[str, int, float]]:
    """(kernel, launches, milliseconds), the longest first."""
    counts = Counter(launch.name for launch in launches)
    of: Callable[[str], float] = lambda name: milliseconds(  # noqa: E731
        [launch for launch in launches if launch.name == name], device
    )
    return sorted(((n, c, of(n)) for n, c in counts.items()), key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = [name for name in cost_model.DEVICES if name != "CPU"]
    parser.add_argument("--device", choices=devices, default="H100")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--launches", action="store_true", help="each step's kernels as well")
    arguments = parser.parse_args()
    console, device = Console(), cost_model.DEVICES[arguments.device]
    table = Table(
        *("model", "frozen ms", "compiled ms", "chain ms", "chain / frozen", "chain / compiled"),
        *("CUDA ms", "CUDA / compiled", "launches: frozen", "chain", "CUDA"),
        title=f"{arguments.images} images, r = {arguments.rank}, {device.name}: predicted",
    )
    for name, vit in MODELS.items():
        step = Step.of(vit, arguments.images, arguments.rank)
        frozen, compiled, chain, untimed = (
            milliseconds(launches, device)
            for launches in (step.frozen, step.compiled, step.chain, step.untimed)
        )
        table.add_row(
            *(name, f"{frozen:.1f}", f"{compiled:.1f}", f"{chain:.1f}"),
            *(f"{chain / frozen:.2f}", f"{chain / compiled:.2f}"),
            *(f"{untimed:.1f}", f"{untimed / compiled:.2f}"),
            *(str(len(step.frozen)), str(len(step.chain)), str(len(step.untimed))),
        )
        if arguments.launches:
            titled = ("frozen", step.frozen), ("chain", step.chain), ("CUDA", step.untimed)
            for title, launches in titled:
                own = Table("kernel", "launches", "ms", title=f"{name}, {title}")
                for kernel, count, ms in by_kernel(launches, device):
                    own.add_row(kernel, str(count), f"{ms:.2f}")
                console.print(own)
    console.print(table)


if __name__ == "__main__":
    main()

"""One training step of a whole timm model: this package, its peers, and the frozen floor.

    python -m benchmarks.whole_model [--models vit_small_patch16_224:8 ...] [--rank 16]
        [--seconds 60] [--compile [IMPL ...]] [--memory-batches 1 2 4 8] [--memory-only]
        [--profile results/step_kernels.csv]

A step is zero_grad, forward, cross entropy, backward and AdamW on what trains; the head trains
everywhere. The floor is the frozen backbone with the gradient flowing to its first block's input.
Before anything is timed, every implementation of a method has to match float64 in logits and in all
factor gradients within twice the error of plain torch; one that does not gets no row. All are then
timed in interleaved rounds, and the ratios to the floor are medians over the rounds. saved_mib is
what autograd keeps for the backward. peak_mem_mb is by how much a whole step raises what is
resident (on a GPU: allocated); on a CPU only --memory-only has it, without times, for it needs
another malloc. --profile then says, in turn for all of them, which of torch's operators a step's
time goes to.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from efft_kernels.testing.error_budget import BUDGET, worst_ratio
from efft_kernels.training.loop import saved_for_backward_mib

from . import peers, tables
from .lib.profiles import kernel_rows, profile_in_turn
from .lib.rows import (
    KERNEL_COLUMNS,
    WHOLE_MODEL_COLUMNS,
    WHOLE_MODEL_CSV,
    Row,
    append_rows,
    provenance,
)
from .lib.timing import Timings, give_back_what_is_freed, interleave, peak_mem_mb
from .peers import COMPILED, FLOOR, Peer

# On two cores a step of each takes 0.2 to 2 s.
DEFAULT_MODELS = (
    "vit_tiny_patch16_224:8",
    "vit_small_patch16_224:8",
    "vit_base_patch16_224:2",
    "swin_tiny_patch4_window7_224:4",
)
HUGGING_FACE = "transformers.ViT-S/16"
COMPILABLE = (
    FLOOR,
    "EFFT2",
    peers.PEFT_LORA,
    peers.EAGER_EFFT2,
    peers.RELEASED_EFFT2,
    peers.PUBLISHED_FACT,
)
MEMORY_IMPLS = (FLOOR, "EFFT2", peers.PEFT_LORA, peers.RELEASED_EFFT2, peers.FULL)
GATE_IMAGES = 2
PROFILED = 5  # steps of each


def make_base(name: str, device: str) -> nn.Module:
    """A timm model, or HUGGING_FACE, with random weights, no dropout, the backbone frozen and the
    head trainable."""
    torch.manual_seed(0)
    if name == HUGGING_FACE:
        model = hugging_face_vit()
    else:
        model = timm.create_model(name, drop_rate=0.0, drop_path_rate=0.0)
    model.to(device).requires_grad_(False)
    model.get_classifier().requires_grad_()
    return model.train()


def hugging_face_vit() -> Any:
    """Hugging Face's ViT of ViT-S/16's sizes, called and asked like a timm model."""
    from transformers import ViTConfig, ViTForImageClassification

    class ViT(ViTForImageClassification):  # type: ignore[misc]
        num_classes = 1000
        pretrained_cfg: ClassVar = {"input_size": (3, 224, 224)}

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = super().forward(pixel_values=images).logits
            return logits

        def get_classifier(self) -> nn.Module:
            classifier: nn.Module = self.classifier
            return classifier

    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViT(ViTConfig(**sizes, num_labels=1000))


def draw_batch(model: nn.Module, images: int, device: str) -> tuple[Tensor, Tensor]:
    """(images [B, 3, H, W], targets [B]), random."""
    generator = torch.Generator().manual_seed(1)
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(images, *size, generator=generator)
    targets = torch.randint(model.num_classes, (images,), generator=generator)
    return x.to(device), targets.to(device)


def step_of(
    peer: Peer,
    images: Tensor,
    targets: Tensor,
    amp: torch.dtype | None,
    *,
    lr: float = 1e-6,
    capturable: bool = False,
) -> Callable[[], Tensor]:
    """One training step, which returns the loss; `capturable` keeps AdamW's state on the GPU."""
    optimizer = torch.optim.AdamW(peer.trainable(), lr=lr, capturable=capturable)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(images.device.type, amp):
            loss = F.cross_entropy(peer.model(images), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def results(peer: Peer, images: Tensor, targets: Tensor, amp: torch.dtype | None) -> list[Tensor]:
    """[logits, all factor gradients as one vector] of one forward and backward."""
    peer.model.zero_grad(set_to_none=True)
    with _autocast(images.device.type, amp):
        logits = peer.model(images)
        loss = F.cross_entropy(logits, targets)
    loss.backward()
    found = [logits.detach(), peer.factor_grads()]
    peer.model.zero_grad(set_to_none=True)
    return found


class Gate:
    """How far peers are from float64, over plain torch's distance, in logits and factor gradients:
    the median over a few draws of images. There are images that a model of random weights takes so
    badly that every rounding grows, ours and plain torch's, each by another factor.

    The peers share the parameters of `base`: what trains must not have changed since.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        batch: tuple[Tensor, Tensor],
        amp: torch.dtype | None,
        draws: int = 3,
    ) -> None:
        self._base, self._rank, self._amp = base, rank, amp
        images, self._targets = (t[:GATE_IMAGES] for t in batch)
        generator = torch.Generator().manual_seed(2)
        others = [torch.randn(images.shape, generator=generator) for _ in range(draws - 1)]
        self._draws = [images, *(other.to(images) for other in others)]
        # By method, for each draw plain torch's results and float64's.
        self._known: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}

    def ratio(self, peer: Peer) -> float | None:
        """Its error over plain torch's; None for a peer that is no method."""
        if peer.method is None:
            return None
        if peer.method not in self._known:
            self._known[peer.method] = self._plain_and_exact(peer.method, peer)
        ratios = [
            worst_ratio(results(peer, images, self._targets, self._amp), *known)
            for images, known in zip(self._draws, self._known[peer.method], strict=True)
        ]
        return math.nan if any(map(math.isnan, ratios)) else statistics.median(ratios)

    def _plain_and_exact(self, method: str, peer: Peer) -> list[tuple[list[Tensor], list[Tensor]]]:
        exact_base = copy.deepcopy(self._base).double()
        exact = peers.build(method, exact_base, self._rank, formula=peers.factored)
        # The very float32 values, not another draw rounded otherwise.
        with torch.no_grad():
            for name, parameter in exact.factors.items():
                parameter.copy_(peer.factors[name].view(parameter.shape))
        plain = peers.build(method, self._base, self._rank, formula=peers.factored)
        return [
            (
                results(plain, images, self._targets, self._amp),
                results(exact, images.double(), self._targets, None),
            )
            for images in self._draws
        ]


def bench_model(
    name: str,
    images: int,
    rank: int,
    *,
    device: str,
    amp: torch.dtype | None,
    impls: Sequence[str] = peers.EVERY,
    compiled: Sequence[str] = (),
    seconds: float = 60.0,
    fewest_rounds: int = 3,
    timed: bool = True,
    resident: bool = False,
    profile: Path | None = None,
) -> list[Row]:
    """Rows of one model: the floor first; without `timed` only what each needs of memory, on a CPU
    what is resident only with `resident`, in a process that has called `give_back_what_is_freed`.
    With `profile` each one's operators are appended to that CSV."""
    base = make_base(name, device)
    batch = draw_batch(base, images, device)
    candidates = [peers.build(impl, base, rank) for impl in dict.fromkeys((FLOOR, *impls))]
    for impl in compiled:
        peer = peers.build(impl, base, rank)
        candidates.append(
            Peer(impl + COMPILED, torch.compile(peer.model), peer.method, peer.factors)
        )
    ratios: dict[str, float] = {}
    if timed:
        gate = Gate(base, rank, batch, amp)
        for peer in list(candidates):
            ratio = gate.ratio(peer)
            if ratio is None:
                continue
            ratios[peer.name] = ratio
            if not ratio <= BUDGET:
                print(
                    f"{name} {peer.name}: error {ratio:.2f} x plain torch's; no row",
                    file=sys.stderr,
                )
                candidates.remove(peer)
    steps = {peer.name: step_of(peer, *batch, amp) for peer in candidates}
    # The warm-up, too.
    losses = {impl: float(step()) for impl, step in steps.items()}
    cuda = device == "cuda"
    memory = {}
    for peer in candidates if cuda or resident else ():
        # Gradients of the step before would be there from the start, and freed at once.
        peer.model.zero_grad(set_to_none=True)
        memory[peer.name] = peak_mem_mb(steps[peer.name], cuda)
    timings = None
    if timed:
        timings = interleave(
            steps, seconds=seconds, device=device, fewest_rounds=fewest_rounds, warm_ups=0
        )
    where = provenance(device, ("timm", "peft"))
    case = {
        "model": name,
        "dtype": "float32" if amp is None else f"{str(amp).removeprefix('torch.')} autocast",
        "batch": images,
        "r": rank,
    }
    if profile is not None:
        for impl, totals in profile_in_turn(steps, device, PROFILED).items():
            own = {**case, "impl": impl, "frozen_dtype": "float32", **provenance(device)}
            append_rows(profile, KERNEL_COLUMNS, [{**own, **row} for row in kernel_rows(totals)])
    return [
        {
            **case,
            "impl": peer.name,
            **times(peer.name, timings),
            "saved_mib": saved_mib(peer, batch, amp),
            "peak_mem_mb": f"{memory[peer.name]:.1f}" if peer.name in memory else "",
            "trainable": sum(p.numel() for p in peer.trainable()),
            "loss": f"{losses[peer.name]:.6f}" if peer.name in losses else "",
            "err_ratio": f"{ratios[peer.name]:.3f}" if peer.name in ratios else "",
            **where,
        }
        for peer in candidates
    ]


def times(impl: str, timings: Timings | None) -> dict[str, str]:
    """A row's times and, where the floor was timed beside it, its ratios to the floor."""
    if timings is None:
        return {}
    ms = timings.time(impl)
    found = {
        "rounds": str(timings.rounds),
        "ms_p20": f"{ms.p20:.3f}",
        "ms_p50": f"{ms.p50:.3f}",
        "ms_p80": f"{ms.p80:.3f}",
    }
    if FLOOR in timings.ms:
        ratio = timings.ratio(impl, FLOOR)
        found["ratio_to_floor"] = f"{ratio.p50:.4f}"
        found["ratio_p20"], found["ratio_p80"] = f"{ratio.p20:.4f}", f"{ratio.p80:.4f}"
    return found


def saved_mib(peer: Peer, batch: tuple[Tensor, Tensor], amp: torch.dtype | None) -> str:
    """A row's saved_mib; none for a compiled peer."""
    if peer.name.endswith(COMPILED):
        return ""  # its graph keeps what it saves to itself
    return f"{saved_for_backward_mib(peer.model, *batch, autocast_dtype=amp):.2f}"


def _autocast(device: str, dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=DEFAULT_MODELS, help="timm name:images", metavar="NAME:B"
    )
    parser.add_argument(
        "--impls",
        nargs="+",
        default=peers.EVERY,
        choices=(*peers.EVERY, *peers.ALONE),
        metavar="I",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--amp", choices=("none", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds for each model")
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=COMPILABLE,
        metavar="I",
        help="compile these with torch.compile as well; without a name all that can be",
    )
    parser.add_argument(
        "--memory-batches",
        type=int,
        nargs="*",
        default=(),
        help="also rows without times: what the last model saves for backward at these batches",
    )
    parser.add_argument("--memory-only", action="store_true", help="no times: of every model")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="append the operators of a step to a CSV"
    )
    parser.add_argument("--out", type=Path, default=WHOLE_MODEL_CSV)
    arguments = parser.parse_args()
    amp_name = arguments.amp or ("bfloat16" if arguments.device == "cuda" else "none")
    amp = None if amp_name == "none" else torch.bfloat16
    console = Console(width=None if sys.stdout.isatty() else 130)
    if arguments.memory_only:
        give_back_what_is_freed()
    for entry in arguments.models:
        name, _, images = entry.partition(":")
        rows = bench_model(
            name,
            int(images or 8),
            arguments.rank,
            device=arguments.device,
            amp=amp,
            impls=arguments.impls,
            compiled=() if arguments.compile is None else arguments.compile or COMPILABLE,
            seconds=arguments.seconds,
            timed=not arguments.memory_only,
            resident=arguments.memory_only,
            profile=arguments.profile,
        )
        append_rows(arguments.out, WHOLE_MODEL_COLUMNS, rows)
        console.print(tables.whole_model_table(rows))
    for images in arguments.memory_batches:
        rows = bench_model(
            name,
            images,
            arguments.rank,
            device=arguments.device,
            amp=amp,
            impls=MEMORY_IMPLS,
            timed=False,
        )
        append_rows(arguments.out, WHOLE_MODEL_COLUMNS, rows)


if __name__ == "__main__":
    main()

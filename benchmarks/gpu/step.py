"""A whole training step by each backend of this package, beside PEFT LoRA and the frozen floor.

    python -m benchmarks.gpu.step [--model vit_base_patch16_224] [--images 64] [--rank 16]
        [--methods EFFT2 LoRA] [--backends cuda triton torch] [--strategy auto]
        [--modes eager graph compiled compiled-graph] [--frozen-dtype float32] [--rounds 15]
        [--no-gate] [--profile kernels.csv] [--out step.csv]

A step is zero_grad, forward under bfloat16 autocast, cross entropy, backward and AdamW on what
trains. AdamW is capturable and its learning rate 0: it does its work, and every step is the same.

eager            the calls themselves, host time included
graph            the whole step captured in one CUDA graph: what the GPU alone takes
compiled         the model under torch.compile; the floor trains its position embedding in place of
                 a hook that takes the gradient to the first block's input
compiled-graph   that step in a CUDA graph

A backend auto+pair_grad+before+gelu+gelu_grad, or with some of these, is `auto` with those steps of
the chain in CUDA C++ and the others not, whatever a measured table says
(ops/backends/cuda_chain.py). It is refused where there is no such step for the model and the GPU.

Each peer is timed in rounds with the floor in the same mode, so its row is there as soon as it was
measured; ratios are medians over the rounds. A peer that fails is reported, and the others go on.

The frozen weights are float32 as timm makes them, and every step of every peer casts them;
--frozen-dtype bfloat16 stores them so that none does. Autocast's own cache is left on: it holds
trainable weights alone and is emptied at the end of each forward, in a capture as outside.

Rows say in `gate` whether the peer matched float64 within twice plain torch's error. Those that
did not, or were not tried, are times to look at; no such row is to be committed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from efft_kernels import Adapter, FusedEFFTLinear
from efft_kernels.ops.backends import cuda_chain
from efft_kernels.ops.backends.cuda_chain import CHOSEN
from efft_kernels.ops.explain import explain
from efft_kernels.testing.error_budget import BUDGET

from .. import peers
from ..lib.profiles import ALL_KERNELS, kernel_rows, profile_step
from ..lib.rows import KERNEL_COLUMNS, STEP_COLUMNS, STEP_CSV, Row, append_rows, provenance
from ..lib.timing import captured, interleave, peak_mem_mb
from ..peers import FLOOR, PEFT_LORA, Peer
from ..whole_model import Gate, draw_batch, make_base, saved_mib, step_of, times

MODES = ("eager", "graph", "compiled", "compiled-graph")
AUTO = "auto"  # what a user gets: blocks in a chain where they can, else a backend per linear
PAIRS = "pairs"  # the same without chains: linears by themselves, no x kept that can be made again
FUSE = {AUTO: "auto", PAIRS: "pairs"}  # `attach`'s; "off" for a backend by name
BACKENDS = {
    "cuda": (AUTO, PAIRS, "cuda", "triton", "torch"),
    "cpu": (AUTO, "cpp", "torch"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AMP = torch.bfloat16

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Entry:
    """What one peer is made of; `backend` is empty for a peer that is not this package, and `AUTO`
    or `PAIRS` for one that chooses, with its blocks in a chain or without.
    """

    impl: str
    backend: str = ""
    strategy: str = "auto"

    @property
    def plain(self) -> str:
        """The backend without the steps asked for."""
        return self.backend.partition("+")[0]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, chains run with the steps asked for."""
        _, *asked = self.backend.split("+")
        if not asked:
            yield
            return
        options = {step: step in asked for step in CHOSEN}
        with mock.patch.object(cuda_chain, "chosen", lambda *_: options):
            yield

    def require_steps(self, base: Any, rank: int, device: str) -> None:
        """Raise unless the model's chain can run with the steps asked for."""
        _, *asked = self.backend.split("+")
        missing = set(asked) - set(steps_there(base, rank, device))
        if missing:
            raise ValueError(
                f"backend {self.backend}: there is no {', '.join(sorted(missing))} in CUDA C++ for"
                f" this model, rank {rank}, on this device"
            )

    @property
    def name(self) -> str:
        """The row's name, e.g. "EFFT2", "EFFT2 [cuda]" or "EFFT2 [cuda split]"."""
        if self.backend in ("", AUTO):
            return self.impl
        named = "" if self.strategy == "auto" else f" {self.strategy}"
        return f"{self.impl} [{self.backend}{named}]"

    def build(self, base: nn.Module, rank: int) -> Peer:
        """The peer over `base`, its layers bound to the backend and strategy."""
        self.require_steps(base, rank, next(base.parameters()).device.type)
        peer = peers.build(self.impl, base, rank, fuse=FUSE.get(self.plain, "off"))
        for layer in fused_layers(peer.model):
            layer.backend = AUTO if self.plain in FUSE else self.backend
            layer.strategy = self.strategy
        return Peer(self.name, peer.model, peer.method, peer.factors)


def steps_there(base: Any, rank: int, device: str) -> list[str]:
    """Those of CHOSEN that there are in CUDA C++ for a ViT here."""
    if device != "cuda":
        return []
    if hasattr(base, "blocks"):  # timm's
        hidden, k = base.blocks[0].mlp.fc1.weight.shape
    elif hasattr(base, "config"):  # Hugging Face's
        hidden, k = base.config.intermediate_size, base.config.hidden_size
    else:
        return []
    here = cuda_chain.takes(k, rank, torch.cuda.current_device())
    return cuda_chain.choices(k, hidden) if here else []


def fused_layers(model: nn.Module) -> list[FusedEFFTLinear]:
    """This package's layers in a model."""
    return [module for module in model.modules() if isinstance(module, FusedEFFTLinear)]


def entries(methods: Sequence[str], backends: Sequence[str], strategy: str) -> list[Entry]:
    """Floor, the first backend, PEFT, the other backends: what teaches most comes first."""
    ours = [[Entry(method, backend, strategy) for method in methods] for backend in backends]
    first, others = (ours[0], ours[1:]) if ours else ([], [])
    return [Entry(FLOOR), *first, Entry(PEFT_LORA), *(entry for own in others for entry in own)]


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store what does not train in `dtype`."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@dataclass
class Bench:
    """One model and batch, and what has been measured on them.

    Attributes:
        case: the columns that all rows share.
        failures: (peer, mode or what was tried) of all that raised.
    """

    base: nn.Module
    batch: tuple[Tensor, Tensor]
    rank: int
    device: str
    rounds: int
    modes: Sequence[str]
    case: dict[str, Any]
    gate: Gate | None
    write: Callable[[Row], None]
    failures: list[tuple[str, str]] = field(default_factory=list)
    _floors: dict[str, Callable[[], object]] = field(default_factory=dict)

    def run(self, entry: Entry) -> Peer | None:
        """Measure one peer in every mode; None where it cannot be built."""
        with entry.running():
            return self._run(entry)

    def _run(self, entry: Entry) -> Peer | None:
        peer = self.attempt(entry.name, "build", lambda: entry.build(self.base, self.rank))
        if peer is None:
            return None
        error: dict[str, str] = {}
        if peer.method is not None:
            error = {"gate": "off"}
            if self.gate is not None:
                error = self.attempt(entry.name, "gate", lambda: self._gated(peer)) or {
                    "gate": "failed"
                }
        step_of_model = functools.cache(functools.partial(self._step, peer))
        for mode in self.modes:
            self.attempt(
                entry.name,
                mode,
                functools.partial(self._measure, peer, mode, step_of_model, error),
            )
            release(self.device)
        if entry.backend:
            self.attempt(entry.name, "choices", lambda: self._print_choices(entry, peer))
        return peer

    def attempt(self, name: str, what: str, call: Callable[[], Any]) -> Any:
        """What `call` returns, or None with the end of its traceback printed."""
        try:
            return call()
        except Exception:
            last_frames = traceback.format_exc(limit=-6)
            print(f"{name}, {what} failed:\n{last_frames}", file=sys.stderr, flush=True)
            self.failures.append((name, what))
            return None

    def _gated(self, peer: Peer) -> dict[str, str]:
        assert self.gate is not None
        ratio = self.gate.ratio(peer)
        verdict = "passed" if ratio is not None and ratio <= BUDGET else "failed"
        print(f"{peer.name}: error {ratio:.3f} x plain torch's: gate {verdict}", flush=True)
        return {"err_ratio": f"{ratio:.3f}", "gate": verdict}

    def _measure(
        self, peer: Peer, mode: str, step_of_model: Callable[[bool], Step], error: dict[str, str]
    ) -> None:
        step = step_of_model(mode.startswith("compiled"))
        losses = [step()]
        call: Callable[[], object] = step
        peak = ""
        if mode.endswith("graph"):
            call = captured(lambda: losses.append(step()))
        elif self.device == "cuda":
            # Gradients of the step before would be there from the start, and freed at once.
            peer.model.zero_grad(set_to_none=True)
            peak = f"{peak_mem_mb(step, True):.1f}"
        if peer.name == FLOOR:
            self._floors[mode] = call
        calls = {peer.name: call}
        if mode in self._floors:
            calls[FLOOR] = self._floors[mode]
        timings = interleave(
            calls, seconds=0.0, device=self.device, fewest_rounds=self.rounds, warm_ups=2
        )
        self.write(
            {
                **self.case,
                "impl": peer.name,
                "mode": mode,
                **times(peer.name, timings),
                "saved_mib": saved_mib(peer, self.batch, AMP) if mode == "eager" else "",
                "trainable": sum(p.numel() for p in peer.trainable()),
                "peak_mem_mb": peak,
                # Of a graph the tensor that its replays write.
                "loss": f"{float(losses[-1]):.6f}",
                **error,
                **provenance(self.device, ("timm", "peft")),
            }
        )

    def _step(self, peer: Peer, compiled: bool) -> Step:
        model: Any = peer.model
        if compiled:
            model = torch.compile(unbroken_floor(self.base) if peer.name == FLOOR else model)
        runs = Peer(peer.name, model, peer.method, peer.factors)
        return step_of(runs, *self.batch, AMP, lr=0.0, capturable=self.device == "cuda")

    def _print_choices(self, entry: Entry, peer: Peer) -> None:
        """What `auto` takes for each kind of linear, forward / backward."""
        if entry.plain in FUSE:
            alone = Adapter(peer.model).describe().alone
            print(f"{entry.name}: {'its blocks may run in a chain' if alone is None else alone}")
            return
        if entry.strategy != "auto":
            return
        seen: dict[str, str] = {}
        rows = self.batch[0].shape[0] * tokens(peer.model)
        for layer in fused_layers(peer.model):
            with torch.no_grad():
                down, core, up = layer.current_factors()
            n, k = layer.weight.shape
            slices = up.shape[0] if core is None else core.shape[0]
            problem = (rows, k, n, slices, down.shape[1], AMP)
            options: Any = {"backend": entry.backend, "weight_dtype": layer.weight.dtype}
            forward, backward = (
                explain(*problem, **options, backward=backward).chosen for backward in (False, True)
            )
            seen[f"{k} to {n} in {slices}"] = f"{forward} / {backward}"
        print(f"{entry.name}: auto takes", *(f"{k}: {v};" for k, v in seen.items()), flush=True)


def unbroken_floor(base: nn.Module) -> nn.Module:
    """The floor for torch.compile: the gradient flows to the position embedding, which trains.

    The hook of the eager floor breaks the graph, and then Dynamo no longer compiles the forward of
    any other peer as a whole either.
    """
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    owner, name = position_embedding(model)
    setattr(owner, name, nn.Parameter(getattr(owner, name).detach().clone()))
    return model


def position_embedding(model: Any) -> tuple[nn.Module, str]:
    """The module that has it and its name there, in timm's ViT or Hugging Face's."""
    if hasattr(model, "pos_embed"):
        return model, "pos_embed"
    return model.vit.embeddings, "position_embeddings"


def tokens(model: Any) -> int:
    """Rows of a ViT's linears for one image."""
    if hasattr(model, "patch_embed"):
        count: int = model.patch_embed.num_patches + model.num_prefix_tokens
        return count
    owner, name = position_embedding(model)
    return getattr(owner, name).shape[1]  # type: ignore[no-any-return]


def release(device: str) -> None:
    """Give the memory of dropped graphs back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# Where a step's time goes


def profile_all(bench: Bench, measured: Sequence[tuple[Entry, Peer]], out: Path) -> list[Row]:
    """Append every peer's kernels to `out`; returns the rows.

    After all timing: CUPTI slows the host down once it was there. It is not torn down between the
    peers, because it crashes when it is set up again in a process with CUDA graphs.
    """
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    bench._floors.clear()
    release(bench.device)
    shared = {name: bench.case[name] for name in KERNEL_COLUMNS if name in bench.case}
    rows: list[Row] = []

    def add(peer: Peer) -> None:
        cuda = bench.device == "cuda"
        step = step_of(peer, *bench.batch, AMP, lr=0.0, capturable=cuda)
        totals = profile_step(step, bench.device)
        if not totals:
            raise RuntimeError("the profiler saw no kernel: is CUPTI there and allowed?")
        own = [
            {**shared, "impl": peer.name, **row, **provenance(bench.device)}
            for row in kernel_rows(totals)
        ]
        append_rows(out, KERNEL_COLUMNS, own)
        rows.extend(own)

    for entry, peer in measured:
        with entry.running():
            bench.attempt(peer.name, "profile", functools.partial(add, peer))
        release(bench.device)
    return rows


def summary(rows: Sequence[Row], kernels: Sequence[Row]) -> Table:
    """A line per peer: ms and ratio in each mode, memory, launches, the error."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    table = Table("one training step", *modes, "saved MiB", "peak MiB", "launches", "kernels ms")
    table.add_column("error, gate")
    launched = {row["impl"]: row for row in kernels if row["kernel"] == ALL_KERNELS}
    for impl in dict.fromkeys(row["impl"] for row in rows):
        own = {row["mode"]: row for row in rows if row["impl"] == impl}
        first = next(iter(own.values()))
        eager, all_kernels = own.get("eager", {}), launched.get(impl)
        table.add_row(
            escape(impl),
            *(_time_cell(own[mode]) if mode in own else "failed" for mode in modes),
            eager.get("saved_mib", ""),
            eager.get("peak_mem_mb", ""),
            str(all_kernels["calls"]) if all_kernels else "",
            f"{float(all_kernels['us']) / 1e3:.2f}" if all_kernels else "",
            f"{first.get('err_ratio', '')} {first.get('gate', '')}".strip(),
        )
    return table


def _time_cell(row: Row) -> str:
    ratio = f" ({row['ratio_to_floor']})" if row.get("ratio_to_floor") else ""
    return f"{row['ms_p50']} ms{ratio}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="vit_base_patch16_224", help="a timm ViT, or transformers.ViT-S/16"
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--methods", nargs="*", default=("EFFT2", "LoRA"), choices=peers.methods(16)
    )
    parser.add_argument(
        "--backends",
        nargs="*",
        help="default: auto, the same with all steps in CUDA C++, pairs cuda triton torch;"
        " or auto cpp torch",
    )
    parser.add_argument("--strategy", default="auto", help="of all peers of this package")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: eager graph, or eager")
    parser.add_argument("--frozen-dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-gate", action="store_true", help="time without comparing to float64")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="append the kernels to a CSV")
    parser.add_argument("--out", type=Path, default=STEP_CSV)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    found = parser.parse_args(arguments)
    cuda = found.device == "cuda"
    found.default_backends = found.backends is None
    found.backends = BACKENDS[found.device] if found.backends is None else found.backends
    found.modes = found.modes or (("eager", "graph") if cuda else ("eager",))
    for backend in found.backends:
        plain, *asked = backend.split("+")
        twice = len(set(asked)) < len(asked)
        if asked and (plain != AUTO or twice or not set(asked) <= set(CHOSEN)):
            parser.error(
                f"--backends must be auto+ with some of {', '.join(CHOSEN)}, got {backend}"
            )
    if not cuda and any(mode.endswith("graph") for mode in found.modes):
        parser.error("--modes graph and compiled-graph need --device cuda")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    base = make_base(options.model, options.device)
    store_frozen(base, DTYPES[options.frozen_dtype])
    batch = draw_batch(base, options.images, options.device)
    rows: list[Row] = []

    def write(row: Row) -> None:
        append_rows(options.out, STEP_COLUMNS, [row])
        rows.append(row)
        print(
            f"{time.perf_counter() - start:4.0f} s  {row['impl']}, {row['mode']}:"
            f" {_time_cell(row)}, loss {row['loss']}",
            flush=True,
        )

    bench = Bench(
        base,
        batch,
        options.rank,
        options.device,
        options.rounds,
        options.modes,
        case={
            "model": options.model,
            "dtype": "bfloat16 autocast",
            "frozen_dtype": options.frozen_dtype,
            "batch": options.images,
            "r": options.rank,
        },
        # One draw: a GPU's time is short.
        gate=None if options.no_gate else Gate(base, options.rank, batch, AMP, draws=1),
        write=write,
    )
    backends = list(options.backends)
    there = steps_there(base, options.rank, options.device)
    if options.default_backends and there:
        backends.insert(1, "+".join((AUTO, *there)))
    todo = entries(options.methods, backends, options.strategy)
    measured = [(entry, peer) for entry in todo if (peer := bench.run(entry)) is not None]
    kernels = profile_all(bench, measured, options.profile) if options.profile else []
    Console(width=None if sys.stdout.isatty() else 160).print(summary(rows, kernels))
    for name, what in bench.failures:
        print(f"FAILED {name}: {what}", flush=True)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())

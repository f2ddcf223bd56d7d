"""How many launches a training step of a whole model makes, counted without a GPU.

    python -m benchmarks.step_launches [--model vit_tiny_patch16_224] [--rank 16] [--out FILE.csv]

The model runs on the CPU with one image, while the Triton backend believes that it is on an H200:
its kernels are counted, not run. Every operator of torch that computes something counts as one
launch; views, allocations and questions about a tensor count as none. On a GPU some operators take
two launches and some none, so these numbers compare ways of adapting a model, and measure no time.
The optimizer's step is left out, dropout is off and the scale is 1: another scale adds one launch
forward and one backward to each group of linears, EFFT's factor dropout some fifty to the whole.
ViT-Ti, ViT-S and ViT-B make the same launches as long as `auto` takes the same strategies; the
smallest is counted in a minute. Ways:

    frozen, gradient to its input    the floor
    EFFT2, triton                    this package: `auto`, as on an H200
    EFFT2, eager torch               the same factors, one operator after the other
    PEFT LoRA                        the peft package on the same linears

each with bfloat16 weights, and with float32 weights under autocast.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from efft_kernels import use_backend
from efft_kernels.ops import cost_model, dispatch

from . import peers
from .host_overhead import host_only
from .lib.rows import PROVENANCE, RESULTS, append_rows, columns, provenance
from .whole_model import draw_batch, make_base

CSV = RESULTS / "launches.csv"
COLUMNS = columns(f"model impl weights r linears forward backward over_floor {PROVENANCE}")
OURS = "EFFT2"
NAMES = {OURS: "EFFT2, triton"}
EVERY = (peers.FLOOR, OURS, peers.EAGER_EFFT2, peers.PEFT_LORA)
EVERY_HALF = (peers.FLOOR, OURS, peers.PEFT_LORA)  # the eager formula wants one dtype
# They launch nothing. _unsafe_view's schema does not say that its result is a view.
NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
NOTHING += ("device", "_unsafe_view")
IMPLEMENTATIONS = {
    torch.ops.efft_kernels.low_rank_linear_fwd.default: dispatch._fwd,
    torch.ops.efft_kernels.low_rank_linear_bwd.default: dispatch._bwd,
}


def computes(func: Any) -> bool:
    """Whether an operator of torch launches something."""
    aliases = [result.alias_info for result in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and func._schema.name.split("::")[-1] not in NOTHING


class Launches(TorchDispatchMode):
    """Counts the operators that compute something, and the Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in IMPLEMENTATIONS:  # its own operators and kernels are what counts
            with self:
                return IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        self.count += computes(func)
        return func(*args, **(kwargs or {}))

    def kernel(self, *_: Any) -> None:
        self.count += 1


@contextlib.contextmanager
def counted_kernels(launches: Launches) -> Iterator[None]:
    """Triton's kernels are compiled for an H200 and counted in the place of running."""
    from efft_kernels.ops.backends.triton import launch_cache
    from efft_kernels.testing.fake_gpu import fake_gpu

    with (
        fake_gpu(90, 132, record=False),
        mock.patch.object(launch_cache, "_starter", lambda compiled, grid: launches.kernel),
        # The choice of strategy sees CPU tensors; it is to be the H200's.
        mock.patch.object(cost_model, "device_of", lambda _: cost_model.DEVICES["H200"]),
    ):
        cost_model.choose.cache_clear()
        try:
            yield
        finally:
            cost_model.choose.cache_clear()


def count(name: str, model: str, rank: int, autocast: bool) -> tuple[int, int]:
    """Launches of (forward and loss, backward)."""
    base = make_base(model, "cpu")
    if not autocast:
        base = base.bfloat16()
    peer = peers.build(name, base, rank)
    images, targets = draw_batch(base, 1, "cpu")
    images = images if autocast else images.bfloat16()
    launches = Launches()
    with contextlib.ExitStack() as stack:
        if name == OURS:
            stack.enter_context(counted_kernels(launches))
            stack.enter_context(use_backend("triton"))

        def step() -> tuple[int, int]:
            launches.count = 0
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(peer.model(images), targets)
            forward = launches.count
            loss.backward()
            return forward, launches.count - forward

        with launches:
            step()  # Triton compiles, and calls a kernel through its own way, not counted
            for parameter in peer.trainable():
                parameter.grad = None
            return step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, help="append the rows to this CSV as well")
    arguments = parser.parse_args()
    reason = host_only()
    if reason is not None:
        raise SystemExit(reason)
    rows = []
    linears = len(peers.find_sites(make_base(arguments.model, "cpu")))
    for autocast in (False, True):
        floor = 0
        for name in EVERY if autocast else EVERY_HALF:
            forward, backward = count(name, arguments.model, arguments.rank, autocast)
            floor = floor or forward + backward
            rows.append(
                {
                    "model": arguments.model,
                    "impl": NAMES.get(name, name),
                    "weights": "float32, autocast" if autocast else "bfloat16",
                    "r": arguments.rank,
                    "linears": linears,
                    "forward": forward,
                    "backward": backward,
                    "over_floor": forward + backward - floor,
                }
            )
    table = Table("weights", "impl", "forward", "backward", "over the floor", "a linear")
    for row in rows:
        table.add_row(
            *(str(row[c]) for c in ("weights", "impl", "forward", "backward", "over_floor")),
            f"{row['over_floor'] / linears:.1f}",  # type: ignore[operator]
        )
    Console().print(table)
    if arguments.out:
        where = provenance("cpu")
        append_rows(arguments.out, COLUMNS, [{**row, **where} for row in rows])


if __name__ == "__main__":
    main()

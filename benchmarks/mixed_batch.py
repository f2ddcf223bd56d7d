"""A batch of several tasks in one forward (`AdapterSet.tasks`) against looping over the tasks.

    python -m benchmarks.mixed_batch

ViT-S/16, inference, EFFT2; the floor is the same batch with a single task. Rows are written only if
the mixed forward gives each row what its own adapter gives alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

from efft_kernels import EFFT2, AdapterSet, attach

from .lib.rows import PROVENANCE, RESULTS, append_rows, columns, provenance
from .lib.timing import interleave

MIXED_BATCH_CSV = RESULTS / "mixed_batch.csv"
COLUMNS = columns(
    "model impl tasks batch r ms_p20 ms_p50 ms_p80 ratio_to_loop_p20 ratio_to_loop "
    f"ratio_to_loop_p80 max_abs_error {PROVENANCE}"
)
LOOP, MIXED, SINGLE = "loop over tasks", "mixed batch", "single task"


def measure(
    model_name: str, tasks: int, batch: int, rank: int, seconds: float, device: str
) -> list[dict[str, object]]:
    """Rows of the three ways for one number of tasks.

    Raises:
        AssertionError: the mixed forward is not what each row's adapter gives alone.
    """
    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=10).to(device).eval()
    adapter = attach(model, EFFT2(rank=rank))
    adapters = AdapterSet(adapter)
    for task in range(tasks):
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.02)
        adapters.add(f"task{task}")
    images = torch.randn(batch, 3, 224, 224, device=device)
    ids = [f"task{row % tasks}" for row in range(batch)]

    @torch.no_grad()
    def mixed() -> torch.Tensor:
        with adapters.tasks(ids):
            return model(images)

    @torch.no_grad()
    def loop() -> torch.Tensor:
        out = images.new_empty((batch, 10))
        for task in range(tasks):
            adapters.use(f"task{task}")
            out[task::tasks] = model(images[task::tasks])
        return out

    @torch.no_grad()
    def single() -> torch.Tensor:
        return model(images)

    error = float((mixed() - loop()).abs().max())
    assert error < 1e-3, f"the mixed batch is off by {error}"
    timings = interleave({LOOP: loop, MIXED: mixed, SINGLE: single}, seconds=seconds, device=device)
    rows = []
    for name in (LOOP, MIXED, SINGLE):
        time, ratio = timings.time(name), timings.ratio(name, LOOP)
        rows.append(
            {
                "model": model_name,
                "impl": name,
                "tasks": tasks,
                "batch": batch,
                "r": rank,
                "ms_p20": round(time.p20, 1),
                "ms_p50": round(time.p50, 1),
                "ms_p80": round(time.p80, 1),
                "ratio_to_loop_p20": round(ratio.p20, 3),
                "ratio_to_loop": round(ratio.p50, 3),
                "ratio_to_loop_p80": round(ratio.p80, 3),
                "max_abs_error": f"{error:.1e}",
                **provenance(device),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=MIXED_BATCH_CSV)
    arguments = parser.parse_args()
    table = Table("way", "tasks", "ms", "of the loop (p20 to p80)", title=arguments.model)
    for tasks in arguments.tasks:
        rows = measure(
            arguments.model,
            tasks,
            arguments.batch,
            arguments.rank,
            arguments.seconds,
            arguments.device,
        )
        append_rows(arguments.out, COLUMNS, rows)
        for row in rows:
            spread = f"{row['ratio_to_loop_p20']} to {row['ratio_to_loop_p80']}"
            ratio = f"{row['ratio_to_loop']} ({spread})"
            table.add_row(str(row["impl"]), str(tasks), str(row["ms_p50"]), ratio)
    Console().print(table)


if __name__ == "__main__":
    main()

"""Has anything become slower? Ratios of a quick fresh run against the last committed rows.

    python -m benchmarks.check [--seconds 60] [--models vit_small_patch16_224:8] [--band 0.10]

Times differ from day to day; ratios to the floor in the same rounds much less. A ratio fails when
its fresh median is above the committed one by more than the band, and the fresh 20th percentile is
above it as well, so that one disturbed round decides nothing. README.md beside this says how the
band was chosen. Rows of another kind of device are not compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from . import peers
from .lib.rows import WHOLE_MODEL_CSV, Row, committed_rows, device_kind, newest
from .tables import WHOLE_KEY
from .whole_model import bench_model

BAND = 0.10
IMPLS = (peers.FLOOR, "EFFT2", "LoRA", peers.PEFT_LORA)
# Only this package's own; PEFT is measured beside them to show what the machine is doing.
GUARDED = ("EFFT2", "LoRA")


@dataclass(frozen=True)
class Comparison:
    """A fresh ratio to the floor beside the committed one."""

    model: str
    impl: str
    committed: float
    fresh_p20: float
    fresh_p50: float
    commit: str

    @property
    def change(self) -> float:
        return self.fresh_p50 / self.committed - 1

    def slower(self, band: float) -> bool:
        """Whether it is guarded and beyond the band."""
        limit = self.committed * (1 + band)
        return self.impl in GUARDED and self.fresh_p50 > limit and self.fresh_p20 > self.committed


def compare(fresh: Sequence[Row], committed: Sequence[Row]) -> list[Comparison]:
    """Each fresh row that has a committed counterpart, the floor left out."""
    timed = newest((row for row in committed if row["ms_p50"]), WHOLE_KEY)
    known = {tuple(str(row[c]) for c in WHOLE_KEY): row for row in timed}
    found = []
    for row in fresh:
        before = known.get(tuple(str(row[c]) for c in WHOLE_KEY))
        if before is not None and row["impl"] != peers.FLOOR:
            found.append(
                Comparison(
                    row["model"],
                    row["impl"],
                    float(before["ratio_to_floor"]),
                    float(row["ratio_p20"]),
                    float(row["ratio_to_floor"]),
                    before["commit"],
                )
            )
    return found


def comparison_table(comparisons: Sequence[Comparison], band: float) -> Table:
    table = Table(
        "model",
        "step",
        "committed",
        "now (p20)",
        "change",
        "",
        title=f"of the floor; fails beyond +{100 * band:.0f}%",
    )
    for c in comparisons:
        verdict = "slower" if c.slower(band) else "ok" if c.impl in GUARDED else "not guarded"
        table.add_row(
            c.model,
            c.impl,
            f"{c.committed:.3f} ({c.commit})",
            f"{c.fresh_p50:.3f} ({c.fresh_p20:.3f})",
            f"{100 * c.change:+.1f}%",
            verdict,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=("vit_small_patch16_224:8",), help="timm name:images"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds for each model")
    parser.add_argument("--band", type=float, default=BAND)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    amp = torch.bfloat16 if device == "cuda" else None
    committed = [
        row for row in committed_rows(WHOLE_MODEL_CSV) if row["device"] == device_kind(device)
    ]
    if not committed:
        sys.exit(
            f"error: no committed rows for {device_kind(device)!r} in {WHOLE_MODEL_CSV.name};"
            " run `make bench` and commit them first"
        )
    comparisons: list[Comparison] = []
    for entry in arguments.models:
        name, _, images = entry.partition(":")
        fresh = bench_model(
            name,
            int(images or 8),
            arguments.rank,
            device=device,
            amp=amp,
            impls=IMPLS,
            seconds=arguments.seconds,
            fewest_rounds=5,
        )
        comparisons += compare(fresh, committed)
    if {c.impl for c in comparisons}.isdisjoint(GUARDED):
        sys.exit("error: none of the models has committed rows at this batch and rank")
    Console().print(comparison_table(comparisons, arguments.band))
    if any(c.slower(arguments.band) for c in comparisons):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Figures in the pages' text are those of the committed results, or counted anew."""

from __future__ import annotations

import csv
import json
import re

import pytest
import timm
import torch

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA, attach

from .pages import PAGES, ROOT, read

METHODS = {kind.__name__: kind for kind in (EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA)}
RESULTS = ROOT / "benchmarks" / "results"


def test_the_demo_s_table_is_the_committed_run() -> None:
    rows = {row["method"]: row for row in json.loads((RESULTS / "demo.json").read_text())["rows"]}
    names = {"linear probe": "linear", "full fine-tuning": "full"}
    names |= {"EFFT1, r = 8": "efft1", "EFFT2, r = 16": "efft2"}
    readme = read("README.md")
    for name, key in names.items():
        row = rows[key]
        mib = f"{row['saved_mib']:.1f}" if row["saved_mib"] > 1 else f"{row['saved_mib']:.2f}"
        top1 = f"{row['top1_mean']:.1f} ± {row['top1_std']:.1f}"
        assert f"| {name} | {row['trainable_params']:,} | {top1} | {mib} |\n" in readme


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_parameter_counts_are_those_of_vit_base(page: str) -> None:
    calls = re.findall(r"^\| (`[A-Z]\w+\(.*) \|.*\| ([\d,;]+.*) \|$", read(page), re.MULTILINE)
    assert len(calls) >= 5
    for spelled, counts in calls:
        methods = [eval(call, METHODS) for call in re.findall(r"`(.+?)`", spelled)]
        for method, count in zip(methods, counts.split("; "), strict=True):
            printed = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{3,}", count)]
            assert counted(method) == printed[0], method
            if len(printed) == 2:
                assert counted(type(method)(rank=32)) == printed[1], method


def counted(method: object) -> int:
    with torch.device("meta"):
        return attach(timm.create_model("vit_base_patch16_224"), method).num_parameters()


def test_the_mixed_batch_s_ratios_are_rows() -> None:
    with (RESULTS / "mixed_batch.csv").open() as file:
        rows = list(csv.DictReader(file))
    ratios = re.search(
        r"took (0\.\d\d)× of looping over 8 tasks and (0\.\d\d)×", read("docs/guides/many-tasks.md")
    )
    assert ratios
    for tasks, ratio in zip(("8", "16"), ratios.groups(), strict=True):
        own = [row for row in rows if (row["tasks"], row["batch"]) == (tasks, "16")]
        assert ratio in {f"{float(row['ratio_to_loop']):.2f}" for row in own}


def test_times_over_something_in_prose_are_of_pages_with_rows() -> None:
    """A ratio in a page's text is either in a generated table or in the page that explains rows."""
    allowed = {"docs/measured.md", "docs/guides/many-tasks.md", "docs/supported_models.md"}
    for page in set(PAGES) - allowed:
        text = re.sub(
            r"<!-- benchmarks:begin -->.*<!-- benchmarks:end -->", "", read(page), flags=re.S
        )
        assert not re.search(r"\d\.\d\d×", text), page

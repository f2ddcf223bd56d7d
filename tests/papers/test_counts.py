"""Every parameter count that the papers print, made again."""

from __future__ import annotations

import dataclasses

import pytest

from efft_kernels import EFFT1, EFFT2, FacTTT, KAdaptation
from efft_kernels.papers import results
from efft_kernels.papers.counts import VIT_B, Count, counts, factors, mean_over_tasks

EXACT = {
    ("efft_table_1", "full", "params_m"): 85_798_656,
    ("efft_table_1", "bitfit", "params_m"): 102_912,
    ("efft_table_1", "adapter", "params_m"): 156_768,
    ("efft_table_1", "adaptformer", "params_m"): 156_768,
    ("efft_table_1", "lora_r8", "params_m"): 294_912,
    ("efft_table_1", "noah", "params_m"): 361_531,
    ("efft_table_1", "ssf", "params_m"): 205_824,
    ("efft_table_1", "efft1_r16", "params_m"): 70_656,
    ("efft_table_1", "efft2_r16", "params_m"): 104_448,
    ("efft_table_1", "efft1_le32", "params_m"): 159_744,
    ("efft_table_1", "efft2_le32", "params_m"): 245_760,
    ("fact_table_1", "fact_tt_r4", "params_m"): 8_448,
    ("fact_table_1", "fact_tk_r8", "params_m"): 13_952,
    ("efft_table_1", "fact_tk_le32", "params_m"): 69_333,
    ("fact_table_1", "fact_tt_le16", "params_m"): 36_649,
    ("fact_table_1", "fact_tk_le32", "params_m"): 69_333,
    ("fact_table_2", "full", "params_m"): 86_743_224,
    ("fact_table_2", "bitfit", "params_m"): 200_760,
    ("fact_table_2", "fact_tt_r16", "params_m"): 135_168,
    ("efft_table_3", "full", "swin_t_params"): 27_519_354,
    ("efft_table_3", "full", "swin_s_params"): 48_837_258,
    ("efft_table_3", "full", "swin_l_params"): 194_995_476,
    ("efft_table_3", "full", "vit_l_params"): 303_301_632,
    ("efft_table_3", "full", "vit_h_params"): 630_764_800,
    ("efft_table_3", "lora", "swin_t_params"): 264_192,
    ("efft_table_3", "lora", "swin_s_params"): 364_032,
    ("efft_table_3", "lora", "swin_b_params"): 436_224,
    ("efft_table_3", "lora", "swin_l_params"): 1_469_952,
    ("efft_table_3", "lora", "vit_l_params"): 393_216,
    ("efft_table_3", "lora", "vit_h_params"): 655_360,
    ("efft_table_3", "efft2", "swin_t_params"): 275_400,
    ("efft_table_3", "efft2", "swin_s_params"): 369_920,
    ("efft_table_3", "efft2", "swin_b_params"): 489_600,
    ("efft_table_3", "efft2", "swin_l_params"): 1_479_680,
    ("efft_table_3", "efft2", "vit_l_params"): 357_888,
    ("efft_table_3", "efft2", "vit_h_params"): 598_016,
    ("kadaptation_table_2", "full", "clip_params"): 151_364_010,
    ("kadaptation_table_2", "full", "vit_params"): 86_697_617,
    ("kadaptation_table_2", "linear", "clip_params"): 86_697,
    ("kadaptation_table_2", "linear", "vit_params"): 129_961,
    ("kadaptation_table_2", "lora", "clip_params"): 185_001,
    ("kadaptation_table_2", "lora", "vit_params"): 277_417,
    ("kadaptation_table_2", "lora_fix", "clip_params"): 135_849,
    ("kadaptation_table_2", "lora_fix", "vit_params"): 203_689,
    ("kadaptation_table_2", "layernorm", "clip_params"): 89_769,
    ("kadaptation_table_2", "layernorm", "vit_params"): 131_497,
    ("kadaptation_table_2", "attention", "clip_params"): 41_042_601,
    ("kadaptation_table_2", "attention", "vit_params"): 28_478_377,
    ("kadaptation_table_2", "transformer_probing", "clip_params"): 86_697 + 3_152_384,
    ("kadaptation_table_2", "transformer_probing", "vit_params"): 129_961 + 7_087_872,
    ("kadaptation_table_2", "lepe", "clip_params"): 148_137,
    ("kadaptation_table_2", "lepe", "vit_params"): 129_961 + 92_160,
    ("kadaptation_table_2", "rpb", "clip_params"): 102_921,
    ("kadaptation_table_2", "rpb", "vit_params"): 129_961 + 104_976,
    ("kadaptation_table_2", "kadaptation", "vit_params"): 129_961 + 36_928,
}
WRONG_IN_PRINT = {
    ("efft_table_1", "efft1_r16", "params_m"),
    ("efft_table_1", "efft2_r16", "params_m"),
    ("efft_table_1", "ssf", "params_m"),  # counts the heads
    ("efft_table_3", "full", "swin_t_params"),
    ("efft_table_3", "full", "swin_b_params"),
    ("efft_table_3", "full", "swin_l_params"),  # 1.95B for 0.195B
    ("efft_table_3", "efft2", "swin_l_params"),  # counts slices that nothing reads
    ("kadaptation_table_2", "linear", "vit_params"),
    ("kadaptation_table_2", "bitfit", "vit_params"),
    ("kadaptation_table_2", "transformer_probing", "clip_params"),
    ("kadaptation_table_2", "transformer_probing", "vit_params"),
    ("kadaptation_table_2", "lepe", "vit_params"),
    ("kadaptation_table_2", "rpb", "vit_params"),
    ("kadaptation_table_2", "kadaptation", "vit_params"),
}


def _by_place() -> dict[tuple[str, str, str], Count]:
    return {(count.table, count.row, count.column): count for count in counts()}


def test_counts() -> None:
    counted = {place: count.counted for place, count in _by_place().items()}
    assert EXACT.items() <= counted.items()


def test_printed_counts_that_do_not_follow_are_named_in_the_tables() -> None:
    wrong = {place for place, count in _by_place().items() if count.verdict == "does not follow"}
    assert wrong == WRONG_IN_PRINT
    named = {
        (key, erratum.row, erratum.column)
        for key, table in results.tables().items()
        for erratum in table.errata
    }
    assert named >= wrong


@pytest.mark.parametrize(
    ("row", "column", "verdict"),
    [
        ("efft2_le32", "params_m", "truncated"),  # 245,760 as 0.245
        ("efft1_le32", "params_m", "rounded"),
        ("full", "params_m", "rounded"),
    ],
)
def test_verdicts(row: str, column: str, verdict: str) -> None:
    assert _by_place()["efft_table_1", row, column].verdict == verdict


@pytest.mark.parametrize(
    ("printed", "counted", "verdict"),
    [
        ("0.59M", 598_016, "truncated"),
        ("0.60M", 598_016, "rounded"),
        ("1.95B", 194_995_476, "does not follow"),
        ("185,001", 185_001, "rounded"),
        ("185,001", 185_002, "does not follow"),
        ("-", 0, "does not follow"),
    ],
)
def test_a_verdict_is_by_the_printed_digits(printed: str, counted: int, verdict: str) -> None:
    count = Count("efft_table_3", "full", "vit_h_params", printed, counted, "")
    assert count.verdict == verdict
    in_millions = dataclasses.replace(count, printed="0.598", column="params_m", counted=598_016)
    assert in_millions.verdict == "rounded"


def test_means_over_the_recipes_ranks_that_efft_does_not_print() -> None:
    means = {
        "efft1_le32": mean_over_tasks("efft1"),
        "efft2_le32": mean_over_tasks("efft2"),
    }
    assert means == {"efft1_le32": 109_847, "efft2_le32": 151_680}
    assert mean_over_tasks("efft2", cores="shared") == 116_832
    for erratum in results.table("efft_table_1").errata:
        if erratum.row in means:
            assert f"{means[erratum.row]:,}" in erratum.why


def test_formulas_of_the_texts() -> None:
    d, layers, r = 768, 12, 32
    assert factors(VIT_B, EFFT1(rank=r)) == 5 * d * r + 3 * layers * r**2
    assert factors(VIT_B, EFFT2(rank=r)) == 7 * d * r + 6 * layers * r**2
    assert factors(VIT_B, EFFT2(rank=r, cores="shared")) == 7 * d * r + 6 * r**2
    assert factors(VIT_B, FacTTT(rank=r)) == 2 * d * r + 12 * layers * r**2
    # KAdaptation's Table 1 has 2L(d/n + r/n) + n³ = 4,678 here.
    assert factors(VIT_B, KAdaptation(products=4, rank=1)) == 73_792
    assert factors(VIT_B, KAdaptation(products=4, rank=1, matrices=("q", "v"))) == 36_928
    assert 2 * layers * (d + 1) // 4 + 4**3 == 4_678
    # Ranks that would give what EFFT's Table 1 prints at r = 16.
    assert factors(VIT_B, EFFT1(rank=17)) == 75_684
    assert factors(VIT_B, EFFT2(rank=21)) == 144_648

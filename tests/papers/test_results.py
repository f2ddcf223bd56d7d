"""The papers' tables as data: complete, and wrong only where the papers are."""

from __future__ import annotations

import pytest

from efft_kernels.experiments.tasks import TASKS
from efft_kernels.papers import results


@pytest.mark.parametrize(
    ("key", "rows", "columns"),
    [
        ("efft_table_1", 15, 22),
        ("efft_table_2", 6, 4),
        ("efft_table_3", 4, 12),
        ("efft_table_4", 5, 4),
        ("efft_table_5", 4, 2),
        ("fact_table_1", 13, 21),
        ("fact_table_2", 6, 5),
        ("kadaptation_table_1", 4, 2),
        ("kadaptation_table_2", 13, 10),
        ("kadaptation_table_3", 4, 1),
    ],
)
def test_tables_are_complete(key: str, rows: int, columns: int) -> None:
    table = results.table(key)
    assert (len(table.rows), len(table.columns)) == (rows, columns)
    assert len(table.cells) == rows * columns
    for erratum in table.errata:
        assert erratum.row in table.rows
        if erratum.column is not None:
            assert table.cells[erratum.row, erratum.column] == erratum.printed
    numbers = [table.value(row, column) for row, column in table.cells]
    assert key == "kadaptation_table_1" or None not in numbers


@pytest.mark.parametrize(
    ("key", "row", "column", "value"),
    [
        ("efft_table_1", "efft2_le32", "group_average", 75.9),
        ("efft_table_1", "efft2_le32", "task_average", 73.6),
        ("efft_table_1", "ssf", "dsprites_ori", 54.9),
        ("efft_table_2", "fact_tt_r16", "average", 77.4),
        ("efft_table_3", "full", "swin_l_params", 1.95e9),
        ("efft_table_3", "linear", "vit_h", 59.0),
        ("efft_table_4", "0-2", "efft1_mhsa", 0.74),
        ("efft_table_4", "5-8", "efft1_ffn", -3.52),
        ("efft_table_5", "r1_eq_r2", "swin", 75.3),
        ("fact_table_1", "fact_tk_le32", "group_average", 75.6),
        ("fact_table_2", "full", "average", 75.0),
        ("fact_table_2", "full", "structured", 59.7),
        ("fact_table_2", "linear", "average", 62.6),
        ("fact_table_2", "vpt_shallow", "params_m", 0.003),
        ("kadaptation_table_2", "attention", "vit_params", 28_478_377),
        ("kadaptation_table_2", "bitfit", "clip_params", 233_873),
        ("kadaptation_table_3", "adapter_attention", "average", 54.1),
    ],
)
def test_values_as_printed(key: str, row: str, column: str, value: float) -> None:
    assert results.table(key).value(row, column) == value


def test_means_that_do_not_follow_from_the_printed_cells() -> None:
    wrong = {
        (key, mean.row, mean.column): (mean.printed, round(mean.computed, 2))
        for key, table in results.tables().items()
        for mean in table.means()
        if not mean.follows
    }
    assert wrong == {
        ("fact_table_1", "full", "group_average"): (68.9, 68.97),
        ("fact_table_1", "linear", "group_average"): (57.6, 57.68),
        ("fact_table_1", "adaptformer", "group_average"): (74.7, 74.75),
        ("fact_table_1", "lora_r8", "group_average"): (74.5, 74.60),
        ("kadaptation_table_2", "layernorm", "clip_average"): (75.2, 75.27),
        ("kadaptation_table_2", "attention", "vit_average"): (84.4, 84.47),
        ("kadaptation_table_2", "lepe", "vit_average"): (85.8, 85.9),
        ("kadaptation_table_2", "rpb", "vit_average"): (85.3, 85.37),
    }
    checked = sum(len(table.means()) for table in results.tables().values())
    assert checked == 2 * 15 + 6 + 13 + 6 + 2 * 13


def test_both_papers_agree_where_they_print_the_same_cells() -> None:
    efft, fact = results.table("efft_table_1"), results.table("fact_table_1")
    shared = [row for row in efft.rows if row in fact.rows]
    assert len(shared) == 10
    for row in shared:
        for column in ("params_m", *TASKS):
            assert efft.cells[row, column] == fact.cells[row, column]


def test_efft_takes_fact_tt_on_swin_for_fact_tk() -> None:
    efft, fact = results.table("efft_table_2"), results.table("fact_table_2")
    columns = ("average", "natural", "specialized", "structured")
    assert efft.values("fact_tt_r16", columns) == fact.values("fact_tt_r16", columns)
    (erratum,) = (item for item in efft.errata if item.column is None)
    assert (erratum.printed, erratum.right) == ("FacT_TK", "FacT-TT r=16")
    for row in ("full", "linear"):
        assert efft.value(row, "average") != fact.value(row, "average")


def _first(key: str, ours: list[str], others: list[str]) -> tuple[int, int]:
    """In how many tasks the best of `ours` is above all others, and in how many it ties."""
    table = results.table(key)

    def best(rows: list[str], task: str) -> float:
        return max(table.value(row, task) or 0 for row in rows)

    differences = [best(ours, task) - best(others, task) for task in TASKS]
    return sum(d > 0 for d in differences), sum(d == 0 for d in differences)


def test_claims_about_tasks_won() -> None:
    ours = ["efft1_le32", "efft2_le32"]
    others = [row for row in results.table("efft_table_1").rows if not row.startswith("efft")]
    assert _first("efft_table_1", ours, others) == (3, 1)
    assert _first("efft_table_1", ours, [row for row in others if row != "ssf"]) == (9, 2)
    assert _first("efft_table_1", ours, ["fact_tk_le32"])[0] == 13
    fact = ["fact_tt_le16", "fact_tk_le32"]
    before = [row for row in results.table("fact_table_1").rows if not row.startswith("fact")]
    assert _first("fact_table_1", fact, ["noah"])[0] == 11
    assert _first("fact_table_1", fact, before)[0] == 7
    (fourteen,) = (c.erratum for c in results.claims() if "14 of 19" in c.erratum.printed)
    assert fourteen.right == "3 of 19, and tied in 1 more"
    assert "9, tied in 2 more" in fourteen.why and "alone 13" in fourteen.why


def test_claims_about_sizes_that_follow() -> None:
    follow = {claim.erratum.printed for claim in results.claims() if claim.erratum.right is None}
    assert follow == {
        "0.28 % of the parameters",
        "search space reduced by 52 %",
        "better than NOAH in 11 of 19 tasks, the best of all in 7",
        "0.07 % and 0.17 % of the parameters",
    }
    assert 0.28 <= 100 * 245_760 / 85_798_656 < 0.29
    table = results.table("kadaptation_table_2")
    for tower, percent in (("clip", 0.07), ("vit", 0.17)):
        ours, full = (table.value(row, f"{tower}_params") for row in ("kadaptation", "full"))
        assert ours and full
        assert round(100 * ours / full, 2) == percent


def test_what_is_wrong_in_tables_that_no_formula_finds() -> None:
    swapped = {item.row: item.right for item in results.table("efft_table_5").errata}
    swin = results.table("efft_table_2")
    assert swapped["linear"] == swin.cells["linear", "average"] == "64.8"
    assert swapped["full"] == swin.cells["full", "average"] == "68.9"
    (layers,) = results.table("efft_table_4").errata
    assert (layers.printed, layers.right) == ("2-4", "3-4")
    formulas = {item.row: item.right for item in results.table("kadaptation_table_1").errata}
    assert formulas == {"lora": "4L r d_model", "kadaptation": "4L r d_model + n³"}


def test_an_unknown_table_and_a_cell_without_a_number() -> None:
    with pytest.raises(ValueError, match="table must be one of efft_table_1"):
        results.table("efft_table_9")
    formulas = results.table("kadaptation_table_1")
    assert formulas.value("lora", "parameters") is None
    with pytest.raises(ValueError, match="numbers in row 'lora'"):
        formulas.values("lora", ("parameters",))

"""Means over seeds, tasks and groups."""

from __future__ import annotations

import pytest

from efft_kernels.experiments.scores import Scores, estimate, published_vtab
from efft_kernels.experiments.tasks import TASKS
from efft_kernels.papers import results


def test_the_interval_is_students() -> None:
    found = estimate([70.0, 71.0, 75.0])
    # s = √7, t(0.975, 2) = 4.302653
    assert found.mean == 72.0
    assert found.half_width == pytest.approx(4.302653 * 7**0.5 / 3**0.5, rel=1e-6)
    assert str(found) == "72.0 ± 6.6"
    assert str(estimate([70.04])) == "70.0"
    with pytest.raises(ValueError, match="one per seed, got none"):
        estimate([])


def test_both_averages_of_the_published_rows_are_those_printed() -> None:
    table = results.table("efft_table_1")
    rows = published_vtab()
    assert len(rows) == 18
    for row in table.rows:
        group, overall = rows[row].group_average(TASKS), rows[row].task_average(TASKS)
        assert group and overall
        assert round(group.mean, 1) == pytest.approx(table.value(row, "group_average"), abs=0.051)
        assert round(overall.mean, 1) == pytest.approx(table.value(row, "task_average"), abs=0.051)


def test_averages_over_seeds_and_the_tasks_that_are_there() -> None:
    scores = Scores(
        "efft2",
        1.0,
        {
            1: {"cifar": 50.0, "svhn": 70.0, "kitti": 90.0},
            2: {"cifar": 54.0, "svhn": 74.0, "kitti": 94.0},
            3: {"cifar": 99.0},  # killed after its first task
        },
    )
    among = ["cifar", "svhn", "kitti"]
    natural, groups = scores.group("Natural", among), scores.group_average(among)
    overall = scores.task_average(among)
    assert natural and groups and overall
    assert (natural.mean, natural.seeds) == (62.0, 2)
    assert groups.mean == 77.0  # (62 + 92)/2
    assert overall.mean == 72.0
    assert scores.group("Specialized", among) is None
    assert scores.task_average(TASKS) is None
    cifar = scores.task("cifar")
    assert cifar and cifar.seeds == 3
    assert scores.tasks() == ["cifar"]
    assert scores.group_average(["cifar", "of the user's own"]) is None

"""The community's lists, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from efft_kernels.experiments.lists import (
    TEST,
    TRAIN,
    ListError,
    MissingTaskError,
    fewshot_lists,
    read_list,
    task_folder,
    vtab_lists,
)
from efft_kernels.experiments.tasks import ALIASES, CLASSES, FEWSHOT, TASKS, canonical, choose
from efft_kernels.papers.recipes import recipe_facts

Write = Callable[..., Path]


def test_tasks_are_those_of_the_recipes() -> None:
    facts = recipe_facts()
    assert tuple(TASKS) == tuple(task for group in facts["groups"].values() for task in group)
    assert len(TASKS) == 19
    for task in TASKS:
        assert CLASSES[task] == facts["tasks"][task]["classes"]
    assert [CLASSES[name] for name in FEWSHOT] == [100, 37, 101, 196, 102]


def test_an_alias_stands_for_one_task_of_its_suite() -> None:
    for suite, aliases in ALIASES.items():
        names = [name for task, others in aliases.items() for name in (task, *others)]
        plain = [name.replace("_", "") for name in names]
        assert len(set(plain)) == len(plain), suite
        for task, others in aliases.items():
            for name in others:
                assert canonical(name.upper().replace("_", "-"), suite) == task
    assert canonical("faces", "vtab") == "faces"


def test_choosing_tasks() -> None:
    assert choose(["all"], "vtab") == list(TASKS)
    assert choose(["CIFAR-100", "clevr-count", "faces"], "vtab") == [
        "cifar",
        "clevr_count",
        "faces",
    ]
    assert choose(["standford-cars"], "fewshot") == ["stanford_cars"]
    with pytest.raises(ValueError, match="each task once, got cifar100 and cifar for cifar"):
        choose(["cifar100", "cifar"], "vtab")
    with pytest.raises(ValueError, match="each task once, got all and sun for sun397"):
        choose(["all", "sun"], "vtab")
    with pytest.raises(ValueError, match="tasks must be names or all"):
        choose(["cifar", ""], "vtab")


def test_a_line_may_have_blanks_in_its_path_and_end_as_on_windows(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffimages/a b  c.png 3\r\n\r\nä\tö.png\t0 \r\nlast.png 12".encode())
    assert read_list(path, tmp_path) == (
        (str(tmp_path / "images/a b  c.png"), 3),
        (str(tmp_path / "ä\tö.png"), 0),
        (str(tmp_path / "last.png"), 12),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty list"),
        (b"\r\n \r\n", "got an empty list"),
        (b"a.png 0\na.png\n", "line 2 must be 'path label', labels from 0, got 'a.png'"),
        (b"a.png cat\n", "line 1 must be 'path label'"),
        (b"a.png -1\n", "line 1 must be 'path label'"),
        (b"a.png 1.0\n", "line 1 must be 'path label'"),
        (b"a.png 0\nb.png 1\na.png 1\n", "line 3 must give an image one label, got 1 for 'a.png'"),
        (b"/etc/a.png 0\n", "line 1 must be a path within"),
        (b"../a.png 0\n", "line 1 must be a path within"),
        (b"\xff\xfea.png 0\n", "must be text in UTF-8"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(ListError) as raised:
        read_list(path, tmp_path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_vtab(vtab_task: Write) -> None:
    root = vtab_task("CIFAR-100")
    lists = vtab_lists(root, "cifar")
    assert lists.root == root / "CIFAR-100"
    assert lists.classes == 100
    assert {name: len(samples) for name, samples in lists.lists.items()} == {
        "train800": 12,
        "val200": 6,
        "train800val200": 18,
        "test": 8,
    }
    assert lists.notes == ()
    splits = lists.splits(TRAIN, TEST)
    assert (len(splits.train), len(splits.val), len(splits.classes)) == (18, 8, 100)


def test_a_task_of_the_users_own_has_the_classes_of_its_lists(vtab_task: Write) -> None:
    assert vtab_lists(vtab_task("faces", classes=3), "faces").classes == 3


def test_the_digest_is_of_paths_and_labels_alone(vtab_task: Write, tmp_path: Path) -> None:
    root = vtab_task("kitti")
    before = vtab_lists(root, "kitti").digest
    root.rename(tmp_path / "moved")
    list_file = tmp_path / "moved/kitti/test.txt"
    list_file.write_bytes(list_file.read_bytes().replace(b"\n", b"\r\n"))
    assert vtab_lists(tmp_path / "moved", "kitti").digest == before
    list_file.write_text(list_file.read_text().replace("07.png 1", "07.png 0"))
    assert vtab_lists(tmp_path / "moved", "kitti").digest != before


def test_a_missing_folder_and_one_that_is_there_twice(vtab_task: Write) -> None:
    root = vtab_task("cifar")
    with pytest.raises(MissingTaskError, match=r"the folder svhn, got none .*svhn_cropped"):
        task_folder(root, "svhn", "vtab")
    (root / "cifar100").mkdir()
    with pytest.raises(ListError, match="must hold cifar once, got cifar and cifar100"):
        vtab_lists(root, "cifar")


def test_lists_that_are_missing(vtab_task: Write) -> None:
    root = vtab_task("kitti")
    (root / "kitti/val200.txt").unlink()
    lists = vtab_lists(root, "kitti")
    assert sorted(lists.lists) == ["test", "train800val200"]
    assert lists.notes == ("val200.txt not there: no epoch is chosen on validation images",)
    (root / "kitti/test.txt").unlink()
    with pytest.raises(ListError, match=r"kitti must hold test\.txt, got none"):
        vtab_lists(root, "kitti")


def test_a_label_outside_the_classes(vtab_task: Write) -> None:
    root = vtab_task("kitti")
    path = root / "kitti/val200.txt"
    path.write_text(path.read_text().replace("no 03.png 1", "no 03.png 4"))
    with pytest.raises(ListError, match=r"val200: labels must be within 0\.\.3, got 4 for .*no 03"):
        vtab_lists(root, "kitti")
    root = vtab_task("faces")
    path = root / "faces/test.txt"
    path.write_text(path.read_text().replace("no 03.png 1", "no 03.png 2"))
    with pytest.raises(ListError, match=r"test: labels must be within 0\.\.1, got 2"):
        vtab_lists(root, "faces")


def test_classes_that_were_never_learnt_are_told(vtab_task: Write) -> None:
    root = vtab_task("kitti")
    path = root / "kitti/val200.txt"
    path.write_text(path.read_text().replace("no 03.png 1", "no 03.png 3"))
    assert vtab_lists(root, "kitti").notes == (
        "1 classes of val200 are not in train800: never learnt",
    )


def test_images_that_are_trained_and_tested_on_are_told(vtab_task: Write) -> None:
    root = vtab_task("kitti")
    folder = root / "kitti"
    with (folder / "test.txt").open("a") as file:
        file.write("images/train/no 01.png 1\nimages/val/no 01.png 1\n")
    assert vtab_lists(root, "kitti").notes == (
        "2 images of test are in train800val200 too: its top-1 is too high",
    )


def test_an_image_that_is_listed_twice_counts_twice(fewshot_set: Write) -> None:
    root = fewshot_set("oxford-pets")  # whose published one-shot lists are like that
    path = root / "oxford-pets/annotations/train_meta.list.num_shot_1.seed_0"
    path.write_text(path.read_text() + "\n" + path.read_text())
    lists = fewshot_lists(root, "pets", 1, 0)
    assert len(lists.lists[TRAIN]) == 4
    assert lists.notes == (
        "2 lines of train800val200 repeat an image: it counts as often as listed",
    )


def test_one_class_alone(vtab_task: Write) -> None:
    with pytest.raises(ListError, match="faces, train800val200: labels must be of at least 2"):
        vtab_lists(vtab_task("faces", classes=1), "faces")


@pytest.mark.parametrize("images", ["images", "."])
def test_fewshot(fewshot_set: Write, images: str) -> None:
    root = fewshot_set("standford-cars", images)
    lists = fewshot_lists(root, "stanford_cars", 2, 0)
    assert lists.root == root / "standford-cars" / images
    assert {name: len(samples) for name, samples in lists.lists.items()} == {TRAIN: 4, TEST: 8}
    assert all(Path(path).is_file() for path, _ in lists.lists[TEST])
    with pytest.raises(ListError, match=r"train_meta\.list\.num_shot_4\.seed_0, got none"):
        fewshot_lists(root, "stanford_cars", 4, 0)

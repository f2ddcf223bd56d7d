"""Reading, checking and splitting image folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from efft_kernels.training import images
from efft_kernels.training.reproducible import epoch_seed


def make_images(root: Path, **counts: int) -> Path:
    """root/NAME/000.png ... for each NAME=count; every image has a colour of its own."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            colour = (40 * label, 3 * index, 100)
            Image.new("RGB", (13, 11), colour).save(root / name / f"{index:03}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", cat=20, dog=10, emu=5)


def test_hold_out_is_stratified_and_complete(folder: Path) -> None:
    splits = images.open_splits(folder, val_split=0.2, seed=3)
    assert splits.classes == ("cat", "dog", "emu")
    assert Counter(label for _, label in splits.val) == {0: 4, 1: 2, 2: 1}
    assert not set(splits.train) & set(splits.val)
    assert len(splits.train) + len(splits.val) == 35


def test_hold_out_depends_on_the_seed_alone(folder: Path) -> None:
    first = images.open_splits(folder, val_split=0.2, seed=3)
    assert first == images.open_splits(folder, val_split=0.2, seed=3)
    assert first.val != images.open_splits(folder, val_split=0.2, seed=4).val


def test_fingerprint_survives_a_move_and_notices_a_new_image(folder: Path) -> None:
    before = images.open_splits(folder, val_split=0.2, seed=0).fingerprint()
    moved = folder.rename(folder.with_name("moved"))
    assert images.open_splits(moved, val_split=0.2, seed=0).fingerprint() == before
    (moved / "cat" / "000.png").rename(moved / "cat" / "new.png")
    assert images.open_splits(moved, val_split=0.2, seed=0).fingerprint() != before


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    make_images(tmp_path / "train", cat=3, dog=2)
    make_images(tmp_path / "val", cat=1, dog=1)
    splits = images.open_splits(tmp_path, val_split=0.5, seed=0)
    assert (len(splits.train), len(splits.val)) == (5, 2)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "without any folder"),
        ({"cat": 4}, "at least 2 classes, got 1"),
        ({"cat": 4, "dog": 0}, "got none in .*dog"),
        ({"cat": 4, "dog": 1}, "at least 2 images .* got 1 in dog"),
        ({"cat": 2, "dog": 2}, "val_split must leave"),
        ({"train": 4}, "'train' but no 'val'"),
    ],
)
def test_unusable_folders_are_named(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    root = make_images(tmp_path / "images", **counts)
    root.mkdir(exist_ok=True)
    if "train" in counts:
        make_images(root / "train", cat=2, dog=2)
    with pytest.raises(ValueError, match=message):
        images.open_splits(root, val_split=0.1, seed=0)


def test_a_missing_folder_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing there"):
        images.read_folder(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file"):
        images.read_folder(tmp_path / "file")


def test_train_and_val_must_have_the_same_classes(tmp_path: Path) -> None:
    make_images(tmp_path / "train", cat=2, dog=2)
    make_images(tmp_path / "val", cat=1, emu=1)
    with pytest.raises(ValueError, match="difference in dog, emu"):
        images.open_splits(tmp_path, val_split=0.5, seed=0)


def test_given_classes_number_the_images(folder: Path) -> None:
    (folder / "cat").rename(folder.parent / "cat")
    _, samples = images.read_folder(folder, classes=["ant", "cat", "dog", "emu"])
    assert Counter(label for _, label in samples) == {2: 10, 3: 5}
    with pytest.raises(ValueError, match=r"only the classes ant, dog, got .* with emu"):
        images.read_folder(folder, classes=["ant", "dog"])


def test_an_image_left_out_does_not_shift_the_split(folder: Path) -> None:
    bad = damage(folder)
    asked: list[int] = []

    def leave_out(samples: Sequence[images.Sample]) -> list[str]:
        asked.append(len(samples))
        return bad

    splits = images.open_splits(folder, val_split=0.2, seed=3, leave_out=leave_out)
    assert asked == [35]
    assert splits.left_out == ("cat/003.png", "dog/004.png")
    for path in bad:
        Path(path).unlink()
    without = images.open_splits(folder, val_split=0.2, seed=3)
    assert (splits.train, splits.val) == (without.train, without.val)
    assert splits.fingerprint() == without.fingerprint()
    assert Counter(label for _, label in splits.val) == {0: 4, 1: 2, 2: 1}


def test_train_and_val_folders_lose_the_images_left_out(tmp_path: Path) -> None:
    for part in ("train", "val"):
        make_images(tmp_path / part, cat=3, dog=2)
    gone = [str(tmp_path / "train/cat/001.png"), str(tmp_path / "val/dog/000.png")]
    splits = images.open_splits(tmp_path, val_split=0.5, seed=0, leave_out=lambda samples: gone)
    assert (len(splits.train), len(splits.val)) == (4, 4)
    assert splits.left_out == ("train/cat/001.png", "val/dog/000.png")
    with pytest.raises(ValueError, match="readable image, got none in cat"):
        images.open_splits(
            tmp_path,
            val_split=0.5,
            seed=0,
            leave_out=lambda samples: [path for path, _ in samples if "val/cat" in path],
        )


@pytest.mark.parametrize("target", ["..", ".", "../dog", "../..", "../../images/emu", "sub"])
def test_a_link_that_leads_back_is_named_and_nothing_counts_twice(
    folder: Path, target: str
) -> None:
    make_images(folder / "cat", sub=2)
    _, plain = images.read_folder(folder)
    (folder / "cat" / "link").symlink_to(target)
    (folder / "dog" / "link").symlink_to("..")
    notes: list[str] = []
    classes, samples = images.read_folder(folder, notify=notes.append)
    assert classes == ["cat", "dog", "emu"]
    assert samples == plain
    assert [note.split(" leads back to ")[0] for note in notes] == [
        str(folder / "cat" / "link"),
        str(folder / "dog" / "link"),
    ]
    (folder / "dog" / "link").unlink()
    with pytest.warns(UserWarning, match=r"cat.link leads back to"):
        images.read_folder(folder)


def test_links_to_other_places_are_followed_once(folder: Path, tmp_path: Path) -> None:
    store = make_images(tmp_path / "store", x=3, y=4)
    (store / "x" / "back").symlink_to(store)
    (folder / "cat" / "more").symlink_to(store / "x")
    (folder / "fox").symlink_to(store / "y")
    (tmp_path / "alias").symlink_to(folder)
    notes: list[str] = []
    classes, samples = images.read_folder(tmp_path / "alias", notify=notes.append)
    assert classes == ["cat", "dog", "emu", "fox"]
    assert Counter(label for _, label in samples) == {0: 23, 1: 10, 2: 5, 3: 4}
    assert len({Path(path).resolve() for path, _ in samples}) == 42
    assert len(notes) == 1


def damage(folder: Path) -> list[str]:
    text = folder / "cat" / "003.png"
    text.write_text("not an image")
    truncated = folder / "dog" / "004.png"
    truncated.write_bytes(truncated.read_bytes()[:45])
    return sorted([str(text), str(truncated)])


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_found_and_named(folder: Path, workers: int) -> None:
    bad = damage(folder)
    _, samples = images.read_folder(folder)
    counted = []
    unreadable = images.find_unreadable(
        samples, workers=workers, on_check=lambda done, total: counted.append((done, total))
    )
    assert sorted(unreadable) == bad
    assert counted[-1] == (35, 35)
    with pytest.raises(images.UnreadableImageError, match=r"2 unreadable: .*003\.png.*--skip-bad"):
        images.refuse_or_report(unreadable, skip=False, notify=pytest.fail)
    notes: list[str] = []
    images.refuse_or_report(unreadable, skip=True, notify=notes.append)
    assert notes[0].startswith("skipped 2 unreadable images: cannot read image")
    assert len(images.without(samples, unreadable, ("cat", "dog", "emu"))) == 33


def test_pipes_links_to_nothing_and_bombs_are_unreadable(folder: Path) -> None:
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "cat" / "nowhere.png").symlink_to("absent")
    (folder / "cat" / "self.png").symlink_to("self.png")
    bomb = b"P6 99999 99999 255 " + bytes(100)
    (folder / "cat" / "bomb.ppm").write_bytes(bomb)
    (folder / "cat" / "folder.png").mkdir()
    _, samples = images.read_folder(folder)
    unreadable = images.find_unreadable(samples)
    assert {Path(path).name for path in unreadable} == {
        "pipe.png",
        "nowhere.png",
        "self.png",
        "bomb.ppm",
    }
    assert "no regular file" in unreadable[str(folder / "cat" / "pipe.png")]


def test_a_class_may_not_lose_all_its_images() -> None:
    samples = [("a.png", 0), ("b.png", 1)]
    with pytest.raises(ValueError, match="readable image, got none in dog"):
        images.without(samples, {"b.png": "damaged"}, ("cat", "dog"))


def test_a_loader_names_an_image_that_breaks_later(folder: Path) -> None:
    _, samples = images.read_folder(folder)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    _, transform = images.make_transforms(model, img_size=32)
    damage(folder)
    loader = images.make_loader(samples, transform, batch_size=8, workers=0, shuffle=False)
    with pytest.raises(images.UnreadableImageError, match=r"003\.png"):
        list(loader)


def test_transforms_follow_the_model_and_keep_the_whole_image() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    train, evaluation = images.make_transforms(model, img_size=32)
    picture = Image.new("RGB", (64, 16), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 8, 16))  # a black left edge, which a crop would lose
    pixels = evaluation(picture)
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, :, :2].mean() < -0.9  # this model's mean and std are 0.5: black is -1
    assert pixels[:, :, -2:].mean() > 0.9
    assert torch.equal(train(picture), pixels)


@pytest.mark.parametrize("augment", [False, True])
def test_pixels_are_normalised_as_the_model_s_own(augment: bool) -> None:
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    assert mean != (0.5, 0.5, 0.5) and std != mean
    black = Image.new("RGB", (40, 40))
    for transform in images.make_transforms(model, img_size=32, augment=augment):
        pixels = transform(black)
        for channel in range(3):
            expected = torch.full((32, 32), -mean[channel] / std[channel])
            torch.testing.assert_close(pixels[channel], expected, rtol=1e-5, atol=1e-5)


def test_the_image_size_is_the_model_s_own_unless_given() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1)
    for options, size in (({}, 224), ({"img_size": 64}, 64)):
        for augment in (False, True):
            for transform in images.make_transforms(model, augment=augment, **options):
                assert transform(Image.new("RGB", (30, 20))).shape == (3, size, size)


def test_augmentation_is_random_and_seeded(folder: Path) -> None:
    _, samples = images.read_folder(folder)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    train, _ = images.make_transforms(model, img_size=32, augment=True)
    loader = images.make_loader(samples, train, batch_size=35, workers=1, shuffle=True)

    def batch(epoch: int) -> torch.Tensor:
        loader.generator.manual_seed(epoch_seed(7, epoch))
        return next(iter(loader))[0]

    assert torch.equal(batch(1), batch(1))
    assert not torch.equal(batch(1), batch(2))

"""The community's lists of images: a file per split, a line "path label" per image.

VTAB-1K:   ROOT/TASK/{train800,val200,train800val200,test}.txt, paths relative to ROOT/TASK.
few-shot:  ROOT/SET/annotations/train_meta.list.num_shot_N.seed_S and test_meta.list, paths relative
           to ROOT/SET/images, or to ROOT/SET where there is none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from ..training.images import ImageSplits, Sample
from .tasks import ALIASES, CLASSES, canonical

SELECT_TRAIN, SELECT_VAL, TRAIN, TEST = "train800", "val200", "train800val200", "test"


class ListError(ValueError):
    """A folder or a list of images that cannot be used; it names the file and the line."""


class MissingTaskError(ListError):
    """There is no folder of a task."""


@dataclass(frozen=True)
class ImageLists:
    """The lists of one task.

    Attributes:
        root: the folder that the images lie in.
        classes: how many; labels count from 0.
        lists: `SELECT_TRAIN`, `SELECT_VAL`, `TRAIN`, `TEST` → (path, label) of its images; the
            first two may be missing.
        notes: what the user should know of them.
    """

    root: Path
    classes: int
    lists: Mapping[str, tuple[Sample, ...]]
    notes: tuple[str, ...] = ()

    def splits(self, train: str, val: str) -> ImageSplits:
        """Two of the lists as a training run takes them."""
        names = tuple(str(label) for label in range(self.classes))
        return ImageSplits(self.root, names, self.lists[train], self.lists[val], held_out=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all paths and labels, wherever the root lies."""
        start = len(str(self.root)) + 1
        parts = {
            name: [(path[start:].replace(os.sep, "/"), label) for path, label in samples]
            for name, samples in self.lists.items()
        }
        content = json.dumps([self.classes, parts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def task_folder(root: Path, task: str, suite: str) -> Path:
    """The folder of a task under its own name or one of its aliases, in any spelling.

    Raises:
        MissingTaskError: there is none.
        ListError: there is more than one.
    """
    found = sorted(
        child
        for child in (root.iterdir() if root.is_dir() else ())
        if child.is_dir() and canonical(child.name, suite) == task
    )
    if len(found) > 1:
        names = " and ".join(child.name for child in found)
        raise ListError(f"{root} must hold {task} once, got {names}")
    if not found:
        others = ", ".join(ALIASES[suite].get(task, ()))
        also = f", or of another: {others}" if others else ""
        raise MissingTaskError(f"{root} must hold the folder {task}, got none of that name{also}")
    return found[0]


def vtab_lists(root: Path, task: str) -> ImageLists:
    """The lists of a VTAB-1K task, or of a task of the user's own in the same layout.

    Raises:
        ListError: no folder, no train800val200.txt or test.txt, or a line that is none.
    """
    folder = task_folder(root, task, "vtab")
    files = {name: folder / f"{name}.txt" for name in (SELECT_TRAIN, SELECT_VAL, TRAIN, TEST)}
    missing = [path.name for path in files.values() if not path.is_file()]
    if needed := [name for name in missing if name in (f"{TRAIN}.txt", f"{TEST}.txt")]:
        raise ListError(f"{folder} must hold {' and '.join(needed)}, got none")
    notes = []
    if missing:
        notes.append(f"{' and '.join(missing)} not there: no epoch is chosen on validation images")
        files = {name: files[name] for name in (TRAIN, TEST)}
    return _checked(folder, task, {n: read_list(path, folder) for n, path in files.items()}, notes)


def fewshot_lists(root: Path, task: str, shots: int, seed: int) -> ImageLists:
    """The lists of a few-shot set, for one number of shots and one seed.

    Raises:
        ListError: no folder, no list, or a line that is none.
    """
    folder = task_folder(root, task, "fewshot")
    annotations = folder / "annotations"
    files = {
        TRAIN: annotations / f"train_meta.list.num_shot_{shots}.seed_{seed}",
        TEST: annotations / "test_meta.list",
    }
    if missing := [path.name for path in files.values() if not path.is_file()]:
        raise ListError(f"{annotations} must hold {' and '.join(missing)}, got none")
    # In the release, Stanford Cars' paths begin in the set's folder, all others' in its images.
    images = folder / "images"
    first = Path(read_list(files[TEST], folder)[0][0])
    root = images if images.is_dir() and not first.exists() else folder
    return _checked(root, task, {name: read_list(path, root) for name, path in files.items()}, [])


def read_list(path: Path, root: Path) -> tuple[Sample, ...]:
    """The images of one list.

    Blanks within a path are part of it: the label is what stands after the last one. Line ends may
    be Windows', and empty lines count for nothing. An image that is listed twice counts twice.

    Args:
        path: the list.
        root: what its paths are relative to.

    Raises:
        ListError: a line without a label, a label that is no whole number from 0, a path out of
            `root`, an image under two labels, or no line at all.
    """
    stat = path.stat()
    return _read_list(path, root, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _read_list(path: Path, root: Path, mtime_ns: int, size: int) -> tuple[Sample, ...]:
    """`read_list`, once for a file that stays as it is: a set's test list goes with all others."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ListError(f"{path} must be text in UTF-8 ({error})") from error
    samples: list[Sample] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.rsplit(maxsplit=1)
        if not fields:
            continue
        where = f"{path}, line {number}"
        if len(fields) < 2 or not (fields[1].isascii() and fields[1].isdecimal()):
            got = line.strip()[:80]
            raise ListError(f"{where} must be 'path label', labels from 0, got {got!r}")
        name, label = os.path.normpath(fields[0].strip()), int(fields[1])
        if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            raise ListError(f"{where} must be a path within {root}, got {name!r}")
        image = os.path.join(root, name)
        if labels.setdefault(image, label) != label:
            raise ListError(f"{where} must give an image one label, got {label} for {name!r}")
        samples.append((image, label))
    if not samples:
        raise ListError(f"{path} must list images, got an empty list")
    return tuple(samples)


def _checked(
    root: Path, task: str, lists: Mapping[str, tuple[Sample, ...]], notes: Sequence[str]
) -> ImageLists:
    """Check the labels against the task's classes, or those of a task that is not known."""
    train_labels = {label for _, label in lists[TRAIN]}
    classes = CLASSES.get(task, max(train_labels) + 1)
    if classes < 2:
        raise ListError(f"{root.name}, {TRAIN}: labels must be of at least 2 classes, got 0 alone")
    for name, samples in lists.items():
        for path, label in samples:
            if label >= classes:
                raise ListError(
                    f"{root.name}, {name}: labels must be within 0..{classes - 1},"
                    f" got {label} for {path}"
                )
    told = list(notes)
    for name, samples in lists.items():
        if again := len(samples) - len(dict(samples)):  # as in NOAH's one-shot lists of Pets
            told.append(f"{again} lines of {name} repeat an image: it counts as often as listed")
    for name, of in ((SELECT_VAL, SELECT_TRAIN), (TEST, TRAIN)):
        if name in lists:
            never_seen = {label for _, label in lists[name]} - {label for _, label in lists[of]}
            if never_seen:
                told.append(f"{len(never_seen)} classes of {name} are not in {of}: never learnt")
            if both := dict(lists[name]).keys() & dict(lists[of]).keys():
                told.append(f"{len(both)} images of {name} are in {of} too: its top-1 is too high")
    return ImageLists(root, classes, lists, tuple(told))

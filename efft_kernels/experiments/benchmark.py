"""Which cells a benchmark has, and running those that the ledger does not have."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.methods import TRAINABLE
from ..training.recipe import recipe_for
from ..training.settings import TrainSettings, require
from .cell import Cell, Notify
from .ledger import Ledger, key
from .lists import (
    SELECT_TRAIN,
    TRAIN,
    ImageLists,
    ListError,
    MissingTaskError,
    fewshot_lists,
    task_folder,
    vtab_lists,
)
from .scheduler import HERE, Failure, Scheduler
from .tasks import TASKS


@dataclass(frozen=True)
class Choices:
    """What every cell of a benchmark is told.

    Attributes:
        methods: keys of `TRAINABLE`.
        given: settings of `TrainSettings` that win over the recipe's. A learning rate below the
            end of the recipe's cosine is that end too, unless `min_lr` is given.
        options: the methods' options that win over the recipe's, for the methods that have them.
        test_every: epochs between two measurements on the test images.
        checkpoint_sha256: `file_digest` of given["checkpoint"].
    """

    methods: tuple[str, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    test_every: int = 10
    checkpoint_sha256: str | None = None

    def __post_init__(self) -> None:
        require("methods", bool(self.methods), "names of methods", "none")
        for method in self.methods:
            require("methods", method in TRAINABLE, f"of {', '.join(TRAINABLE)}", repr(method))
        twice = len(set(self.methods)) < len(self.methods)
        require("methods", not twice, "each named once", ",".join(self.methods))
        require("test_every", self.test_every >= 1, "at least 1", self.test_every)


@dataclass(frozen=True)
class Plan:
    """The cells of a benchmark, and what is left out of it.

    Attributes:
        suite: "vtab" or "fewshot".
        cells: in the order in which they run.
        missing: tasks that have no folder.
        left_out: what → why, where the lists cannot be used.
    """

    suite: str
    cells: tuple[Cell, ...]
    missing: tuple[str, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """What is known after a benchmark ran.

    Attributes:
        finished: cells with their results.
        failed: cell's title → why.
    """

    finished: tuple[tuple[Cell, dict[str, Any]], ...]
    failed: Mapping[str, str]


def plan_vtab(
    root: Path, tasks: Sequence[str], seeds: Sequence[int], choices: Choices, notify: Notify
) -> Plan:
    """Tasks × methods × seeds.

    Args:
        root: folder of the tasks' folders.
        tasks: as `choose` names them.
        seeds: of the trainings.
        choices: the methods and their settings.
        notify: called with a line on what the user should know of a task's lists.

    Raises:
        ValueError: a setting that makes no sense.
    """
    found = read_tasks(root, tasks, notify)
    cells = [
        cell
        for task, lists in found.lists.items()
        for cell in make_cells("vtab", task, lists, seeds, choices)
    ]
    return Plan("vtab", tuple(cells), found.missing, found.left_out)


@dataclass(frozen=True)
class Found:
    """What a folder holds of some tasks.

    Attributes:
        lists: task → its images.
        missing, left_out: as in `Plan`.
    """

    lists: Mapping[str, ImageLists]
    missing: tuple[str, ...]
    left_out: Mapping[str, str]


def read_tasks(root: Path, tasks: Sequence[str], notify: Notify) -> Found:
    """The lists of tasks in VTAB-1K's layout; the arguments are `plan_vtab`'s.

    Raises:
        ValueError: there is no such folder.
    """
    _check_folder(root)
    found: dict[str, ImageLists] = {}
    missing: list[str] = []
    left_out: dict[str, str] = {}
    for task in tasks:
        try:
            found[task] = vtab_lists(root, task)
        except MissingTaskError:
            missing.append(task)
            continue
        except ListError as error:
            left_out[task] = str(error)
            continue
        for note in found[task].notes:
            notify(f"{task}: {note}")
    return Found(found, tuple(missing), left_out)


def plan_fewshot(
    root: Path,
    tasks: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    choices: Choices,
    notify: Notify,
) -> Plan:
    """Sets × shots × methods × seeds; a seed is both the list's and the training's.

    Args:
        shots: images a class.
        (others): as for `plan_vtab`.

    Raises:
        ValueError: a setting that makes no sense.
    """
    _check_folder(root)
    cells: list[Cell] = []
    missing: list[str] = []
    left_out: dict[str, str] = {}
    for task in tasks:
        try:
            task_folder(root, task, "fewshot")
        except MissingTaskError:
            missing.append(task)
            continue
        except ListError as error:
            left_out[task] = str(error)
            continue
        for count in dict.fromkeys(shots):
            for seed in dict.fromkeys(seeds):
                try:
                    lists = fewshot_lists(root, task, count, seed)
                except ListError as error:
                    left_out[f"{task}, {count} shots, seed {seed}"] = str(error)
                    continue
                for note in lists.notes:
                    notify(f"{task}, {count} shots, seed {seed}: {note}")
                cells += make_cells("fewshot", task, lists, [seed], choices, count)
    return Plan("fewshot", tuple(cells), tuple(missing), left_out)


def _check_folder(root: Path) -> None:
    what = "a file" if root.exists() else "nothing there"
    require("data", root.is_dir(), "a folder of tasks' folders", f"{root} ({what})")


def make_cells(
    suite: str,
    task: str,
    lists: ImageLists,
    seeds: Sequence[int],
    choices: Choices,
    shots: int | None = None,
) -> list[Cell]:
    """The cells of one task: methods × seeds, by the recipe.

    Args:
        suite: "vtab" or "fewshot".
        task: its name.
        lists: its images.
        seeds: of the trainings.
        choices: the methods and their settings.
        shots: images a class, of a few-shot set.

    Raises:
        ValueError: a setting that makes no sense.
    """
    published = task if suite == "vtab" and task in TASKS else None
    found = []
    for method in choices.methods:
        recipe = recipe_for("vtab", published, method)
        known = {item.name for item in dataclasses.fields(TRAINABLE[method])}
        options = {name: value for name, value in choices.options.items() if name in known}
        given = dict(choices.given)
        lowest = given.get("lr", recipe.lr) * min(1.0, given.get("backbone_lr_factor", 1.0))
        given.setdefault("min_lr", min(recipe.min_lr, max(lowest, 0.0)))
        for seed in dict.fromkeys(seeds):
            settings = recipe.settings(lists.root, **{**given, "options": options, "seed": seed})
            found.append(
                Cell(
                    suite=suite,
                    task=task,
                    settings=_fitting(settings, lists),
                    lists=lists,
                    checkpoint_sha256=choices.checkpoint_sha256,
                    test_every=choices.test_every,
                    shots=shots,
                )
            )
    return found


def _fitting(settings: TrainSettings, lists: ImageLists) -> TrainSettings:
    """Without drop_last where a list is smaller than a batch: it would leave out every image."""
    trained_on = [lists.lists[name] for name in (TRAIN, SELECT_TRAIN) if name in lists.lists]
    smallest = min(map(len, trained_on))
    drop_last = settings.drop_last and smallest >= settings.batch_size
    return dataclasses.replace(settings, drop_last=drop_last)


def file_digest(path: Path | None) -> str | None:
    """SHA-256 of a file, None for none.

    Raises:
        ValueError: there is no such file.
    """
    if path is None:
        return None
    require("checkpoint", path.is_file(), "a file of weights", f"{path} (nothing there)")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def find_finished(ledger: Ledger, cell: Cell) -> dict[str, Any] | None:
    """A cell's recorded result, or None; one that skipped images counts only where that is allowed.

    Args:
        ledger: where to look.
        cell: whose.
    """
    result = ledger.find(cell)
    if result is None or not {"results", "parameters", "skipped_images"} <= set(result):
        return None
    return result if cell.settings.skip_bad_images or not result["skipped_images"] else None


def run(
    plan: Plan,
    ledger: Ledger,
    *,
    scheduler: Scheduler = HERE,
    notify: Notify = lambda message: None,
    on_cell: Callable[[int, int, Cell, dict[str, Any] | None], None] = lambda *_: None,
    on_epoch: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Run the cells that the ledger does not have, and go on where one fails.

    Args:
        plan: the cells.
        ledger: where results are looked for and recorded, by this process alone.
        scheduler: runs the cells; by default this process does, one after the other.
        notify: called with lines for the user, each once.
        on_cell: called with (cells done, all cells, the cell, its result or None if it failed).
        on_epoch: called with (epochs done, epochs of the cell).

    Raises:
        OSError: a record cannot be written.
    """
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    told: set[str] = set()
    total = len(plan.cells)

    def once(message: str) -> None:
        if message not in told:
            told.add(message)
            notify(message)

    waiting: list[Cell] = []
    for cell in plan.cells:
        found = find_finished(ledger, cell)
        if found is None:
            waiting.append(cell)
            continue
        results[key(cell)] = found
        on_cell(len(results), total, cell, found)
    for cell, ended in scheduler.run(waiting, notify=once, on_epoch=on_epoch):
        if isinstance(ended, Failure):
            failed[cell.title] = ended.reason
            ledger.fail(cell, ended.reason)
        else:
            ledger.finish(cell, ended)
            results[key(cell)] = ended
        done = len(results) + len(failed)
        on_cell(done, total, cell, None if isinstance(ended, Failure) else ended)
    finished = ((cell, results[key(cell)]) for cell in plan.cells if key(cell) in results)
    return Outcome(tuple(finished), failed)

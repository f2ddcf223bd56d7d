"""Sweeps: settings that are tried for each task and method, the best of them trained and tested.

For every task and method all combinations of the axes' values are trained on the images for
selection (train800) and measured on the validation images (val200), with every seed. The
combination with the highest mean over the seeds is trained on both and tested: `vtab`'s own cell,
found in the same ledger. A combination of which a seed failed or diverged is never chosen; of equal
ones the first is.

Chosen on the test images, as papers do, the result is optimistic and says so.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..methods.base import encode
from ..papers.recipes import recipe_facts
from ..training.methods import TRAINABLE
from ..training.settings import require
from . import tables
from .benchmark import Choices, Outcome, Plan, make_cells, read_tasks
from .cell import BEST_ON_TEST, LAST, PROTOCOLS, Cell, Notify
from .grid import Grid
from .ledger import key
from .lists import SELECT_VAL, ImageLists
from .scores import Estimate, estimate

VAL, TEST = "val200", "test"
# Settings of `TrainSettings` that can be an axis; every field of a method can be one too.
SETTINGS: Mapping[str, type] = {
    "lr": float,
    "weight_decay": float,
    "backbone_lr_factor": float,
    "batch_size": int,
    "epochs": int,
    "warmup_epochs": int,
    "drop_path": float,
    "label_smoothing": float,
    "mixup": float,
    "cutmix": float,
    "clip_grad": float,
    "optimizer": str,
}


@dataclass(frozen=True)
class Ladder:
    """An axis that is searched from coarse to fine.

    Every `stride`-th rung is tried; then the rungs a half, a quarter, ... of the stride to both
    sides of the best, which moves as it is beaten.

    Attributes:
        name: of the setting.
        rungs: its values.
        stride: a power of two.
    """

    name: str
    rungs: tuple[float, ...]
    stride: int

    def wanted(self, scores: Mapping[int | None, float | None]) -> list[int]:
        """The rungs to try next, none at the end.

        Args:
            scores: of the rungs that were tried; None for one that came to nothing.
        """
        coarse = list(range(0, len(self.rungs), self.stride))
        if untried := [rung for rung in coarse if rung not in scores]:
            return untried
        best = _argmax(coarse, scores)
        step = self.stride // 2
        while best is not None and step:
            beside = [rung for rung in (best - step, best + step) if 0 <= rung < len(self.rungs)]
            if untried := [rung for rung in beside if rung not in scores]:
                return untried
            best = _argmax([best, *beside], scores)
            step //= 2
        return []


def _argmax(items: Sequence[Any], scores: Mapping[Any, float | None]) -> Any | None:
    """The first of the items with the highest score; None where none has one."""
    scored = [item for item in items if scores[item] is not None]
    return max(scored, key=lambda item: scores[item], default=None)  # type: ignore[arg-type, return-value]


@dataclass(frozen=True)
class Search:
    """What is tried, and by what the best is chosen.

    Attributes:
        axes: setting or method's field → its values. A method without the field is tried without.
        select: `VAL`, or `TEST`, which is optimistic.
        by: "last", the accuracy after the last epoch, or "best", that of the best epoch.
        given: settings of the trainings that choose which the others do not have, e.g. fewer
            `epochs`.
        of_method: method → settings of its trainings alone.
        ladder: an axis of another kind.
    """

    axes: Mapping[str, tuple[Any, ...]]
    select: str = VAL
    by: str = "last"
    given: Mapping[str, Any] = field(default_factory=dict)
    of_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ladder: Ladder | None = None

    def __post_init__(self) -> None:
        require("select", self.select in (VAL, TEST), f"{VAL} or {TEST}", repr(self.select))
        require("by", self.by in ("last", "best"), "last or best", repr(self.by))
        chosen_in_full = self.select == TEST and bool(self.given)
        expected = f"left out where select is {TEST}: all are trained in full"
        require("settings of the search", not chosen_in_full, expected, ", ".join(self.given))
        for name, values in self.axes.items():
            known = name in SETTINGS or any(_has(method, name) for method in TRAINABLE)
            expected = f"one of {', '.join(SETTINGS)}, or an option of a method"
            require("axes", known, expected, repr(name))
            require(name, bool(values), "at least one value to try", "none")
            twice = any(value in values[:index] for index, value in enumerate(values))
            require(name, not twice, "values each given once", _shown_all(values))

    def combinations(self, method: str) -> Iterator[dict[str, Any]]:
        """Name → value, for every combination that a method has."""
        names = [name for name in self.axes if name in SETTINGS or _has(method, name)]
        for values in itertools.product(*(self.axes[name] for name in names)):
            yield dict(zip(names, values, strict=True))

    def check(self, choices: Choices) -> None:
        """Check the axes against what is told to every cell.

        Raises:
            ValueError: one that no method has, or that has one value too.
        """
        names = [*self.axes, *([self.ladder.name] if self.ladder else [])]
        for name in names:
            tried = name in SETTINGS or any(_has(method, name) for method in choices.methods)
            expected = f"an option of {' or '.join(choices.methods)}"
            require(name, tried, expected, "an axis that none of them has")
            fixed = name in choices.given or name in choices.options or name in self.given
            require(name, not fixed, "either an axis or one value", "both")


def _has(method: str, name: str) -> bool:
    return any(item.name == name for item in dataclasses.fields(TRAINABLE[method]))


@dataclass(frozen=True)
class Candidate:
    """A task, a method and one combination of values.

    Attributes:
        task, method: their names.
        values: the combination.
        rung: of the ladder.
        tries: the cells that tell how good it is, one a seed.
        finals: the cells that train and test it, where it is chosen.
    """

    task: str
    method: str
    values: Mapping[str, Any]
    rung: int | None
    tries: tuple[Cell, ...]
    finals: tuple[Cell, ...]


@dataclass(frozen=True)
class Tried:
    """A candidate and what came of it.

    Attributes:
        candidate: it.
        top1: seed → percent of the images that choose; None where the seed failed or diverged.
        why: seed → the reason for that.
    """

    candidate: Candidate
    top1: Mapping[int, float | None]
    why: Mapping[int, str]

    @property
    def score(self) -> float | None:
        """The mean over the seeds, None where one has no number."""
        values = [value for value in self.top1.values() if value is not None]
        return statistics.fmean(values) if len(values) == len(self.top1) else None

    def text(self) -> str:
        """Its mean with its interval, or what went wrong."""
        if self.why:
            diverged = all(why.startswith("diverged") for why in self.why.values())
            return "diverged" if diverged else "failed"
        return str(estimate([value for value in self.top1.values() if value is not None]))


@dataclass(frozen=True)
class SweepPlan:
    """The candidates of a sweep, and what is left out of it; as `Plan`."""

    search: Search
    candidates: tuple[Candidate, ...]
    missing: tuple[str, ...]
    left_out: Mapping[str, str]
    refine: Callable[[Sequence[Tried]], tuple[Candidate, ...]]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The first that run."""
        return tuple(cell for item in self.candidates for cell in item.tries)

    def place(self, candidate: Candidate) -> tuple[int, int]:
        """Where a candidate stands among all: beside those that differ in the ladder's rung."""
        first = [_rest(item, self.search) for item in self.candidates]
        return first.index(_rest(candidate, self.search)), candidate.rung or 0

    def plan(self, cells: Sequence[Cell]) -> Plan:
        """Some of the cells."""
        return Plan("vtab", tuple(cells), self.missing, self.left_out)


@dataclass(frozen=True)
class SweepOutcome:
    """What is known after a sweep.

    Attributes:
        search: what was searched, and by what.
        tried: every candidate.
        chosen: the best for each task and method that has one.
        final: of the cells of those that were chosen.
        failed: cell's title → why, of all cells.
        unchosen: "task, method" → why nothing could be chosen for them.
    """

    search: Search
    tried: tuple[Tried, ...]
    chosen: tuple[Tried, ...]
    final: Outcome
    failed: Mapping[str, str]
    unchosen: Mapping[str, str]


def plan_sweep(
    root: Path,
    tasks: Sequence[str],
    seeds: Sequence[int],
    choices: Choices,
    search: Search,
    notify: Notify,
) -> SweepPlan:
    """Tasks × methods × combinations × seeds.

    Args:
        root: folder of the tasks' folders, in VTAB-1K's layout.
        tasks: as `choose` names them.
        seeds: of the trainings.
        choices: the methods, and what all cells are told.
        search: what is tried.
        notify: called with a line on what the user should know of a task's lists.

    Raises:
        ValueError: a setting that makes no sense.
    """
    search.check(choices)
    found = read_tasks(root, tasks, notify)
    left_out = dict(found.left_out)
    usable: dict[str, ImageLists] = {}
    for task, lists in found.lists.items():
        if search.select == VAL and SELECT_VAL not in lists.lists:
            left_out[task] = f"it has no {SELECT_VAL}.txt to choose on"
        else:
            usable[task] = lists

    def candidate(task: str, method: str, values: Mapping[str, Any], rung: int | None) -> Candidate:
        ladder = search.ladder
        if ladder is not None and rung is not None:
            values = {**values, ladder.name: ladder.rungs[rung]}
        of_method = search.of_method.get(method, {})
        told = _choices(choices, method, {**of_method, **values})
        label = ", ".join(f"{name} {shown(value)}" for name, value in values.items())
        finals = make_cells("vtab", task, usable[task], seeds, told)
        finals[0].settings.method_config()  # what a method refuses is told before anything runs
        tries = finals
        if search.select == VAL:
            told = _choices(told, method, search.given)
            tries = make_cells("vtab", task, usable[task], seeds, told)
        to_choose = search.select == VAL
        return Candidate(
            task,
            method,
            values,
            rung,
            tuple(dataclasses.replace(c, choosing=to_choose, label=label) for c in tries),
            tuple(dataclasses.replace(c, label=label) for c in finals),
        )

    def refine(tried: Sequence[Tried]) -> tuple[Candidate, ...]:
        ladder = search.ladder
        if ladder is None:
            return ()
        more: list[Candidate] = []
        groups: dict[str, list[Tried]] = {}
        for item in tried:
            groups.setdefault(_rest(item.candidate, search), []).append(item)
        for items in groups.values():
            first = items[0].candidate
            scores = {item.candidate.rung: item.score for item in items}
            more += [
                candidate(first.task, first.method, first.values, rung)
                for rung in ladder.wanted(scores)
            ]
        return tuple(more)

    begin = [None] if search.ladder is None else search.ladder.wanted({})
    return SweepPlan(
        search,
        tuple(
            candidate(task, method, values, rung)
            for task in usable
            for method in choices.methods
            for values in search.combinations(method)
            for rung in begin
        ),
        found.missing,
        left_out,
        refine,
    )


def _rest(candidate: Candidate, search: Search) -> str:
    """All that sets a candidate apart but the ladder's rung."""
    but = None if search.ladder is None else search.ladder.name
    values = [f"{name}={value!r}" for name, value in candidate.values.items() if name != but]
    return " ".join([candidate.task, candidate.method, *values])


def _choices(choices: Choices, method: str, values: Mapping[str, Any]) -> Choices:
    """The choices for one method, with some values on top."""
    options = {name: value for name, value in values.items() if _has(method, name)}
    given = {name: value for name, value in values.items() if name not in options}
    return dataclasses.replace(
        choices,
        methods=(method,),
        given={**choices.given, **given},
        options={**choices.options, **options},
    )


def run_sweep(plan: SweepPlan, run: Callable[[str, Plan], Outcome]) -> SweepOutcome:
    """Try, choose, and train what was chosen.

    Args:
        plan: of the sweep.
        run: (what the cells are for, the cells) → what came of them; `benchmark.run` with a ledger.
    """
    candidates = list(plan.candidates)
    tried: list[Tried] = []
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    wave = plan.candidates
    while wave:
        outcome = run("to choose", plan.plan([cell for item in wave for cell in item.tries]))
        results |= {key(cell): result for cell, result in outcome.finished}
        failed |= outcome.failed
        tried = [_tried(item, results, failed, plan.search.by) for item in candidates]
        wave = plan.refine(tried)
        candidates += wave
    chosen = choose(tried)
    finals = [cell for item in chosen for cell in item.candidate.finals]
    final = run("to test", plan.plan(finals)) if finals else Outcome((), {})
    in_order = tuple(sorted(tried, key=lambda item: plan.place(item.candidate)))
    failed |= final.failed
    return SweepOutcome(plan.search, in_order, chosen, final, failed, _unchosen(tried, chosen))


def _unchosen(tried: Sequence[Tried], chosen: Sequence[Tried]) -> dict[str, str]:
    """The tasks and methods of which nothing could be chosen → why."""
    found = {(item.candidate.task, item.candidate.method) for item in chosen}
    all_of = dict.fromkeys((item.candidate.task, item.candidate.method) for item in tried)
    why = "nothing to choose from: of every combination a seed failed or diverged"
    return {f"{task}, {method}": why for task, method in all_of if (task, method) not in found}


def _tried(
    candidate: Candidate,
    results: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    by: str,
) -> Tried:
    top1: dict[int, float | None] = {}
    why: dict[int, str] = {}
    for cell in candidate.tries:
        result = results.get(key(cell))
        seed = cell.settings.seed
        top1[seed] = None if result is None else _measured(result, by, cell.choosing)
        if result is None:
            why[seed] = failed.get(cell.title, "not run")
        elif top1[seed] is None:
            why[seed] = f"diverged: {result.get('diverged')}"
    return Tried(candidate, top1, why)


def _measured(result: Mapping[str, Any], by: str, choosing: bool) -> float | None:
    if not choosing:
        name = LAST if by == "last" else BEST_ON_TEST
        return float(result["results"][name]["top1_percent"])
    curve = result["val_top1_percent"]
    if not curve:
        return None
    return float(curve[-1] if by == "last" else max(curve))


def choose(tried: Sequence[Tried]) -> tuple[Tried, ...]:
    """The best for each task and method, of equal ones the first; none where none has a score."""
    groups: dict[tuple[str, str], list[Tried]] = {}
    for item in tried:
        groups.setdefault((item.candidate.task, item.candidate.method), []).append(item)
    found = []
    for items in groups.values():
        best = _argmax(range(len(items)), dict(enumerate(item.score for item in items)))
        if best is not None:
            found.append(items[best])
    return tuple(found)


def kadaptation() -> tuple[Search, dict[str, Any]]:
    """KAdaptation's protocol as its release runs it: the search, and settings that win over the
    recipe's.

    SGD with momentum 0.9 at a constant rate; the learning rate and the weight decay are searched,
    the latter from coarse to fine, by the best of ten epochs. Where everything trains, what was
    pretrained has a tenth of the head's rate: a second group.

    Source: arXiv:2203.16329, 5.1, and its release's vision_benchmark/.
    """
    facts = recipe_facts()["kadaptation"]
    rungs = tuple(float(10 ** (-6 + rung / 8)) for rung in range(97))
    search = Search(
        axes={"lr": tuple(facts["lr_grid"])},
        by="best",
        given={"epochs": facts["search"]["epochs"]},
        of_method={"full": {"backbone_lr_factor": 0.1}},
        ladder=Ladder("weight_decay", rungs, 16),
    )
    given = {
        "optimizer": "sgd",
        "schedule": facts["schedule"],
        "warmup_epochs": 0,
        "epochs": facts["epochs"],
        "batch_size": facts["batch_size"],
        "drop_last": False,
        "drop_path": 0.0,
        "normalize": "model",
    }
    return search, given


PROTOCOL_GRIDS: Mapping[str, Callable[[], tuple[Search, dict[str, Any]]]] = {
    "kadaptation": kadaptation
}


def shown(value: Any) -> str:
    """A value as the command line spells it."""
    if isinstance(value, list):
        return ":".join(shown(item) for item in value)
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if value is None:
        return "all"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown_all(values: Sequence[Any]) -> str:
    return " ".join(shown(value) for value in values)


def images_of(search: Search) -> str:
    """The images that choose, for a heading."""
    epoch = "last epoch" if search.by == "last" else "best epoch"
    optimistic = ": optimistic" if search.select == TEST else ""
    return f"{search.select}, {epoch}{optimistic}"


def sweep_grids(outcome: SweepOutcome, protocol: str) -> list[Grid]:
    """What was chosen with its results, beside all that was tried; then `vtab`'s tables."""
    search = outcome.search
    names = list(dict.fromkeys(n for item in outcome.tried for n in item.candidate.values))
    by = images_of(search)
    rows = [
        (_where(item), *_values(item, names), item.text(), *_tested(item, outcome.final))
        for item in outcome.chosen
    ]
    notes = [
        "Chosen by the mean over the seeds; of equal ones the first. One of which a seed failed or"
        " diverged is not chosen.",
        *(f"{name}: {meaning}." for name, meaning in PROTOCOLS.items()),
    ]
    if search.select == TEST:
        notes.append("Chosen on the test images: every number here is optimistic.")
    grids = [Grid("Chosen", ("", *names, by, *PROTOCOLS), tuple(rows), tuple(notes))]
    for task in dict.fromkeys(item.candidate.task for item in outcome.tried):
        tried = [item for item in outcome.tried if item.candidate.task == task]
        lines = tuple(
            (
                item.candidate.method,
                *_values(item, names),
                item.text(),
                "chosen" if item in outcome.chosen else "",
            )
            for item in tried
        )
        grids.append(Grid(f"{task}: all that was tried", ("", *names, by, ""), lines))
    return [*grids, *tables.vtab_grids(outcome.final, protocol)] if outcome.chosen else grids


def _where(item: Tried) -> str:
    return f"{item.candidate.task}, {item.candidate.method}"


def _values(item: Tried, names: Sequence[str]) -> list[str]:
    values = item.candidate.values
    return [shown(values[name]) if name in values else "-" for name in names]


def _tested(item: Tried, final: Outcome) -> list[str]:
    """The three results on the test images, over the seeds that have them."""
    keys = {key(cell) for cell in item.candidate.finals}
    results = [result["results"] for cell, result in final.finished if key(cell) in keys]
    texts = []
    for protocol in PROTOCOLS:
        values = [each[protocol]["top1_percent"] for each in results if protocol in each]
        found: Estimate | None = estimate(values) if values else None
        texts.append("-" if found is None else str(found))
    return texts


def tried_csv(outcome: SweepOutcome) -> str:
    """A row for every candidate and seed."""
    names = list(dict.fromkeys(n for item in outcome.tried for n in item.candidate.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "method", *names, "seed", "top1_percent", "why_not", "chosen"])
    for item in outcome.tried:
        for seed, top1 in item.top1.items():
            values = [_values(item, [name])[0] for name in names]
            end = [seed, top1, item.why.get(seed, ""), int(item in outcome.chosen)]
            writer.writerow([item.candidate.task, item.candidate.method, *values, *end])
    return text.getvalue()


def to_json(plan: SweepPlan, outcome: SweepOutcome) -> dict[str, Any]:
    """All that is known."""
    search = outcome.search
    tried = [
        {
            "task": item.candidate.task,
            "method": item.candidate.method,
            "values": {name: encode(value) for name, value in item.candidate.values.items()},
            "top1_percent": {str(seed): top1 for seed, top1 in item.top1.items()},
            "mean": item.score,
            "why_not": {str(seed): why for seed, why in item.why.items()},
            "chosen": item in outcome.chosen,
        }
        for item in outcome.tried
    ]
    return {
        **tables.to_json(plan.plan(()), outcome.final),
        "suite": "sweep",
        "chosen_on": search.select,
        "chosen_by": f"{search.by} epoch",
        "optimistic": search.select == TEST,
        "tried": tried,
        "failed": dict(outcome.failed),
    }

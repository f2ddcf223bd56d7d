"""The settings that the papers and their releases published (recipes.json)."""

from __future__ import annotations

import difflib
import functools
import json
from importlib import resources
from typing import Any

PER_TASK_METHODS = ("efft1", "efft2", "fact_tt", "fact_tk")


@functools.cache
def recipe_facts() -> dict[str, Any]:
    """recipes.json as it is.

    VTAB-1K's are "training", "groups", "tasks" and "lora"; "few_shot" and "kadaptation" are the
    other experiments'. "_sources" says where each is from.
    """
    text = resources.files(__package__).joinpath("recipes.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def task_names() -> tuple[str, ...]:
    """The 19 tasks, by group: Natural, Specialized, Structured."""
    return tuple(task for tasks in recipe_facts()["groups"].values() for task in tasks)


def task_facts(task: str) -> dict[str, Any]:
    """What is published for one task: "classes", and rank, scale and init by method.

    Raises:
        ValueError: no such task.
    """
    tasks = recipe_facts()["tasks"]
    if task not in tasks:
        close = difflib.get_close_matches(task, tasks, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else ", ".join(task_names())
        raise ValueError(f"task must be one of VTAB-1K's 19, got {task!r}; {hint}")
    return tasks[task]  # type: ignore[no-any-return]


def method_options(method: str, task: str | None = None) -> dict[str, Any]:
    """A method's options as released, in the terms of its class in `efft_kernels`.

    EFFT2 is as set_ViT_EFFT builds it: cores shared by all layers, which its scales were searched
    with (the paper's counts are those of cores per layer). Its second letter names the FFN's
    factors the other way round than the paper: "v" is the 4d side, the paper's and our U. EFFT1's
    code was never released, so its letter and scale stand alone.

    Args:
        method: a method's name; one without published options has none.
        task: one of `task_names`, for rank, scale and init; None leaves these to the method.

    Raises:
        ValueError: no such task.
    """
    options: dict[str, Any] = {}
    if method == "noah" and task is not None:
        task_facts(task)
        options["subnet"] = task
    elif method == "lora":
        options |= recipe_facts()["lora"]
    elif task is not None and method in PER_TASK_METHODS:
        options |= task_facts(task)[method]
    elif task is not None:
        task_facts(task)
    if method == "efft2":
        attention, ffn = options.pop("init", "vv")
        options |= {"init": attention, "ffn_init": "u" if ffn == "v" else "v", "cores": "shared"}
    if method in PER_TASK_METHODS:
        options["dropout"] = recipe_facts()["training"]["factor_dropout"]
    if method in ("efft2", "fact_tt", "fact_tk", "lora"):
        options["factor_init"] = "release"
    return options

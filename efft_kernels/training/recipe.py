"""Published recipes: the settings of the papers' experiments, as a run takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..papers.recipes import method_options, recipe_facts
from .methods import TRAINABLE
from .settings import OWN_OPTIONS, TrainSettings, require

RECIPES = ("vtab",)


@dataclass(frozen=True)
class Recipe:
    """The settings of a published experiment; `settings` makes a run's of them.

    The images are resized to img_size × img_size, bicubic, without crop or augmentation.

    Attributes:
        name: a member of `RECIPES`.
        method: key of `TRAINABLE`.
        task: the task whose rank, scale and init these are; None for none's.
        method_options: the method's options by name; those that are not here are the method's own.
        model, img_size, normalize, epochs, batch_size, drop_last, lr, weight_decay, warmup_epochs,
            min_lr, schedule, drop_path, seed: as in `TrainSettings`.
    """

    name: str
    method: str
    task: str | None
    model: str
    img_size: int
    normalize: str
    epochs: int
    batch_size: int
    drop_last: bool
    lr: float
    weight_decay: float
    warmup_epochs: int | None
    min_lr: float
    schedule: str
    drop_path: float
    seed: int
    method_options: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, data: Path, **given: Any) -> TrainSettings:
        """A run's settings.

        Args:
            data: folder of images.
            given: settings of `TrainSettings` that win over the recipe's; of its `options`, each by
                itself. With other epochs, the warm-up is a tenth of them.

        Raises:
            ValueError: a value that makes no sense, or another method; it names the setting.
            TypeError: no setting of that name.
        """
        method = given.get("method", self.method)
        fits = method == self.method
        require("method", fits, f"{self.method}, whose options the recipe has", repr(method))
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["recipe"] = values.pop("name")
        options = values.pop("method_options") | given.pop("options", {})
        values |= {name: options.pop(name) for name in OWN_OPTIONS & set(options)}
        if "epochs" in given:
            values["warmup_epochs"] = None
        return TrainSettings(data=data, **(values | {"options": options} | given))


def recipe_for(name: str, task: str | None = None, method: str = "efft2") -> Recipe:
    """A recipe for a task and a method.

    "vtab" is the recipe of VTAB-1K as the EFFT and FacT releases train: AdamW with ImageNet's mean
    and deviation on every model, an epoch's last and smaller batch left out, and a cosine that
    moves once an epoch. Rank, scale and init are the releases' for each task, for `efft1`, `efft2`,
    `fact_tt` and `fact_tk`; LoRA has r = 8 as in both papers. The EFFT release trains under
    float16 autocast on top (amp="float16"), FacT's without.

    Args:
        name: a member of `RECIPES`.
        task: one of VTAB-1K's 19; None leaves rank, scale and init to the method.
        method: key of `TRAINABLE`.

    Raises:
        ValueError: no such recipe, task or method.

    Source: arXiv:2311.06749, 4.1, and its release's execute.py, vtab.py and configs/;
    arXiv:2212.03145, 4.1, and its release's fact_tt.py, fact_tk.py, vtab.py and configs/.
    """
    require("recipe", name in RECIPES, f"one of {', '.join(RECIPES)}", repr(name))
    require("method", method in TRAINABLE, f"one of {', '.join(TRAINABLE)}", repr(method))
    training = recipe_facts()["training"]
    names = "model epochs batch_size drop_last lr weight_decay warmup_epochs min_lr drop_path seed"
    return Recipe(
        name=name,
        method=method,
        task=task,
        img_size=training["image_size"],
        normalize="imagenet",
        schedule="epoch",
        method_options=method_options(method, task),
        **{setting: training[setting] for setting in names.split()},
    )

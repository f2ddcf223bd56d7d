"""An attached model refuses PEFT, which would freeze its factors and save its part without them."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from ..nn import NOT_FOR_PEFT

PLACE = "peft_config"  # of a model: PEFT puts each of its configurations there first of all


class PeftGuard:
    """Stands where PEFT looks for configurations of its own, and takes none.

    Args:
        model: the name of the model's class.
        before: what stood there, of an adapter that PEFT has merged, say; None for nothing.
    """

    def __init__(self, model: str, before: Any = None) -> None:
        self.model = model
        self.before = before

    def __setitem__(self, adapter: str, config: Any) -> NoReturn:
        raise TypeError(self.model + NOT_FOR_PEFT)

    def update(self, configs: Any) -> NoReturn:
        """As a dictionary's, refused like an item.

        Raises:
            TypeError: always.
        """
        self[""] = configs


def guard(model: nn.Module) -> None:
    """Let `model` refuse PEFT."""
    object.__setattr__(model, PLACE, PeftGuard(type(model).__name__, model.__dict__.get(PLACE)))


def unguard(model: nn.Module) -> None:
    """Put back what stood there before `guard`."""
    guard = model.__dict__.get(PLACE)
    if isinstance(guard, PeftGuard):
        del model.__dict__[PLACE]
        if guard.before is not None:
            object.__setattr__(model, PLACE, guard.before)

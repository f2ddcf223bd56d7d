"""What a baseline is: which of a model's own parameters train, and which new ones are put where.

New parameters live in `Part`s, modules at the model's root. A part acts through hooks that are its
own bound methods, so that copies and pickles of the model carry them along, and detaching is
removing them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


class Part(nn.Module):
    """New parameters and the hooks through which they act.

    Attributes:
        folded: the model's weights hold this part at present: its hooks do nothing.
    """

    folded: bool = False

    def like(self, x: Tensor) -> Tensor:
        """`x` in the dtype of the part's parameters, which train in at least float32."""
        return x.to(next(self.parameters()).dtype)


@dataclass(frozen=True)
class Baseline:
    """A baseline's configuration.

    Attributes:
        name: what files and the command line call it.
    """

    name: ClassVar[str]

    def own_parameters(self, model: nn.Module, outside: Sequence[str]) -> list[str]:
        """Names of the model's own parameters that train; none by default.

        Args:
            model: the model they are in.
            outside: names of the modules that train whole, which are left alone.

        Raises:
            TypeError, ValueError: the baseline cannot take this model; it says so by name.
        """
        return []

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        """The parts, on the default device, initialised; nothing of the model is changed.

        Args:
            model: the model they are for.
            outside: names of the modules that train whole, which are left alone.

        Raises:
            TypeError, ValueError: the baseline cannot take this model; it says so by name.
        """
        return {}

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        """Register the parts' hooks, their own bound methods, on the model."""

    def folded(self, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        """Parameter name → its value in a plain model that computes the same.

        Raises:
            ValueError: there is no such model.
        """
        if parts:
            raise ValueError(
                f"{self.name} must stay attached: it is no change of weights, so a plain"
                f" {type(model).__name__} cannot compute the same"
            )
        return {}

    def to_config(self) -> dict[str, Any]:
        """The configuration as data for JSON."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Baseline:
        """The inverse of `to_config`.

        Raises:
            ValueError: an unknown field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in config.items() if key != "name"}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"{cls.__name__} has fields {sorted(known)}, got unknown {unknown}")
        return cls(**given)


def check_count(name: str, value: object) -> None:
    """Raise unless value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def part_name(module: str) -> str:
    """A part's name from that of the module it acts on, with _ for dots."""
    return module.replace(".", "_")

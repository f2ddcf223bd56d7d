"""The average of trained weights over the updates (EMA), and lending a model another state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..methods.sharded import whole_state
from .loop import trained_parameters

State = dict[str, Tensor]


class Average:
    """timm's moving average of the parameters that train; what is frozen is not copied.

    After the update `step`, counted from 1, the average is decayed by 1 - step^(-2/3) or by
    `decay`, whichever is less, so that a short run does not average in its beginning.

    Args:
        model: whose trained parameters.
        decay: the most it decays by, just below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._trained = nn.ParameterList(trained_parameters(model))
        self._average = ModelEmaV3(self._trained, decay=decay, use_warmup=True)

    def update(self, step: int) -> None:
        """Take in the parameters as they are after `step` updates."""
        self._average.update(self._trained, step)

    def state_dict(self) -> State:
        return self._average.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._average.module.load_state_dict(state)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the average as its parameters, inside the block."""
        own = [parameter.detach().clone() for parameter in self._trained]
        _copy(self._average.module.parameters(), self._trained)
        try:
            yield
        finally:
            _copy(own, self._trained)


@torch.no_grad()
def _copy(values: Iterator[Tensor] | list[Tensor], parameters: nn.ParameterList) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def copy_state(adapter: Adapter) -> State:
    """The adapter's state, of whole tensors in storage of its own."""
    state = whole_state(adapter.state_dict())
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@contextmanager
def lent(adapter: Adapter, state: State | None) -> Iterator[None]:
    """The adapter with another state inside the block; None leaves it its own."""
    if state is None:
        yield
        return
    own = copy_state(adapter)
    adapter.load_state_dict(state)
    try:
        yield
    finally:
        adapter.load_state_dict(own)

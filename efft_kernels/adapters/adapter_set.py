"""Many tasks on one backbone: named adapters of one shape, swapped or mixed within a batch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import TaskBatch
from .adapter import Adapter
from .adapter_file import Header, factors_of, module_key, read_adapter_file, read_header


class AdapterSet:
    """Several adapters of one method and shape on one frozen model.

    The base weights are held once. An adapter costs its factors and its head alone: with EFFT2 of
    r = 16 on ViT-B, 104,448 numbers and the head.

    Args:
        adapter: the attached adapter that gives the shape. Its present factors are not in the set
            until they are added: `tasks.add("first")`.

    Raises:
        TypeError: not an Adapter.
        ValueError: the adapter is merged, or a module trained whole is no nn.Linear (its rows could
            not be chosen per sample).
    """

    def __init__(self, adapter: Adapter) -> None:
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}")
        if adapter.merged:
            raise ValueError("adapter must not be merged: call unmerge() first")
        self.adapter = adapter
        self.model = adapter.model
        self._states: dict[str, dict[str, Tensor]] = {}
        self._current: str | None = None
        for name, module in self._trained_modules():
            if type(module) is not nn.Linear and any(True for _ in module.parameters(False)):
                raise ValueError(
                    f"modules_to_train must hold nn.Linear alone for an AdapterSet, got"
                    f" {type(module).__name__} at {name!r}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order they were added."""
        return tuple(self._states)

    @property
    def current(self) -> str | None:
        """The adapter that `use` put in place, if any."""
        return self._current

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, name: object) -> bool:
        return name in self._states

    def add(
        self, name: str, source: str | os.PathLike[str] | Mapping[str, Tensor] | None = None
    ) -> None:
        """Add an adapter under a new name.

        Args:
            name: a name not in the set.
            source: an adapter file, a state of `Adapter.state_dict`, or None for a copy of the
                model's present factors and heads.

        Raises:
            ValueError: the name is taken, the file holds another method, other options that change
                the function or other linears, or a tensor does not fit. The set is as it was.
            FileNotFoundError: no such file.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r}")
        if name in self._states:
            raise ValueError(f"name must be new in the set, got {name!r}; remove it first")
        own = self.adapter.state_dict()
        if source is None:
            state: Mapping[str, Tensor] = own
        elif isinstance(source, Mapping):
            state = source
        else:
            metadata, state = read_adapter_file(source)
            self._check_header(read_header(metadata, source, "source"), source)
        if set(state) != set(own):
            differing = sorted(set(state) ^ set(own))
            raise ValueError(
                f"source must hold the set's {len(own)} tensors, missing or unknown {differing[:3]}"
            )
        for key, tensor in state.items():
            if tensor.shape != own[key].shape:
                raise ValueError(
                    f"{key} must be {list(own[key].shape)}, got {list(tensor.shape)} for {name!r}"
                )
        self._states[name] = {
            key: state[key].detach().to(like.device, like.dtype, copy=True)
            for key, like in own.items()
        }

    def _check_header(self, header: Header, source: object) -> None:
        own, method = self.adapter.method, header.method
        if header.targets != [site.name for site in self.adapter.sites]:
            raise ValueError(f"source must adapt the set's linears, got others in {source}")
        if type(method) is not type(own):
            raise ValueError(f"source must be an adapter of {own.name!r}, got {method.name!r}")
        for name in (field.name for field in dataclasses.fields(own)):
            ours, theirs = getattr(own, name), getattr(method, name)
            if name not in own.free_fields and ours != theirs:
                raise ValueError(f"source must have the set's {name} {ours}, got {theirs}")

    def remove(self, name: str) -> None:
        """Drop an adapter; the model keeps the factors in place.

        Raises:
            KeyError: no such name.
        """
        del self._states[self._known(name)]
        if self._current == name:
            self._current = None

    def use(self, name: str) -> None:
        """Copy an adapter's numbers into the model's factors and heads.

        Raises:
            KeyError: no such name.
            ValueError: the adapter is merged.
        """
        self.adapter.load_state_dict(self._states[self._known(name)])
        self._current = name

    def update(self, name: str) -> None:
        """Store the model's present factors and heads, after training say, under a name of the set.

        Raises:
            KeyError: no such name.
        """
        for key, tensor in self.adapter.state_dict().items():
            self._states[self._known(name)][key].copy_(tensor)

    @contextmanager
    def tasks(self, task_ids: Sequence[str]) -> Iterator[None]:
        """Within this context row i of the batch is computed with the adapter named task_ids[i].

        One forward for all rows: the base GEMMs run once over the batch, the thin products are
        batched over the rows. Equal to running each row alone with its adapter. For inference:
        factors get no gradients. Memory grows with the distinct tasks in the batch, not with the
        set.

        Args:
            task_ids: one name per row of the batch that the model will be called with.

        Raises:
            KeyError: a name that is not in the set.
            ValueError: no names at all; in the model's forward, a batch of another size.
            RuntimeError: the model is in training mode or merged, or the context is entered within
                itself.
        """
        if self.model.training:
            raise RuntimeError("tasks() is for inference: call model.eval() first")
        if self.adapter.merged:
            raise RuntimeError("tasks() needs the factors: call unmerge() first")
        bank = self.adapter.bank
        if bank.tasks is not None:
            raise RuntimeError("tasks() cannot be entered within itself")
        if not task_ids:
            raise ValueError("task_ids must name one task per row of the batch, got none")
        distinct = list(dict.fromkeys(self._known(name) for name in task_ids))
        states = [self._states[name] for name in distinct]
        device = next(self.adapter.parameters()).device
        index = torch.tensor([distinct.index(name) for name in task_ids], device=device)
        stacked = {
            key: torch.stack([state[key] for state in states]) for key in self.adapter.state_dict()
        }
        hooks = [self.model.register_forward_pre_hook(_RowCheck(len(task_ids)), with_kwargs=True)]
        for name, module in self._trained_modules():
            if isinstance(module, nn.Linear):
                weight = stacked[module_key(name, "weight")]
                bias = stacked.get(module_key(name, "bias"))
                hooks.append(module.register_forward_hook(_TaskHead(weight, bias, index)))
        bank.tasks = TaskBatch(factors_of(stacked), index)
        try:
            yield
        finally:
            bank.tasks = None
            for hook in hooks:
                hook.remove()

    def _trained_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Each module that is trained whole and all modules in it, by dotted names."""
        for outer in self.adapter.modules_to_train:
            yield from self.model.get_submodule(outer).named_modules(prefix=outer)

    def _known(self, name: str) -> str:
        if name not in self._states:
            raise KeyError(
                f"no adapter {name!r} in the set; it has {', '.join(self._states) or 'none'}"
            )
        return name


class _RowCheck:
    """A forward pre-hook that refuses a batch of another size than the number of task ids."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim())
        if (batch := next(tensors, None)) is not None and batch.shape[0] != self.rows:
            raise ValueError(
                f"task_ids must name one task per row of the batch, got {self.rows} for"
                f" {batch.shape[0]} rows"
            )


class _TaskHead:
    """A forward hook that gives each row of the batch its own task's linear head.

    Args:
        weight: [tasks, N, K].
        bias: [tasks, N] or None.
        index: [B], the task of each row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, index: Tensor) -> None:
        self.weight = weight
        self.bias = bias
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        rows = x.reshape(self.index.shape[0], -1, x.shape[-1])  # [B, rows, K]
        y = torch.bmm(rows, self.weight[self.index].mT.to(rows.dtype))
        if self.bias is not None:
            y = y + self.bias[self.index].unsqueeze(1).to(y.dtype)
        return y.reshape(output.shape).to(output.dtype)

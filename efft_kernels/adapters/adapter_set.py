"""Many tasks on one backbone: named adapters of one shape, swapped or mixed within a batch."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..methods.sharded import whole
from ..nn import FactorBank, TaskBatch, TracedTasks, check_weight_is_stored
from ..ops.checks import without_autocast
from .adapter import Adapter
from .adapter_file import (
    Header,
    buffer_key,
    factors_of,
    is_factor,
    module_key,
    read_adapter_file,
    read_header,
)
from .attachment import same_numbers
from .batch_layout import batch_rows, check_batch_major, linear_input


class AdapterSet:
    """Several adapters of one method and shape on one frozen model.

    The base weights are held once. An adapter costs its factors and its head alone: with EFFT2 of
    r = 16 on ViT-B, 104,448 numbers and the head. Heads may have different numbers of outputs.

    Args:
        adapter: the attached adapter that gives the shape. Its present factors are not in the set
            until they are added: `tasks.add("first")`.

    Raises:
        TypeError: not an Adapter, or a module trained whole computes its weight by a hook.
        ValueError: the adapter is merged, or a module trained whole is no nn.Linear (its rows could
            not be chosen per sample).
    """

    def __init__(self, adapter: Adapter) -> None:
        if not isinstance(adapter, Adapter) or not adapter.sites:  # a baseline has none
            raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}")
        if adapter.merged:
            raise ValueError("adapter must not be merged: call unmerge() first")
        self.adapter = adapter
        self.model = adapter.model
        self._states: dict[str, dict[str, Tensor]] = {}
        self._current: str | None = None
        self._is_batch_major = False
        for name, module in self._trained_modules():
            check_weight_is_stored(module, name)
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
        required, own = self.adapter.required_state(), self.adapter.possible_state()
        if source is None:
            state: Mapping[str, Tensor] = self.adapter.state_dict()
        elif isinstance(source, Mapping):
            state = source
        else:
            metadata, state = read_adapter_file(source)
            self._check_header(read_header(metadata, source, "source"), source)
        if differing := sorted((set(required) - set(state)) | (set(state) - set(own))):
            raise ValueError(
                f"source must hold the set's {len(required)} tensors, missing or unknown"
                f" {differing[:3]}"
            )
        heads = self._head_keys()
        for key, tensor in state.items():
            expected = list(own[key].shape)
            if outputs := heads.get(key):
                expected[:1] = state[outputs].shape[:1]
            if list(tensor.shape) != expected and not tensor.numel() == own[key].numel() == 1:
                raise ValueError(f"{key} must be {expected}, got {list(tensor.shape)} for {name!r}")
        self._states[name] = self._copied(state)

    def _head_keys(self) -> dict[str, str]:
        """Key of each tensor of a linear that is trained whole → key of its weight."""
        return {
            module_key(name, part): module_key(name, "weight")
            for name, module in self._trained_modules()
            if isinstance(module, nn.Linear)
            for part, _ in module.named_parameters()
        }

    def _copied(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state in the model's dtypes and place."""
        own = self.adapter.possible_state()
        return {
            key: whole(tensor.detach())
            .to(own[key].device, own[key].dtype, copy=True)
            .view(own[key].shape if tensor.numel() == 1 else tensor.shape)
            for key, tensor in state.items()
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
        """Copy an adapter's numbers into the model's factors, heads and buffers.

        A head with another number of outputs gets new parameters: make its optimizer after this.
        The model's own num_classes (timm) or num_labels (transformers) follows it.

        Raises:
            KeyError: no such name.
            ValueError: the adapter is merged.
        """
        state = self._states[self._known(name)]
        if self.adapter.merged:
            raise ValueError("the adapter must not be merged in use(): call unmerge() first")
        self._resize_heads(state)
        self.adapter.load_state_dict(state)
        self._current = name

    def _resize_heads(self, state: Mapping[str, Tensor]) -> None:
        for name, module in self._trained_modules():
            if not isinstance(module, nn.Linear):
                continue
            outputs = module.out_features
            for part, old in list(module.named_parameters()):
                new = state[module_key(name, part)]
                if new.shape != old.shape:
                    parameter = nn.Parameter(new.to(old, copy=True), old.requires_grad)
                    setattr(module, part, parameter)
                    module.out_features = new.shape[0]
            self._count_outputs(name, outputs, module.out_features)

    def _count_outputs(self, head: str, before: int, now: int) -> None:
        """Correct what the model says of its classes, where it said what the head had."""
        outer = self.model
        for part in head.split("."):
            for owner in (outer, getattr(outer, "config", None)):
                for name in ("num_classes", "num_labels"):
                    if now != before and getattr(owner, name, None) == before:
                        setattr(owner, name, now)
            outer = outer.get_submodule(part)

    def update(self, name: str) -> None:
        """Store the model's present factors and heads, after training say, under a name of the set.

        Raises:
            KeyError: no such name.
        """
        self._states[self._known(name)] = self._copied(self.adapter.state_dict())

    @contextmanager
    def tasks(self, task_ids: Sequence[str], *, batch_first: bool = False) -> Iterator[None]:
        """Within this context row i of the batch is computed with the adapter named task_ids[i].

        One forward for all rows: the base GEMMs run once over the batch, the thin products are
        batched over the rows. Equal to running each row alone with its adapter; where heads have
        different numbers of outputs, a row has -inf beyond its own. For inference:
        factors get no gradients. Memory grows with the distinct tasks in the batch, not with the
        set.

        The context is the present thread's or coroutine's: others that call the model meanwhile get
        the model's own adapter, or their own tasks. The first call of the model with several tasks
        runs it twice more, to see that it keeps the rows of the batch one after the other. Before
        that its parts (`model.forward_features`) cannot be called by themselves.

        Args:
            task_ids: one name per row of the batch that the model will be called with.
            batch_first: take it as given that all adapted linears keep the batch in the leading
                dimension, instead of running the model to see it.

        Raises:
            KeyError: a name that is not in the set.
            ValueError: no names at all; a task whose buffers (BatchNorm's statistics) are not those
                in the model, which one forward cannot exchange; in the model's forward, a batch of
                another size, or a model that does not keep the batch in the leading dimension.
            RuntimeError: the model is in training mode or merged, or the context is entered within
                itself; where a part of the model is called before the model itself.
        """
        bank = self.adapter.bank
        if bank.tasks is not None:
            raise RuntimeError("tasks() cannot be entered within itself")
        states, index, stacked = self._stacked(task_ids)
        several = len(states) > 1 and not batch_first
        batch = TaskBatch(stacked, index, self._require_layout if several else _nothing)
        check = _BatchCheck(self, batch, several)
        hooks = [self.model.register_forward_pre_hook(check, with_kwargs=True)]
        for _, module, weight, bias in self._stacked_heads(states):
            head = _TaskHead(bank, batch, weight, bias)
            hooks.append(module.register_forward_hook(head, with_kwargs=True))
        try:
            with bank.mixed(batch):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _stacked(
        self, task_ids: Sequence[str]
    ) -> tuple[list[dict[str, Tensor]], Tensor, dict[str, Tensor]]:
        """(states of the distinct tasks, task of each row, bank parameter name → [tasks, ...])."""
        if self.model.training:
            raise RuntimeError("tasks() is for inference: call model.eval() first")
        if self.adapter.merged:
            raise RuntimeError("tasks() needs the factors: call unmerge() first")
        if not task_ids:
            raise ValueError("task_ids must name one task per row of the batch, got none")
        distinct = list(dict.fromkeys(self._known(name) for name in task_ids))
        self._check_buffers(distinct)
        states = [self._states[name] for name in distinct]
        device = next(self.adapter.parameters()).device
        index = torch.tensor([distinct.index(name) for name in task_ids], device=device)
        heads = self._head_keys()
        with without_autocast(device):  # torch.stack refuses the other half precision
            stacked = {
                key: torch.stack([state[key] for state in states])
                for key in self.adapter.required_state()
                if key not in heads
            }
        return states, index, factors_of(stacked)

    def _stacked_heads(
        self, states: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, nn.Module, Tensor, Tensor | None]]:
        """(name, module, weight [tasks, N, K], bias [tasks, N]) of each linear trained whole."""
        for name, module in self._trained_modules():
            if isinstance(module, nn.Linear):
                weights = [state[module_key(name, "weight")] for state in states]
                biases = [state.get(module_key(name, "bias")) for state in states]
                with without_autocast(weights[0].device):
                    padded = _padded(weights, biases)
                yield name, module, *padded

    def compiled(self, **options: Any) -> Callable[..., Any]:
        """The model under torch.compile for batches of several tasks, as one graph.

        It gives what the model gives within `tasks(task_ids)`. Factors, heads and the task of each
        row are inputs of the graph: it is the same for all tasks and any number of them, and for
        all batches of two rows or more; what a thread runs is no other's concern.

        Args:
            options: as in torch.compile; fullgraph=True unless it is given.

        Returns:
            run(task_ids, ...): the model called with what follows the tasks. It raises as `tasks`
            does; the first call with several tasks runs the model twice to see its layout.
        """
        bank, model = self.adapter.bank, self.model
        names = [name for name, m in self._trained_modules() if isinstance(m, nn.Linear)]
        for name in names:
            head = model.get_submodule(name)
            if not any(isinstance(hook, _TracedHead) for hook in head._forward_hooks.values()):
                head.register_forward_hook(_TracedHead(bank, name), with_kwargs=True)

        def traced(tasks: TracedTasks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bank.traced = tasks
            try:
                return model(*args, **kwargs)
            finally:
                bank.traced = None

        graph = torch.compile(traced, **{"fullgraph": True, **options})

        @torch.no_grad()
        def run(task_ids: Sequence[str], *args: Any, **kwargs: Any) -> Any:
            if bank.tasks is not None:
                raise RuntimeError("a compiled set names its tasks itself: leave tasks() first")
            states, index, stacked = self._stacked(task_ids)
            _check_rows(args, kwargs, index)
            if len(states) > 1:
                self.check_layout(args, kwargs)
            else:  # twice: a graph for one task alone would be another
                states = states * 2
                stacked = {
                    key: tensor.repeat(2, *[1] * (tensor.dim() - 1))
                    for key, tensor in stacked.items()
                }
            factors = {s.name: bank.stacked_factors(s.name, stacked) for s in self.adapter.sites}
            heads = {name: (w, b) for name, _, w, b in self._stacked_heads(states)}
            batch = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim())
            _leave_open([t for t in batch if t.shape[0] == len(index)] + [index], 0)
            _leave_open([t for pair in (*factors.values(), *heads.values()) for t in pair], 0)
            _leave_open([t for pair in heads.values() for t in pair], 1)  # outputs
            return graph(TracedTasks(factors, heads, index), args, kwargs)

        return run

    def _check_buffers(self, names: Sequence[str]) -> None:
        """Raise unless the model's buffers, its heads' included, are those of each of the tasks."""
        base = self.adapter.bank.attachment.base_buffers.items()
        parts = [
            module_key(name, part)
            for name, module in self._trained_modules()
            for part in module.state_dict()
            if isinstance(module, nn.Linear)
        ]
        own = self.adapter.possible_state().items()
        now = {key: t for key, t in own if key not in parts and not is_factor(key)}
        for name in names:
            theirs = {buffer_key(key): buffer for key, buffer in base} | self._states[name]
            if not all(same_numbers(buffer, theirs[key]) for key, buffer in now.items()):
                raise ValueError(
                    f"task_ids must name tasks that agree with the model in its buffers, got"
                    f" {name!r} with other statistics of BatchNorm, say: use() each such task by"
                    " itself"
                )

    def check_layout(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check once that the model, called with these, keeps the batch in the leading dimension.

        Raises:
            ValueError: it does not.
        """
        if self._is_batch_major:
            return
        heads = {n: m for n, m in self._trained_modules() if isinstance(m, nn.Linear)}
        with self.adapter.bank.mixed(None):
            check_batch_major(self.model.forward, args, kwargs, {**self.adapter.layers(), **heads})
        self._is_batch_major = True

    def _require_layout(self) -> None:
        if not self._is_batch_major:
            raise RuntimeError(
                "tasks() needs a model that keeps the batch in the leading dimension, and looks"
                " when the model itself is called: call it once before its parts, or pass"
                " tasks(..., batch_first=True) where you know that it does"
            )

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


def _padded(
    weights: Sequence[Tensor],  # of each task [N, K], N its own
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """Heads as one [tasks, N, K] with its bias [tasks, N], -inf beyond a task's own outputs."""
    most = max(weight.shape[0] for weight in weights)
    if all(weight.shape[0] == most for weight in weights) and biases[0] is None:
        return torch.stack(list(weights)), None
    rows, ends = [], []
    for weight, bias in zip(weights, biases, strict=True):
        beyond = most - weight.shape[0]
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        rows.append(F.pad(weight, (0, 0, 0, beyond)))
        ends.append(F.pad(bias, (0, beyond), value=-math.inf))
    return torch.stack(rows), torch.stack(ends)


def _leave_open(tensors: Sequence[Tensor | None], dim: int) -> None:
    """Let a graph that is traced with these take other sizes of a dimension."""
    for tensor in tensors:
        if tensor is not None and tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _nothing() -> None:
    """There is nothing to check."""


# Hooks are the module's and a thread's registering is not one step for another: each looks whether
# it is meant before anything else, and takes its arguments with or without keywords.


class _BatchCheck:
    """A forward pre-hook of the model that refuses a batch that `tasks` was not entered for."""

    def __init__(self, tasks: AdapterSet, batch: TaskBatch, several: bool) -> None:
        self.tasks = tasks
        self.batch = batch
        self.several = several

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: dict[str, Any]) -> None:
        if self.tasks.adapter.bank.tasks is not self.batch:
            return
        if module.training:
            raise RuntimeError("tasks() is for inference: call model.eval()")
        kwargs = rest[0] if rest else {}
        _check_rows(args, kwargs, self.batch.task_of_row)
        if self.several:
            self.tasks.check_layout(args, kwargs)


class _TaskHead:
    """A forward hook that gives each row of the batch its own task's linear head.

    Args:
        bank: the adapter's.
        batch: with the task of each row.
        weight: [tasks, N, K].
        bias: [tasks, N] or None.
    """

    def __init__(
        self, bank: FactorBank, batch: TaskBatch, weight: Tensor, bias: Tensor | None
    ) -> None:
        self.bank = bank
        self.batch = batch
        self.weight = weight
        self.bias = bias

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
        if self.bank.tasks is not self.batch:
            return None
        *kwargs, output = rest
        x = linear_input(args, *kwargs)
        return _rows_by_heads(x, self.weight, self.bias, self.batch.task_of_row, output)


class _TracedHead:
    """The same in a graph that `AdapterSet.compiled` traces; idle otherwise.

    Args:
        bank: the adapter's.
        name: the head's.
    """

    def __init__(self, bank: FactorBank, name: str) -> None:
        self.bank = bank
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
        tasks = self.bank.traced
        if tasks is None:
            return None
        *kwargs, output = rest
        x = linear_input(args, *kwargs)
        return _rows_by_heads(x, *tasks.heads[self.name], tasks.task_of_row, output)


def _rows_by_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, output: Tensor
) -> Tensor:
    """Each row of x [B, ..., K] by the head of its task, in the place of what one head gave."""
    rows = x.reshape(index.shape[0], -1, x.shape[-1])  # [B, rows, K]
    y = torch.bmm(rows, weight[index].mT.to(rows.dtype))
    if bias is not None:
        y = y + bias[index].unsqueeze(1).to(y.dtype)
    return y.reshape(*output.shape[:-1], y.shape[-1]).to(output.dtype)


def _check_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: Tensor) -> None:
    rows, expected = batch_rows(args, kwargs), index.shape[0]
    if rows is not None and rows != expected:
        raise ValueError(
            f"task_ids must name one task per row of the batch, got {expected} for {rows} rows"
        )

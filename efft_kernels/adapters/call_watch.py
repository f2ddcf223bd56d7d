"""Which adapted linears run in the model's forward, so that an adapter that does nothing is told.

A parent may read a linear's weight instead of calling it, a module may be replaced after `attach`,
or run without gradients: the factors then learn nothing while the loss still falls by the head.
Hooks on the model count what runs between its forward's start and end, and compare.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import FactorBank, FusedEFFTLinear, without_numbers

_BYPASSED = (
    "{sites} did not run in a forward whose output needs its gradient, so their factors learn"
    " nothing: a parent reads their weight or skips them, or they were replaced after attach. Leave"
    " them out of targets=[...] where that is meant"
)
_WITHOUT_GRAD = (
    "{sites} ran without gradients in a forward whose output needs its gradient, so their factors"
    " learn nothing: under torch.no_grad(), or in a reentrant checkpoint whose input needs no"
    " gradient. For the latter checkpoint with use_reentrant=False, or give the input a gradient"
    " (model.enable_input_require_grads() of Hugging Face, x.requires_grad_())"
)
_REPLACED = (
    "{sites} are not in the model any more, so the adapter is without them: a quantizer or other"
    " code has replaced the modules. Merge the adapter before, or leave them out of targets=[...]"
)
_compiled: set[tuple[str, str]] = set()  # kind of a watch, site or its name without numbers


def _note_compiled(kind: str, site: str) -> None:
    """Called while a graph is traced: what runs in it later cannot be counted."""
    _compiled.add((kind, site))


# As torch.compiler.assume_constant_result does, which takes a second to import Dynamo: the call is
# made while tracing, and leaves no trace in the graph.
_note_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Forward(NamedTuple):
    """The linears that ran so far in a forward of the model, once for each call."""

    with_grad: list[str]
    without: list[str]


class CallWatch:
    """Counts the adapted linears' calls in each of the model's forwards.

    Args:
        sites: the names of the adapted linears.
        strict: raise where a linear's factors cannot learn, instead of warning once.
    """

    def __init__(self, sites: Iterable[str], strict: bool) -> None:
        self.sites = tuple(sites)
        self.strict = strict
        self._last: _Forward | None = None
        self._told: set[str] = set()
        self._learnt: set[str] = set()  # what ran with gradients in any forward
        self._seen: set[str] | None = None  # what ran when we last looked for replaced ones
        self._running: dict[int, _Forward] = {}  # by thread
        # Not the watch's own: models that are alike share a compiled graph, traced for one of them.
        self._kind = _kind_of(self.sites)

    @property
    def calls(self) -> Counter[str] | None:
        """Site → how often it ran in the model's last forward; None before the first."""
        last = self._last
        return None if last is None else Counter(last.with_grad + last.without)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_running": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_kind": _kind_of(state["sites"])}

    def watch(self, model: nn.Module) -> None:
        """Count from now on, by hooks on the model."""
        model.register_forward_pre_hook(self.open)
        model.register_forward_hook(self.close)

    def unwatch(self, model: nn.Module) -> None:
        """Remove the hooks."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]

    def open(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        if not torch.compiler.is_compiling():
            self._running[threading.get_ident()] = _Forward([], [])

    def count(self, site: str) -> None:
        """A linear runs.

        Args:
            site: its name.
        """
        if torch.compiler.is_dynamo_compiling():
            self.note(site)
            return
        now = self._running.get(threading.get_ident())
        if now is not None:
            (now.with_grad if torch.is_grad_enabled() else now.without).append(site)

    def note(self, pattern: str) -> None:
        """A linear is traced into a graph, which other blocks may run too.

        Args:
            pattern: its name; without its numbers, where the graph does not know them.
        """
        _note_compiled(self._kind, pattern)

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model.

        Raises:
            RuntimeError: in a strict watch, where factors that need a gradient get none.
        """
        if torch.compiler.is_compiling():
            return
        now = self._running.pop(threading.get_ident(), None)
        if now is None:
            return
        self._last = now
        ran = set(now.with_grad)
        self._learnt |= ran
        if len(ran) == len(self.sites):
            return
        if torch.is_grad_enabled():
            self._look(module, now, output)
        elif (ran := ran.union(now.without)) != self._seen:
            gone = [site for site in self._candidates(ran) if _layer(module, site) is None]
            self._tell(gone, _REPLACED)
            self._seen = ran

    def _look(self, model: nn.Module, now: _Forward, output: Any) -> None:
        candidates = self._candidates(now.with_grad)
        if not candidates or not any(t.requires_grad for t in _tensors(output)):
            return
        if self._told and not self.strict:  # layers dropped at random: told once for all
            candidates = [site for site in candidates if site not in self._learnt]
        learning = [site for site in candidates if _learns(model, site)]
        absent = [site for site in learning if site not in now.without]
        blind = [site for site in learning if site in now.without]
        if blind and _checkpointed(output):
            blind = []
        self._tell(absent, _BYPASSED)
        self._tell(blind, _WITHOUT_GRAD)

    def _candidates(self, ran: Iterable[str]) -> list[str]:
        quiet = self._told.union(ran)
        return [site for site in self.sites if site not in quiet and not self._was_traced(site)]

    def _was_traced(self, site: str) -> bool:
        """Whether graphs hold the linear, or one at the same place in another block, whose graph
        its own block runs where the blocks are compiled one by one."""
        return any((self._kind, name) in _compiled for name in (site, without_numbers(site)))

    def _tell(self, sites: Sequence[str], text: str) -> None:
        if sites:
            message = text.format(sites=_listed(sites))
            if self.strict:
                raise RuntimeError(message)
            self._told.update(sites)
            warnings.warn(message, stacklevel=2)


def _kind_of(sites: Sequence[str]) -> str:
    """What watches of the same linears share; short, as compiled graphs compare it."""
    return f"{hash(tuple(sites)):x}"


def _learns(model: nn.Module, site: str) -> bool:
    """Whether a linear's factors are meant to get a gradient."""
    bank = next(child for child in model.children() if isinstance(child, FactorBank))
    layer = _layer(model, site)
    merged = layer is not None and layer.merged
    return not merged and any(p.requires_grad for p in bank.group(site).parameters())


def _layer(model: nn.Module, site: str) -> FusedEFFTLinear | None:
    """The adapted layer, None where it was replaced, or a module around it."""
    try:
        layer: Any = model.get_submodule(site)
    except AttributeError:
        return None
    return layer if hasattr(layer, "delta_weight") else None  # torch.compile may have wrapped it


def _tensors(output: Any) -> Iterable[Tensor]:
    """The tensors in what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))


def _checkpointed(output: Any) -> bool:
    """Whether the graph holds a reentrant checkpoint, which runs again with gradients."""
    nodes = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if "CheckpointFunction" in type(node).__name__:
            return True
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        nodes += new
    return False


def _listed(sites: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(sites) - 6} more" if len(sites) > 6 else ""
    return "adapted linears " + ", ".join(map(repr, sites[:6])) + more


def tell_of_frozen(model: nn.Module, trained: Sequence[str], strict: bool) -> None:
    """Say which adapters inside `model` an attach to it freezes.

    Args:
        model: the model that is about to be adapted.
        trained: names of the modules that are trained whole.
        strict: raise instead of warning.

    Raises:
        ValueError: there is one, and `strict`.
    """
    inner = [
        name.rpartition(".")[0] if isinstance(module, FactorBank) else name
        for name, module in model.named_modules()
        if isinstance(module, FactorBank | FusedEFFTLinear)
        and any(parameter.requires_grad for parameter in _own_factors(module))
        and not any(name == outer or name.startswith(outer + ".") for outer in trained)
    ]
    if inner:
        message = (
            f"{_listed(inner).removeprefix('adapted linears ')} of {type(model).__name__} has"
            " factors of its own, which attach freezes with the rest of the model: merge and detach"
            " them first, or name the module in modules_to_train"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


def _own_factors(module: nn.Module) -> Iterable[nn.Parameter]:
    if isinstance(module, FactorBank):
        return module.parameters()
    factors: Any = getattr(module, "factors", None)
    return () if factors is None else factors.parameters()  # type: ignore[no-any-return]

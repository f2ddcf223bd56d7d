"""A group's factors for all its sites at once, computed once in each forward of the model.

Every linear of a group would otherwise fold its core by itself, and autograd would add up the
gradients of the shared factors linear by linear. What is computed at once lives only while the
model's own forward runs: hooks on the model open and close it, so nothing outlives an optimizer's
step, a change of parameters or the capture of a CUDA graph. A linear that is called otherwise, or
under other circumstances than the model, takes its factors alone.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.autograd import forward_ad

from .. import functions
from .base import FactorGroup, Factors

Compute = Callable[..., tuple[Tensor, ...]]


class Kind(NamedTuple):
    """Equal linears of all blocks."""

    group: FactorGroup
    made_of: type[FactorGroup]  # the group's class
    sites: tuple[str, ...]
    plan: Any  # the group's, of these sites


class _Held:
    """The factors of one group, and what they were made from.

    Attributes:
        given: the sites that have them.
    """

    def __init__(self, group: FactorGroup, dropout: bool) -> None:
        self.sources = _state(group)
        self.group = group
        self.products = group.joint_products(dropout)
        self.stream = _stream(group)
        self.given: set[str] = set()

    @functools.cached_property
    def factors(self) -> dict[str, Factors]:
        return self.group.from_products(self.products)

    def are_fresh(self, group: FactorGroup) -> bool:
        """Whether the group still has the very parameters, as they were."""
        now = tuple(_parameters(group))
        return len(now) == len(self.sources) and all(
            p is own and (p is None or (p._version == version and p.requires_grad == learns))
            for p, (own, version, learns) in zip(now, self.sources, strict=True)
        )


_traced: WeakSet[TracingContext] = WeakSet()  # the traces that a model's own forward is part of


def _note_traced() -> None:
    """Called while a model's own forward is traced. Kept beside the trace: a graph under activation
    checkpointing may write to no object that was there before."""
    context = TracingContext.try_get()
    if context is not None:
        _traced.add(context)


def _is_noted() -> bool:
    return TracingContext.try_get() in _traced


def _is_traced_by_itself() -> bool:
    """Called while a hook is traced: whether the trace is of the hook alone. torch.compile(model)
    leaves the call of the hooks to Python, and traces each of them and `forward` by itself."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    code = InstructionTranslator.current_tx().output.root_tx.f_code
    return code in (JointFactors.open.__code__, JointFactors.close.__code__)


# As torch.compiler.assume_constant_result does, without importing Dynamo.
_note_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_noted._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_traced_by_itself._dynamo_marked_constant = True  # type: ignore[attr-defined]


class JointFactors:
    """The factors of whole groups, between `open` and `close`."""

    def __init__(self) -> None:
        # One attribute, so that a thread never takes what another one's forward holds.
        self._now: tuple[object, dict[tuple[FactorGroup, bool], _Held]] | None = None
        self._open = False  # between traces of `open` and `close` by themselves

    def __reduce__(self) -> Any:
        return JointFactors, ()

    def watch(self, model: nn.Module) -> None:
        """Compute factors once in each of the model's forwards, by hooks on it."""
        model.register_forward_pre_hook(self.open)
        model.register_forward_hook(self.close, always_call=True)

    def unwatch(self, model: nn.Module) -> None:
        """Remove the hooks; torch.cuda.make_graphed_callables, for one, takes no module with any.
        The linears make their own factors then."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]
                    model._forward_hooks_always_called.pop(key, None)

    def open(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        if torch.compiler.is_dynamo_compiling():
            if _is_traced_by_itself():
                self._open = True
            else:
                _note_traced()
        else:
            self._now = None if torch.compiler.is_compiling() else (_circumstances(), {})

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model; runs after an exception too."""
        if not torch.compiler.is_dynamo_compiling():
            self._now, self._open = None, False
        elif _is_traced_by_itself():
            self._open = False

    @property
    def traced(self) -> bool:
        """Whether a graph is being traced that a model's own forward is part of, with all its
        blocks."""
        return self._open or _is_noted()

    def get(self, group: FactorGroup, site: str, dropout: bool) -> Factors | None:
        """The operands for one site, or None where it should ask the group for its own.

        Args:
            group: the site's group.
            site: the site's name.
            dropout: apply the method's dropout (training).
        """
        if not group.joint or torch.compiler.is_compiling():
            return None
        held = self._held(group, dropout, {site})
        return None if held is None else held.factors[site]

    def _held(self, group: FactorGroup, dropout: bool, sites: set[str]) -> _Held | None:
        """What a group's sites take, made now if it is not there or not fresh."""
        now = self._now
        if now is None or now[0] != _circumstances() or _is_traced():
            return None
        held = now[1].get((group, dropout))
        # A linear that is called again in the same forward draws masks of its own.
        again = dropout and held is not None and not held.given.isdisjoint(sites)
        if held is None or again or not held.are_fresh(group):
            if _is_uncounted(group):
                return None
            now[1][group, dropout] = held = _Held(group, dropout)
        elif held.stream is not None and held.stream != _stream(group):
            return None
        held.given |= sites
        return held

    def stacks(self, kinds: Sequence[Kind], dropout: bool) -> list[tuple[Tensor, Tensor]] | None:
        """Of each kind of linear down [L, K, Ra] and B [L, N, Ra]; None where `get` gives none.

        Args:
            kinds: all groups' are joint.
            dropout: as there.
        """
        found = []
        products: dict[int, Any] = {}  # by group
        for kind in kinds:
            group = kind.group
            if id(group) not in products:
                if torch.compiler.is_compiling():
                    products[id(group)] = group.joint_products(dropout)
                else:
                    own = {site for k in kinds if k.group is group for site in k.sites}
                    held = self._held(group, dropout, own)
                    if held is None:
                        return None
                    products[id(group)] = held.products
            found.append(group.stacked(products[id(group)], kind.plan))
        return found


def _circumstances() -> object:
    """What has to be the same where factors are made and where they are used.

    A checkpointed segment runs without gradients, or under hooks that take what it saves, and is
    run again in backward: its linears must do the same both times, and draw the same masks.
    """
    return (
        threading.get_ident(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._current_graph_task_id(),
    )


def _is_traced() -> bool:
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or torch.jit.is_tracing()


def _parameters(group: FactorGroup) -> Iterable[nn.Parameter | None]:
    """The group's, those of a parametrization included."""
    return group.parameters() if group._modules else group._parameters.values()


def _is_uncounted(group: FactorGroup) -> bool:
    """Whether nobody counts what is written to its parameters in place."""
    return any(p is not None and p.is_inference() for p in _parameters(group))


def _state(group: FactorGroup) -> list[tuple[nn.Parameter | None, int | None, bool | None]]:
    """The group's parameters, how often each was written in place, and whether it learns."""
    return [
        (None, None, None) if p is None else (p, p._version, p.requires_grad)
        for p in _parameters(group)
    ]


def _version(tensor: Tensor) -> int | None:
    """How often it was written in place; for inference tensors nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _stream(group: FactorGroup) -> object:
    """The present stream: nothing would make another one wait for what was computed here."""
    device = next((p.device for p in group._parameters.values() if p is not None), None)
    return None if device is None or device.type != "cuda" else torch.cuda.current_stream(device)


def keep_graph(compute: Compute, *inputs: Tensor) -> tuple[Tensor, ...]:
    """compute(*inputs), through which backward may go any number of times.

    Each linear alone has a graph of its own down to the parameters, so that the losses of two parts
    of a model can go backward one after the other. They still can where the parts share this.

    Args:
        compute: differentiable torch that gives the same results when it is run again.
        inputs: what it is differentiated by.

    Raises:
        RuntimeError: in backward, when an input has been changed in place since.
    """
    with _without_autocast(inputs[0].device):
        if torch.compiler.is_compiling():
            return compute(*inputs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return functions.apply(_KeptGraph, compute, *inputs)  # type: ignore[no-any-return]
        return compute(*inputs)


class _KeptGraph(torch.autograd.Function):
    """Holds a graph of its own from detached inputs until its first backward."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.compute, ctx.inputs = compute, inputs
        ctx.versions = [_version(t) for t in inputs]
        ctx.graph = _, inner = _graph_of(compute, inputs)
        outputs = tuple(t.detach() for t in inner)
        pairs = zip(outputs, inner, strict=True)
        ctx.mark_non_differentiable(*(out for out, own in pairs if not own.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.versions != [_version(t) for t in ctx.inputs]:
            raise RuntimeError(
                "an adapter's factor was modified by an inplace operation between forward and"
                " backward: run the forward again"
            )
        needs = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return None, *(None for _ in needs)
        again = torch.is_grad_enabled()  # create_graph: a second derivative goes through the inputs
        with _without_autocast(ctx.inputs[0].device):
            if again:
                sources, outputs = ctx.inputs, ctx.compute(*ctx.inputs)
            else:
                # Not kept: a loss that is kept would hold it. Another backward makes it again.
                sources, outputs = ctx.graph or _graph_of(ctx.compute, ctx.inputs)
                ctx.graph = None
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
            found = iter(
                torch.autograd.grad(
                    [output for output, _ in pairs],
                    [source for source, need in zip(sources, needs, strict=True) if need],
                    [grad for _, grad in pairs],
                    create_graph=again,
                    allow_unused=True,
                )
            )
        return None, *(next(found) if need else None for need in needs)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Meta tensors have no autocast, and torch raises for them."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _graph_of(
    compute: Compute, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Detached inputs and what `compute` makes of them, with its graph."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    with torch.enable_grad(), _own_saved_tensors():
        return leaves, compute(*leaves)


def _own_saved_tensors() -> contextlib.AbstractContextManager[Any]:
    """Keep what is saved from hooks: a checkpoint's would run the model again to bring it back."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)

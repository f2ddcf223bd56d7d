"""What `attach` leaves on a model: a bank of factors that carries the record of the change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..methods.base import FactorGroup, Factors, Method, Site
from ..methods.joint import Kind
from ..nn import FactorBank, Place
from .call_watch import CallWatch
from .chained import has_hooks, unchain

BANK_NAME = "factor_bank"
BASELINE_NAME = "baseline"  # a baseline's parts, at the model's root likewise


@dataclass(frozen=True)
class Attachment:
    """What `attach` did to a model.

    Attributes:
        method: the method's configuration.
        sites: the adapted linears, in the model's order.
        modules_to_train: names of the modules trained whole.
        base_shapes: parameter name → shape before attaching; an adapter file carries it to
            recognise the architecture.
        required_grad: parameter name → requires_grad before attaching.
        separated_bias: attention modules whose `qkv_bias_separate` was switched on.
        without_nested_tensors: encoders of torch.nn whose `use_nested_tensor` was switched off.
        base_buffers: name → copy of each buffer that is part of the frozen model's state, from
            before attaching: training may change them (BatchNorm's statistics).
    """

    method: Method
    sites: tuple[Site, ...]
    modules_to_train: tuple[str, ...]
    base_shapes: dict[str, tuple[int, ...]]
    required_grad: dict[str, bool]
    separated_bias: tuple[str, ...] = ()
    without_nested_tensors: tuple[str, ...] = ()
    base_buffers: dict[str, Tensor] = field(default_factory=dict)


class AttachedBank(FactorBank):
    """The bank at an attached model's root; the record on it follows deepcopy and pickle.

    Args:
        groups: as in FactorBank.
        sites: as in FactorBank.
        attachment: what `attach` did.
        strict: raise in a forward where an adapted linear cannot learn, instead of warning once.

    Attributes:
        calls: how often each adapted linear runs.
        unchained: why `attach` left the model's blocks to run one module after the other; None
            where they may run as a chain.

    Raises:
        ValueError: a group named like one of the bank's own attributes.
    """

    unchained: str | None = None

    def __init__(
        self,
        groups: Mapping[str, FactorGroup],
        sites: Mapping[str, str],
        attachment: Attachment,
        strict: bool,
    ) -> None:
        self.attachment = attachment  # set first, so that no group can take its name
        self.calls = CallWatch(sites, strict)
        super().__init__(groups, sites)

    def factors(self, site: str, dropout: bool) -> Factors:
        """As FactorBank's; the call is counted."""
        self.calls.count(site)
        return super().factors(site, dropout)

    def stacks(self, kinds: Sequence[Kind], dropout: bool) -> list[tuple[Tensor, Tensor]] | None:
        """As FactorBank's; the calls are counted."""
        found = super().stacks(kinds, dropout)
        if found is not None:
            for kind in kinds:
                for site in kind.sites:
                    self.calls.count(site)
        return found

    def factors_in_graph(self, place: Place, dropout: bool) -> Factors:
        """As FactorBank's; the call is noted."""
        self.calls.note(place.pattern)
        return super().factors_in_graph(place, dropout)

    def task_factors(self, site: str) -> Factors:
        """As FactorBank's; the call is counted."""
        self.calls.count(site)
        return super().task_factors(site)

    def unwatch(self, model: nn.Module) -> None:
        """Remove the bank's hooks from the model; torch.cuda.make_graphed_callables, for one, takes
        no module with any. Linears make their own factors then, nobody counts their calls, and
        layers that a chain finds by hooks run one by one."""
        self.joint_factors.unwatch(model)
        self.calls.unwatch(model)
        if has_hooks(model):
            unchain(model)
            self.unchained = "the hooks were removed that it needs"


def state_buffers(model: nn.Module, exclude: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) for those that the model's state dict holds.

    Args:
        model: the model to look through.
        exclude: names of modules to leave out.
    """
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            stored = name.rpartition(".")[2] not in module._non_persistent_buffers_set
            if stored and not is_inside(name, exclude):
                yield name, buffer


def parameters_to_train(
    model: nn.Module, modules: Sequence[str], own: Sequence[str] = ()
) -> list[nn.Parameter]:
    """Those that have to require gradients: all of the modules that torch lets, and `own`.

    Args:
        model: the model.
        modules: names of the modules trained whole; their whole numbers stay as they are.
        own: names of further parameters.

    Raises:
        ValueError: one was made in inference mode, where this is outside.
    """
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in own or (is_inside(name, modules) and parameter.is_floating_point())
    }
    for name, parameter in found.items():
        if not _may_require_grad(parameter):
            raise ValueError(
                f"model must have parameters that can be trained, got {name!r} that"
                " torch.inference_mode() made: build the model outside it, or pass"
                " modules_to_train=() where it is not to be trained"
            )
    return list(found.values())


def restore_gradients(model: nn.Module, required: Mapping[str, bool]) -> None:
    """Give parameters the requires_grad that they had, by their names, where torch lets."""
    for name, parameter in model.named_parameters():
        wanted = required.get(name, parameter.requires_grad)
        if not wanted or _may_require_grad(parameter):
            parameter.requires_grad_(wanted)


def _may_require_grad(parameter: nn.Parameter) -> bool:
    return not parameter.is_inference() or torch.is_inference_mode_enabled()


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter or buffer belongs to one of the modules."""
    return name.startswith(tuple(f"{module}." for module in modules))


def same_numbers(tensor: Tensor, base: Tensor) -> bool:
    """Whether a buffer holds what its copy from before holds, in its own dtype and place."""
    if tensor.is_meta:
        return base.is_meta
    if base.is_meta or tensor.shape != base.shape:
        return False
    with torch.no_grad():
        return torch.equal(tensor, base.to(tensor))


def find_bank(model: nn.Module) -> AttachedBank | None:
    """The bank of the adapter that `model` carries, if it carries one."""
    bank = getattr(model, BANK_NAME, None)
    return bank if isinstance(bank, AttachedBank) else None


def require_plain(model: nn.Module) -> None:
    """Check that `model` is a module without an adapter.

    Raises:
        TypeError: it is no nn.Module.
        ValueError: it carries an adapter or a baseline.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if find_bank(model) is not None:
        raise ValueError(
            f"model must carry no adapter, got a {type(model).__name__} that has one:"
            " detach it first"
        )
    if hasattr(model, BASELINE_NAME):
        raise ValueError(
            f"model must carry no baseline, and have no attribute {BASELINE_NAME!r} of its own, got"
            f" a {type(model).__name__} that has one: detach it first"
        )

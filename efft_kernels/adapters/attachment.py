"""What `attach` leaves on a model: a bank of factors that carries the record of the change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..methods.base import FactorGroup, Factors, Method, Site
from ..nn import FactorBank
from .call_watch import CallWatch

BANK_NAME = "factor_bank"


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
    """

    method: Method
    sites: tuple[Site, ...]
    modules_to_train: tuple[str, ...]
    base_shapes: dict[str, tuple[int, ...]]
    required_grad: dict[str, bool]
    separated_bias: tuple[str, ...] = ()
    without_nested_tensors: tuple[str, ...] = ()


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
        strict: bool = False,
    ) -> None:
        self.attachment = attachment  # set first, so that no group can take its name
        self.calls = CallWatch(sites, strict)
        super().__init__(groups, sites)

    def factors(self, site: str, dropout: bool) -> Factors:
        """As FactorBank's; the call is counted."""
        self.calls.count(site)
        return super().factors(site, dropout)

    def task_factors(self, site: str) -> Factors:
        """As FactorBank's; the call is counted."""
        self.calls.count(site)
        return super().task_factors(site)

    def unwatch(self, model: nn.Module) -> None:
        """Remove the bank's hooks from the model; torch.cuda.make_graphed_callables, for one, takes
        no module with any. Linears make their own factors then, and nobody counts their calls."""
        self.joint_factors.unwatch(model)
        self.calls.unwatch(model)


def find_bank(model: nn.Module) -> AttachedBank | None:
    """The bank of the adapter that `model` carries, if it carries one."""
    bank = getattr(model, BANK_NAME, None)
    return bank if isinstance(bank, AttachedBank) else None


def require_plain(model: nn.Module) -> None:
    """Check that `model` is a module without an adapter.

    Raises:
        TypeError: it is no nn.Module.
        ValueError: it carries an adapter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if find_bank(model) is not None:
        raise ValueError(
            f"model must carry no adapter, got a {type(model).__name__} that has one:"
            " detach it first"
        )

"""What is peculiar to a model family, besides the names of its linears (roles.py).

Where a model does not tell its classifier, or its attention uses a linear's weight without calling
the linear, that is dealt with here; so are the hooks with which separate q, k and v linears share
x·down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..methods.base import MHSA_ROLES, Site
from ..nn import FactorBank, FusedEFFTLinear
from ..ops.shared_projection import SharedInput
from .roles import split_name

_CLASSIFIERS = ("head", "heads", "classifier", "fc")
_SECOND_CLASSIFIER = "head_dist"  # distilled DeiT's
_QKV_SWITCH = "qkv_bias_separate"
_SHARING_ROLES = ("q", "k", "v")
# Last parts of parameters' names, "weight" aside, whose shapes go with the image size.
_POSITION_TABLE = re.compile(
    r"(?:.*_)?pos(?:ition|itional)?_emb(?:ed|edding|eddings)?\d*(?:_\w+)?|rel_pos_[hwt]"
    r"|patch_pos|relative_position_bias_table|attention_biases"
)

PEFT_QKV_WARNING = (
    f"PEFT passes the qkv of this model by unless {_QKV_SWITCH} is set on each of its"
    " attention modules: set it before PeftModel.from_pretrained"
)


def classifier_names(model: nn.Module) -> list[str]:
    """The modules that are the model's classifier, by what the model itself tells.

    timm's `get_classifier`; of a Hugging Face model for a task all that is not its base model, and
    nothing of a base model; else by the usual names.
    """
    modules = dict(model.named_modules())
    if callable(get := getattr(model, "get_classifier", None)):
        try:
            own = get()
        except AttributeError:  # it was deleted
            return []
        heads = own if isinstance(own, list | tuple) else [own]
        found = [name for name, module in modules.items() if any(module is h for h in heads)]
        return [name for name in found if name and _has_parameters(modules[name])]
    if hasattr(model, "base_model_prefix"):
        if "For" not in type(model).__name__:
            return []
        if (base := getattr(model, "base_model", model)) is not model:
            return [
                name for name, part in model.named_children() if part is not base and _is_head(part)
            ]
    first = [name for name in _CLASSIFIERS if name in modules][:1]
    return first + [name for name in (_SECOND_CLASSIFIER,) if name in modules]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_head(part: nn.Module) -> bool:
    """Whether what follows a base model is a head: no norm alone, and no transformer."""
    return any(p.dim() > 1 for p in part.parameters()) and not any(
        split_name(f"0.{name}")[1] in MHSA_ROLES for name, _ in part.named_modules()
    )


def is_position_table(name: str) -> bool:
    """Whether a parameter is a positional embedding or bias, which goes with the image size."""
    return bool(_POSITION_TABLE.fullmatch(name.removesuffix(".weight").rpartition(".")[2]))


def find_joined_qkv_bias(model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    """Attention modules that hand their qkv's weight to F.linear with a bias made in forward.

    timm's BEiT, EVA and Swin V2 do so unless `qkv_bias_separate` is set, and would then not call
    the adapted layer; both ways compute the same.
    """
    parents = (site.name.rpartition(".")[0] for site in sites if site.role == "qkv")
    return tuple(
        name for name in parents if getattr(model.get_submodule(name), _QKV_SWITCH, None) is False
    )


def set_qkv_bias_separate(model: nn.Module, names: Sequence[str], separate: bool) -> None:
    """Make the named attention modules call their qkv and add its bias afterwards, or not."""
    for name in names:
        setattr(model.get_submodule(name), _QKV_SWITCH, separate)


def share_inputs(model: nn.Module, bank: FactorBank, sites: Iterable[Site]) -> None:
    """Let the q, k and v linears of each attention module share x·down where their factors allow
    it: hooks on the module open and close what is shared.

    Args:
        model: the adapted model.
        bank: its factors.
        sites: the adapted linears.
    """
    by_parent: dict[tuple[str, object], list[str]] = {}
    for site in sites:
        key = bank.group(site.name).down_key(site.name)
        if site.role in _SHARING_ROLES and key is not None:
            parent = site.name.rpartition(".")[0]
            by_parent.setdefault((parent, (bank.group_of[site.name], key)), []).append(site.name)
    for (parent, _), names in by_parent.items():
        if len(names) < 2:
            continue
        shared = SharedInput()
        module = model.get_submodule(parent)
        module.register_forward_pre_hook(shared.open)
        _call_always(module, shared.close)
        for name in names:
            layer = model.get_submodule(name)
            assert isinstance(layer, FusedEFFTLinear)
            layer.shared_input = shared


def _call_always(module: nn.Module, hook: Any) -> None:
    """Register a forward hook that runs after an exception too.

    Under a number that equal modules have in common, below torch's own: a graph of torch.compile
    is guarded by it, and each block would need another one.
    """
    number = module.register_forward_hook(hook, always_call=True).id
    common = min(0, *module._forward_hooks) - 1
    for table in (module._forward_hooks, module._forward_hooks_always_called):
        entry: Any = table.pop(number)
        table[common] = entry


def unshare_inputs(model: nn.Module) -> None:
    """Remove every hook that `share_inputs` registered."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), SharedInput):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)

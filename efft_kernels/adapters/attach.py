"""Putting a method on a model, anew or from a file: build the factors, swap the linears, freeze the
rest."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..methods import method_from_config
from ..methods.base import Method, Site
from ..nn import FactorBank, FusedEFFTLinear
from ..ops.functional import FLOAT_DTYPES
from .adapter import BANK_NAME, Adapter, Attachment, is_attached, read_adapter_file, shorten
from .shared_input import share_inputs
from .sites import find_sites


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: str | Sequence[str] | None = None,
    layers: int | Iterable[int] | None = None,
    modules_to_train: str | Sequence[str] = ("head",),
) -> Adapter:
    """Adapt `model` in place: targeted nn.Linear become FusedEFFTLinear, all else but the head is
    frozen.

    The layers keep the very same weight and bias tensors; the factors live in a FactorBank at the
    model's root; ΔW starts at exactly zero, so the outputs do not change. All or nothing: on any
    error the model is as it was.

    Args:
        model: any module with the linears that `targets` names; by default timm's ViT, DeiT and
            Swin.
        method: a method's configuration, e.g. `EFFT2(rank=16, scale=10.0)`.
        targets: None for all attention and FFN linears; else names, dotted endings ("attn.qkv"),
            globs, or "mhsa" / "ffn", one or several.
        layers: block indices from 0; None for all.
        modules_to_train: modules that are trained whole beside the factors. "head" stands for the
            model's classifier, whatever its name.

    Returns:
        The adapter: its parameters, merge, save and detach.

    Raises:
        TypeError: model or method of the wrong kind, or a targeted module that is no plain
            nn.Linear.
        ValueError: already attached; a target, layer or module name that matches nothing; a rank
            that does not fit; a method with no place for a target; weights on several devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be a method's configuration such as EFFT2(rank=16), got {method!r}"
        )
    _check_not_attached(model)
    if hasattr(model, BANK_NAME):
        raise ValueError(f"model must not have an attribute {BANK_NAME!r} of its own")
    trained = resolve_modules_to_train(model, modules_to_train)
    targeted = find_sites(model, targets, layers, exclude=trained)
    sites = method.select(targeted)
    if not sites:
        raise ValueError(
            f"targets must include linears that {method} adapts, got only"
            f" {', '.join(sorted({site.role for site in targeted}))}"
        )
    linears: dict[str, nn.Linear] = {}
    for name in (site.name for site in sites):
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"target {name!r} must be an nn.Linear itself, got {type(linear).__name__}"
            )
        _check_not_bypassed(model, name)
        linears[name] = linear
    devices = sorted({str(linear.weight.device) for linear in linears.values()})
    if len(devices) > 1:
        raise ValueError(f"targeted weights must be on one device, got {devices}")
    dtypes = [linear.weight.dtype for linear in linears.values()]
    if not all(dtype in FLOAT_DTYPES for dtype in dtypes):
        raise TypeError(
            "targeted weights must be float64, float32, float16 or bfloat16, got"
            f" {', '.join(sorted(set(map(str, dtypes))))}"
        )

    with torch.device(devices[0]):
        groups = method.build(sites)
    members = method.members(sites)
    bank = FactorBank(groups, {s.name: name for name, group in members.items() for s in group})
    bank.to(functools.reduce(torch.promote_types, dtypes, torch.float32))
    bank.train(model.training)
    layers_by_site = {
        name: FusedEFFTLinear.from_linear(linear, bank=bank, site=name)
        for name, linear in linears.items()
    }
    bank.attachment = attachment = Attachment(
        method=method,
        sites=tuple(sites),
        modules_to_train=tuple(trained),
        base_shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        required_grad={name: p.requires_grad for name, p in model.named_parameters()},
        separated_bias=tuple(_modules_with_fused_bias(model, sites)),
    )
    return _install(model, bank, layers_by_site, attachment)


def _check_not_bypassed(model: nn.Module, name: str) -> None:
    """Raise where torch's own encoder layer would read the weight directly and skip the forward."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TypeError(
            f"target {name!r} must be called by its parent, but nn.TransformerEncoderLayer's fast"
            " path reads its weight in eval: torch.backends.mha.set_fastpath_enabled(False) first"
        )


def _check_not_attached(model: nn.Module) -> None:
    if is_attached(model):
        raise ValueError(
            f"model must carry no adapter, got a {type(model).__name__} that has one:"
            " detach it first"
        )


def _install(
    model: nn.Module,
    bank: FactorBank,
    layers: dict[str, FusedEFFTLinear],
    attachment: Attachment,
) -> Adapter:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in attachment.modules_to_train:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(True)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for name in attachment.separated_bias:
        attention: Any = model.get_submodule(name)
        attention.qkv_bias_separate = True
    model.add_module(BANK_NAME, bank)
    share_inputs(model, bank, attachment.sites)
    return Adapter(model)


def _modules_with_fused_bias(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Attention modules that hand their qkv's weight to F.linear with a bias made in forward.

    timm's BEiT, EVA and Swin V2 do so unless `qkv_bias_separate` is set, and would pass the adapted
    layer by; the two ways compute the same.
    """
    parents = (site.name.rpartition(".")[0] for site in sites if site.role == "qkv")
    return [
        name
        for name in parents
        if getattr(model.get_submodule(name), "qkv_bias_separate", None) is False
    ]


def resolve_modules_to_train(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    """The dotted names of the modules to train whole; "head" becomes the model's classifier's own
    name or names.

    Raises:
        TypeError: not a name or a sequence of names.
        ValueError: a name that is no module of the model.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"modules_to_train must be module names, got {names!r}")
    modules = dict(model.named_modules())
    resolved: list[str] = []
    for name in names:
        found = _classifier_names(model, modules) if name == "head" else [name]
        if not found or any(module not in modules or not module for module in found):
            examples = ", ".join(child for child, _ in model.named_children())
            raise ValueError(
                f"modules_to_train must name modules of {type(model).__name__} ({examples}),"
                f" got {name!r}; pass modules_to_train=() where there is no classifier, and attach"
                " before torch.compile or DataParallel wraps the model"
            )
        resolved += [module for module in found if module not in resolved]
    return resolved


def _classifier_names(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    config = getattr(model, "pretrained_cfg", None)
    classifier = config.get("classifier") if isinstance(config, dict) else None
    declared: list[str] = [classifier] if isinstance(classifier, str) else list(classifier or ())
    if found := [name for name in declared if name in modules]:
        return found
    usual: tuple[str, ...] = ("head", "heads", "classifier", "fc")
    second = [name for name in ("head_dist",) if name in modules]  # distilled DeiT's
    return [name for name in usual if name in modules][:1] + second


def load(model: nn.Module, path: str | os.PathLike[str]) -> Adapter:
    """Attach the adapter saved at `path` to `model`, which must be the architecture it was trained
    on.

    All or nothing: on any error the model is as it was. Nothing is unpickled.

    Args:
        model: the base model, with the same parameter names and shapes, the head's included.
        path: a file written by `Adapter.save`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole adapter file, an unknown version, another architecture, or already
            attached.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    metadata, tensors = read_adapter_file(path)
    try:
        method = method_from_config(json.loads(metadata["method"]))
        targets = json.loads(metadata["targets"])
        modules_to_train = json.loads(metadata["modules_to_train"])
        expected = {
            name: tuple(shape) for name, shape in json.loads(metadata["base_shapes"]).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"path must be an adapter file with a readable header, got {path}: {error}"
        ) from None
    _check_not_attached(model)
    _check_architecture(model, expected)
    adapter = attach(model, method, targets=targets, modules_to_train=modules_to_train)
    try:
        adapter.load_state_dict(tensors)
    except ValueError as error:
        adapter.detach()
        raise ValueError(
            f"path must hold the tensors its header describes, got {path}: {error}"
        ) from None
    return adapter


def _check_architecture(model: nn.Module, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if found == expected:
        return
    differences = [
        f"{name} expected {_shape(expected.get(name))}, got {_shape(found.get(name))}"
        for name in dict.fromkeys([*expected, *found])
        if expected.get(name) != found.get(name)
    ]
    raise ValueError(
        f"model must be the architecture the adapter was trained on, got {type(model).__name__}"
        f" with {len(differences)} differing parameters: {shorten(differences)}"
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))

"""Putting a method on a model, anew or from a file.

`attach` builds the factors, swaps the linears and freezes the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..methods.base import (
    FFN_ROLES,
    MHSA_ROLES,
    FactorGroup,
    Method,
    Site,
    check_choice,
)
from ..methods.lora import LoRA
from ..methods.sharded import check_not_sharded
from ..nn import FusedEFFTLinear, check_weight_is_stored
from ..ops.checks import FLOAT_DTYPES
from .adapter import Adapter
from .adapter_file import (
    errors_about,
    modules_with_tensors,
    read_adapter_file,
    read_header,
    shorten,
)
from .architectures import (
    classifier_names,
    find_joined_qkv_bias,
    is_position_table,
    set_qkv_bias_separate,
    share_inputs,
)
from .attachment import (
    BANK_NAME,
    AttachedBank,
    Attachment,
    is_inside,
    parameters_to_train,
    require_plain,
    state_buffers,
)
from .bypassed import why_bypassed
from .call_watch import tell_of_frozen
from .chained import FUSE, chain
from .coverage import coverage, not_taken
from .peft_guard import guard
from .roles import split_name
from .sites import find_sites
from .swapping import adapted_layer, linear_at, put_in
from .torch_attention import find_nested_tensors, keep_off_fast_paths


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: str | Sequence[str] | None = None,
    layers: int | Iterable[int] | None = None,
    modules_to_train: str | Sequence[str] | None = None,
    fuse: str = "auto",
    strict: bool = False,
) -> Adapter:
    """Adapt `model` in place: targeted nn.Linear become FusedEFFTLinear, the rest is frozen.

    The layers keep the very same weight and bias tensors; the factors live in a FactorBank at the
    model's root; ΔW starts at zero, so the outputs change by rounding at most. It is the parameters
    that are frozen: BatchNorm's statistics move in training as ever, and are in the adapter's file.
    All or nothing: on any error the model is as it was.

    Args:
        model: any module with the linears that `targets` names.
        method: a method's configuration, e.g. `EFFT2(rank=16, scale=10.0)`.
        targets: None for all attention and FFN linears that are known by name, of a model that
            reads text as well those of its vision tower; a warning tells what it passes over. Else
            names, dotted endings ("attn.qkv"), globs, or "mhsa" / "ffn", one or several; a warning
            tells which of these are none of the method's `matrices` (LoRA's are q and v).
        layers: block indices from 0; None for all.
        modules_to_train: modules that are trained whole along with the factors. "head" stands for
            the model's classifier, whatever its name; None for that too, if the model has one.
        fuse: "pairs" lets a linear whose x came out of a norm or an activation make it again in the
            backward from what that module keeps anyway, so that the adapter keeps next to nothing
            of its own; outputs, hooks and gradients are as ever. "auto" also lets the blocks of a
            model that is known exactly run as a chain, where norm, GELU and residual share the
            kernels of the adapted linears: timm's VisionTransformer, and Hugging Face's ViT and
            DINOv2, in training on a GPU under autocast to a half precision. "off" keeps every x.
            `describe` tells what each linear does, and why no chain runs.
        strict: what happens where factors cannot learn: True raises, False warns once. Asked in
            each forward of the model whose output needs its gradient: a linear that did not run, or
            ran without gradients (`describe` shows the calls). Asked here: adapters inside `model`,
            which are frozen with the rest.

    Returns:
        The adapter: its parameters, merge, save and detach.

    Raises:
        TypeError: model, method or strict of the wrong kind, a targeted module that is no plain
            nn.Linear, one whose weight a hook or a parametrization computes, or one whose parent
            uses its weight without calling it.
        ValueError: already attached; a target, layer or module name that matches nothing; a rank
            that does not fit; a method with no place for a target; weights on several devices; a
            model that torch or PEFT has wrapped; an unknown `fuse`; a module to train that was made
            in inference mode; with `strict`, an adapter inside `model` that would be frozen.
        RuntimeError: FSDP2 has sharded the model.
    """
    require_plain(model)
    _check_not_wrapped(model)
    check_choice("fuse", fuse, FUSE)
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be a bool, got {strict!r}")
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be a method's configuration such as EFFT2(rank=16), got {method!r}"
        )
    if hasattr(model, BANK_NAME):
        raise ValueError(f"model must not have an attribute {BANK_NAME!r} of its own")
    trained = resolve_modules_to_train(model, modules_to_train)
    to_train = parameters_to_train(model, trained)
    targeted = find_sites(model, targets, layers, exclude=trained)
    sites = method.select(targeted)
    if not sites:
        raise ValueError(
            f"targets must include linears that {method} adapts, got only"
            f" {', '.join(sorted({site.role for site in targeted}))}"
            + ("; with matrices=None it adapts these" if hasattr(method, "matrices") else "")
        )
    passed_over = None
    if targets is not None:
        passed_over = not_taken(method, targeted)
    elif layers is None:
        found = coverage(model, (site.name for site in targeted), trained)
        passed_over = found.warning(method, targeted)
    linears = _plain_linears(model, sites)
    check_not_sharded(model, "be adapted: call attach or load first")
    weights = [linear.weight for linear in linears.values()]
    # In inference mode the factors could never be trained.
    with torch.inference_mode(False), torch.device(weights[0].device):
        groups = _build(model, method, sites)
    members = method.members(sites)
    bank = AttachedBank(
        groups,
        {site.name: name for name, group in members.items() for site in group},
        Attachment(
            method=method,
            sites=tuple(sites),
            modules_to_train=tuple(trained),
            base_shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
            required_grad={name: p.requires_grad for name, p in model.named_parameters()},
            separated_bias=find_joined_qkv_bias(model, sites),
            without_nested_tensors=find_nested_tensors(model, sites),
            base_buffers={
                name: buffer.detach().clone() for name, buffer in state_buffers(model, trained)
            },
        ),
        strict,
    )
    # Factors train in at least float32, whatever the weights are stored in.
    bank.to(functools.reduce(torch.promote_types, (w.dtype for w in weights), torch.float32))
    bank.train(model.training)
    layers_by_site = {
        name: adapted_layer(model, name, linear, bank) for name, linear in linears.items()
    }
    tell_of_frozen(model, trained, strict)
    if passed_over:
        warnings.warn(passed_over, stacklevel=2)
    _install(model, bank, layers_by_site, to_train)
    for layer in layers_by_site.values():
        layer.remakes_input = fuse != "off"
    bank.unchained = chain(model, bank) if fuse == "auto" else f"fuse={fuse!r}"
    return Adapter(model)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    keep_head: bool = False,
    fuse: str = "auto",
    strict: bool = False,
) -> Adapter:
    """Attach the adapter saved at `path` to `model`, of the architecture it was trained on.

    All or nothing: on any error the model is as it was. Nothing is unpickled.

    Args:
        model: the base model, with the same parameter names and shapes, the head's included. It
            may be built for another image size: positional embeddings and bias tables that are not
            trained are the model's own.
        path: a file written by `Adapter.save`.
        keep_head: take the factors alone, and leave the model's own modules where the file has
            modules trained whole: a head for other classes, say. They are trained as in the file;
            those that the model is without, as with timm's num_classes=0, are left out.
        fuse, strict: as in `attach`.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `model` is no nn.Module.
        ValueError: not a whole adapter file, an unknown version, another architecture, already
            attached, or an unknown `fuse`.
    """
    require_plain(model)
    with errors_about(path):
        return _load(model, path, keep_head, fuse, strict)


def _load(
    model: nn.Module, path: str | os.PathLike[str], keep_head: bool, fuse: str, strict: bool
) -> Adapter:
    metadata, tensors = read_adapter_file(path)
    header = read_header(metadata, path)
    trained = header.modules_to_train
    if keep_head:
        with_parameters = {n.rpartition(".")[0] for n, _ in model.named_parameters()}
        present = [
            name for name in trained if any(is_inside(f"{n}.", [name]) for n in with_parameters)
        ]
        expected = {n: s for n, s in header.base_shapes.items() if not is_inside(n, trained)}
        own = {n: tuple(p.shape) for n, p in model.named_parameters() if is_inside(n, trained)}
        check_architecture(model, expected | own, trained)
        trained = present
    else:
        check_architecture(model, header.base_shapes, trained)
        trained = modules_with_tensors(trained, tensors)
    adapter = attach(
        model,
        header.method,
        targets=header.targets,
        modules_to_train=trained,
        fuse=fuse,
        strict=strict,
    )
    if keep_head:
        own_state = adapter.required_state().items()
        tensors = {key: t for key, t in tensors.items() if not key.startswith("modules.")}
        tensors |= {key: t for key, t in own_state if key.startswith("modules.")}
    try:
        adapter.load_state_dict(tensors)
    except ValueError as error:
        adapter.detach()
        raise ValueError(
            f"path must hold the tensors its header describes, got {path}: {error}"
        ) from None
    return adapter


def _check_not_wrapped(model: nn.Module) -> None:
    """Refuse what wraps a model: the bank belongs at the root of the model itself."""
    peft = "merge_and_unload() first, or read its adapter with import_peft_lora"
    wrappers = dict.fromkeys(("PeftModel", "PeftMixedModel"), peft) | dict.fromkeys(
        ("DataParallel", "DistributedDataParallel", "OptimizedModule"),
        "attach before torch.compile or DataParallel wraps the model",
    )
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if way := next((wrappers[kind] for kind in kinds if kind in wrappers), None):
        raise ValueError(f"model must not be wrapped, got a {type(model).__name__}; {way}")
    for name, module in model.named_modules():
        if "BaseTunerLayer" in (kind.__name__ for kind in type(module).__mro__):
            raise ValueError(
                f"model must hold no layers of PEFT, got a {type(module).__name__} at {name!r};"
                f" {peft}"
            )


def _build(model: nn.Module, method: Method, sites: Sequence[Site]) -> dict[str, FactorGroup]:
    """`method.build`; where the shapes do not fit the method, the error names what would."""
    try:
        return method.build(sites)
    except ValueError as error:
        lora = LoRA(matrices=None)
        if "LoRA" in str(error) or _fits(method, sites) or not _fits(lora, sites):
            raise
        parts = {"mhsa": MHSA_ROLES, "ffn": FFN_ROLES}
        fitting = [
            part
            for part, roles in parts.items()
            if _fits(method, [site for site in sites if site.role in roles])
        ]
        part = f", and {type(method).__name__} takes targets={fitting[0]!r}" if fitting else ""
        raise ValueError(
            f"{error}; LoRA(matrices=None) takes all of {type(model).__name__}{part}"
        ) from None


def _fits(method: Method, sites: Sequence[Site]) -> bool:
    """Whether a method takes linears of these shapes, at the lowest rank."""
    low = {name: rank for name, rank in (("rank", 1), ("ffn_rank", None)) if hasattr(method, name)}
    try:
        with torch.device("meta"):
            return bool(sites) and bool(dataclasses.replace(method, **low).build(sites))
    except ValueError:
        return False


def resolve_modules_to_train(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    """The dotted names of the modules to train whole.

    Args:
        model: the model to look through.
        names: one or several; "head" becomes the classifier's own name or names, and so does None,
            for none where the model has no classifier.

    Raises:
        TypeError: not a name or a sequence of names.
        ValueError: a name that is no module of the model.
    """
    if names is None:
        return classifier_names(model)
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"modules_to_train must be module names, got {names!r}")
    modules = dict(model.named_modules())
    resolved: list[str] = []
    for name in names:
        found = classifier_names(model) if name == "head" else [name]
        if not found or any(module not in modules or not module for module in found):
            examples = ", ".join(child for child, _ in model.named_children())
            raise ValueError(
                f"modules_to_train must name modules of {type(model).__name__} ({examples}),"
                f" got {name!r}; pass modules_to_train=() where there is no classifier"
            )
        resolved += [module for module in found if module not in resolved]
    return resolved


def _plain_linears(model: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Linear]:
    """Site → its nn.Linear, checked to be one that can be swapped."""
    linears: dict[str, nn.Linear] = {}
    refused: dict[str, str] = {}
    for name in (site.name for site in sites):
        linear = linear_at(model, name)
        check_weight_is_stored(linear, f"target {name!r}")
        if reader := why_bypassed(model, name):
            refused[name] = f"called by its parent, but {reader} uses its weight without that"
        elif type(linear) is not nn.Linear:
            refused[name] = f"an nn.Linear itself, got {type(linear).__name__}"
        else:
            linears[name] = linear
    for name, reason in refused.items():
        others = [split_name(site)[0] for site in linears]
        tails = dict.fromkeys(
            site.removeprefix(f"{block}.") for site, block in zip(linears, others, strict=True)
        )
        raise TypeError(f"target {name!r} must be {reason}; {_way_out(list(tails))}")
    devices = sorted({str(linear.weight.device) for linear in linears.values()})
    if len(devices) > 1:
        raise ValueError(f"targeted weights must be on one device, got {devices}")
    dtypes = {linear.weight.dtype for linear in linears.values()}
    if not dtypes <= set(FLOAT_DTYPES):
        raise TypeError(
            "targeted weights must be float64, float32, float16 or bfloat16, got"
            f" {', '.join(sorted(map(str, dtypes)))}"
        )
    return linears


def _way_out(others: Sequence[str]) -> str:
    """What to pass so that a refused linear is left out, given what else is targeted."""
    named = ", ".join([*map(repr, others[:8]), *["..."] * (not 0 < len(others) <= 8)])
    return f"leave it out, e.g. targets=[{named}]"


def _install(
    model: nn.Module,
    bank: AttachedBank,
    layers: Mapping[str, FusedEFFTLinear],
    to_train: Iterable[nn.Parameter],
) -> None:
    """Change the model; nothing here can fail."""
    attachment = bank.attachment
    model.requires_grad_(False)
    for parameter in to_train:
        parameter.requires_grad_(True)
    put_in(model, layers)
    keep_off_fast_paths(model, attachment.sites, attachment.without_nested_tensors)
    set_qkv_bias_separate(model, attachment.separated_bias, True)
    model.add_module(BANK_NAME, bank)
    if any(bank.group(site.name).joint for site in attachment.sites):
        bank.joint_factors.watch(model)
    bank.calls.watch(model)
    guard(model)
    share_inputs(model, bank, attachment.sites)


def check_architecture(
    model: nn.Module,
    expected: Mapping[str, tuple[int, ...]],
    trained: Sequence[str],
    *,
    may_keep_head: bool = True,
) -> None:
    """Check that a model has the parameters that a file was written for.

    Args:
        model: the plain model.
        expected: parameter name → shape.
        trained: modules that the file holds whole.
        may_keep_head: whether the user's call takes keep_head.

    Raises:
        ValueError: it has others; it names the first.
    """
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = [
        name for name in dict.fromkeys([*expected, *found]) if expected.get(name) != found.get(name)
    ]
    if all(
        is_position_table(name)
        and not is_inside(name, trained)
        and len(expected.get(name, ())) == len(found.get(name, ()))
        for name in names
    ):
        return
    differences = [
        f"{name} expected {_shape(expected.get(name))}, got {_shape(found.get(name))}"
        for name in names
    ]
    keep = "pass keep_head=True to load the factors alone, or " if may_keep_head else ""
    advice = (
        f"; these modules are in the file whole: {keep}give the model such ones first, timm's by"
    )
    raise ValueError(
        f"model must be the architecture the adapter was trained on, got {type(model).__name__}"
        f" with {len(differences)} differing parameters: {shorten(differences)}"
        + (
            f"{advice} model.reset_classifier(classes)"
            if all(is_inside(name, trained) for name in names)
            else ""
        )
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))

"""Putting a baseline on a model, anew or from a file, and the handle on it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_file import (
    errors_about,
    module_key,
    modules_with_tensors,
    write_adapter_file,
)
from ..adapters.attach import check_architecture, resolve_modules_to_train
from ..adapters.attachment import (
    BASELINE_NAME,
    AttachedBank,
    Attachment,
    parameters_to_train,
    require_plain,
    restore_gradients,
    state_buffers,
)
from ..methods.base import Method
from ..methods.sharded import check_not_sharded, stored_state
from .base import Baseline, Part
from .baseline_file import BaselineHeader, read_baseline_file
from .description import BaselineDescription


class AttachedParts(nn.Module):
    """A baseline's parts at a model's root, with the record of the change.

    Args:
        parts: the new parameters by name.
        attachment: what was done, as for a method; its `method` is the baseline.
        own: name → copy of each of the model's own parameters that train, from before.
    """

    def __init__(
        self, parts: Mapping[str, Part], attachment: Attachment, own: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.attachment = attachment
        self.own = dict(own)
        self.merged = False
        self.unmerged: dict[str, Tensor | None] = {}

    def named_trained(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) for all that train, the head aside, each once."""
        for name, parameter in self.parts.named_parameters():
            if parameter.requires_grad:
                yield f"parts.{name}", parameter
        for name in self.own:
            yield f"own.{name}", model.get_parameter(name)


def find_baseline(model: nn.Module) -> AttachedParts | None:
    """The parts of the baseline that `model` carries, if it carries one."""
    parts = getattr(model, BASELINE_NAME, None)
    return parts if isinstance(parts, AttachedParts) else None


def attach_baseline(
    model: nn.Module,
    baseline: Baseline,
    *,
    modules_to_train: str | Sequence[str] | None = None,
) -> AttachedBaseline:
    """Put a baseline on `model` in place: what it trains requires grad, the rest is frozen.

    All or nothing: on any error the model is as it was.

    Args:
        model: one that the baseline takes.
        baseline: a configuration, e.g. `AdaptFormer(hidden=8)`.
        modules_to_train: modules that are trained whole along with it. "head" stands for the
            model's classifier, whatever its name; None for that too, if the model has one.

    Returns:
        The handle: its parameters, merge, save and detach.

    Raises:
        TypeError: model or baseline of the wrong kind, or a model that the baseline cannot take.
        ValueError: already adapted; a module name that matches nothing; a size that does not fit.
        RuntimeError: FSDP2 has sharded the model.
    """
    require_plain(model)
    if not isinstance(baseline, Baseline):
        raise TypeError(
            f"baseline must be a baseline's configuration such as BitFit(), got {baseline!r}"
        )
    trained = resolve_modules_to_train(model, modules_to_train)
    check_not_sharded(model, "be adapted: attach first")
    parameters = dict(model.named_parameters())
    own = baseline.own_parameters(model, trained)
    to_train = parameters_to_train(model, trained, own)
    floats = [p for p in parameters.values() if p.is_floating_point()]
    if not floats:
        raise ValueError(f"model must have parameters, got a {type(model).__name__} without")
    # In inference mode the parts could never be trained.
    with torch.inference_mode(False), torch.device(floats[0].device):
        parts = baseline.build(model, trained)
    if not (own or parts or trained):
        raise ValueError(f"modules_to_train must name a head for {baseline.name}, got none")
    attachment = Attachment(
        method=cast(Method, baseline),
        sites=(),
        modules_to_train=tuple(trained),
        base_shapes={name: tuple(p.shape) for name, p in parameters.items()},
        required_grad={name: p.requires_grad for name, p in parameters.items()},
        base_buffers={name: b.detach().clone() for name, b in state_buffers(model, trained)},
    )
    kept = {name: parameters[name].detach().clone() for name in own}
    record = AttachedParts(parts, attachment, kept)
    # New parameters train in at least float32, whatever the weights are stored in.
    record.to(functools.reduce(torch.promote_types, (p.dtype for p in floats), torch.float32))
    record.train(model.training)

    model.requires_grad_(False)
    for parameter in to_train:
        parameter.requires_grad_(True)
    model.add_module(BASELINE_NAME, record)
    handle = AttachedBaseline(model)
    try:
        baseline.connect(model, parts)
    except BaseException:
        handle.detach()
        raise
    return handle


def load_baseline(model: nn.Module, path: str | os.PathLike[str]) -> AttachedBaseline:
    """Attach the baseline saved at `path` to `model`, of the architecture it was trained on.

    All or nothing: on any error the model is as it was. Nothing is unpickled.

    Args:
        model: the base model, with the same parameter names and shapes, the head's included.
        path: a file written by `AttachedBaseline.save`.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `model` is no nn.Module, or one that the baseline cannot take.
        ValueError: not a whole file of a baseline, an unknown version, another architecture, or
            already adapted.
    """
    require_plain(model)
    with errors_about(path):
        header, tensors = read_baseline_file(path)
        check_architecture(model, header.base_shapes, header.modules_to_train, may_keep_head=False)
        trained = modules_with_tensors(header.modules_to_train, tensors)
        handle = attach_baseline(model, header.baseline, modules_to_train=trained)
        try:
            handle.load_state_dict(tensors)
        except ValueError as error:
            handle.detach()
            raise ValueError(
                f"path must hold the tensors its header describes, got {path}: {error}"
            ) from None
    return handle


class AttachedBaseline(Adapter):
    """An attached baseline, as `attach_baseline` and `load_baseline` return it.

    It is used as an `Adapter`; it has no adapted linears, so no `sites`, `layers` or ΔW.

    Args:
        model: the model that carries it.

    Raises:
        ValueError: the model carries no baseline.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = find_baseline(model)
        if parts is None:
            raise ValueError(
                f"model must carry a baseline, got a {type(model).__name__} without one"
            )
        self.model = model
        self.record = parts
        self.bank = cast(AttachedBank, parts)

    @property
    def _attachment(self) -> Attachment:
        if find_baseline(self.model) is not self.record:
            raise RuntimeError("this baseline was detached from its model")
        return self.record.attachment

    @property
    def baseline(self) -> Baseline:
        """The baseline's configuration."""
        return cast(Baseline, self._attachment.method)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that trains besides the head, each once: new parameters and the model's own."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names in the file: "parts.…" and "own.…"."""
        return self.record.named_trained(self.model)

    @property
    def merged(self) -> bool:
        """Whether a detached model would compute the same at present."""
        return self.record.merged

    def merge(self) -> None:
        """Make the parts a part of the weights, computed in at least float32 and rounded once.

        The model's own parameters that were trained stay as they are. Again, nothing happens.

        Raises:
            ValueError: the baseline is no change of weights.
            RuntimeError: FSDP2 has sharded the model, or a weight has since been pruned or
                parametrized.
        """
        _ = self._attachment  # raises where it was detached
        if self.merged:
            return
        check_not_sharded(self.model, "merge a baseline: save it, and load it on a plain model")
        device = next(self.model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            values = self.baseline.folded(self.model, dict(self.record.parts.items()))
        for module, leaf in map(self._owner, values):
            if leaf not in module._parameters:
                raise RuntimeError(
                    f"{leaf} must be a parameter to take a merge, but {module} computes it"
                )
        for name, value in values.items():
            module, leaf = self._owner(name)
            parameter = module._parameters[leaf]
            self.record.unmerged[name] = None if parameter is None else parameter.data
            if parameter is None:
                like = next(module.parameters())
                frozen = nn.Parameter(value.to(like.dtype), requires_grad=False)
                module.register_parameter(leaf, frozen)
            else:
                parameter.data = value.to(parameter.dtype)
        self._set_merged(True)

    def unmerge(self) -> None:
        """Put the base weights back: the very tensors from before `merge`."""
        _ = self._attachment  # raises where it was detached
        for name, data in self.record.unmerged.items():
            module, leaf = self._owner(name)
            if data is None:
                module.register_parameter(leaf, None)
            else:
                parameter = module.get_parameter(leaf)
                parameter.data = data.to(parameter)  # it may have been moved
        self.record.unmerged = {}
        self._set_merged(False)

    def _set_merged(self, merged: bool) -> None:
        self.record.merged = merged
        for part in self.record.parts.values():
            part.folded = merged  # type: ignore[assignment]

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        module, _, leaf = name.rpartition(".")
        return self.model.get_submodule(module), leaf

    def detach(self) -> nn.Module:
        """Remove the baseline: the model is as before, bit for bit, but for the head's values.

        Merged, it keeps what was trained: the weights of a merge, its own trained parameters, and
        BatchNorm's statistics.

        Returns:
            The model.

        Raises:
            RuntimeError: it was detached before, one of the model's own trained parameters was
                replaced by one of another shape, or FSDP2 has sharded the model.
        """
        attachment = self._attachment
        check_not_sharded(
            self.model, "give its baseline back: save it, and load it on a plain model"
        )
        if not self.merged:
            own = {name: self._own_parameter(name) for name in self.record.own}
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(self.record.own[name])
            self._set_buffers({})
        _remove_hooks(self.model)
        delattr(self.model, BASELINE_NAME)
        restore_gradients(self.model, attachment.required_grad)
        return self.model

    def _own_parameter(self, name: str) -> nn.Parameter:
        """One of the model's own parameters, of the shape it had."""
        base = self.record.own[name]
        now = dict(self.model.named_parameters()).get(name)
        if now is None or now.shape != base.shape:
            raise RuntimeError(
                f"the model must have the parameter {name} {list(base.shape)} that it had when the"
                " baseline was attached: merge first, to keep it as it is now"
            )
        return now

    def required_state(self) -> dict[str, Tensor]:
        """What every state holds: parts, own trained parameters, and trained modules."""
        state = {f"parts.{name}": t for name, t in self.record.parts.state_dict().items()}
        for name in self.record.own:
            state[f"own.{name}"] = self.model.get_parameter(name).detach()
        for module in self.modules_to_train:
            for name, tensor in self._submodule(module).state_dict().items():
                state[module_key(module, name)] = tensor
        return state

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file of `state_dict` and what `load_baseline` checks.

        `path` holds either the old or the new content, never a part.

        Args:
            path: where to write.
            metadata: further strings for the file's header.

        Raises:
            ValueError: a metadata key that the format uses; tensors on the meta device.
            TypeError: metadata that is not text.
            OSError: the folder does not exist or cannot be written.
            RuntimeError: it was detached, or a trained module is gone.
        """
        header = BaselineHeader(
            method=self._attachment.method,
            targets=[],
            modules_to_train=list(self.modules_to_train),
            base_shapes=self._base_shapes(),
        )
        write_adapter_file(path, header, stored_state(self.state_dict()), metadata or {})

    def describe(self) -> BaselineDescription:  # type: ignore[override]
        """What trains, as data and as a table."""
        head = [
            (f"{module}.{name}", parameter)
            for module in self.modules_to_train
            for name, parameter in self._submodule(module).named_parameters()
        ]
        trained: list[tuple[str, Any]] = [*self.named_parameters(), *head]
        rows = [
            {"name": name, "shape": list(p.shape), "parameters": p.numel()} for name, p in trained
        ]
        return BaselineDescription(str(self.baseline), rows)

    def __repr__(self) -> str:
        return (
            f"AttachedBaseline({self.baseline} on {type(self.model).__name__},"
            f" {self.num_parameters():,} parameters)"
        )


def _remove_hooks(model: nn.Module) -> None:
    """Remove every hook of a part."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Part):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

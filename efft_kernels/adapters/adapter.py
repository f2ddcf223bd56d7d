"""The handle on an attached method: its parameters, merging, detaching, and its state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..methods.base import Method, Site
from ..methods.sharded import (
    check_not_sharded,
    copy_into,
    factors_of,
    reshard,
    stored_state,
    whole,
)
from ..nn import FusedEFFTLinear
from ..ops.checks import FLOAT_DTYPES
from .adapter_file import (
    Header,
    buffer_key,
    buffers_of,
    factor_key,
    module_key,
    shorten,
    write_adapter_file,
)
from .architectures import set_qkv_bias_separate, unshare_inputs
from .attachment import (
    BANK_NAME,
    Attachment,
    find_bank,
    is_inside,
    restore_gradients,
    same_numbers,
    state_buffers,
)
from .chained import find_chain, unchain
from .coverage import coverage
from .description import Description
from .peft_guard import unguard
from .swapping import check_can_be_taken_out, take_out
from .torch_attention import allow_fast_paths


class Adapter:
    """An attached method, as `attach` and `load` return it; `Adapter(model)` finds it again.

    Args:
        model: the model that carries it.

    Raises:
        ValueError: the model carries no adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        bank = find_bank(model)
        if bank is None:
            raise ValueError(
                f"model must carry an adapter, got a {type(model).__name__} without one"
            )
        self.model = model
        self.bank = bank

    @property
    def _attachment(self) -> Attachment:
        if find_bank(self.model) is not self.bank:
            raise RuntimeError("this adapter was detached from its model")
        return self.bank.attachment

    @property
    def method(self) -> Method:
        """The method's configuration."""
        return self._attachment.method

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted linears, in the model's order."""
        return self._attachment.sites

    @property
    def modules_to_train(self) -> tuple[str, ...]:
        """Names of the modules that are trained whole and saved with the factors."""
        return self._attachment.modules_to_train

    def layers(self) -> dict[str, FusedEFFTLinear]:
        """Module name → adapted layer.

        Raises:
            RuntimeError: one was replaced since.
        """
        layers = {site.name: self._submodule(site.name) for site in self.sites}
        for name, layer in layers.items():
            if not hasattr(layer, "delta_weight"):  # it may be wrapped, by torch.compile say
                raise RuntimeError(
                    f"{name} must be the adapted layer, got the {type(layer).__name__} that"
                    " replaced it"
                )
        return cast(dict[str, FusedEFFTLinear], layers)

    def _submodule(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise RuntimeError(
                f"the model must have the module {name!r} that it had when the adapter was attached"
            ) from None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors, each once; the head's parameters are the model's."""
        return self.bank.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The factors with their names in the bank."""
        return self.bank.named_parameters()

    def num_parameters(self) -> int:
        """How many numbers the factors hold, the head excluded."""
        return sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many of the model's parameters train: factors, and modules trained whole."""
        counts = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        total, trained = (sum(n for n, t in counts if t or every) for every in (True, False))
        factors = sum(p.numel() for p in self.parameters() if p.requires_grad)
        elsewhere = self._trained_elsewhere()
        others = sum(self.model.get_parameter(name).numel() for name in elsewhere)
        whole = ", ".join(self.modules_to_train) or "modules trained whole"
        print(
            f"trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.2f} %):"
            f" {factors:,} in factors, {trained - factors - others:,} in {whole}"
            + (f", {others:,} in no part of the adapter ({shorten(elsewhere)})" if others else "")
        )

    def delta_weights(self) -> dict[str, Tensor]:
        """Module name → ΔW [N, K], detached, float32 (float64 where the factors are)."""
        return {name: layer.delta_weight() for name, layer in self.layers().items()}

    @property
    def merged(self) -> bool:
        """Whether ΔW is at present part of the weights."""
        return any(layer.merged for layer in self.layers().values())

    def merge(self) -> None:
        """Add each ΔW to its weight, in at least float32 and rounded once; again, nothing happens.

        All or nothing: on any error the weights are as they were. For a checkpoint of the merged
        model by itself call `detach` first: before that the model's state dict holds the base
        weights as well, so that an adapted model which loads it does not count ΔW twice. Loading
        any state into a merged model unmerges it.

        Raises:
            RuntimeError: a thread is within `AdapterSet.tasks`, or a weight has since been pruned
                or parametrized.
        """
        reshard(self.model)
        unmerged = [layer for layer in self.layers().values() if not layer.merged]
        try:
            for layer in unmerged:
                layer.merge()
        except BaseException:
            for layer in unmerged:
                layer.unmerge()
            raise

    def unmerge(self) -> None:
        """Put the base weights back: the very tensors from before `merge`."""
        reshard(self.model)
        for layer in self.layers().values():
            layer.unmerge()

    def detach(self) -> nn.Module:
        """Remove the adapter: the linears are plain nn.Linear again, merged ones stay merged.

        Each parameter's requires_grad is as it was before `attach`; the head keeps what it learnt.
        On an error, as of a layer that was parametrized since, the adapter is as it was.
        Buffers that training changed (BatchNorm's statistics) are those of the base model again;
        with a merged adapter they stay, as its weights do: both belong to the adapted model.

        Returns:
            The model.

        Raises:
            RuntimeError: it was detached before, a thread is within `AdapterSet.tasks`, or FSDP2
                has sharded the model.
        """
        attachment = self._attachment
        check_can_be_taken_out(self.model, self.layers())
        if self.bank.mixing:
            raise RuntimeError("detach() must not be called within AdapterSet.tasks()")
        check_not_sharded(
            self.model, "give its adapter back: save it, and load it on a plain model"
        )
        layers, merged = self.layers(), self.merged
        unchain(self.model)
        take_out(self.model, layers)
        if not merged:
            self._set_buffers({})
        unguard(self.model)
        unshare_inputs(self.model)
        allow_fast_paths(self.model, attachment.without_nested_tensors)
        self.bank.unwatch(self.model)
        set_qkv_bias_separate(self.model, attachment.separated_bias, False)
        delattr(self.model, BANK_NAME)
        restore_gradients(self.model, attachment.required_grad)
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """Factors under "factors.", trained modules under "modules."; in the model's storage.

        Those buffers of the frozen modules that changed since `attach` are under "buffers.": a
        training forward moves BatchNorm's statistics though all parameters are frozen, and what was
        validated is the model with the new ones. Where nothing moved, as in a plain ViT, there are
        none. Buffers that are no part of the model's own state dict are not looked at.
        """
        state = self.required_state()
        base = self._attachment.base_buffers
        for name, buffer in self._buffers().items():
            if not same_numbers(buffer, base[name]):
                state[buffer_key(name)] = buffer.detach()
        return state

    def required_state(self) -> dict[str, Tensor]:
        """What every state holds: factors and trained modules."""
        state = {factor_key(name): tensor for name, tensor in self.bank.state_dict().items()}
        for module in self.modules_to_train:
            for name, tensor in self._submodule(module).state_dict().items():
                state[module_key(module, name)] = tensor
        return state

    def possible_state(self) -> dict[str, Tensor]:
        """What a state may hold: the above, and every buffer of the frozen modules."""
        buffers = {buffer_key(name): buffer for name, buffer in self._buffers().items()}
        return self.required_state() | buffers

    def _buffers(self) -> dict[str, Tensor]:
        """The frozen modules' buffers that were there before attaching."""
        base = self._attachment.base_buffers
        return {name: buffer for name, buffer in state_buffers(self.model) if name in base}

    def _set_buffers(self, changed: Mapping[str, Tensor]) -> None:
        """Make the frozen modules' buffers those of the base model, but for the given ones."""
        now = {**self._attachment.base_buffers, **changed}
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                known = not now[name].is_meta and now[name].shape == buffer.shape
                if known and not same_numbers(buffer, now[name]):
                    buffer.copy_(now[name])

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the factors and the trained modules, if all of it fits.

        Buffers that are not in it become those of the base model again.

        Args:
            state: tensors as `state_dict` names them, of any floating dtype.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or no float; the adapter is
                merged; or the model is on the meta device, which would take the numbers and hold
                none.
        """
        if self.merged:
            raise ValueError(
                "the adapter must not be merged when a state is loaded: call unmerge() first"
            )
        required, own = self.required_state(), self.possible_state()
        if missing := sorted(set(required) - set(state)):
            raise ValueError(f"state must hold {len(required)} tensors, missing {shorten(missing)}")
        if unknown := sorted(set(state) - set(own)):
            raise ValueError(
                f"state must hold {len(required)} tensors, got unknown {shorten(unknown)}"
            )
        if meta := [name for name, tensor in own.items() if tensor.is_meta]:
            raise ValueError(
                f"the model must have storage before a state is loaded, got {shorten(meta)} on the"
                " meta device: call model.to_empty(device=...) and load the base weights first"
            )
        for name, tensor in state.items():
            if tensor.shape != own[name].shape and not tensor.numel() == own[name].numel() == 1:
                raise ValueError(
                    f"{name} must be {list(own[name].shape)}, got {list(tensor.shape)}"
                )
            if tensor.dtype != own[name].dtype and not (
                {tensor.dtype, own[name].dtype} <= set(FLOAT_DTYPES)
            ):
                like = own[name].dtype
                floats = "float64, float32, float16 or bfloat16"
                expected = floats if like in FLOAT_DTYPES else like
                raise ValueError(f"{name} must be {expected}, got {tensor.dtype}")
        with torch.no_grad():
            for name, tensor in required.items():
                copy_into(tensor, whole(state[name]).reshape(tensor.shape))  # one number, any dims
        self._set_buffers(buffers_of(state))

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file of `state_dict` and what `load` checks.

        A head that was replaced since `attach` is saved as it is, for models with such a head. A
        warning names what trains and is no part of the file, as a head under another name.
        `path` holds either the old or the new content, never a part. Where FSDP2 has sharded the
        model, every process has to call this: it gathers whole tensors, and each writes them.

        Args:
            path: where to write.
            metadata: further strings for the file's header.

        Raises:
            ValueError: a metadata key that the format uses; factors on the meta device.
            TypeError: metadata that is not text.
            OSError: the folder does not exist or cannot be written.
            RuntimeError: the adapter was detached, or a trained module is gone.
        """
        attachment = self._attachment
        header = Header(
            method=attachment.method,
            targets=[site.name for site in attachment.sites],
            modules_to_train=list(attachment.modules_to_train),
            base_shapes=self._base_shapes(),
        )
        write_adapter_file(path, header, stored_state(self.state_dict()), metadata or {})
        if left_out := self._trained_elsewhere():
            warnings.warn(
                f"{shorten(left_out)} require gradients but are no part of the adapter's file: pass"
                " attach(..., modules_to_train=[...]) the modules that hold them, or freeze them",
                stacklevel=2,
            )

    def _trained_elsewhere(self) -> list[str]:
        """Parameters that require gradients outside the bank and the modules trained whole."""
        saved = (BANK_NAME, *self.modules_to_train)
        return [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and not is_inside(name, saved)
        ]

    def _base_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape of the plain model as it is by now: its head may have been
        replaced, its positional embedding resized."""
        now = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        trained = self.modules_to_train
        frozen = {
            name: now.get(name, shape)
            for name, shape in self._attachment.base_shapes.items()
            if not is_inside(name, trained)
        }
        return frozen | {name: now[name] for name in now if is_inside(name, trained)}

    def describe(self) -> Description:
        """What was grouped with what: one row a linear, and each group's parameters.

        Returns:
            `rows` and `groups` as plain data, and which linears may run in a chain; printed with
            rich it is a table.
        """
        calls, modules = self.bank.calls.calls, dict(self.model.named_modules())
        chained = find_chain(self.model)
        sites = chained.sites() if chained else self.bank.unchained or "blocks were replaced"
        alone, sites = (sites, frozenset[str]()) if isinstance(sites, str) else (None, sites)
        rows = [
            {
                "name": site.name,
                "role": site.role,
                "block": site.block,
                "stage": site.stage,
                "in_features": site.in_features,
                "out_features": site.out_features,
                "group": self.bank.group_of[site.name],
                "rank": factors_of(self.bank.group(site.name), site.name, False).down.shape[1],
                "fused": "chain" if site.name in sites else "alone",
                "calls": None if calls is None else calls[site.name],
                "input": getattr(modules.get(site.name), "input_from", None),
            }
            for site in self.sites
        ]
        groups = {
            name: {key: list(parameter.shape) for key, parameter in group.named_parameters()}
            for name, group in self.bank.named_children()
        }
        found = coverage(self.model, (site.name for site in self.sites), self.modules_to_train)
        left = found.left | found.out_of_reach
        return Description(str(self.method), rows, groups, alone, left, self.modules_to_train)

    def __repr__(self) -> str:
        return (
            f"Adapter({self.method}, {len(self.sites)} linears of {type(self.model).__name__},"
            f" {self.num_parameters():,} parameters)"
        )

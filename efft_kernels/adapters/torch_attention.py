"""torch.nn's own attention and encoder, whose forward reads weights instead of calling linears.

An adapted nn.MultiheadAttention becomes an `AdaptedMultiheadAttention`, in place and with the same
state-dict keys; the inference fast paths of torch's encoder are kept off where a linear in them is
adapted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..methods.base import Site
from ..nn import _BASE_WEIGHT as BASE_WEIGHT
from ..nn import FactorBank, FusedEFFTLinear

IN_PROJ = "in_proj"  # of the module that stands for the stacked weights


class InProjection(FusedEFFTLinear):
    """An attention's stacked query, key and value weights as one adapted linear. Weight and bias
    stay parameters of the attention."""

    _attention: tuple[nn.MultiheadAttention]

    @classmethod
    def of(
        cls, attention: nn.MultiheadAttention, linear: nn.Linear, bank: FactorBank, site: str
    ) -> InProjection:
        """The layer of `attention`, made from its `in_projection`, with the factors of `site`."""
        layer = FusedEFFTLinear.from_linear(linear, bank=bank, site=site)
        layer.__class__ = cls
        layer.__dict__["_parameters"] = {}
        layer.__dict__["_attention"] = (attention,)
        return layer  # type: ignore[return-value]

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """[3·d, d]."""
        return self._attention[0].in_proj_weight

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """[3·d] or None."""
        return self._attention[0].in_proj_bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            setattr(self._attention[0], f"in_proj_{name}", value)
        else:
            super().__setattr__(name, value)

    def _weight_parameter(self) -> nn.Parameter | None:
        return self._attention[0]._parameters.get("in_proj_weight")

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """The attention has loaded its base weight by now, and left this layer unmerged."""
        state = dict(state_dict)
        if prefix:  # else the attention was not asked, and the base weight has no place
            state.pop(prefix + BASE_WEIGHT, None)
        nn.Linear._load_from_state_dict(self, state, prefix, *args, **kwargs)


class AdaptedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention that calls its projections, of which at least one is adapted."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As FusedEFFTLinear's: in_proj is left unmerged, with the state's base weight."""
        adapted: Any = self._modules.get(IN_PROJ)
        if adapted is not None:
            adapted.unmerge()
            base = state_dict.get(f"{prefix}{IN_PROJ}.{BASE_WEIGHT}")
            if base is not None:
                state_dict = {**state_dict, f"{prefix}in_proj_weight": base}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.

        Raises:
            RuntimeError: a mask of the wrong shape, or `is_causal` without `attn_mask`.
        """
        batched = query.dim() == 3
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask must be given along with is_causal")
        # Batch first from here on; one tensor that is all three stays one.
        q, k, v = self._project(*_batch_first(batched, self.batch_first, query, key, value))
        mask = self._mask(q, k, key_padding_mask, attn_mask, is_causal and not need_weights)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.mT
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout, self.training)
            attended = weights @ v  # [B, heads, L, head]
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            causal = is_causal and mask is None
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        y = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return y[0], None if weights is None else weights[0]
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """[B, L, d] each → q, k and v, [B, heads, L, head] each."""
        if query is key and key is value:
            parts = self._projected(query).chunk(3, -1)
        else:
            # The increment is one product for all three, so each input takes it whole.
            first = self._projected(query).chunk(3, -1)[0]
            of_key = self._projected(key).chunk(3, -1)
            of_value = of_key if key is value else self._projected(value).chunk(3, -1)
            parts = first, of_key[1], of_value[2]
        heads = (self.num_heads, self.head_dim)
        return tuple(part.unflatten(-1, heads).transpose(1, 2) for part in parts)

    def _projected(self, x: Tensor) -> Tensor:
        adapted = self._modules.get(IN_PROJ)
        y: Tensor = (
            F.linear(x, self.in_proj_weight, self.in_proj_bias) if adapted is None else adapted(x)
        )
        return y

    def _mask(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        leave_causal: bool,
    ) -> Tensor | None:
        """What is added to the scores, broadcast over [B, heads, L, S]; None for nothing, and for a
        causal mask that the attention makes itself."""
        rows, _, length, _ = q.shape
        span = k.shape[2]
        if leave_causal and key_padding_mask is None:
            return None
        mask = None if attn_mask is None else _added(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(rows, self.num_heads, length, span)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype).view(rows, 1, 1, span)
            mask = padding if mask is None else mask + padding
        return mask


def _batch_first(batched: bool, already: bool, *xs: Tensor) -> list[Tensor]:
    """Each of xs as [B, L, d]; where several are one tensor, so are the results."""
    if batched and already:
        return list(xs)
    moved = {id(x): x.transpose(0, 1) if batched else x.unsqueeze(0) for x in xs}
    return [moved[id(x)] for x in xs]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of scores as what is added to them."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def in_projection(attention: nn.MultiheadAttention) -> nn.Linear:
    """An nn.Linear of the attention's own in_proj weight and bias."""
    linear = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
    linear.weight, linear.bias = attention.in_proj_weight, attention.in_proj_bias
    linear.train(attention.training)
    return linear


def unsupported(attention: nn.MultiheadAttention) -> str | None:
    """Why the projections of an attention cannot be adapted."""
    if type(attention) not in (nn.MultiheadAttention, AdaptedMultiheadAttention):
        return f"{type(attention).__name__}, a subclass of nn.MultiheadAttention,"
    if not attention._qkv_same_embed_dim:
        return "nn.MultiheadAttention with kdim or vdim"
    computed = attention.in_proj_bias is not None and "in_proj_bias" not in attention._parameters
    if computed or attention._parameters.get("in_proj_weight") is None:
        return "nn.MultiheadAttention with a weight or bias that a hook computes"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "nn.MultiheadAttention with add_bias_kv or add_zero_attn"
    return None


def call_projections(attention: nn.MultiheadAttention) -> None:
    """Make an attention call its projections."""
    attention.__class__ = AdaptedMultiheadAttention


def restore_attention(module: nn.Module) -> None:
    """Undo `call_projections` on an attention whose out_proj is a plain linear again."""
    if isinstance(module, AdaptedMultiheadAttention):
        module._modules.pop(IN_PROJ, None)
        module.out_proj.__class__ = NonDynamicallyQuantizableLinear
        module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """A forward pre-hook: torch's encoder layer takes its fast path only without hooks in it."""


def find_nested_tensors(model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    """The nn.TransformerEncoder around `sites` that make nested tensors for the fast path."""
    return tuple(
        name
        for name, module in _around(model, sites)
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
    )


def keep_off_fast_paths(model: nn.Module, sites: Sequence[Site], nested: Sequence[str]) -> None:
    """Keep torch's encoders from reading the weights of adapted linears in eval.

    Args:
        model: the adapted model.
        sites: the adapted linears.
        nested: what `find_nested_tensors` found.
    """
    for _, module in _around(model, sites):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_no_fast_path)
    _make_nested_tensors(model, nested, False)


def _around(model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(site.name.startswith(f"{name}.") for site in sites) or not name:
            yield name, module


def _make_nested_tensors(model: nn.Module, names: Sequence[str], switch: bool) -> None:
    for name in names:
        encoder: Any = model.get_submodule(name)
        encoder.use_nested_tensor = switch


def allow_fast_paths(model: nn.Module, nested: Sequence[str]) -> None:
    """Undo `keep_off_fast_paths`."""
    _make_nested_tensors(model, nested, True)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _no_fast_path:
                del module._forward_pre_hooks[key]

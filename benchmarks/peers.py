"""The same training step, elsewhere: what a user would run instead of this package.

Each peer is a timm model ready for a step. Those that compute the same function as one of this
package's methods are given the very same factor values (`Peer.factor_grads` uses the method's own
parameter names), so that loss and gradients can be compared before anything is timed. Dropout is
off everywhere, and all models share the frozen backbone's tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels import EFFT1, EFFT2, Adapter, FacTTK, FacTTT, KAdaptation, LoRA, attach
from efft_kernels.adapters.sites import find_sites
from efft_kernels.methods.base import Method
from efft_kernels.methods.tensor_train import TensorTrainGroup
from efft_kernels.nn import FactorBank

FLOOR = "frozen, gradient to its input"
PROBE = "linear probe"
PEFT_LORA = "PEFT LoRA"
EAGER_EFFT2 = "EFFT2, eager torch"
RELEASED_EFFT2 = "EFFT2, released formula"
PUBLISHED_FACT = "FacT-TT, published formula"
FULL = "full fine-tuning"
KEPT = ", every x kept"  # behind a method's name: attached with fuse="off"
COMPILED = " (compiled)"


def methods(rank: int) -> dict[str, Method]:
    """This package's methods at one rank, dropout off; KAdaptation's effective rank is n²·r."""
    return {
        "EFFT1": EFFT1(rank=rank, scale=1.0, dropout=0.0),
        "EFFT2": EFFT2(rank=rank, scale=1.0, dropout=0.0),
        "FacT-TT": FacTTT(rank=rank, scale=1.0, dropout=0.0),
        "FacT-TK": FacTTK(rank=rank, scale=1.0, dropout=0.0),
        "LoRA": LoRA(rank=rank, scale=1.0, matrices=None),
        "KAdaptation": KAdaptation(products=4, rank=max(1, rank // 16)),
    }


# The method whose function each peer computes.
SAME_FUNCTION = {
    PEFT_LORA: "LoRA",
    EAGER_EFFT2: "EFFT2",
    RELEASED_EFFT2: "EFFT2",
    PUBLISHED_FACT: "FacT-TT",
}
ALONE = tuple(name + KEPT for name in methods(16))
EVERY = (FLOOR, PROBE, *methods(16), *SAME_FUNCTION, FULL)


@dataclass
class Peer:
    """A model for one training step.

    Attributes:
        name: the row's name.
        model: what is called with the images.
        method: the name of the method whose function it computes, if any.
        factors: the method's parameter name → this model's parameter with those values; a view of
            it has the method's shape.
    """

    name: str
    model: nn.Module
    method: str | None
    factors: Mapping[str, nn.Parameter]

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def factor_grads(self) -> Tensor:
        """All factors' gradients, in the order of their names, as one vector."""
        grads = [p.grad for _, p in sorted(self.factors.items())]
        assert all(grad is not None for grad in grads)
        return torch.cat([grad.flatten() for grad in grads if grad is not None])


Formula = Callable[[Tensor, nn.Linear, FactorBank, str], Tensor]


def factored(x: Tensor, linear: nn.Linear, bank: FactorBank, site: str) -> Tensor:
    """linear(x) + x·down·core[g]·up[g]^T, one torch operator after the other."""
    down, core, up = bank.group(site).factors(site, False)
    p = x @ down.to(x.dtype)
    if core is None:
        parts = [p @ slice_up.mT for slice_up in up]
    else:
        parts = [p @ slice_core @ up[g % up.shape[0]].mT for g, slice_core in enumerate(core)]
    return linear(x) + (parts[0] if len(parts) == 1 else torch.cat(parts, -1))


def dense(x: Tensor, linear: nn.Linear, bank: FactorBank, site: str) -> Tensor:
    """x·W0 + x·(s·U·Σ·V^T) with ΔW formed densely, the slices side by side (EFFT, Eq. 2)."""
    down, core, up = bank.group(site).factors(site, False)
    if core is None:
        slices = [down @ slice_up.mT for slice_up in up]
    else:
        slices = [down @ slice_core @ up[g % up.shape[0]].mT for g, slice_core in enumerate(core)]
    return linear(x) + x @ torch.cat(slices, -1)


def fact_tt(x: Tensor, linear: nn.Linear, bank: FactorBank, site: str) -> Tensor:
    """x·W0 + s·x·U·Σ·V^T, each factor applied as a linear layer of its own (FacT, Eq. 8 and 9).

    As published every matrix of a fused qkv starts from x, and fc1 and fc2 go through d-wide
    chunks of their hidden features.
    """
    group = bank.group(site)
    assert isinstance(group, TensorTrainGroup)
    place = group.placements[site]
    cores = group.core[place.first_core : place.first_core + place.slices]
    scale = group.scale
    u, v = group.U.mT, group.V  # as weights of nn.Linear: [r1, d], [d, r2]
    y = linear(x)
    if place.stacked == "in":  # fc2
        chunks = F.linear(x.unflatten(-1, (place.slices, -1)), u).flatten(-2)
        return y + F.linear(F.linear(chunks, cores.flatten(0, 1).mT), v) * scale
    if site.endswith("qkv"):
        parts = [F.linear(F.linear(F.linear(x, u), core.mT), v) for core in cores]
        return y + torch.cat(parts, -1) * scale
    wide = F.linear(F.linear(x, u), cores.mT.flatten(0, 1))  # [..., slices·r2]
    return y + F.linear(wide.unflatten(-1, (place.slices, -1)), v).flatten(-2) * scale


class PeerLinear(nn.Module):
    """A frozen linear and a formula over the factors of a bank that the model's root owns."""

    def __init__(self, linear: nn.Linear, bank: FactorBank, site: str, formula: Formula) -> None:
        super().__init__()
        self.linear = linear
        self.site = site
        self.formula = formula
        self._bank = (bank,)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.linear, self._bank[0], self.site)


FORMULAS: dict[str, Formula] = {
    EAGER_EFFT2: factored,
    RELEASED_EFFT2: dense,
    PUBLISHED_FACT: fact_tt,
}


def build(
    name: str,
    base: nn.Module,
    rank: int,
    *,
    formula: Formula | None = None,
    fuse: str = "auto",
) -> Peer:
    """A peer over `base`, a timm model whose backbone is frozen and whose head is not.

    Every parameter of `base` is shared but for full fine-tuning, which gets copies. `formula`
    makes any of this package's methods run by that formula in plain torch; `fuse` is `attach`'s.
    """
    if name == FULL:
        model = copy.deepcopy(base).requires_grad_()
        return Peer(name, model, None, {})
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if name == PROBE:
        return Peer(name, model, None, {})
    if name == FLOOR:
        first_block(model).register_forward_pre_hook(_start_graph)
        return Peer(name, model, None, {})
    method = SAME_FUNCTION.get(name, name).removesuffix(KEPT)
    fuse = "off" if name.endswith(KEPT) else fuse
    if name == PEFT_LORA:
        return _peft_lora(model, rank)
    adapter = attach(model, methods(rank)[method], fuse=fuse)
    fill(dict(adapter.named_parameters()))
    formula = formula or FORMULAS.get(name)
    if formula is not None:
        _replace(model, adapter, formula)
    return Peer(name, model, method, dict(adapter.named_parameters()))


def fill(factors: Mapping[str, nn.Parameter]) -> None:
    """Draw every factor's values by its name's place alone, so that equal names get equal values.

    Standard deviation 0.1: at r = 16 a Tensor-Train ΔW is then about as large as a trained weight.
    """
    generator = torch.Generator().manual_seed(2311)
    with torch.no_grad():
        for _, parameter in sorted(factors.items()):
            values = torch.randn(parameter.numel(), generator=generator) * 0.1
            parameter.copy_(values.view(parameter.shape))


def first_block(model: nn.Module) -> nn.Module:
    """The first transformer block of a timm ViT or Swin or of Hugging Face's ViT."""
    block = ("Block", "SwinTransformerBlock", "ViTLayer")
    return next(module for module in model.modules() if type(module).__name__ in block)


def _start_graph(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].detach().requires_grad_(), *args[1:])


def _replace(model: nn.Module, adapter: Adapter, formula: Formula) -> None:
    adapter.bank.unwatch(model)  # the adapted linears are meant not to run
    for name, layer in adapter.layers().items():
        model.set_submodule(name, PeerLinear(layer.to_linear(), adapter.bank, name, formula))


def _peft_lora(model: nn.Module, rank: int) -> Peer:
    """Hugging Face's PEFT on the same linears; α = r, so that its scale is 1."""
    from peft import LoraConfig, get_peft_model

    head = [name for name, p in model.named_parameters() if p.requires_grad]
    sites = find_sites(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=[site.name for site in sites],
    )
    wrapped = get_peft_model(model, config)
    for name in head:
        wrapped.base_model.model.get_parameter(name).requires_grad_()
    factors: dict[str, nn.Parameter] = {}
    for site in sites:
        layer = wrapped.base_model.model.get_submodule(site.name)
        prefix = site.name.replace(".", "_")
        factors[f"{prefix}.A"] = layer.lora_A["default"].weight
        factors[f"{prefix}.B"] = layer.lora_B["default"].weight
    fill(factors)
    return Peer(PEFT_LORA, wrapped, "LoRA", factors)

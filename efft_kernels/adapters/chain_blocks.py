"""The blocks that a chain knows, and where in them lies what it computes.

They are timm's Block and the layers of Hugging Face's ViT and DINOv2, with the families whose
layers are the same code. Neither package is imported here: a model of it has done so.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import FusedEFFTLinear


class Unlike(Exception):
    """In what a model differs from those that a chain knows."""


class Block(NamedTuple):
    """What the chain reads of one block."""

    whole: Any
    norm1: nn.LayerNorm
    attn: Any
    qkv: tuple[FusedEFFTLinear, ...]  # one linear, or those of q, k and v
    proj: FusedEFFTLinear
    norm2: nn.LayerNorm
    fc1: FusedEFFTLinear
    act: Any
    fc2: FusedEFFTLinear
    scale1: Any  # a LayerScale, nn.Identity, or None
    scale2: Any

    @property
    def linears(self) -> tuple[FusedEFFTLinear, ...]:
        return *self.qkv, self.proj, self.fc1, self.fc2

    @property
    def scales(self) -> tuple[nn.Module, ...]:
        """Its LayerScales."""
        none = nn.Identity, NoneType
        return tuple(s for s in (self.scale1, self.scale2) if type(s) not in none)


Children = Mapping[str, tuple[type, ...]]


class BlockKind(NamedTuple):
    """How the blocks of one kind are put together.

    The names of modules are paths within a block.
    """

    package: str
    block: type
    children: Mapping[type, Children]  # of the block and the modules in it
    norm1: str
    attention: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: str
    act: str
    fc2: str
    scales: tuple[str, str] | None  # LayerScales, where there may be some,
    gamma: str  # and their parameter
    heads: str  # the attention's number of them
    # What else differs by now, in blocks that were as expected.
    departed: Callable[[Sequence[Block]], str | None]
    # Whether a hook does nothing at present.
    idles: Callable[[Any], bool]

    def read(self, block: nn.Module) -> Block:
        """The parts of a block that `check_blocks` has seen."""
        get: Callable[[str], Any] = block.get_submodule
        scale1, scale2 = (None, None) if self.scales is None else map(get, self.scales)
        return Block(
            whole=block,
            norm1=get(self.norm1),
            attn=get(self.attention),
            qkv=tuple(map(get, self.qkv)),
            proj=get(self.proj),
            norm2=get(self.norm2),
            fc1=get(self.fc1),
            act=get(self.act),
            fc2=get(self.fc2),
            scale1=scale1,
            scale2=scale2,
        )

    def heads_of(self, block: Block) -> int:
        """How many heads a block's attention has at present."""
        heads: int = getattr(block.attn, self.heads)
        return heads

    def gamma_of(self, scale: Any) -> Tensor | None:
        """A LayerScale's parameter; None of what is none."""
        return None if scale is None else scale._parameters.get(self.gamma)


def kind_of(block: type) -> BlockKind | None:
    """The kind of blocks of that class; None where no chain knows it."""
    timm = _timm()
    if timm is not None and block is timm.Block:
        return _of_timm(timm)
    module = sys.modules.get(block.__module__)
    own = _FAMILIES.get(block.__module__)
    if module is None or own is None or block is not getattr(module, own.prefix + "Layer", None):
        return None
    return _of_transformers(module, own)


# timm


def timm_blocks(model: nn.Module) -> Any:
    """The blocks of timm's VisionTransformer; None of any other model."""
    if type(model) is not getattr(_timm(), "VisionTransformer", None):
        return None
    return model.blocks


def _timm() -> Any:
    """timm's module of the vision transformer, which a model of it has imported; else None."""
    return sys.modules.get("timm.models.vision_transformer")


@functools.cache
def _of_timm(timm: Any) -> BlockKind:
    norms = (nn.LayerNorm, timm.LayerNorm)
    return BlockKind(
        package="timm",
        block=timm.Block,
        children={
            timm.Block: {
                "norm1": norms,
                "attn": (timm.Attention,),
                "ls1": (nn.Identity, timm.LayerScale),
                "drop_path1": (nn.Identity,),
                "norm2": norms,
                "mlp": (timm.Mlp,),
                "ls2": (nn.Identity, timm.LayerScale),
                "drop_path2": (nn.Identity,),
            },
            timm.Attention: {
                "qkv": (FusedEFFTLinear,),
                "q_norm": (nn.Identity,),
                "k_norm": (nn.Identity,),
                "attn_drop": (nn.Dropout,),
                "norm": (nn.Identity,),
                "proj": (FusedEFFTLinear,),
                "proj_drop": (nn.Dropout,),
            },
            timm.Mlp: {
                "fc1": (FusedEFFTLinear,),
                "act": (nn.GELU,),
                "drop1": (nn.Dropout,),
                "norm": (nn.Identity,),
                "fc2": (FusedEFFTLinear,),
                "drop2": (nn.Dropout,),
            },
        },
        norm1="norm1",
        attention="attn",
        qkv=("attn.qkv",),
        proj="attn.proj",
        norm2="norm2",
        fc1="mlp.fc1",
        act="mlp.act",
        fc2="mlp.fc2",
        scales=("ls1", "ls2"),
        gamma="gamma",
        heads="num_heads",
        departed=_timm_departed,
        idles=lambda hook: False,
    )


def _timm_departed(blocks: Sequence[Block]) -> str | None:
    if any(block.act.approximate != "none" for block in blocks):
        return "a GELU of the blocks is no exact one"
    if any(
        norm.__dict__.get("_fast_norm") for block in blocks for norm in (block.norm1, block.norm2)
    ):
        return "timm's fast norm is on"
    if not all(block.attn.fused_attn for block in blocks):
        return "an attention of the blocks is not the fused one"
    return None


# Hugging Face's transformers


class _Family(NamedTuple):
    """One of transformers' models whose layers are ViT's or DINOv2's, to the letter."""

    prefix: str  # of its classes' names
    holder: str  # the class whose forward is a plain loop over the layers,
    layers: str  # and its name for them
    norms: tuple[str, str]
    scales: tuple[str, str] | None


def _families() -> Iterator[tuple[str, _Family]]:
    of_vit = {"vit": "ViT", "deit": "DeiT", "vit_mae": "ViTMAE", "vit_msn": "ViTMSN"}
    for name, prefix in {**of_vit, "ijepa": "IJepa"}.items():
        own = prefix + "Model", "layers", ("layernorm_before", "layernorm_after"), None
        yield f"transformers.models.{name}.modeling_{name}", _Family(prefix, *own)
    of_dinov2 = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
    for name, prefix in of_dinov2.items():
        scales = "layer_scale1", "layer_scale2"
        family = _Family(prefix, prefix + "Encoder", "layer", ("norm1", "norm2"), scales)
        yield f"transformers.models.{name}.modeling_{name}", family


_FAMILIES = dict(_families())  # by the module that has the classes
_CAPTURING = "transformers.utils.output_capturing"
_SDPA = "transformers.integrations.sdpa_attention"


def holder_of_layers(model: nn.Module) -> tuple[str, nn.Module, str] | None:
    """What in a model loops over layers that a chain may know: its path, the module, and its name
    for the layers. None where there is none, or more than one."""
    found = []
    for path, module in model.named_modules():
        kind = type(module)
        family = _FAMILIES.get(kind.__module__)
        if family is None:
            continue
        if kind is getattr(sys.modules.get(kind.__module__), family.holder, None):
            found.append((path, module, family.layers))
    return found[0] if len(found) == 1 else None


@functools.cache
def _of_transformers(module: Any, family: _Family) -> BlockKind:
    def own(name: str) -> tuple[type, ...]:
        # Not all families have all of them, nor all versions.
        return tuple(k for k in [getattr(module, family.prefix + name, None)] if k is not None)

    gelu = getattr(sys.modules.get("transformers.activations"), "GELUActivation", nn.GELU)
    (layer,) = own("Layer")
    norm1, norm2 = family.norms
    children: dict[str, tuple[type, ...]] = {
        norm1: (nn.LayerNorm,),
        "attention": own("Attention"),
        norm2: (nn.LayerNorm,),
        "mlp": own("MLP"),
    }
    if family.scales is None:
        children["dropout"] = (nn.Dropout,)
    else:
        children["drop_path"] = (nn.Identity,)
        children.update(dict.fromkeys(family.scales, own("LayerScale")))
    inside: dict[type, Children] = {layer: children}
    for kind in own("Attention"):
        inside[kind] = {f"{name}_proj": (FusedEFFTLinear,) for name in "qkvo"}
    for kind in own("MLP"):
        inside[kind] = {
            "activation_fn": (gelu,),
            "fc1": (FusedEFFTLinear,),
            "fc2": (FusedEFFTLinear,),
        }
    return BlockKind(
        package="transformers",
        block=layer,
        children=inside,
        norm1=norm1,
        attention="attention",
        qkv=tuple(f"attention.{name}_proj" for name in "qkv"),
        proj="attention.o_proj",
        norm2=norm2,
        fc1="mlp.fc1",
        act="mlp.activation_fn",
        fc2="mlp.fc2",
        scales=family.scales,
        gamma="lambda1",
        heads="num_attention_heads",
        departed=_transformers_departed,
        idles=_captures_nothing,
    )


def _transformers_departed(blocks: Sequence[Block]) -> str | None:
    if any(block.act.act is not F.gelu for block in blocks):
        return "a GELU of the blocks is no exact one"
    if any(block.whole.gradient_checkpointing for block in blocks):
        return "gradient checkpointing is on"
    attentions = [block.attn for block in blocks]
    if any(attention.config._attn_implementation != "sdpa" for attention in attentions):
        return "an attention of the blocks is not torch's: attn_implementation is not 'sdpa'"
    (module,) = {type(attention).__module__ for attention in attentions}
    functions = getattr(sys.modules[module], "ALL_ATTENTION_FUNCTIONS", {})
    known = getattr(sys.modules.get(_SDPA), "sdpa_attention_forward", None)
    if functions.get("sdpa") is not known:
        return "transformers' 'sdpa' was replaced"
    if any(attention.attention_dropout for attention in attentions):
        return "a dropout of the blocks is on"
    if any(
        attention.is_causal
        or attention.head_dim * attention.num_attention_heads != attention.q_proj.in_features
        or attention.scaling != attention.head_dim**-0.5
        for attention in attentions
    ):
        return "an attention of the blocks is not the plain one"
    return None


def _captures_nothing(hook: Any) -> bool:
    """Whether it is one of those that transformers leaves on the layers for `output_hidden_states`
    and the like, and nobody asks for any at present."""
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    its_own = getattr(hook, "__module__", None) == _CAPTURING
    return its_own and collector is not None and not collector.get()


# What keys of a layer's call say nothing to its attention, whatever their values.
_UNREAD = frozenset({"num_items_in_batch"})


def plain_call(args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether what transformers' layers are called with, beside the stream, changes nothing: no
    mask, and no option of the attention."""
    return all(value is None for value in args) and all(
        value is None or value is False or name in _UNREAD for name, value in options.items()
    )


# Whether the blocks of a model are such


def check_blocks(blocks: Any, kind: BlockKind, path: str) -> None:
    """Check that every module inside is one that the chain computes.

    Args:
        blocks: the blocks, children of one module.
        kind: what they should be.
        path: what to call `blocks`.

    Raises:
        Unlike: one is not.
    """
    for place, block in blocks.named_children():
        own = f"{path}.{place}"
        found = type(block)
        if found is not kind.block:
            known = f"{kind.package}'s {kind.block.__name__}"
            raise Unlike(f"{own} is a {found.__name__}, not {known}")
        for name, module in block.named_modules():
            where = f"{own}.{name}".rstrip(".")
            children = kind.children.get(type(module), {})
            for child, part in module._modules.items():
                if type(part) not in children.get(child, ()):
                    what = type(part).__name__
                    raise Unlike(f"{where}.{child} is a {what}, which no chain takes")
            if children and set(children) - set(module._modules) - {"norm"}:
                raise Unlike(f"{where} is not put together like {kind.package}'s")
            if "forward" in module.__dict__ or not has_own_forward(type(module)):
                raise Unlike(f"the forward of {where} was replaced")
        _check_sizes(kind, kind.read(block), own, kind.read(blocks[0]))


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether the class's forward is the one that was written in it, or in a class above it."""
    forward = kind.forward
    named = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    return named in {f"{above.__module__}.{above.__qualname__}.forward" for above in kind.__mro__}


def _check_sizes(kind: BlockKind, block: Block, where: str, first: Block) -> None:
    k = first.norm1.normalized_shape[0]
    rows = 3 * k // len(block.qkv)
    shapes = [tuple(linear.weight.shape) for linear in block.linears]
    hidden = first.fc1.out_features
    expected = [*[(rows, k)] * len(block.qkv), (k, k), (hidden, k), (k, hidden)]
    heads = kind.heads_of(block)
    if shapes != expected or heads != kind.heads_of(first):
        raise Unlike(f"{where} has other sizes than the first block")
    if any((linear.bias is None) is not (block.qkv[0].bias is None) for linear in block.qkv):
        raise Unlike(f"only some of q, k and v of {where} have a bias")
    pairs = (block.scale1, first.scale1), (block.scale2, first.scale2)
    if any(type(own) is not type(other) for own, other in pairs):
        raise Unlike(f"{where} has not the first block's kind of LayerScale")
    gammas = [kind.gamma_of(scale) for scale in (block.scale1, block.scale2)]
    if any(gamma is not None and gamma.shape != (k,) for gamma in gammas):
        raise Unlike(f"a LayerScale of {where} is not one of {k} numbers")
    for norm in (block.norm1, block.norm2):
        if norm.normalized_shape != (k,) or norm.weight is None or norm.bias is None:
            raise Unlike(f"a norm of {where} is not one of {k} weights and biases")

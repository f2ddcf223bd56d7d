"""A timm VisionTransformer's blocks run as a chain (ops/chains.py) where that computes the same.

`chain` puts a `forward` on the instance that holds the blocks. At each call it looks at the model
and the circumstances, and where the chain does not do, the blocks run one after the other as ever.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..methods.joint import Kind
from ..nn import FactorBank, FusedEFFTLinear
from ..ops import chains, compiled_chain
from ..ops.backends.chain_steps import Norm
from ..ops.backends.torch_backend import fold
from ..ops.chain_passes import Frozen, FrozenLinears
from ..ops.checks import without_autocast

FUSE = ("auto", "pairs", "off")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Block(NamedTuple):
    """What the chain reads of one block."""

    norm1: nn.LayerNorm
    attn: Any
    qkv: FusedEFFTLinear
    proj: FusedEFFTLinear
    norm2: nn.LayerNorm
    fc1: FusedEFFTLinear
    fc2: FusedEFFTLinear
    scale1: Any  # timm's LayerScale, or nn.Identity
    scale2: Any

    @classmethod
    def of(cls, block: Any) -> _Block:
        attn, mlp = block.attn, block.mlp
        linears = attn.qkv, attn.proj, block.norm2, mlp.fc1, mlp.fc2
        return cls(block.norm1, attn, *linears, block.ls1, block.ls2)

    @property
    def linears(self) -> tuple[FusedEFFTLinear, ...]:
        return self.qkv, self.proj, self.fc1, self.fc2


class _Parts:
    """The modules inside the blocks and all that must stay as it was when they were looked at."""

    def __init__(self, blocks: nn.Sequential, bank: FactorBank) -> None:
        """Raises _Unlike."""
        _check_blocks(blocks)
        self.blocks = [_Block.of(block) for block in blocks]
        self.linears = [linear for block in self.blocks for linear in block.linears]
        if any(linear._bank != (bank,) for linear in self.linears):
            raise _Unlike("a linear reads its factors from elsewhere")
        self.groups = list({id(g): g for g in (bank.group(s._site) for s in self.linears)}.values())
        self.heads = self.blocks[0].attn.num_heads
        columns = list(zip(*(block.linears for block in self.blocks), strict=True))
        places = [(None, b.scale1, None, b.scale2) for b in self.blocks]
        self._columns = list(zip(columns, zip(*places, strict=True), strict=True))
        self._kinds = _kinds(columns, bank)
        # What `changed` compares: tables that are looked up once and are the modules' own.
        modules = [module for module in blocks.modules() if module is not blocks]
        self._modules = modules
        self._types = [type(module) for module in modules]
        classes: set[Any] = {*self._types, nn.Sequential}
        self._forwards = [(kind, kind.forward) for kind in classes]
        self._tables = [getattr(module, name) for module in (*modules, blocks) for name in _HOOKS]
        self._dicts = [module.__dict__ for module in modules]
        children = [(m._modules, tuple(m._modules.values())) for m in (*modules, blocks)]
        self._children = [(now, then) for now, then in children if then]
        self._childless = [now for now, then in children if not then]
        self._dropouts = [module for module in modules if type(module) is nn.Dropout]
        self._gelus = [module for module in modules if type(module) is nn.GELU]
        self._norms = [norm for block in self.blocks for norm in (block.norm1, block.norm2)]
        scales = [s for block in self.blocks for s in (block.scale1, block.scale2)]
        scales = [scale for scale in scales if type(scale) is not nn.Identity]
        self._parametrised: list[nn.Module] = [*self._norms, *self.linears, *scales]
        self._required = [(module, "weight") for module in (*self._norms, *self.linears)]
        self._required += [(scale, "gamma") for scale in scales]
        self._required += [(norm, "bias") for norm in self._norms]
        self._without_bias = [(linear, linear.bias is None) for linear in self.linears]

    @functools.cached_property
    def rank(self) -> int | str:
        """The largest of the linears, or why they have none that a chain takes."""
        with torch.no_grad():
            kinds = [
                {linear.current_factors().down.shape[1] for linear in linears}
                for linears, _ in self._columns
            ]
        if any(len(ranks) > 1 for ranks in kinds):
            return "linears of one kind have different ranks"
        highest: int = max(map(max, kinds))
        if highest > chains.MAX_RANK:
            return f"the kernels take a rank of {chains.MAX_RANK}, not {highest}"
        return highest

    def changed(self) -> str | None:
        """What makes the blocks differ from timm's own by now."""
        if any(self._tables) or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            return "a module of the blocks has hooks, or all modules have"
        if (
            any(tuple(now.values()) != then for now, then in self._children)
            or any(self._childless)
            or list(map(type, self._modules)) != self._types
        ):
            return "a module of the blocks was replaced"
        if any("forward" in names for names in self._dicts) or any(
            kind.forward is not forward for kind, forward in self._forwards
        ):
            return "a module of the blocks has a forward of its own"
        if any(dropout.p for dropout in self._dropouts):
            return "a dropout of the blocks is on"
        if any(gelu.approximate != "none" for gelu in self._gelus):
            return "a GELU of the blocks is no exact one"
        if any(norm.__dict__.get("_fast_norm") for norm in self._norms):
            return "timm's fast norm is on"
        if any(block.attn.num_heads != self.heads for block in self.blocks):
            return "the heads of an attention were changed"
        if any(module._compiled_call_impl is not None for module in self._modules):
            return "a module of the blocks is compiled"
        if not all(block.attn.fused_attn for block in self.blocks):
            return "an attention of the blocks is not the fused one"
        return None

    def unfit(self, x: Tensor) -> str | None:
        """Why the parameters or the adapter's state do not let a chain run over x."""
        if any(m._parameters.get(name) is None for m, name in self._required) or any(
            (linear._parameters.get("bias") is None) is not absent
            or (absent and linear.bias is not None)
            for linear, absent in self._without_bias
        ):
            return "a weight or bias of the blocks is no parameter, or none any more"
        # One set for all: this is asked at every call.
        found = {
            (type(p), p.requires_grad, p.dtype, p.get_device(), p.is_contiguous())
            for module in self._parametrised
            for p in module._parameters.values()
            if p is not None
        }
        if any(trains for _, trains, *_ in found):
            return "a weight, bias or norm of the blocks trains"
        if found != {(nn.Parameter, False, x.dtype, x.get_device(), True)}:
            return f"a weight of the blocks is no plain {x.dtype} on {x.device}"
        first = self.linears[0]
        # One of each group, as they are moved together: LoRA has hundreds.
        of_groups = [next(group.parameters(), first.weight) for group in self.groups]
        if any(p.device != x.device for p in of_groups):
            return f"a factor is not on {x.device}"
        if any(linear._base_weight for linear in self.linears):
            return "the adapter is merged"
        if {linear.backend for linear in self.linears} | {
            linear.strategy for linear in self.linears
        } != {"auto"}:
            return "a linear has a backend or a strategy of its own"
        if any(linear.training != first.training for linear in self.linears):
            return "linears differ in their mode of training"
        if first._bank[0].tasks is not None:
            return "a batch of several tasks is run"
        if first.training and any(group.activation_dropout for group in self.groups):
            return "the method drops entries of x·down·core"
        return None

    def learns(self, x: Tensor) -> bool:
        """Whether there is a backward to keep anything for."""
        return x.requires_grad or any(
            p.requires_grad for group in self.groups for p in group.parameters()
        )

    def _stacks_by_site(self, rows: torch.dtype) -> list[tuple[Tensor, Tensor]] | None:
        """As `FactorBank.stacks`, each linear asked for its factors in the order in which the
        linears would ask, so that dropout draws the same masks; `rows` is the GEMMs' dtype. None
        where one kind of linear has several ranks."""
        found = []
        for linear in self.linears:
            down, core, up = linear._bank[0].factors(linear._site, linear.training)
            with without_autocast(up.device):
                found.append((down, fold(core, up, rows)))
        kinds = [found[place::4] for place in range(4)]
        if any(len({down.shape[1] for down, _ in kind}) > 1 for kind in kinds):
            return None
        return [
            (torch.stack([down for down, _ in kind]), torch.stack([b for _, b in kind]))
            for kind in kinds
        ]

    def _present_kinds(self, bank: FactorBank) -> list[Kind] | None:
        """`_kinds`, where a group was exchanged, or its class, those of now; a graph has none."""
        if self._kinds is not None and any(
            bank.group(kind.sites[0]) is not kind.group or type(kind.group) is not kind.made_of
            for kind in self._kinds
        ):
            if torch.compiler.is_compiling():
                return None
            self._kinds = _kinds([linears for linears, _ in self._columns], bank)
        return self._kinds

    def operands(self, rows: torch.dtype) -> tuple[Frozen, list[Tensor]] | None:
        """What the chain runs over, its GEMMs in the dtype `rows`; None where one kind of linear
        has several ranks."""
        first = self.linears[0]
        bank: FactorBank = first._bank[0]
        kinds = self._present_kinds(bank)
        stacks = None if kinds is None else bank.stacks(kinds, first.training)
        stacks = self._stacks_by_site(rows) if stacks is None else stacks
        if stacks is None:
            return None
        frozen = Frozen(
            [_norm(norm) for norm in self._norms],
            [
                FrozenLinears(
                    [linear._parameters["weight"] for linear in linears],  # type: ignore[misc]
                    [linear._parameters["bias"] for linear in linears],
                    [None if s is None else s._parameters.get("gamma") for s in scales],
                )
                for linears, scales in self._columns
            ],
            self.heads,
        )
        return chains.scaled(frozen, [factor for pair in stacks for factor in pair])


def _kinds(columns: Sequence[Sequence[FusedEFFTLinear]], bank: FactorBank) -> list[Kind] | None:
    """The kinds of linears for `FactorBank.stacks`; None where it has none of them."""
    found = []
    for linears in columns:
        sites = tuple(linear._site for linear in linears)
        group = bank.group(sites[0])
        if not group.joint or any(bank.group(site) is not group for site in sites):
            return None
        plan = group.stack_plan(sites)
        if plan is None:
            return None
        found.append(Kind(group, type(group), sites, plan))
    return found


def _norm(module: nn.LayerNorm) -> Norm:
    own: Any = module._parameters
    return Norm(own["weight"], own["bias"], module.eps)


def graph_dtype(x: Tensor) -> torch.dtype:
    """Of a chain's GEMMs in a graph over x."""
    return torch.get_autocast_dtype(x.device.type)


def _facts(
    tokens: int, k: int, heads: int, rank: int, dtype: torch.dtype, index: int | None
) -> int | None:
    """What a graph takes for granted once it is traced: the attention that torch chooses, and that
    the kernels run on the device and take the sizes."""
    if torch._C._are_functorch_transforms_active():
        return None
    return chains.attention_of_graph(tokens, k, heads, rank, dtype, index)


# As torch.compiler.assume_constant_result does, without importing Dynamo.
_facts._dynamo_marked_constant = True  # type: ignore[attr-defined]


class ChainedBlocks:
    """The forward of an nn.Sequential of blocks.

    It follows deepcopy and pickle: a copy runs its own blocks.

    Args:
        blocks: the blocks.
        bank: the factors of their linears.
    """

    def __init__(self, blocks: nn.Sequential, bank: FactorBank) -> None:
        self.__setstate__({"blocks": blocks, "bank": bank})

    def __getstate__(self) -> dict[str, Any]:
        return {"blocks": self._blocks(), "bank": self._bank}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The blocks hold this object: a reference back would keep their memory until a collection.
        self._blocks = weakref.ref(state["blocks"])
        self._bank = state["bank"]
        self._parts: _Parts | str | None = None

    def forward(self, input: Tensor) -> Tensor:
        """What the blocks make of the stream [images, tokens, K]."""
        if torch.compiler.is_compiling():
            traced = self._in_graph(input)
            if traced is not None:
                (frozen, factors), attention = traced
                dtype = graph_dtype(input)
                return compiled_chain.run_stacks(input, frozen, factors, attention, dtype)
        elif torch.is_grad_enabled() and not torch.jit.is_tracing():
            found = self._engine(input)
            if not isinstance(found, str):
                engine, parts = found
                with torch.autocast(input.device.type, enabled=False):
                    operands = parts.operands(engine.dtype)
                assert operands is not None  # `parts.rank` is the ranks'
                return chains.run_stacks(input, *operands, engine)
        out: Tensor = nn.Sequential.forward(self._blocks(), input)  # type: ignore[arg-type]
        return out

    def _in_graph(self, x: Tensor) -> tuple[tuple[Frozen, list[Tensor]], int] | None:
        """The operands of a chain over x in the graph that is being traced, and its attention; None
        where there is no chain. The graph is guarded by all that is asked here but for `_facts`.
        """
        if not torch.is_grad_enabled() or not torch.compiler.is_dynamo_compiling():
            return None  # the latter: torch.export, whose program is to hold plain blocks
        parts = self._parts
        if not isinstance(parts, _Parts):  # a copy looks in its first eager call
            return None
        if x.dim() != 3 or not x.shape[0]:
            return None
        if x.shape[2] != parts.linears[0].in_features or not parts.learns(x):
            return None
        if chains.refusal_of_graph(x) or parts.unfit(x) or parts.changed():
            return None
        with torch.autocast(x.device.type, enabled=False):
            operands = parts.operands(graph_dtype(x))
        if operands is None:
            return None
        rank = max(factor.shape[2] for factor in operands[1])
        facts = x.shape[1], x.shape[2], parts.heads, rank, graph_dtype(x), x.device.index
        attention = _facts(*facts)
        return None if attention is None else (operands, attention)

    def _engine(self, x: Tensor) -> tuple[chains.Engine, _Parts] | str:
        """What runs the chain over x, or why it does not run; what is quickly seen comes first."""
        if reason := chains.refusal(x) or chains.watched():
            return reason
        parts = self._look()
        if isinstance(parts, str):
            return parts
        if x.shape[2] != parts.linears[0].in_features:
            return "the blocks' input has another width"
        if reason := parts.unfit(x) or parts.changed():
            return reason
        if isinstance(parts.rank, str):
            return parts.rank
        engine = chains.engine_for(x, parts.heads, parts.rank)
        return engine if isinstance(engine, str) else (engine, parts)

    def _look(self) -> _Parts | str:
        """The parts of the blocks, or what sets them apart from those that a chain knows."""
        if self._parts is None:
            blocks: Any = self._blocks()
            try:
                self._parts = _Parts(blocks, self._bank)
            except _Unlike as unlike:
                self._parts = str(unlike)
        return self._parts

    def sites(self) -> frozenset[str] | str:
        """The sites in the chain, or what in the model keeps it from running at present."""
        parts = self._look()
        if isinstance(parts, str):
            return parts
        if isinstance(parts.rank, str):
            return parts.rank
        weight = parts.linears[0].weight
        # Merging is a state of the adapter's own, and passes.
        merged = any(linear.merged for linear in parts.linears)
        reason = parts.changed() or (None if merged else parts.unfit(weight))
        return reason or frozenset(linear._site for linear in parts.linears)


class _Unlike(Exception):
    """In what a model differs from those that a chain knows."""


def chain(model: nn.Module, bank: FactorBank) -> str | None:
    """Let the blocks of an adapted model run as a chain.

    Returns:
        Why they cannot, in which case the model is left alone; else None.
    """
    if type(model) is not getattr(_timm(), "VisionTransformer", None):
        return f"{type(model).__name__} is not timm's VisionTransformer"
    blocks: Any = model.blocks
    if "forward" in blocks.__dict__:
        return "blocks has a forward of its own"
    chained = ChainedBlocks(blocks, bank)
    parts = chained._look()
    if isinstance(parts, str):
        return parts
    blocks.forward = chained.forward
    return None


def find_chain(model: nn.Module) -> ChainedBlocks | None:
    """What `chain` put on the model's blocks, if it is still there."""
    forward = getattr(getattr(model, "blocks", None), "__dict__", {}).get("forward")
    chained = getattr(forward, "__self__", None)
    return chained if isinstance(chained, ChainedBlocks) else None


def unchain(model: nn.Module) -> None:
    """Take away what `chain` put there."""
    if find_chain(model) is not None:
        del model.blocks.forward  # type: ignore[union-attr]


def _timm() -> Any:
    """timm's module of the vision transformer, which a model of it has imported; else None."""
    return sys.modules.get("timm.models.vision_transformer")


def _check_blocks(blocks: Any) -> None:
    """Raise _Unlike unless every module inside is one that the chain computes."""
    timm = _timm()
    if type(blocks) is not nn.Sequential or not len(blocks):
        raise _Unlike("blocks is no plain nn.Sequential")
    norms = (nn.LayerNorm, timm.LayerNorm)
    kinds: dict[type, dict[str, tuple[type, ...]]] = {
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
    }
    for place, block in blocks.named_children():
        if type(block) is not timm.Block:
            raise _Unlike(f"blocks.{place} is a {type(block).__name__}, not timm's Block")
        for name, module in block.named_modules():
            where = f"blocks.{place}.{name}".rstrip(".")
            children = kinds.get(type(module), {})
            for child, found in module._modules.items():
                if type(found) not in children.get(child, ()):
                    raise _Unlike(
                        f"{where}.{child} is a {type(found).__name__}, which no chain takes"
                    )
            if children and set(children) - set(module._modules) - {"norm"}:
                raise _Unlike(f"{where} is not put together like timm's")
            if "forward" in module.__dict__ or not _has_own_forward(type(module)):
                raise _Unlike(f"the forward of {where} was replaced")
        _check_sizes(block, f"blocks.{place}", blocks[0])


def _has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether the class's forward is the one that was written in it, or in a class above it."""
    forward = kind.forward
    named = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    return named in {f"{above.__module__}.{above.__qualname__}.forward" for above in kind.__mro__}


def _check_sizes(block: Any, where: str, first: Any) -> None:
    k = first.norm1.normalized_shape[0]
    attn, mlp = block.attn, block.mlp
    shapes = [tuple(linear.weight.shape) for linear in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)]
    hidden = first.mlp.fc1.out_features
    if shapes != [(3 * k, k), (k, k), (hidden, k), (k, hidden)] or attn.num_heads != (
        first.attn.num_heads
    ):
        raise _Unlike(f"{where} has other sizes than the first block")
    if any(type(getattr(block, ls)) is not type(getattr(first, ls)) for ls in ("ls1", "ls2")):
        raise _Unlike(f"{where} has not the first block's kind of LayerScale")
    if any(
        getattr(s, "gamma", None) is not None and s.gamma.shape != (k,)
        for s in (block.ls1, block.ls2)
    ):
        raise _Unlike(f"a LayerScale of {where} is not one of {k} numbers")
    for norm in (block.norm1, block.norm2):
        if norm.normalized_shape != (k,) or norm.weight is None or norm.bias is None:
            raise _Unlike(f"a norm of {where} is not one of {k} weights and biases")

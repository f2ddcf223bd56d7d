"""A vision transformer's blocks run as a chain (ops/chains.py) where that computes the same.

timm's VisionTransformer calls its blocks as one nn.Sequential: `chain` puts a `forward` on that
instance. Hugging Face's models loop over their layers: hooks on the module that does let its own
forward see one callable in their place, and nobody else. At each call either looks at the model and
the circumstances, and where the chain does not do, the blocks run one after the other as ever.
`chain_blocks.py` says which blocks a chain knows.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

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
from ..ops.shared_projection import SharedInput
from .chain_blocks import (
    BlockKind,
    Unlike,
    check_blocks,
    has_own_forward,
    holder_of_layers,
    kind_of,
    plain_call,
    timm_blocks,
)

FUSE = ("auto", "pairs", "off")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Parts:
    """The modules inside the blocks and all that must stay as it was when they were looked at."""

    def __init__(self, blocks: Any, bank: FactorBank, path: str) -> None:
        """Raises Unlike.

        Args:
            blocks: the module whose children they are.
            bank: the factors of their linears.
            path: what to call `blocks`.
        """
        kind = kind_of(type(blocks[0]))
        if kind is None:
            raise Unlike(f"{path}.0 is a {type(blocks[0]).__name__}, which no chain takes")
        check_blocks(blocks, kind, path)
        self.kind: BlockKind = kind
        self.blocks = [kind.read(block) for block in blocks]
        self.linears = [linear for block in self.blocks for linear in block.linears]
        if any(linear._bank != (bank,) for linear in self.linears):
            raise Unlike("a linear reads its factors from elsewhere")
        self.heads = kind.heads_of(self.blocks[0])
        columns = list(zip(*(block.linears for block in self.blocks), strict=True))
        places = [(None, b.scale1, None, b.scale2) for b in self.blocks]
        self._equal = columns  # linears at the same place of a block
        of_qkv = tuple(linear for block in self.blocks for linear in block.qkv)
        columns = [of_qkv, *columns[len(self.blocks[0].qkv) :]]
        self._columns = list(zip(columns, zip(*places, strict=True), strict=True))
        self._look_at_groups(bank)
        # What `changed` compares: tables that are looked up once and are the modules' own.
        modules = [module for module in blocks.modules() if module is not blocks]
        self._modules = modules
        self._types = [type(module) for module in modules]
        classes: set[Any] = {*self._types, type(blocks)}
        self._forwards = [(kind, kind.forward) for kind in classes]
        self._tables = [getattr(module, name) for module in (*modules, blocks) for name in _HOOKS]
        self._dicts = [module.__dict__ for module in modules]
        children = [(m._modules, tuple(m._modules.values())) for m in (*modules, blocks)]
        self._children = [(now, then) for now, then in children if then]
        self._childless = [now for now, then in children if not then]
        self._dropouts = [module for module in modules if type(module) is nn.Dropout]
        self._norms = [norm for block in self.blocks for norm in (block.norm1, block.norm2)]
        scales = [scale for block in self.blocks for scale in block.scales]
        self._parametrised: list[nn.Module] = [*self._norms, *self.linears, *scales]
        self._required = [(module, "weight") for module in (*self._norms, *self.linears)]
        self._required += [(scale, kind.gamma) for scale in scales]
        self._required += [(norm, "bias") for norm in self._norms]
        self._without_bias = [(linear, linear.bias is None) for linear in self.linears]

    def _look_at_groups(self, bank: FactorBank) -> None:
        """What depends on the groups in the bank, and is looked at again where they changed."""
        self.groups = list({id(g): g for g in (bank.group(s._site) for s in self.linears)}.values())
        self._kinds = _kinds(self._equal, bank)
        self._one_down = all(_share_down(block.qkv, bank) for block in self.blocks)
        sites = [] if self._kinds is None else [kind.sites[0] for kind in self._kinds]
        if self._one_down:
            sites += [block.qkv[0]._site for block in self.blocks]
        found = {id(bank.group(site)): (site, bank.group(site)) for site in sites}
        self._seen = [(site, group, type(group)) for site, group in found.values()]
        self._rank: int | str | None = None

    @property
    def rank(self) -> int | str:
        """The largest of the chain's linears, or why they have none that a chain takes."""
        if self._rank is None:
            self._rank = self._find_rank()
        return self._rank

    def _find_rank(self) -> int | str:
        with torch.no_grad():
            kinds = [
                {linear.current_factors().down.shape[1] for linear in linears}
                for linears in self._equal
            ]
        if any(len(ranks) > 1 for ranks in kinds):
            return "linears of one kind have different ranks"
        highest = [max(ranks) for ranks in kinds]
        of_qkv = highest[: len(self.blocks[0].qkv)]
        most: int = max(of_qkv[0] if self._one_down else sum(of_qkv), *highest)
        if most > chains.MAX_RANK:
            return f"the kernels take a rank of {chains.MAX_RANK}, not {most}"
        return most

    def _idles(self, hook: Any) -> bool:
        """Whether a hook matters to modules that run one by one alone."""
        return isinstance(getattr(hook, "__self__", None), SharedInput) or self.kind.idles(hook)

    def changed(self) -> str | None:
        """What makes the blocks differ by now from those that a chain knows."""
        if any(self._tables) and not all(
            self._idles(hook) for table in self._tables for hook in table.values()
        ):
            return "a module of the blocks has hooks"
        if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            return "all modules have hooks"
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
        if any(self.kind.heads_of(block) != self.heads for block in self.blocks):
            return "the heads of an attention were changed"
        if any(module._compiled_call_impl is not None for module in self._modules):
            return "a module of the blocks is compiled"
        return self.kind.departed(self.blocks)

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
        count = len(self._equal)
        kinds = [found[place::count] for place in range(count)]
        if any(len({down.shape[1] for down, _ in kind}) > 1 for kind in kinds):
            return None
        return [
            (torch.stack([down for down, _ in kind]), torch.stack([b for _, b in kind]))
            for kind in kinds
        ]

    def _present_kinds(self, bank: FactorBank) -> list[Kind] | None:
        """`_kinds`, where a group was exchanged, or its class, those of now; a graph has none."""
        if any(
            bank.group(site) is not group or type(group) is not made_of
            for site, group, made_of in self._seen
        ):
            if torch.compiler.is_compiling():
                return None
            self._look_at_groups(bank)
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
        separate = len(self.blocks[0].qkv)
        stacks = [chains.side_by_side(stacks[:separate], self._one_down), *stacks[separate:]]
        frozen = Frozen(
            [_norm(norm) for norm in self._norms],
            [
                FrozenLinears(
                    [linear._parameters["weight"] for linear in linears],  # type: ignore[misc]
                    [linear._parameters["bias"] for linear in linears],
                    [self.kind.gamma_of(scale) for scale in scales],
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


def _share_down(linears: Sequence[FusedEFFTLinear], bank: FactorBank) -> bool:
    """Whether linears that read the same x have one `down` for all."""
    groups = [bank.group(linear._site) for linear in linears]
    keys = {group.down_key(linear._site) for group, linear in zip(groups, linears, strict=True)}
    return keys != {None} and len(keys) == 1 and all(group is groups[0] for group in groups)


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


def _weak(module: nn.Module | None) -> Callable[[], nn.Module | None]:
    """A reference that does not keep it; None of what is gone."""
    return _gone if module is None else weakref.ref(module)


def _gone() -> None:
    return None


class Chained(ABC):
    """Blocks that run as a chain where that does.

    It follows deepcopy and pickle: a copy runs its own blocks.

    Args:
        blocks: the module whose children they are.
        bank: the factors of their linears.
        path: what to call `blocks`.
    """

    def __init__(self, blocks: nn.Module, bank: FactorBank, path: str) -> None:
        self.__setstate__({"blocks": blocks, "bank": bank, "path": path})

    def __getstate__(self) -> dict[str, Any]:
        return {"blocks": self._blocks(), "bank": self._bank, "path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The blocks hold this object: a reference back would keep their memory until a collection.
        self._blocks = _weak(state["blocks"])
        self._bank: FactorBank = state["bank"]
        self._path: str = state["path"]
        self._parts: _Parts | str | None = None

    @abstractmethod
    def put_in(self) -> None:
        """Let the model's forward come here."""

    @abstractmethod
    def take_out(self) -> None:
        """Undo `put_in`."""

    def _run_chain(self, input: Tensor) -> Tensor | None:
        """What the blocks make of the stream [images, tokens, K], by a chain; None where none
        runs."""
        found = self._engine(input)
        if isinstance(found, str):
            return None
        engine, parts = found
        with torch.autocast(input.device.type, enabled=False):
            operands = parts.operands(engine.dtype)
        assert operands is not None  # `parts.rank` is the ranks'
        return chains.run_stacks(input, *operands, engine)

    def _engine(self, x: Tensor) -> tuple[chains.Engine, _Parts] | str:
        """What runs the chain over x, or why it does not run; what is quickly seen comes first."""
        if reason := chains.refusal(x) or chains.watched() or self._bypassed():
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
            try:
                self._parts = _Parts(self._blocks(), self._bank, self._path)
            except Unlike as unlike:
                self._parts = str(unlike)
        return self._parts

    def _bypassed(self) -> str | None:
        """Why the model's own forward does not come here as it did."""
        return None

    def sites(self) -> frozenset[str] | str:
        """The sites in the chain, or what in the model keeps it from running at present."""
        if reason := self._bypassed():
            return reason
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


class ChainedBlocks(Chained):
    """The forward of timm's nn.Sequential of blocks."""

    def put_in(self) -> None:
        """As the instance's own forward."""
        blocks: Any = self._blocks()
        blocks.forward = self.forward

    def take_out(self) -> None:
        """The class's forward is the instance's again."""
        blocks: Any = self._blocks()
        del blocks.forward

    def forward(self, input: Tensor) -> Tensor:
        """What the blocks make of the stream [images, tokens, K]."""
        if torch.compiler.is_compiling():
            traced = self._in_graph(input)
            if traced is not None:
                (frozen, factors), attention = traced
                dtype = graph_dtype(input)
                return compiled_chain.run_stacks(input, frozen, factors, attention, dtype)
        elif torch.is_grad_enabled() and not torch.jit.is_tracing():
            chained = self._run_chain(input)
            if chained is not None:
                return chained
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


class _StandIn(list[Callable[..., Tensor]]):
    """What is in the place of a model's layers."""


class ChainedLayers(Chained):
    """What the forward of a Hugging Face model finds in the place of its layers while it runs: one
    layer that makes what all of them make one after the other. Another thread may see it as well.

    Args:
        layers: the layers.
        bank: the factors of their linears.
        path: what to call `layers`.
        holder: the module whose forward loops over them.
        name: the holder's name for them.
    """

    def __init__(
        self, layers: nn.Module, bank: FactorBank, path: str, holder: nn.Module, name: str
    ) -> None:
        own = {"blocks": layers, "bank": bank, "path": path}
        self.__setstate__({**own, "holder": holder, "name": name})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "holder": self._holder(), "name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._holder = weakref.ref(state["holder"])
        self._name: str = state["name"]

    def put_in(self) -> None:
        """By hooks on the holder."""
        holder: Any = self._holder()
        holder.register_forward_pre_hook(self.open)
        holder.register_forward_hook(self.close, always_call=True)

    def take_out(self) -> None:
        """Remove the hooks."""
        holder: Any = self._holder()
        for hooks in (holder._forward_pre_hooks, holder._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]
                    holder._forward_hooks_always_called.pop(key, None)

    def open(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the holder."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if module is self._holder() and self._bypassed() is None:  # and no replica of it
            # Found before the module of that name, which stays where it is.
            module.__dict__[self._name] = _StandIn([self.run])

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the holder; runs after an exception too."""
        if torch.compiler.is_compiling():
            return
        if type(module.__dict__.get(self._name)) is _StandIn:
            del module.__dict__[self._name]

    def run(self, input: Tensor, *args: Any, **options: Any) -> Tensor:
        """What the layers make of the stream [images, tokens, K], all of them called like this."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            chained = self._run_chain(input) if plain_call(args, options) else None
            if chained is not None:
                return chained
        holder: Any = self._holder()
        for layer in holder._modules[self._name]:
            input = layer(input, *args, **options)
        return input

    def _bypassed(self) -> str | None:
        holder: Any = self._holder()
        layers = self._blocks()
        if layers is None or holder._modules.get(self._name) is not layers:
            return f"{self._path} was replaced"
        if "forward" in holder.__dict__ or not has_own_forward(type(holder)):
            return f"the forward around {self._path} was replaced"
        return None


def chain(model: nn.Module, bank: FactorBank) -> str | None:
    """Let the blocks of an adapted model run as a chain.

    Returns:
        Why they cannot, in which case the model is left alone; else None.
    """
    found = _find_blocks(model, bank)
    if isinstance(found, str):
        return found
    parts = found._look()
    if isinstance(parts, str):
        return parts
    found.put_in()
    return None


def _find_blocks(model: nn.Module, bank: FactorBank) -> Chained | str:
    """The blocks of a model that a chain may know; or why there are none."""
    blocks = timm_blocks(model)
    if blocks is not None:
        if type(blocks) is not nn.Sequential or not len(blocks):
            return "blocks is no plain nn.Sequential"
        if "forward" in blocks.__dict__:
            return "blocks has a forward of its own"
        return ChainedBlocks(blocks, bank, "blocks")
    found = holder_of_layers(model)
    if found is None:
        return (
            f"{type(model).__name__} is not timm's VisionTransformer, nor has it the layers of one"
            " ViT or DINOv2 of transformers"
        )
    path, holder, name = found
    layers: Any = holder._modules.get(name)
    path = f"{path}.{name}".lstrip(".")
    if type(layers) is not nn.ModuleList or not len(layers):
        return f"{path} is no plain nn.ModuleList"
    chained = ChainedLayers(layers, bank, path, holder, name)
    return chained._bypassed() or chained


def find_chain(model: nn.Module) -> Chained | None:
    """What `chain` put into the model, if it is still there."""
    calls = [getattr(getattr(model, "blocks", None), "__dict__", {}).get("forward")]
    calls += [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    owners = (getattr(call, "__self__", None) for call in calls)
    return next((owner for owner in owners if isinstance(owner, Chained)), None)


def unchain(model: nn.Module) -> None:
    """Take away what `chain` put there."""
    found = find_chain(model)
    if found is not None:
        found.take_out()


def has_hooks(model: nn.Module) -> bool:
    """Whether what `chain` put there are hooks."""
    return isinstance(find_chain(model), ChainedLayers)

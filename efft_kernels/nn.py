"""FusedEFFTLinear, the drop-in nn.Linear, and FactorBank, which owns factors that layers share."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .methods.base import FactorGroup, Factors, Rank, check_choice, check_number, rank_pair
from .methods.followed_table import FollowedTable
from .methods.joint import JointFactors, Kind
from .methods.sharded import copy_into, factors_of, is_sharded, whole
from .methods.tensor_train import Placement, TensorTrainGroup
from .ops import recompute
from .ops.backends.torch_backend import fold
from .ops.checks import without_autocast
from .ops.layer import adapted_linear
from .ops.recompute import Source
from .ops.reference import delta_weight
from .ops.shared_projection import SharedInput

Module = TypeVar("Module", bound=nn.Module)


class TaskBatch(NamedTuple):
    """The factors of several tasks and which task each row of a batch belongs to."""

    parameters: dict[str, Tensor]  # bank parameter name → [tasks, ...]
    task_of_row: Tensor  # [B]
    check: Callable[[], None]  # raises where the model's rows may not be one image after the other


class TracedTasks(NamedTuple):
    """The tasks of a graph that is being traced, all of them its inputs."""

    factors: Mapping[str, Factors]  # site → down [tasks, K, Ra], None, up [tasks, N, Ra]
    heads: Mapping[
        str, tuple[Tensor, Tensor | None]
    ]  # name → weight [tasks, N, K], bias [tasks, N]
    task_of_row: Tensor  # [B]


# Of the present thread or coroutine; others that use the model meanwhile see none.
_TASKS: ContextVar[Mapping[FactorBank, TaskBatch | None]] = ContextVar("_TASKS", default={})  # noqa: B039
_MIXING = threading.Lock()


def _without_autocast(group: nn.Module) -> AbstractContextManager[object]:
    """What a group makes its operands in."""
    parameter = next(group.parameters(), None)
    return contextlib.nullcontext() if parameter is None else without_autocast(parameter.device)


def without_numbers(site: str) -> str:
    """A linear's name for all blocks, "blocks.#.mlp.fc1": numbers of the modules around it are
    left out."""
    return re.sub(r"\d+(?=.*\.)", "#", site)


class Place:
    """Where a layer finds its factors in the bank, by a path that is the same in every block.

    Args:
        site: the site's name.
        group: the group that holds its factors.

    Attributes:
        position: what the group knows of the site for `FactorGroup.factors_at`.
        pattern: the site's name, `without_numbers`.
    """

    def __init__(self, site: str, group: FactorGroup) -> None:
        self.site = site
        self.pattern = without_numbers(site)
        self.group = group

    @property
    def group(self) -> FactorGroup:
        """The bank's own: it follows where that is exchanged."""
        return self._group

    @group.setter
    def group(self, group: FactorGroup) -> None:
        self._group = group
        self.position = None if group is None else group.position(self.site)


class FactorBank(nn.Module):
    """The factors of an attached method, owned once at the model's root.

    Layers hold the bank in a tuple, which torch does not register, and read it in forward: each
    factor has one state-dict key, and deepcopy, `to_empty`, `load_state_dict(assign=True)`, DDP and
    FSDP2 see it once.

    Args:
        groups: name → group of parameters; a name becomes the prefix of its state-dict keys.
        sites: site name → name of its group.

    Attributes:
        places: site → where its layer finds its factors.
        mixing: how many threads run a batch of several tasks at present.
        traced: the tasks of the graph that `AdapterSet.compiled` traces.

    Raises:
        ValueError: a group named like one of the bank's own attributes.
    """

    def __init__(self, groups: Mapping[str, FactorGroup], sites: Mapping[str, str]) -> None:
        super().__init__()
        self.group_of = dict(sites)
        self.mixing = 0
        self.traced: TracedTasks | None = None
        self.joint_factors = JointFactors()
        for name, group in groups.items():
            if hasattr(self, name):
                raise ValueError(
                    f"groups must not be named like a FactorBank's own attribute, got {name!r}"
                )
            self.add_module(name, group)
        self.places = {site: Place(site, self.group(site)) for site in sites}
        followers: dict[str, list[Place]] = {}
        for site, name in self.group_of.items():
            followers.setdefault(name, []).append(self.places[site])
        self._modules = FollowedTable(self._modules, followers, "group")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mixing": 0, "traced": None}

    @property
    def tasks(self) -> TaskBatch | TracedTasks | None:
        """The batch of several tasks that the present thread runs, if any."""
        if self.traced is not None:
            return self.traced
        # A compiled graph is guarded by `mixing`; it could not be by a context variable.
        return self._own_tasks() if self.mixing else None

    @torch.compiler.disable(reason="tasks() is compiled by AdapterSet.compiled()")
    def _own_tasks(self) -> TaskBatch | None:
        return _TASKS.get().get(self)

    @contextlib.contextmanager
    def mixed(self, tasks: TaskBatch | None) -> Iterator[None]:
        """Within this context the layers compute `tasks`, in this thread alone; None for the
        model's own factors."""
        with _MIXING:
            self.mixing += 1
        outer = self._own_tasks()
        _TASKS.set({**_TASKS.get(), self: tasks})
        try:
            yield
        finally:
            others = {bank: batch for bank, batch in _TASKS.get().items() if bank is not self}
            _TASKS.set(others if outer is None else {**others, self: outer})
            with _MIXING:
                self.mixing -= 1

    def forward(self, input: Any) -> Any:
        """The input itself: at the root of an nn.Sequential the bank is the last of the chain."""
        return input

    def group(self, site: str) -> FactorGroup:
        """The group that holds a site's factors."""
        group: Any = self._modules[self.group_of[site]]
        return group  # type: ignore[no-any-return]

    def factors(self, site: str, dropout: bool) -> Factors:
        """The operands for one site, from all its group's at once where the model's forward runs.

        Args:
            site: the site's name.
            dropout: apply the method's dropout (training).
        """
        group = self.group(site)
        # Dropout on x·down·core needs the core by itself.
        if not (dropout and group.activation_dropout):
            joint = self.joint_factors.get(group, site, dropout)
            if joint is not None:
                return joint
        with _without_autocast(group):
            return group.factors(site, dropout)

    def stacks(self, kinds: Sequence[Kind], dropout: bool) -> list[tuple[Tensor, Tensor]] | None:
        """Of each kind of linear the factors of all its sites, down [L, K, Ra] and B [L, N, Ra];
        None where `factors` has to be asked for each.

        Args:
            kinds: all groups' are joint.
            dropout: as in `factors`.
        """
        if dropout and any(kind.group.activation_dropout for kind in kinds):
            return None
        return self.joint_factors.stacks(kinds, dropout)

    def factors_in_graph(self, place: Place, dropout: bool) -> Factors:
        """The operands for one site in a graph of torch.compile. Equal linears of different blocks
        take the same one, so that blocks that are compiled one by one share a graph.

        Args:
            place: the site's.
            dropout: as in `factors`.
        """
        group = place.group
        with _without_autocast(group):
            # Where one graph holds all blocks, a slice of the cores has the cheaper backward.
            if place.position is not None and not self.joint_factors.traced:
                factors = group.factors_at(place.position, dropout)
                if factors is not None:
                    return factors
            # A group that does not look at the name is not told apart by it.
            return group.factors(place.site, dropout)

    def task_factors(self, site: str) -> Factors:
        """(down [tasks, K, Ra], None, up [tasks, N, Ra]) of one site for every task of the present
        batch; the core is folded into up."""
        if self.traced is not None:
            return self.traced.factors[site]
        return self._factors_of_tasks(site)

    @torch.compiler.disable
    def _factors_of_tasks(self, site: str) -> Factors:
        tasks = self._own_tasks()
        assert tasks is not None
        tasks.check()
        return self.stacked_factors(site, tasks.parameters)

    def stacked_factors(self, site: str, parameters: Mapping[str, Tensor]) -> Factors:
        """(down [tasks, K, Ra], None, up [tasks, N, Ra]) of one site; the core is folded into up.

        Args:
            site: the site's name.
            parameters: bank parameter name → [tasks, ...].
        """
        prefix = self.group_of[site] + "."
        own = {
            key.removeprefix(prefix): tensor
            for key, tensor in parameters.items()
            if key.startswith(prefix)
        }
        # functional_call puts the tasks' parameters into the module while it runs it: other threads
        # must not see them there.
        group = _shallow_copy(self.group(site))

        def of_one_task(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            down, core, up = torch.func.functional_call(group, parameters, (site, False))
            return down, fold(core, up)

        with _without_autocast(group):
            down, up = torch.func.vmap(of_one_task)(own)
        return Factors(down, None, up)

    def reset_parameters(self) -> None:
        """Initialise every group anew: each ΔW is exactly zero."""
        for group in self.children():
            group.reset_parameters()  # type: ignore[operator]


_OWN_SITE = "self"
_BASE_WEIGHT = "base_weight"
_OWN_ATTRIBUTES = (
    *("backend", "strategy", "_bank", "_site", "_place", "_base_weight"),
    *("shared_input", "remakes_input", "input_from", "_recipes"),
)
NOT_FOR_PEFT = (
    " is adapted by efft_kernels already, and PEFT cannot wrap it: call merge() and detach() on the"
    " adapter for a plain model first, or take the adapter over by export_peft_lora(adapter,"
    " folder) and PeftModel.from_pretrained"
)
_WAY_OUT = (
    "make it permanent first, by torch.nn.utils.prune.remove, remove_weight_norm,"
    " remove_spectral_norm or parametrize.remove_parametrizations"
)


def check_weight_is_stored(linear: nn.Module, name: str) -> None:
    """Check that a linear's weight is a parameter of its own: one that is computed anew for each
    forward could not be merged.

    Args:
        linear: what is to be adapted.
        name: what to call it in the error's text.

    Raises:
        TypeError: it is pruned, weight-normed, spectral-normed or parametrized.
    """
    if isinstance(linear, nn.Linear) and (
        parametrize.is_parametrized(linear) or "weight" not in linear._parameters
    ):
        raise TypeError(
            f"{name} must hold its weight as a parameter, got one that a hook or a parametrization"
            f" computes: {_WAY_OUT}"
        )


def check_class_is_own(module: nn.Module) -> None:
    """Check that a module can get its class from before `attach` again.

    Raises:
        RuntimeError: it was parametrized since, which is a matter of its class.
    """
    if parametrize.is_parametrized(module):
        raise RuntimeError(f"a parametrized layer cannot become a plain one: {_WAY_OUT}")


class FusedEFFTLinear(nn.Linear):
    """A drop-in nn.Linear that computes y = x·W^T + bias + s·x·U·Σ_g·V^T in one operator.

    Made directly it owns its factors U [in_features, r1], V [out_features/slices, r2] and Σ
    [slices, r1, r2] under `factors.*`; weight and bias are trainable as in nn.Linear (freeze them
    for adapter training). Made by `attach` it reads its factors from the model's FactorBank. ΔW
    starts at exactly zero. x is [..., K] and y is [..., N], in x's dtype or autocast's.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        rank: r, or (r1, r2).
        scale: s.
        slices: G, the number of matrices stacked along out_features (3 for a fused qkv); divides N.
        init: the factor that starts at zero, "v" or "u".
        dropout: probability of dropping a factor entry in training.
        learn_scale: make s a learnable scalar.
        backend: as in `low_rank_linear`.
        strategy: as in `low_rank_linear`.
        device: of weight, bias and factors.
        dtype: of weight and bias; factors are float32 where this is a half precision.

    Raises:
        ValueError: rank below 1 or above min(K, N), N not divisible by slices, init, dropout or
            scale out of range.
        TypeError: rank or scale of the wrong kind.

    Source: EFFT (arXiv:2311.06749), Eq. 2 and 3, one layer of an aggregated group.
    """

    factors: FactorGroup | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: Rank = 16,
        scale: float = 1.0,
        slices: int = 1,
        init: str = "v",
        dropout: float = 0.0,
        learn_scale: bool = False,
        backend: str = "auto",
        strategy: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_up(backend, strategy)
        self.factors = _own_factors(
            in_features, out_features, rank, scale, slices, init, dropout, learn_scale
        ).to(device=self.weight.device, dtype=_factor_dtype(self.weight.dtype))

    def _set_up(self, backend: str, strategy: str) -> None:
        self.backend = backend
        self.strategy = strategy
        self.factors = None
        self._bank: tuple[FactorBank, ...] = ()
        self._place: Place | None = None
        self._site = _OWN_SITE
        self.shared_input: SharedInput | None = None
        self.remakes_input = True  # in the backward, where that does without keeping it
        self._recipes = recompute.Recipes()  # those that were seen to make x
        self.input_from: str | None = None  # what made x in the last training forward, or "kept"
        self._base_weight: tuple[nn.Parameter, ...] = ()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bank: FactorBank | None = None,
        site: str | None = None,
        rank: Rank = 16,
        scale: float = 1.0,
        slices: int = 1,
        init: str = "v",
        dropout: float = 0.0,
        learn_scale: bool = False,
        backend: str = "auto",
        strategy: str = "auto",
    ) -> FusedEFFTLinear:
        """A layer that keeps `linear`'s very own weight, bias, hooks and training flag.

        With `bank` and `site` it reads those factors and ignores the arguments that describe its
        own.

        Raises:
            TypeError: `linear` is not exactly an nn.Linear (a subclass may compute something else),
                or a hook or parametrization computes its weight.
            ValueError: as in the constructor.
        """
        check_weight_is_stored(linear, "linear" if site is None else f"target {site!r}")
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be an nn.Linear itself, got {type(linear).__name__}")
        k, n = linear.in_features, linear.out_features
        own = None
        if bank is None:
            own = _own_factors(k, n, rank, scale, slices, init, dropout, learn_scale).to(
                device=linear.weight.device, dtype=_factor_dtype(linear.weight.dtype)
            )
            own.train(linear.training)
        layer = cls.__new__(cls)
        layer.__dict__ = _module_state(linear)
        layer._set_up(backend, strategy)
        layer.factors = own
        if bank is not None:
            if site is None or site not in bank.group_of:
                raise ValueError(f"site must be one of the bank's sites, got {site!r}")
            layer._bank, layer._site, layer._place = (bank,), site, bank.places[site]
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear with this layer's present weight, bias, hooks and training flag,
        factors left behind.

        Raises:
            RuntimeError: it was parametrized since, which is a matter of its class.
        """
        check_class_is_own(self)
        linear = nn.Linear.__new__(nn.Linear)
        state = _module_state(self)
        for name in _OWN_ATTRIBUTES:
            del state[name]
        for attributes in (state, state["_modules"]):
            attributes.pop("factors", None)
        linear.__dict__ = state
        return linear

    def _group(self) -> FactorGroup:
        group: Any = self.factors if self._place is None else self._place.group
        return group  # type: ignore[no-any-return]

    def current_factors(self, dropout: bool = False) -> Factors:
        """(down [K, Ra], core [G, Ra, Rb], up [1 or G, N/G, Rb]), differentiable in the factors."""
        group = self._group()
        with _without_autocast(group):
            return factors_of(group, self._site, dropout)

    def delta_weight(self) -> Tensor:
        """ΔW [N, K], detached, in float32 (float64 where the factors are)."""
        with torch.no_grad():
            down, core, up = self.current_factors()
            dtype = torch.promote_types(down.dtype, torch.float32)
            slices = up.shape[0] if core is None else core.shape[0]
            core = None if core is None else core.to(dtype)
            with without_autocast(down.device):
                return delta_weight(down.to(dtype), core, up.to(dtype), slices)

    @property
    def merged(self) -> bool:
        """Whether ΔW is at present part of `weight`."""
        return bool(self._base_weight)

    def merge(self) -> None:
        """Put W + ΔW in `weight`, added in at least float32 and rounded once; the base is kept for
        `unmerge`.

        Raises:
            RuntimeError: a thread is within `AdapterSet.tasks`, or the weight has since been pruned
                or parametrized.
        """
        if self.merged:
            return
        if self._bank and self._bank[0].mixing:
            raise RuntimeError("merge() must not be called within AdapterSet.tasks()")
        base = self._stored_weight("merge")
        # A weight made in inference mode could take no part in autograd afterwards.
        with torch.inference_mode(False), torch.no_grad():
            merged = self.delta_weight().add_(whole(base)).to(base.dtype)
            if is_sharded(base):  # FSDP2 knows this very parameter
                self._base_weight = (nn.Parameter(base.detach().clone(), base.requires_grad),)
                copy_into(base, merged)
                return
            self.weight = nn.Parameter(merged, requires_grad=base.requires_grad)
        self._base_weight = (base,)

    def unmerge(self) -> None:
        """Put the very base weight back, bit for bit, with the merged one's requires_grad."""
        if self._base_weight:
            merged, (base,) = self._stored_weight("unmerge"), self._base_weight
            if is_sharded(merged):
                copy_into(merged, base)
            else:
                self.weight = base.requires_grad_(merged.requires_grad)
            self._base_weight = ()

    def _stored_weight(self, purpose: str) -> nn.Parameter:
        weight = self._weight_parameter()
        if weight is None:
            raise RuntimeError(
                f"weight must be a parameter of the layer to {purpose}, got one that a hook or a"
                f" parametrization computes: {_WAY_OUT}"
            )
        return weight

    def _weight_parameter(self) -> nn.Parameter | None:
        return self._parameters.get("weight")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """While merged, the base weight as well: `load_state_dict` would else count ΔW twice, and a
        plain model takes such a state only where the further keys are left out on purpose."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for base in self._base_weight:
            destination[prefix + _BASE_WEIGHT] = base if keep_vars else base.detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Leaves the layer unmerged, with the state's base weight: ΔW of the factors loaded along
        with it is not yet known here."""
        self.unmerge()
        state = dict(state_dict)
        if (base := state.pop(prefix + _BASE_WEIGHT, None)) is not None:
            state[prefix + "weight"] = base
        super()._load_from_state_dict(state, prefix, *args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] → [..., N].

        Raises:
            RuntimeError: training while merged, when the factors would silently not learn; merged
                within `AdapterSet.tasks`.
        """
        if self._base_weight:
            if self._bank and self._bank[0].tasks is not None:
                raise RuntimeError("tasks() needs the factors: call unmerge()")
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "this FusedEFFTLinear is merged, so its factors cannot learn: call unmerge()"
                    " to train, or eval() to use the merged weight"
                )
            return F.linear(input, self.weight, self.bias)
        bank = self._bank[0] if self._bank else None
        tasks = None if bank is None else bank.tasks
        if bank is None:
            down, core, up = self._group().factors(self._site, self.training)
        elif tasks is not None:
            down, core, up = bank.task_factors(self._site)
        elif self._place is not None and torch.compiler.is_dynamo_compiling():
            down, core, up = bank.factors_in_graph(self._place, self.training)
        else:
            down, core, up = bank.factors(self._site, self.training)
        if self.shared_input is not None and tasks is None:
            down = self.shared_input.down_for(input, down, self.training, self._group())
        source = None
        if tasks is None and torch.is_grad_enabled() and not torch.jit.is_tracing():
            source = self._source(input, down)
        return adapted_linear(
            input,
            self.weight,
            self.bias,
            down,
            core,
            up,
            dropout=self._group().activation_dropout if self.training else 0.0,
            shared_input=self.shared_input,
            task_of_row=None if tasks is None else tasks.task_of_row,
            source=source,
            backend=self.backend,
            strategy=self.strategy,
        )

    @property
    def base_layer(self) -> Any:
        """What PEFT asks the layers for that it is about to wrap, before it changes the model.

        Raises:
            TypeError: the layer is an attached one: PEFT would save its part without the factors.
        """
        if self._bank:
            raise TypeError(self._site + NOT_FOR_PEFT)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'base_layer'")

    def __dir__(self) -> list[str]:
        """Without `base_layer`: torch.jit.trace, for one, reads all that is here."""
        return [name for name in super().__dir__() if name != "base_layer"]

    def __prepare_scriptable__(self) -> Any:
        """Called by torch.jit.script.

        Raises:
            TypeError: always; TorchScript has no such layers.
        """
        raise TypeError(
            "torch.jit.script takes no adapted linears: call merge() and detach() on the adapter,"
            " which leave plain ones, or use torch.export or torch.jit.trace"
        )

    def _source(self, x: Tensor, down: Tensor) -> Source | None:
        """What the backward can make x from, once it was seen to make this layer's x."""
        if not down.requires_grad or torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return None
        source = recompute.find(x) if self.remakes_input else None
        if source is not None:
            source = source if self._recipes.make(source, x) else None
        self.input_from = "kept" if source is None else source.recipe.kind
        return source

    def _apply(self, fn: Any, recurse: bool = True) -> FusedEFFTLinear:
        super()._apply(fn, recurse)
        if self._base_weight:
            (base,) = self._base_weight
            with torch.no_grad():
                moved = fn(base)
            # As torch does for parameters: the tensor stays the same wherever it can.
            if torch._has_compatible_shallow_copy_type(base, moved):
                base.data = moved
            else:
                self._base_weight = (nn.Parameter(moved, requires_grad=base.requires_grad),)
        return self

    def reset_parameters(self) -> None:
        """Weight and bias as nn.Linear does; the layer's own factors so that ΔW is zero."""
        super().reset_parameters()
        if getattr(self, "factors", None) is not None:
            self.factors.reset_parameters()  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self._bank:
            text += f", factors={self._bank[0].group_of[self._site]!r} of the model's bank"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        if self.strategy != "auto":
            text += f", strategy={self.strategy!r}"
        return text + (", merged=True" if self.merged else "")


def _factor_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Factors train in at least float32: an optimizer step is often below half an ulp of a
    half-precision value."""
    return torch.promote_types(weight_dtype, torch.float32)


def _module_state(module: nn.Module) -> dict[str, Any]:
    """The module's attributes with containers of its own, hook tables excepted: their handles stay
    valid."""
    state = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = state[name].copy()
    return state


def _shallow_copy(module: Module) -> Module:
    """The module with the same tensors, in which they can be exchanged."""
    copied = module.__new__(type(module))
    copied.__dict__ = _module_state(module)
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else _shallow_copy(child)
    return copied


def _own_factors(
    k: int,
    n: int,
    rank: Rank,
    scale: float,
    slices: int,
    init: str,
    dropout: float,
    learn_scale: bool,
) -> TensorTrainGroup:
    pair = rank_pair("rank", rank)
    if max(pair) > min(k, n):
        raise ValueError(f"rank must be at most min(K, N)={min(k, n)} (K={k}, N={n}), got {rank}")
    if isinstance(slices, bool) or not isinstance(slices, int):
        raise TypeError(f"slices must be an int, got {type(slices).__name__}")
    if slices < 1 or n % slices:
        raise ValueError(f"slices must divide out_features N={n}, got {slices}")
    check_number("scale", scale)
    check_choice("init", init, ("u", "v"))
    check_number("dropout", dropout, low=0.0, below=1.0)
    return TensorTrainGroup(
        {_OWN_SITE: Placement(0, slices, "in", (0, k))},
        dims=(k, n // slices),
        rank=pair,
        cores=slices,
        scale=scale,
        learn_scale=learn_scale,
        init=init,
        dropout=dropout,
    )

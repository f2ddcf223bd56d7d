"""What x was made of, and x made again from it: how an adapted linear does without keeping x.

d_down = x^T·S needs x in the backward. Where x came out of a norm or an activation, autograd keeps
that operation's own input anyway, and x follows from it by one pass. `find` reads in x's graph what
x came from. Nothing is asked of the modules, so a hook, a patched module or another way of calling
them is simply another graph; x, its gradient and who else uses it stay as they were.

Views, permutations, rolls and paddings on the way are made again too, as Swin's windows need; where
they move rows as a whole, the CPU's kernel takes each row from where it was.

A second derivative goes to what x is made from, and through that to all before it; one with respect
to x itself lacks what comes by way of d_down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.hooks import RemovableHandle

from .backends import cpp_backend
from .backends.torch_backend import thin_grad
from .checks import HALF_DTYPES
from .dispatch import (
    available_backends,
    has_tangent,
    is_batched,
    launch_context,
    requested_backend,
)
from .schemas import OPERANDS, STRATEGY_CODES, needs_code

# How csrc makes rows of x by itself, as in csrc/codes.h; from a recipe of another code x is made
# here.
PLAIN, LAYER_NORM, GELU, GELU_TANH = range(4)

_MAX_DEPTH = 16  # operations between what is kept and x
_MAX_RECIPES = 1024  # which are never freed
_MAX_INDICES = 32  # of rows that were moved: a Swin has 8 for each size of its batches
_CHECKPOINT = "torch.utils.checkpoint"

Expression = tuple[Any, ...]


class Recipe(NamedTuple):
    """How x follows from tensors that are kept."""

    kind: str  # of the operation that made x, but for views: "LayerNorm", "GELU", ...
    code: int
    expression: Expression
    moved: bool = False  # whether x's rows, which `code` makes, have other places than those kept
    unseen: bool = False  # whether there are tensors on the way that nobody keeps
    pads: bool = False  # whether there is a padding among them

    def __call__(self, kept: Sequence[Tensor | None]) -> Tensor:
        """x but for its shape, [..., K] with the rows in order; differentiable in what is kept.
        With x's device as the current one, and without autocast."""
        return _evaluate(self.expression, kept)

    def padded(self, kept: Sequence[Tensor | None]) -> Tensor | None:
        """Where x is of a padding alone: the same with NaN there; None without a padding."""
        return _evaluate(self.expression, kept, math.nan) if self.pads else None

    def row_index(self, shape: Sequence[int]) -> Tensor | None:
        """Of each row of x the row of what is kept, of this shape, that it is made from: [M] of
        int64, -1 for a row of zeros. None where not whole rows were moved.
        """
        return _row_index(self.expression, tuple(shape))


class Source(NamedTuple):
    """A recipe and what it reads: tensors that x's graph keeps."""

    recipe: Recipe
    kept: tuple[Tensor | None, ...]
    attached: bool  # whether they are part of the graph, which a second derivative needs

    def makes(self, x: Tensor) -> bool:
        """Whether it makes this x, but for rounding, which zeros of a padding have none of. A graph
        does not tell all: neither the value that a padding has, nor that a tensor on the way was
        written where autograd does not look."""
        with torch.no_grad(), launch_context(x.device):
            made = self.recipe(self.kept).reshape(x.shape)
            padded = self.recipe.padded(self.kept)
            wide = torch.promote_types(x.dtype, torch.float32)
            tolerance = torch.finfo(x.dtype).eps ** 0.5
            scale = x.abs().amax().to(wide).nan_to_num(1.0, 1.0)
            near = (made.to(wide) - x.to(wide)).abs() <= tolerance * scale
            if padded is not None:
                near &= ~padded.reshape(x.shape).isnan()
            return bool((near | (made == x) | (made.isnan() & x.isnan())).all())


class _Seen:
    """Whether a recipe was seen to make a layer's x, and when."""

    def __init__(self, right: bool) -> None:
        self.right, self.handles = right, RemovableHandle.next_id
        self.times, self.calls = 1, 0

    def is_due(self) -> bool:
        """Whether to look again: there are hooks that there were not then. Not at every one of its
        calls where hooks come with every step, as FSDP2's do."""
        self.calls += 1
        return self.handles != RemovableHandle.next_id and self.calls >= self.times


class Recipes:
    """The recipes of one layer's x, each seen to make it."""

    def __init__(self) -> None:
        self._seen: dict[Recipe, _Seen] = {}

    def __reduce__(self) -> Any:
        return Recipes, ()  # what was seen was seen by this process

    def __len__(self) -> int:
        return len(self._seen)

    def clear(self) -> None:
        """Look at each again."""
        self._seen.clear()

    def make(self, source: Source, x: Tensor) -> bool:
        """Whether x can be made from the source.

        It is compared with x when its recipe first comes up, and once more after hooks were
        registered, anywhere, where tensors that nobody keeps lie on the way: a hook may write to
        them in place. A look at the values would break the capture of a CUDA graph: what is not
        known there is kept. Where there are none (meta and fake tensors) what is asked for is
        shapes and memory, as they will be.
        """
        seen = self._seen.get(source.recipe)
        if not has_values(x):
            return seen is None or seen.right
        if x.device.type == "cpu" and not _padding_is_zero(source, x):
            return False
        if seen is not None and not (source.recipe.unseen and seen.is_due()):
            return seen.right
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return seen is not None and seen.right
        right = source.makes(x)
        if seen is None:
            self._seen[source.recipe] = _Seen(right)
        else:
            seen.right, seen.handles = right, RemovableHandle.next_id
            seen.times, seen.calls = seen.times + 1, 0
        return right


def _padding_is_zero(source: Source, x: Tensor) -> bool:
    """Whether the numbers of a padding are, of which one is as good as all."""
    if not source.recipe.pads:
        return True
    shapes = tuple(None if t is None else tuple(t.shape) for t in source.kept)
    place = _of_padding(source.recipe.expression, shapes)
    if place is None:
        return True
    index: list[int] = []
    for size in reversed(x.shape):
        place, i = divmod(place, size)
        index.insert(0, i)
    return float(x.detach()[tuple(index)]) == 0


def find(x: Tensor) -> Source | None:
    """What x [..., K] can be made from, or None where it has to be kept itself.

    It is None where grad is off, for a leaf, for an x that was written in place or that its
    producer keeps, and where what the producer kept is not there as it was (checkpointing,
    offloading). Not for a graph that is traced: a compiler decides itself what to keep.
    """
    if torch._C._are_functorch_transforms_active():
        return None
    if x.grad_fn is None or not torch.is_grad_enabled() or x._version or not x.numel():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and _is_checkpoints(hooks[0]):
        return None
    node = _below_views(x)
    maker = type(node).__name__
    if maker not in _MAKERS:
        return None
    graph = _Graph()
    try:
        expression = graph.expression(node, 0)
        recipe = _recipe(maker, expression, graph.unseen or _has_unseen(expression))
    except _NotKept:
        return None
    return Source(recipe, tuple(graph.kept), graph.attached) if graph.computes else None


def has_values(x: Tensor) -> bool:
    """Whether there is anything to compare: not on the meta device, and not in a fake tensor."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def kept_for(x: Tensor | None, source: Source | None) -> tuple[Tensor | None, ...]:
    """What a node saves in order to have x [M, K] in its backward."""
    return (x,) if source is None else source.kept


def made_from(kept: Sequence[Tensor | None], source: Source | None, like: Tensor) -> Tensor | None:
    """x [M, K] in the dtype of `like` from what `kept_for` gave; None where that was None.

    Raises:
        RuntimeError: what is kept is not part of the graph, and a second derivative is wanted; or
            it is not in memory any more.
    """
    if source is None:
        return kept[0]
    if torch.is_grad_enabled() and not source.attached:
        raise RuntimeError(
            "low_rank_linear: no second derivative under saved-tensor hooks where x is made from"
            " what its producer kept; attach the adapter with fuse='off'"
        )
    if any(t is not None and not _in_memory(t) for t in kept):
        raise RuntimeError(
            "low_rank_linear: what x is made from is not in memory any more; where FSDP2 shards a"
            " norm by itself, shard it with the linears that it feeds, or attach the adapter with"
            " fuse='off'"
        )
    with launch_context(like.device):  # without autocast
        x = source.recipe(kept)
    return x.reshape(-1, x.shape[-1]).to(like.dtype)


def down_grad(
    kept: Sequence[Tensor | None], source: Source | None, s: Tensor, dtype: torch.dtype
) -> Tensor:
    """d_down = x^T·S, [K, r] in `dtype`, x being what `kept_for` kept or makes.

    Args:
        kept, source: of x [M, K].
        s: [M, r].
        dtype: of down.

    Raises:
        RuntimeError: as `made_from`.
    """
    if source is not None and _has_kernel(source, kept, s):
        # The backward of a linear of r outputs and rank r, whose B is the identity, so that its S
        # is this one: x's rows are made there while they are in cache.
        r = s.shape[1]
        first, *norm = kept if source.recipe.code == LAYER_NORM else (kept[0], *[None] * 4)
        assert first is not None
        k = first.shape[-1]
        rows = source.recipe.row_index(first.shape) if source.recipe.moved else None
        statistics = [None if t is None else t.reshape(-1, 1) for t in norm[:2]]
        wide = torch.promote_types(s.dtype, torch.float32)
        eye, unused = torch.eye(r, dtype=wide)[None], s.new_empty(r, k, dtype=wide)
        needs = needs_code([name == "down" for name in OPERANDS])
        _, d_down, *_ = torch.ops.efft_kernels.native_bwd_made(
            *(s, source.recipe.code, first.reshape(-1, k), rows, *statistics, *norm[2:]),
            *(unused, None, unused.t(), None, eye, needs, STRATEGY_CODES["split"]),
        )
        return d_down.to(dtype)  # type: ignore[no-any-return]
    x = made_from(kept, source, s)
    assert x is not None
    return thin_grad(x, s, dtype)


def _has_kernel(source: Source, kept: Sequence[Tensor | None], s: Tensor) -> bool:
    """Whether the CPU's kernel makes this x."""
    return (
        source.recipe.code != PLAIN
        and s.device.type == "cpu"
        and type(s) is Tensor  # a subclass has operators of its own, a fake one no values
        and s.dtype in cpp_backend.DTYPES
        and not torch.is_grad_enabled()
        and not has_tangent(s)
        and not is_batched(s)
        and requested_backend("auto") in ("auto", "cpp")
        and available_backends()["cpp"] is None
        and all(t is None or (t.dtype in cpp_backend.DTYPES and _in_memory(t)) for t in kept)
        and not (source.recipe.moved and source.recipe.row_index(_sizes(kept[0])) is None)
    )


def _sizes(tensor: Tensor | None) -> torch.Size:
    assert tensor is not None
    return tensor.shape


def _in_memory(tensor: Tensor) -> bool:
    """FSDP2 frees a parameter when the forward of its module is over."""
    return tensor.untyped_storage().nbytes() > 0


def _is_checkpoints(hook: object) -> bool:
    return getattr(hook, "__module__", None) == _CHECKPOINT


def _below_views(x: Tensor) -> Any:
    """The node above which there are only views that leave each row as it is."""
    node: Any = x.grad_fn
    if x.output_nr:
        return None
    while type(node).__name__ in ("ViewBackward0", "UnsafeViewBackward0"):
        inner = tuple(node._saved_self_sym_sizes)
        above, place = node.next_functions[0]
        if not inner or inner[-1] != x.shape[-1] or above is None or place:
            break
        node = above
    return node


_recipes: dict[tuple[str, Expression, bool], Recipe] = {}


def _recipe(maker: str, expression: Expression, unseen: bool) -> Recipe:
    """The one recipe of an expression.

    Raises:
        _NotKept: there are too many.
    """
    key = maker, expression, unseen
    found = _recipes.get(key)
    if found is None:
        if len(_recipes) >= _MAX_RECIPES:
            raise _NotKept
        code, rows = PLAIN, expression
        while rows[0] in _MOVES:
            rows = rows[1]
        if rows[:6] == ("layer_norm", *(("kept", place) for place in range(5))):
            code = LAYER_NORM if rows[6] == 1 else PLAIN
        elif rows[:2] == ("gelu", ("kept", 0)):
            code = {"none": GELU, "tanh": GELU_TANH}[rows[2]]
        moved = code != PLAIN and rows is not expression
        pads = _count(expression, "pad")
        if pads > 1:
            raise _NotKept  # one number would not be as good as all
        found = _recipes[key] = Recipe(_MAKERS[maker], code, expression, moved, unseen, pads > 0)
    return found


class _NotKept(Exception):
    """x has to be kept itself."""


class _Graph:
    """What was found in the graph above an x."""

    def __init__(self) -> None:
        self.kept: list[Tensor | None] = []
        self.attached = True
        self.computes = False  # else x shares the memory of what is kept
        self.unseen = False  # whether a result that is not kept was copied

    def saved(self, node: Any, name: str, operand: int | None = None) -> Tensor | None:
        """A tensor that a node saved; `operand`: its place among those that it is differentiated
        by, None for a result.

        Raises:
            _NotKept: it is not there as it was.
        """
        try:
            raw = getattr(node, "_raw_saved_" + name)
            if raw.unpack_hook is None:
                own = getattr(node, "_saved_" + name)
                if own is not None and not _in_memory(own):
                    raise _NotKept
                return own  # type: ignore[no-any-return]
            # What a hook made of it is not unpacked where that may copy it or run a forward again.
            if _is_checkpoints(raw.unpack_hook):
                raise _NotKept
            found = raw.data
            if not isinstance(found, Tensor) or not _in_memory(found):
                raise _NotKept
            if raw.unpack_hook(found) is not found:
                raise _NotKept
        except RuntimeError as error:  # freed, or written in place since
            raise _NotKept from error
        above, place = (node, 0) if operand is None else node.next_functions[operand]
        if above is not None:
            leaf = getattr(above, "variable", None)
            self.attached &= found is leaf or (operand is not None and found.grad_fn is above)
            if leaf is None:
                wanted = above._input_metadata[place]
                if (found.dtype, found.device) != (wanted.dtype, wanted.device) or (
                    operand is not None and found.shape != tuple(wanted.shape)
                ):
                    raise _NotKept
        return found

    def keep(self, tensor: Tensor | None) -> Expression:
        self.kept.append(tensor)
        return ("kept", len(self.kept) - 1)

    def operand(self, node: Any, name: str, place: int, depth: int) -> Expression:
        """An operand of `node`: saved by it, or made again in its turn."""
        saved = self.saved(node, name, place)
        return self.above(node, place, depth) if saved is None else self.keep(saved)

    def above(self, node: Any, place: int, depth: int) -> Expression:
        """The expression of what a node was applied to."""
        inner, output = node.next_functions[place]
        if inner is None or output:
            raise _NotKept
        return self.expression(inner, depth + 1)

    def expression(self, node: Any, depth: int) -> Expression:
        """The result of a node.

        Raises:
            _NotKept: it cannot be made again.
        """
        rule = None if depth > _MAX_DEPTH else _RULES.get(type(node).__name__)
        if rule is None:
            raise _NotKept
        return rule(self, node, depth)


# One rule for each kind of node: (graph, node, depth) → expression


def _layer_norm(graph: _Graph, node: Any, depth: int) -> Expression:
    graph.computes = True
    x = graph.keep(graph.saved(node, "input", 0))
    statistics = [graph.saved(node, name) for name in ("result1", "result2")]
    # Rounded to half precision they would not give x again.
    if any(t is None or t.dtype in HALF_DTYPES for t in statistics):
        raise _NotKept
    affine = [graph.saved(node, name, i) for i, name in enumerate(("weight", "bias"), 1)]
    parts = [graph.keep(t) for t in (*statistics, *affine)]
    return ("layer_norm", x, *parts, len(node._saved_normalized_shape))


def _activation(name: str) -> Callable[..., Expression]:
    def rule(graph: _Graph, node: Any, depth: int) -> Expression:
        graph.computes = True
        h = graph.keep(graph.saved(node, "self", 0))
        return (name, h, *([node._saved_approximate] if name == "gelu" else []))

    return rule


def _product(graph: _Graph, node: Any, depth: int) -> Expression:
    graph.computes = True
    factors = (graph.operand(node, name, i, depth) for i, name in enumerate(("self", "other")))
    return ("mul", *factors)


def _batched_product(graph: _Graph, node: Any, depth: int) -> Expression:
    graph.computes = True
    a, b = (graph.saved(node, name, i) for i, name in enumerate(("self", "mat2")))
    if a is None or b is None:
        raise _NotKept
    return ("bmm", graph.keep(a), graph.keep(b))


def _result(name: str) -> Callable[..., Expression]:
    def rule(graph: _Graph, node: Any, depth: int) -> Expression:
        found = graph.saved(node, name)
        if found is None:
            raise _NotKept
        return graph.keep(found)

    return rule


def _clone(graph: _Graph, node: Any, depth: int) -> Expression:
    graph.computes = True
    inner = graph.above(node, 0, depth)
    graph.unseen |= _is_computed(inner)
    return inner


def _view(graph: _Graph, node: Any, depth: int) -> Expression:
    # Open in the first dim, so that batches of all sizes have one recipe.
    shape = tuple(node._input_metadata[0].shape)
    return ("reshape", graph.above(node, 0, depth), (-1, *shape[1:]))


def _permute(graph: _Graph, node: Any, depth: int) -> Expression:
    return ("permute", graph.above(node, 0, depth), _signed(node._saved_dims))


def _transpose(graph: _Graph, node: Any, depth: int) -> Expression:
    dims = _signed((node._saved_dim0, node._saved_dim1))
    return ("transpose", graph.above(node, 0, depth), *dims)


def _roll(graph: _Graph, node: Any, depth: int) -> Expression:
    shifts, dims = _signed(node._saved_shifts), _signed(node._saved_dims)
    graph.computes = True
    return ("roll", graph.above(node, 0, depth), shifts, dims)


def _pad(graph: _Graph, node: Any, depth: int) -> Expression:
    graph.computes = True
    return ("pad", graph.above(node, 0, depth), _signed(node._saved_pad))


def _signed(numbers: Sequence[int]) -> tuple[int, ...]:
    """A node's saved integers, which torch hands over without their sign."""
    return tuple(n - (1 << 64) if n >= 1 << 63 else n for n in numbers)


_RULES: dict[str, Callable[..., Expression]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _activation("gelu"),
    "SiluBackward0": _activation("silu"),
    "MulBackward0": _product,
    "BmmBackward0": _batched_product,
    "SigmoidBackward0": _result("result"),
    "TanhBackward0": _result("result"),
    "ReluBackward0": _result("result"),
    "RsqrtBackward0": _result("result"),
    "ScaledDotProductFlashAttentionForCpuBackward0": _result("output"),
    "ScaledDotProductFlashAttentionBackward0": _result("output"),
    "ScaledDotProductEfficientAttentionBackward0": _result("output"),
    "ScaledDotProductCudnnAttentionBackward0": _result("output"),
    "CloneBackward0": _clone,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "PermuteBackward0": _permute,
    "TransposeBackward0": _transpose,
    "RollBackward0": _roll,
    "ConstantPadNdBackward0": _pad,
}
# What may stand directly above x, but for views that leave its rows alone, and its name.
_MAKERS = {
    "NativeLayerNormBackward0": "LayerNorm",
    "GeluBackward0": "GELU",
    "SiluBackward0": "SiLU",
    "MulBackward0": "a product",
    "ViewBackward0": "a view",
    "UnsafeViewBackward0": "a view",
    "CloneBackward0": "a view",
    "PermuteBackward0": "a view",
    "TransposeBackward0": "a view",
    "RollBackward0": "a view",
    "ConstantPadNdBackward0": "a view",
}


def _operands(expression: Expression) -> Iterator[Expression]:
    return (e for e in expression[1:] if isinstance(e, tuple) and e and isinstance(e[0], str))


def _count(expression: Expression, name: str) -> int:
    return (expression[0] == name) + sum(_count(e, name) for e in _operands(expression))


def _has_unseen(expression: Expression) -> bool:
    """Whether x is computed from results of others that are not kept. x itself counts what is
    written to it, and so does what is kept."""
    while expression[0] in _VIEWS:
        expression = expression[1]
    return any(_is_computed(e) for e in _operands(expression))


def _is_computed(expression: Expression) -> bool:
    while expression[0] in _VIEWS:
        expression = expression[1]
    return expression[0] != "kept"


# From an expression to x


def _evaluate(
    expression: Expression, kept: Sequence[Tensor | None], padding: float = 0.0
) -> Tensor:
    name, *rest = expression
    if name == "kept":
        found = kept[rest[0]]
        assert found is not None
        return found
    if name == "layer_norm":
        *places, dims = rest
        x, mean, rstd, weight, bias = (kept[place] for _, place in places)
        assert x is not None and mean is not None and rstd is not None
        return _normalise(x, mean, rstd, weight, bias, dims)
    if name in ("mul", "bmm"):
        a, b = (_evaluate(factor, kept, padding) for factor in rest)
        return torch.mul(a, b) if name == "mul" else torch.bmm(a, b)
    inner = _evaluate(rest[0], kept, padding)
    if name == "pad":
        return F.pad(inner, rest[1], value=padding)
    result: Tensor = _OPERATIONS[name](inner, *rest[1:])
    return result


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
    "silu": F.silu,
    "reshape": torch.reshape,
    "permute": torch.permute,
    "transpose": torch.transpose,
    "roll": torch.roll,
    "pad": F.pad,
}


# Operations whose result may share memory with what they were given, and with it the count of what
# is written in place; and those that may move rows and leave them whole.
_VIEWS = ("reshape", "permute", "transpose")
_MOVES = ("reshape", "permute", "transpose", "roll", "pad")


@lru_cache(_MAX_INDICES)
def _row_index(expression: Expression, shape: tuple[int, ...]) -> Tensor | None:
    """As Recipe.row_index."""
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return _moved_rows(expression, shape).reshape(-1)
    except _NotKept:
        return None


@lru_cache(_MAX_RECIPES)
def _of_padding(expression: Expression, shapes: tuple[tuple[int, ...] | None, ...]) -> int | None:
    """The place of a number of x that is of a padding alone, if there is one.

    Args:
        expression: x's.
        shapes: of what is kept.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        kept = [None if shape is None else torch.ones(shape) for shape in shapes]
        places = _evaluate(expression, kept, math.nan).flatten().isnan().nonzero().flatten()
    return int(places[0]) if len(places) else None


def _moved_rows(expression: Expression, shape: tuple[int, ...]) -> Tensor:
    """The rows' numbers in the places to which the expression moves them, [..., 1].

    Raises:
        _NotKept: it does not leave rows whole.
    """
    name, inner, *rest = expression
    if name not in _MOVES:
        return torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1)
    rows = _moved_rows(inner, shape)
    last = rows.dim() - 1
    if name == "reshape":
        *outer, width = rest[0]
        whole, rest = width == shape[-1] and len(outer) > 0, [(*outer, 1)]
    elif name == "permute":
        whole = rest[0][-1] in (-1, last)
    elif name == "pad":
        whole, rest = not any(rest[0][:2]), [rest[0], "constant", -1]
    else:
        dims = rest[1] if name == "roll" else rest
        whole = len(dims) > 0 and not {-1, last} & set(dims)
    if not whole:
        raise _NotKept
    moved: Tensor = _OPERATIONS[name](rows, *rest)
    return moved


def _normalise(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
) -> Tensor:
    """LayerNorm over the last `dims` dims, from its statistics."""
    if torch.is_grad_enabled() and x.requires_grad:
        mean, rstd = _statistics(x, rstd, dims)
    elif x.is_cuda and dims == 1 and x.dtype != torch.float64 and (kernel := _kernel_for(x)):
        rows = x.reshape(-1, x.shape[-1])
        return kernel(rows, mean.view(-1), rstd.view(-1), weight, bias).view(x.shape)
    centred = (x - mean).mul_(rstd)
    if weight is not None and bias is not None:
        return torch.addcmul(bias.to(centred.dtype), centred, weight.to(centred.dtype)).to(x.dtype)
    if weight is not None:
        centred = centred * weight
    return (centred if bias is None else centred + bias).to(x.dtype)


def _kernel_for(x: Tensor) -> Callable[..., Tensor] | None:
    """The kernel that does it in one pass; a fake tensor has no memory to give to it."""
    return None if isinstance(x, FakeTensor) else _triton()


@cache
def _triton() -> Callable[..., Tensor] | None:
    """That kernel, where Triton can run."""
    if available_backends()["triton"] is not None:
        return None
    from .backends.triton.remake import launch_remake

    return launch_remake


def _statistics(x: Tensor, rstd: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The mean and `rstd` as functions of x: d rstd = -rstd³/2 · d var, whatever ε was."""
    over = tuple(range(-dims, 0))
    wide = x.to(rstd.dtype)
    var = wide.var(over, correction=0, keepdim=True)
    eps = (rstd.double().pow(-2) - var.double()).detach()
    return wide.mean(over, keepdim=True), (var + eps).rsqrt().to(rstd.dtype)

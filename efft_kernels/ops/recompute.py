"""What x was made of, and x made again from it: how an adapted linear does without keeping x.

d_down = x^T·S needs x in the backward. Where x came out of a norm or an activation, autograd keeps
that operation's own input anyway, and x follows from it by one pass. `find` reads in x's graph what
x came from. Nothing is asked of the modules, so a hook, a patched module or another way of calling
them is simply another graph; x, its gradient and who else uses it stay as they were.

Views, permutations, rolls and paddings on the way are made again too, as Swin's windows need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import available_backends, launch_context

# How csrc makes x by itself, as in csrc/codes.h; from a recipe of another code x is made here.
PLAIN, LAYER_NORM, GELU, GELU_TANH = range(4)

_MAX_DEPTH = 16  # operations between what is kept and x
_CHECKPOINT = "torch.utils.checkpoint"

Shape = tuple[int, ...]
Expression = tuple[Any, ...]


class Recipe(NamedTuple):
    """How x follows from tensors that are kept."""

    kind: str  # of the operation that made x, but for views: "LayerNorm", "GELU", ...
    code: int
    expression: Expression

    def __call__(self, kept: Sequence[Tensor | None]) -> Tensor:
        """x but for its shape, [..., K] with the rows in order; differentiable in what is kept."""
        return _evaluate(self.expression, kept)


class Source(NamedTuple):
    """A recipe and what it reads: tensors that x's graph keeps."""

    recipe: Recipe
    kept: tuple[Tensor | None, ...]
    attached: bool  # whether they are part of the graph, which a second derivative needs


def find(x: Tensor) -> Source | None:
    """What x [..., K] can be made from, or None where it has to be kept itself.

    It is None where grad is off, for a leaf, for an x that was written in place or that its
    producer keeps, and where what the producer kept is not there as it was (checkpointing,
    offloading).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None  # a compiler decides itself what to keep
    if torch._C._are_functorch_transforms_active():
        return None
    if x.grad_fn is None or not torch.is_grad_enabled() or x._version or not x.numel():
        return None
    shape: Shape = tuple(x.shape)
    node, _ = node_shape = _below_views(x.grad_fn, shape)
    if type(node).__name__ not in _MAKERS:
        return None
    graph = _Graph()
    try:
        expression = graph.expression(*node_shape, x.dtype, 0)
    except _NotKept:
        return None
    if not graph.computes:
        return None
    return Source(_recipe(type(node).__name__, expression), tuple(graph.kept), graph.attached)


def kept_for(x: Tensor | None, source: Source | None) -> tuple[Tensor | None, ...]:
    """What a node saves in order to have x [M, K] in its backward."""
    return (x,) if source is None else source.kept


def made_from(kept: Sequence[Tensor | None], source: Source | None, like: Tensor) -> Tensor | None:
    """x [M, K] in the dtype of `like` from what `kept_for` gave; None where that was None.

    Raises:
        RuntimeError: a second derivative is wanted and what is kept is not part of the graph.
    """
    if source is None:
        return kept[0]
    if torch.is_grad_enabled() and not source.attached:
        raise RuntimeError(
            "low_rank_linear: no second derivative under saved-tensor hooks where x is made from"
            " what its producer kept; attach the adapter with fuse='off'"
        )
    x = source.recipe(kept)
    return x.reshape(-1, x.shape[-1]).to(like.dtype)


def _below_views(node: Any, shape: Shape) -> tuple[Any, Shape]:
    """The node above which there are only views that leave each row as it is."""
    while type(node).__name__ in ("ViewBackward0", "UnsafeViewBackward0"):
        inner = tuple(node._saved_self_sym_sizes)
        if not inner or inner[-1] != shape[-1]:
            break
        node, shape = node.next_functions[0][0], inner
    return node, shape


@cache  # csrc/entry never frees a recipe that it was given
def _recipe(maker: str, expression: Expression) -> Recipe:
    code = PLAIN
    if expression[:6] == ("layer_norm", *(("kept", place) for place in range(5))):
        code = LAYER_NORM if expression[6] == 1 else PLAIN
    elif expression[:2] == ("gelu", ("kept", 0)):
        code = {"none": GELU, "tanh": GELU_TANH}[expression[2]]
    return Recipe(_MAKERS[maker], code, expression)


class _NotKept(Exception):
    """x has to be kept itself."""


class _Graph:
    """What was found in the graph above an x."""

    def __init__(self) -> None:
        self.kept: list[Tensor | None] = []
        self.attached = True
        self.computes = False  # else x shares the memory of what is kept

    def saved(self, node: Any, name: str) -> Tensor | None:
        """A tensor that a node saved."""
        try:
            raw = getattr(node, "_raw_saved_" + name)
            if raw.unpack_hook is None:
                return getattr(node, "_saved_" + name)  # type: ignore[no-any-return]
            # What a hook made of it is not unpacked: that may copy, or run a forward again. A
            # checkpoint hands out each tensor once.
            if getattr(raw.unpack_hook, "__module__", None) == _CHECKPOINT:
                raise _NotKept
            found = raw.data
        except RuntimeError as error:  # freed, or written in place since
            raise _NotKept from error
        self.attached = False
        if not isinstance(found, Tensor):
            raise _NotKept
        return found

    def keep(self, tensor: Tensor | None) -> Expression:
        self.kept.append(tensor)
        return ("kept", len(self.kept) - 1)

    def operand(self, node: Any, name: str, place: int, shape: Shape, depth: int) -> Expression:
        """An operand of `node`, of its result's shape: saved by it, or made again in its turn."""
        saved = self.saved(node, name)
        if saved is not None:
            return self.keep(saved)
        return self.expression(node.next_functions[place][0], shape, None, depth + 1)

    def expression(
        self, node: Any, shape: Shape, dtype: torch.dtype | None, depth: int
    ) -> Expression:
        """The result of a node; `dtype` is None where it is not known.

        Raises:
            _NotKept: it cannot be made again.
        """
        rule = None if depth > _MAX_DEPTH else _RULES.get(type(node).__name__)
        if rule is None:
            raise _NotKept
        return rule(self, node, shape, dtype, depth)


# One rule for each kind of node: (graph, node, its result's shape and dtype, depth) → expression


def _layer_norm(graph: _Graph, node: Any, shape: Shape, *_: Any) -> Expression:
    graph.computes = True
    x = graph.saved(node, "input")
    if x is None or x.shape != shape:
        raise _NotKept
    names = ("result1", "result2", "weight", "bias")
    parts = [graph.keep(x), *(graph.keep(graph.saved(node, name)) for name in names)]
    return ("layer_norm", *parts, len(node._saved_normalized_shape))


def _activation(name: str) -> Callable[..., Expression]:
    def rule(graph: _Graph, node: Any, shape: Shape, *_: Any) -> Expression:
        graph.computes = True
        h = graph.saved(node, "self")
        if h is None or h.shape != shape:
            raise _NotKept
        return (name, graph.keep(h), *([node._saved_approximate] if name == "gelu" else []))

    return rule


def _product(graph: _Graph, node: Any, shape: Shape, dtype: Any, depth: int) -> Expression:
    graph.computes = True
    return (
        "mul",
        graph.operand(node, "self", 0, shape, depth),
        graph.operand(node, "other", 1, shape, depth),
    )


def _batched_product(graph: _Graph, node: Any, shape: Shape, *_: Any) -> Expression:
    graph.computes = True
    a, b = graph.saved(node, "self"), graph.saved(node, "mat2")
    if a is None or b is None or (*a.shape[:2], b.shape[2]) != shape:
        raise _NotKept
    return ("bmm", graph.keep(a), graph.keep(b))


def _result(name: str) -> Callable[..., Expression]:
    def rule(graph: _Graph, node: Any, *_: Any) -> Expression:
        found = graph.saved(node, name)
        if found is None:
            raise _NotKept
        return graph.keep(found)

    return rule


def _inner(graph: _Graph, node: Any, shape: Shape, depth: int) -> Expression:
    return graph.expression(node.next_functions[0][0], shape, None, depth + 1)


def _clone(graph: _Graph, node: Any, shape: Shape, dtype: Any, depth: int) -> Expression:
    graph.computes = True
    return _inner(graph, node, shape, depth)


def _view(graph: _Graph, node: Any, shape: Shape, dtype: Any, depth: int) -> Expression:
    inner = _inner(graph, node, tuple(node._saved_self_sym_sizes), depth)
    # Open in the first dim, so that batches of all sizes have one recipe.
    return ("reshape", inner, (-1, *shape[1:]))


def _permute(graph: _Graph, node: Any, shape: Shape, dtype: Any, depth: int) -> Expression:
    dims = tuple(dim % len(shape) for dim in _signed(node._saved_dims))
    inner = tuple(shape[dims.index(i)] for i in range(len(shape)))
    return ("permute", _inner(graph, node, inner, depth), dims)


def _transpose(graph: _Graph, node: Any, shape: Shape, dtype: Any, depth: int) -> Expression:
    a, b = (dim % len(shape) for dim in _signed((node._saved_dim0, node._saved_dim1)))
    inner = list(shape)
    inner[a], inner[b] = inner[b], inner[a]
    return ("transpose", _inner(graph, node, tuple(inner), depth), a, b)


def _roll(graph: _Graph, node: Any, shape: Shape, dtype: Any, depth: int) -> Expression:
    shifts, dims = _signed(node._saved_shifts), _signed(node._saved_dims)
    graph.computes = True
    return ("roll", _inner(graph, node, shape, depth), shifts, dims)


def _pad(graph: _Graph, node: Any, shape: Shape, dtype: Any, depth: int) -> Expression:
    pad, inner = _signed(node._saved_pad), list(shape)
    for i in range(len(pad) // 2):
        inner[-1 - i] -= pad[2 * i] + pad[2 * i + 1]
    graph.computes = True
    return ("pad", _inner(graph, node, tuple(inner), depth), pad)


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


# From an expression to x


def _evaluate(expression: Expression, kept: Sequence[Tensor | None]) -> Tensor:
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
        a, b = (_evaluate(factor, kept) for factor in rest)
        return torch.mul(a, b) if name == "mul" else torch.bmm(a, b)
    inner = _evaluate(rest[0], kept)
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
    elif x.is_cuda and dims == 1 and x.dtype != torch.float64 and (kernel := _triton()):
        rows = x.reshape(-1, x.shape[-1])
        with launch_context(x.device):
            return kernel(rows, mean.view(-1), rstd.view(-1), weight, bias).view(x.shape)
    centred = (x - mean).mul_(rstd)
    if weight is not None and bias is not None and not centred.requires_grad:
        return torch.addcmul(bias.to(centred.dtype), centred, weight.to(centred.dtype)).to(x.dtype)
    if weight is not None:
        centred = centred * weight
    return (centred if bias is None else centred + bias).to(x.dtype)


@cache
def _triton() -> Callable[..., Tensor] | None:
    """The kernel that does it in one pass, where Triton can run."""
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

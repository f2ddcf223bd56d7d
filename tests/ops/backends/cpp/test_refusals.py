"""Arguments that the C++ operators must refuse, by name and before anything is read."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from efft_kernels.ops import checks
from efft_kernels.ops.backends import cpp_backend

from .operators import BF16, F16, F32, F64, FACTORS, NAMES, Shape, cast, exact, integers


def operator_arguments(operator: str, t: dict) -> tuple:
    if operator == "fwd":
        return (*(t[name] for name in NAMES), True, cpp_backend.STRATEGY_CODES["split"])
    given = (t[name] for name in ("dy", "x", "weight", "p", *FACTORS))
    return (*given, 0b111001, cpp_backend.STRATEGY_CODES["merged"])


def call_operator(operator: str, t: dict):
    return getattr(torch.ops.efft_kernels, f"native_{operator}")(*operator_arguments(operator, t))


# More than one line, so that a wrong size would be read beyond its end.
TARGET = Shape(M=19, K=53, n=23, G=3, Ra=7, Rb=5)


def operands_of(operator: str, shape: Shape = TARGET) -> dict:
    t = cast(integers(shape, bound=1), F32)
    t["p"] = t["x"] @ t["down"]
    return {
        n: v for n, v in t.items() if n not in (("bias",) if operator == "bwd" else ("dy", "p"))
    }


@st.composite
def broken_calls(draw):
    """(operator, operands) with one to three of them of another shape or dtype, or missing."""
    operator = draw(st.sampled_from(["fwd", "bwd"]))
    t = operands_of(operator, replace(TARGET, core=draw(st.booleans()), shared=draw(st.booleans())))
    present = [name for name, v in t.items() if v is not None]
    for name in draw(st.lists(st.sampled_from(present), min_size=1, max_size=3, unique=True)):
        shape = list(t[name].shape)
        match draw(st.sampled_from(["resize", "drop", "add", "turn", "scalar", "dtype", "none"])):
            case "resize":
                at = draw(st.integers(0, len(shape) - 1))
                shape[at] = draw(st.sampled_from([0, 1, shape[at] - 1, shape[at] + 1]))
            case "drop":
                shape.pop(draw(st.integers(0, len(shape) - 1)))
            case "add":
                shape.insert(draw(st.integers(0, len(shape))), draw(st.integers(0, 2)))
            case "turn":
                shape.reverse()
            case "scalar":
                shape = []
            case "dtype":
                kinds = [F16, F64, BF16, torch.int8, torch.int64, torch.bool, torch.complex64]
                t[name] = t[name].to(draw(st.sampled_from(kinds)))
                continue
            case "none":
                if name in ("bias", "core", "p") or (operator == "bwd" and name == "x"):
                    t[name] = None
                continue
        t[name] = torch.ones(shape)
    return operator, t


def acceptable(operator: str, t: dict) -> bool:
    """Whether the operands fit together, by the checks that every Python call goes through."""
    x = t["x"] if operator == "fwd" else t["dy"]
    kernel = (F32, F64, BF16)
    if any(v is not None and v.dtype not in (*kernel, F16) for v in t.values()):
        return False
    if x.dtype not in kernel or x.dim() != 2 or t["weight"].numel() == 0:
        return False
    if operator == "bwd":
        m, (x, p) = x.shape[0], (t["x"], t["p"])
        if x is None or p is None or x.dtype not in kernel or p.dtype not in kernel:
            return False
        if t["weight"].dim() != 2 or t["dy"].shape[1] != t["weight"].shape[0]:
            return False
        if x.dim() != 2 or x.shape[0] != m or t["down"].dim() != 2:
            return False
        if p.shape != (m, t["down"].shape[1]):
            return False
    try:
        checks.check_shapes(x, *(t.get(name) for name in NAMES[1:]))
    except ValueError:
        return False
    return True


@hypothesis.settings(max_examples=400)
@hypothesis.given(broken_calls())
def test_operands_that_do_not_fit_are_refused(call):
    """Whatever the shapes and dtypes: an error, or the right result; nothing is read beyond its end
    (under AddressSanitizer that would end the run)."""
    operator, t = call
    if not acceptable(operator, t):
        with pytest.raises(RuntimeError, match="efft_kernels"):
            call_operator(operator, t)
        return
    found = dict(zip(("y", "p") if operator == "fwd" else ("dx", "d_down", "d_core", "d_up"),
                     call_operator(operator, t), strict=True))  # fmt: skip
    right = exact({"bias": None, "dy": torch.zeros_like(found.get("y", t["x"])), **t})
    for name in found:
        if name in right:
            assert torch.equal(found[name], right[name].to(found[name].dtype)), name


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        ("fwd", {"x": (19,)}, r"x must be \[M, K\]"),
        ("fwd", {"x": (19, 54)}, r"weight must be \[N >= 1, K >= 1\]"),
        ("fwd", {"bias": (1,)}, r"bias must be \[N\]"),
        ("fwd", {"bias": (69, 1)}, r"bias must be \[N\]"),
        ("fwd", {"down": (53, 0)}, "up must be"),
        ("fwd", {"core": ()}, r"core must be \[G, Ra, Rb\]"),
        ("fwd", {"core": (3, 7)}, r"core must be \[G, Ra, Rb\]"),
        ("fwd", {"core": (3, 6, 5)}, r"core must be \[G, Ra, Rb\]"),
        ("fwd", {"core": (3, 7, 6)}, r"core must be \[G, Ra, Rb\]"),
        ("fwd", {"core": (0, 7, 5)}, "up must be"),
        ("fwd", {"core": None}, "up must be .* where core is None|up must be"),
        ("fwd", {"up": (2, 23, 5)}, "up must be"),
        ("fwd", {"core": (2, 7, 5), "up": (2, 34, 5)}, "up must be .* with G dividing N"),
        ("bwd", {"dy": (19, 68)}, "weight must be"),
        ("bwd", {"x": (18, 53)}, "x must be .* for the gradient of down"),
        ("bwd", {"x": None}, "x must be .* for the gradient of down"),
        ("bwd", {"p": (18, 7)}, "p must be .* for the gradients of core and up"),
        ("bwd", {"p": (19, 6)}, "p must be .* for the gradients of core and up"),
        ("bwd", {"p": None}, "p must be .* for the gradients of core and up"),
        ("bwd", {"weight": (69, 0)}, "weight must be"),
    ],
    ids=str,
)
def test_refusals_name_the_argument(operator, changes, message):
    t = operands_of(operator)
    for name, shape in changes.items():
        t[name] = None if shape is None else torch.ones(shape)
    with pytest.raises(RuntimeError, match=f"efft_kernels: {message}"):
        call_operator(operator, t)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"made_by": 0}, "made_by must be"),
        ({"made_by": 4}, "made_by must be"),
        ({"rows": torch.zeros(18, dtype=torch.int64)}, r"rows must be \[M\] of int64"),
        ({"rows": torch.zeros(19, 1, dtype=torch.int64)}, r"rows must be \[M\] of int64"),
        ({"rows": torch.zeros(19, dtype=torch.int32)}, r"rows must be \[M\] of int64"),
        ({"rows": torch.zeros(38, dtype=torch.int64)[::2]}, r"rows must be \[M\] of int64"),
        ({"rows": torch.tensor([-2] + [0] * 18)}, "rows must be rows of `kept`, or -1"),
        ({"rows": torch.tensor([0] * 18 + [19])}, "rows must be rows of `kept`, or -1"),
        ({"rows": torch.zeros(19).long(), "mean": (18, 1)}, r"mean must be \[M, 1\]"),
        ({"kept": (18, 53)}, "x must be .* for the gradient of down"),
        ({"mean": None}, "mean and rstd must be given"),
        ({"rstd": None}, "mean and rstd must be given"),
        ({"mean": (18, 1)}, r"mean must be \[M, 1\]"),
        ({"rstd": (19,)}, r"rstd must be \[M, 1\]"),
        ({"norm_weight": (52,)}, r"norm_weight must be \[K\]"),
        ({"norm_bias": (53, 1)}, r"norm_bias must be \[K\]"),
        ({"kept": (19, 52)}, "x must be .* for the gradient of down"),
    ],
    ids=str,
)
def test_refusals_of_what_x_is_made_from(changes, message):
    shapes = {"kept": (19, 53), "rows": None, "mean": (19, 1), "rstd": (19, 1)}
    shapes |= {"norm_weight": (53,), "norm_bias": (53,)} | changes
    made_by = shapes.pop("made_by", 1)
    source = [torch.ones(s) if isinstance(s, tuple) else s for s in shapes.values()]
    dy, _, *rest = operator_arguments("bwd", operands_of("bwd"))
    with pytest.raises(RuntimeError, match=f"efft_kernels: {message}"):
        torch.ops.efft_kernels.native_bwd_made(dy, made_by, *source, *rest)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.int64, torch.complex64, F16], ids=str
)
@pytest.mark.parametrize(
    ("operator", "name"),
    [("fwd", name) for name in NAMES]
    + [("bwd", name) for name in ("dy", "x", "weight", "p", *FACTORS)],
)
def test_a_dtype_is_never_read_as_another(operator, name, dtype):
    """float16 parameters are widened first; as x, dY or P it is refused, like what is not real."""
    t = operands_of(operator)
    right = call_operator(operator, t)
    t[name] = t[name].to(dtype)
    if dtype == F16 and name not in ("x", "dy", "p"):
        for found, expected in zip(call_operator(operator, t), right, strict=True):
            assert torch.equal(found.float(), expected)
        return
    with pytest.raises(RuntimeError, match=f"efft_kernels: {name} must be"):
        call_operator(operator, t)


@pytest.mark.parametrize("code", [-1, 0, 3, 1 << 40])
def test_an_unknown_strategy_is_refused(code):
    for operator in ("fwd", "bwd"):
        arguments = operator_arguments(operator, operands_of(operator))[:-1]
        with pytest.raises(RuntimeError, match=r"strategy must be 1 \(split\) or 2 \(merged\)"):
            getattr(torch.ops.efft_kernels, f"native_{operator}")(*arguments, code)


@pytest.mark.parametrize("operator", ["fwd", "bwd"])
def test_memory_that_was_given_back_is_refused(operator):
    """As FSDP leaves the parameters it has resharded."""
    for name in operands_of(operator):
        t = operands_of(operator)
        t[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="must be in memory"):
            call_operator(operator, t)


def test_other_kinds_of_tensor_are_refused():
    for make in (torch.Tensor.to_sparse, lambda t: t.to("meta"), torch.Tensor.to_mkldnn):
        t = operands_of("fwd")
        t["down"] = make(t["down"])
        with pytest.raises(NotImplementedError, match="native_fwd"):
            call_operator("fwd", t)

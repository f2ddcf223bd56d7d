"""The one autocast rule and the checks of arguments, for every entry point in Python.

csrc/entry makes the same checks and leaves a call that fails one to Python, so that the text of
every error is here.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for the device; meta tensors have none, and torch raises for them."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What factors are composed in, and an operator's own casts stand in: ambient autocast would
    make products half precision and leave the others as they are."""
    if autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def to_autocast_dtype(x: Tensor) -> Tensor:
    """x in the ambient autocast dtype; as it is without autocast, and for float64, which torch's
    own operators leave alone too.

    Raises:
        TypeError: x is not a Tensor, or not of one of FLOAT_DTYPES.
    """
    x = _floating("x", x)
    device_type = x.device.type
    if autocast_enabled(device_type) and x.dtype in (torch.float32, *HALF_DTYPES):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _floating(name: str, tensor: object) -> Tensor:
    """`tensor` itself, where it is one of a dtype that the operator takes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    return tensor


def check_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
) -> None:
    """Check kinds, dtypes, devices and shapes of one call's tensors, x in its autocast dtype.

    Args:
        x, weight, bias, down, core, up: as in `low_rank_linear`.

    Raises:
        TypeError: a tensor is missing, not floating, or of a dtype that does not fit.
        ValueError: a device or shape does not fit.
    """
    autocast = autocast_enabled(x.device.type)
    operands = {"x": x, "weight": weight, "bias": bias, "down": down, "core": core, "up": up}
    for name, tensor in operands.items():
        if tensor is None and name in ("bias", "core"):
            continue
        tensor = _floating(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if tensor.dtype != x.dtype and not (autocast and x.dtype in HALF_DTYPES):
            if name in ("weight", "bias"):
                raise TypeError(
                    f"{name} must have x's dtype {x.dtype} outside autocast, got {tensor.dtype}"
                )
            if tensor.dtype != torch.float32 or x.dtype not in HALF_DTYPES:
                raise TypeError(
                    f"{name} must have x's dtype {x.dtype} (or float32 beside a half-precision x),"
                    f" got {tensor.dtype}"
                )
    if up.dtype != down.dtype or (core is not None and core.dtype != down.dtype):
        core_dtype = "" if core is None else f", core {core.dtype}"
        raise TypeError(
            f"down, core and up must share one dtype, got down {down.dtype}{core_dtype},"
            f" up {up.dtype}"
        )
    check_shapes(x, weight, bias, down, core, up)


def check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
) -> None:
    """Raise ValueError for a shape that does not fit, with what was expected and what came."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got {tuple(weight.shape)}")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., K={k}], got {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [N={n}], got {tuple(bias.shape)}")
    if down.dim() != 2 or down.shape[0] != k or down.shape[1] < 1:
        raise ValueError(f"down must be [K={k}, Ra >= 1], got {tuple(down.shape)}")
    ra = down.shape[1]
    if core is None:
        if up.dim() != 3 or up.shape[0] < 1 or n % up.shape[0]:
            raise ValueError(
                f"up must be [G, N/G, Ra={ra}] with G dividing N={n} when core is None,"
                f" got {tuple(up.shape)}"
            )
        slices, rb = up.shape[0], ra
        allowed: tuple[int, ...] = (slices,)
    else:
        if core.dim() != 3 or core.shape[0] < 1 or core.shape[1] != ra or core.shape[2] < 1:
            raise ValueError(f"core must be [G, Ra={ra}, Rb], got {tuple(core.shape)}")
        slices, rb = core.shape[0], core.shape[2]
        if n % slices:
            raise ValueError(
                f"core must be [G, Ra, Rb] with G dividing N={n}, got {tuple(core.shape)}"
            )
        allowed = (1, slices)
    leading = " or ".join(map(str, sorted(set(allowed))))
    if up.dim() != 3 or up.shape[0] not in allowed or up.shape[1:] != (n // slices, rb):
        raise ValueError(
            f"up must be [{leading}, N/G={n // slices}, Rb={rb}], got {tuple(up.shape)}"
        )

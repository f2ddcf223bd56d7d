"""Fused low-rank linears for factor-tuning vision transformers: EFFT and kin on one operator.

The first public name that is asked for loads the package, and torch with it: what needs neither, as
`efft-kernels --version`, answers at once.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.adapter_set import AdapterSet
    from .adapters.attach import attach, load
    from .interop import (
        export_peft_lora,
        from_pretrained,
        import_fact,
        import_peft_lora,
        push_to_hub,
        save_pretrained,
    )
    from .methods import EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA
    from .nn import FactorBank, FusedEFFTLinear
    from .ops import reference
    from .ops.dispatch import available_backends, use_backend
    from .ops.functional import low_rank_linear

__version__ = "0.1.0"

__all__ = [
    "EFFT1",
    "EFFT2",
    "Adapter",
    "AdapterSet",
    "FacTTK",
    "FacTTT",
    "FactorBank",
    "FusedEFFTLinear",
    "KAdaptation",
    "LoRA",
    "attach",
    "available_backends",
    "export_peft_lora",
    "from_pretrained",
    "import_fact",
    "import_peft_lora",
    "load",
    "low_rank_linear",
    "push_to_hub",
    "reference",
    "save_pretrained",
    "use_backend",
]

# Module → the public names that lie there; they are all loaded at once.
_ORIGINS = {
    "adapters.adapter": ("Adapter",),
    "adapters.adapter_set": ("AdapterSet",),
    "adapters.attach": ("attach", "load"),
    "interop": (
        "export_peft_lora",
        "from_pretrained",
        "import_fact",
        "import_peft_lora",
        "push_to_hub",
        "save_pretrained",
    ),
    "methods": ("EFFT1", "EFFT2", "FacTTK", "FacTTT", "KAdaptation", "LoRA"),
    "nn": ("FactorBank", "FusedEFFTLinear"),
    "ops.dispatch": ("available_backends", "use_backend"),
    "ops.functional": ("low_rank_linear",),  # which loads ops.reference
    "ops": ("reference",),
}

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name):
        if name in __all__:
            for module, names in _ORIGINS.items():
                found = importlib.import_module(f".{module}", __name__)
                globals().update({each: getattr(found, each) for each in names})
            return globals()[name]
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Fused low-rank linears for factor-tuning vision transformers: EFFT and kin on one operator."""

from .adapters.adapter import Adapter
from .adapters.adapter_set import AdapterSet
from .adapters.attach import attach, load
from .interop import export_peft_lora, import_fact, import_peft_lora
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
    "import_fact",
    "import_peft_lora",
    "load",
    "low_rank_linear",
    "reference",
    "use_backend",
]

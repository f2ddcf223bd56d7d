"""The papers' baselines on the same life cycle as the methods: attach, train, save, load, detach.

EFFT is arXiv:2311.06749, FacT arXiv:2212.03145, KAdaptation arXiv:2203.16329; docs/baselines.md
lists what each baseline trains and how that agrees with what they print.

base.py               what a baseline is, and its parts with their hooks
registry.py           baselines by name
attached.py           attach_baseline, load_baseline, the handle
baseline_file.py      the safetensors file and its header
description.py        what describe() prints
vision_transformer.py what they ask of a model
selected.py           linear, full, bitfit, layernorm, attention
prompts.py            vpt_shallow, vpt_deep
bottleneck.py         adapter, adapterdrop, adaptformer, compacter
ssf.py                ssf
low_rank.py           lora_fix
probing.py            transformer_probing
positions.py          lepe, rpb
noah.py               noah
"""

from .attached import AttachedBaseline, attach_baseline, find_baseline, load_baseline
from .base import Baseline
from .baseline_file import BASELINE_FORMAT
from .bottleneck import AdapterDrop, AdapterTuning, AdaptFormer, Compacter
from .low_rank import LoRAFix
from .noah import NOAH
from .positions import LePETuning, RPBTuning
from .probing import TransformerProbing
from .prompts import VPTDeep, VPTShallow
from .registry import BASELINES, baseline_from_config, register_baseline
from .selected import AttentionTuning, BitFit, FullFineTuning, LayerNormTuning, LinearProbing
from .ssf import SSF

__all__ = [
    "BASELINES",
    "BASELINE_FORMAT",
    "NOAH",
    "SSF",
    "AdaptFormer",
    "AdapterDrop",
    "AdapterTuning",
    "AttachedBaseline",
    "AttentionTuning",
    "Baseline",
    "BitFit",
    "Compacter",
    "FullFineTuning",
    "LayerNormTuning",
    "LePETuning",
    "LinearProbing",
    "LoRAFix",
    "RPBTuning",
    "TransformerProbing",
    "VPTDeep",
    "VPTShallow",
    "attach_baseline",
    "baseline_from_config",
    "find_baseline",
    "load_baseline",
    "register_baseline",
]

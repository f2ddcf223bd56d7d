"""The factorisation methods, one small file each; they know torch and nothing else.

A method registers its class under its name (`@register_method`) and is imported here, on one line.
"""

from .base import FactorGroup as FactorGroup
from .base import Factors as Factors
from .base import Method as Method
from .base import Site as Site
from .efft import EFFT1 as EFFT1
from .efft import EFFT2 as EFFT2
from .fact import FacTTK as FacTTK
from .fact import FacTTT as FacTTT
from .kadaptation import KAdaptation as KAdaptation
from .lora import LoRA as LoRA
from .registry import METHODS as METHODS
from .registry import method_from_config as method_from_config
from .registry import register_method as register_method

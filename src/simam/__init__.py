"""SimAM, parameter-free attention for convolutional networks."""

from . import functional
from .attach import attach, attached, detach, detached
from .attention_maps import attention_maps
from .checkpoints import load_checkpoint
from .convert import convert
from .identify import Identification, identify
from .kernels import kernels_info
from .module import SimAM
from .placement import ExistingSimAM, Insertion, Plan, Unanalysed, plan
from .recalibrate import recalibrate

__all__ = [
    "ExistingSimAM",
    "Identification",
    "Insertion",
    "Plan",
    "SimAM",
    "Unanalysed",
    "attach",
    "attached",
    "attention_maps",
    "convert",
    "detach",
    "detached",
    "functional",
    "identify",
    "kernels_info",
    "load_checkpoint",
    "plan",
    "recalibrate",
]
__version__ = "0.1.0.dev0"

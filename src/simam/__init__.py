"""SimAM, parameter-free attention for convolutional networks."""

from . import functional
from .attach import Insertion, Plan, attach, detach, plan
from .module import SimAM

__all__ = ["Insertion", "Plan", "SimAM", "attach", "detach", "functional", "plan"]
__version__ = "0.1.0.dev0"

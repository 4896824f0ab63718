"""SimAM, parameter-free attention for convolutional networks."""

from . import functional
from .module import SimAM

__all__ = ["SimAM", "functional"]
__version__ = "0.1.0.dev0"

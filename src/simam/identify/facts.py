"""The description of a module by its parts; see `dissection`."""

from dataclasses import dataclass

from .reading import Reading
from .spread import Spread


@dataclass(frozen=True)
class Facts:
    """The parts of a module.

    Attributes:
        reading (Reading): how output, gate and z are made.
        spread (Spread): v, f and lambda.
        law (str): a value of `LAWS`: what stands for v + lambda; "none" if k is a constant.
        offset (float), small_offset (float): c if v is far above lambda, and far below.
        softmax (bool): whether the gates of a group add up to 1.
        pooled (str): "sum" or "average" if t is that of the whole group.
    """

    reading: Reading
    spread: Spread
    law: str
    offset: float
    small_offset: float
    softmax: bool = False
    pooled: str = ""

"""The end of a process that is one of a group."""

import os
from typing import NoReturn


def leave() -> NoReturn:
    """End this process, successfully, without destroying what it holds.

    Torch destroys the process group of a `DistributedDataParallel` while it holds Python's lock. A
    thread of the group may wait for the lock to release the tensors of its last reduction, and the
    two wait for each other forever.
    """
    os._exit(0)

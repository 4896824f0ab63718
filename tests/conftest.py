"""Hypothesis profiles, and the devices that every test of numbers runs on."""

import os

import pytest
import torch
from hypothesis import settings

# The first example on a device also pays for its start, so no example has a deadline.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
# On a busy machine, threads that wait for each other at every layer take many times as long.
torch.set_num_threads(1)

settings.load_profile("ci" if os.environ.get("CI") else "default")


# One for the session: hypothesis runs many examples in one call of a test.
@pytest.fixture(scope="session", params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)

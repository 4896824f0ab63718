"""Hypothesis profiles, and the devices and implementations that every test of numbers runs on."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from simam import kernels
from simam.kernels import cpu, gpu

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


@pytest.fixture(scope="module", params=["kernel", "reference"])
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """What computes the layer where both could: the fused kernel, or plain torch operations."""
    missing = (cpu if device.type == "cpu" else gpu).missing
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(kernels, "serve", lambda x: False)
        elif missing:
            pytest.skip(missing)
        # Deterministic, torch allocates outputs as NaN, so that an element left out shows.
        torch.use_deterministic_algorithms(True)
        yield request.param
        torch.use_deterministic_algorithms(False)

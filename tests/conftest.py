"""Hypothesis profiles, and the devices and implementations that tests of numbers run on."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from simam import kernels
from simam.kernels import cpu, gpu

# The first example on a device includes its initialisation, so examples have no deadline.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
# On a busy machine, threads that wait for each other in every layer are many times slower.
torch.set_num_threads(1)

settings.load_profile("ci" if os.environ.get("CI") else "default")

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


# Session scope, because hypothesis runs many examples in one call of a test.
@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module", params=["kernel", "reference"])
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Run a test with the fused kernel, and again with plain torch operations."""
    unavailable_reason = (cpu if device.type == "cpu" else gpu).unavailable_reason
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(kernels, "is_supported", lambda x: False)
        elif unavailable_reason:
            pytest.skip(unavailable_reason)
        # With deterministic algorithms torch fills outputs with NaN, so unwritten elements show.
        torch.use_deterministic_algorithms(True)
        yield request.param
        torch.use_deterministic_algorithms(False)

"""An attached network in distributed data-parallel training, on two processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simam import SimAM, attach, detach, plan
from tests.helpers.processes import leave
from tests.helpers.tiny_blocks import basic, conv

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(channels=3), basic(), basic(), nn.Flatten(), nn.Linear(8 * 36, 2))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 6, 6, generator=generator), torch.randn(4, 2, generator=generator)


def gradients(model: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    model(x).mul(cotangent).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = DistributedDataParallel(attach(network(), e_lambda=0.1))
    half = slice(2 * rank, 2 * rank + 2)
    found = gradients(model, *(tensor[half] for tensor in batch()))
    torch.save(
        {
            "gradients": found,
            "layers": sum(isinstance(m, SimAM) for m in model.modules()),
            "hosts": [insertion.path for insertion in plan(model)],
            "state": list(model.state_dict()),
            "left": sum(isinstance(m, SimAM) for m in detach(model).modules()),
        },
        f"{folder}/{rank}.pt",
    )
    leave()


def test_ddp_gradients_of_two_processes_match_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    expected = gradients(attach(network(), e_lambda=0.1), *batch())
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result["state"] == [f"module.{name}" for name in network().state_dict()]
        assert result["hosts"] == ["module.1.conv2", "module.2.conv2"]
        assert (result["layers"], result["left"]) == (2, 0)
        torch.testing.assert_close(
            result["gradients"], {f"module.{name}": grad for name, grad in expected.items()}
        )

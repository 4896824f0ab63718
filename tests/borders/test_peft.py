"""peft: adapters of the convolutions that SimAM follows. `.ci/borders` installs peft and runs this.

Unmerged, an adapter must act before SimAM, as it does when it is merged into the convolution.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import simam
from simam import attach, attached, detach
from tests.helpers.borders import compare, tool

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.borders,
    # Of BOFT without a CUDA compiler, and of the rounding of IA3.
    pytest.mark.filterwarnings(r"ignore::UserWarning:peft\..*"),
]

PATHS = ["0.conv2", "1.conv2"]
# peft itself does not merge OFT exactly on a convolution with padding, so that OFT is not here.
CONFIGS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "init_lora_weights": False},
    "LoraConfig with DoRA": {"r": 4, "init_lora_weights": False, "use_dora": True},
    "LoHaConfig": {"r": 4, "init_weights": False},
    "LoKrConfig": {"r": 4, "init_weights": False},
    "IA3Config": {"feedforward_modules": [], "init_ia3_weights": False},
    "BOFTConfig": {"boft_block_size": 4, "init_weights": False},
    "HRAConfig": {"r": 4, "init_weights": False},
    "HiraConfig": {"r": 4, "init_weights": False},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.conv1(x).relu()))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def config(name: str) -> Any:
    kind = getattr(peft, name.partition(" ")[0], None)
    if kind is None:
        pytest.skip(f"peft {peft.__version__} has no {name}")
    return kind(target_modules=["conv2"], **CONFIGS[name])


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_attach_puts_simam_behind_the_adapter(name: str) -> None:
    model = peft.get_peft_model(network(), config(name)).eval()
    adapter, x = model.base_model.model[0].conv2, torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = simam.functional.simam(adapter(x), 0.1)
        attach(model, e_lambda=0.1)
        assert list(attached(model)) == [f"base_model.model.{path}" for path in PATHS]
        torch.testing.assert_close(adapter(x), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_network_equals_the_unmerged_one(name: str, record: Callable[..., None]) -> None:
    model = attach(peft.get_peft_model(network(), config(name)), e_lambda=0.1)
    expected = run(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(
            run(model), run(attach(network(), e_lambda=0.1)), rtol=1e-5, atol=1e-5
        )
    merged = model.merge_and_unload()
    assert list(attached(merged)) == PATHS
    assert isinstance(merged[0].conv2, nn.Conv2d)
    torch.testing.assert_close(run(merged), expected, rtol=1e-5, atol=1e-5)
    differences = compare(run(merged), expected, run(detach(merged)))
    case = "adapter, `attach`, `merge_and_unload`"
    record(tool("peft"), case, "works", network=name, **differences)


@pytest.mark.parametrize("name", CONFIGS)
def test_unloaded_network_keeps_simam(name: str) -> None:
    model = attach(peft.get_peft_model(network(), config(name)), e_lambda=0.1)
    unloaded = model.unload()
    assert list(attached(unloaded)) == PATHS
    torch.testing.assert_close(run(unloaded), run(attach(network(), e_lambda=0.1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_attached_convolution_refuses_an_adapter(name: str, record: Callable[..., None]) -> None:
    net = attach(network(), e_lambda=0.1)
    expected = run(net)
    with pytest.raises(RuntimeError, match=r"^cannot adapt this Conv2d: SimAM is attached"):
        peft.get_peft_model(net, config(name))
    assert list(attached(net)) == PATHS
    assert torch.equal(run(net), expected)
    model = attach(peft.get_peft_model(detach(net), config(name)), e_lambda=0.1)
    assert list(attached(model)) == [f"base_model.model.{path}" for path in PATHS]
    record(tool("peft"), "`attach`, then an adapter", "refused clearly", network=name)


def test_saved_adapters_load_and_take_simam(tmp_path: Path) -> None:
    model = attach(peft.get_peft_model(network(), config("LoraConfig")), e_lambda=0.1)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(network(), tmp_path)
    assert not attached(loaded)
    assert torch.equal(run(attach(loaded, e_lambda=0.1)), run(model))
    with pytest.raises(RuntimeError, match=r"^cannot adapt this Conv2d"):
        peft.PeftModel.from_pretrained(attach(network()), tmp_path)


def test_attached_adapters_learn_and_take_a_second_adapter() -> None:
    model = attach(peft.get_peft_model(network(), config("LoraConfig")), e_lambda=0.1)
    model.add_adapter("other", config("LoraConfig"))
    adapter = model.base_model.model[0].conv2
    adapter(torch.randn(2, 8, 6, 6)).sum().backward()
    assert adapter.lora_A["default"].weight.grad is not None
    assert adapter.base_layer.weight.grad is None
    model.base_model.set_adapter("other")
    expected = run(model)
    torch.testing.assert_close(run(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)

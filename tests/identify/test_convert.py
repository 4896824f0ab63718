"""`simam.convert`: which modules become a `simam.SimAM`, and what stays."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import simam
from simam import SimAM, convert
from tests.helpers import copies
from tests.helpers.copies import deviations, inverse_energy


class SimamCopy(copies.Authors):
    """A right copy, whose name is written in another case."""


class GateSimAM(nn.Module):
    """A wrong copy: it returns the gate."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(inverse_energy(x, 1e-4))


class Attention(copies.LeaveOneOut):
    """A right copy by another name."""


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.attention = attention
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.attention(self.conv(x)))


def images(rank: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, *[6] * (rank - 2), generator=generator, dtype=torch.float64)


def network(*attentions: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*map(Block, attentions)).double()


def silently(model: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert(model, **options)


def test_convert_keeps_outputs_gradients_and_state(capsys: pytest.CaptureFixture[str]) -> None:
    model = network(SimamCopy(), SimamCopy(None, 0.1), copies.Printing())
    model[2].attention.__class__.__name__ = "PrintingSimAM"
    plain = copy.deepcopy(model)
    x, y = images().requires_grad_(), images().requires_grad_()
    expected = plain(x)
    capsys.readouterr()
    assert silently(model) is model
    assert capsys.readouterr() == ("", "")
    assert [type(block.attention) for block in model] == [SimAM] * 3
    assert [block.attention.e_lambda for block in model] == [1e-4, 0.1, 1e-4]
    found = model(y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(found.shape, dtype=found.dtype)
    for output in (expected, found):
        output.backward(cotangent)
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-10, atol=1e-12)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    copies.Printing.__name__ = "Printing"


def test_convert_replaces_leave_one_out_by_where() -> None:
    model = network(Attention(0.5), SimamCopy())
    x = images()
    expected = model(x)
    silently(model, where="0.attention")
    assert str(model[0].attention) == "SimAM(e_lambda=0.5, statistics='leave_one_out')"
    assert type(model[1].attention) is SimamCopy
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    silently(model, where=lambda path, module: isinstance(module, SimamCopy))
    assert type(model[1].attention) is SimAM


def test_convert_uses_the_lambda_that_the_copy_computes_with() -> None:
    class OutsideSimAM(copies.Formula):
        pass

    class IgnoringSimAM(copies.Ignored):
        pass

    model = network(OutsideSimAM(copies.outside, 0.1), IgnoringSimAM(4, e_lambda=0.1))
    silently(model)
    assert [block.attention.e_lambda for block in model] == [0.025, 1e-4]


def test_convert_warns_once_and_names_every_module_that_stays() -> None:
    class SimAMWithParameter(copies.UnusedParameter):
        pass

    class TwoInputsSimAM(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * y

    model = network(GateSimAM(), SimamCopy(), SimAMWithParameter(), copies.Counting())
    model[1].unused = TwoInputsSimAM()
    model[3].attention.__class__ = type("CountingSimAM", (copies.Counting,), {})
    stay = [model[0].attention, model[2].attention, model[3].attention, model[1].unused]
    with pytest.warns(UserWarning, match="left as they are") as caught:
        convert(model)
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert "0.attention (GateSimAM): it returns the gate instead of x * gate" in text
    assert "2.attention (SimAMWithParameter): it has parameters (weight)" in text
    assert "3.attention (CountingSimAM): it has buffers (calls), which would be lost" in text
    assert "1.unused (TwoInputsSimAM): its forward takes further arguments (y)" in text
    assert [
        model[0].attention, model[2].attention, model[3].attention, model[1].unused
    ] == stay  # fmt: skip
    assert type(model[1].attention) is SimAM


def test_convert_leaves_a_module_with_hooks() -> None:
    model = network(SimamCopy())
    calls: list[int] = []
    model[0].attention.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match=r"0.attention \(SimamCopy\): it has hooks"):
        convert(model)
    assert type(model[0].attention) is SimamCopy
    assert calls == []


def test_convert_replaces_a_shared_module_at_all_of_its_paths() -> None:
    shared = SimamCopy()
    model = network(shared, shared)
    model.alias = shared
    silently(model)
    assert type(model.alias) is SimAM
    assert model[0].attention is model[1].attention is model.alias


@pytest.mark.parametrize("training", [True, False])
def test_convert_keeps_mode_and_plain_attributes(training: bool) -> None:
    layer = SimamCopy().train(training)
    layer.f, layer.i, layer.type, layer.np = -1, 3, "models.SimAM", 0
    layer.last = torch.ones(2)
    model = nn.Sequential(nn.ReLU(), layer).train(not training)
    layer.train(training)
    silently(model)
    found = model[1]
    assert type(found) is SimAM
    assert found.training is training
    assert (found.f, found.i, found.type, found.np) == (-1, 3, "models.SimAM", 0)
    assert not hasattr(found, "last")
    assert model.training is not training


def test_convert_leaves_the_layers_of_simam_and_its_hosts() -> None:
    model = network(SimAM(), SimamCopy())
    with pytest.warns(UserWarning, match="SimAM is there already"):
        simam.attach(model, where="*.conv")
    layers = [model[0].attention, *simam.attached(model).values()]
    silently(model)
    assert [model[0].attention, *simam.attached(model).values()] == layers
    assert type(model[1].attention) is SimAM
    silently(model)  # now there is nothing to do


def test_convert_takes_the_copy_inside_a_block_and_not_the_block() -> None:
    class SimAMBlock(Block):
        pass

    model = nn.Sequential(SimAMBlock(SimamCopy()))
    silently(model)
    assert type(model[0]) is SimAMBlock
    assert type(model[0].attention) is SimAM


class AnyRankSimAM(nn.Module):
    """Right on four dimensions; on five, the first two spatial dimensions alone."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[2] * x.shape[3] - 1
        square = deviations(x) ** 2
        variance = square.sum((2, 3), keepdim=True) / count
        return x * torch.sigmoid(square / (4 * (variance + 1e-4)) + 0.5)


def test_convert_leaves_a_copy_that_differs_on_the_inputs_of_a_3d_network() -> None:
    volumes = nn.Sequential(nn.Conv3d(4, 4, 3), AnyRankSimAM())
    with pytest.warns(UserWarning, match=r"1 \(AnyRankSimAM\): it computes something else on 5-D"):
        convert(volumes)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), AnyRankSimAM())
    silently(model)
    assert type(model[1]) is SimAM


def test_convert_leaves_a_module_that_is_compiled_by_itself() -> None:
    model = nn.Sequential(torch.compile(SimamCopy()))
    with pytest.warns(UserWarning, match=r"0._orig_mod \(SimamCopy\): it is compiled"):
        convert(model)


def test_convert_refuses_before_any_change() -> None:
    with pytest.raises(TypeError, match=r"^expected an nn.Module, got list$"):
        convert([])  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"class name contains 'simam' in this Sequential"):
        convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"this SimamCopy cannot replace itself"):
        convert(SimamCopy())
    model = network(SimamCopy())
    with pytest.raises(ValueError, match=r"where='\*.simam' matches none of the model's modules"):
        convert(model, where="*.simam")
    with pytest.raises(TypeError, match=r"^where must be a glob"):
        convert(model, where=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"TorchScript module cannot be changed"):
        convert(torch.jit.script(nn.Sequential(nn.ReLU())))
    assert type(model[0].attention) is SimamCopy

"""`simam maps`: the picture it draws, and what it says of mistakes before any work."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import oracles

pytest.importorskip("matplotlib", reason="it draws")
pytest.importorskip("timm", reason="the maps are of models of torchvision and timm")

import numpy
from PIL import Image

import simam
from simam.cli import main
from simam.cli import maps as photography
from simam.cli.figure import draw
from simam.cli.maps import Layer, look, read
from simam.cli.models import Subject, build
from simam.messages import UserError
from tests.helpers.command import SMALL, Capture, message

LAYERS = ["layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]


def image(size: tuple[int, int] = (80, 60), seed: int = 0) -> Image.Image:
    """Colours that change across a picture, another way for each seed."""
    corners = numpy.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=numpy.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photograph(tmp_path: Path) -> str:
    image().save(tmp_path / "photograph.png")
    return str(tmp_path / "photograph.png")


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out.png")


def mistake(capsys: Capture, *arguments: str) -> str:
    return message(capsys, "maps", *arguments)


def test_one_photograph(photograph: str, output: str, capsys: Capture) -> None:
    assert main(["maps", SMALL, photograph, "-o", output]) == 0
    out, err = capsys.readouterr()
    assert out == (
        f"{output}: {', '.join(LAYERS)} of test_resnet, weights: random, SimAM(e_lambda=0.0001)\n"
    )
    assert err == ""
    with Image.open(output) as drawn:
        assert drawn.format == "PNG"
        width, height = drawn.size
    assert 1200 < width < 1500
    assert 500 < height < width


def test_three_photographs_and_chosen_layers(
    photograph: str, output: str, tmp_path: Path, capsys: Capture
) -> None:
    others = [str(tmp_path / name) for name in ("b.jpg", "c.webp")]
    for seed, file in enumerate(others, start=1):
        image(seed=seed).save(file)
    layers = ["layer4*", "layer[12].*"]
    arguments = ["--e-lambda", "0.1", "--statistics", "leave_one_out", "--layers", *layers]
    assert main(["maps", SMALL, photograph, *others, "-o", output, *arguments]) == 0
    assert capsys.readouterr().out == (
        f"{output}: layer1.0.conv2, layer2.0.conv2, layer4.0.conv2 of test_resnet, weights: "
        "random, SimAM(e_lambda=0.1, statistics='leave_one_out')\n"
    )


@pytest.mark.parametrize("suffix", ["pdf", "svg", "JPG"])
def test_formats(suffix: str, photograph: str, tmp_path: Path) -> None:
    output = tmp_path / f"out.{suffix}"
    assert main(["maps", SMALL, photograph, "-o", str(output), "--layers", "layer4*"]) == 0
    starts = {"pdf": b"%PDF", "svg": b"<?xml", "JPG": b"\xff\xd8\xff"}
    assert output.read_bytes().startswith(starts[suffix])


def test_weights_change_the_picture(photograph: str, tmp_path: Path, capsys: Capture) -> None:
    state = build(SMALL).model.state_dict()
    torch.save({k: t.flip(0) if t.dim() else t for k, t in state.items()}, tmp_path / "w.pt")
    outputs = [tmp_path / name for name in ("a.png", "b.png")]
    command = ["maps", SMALL, photograph, "--layers", "layer4*", "-o"]
    assert main([*command, str(outputs[0])]) == 0
    assert main([*command, str(outputs[1]), "--weights", str(tmp_path / "w.pt")]) == 0
    assert "weights: w.pt, " in capsys.readouterr().out
    assert outputs[0].read_bytes() != outputs[1].read_bytes()


class Net(nn.Module):
    """Two SimAM at a resolution, and a third at half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = simam.SimAM(e_lambda=0.1)
        self.second = simam.SimAM(e_lambda=0.2)
        self.pool = nn.AvgPool2d(2)
        self.third = simam.SimAM(e_lambda=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.pool(self.second(self.first(x))))


SUBJECT = Subject("resnet18", "torchvision", "0", Net().eval(), (3, 224, 224))


def test_layers_are_the_last_of_each_resolution() -> None:
    _, layers = look(SUBJECT, [image()])
    assert [layer.path for layer in layers] == ["second", "third"]
    assert [list(layer.maps[0].shape) for layer in layers] == [[224, 224], [112, 112]]


def gate(x: Tensor, e_lambda: float) -> Tensor:
    return oracles.gate(oracles.each_channel(oracles.ENERGY["shared"], x, e_lambda))


def test_what_is_drawn_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("net", "none", "0", Net().eval(), (3, 8, 8))
    cut = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    shown = iter(cut)
    own = (lambda photograph: next(shown), (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr(photography, "_preprocessing", lambda subject: own)
    seen, (layer,) = look(subject, [None, None], ["fir*"])
    for x, photograph, found in zip(cut, seen, layer.maps, strict=True):
        torch.testing.assert_close(photograph, x * 0.25 + 0.5)
        expected = gate(x[None], 0.1)[0]
        oracles.assert_close(found, expected.mean(0), absolute=1e-6)
    gates = torch.cat([gate(x[None], 0.1) for x in cut]).flatten().tolist()
    low = 1 / (1 + 2.718281828459045**-0.5)
    bins = [min(int((g - low) / (1 - low) * 40), 39) for g in gates]
    assert layer.counts.tolist() == [bins.count(i) for i in range(40)]
    assert layer.counts.sum() == 2 * 3 * 64


@pytest.fixture
def picture() -> Any:
    generator = torch.Generator().manual_seed(0)
    photographs = [torch.rand(3, 20, 30, generator=generator) for _ in range(2)]
    layers = []
    for path, side, upper in (("a.b", 4, 0.98), ("c." * 15 + "d", 2, 0.74)):
        maps = [0.63 + 0.1 * torch.rand(side, side, generator=generator) for _ in photographs]
        layers.append(Layer(path, upper, maps, torch.arange(40.0, dtype=torch.float64)))
    figure = draw(["a $b_c$.png", "x" * 40 + ".png"], photographs, layers, "of _what_ $it$ is")
    return figure, photographs, layers


def test_panels(picture: Any) -> None:
    figure, photographs, layers = picture
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 2 * 3
    for row, photograph in enumerate(photographs):
        plain, *laid = panels[3 * row : 3 * row + 3]
        numpy.testing.assert_array_equal(plain.images[0].get_array(), photograph.movedim(0, -1))
        for panel, layer in zip(laid, layers, strict=True):
            grey, gates = panel.images
            numpy.testing.assert_allclose(grey.get_array(), photograph.mean(0), rtol=1e-6)
            numpy.testing.assert_array_equal(gates.get_array(), layer.maps[row])
            assert grey.get_extent() == gates.get_extent()
            values = torch.cat([gates.flatten() for gates in layer.maps]).numpy()
            assert gates.get_clim() == pytest.approx(numpy.quantile(values, (0.01, 0.99)))
            assert panel.get_aspect() == 1


def test_histograms(picture: Any) -> None:
    figure, _, layers = picture
    axes = [axis for axis in figure.axes if axis.patches and axis.get_yscale() == "log"]
    for axis, layer in zip(axes, layers, strict=True):
        (stairs,) = axis.patches
        values, edges, _ = stairs.get_data()
        numpy.testing.assert_allclose(values, torch.arange(40.0) / 780)
        assert (edges[0], edges[-1]) == pytest.approx((0.6224593, 1))
        assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(
            [0.6224593, layer.upper]
        )
        assert [t.get_text() for t in axis.get_xticklabels()] == ["0.622", f"{layer.upper:.3f}"]


def test_no_text_overlaps_or_leaves_the_picture(picture: Any) -> None:
    figure = picture[0]
    figure.canvas.draw()
    width, height = figure.bbox.size
    texts = [t for t in figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_visible()]
    told = {text for text, _ in boxes}
    assert {"of _what_ $it$ is", "a $b_c$.png", "a.b\n4x4", "0.622", "0.740", "100 %"} <= told
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
        for other, its in boxes[index + 1 :]:
            assert not box.padded(-1).overlaps(its.padded(-1)), (text, other)


def test_a_map_without_differences_is_not_drawn_as_if_it_had_some() -> None:
    flat = [0.63 + 1e-7 * torch.rand(4, 4, generator=torch.Generator().manual_seed(0))]
    counts = torch.ones(40, dtype=torch.float64)
    figure = draw(["a"], [torch.rand(3, 8, 8)], [Layer("b", 1.0, flat, counts)], "c")
    (laid,) = [axis.images[1] for axis in figure.axes if len(axis.images) == 2]
    assert laid.get_clim() == pytest.approx((0.63, 0.631))


def preprocessed(name: str, photograph: Image.Image, model: nn.Module) -> Tensor:
    seen, _ = look(Subject(name, "torchvision", "0", model, (3, 224, 224)), [photograph], ["first"])
    return seen[0]


def test_photographs_are_cut_as_the_published_networks_do() -> None:
    photograph = image((400, 300))
    scaled = photograph.resize((341, 256), Image.Resampling.BILINEAR)
    expected = numpy.asarray(scaled.crop((58, 16, 282, 240))) / 255
    found = preprocessed("resnet18", photograph, Net()).movedim(0, -1)
    numpy.testing.assert_allclose(found, expected, atol=1e-6)
    # A network for segmentation has none of its own: the shorter side fills the input.
    scaled = photograph.resize((298, 224), Image.Resampling.BILINEAR)
    expected = numpy.asarray(scaled.crop((37, 0, 261, 224))) / 255
    found = preprocessed("fcn_resnet50", photograph, Net()).movedim(0, -1)
    numpy.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "side", "mean", "std"),
    [
        ("timm/tf_efficientnet_lite0", 224, (0.5,) * 3, (0.5,) * 3),
        (SMALL, 160, (0.5,) * 3, (0.5,) * 3),
        ("resnet18", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("efficientnet_b3", 300, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("lraspp_mobilenet_v3_large", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 320, (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_the_model_gets_what_it_was_trained_on(
    name: str, side: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    colour = (10, 100, 200)
    got: list[Any] = []

    class Shows(Net):
        def forward(self, x: Any) -> Tensor:
            got.append(x[0])
            return super().forward(x if isinstance(x, Tensor) else torch.stack(x))

    subject = build(name)
    vars(subject)["model"] = Shows().eval()
    subject.model.pretrained_cfg = getattr(build(name).model, "pretrained_cfg", None)
    seen, _ = look(subject, [Image.new("RGB", (500, 400), colour)])
    expected = [(c / 255 - m) / s for c, m, s in zip(colour, mean, std, strict=True)]
    assert got[0].shape == (3, side, side)
    torch.testing.assert_close(got[0].amax((1, 2)), torch.tensor(expected), atol=0.005, rtol=0)
    torch.testing.assert_close(got[0].amin((1, 2)), torch.tensor(expected), atol=0.005, rtol=0)
    torch.testing.assert_close(seen[0][:, 0, 0], torch.tensor(colour) / 255, atol=0.005, rtol=0)


def test_photographs_are_upright_and_in_colour(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    image((80, 60)).save(tmp_path / "turned.jpg", exif=turned)
    assert read(str(tmp_path / "turned.jpg")).size == (60, 80)
    image().convert("L").save(tmp_path / "grey.png")
    assert read(str(tmp_path / "grey.png")).mode == "RGB"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was built before the mistake was seen")

    monkeypatch.setattr("simam.cli.build", refuse)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file or directory"),
        (b"no image", "UnidentifiedImageError: cannot identify image file "),
        (b"", "UnidentifiedImageError: cannot identify image file "),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), ""),
    ],
)
def test_a_file_that_is_no_photograph(
    content: bytes | None, told: str, photograph: str, output: str, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "photo.png"
    if content is not None:
        file.write_bytes(content)
    said = mistake(capsys, SMALL, photograph, str(file), "-o", output)
    assert said.startswith(f"cannot read {file}: {told}")
    assert said.endswith("; expected a .jpg, .png or other image file")
    assert not Path(output).exists()


@pytest.mark.usefixtures("no_model")
def test_a_photograph_that_is_cut_off(
    photograph: str, output: str, tmp_path: Path, capsys: Capture
) -> None:
    half = tmp_path / "half.png"
    content = Path(photograph).read_bytes()
    half.write_bytes(content[: len(content) // 2])
    assert mistake(capsys, SMALL, str(half), "-o", output).startswith(f"cannot read {half}: ")


@pytest.mark.usefixtures("no_model")
def test_a_folder_as_photograph(output: str, tmp_path: Path, capsys: Capture) -> None:
    said = mistake(capsys, SMALL, str(tmp_path), "-o", output)
    assert said.startswith(f"cannot read {tmp_path}: ")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("out.doc", r"expected a name that ends in one of .*\.jpg, .*\.png, .*"),
        ("out", r"expected a name that ends in one of .*"),
        ("none/out.png", r"there is no folder .*none; create it first"),
        ("folder.png", r"it is a folder, or write-protected"),
    ],
)
def test_outputs_that_cannot_be_written(
    name: str, told: str, photograph: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "folder.png").mkdir()
    output = str(tmp_path / name)
    said = mistake(capsys, SMALL, photograph, "-o", output)
    assert re.fullmatch(rf"cannot write {re.escape(output)}: {told}", said)


@pytest.mark.usefixtures("no_model")
def test_a_write_protected_output(
    photograph: str, output: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert mistake(capsys, SMALL, photograph, "-o", output) == (
        f"cannot write {output}: it is a folder, or write-protected"
    )


@pytest.mark.usefixtures("no_model")
def test_a_photograph_is_not_overwritten(photograph: str, capsys: Capture) -> None:
    content = Path(photograph).read_bytes()
    assert mistake(capsys, SMALL, photograph, "-o", photograph) == (
        f"{photograph} is one of the photographs; give another file for the picture"
    )
    assert Path(photograph).read_bytes() == content


def test_a_disk_that_is_full(photograph: str, output: str, capsys: Capture,
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert mistake(capsys, SMALL, photograph, "-o", output) == (
        f"cannot write {output} (OSError: [Errno 28] No space left on device)"
    )


@pytest.mark.usefixtures("no_model")
def test_missing_matplotlib(
    photograph: str, output: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = mistake(capsys, SMALL, photograph, "-o", output)
    assert said.startswith("matplotlib cannot be imported (ModuleNotFoundError: ")
    assert said.endswith('): pip install "simam[viz]"')


def test_globs_that_match_nothing(photograph: str, output: str, capsys: Capture) -> None:
    said = mistake(capsys, SMALL, photograph, "-o", output, "--layers", "layer1*", "layer5*")
    assert said == f"--layers 'layer5*' matches none of the layers: {', '.join(LAYERS)}"
    assert not Path(output).exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: MODEL, IMAGE, -o/--output"),
        ([SMALL, "-o", "a.png"], "the following arguments are required: IMAGE"),
        ([SMALL, "a.jpg"], "the following arguments are required: -o/--output"),
        (
            [SMALL, "a.jpg", "-o", "a.png", "--e-lambda", "0"],
            "argument --e-lambda: e_lambda must be a positive, finite number, got 0.0",
        ),
        ([SMALL, "a.jpg", "-o", "a.png", "--layer", "x", "--nosuch"], "unrecognized arguments: "),
    ],
)
def test_mistakes_in_arguments(arguments: list[str], told: str, capsys: Capture) -> None:
    said = mistake(capsys, *arguments)
    assert said.startswith(told)
    assert "--help" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ResNet19"], "unknown model 'ResNet19'; close names: resnet18, "),
        ([SMALL, "--weights", "no.pt"], "cannot read no.pt: No such file"),
        (["vgg11"], "found no place for SimAM in this VGG"),
        ([SMALL, "--where", "x"], "--where 'x' matches none of the model's convolutions"),
        (["r3d_18"], "r3d_18 takes videos; maps are drawn for models of single images"),
        (["raft_small"], "raft_small takes pairs of images; maps are drawn for models of single"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_models_that_do_not_fit(
    arguments: list[str], told: str, photograph: str, output: str, capsys: Capture
) -> None:
    model, *options = arguments
    assert mistake(capsys, model, photograph, "-o", output, *options).startswith(told)


def test_a_model_that_fails() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("of the model")

    subject = Subject("resnet18", "torchvision", "0", Fails(), (3, 224, 224))
    told = r"^resnet18 fails on an input of shape 3x224x224 \(RuntimeError: of the model\)$"
    with pytest.raises(UserError, match=told):
        look(subject, [image()])


def test_gates_that_are_not_finite() -> None:
    class Overflows(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 0)

    subject = Subject("resnet18", "torchvision", "0", Overflows(), (3, 224, 224))
    told = (
        "the gates of second are not finite: values of resnet18 overflow before it; "
        "check its weights"
    )
    with pytest.raises(UserError, match=f"^{told}$"):
        look(subject, [image()])


def test_matplotlib_is_loaded_late_and_its_settings_are_left(photograph: str, output: str) -> None:
    program = (
        "import sys, simam.cli\n"
        "assert not {'matplotlib', 'PIL'} & sys.modules.keys(), 'loaded early'\n"
        "import matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "assert simam.cli.main(sys.argv[1:]) == 0\n"
        "assert matplotlib.rcParams.copy() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, "maps", SMALL, photograph, "-o", output]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{output}: layer1.0.conv2, ")

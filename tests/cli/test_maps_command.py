"""`simam maps`: the figures it draws, and its error messages, most of them before any work."""

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

pytest.importorskip("matplotlib", reason="draws the maps")
pytest.importorskip("timm", reason="builds the models, with torchvision")

import numpy
from PIL import Image

import simam
from simam.cli import main
from simam.cli import maps as maps_module
from simam.cli.figure import draw
from simam.cli.maps import Layer, collect, read_image
from simam.cli.models import Subject, build
from simam.messages import UserError
from tests.helpers.command import SMALL, Capture, error_message

LAYERS = ["layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]


def image(size: tuple[int, int] = (80, 60), seed: int = 0) -> Image.Image:
    """An image of smooth colours, which depend on the seed."""
    corners = numpy.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=numpy.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    image().save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out.png")


def maps_error(capsys: Capture, *arguments: str) -> str:
    """The error message of `simam maps`."""
    return error_message(capsys, "maps", *arguments)


def test_maps_command_draws_one_image(image_file: str, output: str, capsys: Capture) -> None:
    assert main(["maps", SMALL, image_file, "-o", output]) == 0
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


def test_maps_command_draws_several_images_and_chosen_layers(
    image_file: str, output: str, tmp_path: Path, capsys: Capture
) -> None:
    others = [str(tmp_path / name) for name in ("b.jpg", "c.webp")]
    for seed, file in enumerate(others, start=1):
        image(seed=seed).save(file)
    layers = ["layer4*", "layer[12].*"]
    arguments = ["--e-lambda", "0.1", "--statistics", "leave_one_out", "--layers", *layers]
    assert main(["maps", SMALL, image_file, *others, "-o", output, *arguments]) == 0
    assert capsys.readouterr().out == (
        f"{output}: layer1.0.conv2, layer2.0.conv2, layer4.0.conv2 of test_resnet, weights: "
        "random, SimAM(e_lambda=0.1, statistics='leave_one_out')\n"
    )


@pytest.mark.parametrize("suffix", ["pdf", "svg", "JPG"])
def test_maps_command_writes_the_format_of_the_suffix(
    suffix: str, image_file: str, tmp_path: Path
) -> None:
    output = tmp_path / f"out.{suffix}"
    assert main(["maps", SMALL, image_file, "-o", str(output), "--layers", "layer4*"]) == 0
    starts = {"pdf": b"%PDF", "svg": b"<?xml", "JPG": b"\xff\xd8\xff"}
    assert output.read_bytes().startswith(starts[suffix])


def test_maps_command_draws_the_maps_of_the_weights(
    image_file: str, tmp_path: Path, capsys: Capture
) -> None:
    state = build(SMALL).model.state_dict()
    torch.save({k: t.flip(0) if t.dim() else t for k, t in state.items()}, tmp_path / "w.pt")
    outputs = [tmp_path / name for name in ("a.png", "b.png")]
    command = ["maps", SMALL, image_file, "--layers", "layer4*", "-o"]
    assert main([*command, str(outputs[0])]) == 0
    assert main([*command, str(outputs[1]), "--weights", str(tmp_path / "w.pt")]) == 0
    assert "weights: w.pt, " in capsys.readouterr().out
    assert outputs[0].read_bytes() != outputs[1].read_bytes()


class Net(nn.Module):
    """Two SimAM layers at one resolution, and a third at half that resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = simam.SimAM(e_lambda=0.1)
        self.second = simam.SimAM(e_lambda=0.2)
        self.pool = nn.AvgPool2d(2)
        self.third = simam.SimAM(e_lambda=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.pool(self.second(self.first(x))))


SUBJECT = Subject("resnet18", "torchvision", "0", Net().eval(), (3, 224, 224))


def test_collect_chooses_the_last_layer_of_each_resolution() -> None:
    _, layers = collect(SUBJECT, [image()])
    assert [layer.path for layer in layers] == ["second", "third"]
    assert [list(layer.maps[0].shape) for layer in layers] == [[224, 224], [112, 112]]


def gate(x: Tensor, e_lambda: float) -> Tensor:
    return oracles.gate(oracles.each_channel(oracles.ENERGY["shared"], x, e_lambda))


def test_collect_computes_maps_and_histograms(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("net", "none", "0", Net().eval(), (3, 8, 8))
    inputs = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    remaining = iter(inputs)
    preprocessing = (lambda image: next(remaining), (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr(maps_module, "_preprocessing", lambda subject: preprocessing)
    shown, (layer,) = collect(subject, [None, None], ["fir*"])
    for x, image, found in zip(inputs, shown, layer.maps, strict=True):
        torch.testing.assert_close(image, x * 0.25 + 0.5)
        expected = gate(x[None], 0.1)[0]
        oracles.assert_close(found, expected.mean(0), absolute=1e-6)
    gates = torch.cat([gate(x[None], 0.1) for x in inputs]).flatten().tolist()
    low = 1 / (1 + 2.718281828459045**-0.5)
    bins = [min(int((g - low) / (1 - low) * 40), 39) for g in gates]
    assert layer.counts.tolist() == [bins.count(i) for i in range(40)]
    assert layer.counts.sum() == 2 * 3 * 64


@pytest.fixture
def figure() -> Any:
    """A drawn figure of two layers, with its images and layers."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 20, 30, generator=generator) for _ in range(2)]
    layers = []
    for path, side, upper in (("a.b", 4, 0.98), ("c." * 15 + "d", 2, 0.74)):
        maps = [0.63 + 0.1 * torch.rand(side, side, generator=generator) for _ in images]
        layers.append(
            Layer(path, (0.6224593, upper), maps, torch.arange(40.0, dtype=torch.float64))
        )
    figure = draw(["a $b_c$.png", "x" * 40 + ".png"], images, layers, "of _what_ $it$ is")
    return figure, images, layers


def test_draw_lays_maps_over_images(figure: Any) -> None:
    drawn, images, layers = figure
    panels = [axis for axis in drawn.axes if axis.images]
    assert len(panels) == 2 * 3
    for row, image in enumerate(images):
        plain, *laid = panels[3 * row : 3 * row + 3]
        numpy.testing.assert_array_equal(plain.images[0].get_array(), image.movedim(0, -1))
        for panel, layer in zip(laid, layers, strict=True):
            grey, gates = panel.images
            numpy.testing.assert_allclose(grey.get_array(), image.mean(0), rtol=1e-6)
            numpy.testing.assert_array_equal(gates.get_array(), layer.maps[row])
            assert grey.get_extent() == gates.get_extent()
            values = torch.cat([gates.flatten() for gates in layer.maps]).numpy()
            assert gates.get_clim() == pytest.approx(numpy.quantile(values, (0.01, 0.99)))
            assert panel.get_aspect() == 1


def test_draw_histograms(figure: Any) -> None:
    drawn, _, layers = figure
    axes = [axis for axis in drawn.axes if axis.patches and axis.get_yscale() == "log"]
    for axis, layer in zip(axes, layers, strict=True):
        (stairs,) = axis.patches
        values, edges, _ = stairs.get_data()
        numpy.testing.assert_allclose(values, torch.arange(40.0) / 780)
        assert (edges[0], edges[-1]) == pytest.approx((0.6224593, 1))
        assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(
            [0.6224593, layer.bounds[1]]
        )
        assert [t.get_text() for t in axis.get_xticklabels()] == ["0.622", f"{layer.bounds[1]:.3f}"]


def test_draw_overlaps_no_text_and_keeps_it_inside(figure: Any) -> None:
    drawn = figure[0]
    drawn.canvas.draw()
    width, height = drawn.bbox.size
    texts = [t for t in drawn.findobj(lambda a: hasattr(a, "get_text")) if t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_visible()]
    shown = {text for text, _ in boxes}
    assert {"of _what_ $it$ is", "a $b_c$.png", "a.b\n4x4", "0.622", "0.740", "100 %"} <= shown
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
        for other, its in boxes[index + 1 :]:
            assert not box.padded(-1).overlaps(its.padded(-1)), (text, other)


def test_draw_shows_no_rounding_errors_of_a_flat_map() -> None:
    flat = [0.63 + 1e-7 * torch.rand(4, 4, generator=torch.Generator().manual_seed(0))]
    counts = torch.ones(40, dtype=torch.float64)
    figure = draw(["a"], [torch.rand(3, 8, 8)], [Layer("b", (0.6224593, 1.0), flat, counts)], "c")
    (laid,) = [axis.images[1] for axis in figure.axes if len(axis.images) == 2]
    assert laid.get_clim() == pytest.approx((0.63, 0.631))


def preprocessed(name: str, original: Image.Image, model: nn.Module) -> Tensor:
    subject = Subject(name, "torchvision", "0", model, (3, 224, 224))
    inputs, _ = collect(subject, [original], ["first"])
    return inputs[0]


def test_collect_crops_images_like_the_published_networks() -> None:
    original = image((400, 300))
    scaled = original.resize((341, 256), Image.Resampling.BILINEAR)
    expected = numpy.asarray(scaled.crop((58, 16, 282, 240))) / 255
    found = preprocessed("resnet18", original, Net()).movedim(0, -1)
    numpy.testing.assert_allclose(found, expected, atol=1e-6)
    # Segmentation networks have no preset crop: the shorter side is resized to the input.
    scaled = original.resize((298, 224), Image.Resampling.BILINEAR)
    expected = numpy.asarray(scaled.crop((37, 0, 261, 224))) / 255
    found = preprocessed("fcn_resnet50", original, Net()).movedim(0, -1)
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
def test_collect_preprocesses_images_as_in_training(
    name: str, side: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    colour = (10, 100, 200)
    got: list[Any] = []

    class Recorder(Net):
        def forward(self, x: Any) -> Tensor:
            got.append(x[0])
            return super().forward(x if isinstance(x, Tensor) else torch.stack(x))

    subject = build(name)
    vars(subject)["model"] = Recorder().eval()
    subject.model.pretrained_cfg = getattr(build(name).model, "pretrained_cfg", None)
    inputs, _ = collect(subject, [Image.new("RGB", (500, 400), colour)])
    expected = [(c / 255 - m) / s for c, m, s in zip(colour, mean, std, strict=True)]
    assert got[0].shape == (3, side, side)
    torch.testing.assert_close(got[0].amax((1, 2)), torch.tensor(expected), atol=0.005, rtol=0)
    torch.testing.assert_close(got[0].amin((1, 2)), torch.tensor(expected), atol=0.005, rtol=0)
    torch.testing.assert_close(inputs[0][:, 0, 0], torch.tensor(colour) / 255, atol=0.005, rtol=0)


def test_read_image_rotates_and_converts_to_colour(tmp_path: Path) -> None:
    rotated = Image.Exif()
    rotated[0x0112] = 6  # the camera was rotated
    image((80, 60)).save(tmp_path / "rotated.jpg", exif=rotated)
    assert read_image(str(tmp_path / "rotated.jpg")).size == (60, 80)
    image().convert("L").save(tmp_path / "grey.png")
    assert read_image(str(tmp_path / "grey.png")).mode == "RGB"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was built before the mistake was reported")

    monkeypatch.setattr("simam.cli.commands.build", refuse)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"no image", "UnidentifiedImageError: cannot identify image file "),
        (b"", "UnidentifiedImageError: cannot identify image file "),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), ""),
    ],
)
def test_maps_command_refuses_files_that_are_no_images(
    content: bytes | None,
    message: str,
    image_file: str,
    output: str,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    file = tmp_path / "photo.png"
    if content is not None:
        file.write_bytes(content)
    found = maps_error(capsys, SMALL, image_file, str(file), "-o", output)
    assert found.startswith(f"cannot read {file}: {message}")
    assert found.endswith("; expected a .jpg, .png or other image file")
    assert not Path(output).exists()


@pytest.mark.usefixtures("no_model")
def test_maps_command_refuses_a_truncated_image(
    image_file: str, output: str, tmp_path: Path, capsys: Capture
) -> None:
    half = tmp_path / "half.png"
    content = Path(image_file).read_bytes()
    half.write_bytes(content[: len(content) // 2])
    assert maps_error(capsys, SMALL, str(half), "-o", output).startswith(f"cannot read {half}: ")


@pytest.mark.usefixtures("no_model")
def test_maps_command_refuses_a_folder_as_image(
    output: str, tmp_path: Path, capsys: Capture
) -> None:
    found = maps_error(capsys, SMALL, str(tmp_path), "-o", output)
    assert found.startswith(f"cannot read {tmp_path}: ")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.doc", r"expected a name that ends in one of .*\.jpg, .*\.png, .*"),
        ("out", r"expected a name that ends in one of .*"),
        ("none/out.png", r"there is no folder .*none; create it first"),
        ("folder.png", r"it is a folder or write-protected"),
    ],
)
def test_maps_command_refuses_outputs_that_cannot_be_written(
    name: str, message: str, image_file: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "folder.png").mkdir()
    output = str(tmp_path / name)
    found = maps_error(capsys, SMALL, image_file, "-o", output)
    assert re.fullmatch(rf"cannot write {re.escape(output)}: {message}", found)


@pytest.mark.usefixtures("no_model")
def test_maps_command_refuses_a_write_protected_output(
    image_file: str, output: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert maps_error(capsys, SMALL, image_file, "-o", output) == (
        f"cannot write {output}: it is a folder or write-protected"
    )


@pytest.mark.usefixtures("no_model")
def test_maps_command_refuses_to_overwrite_an_image(image_file: str, capsys: Capture) -> None:
    content = Path(image_file).read_bytes()
    assert maps_error(capsys, SMALL, image_file, "-o", image_file) == (
        f"{image_file} is one of the images; choose another file for the figure"
    )
    assert Path(image_file).read_bytes() == content


def test_maps_command_reports_a_full_disk(image_file: str, output: str, capsys: Capture,
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert maps_error(capsys, SMALL, image_file, "-o", output) == (
        f"cannot write {output} (OSError: [Errno 28] No space left on device)"
    )


@pytest.mark.usefixtures("no_model")
def test_maps_command_names_the_extra_of_missing_matplotlib(
    image_file: str, output: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = maps_error(capsys, SMALL, image_file, "-o", output)
    assert found.startswith("matplotlib cannot be imported (ModuleNotFoundError: ")
    assert found.endswith(
        '); install the extra "viz": pip install "simam[viz]", '
        'or from a checkout pip install ".[viz]"'
    )


def test_maps_command_refuses_globs_that_match_nothing(
    image_file: str, output: str, capsys: Capture
) -> None:
    found = maps_error(capsys, SMALL, image_file, "-o", output, "--layers", "layer1*", "layer5*")
    assert found == f"--layers 'layer5*' matches none of the SimAM layers: {', '.join(LAYERS)}"
    assert not Path(output).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_maps_command_refuses_invalid_arguments(
    arguments: list[str], message: str, capsys: Capture
) -> None:
    found = maps_error(capsys, *arguments)
    assert found.startswith(message)
    assert "--help" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ResNet19"], "unknown model 'ResNet19'; close names: resnet18, "),
        ([SMALL, "--weights", "no.pt"], "cannot read no.pt: No such file"),
        (["squeezenet1_1"], "found no place for SimAM in this SqueezeNet"),
        ([SMALL, "--where", "x"], "--where 'x' matches none of the model's modules"),
        (["mc3_18"], "mc3_18 takes videos; expected a model that takes single images"),
        (["raft_small"], "raft_small takes pairs of images; expected a model that takes single"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_maps_command_refuses_models_that_do_not_fit(
    arguments: list[str], message: str, image_file: str, output: str, capsys: Capture
) -> None:
    model, *options = arguments
    assert maps_error(capsys, model, image_file, "-o", output, *options).startswith(message)


def test_collect_names_a_model_that_fails() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("of the model")

    subject = Subject("resnet18", "torchvision", "0", Fails(), (3, 224, 224))
    message = r"^resnet18 fails on an input of shape 3x224x224 \(RuntimeError: of the model\)$"
    with pytest.raises(UserError, match=message):
        collect(subject, [image()])


def test_collect_refuses_gates_that_are_not_finite() -> None:
    class Overflows(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 0)

    subject = Subject("resnet18", "torchvision", "0", Overflows(), (3, 224, 224))
    message = (
        "the gates of second are not finite: activations of resnet18 overflow before this layer; "
        "check the weights"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        collect(subject, [image()])


def test_maps_command_imports_matplotlib_late_and_keeps_its_settings(
    image_file: str, output: str
) -> None:
    program = (
        "import sys, simam.cli\n"
        "assert not {'matplotlib', 'PIL'} & sys.modules.keys(), 'imported early'\n"
        "import matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "assert simam.cli.main(sys.argv[1:]) == 0\n"
        "assert matplotlib.rcParams.copy() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, "maps", "resnet18", image_file, "-o", output]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{output}: layer1.1.conv2, ")

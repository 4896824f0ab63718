"""Measure what SimAM does to a pretrained network, and what brings its accuracy back.

The network is an EfficientNet-Lite0 with ImageNet weights. With --photographs it is evaluated right
after attach and after batch-norm recalibration. The folder holds photographs of ImageNet classes,
named nXXXXXXXX_name.jpg. The statistics for one half of them are estimated on the other half,
without labels. With --fine-tune it is evaluated after a short training. The folder holds train and
test, each with one folder of images per class. Writes JSON.
"""

import argparse
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import simam
from benchmarks.speed.options import require_packages
from benchmarks.speed.timing import machine_info
from simam import functional

from .efficientnet_lite0 import PACKAGE, read_weights, to_timm

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE = 50  # for evaluation and recalibration
STEPS, TRAIN_BATCH_SIZE, LEARNING_RATE = 96, 32, 0.01
TRAIN_IMAGES, TEST_IMAGES = 2000, 1000
SEEDS = 3


class Variant(nn.Module):
    """x (1 + strength (gate / scale - 1)); scale None is the mean of the gate over its channel."""

    def __init__(self, e_lambda: float, strength: float, scale: float | None) -> None:
        super().__init__()
        self.e_lambda, self.strength, self.scale = e_lambda, strength, scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            gate = functional.attention(x, self.e_lambda)
            scaled = x * gate / gate.mean((2, 3), keepdim=True)
        else:
            scaled = functional.simam(x, self.e_lambda) / self.scale
        return x + self.strength * (scaled - x)


def network(**options: Any) -> nn.Module:
    """Build the pretrained network; with options for timm, its classifier starts from zero."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0", **options)
    weights = to_timm(read_weights())
    if options:
        state = model.get_submodule("classifier").state_dict()
        weights |= {f"classifier.{name}": torch.zeros_like(v) for name, v in state.items()}
    model.load_state_dict(weights)
    return model.eval().to(memory_format=torch.channels_last)


def attach(
    model: nn.Module,
    where: str | None = None,
    e_lambda: float = 0.1,
    strength: float = 1.0,
    scale: float | None = 1.0,
) -> nn.Module:
    """Attach SimAM; a gate other than the published one replaces the layer by a `Variant`."""
    simam.attach(model, e_lambda=e_lambda, where=where)
    if (strength, scale) != (1.0, 1.0):
        for module in list(model.modules()):
            if isinstance(getattr(module, "simam", None), simam.SimAM):
                module.simam = Variant(e_lambda, strength, scale)
    return model


LATE, LAST = "blocks.[456].*.conv_dw", "blocks.[56].*.conv_dw"
GATES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "published": {},
    "blend 0.5": {"strength": 0.5},
    "gate / 0.68": {"scale": 0.68},
    "gate / 0.68, blend 0.5": {"scale": 0.68, "strength": 0.5},
    "stages 5 to 7: published": {"where": LATE},
    "stages 5 to 7: blend 0.5": {"where": LATE, "strength": 0.5},
    "stages 5 to 7: gate / 0.68": {"where": LATE, "scale": 0.68},
    "stages 6 and 7: published": {"where": LAST},
    "stage 7: published": {"where": "blocks.6.*.conv_dw"},
    "gate / channel mean": {"scale": None},
    "published, lambda 1e-4": {"e_lambda": 1e-4},
    "blend 0.25": {"strength": 0.25},
}


def read_photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Read all photographs, in a fixed random order, and their classes."""
    from PIL import Image
    from timm.data import ImageNetInfo
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(256, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    info = ImageNetInfo()
    classes = {synset: index for index, synset in enumerate(info.label_names())}
    files = sorted(folder.glob("n*.jpg"))
    if not files:
        raise SystemExit(f"expected photographs named nXXXXXXXX_name.jpg in {folder}, got none")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    files = [files[i] for i in order]
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([classes[file.name.partition("_")[0]] for file in files])
    return images.contiguous(memory_format=torch.channels_last), labels


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Evaluate a model: 1 for every image that it classifies correctly, 0 for the others."""
    guesses = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH_SIZE)])
    return (guesses == labels).double()


def recalibrated_correct(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    max_images: int | None = None,
    reference: nn.Module | None = None,
) -> Tensor:
    """Evaluate each half of the images after recalibration on the other half.

    Args:
        model (nn.Module): recalibrated in copies; it stays as it is.
        images (Tensor[N, C, H, W]): the images.
        labels (Tensor[N]): their classes.
        max_images (int, optional): recalibrate on at most this many images.
        reference (nn.Module, optional): the plain network, see `simam.recalibrate`.

    Returns:
        Tensor[N]: as `correct`.
    """
    results = []
    halves = images.chunk(2)
    for half, half_labels, others in zip(halves, labels.chunk(2), halves[::-1], strict=True):
        fresh = copy.deepcopy(model)
        simam.recalibrate(fresh, others[:max_images].split(BATCH_SIZE), reference=reference)
        results.append(correct(fresh, half, half_labels))
    return torch.cat(results)


def measure_photographs(folder: Path) -> Iterator[dict[str, Any]]:
    """Measure the accuracy with every gate, right after attach and after recalibration.

    Yields:
        dict: gate and insertions (the number of SimAM layers). Under "attached", "recalibrated"
            and, for some gates, "with reference": top-1 accuracy in percent, its change against
            the plain network in percentage points, and the standard error of the change. Under
            "gain by reference": the same, against "recalibrated".
    """
    images, labels = read_photographs(folder)
    plain = network()
    base = correct(plain, images, labels)

    def against(result: Tensor, other: Tensor) -> dict[str, float]:
        change = result - other
        return {
            "top1": 100 * result.mean().item(),
            "change": 100 * change.mean().item(),
            "error": 100 * change.std().item() / math.sqrt(len(change)),
        }

    for name, options in GATES.items():
        model = network()
        if options is not None:
            attach(model, **options)
        for max_images in (None, 100) if name == "published" else (None,):
            recalibrated = recalibrated_correct(model, images, labels, max_images)
            row: dict[str, Any] = {
                "gate": f"{name}, {max_images} photographs" if max_images else name,
                "insertions": sum(isinstance(m, (simam.SimAM, Variant)) for m in model.modules()),
                "attached": against(correct(model, images, labels), base),
                "recalibrated": against(recalibrated, base),
            }
            if "published" in name:
                referred = recalibrated_correct(model, images, labels, max_images, reference=plain)
                row["with reference"] = against(referred, base)
                row["gain by reference"] = against(referred, recalibrated)
            yield row


def read_classes(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Read a random sample of a folder with one folder per class, at 64 x 64, and the classes."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(64, v2.InterpolationMode.BICUBIC),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    data = ImageFolder(folder)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [data[i] for i in order[:count]]
    images = torch.stack([transform(image) for image, _ in chosen])
    labels = torch.tensor([label for _, label in chosen])
    return images.contiguous(memory_format=torch.channels_last), labels


STARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attached": {"attached": {}},
    "attached, recalibrated": {"attached": {}, "recalibrated": True},
    "attached, strength grows": {"attached": {"strength": 1e-9}},
    "stages 5 to 7 attached, recalibrated": {"attached": {"where": LATE}, "recalibrated": True},
}


def fine_tune(
    images: Tensor,
    labels: Tensor,
    test: tuple[Tensor, Tensor],
    seed: int,
    attached: dict[str, Any] | None = None,
    recalibrated: bool = False,
) -> list[float]:
    """Train the network on the same images in the same order, whatever it starts from.

    Args:
        images (Tensor[N, C, H, W]): the training images.
        labels (Tensor[N]): their classes.
        test (tuple of Tensor): images and classes for the evaluation.
        seed (int): seed of the order and of the flips.
        attached (dict, optional): attach SimAM, with these options of `attach`.
        recalibrated (bool): recalibrate before training.

    Returns:
        list of float: test accuracy in percent after half of the steps and at the end.
    """
    torch.manual_seed(seed)
    # With this network's momentum of 0.01, running statistics would lag behind in so few steps.
    model = network(num_classes=10, bn_momentum=0.1)
    if attached is not None:
        attach(model, **attached)
    if recalibrated:
        simam.recalibrate(model, images[:400].split(BATCH_SIZE))
    growing = [module for module in model.modules() if isinstance(module, Variant)]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for step in range(STEPS):
        for layer in growing:
            layer.strength = min(1.0, 2 * (step + 1) / STEPS)
        chosen = torch.randint(len(images), (TRAIN_BATCH_SIZE,), generator=generator)
        batch = images[chosen]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        loss = nn.functional.cross_entropy(model.train()(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step + 1 in (STEPS // 2, STEPS):
            accuracies.append(100 * correct(model.eval(), *test).mean().item())
    return accuracies


def measure_fine_tunes(folder: Path) -> Iterator[dict[str, Any]]:
    """Measure the accuracy after a short training from every start.

    Yields:
        dict: start; the mean over seeds of the test accuracy in percent after half of the steps
            ("halfway") and at the end ("end"); the mean change of the latter against the plain
            network, seed by seed, and its standard error; the two accuracies of every run.
    """
    images, labels = read_classes(folder / "train", SEEDS * TRAIN_IMAGES)
    test = read_classes(folder / "test", TEST_IMAGES)
    subsets = list(zip(images.split(TRAIN_IMAGES), labels.split(TRAIN_IMAGES), strict=True))
    runs: dict[str, list[list[float]]] = {}
    for name, start in STARTS.items():
        runs[name] = [fine_tune(*data, test, seed, **start) for seed, data in enumerate(subsets)]
        halfway, end = zip(*runs[name], strict=True)
        changes = [run[1] - plain[1] for run, plain in zip(runs[name], runs["plain"], strict=True)]
        yield {
            "start": name,
            "halfway": mean(halfway),
            "end": mean(end),
            "change": mean(changes),
            "error": stdev(changes) / math.sqrt(len(changes)),
            "runs": runs[name],
        }


def print_case(case: dict[str, Any]) -> None:
    """Print one case in one line."""
    if "start" in case:
        line = f"{case['start']:40} {case['halfway']:6.1f} {case['end']:6.1f}"
        line += f"   {case['change']:+5.1f} +- {case['error']:.1f}"
    else:
        line = f"{case['gate']:40} {case['insertions']:2} insertions"
        for key in ("attached", "recalibrated", "with reference", "gain by reference"):
            if key in case:
                top1, change, error = (case[key][name] for name in ("top1", "change", "error"))
                line += f"   {key} {top1:5.1f} ({change:+.1f} +- {error:.1f})"
    print(line, flush=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.recalibration", description=__doc__
    )
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="evaluate on these")
    parser.add_argument("--fine-tune", type=Path, metavar="FOLDER", help="train on these images")
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS / "recalibration.json",
        help="file to write; results that are not measured again stay; default: the committed file",
    )
    options = parser.parse_args()
    if not (options.photographs or options.fine_tune):
        parser.error("expected --photographs FOLDER, --fine-tune FOLDER or both, got neither")
    require_packages(parser, "test", "timm", "torchvision", "PIL", PACKAGE)
    torch.set_num_threads(1)
    measurements = {}
    if options.photographs:
        measurements["photographs"] = measure_photographs(options.photographs)
    if options.fine_tune:
        measurements["fine_tune"] = measure_fine_tunes(options.fine_tune)
    for name, rows in measurements.items():
        cases = []
        for case in rows:
            cases.append(case)
            print_case(case)
            kept = json.loads(options.json.read_text()) if options.json.exists() else machine_info()
            options.json.write_text(json.dumps(kept | {name: cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()

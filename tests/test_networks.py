import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.models import MODELS, Member
from hashret.models.backbones import DEVIATION, MEAN, Backbone, backbone
from hashret.models.networks import NETWORKS, Network
from hashret.runtime.folding import Blocked, folded

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
DIGITS = (load_digits().images * 15.9375).astype(np.uint8)  # (1797, 8, 8)
SMALL = "backbone:shufflenet_v2_x0_5"
EVERY = [*NETWORKS, SMALL]
SIZES = [(1, 1), (5, 7), (28, 28), (33, 17), (1, 64)]


def network(name: str) -> Network:
    return NETWORKS[name] if name in NETWORKS else backbone(name, "random")


def member(name: str, shape: tuple[int, int, int], bits: int = 16, **settings: Any) -> Member:
    """Build a denoising autoencoder, which supports every network."""
    torch.manual_seed(0)
    settings |= {} if name in NETWORKS else {"weights": "random"}
    return MODELS["denoising"](shape, bits, network=name, **settings)


def digits(channels: int, n: int = 200) -> Tensor:
    grey = torch.from_numpy(DIGITS[:n, None] / np.float32(255))
    return grey if channels == 1 else torch.cat([grey, 1 - grey, grey.square()], 1)


def with_random_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model in evaluation mode and float64, with random statistics and weights of normalisations."""
    model.double().train()(x)
    for norm in [layer for layer in model.modules() if isinstance(layer, NORMS)]:
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_has_equal_outputs_and_fewer_layers(name: str) -> None:
    x = torch.rand(32, 3, 10, 9, dtype=torch.float64)
    encoder = with_random_norms(network(name).encoder((3, 10, 9), 16, 4), x)
    z = encoder(x).detach()
    decoder = with_random_norms(network(name).decoder(16, (3, 10, 9), 4), z)
    for model, inputs in ((encoder, x), (decoder, z)):
        folded_model = folded(model)
        assert model is decoder or not any(isinstance(layer, NORMS) for layer in folded_model.modules())
        torch.testing.assert_close(folded_model(inputs), model(inputs), rtol=1e-10, atol=1e-10)
        assert any(isinstance(layer, NORMS) for layer in model.modules())  # the model itself is unchanged


@pytest.mark.parametrize(
    ("name", "width", "blocked"),
    [("conv", 16, True), ("conv", 24, False), ("resnet", 16, False), ("mlp", 16, False)],
)
def test_convolutions_use_the_blocked_layout_where_it_is_faster(name: str, width: int, blocked: bool) -> None:
    x = torch.rand(100, 1, 28, 28)
    model = with_random_norms(network(name).encoder((1, 28, 28), 8, width), x.double()).float()
    folded_model = folded(model)
    assert blocked == any(isinstance(layer, Blocked) for layer in folded_model.modules())
    with torch.inference_mode():
        for n in (1, Blocked.MIN_IMAGES - 1, Blocked.MIN_IMAGES, 100):
            torch.testing.assert_close(folded_model(x[:n]), model(x[:n]), rtol=1e-4, atol=1e-4)
        assert folded_model.double()(x.double()).dtype == torch.float64


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")  # type: ignore[no-untyped-call]
def test_the_blocked_layout_is_kept_between_layers() -> None:
    seen: list[bool] = []

    class Watching(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_mkldnn)
            return super().forward(x)

    layers = Blocked(nn.Conv2d(1, 16, 3), Watching(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 32, 3))
    with torch.inference_mode():
        outputs = [layers(torch.rand(n, 1, 9, 9)) for n in (Blocked.MIN_IMAGES - 1, Blocked.MIN_IMAGES)]
    assert seen == [False, True] and not any(y.is_mkldnn for y in outputs)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_networks_decode_to_the_size_of_any_image(name: str, size: tuple[int, int], channels: int) -> None:
    x = torch.rand(3, channels, *size)
    model = member(name, (channels, *size), 24, width=2)
    assert all(term.shape == () and term.isfinite() for term in model.loss(x).values())
    model.eval()
    assert model.outputs(x).shape == (3, 24)
    assert model.reconstruct(x).shape == x.shape
    together, alone = model.outputs(x), torch.cat([model.outputs(image[None]) for image in x])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_training_changes_all_weights_of_a_network(name: str, channels: int) -> None:
    x = digits(channels, 200 if name in NETWORKS else 16)
    model = member(name, (channels, 8, 8), width=4)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(30 if name in NETWORKS else 8):
        loss = torch.stack(list(model.loss(x).values())).sum()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            for weight, tensor in model.named_parameters():
                assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), weight
        optimiser.step()
    assert losses[-1] < (0.9 if name in NETWORKS else 0.995) * losses[0]  # the backbone has random weights


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_networks_train_on_colour_images_of_48_pixels(name: str) -> None:
    """oneDNN crashed on the gradient of a strided 1 × 1 convolution with the channels last."""
    model = member(name, (3, 48, 48), width=8).to(memory_format=torch.channels_last).train()
    x = torch.rand(32, 48, 48, 3).permute(0, 3, 1, 2)
    torch.stack(list(model.loss(x).values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_codes_are_equal_alone_in_batches_and_from_disk(tmp_path: Path, name: str) -> None:
    settings = {} if name in NETWORKS else {"weights": "random"}
    images = DIGITS[:40]
    hasher = Hasher("denoising", 16, network=name, width=4, **settings).fit(images, steps=4)
    codes = hasher.encode(images)
    assert len(np.unique(codes, axis=0)) > 10
    for size in (1, 7):
        again = [hasher.encode(images[i : i + size]) for i in range(0, len(images), size)]
        assert (np.concatenate(again) == codes).all()
    hasher.save(tmp_path / "model")
    stored = Hasher.load(tmp_path / "model")
    assert stored.fingerprint == hasher.fingerprint and (stored.encode(images) == codes).all()


def test_the_deep_network_is_that_of_hinton_and_salakhutdinov() -> None:
    def layers(model: nn.Module) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]

    model = MODELS["ae"]((1, 28, 28), 32, network="deep")
    assert layers(model.encoder) == [(784, 1000), (1000, 500), (500, 250), (250, 32)]
    assert layers(model.decoder) == [(32, 250), (250, 500), (500, 1000), (1000, 784)]
    half = MODELS["ae"]((1, 28, 28), 32, network="deep", width=12)
    assert layers(half.encoder)[1] == (500, 250)


def test_the_residual_network_is_torchvisions_resnet_18_without_downsampling() -> None:
    reference = torchvision.models.resnet18()
    reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool = reference.avgpool = nn.Identity()
    reference.fc = nn.Linear(512 * 4 * 4, 16)
    x = torch.rand(2, 3, 32, 32)
    ours = NETWORKS["resnet"].encoder((3, 32, 32), 16, 64)
    state = ours.state_dict()
    assert [t.shape for t in state.values()] == [t.shape for t in reference.state_dict().values()]
    ours.load_state_dict(dict(zip(state, reference.state_dict().values(), strict=True)))
    assert torch.allclose(ours.eval()(x), reference.eval()(x), atol=1e-5)


def test_a_residual_network_ends_in_small_maps_whatever_the_image() -> None:
    for size, positions in (((8, 8), 1), ((32, 32), 16), ((64, 64), 16), ((224, 100), 8)):
        model = NETWORKS["resnet"].encoder((1, *size), 16, 2)
        linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
        assert linear.in_features == 16 * positions


def test_every_resolution_of_a_unet_reaches_its_decoder() -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 1, 9, 14)
    encoder, decoder = NETWORKS["unet"].encoder((1, 9, 14), 8, 3), NETWORKS["unet"].decoder(8, (1, 9, 14), 3)
    z = encoder(x)
    maps = [(3, 9, 14), (6, 5, 7), (12, 3, 4), (24, 2, 2)]
    assert z.shape == (20, 8 + sum(prod(shape) for shape in maps) + 9 * 14)
    start = 0
    for columns in (8, *(prod(shape) for shape in maps), 9 * 14):
        without = z.clone()
        without[:, start : start + columns] = 0
        assert (decoder(without) - decoder(z)).abs().mean() > 1e-3
        start += columns
    assert torch.allclose(decoder(z) - decoder(without), x, atol=1e-6)  # the decoder adds the image to its output
    assert torch.equal(z[:, 8 : 8 + 3 * 9 * 14].reshape(20, 3, 9, 14), encoder.stages[0](x))  # type: ignore[index,operator,unused-ignore]


def test_a_unet_restores_details_beyond_the_code() -> None:
    """Noise cannot be compressed into a code."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.rand(2, 200, 1, 8, 8, generator=generator)
    errors = {}
    for name in ("unet", "conv"):
        model = member(name, (1, 8, 8), 8, width=8, strength=0.05)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(150):
            optimiser.zero_grad()
            model.loss(train)["reconstruction"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        errors[name] = float((model.eval().reconstruct(test) - test).square().mean().detach())
    assert errors["unet"] < 0.02 < 0.06 < errors["conv"]  # its variance is 1/12


@pytest.mark.parametrize("name", sorted({name for name in MODELS if MODELS[name].trainable} - {"denoising"}))
def test_only_denoising_members_accept_skip_connections(name: str) -> None:
    if "network" not in MODELS[name].defaults():
        return
    with pytest.raises(ValueError, match=r"network 'unet' .*(choose model 'denoising'|does not have)"):
        Hasher(name, 16, network="unet")


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "vgg11", "vit_b_32", "densenet121"])
def test_features_are_the_inputs_of_the_last_layer_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name).eval()
    torch.manual_seed(0)
    features = backbone(f"backbone:{name}", "random").encoder((3, 224, 224), 8, 24)[0].eval()  # type: ignore[index]
    x = torch.rand(2, 3, 224, 224)
    mean, deviation = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, DEVIATION))
    last = [layer for layer in reference.modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.normal_(last.weight, std=0.1)
    with torch.no_grad():
        expected = reference((x - mean) / deviation)
        outputs = F.linear(features(x), last.weight, last.bias)
    assert torch.allclose(outputs, expected, atol=1e-4) and expected.std() > 1e-3


def test_normalisation_and_size_are_those_of_the_weights() -> None:
    for name in ("resnet18", "efficientnet_b3", "vit_b_16"):
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        assert (tuple(preset.mean), tuple(preset.std)) == (MEAN, DEVIATION)
        features = backbone(f"backbone:{name}", "random").encoder((1, 8, 8), 8, 24)[0]  # type: ignore[index]
        assert features.size == preset.crop_size[0]


@pytest.mark.parametrize("size", [(8, 8), (300, 250), (224, 224)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_backbone_inputs_equal_those_of_torchvision(channels: int, size: tuple[int, int]) -> None:
    features = backbone(SMALL, "random").encoder((channels, *size), 8, 24)[0]  # type: ignore[index]
    features.classifier = nn.Identity()
    x = torch.rand(2, channels, *size)
    colour = torchvision.transforms.functional.resize(x, [224, 224], antialias=True).expand(2, 3, 224, 224)
    expected = torchvision.transforms.functional.normalize(colour, MEAN, DEVIATION)
    assert torch.allclose(features(x), expected, atol=1e-5)


def test_a_backbone_is_frozen() -> None:
    model = member(SMALL, (1, 8, 8), width=2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    frozen = {name for name in before if name.startswith("encoder.0.")}
    assert len(frozen) > 200 and not frozen & {name for name, _ in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.train().parameters(), 0.01, weight_decay=0.1)
    backbones = [part for part in model.modules() if isinstance(part, Backbone)]
    assert len(backbones) == 1 and not any(part.training for part in backbones[0].modules())
    for _ in range(2):
        model.loss(digits(1, 8))["reconstruction"].backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["encoder.2.weight"], after["encoder.2.weight"])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_weights_are_loaded_from_a_file_and_stored_with_the_model(tmp_path: Path, weights: Path) -> None:
    hasher = Hasher("ae", 16, network=SMALL, width=2, weights=str(weights)).fit(DIGITS[:30], steps=2)
    original = torch.load(weights, weights_only=True)
    state = hasher._parts()[1].state_dict()
    assert all(
        torch.equal(state[f"encoder.0.classifier.{name}"], original[name]) for name in original if "fc." not in name
    )
    hasher.save(tmp_path / "model")
    codes = hasher.encode(DIGITS[:30])
    weights.unlink()
    stored = Hasher.load(tmp_path / "model")
    assert stored.fingerprint == hasher.fingerprint and (stored.encode(DIGITS[:30]) == codes).all()
    with pytest.raises(HashretError, match="does not have the weights of shufflenet_v2_x0_5 .*: give another file"):
        Hasher("ae", 16, network=SMALL, weights=str(weights)).fit(DIGITS[:30], steps=2)


def test_weights_are_loaded_from_the_cache_of_torchvision(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / "hub" / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth"
    hasher = Hasher("ae", 16, network=SMALL, width=2)  # weights are needed only for training
    with pytest.raises(HashretError, match=f"download https://.*pth to {path}, or give the setting weights") as error:
        hasher.fit(DIGITS[:30], steps=2)
    assert "\n" not in str(error.value)
    path.parent.mkdir(parents=True)
    weights.rename(path)
    state = hasher.fit(DIGITS[:30], steps=2)._parts()[1].state_dict()
    assert torch.equal(state["encoder.0.classifier.conv1.0.weight"], torch.load(path)["conv1.0.weight"])


class TouchesFile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("wrong", ["of another network", "code", "text", "a folder", "a number"])
def test_a_file_without_the_weights_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if wrong == "a folder":
        Path("weights").mkdir()
    elif wrong == "text":
        Path("weights").write_text("no weights")
    else:
        network = torchvision.models.mobilenet_v3_small().state_dict()
        torch.save({"of another network": network, "code": TouchesFile(), "a number": 3}[wrong], "weights")
    with pytest.raises(HashretError, match=r"^weights does not have the weights of .*: give another file$") as error:
        Hasher("ae", 16, network=SMALL, weights="weights").fit(DIGITS[:30], steps=1)
    assert "\n" not in str(error.value) and not Path("touched").exists()


def test_unsuitable_backbones_are_refused_with_a_list() -> None:
    with pytest.raises(ValueError, match="no network 'backbone:none'; choose backbone: and one of .*resnet18, "):
        Hasher("ae", 16, network="backbone:none")
    with pytest.raises(ValueError, match="weights are for a network such as backbone:resnet18: network 'conv' takes"):
        Hasher("ae", 16, weights="some.pth")
    with pytest.raises(ValueError, match="takes images of 1 or 3 channels, not 2"):
        backbone(SMALL, "random").encoder((2, 8, 8), 8, 24)


def test_every_backbone_can_be_built_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match="choose backbone: and") as error:
        backbone("backbone:", "")
    names = str(error.value).partition("one of ")[2].split(", ")
    assert len(names) > 50
    with torch.device("meta"):
        for name in names[::6]:
            encoder = backbone(f"backbone:{name}", "").encoder((1, 9, 9), 16, 24)
            assert encoder(torch.rand(2, 1, 9, 9)).shape == (2, 16)


def test_torchvision_is_imported_only_for_backbones() -> None:
    code = "import sys, hashret; hashret.Hasher('ae', 16, network='resnet'); print('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"

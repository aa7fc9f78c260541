import pytest
import torch

from hashret.models.networks import NETWORKS, folded

NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_folded_network_gives_the_same_with_fewer_layers(network: str) -> None:
    model = NETWORKS[network].encoder((3, 10, 9), 16, 4)
    x = torch.rand(32, 3, 10, 9, dtype=torch.float64)
    model.double().train()(x)  # which gives the normalisations statistics that are not the ones they began with
    for norm in [layer for layer in model.modules() if isinstance(layer, NORMS)]:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    model.eval()
    quick = folded(model)
    assert not any(isinstance(layer, NORMS) for layer in quick.modules())
    torch.testing.assert_close(quick(x), model(x), rtol=1e-12, atol=1e-12)
    assert any(isinstance(layer, NORMS) for layer in model.modules())  # it was not changed

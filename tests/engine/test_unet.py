import pytest
import torch

from registration_engine.errors import InvalidVolumeError
from registration_engine.unet import ARCHITECTURES, UNet, parameters_of


@pytest.mark.parametrize(("name", "parameters"), [("teacher", 610_819), ("student", 237_443)])
def test_the_networks_have_the_size_the_paper_gives(name: str, parameters: int) -> None:
    network = UNet(ARCHITECTURES[name])

    assert parameters_of(network) == parameters
    assert [c.out_channels for c in network.modules() if isinstance(c, torch.nn.Conv3d)] == [
        *ARCHITECTURES[name].encoder,
        ARCHITECTURES[name].bottleneck,
        *ARCHITECTURES[name].decoder,
        *(16, 16, 16),
        3,
    ]


def test_an_untrained_network_moves_nothing_and_keeps_the_grid() -> None:
    with torch.no_grad():
        displacement = UNet(ARCHITECTURES["student"])(torch.rand(1, 2, 16, 32, 48))

    assert displacement.shape == (1, 3, 16, 32, 48)
    assert float(displacement.abs().max()) < 1e-2


def test_checkpointing_and_channels_last_change_no_gradient() -> None:
    pair = torch.rand(1, 2, 16, 16, 16)

    def gradients(**options: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        network = UNet(ARCHITECTURES["student"], **options)
        network(pair).square().sum().mul(1e8).backward()
        return [p.grad for p in network.parameters()]

    plain = gradients()

    for options in ({"checkpointing": True}, {"channels_last": True}):
        for expected, got in zip(plain, gradients(**options), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_autocast_returns_a_float32_field_near_the_exact_one() -> None:
    torch.manual_seed(3)
    exact = UNet(ARCHITECTURES["student"])
    torch.nn.init.normal_(exact.flow.weight, std=0.1)
    rough = UNet(ARCHITECTURES["student"], autocast=torch.bfloat16)
    rough.load_state_dict(exact.state_dict())
    pair = torch.rand(1, 2, 16, 16, 16)

    with torch.no_grad():
        expected, got = exact(pair), rough(pair)

    assert got.dtype == torch.float32
    assert 0 < float((got - expected).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("shape", [(1, 2, 16, 16, 17), (1, 3, 16, 16, 16), (2, 16, 16, 16), (1, 2, 0, 16, 16)])
def test_a_grid_that_does_not_halve_four_times_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidVolumeError, match="multiples of 16"):
        UNet(ARCHITECTURES["student"])(torch.zeros(shape))

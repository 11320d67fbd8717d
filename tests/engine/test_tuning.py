from dataclasses import replace

import numpy as np
import pytest
import torch
from engine import bodies

from registration_engine import PRESETS, Volume, register
from registration_engine.checkpoint import LoadedModel
from registration_engine.prepare import prepared
from registration_engine.presets import Preset, Tuning
from registration_engine.tuning import NetworkPair, padded, tuned
from registration_engine.unet import ARCHITECTURES, UNet

CPU = torch.device("cpu")
SMALL = {"shape": (30, 28, 26), "spacing": (4.0, 4.0, 4.5)}
QUICK = replace(PRESETS["paper-student"], tuning=Tuning(learning_rate=5e-4, epochs=20, lambda_smooth=0.5))


def model(seed: int = 0, flow: float | None = None) -> LoadedModel:
    """An untrained student; with `flow`, one whose prediction is noise of about so many voxels."""
    torch.manual_seed(seed)
    network = UNet(ARCHITECTURES["student"])
    if flow is not None:
        torch.nn.init.normal_(network.flow.weight, std=flow)
    return LoadedModel("student", f"{seed:064}", network.requires_grad_(False))


@pytest.fixture(scope="module")
def pair() -> tuple[Volume, Volume]:
    """Different grids, orientations and extents; breathing of 20 mm between them."""
    fixed = bodies.volume(bodies.grid(**SMALL))
    turned = bodies.grid((34, 30, 28), (4.0, 4.2, 4.0), rotation=bodies.rotation((0, 0, 1), 8))
    return fixed, bodies.volume(turned, through=bodies.breathing(20.0), seed=1)


def test_tuning_makes_the_images_more_alike_on_the_fixed_grid(pair) -> None:
    registration = register(*pair, preset=QUICK, model=model())

    assert registration.grid is pair[0].grid
    assert registration.displacement.shape == (*pair[0].grid.shape, 3)
    assert np.isfinite(registration.displacement).all()
    assert registration.report.max_displacement_mm > 1
    report = registration.report
    assert report.similarity_after > report.similarity_before
    assert report.folding_fraction == 0
    assert (report.model_sha256, report.preset) == (model().sha256, "paper-student")


def test_one_patients_fit_never_reaches_the_next(pair) -> None:
    other = bodies.volume(bodies.grid(**SMALL), through=bodies.breathing(-10.0), seed=3)
    network, fresh = model().network, model().network
    short = Tuning(learning_rate=5e-4, epochs=3)
    list(tuned(network_pair((pair[0], other)), network, short))

    *_, (_, loss, voxels) = tuned(network_pair(pair), network, short)

    *_, (_, expected, alone) = tuned(network_pair(pair), fresh, short)
    assert loss == expected
    assert torch.equal(voxels, alone)
    assert all(torch.equal(weight, fresh.state_dict()[name]) for name, weight in network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def network_pair(pair: tuple[Volume, Volume], spacing_mm: float = 8.0) -> NetworkPair:
    fixed, moving = (prepared(volume, None, "An", CPU) for volume in pair)
    return NetworkPair.of(fixed, moving, np.eye(4), spacing_mm)


def test_tuning_stops_at_its_epochs_its_seconds_or_where_nothing_is_gained(pair) -> None:
    images, network = network_pair(pair), model().network

    def epochs(**limits: float | bool) -> list[tuple[float, float]]:
        tuning = Tuning(**{"learning_rate": 1e-3, "epochs": 30, **limits})
        return [(part, loss) for part, loss, _ in tuned(images, network, tuning)]

    assert len(epochs(epochs=4)) == 5
    assert len(epochs(seconds=1e-9)) == 1
    still = epochs(learning_rate=0.0, stops_early=True)
    assert len(still) == 11
    assert len({loss for _, loss in still}) == 1
    assert epochs(epochs=4)[-1][0] == 1


def test_what_lies_in_padding_or_outside_the_moving_image_counts_nothing(pair) -> None:
    images = network_pair(pair)
    fixed = images.level.fixed
    voxels = torch.zeros_like(images.level.base)
    spoilt = replace(fixed, image=torch.where(fixed.valid > 0, fixed.image, 0.7))

    assert all(n % 16 == 0 for n in fixed.grid.shape)
    assert (fixed.valid == 0).any()
    tuning = Tuning(learning_rate=1e-3)
    loss = images.loss(voxels, tuning)
    assert torch.equal(loss, replace(images, level=replace(images.level, fixed=spoilt)).loss(voxels, tuning))


def test_moving_out_of_the_field_of_view_never_lowers_the_loss(pair) -> None:
    opposite = Volume(1.5 - pair[0].voxels, pair[0].grid)  # correlation +1: less of it must not look better
    tuning = Tuning(learning_rate=1e-3, lambda_smooth=0.0, alpha_div=0.0)
    images = network_pair((pair[0], opposite))
    voxels = torch.zeros_like(images.level.base)
    losses = [float(images.loss(voxels + shift, tuning)) for shift in (0.0, 8.0, 12.0, 100.0)]

    assert losses[0] < losses[1] < losses[2] < losses[3]
    assert losses[3] == 1


def test_too_little_memory_tunes_at_half_the_resolution_and_says_so(pair, monkeypatch) -> None:
    sides, of = [], NetworkPair.of

    def run_out(fixed, moving, moving_from_fixed, spacing_mm) -> NetworkPair:
        found = of(fixed, moving, moving_from_fixed, spacing_mm)
        sides.append(spacing_mm)
        if len(sides) == 1:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(NetworkPair, "of", staticmethod(run_out))
    short = replace(QUICK, tuning=replace(QUICK.tuning, epochs=2))

    assert register(*pair, preset=short, model=model()).report.profile == "lean"
    assert sides == [8.0, 16.0]


def test_half_a_voxel_beyond_the_outer_slices_still_counts_and_what_slips_farther_is_pulled_back() -> None:
    k, j, i = np.meshgrid(*[np.arange(16)] * 3, indexing="ij")
    waves = Volume((np.sin(i / 2) + np.cos(j / 3) + np.sin(k / 2.5)).astype(np.float32), bodies.grid((16, 16, 16)))
    images = network_pair((waves, waves), spacing_mm=1.0)
    tuning = Tuning(learning_rate=1e-3, lambda_smooth=0.0, alpha_div=0.0)
    still = torch.zeros_like(images.level.base)

    def shifted(amount: float) -> torch.Tensor:
        moved = still.clone()
        moved[2, -1] = amount  # the last slice, outwards
        return moved.requires_grad_()

    near, far = shifted(0.4), shifted(1.5)
    losses = [images.loss(voxels, tuning) for voxels in (near, far)]
    losses[1].backward()

    aligned = float(images.loss(still, tuning))
    assert float(losses[0].detach()) < aligned + 0.02
    assert float(losses[1].detach()) > aligned + 0.05
    assert float(far.grad[2, -1].mean()) > 0


def test_padding_keeps_every_voxel_in_its_place(pair) -> None:
    image = prepared(pair[0], None, "An", CPU)

    wide = padded(image)

    first = np.rint(wide.grid.indices(image.grid.points_mm(np.zeros(3)))).astype(int)
    inside = (0, *(slice(f, f + n) for f, n in zip(first, image.grid.shape, strict=True)))
    np.testing.assert_allclose(wide.grid.points_mm(first), image.grid.points_mm(np.zeros(3)), atol=1e-9)
    assert torch.equal(wide.image[inside], image.image[0])
    assert float(wide.valid.sum()) == image.valid.sum()


def test_a_bad_prediction_is_no_start_of_the_field(pair) -> None:
    preset = Preset("fast", voxels=10_000, iterations=(1,), model="student")

    registration = register(*pair, preset=preset, model=model(flow=0.5))

    assert registration.report.similarity_after >= registration.report.similarity_before
    assert registration.report.max_displacement_mm < 20
    assert registration.report.model_sha256 == model().sha256


def test_a_network_of_another_architecture_is_refused(pair) -> None:
    from registration_engine import InvalidRequestError

    with pytest.raises(InvalidRequestError, match="got 'student', expected 'teacher'"):
        register(*pair, preset="paper-teacher", model=model())

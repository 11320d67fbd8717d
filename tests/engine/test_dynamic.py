import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine import bodies

from registration_engine import PRESETS, InvalidRequestError, InvalidVolumeError, Preset, Volume, tuning
from registration_engine import evaluation as ev
from registration_engine.checkpoint import LoadedModel
from registration_engine.dynamic import reference_number, region_mean, register_4d
from registration_engine.prepare import prepared
from registration_engine.presets import Tuning
from registration_engine.unet import ARCHITECTURES, UNet

QUICK = Preset("quick", voxels=8_000, iterations=(30, 20))
GRID = bodies.grid((18, 20, 22), (6.5, 6.0, 5.5))
DEPTHS = (14.0, 9.0, 0.0)
UPTAKE = (1.0, 1.3, 2.0)


@pytest.fixture(scope="module")
def phases() -> list[Volume]:
    """Three phases of breathing and uptake; the reference, number 2, is at rest."""
    return [
        bodies.volume(GRID, through=bodies.breathing(depth), contrast=lambda v, u=uptake: v * u, seed=n)
        for n, (depth, uptake) in enumerate(zip(DEPTHS, UPTAKE, strict=True))
    ]


@pytest.fixture(scope="module")
def found(phases):
    told = []
    results = {
        p.number: p for p in register_4d(phases, preset=QUICK, reference=2, progress=lambda *step: told.append(step))
    }
    return results, told


def body() -> np.ndarray:
    points = GRID.points_mm(np.moveaxis(np.indices(GRID.shape, dtype=float), 0, -1))
    return np.linalg.norm(points / np.array([40, 30, 42]), axis=-1) < 1


def test_every_phase_comes_to_the_reference_with_progress_per_phase(found):
    results, told = found

    assert sorted(results) == [0, 1]
    region = body()
    points = GRID.points_mm(np.argwhere(region).astype(float))
    for number, phase in results.items():
        # phase n shows at y what the reference shows at through(y): the truth maps through(y) to y
        there = points
        here = bodies.breathing(DEPTHS[number])(there)
        inside = (np.abs(GRID.indices(here) - (np.array(GRID.shape) - 1) / 2) < np.array(GRID.shape) / 2 - 1).all(1)
        field = phase.registration.total_field()
        errors = ev.landmark_errors(field, here[inside], there[inside])
        before = np.linalg.norm(here - there, axis=1)
        assert errors.mean() < 0.4 * before.mean(), number
        assert phase.registration.report.folding_fraction == 0
    assert {number for number, *_ in told} == {0, 1}
    assert [stage for number, stage, part in told if number == 0 and part == 1][-1] == "judge"


def test_a_series_read_backwards_gives_the_same_bits(phases, found):
    results, _ = found

    backwards = {2 - p.number: p for p in register_4d(phases[::-1], preset=QUICK, reference="first")}

    assert sorted(backwards) == [0, 1]
    for number, phase in backwards.items():
        one, other = (p.registration.total_field().vectors for p in (results[number], phase))
        assert np.array_equal(one, other)


def test_an_exception_of_progress_ends_the_series_and_a_bad_reference_is_refused_at_once(phases):
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        list(register_4d(phases, preset=QUICK, progress=stop))
    with pytest.raises(InvalidVolumeError, match="Reference image: every voxel"):
        register_4d([Volume(np.zeros(GRID.shape), GRID), *phases], preset=QUICK, reference="first")
    with pytest.raises(InvalidRequestError, match="got 'last', expected middle, first or 0 to 2"):
        register_4d(phases, reference="last")


def test_a_network_that_adapts_goes_on_from_where_it_was_and_the_callers_stays_as_it_was(phases):
    torch.manual_seed(0)
    model = LoadedModel("student", "0" * 64, UNet(ARCHITECTURES["student"]).requires_grad_(False))
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    preset = replace(PRESETS["paper-student"], tuning=Tuning(learning_rate=5e-4, epochs=6, lambda_smooth=0.5))

    found = list(register_4d([phases[2], phases[1]], preset=preset, reference="first", model=model, device="cpu"))

    assert found[0].registration.report.model_sha256 == "0" * 64
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())

    fixed, moving = (prepared(phases[n], None, "Phase", torch.device("cpu")) for n in (2, 1))
    own = copy.deepcopy(model.network)
    tuning.refine(fixed, moving, np.eye(4), preset, own, lambda _: None, True)
    pair = tuning.NetworkPair.of(fixed, moving, np.eye(4), tuning.working_spacing(fixed, own))
    untuned, adapted = (next(tuning.tuned(pair, each, preset.tuning))[1] for each in (model.network, own))
    assert adapted < untuned - 1e-4


@pytest.mark.parametrize(
    ("name", "count", "number"), [("middle", 30, 15), ("middle", 5, 2), ("first", 9, 0), ("7", 8, 7)]
)
def test_the_reference_is_counted_from_zero(name, count, number):
    assert reference_number(name, count) == number


def test_a_region_is_measured_through_the_field_and_only_where_the_image_reaches():
    volume = bodies.volume(GRID, noise=0)
    region = np.zeros(GRID.shape, bool)
    region[8:14, 8:14, 8:14] = True

    assert region_mean(volume, GRID, region) == pytest.approx(volume.voxels[region].mean(), rel=1e-5)
    far = Volume(volume.voxels, bodies.grid(GRID.shape, GRID.spacing_mm, center=(900, 0, 0)))
    assert np.isnan(region_mean(far, GRID, region))

import numpy as np
import pytest
from engine import bodies

from registration_engine import InvalidRequestError, InvalidVolumeError, Preset, Volume
from registration_engine import evaluation as ev
from registration_engine.dynamic import reference_number, region_mean, register_4d

QUICK = Preset("quick", voxels=8_000, iterations=(30, 20))
GRID = bodies.grid((18, 20, 22), (6.5, 6.0, 5.5))
DEPTHS = (14.0, 9.0, 0.0, 12.0)
UPTAKE = (1.0, 1.3, 2.0, 1.7)


@pytest.fixture(scope="module")
def phases() -> list[Volume]:
    """Four phases of breathing and uptake; the reference, number 2, is at rest."""
    return [
        bodies.volume(GRID, through=bodies.breathing(depth), contrast=lambda v, u=uptake: v * u, seed=n)
        for n, (depth, uptake) in enumerate(zip(DEPTHS, UPTAKE, strict=True))
    ]


@pytest.fixture(scope="module")
def found(phases):
    told = []
    results = {p.number: p for p in register_4d(phases, preset=QUICK, progress=lambda *step: told.append(step))}
    return results, told


def body() -> np.ndarray:
    points = GRID.points_mm(np.moveaxis(np.indices(GRID.shape, dtype=float), 0, -1))
    return np.linalg.norm(points / np.array([40, 30, 42]), axis=-1) < 1


def test_every_phase_comes_to_the_middle_one_with_progress_per_phase(found):
    results, told = found

    assert sorted(results) == [0, 1, 3]
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
    assert {number for number, *_ in told} == {0, 1, 3}
    assert [stage for number, stage, part in told if number == 0 and part == 1][-1] == "judge"


def test_a_series_read_backwards_and_without_its_ends_gives_the_same_bits(phases, found):
    results, _ = found

    backwards = {3 - p.number: p for p in register_4d(phases[:0:-1], preset=QUICK)}

    assert sorted(backwards) == [1, 3]
    for number, phase in backwards.items():
        one, other = (p.registration.total_field().vectors for p in (results[number], phase))
        assert np.array_equal(one, other)


def test_a_phase_that_cannot_be_registered_is_told_and_the_others_come_all_the_same(phases):
    broken = [phases[0], Volume(np.full(GRID.shape, 7.0), GRID), phases[2]]

    results = {p.number: p for p in register_4d(broken, preset="rigid", reference="2")}

    assert "every voxel has the value 7" in str(results[1].error)
    assert results[1].registration is None
    assert results[0].error is None
    assert results[0].registration.report.similarity_after > 0.1


def test_an_exception_of_progress_ends_the_series_and_a_bad_reference_is_refused_at_once(phases):
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        list(register_4d(phases, preset=QUICK, progress=stop))
    with pytest.raises(InvalidVolumeError, match="Reference image: every voxel"):
        register_4d([Volume(np.zeros(GRID.shape), GRID), *phases], preset=QUICK, reference="first")
    with pytest.raises(InvalidRequestError, match="got 'last', expected middle, first or 0 to 3"):
        register_4d(phases, reference="last")


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

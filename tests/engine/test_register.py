from dataclasses import replace

import numpy as np
import pytest
from engine import bodies

from registration_engine import (
    DisplacementField,
    ImplausibleResultError,
    InvalidRequestError,
    InvalidVolumeError,
    NoOverlapError,
    OutOfDeviceMemoryError,
    Preset,
    Registration,
    Volume,
    register,
    warp,
)
from registration_engine.presets import STIFF, Manner

SMALL = Preset("small", voxels=40_000, iterations=(40, 40, 30))
QUICK = Preset("quick", voxels=8_000, iterations=(15, 10))


def errors_mm(registration: Registration, through) -> np.ndarray:
    """Distance between the found and the true map at points within the body."""
    rng = np.random.default_rng(5)
    directions = rng.normal(size=(400, 3))
    points = directions / np.linalg.norm(directions, axis=1, keepdims=True) * rng.uniform(0, 1, (400, 1))
    points = points * np.array([40.0, 30.0, 42.0])
    field = registration.total_field()
    nearest = np.rint(field.grid.indices(points)).astype(int)
    centers = field.grid.points_mm(nearest.astype(float))
    found = centers + field.vectors[tuple(nearest.T)]
    return np.linalg.norm(found - through(centers), axis=1)


def test_a_known_breathing_motion_is_found_without_folding():
    through = bodies.breathing(14.0)
    on = bodies.grid()

    registration = register(bodies.volume(on, through=through), bodies.volume(on, seed=1), preset=SMALL)

    before = np.linalg.norm(through(np.zeros((1, 3))), axis=1)
    errors = errors_mm(registration, through)
    assert before > 12
    assert errors.mean() < 1.0
    assert np.percentile(errors, 95) < 2.5
    report = registration.report
    assert report.folding_fraction == 0
    assert report.similarity_after > report.similarity_before + 0.1
    assert 8 < report.max_displacement_mm + np.abs(registration.moving_from_fixed[:3, 3]).max() < 40
    assert set(report.seconds) == {"prepare", "linear", "field", "judge"}
    assert report.peak_memory_bytes > 0


def test_another_contrast_on_an_oblique_anisotropic_grid_is_registered_all_the_same():
    through = bodies.breathing(9.0)
    fixed = bodies.volume(
        bodies.grid((26, 61, 57), (5.0, 2.2, 2.4), rotation=bodies.rotation((1, 2, 0.5), 25)), through=through
    )
    moving = bodies.volume(
        bodies.grid((43, 40, 47), (3.0, 3.3, 2.9), center=(4, -3, 5), rotation=bodies.rotation((0, 1, 1), -15)),
        contrast=lambda v: 300 * (0.9 - v) * (v > 0.1) + 900 * v**2,
        seed=1,
    )

    registration = register(fixed, moving, preset=SMALL)

    errors = errors_mm(registration, through)
    assert errors.mean() < 1.6
    assert np.percentile(errors, 95) < 3.5
    assert registration.report.folding_fraction == 0


@pytest.mark.parametrize(("axis", "degrees"), [((0, 0, 1), 25), ((1, 0.3, 0.2), 95), ((0.2, 1, 0), 170)])
def test_a_turned_and_shifted_body_is_found_by_the_rigid_preset(axis, degrees):
    matrix = np.eye(4)
    matrix[:3, :3] = bodies.rotation(axis, degrees)
    matrix[:3, 3] = (160.0, -90.0, 40.0)

    def through(points):
        return points @ matrix[:3, :3].T + matrix[:3, 3]

    def back(points):
        return (points - matrix[:3, 3]) @ matrix[:3, :3]

    fixed = bodies.volume(bodies.grid())
    moving = bodies.volume(bodies.grid((35, 35, 35), center=(158.0, -86.0, 43.0)), through=back, seed=1)

    registration = register(fixed, moving, preset="rigid")

    assert registration.displacement is None
    assert np.allclose(registration.rigid[:3, :3] @ registration.rigid[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.array_equal(registration.rigid, registration.moving_from_fixed)
    assert np.percentile(errors_mm(registration, through), 95) < 1.5


def test_points_outside_the_moving_field_of_view_do_not_pull():
    through = bodies.breathing(6.0)
    fixed = bodies.volume(bodies.grid(), through=through)
    moving = bodies.volume(bodies.grid((18, 33, 36), center=(0, 0, 12)), seed=1)

    registration = register(fixed, moving, preset=SMALL)

    errors = errors_mm(registration, through)
    assert np.median(errors) < 1.2
    assert errors.max() < 7


def test_masks_limit_what_counts():
    on = bodies.grid()
    through = bodies.breathing(8.0)
    fixed, moving = bodies.volume(on, through=through), bodies.volume(on, seed=1)
    spoiled = fixed.voxels.copy()
    spoiled[:, :, 30:] = np.random.default_rng(3).uniform(0, 3, spoiled[:, :, 30:].shape)
    mask = np.ones(on.shape)
    mask[:, :, 29:] = 0

    registration = register(Volume(spoiled, on), moving, preset=SMALL, fixed_mask=Volume(mask, on))

    assert errors_mm(registration, through).mean() < 1.2


def test_what_drives_the_field_is_chosen_by_the_kinds_of_the_images():
    on = bodies.grid()
    fixed = bodies.volume(on, through=bodies.breathing(9.0))
    alike = bodies.volume(on, contrast=lambda v: 0.9 * v + 0.05 * v**2, seed=1)
    unlike = bodies.volume(on, contrast=lambda v: np.where(v < 0.1, v, 0.9 - v), seed=1)
    one = replace(SMALL, manners=(STIFF,))
    other = replace(one, unlike=STIFF)

    fields = [register(fixed, moving, preset=p).displacement for moving in (alike, unlike) for p in (one, other)]

    assert np.array_equal(fields[0], fields[1])
    assert not np.array_equal(fields[2], fields[3])


def test_a_manner_too_stiff_for_what_the_search_has_found_gives_way_to_a_suppler_one():
    on, through = bodies.grid(), bodies.breathing(14.0)
    fixed, moving = bodies.volume(on, through=through), bodies.volume(on, seed=1)
    rigid_like = Manner(local_share=1.0, structure_share=0.0, step_smoothing=2.0, field_smoothing=25.0)

    alone, ladder = (
        register(fixed, moving, preset=replace(SMALL, manners=manners))
        for manners in ((rigid_like,), (rigid_like, STIFF))
    )

    assert errors_mm(ladder, through).mean() < 0.6 * errors_mm(alone, through).mean()


def test_the_same_input_gives_the_same_bits():
    on = bodies.grid((24, 26, 28), (5.0, 5.0, 5.0))
    fixed, moving = bodies.volume(on, through=bodies.breathing(8.0)), bodies.volume(on, seed=1)

    first, second = (register(fixed, moving, preset=QUICK, device="cpu", seed=3) for _ in range(2))

    assert np.array_equal(first.displacement, second.displacement)
    assert np.array_equal(first.moving_from_fixed, second.moving_from_fixed)
    assert first.report.similarity_after == second.report.similarity_after
    assert first.report.seed == 3


def test_an_image_registered_to_itself_stays_where_it_is():
    image = bodies.volume(bodies.grid())

    registration = register(image, image, preset=SMALL)

    assert np.abs(registration.total_field().vectors).max() < 0.5
    assert registration.report.similarity_after >= registration.report.similarity_before


def test_progress_is_told_in_order_and_may_stop_the_work():
    on = bodies.grid((24, 26, 28), (5.0, 5.0, 5.0))
    fixed, moving = bodies.volume(on), bodies.volume(on, seed=1)
    heard = []

    register(fixed, moving, preset=QUICK, progress=lambda stage, part: heard.append((stage, part)))

    assert list(dict.fromkeys(stage for stage, _ in heard)) == ["prepare", "linear", "field", "judge"]
    for stage in ("prepare", "linear", "field", "judge"):
        parts = [part for name, part in heard if name == stage]
        assert parts == sorted(parts)
        assert (parts[0], parts[-1]) == (0.0, 1.0)

    def stop(stage: str, part: float) -> None:
        if stage == "field" and part > 0.1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        register(fixed, moving, preset=QUICK, progress=stop)


def test_a_given_start_spares_the_way_and_a_wrong_one_does_no_harm():
    on = bodies.grid((24, 26, 28), (5.0, 5.0, 5.0))
    turn = bodies.rotation((0, 0, 1), 40)

    def through(points):
        return bodies.breathing(12.0)(points) @ turn.T + (30.0, 0.0, 0.0)

    fixed = bodies.volume(on, through=through)
    moving = bodies.volume(bodies.grid((32, 32, 32), (5.0, 5.0, 5.0), center=(0, 0, 0)), seed=1)
    coarse = bodies.grid((9, 10, 11), (14.0, 14.0, 14.0), rotation=bodies.rotation((1, 1, 0), 30))
    points = coarse.points_mm(np.stack(np.meshgrid(*map(np.arange, coarse.shape), indexing="ij"), -1).astype(float))
    near = DisplacementField(through(points) - points, coarse)
    wrong = DisplacementField(20 * np.sin(points / 9), coarse)
    hasty = Preset("hasty", voxels=60_000, iterations=(3,))

    alone, helped, misled = (register(fixed, moving, preset=hasty, start=start) for start in (None, near, wrong))

    assert errors_mm(helped, through).mean() < 0.6 * errors_mm(alone, through).mean()
    assert np.array_equal(misled.total_field().vectors, alone.total_field().vectors)


def test_too_little_memory_halves_the_resolution_and_says_so_or_is_a_named_error():
    on = bodies.grid((24, 26, 28), (5.0, 5.0, 5.0))
    fixed, moving = bodies.volume(on, through=bodies.breathing(8.0)), bodies.volume(on, seed=1)
    left = [1]

    def run_out(stage: str, part: float) -> None:
        if stage == "field" and part == 0 and left:
            left.pop()
            raise MemoryError

    assert register(fixed, moving, preset=QUICK, progress=run_out).report.profile == "lean"
    left[:] = [1, 1]
    with pytest.raises(OutOfDeviceMemoryError, match="preset quick, profile lean"):
        register(fixed, moving, preset=QUICK, progress=run_out)


def test_a_constant_image_is_refused():
    good = bodies.volume(bodies.grid())
    flat = Volume(np.full(good.grid.shape, 7.0), good.grid)

    with pytest.raises(InvalidVolumeError, match=r"Moving image: every voxel has the value 7"):
        register(good, flat, preset=SMALL)


def test_an_image_of_three_slices_is_refused():
    good = bodies.volume(bodies.grid())
    thin = bodies.volume(bodies.grid((3, 33, 36)))

    with pytest.raises(InvalidVolumeError, match=r"Fixed image: got \(3, 33, 36\) voxels, expected 4 or more"):
        register(thin, good, preset=SMALL)


def test_a_mask_on_another_grid_or_with_nothing_in_it_is_refused():
    good = bodies.volume(bodies.grid())
    elsewhere = Volume(np.ones(good.grid.shape), bodies.grid(center=(5, 0, 0)))
    empty = Volume(np.zeros(good.grid.shape), good.grid)

    with pytest.raises(InvalidVolumeError, match=r"Fixed mask: .* expected the image's grid"):
        register(good, good, preset=SMALL, fixed_mask=elsewhere)
    with pytest.raises(InvalidVolumeError, match="Moving mask: got no voxel above 0"):
        register(good, good, preset=SMALL, moving_mask=empty)


def test_images_that_cannot_be_brought_together_are_refused():
    image = bodies.volume(bodies.grid())
    shell, core = np.ones(image.grid.shape), np.zeros(image.grid.shape)
    shell[3:-3, 3:-3, 3:-3] = 0
    core[13:17, 15:19, 16:20] = 1

    with pytest.raises(NoOverlapError, match="after every start"):
        register(
            image,
            image,
            preset="rigid",
            fixed_mask=Volume(core, image.grid),
            moving_mask=Volume(shell, image.grid),
        )


def test_a_motion_beyond_the_preset_is_refused():
    on = bodies.grid()
    fixed, moving = bodies.volume(on, through=bodies.breathing(14.0)), bodies.volume(on, seed=1)
    strict = Preset("strict", voxels=10_000, iterations=(20,), largest_displacement_mm=2.0)

    with pytest.raises(ImplausibleResultError, match=r"expected 2 mm at most \(preset strict\)"):
        register(fixed, moving, preset=strict)


def test_an_unknown_preset_or_device_is_refused():
    image = bodies.volume(bodies.grid())

    with pytest.raises(InvalidRequestError, match="'quick', expected one of rigid, fast, balanced, accurate"):
        register(image, image, preset="quick")
    with pytest.raises(InvalidRequestError, match="Device: got 'abacus'"):
        register(image, image, device="abacus")


def test_the_registered_image_is_like_the_fixed_one():
    on = bodies.grid((40, 44, 48), (3.0, 3.0, 3.0))
    through = bodies.breathing(10.0)
    fixed, moving = bodies.volume(on, through=through), bodies.volume(on, seed=1)

    registered = warp(moving, register(fixed, moving, preset=SMALL).total_field(), on)

    before, after = (np.abs(image.voxels - fixed.voxels).mean() for image in (moving, registered))
    assert after < 0.5 * before

import numpy as np
import pytest
from engine import bodies

from registration_engine import InvalidRequestError, InvalidVolumeError
from registration_engine import evaluation as ev
from registration_engine.patches import patch_mutual_information
from registration_engine.volume import DisplacementField

BALL = bodies.grid((30, 34, 38), (2.0, 1.5, 1.0))


def ball(on, center, radius) -> np.ndarray:
    return np.linalg.norm(points_of(on) - np.array(center), axis=-1) <= radius


def points_of(on) -> np.ndarray:
    return on.points_mm(np.moveaxis(np.indices(on.shape, dtype=float), 0, -1))


def field_of(on, through) -> DisplacementField:
    points = points_of(on)
    return DisplacementField(through(points) - points, on)


def patch_map_by_definition(fixed, moving, domain, normalized):
    """Appendix C word by word: every patch on its own."""

    def binned(image):
        low, high = np.percentile(image, [0.5, 99.5])
        return np.clip((image - low) / (high - low) * 16, 0, 15).astype(int)

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    f, m, total, patches = binned(fixed), binned(moving), np.zeros(fixed.shape), np.zeros(fixed.shape)
    starts = [range(0, max(-(-n // 4) * 4 - 16, 0) + 1, 4) for n in fixed.shape]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                box = (slice(z, z + 16), slice(y, y + 16), slice(x, x + 16))
                inside = domain[box]
                if inside.sum() < 512:
                    continue
                joint = np.zeros((16, 16))
                np.add.at(joint, (f[box][inside], m[box][inside]), 1)
                joint /= joint.sum()
                h_f, h_m = entropy(joint.sum(1)), entropy(joint.sum(0))
                value = max(h_f + h_m - entropy(joint.ravel()), 0)
                if normalized:
                    value = 2 * value / (h_f + h_m) if h_f + h_m > 0 else 0.0
                total[box] += value
                patches[box] += 1
    return np.where(domain & (patches > 0), total / np.maximum(patches, 1), np.nan)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("shape", [(24, 29, 21), (10, 33, 18)])
def test_the_patch_map_is_what_appendix_c_defines_patch_by_patch(shape, normalized):
    rng = np.random.default_rng(3)
    fixed = bodies.volume(bodies.grid(shape)).voxels
    moving = np.sin(4 * fixed) + 0.1 * rng.normal(size=shape).astype(np.float32)
    moving[:, :17] = 1.25  # patches where it tells nothing
    domain = ball(bodies.grid(shape, (1, 1, 1)), (0, 0, 0), 13)

    found = patch_mutual_information(fixed, moving.astype(np.float32), domain, normalized=normalized)

    expected = patch_map_by_definition(fixed, moving.astype(np.float32), domain, normalized)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.isnan(found[~domain]).all()


def test_the_patch_map_is_one_for_the_same_image_and_names_the_corner_that_is_off():
    fixed = bodies.volume(bodies.grid((40, 44, 48), (3.0, 3.0, 3.0))).voxels.copy()
    moving = fixed.copy()
    moving[20:, 20:, 20:] = np.random.default_rng(0).permutation(moving[20:, 20:, 20:].ravel()).reshape(20, 24, 28)

    assert np.allclose(patch_mutual_information(fixed, fixed), 1, atol=1e-5)
    found = patch_mutual_information(fixed, moving)
    assert found[28:, 28:, 28:].max() < 0.3
    assert found[:10, :10, :10].min() > 0.99
    moving[:, :20] = 0.4
    assert (patch_mutual_information(fixed, moving)[:, :4] == 0).all()


def test_the_patch_map_refuses_other_shapes_other_patches_and_nan():
    image = np.zeros((20, 20, 20), np.float32)
    with pytest.raises(InvalidVolumeError, match="expected one shape"):
        patch_mutual_information(image, image[1:])
    with pytest.raises(InvalidRequestError, match="multiple of the stride"):
        patch_mutual_information(image, image, patch=10)
    with pytest.raises(InvalidVolumeError, match="moving image holds NaN"):
        patch_mutual_information(image, np.full_like(image, np.nan))


def test_two_balls_have_the_overlap_and_the_surface_distance_of_geometry():
    fixed = 3 * ball(BALL, (0, 0, 0), 12).astype(int)
    moving = 3 * ball(BALL, (4, 0, 0), 12).astype(int)

    (found,) = ev.label_overlaps(fixed, moving, BALL.spacing_mm)

    # two spheres of radius r at distance d share (1 - d/2r)² (1 + d/4r) of their volume
    share = (1 - 4 / 24) ** 2 * (1 + 4 / 48)
    assert found.label == 3
    assert found.dice == pytest.approx(share, abs=0.01)
    assert found.iou == pytest.approx(share / (2 - share), abs=0.015)
    # sphere to shifted sphere: d·|cos| of the direction at most; its 95th percentile over the surface is near 0.95 d
    assert found.hd95_mm == pytest.approx(3.8, abs=0.7)


def test_surface_distance_is_exact_for_plates_in_millimetres():
    a, b = np.zeros((12, 20, 20), bool), np.zeros((12, 20, 20), bool)
    a[3:5, 2:18, 2:18] = True
    b[7:9, 2:18, 2:18] = True

    assert ev.surface_distance_95(a, b, np.array([2.5, 1.0, 1.0])) == pytest.approx(10.0)
    assert ev.surface_distance_95(a, a, np.array([2.5, 1.0, 1.0])) == 0
    assert ev.surface_distance_95(a, np.zeros_like(a), np.array([2.5, 1.0, 1.0])) == float("inf")


def test_a_label_in_one_image_only_scores_zero_and_one_in_neither_is_left_out():
    fixed = np.zeros((8, 8, 8), int)
    fixed[2:5, 2:5, 2:5] = 7

    found = ev.label_overlaps(fixed, np.zeros_like(fixed), np.ones(3), [2, 7])

    assert [(o.label, o.dice, o.iou, o.hd95_mm) for o in found] == [(7, 0.0, 0.0, float("inf"))]
    with pytest.raises(InvalidVolumeError, match="fractions"):
        ev.label_overlaps(fixed + 0.5, fixed, np.ones(3))


def test_landmark_errors_are_zero_under_the_true_map_and_its_length_without():
    on = bodies.grid((30, 30, 30), (3, 3, 3), rotation=bodies.rotation((1, 2, 3), 20))
    matrix = bodies.rotation((1, 0, 0), 3) * 1.02

    def through(points):
        return points @ matrix.T + np.array([4.0, -1.0, 2.0])

    fixed = np.random.default_rng(1).uniform(-20, 20, (50, 3))

    # a linear map is what trilinear interpolation gives exactly
    assert ev.landmark_errors(field_of(on, through), fixed, through(fixed)).max() < 1e-4
    still = DisplacementField(np.zeros((*on.shape, 3)), on)
    np.testing.assert_allclose(
        ev.landmark_errors(still, fixed, through(fixed)), np.linalg.norm(through(fixed) - fixed, axis=1)
    )
    with pytest.raises(InvalidRequestError, match="Landmark 1: fixed point"):
        ev.landmark_errors(still, fixed + 200, fixed)


def test_the_jacobian_is_that_of_calculus_on_an_oblique_grid_in_any_slab():
    on = bodies.grid((41, 20, 24), (1.0, 2.0, 1.5), rotation=bodies.rotation((1, 1, 0), 30))

    def through(p):
        return p + np.stack([0.004 * p[..., 0] ** 2, 0.1 * p[..., 0], 0.3 * p[..., 2]], -1)

    found = ev.jacobian_determinant(field_of(on, through))

    expected = (1 + 0.008 * points_of(on)[..., 0]) * 1.3
    np.testing.assert_allclose(found[1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], rtol=1e-3)


def test_an_affine_map_has_no_irregularity_and_the_rest_of_a_composed_map_is_found():
    on = bodies.grid()
    region = ball(on, (0, 0, 0), 50)
    matrix = bodies.rotation((0, 1, 2), 25) @ np.diag([1.3, 0.9, 1.1])

    def linear(points):
        return points @ matrix.T + np.array([120.0, -40.0, 7.0])

    pure = ev.volume_change(field_of(on, linear), region)
    assert (pure.folding_fraction, pure.sdlogj) == (0, pytest.approx(0, abs=1e-3))
    assert pure.max_displacement_mm < 0.01
    breathing = bodies.breathing(10.0)
    alone = ev.volume_change(field_of(on, breathing), region)
    composed = ev.volume_change(field_of(on, lambda p: linear(breathing(p))), region)
    assert alone.sdlogj > 0.05
    assert composed.sdlogj == pytest.approx(alone.sdlogj, rel=0.01)
    assert composed.max_displacement_mm == pytest.approx(alone.max_displacement_mm, rel=0.01)


def test_folding_is_counted_over_the_region_alone():
    on = bodies.grid((20, 20, 20), (1, 1, 1))

    def through(points):
        x = points[..., 0]
        # between x = 2 and x = 6 the map runs backwards
        return points + np.stack([np.where(x > 2, -2 * np.clip(x - 2, 0, 4), 0), 0 * x, 0 * x], -1)

    everywhere = np.ones(on.shape, bool)
    field = field_of(on, through)

    determinant = ev.jacobian_determinant(field)
    assert ev.volume_change(field, everywhere).folding_fraction == np.mean(determinant <= 0) > 0.1
    assert ev.volume_change(field, points_of(on)[..., 0] < 0).folding_fraction == 0


def test_a_map_and_its_inverse_meet_and_a_wrong_one_does_not():
    on = bodies.grid()
    region = ball(on, (0, 0, 0), 40)
    field = field_of(on, bodies.breathing(8.0))

    back = ev.inverted(field)

    errors = ev.inverse_consistency(field, back, region)
    assert errors.size == region.sum()
    assert errors.mean() < 0.05  # 3 mm voxels, linear between them
    assert ev.inverse_consistency(field, field, region).mean() > 5
    with pytest.raises(InvalidVolumeError, match="Region: got no voxel"):
        ev.inverse_consistency(field, back, np.zeros(on.shape, bool))

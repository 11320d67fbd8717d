import numpy as np
import SimpleITK as sitk  # noqa: N813 — the name its users know
from engine import bodies

from registration_engine import DisplacementField, Registration, Volume, warp
from registration_engine.resampling import field_image, grid_of, image_of


def test_warping_equals_plain_simpleitk():
    moving = bodies.volume(bodies.grid((20, 22, 24), (3.0, 4.0, 2.0), rotation=bodies.rotation((1, 0, 2), 30)))
    onto = bodies.grid((18, 26, 20), (4.0, 3.0, 3.5), center=(2, 1, -3))
    vectors = np.random.default_rng(0).normal(scale=2.0, size=(*onto.shape, 3)).astype(np.float32)
    field = DisplacementField(vectors, onto)

    warped = warp(moving, field, onto, outside=-5.0)

    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(image_of(np.zeros(onto.shape, np.float32), onto))
    resampler.SetTransform(sitk.DisplacementFieldTransform(field_image(field)))
    resampler.SetDefaultPixelValue(-5.0)
    expected = sitk.GetArrayFromImage(resampler.Execute(image_of(moving.voxels, moving.grid)))
    assert np.array_equal(warped.voxels, expected)
    assert (warped.voxels == -5.0).any()


def test_a_point_is_inside_up_to_half_a_voxel_beyond_the_outer_centers():
    on = bodies.grid((6, 6, 6), (2.0, 2.0, 2.0))
    image = Volume(np.full(on.shape, 3.0), on)

    for shift, expected in ((0.9, 3.0), (1.1, 0.0)):
        vectors = np.zeros((*on.shape, 3))
        vectors[..., 0] = shift
        assert warp(image, DisplacementField(vectors, on), on).voxels[3, 3, -1] == expected


def test_beyond_the_fields_own_grid_nothing_is_displaced():
    on, wider = bodies.grid((6, 6, 6), (2.0, 2.0, 2.0)), bodies.grid((6, 6, 16), (2.0, 2.0, 2.0))
    image = bodies.volume(wider)
    field = DisplacementField(np.full((*on.shape, 3), 0.8), on)

    warped = warp(image, field, wider)

    assert np.allclose(warped.voxels[:, :, :4], image.voxels[:, :, :4], atol=1e-5)
    assert not np.allclose(warped.voxels[:, :, 7:9], image.voxels[:, :, 7:9], atol=1e-3)


def test_a_linear_map_as_a_field_gives_the_same_image_as_the_map():
    moving, onto = bodies.volume(bodies.grid((20, 22, 24))), bodies.grid((18, 20, 22), (3.5, 3.0, 3.0))
    matrix = np.eye(4)
    matrix[:3, :3] = bodies.rotation((1, 1, 1), 8) * 1.05
    matrix[:3, 3] = (3.0, -2.0, 1.0)
    registration = Registration(onto, np.eye(4), matrix, None, report=None)

    warped = warp(moving, registration.total_field(), onto)

    affine = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
    reference = image_of(np.zeros(onto.shape, np.float32), onto)
    expected = sitk.GetArrayFromImage(sitk.Resample(image_of(moving.voxels, moving.grid), reference, affine))
    assert np.mean(np.abs(warped.voxels - expected) < 1e-3) > 0.999


def test_a_grid_survives_the_way_through_simpleitk():
    for angle in (0, 33, 190):
        on = bodies.grid((5, 6, 7), (4.0, 2.0, 3.0), center=(9, 8, 7), rotation=bodies.rotation((1, 2, 2), angle))

        assert grid_of(image_of(np.zeros(on.shape, np.float32), on)).is_same_as(on, tolerance_mm=1e-6)

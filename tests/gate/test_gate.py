"""The gate: every kind of object in every case, as independent readers see it.

Cases are all pairs of factor values; `make gate` takes the full product. A case is made once and read by every reader.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import counterparts
import highdicom as hd
import numpy as np
import orthanc
import pytest
import SimpleITK
from cases import BALL_MM, FACTORS, RADIUS_MM, Case, Delivered, cases, deliver, make_case, pairs_of
from hand_made import make_source, rotation, translation
from pydicom import dcmread

from dicomnode import volumes
from dicomnode.objects.deformable import interpolate
from dicomnode.outputs import ALL_OUTPUTS

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
SIEMENS = {"image": "MR, real", "position": "two positions"}
CASES = cases()


@pytest.fixture(
    scope="module",
    params=[*CASES, pytest.param(SIEMENS, marks=pytest.mark.data)],
    ids=lambda case: "-".join(case.values()).replace(" ", "_"),
)
def delivered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    folder = tmp_path_factory.mktemp("delivered")
    case: Case = request.param
    if case is not SIEMENS:
        return make_case(case, folder)
    source = DATA / "siemens-mr-two-positions"
    if not source.is_dir():
        pytest.skip("the real images are not there: shared/data/dicom/siemens-mr-two-positions")
    folders = source / "HFS_t1", source / "HFDL_t1"
    fixed, moving = (sorted(each.glob("*.dcm")) for each in folders)
    return deliver(folder, fixed, moving, twins=folders, with_drawings=False)


@pytest.fixture(scope="session")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[orthanc.Orthanc]:
    if orthanc.EXECUTABLE is None:
        pytest.skip("Orthanc is not installed")
    server = orthanc.Orthanc(tmp_path_factory.mktemp("pacs") / "orthanc")
    yield server
    server.stop()


def test_the_cases_hold_every_pair_of_factor_values() -> None:
    held = set().union(*map(pairs_of, CASES))

    for one, values in FACTORS.items():
        for other, others in FACTORS.items():
            if list(FACTORS).index(one) < list(FACTORS).index(other):
                assert {((one, a), (other, b)) for a in values for b in others} <= held


def test_the_case_holds_every_output_that_a_rule_can_ask_for(delivered: Delivered) -> None:
    rescales = {volumes.rescale(each) for each in make_source(volumes.read_headers(delivered.fixed)).datasets}
    absent = {"series_4d"}  # phases, as `series`; tests/node/test_products.py
    absent |= {"blending"} if len(rescales) > 1 else set()
    absent |= set() if delivered.drawn else {"contours", "segmentations"}

    assert set(delivered.made) == set(ALL_OUTPUTS) - absent


def test_dciodvfy_finds_no_error_that_the_sources_have_not(delivered: Delivered) -> None:
    theirs = counterparts.dciodvfy_errors(delivered.sources)

    assert counterparts.dciodvfy_errors(delivered.objects) <= theirs


def test_dcentvfy_is_silent_over_sources_and_objects(delivered: Delivered) -> None:
    assert counterparts.dcentvfy_complaints([*delivered.sources, *delivered.objects]) == ""


def test_pydicomrt_decodes_the_field_that_is_in_memory(delivered: Delivered) -> None:
    decoded = counterparts.decoded_field(delivered.one("dsr"))

    assert decoded.grid.is_same_as(delivered.sampled.field.grid)
    assert np.abs(decoded.vectors - delivered.sampled.field.vectors).max() < 0.01


def test_pydicomrt_decodes_a_way_back_that_undoes_the_way_there(delivered: Delivered) -> None:
    there, back = (counterparts.decoded_field(delivered.one(kind)) for kind in ("dsr", "dsr-inverse"))
    moving = make_source(volumes.read_headers(delivered.moving)).grid
    points = moving.points_mm(np.random.default_rng(7).uniform(0, np.array(moving.shape) - 1, (1000, 3)))

    fixed = points + counterparts.displacements_at(back, points)

    index = there.grid.indices(fixed)
    inside = ((index >= 0) & (index <= np.array(there.grid.shape) - 1)).all(axis=1)
    home = (fixed + counterparts.displacements_at(there, fixed))[inside]
    assert inside.sum() > 300
    assert np.linalg.norm(home - points[inside], axis=1).max() < 0.3


def test_the_decoded_field_is_the_engines_map_at_random_points(delivered: Delivered) -> None:
    registration, field = delivered.registration, counterparts.decoded_field(delivered.one("dsr"))
    assert registration.displacement is not None
    index = np.random.default_rng(7).uniform(0, np.array(registration.grid.shape) - 1, (3000, 3))
    points = registration.grid.points_mm(index)

    mapped = points + counterparts.displacements_at(field, points)

    linear = registration.moving_from_fixed
    expected = points @ linear[:3, :3].T + linear[:3, 3] + interpolate(registration.displacement, index)
    assert np.linalg.norm(mapped - expected, axis=1).max() < 0.2
    backwards = points - counterparts.displacements_at(field, points)
    assert np.linalg.norm(backwards - expected, axis=1).min() > 5  # read the wrong way, nothing would fit


def test_dcmtk_decodes_the_same_vectors(delivered: Delivered) -> None:
    vectors = counterparts.vectors_by_dcmtk(delivered.made["dsr"][0])

    assert vectors == delivered.sampled.field.vectors.astype("<f4").tobytes()


def test_pydicomrt_reads_the_inverse_of_the_engines_matrices(delivered: Delivered) -> None:
    moving = dcmread(delivered.moving[0])

    for path, matrix in zip(
        delivered.made["sro"], (delivered.registration.rigid, delivered.registration.moving_from_fixed), strict=True
    ):
        fixed_from_moving = counterparts.decoded_matrix(dcmread(path), moving)
        assert np.abs(fixed_from_moving @ matrix - np.eye(4)).max() < 1e-6
        assert np.abs(matrix @ matrix - np.eye(4)).max() > 0.1  # so the direction matters


def test_plastimatch_writes_the_same_matrix(delivered: Delivered, tmp_path: Path) -> None:
    theirs = counterparts.plastimatch_matrix(delivered.registration.rigid, *delivered.twins, tmp_path)

    ours = counterparts.decoded_matrix(delivered.one("sro"), dcmread(delivered.moving[0]))
    assert np.abs(theirs - ours).max() < 1e-5


def test_simpleitk_makes_the_same_series_of_the_original_and_the_decoded_field(delivered: Delivered) -> None:
    field = counterparts.decoded_field(delivered.one("dsr"))

    ours = counterparts.read_series(delivered.made["series"])
    theirs = counterparts.resampled(delivered.readable_moving, field, ours, outside=delivered.outside)

    unit = max(1.0, counterparts.stored_unit(delivered.one("series")))
    difference = np.abs(SimpleITK.GetArrayViewFromImage(ours) - SimpleITK.GetArrayViewFromImage(theirs))
    assert (difference <= unit).mean() >= 0.999
    assert np.ptp(SimpleITK.GetArrayViewFromImage(ours)) > 200


def test_what_was_drawn_lies_where_the_decoded_field_takes_it(delivered: Delivered) -> None:
    if not delivered.drawn:
        pytest.skip("nothing was drawn on these images")
    field = counterparts.decoded_field(delivered.one("dsr"))
    fixed = make_source(volumes.read_headers(delivered.fixed)).grid

    def moved_radius(points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points + counterparts.displacements_at(field, points) - BALL_MM, axis=1)

    drawn = [c.ContourData for c in delivered.one("contours").ROIContourSequence[0].ContourSequence]
    outline = np.array([value for each in drawn for value in each], dtype=float).reshape(-1, 3)
    median, most = np.percentile(np.abs(moved_radius(outline) - RADIUS_MM), (50, 90))
    assert (median < 1.5, most < 4) == (True, True)  # slices of 11 mm
    volume = hd.seg.segread(delivered.made["segmentations"][0]).get_volume(segment_numbers=[1])
    index = np.argwhere(volume.array[..., 0] > 0)
    inside = index @ np.asarray(volume.affine)[:3, :3].T + np.asarray(volume.affine)[:3, 3]
    everywhere = fixed.points_mm(np.moveaxis(np.indices(fixed.shape), 0, -1).reshape(-1, 3).astype(float))
    expected = int((moved_radius(everywhere) <= RADIUS_MM).sum())
    common = int((moved_radius(inside) <= RADIUS_MM).sum())
    assert 2 * common / (len(inside) + expected) > 0.85  # of voxels a third of the radius large


def test_the_blending_state_shows_the_two_series_that_were_delivered(delivered: Delivered) -> None:
    rescales = {volumes.rescale(each) for each in make_source(volumes.read_headers(delivered.fixed)).datasets}
    if len(rescales) > 1:
        assert "blending" not in delivered.made
        return
    for layer, paths in zip(
        delivered.one("blending").BlendingSequence, (delivered.fixed, delivered.made["series"]), strict=True
    ):
        instances = [dcmread(path, stop_before_pixels=True) for path in paths]
        (series,) = layer.ReferencedSeriesSequence
        named = {image.ReferencedSOPInstanceUID for image in series.ReferencedImageSequence}
        assert named == {each.SOPInstanceUID for each in instances}
        assert {series.SeriesInstanceUID} == {each.SeriesInstanceUID for each in instances}
        assert {layer.StudyInstanceUID} == {each.StudyInstanceUID for each in instances}


def test_dcm2niix_gives_the_registered_series_the_fixed_geometry(delivered: Delivered, tmp_path: Path) -> None:
    ours = counterparts.nifti_by_dcm2niix(delivered.folder / "series", tmp_path / "ours")
    fixed = counterparts.nifti_by_dcm2niix(delivered.twins[0], tmp_path / "fixed")

    is_same_grid = delivered.resolution == "fixed"
    tolerance_mm = 1e-2 if is_same_grid else float(np.linalg.norm(ours.GetSpacing())) / 2
    assert np.linalg.norm(corners(ours) - corners(fixed), axis=1).max() <= tolerance_mm
    assert np.allclose(corners(ours).mean(axis=0), corners(fixed).mean(axis=0), atol=1e-2)
    assert not is_same_grid or ours.GetSize() == fixed.GetSize()


def corners(image: SimpleITK.Image) -> np.ndarray:
    """(8, 3) LPS mm of the box that the voxels fill, in an order that no flip of an axis changes."""
    ends = [(-0.5, n - 0.5) for n in image.GetSize()]
    points = [image.TransformContinuousIndexToPhysicalPoint(index) for index in product(*ends)]
    return np.array(sorted(points, key=lambda point: [round(component / 4) for component in point]))


def test_orthanc_gives_every_byte_back(delivered: Delivered, pacs: orthanc.Orthanc, tmp_path: Path) -> None:
    storescu = counterparts.tool("storescu", "dcmtk")
    address = ["-aec", pacs.ae_title, "127.0.0.1", str(pacs.port)]
    subprocess.run([storescu, "-R", *address, *delivered.objects], check=True, env={**os.environ, "TCP_NODELAY": "1"})

    for path in delivered.objects:
        back = pacs.download(
            pacs.identifier(str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)), tmp_path / "a"
        )
        assert data_set(back) == data_set(path)


def data_set(path: Path) -> bytes:
    """The bytes after the file meta information, which is each writer's own (PS3.10 7.1)."""
    content = path.read_bytes()
    return content[144 + int.from_bytes(content[140:144], "little") :]


def test_the_phantom_is_no_friend_of_the_wrong_direction() -> None:
    """The hand-made map, taken for its inverse, misses by more than 5 mm at every corner: the canary can sing."""
    there = rotation(3, -2, 5) @ translation(8, -3, 2)
    back = np.linalg.inv(there)
    corners = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-60, 60) for z in (-40, 40)], dtype=float)

    assert np.linalg.norm(corners @ (there - back).T, axis=1).min() > 5

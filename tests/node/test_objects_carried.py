"""What was drawn on the moving series lies where it belongs on the fixed one, in objects that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import counterparts
import highdicom as hd
import numpy as np
import phantoms
import pytest
from drawn import ball, circles, segmentation, structures
from hand_made import make_provenance, make_registration, make_report, make_source, translation
from pydicom import Dataset

from dicomnode import objects
from dicomnode.errors import StudyError
from dicomnode.objects import Drawing, belongs_to, sample_grid
from dicomnode.objects.common import Subject
from dicomnode.objects.outlines import band_mm, outlines, signed_distance
from registration_engine import Grid, Registration

SHIFT_MM = (8.0, -4.0, 10.0)
FIXED = phantoms.make_series(shape=(16, 40, 44), spacing_mm=(5, 4, 4), seed=1)
MOVING = phantoms.make_series(
    shape=(14, 36, 40), spacing_mm=(5, 4, 4), seed=2, phase="arterial", study="later study", frame_of_reference="other"
)
SOURCES = make_source(FIXED), make_source(MOVING)
CENTER_MM, RADIUS_MM = np.array([6.0, -3.0, 2.5]), 22.0


def shifted() -> Registration:
    """x_moving = x_fixed + SHIFT_MM, whole voxels."""
    return Registration(SOURCES[0].grid, translation(*SHIFT_MM), translation(*SHIFT_MM), None, make_report())


def carry(dataset: Dataset, registration: Registration | None = None, **changes: Any) -> Dataset:
    sampled = sample_grid(registration or shifted())
    drawing = Drawing(dataset, "d")
    _, made = objects.carried(*SOURCES, sampled, drawing, provenance=make_provenance(), **changes)
    return made


def segments_of(made: Dataset) -> dict[str, np.ndarray]:
    """(Z, Y, X) on the fixed grid by segment label, as highdicom reads them."""
    read = hd.seg.Segmentation.from_dataset(made)
    labels = {number: read.get_segment_description(number).segment_label for number in read.segment_numbers}
    found = {}
    for number, label in labels.items():
        volume = read.get_volume(segment_numbers=[number], rescale_fractional=True)
        first = SOURCES[0].grid.indices(np.asarray(volume.affine)[:3, 3])
        values = np.zeros(SOURCES[0].grid.shape, dtype=np.float32)
        k, j, i = (round(float(n)) for n in first)
        z, y, x = volume.array.shape[:3]
        values[k : k + z, j : j + y, i : i + x] = volume.array[..., 0]
        found[label] = values
    return found


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_a_segmentation_comes_by_the_known_shift_exactly(kind: str) -> None:
    grid = SOURCES[1].grid
    masks = {"one": ball(grid, CENTER_MM, RADIUS_MM), "two": ball(grid, CENTER_MM + np.array([45, 0, 0]), 12)}
    if kind != "LABELMAP":
        masks["within"] = ball(grid, CENTER_MM, 9)  # segments may overlap

    made = carry(segmentation(SOURCES[1].datasets, masks, kind))

    found = segments_of(made)
    assert made.SegmentationType == ("FRACTIONAL" if kind == "FRACTIONAL" else "BINARY")
    assert list(found) == list(masks)
    for name, center, radius in (("one", 0, RADIUS_MM), ("two", 45, 12), ("within", 0, 9)):
        if name in masks:
            assert np.array_equal(
                found[name], ball(SOURCES[0].grid, CENTER_MM + np.array([center, 0, 0]) - SHIFT_MM, radius)
            )


def test_contours_come_by_the_known_shift_within_a_tenth_of_a_voxel() -> None:
    made = carry(structures(MOVING, {"liver": circles(SOURCES[1].grid, CENTER_MM, RADIUS_MM)}))

    contours = made.ROIContourSequence[0].ContourSequence
    expected = circles(SOURCES[0].grid, CENTER_MM - SHIFT_MM, RADIUS_MM)
    heights = {round(float(points[0, 2]), 3): points for _, points in expected}
    found = {round(float(c.ContourData[2]), 3): np.reshape(np.array(c.ContourData, float), (-1, 3)) for c in contours}
    assert set(heights) == set(found)
    center = (CENTER_MM - SHIFT_MM)[:2]
    for z, points in found.items():
        radius = np.linalg.norm(heights[z][0, :2] - center)
        assert np.abs(np.linalg.norm(points[:, :2] - center, axis=1) - radius).max() < 0.4
        assert np.ptp(points[:, 2]) == 0
    for contour in contours:
        (image,) = contour.ContourImageSequence
        (place,) = [d.ImagePositionPatient for d in FIXED if d.SOPInstanceUID == image.ReferencedSOPInstanceUID]
        assert float(place[2]) == float(contour.ContourData[2])
        assert contour.ContourGeometricType == "CLOSED_PLANAR"


def test_a_study_that_the_pair_does_not_know_is_not_referred_to() -> None:
    drawn = structures(MOVING, {"liver": circles(SOURCES[1].grid, CENTER_MM, RADIUS_MM)})
    made = carry(drawn)
    subject = Subject(*SOURCES, make_provenance(), is_deformable=True)
    objects.check(made, subject, also=[drawn])
    made.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].ReferencedSOPInstanceUID = "2.25.1"

    with pytest.raises(AssertionError, match=r"reference to 2\.25\.1"):
        objects.check(made, subject, also=[drawn])


def test_a_hole_stays_a_hole_and_a_point_comes_where_it_belongs() -> None:
    ring = [*circles(SOURCES[1].grid, CENTER_MM, 24), *circles(SOURCES[1].grid, CENTER_MM, 12)]
    marker = ("POINT", np.array([[10.0, 5.0, -7.5]]))
    line = ("OPEN_NONPLANAR", np.array([[0.0, 0, 0], [10, 5, 3], [20, 7, 9]]))
    registration = make_registration(SOURCES[0].grid)

    shifted_only = carry(structures(MOVING, {"ring": ring, "marker": [marker], "line": [line]}))
    bent = carry(structures(MOVING, {"marker": [marker], "line": [line]}), registration)

    by_slice: dict[float, int] = {}
    for contour in shifted_only.ROIContourSequence[0].ContourSequence:
        z = float(contour.ContourData[2])
        by_slice[z] = by_slice.get(z, 0) + 1
    assert by_slice[min(by_slice, key=lambda z: abs(z - (CENTER_MM - SHIFT_MM)[2]))] == 2
    (point,) = shifted_only.ROIContourSequence[1].ContourSequence
    assert np.allclose(np.array(point.ContourData, float), marker[1][0] - SHIFT_MM, atol=0.01)
    field = sample_grid(registration).field
    for number, (kind, points) in enumerate((marker, line)):
        (contour,) = bent.ROIContourSequence[number].ContourSequence
        fixed = np.reshape(np.array(contour.ContourData, float), (-1, 3))
        assert contour.ContourGeometricType == kind
        assert np.allclose(fixed + counterparts.displacements_at(field, fixed), points, atol=0.02)


def test_contours_and_segments_of_one_body_agree_where_the_field_bends() -> None:
    registration = make_registration(SOURCES[0].grid)
    grid = SOURCES[1].grid

    carried = carry(structures(MOVING, {"a": circles(grid, CENTER_MM, RADIUS_MM)}), registration)
    (mask,) = segments_of(
        carry(segmentation(SOURCES[1].datasets, {"a": ball(grid, CENTER_MM, RADIUS_MM)}), registration)
    ).values()

    drawn = np.zeros(mask.shape, dtype=bool)
    for contour in carried.ROIContourSequence[0].ContourSequence:
        index = SOURCES[0].grid.indices(np.reshape(np.array(contour.ContourData, float), (-1, 3)))
        drawn[round(index[0, 0])] ^= signed_distance([index[:, 1:]], mask.shape[1:], (4, 4)) > 0
    assert 2 * (drawn & (mask > 0)).sum() / (drawn.sum() + mask.sum()) > 0.93
    truth = points_of(SOURCES[0].grid)
    inside = np.linalg.norm(truth + at(registration, truth) - CENTER_MM, axis=-1) <= RADIUS_MM
    assert 2 * (drawn & inside).sum() / (drawn.sum() + inside.sum()) > 0.97


def points_of(grid: Grid) -> np.ndarray:
    return grid.points_mm(np.moveaxis(np.indices(grid.shape), 0, -1).astype(float))


def at(registration: Registration, points: np.ndarray) -> np.ndarray:
    field = sample_grid(registration).field
    return counterparts.displacements_at(field, points.reshape(-1, 3)).reshape(points.shape)


@pytest.mark.parametrize("form", ["segmentation", "structures"])
def test_others_read_what_is_carried(form: str, tmp_path: Path) -> None:
    grid = SOURCES[1].grid
    drawn = (
        segmentation(SOURCES[1].datasets, {"one": ball(grid, CENTER_MM, RADIUS_MM)})
        if form == "segmentation"
        else structures(MOVING, {"liver": circles(grid, CENTER_MM, RADIUS_MM)})
    )
    made = carry(drawn, warning="grid error up to 0.31 mm")
    sources = [*phantoms.write_series(FIXED, tmp_path / "f"), *phantoms.write_series(MOVING, tmp_path / "m")]
    paths = [tmp_path / "drawn.dcm", tmp_path / "made.dcm"]
    for dataset, path in zip((drawn, made), paths, strict=True):
        dataset.save_as(path, enforce_file_format=True)

    assert counterparts.dciodvfy_errors(paths[1:]) <= counterparts.dciodvfy_errors(paths[:1])
    assert counterparts.dcentvfy_complaints([*sources, *paths]) == ""
    assert made.StudyInstanceUID == FIXED[0].StudyInstanceUID
    assert made.SeriesDescription.startswith("CHECK! REG ")
    assert carry(drawn).SOPInstanceUID == made.SOPInstanceUID != drawn.SOPInstanceUID


def test_what_was_drawn_on_other_images_is_told_apart() -> None:
    grid = SOURCES[1].grid
    ours = (
        segmentation(SOURCES[1].datasets, {"one": ball(grid, CENTER_MM, RADIUS_MM)}),
        structures(MOVING, {"liver": circles(grid, CENTER_MM, RADIUS_MM)}),
    )

    for dataset in ours:
        assert belongs_to(dataset, SOURCES[1])
        assert not belongs_to(dataset, SOURCES[0])
    assert not belongs_to(MOVING[0], SOURCES[1])


def test_what_cannot_be_carried_is_refused_by_name() -> None:
    grid = SOURCES[1].grid
    far = structures(MOVING, {"a": circles(grid, CENTER_MM, 10)})
    strange = structures(MOVING, {"a": circles(grid, CENTER_MM, 10)})
    strange.PatientID = "STRANGER"
    broken = structures(MOVING, {"a": circles(grid, CENTER_MM, 10)})
    broken.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2"]
    away = Registration(
        SOURCES[0].grid, translation(900, 0, 0), translation(900, 0, 0), None, make_report()
    )  # fmt: skip

    with pytest.raises(StudyError, match="no structure reaches the fixed volume"):
        carry(far, away)
    with pytest.raises(StudyError, match="of another patient"):
        carry(strange)
    with pytest.raises(StudyError, match="cannot be read"):
        carry(broken)


def test_outlines_undo_signed_distance() -> None:
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    outer, hole = (np.column_stack([20 + r * np.sin(angle), 25 + r * np.cos(angle)]) for r in (11, 4))

    distance = signed_distance([outer, hole], (40, 50), (1.0, 1.0))

    radius = np.hypot(*(np.indices((40, 50)) - np.array([20, 25])[:, None, None]))
    band = band_mm((1.0, 1.0))
    assert np.abs(distance - np.clip(np.minimum(11 - radius, radius - 4), -band, band)).max() < 0.01
    found = sorted(outlines(distance), key=len)
    assert [abs(np.hypot(*(p - [20, 25]).T) - r).max() < 0.03 for p, r in zip(found, (4, 11), strict=True)] == [
        True
    ] * 2


def test_a_shape_that_fills_the_image_and_a_saddle_are_closed() -> None:
    (whole,) = outlines(np.ones((4, 5)))
    saddles = outlines(np.array([[1.0, -1.0], [-1.0, 1.0]])), outlines(np.array([[1.0, -0.5], [-0.5, 1.0]]))

    assert (whole.min(), *whole.max(axis=0)) == (-0.5, 3.5, 4.5)
    assert [len(each) for each in saddles] == [2, 1]

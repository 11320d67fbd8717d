from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import phantoms
import pytest
from hand_made import make_objects, make_registration, make_report, translation
from pydicom import Dataset
from pydicom.uid import UID

from dicomnode import volumes
from dicomnode.errors import StudyError
from dicomnode.objects import SampledField, sample_grid
from dicomnode.objects.texts import described
from registration_engine import Registration

SMALL = (6, 16, 20)


def shift(grid: Any, x: float, y: float, z: float) -> Registration:
    return Registration(grid, translation(x, y, z), translation(x, y, z), None, make_report())


def series_of(
    fixed: list[Any], moving: list[Any], registration: Registration | None = None, **changes: Any
) -> list[Any]:
    made = make_objects(fixed, moving, registration, **{"outputs": ["dsr", "series"], **changes})
    return [dataset for kind, dataset in made if kind == "series"]


def stored(series: list[Dataset]) -> npt.NDArray[np.int64]:
    """(slices, rows, columns) along the normal, stored values."""
    ordered = sorted(series, key=lambda d: d.InstanceNumber)
    return np.array([dataset.pixel_array for dataset in ordered], dtype=np.int64)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_moving_body_lies_on_the_fixed_one(modality: str) -> None:
    fixed = phantoms.make_series(modality=modality)
    moving = phantoms.make_series(modality=modality, shift_mm=(8, -4, 5))  # whole voxels, so nothing is interpolated

    made = stored(series_of(fixed, moving, shift(volumes.load(fixed).grid, 8, -4, 5)))

    offset = 1024 if modality == "CT" else 0
    inner = np.s_[:-1, 1:, :-2]
    assert np.abs(made[inner] - (stored(fixed)[inner] - offset)).max() < 50  # both series' noise only
    wrong = stored(series_of(fixed, moving, shift(volumes.load(fixed).grid, -8, 4, -5)))
    assert np.abs(wrong[inner] - (stored(fixed)[inner] - offset)).max() > 200


def test_each_instance_has_the_geometry_of_its_fixed_slice() -> None:
    fixed, moving = phantoms.make_pair(oblique=True, same_study=False)
    moving_grid = phantoms.make_series(phase="arterial", shape=(9, 20, 30), spacing_mm=(9, 7, 6), study="later study")

    made = series_of(fixed, moving_grid)

    by_position = {str(d.ImagePositionPatient): d for d in fixed}
    assert len(made) == 20
    for dataset in made:
        slice_of_fixed = by_position[str(dataset.ImagePositionPatient)]
        for keyword in ("ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "SliceThickness"):
            assert dataset[keyword].value == slice_of_fixed[keyword].value
        assert dataset.FrameOfReferenceUID == fixed[0].FrameOfReferenceUID != moving[0].FrameOfReferenceUID
        assert dataset.InstanceNumber == slice_of_fixed.InstanceNumber  # the phantom numbers along the normal
        assert dataset.ReferencedImageSequence[0].ReferencedSOPInstanceUID == slice_of_fixed.SOPInstanceUID


def test_what_was_acquired_is_the_moving_series() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL)

    for made in series_of(fixed, moving):
        assert made.SOPClassUID == moving[0].SOPClassUID
        assert (made.ContrastBolusAgent, made.KVP, made.ConvolutionKernel) == ("Iomeprol", 120, "B30f")
        assert (made.AcquisitionTime, made.Manufacturer) == ("093030", "Phantom Works")
        assert (made.WindowCenter, made.WindowWidth) == (50, 400)
        assert made.SeriesDescription == "REG Abdomen arterial to Abdomen native"
        assert made.SeriesNumber == 1003
        assert made.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
        assert [c.CodeValue for c in made.DerivationCodeSequence] == ["113085", "125027"]
        assert made.ReferencedInstanceSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue == "125028"
        assert (made.BurnedInAnnotation, made.LossyImageCompression) == ("NO", "00")


def test_a_linear_registration_is_not_called_deformed() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL)

    made = series_of(fixed, moving, make_registration(volumes.load(fixed).grid, bump_mm=None))

    assert [c.CodeValue for c in made[0].DerivationCodeSequence] == ["113085"]


def test_what_describes_the_moving_grid_or_study_stays_behind() -> None:
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = "1.2", "1.2.3"
    dropped = {
        "GantryDetectorTilt": 3,
        "ReconstructionDiameter": 400,
        "SliceLocation": 12,
        "SmallestImagePixelValue": 0,
        "PixelPaddingValue": -1024,
        "IconImageSequence": [image],
        "RequestAttributesSequence": [image],
        "ReferencedPerformedProcedureStepSequence": [image],
        "PerformedProcedureStepID": "P",
        "SynchronizationFrameOfReferenceUID": "1.2.3",
        "TemporalPositionIndex": 1,
        "RealWorldValueMappingSequence": [image],
        "ReferencedImageSequence": [image],
    }
    fixed = phantoms.make_series(shape=SMALL)
    moving = phantoms.make_series(phase="arterial", shape=SMALL, header=dropped)
    for dataset in moving:
        dataset.private_block(0x0019, "PHANTOM", create=True).add_new(1, "LO", "x")

    for made in series_of(fixed, moving):
        kept = {"ReferencedImageSequence"} | set(dropped).difference(made.dir())
        assert kept == set(dropped)
        assert not [element for element in made.iterall() if element.tag.is_private]
        assert made.ReferencedImageSequence[0].ReferencedSOPInstanceUID != "1.2.3"


def test_only_the_contributing_moving_slices_are_source_images() -> None:
    fixed, moving = phantoms.make_pair()

    made = series_of(fixed, moving, shift(volumes.load(fixed).grid, 0, 0, 12))  # 2.4 slices of 5 mm

    for dataset in made:
        sources = {item.ReferencedSOPInstanceUID for item in dataset.get("SourceImageSequence") or []}
        z = dataset.ImagePositionPatient[2] + 12
        near = {d.SOPInstanceUID for d in moving if abs(d.ImagePositionPatient[2] - z) < 5}
        if max(d.ImagePositionPatient[2] for d in moving) + 2.5 >= z:
            assert sources == near
        else:
            assert sources == set()
    items = made[10].SourceImageSequence
    assert {i.SpatialLocationsPreserved for i in items} == {"NO"}
    assert {i.PurposeOfReferenceCodeSequence[0].CodeValue for i in items} == {"121322"}


def test_outside_the_moving_image_ct_is_air_and_mr_is_zero() -> None:
    for modality, expected in (("CT", -1024), ("MR", 0)):
        fixed, moving = phantoms.make_pair(shape=SMALL, modality=modality)

        made = stored(series_of(fixed, moving, shift(volumes.load(fixed).grid, 1000, 0, 0)))

        assert np.unique(made).tolist() == [expected]


def test_ct_is_stored_as_whole_signed_hounsfield_units() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL)
    for dataset in moving:
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -512

    made = series_of(fixed, moving, shift(volumes.load(fixed).grid, 0, 0, 0))

    first = made[0]
    assert (first.RescaleSlope, first.RescaleIntercept, first.RescaleType) == (1, 0, "HU")
    assert (first.BitsAllocated, first.BitsStored, first.HighBit, first.PixelRepresentation) == (16, 16, 15, 1)
    assert np.array_equal(stored(made), np.rint(stored(moving) * 0.5 - 512))


@pytest.mark.parametrize("rescale", [None, (2.5, -10.0)])
def test_mr_keeps_the_stored_scale_of_the_moving_series(rescale: tuple[float, float] | None) -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, modality="MR")
    for dataset in moving if rescale else []:
        dataset.RescaleSlope, dataset.RescaleIntercept = rescale

    made = series_of(fixed, moving, shift(volumes.load(fixed).grid, 0, 0, 0))

    assert (made[0].BitsStored, made[0].HighBit, made[0].PixelRepresentation) == (12, 11, 0)
    assert (made[0].get("RescaleSlope"), made[0].get("RescaleIntercept")) == (rescale or (None, None))
    assert np.array_equal(stored(made), stored(moving))


def test_rescale_that_varies_by_slice_becomes_one_scale_that_holds_every_value() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, modality="MR")
    for k, dataset in enumerate(moving):
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + k / 7, 0
    expected = volumes.load(moving).voxels[::-1]

    made = series_of(fixed, moving, shift(volumes.load(fixed).grid, 0, 0, 0))

    (slope,) = {float(dataset.RescaleSlope) for dataset in made}
    assert {float(dataset.RescaleIntercept) for dataset in made} == {0.0}
    assert np.abs(stored(made) * slope - expected).max() <= slope * 0.51
    assert stored(made).max() >= 65534


def test_values_beyond_the_stored_range_are_clipped_not_wrapped() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL)
    for dataset in moving:
        dataset.RescaleSlope = 100

    made = stored(series_of(fixed, moving, shift(volumes.load(fixed).grid, 0, 0, 0)))

    assert made.max() == 32767
    assert made.min() >= -1024


def test_once_lossy_always_lossy() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL)
    for dataset in moving[2:]:
        dataset.LossyImageCompression = "01"
        dataset.LossyImageCompressionRatio, dataset.LossyImageCompressionMethod = [4, 7], ["ISO_10918_1", "ISO_14495_1"]

    for made in series_of(fixed, moving):
        assert made.LossyImageCompression == "01"
        assert (list(made.LossyImageCompressionRatio), len(made.LossyImageCompressionMethod)) == ([4, 7], 2)


def test_malformed_values_of_the_source_are_carried_over(recwarn: pytest.WarningsRecorder) -> None:
    bad = UID("2.16.578.1.5056857de2.145", validation_mode=0)
    fixed, moving = phantoms.make_pair(shape=SMALL)
    for dataset in moving:
        dataset._dict[0x0020000E].__dict__["_value"] = bad

    made = series_of(fixed, moving)

    assert made[0].RelatedSeriesSequence[0].SeriesInstanceUID == bad
    assert not list(recwarn)


def test_the_series_is_made_with_the_very_field_that_is_delivered() -> None:
    fixed, moving = phantoms.make_pair()
    registration = make_registration(volumes.load(fixed).grid)
    coarse = sample_grid(registration, tolerance_mm=100, spacing_mm=32)

    with_coarse = stored(series_of(fixed, moving, registration, sampled=coarse))

    linear = shift(volumes.load(fixed).grid, 0, 0, 0)  # the map that the field does not hold plays no part
    again = stored(series_of(fixed, moving, linear, sampled=SampledField(coarse.field, 0.0)))
    assert np.array_equal(with_coarse, again)


def test_the_label_is_the_rules_own_text() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL)

    made = make_objects(fixed, moving, description="computed: {moving} on {fixed}")

    assert {dataset.SeriesDescription for _, dataset in made} == {"computed: Abdomen arterial on Abdomen native"}
    for dataset in (d for kind, d in made if kind == "series"):
        assert dataset.DerivationDescription.startswith("computed: Abdomen arterial on Abdomen native: resampled once")


@pytest.mark.parametrize("pattern", ["REG {moving} to {fixed}", "{fixed} {moving} {fixed} computed", "x" * 64])
def test_a_label_is_cut_to_what_a_long_string_holds(pattern: str) -> None:
    label = described(pattern, "M" * 50, "F" * 50)

    assert len(label) <= 64
    assert {"M", "F"} <= set(label) or "{" not in pattern
    assert label.endswith("computed") or "computed" not in pattern


def test_names_are_never_read_as_patterns() -> None:
    assert described("REG {moving} to {fixed}", "{fixed}", "{moving}") == "REG {fixed} to {moving}"


def test_with_the_moving_voxel_size_the_series_fills_the_fixed_box() -> None:
    fixed = phantoms.make_series(shape=(8, 20, 24), spacing_mm=(10, 8, 8), oblique=True)
    moving = phantoms.make_series(phase="arterial", shape=(9, 30, 31), spacing_mm=(7, 3, 2.5))

    made = series_of(fixed, moving, shift(volumes.load(fixed).grid, 8, -3, 2), resolution="moving")

    grid = volumes.load(made).grid
    ours, box = (np.array(g.shape) * g.spacing_mm for g in (grid, volumes.load(fixed).grid))
    assert np.allclose(grid.spacing_mm, (7, 3, 2.5))
    assert ((ours >= box - 1e-6) & (ours < box + grid.spacing_mm)).all()
    assert np.allclose(np.array(made[0].ImageOrientationPatient), np.array(fixed[0].ImageOrientationPatient), atol=1e-6)
    middle = [volumes.load(s).grid.points_mm((np.array(volumes.load(s).grid.shape) - 1) / 2) for s in (made, fixed)]
    assert np.allclose(*middle, atol=1e-3)
    assert {d.FrameOfReferenceUID for d in made} == {fixed[0].FrameOfReferenceUID}
    assert all(d.ReferencedImageSequence[0].ReferencedSOPInstanceUID in {f.SOPInstanceUID for f in fixed} for d in made)


def test_a_voxel_size_that_would_need_a_giant_series_is_refused() -> None:
    fixed = phantoms.make_series(shape=(8, 20, 24), spacing_mm=(100, 80, 80))
    moving = phantoms.make_series(phase="arterial", shape=(9, 30, 31), spacing_mm=(0.1, 0.1, 0.1))

    with pytest.raises(StudyError, match="8000 × 16000 × 19200 voxels"):
        series_of(fixed, moving, shift(volumes.load(fixed).grid, 8, -3, 2), resolution="moving")


def test_the_window_is_that_of_the_middle_of_the_moving_series() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, modality="MR")
    for number, dataset in enumerate(moving):
        dataset.WindowCenter, dataset.WindowWidth = 100 + number, 200 + number

    made = series_of(fixed, moving)

    assert {(float(d.WindowCenter), float(d.WindowWidth)) for d in made} <= {(102, 202), (103, 203)}
    assert len({float(d.WindowCenter) for d in made}) == 1


def test_pet_keeps_its_unit_and_has_one_slope_that_holds_every_value() -> None:
    fixed, moving = phantoms.make_pair(shape=SMALL, modality="PT")

    made = series_of(fixed, moving, shift(volumes.load(fixed).grid, 0, 0, 0))

    assert np.abs(volumes.load(made).voxels - volumes.load(moving).voxels).max() <= float(made[0].RescaleSlope)
    assert {(d.Units, float(d.RescaleIntercept), "RescaleType" in d) for d in made} == {("BQML", 0.0, False)}
    assert len({float(d.RescaleSlope) for d in made}) == 1
    assert sorted(d.ImageIndex for d in made) == list(range(1, 7))
    assert {d.NumberOfSlices for d in made} == {6}


@pytest.mark.parametrize("position", ["HFS", "FFP", "HFDL"])
def test_how_the_patient_lay_is_said_as_the_modality_says_it(position: str) -> None:
    ct = phantoms.make_series(shape=SMALL, position=position)
    pet = phantoms.make_series(shape=SMALL, modality="PT", header={"PatientPosition": None})
    linear = shift(volumes.load(ct).grid, 0, 0, 0)

    (on_ct, *_) = series_of(ct, pet, linear)
    (on_pet, *_) = series_of(pet, ct, shift(volumes.load(pet).grid, 0, 0, 0))

    assert "PatientPosition" not in on_ct
    orientation = on_ct.PatientOrientationCodeSequence[0]
    said = (
        on_ct.PatientGantryRelationshipCodeSequence[0].CodeMeaning,
        orientation.PatientOrientationModifierCodeSequence[0].CodeMeaning,
    )
    assert said == {
        "HFS": ("headfirst", "supine"), "FFP": ("feet-first", "prone"), "HFDL": ("headfirst", "left lateral decubitus"),
    }[position]  # fmt: skip
    assert on_pet.PatientPosition == "HFS"
    assert "PatientOrientationCodeSequence" not in on_pet

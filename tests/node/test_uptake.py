"""Uptake curves of a dynamic series: which regions are chosen, what is measured there, and how it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import counterparts
import highdicom
import numpy as np
import phantoms
import pytest
from hand_made import make_provenance, make_source
from pydicom import Dataset, dcmread

from dicomnode import objects, volumes
from dicomnode.objects.uptake_objects import units_of
from dicomnode.uptake import EDGE_MM, Moment, Uptake, measure_uptake
from registration_engine import DisplacementField, Grid, Volume

SHAPE, SPACING_MM = (24, 40, 48), (5.0, 4.0, 4.0)
AFFINE = np.array([[0, 0, 4.0, 0], [0, 4.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1.0]])
GRID = Grid(SHAPE, AFFINE)
SHIFT_MM = 16.0
VESSEL, KIDNEY = ((8, 14), (20, 26), (8, 14)), ((8, 14), (18, 26), (32, 40))
CURVES = {"vessel": (0.0, 400.0, 200.0, 150.0), "kidney": (0.0, 100.0, 180.0, 220.0)}
SECONDS = (0.0, 20.0, 60.0, 180.0)


def phase(number: int, *, shifted: bool) -> Volume:
    """A body of 300 in air with a vessel and a kidney that take up; shifted, it lies 16 mm to the left."""
    voxels = np.zeros(SHAPE, np.float32)
    voxels[2:-2, 4:-4, 4:-8] = 300
    for name, ((z, zz), (y, yy), (x, xx)) in (("vessel", VESSEL), ("kidney", KIDNEY)):
        voxels[z:zz, y:yy, x:xx] += CURVES[name][number]
    return Volume(np.roll(voxels, 4, axis=2) if shifted else voxels, GRID)


def moment(number: int) -> Moment:
    """Every second phase is shifted, and its field says so."""
    shifted = number % 2 == 1
    vectors = np.zeros((*SHAPE, 3), np.float32)
    vectors[..., 0] = SHIFT_MM
    field = DisplacementField(vectors, GRID) if shifted else None
    return Moment(phase(number, shifted=shifted), is_registered=True, field=field)


@pytest.fixture(scope="module")
def measured() -> Uptake:
    found = measure_uptake(phase(0, shifted=False), 4, moment, seconds=SECONDS)
    assert found is not None
    return found


def test_the_regions_are_the_body_the_strongest_uptake_and_the_one_least_like_it(measured: Uptake) -> None:
    whole, first, second, *others = measured.regions

    assert (whole.name, first.name, second.name) == ("Body", "Region 1", "Region 2")
    for region, ((z, zz), (y, yy), (x, xx)) in ((first, VESSEL), (second, KIDNEY)):
        inside = np.zeros(SHAPE, bool)
        inside[z:zz, y:yy, x:xx] = True
        assert not (region.mask & ~inside).any()
        assert region.mask[region.center]
    edges = [len(set(axis)) for axis in np.nonzero(first.mask)]
    assert edges == [3, 3, 3]  # of 5, 4 and 4 mm: about 15 mm
    assert max(abs(n * mm - EDGE_MM) for n, mm in zip(edges, SPACING_MM, strict=True)) <= 4
    assert not any((each.mask & ~whole.mask).any() for each in (first, second))
    assert others == []  # what is left takes up like these two, or not at all


def test_registered_curves_are_the_true_ones_and_those_before_are_not(measured: Uptake) -> None:
    for row, name in ((1, "vessel"), (2, "kidney")):
        true = 300 + np.array(CURVES[name])
        assert measured.after[row] == pytest.approx(true, abs=0.5)
        assert measured.before[row, ::2] == pytest.approx(true[::2])
    assert measured.before[1, 1] == pytest.approx(300)  # the vessel lay elsewhere
    inside = measured.regions[0].mask
    assert measured.after[0, 0] == pytest.approx(phase(0, shifted=False).voxels[inside].mean())


def test_a_phase_that_was_not_accepted_has_no_registered_value_and_chooses_no_region() -> None:
    def but_one(number: int) -> Moment:
        at = moment(number)
        return Moment(at.image, is_registered=False) if number == 1 else at

    found = measure_uptake(phase(0, shifted=False), 4, but_one)

    assert found is not None
    assert np.isnan(found.after[:, 1]).all()
    assert np.isfinite(found.before).all()
    assert np.isfinite(np.delete(found.after, 1, axis=1)).all()
    assert found.after[1].tolist() == pytest.approx([300, np.nan, 480, 520], nan_ok=True)  # now the kidney


def test_a_body_that_no_other_phase_reaches_has_no_curves() -> None:
    affine = AFFINE.copy()
    affine[:3, 3] = 5000

    def far(number: int) -> Moment:
        image = phase(number, shifted=False)
        return Moment(Volume(image.voxels, Grid(SHAPE, affine)) if number else image, is_registered=True)

    assert measure_uptake(phase(0, shifted=False), 2, far) is None


def dynamic(modality: str, one_series: bool) -> list[list[Any]]:
    """Headers of four phases on GRID's shape, 20, 60 and 180 s after the first."""
    found = []
    for n, seconds in enumerate(SECONDS):
        series = phantoms.make_series(modality=modality, shape=SHAPE, spacing_mm=SPACING_MM, seed=n)
        uid = phantoms.make_uid("dynamic", 0 if one_series else n)
        for k, dataset in enumerate(series):
            dataset.SeriesInstanceUID = uid
            dataset.SOPInstanceUID = phantoms.make_uid("dynamic", n, k)
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.AcquisitionDate = "20250102"
            dataset.AcquisitionTime = f"10{int(seconds) // 60:02}{int(seconds) % 60:02}"
            dataset.InstanceNumber = n * SHAPE[0] + k + 1
            dataset.SeriesNumber = 4 if one_series else 4 + n
        found.append(series)
    return found


def made(phases: list[list[Any]], uptake: Uptake, **changes: Any) -> dict[str, Dataset]:
    first, *others = (make_source(series) for series in phases)
    built = objects.uptake_objects(first, others, uptake, provenance=make_provenance(), **changes)
    return {dataset.Modality: dataset for kind, dataset in built if kind == "uptake"}


@pytest.mark.parametrize(("modality", "one_series"), [("MR", True), ("CT", False), ("PT", False)])
def test_validators_find_nothing_and_highdicom_reads_regions_times_and_means(
    tmp_path: Path, measured: Uptake, modality: str, one_series: bool
) -> None:
    phases = dynamic(modality, one_series)
    sources = [path for n, each in enumerate(phases) for path in phantoms.write_series(each, tmp_path / str(n))]

    found = made(phases, measured)

    paths = {name: tmp_path / f"{name}.dcm" for name in found}
    for name, dataset in found.items():
        dataset.save_as(paths[name], enforce_file_format=True)
    assert set(paths) == {"SEG", "SR", "OT"}
    assert counterparts.dciodvfy_errors(paths.values()) <= counterparts.dciodvfy_errors(sources)
    assert counterparts.dcentvfy_complaints([*sources, *paths.values()]) == ""
    segmentation = highdicom.seg.segread(paths["SEG"])
    for number, region in enumerate(measured.regions, start=1):
        read = segmentation.get_volume(segment_numbers=[number])
        theirs = np.zeros(SHAPE, bool)
        index = np.argwhere(read.array[..., 0] > 0) @ read.affine[:3, :3].T + read.affine[:3, 3]
        at = np.rint(GRID.indices(index)).astype(int)
        theirs[tuple(at.T)] = True
        assert np.array_equal(theirs, region.mask)
    groups = highdicom.sr.srread(paths["SR"]).content.get_volumetric_roi_measurement_groups()
    assert len(groups) == len(measured.regions) * len(SECONDS)
    assert len({group.tracking_uid for group in groups}) == len(measured.regions)
    for n, group in enumerate(groups):
        row, column = divmod(n, len(SECONDS))
        segment = group.referenced_segment
        assert segment.referenced_sop_instance_uid == found["SEG"].SOPInstanceUID
        assert segment.referenced_segment_numbers == [row + 1]
        means = [each for each in group.get_measurements() if each.derivation is not None]  # else TID 1502's numbers
        told = {each.method.meaning: float(each.value) for each in means}
        assert told == pytest.approx(
            {"Before registration": measured.before[row, column], "After registration": measured.after[row, column]}
        )
        words = {item.name.meaning: item for item in group[0].ContentSequence}
        assert words["Time Point"].value == f"Phase {column + 1}"
        assert float(words["Longitudinal Temporal Offset from Event"].value) == SECONDS[column]
    page = dcmread(paths["OT"])
    assert page.pixel_array.shape == (1024, 1280, 3)
    assert len(np.unique(page.pixel_array.reshape(-1, 3), axis=0)) > 20


def test_times_come_from_the_headers_or_not_at_all() -> None:
    phases = dynamic("MR", one_series=True)

    assert volumes.seconds_of(phases) == SECONDS
    for series in phases:
        for dataset in series:
            for keyword in ("AcquisitionDate", "AcquisitionTime", "ContentTime"):
                dataset.pop(keyword, None)
    assert volumes.seconds_of(phases) == ()


def test_a_warning_marks_all_and_other_inputs_give_other_uids(measured: Uptake) -> None:
    phases = dynamic("MR", one_series=True)

    first, again = (made(phases, measured) for _ in range(2))
    warned, others = made(phases, measured, warning="1 of 3 phases was rejected"), made(phases[:3], measured)

    assert first == again
    assert all(each.SeriesDescription.startswith("CHECK! UPTAKE") for each in warned.values())
    assert not {each.SOPInstanceUID for each in first.values()} & {each.SOPInstanceUID for each in others.values()}


def test_units_are_those_of_the_values() -> None:
    pet, counts = Dataset(), Dataset()
    pet.Modality, pet.Units = "PT", "BQML"
    counts.Modality, counts.Units = "PT", "PROPCNT"

    assert [units_of(each).value for each in (pet, counts)] == ["Bq/ml", "1"]

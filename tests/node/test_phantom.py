"""The generated study: its truth is exact, its series are valid CT, and the same seed makes the same bytes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from dicomnode import anatomy, phantom
from dicomnode.phantom import PhantomStudy, true_displacement, write_study

SMALL = (32, 96, 96)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> PhantomStudy:
    return write_study(tmp_path_factory.mktemp("phantom"), 3, shape=SMALL)


def test_the_motion_never_folds_nor_tears() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (20_000, 3)) * np.array(phantom.FIELD_OF_VIEW_MM[::-1]) / 2
    step = 0.05

    columns = [
        (true_displacement(points + step * axis) - true_displacement(points - step * axis)) / (2 * step)
        for axis in np.eye(3)
    ]
    determinants = np.linalg.det(np.stack(columns, axis=-1) + np.eye(3))

    assert determinants.min() > 0.5
    assert determinants.max() < 1.6


def test_the_dome_of_the_liver_moves_by_centimetres_and_the_spine_and_the_flanks_do_not() -> None:
    dome, spine, flank = (true_displacement(np.array(p, float)) for p in ((-60, 0, 70), (0, 70, 40), (-150, 0, 40)))

    assert -25 < dome[2] < -15
    assert np.linalg.norm(spine) < 0.01
    assert np.linalg.norm(flank) < 2


def test_fixed_positions_are_the_inverse_of_the_motion() -> None:
    points = np.random.default_rng(1).uniform(-120, 120, (500, 3))

    fixed = phantom.fixed_positions(points)

    assert np.abs(fixed + true_displacement(fixed) - points).max() < 1e-3


@pytest.mark.parametrize("seed", [1, 2])
def test_at_least_300_landmarks_start_more_than_6_mm_apart(seed: int) -> None:
    points = phantom.landmarks(anatomy.build(seed), seed)

    assert len(points) >= 300
    assert np.linalg.norm(true_displacement(points), axis=1).mean() > 6


def test_a_voxel_of_the_fixed_phase_is_the_body_at_the_displaced_place() -> None:
    body = anatomy.build(3)
    spacing = np.divide(phantom.FIELD_OF_VIEW_MM, SMALL)
    index = np.random.default_rng(2).integers(0, SMALL, (3000, 3))
    points = ((index - (np.array(SMALL) - 1) / 2) * spacing)[:, ::-1]
    material = np.moveaxis((points + true_displacement(points)).astype(np.float32), -1, 0)

    drawn = phantom.draw(body, contrast=False, shape=SMALL)[tuple(index.T)]
    expected = body.hounsfield(*material, contrast=False, edge_mm=float(spacing.mean()))

    # float32 coordinates may differ in the last place, which shows only at bone edges
    assert np.quantile(np.abs(drawn - expected), 0.999) < 0.5
    assert np.abs(drawn - expected).max() < 5


def test_contrast_enhances_liver_kidney_and_vessels_and_leaves_fat_and_lung_alone() -> None:
    body = anatomy.build(3)
    places = {
        "liver": (-90, 20, -20),
        "kidney": (84, 41, -44),
        "aorta": (11, 30, -20),
        "fat": (0, -95, -60),
        "lung": (-95, 0, 120),
    }
    where = np.array(list(places.values()), np.float32).T

    native, portal = (body.hounsfield(*where, contrast=contrast, edge_mm=1) for contrast in (False, True))
    gain = dict(zip(places, portal - native, strict=True))

    assert 45 < gain["liver"] < 65
    assert gain["kidney"] > 120
    assert gain["aorta"] > 90
    assert abs(gain["fat"]) < 8
    assert abs(gain["lung"]) < 8


def test_the_same_seed_makes_the_same_bytes_and_another_seed_another_study(tmp_path: Path, study: PhantomStudy) -> None:
    again = write_study(tmp_path / "again", 3, shape=SMALL)
    other = write_study(tmp_path / "other", 4, shape=SMALL)

    assert [p.read_bytes() for p in again.moving_files] == [p.read_bytes() for p in study.moving_files]
    assert other.study_instance_uid != study.study_instance_uid
    assert other.fixed_files[16].read_bytes() != study.fixed_files[16].read_bytes()


def test_both_series_share_study_and_frame_of_reference_and_only_the_second_has_contrast(study: PhantomStudy) -> None:
    native, portal = ([dcmread(p) for p in files] for files in (study.fixed_files, study.moving_files))

    assert len(native) == len(portal) == SMALL[0]
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({ds[keyword].value for ds in native + portal}) == 1
    assert len({ds.SOPInstanceUID for ds in native + portal}) == 2 * SMALL[0]
    assert {ds.SeriesInstanceUID for ds in native} == {study.fixed_series_instance_uid}
    assert {ds.SeriesInstanceUID for ds in portal} == {study.moving_series_instance_uid}
    assert not any("ContrastBolusAgent" in ds for ds in native)
    assert all(ds.ContrastBolusAgent for ds in portal)
    assert np.diff([ds.ImagePositionPatient[2] for ds in native]) == pytest.approx(np.full(SMALL[0] - 1, 9.0))


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian: dicom3tools) is not installed")
@pytest.mark.parametrize("pick", [lambda s: s.fixed_files[0], lambda s: s.moving_files[-1]], ids=["native", "portal"])
def test_dciodvfy_finds_no_error(study: PhantomStudy, pick: Callable[[PhantomStudy], Path]) -> None:
    said = subprocess.run(
        ["dciodvfy", "-new", str(pick(study))], capture_output=True, text=True, timeout=60, check=False
    )

    assert [line for line in said.stderr.splitlines() if line.startswith("Error")] == []
    assert "CTImage" in said.stderr

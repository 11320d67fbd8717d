"""Our objects as others read them. One set of objects per case, made once, read by every counterpart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import counterparts
import numpy as np
import phantoms
import pytest
import SimpleITK
from hand_made import make_objects, make_registration, make_source, rotation, translation
from pydicom import Dataset, dcmread

from dicomnode import volumes
from dicomnode.objects import SampledField, sample_grid
from dicomnode.objects.deformable import interpolate
from registration_engine import Registration

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"

CASES = {
    "CT, one study, one Frame of Reference": {},
    "CT, one study, two Frames of Reference": {"frame_of_reference": "second"},
    "CT, two studies, oblique": {"same_study": False, "oblique": True},
    "MR, two studies": {"same_study": False, "modality": "MR"},
    "MR, one study, oblique": {"modality": "MR", "oblique": True},
}
SIEMENS = "MR, real, two positions"


@dataclass(frozen=True)
class Delivered:
    folder: Path
    fixed: list[Path]
    moving: list[Path]
    made: dict[str, list[Path]]
    registration: Registration
    sampled: SampledField

    def one(self, kind: str) -> Dataset:
        return dcmread(self.made[kind][0])

    @property
    def objects(self) -> list[Path]:
        return [path for paths in self.made.values() for path in paths]

    @property
    def outside(self) -> float:
        return -1024.0 if dcmread(self.moving[0]).Modality == "CT" else 0.0


@pytest.fixture(
    scope="module", params=[*CASES, pytest.param(SIEMENS, marks=pytest.mark.data)], ids=lambda p: p.replace(", ", "-")
)
def delivered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    folder = tmp_path_factory.mktemp("delivered")
    if request.param == SIEMENS:
        source = DATA / "siemens-mr-two-positions"
        if not source.is_dir():
            pytest.skip("the real images are not there: shared/data/dicom/siemens-mr-two-positions")
        fixed, moving = (sorted((source / name).glob("*.dcm")) for name in ("HFS_t1", "HFDL_t1"))
    else:
        case = dict(CASES[request.param])
        second = case.pop("frame_of_reference", None)
        pair = phantoms.make_pair(**case)
        for dataset in pair[1] if second else []:
            dataset.FrameOfReferenceUID = phantoms.make_uid(second)
        fixed, moving = (phantoms.write_series(s, folder / name) for s, name in zip(pair, ("f", "m"), strict=True))
    return deliver(folder, fixed, moving)


def deliver(folder: Path, fixed: list[Path], moving: list[Path]) -> Delivered:
    registration = make_registration(make_source(volumes.read_headers(fixed)).grid)
    sampled = sample_grid(registration)
    made: dict[str, list[Path]] = {}
    (folder / "series").mkdir()
    for n, (kind, dataset) in enumerate(
        make_objects(volumes.read(fixed), volumes.read(moving), registration, sampled=sampled)
    ):
        path = folder / ("series" if kind == "series" else "") / f"{kind}{n}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        made.setdefault(kind, []).append(path)
    return Delivered(folder, fixed, moving, made, registration, sampled)


def test_dciodvfy_finds_no_error_that_the_sources_have_not(delivered: Delivered) -> None:
    theirs = counterparts.dciodvfy_errors([*delivered.fixed[:3], *delivered.moving[:3]])

    assert counterparts.dciodvfy_errors(delivered.objects) <= theirs


def test_dcentvfy_is_silent_over_sources_and_objects(delivered: Delivered) -> None:
    assert counterparts.dcentvfy_complaints([*delivered.fixed, *delivered.moving, *delivered.objects]) == ""


def test_pydicomrt_decodes_the_field_that_is_in_memory(delivered: Delivered) -> None:
    decoded = counterparts.decoded_field(delivered.one("dsr"))

    assert decoded.grid.is_same_as(delivered.sampled.field.grid)
    assert np.abs(decoded.vectors - delivered.sampled.field.vectors).max() < 0.01


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
    fixed, moving = (paths[0].parent for paths in (delivered.fixed, delivered.moving))

    theirs = counterparts.plastimatch_matrix(delivered.registration.rigid, fixed, moving, tmp_path)

    ours = counterparts.decoded_matrix(delivered.one("sro"), dcmread(delivered.moving[0]))
    assert np.abs(theirs - ours).max() < 1e-5


def test_simpleitk_makes_the_same_series_of_the_original_and_the_decoded_field(delivered: Delivered) -> None:
    field = counterparts.decoded_field(delivered.one("dsr"))

    theirs = counterparts.resampled(delivered.moving, field, delivered.fixed, outside=delivered.outside)

    ours = counterparts.read_series(delivered.made["series"])
    assert np.allclose(ours.GetOrigin(), theirs.GetOrigin(), atol=1e-3)
    difference = np.abs(SimpleITK.GetArrayViewFromImage(ours) - SimpleITK.GetArrayViewFromImage(theirs))
    assert (difference <= 1).mean() >= 0.999
    assert np.ptp(SimpleITK.GetArrayViewFromImage(ours)) > 200


def test_dcm2niix_gives_the_registered_series_the_fixed_geometry(delivered: Delivered, tmp_path: Path) -> None:
    ours = counterparts.nifti_by_dcm2niix(delivered.folder / "series", tmp_path / "ours")
    fixed = counterparts.nifti_by_dcm2niix(delivered.fixed[0].parent, tmp_path / "fixed")

    assert ours.GetSize() == fixed.GetSize()
    for of_ours, of_fixed in (
        (ours.GetOrigin(), fixed.GetOrigin()),
        (ours.GetSpacing(), fixed.GetSpacing()),
        (ours.GetDirection(), fixed.GetDirection()),
    ):
        assert np.allclose(of_ours, of_fixed, atol=1e-3)


def test_the_phantom_is_no_friend_of_the_wrong_direction() -> None:
    """The hand-made map, taken for its inverse, misses by more than 5 mm at every corner: the canary can sing."""
    there = rotation(3, -2, 5) @ translation(8, -3, 2)
    back = np.linalg.inv(there)
    corners = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-60, 60) for z in (-40, 40)], dtype=float)

    assert np.linalg.norm(corners @ (there - back).T, axis=1).min() > 5

"""Real input through real counterparts: two Siemens series by DCMTK's storescu, results in Debian's Orthanc.

One patient, the same head supine and on its side, two studies and two Frames of Reference.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import counterparts
import numpy as np
import orthanc
import pytest
import SimpleITK
from orthanc import Orthanc
from pydicom import Dataset, dcmread
from running_node import RunningNode, wait_for

from dicomnode import volumes
from registration_engine import DisplacementField, Registration, register

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom" / "siemens-mr-two-positions"
FIXED, MOVING = DATA / "HFS_t1", DATA / "HFDL_t1"

RULES = """
version: 1
rules:
  - id: positions
    when: {Modality: MR}
    roles: {fixed: {match: {PatientPosition: HFS}}, moving: {match: {PatientPosition: HFDL}}}
    pair: {same: [PatientID]}
    register: {preset: balanced}
    outputs: [series, sro, dsr]
"""

pytestmark = [
    pytest.mark.data,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not DATA.is_dir(), reason="the real images of ../shared/data are not here"),
    pytest.mark.skipif(orthanc.EXECUTABLE is None, reason="Orthanc is not installed (Debian package orthanc)"),
    pytest.mark.skipif(shutil.which("storescu") is None, reason="storescu is not installed (Debian package dcmtk)"),
]


@dataclass(frozen=True)
class Outcome:
    """What came back, as Orthanc holds it, and the same registration by the engine alone."""

    series: list[Path]
    sro: Path
    dsr: Path
    report: dict[str, float]
    registration: Registration

    @property
    def field(self) -> DisplacementField:
        return counterparts.decoded_field(dcmread(self.dsr))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("light")
    pacs = Orthanc(folder / "orthanc")
    node = RunningNode(folder / "node", destinations=[("pacs", pacs.ae_title, pacs.port)], rules=RULES)
    try:
        node.start()
        for sent in (FIXED, MOVING):
            subprocess.run(["storescu", "-aec", "DICOMNODE", "+sd", "127.0.0.1", str(node.port), str(sent)], check=True)

        def delivered() -> bool:
            status = node.status()
            assert not [job for job in status["jobs"] if job["state"] in ("failed", "rejected")], status["jobs"]
            return bool(status["deliveries"]) and {each["state"] for each in status["deliveries"]} == {"delivered"}

        wait_for(delivered, timeout_s=400, what="every delivery")
        (job,) = node.status()["jobs"]
        assert (job["state"], job["verdict"]) == ("done", "accept")
        received = folder / "received"
        received.mkdir()
        paths = [pacs.download(str(each), received / f"{uid}.dcm") for uid, each in pacs.instances().items()]
        assert node.stop() == 0
        by_modality: dict[str, list[Path]] = {"MR": [], "REG": []}
        for path in paths:
            by_modality[dcmread(path, stop_before_pixels=True).Modality].append(path)
        deformable = [path for path in by_modality["REG"] if "DeformableRegistrationSequence" in dcmread(path)]
        spatial = [path for path in by_modality["REG"] if "RegistrationSequence" in dcmread(path)]
        assert (len(by_modality["MR"]), len(deformable), len(spatial)) == (35, 1, 1)
        fixed, moving = (volumes.load(volumes.read(sorted(each.glob("*.dcm")))) for each in (FIXED, MOVING))
        # the engine is deterministic: this is the registration that the worker had
        registration = register(fixed, moving, preset="balanced", device="cpu")
        yield Outcome(by_modality["MR"], spatial[0], deformable[0], job["report"], registration)
    finally:
        node.kill()
        pacs.stop()


def sources() -> list[Path]:
    return [*sorted(FIXED.glob("*.dcm")), *sorted(MOVING.glob("*.dcm"))]


def first(folder: Path) -> Dataset:
    return dcmread(min(folder.glob("*.dcm")))


def test_similarity_rises_clearly_and_nothing_folds(outcome: Outcome) -> None:
    assert outcome.report["similarity_after"] > 1.5 * outcome.report["similarity_before"]
    assert outcome.report["folding_fraction"] == 0
    jacobian = SimpleITK.DisplacementFieldJacobianDeterminant(
        counterparts.transform_of(outcome.field).GetDisplacementField()
    )
    assert SimpleITK.GetArrayViewFromImage(jacobian).min() > 0


def test_dciodvfy_finds_no_error_that_the_source_had_not(outcome: Outcome) -> None:
    found = counterparts.dciodvfy_errors([*outcome.series, outcome.sro, outcome.dsr])

    assert found <= counterparts.dciodvfy_errors(sources())


def test_dcentvfy_is_silent_over_sources_and_results(outcome: Outcome) -> None:
    of_sources = set(counterparts.dcentvfy_complaints(sources()).splitlines())
    everything = [*sources(), *outcome.series, outcome.sro, outcome.dsr]

    assert set(counterparts.dcentvfy_complaints(everything).splitlines()) <= of_sources
    assert counterparts.dcentvfy_complaints([*outcome.series, outcome.sro, outcome.dsr]) == ""


def test_the_decoded_field_is_the_engines(outcome: Outcome) -> None:
    grid = outcome.registration.grid
    random = np.random.default_rng(7)
    points = grid.points_mm(random.random((3000, 3)) * (np.array(grid.shape) - 1))

    decoded = counterparts.displacements_at(outcome.field, points)
    engine = counterparts.displacements_at(outcome.registration.total_field(), points)

    assert np.linalg.norm(decoded - engine, axis=1).max() < 0.2


def test_the_spatial_registration_is_plastimatchs(outcome: Outcome, tmp_path: Path) -> None:
    by_plastimatch = counterparts.plastimatch_matrix(outcome.registration.rigid, FIXED, MOVING, tmp_path)

    item = dcmread(outcome.sro).RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence[0]

    assert item.FrameOfReferenceTransformationMatrixType == "RIGID"
    ours = np.array(item.FrameOfReferenceTransformationMatrix, dtype=float).reshape(4, 4)
    assert np.abs(ours - by_plastimatch).max() < 1e-5
    assert np.abs(counterparts.decoded_matrix(dcmread(outcome.sro), first(MOVING)) - by_plastimatch).max() < 1e-5


def test_the_moving_dicom_through_the_decoded_field_is_the_delivered_series(outcome: Outcome) -> None:
    fixed, moving = sorted(FIXED.glob("*.dcm")), sorted(MOVING.glob("*.dcm"))

    onto = counterparts.read_series(fixed)
    expected = SimpleITK.GetArrayFromImage(counterparts.resampled(moving, outcome.field, onto, outside=0))
    delivered = SimpleITK.GetArrayFromImage(counterparts.read_series(outcome.series))

    assert expected.std() > 10
    assert (np.abs(expected - delivered) <= 1).mean() >= 0.999


def test_the_registered_series_lies_in_the_fixed_study_and_frame_of_reference(outcome: Outcome) -> None:
    for path in outcome.series:
        dataset = dcmread(path, stop_before_pixels=True)
        assert dataset.StudyInstanceUID == first(FIXED).StudyInstanceUID
        assert dataset.FrameOfReferenceUID == first(FIXED).FrameOfReferenceUID
        assert dataset.ImageType[:2] == ["DERIVED", "SECONDARY"]

"""The parts of the demonstration that can be judged alone: decoding, scoring, the stand-in PACS, the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, Sequence, dcmread

from dicomnode.demo import evaluation, processes
from dicomnode.demo.evaluation import DeliveredField, Received, decode_field
from dicomnode.demo.picture import draw_before_after
from dicomnode.demo.processes import DemoError, StandInPacs, send
from dicomnode.phantom import FIELD_OF_VIEW_MM, PhantomStudy, true_displacement, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> PhantomStudy:
    return write_study(tmp_path_factory.mktemp("phantom"), 5, shape=(32, 96, 96))


def deformable_registration(
    vectors: np.ndarray, grid: np.ndarray, resolution: tuple[float, ...], pre: np.ndarray, post: np.ndarray
) -> Dataset:
    """A data set with the attributes of PS3.3 C.20.3 that carry the map."""

    def matrix(values: np.ndarray) -> Sequence:
        item = Dataset()
        item.FrameOfReferenceTransformationMatrix = [f"{v:.10g}" for v in values.ravel()]
        return Sequence([item])

    placed = Dataset()
    placed.ImagePositionPatient = grid[:3, 3].tolist()
    placed.ImageOrientationPatient = [*grid[:3, 0], *grid[:3, 1]]
    placed.GridDimensions = list(vectors.shape[2::-1])
    placed.GridResolution = list(resolution)
    placed.VectorGridData = vectors.astype("<f4").tobytes()
    item = Dataset()
    item.DeformableRegistrationGridSequence = Sequence([placed])
    item.PreDeformationMatrixRegistrationSequence = matrix(pre)
    item.PostDeformationMatrixRegistrationSequence = matrix(post)
    dataset = Dataset()
    dataset.DeformableRegistrationSequence = Sequence([item])
    return dataset


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 3.0], [s, c, 0, -5.0], [0, 0, 1, 7.0], [0, 0, 0, 1]])


def true_field() -> DeliveredField:
    """The phantom's motion on a 6 mm grid that holds its whole field of view."""
    half = np.array(FIELD_OF_VIEW_MM) / 2 + 8
    z, y, x = (np.arange(-n, n + 6, 6) for n in half)
    grid = np.diag([6.0, 6.0, 6.0, 1.0])
    grid[:3, 3] = x[0], y[0], z[0]
    points = np.stack(np.broadcast_arrays(x, y[:, None], z[:, None, None]), axis=-1)
    return DeliveredField(true_displacement(points), grid, np.eye(4), np.eye(4))


def test_a_decoded_field_on_an_oblique_grid_applies_pre_matrix_then_vectors_then_post_matrix() -> None:
    rng = np.random.default_rng(0)
    grid, resolution = rotation(30), (2.0, 3.0, 4.0)
    linear = rng.normal(size=(3, 3)) / 10
    k, j, i = np.meshgrid(*(np.arange(n) for n in (5, 6, 7)), indexing="ij")
    grid_points = (np.stack([i, j, k], axis=-1) * resolution) @ grid[:3, :3].T + grid[:3, 3]
    field = decode_field(deformable_registration(grid_points @ linear.T, grid, resolution, rotation(10), rotation(-40)))
    points = (rng.uniform(0, (6, 5, 4), (50, 3)) * resolution) @ grid[:3, :3].T + grid[:3, 3]

    before = points @ rotation(10)[:3, :3].T + rotation(10)[:3, 3]
    expected = (before + points @ linear.T) @ rotation(-40)[:3, :3].T + rotation(-40)[:3, 3]

    assert field.source_points(points) == pytest.approx(expected, abs=1e-4)
    jacobian = rotation(-40)[:3, :3] @ (rotation(10)[:3, :3] + linear)
    for determinant in field.determinants():
        assert determinant == pytest.approx(np.linalg.det(jacobian), abs=1e-4)


def test_a_point_outside_of_the_delivered_grid_is_refused() -> None:
    field = true_field()

    with pytest.raises(ValueError, match="outside"):
        field.source_points(np.array([[0.0, 0.0, 1000.0]]))


def test_vector_data_of_the_wrong_length_are_refused() -> None:
    dataset = deformable_registration(np.zeros((2, 2, 2, 3)), np.eye(4), (1, 1, 1), np.eye(4), np.eye(4))
    dataset.DeformableRegistrationSequence[0].DeformableRegistrationGridSequence[0].GridDimensions = [2, 2, 3]

    with pytest.raises(ValueError, match="got 24 numbers, expected 36"):
        decode_field(dataset)


def test_the_true_motion_scores_near_zero_without_folding(study: PhantomStudy) -> None:
    found = evaluation.evaluate(study, Received((), None, true_field(), has_spatial_registration=True))

    assert found.before.mean_mm > 6
    assert found.after.mean_mm < 0.2
    assert found.after.largest_mm < 1
    assert found.folding_fraction == 0
    assert found.smallest_determinant > 0.5


def test_the_reversed_motion_scores_worse_than_none(study: PhantomStudy) -> None:
    right = true_field()
    wrong = DeliveredField(-right.vectors, right.grid, right.pre, right.post)

    found = evaluation.evaluate(study, Received((), None, wrong, has_spatial_registration=True))

    assert found.after.mean_mm > 1.5 * found.before.mean_mm


def test_one_vector_that_crosses_its_neighbour_is_counted_as_folding() -> None:
    field = true_field()
    vectors = field.vectors.copy()
    vectors[25, 30, 30, 0] += 13  # beyond the next grid point, 6 mm away

    folded = np.minimum.reduce(list(DeliveredField(vectors, field.grid, field.pre, field.post).determinants())) <= 0

    assert 1 <= folded.sum() <= 8


def test_what_the_pacs_did_not_receive_is_named(study: PhantomStudy) -> None:
    found = evaluation.evaluate(study, Received((), None, None, has_spatial_registration=False))

    assert [line.split(":")[0] for line in found.missing] == [
        "Deformable Spatial Registration", "Spatial Registration", "registered series",
    ]  # fmt: skip
    assert found.after == found.before


def test_mutual_information_is_one_for_equal_images_and_falls_with_misalignment(study: PhantomStudy) -> None:
    voxels = evaluation.read_series(study.fixed_files).voxels
    information = evaluation.normalized_mutual_information

    assert information(voxels, voxels) == pytest.approx(1)
    assert information(voxels, np.roll(voxels, 8, axis=1)) < information(voxels, np.roll(voxels, 2, axis=1)) < 0.9


def test_the_stand_in_pacs_keeps_every_instance_once_as_it_was_sent(tmp_path: Path, study: PhantomStudy) -> None:
    with StandInPacs(tmp_path / "received") as pacs:
        send(study.moving_files[:3], pacs.port)
        send(study.moving_files[:3], pacs.port)

    received = evaluation.read_received(pacs.files())

    assert {ds.SOPInstanceUID for ds in received.datasets} == {
        dcmread(p).SOPInstanceUID for p in study.moving_files[:3]
    }
    assert len(received.datasets) == 3
    (line,) = received.inventory()
    assert "CT Image Storage" in line
    assert "3 × Portal venous 9.0" in line


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"jobs": [{"id": "7", "state": "rejected", "reason": "similarity fell"}]}, "job 7: rejected: similarity fell"),
        ({"deliveries": [{"sop_instance_uid": "1.2", "state": "failed", "reason": "0xA900"}]}, "1.2: failed: 0xA900"),
        ({"series": [{"series_instance_uid": "1.3", "state": "refused", "reason": "gap"}]}, "series 1.3: refused: gap"),
        ({"series": [{"series_instance_uid": "1.3", "state": "unpaired", "reason": "no role"}]}, "unpaired: no role"),
    ],
)
def test_a_failure_that_the_node_tells_ends_the_demo_with_its_reason(
    rows: dict[str, list[dict[str, str]]], words: str
) -> None:
    status = {"series": [], "jobs": [], "deliveries": []} | rows

    with pytest.raises(DemoError, match=words):
        processes._must_succeed(status, abandoned=True)


def test_the_picture_shows_coronal_and_axial_slices_before_and_after(tmp_path: Path, study: PhantomStudy) -> None:
    registered = evaluation.read_series(study.moving_files)

    draw_before_after(study, registered, tmp_path / "with.png")
    draw_before_after(study, None, tmp_path / "without.png")

    pictures = [np.asarray(Image.open(tmp_path / name).convert("L"), float) for name in ("with.png", "without.png")]
    assert pictures[0].shape == pictures[1].shape
    assert pictures[0].std() > 20
    assert np.abs(pictures[0] - pictures[1]).max() > 100

"""Judges what the stand-in PACS received against the truth of the phantom: reads DICOM only, nothing of the node.

The Deformable Spatial Registration is decoded here from the standard's text (PS3.3 C.20.3), apart from the code that
wrote it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeformableSpatialRegistrationStorage,
    SecondaryCaptureImageStorage,
    SpatialRegistrationStorage,
)

from dicomnode.phantom import PhantomStudy, true_displacement

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A series as voxels, slices in the order of their position.

    Attributes
    ----------
    voxels
        (Z, Y, X), HU.
    planes
        (Z, 11): Image Position, Image Orientation and Pixel Spacing of each slice.
    """

    voxels: npt.NDArray[np.float32]
    planes: Array
    frame_of_reference_uid: str


@dataclass(frozen=True)
class DeliveredField:
    """The map of a Deformable Spatial Registration, from the Registered to the Source RCS, mm.

    Attributes
    ----------
    vectors
        (Z, Y, X, 3), components (x, y, z).
    grid
        (4, 4): grid index (i, j, k, 1) → Registered RCS.
    pre, post
        (4, 4), applied before and after the vectors are added.
    """

    vectors: Array
    grid: Array
    pre: Array
    post: Array

    def source_points(self, points_mm: Array) -> Array:
        """Source RCS (n, 3) of Registered RCS points (n, 3); trilinear between the grid's points.

        Raises
        ------
        ValueError
            A point is outside of the grid.
        """
        inverse = np.linalg.inv(self.grid)
        kji = (points_mm @ inverse[:3, :3].T + inverse[:3, 3])[:, ::-1]
        last = np.array(self.vectors.shape[:3]) - 1
        if (kji < -1e-6).any() or (kji > last + 1e-6).any():
            raise ValueError(
                f"{np.count_nonzero((kji < 0) | (kji > last))} coordinates lie outside of the field's grid"
            )
        low = np.clip(np.floor(kji).astype(int), 0, np.maximum(last - 1, 0))
        part = kji - low
        added = np.zeros_like(points_mm)
        for corner in product((0, 1), repeat=3):
            weight = np.prod(np.where(corner, part, 1 - part), axis=1, keepdims=True)
            added += weight * self.vectors[tuple((low + corner).T)]
        before = points_mm @ self.pre[:3, :3].T + self.pre[:3, 3]
        return np.asarray((before + added) @ self.post[:3, :3].T + self.post[:3, 3])

    def determinants(self) -> Iterator[Array]:
        """det J of the whole map at the eight corners of every cell: the trilinear map is extreme there."""
        steps = [np.diff(self.vectors, axis=axis) for axis in (2, 1, 0)]  # along i, j, k
        per_mm = np.linalg.inv(self.grid[:3, :3])
        nz, ny, nx = (n - 1 for n in self.vectors.shape[:3])
        for k, j, i in product((0, 1), repeat=3):
            z, y, x = slice(k, k + nz), slice(j, j + ny), slice(i, i + nx)
            by_index = np.stack([steps[0][z, y], steps[1][z, :, x], steps[2][:, y, x]], axis=-1)
            yield np.linalg.det(self.post[:3, :3] @ (self.pre[:3, :3] + by_index @ per_mm))


@dataclass(frozen=True)
class Received:
    """What came back: the registered series, the field, and a line on each object."""

    datasets: tuple[Dataset, ...]
    registered: Series | None
    field: DeliveredField | None
    has_spatial_registration: bool

    def pages(self) -> list[Dataset]:
        """The pages of quality, Secondary Capture, in the order of reading."""
        found = [each for each in self.datasets if each.SOPClassUID == SecondaryCaptureImageStorage]
        return sorted(found, key=lambda each: int(each.InstanceNumber))

    def inventory(self) -> list[str]:
        """One line for each series: SOP class, modality, instances, description, UID."""
        by_series = defaultdict(list)
        for dataset in self.datasets:
            by_series[str(dataset.SeriesInstanceUID)].append(dataset)
        lines = []
        for uid, members in by_series.items():
            for sop_class, count in Counter(str(each.SOPClassUID) for each in members).items():
                first = next(each for each in members if each.SOPClassUID == sop_class)
                named = f"SOP Instance {first.SOPInstanceUID}" if count == 1 else f"Series {uid}"
                description = str(first.get("SeriesDescription", ""))
                lines.append(f"{UID(sop_class).name:44} {first.Modality:4} {count:4} × {description:36} {named}")
        return sorted(lines)


@dataclass(frozen=True)
class LandmarkError:
    """Distances at the landmarks."""

    mean_mm: float
    p95_mm: float
    largest_mm: float


@dataclass(frozen=True)
class Evaluation:
    """How good the delivered result is.

    Attributes
    ----------
    folding_fraction
        Share of the delivered grid's cells with det J <= 0 at any corner.
    similarity_before, similarity_after
        Normalized mutual information 2·I/(H_F+H_M) of the fixed with the moving and with the registered series.
    missing
        What should have come and did not, or not as it should, in words.
    """

    before: LandmarkError
    after: LandmarkError
    folding_fraction: float
    smallest_determinant: float
    similarity_before: float
    similarity_after: float
    missing: tuple[str, ...]


def read_received(files: Iterable[Path]) -> Received:
    """Read everything the PACS wrote."""
    datasets = tuple(dcmread(path, force=True) for path in files)
    images = [each for each in datasets if each.SOPClassUID == CTImageStorage]
    fields = [each for each in datasets if each.SOPClassUID == DeformableSpatialRegistrationStorage]
    return Received(
        datasets=datasets,
        registered=_stacked(images) if images else None,
        field=decode_field(fields[0]) if len(fields) == 1 else None,
        has_spatial_registration=any(each.SOPClassUID == SpatialRegistrationStorage for each in datasets),
    )


def read_series(files: Iterable[Path]) -> Series:
    """Read one series."""
    return _stacked([dcmread(path) for path in files])


def decode_field(dataset: Dataset) -> DeliveredField:
    """Decode a Deformable Spatial Registration.

    Raises
    ------
    ValueError
        Not exactly one item has a grid, or the grid's bytes are not as many as its dimensions ask for.
    """
    items = [item for item in dataset.DeformableRegistrationSequence if "DeformableRegistrationGridSequence" in item]
    if len(items) != 1:
        raise ValueError(f"Deformable Registration Sequence: got {len(items)} items with a grid, expected one")
    grid = items[0].DeformableRegistrationGridSequence[0]
    # PS3.3 C.20.3.1.3: x fastest, then rows, then planes; three 32-bit floats each.
    nx, ny, nz = grid.GridDimensions
    vectors = np.frombuffer(grid.VectorGridData, "<f4")
    if vectors.size != 3 * nx * ny * nz:
        raise ValueError(f"Vector Grid Data: got {vectors.size} numbers, expected {3 * nx * ny * nz}")
    row, column = np.reshape(np.array(grid.ImageOrientationPatient, float), (2, 3))
    placed = np.eye(4)
    placed[:3, :3] = np.column_stack([row, column, np.cross(row, column)]) * np.array(grid.GridResolution, float)
    placed[:3, 3] = grid.ImagePositionPatient
    return DeliveredField(
        vectors=vectors.reshape(nz, ny, nx, 3).astype(np.float64),
        grid=placed,
        pre=_matrix(items[0], "PreDeformationMatrixRegistrationSequence"),
        post=_matrix(items[0], "PostDeformationMatrixRegistrationSequence"),
    )


def evaluate(study: PhantomStudy, received: Received) -> Evaluation:
    """Compare what was received with the truth. Where no field came, the error after is that before."""
    fixed, moving = read_series(study.fixed_files), read_series(study.moving_files)
    truth = study.landmarks_mm + true_displacement(study.landmarks_mm)
    before = _error(study.landmarks_mm - truth)
    after, smallest, folded = before, np.full((1, 1, 1), np.inf), 0.0
    if received.field is not None:
        after = _error(received.field.source_points(study.landmarks_mm) - truth)
        smallest = np.minimum.reduce(list(received.field.determinants()))
        folded = float(np.mean(smallest <= 0))
    registered = received.registered
    comparable = registered is not None and registered.voxels.shape == fixed.voxels.shape
    return Evaluation(
        before=before,
        after=after,
        folding_fraction=folded,
        smallest_determinant=float(smallest.min()),
        similarity_before=normalized_mutual_information(fixed.voxels, moving.voxels),
        similarity_after=normalized_mutual_information(fixed.voxels, registered.voxels)
        if registered is not None and comparable
        else 0.0,
        missing=tuple(_missing(fixed, received)),
    )


def normalized_mutual_information(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """2·I/(H_a+H_b) of every second voxel along each axis, 64 bins from -200 to 300 HU; 1 for equal images."""
    every = (slice(None, None, 2),) * 3
    bins = [np.clip((image[every] + 200) * (63 / 500), 0, 63).astype(np.int64).ravel() for image in (a, b)]
    joint = np.bincount(bins[0] * 64 + bins[1], minlength=64 * 64).reshape(64, 64) / bins[0].size
    entropy_a, entropy_b, entropy = (_entropy(p) for p in (joint.sum(axis=1), joint.sum(axis=0), joint))
    return 2 * (entropy_a + entropy_b - entropy) / max(entropy_a + entropy_b, 1e-12)


def _entropy(p: Array) -> float:
    return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


def _error(offsets_mm: Array) -> LandmarkError:
    distance = np.linalg.norm(offsets_mm, axis=1)
    return LandmarkError(float(distance.mean()), float(np.percentile(distance, 95)), float(distance.max()))


def _missing(fixed: Series, received: Received) -> Iterator[str]:
    if received.field is None:
        yield "Deformable Spatial Registration: the PACS did not receive exactly one"
    if not received.has_spatial_registration:
        yield "Spatial Registration: the PACS received none"
    registered = received.registered
    if registered is None:
        yield "registered series: the PACS received none"
    elif registered.planes.shape != fixed.planes.shape:
        yield f"registered series: got {len(registered.planes)} slices, expected {len(fixed.planes)}"
    elif (off := np.abs(registered.planes - fixed.planes).max()) > 1e-3:
        yield f"registered series: position, orientation or spacing is off the fixed series' by {off:.3f}"
    elif registered.frame_of_reference_uid != fixed.frame_of_reference_uid:
        yield "registered series: its Frame of Reference UID is not that of the fixed series"


def _stacked(datasets: Sequence[Dataset]) -> Series:
    row, column = np.reshape(np.array(datasets[0].ImageOrientationPatient, float), (2, 3))
    normal = np.cross(row, column)
    ordered = sorted(datasets, key=lambda each: float(normal @ np.array(each.ImagePositionPatient, float)))
    voxels = [each.pixel_array * float(each.RescaleSlope) + float(each.RescaleIntercept) for each in ordered]
    planes = [[*each.ImagePositionPatient, *each.ImageOrientationPatient, *each.PixelSpacing] for each in ordered]
    return Series(
        np.stack(voxels).astype(np.float32), np.array(planes, float), str(datasets[0].get("FrameOfReferenceUID", ""))
    )


def _matrix(item: Dataset, keyword: str) -> Array:
    sequence = item.get(keyword)
    if not sequence:
        return np.eye(4)
    return np.reshape(np.array(sequence[0].FrameOfReferenceTransformationMatrix, float), (4, 4))

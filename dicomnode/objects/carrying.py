"""What was drawn on the moving series, carried to the fixed one by the field that is delivered.

Law: a drawing is a local image in moving space; it is resampled as the series is, once, with the very field. What is
carried is called carried, and refers to what it was made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import UID, RTStructureSetStorage, SegmentationStorage

from dicomnode.errors import StudyError
from dicomnode.objects.common import SourceSeries, Subject
from dicomnode.objects.deformable import interpolate
from dicomnode.objects.references import refer, reference
from registration_engine import DisplacementField, Grid, Volume, warp

KINDS = {
    RTStructureSetStorage: "contours",
    SegmentationStorage: "segmentations",
    UID("1.2.840.10008.5.1.4.1.1.66.7"): "segmentations",  # Label Map Segmentation Storage
}
"""The SOP classes of what can be carried, and the output that each belongs to."""
_NODES = 33
_STEPS, _NEAR_MM = 60, 0.01


@dataclass(frozen=True, eq=False)
class Drawing:
    """A Segmentation or RT Structure Set that belongs to the moving series.

    Attributes
    ----------
    sha256
        Of its data set.
    """

    dataset: Dataset
    sha256: str

    @property
    def output(self) -> str:
        """contours or segmentations."""
        return KINDS[self.dataset.SOPClassUID]

    @property
    def key(self) -> str:
        """What makes the UIDs of its carried form its own."""
        return f"{self.output} {self.dataset.SOPInstanceUID} {self.sha256}"


def belongs_to(dataset: Dataset, series: SourceSeries) -> bool:
    """Whether a Segmentation or RT Structure Set was drawn on these images: it names one of them, or their series."""
    if dataset.get("SOPClassUID") not in KINDS:
        return False
    named, listed = set(), set()
    for item in _series_items(dataset):
        named.add(str(item.get("SeriesInstanceUID", "")))
        for keyword in ("ReferencedInstanceSequence", "ContourImageSequence"):
            listed |= {str(each.get("ReferencedSOPInstanceUID", "")) for each in item.get(keyword) or []}
    held = {uid for uid, _ in series.slices}
    return bool(listed & held) if listed else str(series.first.SeriesInstanceUID) in named


def _series_items(dataset: Dataset) -> Iterator[Dataset]:
    yield from dataset.get("ReferencedSeriesSequence") or []
    for study in dataset.get("StudiesContainingOtherReferencedInstancesSequence") or []:
        yield from study.get("ReferencedSeriesSequence") or []
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            yield from study.get("RTReferencedSeriesSequence") or []


def carried_values(
    values: npt.NDArray[np.float32], grid: Grid, field: DisplacementField, fixed: Grid, *, outside: float
) -> tuple[tuple[slice, slice, slice], npt.NDArray[np.float32]] | None:
    """A local image in moving space on the part of the fixed grid that it may land on, trilinear.

    Parameters
    ----------
    values
        (Z, Y, X) on `grid`.
    outside
        The value beyond `grid`.

    Returns
    -------
    tuple
        Slices into the fixed array, and the values there; None where it lands nowhere on the fixed grid.
    """
    part = _landing(grid, field, fixed)
    if part is None:
        return None
    affine = fixed.affine.copy()
    affine[:3, 3] = fixed.points_mm(np.array([each.start for each in part], dtype=np.float64))
    shape = (part[0].stop - part[0].start, part[1].stop - part[1].start, part[2].stop - part[2].start)
    return part, warp(Volume(values, grid), field, Grid(shape, affine), outside=outside).voxels


def _landing(grid: Grid, field: DisplacementField, fixed: Grid) -> tuple[slice, slice, slice] | None:
    """A box of fixed voxels that holds all whose place in moving space lies within `grid`, by a coarse lattice."""
    axes = [np.unique(np.linspace(0, n - 1, min(n, _NODES)).round()) for n in fixed.shape]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    points = fixed.points_mm(index)
    points = points + interpolate(field.vectors, field.grid.indices(points))
    steps = [np.linalg.norm(np.diff(points, axis=axis), axis=-1).max(initial=0.0) for axis in range(3)]
    margin = float(sum(steps)) / grid.spacing_mm  # a voxel's place is at most this far from that of its nodes
    place = grid.indices(points)
    near = ((place >= -0.5 - margin) & (place <= np.array(grid.shape) - 0.5 + margin)).all(axis=-1)
    if not near.any():
        return None
    box = []
    for axis, nodes in enumerate(axes):
        hit = np.unique(np.argwhere(near)[:, axis])
        first, last = nodes[max(hit[0] - 1, 0)], nodes[min(hit[-1] + 1, len(nodes) - 1)]
        box.append(slice(int(first), int(last) + 1))
    return box[0], box[1], box[2]


def carried_points(points: npt.NDArray[np.float64], field: DisplacementField) -> npt.NDArray[np.float64]:
    """Where points (n, 3) of moving space lie in fixed space, LPS mm: the x with x + displacement(x) there.

    Newton's iteration with the field's mean linear part; beyond the field its outermost vectors go on.

    Raises
    ------
    StudyError
        It comes within 0.01 mm of no such x for some point.
    """
    nodes = np.stack(np.meshgrid(*[np.linspace(0, n - 1, 5) for n in field.grid.shape], indexing="ij"), -1)
    there = field.grid.points_mm(nodes.reshape(-1, 3))
    here = there + interpolate(field.vectors, nodes.reshape(-1, 3))
    ones = np.ones((len(there), 1))
    linear = np.linalg.lstsq(np.hstack([there, ones]), here, rcond=None)[0]
    back = np.linalg.inv(linear[:3])
    x = (points - linear[3]) @ back
    for _ in range(_STEPS):
        missing = points - x - interpolate(field.vectors, field.grid.indices(x))
        if np.linalg.norm(missing, axis=-1).max(initial=0.0) < _NEAR_MM:
            return np.asarray(x, dtype=np.float64)
        x = x + missing @ back
    raise StudyError(f"{len(points)} points cannot be carried over: the map has no inverse there within {_NEAR_MM} mm")


def refer_to_drawing(dataset: Dataset, subject: Subject, drawing: Drawing) -> None:
    """The Common Instance Reference of something carried: the fixed and moving series, and what it was made of."""
    images = [(series.first, series.references()) for series in (subject.fixed, subject.moving)]
    for keyword in ("ReferencedSeriesSequence", "StudiesContainingOtherReferencedInstancesSequence"):
        if keyword in dataset:
            delattr(dataset, keyword)
    refer(dataset, [*images, (drawing.dataset, [reference(drawing.dataset)])])

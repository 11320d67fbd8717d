"""Where the slices of a registered series lie: on the fixed slices, or in the fixed box with the moving voxels' size.

Law: geometry and Patient Position are the fixed series', whatever the image of the moving series was.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from pydicom import Dataset
from pydicom.uid import UID, PositronEmissionTomographyImageStorage

from dicomnode.errors import StudyError
from dicomnode.objects.common import SourceSeries, decimal
from dicomnode.volumes import MAX_VOXELS
from registration_engine import Grid

RESOLUTIONS = ("fixed", "moving")
GEOMETRY = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "SliceThickness",
    "SpacingBetweenSlices",
)
_LARGEST_SIDE = 65535  # Rows and Columns, VR US


@dataclass(frozen=True, eq=False)
class Plane:
    """One slice of a registered series.

    Attributes
    ----------
    geometry
        The elements of `GEOMETRY`, as far as the slice has them.
    fixed
        The fixed slice that it lies on or is nearest to.
    """

    geometry: Dataset
    fixed: Dataset


@dataclass(frozen=True, eq=False)
class Planes:
    """The slices of a registered series in the order of their grid, which runs against the normal (row × column)."""

    grid: Grid
    slices: tuple[Plane, ...]


def planes_of(fixed: SourceSeries, moving: Grid, resolution: str) -> Planes:
    """The slices of a registered series.

    Parameters
    ----------
    resolution
        fixed: the fixed slices, element by element as received. moving: the fixed volume's box and axes, each axis
        with the voxel size of the moving axis nearest to it.

    Raises
    ------
    StudyError
        The moving voxels are too small for the fixed box.
    """
    if resolution == "fixed":
        return Planes(fixed.grid, tuple(Plane(_received(dataset), dataset) for dataset in fixed.datasets))
    grid = resampled_grid(fixed.grid, moving)
    slices = []
    for k in range(grid.shape[0]):
        nearest = fixed.grid.indices(grid.points_mm(np.array([k, 0.0, 0.0])))[0]
        number = int(np.clip(np.rint(nearest), 0, len(fixed.datasets) - 1))
        slices.append(Plane(_computed(grid, k), fixed.datasets[number]))
    return Planes(grid, tuple(slices))


def resampled_grid(fixed: Grid, moving: Grid) -> Grid:
    """The smallest grid around the fixed volume's box, on its axes and about its center, of the moving voxel size."""
    axes = fixed.affine[:3, :3] / fixed.spacing_mm
    cosines = np.abs(axes.T @ (moving.affine[:3, :3] / moving.spacing_mm))
    nearest = max(permutations(range(3)), key=lambda order: cosines[range(3), order].sum())
    spacing = np.array([float(str(decimal(value))) for value in moving.spacing_mm[list(nearest)]])
    extent = fixed.spacing_mm * fixed.shape
    shape = np.maximum(np.ceil(extent / spacing - 1e-6).astype(int), 2)
    if int(shape.prod(dtype=np.int64)) > MAX_VOXELS or shape.max() > _LARGEST_SIDE:
        raise StudyError(
            f"Registered series: {' × '.join(map(str, shape))} voxels of {spacing.tolist()} mm in the fixed volume's "
            f"box, expected at most {MAX_VOXELS} and {_LARGEST_SIDE} along a side; resolution: fixed is possible"
        )
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    center = fixed.points_mm((np.array(fixed.shape) - 1) / 2)
    affine[:3, 3] = center - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _received(dataset: Dataset) -> Dataset:
    geometry = Dataset()
    for keyword in GEOMETRY:
        if keyword in dataset:
            geometry[keyword] = copy.deepcopy(dataset[keyword])
    return geometry


def _computed(grid: Grid, k: int) -> Dataset:
    geometry = Dataset()
    directions = grid.affine[:3, :3] / grid.spacing_mm
    geometry.ImagePositionPatient = [decimal(value) for value in grid.points_mm(np.array([k, 0.0, 0.0]))]
    geometry.ImageOrientationPatient = [decimal(value) for value in (*directions[:, 2], *directions[:, 1])]
    geometry.PixelSpacing = [decimal(value) for value in grid.spacing_mm[1:]]
    geometry.Rows, geometry.Columns = grid.shape[1:]
    geometry.SliceThickness = geometry.SpacingBetweenSlices = decimal(grid.spacing_mm[0])
    return geometry


# PS3.3 C.7.3.1.1.2 and C.8.4.6: PET says in codes of CID 19, 20 and 21 what others say in one word
_GRAVITY = {
    "S": ("40199007", "supine"),
    "P": ("1240000", "prone"),
    "DR": ("102535000", "right lateral decubitus"),
    "DL": ("102536004", "left lateral decubitus"),
}
_GANTRY = {"HF": ("102540008", "headfirst"), "FF": ("102541007", "feet-first")}
_CODED_POSITION = ("PatientOrientationCodeSequence", "PatientGantryRelationshipCodeSequence")


def set_position(target: Dataset, fixed: Dataset, sop_class: UID) -> None:
    """Write how the patient lay for the fixed series, in the form that the SOP class asks for."""
    position = str(fixed.get("PatientPosition") or "")
    if sop_class != PositronEmissionTomographyImageStorage:
        target.PatientPosition = position or _position_in_codes(fixed)
        return
    gantry, gravity = _GANTRY.get(position[:2]), _GRAVITY.get(position[2:])
    if gantry and gravity:
        orientation = _snomed("102538003", "recumbent")
        orientation.PatientOrientationModifierCodeSequence = [_snomed(*gravity)]
        target.PatientOrientationCodeSequence = [orientation]
        target.PatientGantryRelationshipCodeSequence = [_snomed(*gantry)]
        return
    for keyword in _CODED_POSITION:
        setattr(target, keyword, copy.deepcopy(list(fixed.get(keyword) or [])))


def _position_in_codes(fixed: Dataset) -> str:
    """Patient Position of a series that has it in codes; empty where they are others than these."""
    orientation, relation = (list(fixed.get(keyword) or []) for keyword in _CODED_POSITION)
    modifier = list(orientation[0].get("PatientOrientationModifierCodeSequence") or []) if orientation else []
    gantry = [name for name, (value, _) in _GANTRY.items() if relation and relation[0].get("CodeValue") == value]
    gravity = [name for name, (value, _) in _GRAVITY.items() if modifier and modifier[0].get("CodeValue") == value]
    return gantry[0] + gravity[0] if gantry and gravity else ""


def _snomed(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item

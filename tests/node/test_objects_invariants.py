"""Every invariant has a mutation that breaks it, and nothing broken leaves.

What an invariant says where it is broken is its name. The names are read from the source of the invariants, so that
one without a mutation fails here.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import multi_frame
import numpy as np
import phantoms
import pytest
from hand_made import make_objects, make_provenance, make_registration, make_source
from pydicom import Dataset
from pydicom.uid import EnhancedMRImageStorage, MRImageStorage

from dicomnode import objects
from dicomnode.objects import invariants, sample_grid, series_invariants, violations
from dicomnode.objects.common import SourceSeries, Subject
from dicomnode.objects.invariants import check
from dicomnode.volumes.frames import frames_of
from registration_engine import DisplacementField, Grid, Registration

SMALL = (6, 16, 20)
Spoil = Callable[[Dataset], object]


@cache
def series(form: str) -> tuple[list[Any], list[Any]]:
    fixed = phantoms.make_series(shape=SMALL, seed=1)
    moving = phantoms.make_series(
        shape=SMALL, seed=2, phase="arterial", study="later study", frame_of_reference="other", spacing_mm=(4.5, 4, 3.5)
    )
    if form == "Enhanced":
        return frames_of(multi_frame.well_formed(fixed)), frames_of(multi_frame.well_formed(moving))
    return fixed, moving


@cache
def pair(form: str = "single") -> tuple[SourceSeries, SourceSeries, Registration]:
    fixed, moving = (make_source(each) for each in series(form))
    return fixed, moving, make_registration(fixed.grid)


@cache
def made(kind: str, form: str = "single", resolution: str = "fixed") -> Dataset:
    """One object of this kind; of a series an inner slice."""
    found = all_made(kind, form, resolution)
    return found[len(found) // 2]


@cache
def all_made(kind: str, form: str = "single", resolution: str = "fixed") -> list[Dataset]:
    outputs = {"series": ["dsr", "series"], "blending": ["series", "blending"]}.get(kind, [kind])
    everything = make_objects(*series(form), pair(form)[2], outputs=outputs, resolution=resolution)
    return [dataset for name, dataset in everything if name == kind]


def checked(dataset: Dataset, kind: str, form: str = "single", resolution: str = "fixed") -> None:
    fixed, moving, registration = pair(form)
    subject = Subject(fixed, moving, make_provenance(), is_deformable=True, resolution=resolution)
    also = {"series": lambda: [made("dsr", form)], "blending": lambda: all_made("series", form)}.get(kind, list)()
    check(
        dataset,
        subject,
        also=also,
        moving_from_fixed=registration.rigid if kind == "sro" else None,
        field=sample_grid(registration).field if kind == "dsr" else None,
    )


def deformable(dataset: Dataset) -> Dataset:
    return dataset.DeformableRegistrationSequence[0]


def grid(dataset: Dataset) -> Dataset:
    return deformable(dataset).DeformableRegistrationGridSequence[0]


def layer(dataset: Dataset, index: int) -> Dataset:
    return dataset.BlendingSequence[index].ReferencedSeriesSequence[0]


def named(report: Dataset) -> Dataset:
    """A reference in a report's content."""
    return next(violations.items(report.ContentSequence[-1], "ReferencedSOPInstanceUID"))


def moving_item(dataset: Dataset) -> Dataset:
    return dataset.RegistrationSequence[1].MatrixRegistrationSequence[0]


def moving_matrix(dataset: Dataset) -> Any:
    return moving_item(dataset).MatrixSequence[0].FrameOfReferenceTransformationMatrix


def put(path: str, value: object) -> Spoil:
    """Set an element; `path` is keywords with indices of items, as `A[0].B`."""

    def spoil(dataset: Dataset) -> None:
        *way, last = path.split(".")
        for step in way:
            keyword, index = step[:-1].split("[")
            dataset = dataset[keyword].value[int(index)]
        setattr(dataset, last, value)

    return spoil


def invert(dataset: Dataset) -> None:
    matrix = np.linalg.inv(np.reshape(np.array(moving_matrix(dataset), dtype=float), (4, 4)))
    moving_item(dataset).MatrixSequence[0].FrameOfReferenceTransformationMatrix = [f"{v:.10f}" for v in matrix.ravel()]


def mirror(dataset: Dataset) -> None:
    matrix = moving_matrix(dataset)
    for n in (0, 4, 8):
        matrix[n] = -matrix[n]


def vectors(dataset: Dataset, change: Callable[[Any], Any]) -> None:
    stored = np.frombuffer(grid(dataset).VectorGridData, "<f4")
    grid(dataset).VectorGridData = change(stored.copy()).astype("<f4").tobytes()


def poison(stored: Any) -> Any:
    stored[0] = np.nan
    return stored


def twice(sequence: Callable[[Dataset], Any]) -> Spoil:
    def spoil(dataset: Dataset) -> None:
        found = sequence(dataset)
        found.append(copy.deepcopy(found[0]))

    return spoil


def without(sequence: Callable[[Dataset], Any]) -> Spoil:
    def spoil(dataset: Dataset) -> None:
        del sequence(dataset)[0]

    return spoil


def one_plane_more(dataset: Dataset) -> None:
    x, y, z = grid(dataset).GridDimensions
    grid(dataset).GridDimensions = [x, y, z + 1]
    vectors(dataset, lambda stored: np.concatenate([stored, stored[: 3 * x * y]]))


def shift(value: Any, index: int, by: float) -> None:
    value[index] = float(value[index]) + by


STRANGER = "1.2.3"
OF_ANY: dict[str, Spoil] = {
    "UID in file meta information": lambda d: setattr(d.file_meta, "MediaStorageSOPInstanceUID", STRANGER),
    "SOP class in file meta": lambda d: setattr(d.file_meta, "MediaStorageSOPClassUID", STRANGER),
    "UID is not of our own making": lambda d: (
        setattr(d, "SOPInstanceUID", STRANGER),
        setattr(d.file_meta, "MediaStorageSOPInstanceUID", STRANGER),
    ),
    "lies in a source series": lambda d: setattr(d, "SeriesInstanceUID", series("single")[1][0].SeriesInstanceUID),
    "study": lambda d: setattr(d, "StudyInstanceUID", series("single")[1][0].StudyInstanceUID),
    "patient": lambda d: setattr(d, "PatientID", "STRANGER"),
    "not marked as our own output": lambda d: delattr(d, "ContributingEquipmentSequence"),
    "Series Description is empty": lambda d: setattr(d, "SeriesDescription", ""),
    "Frame of Reference": lambda d: setattr(d, "FrameOfReferenceUID", STRANGER),
    "own study listed as another": lambda d: setattr(
        d.StudiesContainingOtherReferencedInstancesSequence[0], "StudyInstanceUID", d.StudyInstanceUID
    ),
    "reference to": put("ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID", STRANGER),
}
OF_KIND: dict[str, dict[str, Spoil]] = {
    "dsr": {
        "not one deformable item": twice(lambda d: d.DeformableRegistrationSequence),
        "source frame": lambda d: setattr(deformable(d), "SourceFrameOfReferenceUID", d.FrameOfReferenceUID),
        "images of the deformable item": without(lambda d: deformable(d).ReferencedImageSequence),
        "error is not told": lambda d: delattr(deformable(d), "FrameOfReferenceTransformationComment"),
        "matrix before or after is missing": without(lambda d: deformable(d).PreDeformationMatrixRegistrationSequence),
        "matrix before or after": lambda d: shift(
            deformable(d).PostDeformationMatrixRegistrationSequence[0].FrameOfReferenceTransformationMatrix, 3, 1e-3
        ),
        "not one grid": twice(lambda d: deformable(d).DeformableRegistrationGridSequence),
        "vector bytes": lambda d: vectors(d, lambda stored: stored[:-3]),
        "vectors are not finite": lambda d: vectors(d, poison),
        "vectors are not the delivered": lambda d: vectors(d, lambda stored: -stored),
        "grid is not along LPS": lambda d: setattr(grid(d), "ImageOrientationPatient", [0, 1, 0, 1, 0, 0]),
        "grid does not cover the fixed volume": lambda d: shift(grid(d).ImagePositionPatient, 0, 40),
        "grid dimensions": one_plane_more,
    },
    "sro": {
        "not one item for each series": twice(lambda d: d.RegistrationSequence),
        "order of the series": lambda d: d.RegistrationSequence.reverse(),
        "images of an item": without(lambda d: d.RegistrationSequence[1].ReferencedImageSequence),
        "more than one registration in an item": twice(lambda d: d.RegistrationSequence[1].MatrixRegistrationSequence),
        "more than one matrix": twice(lambda d: moving_item(d).MatrixSequence),
        "the fixed series' matrix is not the identity": lambda d: shift(
            d.RegistrationSequence[0].MatrixRegistrationSequence[0].MatrixSequence[0][0x300600C6].value, 3, 1e-3
        ),
        "matrix does not lead from moving to fixed": invert,
        "matrix": lambda d: shift(moving_matrix(d), 12, 1e-3),
        "rigid matrix is not orthonormal": lambda d: shift(moving_matrix(d), 1, 1e-4),
        "rigid matrix mirrors": mirror,
    },
    "series": {
        "pixel bytes": lambda d: setattr(d, "PixelData", d.PixelData[:-2]),
        "SOP class is not the moving series'": lambda d: (
            setattr(d, "SOPClassUID", MRImageStorage),
            setattr(d.file_meta, "MediaStorageSOPClassUID", MRImageStorage),
        ),
        "Image Type does not say DERIVED": lambda d: setattr(d, "ImageType", ["ORIGINAL", "PRIMARY", "AXIAL"]),
        "High Bit": lambda d: setattr(d, "HighBit", 11),
        "photometry": lambda d: setattr(d, "PhotometricInterpretation", "MONOCHROME1"),
        "lossy compression is not told": lambda d: setattr(d, "LossyImageCompression", "01"),
        "Related Series Sequence": without(lambda d: d.RelatedSeriesSequence),
        "Derivation Description is empty": lambda d: delattr(d, "DerivationDescription"),
        "slice refers to no fixed slice": lambda d: delattr(d, "ReferencedImageSequence"),
        "ImagePositionPatient is not the fixed slice's": lambda d: shift(d.ImagePositionPatient, 2, 5),
        "ImageOrientationPatient is not the fixed slice's": put("ImageOrientationPatient", [0, 1, 0, 1, 0, 0]),
        "PixelSpacing is not the fixed slice's": put("PixelSpacing", [4, 3]),
        "Rows is not the fixed slice's": lambda d: (setattr(d, "Rows", d.Columns), setattr(d, "Columns", 16)),
        "no Image Position (Patient)": lambda d: delattr(d, "ImagePositionPatient"),
    },
    "blending": {
        "order of the layers": lambda d: d.BlendingSequence.reverse(),
        "images of the layer below": without(lambda d: layer(d, 0).ReferencedImageSequence),
        "images of the layer above": without(lambda d: layer(d, 1).ReferencedImageSequence),
        "reference to": lambda d: setattr(layer(d, 1).ReferencedImageSequence[0], "ReferencedSOPInstanceUID", STRANGER),
    },
    "sr": {"reference to": lambda d: setattr(named(d), "ReferencedSOPInstanceUID", STRANGER)},
    "series of the moving voxel size": {
        "planes are not parallel to the fixed ones": put("ImageOrientationPatient", [0, 1, 0, 1, 0, 0]),
        "slice lies outside the fixed volume's box": lambda d: shift(d.ImagePositionPatient, 2, 40),
    },
    "Enhanced series": {
        "number of frames": without(lambda d: d.PerFrameFunctionalGroupsSequence),
        "pixel bytes": lambda d: setattr(d, "PixelData", d.PixelData[:-2]),
        "Derivation Description is empty": lambda d: delattr(
            d.PerFrameFunctionalGroupsSequence[3].DerivationImageSequence[0], "DerivationDescription"
        ),
        "ImagePositionPatient is not the fixed slice's": lambda d: shift(
            d.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0].ImagePositionPatient, 2, 5
        ),
        "SOP class is not the moving series'": lambda d: (
            setattr(d, "SOPClassUID", EnhancedMRImageStorage),
            setattr(d.file_meta, "MediaStorageSOPClassUID", d.SOPClassUID),
        ),
    },
}
ARGUMENTS = {
    "series of the moving voxel size": ("series", "single", "moving"),
    "Enhanced series": ("series", "Enhanced", "fixed"),
}
MUTATIONS = [
    *((kind, name, spoil) for kind, spoils in OF_KIND.items() for name, spoil in spoils.items()),
    *((kind, name, spoil) for kind in ("dsr", "sro", "series") for name, spoil in OF_ANY.items()),
]


@pytest.mark.parametrize(("kind", "name", "spoil"), MUTATIONS, ids=[f"{kind}-{name}" for kind, name, _ in MUTATIONS])
def test_what_breaks_an_invariant_does_not_leave(kind: str, name: str, spoil: Spoil) -> None:
    arguments = ARGUMENTS.get(kind, (kind,))
    dataset = copy.deepcopy(made(*arguments))
    checked(dataset, *arguments)
    spoil(dataset)

    with pytest.raises(AssertionError, match=re.escape(name)):
        checked(dataset, *arguments)


def test_every_invariant_has_a_mutation() -> None:
    mutated = {name for _, name, _ in MUTATIONS}

    names = set()
    for module in (invariants, series_invariants):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                texts = [str(each.value) for each in ast.walk(node.args[2]) if isinstance(each, ast.Constant)]
                names.add(max(texts, key=len).strip())

    assert len(names) > 35
    assert {name for name in names if not any(name in each for each in mutated)} == set()


def test_the_check_stands_between_making_and_sending() -> None:
    fixed, moving = series("single")
    registration = pair()[2]
    sampled = sample_grid(registration)
    short = DisplacementField(
        sampled.field.vectors[:-3],
        Grid((sampled.field.grid.shape[0] - 3, *sampled.field.grid.shape[1:]), sampled.field.grid.affine),
    )
    skewed = replace(registration, rigid=registration.rigid @ np.diag([1.01, 1, 1, 1]))

    with pytest.raises(AssertionError, match="does not cover"):
        make_objects(fixed, moving, registration, outputs=["dsr"], sampled=replace(sampled, field=short))
    with pytest.raises(AssertionError, match="not orthonormal"):
        make_objects(fixed, moving, skewed, outputs=["sro"])


def test_all_that_is_built_passes() -> None:
    built = make_objects(*series("Enhanced"), outputs=[o for o in objects.OUTPUTS if o != "dsr-inverse"])
    fixed, moving, _ = pair("Enhanced")
    subject = Subject(fixed, moving, make_provenance(), is_deformable=True)
    refers = {"series": "dsr", "blending": "series"}
    for kind, dataset in built:
        check(dataset, subject, also=[each for name, each in built if name == refers.get(kind)])

"""Independent readers and writers of our objects: dicom3tools, DCMTK, pydicomrt, plastimatch, SimpleITK, dcm2niix.

Each function skips the calling test, with the reason, where its tool is not installed.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from pydicom import Dataset, dcmread

from registration_engine import DisplacementField, Grid

Matrix = npt.NDArray[np.float64]


def dciodvfy_errors(paths: Iterable[Path]) -> set[str]:
    """Every distinct line that `dciodvfy -new` starts with Error, over all files; numbers of items left out."""
    dciodvfy = tool("dciodvfy", "dicom3tools")
    lines: list[str] = []
    for path in paths:
        done = subprocess.run([dciodvfy, "-new", path], capture_output=True, text=True, check=False)
        lines += (done.stdout + done.stderr).splitlines()
    return {re.sub(r"\[\d+\]", "[]", line) for line in lines if line.startswith("Error")}


def dcentvfy_complaints(paths: Iterable[Path]) -> str:
    """What `dcentvfy` says of all files together; empty where patients, studies and series are consistent.

    Less what it says of every report beside any image: it counts Accession Number to the study in the one and to the
    series in the other.
    """
    done = subprocess.run([tool("dcentvfy", "dicom3tools"), *paths], capture_output=True, text=True, check=False)
    always = "Different information entities for attribute - Element=<AccessionNumber>"
    return "".join(line for line in (done.stdout + done.stderr).splitlines(keepends=True) if always not in line)


def decoded_field(deformable: Dataset) -> DisplacementField:
    """The vectors of a Deformable Spatial Registration as pydicomrt reads them; identity before and after asserted."""
    parser = pytest.importorskip("pydicomrt.reg.parser", reason="pydicomrt is not installed")
    (item,) = parser.get_deformable_registrations(deformable)
    for when in ("Pre", "Post"):
        assert np.array_equal(item[f"{when}DeformationMatrixRegistration"], np.eye(4).ravel())
    read = item["DeformableRegistrationGrid"]
    row, column = np.reshape(np.array(read["ImageOrientationPatient"], dtype=float), (2, 3))
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([np.cross(row, column), column, row]) * np.array(read["GridResolution"])[::-1]
    affine[:3, 3] = np.array(read["ImagePositionPatient"], dtype=float)
    vectors = np.asarray(read["VectorGridData"], dtype=np.float32)
    assert vectors.shape[:3] == tuple(read["GridDimensions"])[::-1]
    return DisplacementField(vectors, Grid(vectors.shape[:3], affine))


def decoded_matrix(spatial: Dataset, moving: Dataset) -> Matrix:
    """The matrix from moving to fixed of a Spatial Registration as pydicomrt reads it."""
    parser = pytest.importorskip("pydicomrt.reg.parser", reason="pydicomrt is not installed")
    read = parser.get_spatial_registrations(spatial)
    return np.reshape(read[spatial.FrameOfReferenceUID][moving.FrameOfReferenceUID], (4, 4))


def transform_of(field: DisplacementField) -> SimpleITK.Transform:
    """The field as SimpleITK's transform from fixed to moving points."""
    image = SimpleITK.GetImageFromArray(field.vectors.astype(np.float64), isVector=True)
    image.SetOrigin(field.grid.affine[:3, 3].tolist())
    image.SetSpacing(field.grid.spacing_mm[::-1].tolist())
    image.SetDirection((field.grid.affine[:3, 2::-1] / field.grid.spacing_mm[::-1]).ravel().tolist())
    return SimpleITK.DisplacementFieldTransform(image)


def displacements_at(field: DisplacementField, points_mm: Matrix) -> Matrix:
    """(n, 3), the field at LPS points (n, 3), by SimpleITK."""
    transform = transform_of(field)
    return np.array([transform.TransformPoint(point) for point in points_mm.tolist()]) - points_mm


def resampled(
    moving: Sequence[Path], field: DisplacementField, onto: SimpleITK.Image, *, outside: float
) -> SimpleITK.Image:
    """The original moving DICOM on an image's grid through a field: read and resampled by SimpleITK alone."""
    return SimpleITK.Resample(
        read_series(moving),
        onto,
        transform_of(field),
        SimpleITK.sitkLinear,
        outside,
        SimpleITK.sitkFloat64,
    )


def stored_unit(dataset: Dataset) -> float:
    """What one stored unit of an image is worth."""
    for groups in dataset.get("SharedFunctionalGroupsSequence") or []:
        return float(groups.PixelValueTransformationSequence[0].RescaleSlope)
    return float(dataset.get("RescaleSlope", 1))


def read_series(paths: Sequence[Path]) -> SimpleITK.Image:
    """A series by ITK's GDCM reader, slices in ascending position; or one multi-frame instance."""
    if len(paths) == 1:
        return SimpleITK.ReadImage(str(paths[0]), SimpleITK.sitkFloat64)
    headers = {path: dcmread(path, stop_before_pixels=True) for path in paths}
    row, column = np.reshape(np.array(headers[paths[0]].ImageOrientationPatient, dtype=float), (2, 3))
    normal = np.cross(row, column)
    ordered = sorted(paths, key=lambda p: float(normal @ np.array(headers[p].ImagePositionPatient, dtype=float)))
    return SimpleITK.ReadImage([str(path) for path in ordered], SimpleITK.sitkFloat64)


def plastimatch_matrix(moving_from_fixed: Matrix, fixed: Path, moving: Path, work: Path) -> Matrix:
    """The matrix from moving to fixed that plastimatch writes for ITK's transform from fixed to moving points.

    Parameters
    ----------
    fixed, moving
        Folders with one series each.
    """
    plastimatch = tool("plastimatch", "plastimatch")
    affine = SimpleITK.AffineTransform(3)
    affine.SetMatrix(moving_from_fixed[:3, :3].ravel().tolist())
    affine.SetTranslation(moving_from_fixed[:3, 3].tolist())
    SimpleITK.WriteTransform(affine, str(work / "moving_from_fixed.tfm"))
    subprocess.run(
        [
            plastimatch, "xf-convert", "--input", work / "moving_from_fixed.tfm", "--output-dicom", work / "sro",
            "--fixed-rcs", fixed, "--moving-rcs", moving,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    (written,) = (work / "sro").glob("*.dcm")
    # Registration Sequence of plastimatch: fixed with the identity first, as ours.
    item = dcmread(written).RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence[0]
    return np.array(item.FrameOfReferenceTransformationMatrix, dtype=float).reshape(4, 4)


def vectors_by_dcmtk(deformable: Path) -> bytes:
    """Vector Grid Data as DCMTK decodes it."""
    done = subprocess.run([tool("dcm2json", "dcmtk"), "-q", deformable], capture_output=True, check=True)
    element: Any = json.loads(done.stdout)["00640002"]["Value"][0]["00640005"]["Value"][0]["00640009"]
    return base64.b64decode(element["InlineBinary"])


def nifti_by_dcm2niix(folder: Path, work: Path) -> SimpleITK.Image:
    """The one image that dcm2niix makes of a folder of DICOM files."""
    work.mkdir(exist_ok=True)
    subprocess.run([tool("dcm2niix", "dcm2niix"), "-o", work, folder], check=True, capture_output=True)
    (image,) = work.glob("*.nii*")
    return SimpleITK.ReadImage(str(image), SimpleITK.sitkFloat64)


def tool(name: str, package: str) -> str:
    """The path of a program, else the test is skipped."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package {package})")
    return path

"""A made-up contrast CT study of a breathing body, with the motion known at every point.

Native is the fixed phase, at the end of breathing out; portal venous is the moving one, after breathing in. The
moving phase is drawn at rest and the fixed phase at x + displacement(x), so the truth is exact: no image is
interpolated. Coordinates are LPS millimetres. Same seed and shape, same bytes.
"""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from dicomnode import anatomy
from dicomnode.anatomy import Anatomy, Array

Points = npt.NDArray[np.float64]
Shape = tuple[int, int, int]

FIELD_OF_VIEW_MM = (288.0, 358.4, 358.4)
"""Along (z, y, x); the voxel size is this over the shape."""
SIGMA_HU = 8.0
EXCURSION_MM = 16.0
"""Largest movement of the diaphragm, head to foot."""
FADE_MM = 65.0
"""Depth below the wall of the chest within which the motion fades to nothing."""
BORDERS = {"liver": 110, "spleen": 40, "kidney": 40, "stomach": 30, "heart": 30, "pancreas": 15, "gallbladder": 15,
           "large vessels": 30}  # fmt: skip
FORKS = {"liver vessels": 80, "lung vessels": 50, "mesenteric vessels": 20}
"""Landmarks wanted in each group of tissues."""


@dataclass(frozen=True)
class PhantomStudy:
    """Two CT series on disk and what is true of them.

    Attributes
    ----------
    fixed_files, moving_files
        One file per slice, from foot to head.
    landmarks_mm
        (n, 3), points of the fixed phase on organ borders and vessels.
    """

    patient_id: str
    study_instance_uid: str
    fixed_series_instance_uid: str
    moving_series_instance_uid: str
    fixed_files: tuple[Path, ...]
    moving_files: tuple[Path, ...]
    landmarks_mm: Points


def write_study(folder: Path, seed: int, *, shape: Shape = (96, 256, 256)) -> PhantomStudy:
    """Write both series as single-frame CT under `folder`/native and `folder`/portal.

    Parameters
    ----------
    shape
        (slices, rows, columns); the field of view stays the same, so fewer voxels are larger ones.
    """
    body = anatomy.build(seed)
    files = {}
    for contrast in (False, True):
        voxels = draw(body, contrast=contrast, shape=shape)
        noise = np.random.default_rng((seed, contrast)).normal(size=voxels.shape).astype(np.float32)
        for axis in (1, 2):  # a soft kernel: neighbours in the slice share their noise
            noise = noise + 0.5 * (np.roll(noise, 1, axis) + np.roll(noise, -1, axis))
        voxels += noise * (SIGMA_HU / noise.std())
        phase = folder / ("portal" if contrast else "native")
        files[contrast] = _write_series(phase, voxels, seed, contrast=contrast)
    study, native, portal = (_uid(seed, shape, name) for name in ("study", "native", "portal"))
    return PhantomStudy(_patient_id(seed), study, native, portal, files[False], files[True], landmarks(body, seed))


def draw(body: Anatomy, *, contrast: bool, shape: Shape, displaced: bool | None = None) -> Array:
    """Draw one phase free of noise.

    Parameters
    ----------
    contrast
        Portal venous, else native.
    displaced
        Organs where the fixed phase has them (True) or at rest as in the moving one (False); by default as in the
        study, where native is fixed. Portal venous at fixed positions is what a perfect registration would make.

    Returns
    -------
    (Z, Y, X), HU.
    """
    displaced = not contrast if displaced is None else displaced
    spacing = np.divide(FIELD_OF_VIEW_MM, shape)
    z, y, x = ((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True))
    edge_mm = float(spacing.mean())
    reach = np.array([4.0, 9.0, EXCURSION_MM + 1]) + 2 * edge_mm  # a displaced tissue is this near to its place at rest

    def draw_slab(slab: slice) -> Array:
        where: list[Array] = [
            np.ascontiguousarray(c, np.float32) for c in np.broadcast_arrays(x, y[:, None], z[slab, None, None])
        ]
        if displaced:
            where = [c + d for c, d in zip(where, _displacement(*where), strict=True)]

        def locate(low: anatomy.Point, high: anatomy.Point) -> tuple[slice, ...]:
            axes = zip((z[slab], y, x), np.subtract(low, reach)[::-1], np.add(high, reach)[::-1], strict=True)
            return tuple(slice(*np.searchsorted(axis, (a, b))) for axis, a, b in axes)

        return body.hounsfield(*where, contrast=contrast, edge_mm=edge_mm, locate=locate)

    with ThreadPoolExecutor(2) as pool:
        return np.concatenate(list(pool.map(draw_slab, (slice(k, k + 16) for k in range(0, shape[0], 16)))))


def true_displacement(points_mm: Points) -> Points:
    """Where points of the fixed phase go: x_moving - x_fixed.

    Parameters
    ----------
    points_mm
        (..., 3), LPS mm, in the fixed phase.

    Returns
    -------
    (..., 3), mm. det J of the map is above 0.5 everywhere.
    """
    return np.stack(_displacement(*np.moveaxis(np.asarray(points_mm, np.float64), -1, 0)), axis=-1)


def landmarks(body: Anatomy, seed: int) -> Points:
    """Points of the fixed phase that an eye could find in both: on organ borders, and where vessels fork.

    Chosen at rest with no regard to the motion: along random rays from within each organ the first place where its
    surface is and at least 10 HU change within 3 mm in both phases, 40 HU in one.

    Returns
    -------
    (n, 3), LPS mm, n at least 300.
    """
    rng = np.random.default_rng((seed, 7))
    found = [_borders(body, group, quota, rng) for group, quota in BORDERS.items()]
    found += [_forks(body, group, quota, rng) for group, quota in FORKS.items()]
    return fixed_positions(np.concatenate(found))


def fixed_positions(points_mm: Points) -> Points:
    """Where points of the moving phase lie in the fixed one: inverse of x + displacement(x), to a micrometre."""
    fixed = points_mm.copy()
    for _ in range(200):
        residual = fixed + true_displacement(fixed) - points_mm
        if np.abs(residual).max() < 1e-3:
            return fixed
        fixed -= residual
    raise ArithmeticError(f"inverse of the breathing motion: residual {np.abs(residual).max():.4f} mm after 200 steps")


def _displacement(x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
    """Components (x, y, z) of x_moving - x_fixed: breathing in pushes the organs to the feet and the belly forward.

    Nothing moves at the wall of the chest and at the spine; in place of a true sliding there the motion fades over
    some 65 mm.
    """
    height = np.exp(-(((z - 75) / (95 + 5 * np.sign(75 - z))) ** 2))
    from_wall = _smooth_step(-anatomy.cavity(x, y, z) / FADE_MM)
    from_spine = _smooth_step((np.hypot(x / 48, (y - 68) / 42) - 0.6) / 0.9)
    free = height * from_wall * from_spine
    belly = np.exp(-(((z + 60) / 90) ** 2)) * _smooth_step((50 - y) / 150)
    return 2 * free * np.sin(x / 60), -6 * belly, -EXCURSION_MM * free * (1 - 0.15 / (1 + np.exp(-x / 30)))


def _smooth_step(t: Array) -> Array:
    """0 below 0, 1 above 1, between them a quintic with two continuous derivatives."""
    t = np.clip(t, 0, 1)
    return np.asarray(t * t * t * (t * (6 * t - 15) + 10))


def _borders(body: Anatomy, group: str, quota: int, rng: np.random.Generator) -> Points:
    """Visible points on the surfaces of a group, along random rays from random points inside, at rest."""
    tissues = [tissue for tissue in body.tissues if tissue.group == group]
    surfaces, headings = [], []
    for _ in range(30):
        tissue = tissues[rng.integers(len(tissues))]
        start = rng.uniform(tissue.low, tissue.high, (12, 1, 3))
        heading = rng.normal(size=(12, 1, 3))
        heading /= np.linalg.norm(heading, axis=-1, keepdims=True)
        distance = tissue.distance(*_components(start + np.arange(160.0)[:, None] * heading))
        out = np.argmax(distance > 0, axis=1)
        ray = np.flatnonzero((distance[:, 0] < 0) & (out > 0))
        inner, outer = distance[ray, out[ray] - 1], distance[ray, out[ray]]
        reach = out[ray] - 1 + inner / (inner - outer)
        surfaces.append(start[ray, 0] + heading[ray, 0] * reach[:, None])
        headings.append(heading[ray, 0])
    surface, heading = np.concatenate(surfaces), np.concatenate(headings)
    across = _components(np.stack([surface - 3 * heading, surface + 3 * heading]))
    native, portal = (
        np.abs(np.diff(body.hounsfield(*across, contrast=contrast, edge_mm=1), axis=0)[0]) for contrast in (False, True)
    )
    visible = (np.minimum(native, portal) > 10) & (np.maximum(native, portal) > 40)
    return np.asarray(surface[visible & _well_inside(surface)][:quota])


def _forks(body: Anatomy, group: str, quota: int, rng: np.random.Generator) -> Points:
    """Places where vessels of a group fork, at rest."""
    pieces = [tissue for tissue in body.tissues if tissue.group == group and tissue.fork]
    forks = np.array([t.fork for t in pieces if t.distance(*_components(np.array([t.fork])))[0] < 0])
    return rng.permutation(forks[_well_inside(forks)])[:quota]


def _components(points_mm: Points) -> list[Array]:
    return [np.asarray(c, np.float32) for c in np.moveaxis(points_mm, -1, 0)]


def _well_inside(points_mm: Points) -> npt.NDArray[np.bool_]:
    """Whether points at rest are in view in both phases."""
    half = np.array(FIELD_OF_VIEW_MM[::-1]) / 2 - (4, 10, EXCURSION_MM)
    return np.asarray((np.abs(points_mm) < half).all(axis=-1))


def _write_series(folder: Path, voxels: Array, seed: int, *, contrast: bool) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.clip(np.rint(voxels) + 1024, 0, 4095).astype("<u2")
    files = []
    for k, plane in enumerate(stored):
        path = folder / f"{k + 1:04d}.dcm"
        _ct_slice(plane, k, voxels.shape, seed, contrast=contrast).save_as(path, enforce_file_format=True)
        files.append(path)
    return tuple(files)


def _ct_slice(plane: npt.NDArray[np.uint16], k: int, shape: Shape, seed: int, *, contrast: bool) -> Dataset:
    """One CT Image, PS3.3 A.3."""
    phase = "portal" if contrast else "native"
    time = "101500" if contrast else "101000"
    thickness, *in_plane = np.divide(FIELD_OF_VIEW_MM, shape).tolist()
    z, y, x = (-(n - 1) / 2 * mm for n, mm in zip(shape, (thickness, *in_plane), strict=True))
    ct = Dataset()
    ct.file_meta = FileMetaDataset()
    ct.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ct.file_meta.MediaStorageSOPClassUID = ct.SOPClassUID = CTImageStorage
    ct.file_meta.MediaStorageSOPInstanceUID = ct.SOPInstanceUID = UID(_uid(seed, shape, phase, k))
    values: dict[str, object] = {
        # patient and study
        "PatientName": "PHANTOM^BODY", "PatientID": _patient_id(seed), "PatientBirthDate": "19600101",
        "PatientSex": "O", "StudyInstanceUID": _uid(seed, shape, "study"), "StudyID": "1", "StudyDate": "20260105",
        "StudyTime": "100000", "AccessionNumber": "", "ReferringPhysicianName": "",
        "StudyDescription": "CT abdomen two phases",
        # series and frame of reference
        "Modality": "CT", "SeriesInstanceUID": _uid(seed, shape, phase), "SeriesNumber": 3 if contrast else 2,
        "SeriesDate": "20260105", "SeriesTime": time, "BodyPartExamined": "ABDOMEN", "PatientPosition": "HFS",
        "SeriesDescription": f"{'Portal venous' if contrast else 'Native'} {thickness:.1f}",
        "ProtocolName": "Abdomen two phases", "PositionReferenceIndicator": "",
        "FrameOfReferenceUID": _uid(seed, shape, "frame of reference"),
        # equipment
        "Manufacturer": "dicomnode", "ManufacturerModelName": "Generated phantom", "SoftwareVersions": "1",
        # image and plane
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "InstanceNumber": k + 1,
        "AcquisitionNumber": 2 if contrast else 1,
        "AcquisitionDate": "20260105", "AcquisitionTime": time, "ContentDate": "20260105", "ContentTime": time,
        "ImagePositionPatient": _decimals(x, y, z + k * thickness),
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": _decimals(*in_plane),
        "SliceThickness": _decimals(thickness),
        "SpacingBetweenSlices": _decimals(thickness), "SliceLocation": _decimals(z + k * thickness),
        # CT
        "KVP": 120, "ConvolutionKernel": "B30f", "RescaleIntercept": -1024, "RescaleSlope": 1, "RescaleType": "HU",
        "WindowCenter": 50, "WindowWidth": 400,
        # pixels
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": shape[1], "Columns": shape[2],
        "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "PixelData": plane.tobytes(),
    }  # fmt: skip
    if contrast:
        values |= {"ContrastBolusAgent": "Iodine 350", "ContrastBolusVolume": 100, "ContrastBolusStartTime": "101350"}
    for keyword, value in values.items():
        setattr(ct, keyword, value)
    return ct


def _decimals(*values: float) -> list[str]:
    """Decimal Strings have at most 16 characters, PS3.5 6.2."""
    return [f"{value:.10g}" for value in values]


def _patient_id(seed: int) -> str:
    return f"PHANTOM-{seed}"


def _uid(seed: int, shape: Shape, *names: object) -> str:
    """The same for the same phantom: PS3.5 B.2, a UUID under 2.25."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'dicomnode phantom {seed} {shape} {names}').int}"

"""Small synthetic DICOM series with known geometry and known shifts; no file, no download, the same at every call."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, PositronEmissionTomographyImageStorage
from pydicom.valuerep import DSfloat

SHAPE = (20, 48, 56)
SPACING_MM = (5.0, 4.0, 4.0)

# (center LPS mm, half axes mm, CT HU, MR units, what contrast agent adds); drawn in this order, later ones on top.
# The right-left, front-back and head-foot mirror images of this body all differ from it.
_ORGANS = (
    ((0, 0, 0), (95, 70, 400), 40.0, 300.0, {}),  # body
    ((-40, -8, 2), (42, 40, 38), 60.0, 450.0, {"arterial": 20.0, "portal": 60.0}),  # liver
    ((50, 15, 14), (20, 22, 26), 50.0, 250.0, {"arterial": 60.0, "portal": 70.0}),  # spleen
    ((8, 22, 0), (9, 9, 400), 45.0, 120.0, {"arterial": 260.0, "portal": 110.0}),  # aorta
    ((-32, -14, 10), (7, 26, 7), 45.0, 160.0, {"arterial": 30.0, "portal": 130.0}),  # hepatic vessel
    ((0, 48, 0), (18, 16, 400), 420.0, 150.0, {}),  # spine
    ((-20, 5, 60), (45, 45, 28), -750.0, 40.0, {}),  # base of the right lung
)
_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
POSITIONS = {
    "HFS": np.eye(3),
    "FFP": np.diag([1.0, -1.0, -1.0]),
    "HFDL": np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
}
"""How the gantry's axes (right, down, in) lie in the patient, LPS columns, PS3.3 C.7.3.1.1.2."""
_OBLIQUE = (math.cos(0.35), math.sin(0.35), 0.0, -math.sin(0.35) * 0.8, math.cos(0.35) * 0.8, 0.6)


def make_series(
    *,
    modality: str = "CT",
    phase: str = "native",
    shift_mm: Sequence[float] = (0.0, 0.0, 0.0),
    shape: tuple[int, int, int] = SHAPE,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    oblique: bool = False,
    position: str = "HFS",
    patient_id: str = "PHANTOM",
    study: str = "study",
    frame_of_reference: str | None = None,
    seed: int = 0,
    header: Mapping[str, Any] | None = None,
) -> list[FileDataset]:
    """One axial (or oblique) single-frame CT, MR or PET series, in the order of its slices.

    Parameters
    ----------
    modality
        CT (signed 16 bit, slope 1, intercept -1024), MR (unsigned 12 bit, no rescale) or PT (Bq/ml, unsigned 16 bit,
        a slope of its own in each slice).
    phase
        native, arterial or portal: what contrast agent brightens, and what the header says of it.
    shift_mm
        The body lies this much further along LPS (x, y, z), so x_moving = x_fixed + shift_mm.
    shape, spacing_mm
        (slices, rows, columns) and their distances.
    position
        HFS, FFP or HFDL: the planes turn with the patient, who stays where LPS has him.
    patient_id, study, frame_of_reference
        Names that UIDs are made from: equal names give equal UIDs. `frame_of_reference` defaults to the study's.
    seed
        Of the noise.
    header
        Elements to set on every instance, by keyword; None removes the element.
    """
    affine = _affine(shape, spacing_mm, oblique, position)
    stored = _stored(modality, _body(shape, affine, modality, phase, shift_mm, seed))
    identity = (modality, phase, tuple(shift_mm), shape, spacing_mm, oblique, position, patient_id, study, seed)
    series_uid = make_uid("series", *identity, frame_of_reference, sorted((header or {}).items(), key=str))
    datasets = []
    for k in range(shape[0]):
        dataset = _template(modality, phase)
        dataset.PatientID = patient_id
        dataset.StudyInstanceUID = make_uid("study", patient_id, study)
        dataset.StudyID = study[:16]
        dataset.SeriesInstanceUID = series_uid
        dataset.FrameOfReferenceUID = make_uid("for", patient_id, frame_of_reference or study)
        dataset.SOPInstanceUID = make_uid(series_uid, k)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = k + 1
        dataset.Rows, dataset.Columns = shape[1:]
        dataset.PixelSpacing = list(spacing_mm[1:])
        dataset.SliceThickness = spacing_mm[0]
        if modality == "MR":
            dataset.SpacingBetweenSlices = spacing_mm[0]
        dataset.PatientPosition = position
        directions = affine[:3, :3] / spacing_mm
        dataset.ImageOrientationPatient = [_ds(v) for v in (*directions[:, 2], *directions[:, 1])]
        dataset.ImagePositionPatient = [_ds(v) for v in affine[:3] @ [k, 0, 0, 1]]
        if modality == "PT":
            dataset.RescaleSlope = _slope(k)
            dataset.ImageIndex, dataset.NumberOfSlices = k + 1, shape[0]
            dataset.RadiopharmaceuticalInformationSequence = [_radiopharmaceutical()]
            dataset.PatientOrientationCodeSequence = [_coded("102538003", "SCT", "recumbent")]
            dataset.PatientOrientationCodeSequence[0].PatientOrientationModifierCodeSequence = [
                _coded("40199007", "SCT", "supine")
            ]
            dataset.PatientGantryRelationshipCodeSequence = [_coded("102540008", "SCT", "headfirst")]
        dataset.PixelData = stored[k].tobytes()
        for keyword, value in (header or {}).items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        datasets.append(dataset)
    return datasets


def make_pair(
    *, modality: str = "CT", shift_mm: Sequence[float] = (6.0, -4.0, 5.0), same_study: bool = True, **both: Any
) -> tuple[list[FileDataset], list[FileDataset]]:
    """(fixed, moving): native and arterial phase, the moving body `shift_mm` away; `both` goes to `make_series`."""
    fixed = make_series(modality=modality, phase="native", seed=1, **both)
    both.setdefault("study", "study" if same_study else "later study")
    moving = make_series(modality=modality, phase="arterial", shift_mm=shift_mm, seed=2, **both)
    return fixed, moving


def write_series(datasets: Sequence[FileDataset], folder: Path) -> list[Path]:
    """Write each instance as a DICOM file; paths in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04d}.dcm" for number, _ in enumerate(datasets, start=1)]
    for dataset, path in zip(datasets, paths, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def make_uid(*parts: object) -> str:
    """A UID that depends on nothing but its parts."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, repr(parts)).int}"


def _affine(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], oblique: bool, position: str
) -> npt.NDArray[np.float64]:
    """(k, j, i, 1) → LPS mm, with the volume's center at the origin."""
    row, column = np.reshape(_OBLIQUE if oblique else (1, 0, 0, 0, 1, 0), (2, 3)) @ POSITIONS[position].T
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([np.cross(row, column), column, row]) * spacing_mm
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def _body(
    shape: tuple[int, int, int],
    affine: npt.NDArray[np.float64],
    modality: str,
    phase: str,
    shift_mm: Sequence[float],
    seed: int,
) -> npt.NDArray[np.float64]:
    """(slices, rows, columns): HU or MR units, with soft organ borders and a little noise."""
    index = np.moveaxis(np.indices(shape), 0, -1)
    points = index @ affine[:3, :3].T + affine[:3, 3] - np.asarray(shift_mm)
    values = np.full(shape, -1000.0 if modality == "CT" else 0.0)
    for center, half_axes, hounsfield, mr, contrast in _ORGANS:
        target = (hounsfield if modality == "CT" else mr) + contrast.get(phase, 0.0)
        radius = np.linalg.norm((points - center) / half_axes, axis=-1)
        inside = 1 / (1 + np.exp(np.clip((radius - 1) * min(half_axes) / 1.5, -50, 50)))
        values += inside * (target - values)
    return values + np.random.default_rng(seed).normal(0, 4, shape)


def _stored(modality: str, values: npt.NDArray[np.float64]) -> npt.NDArray[np.generic]:
    if modality == "CT":
        return np.clip(np.rint(values + 1024), 0, 4095).astype("<i2")
    if modality == "PT":
        slopes = np.array([_slope(k) for k in range(len(values))])[:, None, None]
        return np.clip(np.rint(values * 20 / slopes), 0, 32767).astype("<u2")
    return np.clip(np.rint(values), 0, 4095).astype("<u2")


def _slope(k: int) -> float:
    """Bq/ml per stored unit of a PET slice."""
    return 0.5 + 0.01 * (k % 5)


def _template(modality: str, phase: str) -> FileDataset:
    """Everything that does not depend on the slice: a header that dciodvfy accepts."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = _CLASSES[modality]
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    for keyword, value in {**_COMMON, **_OF_MODALITY[modality], **_phase(phase)}.items():
        setattr(dataset, keyword, value)
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    return dataset


def _phase(phase: str) -> dict[str, Any]:
    """What the header says about contrast agent: none, or given at 09:30:00 and imaged some seconds later."""
    if phase == "native":
        return {"SeriesDescription": "Abdomen native", "SeriesNumber": 2, "AcquisitionTime": "092000"}
    number, time = {"arterial": (3, "093030"), "portal": (4, "093110")}[phase]
    return {
        "SeriesDescription": f"Abdomen {phase}",
        "SeriesNumber": number,
        "AcquisitionTime": time,
        "ContrastBolusAgent": "Iomeprol",
        "ContrastBolusStartTime": "093000",
        "ContrastBolusVolume": 100,
    }


def _radiopharmaceutical() -> Dataset:
    made = Dataset()
    made.Radiopharmaceutical = "FDG"
    made.RadionuclideCodeSequence = [_coded("77004003", "SCT", "^18^Fluorine")]
    return made


def _coded(value: str, scheme: str, meaning: str) -> Dataset:
    made = Dataset()
    made.CodeValue, made.CodingSchemeDesignator, made.CodeMeaning = value, scheme, meaning
    return made


def _ds(value: float) -> DSfloat:
    return DSfloat(float(value), auto_format=True)


_COMMON: dict[str, Any] = {
    "SpecificCharacterSet": "ISO_IR 192",
    "InstanceCreationDate": "20250102",
    "InstanceCreationTime": "094000",
    "StudyDate": "20250102",
    "SeriesDate": "20250102",
    "AcquisitionDate": "20250102",
    "ContentDate": "20250102",
    "StudyTime": "091000",
    "SeriesTime": "091500",
    "ContentTime": "094000",
    "AccessionNumber": "A1",
    "Manufacturer": "Phantom Works",
    "ManufacturerModelName": "Phantom",
    "DeviceSerialNumber": "1",
    "SoftwareVersions": "1",
    "ReferringPhysicianName": "Referrer^Rita",
    "StudyDescription": "Abdomen",
    "PatientName": "Phantom^Pat",
    "PatientBirthDate": "19700101",
    "PatientSex": "O",
    "BodyPartExamined": "ABDOMEN",
    "PatientPosition": "HFS",
    "AcquisitionNumber": 1,
    "PositionReferenceIndicator": "",
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
}
_CT: dict[str, Any] = {
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "Modality": "CT",
    "KVP": 120,
    "ConvolutionKernel": "B30f",
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 1,
    "RescaleIntercept": -1024,
    "RescaleSlope": 1,
    "RescaleType": "HU",
    "WindowCenter": 50,
    "WindowWidth": 400,
}
_MR: dict[str, Any] = {
    "ImageType": ["ORIGINAL", "PRIMARY", "M"],
    "Modality": "MR",
    "ScanningSequence": "GR",
    "SequenceVariant": "SP",
    "ScanOptions": "",
    "MRAcquisitionType": "3D",
    "SequenceName": "*fl3d1",
    "RepetitionTime": 4,
    "EchoTime": 2,
    "EchoTrainLength": 1,
    "FlipAngle": 10,
    "MagneticFieldStrength": 3,
    "BitsStored": 12,
    "HighBit": 11,
    "PixelRepresentation": 0,
    "WindowCenter": 300,
    "WindowWidth": 600,
}
_PT: dict[str, Any] = {
    "ImageType": ["ORIGINAL", "PRIMARY"],
    "Modality": "PT",
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 0,
    "RescaleIntercept": 0,
    "WindowCenter": 4000,
    "WindowWidth": 8000,
    "Units": "BQML",
    "CountsSource": "EMISSION",
    "SeriesType": ["WHOLE BODY", "IMAGE"],
    "CorrectedImage": ["DECY", "ATTN", "SCAT"],
    "DecayCorrection": "START",
    "CollimatorType": "NONE",
    "ReconstructionMethod": "OSEM",
    "FrameReferenceTime": 0,
    "ActualFrameDuration": 120000,
    "DecayFactor": 1.01,
}
_OF_MODALITY = {"CT": _CT, "MR": _MR, "PT": _PT}


def as_plain(dataset: Dataset) -> Dataset:
    """A copy without file meta information, as an association carries it."""
    plain = Dataset()
    plain.update(dataset)
    return plain

"""What a registered series takes over from the moving one, and how it says what was done to it."""

from __future__ import annotations

from pydicom import Dataset

from dicomnode.objects.common import Subject, code, pair_description
from dicomnode.objects.texts import ascii_text

# From the moving instance, beside group 0018 less MOVING_GRID: what was imaged, by whom, with what
KEPT = (
    "ImageType",
    "AcquisitionDate",
    "AcquisitionTime",
    "AcquisitionDateTime",
    "Modality",
    "Manufacturer",
    "InstitutionName",
    "InstitutionAddress",
    "StationName",
    "InstitutionalDepartmentName",
    "PerformingPhysicianName",
    "OperatorsName",
    "ManufacturerModelName",
    "AnatomicRegionSequence",
    "IrradiationEventUID",
    "AcquisitionNumber",
    "Laterality",
    "ImageLaterality",
    "TemporalPositionIdentifier",
    "NumberOfTemporalPositions",
    "PhotometricInterpretation",
    # PET Series, Isotope and Image modules, PS3.3 C.8.9
    "Units",
    "CountsSource",
    "SeriesType",
    "CorrectedImage",
    "DecayCorrection",
    "RandomsCorrectionMethod",
    "AttenuationCorrectionMethod",
    "ScatterCorrectionMethod",
    "ReconstructionMethod",
    "RadiopharmaceuticalInformationSequence",
    "FrameReferenceTime",
    "DecayFactor",
    "DoseCalibrationFactor",
)
WINDOW = ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "VOILUTFunction")
# Of group 0018: true of the moving grid only
MOVING_GRID = (
    "SliceThickness",
    "SpacingBetweenSlices",
    "PatientPosition",
    "GantryDetectorTilt",
    "TableHeight",
    "ReconstructionDiameter",
    "InPlanePhaseEncodingDirection",
    "AcquisitionMatrix",
    "DataCollectionCenterPatient",
    "ReconstructionTargetCenterPatient",
    "TablePosition",
)


def derivation(subject: Subject) -> tuple[str, list[Dataset]]:
    """Derivation Description and the items of Derivation Code Sequence, CID 7203."""
    onto = "on the fixed grid"
    if subject.resolution == "moving":
        onto = "with the moving voxel size in the fixed volume's box"
    text = f"{pair_description(subject)}: resampled once, linearly, {onto} by the total displacement field."
    if subject.warning:
        text += f" WARNING: {subject.warning}"
    codes = [code("113085", "Spatial resampling")]
    if subject.is_deformable:
        codes.append(code("125027", "Deformed for Registration"))
    return ascii_text(text)[:1024], codes

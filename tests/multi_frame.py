"""Single-frame series made into one multi-frame instance, for tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pydicom import Dataset
from pydicom.dataset import FileDataset
from pydicom.uid import UID, EnhancedCTImageStorage, EnhancedMRImageStorage, EnhancedPETImageStorage


def item(**elements: Any) -> Dataset:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def enhanced(series: Sequence[FileDataset], sop_class: UID, *, of_frame: Sequence[dict[str, Any]]) -> FileDataset:
    """One multi-frame instance of a single-frame series; `of_frame` adds functional groups frame by frame."""
    made = copy.deepcopy(series[0])
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = sop_class
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope",
                    "RescaleIntercept", "InstanceNumber", "AcquisitionNumber", "SliceThickness"):  # fmt: skip
        if keyword in made:
            delattr(made, keyword)
    made.NumberOfFrames = len(series)
    first = series[0]
    made.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=first.PixelSpacing, SliceThickness=5)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=first.ImageOrientationPatient)],
        )
    ]
    made.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=dataset.ImagePositionPatient)],
            PixelValueTransformationSequence=[
                item(RescaleSlope=dataset.get("RescaleSlope", 1), RescaleIntercept=dataset.get("RescaleIntercept", 0))
            ],
            **more,
        )
        for dataset, more in zip(series, of_frame, strict=True)
    ]
    made.PixelData = b"".join(dataset.PixelData for dataset in series)
    return made


def well_formed(series: Sequence[FileDataset]) -> FileDataset:
    """One Enhanced CT, MR or PET instance of a phantom's series, with the modules that its IOD asks for."""
    modality = str(series[0].Modality)
    ascending = sorted(series, key=lambda dataset: int(dataset.InstanceNumber))
    groups = [
        {
            "FrameContentSequence": [
                item(
                    FrameReferenceDateTime=f"20250102{dataset.AcquisitionTime}",
                    FrameAcquisitionDateTime=f"20250102{dataset.AcquisitionTime}",
                    FrameAcquisitionDuration=100.0,
                    FrameAcquisitionNumber=1,
                    StackID="1",
                    InStackPositionNumber=number,
                    DimensionIndexValues=[1, number],
                )
            ],
            "PixelValueTransformationSequence": [
                item(
                    RescaleSlope=dataset.get("RescaleSlope", 1),
                    RescaleIntercept=dataset.get("RescaleIntercept", 0),
                    RescaleType=dataset.get("RescaleType", "US"),
                )
            ],
        }
        for number, dataset in enumerate(ascending, start=1)
    ]
    made = enhanced(ascending, _ENHANCED_CLASSES[modality], of_frame=[{}] * len(series))
    for keyword in _SINGLE_FRAME_ONLY:
        if keyword in made:
            delattr(made, keyword)
    shared = made.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence[0].SpacingBetweenSlices = shared.PixelMeasuresSequence[0].SliceThickness = series[
        0
    ].SliceThickness
    shared.FrameVOILUTSequence = [item(WindowCenter=series[0].WindowCenter, WindowWidth=series[0].WindowWidth)]
    shared.FrameAnatomySequence = [item(AnatomicRegionSequence=[_code("818981001", "Abdomen")], FrameLaterality="U")]
    for keyword, groups_of in _shared_groups(modality).items():
        setattr(shared, keyword, groups_of)
    for own, group in zip(made.PerFrameFunctionalGroupsSequence, groups, strict=True):
        for keyword, value in group.items():
            setattr(own, keyword, value)
    made.InstanceNumber = 1
    made.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    made.DimensionOrganizationSequence = [item(DimensionOrganizationUID="1.2.3.4")]
    made.DimensionIndexSequence = [
        item(DimensionOrganizationUID="1.2.3.4", DimensionIndexPointer=tag, FunctionalGroupPointer=0x00209111)
        for tag in (0x00209056, 0x00209057)
    ]
    for keyword, value in {**_ENHANCED_COMMON, **_ENHANCED_MODULES[modality]}.items():
        setattr(made, keyword, value)
    return made


def _code(value: str, meaning: str) -> Dataset:
    return item(CodeValue=value, CodingSchemeDesignator="SCT", CodeMeaning=meaning)


def _shared_groups(modality: str) -> dict[str, list[Dataset]]:
    """The functional groups that the IOD of the modality makes mandatory for an original image."""
    kind = item(
        FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        PixelPresentation="MONOCHROME",
        VolumetricProperties="VOLUME",
        VolumeBasedCalculationTechnique="NONE",
    )
    if modality == "CT":
        return {"CTImageFrameTypeSequence": [kind], **{name: [item(**of)] for name, of in _CT_GROUPS.items()}}
    if modality == "PT":
        return {"PETFrameTypeSequence": [kind], **{name: [item(**of)] for name, of in _PET_GROUPS.items()}}
    kind.ComplexImageComponent, kind.AcquisitionContrast = "MAGNITUDE", "T1"
    return {"MRImageFrameTypeSequence": [kind], **{name: [item(**of)] for name, of in _MR_GROUPS.items()}}


_CT_GROUPS: dict[str, dict[str, Any]] = {
    "IrradiationEventIdentificationSequence": {"IrradiationEventUID": "1.2.3.5"},
    "CTAcquisitionTypeSequence": {
        "AcquisitionType": "SPIRAL", "TubeAngle": 0.0, "ConstantVolumeFlag": "NO", "FluoroscopyFlag": "NO",
    },
    "CTAcquisitionDetailsSequence": {
        "RotationDirection": "CW", "RevolutionTime": 0.5, "SingleCollimationWidth": 0.6, "TotalCollimationWidth": 38.4,
        "TableHeight": 100, "GantryDetectorTilt": 0, "DataCollectionDiameter": 500,
    },
    "CTTableDynamicsSequence": {"TableSpeed": 40.0, "TableFeedPerRotation": 20.0, "SpiralPitchFactor": 0.5},
    "CTPositionSequence": {
        "TablePosition": 1.0, "DataCollectionCenterPatient": [0.0, 0.0, 0.0],
        "ReconstructionTargetCenterPatient": [0.0, 0.0, 0.0],
    },
    "CTGeometrySequence": {"DistanceSourceToDetector": 1000, "DistanceSourceToDataCollectionCenter": 500},
    "CTReconstructionSequence": {
        "ReconstructionAlgorithm": "FILTER_BACK_PROJ", "ConvolutionKernel": "B30f", "ConvolutionKernelGroup": "BRAIN",
        "ReconstructionDiameter": 300, "ReconstructionPixelSpacing": [4.0, 4.0], "ReconstructionAngle": 180.0,
        "ImageFilter": "NONE",
    },
    "CTExposureSequence": {
        "ExposureTimeInms": 500.0, "XRayTubeCurrentInmA": 200.0, "ExposureInmAs": 100.0,
        "ExposureModulationType": "NONE", "CTDIvol": 10.0,
    },
    "CTXRayDetailsSequence": {
        "KVP": 120, "FocalSpots": 1.2, "FilterType": "NONE", "CalciumScoringMassFactorPatient": 1.0,
    },
}  # fmt: skip
_MR_GROUPS: dict[str, dict[str, Any]] = {
    "MRTimingAndRelatedParametersSequence": {
        "RepetitionTime": 4, "FlipAngle": 10, "EchoTrainLength": 1, "RFEchoTrainLength": 0,
        "GradientEchoTrainLength": 1,
    },
    "MRFOVGeometrySequence": {
        "InPlanePhaseEncodingDirection": "ROW", "MRAcquisitionFrequencyEncodingSteps": 20,
        "MRAcquisitionPhaseEncodingStepsInPlane": 16, "MRAcquisitionPhaseEncodingStepsOutOfPlane": 6,
        "PercentSampling": 100, "PercentPhaseFieldOfView": 100,
    },
    "MREchoSequence": {"EffectiveEchoTime": 2.0},
    "MRModifierSequence": {
        "InversionRecovery": "NO", "FlowCompensation": "NONE", "Spoiling": "RF", "T2Preparation": "NO",
        "SpectrallySelectedExcitation": "NONE", "SpatialPresaturation": "NONE", "PartialFourier": "NO",
        "ParallelAcquisition": "NO",
    },
    "MRImagingModifierSequence": {
        "MagnetizationTransfer": "NONE", "BloodSignalNulling": "NO", "Tagging": "NONE", "TransmitterFrequency": 123.2,
        "PixelBandwidth": 200,
    },
    "MRReceiveCoilSequence": {
        "ReceiveCoilName": "BODY", "ReceiveCoilManufacturerName": "", "ReceiveCoilType": "BODY",
        "QuadratureReceiveCoil": "YES",
    },
    "MRTransmitCoilSequence": {
        "TransmitCoilName": "BODY", "TransmitCoilManufacturerName": "", "TransmitCoilType": "BODY",
    },
    "MRAveragesSequence": {"NumberOfAverages": 1},
}  # fmt: skip
_PET_GROUPS: dict[str, dict[str, Any]] = {
    "RadiopharmaceuticalUsageSequence": {"RadiopharmaceuticalAgentNumber": 1},
    "PETFrameAcquisitionSequence": {"TableHeight": 100, "GantryDetectorTilt": 0, "DataCollectionDiameter": 500},
    "PETDetectorMotionDetailsSequence": {"RotationDirection": "CW", "RevolutionTime": 0.5},
    "PETPositionSequence": {"TablePosition": 1.0},
    "PETFrameCorrectionFactorsSequence": {"PrimaryPromptsCountsAccumulated": 1000, "ScatterFractionFactor": 0.1},
    "PETReconstructionSequence": {"ReconstructionAlgorithm": "FILTER_BACK_PROJ", "ReconstructionDiameter": 300},
}


_ENHANCED_CLASSES = {"CT": EnhancedCTImageStorage, "MR": EnhancedMRImageStorage, "PT": EnhancedPETImageStorage}
_SINGLE_FRAME_ONLY = (
    "KVP", "ConvolutionKernel", "RescaleType", "WindowCenter", "WindowWidth", "ScanningSequence", "SequenceVariant",
    "ScanOptions", "SequenceName", "RepetitionTime", "EchoTime", "EchoTrainLength", "FlipAngle", "SpacingBetweenSlices",
    "ContrastBolusAgent", "ContrastBolusStartTime", "ContrastBolusVolume", "AcquisitionDate", "AcquisitionTime",
    "ImageIndex", "NumberOfSlices", "SeriesType", "FrameReferenceTime", "DecayFactor", "ActualFrameDuration",
    "CorrectedImage", "CollimatorType", "ReconstructionMethod", "Units", "DecayCorrection", "CountsSource",
    "PatientOrientationCodeSequence", "PatientGantryRelationshipCodeSequence",
)  # fmt: skip
_ENHANCED_COMMON: dict[str, Any] = {
    "PixelPresentation": "MONOCHROME",
    "VolumetricProperties": "VOLUME",
    "VolumeBasedCalculationTechnique": "NONE",
    "AcquisitionDateTime": "20250102093030",
    "AcquisitionDuration": 10.0,
    "ContentQualification": "RESEARCH",
    "AcquisitionContextSequence": [],
    "LossyImageCompression": "00",
    "BurnedInAnnotation": "NO",
    "PresentationLUTShape": "IDENTITY",
}
_MR_PULSE: dict[str, Any] = {
    "ResonantNucleus": "1H", "KSpaceFiltering": "NONE", "ApplicableSafetyStandardAgency": "IEC",
    "ComplexImageComponent": "MAGNITUDE", "AcquisitionContrast": "T1", "PulseSequenceName": "fl3d",
    "MRAcquisitionType": "3D", "EchoPulseSequence": "GRADIENT", "MultiPlanarExcitation": "NO", "PhaseContrast": "NO",
    "TimeOfFlightContrast": "NO", "SteadyStatePulseSequence": "NONE", "EchoPlanarPulseSequence": "NO",
    "SaturationRecovery": "NO", "SpectrallySelectedSuppression": "NONE", "OversamplingPhase": "NONE",
    "GeometryOfKSpaceTraversal": "RECTILINEAR", "SegmentedKSpaceTraversal": "SINGLE", "CoverageOfKSpace": "FULL",
    "RectilinearPhaseEncodeReordering": "LINEAR", "NumberOfKSpaceTrajectories": 1, "MagneticFieldStrength": 3,
}  # fmt: skip
_ENHANCED_MODULES: dict[str, dict[str, Any]] = {"CT": {}, "MR": _MR_PULSE, "PT": {}}

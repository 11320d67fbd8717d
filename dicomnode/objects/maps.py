"""Maps of a registration's quality: Parametric Maps, PS3.3 A.75, and the valid overlap as a Segmentation, A.51."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydicom import Dataset
from pydicom.uid import ParametricMapStorage, SegmentationStorage

from dicomnode.objects.codes import explain_codes, private_code
from dicomnode.objects.common import (
    Subject,
    code,
    identify_content,
    own_object,
    pair_description,
    set_frame_of_reference,
)
from dicomnode.objects.map_frames import index_by_segment, set_bits, set_frames
from dicomnode.quality import Map, Quality, thinned
from dicomnode.volumes import SOFTWARE_NAME

LARGEST_VOXELS = 4_000_000
"""A finer map is written thinned: 16 MB; patches and fields hold nothing finer than a few voxels."""
UNMEASURED = -1.0
"""Float Pixel Padding Value of the patch-wise NMI: outside what was measured."""


@dataclass(frozen=True)
class Quantity:
    """What a map shows: names, unit (UCUM), range that viewers begin with; None: up to the largest value."""

    label: str
    meaning: str
    number: int
    unit: tuple[str, str]
    window: tuple[float, float | None]
    of: Callable[[Quality], Map]


QUANTITIES = {
    "pmm": Quantity("PMM", "Patch-wise NMI", 4200, ("1", "no units"), (0.0, 1.0), lambda q: q.patches[1]),
    "jacobian": Quantity("JACOBIAN", "Jacobian determinant", 4300, ("1", "no units"), (0.5, 1.5), lambda q: q.jacobian),
    "displacement": Quantity(
        "DISPLACEMENT", "Displacement magnitude", 4400, ("mm", "millimeter"), (0.0, None), lambda q: q.displacement
    ),
}
"""By output name. All after registration, of the delivered field, total map."""


def parametric_map(subject: Subject, kind: str, quality: Quality) -> Dataset:
    """One quantity as 32-bit floats on the fixed grid, or on every nth of its voxels where it is large.

    Parameters
    ----------
    kind
        A name of `QUANTITIES`.
    """
    quantity = QUANTITIES[kind]
    grid, every = thinned(quality.fixed.grid, LARGEST_VOXELS)
    values = quantity.of(quality)[every]
    measured = np.isfinite(values)
    stored = np.where(measured, values, UNMEASURED).astype("<f4")
    name = private_code(quantity.label, quantity.meaning)
    dataset = own_object(
        subject,
        ParametricMapStorage,
        kind,
        modality=str(subject.fixed.first.Modality),
        number=quantity.number,
        description=f"{quantity.label} {pair_description(subject)}"[:64],
    )
    set_frame_of_reference(dataset, subject)
    identify_content(dataset, quantity.label, f"{quantity.meaning} of the registration")
    explain_codes(dataset)
    set_frames(dataset, subject, grid, name)
    dataset.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "QUANTITY"]
    dataset.ContentQualification = "RESEARCH"
    dataset.BurnedInAnnotation = dataset.RecognizableVisualFeatures = "NO"
    dataset.LossyImageCompression = "00"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.AcquisitionContextSequence = []
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 32
    low, high = quantity.window
    high = max(float(stored.max()), 1.0) if high is None else high
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.ParametricMapFrameTypeSequence = [_item(FrameType=list(dataset.ImageType))]
    shared.PixelValueTransformationSequence = [_item(RescaleIntercept=0, RescaleSlope=1, RescaleType="US")]
    shared.FrameVOILUTSequence = [_item(WindowCenter=round((low + high) / 2, 3), WindowWidth=round(high - low, 3))]
    shared.RealWorldValueMappingSequence = [_real_world(quantity, name, stored)]
    if not measured.all():
        dataset.FloatPixelPaddingValue = dataset.FloatPixelPaddingRangeLimit = UNMEASURED
    dataset.FloatPixelData = stored.tobytes()
    return dataset


def overlap_segmentation(subject: Subject, quality: Quality) -> Dataset:
    """The voxels of the fixed grid that the registered image has values for, as a binary Segmentation."""
    dataset = own_object(
        subject,
        SegmentationStorage,
        "overlap",
        modality="SEG",
        number=4500,
        description=f"OVERLAP {pair_description(subject)}"[:64],
    )
    set_frame_of_reference(dataset, subject)
    identify_content(dataset, "OVERLAP", "What the registered image reaches")
    explain_codes(dataset)
    set_frames(dataset, subject, quality.fixed.grid, code("113076", "Segmentation"))
    index_by_segment(dataset, [(1, k) for k in range(quality.fixed.grid.shape[0])])
    dataset.SegmentSequence = [
        _item(
            SegmentNumber=1,
            SegmentLabel="Valid overlap",
            SegmentDescription="Voxels of the fixed image whose place lies within the moving image",
            SegmentAlgorithmType="AUTOMATIC",
            SegmentAlgorithmName=SOFTWARE_NAME,
            SegmentedPropertyCategoryCodeSequence=[code("309825002", "Spatial and Relational Concept", "SCT")],
            SegmentedPropertyTypeCodeSequence=[private_code("OVERLAP", "Valid overlap of a registration")],
        )
    ]
    set_bits(dataset, [quality.overlap])
    return dataset


def _real_world(quantity: Quantity, name: Dataset, stored: Map) -> Dataset:
    """PS3.3 C.7.6.16.2.11: the stored float is the value. The range takes in the padding, which readers refuse else."""
    return _item(
        LUTExplanation=quantity.meaning,
        LUTLabel=quantity.label,
        MeasurementUnitsCodeSequence=[code(*quantity.unit, "UCUM")],
        DoubleFloatRealWorldValueFirstValueMapped=float(stored.min()),
        DoubleFloatRealWorldValueLastValueMapped=float(stored.max()),
        RealWorldValueIntercept=0.0,
        RealWorldValueSlope=1.0,
        QuantityDefinitionSequence=[
            _item(
                ValueType="CODE",
                ConceptNameCodeSequence=[code("246205007", "Quantity", "SCT")],
                ConceptCodeSequence=[name],
            )
        ],
    )


def _item(**elements: object) -> Dataset:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item

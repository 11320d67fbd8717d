"""Uptake curves of a dynamic series: the regions as a Segmentation, the numbers as an SR, the curves as a page.

The report is a TID 1500 with one group, TID 1411, for each region and phase: the region's segment, when the phase was
(TID 1502), and the mean intensity there before and after registration. A region has one Tracking UID in all phases, so
that readers put its curve together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from highdicom import sr
from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage

from dicomnode.objects.codes import concept, explain_codes, private_code
from dicomnode.objects.common import (
    DESCRIPTION,
    Provenance,
    SourceSeries,
    Subject,
    code,
    identify_content,
    own_object,
    series_name,
    set_frame_of_reference,
)
from dicomnode.objects.invariants import check
from dicomnode.objects.map_frames import index_by_segment, set_bits, set_frames
from dicomnode.objects.measurement_report import algorithm, report_object, write_groups
from dicomnode.objects.references import by_series, refer
from dicomnode.objects.scale import header_window, is_in_hu
from dicomnode.objects.secondary_capture import secondary_capture, words_of
from dicomnode.objects.texts import described
from dicomnode.objects.uptake_page import uptake_page
from dicomnode.uptake import EDGE_MM, WHOLE, Uptake
from dicomnode.volumes import SOFTWARE_NAME

_QUANTITIES = {
    "CT": Code("112031", "DCM", "Attenuation Coefficient"),
    "MR": Code("110852", "DCM", "MR signal intensity"),
    "PT": Code("110821", "DCM", "Nuclear Medicine Tomographic Activity"),
}
"""By modality, PS3.16 CID 7180 and its kin."""
_NO_UNITS = Code("1", "UCUM", "no units")
_PET_UNITS = {
    "BQML": Code("Bq/ml", "UCUM", "Becquerels/milliliter"),
    "CNTS": Code("{counts}", "UCUM", "Counts"),
    "GML": Code("g/ml", "UCUM", "Grams/milliliter"),
}
"""By Units (0054,1001), PS3.3 C.8.9.1.1.3."""
_MEAN = Code("373098007", "SCT", "Mean")
_BEFORE, _AFTER = concept("UNREGISTERED", "Before registration"), concept("REGISTERED", "After registration")


def uptake_objects(
    reference: SourceSeries,
    others: Sequence[SourceSeries],
    uptake: Uptake,
    *,
    provenance: Provenance,
    warning: str = "",
    store_in: str = "fixed_study",
    description: str = DESCRIPTION,
) -> Iterator[tuple[str, Dataset]]:
    """Make the Segmentation of the regions, the report and the page, in this order; the kind of all is `uptake`.

    Parameters
    ----------
    reference, others
        Of all phases, headers enough.
    warning
        About all phases; empty where there is none.
    """
    phases = SourceSeries(
        tuple(dataset for each in others for dataset in each.datasets),
        {uid: digest for each in others for uid, digest in each.digests.items()},
        reference.grid,
    )
    subject = Subject(reference, phases, provenance, is_deformable=True, warning=warning, store_in=store_in)
    name = described(description, "4D", series_name(reference))
    with disable_value_validation():
        segmentation = _segmentation(subject, uptake, f"UPTAKE {name}")
        made = [
            check(segmentation, subject),
            check(_report(subject, uptake, segmentation, f"UPTAKE {name}"), subject, also=[segmentation]),
        ]
        words = words_of(subject)
        unit = units_of(reference.first)
        picture = uptake_page(
            uptake,
            words,
            unit="HU" if unit.value == "[hnsf'U]" else unit.meaning,
            header=header_window(reference),
        )
        page = secondary_capture(subject, "uptake page", "Uptake", picture, number=4720, description=f"UPTAKE {name}")
        made.append(check(page, subject))
    for dataset in made:
        yield "uptake", dataset


def units_of(dataset: Dataset) -> Code:
    """The unit of the rescaled values."""
    if is_in_hu(dataset):
        return Code("[hnsf'U]", "UCUM", "Hounsfield unit")
    return _PET_UNITS.get(str(dataset.get("Units") or ""), _NO_UNITS)


def _segmentation(subject: Subject, uptake: Uptake, description: str) -> Dataset:
    dataset = own_object(
        subject, SegmentationStorage, "uptake", modality="SEG", number=4700, description=description[:64]
    )
    set_frame_of_reference(dataset, subject)
    identify_content(dataset, "UPTAKE", "Regions of the uptake curves")
    explain_codes(dataset)
    set_frames(dataset, subject, uptake.reference.grid, code("113076", "Segmentation"))
    where = [
        (number, int(k))
        for number, region in enumerate(uptake.regions, start=1)
        for k in np.flatnonzero(region.mask.any(axis=(1, 2)))
    ]
    index_by_segment(dataset, where)
    set_bits(dataset, [uptake.regions[number - 1].mask[k] for number, k in where])
    dataset.SegmentSequence = [_segment(number, region.name) for number, region in enumerate(uptake.regions, start=1)]
    return dataset


def _segment(number: int, name: str) -> Dataset:
    segment = Dataset()
    segment.SegmentNumber = number
    segment.SegmentLabel = name
    segment.SegmentDescription = (
        "The body that every registered phase reaches"
        if name == WHOLE
        else f"Cube of about {EDGE_MM:g} mm that takes up much, in another way than the regions before it"
    )
    segment.SegmentAlgorithmType = "AUTOMATIC"
    segment.SegmentAlgorithmName = SOFTWARE_NAME
    segment.SegmentedPropertyCategoryCodeSequence = [code("309825002", "Spatial and Relational Concept", "SCT")]
    segment.SegmentedPropertyTypeCodeSequence = [private_code("UPTAKE_REGION", "Region of an uptake curve")]
    return segment


def _report(subject: Subject, uptake: Uptake, segmentation: Dataset, description: str) -> Dataset:
    dataset = report_object(subject, "uptake report", number=4710, description=description)
    sources = [*subject.fixed.datasets, *subject.moving.datasets]
    refer(dataset, by_series([*sources, segmentation]))
    groups = [
        _group(subject, uptake, segmentation, number, phase)
        for number in range(len(uptake.regions))
        for phase in range(uptake.before.shape[1])
    ]
    write_groups(dataset, subject, [group for group in groups if group is not None])
    return dataset


def _group(
    subject: Subject, uptake: Uptake, segmentation: Dataset, number: int, phase: int
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations | None:
    """One region at one phase; None where nothing could be measured."""
    first = subject.fixed.first
    name = _QUANTITIES.get(str(first.get("Modality")), concept("INTENSITY", "Image intensity"))
    measurements = [
        sr.Measurement(
            name=name, value=float(values[number, phase]), unit=units_of(first), derivation=_MEAN, method=how
        )
        for values, how in ((uptake.before, _BEFORE), (uptake.after, _AFTER))
        if np.isfinite(values[number, phase])
    ]
    if not measurements:
        return None
    offset = None
    if uptake.seconds:
        offset = sr.LongitudinalTemporalOffsetFromEvent(
            value=uptake.seconds[phase],
            unit=Code("s", "UCUM", "second"),
            event_type=concept("FIRST_PHASE", "Beginning of the first phase"),
        )
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=subject.uid("uptake region", number), identifier=uptake.regions[number].name
        ),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=segmentation.SOPClassUID,
            sop_instance_uid=segmentation.SOPInstanceUID,
            segment_number=number + 1,
            source_series=sr.SourceSeriesForSegmentation(str(first.SeriesInstanceUID)),
        ),
        time_point_context=sr.TimePointContext(
            time_point=f"Phase {phase + 1}", time_point_order=phase + 1, temporal_offset_from_event=offset
        ),
        finding_type=concept("UPTAKE", "Uptake over time"),
        algorithm_id=algorithm(subject),
        measurements=measurements,
    )

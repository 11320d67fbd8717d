"""One 4D series of all phases: those registered as they were made, the reference with its own pixels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from pydicom import Dataset
from pydicom.config import disable_value_validation

from dicomnode.objects.common import Provenance, SourceSeries, Subject, _uid, series_name
from dicomnode.objects.deformable import sample_grid
from dicomnode.objects.invariants import check
from dicomnode.objects.mark import mark_image, marked
from dicomnode.objects.series import registered_series
from dicomnode.objects.texts import described
from dicomnode.volumes import load, stored_values
from registration_engine import Registration, Report

_OF_SERIES = (
    "SeriesNumber", "SeriesDate", "SeriesTime", "TimezoneOffsetFromUTC", "ProtocolName", "OperatorsName",
    "PerformingPhysicianName", "BodyPartExamined", "Laterality", "SeriesDescriptionCodeSequence",
    "PerformedProcedureStepID", "PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime",
    "PerformedProcedureStepDescription",
)  # fmt: skip
"""What is one within a series, PS3.3 C.7.3.1: phases come from several, registered at several times."""


def series_4d_uid(digests: Sequence[str], provenance: Provenance) -> str:
    """The Series Instance UID of the 4D series of these source instances, made in this way."""
    how = [provenance.rule_id, provenance.rule_version, provenance.preset, dict(provenance.parameters)]
    software = [provenance.software_version, provenance.model_sha256, provenance.device_class]
    return _uid(["4d series", sorted(digests), *how, *software])


def reference_phase(fixed: SourceSeries, report: Report, provenance: Provenance, *, store_in: str) -> Iterator[Dataset]:
    """The reference as a phase of the 4D series: a derived copy whose stored values are the source's, unchanged."""
    identity = Registration(
        grid=fixed.grid,
        rigid=np.eye(4),
        moving_from_fixed=np.eye(4),
        displacement=None,
        report=replace(report, folding_fraction=0.0, max_displacement_mm=0.0),
    )
    subject = Subject(fixed, fixed, provenance, is_deformable=False, store_in=store_in)
    with disable_value_validation():
        made = registered_series(subject, load(fixed.datasets), sample_grid(identity), None, may_be_multi_frame=False)
        stored = stored_values(fixed.datasets)
        for dataset, source, pixels in zip(made, fixed.datasets, stored, strict=True):
            dataset.DerivationDescription = "Reference phase of a registered dynamic series: its pixels are unchanged."
            del dataset.DerivationCodeSequence
            for keyword in ("BitsAllocated", "BitsStored", "PixelRepresentation"):
                dataset[keyword] = source[keyword]
            dataset.HighBit = dataset.BitsStored - 1  # stored values come shifted down to the lowest bits
            for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue"):
                if keyword in source:
                    dataset[keyword] = source[keyword]
                elif keyword in dataset:
                    del dataset[keyword]
            dataset.PixelData = pixels.astype(f"<{pixels.dtype.kind}{dataset.BitsAllocated // 8}").tobytes()
            yield check(dataset, subject)


def description_4d(fixed: SourceSeries, pattern: str) -> str:
    """The Series Description of the 4D series onto this reference."""
    return described(pattern, "4D", series_name(fixed))


def as_phase(
    dataset: Dataset,
    *,
    like: Dataset,
    series_uid: str,
    description: str,
    phase: int,
    phases: int,
    slices: int,
    warning: str = "",
) -> Dataset:
    """A slice of a registered series as a slice of the 4D series.

    Parameters
    ----------
    like
        A slice of the reference phase: what is one within a series is as there.
    phase
        From 0.
    warning
        About all phases.
    """
    for keyword in _OF_SERIES:
        if keyword in like:
            dataset[keyword] = copy.deepcopy(like[keyword])
        elif keyword in dataset:
            del dataset[keyword]
    dataset.SeriesInstanceUID = series_uid
    dataset.SeriesDescription = marked(description, warning)
    mark_image(dataset, warning)
    if "NumberOfSlices" in dataset:  # PET, PS3.3 C.8.9.1
        dataset.SeriesType = ["DYNAMIC", "IMAGE"]
        dataset.NumberOfTimeSlices = phases
        dataset.ImageIndex = phase * slices + int(dataset.InstanceNumber)
    dataset.TemporalPositionIdentifier = phase + 1
    dataset.NumberOfTemporalPositions = phases
    dataset.AcquisitionNumber = phase + 1
    dataset.InstanceNumber = phase * slices + int(dataset.InstanceNumber)
    return dataset
